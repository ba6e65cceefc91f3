"""Processes that tests start: they find the modules that the tests find."""

import os
import subprocess
import sys
from collections.abc import Mapping


def env_here(**more: str) -> dict[str, str]:
    """The environment, with the module path of this process."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more}


def env_compiled(**more: str) -> dict[str, str]:
    """`env_here` without the interpreter, which conftest turns on where there is no GPU."""
    return {k: v for k, v in env_here(**more).items() if k != "TRITON_INTERPRET"}


def run_python(
    code: str, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own and capture what it prints; env: instead of `env_here`."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=env_here() if env is None else env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
