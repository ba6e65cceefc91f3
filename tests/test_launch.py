"""Launching without Triton's binding of arguments makes the launches that Triton would make."""

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
    launches, _, _, kinds, *_ = done.stdout.split()
    assert int(launches) > int(kinds) > 100, done.stdout
