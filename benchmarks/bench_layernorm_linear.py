"""LayerNorm and the QKV projection, (B, 197, C) -> (B, 197, 3C)."""

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
        return draw(b, N, c), draw(c), draw(c), draw(3 * c, c, scale=c**-0.5), draw(3 * c)

    flops = 2 * b * N * c * 3 * c
    moved = (b * N * 4 * c + 3 * c * c) * dtype.itemsize
    # Backward makes dx and dW: reads dy, x and W once, writes dx and dW.
    more = (b * N * 5 * c + 6 * c * c) * dtype.itemsize
    work = Work(3 * flops, moved + more) if backward else Work(flops, moved)
    reference_op, providers = reference.layernorm_linear, peers.layernorm_linear(device)
    shape = f"{name} M{b * N}"
    return Case("layernorm_linear", shape, dtype, inputs, reference_op, providers, work, backward)


@pytest.mark.parametrize(("case", "provider"), front_door.parameters(cases))
def bench_layernorm_linear(benchmark, case: Case, provider: str) -> None:
    front_door.replay(benchmark, case, provider)
