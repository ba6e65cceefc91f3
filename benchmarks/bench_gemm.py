"""Plain GEMMs of a ViT's projections against cuBLAS: y = x W^T, dx = dy W, dW = dy^T x.

Without fused prologues and epilogues: the rate of the kernels' main loops alone, for dW with the
reduction of its split-K partial sums. Our dW also sums db, for which cuBLAS's needs a pass over dy
of its own: a second peer makes it. x: (M, K); W: (N, K); dy: (M, N).
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import front_door, peers, workloads
from benchmarks.harness import Case, Provider, Work

TOKENS = 197
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x W^T": lambda x, weight: torch.mm(x, weight.t()),
    "dy W": lambda dy, weight: torch.mm(dy, weight),
    "dy^T x": lambda dy, x: torch.mm(dy.t(), x),
}


def cases(device: torch.device) -> list[Case]:
    dtype, cuda = workloads.op_dtype(device), device.type == "cuda"
    layers = (("fc1", 4, 1), ("qkv", 3, 1), ("proj", 1, 1), ("fc2", 1, 4))
    return [
        case(device, f"{name} {layer}", b * TOKENS, outs * c, ins * c, dtype, product)
        for name, b, c in workloads.row_shapes(device)
        if name in ("B", "L") or not cuda
        for layer, outs, ins in (layers if cuda else layers[:1])
        for product in PRODUCTS
    ]


def case(
    device: torch.device, name: str, M: int, N: int, K: int, dtype: torch.dtype, product: str
) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x, weight, dy = (torch.randn(s, device=device) for s in ((M, K), (N, K), (M, N)))
        weight *= K**-0.5
        pair = {"x W^T": (x, weight), "dy W": (dy, weight), "dy^T x": (dy, x)}[product]
        return pair[0].to(dtype), pair[1].to(dtype)

    work = Work(2 * M * N * K, (M * K + N * K + M * N) * dtype.itemsize)
    peer = "cuBLAS" if device.type == "cuda" else "torch.mm"
    providers = [
        peers.entry("fastvit", peers.missing(device=device), lambda: ours(product)),
        Provider(peer, PRODUCTS[product]),
    ]
    if product == "dy^T x":
        providers.append(Provider(f"{peer} and dy.sum(0)", _dw_and_db))
    shape = f"{name} M{M} {product}"
    return Case("gemm", shape, dtype, inputs, PRODUCTS[product], providers, work)


def _dw_and_db(dy: Tensor, x: Tensor) -> Tensor:
    dy.sum(0)
    return torch.mm(dy.t(), x)


def ours(product: str) -> Callable[[Tensor, Tensor], Tensor]:
    from fastvit_kernels import gemm, gemm_dw, parameter_grads

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return gemm.gemm(x, weight.t(), x.new_empty(len(x), len(weight)))

    def dx(dy: Tensor, weight: Tensor) -> Tensor:
        return gemm.gemm(dy, weight, dy.new_empty(len(dy), weight.shape[1]))

    def dw(dy: Tensor, x: Tensor) -> Tensor:
        like = dy.new_empty(dy.shape[1], x.shape[1])
        (found, *_) = parameter_grads.reduce_slabs(gemm_dw.gemm_dw(dy, x), like, None)
        assert found is not None
        return found

    return {"x W^T": forward, "dy W": dx, "dy^T x": dw}[product]


@pytest.mark.parametrize(("case", "provider"), front_door.parameters(cases))
def bench_gemm(benchmark, case: Case, provider: str) -> None:
    front_door.replay(benchmark, case, provider)
