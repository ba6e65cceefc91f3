"""LayerNorm folded into the GEMM that follows, against float64, and when folding is chosen."""

import pytest
import torch
from fastvit_kernels import gemm, layernorm_fold, tuned
from parity import (
    check_compiles,
    check_parity,
    check_repeatable,
    fold_every_norm,
    half,
    record_launches,
)
from test_gemm_ops import OPS, WITH_NORM, placed

import fastvit
from fastvit import ops

every_op = pytest.mark.parametrize("op", WITH_NORM)


@pytest.fixture(params=["tma", "pointers"])
def folds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fold every norm of 16-bit GEMMs, through TMA or pointers; the names of the GEMMs launched."""
    fold_every_norm(monkeypatch)
    if request.param == "pointers":
        monkeypatch.setattr(gemm, "tma_compatible", lambda *tensors: False)
    return record_launches(monkeypatch, gemm)


@every_op
@half
@pytest.mark.parametrize(
    "size",
    [
        (1, 1, 8, 16),
        (2, 17, 72, 24),
        (3, 50, 40, 136),
        pytest.param((2, 197, 64, 192), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_parity(
    op: str,
    size: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    folds: list[str],
    request: pytest.FixtureRequest,
) -> None:
    check_parity(op, OPS[op](*size), dtype, device)
    check_parity(op, OPS[op](*size), dtype, device, autocast=True)
    if "tma" in request.node.callspec.id and device.type == "cpu":
        assert folds[0] == "_gemm_tma_kernel"


@every_op
@half
@pytest.mark.parametrize(
    "absent", ["norm_weight", "norm_bias", "bias", "qkv_bias", "fc1_bias", "all"]
)
def test_without(
    op: str, absent: str, dtype: torch.dtype, device: torch.device, folds: list[str]
) -> None:
    args = OPS[op](2, 9, 32, 48)
    args |= {k: None for k in args if absent in (k, "all") and ("bias" in k or "norm" in k)}
    check_parity(op, args, dtype, device)


@every_op
@half
def test_rmsnorm(op: str, dtype: torch.dtype, device: torch.device, folds: list[str]) -> None:
    args = {**OPS[op](2, 17, 72, 24), "norm_bias": None, "norm_kind": "rmsnorm"}
    check_parity(op, args, dtype, device)


@every_op
@half
@pytest.mark.parametrize(
    "case",
    [
        "mean",
        "constant",
        "outlier",
        "spread weights",
        "small weights",
        "small",
        "tiny",
        "tiny, far",
        "large",
    ],
)
def test_accuracy_where_folding_might_lose_it(
    case: str, op: str, dtype: torch.dtype, device: torch.device, folds: list[str]
) -> None:
    """Rows with a mean of 100 deviations; constant rows; a channel 300 times as large as the others
    with a small norm weight, as in trained models; norm weights of 0 and 50, and of 1e-4; rows
    scaled by 1e-2, by 1e3, and by 1e-5, where eps exceeds the variance, with a mean of zero and of
    20 deviations.
    """
    args = OPS[op](2, 33, 96, 64)
    x, norm_weight = args["x"].detach(), args["norm_weight"].detach()
    if case == "mean":
        x += 100
    elif case == "constant":
        x[:, ::2] = torch.tensor([0.0, 1.0, -3.0, 100.0, 1e-3]).repeat(4)[:17, None]
    elif case == "outlier":
        x[..., 5] = 300 + x[..., 5]
        norm_weight[5] = 0.02
    elif case == "spread weights":
        norm_weight[::7] = 0
        norm_weight[3::7] = 50
        if op == "layernorm_attention":  # else each query has one key, whose error is luck
            args["qkv_weight"].detach().view(3, -1)[:2] /= 16
    elif case == "small weights":
        norm_weight *= 1e-4
    else:
        x += 20 * (case == "tiny, far")
        x *= {"small": 1e-2, "large": 1e3}.get(case, 1e-5)
    if case in ("small weights", "tiny", "tiny, far"):  # a bias would hide their error
        args |= {name: None for name in args if "bias" in name}
    check_parity(op, args, dtype, device)
    check_parity(op, args, dtype, device, autocast=True)


@every_op
def test_nan_stays_in_its_row(op: str, device: torch.device, folds: list[str]) -> None:
    args = {
        k: v.bfloat16() if isinstance(v, torch.Tensor) else v
        for k, v in placed(OPS[op](2, 9, 32, 48), device).items()
    }
    args["x"][1, 4, 3] = float("nan")
    with fastvit.use_backend("triton"):
        out = getattr(ops, op)(**args)
    # All rows of an image attend to its keys.
    own = out[1] if op == "layernorm_attention" else out[1, 4]
    assert own.isnan().all() and int(out.isnan().sum()) == own.numel()


@every_op
def test_repeatable_and_compiled(op: str, device: torch.device, folds: list[str]) -> None:
    args = OPS[op](2, 33, 48, 64)
    check_repeatable(op, args, torch.bfloat16, device)
    args = {
        k: v.detach().bfloat16().requires_grad_(v.requires_grad)
        if isinstance(v, torch.Tensor)
        else v
        for k, v in args.items()
    }
    check_compiles(op, args, device)


def test_weight_of_other_strides(device: torch.device, folds: list[str]) -> None:
    args = OPS["layernorm_linear"](2, 33, 48, 64)
    args["weight"] = args["weight"].detach().t().contiguous().t().requires_grad_()
    check_parity("layernorm_linear", args, torch.bfloat16, device)


@pytest.mark.parametrize("name", ["x", "weight"])
def test_rows_at_a_stride_that_8_does_not_divide(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8, but not 16, divides their length."""
    fold_every_norm(monkeypatch)
    args = OPS["layernorm_linear"](2, 9, 24, 40)
    wide = torch.nn.functional.pad(args[name].detach().bfloat16(), (0, 4))
    args[name] = wide[..., :24].requires_grad_()
    check_parity("layernorm_linear", args, torch.bfloat16, device)


def test_what_is_folded() -> None:
    """W', s and b' agree with the formula of `layernorm_fold`; s is the sum of the rounded W'."""
    if torch.cuda.is_available():
        pytest.skip("the launcher wants tensors of the GPU")
    args = {k: v.detach() for k, v in OPS["layernorm_linear"](2, 9, 40, 24).items()}
    x, weight = args["x"].flatten(0, 1).bfloat16(), args["weight"].bfloat16()
    norm_weight, norm_bias, bias = args["norm_weight"], args["norm_bias"], args["bias"]
    folded, _, sums, folded_bias, _, _, mean, rstd = layernorm_fold.layernorm_fold(
        x, norm_weight, norm_bias, weight, bias, 1e-6, False, torch.bfloat16
    )
    wide = weight.double()
    torch.testing.assert_close(folded.double(), (wide * norm_weight).bfloat16().double())
    torch.testing.assert_close(sums.double(), folded.double().sum(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        folded_bias.double(), bias + wide @ norm_bias.double(), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(mean.double(), x.double().mean(1), rtol=0, atol=1e-6)
    rstd64 = (x.double().var(1, unbiased=False) + 1e-6).rsqrt()
    torch.testing.assert_close(rstd.double(), rstd64, rtol=1e-6, atol=0)


def test_where_it_is_chosen() -> None:
    """For 16-bit products with so many rows that rewriting the weight is cheap."""
    assert tuned.norm_placement(256 * 197, 3072, torch.bfloat16) == "fold"
    assert tuned.norm_placement(197, 3072, torch.bfloat16) == "row"
    assert tuned.norm_placement(256 * 197, 3072, torch.float32) == "load"
