"""The output projection and its residual, (B, 197, C) -> (B, 197, C)."""

from functools import partial

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
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        draw = partial(workloads.draw, device, dtype, backward)
        return draw(b, N, c), draw(c, c, scale=c**-0.5), draw(c), draw(b, N, c)

    flops = 2 * b * N * c * c
    moved = (b * N * 3 * c + c * c) * dtype.itemsize
    # Backward: dx and dW from dy and x; the residual's gradient is dy itself.
    more = (b * N * 3 * c + 2 * c * c) * dtype.itemsize
    work = Work(3 * flops, moved + more) if backward else Work(flops, moved)
    reference_op, providers = reference.linear_residual, peers.linear_residual(device)
    shape = f"{name} M{b * N}"
    return Case("linear_residual", shape, dtype, inputs, reference_op, providers, work, backward)


@pytest.mark.parametrize(("case", "provider"), front_door.parameters(cases))
def bench_linear_residual(benchmark, case: Case, provider: str) -> None:
    front_door.replay(benchmark, case, provider)
