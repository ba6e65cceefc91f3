"""One encoder block, (B, N, C), 64 channels a head: attention and MLP with norms and residuals."""

from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import front_door, peers, workloads
from benchmarks.harness import Case, Work
from fastvit import reference


def cases(device: torch.device) -> list[Case]:
    return workloads.row_cases(case, device)


def case(
    device: torch.device,
    name: str,
    b: int,
    c: int,
    dtype: torch.dtype,
    backward: bool,
    n: int = 197,
) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        draw = partial(workloads.draw, device, dtype, backward)

        def linear(out: int, features: int) -> tuple[Tensor, Tensor]:
            return draw(out, features, scale=features**-0.5), draw(out)

        norm1, norm2 = (draw(c), draw(c)), (draw(c), draw(c))
        attention = *linear(3 * c, c), *linear(c, c)
        return draw(b, n, c), *norm1, *attention, *norm2, *linear(4 * c, c), *linear(c, 4 * c)

    weights = 12 * c * c + 13 * c
    products, scores = 24 * b * n * c * c, 4 * b * n * n * c
    # Backward takes two products for each weight product and five for attention's two. Both passes
    # together move x, out, dout, dx, the weights and their gradients.
    if backward:
        work = Work(3 * products + 3.5 * scores, (4 * b * n * c + 2 * weights) * dtype.itemsize)
    else:
        work = Work(products + scores, (2 * b * n * c + weights) * dtype.itemsize)
    oracle, providers = peers.chain(reference), peers.block(device)
    return Case("block", f"{name} B{b} N{n}", dtype, inputs, oracle, providers, work, backward)


@pytest.mark.parametrize(("case", "provider"), front_door.parameters(cases))
def bench_block(benchmark, case: Case, provider: str) -> None:
    front_door.replay(benchmark, case, provider)
