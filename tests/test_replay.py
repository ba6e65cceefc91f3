"""Recipes repeat a launcher's work for other tensors, bit for bit, and only where that is right."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastvit_kernels import replay, tuned
from fastvit_kernels.recipe import Program
from test_gradient_copy import model
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

import fastvit
from fastvit import ops


def elsewhere(args: tuple) -> list[Any]:
    """Copies of the tensors at other addresses; a tensor given twice is copied once."""
    copies: dict[int, Tensor] = {}
    for t in args:
        if isinstance(t, Tensor):
            span = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
            memory = t.detach().as_strided((span if t.numel() else 0,), (1,)).clone()
            copies.setdefault(id(t), memory.as_strided(t.shape, t.stride(), 0))
    return [copies[id(a)] if isinstance(a, Tensor) else a for a in args]


class Checked:
    """Replaces `replay.run`: compares the recipe of every launcher with the launcher itself."""

    def __init__(self) -> None:
        self.launchers: Counter[str] = Counter()

    def __call__(self, launcher: Callable[..., Any], args: tuple) -> Any:
        done = launcher(*args)
        key, tensors = replay._cache_key(launcher, args)
        if key is None:
            return done
        recorded, recipe = replay.record(launcher, args, tensors)
        assert recipe is not None, f"{launcher.__module__} cannot be repeated"
        assert not _held(list(recipe.__globals__.values()))  # type: ignore[attr-defined]
        others = [t for t in elsewhere(args) if isinstance(t, Tensor)]
        repeated = recipe(*others)
        for got in (recorded, repeated):
            assert type(got) is type(done)
            torch.testing.assert_close(got, done, rtol=0, atol=0, equal_nan=True, check_stride=True)
        modes = [t.is_inference() for r in (done, repeated) for t in _flat(r)]
        assert modes[: len(modes) // 2] == modes[len(modes) // 2 :]
        self.launchers[launcher.__module__.removeprefix("fastvit_kernels.")] += 1
        return done


def _held(thing: Any) -> list[Tensor]:
    """Tensors that a recipe would keep alive."""
    if isinstance(thing, TensorDescriptor):
        return _held(thing.base)
    parts = thing if isinstance(thing, (list, tuple)) else ()
    return [thing] if isinstance(thing, Tensor) else [t for part in parts for t in _held(part)]


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Checked:
    check = Checked()
    monkeypatch.setattr(replay, "run", check)
    return check


@pytest.mark.parametrize(
    ("dtype", "autocast", "way"),
    [
        (torch.float32, False, "load"),
        (torch.float32, True, "fold"),
        (torch.bfloat16, False, "row"),
    ],
)
def test_model(
    dtype: torch.dtype,
    autocast: bool,
    way: str,
    device: torch.device,
    checked: Checked,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In training, and in inference mode."""
    monkeypatch.setattr(tuned, "norm_placement", lambda *_: way)
    vit = model(3, layer_scale=0.5, drop_path=0.5).train().to(device, dtype)
    images = torch.randn(3, 3, 16, 16).to(device, dtype)
    with fastvit.use_backend("triton"), torch.autocast(device.type, torch.bfloat16, autocast):
        vit(images).float().sum().backward()
        with torch.inference_mode():
            vit.eval()(images)
    # Of attention the last block, of which <cls> alone is read, runs the three ops.
    calls = {"patch_embed": 1, "layernorm_attention": 2, "layernorm_mlp": 3}
    calls |= {"layernorm_linear": 1, "attention": 1, "linear_residual": 1}
    assert checked.launchers == {kind: 2 * n + n for kind, n in calls.items()}


def test_options_of_attention(device: torch.device, checked: Checked) -> None:
    qkv = torch.randn(2, 19, 3, 2, 16).to(device).requires_grad_()
    angles = torch.randn(18, 8).to(device)
    weight = torch.randn(16).to(device)
    options: dict[str, Any] = {"q_weight": weight, "k_weight": weight, "norm_kind": "rmsnorm"}
    options |= {"cos": angles.cos(), "sin": angles.sin(), "dropout": 0.3}
    bounds = torch.tensor([0, 5, 19], dtype=torch.int32).to(device)
    with fastvit.use_backend("triton"):
        q, k, v = qkv.unbind(2)
        ops.attention(q, k, v, key_padding=bounds[1:].clone()).sum().backward()
        ops.attention_qkv(qkv, **options).sum().backward()
        ops.attention_packed(qkv[0], bounds, 14).sum().backward()
        ops.attention_maps(q, k)
        ops.swiglu(qkv.flatten(2)).sum().backward()
    assert set(checked.launchers) >= {"attention", "attention_qk", "attention_maps", "swiglu"}


runs: list[str] = []


def scale(x: Tensor, factor: Tensor, by: float) -> list[Tensor]:
    """A launcher of PyTorch's own ops, which returns a transposed copy, a view and a cast."""
    runs.append("scale")
    scaled = torch.mul(x, by, out=torch.empty_like(x)).t()
    cast = torch.empty(4, dtype=torch.float64, device=x.device).copy_(factor.flatten()[:4])
    return [scaled.contiguous(), scaled[1:], cast]


def how(launcher: Callable[..., Any], *args: Any) -> str:
    """Whether `replay` "ran" or "repeated" launcher(*args), whose result is checked."""
    before = len(runs)
    got = replay.replay(launcher, args)
    way = "ran" if len(runs) > before else "repeated"
    torch.testing.assert_close(got, launcher(*args), rtol=0, atol=0, check_stride=True)
    return way


@pytest.fixture(autouse=True)
def _forget() -> None:
    replay._recipes.clear()


def test_the_third_call_is_repeated(device: torch.device) -> None:
    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def three(*args: Any) -> list[str]:
        return [how(scale, *(elsewhere(args))) for _ in range(3)]

    x, factor = new(4, 8), new(2, 4)
    expected = ["ran", "ran", "repeated"]
    for args in (
        (x, factor, 2.0),
        (x, factor, 3.0),
        (new(8, 4).t(), factor, 2.0),
        (new(4, 12)[:, :8], factor, 2.0),
        (x.double(), factor, 2.0),
        (x, x, 2.0),
        (x, new(4, 8), 2.0),  # two tensors differ from one tensor twice
    ):
        assert three(*args) == expected
    assert how(scale, new(4, 8), new(2, 4), 2.0) == "repeated"
    with torch.inference_mode():
        assert three(x, factor, 2.0) == expected
    tuned.clear_choices()
    assert three(x, factor, 2.0) == expected
    torch.backends.cuda.matmul.allow_tf32 = True  # conftest.py resets it
    assert three(x, factor, 2.0) == expected


def test_compiled_ops_are_repeated(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile passes lists for tuples."""
    repeats: list[Callable] = []
    function = Program.function

    def counted(program: Program) -> Callable[..., Any]:
        repeat = function(program)
        return lambda *tensors: repeats.append(repeat) or repeat(*tensors)

    monkeypatch.setattr(replay, "run", replay.replay)
    monkeypatch.setattr(Program, "function", counted)
    images, weight = torch.randn(2, 3, 8, 8, device=device), torch.randn(16, 3, 4, 4, device=device)
    compiled = torch.compile(ops.patch_embed, backend="aot_eager", fullgraph=True)
    grads = []
    for _ in range(3):
        w = weight.clone().requires_grad_()
        with fastvit.use_backend("triton"):
            compiled(images, w).square().sum().backward()
        grads.append(w.grad)
    assert len(repeats) == 2 and torch.equal(grads[0], grads[2])


def test_never_repeated(device: torch.device) -> None:
    """Unaligned addresses, which kernels are specialized for, and results no recipe can express."""

    def reads(x: Tensor) -> Tensor:
        runs.append("reads")
        return x + x.sum().item()

    def returns(x: Tensor) -> list[Tensor]:
        runs.append("returns")
        return [x, x + 1]

    x = torch.randn(33, device=device)
    for _ in range(4):
        assert how(scale, x[1:].view(4, 8), x[:8], 2.0) == "ran"
        assert how(reads, x) == how(returns, x) == "ran"


def test_tensors_are_let_go_after_their_last_use(device: torch.device) -> None:
    def launcher(x: Tensor) -> Tensor:
        first, _, second = x + 1, x + 2, torch.empty_like(x)
        second.copy_(first)
        return second.mul(2)

    x = torch.randn(4, device=device)
    with replay.Recorder([x]) as watch:
        result = launcher(x)
    program = watch.program("launcher", 1, result)
    assert program is not None
    names = [type(step).__name__ for step in program.steps]
    add, end = "Call", "Release"
    assert names == [add, add, end, "Allocation", "Call", end, "Call", end]
    assert torch.equal(program.function()(x + 1), 2 * (x + 2))


def test_so_many_recipes_are_kept(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_RECIPES", 2)
    for n in range(4, 9):
        how(scale, torch.randn(4, n, device=device), torch.randn(4, device=device), 2.0)
        assert len(replay._recipes) <= 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_graphed_model_gives_the_same_gradients(device: torch.device) -> None:
    images = torch.randn(8, 3, 16, 16, device=device)
    grads = []
    for graphed in (False, True):
        torch.manual_seed(0)
        vit = model(3, layer_scale=0.5).train().to(device)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            run: Any = vit
            if graphed:
                run = torch.cuda.make_graphed_callables(vit, (images.clone(),))
            loss = run(images).square().sum()
        loss.backward()
        grads.append([p.grad for p in vit.parameters()])
    assert all(map(torch.equal, *grads))
