"""Attention on a packed (B, N, 3, H, D) projection against every SDPA backend and library."""

import pytest
import torch
from torch import Tensor

from benchmarks import front_door, peers, workloads
from benchmarks.harness import Case, Work
from fastvit import reference


def cases(device: torch.device) -> list[Case]:
    dtype = workloads.op_dtype(device)
    return [
        case(device, *shape, dtype, backward)
        for shape in workloads.attention_shapes(device)
        for backward in (False, True)
    ]


def case(
    device: torch.device, b: int, n: int, h: int, d: int, dtype: torch.dtype, backward: bool
) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        qkv = torch.randn(b, n, 3, h, d, device=device).to(dtype)
        return (qkv.requires_grad_(backward),)

    return Case(
        "attention",
        f"B{b} N{n} H{h} D{d}",
        dtype,
        inputs,
        reference.attention_qkv,
        peers.attention(device),
        work(b, n, h, d, dtype.itemsize, backward),
        backward,
    )


def work(b: int, n: int, h: int, d: int, itemsize: int, backward: bool) -> Work:
    """Forward: 2 products, reads q k v, writes o, lse. Backward: 5 products more (S again), reads
    q k v o do lse, writes dq dk dv; each pass takes every exponential once."""
    tokens, products = b * n * h * d, 2 * b * h * n * n * d
    if not backward:
        return Work(2 * products, 4 * tokens * itemsize + 4 * b * n * h, b * h * n * n)
    return Work(7 * products, 12 * tokens * itemsize + 8 * b * n * h, 2 * b * h * n * n)


@pytest.mark.parametrize(("case", "provider"), front_door.parameters(cases))
def bench_attention(benchmark, case: Case, provider: str) -> None:
    front_door.replay(benchmark, case, provider)
