"""Whole models: inference and a training step, ours against the libraries people use."""

import pytest
import torch

from benchmarks import front_door, models
from benchmarks.models import Task
from benchmarks.workloads import SIZES


def tasks(device: torch.device) -> list[Task]:
    if device.type != "cuda":
        size, dtype = SIZES["Ti/16"], torch.float32
        return [Task("infer", size, 2, dtype), Task("train", size, 2, dtype)]
    bf16 = torch.bfloat16
    base = SIZES["B/16"]
    return [
        *(Task("train", size, size.batch, bf16) for size in SIZES.values()),
        *(Task("infer", base, batch, bf16) for batch in (1, 8, 64, 256)),
    ]


def parameters() -> list:
    return [
        pytest.param(task, entry.name, id=f"{task.key}-{entry.name}")
        for task in tasks(front_door.DEVICE)
        for entry in models.entries(front_door.DEVICE)
    ]


_measured: dict[str, list[dict]] = {}


@pytest.mark.parametrize(("task", "provider"), parameters())
def bench_model(benchmark, task: Task, provider: str) -> None:
    if task.key not in _measured:
        limits = front_door.ceilings()
        _measured[task.key] = models.run(task, front_door.DEVICE, limits, front_door.SECONDS)
    row = next(r for r in _measured[task.key] if r["provider"] == provider)
    front_door.show(benchmark, task.key, row, {})
