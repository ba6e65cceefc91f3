"""The plan of a weight gradient: every row of every tile once, in order, and programs kept busy."""

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
        ptr = segments_ptr + (pid * width + i) * 4
        tl.store(ptr, tile)
        tl.store(ptr + 1, first)
        tl.store(ptr + 2, end)
        tl.store(ptr + 3, part)
    if pid == 0:
        for t in range(tiles + 1):
            part = dw_plan.first_part(t, tiles, steps, programs, chunks, share, chunks2)
            tl.store(first_parts_ptr + t, part)


def check_plan(plan: Plan, device: torch.device) -> None:
    """What the kernels make of it: each tile's parts follow each other, from step 0 to the last."""
    width = plan.tiles + 2
    options = {"dtype": torch.int32, "device": device}
    segments = torch.full((plan.programs, width, 4), -1, **options)
    first_parts = torch.full((plan.tiles + 1,), -1, **options)
    _write_plan[(plan.programs,)](segments, first_parts, width, *plan.arguments)
    runs = [[s for s in program if s[0] >= 0] for program in segments.tolist()]
    assert max(sum(end - first for _, first, end, _ in run) for run in runs) == plan.longest
    starts = first_parts.tolist()
    assert starts[0] == 0 and starts[-1] == plan.parts
    by_part = {part: (tile, first, end) for run in runs for tile, first, end, part in run}
    assert sorted(by_part) == list(range(plan.parts)) and sum(map(len, runs)) == plan.parts
    for tile in range(plan.tiles):
        parts = [by_part[part] for part in range(starts[tile], starts[tile + 1])]
        edges = [0, *(end for _, _, end in parts)]
        assert [first for _, first, _ in parts] == edges[:-1] and edges[-1] == plan.steps
        assert all(t == tile and first < end for t, first, end in parts)


@pytest.mark.parametrize("most", [12, pytest.param(40, marks=pytest.mark.slow)])
@settings(deadline=None, max_examples=20)
@given(data=st.data(), steps=st.integers(1, 60), part_steps=st.sampled_from([0, 0.2, 3, 15]))
def test_every_step_once(most: int, data: st.DataObject, steps: int, part_steps: float) -> None:
    tiles, programs = (data.draw(st.integers(1, most)) for _ in range(2))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_plan(dw_plan.plan(tiles, steps, programs, part_steps), device)
    check_plan(dw_plan.even(tiles, steps, programs), device)


@pytest.mark.parametrize("dims", [(2304, 768), (768, 768), (3072, 768), (768, 3072), (4096, 1024)])
def test_programs_of_an_h100_are_busy(dims: tuple[int, int]) -> None:
    """ViT-B and -L at batch 256: within 5 % of an even share, at fewer slabs than programs take."""
    with tuned.target(90, 132):
        config, plan = tuned.gemm_dw(50432, *dims, torch.bfloat16, None, tma=True)
    assert config.tma and plan.programs == 132
    assert plan.longest < 1.05 * plan.tiles * plan.steps / plan.programs
    assert plan.parts <= 2 * plan.programs


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
