"""`pytest benchmarks/ --benchmark-only`: interleaved measurements shown by pytest-benchmark.

All providers of a group are measured together by `harness.run` when its first test runs;
each test then replays its own rounds to pytest-benchmark through a clock that shows their times.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import harness, machine
from benchmarks.harness import Case

SECONDS = 1.0
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Clock:
    """A timer that only the recorded rounds advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()
_measured: dict[str, list[dict]] = {}


@functools.cache
def ceilings() -> machine.Ceilings:
    return machine.ceilings(DEVICE)


@functools.cache
def environment() -> dict[str, Any]:
    return machine.environment(DEVICE)


def parameters(cases: Callable[[torch.device], list[Case]]) -> list[Any]:
    return [
        pytest.param(c, p.name, id=f"{c.shape}-{'fwdbwd' if c.backward else 'fwd'}-{p.name}")
        for c in cases(DEVICE)
        for p in c.providers
    ]


def replay(benchmark: Any, case: Case, provider: str) -> None:
    if case.key not in _measured:
        _measured[case.key] = harness.run(case, DEVICE, ceilings(), SECONDS)
    row = next(r for r in _measured[case.key] if r["provider"] == provider)
    floor = case.work.floor_ms(ceilings(), case.dtype)
    show(benchmark, case.key, row, {"floor_ms": floor, "work": vars(case.work)})


def show(benchmark: Any, group: str, row: dict, extra: dict[str, Any]) -> None:
    """Hand one measured row to pytest-benchmark, or skip or fail with its reason."""
    if row["status"] == "absent":
        pytest.skip(f"{row['provider']}: {row['reason']}")
    if row["status"] != "ok":
        pytest.fail(f"{row['provider']}: {row['status']}: {row['reason']}", pytrace=False)
    benchmark.group = f"{group} on {DEVICE.type}"
    benchmark.extra_info.update({k: v for k, v in row.items() if k not in ("seconds", "reason")})
    benchmark.extra_info.update(extra)
    benchmark.extra_info["environment"] = environment()
    benchmark.extra_info["ceilings"] = ceilings().as_dict()
    rounds = iter(row["seconds"])

    def pass_time() -> None:
        CLOCK.now += next(rounds, 0.0)

    benchmark._timer = CLOCK
    benchmark.pedantic(pass_time, rounds=len(row["seconds"]))
