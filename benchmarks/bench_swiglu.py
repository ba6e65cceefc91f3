"""SiLU(gate) * value of a packed projection, (B, 197, 2F) -> (B, 197, F), F = 8/3 C as in ViT-g."""

import pytest
import torch
from torch import Tensor

from benchmarks import front_door, peers, workloads
from benchmarks.harness import Case, Work
from fastvit import reference

N = 197


def cases(device: torch.device) -> list[Case]:
    return workloads.row_cases(case, device)


def case(
    device: torch.device, name: str, b: int, c: int, dtype: torch.dtype, backward: bool
) -> Case:
    hidden = 8 * c // 3

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
        return (workloads.draw(device, dtype, backward, b, N, 2 * hidden),)

    moved = 3 * b * N * hidden * dtype.itemsize
    # Backward: dy and x read, dx written.
    work = Work(0, moved + (5 * b * N * hidden * dtype.itemsize if backward else 0))
    shape = f"{name} M{b * N}"
    providers = peers.swiglu(device)
    return Case("swiglu", shape, dtype, inputs, reference.swiglu, providers, work, backward)


@pytest.mark.parametrize(("case", "provider"), front_door.parameters(cases))
def bench_swiglu(benchmark, case: Case, provider: str) -> None:
    front_door.replay(benchmark, case, provider)
