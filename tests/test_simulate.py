"""The model of an SM that estimates attention's times: its queues, and real machine code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import env_compiled

from benchmarks.simulate import SHARED, Instruction, Quadrant, path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "simulate.py"


def test_warps_share_a_pipe() -> None:
    taken = [Instruction("MUFU.EX2", "R0, R1", False)] * 400
    for resident, programs in ((1, 1), (4, 12)):
        each = Quadrant(taken, 0.0).run(resident, warps=1, programs=programs)
        assert each == pytest.approx(8 * 400, rel=0.05)


def test_one_instruction_issues_per_cycle() -> None:
    taken = [Instruction("FADD", "R0, R1", False, stall=4) for _ in range(400)]
    assert Quadrant(taken, 0.0).run(1, warps=1, programs=1) == pytest.approx(1600, rel=0.01)
    # Other warps fill the stalls.
    assert Quadrant(taken, 0.0).run(4, warps=1, programs=40) < 600


def test_more_programs_take_longer() -> None:
    times = {
        n: Quadrant([Instruction("FADD", "R0, R1", False, stall=4)] * 400, 0.0) for n in (4, 12)
    }
    for n, quadrant in times.items():
        quadrant.run(4, warps=1, programs=n)
    assert 1.5 * times[4].cycles < times[12].cycles < 3.5 * times[4].cycles
    assert times[12].busy["issue"] <= times[12].cycles


def test_four_quadrants_share_the_shared_memory() -> None:
    """A load issues at once, but its result waits for those before."""
    quadrant = Quadrant([Instruction("LDS.128", "R0, [R1]", False)] * 400, 0.0)
    quadrant.run(1, warps=1, programs=1)
    assert quadrant.free["shared"] == pytest.approx(400 * 512 / (SHARED / 4), rel=0.05)


@pytest.mark.parametrize(
    ("operands", "rows"), [("R24, gdesc[UR4], R24", 64), ("R24, R8, gdesc[UR4]", 0)]
)
def test_a_product_waits_for_shared_memory(operands: str, rows: int) -> None:
    """64 rows by 32 columns from shared memory take 24 cycles to read and 16 to multiply."""
    product = Instruction("HGMMA.64x32x16.F32.BF16", operands, False)
    assert product.cost == 16 and product.bytes == 2 * 16 * (rows + 32)
    quadrant = Quadrant([product] * 50, 0.0)
    # Asynchronous: only a wait would see it.
    assert quadrant.run(1, warps=1, programs=1) <= 50 + 1
    assert quadrant.free["tensor"] == pytest.approx(50 * max(16, product.bytes / SHARED), rel=0.05)


def test_a_loop_is_taken_as_often_as_its_shape_says() -> None:
    code = [
        Instruction("S2R", "R0", False),
        Instruction("LDGSTS.E.128", "[R1], [R2]", True),
        Instruction("HGMMA.64x64x16", "R24, gdesc[UR4], R24", False),
        Instruction("BRA", "`(.L_x_0)", True, target=1),
        Instruction("STG.E.128", "[R2], R0", False),
        Instruction("EXIT", "", False),
    ]
    taken = path(code, steps=5, stages=3, resident=False)
    loads = [c.bytes for c in taken if c.op == "LDGSTS"]
    assert loads == [512] * 3 + [0] * 2  # the last two tiles were loaded ahead
    assert taken[-1].op == "STG" and len(taken) == 1 + 5 * 3 + 1


def test_only_the_first_variant_is_taken() -> None:
    variant = [
        Instruction("HGMMA.64x64x16", "R24, gdesc[UR4], R24", False),
        Instruction("BRA", "`(.L_x_0)", True, target=0),
        Instruction("STG.E.128", "[R2], R0", False),
        Instruction("EXIT", "", True),
    ]
    assert len(path(2 * variant, steps=3, stages=1, resident=False)) == 3 * 2 + 1


def test_attention_of_one_shape() -> None:
    command = [sys.executable, str(SCRIPT), "40x330x12x64"]
    run = subprocess.run(command, env=env_compiled(), capture_output=True, text=True, check=True)
    times = [float(t) for t in re.findall(r"^ *(\d+) us", run.stdout, re.MULTILINE)]
    # Forward's FLOPs at 800 TFLOP/s, and thirty times that.
    floor = 4 * 40 * 330**2 * 12 * 64 / 800e12 * 1e6
    assert len(times) == 3 and all(floor < t < 30 * floor for t in times)
