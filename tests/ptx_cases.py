"""The cases that `test_ptx` runs on `ptx_machine`: compiled kernels, with ragged tails."""

import os

import pytest
import torch
from checks import check
from fastvit_kernels import dw_plan, gemm, gemm_dw, parameter_grads, tuned
from parity import check_parity, leaf
from test_gradient_copy import check_model, model
from torch.nn.functional import gelu

ARCH = int(os.environ.get("PTX_MACHINE", "90").partition("-")[0])
PRODUCTS = [name for name, c in tuned.look_up(tuned.GEMM, ARCH).items() if c.BLOCK_N > 64]
GRADIENTS = [(name, False) for name in tuned.look_up(tuned.GEMM_DW, ARCH)]
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", PRODUCTS)
def test_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The epilogue that reads and writes most; three tiles on two SMs."""
    config = tuned.look_up(tuned.GEMM, ARCH)[name]
    monkeypatch.setattr(tuned, "gemm", lambda *_, **__: config)
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    M, N, K = 2 * config.BLOCK_M + 9, config.BLOCK_N - 8, 4 * config.BLOCK_K - 8
    a, b, u = torch.randn(M, K), torch.randn(K, N) * K**-0.5, torch.randn(M, N)
    a, b, u = (t.to(dtype) for t in (a, b, u))
    du, h = torch.empty_like(u), torch.empty_like(u)
    gemm.gemm(a, b, du, epilogue="dgelu", u=u, h=h)

    def truth(*tensors: torch.Tensor) -> torch.Tensor:
        a, b, u = tensors
        return torch.autograd.grad(gelu(u.requires_grad_()), u, a @ b)[0]

    check("du", du, truth(a, b, u), truth(a.double(), b.double(), u.double()))
    check("h", h, gelu(u), gelu(u.double()))


@pytest.mark.parametrize(("name", "tf32"), [*GRADIENTS, ("float32", True)])
def test_weight_gradient(name: str, tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than the pipeline holds, in each of a program's loops."""
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    config = tuned.look_up(tuned.GEMM_DW, ARCH)[name]
    M, N, K = 15 * config.BLOCK_M + 9, config.BLOCK_N - 8, config.BLOCK_K + 8
    plan = dw_plan.plan(2, 16, 2, 0)
    monkeypatch.setattr(tuned, "gemm_dw", lambda *_, **__: (config, plan))
    monkeypatch.setattr(tuned, "dw_columns", lambda *_: 2)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    g, x = torch.randn(M, N).to(dtype), torch.randn(M, K).to(dtype)
    w, bias = torch.empty(N, K, dtype=dtype), torch.empty(N, dtype=dtype)
    dw, db, *_ = parameter_grads.reduce_slabs(gemm_dw.gemm_dw(g, x), w, bias)
    cut_g, cut_x = ((t.view(torch.int32) & -8192).view(dtype) if tf32 else t for t in (g, x))
    assert dw is not None and db is not None
    check("dw", dw, cut_g.t() @ cut_x, g.t().double() @ x.double())
    check("db", db, g.sum(0), g.double().sum(0))


# Rows of every regime: resident, with a tail, online; head dims of one and of two pieces.
@pytest.mark.parametrize(("N", "D"), [(50, 64), (140, 64), (70, 96), (390, 16)], ids=str)
def test_attention(N: int, D: int) -> None:
    check_parity("attention_qkv", {"qkv": leaf(1, N, 3, 1, D)}, torch.bfloat16)


@pytest.mark.parametrize("N", [140, 180, 330])
def test_attention_of_many_heads(N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One head fills the one SM. On sm_90 the last queries take one step in dK and dV, then two;
    the last keys a tile of 16, then a whole one with a mask; 330 queries take tiles of 128."""
    monkeypatch.setattr(tuned, "num_sms", lambda _: 1)
    check_parity("attention_qkv", {"qkv": leaf(1, N, 3, 1, 64)}, torch.bfloat16)


def test_attention_of_large_scores() -> None:
    qkv = leaf(1, 50, 3, 1, 16, grad=False)
    qkv[:, :, :2] = 16 * (1e3 * qkv[:, :, :2] / 16).round()
    check_parity("attention_qkv", {"qkv": qkv.requires_grad_()}, torch.bfloat16)


def test_narrow_model() -> None:
    """Under autocast, with LayerScale and drop path; on sm_90 its MLP is one kernel each way."""
    check_model(lambda: model(1, layer_scale=0.5, drop_path=0.5).train(), CPU)


@pytest.mark.parametrize("way", ["fold", "row"])
def test_model_of_products(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch per GEMM, with LayerNorm folded and by the row kernel."""
    monkeypatch.setattr(tuned, "norm_placement", lambda *_: way)
    monkeypatch.setattr(tuned, "mlp_narrow", lambda *_: None)
    check_model(lambda: model(1, layer_scale=0.5, drop_path=0.5).train(), CPU)


def test_patches() -> None:
    args = {"images": leaf(2, 3, 24, 40), "weight": leaf(72, 3, 8, 8, scale=0.1), "bias": leaf(72)}
    check_parity(
        "patch_embed", {**args, "pos": leaf(15, 72), "prefix": leaf(1, 72)}, torch.bfloat16
    )
