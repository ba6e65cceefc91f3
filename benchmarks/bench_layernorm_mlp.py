"""x + fc2(GELU(fc1(LayerNorm(x)))), (B, 197, C) with 4C hidden."""

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
        first = draw(4 * c, c, scale=c**-0.5), draw(4 * c)
        second = draw(c, 4 * c, scale=(4 * c) ** -0.5), draw(c)
        return draw(b, N, c), draw(c), draw(c), *first, *second

    flops = 2 * b * N * c * 8 * c
    # The floor of a fully fused MLP: the hidden activation never leaves the chip.
    moved = (b * N * 2 * c + 8 * c * c) * dtype.itemsize
    more = (b * N * 3 * c + 16 * c * c) * dtype.itemsize
    work = Work(3 * flops, moved + more) if backward else Work(flops, moved)
    reference_op, providers = reference.layernorm_mlp, peers.layernorm_mlp(device, backward)
    shape = f"{name} M{b * N}"
    return Case("layernorm_mlp", shape, dtype, inputs, reference_op, providers, work, backward)


@pytest.mark.parametrize(("case", "provider"), front_door.parameters(cases))
def bench_layernorm_mlp(benchmark, case: Case, provider: str) -> None:
    front_door.replay(benchmark, case, provider)
