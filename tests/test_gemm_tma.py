"""The persistent TMA GEMM against float64: each configuration, several tiles per program."""

from typing import Any

import pytest
import torch
from checks import check
from fastvit_kernels import gemm, tuned
from fastvit_kernels.operands import tma_compatible
from parity import half
from torch import Tensor
from torch.nn.functional import gelu

# Ragged tiles along M and N; few and many steps along K.
sizes = pytest.mark.parametrize("size", [(300, 264, 512), (259, 520, 776)], ids=str)


@pytest.fixture
def line(request: Any, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> str:
    """Use this line of the table, and two SMs, so that each program has several tiles."""
    table = tuned.look_up(tuned.GEMM, tuned.arch(device.index) or 90)
    if request.param not in table:
        pytest.skip("this GPU has no such line")
    monkeypatch.setattr(tuned, "gemm", lambda *_, **__: table[request.param])
    monkeypatch.setattr(tuned, "num_sms", lambda _: 2)
    return request.param


def lines(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("line", names, indirect=True)


def operands(size: tuple[int, int, int], dtype: torch.dtype, device: Any) -> tuple[Tensor, Tensor]:
    M, N, K = size
    a, weight = torch.randn(M, K), torch.randn(N, K) * K**-0.5
    return a.to(device, dtype), weight.to(device, dtype)


def poisoned(a: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    shape = len(a), len(weight)
    return torch.full(shape, float("nan"), dtype=dtype or a.dtype, device=a.device)


def test_what_tma_can_address() -> None:
    base = torch.empty(8 + 16 * 32, dtype=torch.bfloat16)
    rows = base[8:].view(16, 32)
    assert tma_compatible(rows) and tma_compatible(rows[:, :24])
    for other in (
        base[1:-7].view(16, 32),  # its base is aligned to 2 bytes
        rows[:, :28].contiguous(),
        rows[:1].expand(16, 32),
        rows[:, ::2],
        rows.float(),
    ):
        assert not tma_compatible(rows, other)


@half
@sizes
@lines("tma_wide", "tma_gelu")
@pytest.mark.parametrize("saves", [True, False], ids=["training", "inference"])
def test_gelu(saves: bool, size: Any, dtype: torch.dtype, device: Any, line: str) -> None:
    a, weight = operands(size, dtype, device)
    bias = torch.randn(size[1]).to(device)
    h, u = poisoned(a, weight), poisoned(a, weight) if saves else None
    gemm.gemm(a, weight.t(), h, epilogue="gelu", bias=bias, u=u)
    eager = a @ weight.t() + bias.to(dtype)
    truth = a.double() @ weight.double().t() + bias.double()
    check("h", h, gelu(eager), gelu(truth))
    if u is not None:
        check("u", u, eager, truth)


@half
@sizes
@lines("tma_square", "tma_dgelu")
def test_dgelu(size: Any, dtype: torch.dtype, device: Any, line: str) -> None:
    a, weight = operands(size, dtype, device)
    b, u = weight.t().contiguous(), torch.randn(size[0], size[1]).to(device, dtype)
    du, h = poisoned(a, weight), poisoned(a, weight)
    gemm.gemm(a, b, du, epilogue="dgelu", u=u, h=h)
    check("h", h, gelu(u), gelu(u.double()))

    def backward(u: Tensor, dh: Tensor) -> Tensor:
        u = u.clone().requires_grad_()
        return torch.autograd.grad(gelu(u), u, dh)[0]

    check("du", du, backward(u, a @ b), backward(u.double(), a.double() @ b.double()))


@half
@sizes
@lines("tma_wide", "tma_residual")
@pytest.mark.parametrize("branch", [True, False], ids=["scaled", "plain"])
@pytest.mark.parametrize("wide", [True, False], ids=["float32 stream", "16-bit stream"])
def test_residual(
    wide: bool, branch: bool, size: Any, dtype: torch.dtype, device: Any, line: str
) -> None:
    a, weight = operands(size, dtype, device)
    M, N, _ = size
    stream, tokens = torch.float32 if wide else dtype, 50 if M % 50 == 0 else 37
    bias, residual = torch.randn(N).to(device), torch.randn(M, N).to(device, stream)
    options: dict[str, Any] = {"bias": bias, "residual": residual}
    if branch:
        options["layer_scale"] = torch.randn(N).to(device)
        options["path_scale"] = torch.rand(M // tokens).to(device)
    out, copy = poisoned(a, weight, stream), poisoned(a, weight) if wide else None
    parts = gemm.new_row_statistics(a, weight.t()).fill_(float("nan"))
    gemm.gemm(a, weight.t(), out, epilogue="residual", parts=parts, copy=copy, **options)

    def eager(wider: torch.dtype, narrow: torch.dtype) -> Tensor:
        y = (a.to(narrow) @ weight.to(narrow).t() + bias.to(narrow)).to(wider)
        if branch:
            rows = options["path_scale"].to(wider).repeat_interleave(tokens)
            y = y * options["layer_scale"].to(wider) * rows[:, None]
        return residual.to(wider) + y

    truth = eager(torch.float64, torch.float64)
    check("out", out, eager(stream, dtype), truth)
    if copy is not None:
        assert torch.equal(copy, out.to(dtype))
    width = 1 << (-(-N // len(parts)) - 1).bit_length()
    for part, piece in zip(parts, out.double().split(width, dim=1), strict=True):
        mean = piece.mean(1)
        torch.testing.assert_close(part[0].double(), mean, rtol=1e-5, atol=1e-5)
        squares = (piece - mean[:, None]).square().sum(1)
        torch.testing.assert_close(part[1].double(), squares, rtol=1e-5, atol=1e-5)
