"""Patch projection with bias, positions and prefix tokens, against timm's convolution and cat."""

from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import front_door, peers, workloads
from benchmarks.harness import Case, Work
from fastvit import reference

IMAGE, PATCH = 224, 16


def cases(device: torch.device) -> list[Case]:
    return workloads.row_cases(case, device)


def case(
    device: torch.device, name: str, b: int, c: int, dtype: torch.dtype, backward: bool
) -> Case:
    m, k = (IMAGE // PATCH) ** 2, 3 * PATCH**2

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        images = workloads.draw(device, dtype, False, b, 3, IMAGE, IMAGE)
        draw = partial(workloads.draw, device, dtype, backward)
        return images, draw(c, 3, PATCH, PATCH, scale=k**-0.5), draw(c), draw(m, c), draw(1, c)

    flops = 2 * b * m * k * c
    moved = (b * 3 * IMAGE**2 + k * c + b * (m + 1) * c + m * c) * dtype.itemsize
    # The image needs no gradient, so backward is one product, dW, which reads the image and dy.
    work = Work(2 * flops, 2 * moved) if backward else Work(flops, moved)
    reference_op, providers = reference.patch_embed, peers.patch_embed(device)
    shape = f"{name} B{b}"
    return Case("patch_embed", shape, dtype, inputs, reference_op, providers, work, backward)


@pytest.mark.parametrize(("case", "provider"), front_door.parameters(cases))
def bench_patch_embed(benchmark, case: Case, provider: str) -> None:
    front_door.replay(benchmark, case, provider)
