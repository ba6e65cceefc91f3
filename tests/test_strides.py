"""Vectors and matrices of any strides: what lies between their elements must not be used."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.deterministic
from fastvit_kernels.attention import strides_divisor, with_int32_offsets
from parity import check_parity, leaf
from test_gemm_ops import layernorm_attention, layernorm_linear, layernorm_mlp, linear_residual
from torch import Tensor

import fastvit
from fastvit import ops, reference


def patch_embed() -> dict[str, Any]:
    images = {"images": leaf(2, 3, 8, 12), "weight": leaf(16, 3, 4, 4, scale=0.1)}
    return {**images, "bias": leaf(16), "pos": leaf(6, 16), "prefix": leaf(2, 16)}


def qk_params(tokens: int) -> dict[str, Any]:
    angles = torch.randn(tokens, 8)
    norms = {f"{t}_{kind}": leaf(16) for t in "qk" for kind in ("weight", "bias")}
    return {**norms, "cos": angles.cos(), "sin": angles.sin(), "norm_kind": "layernorm"}


def attention() -> dict[str, Any]:
    return {**{t: leaf(2, 9, 2, 16) for t in "qkv"}, "key_padding": torch.tensor([5, 7])}


def attention_qkv() -> dict[str, Any]:
    padding = {"key_padding": torch.tensor([5, 7], dtype=torch.int32)}
    return {"qkv": leaf(2, 9, 3, 2, 16), **padding, **qk_params(9)}


def attention_packed() -> dict[str, Any]:
    bounds = {"cu_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32), "max_seqlen": 5}
    return {"qkv": leaf(9, 3, 2, 16), **bounds}


OPS: dict[str, Callable[[], dict[str, Any]]] = {
    "patch_embed": patch_embed,
    "layernorm_linear": lambda: layernorm_linear(2, 9, 32, 48),
    "linear_residual": lambda: linear_residual(2, 9, 32, 48),
    "layernorm_attention": lambda: layernorm_attention(2, 9, 32, 48),
    "layernorm_mlp": lambda: layernorm_mlp(2, 9, 32, 48),
    "attention": attention,
    "attention_qkv": attention_qkv,
    "attention_packed": attention_packed,
}
ROWS = ("x", "residual", "images", "q", "k", "v", "qkv")  # tested at any strides elsewhere


def apart(t: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """t as every second element of a tensor, between values that would show in any result."""
    other = torch.full_like(t, float("nan") if t.is_floating_point() else 1 << 20)
    return torch.stack((t, other), -1), lambda base: base[..., 0]


def repeated(t: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The last entry of t along dim 0, expanded at stride 0."""
    return t[-1:], lambda base: base.expand(t.shape)


def transposed(t: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A matrix with contiguous columns."""
    return t.transpose(0, -1).contiguous(), lambda base: base.transpose(0, -1)


@pytest.mark.parametrize("view", [apart, repeated, transposed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", OPS)
def test_parity(op: str, view: Callable, device: torch.device) -> None:
    """All vectors and matrices of an op are such views; gradients are of the viewed tensors."""
    args, views = OPS[op](), {}
    for name, t in args.items():
        if isinstance(t, Tensor) and name not in (*ROWS, *["cu_seqlens"] * (view is repeated)):
            base, views[name] = view(t.detach())
            args[name] = base.clone().requires_grad_(t.requires_grad)
    # An expanded number has one number for its gradient, which eager may get right by luck.
    check_parity(op, args, device=device, together=view is repeated, views=views)


def test_lse_and_maps(device: torch.device) -> None:
    q, k = (torch.randn(2, 9, 2, 16, device=device) for _ in "qk")
    lengths, pick = apart(torch.tensor([5, 7], device=device))
    lse, pick_lse = apart(reference.attention_lse(q, k))
    with fastvit.use_backend("triton"):
        got = ops.attention_lse(q, k, key_padding=pick(lengths))
        maps = ops.attention_maps(q, k, pick_lse(lse), rows=[0, 4])
    expected = reference.attention_lse(q, k, key_padding=pick(lengths))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(maps, reference.attention_maps(q, k, pick_lse(lse), rows=[0, 4]))


def test_key_padding_without_norms(device: torch.device) -> None:
    """In test_parity, with norms of q and k, the lengths take another way."""
    lengths, view = apart(torch.tensor([5, 7]))
    args = {"qkv": leaf(2, 9, 3, 2, 16), "key_padding": lengths}
    check_parity("attention_qkv", args, device=device, views={"key_padding": view})


@pytest.mark.parametrize("N", [20, 130])
def test_gradient_of_attention(N: int, device: torch.device) -> None:
    """Its tokens side by side, at lengths that take both ways of backward."""
    qkv = torch.randn(1, N, 3, 2, 16, device=device, requires_grad=True)
    do = torch.randn(1, 2, 16, N, device=device).permute(0, 3, 1, 2)
    with fastvit.use_backend("triton"):
        o = ops.attention_qkv(qkv)
    grads = (torch.autograd.grad(o, qkv, g, retain_graph=True) for g in (do, do.contiguous()))
    torch.testing.assert_close(*grads)


def test_rows_are_read_by_eights_only_where_all_strides_permit_it() -> None:
    t = torch.empty(2, 5, 3, 8)
    assert strides_divisor(t) == 8
    for strides in ((124, 24, 8, 1), (200, 28, 8, 1), (200, 24, 12, 1)):
        assert strides_divisor(t, torch.empty_strided(t.shape, strides)) == 1


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["resident", "walked over"])
@pytest.mark.parametrize("apart", ["heads", "tokens"])
def test_half_the_range_of_32_bits_apart(
    apart: str, dropout: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strides span 4 GiB, of which only the pages of three heads or three tokens are touched."""
    N, D = (9, 16) if apart == "heads" else (3, 16)
    strides = (3 * N * D, 3 * D, D, 1 << 30, 1)
    if apart == "tokens":
        strides = (9 * D, 1 << 30, 3 * D, D, 1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        qkv = torch.empty_strided((1, N, 3, 3, D), strides, dtype=torch.float16, device=device)
    qkv.copy_(torch.randn(1, N, 3, 3, D))
    for norm_kind in (None, "rmsnorm"):
        results = []
        for x in (qkv.detach(), qkv.contiguous()):
            torch.manual_seed(1)
            with fastvit.use_backend("triton"):
                out = ops.attention_qkv(x.requires_grad_(), dropout=dropout, norm_kind=norm_kind)
            results.append((out, *torch.autograd.grad(out, x, x.detach()[:, :, 0])))
        for got, expected in zip(*results, strict=True):
            assert torch.equal(got, expected)


def test_a_sequence_too_long_for_32_bit_offsets_is_refused() -> None:
    q = torch.empty(1, 1 << 20, 12, 64, device="meta")
    with pytest.raises(RuntimeError, match=r"one sequence, 1048576 tokens, 12 heads .* 2\*\*31"):
        with_int32_offsets(q, q.shape[1])
    assert with_int32_offsets(q) is q  # a packed batch of short sequences
    qkv = torch.empty(3, 2048, 1370, 12, 64, device="meta").permute(1, 2, 0, 3, 4)
    assert with_int32_offsets(qkv) is qkv  # q, k and v lie far apart, their heads do not
