"""layernorm_linear, linear_residual, layernorm_mlp against float64: forward, every gradient."""

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from fastvit_kernels.common import dgelu, gelu
from parity import (
    DTYPES,
    check_compiles,
    check_no_double_backward,
    check_parity,
    check_repeatable,
    dtype_id,
    leaf,
    results,
)

import fastvit
from fastvit import ops


def layernorm_linear(B: int, N: int, C: int, F: int) -> dict:
    norm = {"x": leaf(B, N, C), "norm_weight": leaf(C), "norm_bias": leaf(C)}
    return {**norm, "weight": leaf(F, C, scale=C**-0.5), "bias": leaf(F)}


def linear_residual(B: int, N: int, C: int, F: int) -> dict:
    return {
        "x": leaf(B, N, F),
        "weight": leaf(C, F, scale=F**-0.5),
        "bias": leaf(C),
        "residual": leaf(B, N, C),
        "layer_scale": leaf(C),
        "path_scale": torch.tensor([0.0, 1.25, 1.25])[:B],
    }


def layernorm_mlp(B: int, N: int, C: int, F: int) -> dict:
    norm = {"x": leaf(B, N, C), "norm_weight": leaf(C), "norm_bias": leaf(C)}
    branch = {"layer_scale": leaf(C), "path_scale": torch.tensor([1.25, 0.0, 1.25])[:B]}
    fc1 = {"fc1_weight": leaf(F, C, scale=C**-0.5), "fc1_bias": leaf(F)}
    fc2 = {"fc2_weight": leaf(C, F, scale=F**-0.5), "fc2_bias": leaf(C)}
    return {**norm, **fc1, **fc2, **branch}


OPS = {f.__name__: f for f in (layernorm_linear, linear_residual, layernorm_mlp)}
OPTIONAL = ("norm_weight", "norm_bias", "bias", "fc1_bias", "fc2_bias", "layer_scale", "path_scale")
SIZES = {
    "one row": (1, 1, 8, 16),
    "ragged": (2, 17, 72, 24),
    "square": (2, 64, 64, 64),
    "odd": (3, 50, 40, 136),
    "197": (2, 197, 64, 192),
}
every_op = pytest.mark.parametrize("op", OPS)


@every_op
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_parity(op: str, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    check_parity(op, OPS[op](*size), dtype, device)


@pytest.mark.slow
@every_op
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_model_width(op: str, dtype: torch.dtype, device: torch.device) -> None:
    check_parity(op, OPS[op](2, 50, 384, 1536), dtype, device)


@every_op
@pytest.mark.parametrize("absent", [*OPTIONAL, "all"])
def test_without(op: str, absent: str, device: torch.device) -> None:
    args = OPS[op](2, 9, 32, 48)
    dropped = {k: None for k in args if absent in (k, "all") and k in OPTIONAL}
    if not dropped:
        pytest.skip(f"{op} takes no {absent}")
    check_parity(op, {**args, **dropped}, device=device)


@every_op
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_autocast(op: str, dtype: torch.dtype, device: torch.device) -> None:
    check_parity(op, OPS[op](2, 33, 48, 64), dtype, device, autocast=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_tanh_gelu(dtype: torch.dtype, device: torch.device) -> None:
    args = {**layernorm_mlp(2, 17, 32, 64), "activation": "gelu_tanh"}
    check_parity("layernorm_mlp", args, dtype, device)


@pytest.mark.parametrize("op", ["layernorm_linear", "layernorm_mlp"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_mean_a_hundred_deviations_away(op: str, dtype: torch.dtype, device: torch.device) -> None:
    args = OPS[op](2, 17, 64, 48)
    args["x"] = (args["x"].detach() + 100).requires_grad_()
    check_parity(op, args, dtype, device)


@every_op
@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_tiny_and_huge(op: str, scale: float, device: torch.device) -> None:
    args = OPS[op](2, 9, 32, 48)
    args["x"] = (args["x"].detach() * scale).requires_grad_()
    check_parity(op, args, device=device)


@every_op
def test_strided(op: str, device: torch.device) -> None:
    args = OPS[op](2, 9, 32, 48)
    width = args["x"].shape[-1]
    for x in (
        leaf(2, 12, width)[:, 3:],
        leaf(2, 9, 2 * width)[..., ::2],
        leaf(2, 9, 80)[..., :width],
    ):
        check_parity(op, {**args, "x": x.detach().requires_grad_()}, device=device)


def test_broadcast_gradient(device: torch.device) -> None:
    """sum() sends a gradient of stride 0 through the op."""
    x, weight = leaf(2, 9, 32), leaf(16, 32)
    with fastvit.use_backend("triton"):
        ops.layernorm_linear(x.to(device), None, None, weight.to(device)).sum().backward()
    got = weight.grad
    weight.grad = None
    torch.nn.functional.layer_norm(x, (32,), eps=1e-6).matmul(weight.t()).sum().backward()
    torch.testing.assert_close(got, weight.grad)


@every_op
def test_empty(op: str, device: torch.device) -> None:
    args = OPS[op](1, 9, 32, 48)
    empty = {k: v[:0] if k in ("x", "residual", "path_scale") else v for k, v in args.items()}
    empty = {k: v.detach().requires_grad_(k != "path_scale") for k, v in empty.items()}
    with fastvit.use_backend("triton"):
        got = results(getattr(ops, op), empty, device)
    assert got["out"].shape[:2] == (0, 9)
    assert not any(v.any() for v in got.values())


@every_op
def test_nan_stays_in_its_row(op: str, device: torch.device) -> None:
    args = {k: v.detach().to(device) for k, v in OPS[op](2, 9, 32, 48).items()}
    args["x"][1, 4, 3] = float("nan")
    args["path_scale"] = torch.ones(2, device=device)
    if op == "layernorm_linear":
        del args["path_scale"]
    with fastvit.use_backend("triton"):
        nan = getattr(ops, op)(**args).isnan()
    assert nan[1, 4].all() and int(nan.sum()) == nan.shape[-1]


@every_op
def test_repeatable_compiled_and_first_order(op: str, device: torch.device) -> None:
    args = OPS[op](3, 50, 40, 136)
    check_repeatable(op, args, torch.bfloat16, device)
    check_compiles(op, args, device)
    check_no_double_backward(op, args, device)


@every_op
def test_saved_bytes_are_what_the_docstring_says(op: str, device: torch.device) -> None:
    """Under autocast: float32 residual stream, bf16 products."""
    B, N, C, F = 2, 33, 48, 64
    args = {k: v.detach().to(device).requires_grad_() for k, v in OPS[op](B, N, C, F).items()}
    params = {v.untyped_storage().data_ptr() for k, v in args.items() if k != "x"}
    saved: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    autocast = torch.autocast(device.type, torch.bfloat16)
    with fastvit.use_backend("triton"), autocast, hooks:
        getattr(ops, op)(**args)
    activations = sum(size for pointer, size in saved.items() if pointer not in params)
    M, stats, weight = B * N, 8, 2 * C * F
    expected = {
        "layernorm_linear": M * (4 * C + stats) + weight,
        "linear_residual": M * 2 * F + weight,
        "layernorm_mlp": M * (4 * C + 2 * F + stats) + 2 * weight,
    }
    assert activations == expected[op]


@triton.jit
def _gelu_kernel(x_ptr, y_ptr, dy_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, gelu(x, False, False))
    tl.store(dy_ptr + offs, dgelu(x, False, False))


def test_cheap_erf_is_under_half_a_rounding_of_16_bits(device: torch.device) -> None:
    """The 16-bit GELU's formula against float64, value and slope, over all it can be given."""
    x = torch.linspace(-12, 12, 1 << 14, device=device)
    y, dy = torch.empty_like(x), torch.empty_like(x)
    _gelu_kernel[(1,)](x, y, dy, BLOCK=x.numel())  # pyright: ignore[reportArgumentType]
    truth = x.double().requires_grad_()
    value = torch.nn.functional.gelu(truth)
    value.sum().backward()
    assert truth.grad is not None
    assert float((y.double() - value.detach()).abs().max()) < 1e-6
    assert float((dy.double() - truth.grad).abs().max()) < 1e-6


@pytest.mark.parametrize("op", ["layernorm_linear", "layernorm_mlp"])
def test_what_the_kernel_lacks_runs_in_eager_and_says_so(op: str) -> None:
    args = OPS[op](2, 5, 16, 24)
    choices = [{"norm_kind": "rmsnorm"}]
    choices += [{"activation": "quick_gelu"}, {"dropout": 0.5}] if op == "layernorm_mlp" else []
    for extra in choices:
        getattr(ops, op)(**args, **extra)
        with fastvit.use_backend("triton"), pytest.raises(RuntimeError, match="not in the kernel"):
            getattr(ops, op)(**args, **extra)
    x = args["x"].detach()
    got = ops.layernorm_linear(x, None, None, torch.eye(16), norm_kind="rmsnorm")
    torch.testing.assert_close(got, x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())


def _names(f: Callable) -> set[str]:
    return set(f(1, 1, 8, 8))


def test_every_argument_of_the_ops_is_tested() -> None:
    import inspect

    for op, make in OPS.items():
        arguments = set(inspect.signature(getattr(ops, op)).parameters)
        assert arguments - _names(make) <= {"eps", "activation", "dropout", "norm_kind"}
