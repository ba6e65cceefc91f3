"""Launches that bypass Triton's argument binding, and recipes, equal those that Triton makes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_launch_is_the_one_triton_would_make() -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(str(ROOT / p) for p in ("src", "kernels"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/fake_gpu.py")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    launches, kinds, recipes = (int(word) for word in done.stdout.split() if word.isdigit())
    assert launches > kinds > 100 and recipes > 50, done.stdout
