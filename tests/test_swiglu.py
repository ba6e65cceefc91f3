"""swiglu against float64: forward and gradient, odd sizes, strides, and what its kernel refuses."""

import pytest
import torch
from checks import dtype_name
from parity import (
    DTYPES,
    check_compiles,
    check_parity,
    check_plain_backward,
    check_repeatable,
    leaf,
)

import fastvit
from fastvit import ops


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [(1, 2), (2, 17, 48), (3, 50, 2 * 171)], ids=str)
def test_parity(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    check_parity("swiglu", {"x": leaf(*shape)}, dtype, device)
    check_parity("swiglu", {"x": leaf(*shape, scale=50.0)}, dtype, device)


def test_autocast_keeps_the_dtype_of_x(device: torch.device) -> None:
    check_parity("swiglu", {"x": leaf(2, 9, 32)}, torch.bfloat16, device, autocast=True)


def test_strided_and_empty(device: torch.device) -> None:
    for x in (leaf(2, 12, 32)[:, 3:], leaf(2, 9, 64)[..., ::2], leaf(2, 9, 80)[..., :32]):
        check_parity("swiglu", {"x": x.detach().requires_grad_()}, device=device)
    with fastvit.use_backend("triton"):
        x = torch.zeros(0, 9, 32, device=device, requires_grad=True)
        ops.swiglu(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def test_repeatable_compiled_and_first_order(device: torch.device) -> None:
    args = {"x": leaf(3, 50, 40)}
    check_repeatable("swiglu", args, torch.bfloat16, device)
    check_compiles("swiglu", args, device)
    check_plain_backward("swiglu", args, device)


@pytest.mark.parametrize("mlp", ["swiglu", "swiglu_packed"])
def test_a_swiglu_model_is_all_kernels(mlp: str, device: torch.device) -> None:
    model = fastvit.ViT(
        image_size=16, patch_size=8, dim=32, depth=1, heads=2, mlp_dim=48, num_classes=4, mlp=mlp
    ).to(device)
    with fastvit.use_backend("triton"):
        report = fastvit.backend_report(model, torch.randn(2, 3, 16, 16, device=device))
    assert {c.backend for c in report.choices} == {"triton"}
    assert "swiglu" in {c.op for c in report.choices}
