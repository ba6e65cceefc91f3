"""Launches that bypass Triton's argument binding, and recipes, equal those that Triton makes."""

import subprocess
import sys
from pathlib import Path

from processes import env_compiled

FAKE_GPU = Path(__file__).with_name("fake_gpu.py")


def test_every_launch_is_the_one_triton_would_make() -> None:
    command = [sys.executable, str(FAKE_GPU)]
    done = subprocess.run(command, env=env_compiled(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launches, kinds, recipes = (int(word) for word in done.stdout.split() if word.isdigit())
    assert launches > kinds > 100 and recipes > 50, done.stdout
