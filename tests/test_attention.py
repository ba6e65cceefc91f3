"""Attention against float64: forward and every gradient, odd sizes, all head dims, bad values."""

import math

import pytest
import torch
from checks import check, dtype_name
from fastvit_kernels import tuned, tuned_attention
from parity import (
    DTYPES,
    check_compiles,
    check_parity,
    check_plain_backward,
    check_repeatable,
    leaf,
)

import fastvit
from fastvit import ops, reference

HEAD_DIMS = [16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("N", [1, 2, 17, 50, 64, 65, 128, 197])
def test_tokens(N: int, dtype: torch.dtype, device: torch.device) -> None:
    check_parity("attention_qkv", {"qkv": leaf(1, N, 3, 2, 64)}, dtype, device)


@pytest.mark.slow
@pytest.mark.parametrize("N", [257, 577, 785])
def test_many_tokens(N: int, device: torch.device) -> None:
    check_parity("attention_qkv", {"qkv": leaf(1, N, 3, 1, 64)}, torch.bfloat16, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_head_dims(D: int, dtype: torch.dtype, device: torch.device) -> None:
    check_parity("attention_qkv", {"qkv": leaf(2, 37, 3, 1, D)}, dtype, device)


@pytest.mark.parametrize("scale", [0.01, 0.5, 1.0])
def test_scale(scale: float, device: torch.device) -> None:
    check_parity("attention_qkv", {"qkv": leaf(1, 33, 3, 2, 32), "scale": scale}, device=device)


def test_separate_and_strided(device: torch.device) -> None:
    heads_first = (leaf(2, 3, 21, 32, grad=False).transpose(1, 2) for _ in range(3))
    q, k, v = (t.requires_grad_() for t in heads_first)
    check_parity("attention", {"q": q, "k": k, "v": v}, device=device)
    dim_first = leaf(2, 32, 3, 21, grad=False).permute(0, 3, 2, 1).requires_grad_()
    check_parity("attention", {"q": dim_first, "k": k, "v": v}, device=device)


def test_autocast(device: torch.device) -> None:
    args = {"qkv": leaf(2, 21, 3, 2, 32)}
    check_parity("attention_qkv", args, torch.bfloat16, device, autocast=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize(("size", "N"), [(1, 40), (1, 140), (1, 400), (512, 140), (512, 400)])
def test_large_scores(
    size: int, N: int, dtype: torch.dtype, device: torch.device, on_gpu: bool
) -> None:
    """q and k of 1e3; and of 5e5, where dQ scales scores by a power of two."""
    qkv = leaf(1, N, 3, 1, 16, grad=False)
    qkv[:, :, :2] *= 1e3
    if not on_gpu:  # numpy's order of summation depends on the shape: make all sums exact
        qkv[:, :, :2] = 16 * (qkv[:, :, :2] / 16).round()
    qkv[:, :, :2] *= size
    check_parity("attention_qkv", {"qkv": qkv.requires_grad_()}, dtype, device)


def test_large_scores_do_not_round_dq(device: torch.device) -> None:
    """The exponent of p is rounded by up to half a unit, which dQ makes good. Scores of 9e6, off by
    a few: eager rounds them as much, so that dQ is compared with float64 alone."""
    q, k, v = torch.randn(3, 1, 256, 1, 16).unbind(0)
    q = torch.zeros_like(q)
    q[..., 0], k[..., 0] = 3e6, 1
    do = torch.randn_like(v)

    def dq(backend: str, *tensors: torch.Tensor) -> torch.Tensor:
        q, k, v, do = (t.to(device) for t in tensors)
        with fastvit.use_backend(backend):
            o = ops.attention(q.requires_grad_(), k, v, scale=math.log(2) / 3)
        return torch.autograd.grad(o, q, do)[0].double()

    got = dq("triton", q, k, v, do)
    truth = dq("reference", *(t.double() for t in (q, k, v, do)))
    torch.testing.assert_close(got, truth, rtol=0, atol=2e-6)


@pytest.mark.parametrize("N", [140, 180, 330])
def test_tiles_of_many_heads(N: int, device: torch.device, on_gpu: bool) -> None:
    """One head fills the one SM. On sm_90 the last queries take one step in dK and dV, then two;
    the last keys a tile of 16, then a whole one with a mask; 330 queries take tiles of 128."""
    arch = tuned.arch(torch.cuda.current_device()) if on_gpu else 90
    with tuned.target(arch, sms=1):
        check_parity("attention_qkv", {"qkv": leaf(1, N, 3, 1, 64)}, torch.bfloat16, device)


@pytest.mark.parametrize(("N", "H"), [(20, 2), (20, 1), (130, 2)])
def test_keys_past_the_last_get_no_weight_in_backward(N: int, H: int, device: torch.device) -> None:
    """All scores are far below zero, the score of the zeros that fill up a tile, at lengths and
    heads that take each way of backward."""
    qkv = leaf(1, N, 3, H, 16, grad=False)
    qkv[:, :, 0] = 16
    qkv[:, :, 1] = qkv[:, :, 1].round() - 32
    check_parity("attention_qkv", {"qkv": qkv.requires_grad_()}, device=device)


def test_equal_scores_give_the_mean(device: torch.device) -> None:
    qkv = torch.randn(1, 50, 3, 2, 32, device=device)
    qkv[:, :, 0] = 0
    with fastvit.use_backend("triton"):
        o = ops.attention_qkv(qkv)
    torch.testing.assert_close(o, qkv[:, :, 2].mean(1, keepdim=True).expand_as(o))


def test_nan_and_inf_stay_where_eager_has_them(device: torch.device) -> None:
    qkv = torch.randn(1, 70, 3, 3, 16, device=device)
    qkv[0, 3, 0, 0, 5] = float("nan")  # one query row of head 0
    qkv[0, 66, 1, 1, 2] = float("nan")  # one key: every row of head 1
    with fastvit.use_backend("triton"):
        got = ops.attention_qkv(qkv)
    check("o", got, reference.attention_qkv(qkv), reference.attention_qkv(qkv.double()))
    assert got[0, 3, 0].isnan().all() and got[0, :, 1].isnan().all()
    assert int(got.isnan().sum()) == 16 + 70 * 16


@pytest.mark.parametrize("N", [70, 140, 400])
def test_nan_in_gradients_stays_where_eager_has_it(N: int, device: torch.device) -> None:
    """NaN in do, in v or in one query, at lengths that take every regime of backward."""
    qkv, do = torch.randn(1, N, 3, 4, 16), torch.randn(1, N, 4, 16)
    do[0, 5, 0, 3] = float("nan")
    qkv[0, 60, 2, 1, 3] = float("nan")
    qkv[0, 61, 0, 2, 3] = float("nan")

    def gradient(backend: str, dtype: torch.dtype) -> torch.Tensor:
        x = qkv.to(device, dtype).requires_grad_()
        with fastvit.use_backend(backend):
            o = ops.attention_qkv(x)
        return torch.autograd.grad(o, x, do.to(o))[0]

    eager, truth = gradient("reference", torch.float32), gradient("reference", torch.float64)
    got = gradient("triton", torch.float32)
    check("dqkv", got, eager, truth)
    assert got[:, :, :, 0].isnan().any() and got[:, :, :, 3].isfinite().all()


@pytest.mark.parametrize("N", [80, 400])
def test_keys_of_minus_infinity_get_no_weight(N: int, device: torch.device) -> None:
    """More such keys than the first tile has, and in rows of several tiles."""
    q, v = (torch.randn(1, N, 1, 16, device=device).abs() for _ in range(2))
    k = torch.randn(1, N, 1, 16, device=device)
    k[:, : N - 10] = float("-inf")
    with fastvit.use_backend("triton"):
        got = ops.attention(q, k, v)
        alone = ops.attention(q[:, :10], k[:, N - 10 :], v[:, N - 10 :])
    assert got.isfinite().all()
    torch.testing.assert_close(got[:, :10], alone)


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 16), (2, 0, 3, 2, 16), (2, 5, 3, 0, 16)])
def test_empty(shape: tuple[int, ...], device: torch.device) -> None:
    qkv = torch.randn(shape, device=device, requires_grad=True)
    with fastvit.use_backend("triton"):
        o = ops.attention_qkv(qkv)
    o.sum().backward()
    assert o.shape == (shape[0], shape[1], shape[3], shape[4])
    assert qkv.grad is not None and qkv.grad.shape == shape


def test_lse(device: torch.device) -> None:
    q, k, _ = torch.randn(2, 67, 3, 2, 24, device=device).unbind(2)
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * 0.3
    for backend in ("triton", "reference"):
        with fastvit.use_backend(backend):
            lse = ops.attention_lse(q, k, 0.3)
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("N", "D"), [(70, 24), (130, 64), (400, 80)])
def test_repeatable(N: int, D: int, device: torch.device) -> None:
    check_repeatable("attention_qkv", {"qkv": leaf(1, N, 3, 1, D)}, torch.bfloat16, device)


def test_compiled_and_first_order(device: torch.device) -> None:
    args = {"qkv": leaf(2, 70, 3, 2, 24)}
    check_compiles("attention_qkv", args, device)
    check_plain_backward("attention_qkv", args, device)


@pytest.mark.parametrize("N", [197, 257, 577, 785, 1029, 1370])
@pytest.mark.parametrize("arch", [80, 90])
def test_tails_are_cut_to_size(N: int, arch: int) -> None:
    """Under 12 % of the scores computed in forward lie beyond the sequence."""
    from fastvit_kernels.attention_plan import plan_fwd

    c = plan_fwd(256 * 12, N, 64, torch.bfloat16, False, arch, 132).constants
    rows = N // c["BLOCK_M"] * c["BLOCK_M"] + c["TAIL_M"]
    keys = c["KEYS"] if "KEYS" in c else N // c["BLOCK_N"] * c["BLOCK_N"] + c["TAIL_N"]
    assert rows >= N and keys >= N
    assert 1 - N * N / (rows * keys) < 0.12


@pytest.mark.parametrize("kernel", ["fwd_resident", "bwd_64_keys", "dq_long", "dkv_even"])
@pytest.mark.parametrize("arch", [80, 90])
def test_what_16_bits_alone_take_is_not_for_float32(arch: int, kernel: str) -> None:
    assert tuned_attention.find(kernel, 64, torch.float32, arch) is None


@pytest.mark.parametrize("arch", [80, 90])
def test_columns_without_a_mask_are_keys(arch: int) -> None:
    from fastvit_kernels.attention_plan import plan_fwd

    for N in range(1, 225):
        c = plan_fwd(256 * 12, N, 64, torch.bfloat16, False, arch, 132).constants
        assert c["MASK_FROM"] < N <= c["KEYS"]


def test_batch_beyond_a_grid_is_refused_or_served_by_the_reference(device: torch.device) -> None:
    qkv = torch.zeros(65536, 1, 3, 1, 16, device=device)
    with fastvit.use_backend("triton"), pytest.raises(RuntimeError, match="batch 65536 is over"):
        ops.attention_qkv(qkv)
    assert ops.attention_qkv(qkv).shape == (65536, 1, 1, 16)
    # Compiled code may not choose by its batch.
    compiled = torch.compile(ops.attention_qkv, backend="aot_eager")
    with fastvit.use_backend("triton"), pytest.raises(RuntimeError, match="batch 65536 is over"):
        compiled(qkv)
