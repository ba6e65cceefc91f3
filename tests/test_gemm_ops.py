"""layernorm_linear, linear_residual, layernorm_attention, layernorm_mlp against float64: forward,
every gradient."""

import re
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from checks import dtype_name
from fastvit_kernels import gemm_dw, layernorm, parameter_grads
from fastvit_kernels.common import dgelu, gelu
from parity import (
    DTYPES,
    check_compiles,
    check_parity,
    check_plain_backward,
    check_repeatable,
    half,
    leaf,
    results,
    saved_bytes,
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


def layernorm_attention(B: int, N: int, C: int, F: int) -> dict:
    inner = 2 * min(128, max(16, C // 16 * 8))  # two heads, about as wide as x
    norm = {"x": leaf(B, N, C), "norm_weight": leaf(C), "norm_bias": leaf(C)}
    branch = {"layer_scale": leaf(C), "path_scale": torch.tensor([1.25, 0.0, 1.25])[:B]}
    # Halved: where a few keys get all the weight, one element's error is a matter of luck.
    qkv = {"qkv_weight": leaf(3 * inner, C, scale=0.5 * C**-0.5), "qkv_bias": leaf(3 * inner)}
    proj = {"proj_weight": leaf(C, inner, scale=inner**-0.5), "proj_bias": leaf(C)}
    return {**norm, **qkv, **proj, **branch, "heads": 2}


OPS = {
    f.__name__: f for f in (layernorm_linear, linear_residual, layernorm_attention, layernorm_mlp)
}
OPTIONAL = ("norm_weight", "norm_bias", "bias", "qkv_bias", "proj_bias", "fc1_bias", "fc2_bias")
OPTIONAL += ("layer_scale", "path_scale")
SIZES = {
    "one row": (1, 1, 8, 16),
    "ragged": (2, 17, 72, 24),
    "square": (2, 64, 64, 64),
    "odd": (3, 50, 40, 136),
    "197": (2, 197, 64, 192),
}
every_op = pytest.mark.parametrize("op", OPS)
WITH_NORM = ["layernorm_linear", "layernorm_attention", "layernorm_mlp"]


def placed(args: dict, device: torch.device) -> dict:
    """Copies of the tensors on the device, without gradients; other arguments as they are."""
    return {k: v.detach().to(device) if torch.is_tensor(v) else v for k, v in args.items()}


def wanting(args: dict) -> list[str]:
    """The names of the tensors that get a gradient."""
    return [k for k, v in args.items() if torch.is_tensor(v) and v.requires_grad]


@every_op
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_parity(op: str, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    check_parity(op, OPS[op](*size), dtype, device)


@pytest.mark.slow
@every_op
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
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
@half
def test_autocast(op: str, dtype: torch.dtype, device: torch.device) -> None:
    check_parity(op, OPS[op](2, 33, 48, 64), dtype, device, autocast=True)


@every_op
def test_a_result_may_be_changed_in_place(op: str, device: torch.device) -> None:
    args = OPS[op](2, 17, 72, 24)
    grads = []
    for in_place in (False, True):
        leaves = placed(args, device)
        for name in wanting(args):
            leaves[name].requires_grad_()
        with fastvit.use_backend("triton"):
            out = getattr(ops, op)(**leaves)
        out = out.mul_(2.0) if in_place else out * 2.0
        grads.append(torch.autograd.grad(out.square().sum(), leaves["x"])[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_activations(activation: str, dtype: torch.dtype, device: torch.device) -> None:
    args = {**layernorm_mlp(2, 17, 32, 64), "activation": activation}
    check_parity("layernorm_mlp", args, dtype, device)


@pytest.mark.parametrize("op", WITH_NORM)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_rmsnorm(op: str, dtype: torch.dtype, device: torch.device) -> None:
    args = {**OPS[op](2, 17, 72, 24), "norm_bias": None, "norm_kind": "rmsnorm"}
    check_parity(op, args, dtype, device)
    check_parity(op, args, dtype, device, autocast=dtype != torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_scale_of_attention(dtype: torch.dtype, device: torch.device) -> None:
    args = {**layernorm_attention(2, 17, 72, 24), "scale": 0.4}
    check_parity("layernorm_attention", args, dtype, device)


def three_ops(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    heads: int,
    layer_scale: torch.Tensor | None,
    path_scale: torch.Tensor | None,
) -> torch.Tensor:
    """What `layernorm_attention` replaces."""
    qkv, x = ops.layernorm_linear_fork(x, norm_weight, norm_bias, qkv_weight, qkv_bias)
    o = ops.attention_qkv(qkv.unflatten(-1, (3, heads, -1))).flatten(2)
    return ops.linear_residual(o, proj_weight, proj_bias, x, layer_scale, path_scale)


@pytest.mark.parametrize("absent", ["", "layer_scale", "path_scale", "layer_scale path_scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_attention_branch_is_its_three_ops(
    dtype: torch.dtype, absent: str, device: torch.device
) -> None:
    """Bit for bit: output and every gradient, and the output without gradients; in bfloat16 by
    autocast, with all arguments in float32."""
    args = layernorm_attention(3, 50, 72, 24) | dict.fromkeys(absent.split())
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with fastvit.use_backend("triton"), autocast:
        got, expected = (results(f, args, device) for f in (ops.layernorm_attention, three_ops))
        with torch.no_grad():
            given = placed(args, device)
            got["alone"], expected["alone"] = ops.layernorm_attention(**given), three_ops(**given)
    assert got.keys() == expected.keys() and len(got) == len(wanting(args)) + 2
    for name in expected:
        assert torch.equal(got[name], expected[name]), name
        assert got[name].dtype == expected[name].dtype, name


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_recompute_saves_the_arguments_alone(backend: str, device: torch.device) -> None:
    """The same output and gradients, bit for bit, without saving the hidden activation."""
    args = layernorm_mlp(2, 33, 48, 64)
    runs, saved = [], []
    for save in ("all", "recompute"):
        with fastvit.use_backend(backend), saved_bytes() as kept:
            runs.append(results(ops.layernorm_mlp, {**args, "save": save}, device))
        saved.append(sum(kept.values()))
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name]), name
    assert saved[0] - saved[1] >= 2 * 33 * 64 * 4
    with pytest.raises(ValueError, match="save 'none' is unknown"):
        ops.layernorm_mlp(**args, save="none")


def test_inference_writes_no_hidden_activation(device: torch.device) -> None:
    import fastvit_kernels.layernorm_mlp as kernel

    given = []
    launch = kernel.layernorm_mlp_fwd
    args = layernorm_mlp(2, 9, 32, 48)
    with pytest.MonkeyPatch.context() as patch, fastvit.use_backend("triton"):
        patch.setattr(kernel, "layernorm_mlp_fwd", lambda *a: given.append(launch(*a)) or given[-1])
        out = ops.layernorm_mlp(**{k: v.to(device) for k, v in args.items()})
        with torch.no_grad():
            again = ops.layernorm_mlp(**{k: v.to(device) for k, v in args.items()})
    assert torch.equal(out, again)
    assert [[t.shape for t in made[1:2]] for made in given] == [[(18, 48)], []]


def test_fork_adds_the_residuals_gradient(device: torch.device) -> None:
    """x, used again after the fork, gets the sum of both gradients; either may be absent. The
    rows of the residual's are apart, as those of a piece of a concatenation."""
    args = layernorm_linear(2, 17, 40, 24)
    for uses in ("both", "product", "residual"):
        grads = []
        for backend in ("reference", "triton"):
            given = {
                k: v.detach().to(device).requires_grad_(v.requires_grad) for k, v in args.items()
            }
            with fastvit.use_backend(backend):
                y, x = ops.layernorm_linear_fork(**given)
            loss = (y.square().sum() if uses != "residual" else 0) + (
                torch.cat((x, y.detach()), -1).pow(3).sum() if uses != "product" else 0
            )
            assert isinstance(loss, torch.Tensor)
            loss.backward()
            grads.append({k: v.grad for k, v in given.items() if v.grad is not None})
        assert grads[0].keys() == grads[1].keys()
        for name, grad in grads[0].items():
            torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-3)


def test_one_row_and_its_gradient_at_stride_zero(device: torch.device) -> None:
    ones, zeros, weight = torch.ones(16), torch.zeros(16), torch.randn(24, 16)
    grads = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        x = torch.randn(16, device=device, requires_grad=True)
        norm = (ones.to(device), zeros.to(device), weight.to(device))
        with fastvit.use_backend(backend):
            (ops.swiglu(x).sum() + ops.layernorm_linear(x, *norm).sum()).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


@every_op
@pytest.mark.parametrize("trained", ["", "norm", "weight", "fc1|qkv|^bias", "scale|bias"])
def test_frozen_parameters(op: str, trained: str, device: torch.device) -> None:
    """What is trained beside frozen parameters gets bitwise the gradient that it gets beside
    trained ones, as x does; frozen parameters get none.
    """
    grads: list[dict[str, torch.Tensor]] = []
    for pattern in (".", trained or "^$"):
        args = placed(OPS[op](2, 17, 40, 24), device)
        torch.manual_seed(0)
        for name, value in args.items():
            if name == "heads":
                continue
            value.copy_(torch.randn(value.shape))
            chosen = re.search(pattern, name) and name != "path_scale"
            value.requires_grad_(name in ("x", "residual") or bool(chosen))
        with fastvit.use_backend("triton"):
            getattr(ops, op)(**args).square().sum().backward()
        tensors = {k: v for k, v in args.items() if k != "heads"}
        assert all(v.requires_grad == (v.grad is not None) for v in tensors.values())
        grads.append({k: v.grad for k, v in tensors.items() if v.grad is not None})
    for name, grad in grads[1].items():
        assert torch.equal(grad, grads[0][name]), name


@pytest.mark.parametrize("op", WITH_NORM)
def test_no_norm_is_summed_for_frozen_parameters(
    op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, launch = [], layernorm.layernorm_bwd
    monkeypatch.setattr(layernorm, "layernorm_bwd", lambda *a: made.append(launch(*a)) or made[-1])
    for frozen in (False, True):
        args = placed(OPS[op](2, 17, 40, 24), device)
        args["x"].requires_grad_()
        args["norm_weight"].requires_grad_(not frozen)
        with fastvit.use_backend("triton"):
            getattr(ops, op)(**args).sum().backward()
    assert [norm_rows is None for *_, norm_rows in made] == [False, True]


@pytest.mark.parametrize("op", WITH_NORM)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
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
    args = OPS[op](2, 9, 24, 40)
    width = args["x"].shape[-1]
    for x in (
        leaf(2, 12, width)[:, 3:],
        leaf(2, 9, 2 * width)[..., ::2],
        leaf(2, 9, 2 * width)[..., :width],
        # 8, but not 16, divides the length of a row, and not even 8 its stride.
        leaf(2, 9, width + 4)[..., :width],
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


def test_more_partial_sums_than_are_added_at_a_time(device: torch.device) -> None:
    """Rows of a norm's gradients, alone and beside a weight's; columns of tiles, for a bias."""
    rows, vector = torch.randn(70, 2, 24, device=device), torch.empty(24, device=device)
    norm = rows, vector, vector
    g, x = torch.randn(8, 8, device=device), torch.randn(8, 2184, device=device)
    slabs = gemm_dw.gemm_dw(g, x)
    assert slabs.columns > 16
    alone = parameter_grads.reduce_norm(norm)
    grads = parameter_grads.reduce_slabs(slabs, x.new_empty(8, 2184), g[0], norm=norm)
    for got in (alone, grads):
        torch.testing.assert_close(got[-2:], tuple(rows.sum(0)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[:2], (g.T @ x, g.sum(0)), rtol=1e-5, atol=1e-5)


@every_op
def test_empty(op: str, device: torch.device) -> None:
    args = OPS[op](1, 9, 32, 48)
    rows = {k: args[k][:0].detach() for k in ("x", "residual", "path_scale") if k in args}
    empty = args | {k: v.requires_grad_(k != "path_scale") for k, v in rows.items()}
    with fastvit.use_backend("triton"):
        got = results(getattr(ops, op), empty, device)
    assert got["out"].shape[:2] == (0, 9)
    assert not any(v.any() for v in got.values())


@every_op
def test_nan_stays_in_its_row(op: str, device: torch.device) -> None:
    args = placed(OPS[op](2, 9, 32, 48), device)
    args["x"][1, 4, 3] = float("nan")
    args["path_scale"] = torch.ones(2, device=device)
    if op == "layernorm_linear":
        del args["path_scale"]
    with fastvit.use_backend("triton"):
        nan = getattr(ops, op)(**args).isnan()
    # All rows of an image attend to its keys.
    own = nan[1] if op == "layernorm_attention" else nan[1, 4]
    assert own.all() and int(nan.sum()) == own.numel()


@every_op
def test_repeatable_compiled_and_first_order(op: str, device: torch.device) -> None:
    args = OPS[op](3, 50, 40, 136)
    check_repeatable(op, args, torch.bfloat16, device)
    check_compiles(op, args, device)
    check_plain_backward(op, args, device)


@every_op
def test_saved_bytes_are_what_the_docstring_says(op: str, device: torch.device) -> None:
    """Under autocast: float32 residual stream, bf16 products."""
    B, N, C, F = 2, 33, 48, 64
    args = OPS[op](B, N, C, F)
    wanted, args = wanting(args), placed(args, device)
    for name in wanted:
        args[name].requires_grad_()
    params = {args[name].untyped_storage().data_ptr() for name in wanted if name != "x"}
    params |= {v.untyped_storage().data_ptr() for k, v in args.items() if k == "path_scale"}
    autocast = torch.autocast(device.type, torch.bfloat16)
    with fastvit.use_backend("triton"), autocast, saved_bytes() as saved:
        getattr(ops, op)(**args)
    activations = sum(size for pointer, size in saved.items() if pointer not in params)
    M, stats, weight = B * N, 8, 2 * C * F
    inner = 48  # 4 of which are qkv and o; lse is one float32 for each of two heads
    expected = {
        "layernorm_linear": M * (4 * C + stats) + weight,
        "linear_residual": M * 2 * F + weight,
        "layernorm_attention": M * (4 * C + 2 * 4 * inner + 4 * 2 + stats) + 2 * 4 * inner * C,
        "layernorm_mlp": M * (4 * C + 2 * F + stats) + 2 * weight,
    }
    assert activations == expected[op]


@triton.jit
def _gelu_kernel(x_ptr, y_ptr, dy_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, gelu(x, "gelu", False))
    tl.store(dy_ptr + offs, dgelu(x, "gelu", False))


def test_cheap_erf_is_under_half_a_rounding_of_16_bits(device: torch.device) -> None:
    """The GELU formula of 16-bit kernels against float64, value and slope, on [-12, 12]."""
    x = torch.linspace(-12, 12, 1 << 14, device=device)
    y, dy = torch.empty_like(x), torch.empty_like(x)
    _gelu_kernel[(1,)](x, y, dy, BLOCK=x.numel())  # pyright: ignore[reportArgumentType]
    truth = x.double().requires_grad_()
    value = torch.nn.functional.gelu(truth)
    value.sum().backward()
    assert truth.grad is not None
    assert float((y.double() - value.detach()).abs().max()) < 1e-6
    assert float((dy.double() - truth.grad).abs().max()) < 1e-6


def test_what_the_kernel_lacks_runs_in_eager_and_says_so(device: torch.device) -> None:
    args = placed(layernorm_mlp(2, 5, 16, 24), device)
    ops.layernorm_mlp(**args, dropout=0.5)
    with fastvit.use_backend("triton"), pytest.raises(RuntimeError, match="not in the kernel"):
        ops.layernorm_mlp(**args, dropout=0.5)


def test_rmsnorm_is_its_formula() -> None:
    x = torch.randn(2, 5, 16)
    got = ops.layernorm_linear(x, None, None, torch.eye(16), norm_kind="rmsnorm")
    torch.testing.assert_close(got, x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())


def _names(f: Callable) -> set[str]:
    return set(f(1, 1, 8, 8))


def test_every_argument_of_the_ops_is_tested() -> None:
    import inspect

    for op, make in OPS.items():
        arguments = set(inspect.signature(getattr(ops, op)).parameters)
        others = {"eps", "activation", "dropout", "norm_kind", "save", "scale"}
        assert arguments - _names(make) <= others
