"""Where only <cls> is read, the last block's MLP and the final norm run on <cls> alone."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import check
from peers import randomize_weights, weights
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.flop_counter import FlopCounterMode

import fastvit
from fastvit import ops
from fastvit.layers import Mlp

TINY: dict[str, Any] = dict(
    image_size=16, patch_size=4, dim=32, depth=2, heads=2, mlp_dim=48, num_classes=10
)
TOKENS = 17

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one block": {"depth": 1},
    "registers": {"registers": 3},
    "registers, no_embed_class": {"registers": 3, "no_embed_class": True},
    "layer scale": {"layer_scale": 0.3},
    "qk_norm": {"qk_norm": True},
    "rmsnorm": {"norm": "rmsnorm", "qk_norm": True},
    "SwiGLU": {"mlp": "swiglu"},
    "packed SwiGLU": {"mlp": "swiglu_packed", "layer_scale": 0.3},
    "rope of EVA": {"rope": "eva", "qkv_bias": "qv"},
    "rope of DINOv3": {"rope": "dinov3", "registers": 2, "pos_embed": "none"},
    "norm after pooling": {"fc_norm": True},
    "no final norm": {"final_norm": False},
    "no head": {"num_classes": 0},
    "two layers of head": {"head_hidden_dim": 12},
    "own dim_head": {"dim_head": 24, "proj_bias": False, "mlp_bias": False},
    "drop path": {"drop_path": 0.5, "layer_scale": 0.3},
    "attention dropout": {"attn_dropout": 0.3},
    "other dropouts": {"emb_dropout": 0.2, "head_dropout": 0.2, "patch_dropout": 0.3},
}


def random_vit(**options: Any) -> fastvit.ViT:
    return randomize_weights(fastvit.ViT(**{**TINY, **options})).train()


def rows(model: nn.Module, side: int = 16, batch: int = 2) -> int:
    """The number of tokens per image that the last op of the last block ran on."""
    p = next(model.parameters())
    images = torch.randn(batch, 3, side, side, dtype=p.dtype, device=p.device)
    choices = fastvit.backend_report(model, images).choices
    kinds = ("linear_residual", "layernorm_mlp")
    return [c for c in choices if c.op in kinds][-1].shape[1]


def full(model: fastvit.ViT, images: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(images))


def outcome(model: fastvit.ViT, run: Callable[[Tensor], Tensor], images: Tensor) -> list[Any]:
    """Output and the gradients of images and parameters, from a fixed seed."""
    torch.manual_seed(4)
    model.zero_grad()
    x = images.clone().requires_grad_()
    out = run(x)
    (out * weights(out)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters())]


def same(got: list[Any], expected: list[Any]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_and_gradients_are_those_of_all_tokens(options: dict[str, Any]) -> None:
    model = random_vit(**options).double()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    assert rows(model) == 1
    expected = outcome(model, functools.partial(full, model), images)
    same(outcome(model, model, images), expected)


def test_other_sizes_checkpointing_recompute_and_frozen_parameters() -> None:
    model = random_vit(dynamic_img_size=True, drop_path=0.5).double()
    images = torch.randn(3, 3, 24, 8, dtype=torch.float64)
    expected = outcome(model, functools.partial(full, model), images)
    model.set_mlp_recompute()
    same(outcome(model, model, images), expected)
    model.set_grad_checkpointing()
    same(outcome(model, model, images), expected)
    assert rows(model) == rows(model, batch=1) == rows(model, batch=0) == 1
    model.blocks.requires_grad_(False)
    model.blocks[-1].attn.qkv.requires_grad_(True)  # type: ignore[union-attr]
    expected = outcome(model, functools.partial(full, model), images)
    same(outcome(model, model, images), expected)


def test_autocast() -> None:
    model = random_vit(layer_scale=0.3)
    images = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = model(images), full(model, images)
        assert rows(model) == 1
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(
        got, expected, rtol=2**-6, atol=2**-6 * float(expected.detach().abs().max())
    )


HOOKS: dict[str, Callable[[Any, Any], Any]] = {
    "forward": lambda m, see: m.register_forward_hook(lambda m, args, out: see(out)),
    "forward pre": lambda m, see: m.register_forward_pre_hook(lambda m, args: see(args[0])),
    "backward": lambda m, see: m.register_full_backward_hook(lambda m, i, o: see(o[0])),
    "backward pre": lambda m, see: m.register_full_backward_pre_hook(lambda m, o: see(o[0])),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", ["blocks.1", "blocks.1.attn", "blocks.1.mlp", "norm"])
def test_hooks_see_all_tokens(kind: str, name: str) -> None:
    model = random_vit()
    seen: list[torch.Size] = []
    handle = HOOKS[kind](model.get_submodule(name), lambda t: seen.append(t.shape))
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert seen == [(2, TOKENS, 32)]
    handle.remove()
    assert rows(model) == 1


@pytest.mark.parametrize("name", ["", "blocks.0", "norm_pre", "head_drop", "head"])
def test_hooks_elsewhere_cost_nothing(name: str) -> None:
    model = random_vit()
    handle = model.get_submodule(name).register_forward_hook(lambda *args: None)
    assert rows(model) == 1
    handle.remove()


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_global_hooks_see_all_tokens(kind: str) -> None:
    model = random_vit()
    register = getattr(torch_module, f"register_module_{kind}_hook")
    seen: dict[nn.Module, torch.Size] = {}

    def look(module: nn.Module, *args: Any) -> None:
        t = args[-1]
        seen[module] = (t if isinstance(t, Tensor) else t[0]).shape

    handle = register(look)
    try:
        # Images need a gradient: full backward hooks warn about modules whose inputs need none.
        model(torch.randn(2, 3, 16, 16, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    assert seen[model.blocks[-1]] == seen[model.norm] == (2, TOKENS, 32)
    assert rows(model) == 1


def test_subclasses_and_patches_see_all_tokens() -> None:
    images = torch.randn(2, 3, 16, 16)

    class Features(fastvit.ViT):
        def forward_features(self, images: Tensor) -> Tensor:
            return 2 * super().forward_features(images)

    class Pooled(fastvit.ViT):
        def pooled(self, x: Tensor) -> Tensor:
            return x.mean(dim=1)

    class Unrelated(fastvit.ViT):
        def get_classifier(self) -> nn.Module:
            return self.head

    plain = random_vit()
    for kind, expected in (
        (Features, plain.forward_head(2 * plain.forward_features(images))),
        (Pooled, plain.head(plain.forward_features(images).mean(dim=1))),
        (Unrelated, full(plain, images)),
    ):
        model = kind(**TINY)
        model.load_state_dict(plain.state_dict())
        torch.testing.assert_close(model(images), expected)
        assert rows(model) == (1 if kind is Unrelated else TOKENS)

    seen: list[torch.Size] = []

    def patched(module: Any, method: str) -> None:
        before = getattr(module, method)

        def look(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(x.shape)
            return before(x, *args, **kwargs)

        setattr(module, method, look)

    for name, method in (
        ("", "forward_head"),
        ("blocks.1", "forward"),
        ("blocks.1.mlp", "forward"),
        ("norm", "forward"),
    ):
        model = random_vit()
        patched(model.get_submodule(name), method)
        model(images)
        assert seen.pop() == (2, TOKENS, 32)


class Mixing(Mlp):
    """A user-defined MLP that mixes tokens."""

    def forward(self, x: Tensor, *args: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x, *args) + x.mean(dim=1, keepdim=True)


def test_modules_of_the_users_own_see_all_tokens() -> None:
    images = torch.randn(2, 3, 16, 16)
    model = random_vit()
    model.blocks[-1].mlp = Mixing(32, 48)
    torch.testing.assert_close(model(images), full(model, images))
    model = random_vit()
    model.blocks.append(nn.Identity())
    model.blocks[-1].forward = lambda input: input + input.mean(dim=1, keepdim=True)  # type: ignore
    torch.testing.assert_close(model(images), full(model, images))
    model = random_vit()
    model.norm = nn.BatchNorm1d(TOKENS)  # type: ignore[assignment]
    torch.testing.assert_close(model(images), full(model, images))
    model = random_vit()
    model.blocks = nn.Sequential()
    torch.testing.assert_close(model(images), full(model, images))


def test_other_pools_and_dropout_in_training_take_all_tokens() -> None:
    for pool in ("mean", "max", "avgmax", "cls_mean", "none"):
        assert rows(random_vit(pool=pool)) == TOKENS
    model, images = random_vit(pool="map"), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(images), full(model, images))
    for rate in ("proj_dropout", "mlp_dropout"):
        model = random_vit(**{rate: 0.1})
        assert rows(model) == TOKENS
        assert rows(model.eval()) == 1
    model = random_vit()
    model.reset_classifier(3, "avg")
    assert rows(model) == TOKENS
    model.reset_classifier(3, "token")
    assert rows(model) == 1


@pytest.mark.parametrize("mlp", ["mlp", "swiglu"])
def test_flops_are_what_one_vector_takes(mlp: str) -> None:
    """The last block's projection and MLP run on 1 token, not 17; backward costs twice forward."""
    model = random_vit(mlp=mlp, dim_head=24)
    per_vector = 2 * (32 * 2 * 24 + (3 if mlp == "swiglu" else 2) * 32 * 48)
    counts = []
    for run in (functools.partial(full, model), model):
        images = torch.randn(2, 3, 16, 16)
        with FlopCounterMode(display=False) as training:
            out = run(images)
            forward = training.get_total_flops()
            out.sum().backward()
        counts.append((forward, training.get_total_flops()))
    saved = [a - b for a, b in zip(*counts, strict=True)]
    assert saved == [2 * (TOKENS - 1) * per_vector, 3 * 2 * (TOKENS - 1) * per_vector]


@pytest.mark.parametrize("training", [False, True])
def test_compiled_graphs_hold_cls_alone_behind_the_last_attention(training: bool) -> None:
    model = random_vit(rope="eva", layer_scale=0.3, drop_path=0.2).train(training)
    model.set_grad_checkpointing(training)
    images = torch.randn(3, 3, 16, 16)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=keep)
    torch.manual_seed(1)
    expected = model(images)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(images), expected)
    hidden = [list(t) for graph in graphs for t in hidden_shapes(graph, "example_value")]
    assert sorted(shape[1] for shape in hidden) == [1, TOKENS]
    if training:
        return
    hidden = hidden_shapes(export(model, images).graph_module, "val")
    assert sorted(shape[1] for shape in hidden) == [1, TOKENS]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_exports_with_a_dynamic_batch(backend: str, device: torch.device) -> None:
    images = torch.randn(5, 3, 16, 16, device=device)
    with fastvit.use_backend(backend):
        for options in ({"rope": "eva"}, {"mlp": "swiglu", "norm": "rmsnorm"}):
            model = random_vit(depth=1, **options).to(device).eval()
            program = export(model, images[:3]).module()
            for n in (1, 5):
                torch.testing.assert_close(program(images[:n]), model(images[:n]))


def export(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def hidden_shapes(graph: torch.fx.GraphModule, meta: str) -> list[torch.Size]:
    """The shapes of GELU's outputs in the graph and its subgraphs."""
    modules = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
    nodes = [node for module in modules for node in module.graph.nodes]
    return [node.meta[meta].shape for node in nodes if "gelu" in str(node.target)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["linear_residual", "layernorm_mlp", "layernorm_linear_fork"])
def test_kernels_take_the_first_row_of_each_image(
    op: str, dtype: torch.dtype, device: torch.device
) -> None:
    """A slice (B, 1, C) of (B, N, C) has a row stride of N * C; other rows get no gradient."""
    B, N, C, hidden = 5, 7, 32, 48
    inputs = {"x": torch.randn(B, N, C), "residual": torch.randn(B, N, C)}
    sizes = {"w1": (hidden, C), "b1": (hidden,), "w2": (C, hidden), "b2": (C,), "proj": (C, C)}
    sizes |= {"norm": (C,), "norm_bias": (C,), "scale": (C,)}
    inputs |= {name: torch.randn(size) / size[-1] ** 0.5 for name, size in sizes.items()}
    path = torch.tensor([2.0, 0.0, 2.0, 2.0, 0.0])
    weights = torch.randn(B, N, C)

    def run(dtype: torch.dtype, backend: str, device: torch.device) -> dict[str, Tensor]:
        t = {k: v.to(device, dtype, copy=True).requires_grad_() for k, v in inputs.items()}
        path_scale = path.to(device)
        x, residual = t["x"][:, :1], t["residual"][:, :1]
        with fastvit.use_backend(backend):
            if op == "linear_residual":
                out = ops.linear_residual(
                    x, t["proj"], t["b2"], residual, t["scale"], path_scale, 0.0
                )
            elif op == "layernorm_mlp":
                mlp = (t["w1"], t["b1"], t["w2"], t["b2"])
                out = ops.layernorm_mlp(x, t["norm"], t["norm_bias"], *mlp, t["scale"], path_scale)
            else:
                norm = (t["norm"], t["norm_bias"], t["proj"], t["b2"])
                y, x = ops.layernorm_linear_fork(x, *norm)
                out = x + y
            out.backward(weights[:, :1].to(device, dtype))  # at the strides of all tokens
        grads = {f"d{k}": v.grad for k, v in t.items() if v.grad is not None}
        return {"out": out.detach(), **grads}

    got, eager = run(dtype, "triton", device), run(dtype, "reference", device)
    truth = run(torch.float64, "reference", torch.device("cpu"))
    assert got.keys() == eager.keys() == truth.keys()
    for name in truth:
        check(name, got[name], eager[name], truth[name])
        if name == "dx":
            assert not got[name][:, 1:].any()


@pytest.mark.parametrize("options", [{}, {"mlp": "swiglu", "norm": "rmsnorm", "rope": "dinov3"}])
def test_kernels_give_the_gradients_of_all_tokens(
    options: dict[str, Any], device: torch.device
) -> None:
    model = random_vit(depth=1, registers=1, layer_scale=0.3, drop_path=0.0, **options).to(device)
    images, labels = torch.randn(3, 3, 16, 16, device=device), torch.arange(3, device=device)
    found = []
    for run in (functools.partial(full, model), model):
        model.zero_grad()
        with fastvit.use_backend("triton"):
            loss = F.cross_entropy(run(images), labels)
            loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
