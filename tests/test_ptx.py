"""Run compiled kernels without a GPU: `ptx_cases` on the emulator `ptx_machine`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import env_compiled

CASES = Path(__file__).with_name("ptx_cases.py")


@pytest.mark.timeout(1200)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs what is compiled for it")
@pytest.mark.parametrize(
    "machine",
    ["90-late", *(pytest.param(name, marks=pytest.mark.slow) for name in ("90", "80-late"))],
)
def test_compiled_kernels(machine: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(CASES)]
    env = env_compiled(PTX_MACHINE=machine)
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
