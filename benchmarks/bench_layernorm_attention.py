"""x + proj(attention(qkv(LayerNorm(x)))), (B, 197, C) -> (B, 197, C)."""

from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import front_door, peers, workloads
from benchmarks.harness import Case, Work
from fastvit import reference

N = 197
HEAD_DIMS = {"H": 80, "odd": 24}  # elsewhere 64


def cases(device: torch.device) -> list[Case]:
    return workloads.row_cases(case, device)


def case(
    device: torch.device, name: str, b: int, c: int, dtype: torch.dtype, backward: bool
) -> Case:
    heads = c // HEAD_DIMS.get(name, 64)

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        draw = partial(workloads.draw, device, dtype, backward)
        qkv = draw(3 * c, c, scale=c**-0.5), draw(3 * c)
        proj = draw(c, c, scale=c**-0.5), draw(c)
        return draw(b, N, c), draw(c), draw(c), *qkv, *proj, heads

    linear, scores = 2 * b * N * 4 * c * c, 2 * b * N * N * c
    # The floor of a fully fused branch: qkv and o never leave the chip.
    moved = (b * N * 2 * c + 4 * c * c) * dtype.itemsize
    more = (b * N * 3 * c + 8 * c * c) * dtype.itemsize
    exps = b * heads * N * N
    work = Work(linear + 2 * scores, moved, exps)
    if backward:
        work = Work(3 * linear + 7 * scores, moved + more, 2 * exps)
    eager, providers = reference.layernorm_attention, peers.layernorm_attention(device)
    shape = f"{name} M{b * N}"
    return Case("layernorm_attention", shape, dtype, inputs, eager, providers, work, backward)


@pytest.mark.parametrize(("case", "provider"), front_door.parameters(cases))
def bench_layernorm_attention(benchmark, case: Case, provider: str) -> None:
    front_door.replay(benchmark, case, provider)
