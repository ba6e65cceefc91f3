"""Dropout inside attention: its rate, its independence, and one mask in forward and in backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import check, dtype_name
from parity import DTYPES, check_plain_backward, leaf, results
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastvit
from fastvit import ops, reference

RATE = 0.3


def kept(B: int, N: int, H: int, seed: int, device: torch.device, D: int = 64) -> Tensor:
    """The dropout mask of the kernel, (B, H, N, N): 0 or 1 / (1 - RATE).

    With all scores equal and unit vectors for values, o is the mask divided by N.
    """
    q = torch.zeros(B, N, H, D, device=device)
    columns = []
    for first in range(0, N, D):
        unit = torch.eye(D, device=device)[: N - first]
        v = torch.zeros_like(q)
        v[:, first : first + D] = unit[:, None]
        torch.manual_seed(seed)
        with fastvit.use_backend("triton"):
            columns.append(ops.attention(q, q, v, dropout=RATE)[..., : len(unit)])
    return N * torch.cat(columns, dim=-1).transpose(1, 2)


def attention_with(mask: Tensor, qkv: Tensor, key_padding: Tensor | None = None) -> Tensor:
    """Eager attention with a given dropout mask."""
    q, k, v = qkv.unbind(2)
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * q.shape[-1] ** -0.5
    if key_padding is not None:
        real = torch.arange(q.shape[1], device=q.device) < key_padding[:, None]
        scores = scores.masked_fill(~real[:, None, None], -torch.inf)
    p = scores.float() if qkv.dtype != torch.float64 else scores
    return torch.einsum("bhmn,bnhd->bmhd", (p.softmax(-1) * mask).to(v.dtype), v)


def check_dropout(
    args: dict[str, Any], got: Callable[..., Tensor], eager: Callable[..., Tensor], device: Any
) -> None:
    def seeded(**kwargs: Any) -> Tensor:
        torch.manual_seed(7)
        return got(**kwargs, dropout=RATE)

    qkv = args["qkv"]
    wide = {**args, "qkv": qkv.detach().double().requires_grad_()}
    with fastvit.use_backend("triton"):
        ours = results(seeded, args, device)
    theirs = results(eager, args, device)
    truth = results(eager, wide, device, dout_dtype=qkv.dtype)
    for name in truth:
        check(f"{name} {dtype_name(qkv.dtype)}", ours[name], theirs[name], truth[name])


def cast(qkv: Tensor, dtype: torch.dtype) -> Tensor:
    return qkv.detach().to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(("N", "D"), [(1, 16), (50, 64), (130, 24), (197, 72)])
def test_backward_has_the_mask_of_forward(
    N: int, D: int, dtype: torch.dtype, device: torch.device
) -> None:
    mask = kept(1, N, 2, 7, device, D=128)
    args = {"qkv": cast(leaf(1, N, 3, 2, D), dtype)}
    check_dropout(args, ops.attention_qkv, lambda qkv: attention_with(mask, qkv), device)


@pytest.mark.parametrize("D", range(16, 129, 8))
def test_head_dims(D: int, device: torch.device) -> None:
    mask = kept(1, 37, 1, 7, device)
    args = {"qkv": cast(leaf(1, 37, 3, 1, D), torch.bfloat16)}
    check_dropout(args, ops.attention_qkv, lambda qkv: attention_with(mask, qkv), device)


def test_padded(device: torch.device) -> None:
    mask = kept(3, 70, 2, 7, device)
    args = {"qkv": leaf(3, 70, 3, 2, 32), "key_padding": torch.tensor([70, 1, 33])}
    check_dropout(args, ops.attention_qkv, lambda **kw: attention_with(mask, **kw), device)


@pytest.mark.parametrize("norm_kind", [None, "rmsnorm"])
def test_packed(norm_kind: str | None, device: torch.device) -> None:
    lengths = [1, 40, 17]
    masks = kept(3, 40, 2, 7, device)
    ends = torch.tensor([0, 1, 41, 58], dtype=torch.int32)

    def got(qkv: Tensor, dropout: float) -> Tensor:
        options: dict[str, Any] = {"dropout": dropout, "norm_kind": norm_kind}
        return ops.attention_packed(qkv, ends.to(qkv.device), 40, **options)

    def eager(qkv: Tensor) -> Tensor:
        if norm_kind is not None:
            q, k = reference.qk_norm_rope(qkv[None], norm_kind=norm_kind)
            qkv = torch.stack([q[0], k[0], qkv[:, 2]], dim=1)
        parts = zip(qkv.split(lengths), masks, strict=True)
        return torch.cat([attention_with(m[:, : len(x), : len(x)], x[None])[0] for x, m in parts])

    check_dropout({"qkv": leaf(58, 3, 2, 16)}, got, eager, device)


def test_with_qk_norm_and_rope(device: torch.device) -> None:
    mask = kept(2, 33, 2, 7, device)
    angles = torch.randn(32, 8, device=device)
    options = {"cos": angles.cos(), "sin": angles.sin(), "norm_kind": "rmsnorm"}

    def got(qkv: Tensor, dropout: float) -> Tensor:
        return ops.attention_qkv(qkv, dropout=dropout, **options)

    def eager(qkv: Tensor) -> Tensor:
        q, k = reference.qk_norm_rope(qkv, **options)
        return attention_with(mask, torch.stack([q, k, qkv[:, :, 2]], dim=2))

    check_dropout({"qkv": leaf(2, 33, 3, 2, 16)}, got, eager, device)


def test_rate_and_independence(device: torch.device) -> None:
    """The mean, over all and along each dimension, within five standard deviations of 1 - RATE; no
    correlation with neighbours in any dimension, nor with the mask of another seed."""
    B, N, H = 2, 130, 3
    mask, other = ((kept(B, N, H, seed, device) > 0).double() for seed in (1, 2))
    spread = (RATE * (1 - RATE)) ** 0.5
    for dims in ([0, 1, 2, 3], [1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]):
        mean = mask.mean(dims)
        count = mask.numel() / mean.numel()
        assert ((mean - (1 - RATE)).abs() < 5 * spread / count**0.5).all(), dims
    centred, other = (mask - mask.mean()) / spread, (other - other.mean()) / spread
    shifts = [(dim, by) for dim, by in ((0, 1), (1, 1), (2, 1), (3, 1), (3, 2), (3, 3), (3, 4))]
    for pair in [centred * centred.roll(by, dim) for dim, by in shifts] + [centred * other]:
        assert abs(float(pair.mean())) < 5 / pair.numel() ** 0.5


def test_values_are_zero_or_one_over_keep(device: torch.device) -> None:
    mask = kept(1, 90, 2, 3, device)
    assert mask.count_nonzero() < mask.numel()
    torch.testing.assert_close(mask[mask > 0], torch.full_like(mask[mask > 0], 1 / (1 - RATE)))


def test_mask_is_a_function_of_place_alone(device: torch.device) -> None:
    """Tile sizes, and so the elements of a tile, depend on the head dim; the mask does not."""
    assert torch.equal(kept(1, 150, 2, 3, device, D=16), kept(1, 150, 2, 3, device, D=128))


def test_seeds(device: torch.device) -> None:
    qkv = torch.randn(1, 40, 3, 2, 16, device=device)
    with fastvit.use_backend("triton"):
        plain = ops.attention_qkv(qkv)
        torch.manual_seed(0)
        off = ops.attention_qkv(qkv, dropout=0.0)
        first, second = (ops.attention_qkv(qkv, dropout=RATE) for _ in range(2))
        torch.manual_seed(0)
        again = ops.attention_qkv(qkv, dropout=RATE)
    assert torch.equal(plain, off)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_checkpointing_repeats_the_mask(device: torch.device) -> None:
    def gradient(run: Callable[..., Any]) -> Tensor:
        qkv = torch.randn(1, 40, 3, 2, 16, generator=torch.Generator().manual_seed(1))
        qkv = qkv.to(device).requires_grad_()
        torch.manual_seed(0)
        with fastvit.use_backend("triton"):
            run(qkv).square().sum().backward()
        assert qkv.grad is not None
        return qkv.grad

    def drop(qkv: Tensor) -> Tensor:
        return ops.attention_qkv(qkv, dropout=RATE)

    plain = gradient(drop)
    assert torch.equal(plain, gradient(lambda qkv: checkpoint(drop, qkv, use_reentrant=False)))


def test_compiled_and_first_order(device: torch.device) -> None:
    def drop(qkv: Tensor) -> Tensor:
        return ops.attention_qkv(qkv, dropout=RATE)

    x = leaf(1, 33, 3, 2, 16)
    compiled = torch.compile(drop, fullgraph=True, backend="aot_eager")
    found = []
    for call in (drop, compiled):
        torch.manual_seed(0)
        with fastvit.use_backend("triton"):
            found.append(results(call, {"qkv": x}, device))
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name
    check_plain_backward("attention_qkv", {"qkv": x, "dropout": RATE}, device)


def test_a_model_with_dropout_stays_on_the_kernel() -> None:
    model = fastvit.ViT(
        image_size=8, patch_size=4, dim=32, depth=1, heads=2, mlp_dim=64, attn_dropout=0.2
    ).train()
    report = fastvit.backend_report(model, torch.randn(1, 3, 8, 8))
    reasons = {c.op: c.reason for c in report.choices}
    assert "dropout" not in reasons["attention"]


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_bad_rate(rate: float) -> None:
    with pytest.raises(ValueError, match=r"attention: dropout must be in \[0, 1\), got"):
        ops.attention_qkv(torch.randn(1, 5, 3, 1, 16), dropout=rate)
