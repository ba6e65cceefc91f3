"""The schedule of dW: every step of every tile is summed once, in order; programs are kept busy."""

import pytest
import torch
import triton
import triton.language as tl
from fastvit_kernels import dw_plan, tuned
from fastvit_kernels.dw_plan import Plan
from hypothesis import given, settings
from hypothesis import strategies as st


@triton.jit
def _write_plan(
    segments_ptr,
    first_parts_ptr,
    width,
    num_n,
    columns,
    tiles,
    steps,
    programs,
    chunks,
    share,
    chunks2,
):
    pid = tl.program_id(0)
    for i in range(dw_plan.num_segments(pid, tiles, steps, programs, chunks, share, chunks2)):
        tile, first, end, part = dw_plan.segment(
            pid, i, tiles, steps, programs, chunks, share, chunks2
        )
        lo, hi = dw_plan.owned(tile // num_n, columns, first, end, steps, chunks, share)
        ptr = segments_ptr + (pid * width + i) * 6
        tl.store(ptr, tile)
        tl.store(ptr + 1, first)
        tl.store(ptr + 2, end)
        tl.store(ptr + 3, part)
        tl.store(ptr + 4, lo)
        tl.store(ptr + 5, hi)
    if pid == 0:
        for t in range(tiles + 1):
            part = dw_plan.first_part(t, tiles, steps, programs, chunks, share, chunks2)
            tl.store(first_parts_ptr + t, part)


def runs_of(plan: Plan, num_n: int, columns: int) -> tuple[list[list[list[int]]], list[int]]:
    """The plan as the kernels compute it: (tile, first, end, part, lo, hi) of each segment of each
    program, and the first part of each tile.
    """
    width = plan.tiles + 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = {"dtype": torch.int32, "device": device}
    segments = torch.full((plan.programs, width, 6), -1, **options)
    starts = torch.full((plan.tiles + 1,), -1, **options)
    _write_plan[(plan.programs,)](segments, starts, width, num_n, columns, *plan.arguments)
    return [[s for s in program if s[0] >= 0] for program in segments.tolist()], starts.tolist()


def check_plan(plan: Plan, num_n: int) -> None:
    """Check that the parts of each tile cover its steps in order, and that the first `columns`
    tiles of each row of tiles together sum every step for db once.
    """
    columns = plan.columns(num_n)
    runs, starts = runs_of(plan, num_n, columns)
    assert max(sum(end - first for _, first, end, *_ in run) for run in runs) == plan.longest()
    assert starts[0] == 0 and starts[-1] == plan.parts
    by_part = {s[3]: s for run in runs for s in run}
    assert sorted(by_part) == list(range(plan.parts)) and sum(map(len, runs)) == plan.parts
    for tile in range(plan.tiles):
        parts = [by_part[part] for part in range(starts[tile], starts[tile + 1])]
        edges = [0, *(end for _, _, end, *_ in parts)]
        assert [first for _, first, *_ in parts] == edges[:-1] and edges[-1] == plan.steps
        for t, first, end, _, lo, hi in parts:
            assert t == tile and first < end and first <= lo <= hi <= end
    for n in range(num_n):
        tiles = range(n, plan.tiles, num_n)
        stretches = [s for t in tiles for s in (by_part[p] for p in range(*starts[t : t + 2]))]
        summed = [step for *_, lo, hi in stretches for step in range(lo, hi)]
        assert sorted(summed) == list(range(plan.steps))
        assert all(lo == hi for t, *_, lo, hi in stretches if t // num_n >= columns)


@pytest.mark.parametrize("most", [12, pytest.param(40, marks=pytest.mark.slow)])
@settings(deadline=None, max_examples=20)
@given(data=st.data(), steps=st.integers(1, 60), part_steps=st.sampled_from([0, 0.2, 3, 15]))
def test_every_step_once(most: int, data: st.DataObject, steps: int, part_steps: float) -> None:
    num_n, programs = (data.draw(st.integers(1, most)) for _ in range(2))
    tiles = num_n * data.draw(st.integers(1, max(1, most // num_n)))
    check_plan(dw_plan.plan(tiles, steps, programs, part_steps), num_n)
    check_plan(dw_plan.even(tiles, steps, programs), num_n)


@pytest.mark.parametrize(
    "dims",
    [
        *[(2304, 768), (768, 768), (3072, 768), (768, 3072)],
        *[(3072, 1024), (4096, 1024), (1024, 4096)],
    ],
)
def test_programs_of_an_h100_are_busy(dims: tuple[int, int]) -> None:
    """ViT-B and -L, 50,432 tokens: the busiest program is within 8 % of an even share, counting
    9 steps for the start and end of each segment (as on an H200), and there are few partial sums.
    """
    with tuned.target(90, 132):
        config, plan = tuned.gemm_dw(50432, *dims, torch.bfloat16, None, tma=True)
    assert config.tma and plan.programs == 132
    assert plan.longest(9) < 1.08 * plan.tiles * plan.steps / plan.programs + 9
    assert plan.parts <= 2 * plan.programs


def test_columns_share_the_sums() -> None:
    """ViT-B's fc1: within 6 % of an even share, counting 1/8 step for each step summed for db."""
    with tuned.target(90, 132):
        config, plan = tuned.gemm_dw(50432, 3072, 768, torch.bfloat16, None, tma=True)
        num_n = 3072 // config.BLOCK_N
        columns = tuned.dw_columns(plan, num_n, None)
    runs, _ = runs_of(plan, num_n, columns)
    steps = [sum(end - first + (hi - lo) / 8 for _, first, end, _, lo, hi in run) for run in runs]
    assert max(steps) < 1.06 * plan.tiles * plan.steps / plan.programs


def test_few_rows_are_not_cut() -> None:
    with tuned.target(90, 132):
        _, plan = tuned.gemm_dw(197, 3072, 768, torch.bfloat16, None, tma=True)
    assert plan.parts == plan.tiles


def test_narrow_tiles_where_wide_ones_hang_over() -> None:
    """dW of (1536, 384) in tiles of 128 x 256 would be a third more work."""
    with tuned.target(90, 132):
        config, _ = tuned.gemm_dw(50432, 1536, 384, torch.bfloat16, None, tma=True)
        wide, _ = tuned.gemm_dw(50432, 384, 1536, torch.bfloat16, None, tma=True)
    assert (config.BLOCK_K, wide.BLOCK_K) == (128, 256)
