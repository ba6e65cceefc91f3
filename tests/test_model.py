"""fastvit.ViT against timm and float64: logits, gradients, training, export, bad input."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import check
from peers import randomize_weights
from torch import Tensor, nn

import fastvit
from fastvit.errors import UsageError
from fastvit.model import Block

TINY: dict[str, Any] = dict(
    image_size=16, patch_size=4, dim=32, depth=2, heads=2, mlp_dim=64, num_classes=10
)


def tiny(**kwargs) -> fastvit.ViT:
    return fastvit.ViT(**{**TINY, **kwargs})


def timm_twin(**kwargs):
    """timm's own model and ours, with the same weights."""
    timm = pytest.importorskip("timm")
    theirs = timm.models.VisionTransformer(
        img_size=kwargs.get("image_size", 16),
        patch_size=kwargs.get("patch_size", 4),
        embed_dim=32,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        num_classes=10,
        in_chans=kwargs.get("channels", 3),
        qkv_bias=kwargs.get("qkv_bias", True),
        init_values=kwargs.get("layer_scale"),
        reg_tokens=kwargs.get("registers", 0),
        global_pool={"cls": "token", "mean": "avg"}[kwargs.get("pool", "cls")],
    )
    randomize_weights(theirs)
    ours = tiny(**kwargs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


VARIANTS = {
    "plain": {},
    "oblong": {"image_size": (8, 24), "patch_size": (2, 6)},
    "registers": {"registers": 3},
    "mean": {"pool": "mean"},
    "layer scale": {"layer_scale": 0.1},
    "five channels": {"channels": 5},
    "no qkv bias": {"qkv_bias": False},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_agrees_with_timm(variant: dict) -> None:
    theirs, ours = timm_twin(**variant)
    size = ours.patch_embed.img_size
    images = torch.randn(3, variant.get("channels", 3), *size)
    torch.testing.assert_close(
        ours.forward_features(images), theirs.forward_features(images), atol=1e-5, rtol=1e-5
    )
    tokens = ours.forward_features(images)
    for pre_logits in (False, True):
        torch.testing.assert_close(
            ours.forward_head(tokens, pre_logits=pre_logits),
            theirs.forward_head(tokens, pre_logits=pre_logits),
        )
    labels = torch.tensor([1, 2, 3])
    for model in (theirs, ours):
        F.cross_entropy(model(images), labels).backward()
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)
    grads = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(grads[name].grad, parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_224"])
def test_timm_preset_loads_strictly(name: str) -> None:
    timm = pytest.importorskip("timm")
    theirs, ours = timm.create_model(name).eval(), fastvit.create_model(name).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert float((ours(images) - theirs(images)).abs().max()) < 1e-5


def test_initialisation_is_timms() -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_tiny_patch16_224")
    ours = fastvit.create_model("vit_tiny_patch16_224")
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert mine[name].shape == parameter.shape
        expected, got = parameter.std(correction=0), mine[name].std(correction=0)
        torch.testing.assert_close(got, expected, rtol=0.15, atol=1e-7, msg=f"std of {name}")


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        dict(layer_scale=0.1, pre_norm=True, norm="rmsnorm"),
        dict(registers=2, qk_norm=True, pool="mean", no_embed_class=True),
        dict(rope="dinov3", mlp="swiglu", qkv_bias="qv", pos_embed="none"),
        dict(rope="eva", mlp="swiglu_packed", proj_bias=False, mlp_bias=False, qkv_bias=False),
        dict(pool="map", class_token=False, patch_bias=False, qk_norm=True, norm="rmsnorm"),
        dict(pool="cls_mean", head_hidden_dim=8, final_norm=False),
        dict(num_classes=0),
    ],
    ids=lambda kwargs: "-".join(kwargs) or "default",
)
def test_init_weights_makes_a_fresh_model_of_any(kwargs: dict) -> None:
    torch.manual_seed(3)
    fresh = tiny(**kwargs)
    with torch.device("meta"):
        model = tiny(**kwargs)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.constant_(tensor, torch.nan)
    torch.manual_seed(3)
    model.init_weights()
    assert [n for n, p in model.named_parameters() if not p.equal(fresh.get_parameter(n))] == []
    assert [n for n, b in model.named_buffers() if not b.equal(fresh.get_buffer(n))] == []


def test_reference_block_passes_gradcheck_in_float64() -> None:
    """The reference's gradients of input, parameters and LayerScale against finite differences."""
    block = Block(8, 2, 4, 12, layer_scale=0.5).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    names = [name for name, _ in block.named_parameters()]

    def forward(x: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(block, dict(zip(names, params, strict=True)), (x,))

    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    with fastvit.use_backend("reference"):
        assert torch.autograd.gradcheck(forward, (x, *block.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_model_on_the_kernels(dtype: torch.dtype, device: torch.device) -> None:
    """Logits, loss and every parameter's gradient of a tiny ViT against float64."""
    model = tiny(layer_scale=0.5, registers=2)
    randomize_weights(model)
    model.to(dtype)
    images, labels = torch.randn(2, 3, 16, 16).to(dtype), torch.tensor([3, 7])

    def run(dtype: torch.dtype, backend: str, device: torch.device) -> dict[str, Tensor]:
        twin = fastvit.ViT(**model.config).to(device, dtype)
        twin.load_state_dict(model.state_dict())
        with fastvit.use_backend(backend):
            logits = twin(images.to(device, dtype))
            loss = F.cross_entropy(logits, labels.to(device))
            loss.backward()
        grads = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
        return {"logits": logits, "loss": loss, **grads}

    got = run(dtype, "triton", device)
    eager = run(dtype, "reference", device)
    truth = run(torch.float64, "reference", torch.device("cpu"))
    for name in truth:
        check(name, got[name], eager[name], truth[name])


def test_training_curve_on_the_kernels_is_the_references(device: torch.device) -> None:
    """Ten steps of AdamW on one batch; both backends start from the same weights."""
    start = tiny(drop_path=0.1)
    images, labels = torch.randn(8, 3, 16, 16, device=device), torch.arange(8, device=device)

    def curve(backend: str) -> list[float]:
        torch.manual_seed(0)
        model = tiny(drop_path=0.1).to(device)
        model.load_state_dict(start.state_dict())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        with fastvit.use_backend(backend):
            for _ in range(10):
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        return losses

    ours, reference = curve("triton"), curve("reference")
    assert reference[-1] < 0.5 * reference[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(reference), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiles_without_graph_breaks(backend: str, device: torch.device) -> None:
    model = tiny(layer_scale=0.1, depth=1).to(device)
    images = torch.randn(2, 3, 16, 16, device=device)
    with fastvit.use_backend(backend):
        plain = model(images)
        plain.sum().backward()
        expected = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
        compiled.sum().backward()
    torch.testing.assert_close(compiled, plain)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_exports(backend: str, device: torch.device) -> None:
    model = tiny(depth=1).to(device).eval()
    images = torch.randn(2, 3, 16, 16, device=device)
    with fastvit.use_backend(backend), torch.no_grad():
        program = torch.export.export(model, (images,))
        torch.testing.assert_close(program.module()(images), model(images))


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    model = tiny()
    images = torch.randn(2, 3, 16, 16)
    model(images).sum().backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing(True)
    model(images).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=0, msg=name)


def test_attention_maps_are_timms() -> None:
    theirs, ours = timm_twin(registers=1)
    theirs, ours = theirs.eval(), ours.eval()
    images, maps = torch.randn(2, 3, 16, 16), []
    for block in theirs.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda m, args, out: maps.append(out))
    theirs(images)
    ours_all = ours.attention_maps(images, layers=[0, -1], rows="all")
    torch.testing.assert_close(ours_all, torch.stack(maps, 1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.attention_maps(images), ours_all[:, 1:, :, :1])
    torch.testing.assert_close(
        ours.attention_maps(images, layers=[1], rows=[2, 5]), ours_all[:, 1:, :, [2, 5]]
    )


def test_attention_maps_of_wrapped_and_replaced_blocks() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, images = tiny(), torch.randn(2, 3, 16, 16)
    expected = model.attention_maps(images, layers=(0, 1))
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")  # type: ignore[assignment]
    assert torch.equal(model.attention_maps(images, layers=(0, 1)), expected)
    model.blocks[1] = nn.Identity()
    with pytest.raises(UsageError, match="layers: block 1 runs a Identity; expected fastvit's own"):
        model.attention_maps(images)
    with pytest.raises(UsageError, match="layers must name at least one block, got none"):
        model.attention_maps(images, layers=())


def test_drop_path_scales_and_drops_by_sample() -> None:
    block = Block(32, 2, 16, 64, drop_path=0.25).train()
    scale = block.path_scale(torch.zeros(20_000, 1, 32))
    assert scale is not None
    assert scale.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert float(scale.mean()) == pytest.approx(1, abs=0.02)
    assert block.eval().path_scale(torch.zeros(4, 1, 32)) is None
    rates = [b.drop_path for b in tiny(depth=5, drop_path=0.4).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_dropout_acts_in_training_alone() -> None:
    model = tiny(dropout=0.2, emb_dropout=0.2)
    images = torch.randn(2, 3, 16, 16)
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))
    report = fastvit.backend_report(model.train(), images)
    assert {c.backend for c in report.choices} == {"reference"}


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_monte_carlo_dropout_by_part(part: str) -> None:
    model, images = tiny(dropout=0.2, drop_path=0.5).eval(), torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images), model(images))
    for block in model.blocks:
        block.get_submodule(part).train()
    assert not torch.equal(model(images), model(images))
    assert not any(block.training for block in model.blocks), "drop path stays off"


def test_vit_pytorch_arguments_and_small_head() -> None:
    model = fastvit.ViT(
        image_size=32,
        patch_size=8,
        num_classes=7,
        dim=48,
        depth=1,
        heads=4,
        dim_head=16,
        mlp_dim=96,
        pool="mean",
        channels=1,
        head_hidden_dim=20,
    )
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert model.state_dict()["blocks.0.attn.qkv.weight"].shape == (3 * 64, 48)
    assert [type(m) for m in model.head.children()] == [nn.Linear, nn.GELU, nn.Linear]
    assert tiny(num_classes=0)(torch.randn(2, 3, 16, 16)).shape == (2, 32)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_empty_batch(backend: str, device: torch.device) -> None:
    model = tiny(depth=1).to(device)
    with fastvit.use_backend(backend):
        logits = model(torch.randn(0, 3, 16, 16, device=device))
        logits.sum().backward()
    assert logits.shape == (0, 10)
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_size": 18}, r"image_size \(18, 18\) is not a multiple of patch_size \(4, 4\)"),
        ({"image_size": (16, 18)}, r"\(16, 18\) .* in width"),
        ({"image_size": "16"}, r"image_size must be a positive int or a pair of them, got '16'"),
        ({"patch_size": (4, 4, 4)}, r"patch_size must be a positive int or a pair"),
        ({"patch_size": 0}, r"patch_size must be a positive int"),
        ({"heads": 3}, r"dim 32 is not a multiple of heads 3; pass dim_head"),
        ({"heads": 0}, r"heads must be an int >= 1, got 0"),
        ({"depth": 1.5}, r"depth must be an int >= 1, got 1.5"),
        ({"num_classes": -1}, r"num_classes must be an int >= 0, got -1"),
        ({"channels": 0}, r"channels must be an int >= 1, got 0"),
        ({"registers": -1}, r"registers must be an int >= 0"),
        ({"dim_head": 0}, r"dim_head must be an int >= 1"),
        ({"pool": "clas"}, r"pool must be one of \('cls', 'mean'.*, got 'clas'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"drop_path": -0.1}, r"drop_path must be in \[0, 1\), got -0.1"),
        ({"head_hidden_dim": 0}, r"head_hidden_dim must be an int >= 1"),
        ({"image_size": None}, r"image_size must be a positive int or a pair of them, got None"),
        ({"image_size": 16.0}, r"image_size must be a positive int or a pair of them, got 16.0"),
        ({"patch_size": True}, r"patch_size must be a positive int"),
        ({"dropout": "a"}, r"dropout must be in \[0, 1\), got 'a'"),
        ({"dropout": None}, r"dropout must be in \[0, 1\), got None"),
        ({"layer_scale": "a"}, r"layer_scale must be positive and finite, got 'a'"),
        ({"layer_scale": float("nan")}, r"layer_scale must be positive and finite, got nan"),
        ({"norm_eps": None}, r"norm_eps must be positive and finite, got None"),
        ({"norm_eps": -1}, r"norm_eps must be positive and finite, got -1"),
        ({"rope": []}, r"rope must be one of \(None, 'eva', 'dinov3'\), got \[\]"),
        ({"class_token": "no"}, r"class_token must be one of \(True, False\), got 'no'"),
        ({"fc_norm": "nope"}, r"fc_norm must be one of \(True, False, None\), got 'nope'"),
        ({"qk_norm": "nope"}, r"qk_norm must be one of \(True, False\), got 'nope'"),
    ],
)
def test_bad_arguments(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**kwargs)


def test_numpys_integers_are_integers() -> None:
    numpy = pytest.importorskip("numpy")
    model = tiny(image_size=numpy.int64(8), patch_size=(numpy.int32(4), 2), dim=numpy.int64(32))
    assert model(torch.randn(1, 3, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize("images", [None, [1.0]])
def test_images_that_are_no_tensor(images: Any) -> None:
    with pytest.raises(TypeError, match=f"images must be a tensor, got {type(images).__name__}"):
        tiny()(images)


def test_no_class_token_no_cls_map() -> None:
    model = tiny(class_token=False, pool="mean", registers=1)
    with pytest.raises(ValueError, match="rows 'cls' needs a class token"):
        model.attention_maps(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 1, 16, 16), (2, 3, 16, 20), (2, 3, 8, 8)])
def test_bad_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 16, 16\), got \("):
        tiny()(torch.randn(shape))


def test_bad_dtype_and_layers() -> None:
    with pytest.raises(TypeError, match=r"images is torch.float64 but weight is torch.float32"):
        tiny()(torch.randn(1, 3, 16, 16, dtype=torch.float64))
    with pytest.raises(UsageError, match=r"images is torch.uint8; expected floating point"):
        tiny()(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="layers: 5 is out of range for depth 2"):
        tiny().attention_maps(torch.randn(1, 3, 16, 16), layers=[5])
    with pytest.raises(ValueError, match="rows must be 'cls', 'all' or indices, got 'CLS'"):
        tiny().attention_maps(torch.randn(1, 3, 16, 16), rows="CLS")


def test_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'vit_basic'; .*vit_base_patch16_224"):
        fastvit.create_model("vit_basic")
    assert "vit_huge_patch14_224" in fastvit.list_models("*huge*")


def test_symbolic_tracing_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"torch\.fx cannot trace .*forward_intermediates"):
        torch.fx.symbolic_trace(fastvit.ViT(**TINY))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit._trace.TracerWarning")
def test_traced_norms_have_constant_shapes() -> None:
    """The ONNX exporter of TorchScript has no LayerNorm over a size that the trace computes."""
    model = fastvit.ViT(**TINY).eval()
    trace: Any = torch.jit.trace(model, torch.randn(2, 3, 16, 16))
    graph = trace.inlined_graph
    norms = graph.findAllNodes("aten::layer_norm")
    shapes = [list(node.inputs())[1].node() for node in norms]
    assert shapes and all(i.node().kind() == "prim::Constant" for s in shapes for i in s.inputs())
