"""QK-norm and RoPE on the way into attention: against float64, every gradient, both pairings."""

from typing import Any

import pytest
import torch
from checks import check, dtype_name
from fastvit_kernels import tuned, tuned_attention
from fastvit_kernels.attention_qk import _attention_qk_sum_kernel
from fastvit_kernels.launch import launch
from parity import (
    DTYPES,
    check_compiles,
    check_parity,
    check_plain_backward,
    check_repeatable,
    leaf,
)
from torch import Tensor

import fastvit
from fastvit import ops, reference


def norm(kind: str, D: int, bias: bool = True, turned: bool = True) -> dict[str, Any]:
    """Arguments of a norm of q and k; turned: RoPE follows. Without it k_bias, the same for all
    keys, changes no softmax: its gradient, zero but for rounding, is not tested."""
    weights = {"q_weight": leaf(D), "k_weight": leaf(D), "norm_kind": kind}
    return weights | ({"q_bias": leaf(D), "k_bias": leaf(D, grad=turned)} if bias else {})


def rope(m: int, D: int, interleaved: bool = False, batch: tuple[int, ...] = ()) -> dict[str, Any]:
    angles = 3 * torch.randn(*batch, m, D // 2)
    return {"cos": angles.cos(), "sin": angles.sin(), "interleaved": interleaved}


CASES = {
    "layernorm": lambda D: norm("layernorm", D, turned=False),
    "layernorm without bias": lambda D: norm("layernorm", D, bias=False),
    "layernorm without weights": lambda D: {"norm_kind": "layernorm"},
    "rmsnorm": lambda D: norm("rmsnorm", D, bias=False),
    "rope of halves": lambda D: rope(32, D),
    "rope of neighbours": lambda D: rope(32, D, interleaved=True),
    "rope per image": lambda D: rope(32, D, batch=(2,)),
    "layernorm and rope": lambda D: norm("layernorm", D) | rope(37, D),
    "rmsnorm and rope": lambda D: norm("rmsnorm", D, bias=False) | rope(36, D, interleaved=True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES)
def test_parity(case: str, dtype: torch.dtype, device: torch.device) -> None:
    check_parity("attention_qkv", {"qkv": leaf(2, 37, 3, 3, 32), **CASES[case](32)}, dtype, device)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("D", range(16, 129, 8))
def test_head_dims(D: int, interleaved: bool, device: torch.device) -> None:
    args = {"qkv": leaf(1, 19, 3, 2, D), **norm("layernorm", D), **rope(18, D, interleaved)}
    check_parity("attention_qkv", args, torch.bfloat16, device)


@pytest.mark.parametrize("N", [3, 129, 300])
def test_tokens_padding_and_strides(N: int, device: torch.device) -> None:
    qkv = leaf(3, 2, N, 2, 16, grad=False).permute(1, 2, 0, 3, 4).requires_grad_()
    options = {**norm("rmsnorm", 16, bias=False), **rope(N, 16)}
    lengths = torch.tensor([N, N // 2])
    check_parity("attention_qkv", {"qkv": qkv, "key_padding": lengths, **options}, device=device)


def test_programs_of_several_blocks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned_attention, "qk", lambda D, _: tuned.Config(8, D // 2))
    monkeypatch.setattr(tuned_attention, "qk_run", lambda *_: 2)
    args = {"qkv": leaf(2, 19, 3, 1, 16), **norm("layernorm", 16, turned=False)}
    check_parity("attention_qkv", args, device=device)


def test_more_partial_sums_than_are_added_at_a_time(device: torch.device) -> None:
    x, out = torch.randn(300, 24, device=device), torch.empty(24, device=device)
    launch(_attention_qk_sum_kernel, (2,), x, out, *x.shape, BLOCK_M=128, BLOCK_C=16)
    torch.testing.assert_close(out, x.sum(0), rtol=1e-5, atol=1e-4)


def test_far_from_zero(device: torch.device) -> None:
    qkv = leaf(1, 9, 3, 1, 64, grad=False)
    qkv[:, :, :2] += 100
    args = {"qkv": qkv.requires_grad_(), **norm("layernorm", 64, turned=False)}
    check_parity("attention_qkv", args, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_packed(dtype: torch.dtype, device: torch.device) -> None:
    lengths = torch.tensor([0, 1, 41, 58], dtype=torch.int32)
    args = {"qkv": leaf(58, 3, 2, 24), "cu_seqlens": lengths, "max_seqlen": 40}
    options = {**norm("layernorm", 24), **rope(58, 24)}
    check_parity("attention_packed", {**args, **options}, dtype, device)


def test_autocast(device: torch.device) -> None:
    """The norm's weights stay float32, and so do their gradients."""
    args = {"qkv": leaf(2, 21, 3, 2, 32), **norm("layernorm", 32), **rope(20, 32)}
    check_parity("attention_qkv", args, torch.bfloat16, device, autocast=True)


def test_q_and_k_are_what_attention_sees(device: torch.device) -> None:
    qkv, options = torch.randn(2, 30, 3, 2, 16, device=device), rope(28, 16, True)
    tables = {"cos": options["cos"].to(device), "sin": options["sin"].to(device)}
    args = {**tables, "interleaved": True, "norm_kind": "rmsnorm"}
    with fastvit.use_backend("triton"):
        q, k = ops.qk_norm_rope(qkv, **args)
        o = ops.attention_qkv(qkv, **args)
        assert torch.equal(o, ops.attention(q, k, qkv[:, :, 2]))
    wide: dict[str, Any] = {n: t.double() for n, t in tables.items()}
    wide |= {"interleaved": True, "norm_kind": "rmsnorm"}
    eager, truth = reference.qk_norm_rope(qkv, **args), reference.qk_norm_rope(qkv.double(), **wide)
    check("q", q, eager[0], truth[0])
    check("k", k, eager[1], truth[1])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_q_and_k_are_of_autocasts_dtype_without_a_gradient(
    backend: str, device: torch.device
) -> None:
    qkv = torch.randn(1, 5, 3, 2, 16, device=device, requires_grad=True)
    weight = torch.ones(16, device=device)
    with fastvit.use_backend(backend), torch.autocast(device.type, torch.bfloat16):
        pair = ops.qk_norm_rope(qkv, q_weight=weight, norm_kind="layernorm")
    for t in pair:
        assert t.dtype == torch.bfloat16 and not t.requires_grad


def test_prefix_tokens_and_angle_zero_are_left_alone(device: torch.device) -> None:
    qkv = torch.randn(1, 12, 3, 2, 32, device=device)
    angles = torch.zeros(7, 16, device=device)
    angles[3:] = 1.5
    with fastvit.use_backend("triton"):
        q, k = ops.qk_norm_rope(qkv, cos=angles.cos(), sin=angles.sin())
    for got, x in ((q, qkv[:, :, 0]), (k, qkv[:, :, 1])):
        assert torch.equal(got[:, :8], x[:, :8]) and not torch.equal(got[:, 8:], x[:, 8:])


def test_nan_stays_in_its_head(device: torch.device) -> None:
    qkv = torch.randn(1, 20, 3, 3, 16, device=device)
    qkv[0, 4, 0, 1, 3] = float("nan")
    with fastvit.use_backend("triton"):
        q, k = ops.qk_norm_rope(qkv, norm_kind="layernorm")
    assert q[0, 4, 1].isnan().all() and int(q.isnan().sum()) == 16 and k.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 16), (2, 0, 3, 2, 16)])
def test_empty(shape: tuple[int, ...], device: torch.device) -> None:
    qkv = torch.randn(shape, device=device, requires_grad=True)
    weight = torch.ones(16, device=device, requires_grad=True)
    with fastvit.use_backend("triton"):
        o = ops.attention_qkv(qkv, q_weight=weight, k_weight=weight, norm_kind="rmsnorm")
    o.sum().backward()
    assert qkv.grad is not None and qkv.grad.shape == shape
    assert weight.grad is not None and not weight.grad.any()


def test_repeatable_compiled_and_first_order(device: torch.device) -> None:
    args = {"qkv": leaf(1, 150, 3, 2, 16), **norm("layernorm", 16), **rope(149, 16)}
    check_repeatable("attention_qkv", args, torch.float16, device)
    check_compiles("attention_qkv", args, device)
    check_compiles("attention_qkv", args, device, dynamic=True)
    check_plain_backward("attention_qkv", args, device)


@pytest.mark.parametrize("form", ["eva", "dinov3"])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_attention_of_a_model(form: str, kind: str, device: torch.device) -> None:
    """Attention as a model calls it, without RoPE on <cls> and registers, against the reference."""
    sizes: dict[str, Any] = {"image_size": 16, "patch_size": 4, "dim": 32, "heads": 2}
    model = fastvit.ViT(
        **sizes, depth=1, mlp_dim=64, registers=2, rope=form, qk_norm=True, norm=kind
    ).to(device)
    block: Any = model.blocks[0]
    for n in (block.attn.q_norm, block.attn.k_norm):
        torch.nn.init.normal_(n.weight)
    _, tables = model.embed(torch.randn(2, 3, 16, 16, device=device))
    qkv = torch.randn(2, 19, 3, 2, 16, device=device, requires_grad=True)
    results: dict[str, list[Tensor]] = {}
    for backend in ("reference", "triton"):
        options = block.attn.qk_options(tables)
        with fastvit.use_backend(backend):
            o = ops.attention_qkv(qkv, **options)
            maps = ops.attention_maps(*ops.qk_norm_rope(qkv, **options), rows=range(19))
        weights = [block.attn.q_norm.weight, block.attn.k_norm.weight]
        results[backend] = [o, maps, *torch.autograd.grad(o.square().sum(), [qkv, *weights])]
    for got, expected in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


QKV = torch.randn(2, 5, 3, 2, 16)
W, T = torch.ones(16), torch.ones(4, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_weight": torch.ones(8), "norm_kind": "rmsnorm"}, r"q_weight must be \(16,\), got \(8"),
        ({"q_bias": W, "norm_kind": "rmsnorm"}, "q_bias must be None: RMSNorm has no bias"),
        ({"k_weight": W}, "k_weight was given without norm_kind"),
        ({"norm_kind": "batchnorm"}, r"norm_kind 'batchnorm' is unknown; expected \('layernorm'"),
        ({"cos": T}, "cos and sin go together"),
        ({"cos": T, "sin": T[:2]}, r"sin must be \(4, 8\), got \(2, 8\)"),
        ({"cos": T[:, :4], "sin": T}, r"cos must be \(m, 8\) or \(2, m, 8\) with m <= 5, got"),
        ({"cos": torch.ones(6, 8), "sin": torch.ones(6, 8)}, r"with m <= 5, got \(6, 8\)"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    for op in (ops.attention_qkv, ops.qk_norm_rope):
        with pytest.raises(ValueError, match=message):
            op(QKV, **options)
