"""Attention over padded keys and packed images, and its maps: against float64 and one another."""

from typing import Any

import pytest
import torch
from checks import check, dtype_name
from fastvit_kernels import tuned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import DTYPES, check_compiles, check_parity, check_repeatable, leaf
from torch import Tensor

import fastvit
from fastvit import ops, reference


def examples(count: int) -> settings:
    health = [HealthCheck.function_scoped_fixture]
    return settings(deadline=None, database=None, max_examples=count, suppress_health_check=health)


def eager_attention(qkv: Tensor) -> Tensor:
    """Eager attention, padded to at least 32 tokens: for a handful of float32 tokens the CPU's GEMM
    sums in another order, more exact than a running sum can be.
    """
    B, N = qkv.shape[:2]
    padded = torch.nn.functional.pad(qkv, (0, 0) * 3 + (0, max(0, 32 - N)))
    lengths = torch.full((B,), N, device=qkv.device)
    return reference.attention_qkv(padded, key_padding=lengths)[:, :N]


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("lengths", [[130], [1, 17, 1], [64, 0, 50], [128, 129]], ids=str)
def test_packed(lengths: list[int], dtype: torch.dtype, device: torch.device) -> None:
    args = {"qkv": leaf(sum(lengths), 3, 2, 32), "cu_seqlens": bounds(lengths)}
    check_parity("attention_packed", {**args, "max_seqlen": max(lengths)}, dtype, device)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_tiles_of_128_queries(packed: bool, device: torch.device, on_gpu: bool) -> None:
    """Three heads fill the one SM. On sm_90 an image takes up to three tiles."""
    arch = tuned.arch(torch.cuda.current_device()) if on_gpu else 90
    lengths = [330, 20, 0]
    with tuned.target(arch, sms=1):
        if packed:
            args = {"qkv": leaf(350, 3, 1, 64), "cu_seqlens": bounds(lengths), "max_seqlen": 330}
            check_parity("attention_packed", args, torch.bfloat16, device)
        else:
            args = {"qkv": leaf(3, 330, 3, 1, 64), "key_padding": torch.tensor(lengths)}
            check_parity("attention_qkv", args, torch.bfloat16, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_one_image_of_one_token(dtype: torch.dtype, device: torch.device) -> None:
    """o = v, dv = do, and dq = dk = 0 but for the rounding of do . v, taken in two orders."""
    qkv = torch.randn(1, 3, 2, 32, device=device).to(dtype).requires_grad_()
    do = torch.randn(1, 2, 32, device=device).to(dtype)
    with fastvit.use_backend("triton"):
        o = ops.attention_packed(qkv, bounds([1]).to(device), 1)
    o.backward(do)
    assert qkv.grad is not None
    assert torch.equal(o, qkv[:, 2]) and torch.equal(qkv.grad[:, 2], do)
    terms = (do * qkv[:, 2]).abs().sum(-1, keepdim=True).float()
    bound = 32 * torch.finfo(torch.float32).eps * terms * 32**-0.5
    for grad, other in ((qkv.grad[:, 0], qkv[:, 1]), (qkv.grad[:, 1], qkv[:, 0])):
        assert (grad.float().abs() <= bound * other.float().abs()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("N", [1, 50, 140])
def test_key_padding(N: int, dtype: torch.dtype, device: torch.device) -> None:
    lengths = torch.tensor([N, 1, 0, N // 2])
    args = {"qkv": leaf(4, N, 3, 1, 24), "key_padding": lengths}
    check_parity("attention_qkv", args, dtype, device)


def test_key_padding_of_separate_strided_tensors(device: torch.device) -> None:
    q, k, v = (leaf(2, 2, 40, 16, grad=False).transpose(1, 2).requires_grad_() for _ in range(3))
    args = {"q": q, "k": k, "v": v, "key_padding": torch.tensor([33, 40], dtype=torch.int32)}
    check_parity("attention", args, device=device)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_padding_holds_does_not_matter(bad: float, device: torch.device) -> None:
    qkv = torch.randn(2, 40, 3, 2, 16, device=device)
    lengths = torch.tensor([30, 17], device=device)
    dirty = qkv.clone()
    for b, n in enumerate(lengths.tolist()):
        dirty[b, n:, 1:] = bad
    grads = []
    for x in (qkv, dirty):
        x.requires_grad_()
        with fastvit.use_backend("triton"):
            o = ops.attention_qkv(x, key_padding=lengths)
        o[:, :17].sum().backward()
        grads.append((o, x.grad))
    (o, grad), (o_dirty, grad_dirty) = grads
    assert torch.equal(o, o_dirty)
    assert torch.equal(grad, grad_dirty)
    for b, n in enumerate(lengths.tolist()):
        assert (grad[b, n:, 1:] == 0).all()


def test_a_longest_length_may_be_far_too_long(device: torch.device) -> None:
    x, ends = torch.randn(43, 3, 2, 16, device=device), bounds([40, 3]).to(device)
    with fastvit.use_backend("triton"):
        assert torch.equal(*(ops.attention_packed(x, ends, n) for n in (40, 1 << 30)))


def test_ragged_is_repeatable_and_compiles(device: torch.device) -> None:
    lengths = [40, 3, 70]
    args = {"qkv": leaf(sum(lengths), 3, 2, 16), "cu_seqlens": bounds(lengths), "max_seqlen": 70}
    check_repeatable("attention_packed", args, torch.bfloat16, device)
    check_compiles("attention_packed", args, device)
    padded = {"qkv": leaf(2, 40, 3, 1, 16), "key_padding": torch.tensor([40, 9])}
    check_repeatable("attention_qkv", padded, torch.float16, device)
    check_compiles("attention_qkv", padded, device)


@examples(25)
@given(data=st.data())
def test_packed_is_padded_is_one_by_one(data: st.DataObject, device: torch.device) -> None:
    lengths = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=4))
    H, D = data.draw(st.integers(1, 2)), 8 * data.draw(st.integers(2, 16))
    qkv = torch.randn(sum(lengths), 3, H, D, device=device)
    parts = qkv.split(lengths)
    padded = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    with fastvit.use_backend("triton"):
        packed = ops.attention_packed(qkv, bounds(lengths).to(device), max(lengths))
        in_rows = ops.attention_qkv(padded, key_padding=torch.tensor(lengths, device=device))
        alone = [ops.attention_qkv(part[None])[0] for part in parts]
    truth = torch.cat([reference.attention_qkv(part[None].double())[0] for part in parts])
    eager = torch.cat([eager_attention(part[None])[0] for part in parts])
    for name, got in {
        "packed": packed,
        "padded": torch.cat([row[:n] for row, n in zip(in_rows, lengths, strict=True)]),
        "alone": torch.cat(alone),
    }.items():
        check(f"{name} {lengths}", got, eager, truth)


@examples(25)
@given(data=st.data())
def test_order_of_keys_does_not_matter(data: st.DataObject, device: torch.device) -> None:
    N, D = data.draw(st.integers(1, 150)), 8 * data.draw(st.integers(2, 16))
    qkv = torch.randn(1, N, 3, 1, D, device=device)
    q, k, v = qkv.unbind(2)
    order = torch.randperm(N, device=device)
    with fastvit.use_backend("triton"):
        shuffled = ops.attention(q, k[:, order], v[:, order])
    check(f"N {N} D {D}", shuffled, eager_attention(qkv), reference.attention_qkv(qkv.double()))


@examples(25)
@given(data=st.data())
def test_appending_masked_tokens_changes_nothing(data: st.DataObject, device: torch.device) -> None:
    N, extra = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 150))
    D = 8 * data.draw(st.integers(2, 16))
    qkv = torch.randn(2, N + extra, 3, 1, D, device=device)
    lengths = torch.tensor([N, N], device=device)
    with fastvit.use_backend("triton"):
        padded = ops.attention_qkv(qkv, key_padding=lengths)[:, :N]
    alone = qkv[:, :N]
    truth = reference.attention_qkv(alone.double())
    check(f"N {N} + {extra} D {D}", padded, eager_attention(alone), truth)


@pytest.mark.slow
@examples(500)
@given(data=st.data())
def test_any_shape(data: st.DataObject, device: torch.device) -> None:
    """Any length, head dim and dtype, with and without key padding, QK-norm and RoPE."""
    N, D = data.draw(st.integers(2, 300)), 8 * data.draw(st.integers(2, 16))
    B, H = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    args: dict[str, Any] = {"qkv": leaf(B, N, 3, H, D)}
    if data.draw(st.booleans()):
        # Not 1: dq and dk are then zeros, with no scale to compare their rounding errors with.
        lengths = st.integers(0, N).filter(lambda n: n != 1)
        args["key_padding"] = torch.tensor([data.draw(lengths) for _ in range(B)])
    if data.draw(st.booleans()):
        angles = torch.randn(data.draw(st.integers(1, N)), D // 2)
        args |= {"cos": angles.cos(), "sin": angles.sin()}
        args["interleaved"] = data.draw(st.booleans())
    if data.draw(st.booleans()):
        args["norm_kind"] = data.draw(st.sampled_from(["layernorm", "rmsnorm"]))
        args |= {"q_weight": leaf(D), "k_weight": leaf(D)}
    dtype = data.draw(st.sampled_from(DTYPES))
    check_parity("attention_qkv", args, dtype, device, together=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("rows", [(0,), (0, 7, -1), tuple(range(40))], ids=len)
@pytest.mark.parametrize("lse_known", [False, True])
def test_maps(
    rows: tuple[int, ...], lse_known: bool, dtype: torch.dtype, device: torch.device
) -> None:
    q, k, _ = torch.randn(2, 70, 3, 2, 24, device=device).to(dtype).unbind(2)
    with fastvit.use_backend("triton"):
        lse = ops.attention_lse(q, k) if lse_known else None
        got = ops.attention_maps(q, k, lse, rows)
    truth = torch.einsum("brhd,bnhd->bhrn", q.double()[:, list(rows)], k.double()) * 24**-0.5
    eager = reference.attention_maps(q, k, reference.attention_lse(q, k), rows)
    assert got.shape == (2, 2, len(rows), 70) and got.dtype == torch.float32
    check("maps", got, eager, truth.softmax(-1), dtype)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 2, len(rows), device=device))


@pytest.mark.parametrize("N", [1, 64, 300])
def test_maps_of_one_head_shared_by_programs(N: int, device: torch.device) -> None:
    """Scores that grow with the key, so that the running maximum moves."""
    q, k = torch.randn(2, 1, N, 1, 16, device=device)
    k += q[:, :1] * torch.arange(N, device=device)[:, None, None] / 100
    with fastvit.use_backend("triton"):
        got = ops.attention_maps(q, k, rows=(0, N - 1))
    truth = reference.attention_maps(q.double(), k.double(), rows=(0, N - 1))
    check("maps", got, reference.attention_maps(q, k, rows=(0, N - 1)), truth.double())


def test_maps_sum_to_the_output(device: torch.device) -> None:
    q, k, v = torch.randn(1, 33, 3, 2, 16, device=device).unbind(2)
    with fastvit.use_backend("triton"):
        maps = ops.attention_maps(q, k, ops.attention_lse(q, k, 0.3), range(33), 0.3)
        o = ops.attention(q, k, v, 0.3)
    torch.testing.assert_close(torch.einsum("bhmn,bnhd->bmhd", maps, v), o)


@pytest.mark.parametrize(("B", "rows"), [(0, (0,)), (1, ())])
def test_maps_of_nothing(B: int, rows: tuple[int, ...], device: torch.device) -> None:
    q = torch.randn(B, 5, 2, 16, device=device)
    with fastvit.use_backend("triton"):
        assert ops.attention_maps(q, q, rows=rows).shape == (B, 2, len(rows), 5)


X = torch.randn(4, 3, 2, 16)
ENDS = torch.tensor([0, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.attention_packed(X[None], ENDS, 4), ValueError, r"qkv must be \(total, 3"),
        (lambda: ops.attention_packed(X, ENDS[None], 4), ValueError, "cu_seqlens must have 1"),
        (lambda: ops.attention_packed(X, ENDS.float(), 4), TypeError, "cu_seqlens must be int32"),
        (lambda: ops.attention_packed(X, ENDS, 0), ValueError, "max_seqlen must be at least 1"),
        (
            lambda: ops.attention_qkv(X[None], key_padding=torch.tensor([1, 2])),
            ValueError,
            r"key_padding must be \(1,\), got \(2,\)",
        ),
        (
            lambda: ops.attention_qkv(X[None], key_padding=torch.tensor([True])),
            TypeError,
            "key_padding must be int32 or int64, got torch.bool",
        ),
        (
            lambda: ops.attention_maps(X[None, :, 0], X[None, :, 1], rows=(4,)),
            ValueError,
            r"rows \[4\] are out of range for 4 tokens",
        ),
        (
            lambda: ops.attention_maps(X[None, :, 0], X[None, :, 1], torch.zeros(1, 4, 2)),
            ValueError,
            r"lse must be \(1, 2, 4\), got \(1, 4, 2\)",
        ),
    ],
)
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_scale_that_is_not_positive_is_the_reference_s(device: torch.device) -> None:
    qkv = torch.randn(1, 5, 3, 1, 16, device=device)
    torch.testing.assert_close(
        ops.attention_qkv(qkv, 0.0)[0], qkv[0, :, 2].mean(0).expand(5, 1, 16)
    )
    with fastvit.use_backend("triton"), pytest.raises(RuntimeError, match=r"scale 0\.0 is not"):
        ops.attention_qkv(qkv, 0.0)
