"""vit-pytorch's MAE, SimMIM, Extractor and Dino on fastvit.ViT; Recorder names a substitute."""

from typing import Any

import pytest
import torch
from einops.layers.torch import Rearrange
from peers import close, randomize_weights
from torch import nn

import fastvit

vit_pytorch: Any = pytest.importorskip("vit_pytorch")
from vit_pytorch.dino import Dino  # noqa: E402
from vit_pytorch.extractor import Extractor  # noqa: E402
from vit_pytorch.mae import MAE  # noqa: E402
from vit_pytorch.recorder import Recorder  # noqa: E402
from vit_pytorch.simmim import SimMIM  # noqa: E402

SIZE: dict[str, Any] = dict(image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, heads=2)


def twins() -> tuple[Any, Any]:
    """vit-pytorch's ViT with the patch projection of a standard ViT, and ours with its weights."""
    theirs = vit_pytorch.ViT(**SIZE, mlp_dim=48, dim_head=16)
    patches = Rearrange("b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=8, p2=8)
    theirs.to_patch_embedding = nn.Sequential(patches, nn.Identity(), nn.Linear(192, 32))
    theirs.pos_embedding = nn.Parameter(torch.empty(1, 17, 32))
    theirs = randomize_weights(theirs)
    names = {"to_patch_embedding.2": "to_patch_embedding.1", "transformer.norm": "mlp_head.0"}
    names["mlp_head"] = "mlp_head.1"
    state = {}
    for key, tensor in theirs.state_dict().items():
        old = next((name for name in names if key.startswith(f"{name}.")), "")
        state[names.get(old, "") + key.removeprefix(old)] = tensor
    return theirs, fastvit.load_checkpoint(state, heads=2)


@pytest.mark.parametrize("wrapper", ["MAE", "SimMIM"])
def test_masked_image_modelling_is_vit_pytorchs(wrapper: str) -> None:
    """The same loss and the same gradients in the encoder, from the same random masks."""
    theirs, ours = twins()
    images = torch.randn(4, 3, 32, 32)
    losses = []
    for encoder in (theirs, ours):
        torch.manual_seed(1)
        if wrapper == "MAE":
            model: Any = MAE(encoder=encoder, decoder_dim=24, decoder_heads=2, masking_ratio=0.75)
        else:
            model = SimMIM(encoder=encoder, masking_ratio=0.5)
        torch.manual_seed(2)
        losses.append(model(images))
        losses[-1].backward()
    close("loss", losses[1], losses[0])
    kernel = theirs.to_patch_embedding[2].weight.grad.unflatten(1, (8, 8, 3)).permute(0, 3, 1, 2)
    close("patch projection", ours.patch_embed.proj.weight.grad, kernel)
    close("positions", ours.pos_embed.grad, theirs.pos_embedding.grad)
    for i, (attention, mlp) in enumerate(theirs.transformer.layers):
        block = ours.blocks[i]
        close("qkv", block.attn.qkv.weight.grad, attention.to_qkv.weight.grad)
        close("fc1", block.mlp.fc1.weight.grad, mlp.net[1].weight.grad)
    close("norm", ours.norm.weight.grad, theirs.transformer.norm.weight.grad)
    assert ours.head.weight.grad is None


def test_mae_trains_other_models_of_ours_too() -> None:
    """Mean pooling without <cls>, registers and no_embed_class: the loss falls."""
    for options in (
        {"pool": "mean", "class_token": False},
        {"no_embed_class": True, "registers": 2},
        {"registers": 2, "qkv_bias": False, "layer_scale": 1.0},
        {"image_size": 38, "crop_remainder": True},
    ):
        torch.manual_seed(0)
        arguments: dict[str, Any] = {**SIZE, "mlp_dim": 48, **options}
        encoder = fastvit.ViT(**arguments)
        mae: Any = MAE(encoder=encoder, decoder_dim=24, decoder_heads=2)
        optimizer = torch.optim.Adam(mae.parameters(), lr=1e-2)
        images = torch.randn(4, *encoder.default_cfg["input_size"])
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            losses.append(mae(images))
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.8 * losses[0]
        again = fastvit.ViT(**arguments)
        again.load_state_dict(encoder.state_dict())


def test_mae_recomputes_blocks_and_calls_hooks() -> None:
    theirs, ours = twins()
    images = torch.randn(4, 3, 32, 32)
    calls: list[str] = []
    ours.blocks[0].attn.register_forward_hook(lambda *_: calls.append("attn"))
    projection = [encoder.to_patch_embedding[-1] for encoder in (theirs, ours)]
    patches = ours.to_patch_embedding[0](images)
    expected = projection[0](patches)
    close("projection", projection[1](patches), expected)
    ours.patch_embed.proj.register_forward_hook(lambda module, args, out: 2 * out)
    close("hooked projection", projection[1](patches), 2 * expected)
    ours.set_grad_checkpointing()
    mae: Any = MAE(encoder=ours, decoder_dim=24, decoder_heads=2)
    mae(images).backward()
    assert calls == ["attn", "attn"]


def test_extractor_takes_a_block() -> None:
    theirs, ours = twins()
    images = torch.randn(2, 3, 32, 32)
    logits, tokens = Extractor(ours, layer=ours.blocks[-1])(images)
    close("logits", logits, theirs(images))
    _, expected = Extractor(theirs)(images)  # after the final norm, which a block does not apply
    close("tokens", ours.norm(tokens), expected)
    with pytest.raises(TypeError, match=r"Extractor\(model, layer=model\.blocks\[-1\]\)"):
        Extractor(ours)(images)


def test_recorder_says_what_to_use() -> None:
    theirs, ours = twins()
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(TypeError, match=r"use model\.attention_maps"):
        Recorder(ours)(images)
    _, expected = Recorder(theirs)(images)
    close("maps", ours.attention_maps(images, layers=range(2), rows="all"), expected)


def test_dino() -> None:
    """hidden_layer=-2 is the input of the head, in vit-pytorch (`to_latent`) as in ours."""
    theirs, ours = twins()
    images = torch.randn(4, 3, 32, 32)
    options: dict[str, Any] = dict(image_size=32, hidden_layer=-2, num_classes_K=16)
    options.update(projection_hidden_size=16, projection_layers=2, augment_fn=nn.Identity())
    options["augment_fn2"] = nn.Identity()
    losses, embeddings = [], []
    for net in (theirs, ours):
        torch.manual_seed(1)
        if net is theirs:
            options["hidden_layer"] = "to_latent"
        learner: Any = Dino(net, **options)
        options["hidden_layer"] = -2
        torch.manual_seed(2)
        losses.append(learner(images))
        losses[-1].backward()
        learner.update_moving_average()
        embeddings.append(learner(images, return_embedding=True)[1])
    close("embedding", embeddings[1], embeddings[0])
    close("loss", losses[1], losses[0])
    gradient = theirs.transformer.layers[0][1].net[1].weight.grad
    close("gradient", ours.blocks[0].mlp.fc1.weight.grad, gradient)
