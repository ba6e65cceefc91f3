"""The steps of `gpu.py`, most valuable first: each one measures one thing and returns rows."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import (
    bench_attention,
    bench_layernorm_linear,
    bench_layernorm_mlp,
    bench_linear_residual,
    bench_patch_embed,
    harness,
    models,
    numerics,
    peers,
)
from benchmarks.harness import Case
from benchmarks.machine import ROOT, Ceilings
from benchmarks.models import Task
from benchmarks.workloads import INFERENCE_BATCHES, SIZES, TOY, Size

PARTS = ("parity", "ops", "train", "infer", "numerics", "autotune")
OPS = (
    bench_attention,
    bench_layernorm_mlp,
    bench_layernorm_linear,
    bench_linear_residual,
    bench_patch_embed,
)


@dataclass(frozen=True)
class Step:
    """`run(device, ceilings)` gives rows; the worker is ended after `limit` seconds."""

    part: str
    key: str
    limit: float
    run: Callable[[torch.device, Ceilings], list[dict[str, Any]]]


def steps(device: torch.device) -> list[Step]:
    """All steps in the order of their worth. On a CPU the same paths with toy sizes."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16
    sizes = list(SIZES.values()) if cuda else [TOY]
    base = SIZES["B/16"] if cuda else TOY
    seconds = 2.0 if cuda else 0.05
    first, later = _ops(device)
    found = [Step("parity", f"check {c.key}", 60, _check(c)) for c in _small(device)]
    found += [_train(base, seconds), _train(base, seconds, compiled=True)]
    found += first
    found += [Step("parity", "pytest", 150, _pytest)]
    found += [_infer(base, b, seconds) for b in (INFERENCE_BATCHES[::-1] if cuda else (2,))]
    found += [_infer(base, b, seconds, compiled=True) for b in ((256, 1) if cuda else (2,))]
    if cuda:
        for name in ("L/16", "S/16", "DINOv2-L/14 518", "H/14", "B/16 384", "Ti/16"):
            found += [_train(SIZES[name], seconds, c) for c in (False, True)]
    found += [Step("train", f"profile {base.name}", 60, lambda d, _: _profile(d, base))]
    found += [Step("numerics", "ops", 90, lambda d, _: numerics.ops(d))]
    found += [Step("numerics", "models", 120, lambda d, _: numerics.models(d, sizes[:3]))]
    found += later
    if cuda:
        found += [
            _infer(SIZES[name], b, seconds)
            for name in ("L/16", "S/16", "H/14", "Ti/16")
            for b in INFERENCE_BATCHES[::-1]
        ]
    big = SIZES["L/16"] if cuda else TOY
    found += [Step("train", f"largest batch {big.name}", 120, lambda d, _: _largest(d, big))]
    task = Task("train", base, base.batch, dtype)
    found += [Step("autotune", task.key, 300, _autotune(task, seconds))]
    found += [
        Step("autotune", f"{case.key} compiled", 120, _op(case, compiled=True))
        for module in OPS[1:]
        for case in module.cases(device)[:2]
    ]
    return found


def _train(size: Size, seconds: float, compiled: bool = False) -> Step:
    task = Task("train", size, size.batch, torch.bfloat16)
    return _model("train", task, seconds, compiled)


def _infer(size: Size, batch: int, seconds: float, compiled: bool = False) -> Step:
    task = Task("infer", size, batch, torch.bfloat16)
    return _model("infer", task, seconds / 2, compiled)


def _model(part: str, task: Task, seconds: float, compiled: bool) -> Step:
    """All that runs at once, or, a step of its own as it takes long, ours and timm compiled."""

    def run(device: torch.device, ceilings: Ceilings) -> list[dict]:
        entries = models.entries(device)
        pair = (models._fastvit, models._timm)
        if compiled:
            entries = [e for e in entries if e.build in pair and not e.graph]
        else:
            entries = [e for e in entries if e.mode is None]
        batch = task.batch
        while True:
            smaller = replace(task, batch=batch)
            try:
                return _rows(models.run(smaller, device, ceilings, seconds, entries))
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                batch //= 2

    return Step(part, task.key + " compiled" * compiled, 200, run)


def _autotune(task: Task, seconds: float) -> Callable[..., list[dict]]:
    def run(device: torch.device, ceilings: Ceilings) -> list[dict]:
        wanted = ("fastvit", "timm eager (SDPA)", "timm + torch.compile max-autotune")
        chosen = [e for e in models.entries(device, autotune=True) if e.name.startswith(wanted)]
        return _rows(models.run(task, device, ceilings, seconds, chosen))

    return run


def _ops(device: torch.device) -> tuple[list[Step], list[Step]]:
    """(the first shape of every op, all other shapes)."""
    first: list[Step] = []
    later: list[Step] = []
    for module in OPS:
        for i, case in enumerate(module.cases(device)):
            step = Step("ops", case.key, 90, _op(case))
            (first if i < 2 else later).append(step)
    return first, later


def _op(case: Case, compiled: bool = False) -> Callable[..., list[dict]]:
    """Ours with the peers that run at once, or with torch.compile's."""
    seconds = 0.4 if torch.cuda.is_available() else 0.02
    slow = [p for p in case.providers if p.name.startswith("torch.compile")]
    quick = [p for p in case.providers if p not in slow]
    case = replace(case, providers=[*quick[:2], *slow] if compiled else quick)
    return lambda device, ceilings: _rows(harness.run(case, device, ceilings, seconds))


def _small(device: torch.device) -> Iterator[Case]:
    """Every op, forward and backward, at one real and one odd shape, ours alone."""
    own = peers.ours_name(device)
    for module in OPS:
        for case in _odd(module, device):
            yield replace(case, providers=[p for p in case.providers if p.name == own])


def _odd(module: Any, device: torch.device) -> list[Case]:
    dtypes = (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,)
    if module is bench_attention:
        shapes = ((2, 197, 12, 64), (3, 50, 2, 80), (2, 257, 16, 80))
        return [module.case(device, *shape, dtype, True) for shape in shapes for dtype in dtypes]
    shapes = (("B", 2, 768), ("odd", 3, 72))
    return [module.case(device, *shape, dtype, True) for shape in shapes for dtype in dtypes]


def _check(case: Case) -> Callable[..., list[dict]]:
    def run(device: torch.device, ceilings: Ceilings) -> list[dict]:
        return _rows(harness.run(case, device, ceilings, 0.0))

    return run


def _rows(rows: list[dict]) -> list[dict]:
    """Without the single rounds: median and spread are kept."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def _pytest(device: torch.device, _: Ceilings) -> list[dict]:
    """The parity tests as they are, on this device, in a process of their own."""
    tests = [f"tests/test_{name}.py" for name in ("attention", "gemm_ops", "patch_embed")]
    tests = [t for t in tests if (ROOT / t).exists()]
    if device.type != "cuda":
        tests = ["tests/test_ops.py::test_use_backend_nests_and_restores"]
    # A configuration of its own: plug-ins that the project's names may be absent here.
    with tempfile.NamedTemporaryFile("w", suffix=".ini") as config:
        config.write(
            "[pytest]\npythonpath = src kernels tests .\n"
            "markers =\n    gpu: needs an NVIDIA GPU\n    slow: slow\n"
        )
        config.flush()
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--maxfail=20"]
        command += ["-p", "no:cacheprovider", "-c", config.name, f"--rootdir={ROOT}", *tests]
        path = os.pathsep.join(str(ROOT / p) for p in ("src", "kernels", "tests", "."))
        env = {**os.environ, "PYTHONPATH": path}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=130
            )
            out, code = done.stdout + done.stderr, done.returncode
        except subprocess.TimeoutExpired as late:
            out = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
            code = None
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", out)}
    status = "ok" if code == 0 else "out of time" if code is None else "failed"
    return [{"kind": "pytest", "status": status, **counts, "output": out[-8000:]}]


def _largest(device: torch.device, size: Size) -> list[dict]:
    limit = 1 << 14 if device.type == "cuda" else 4
    rows = []
    for entry in models.entries(device)[:2]:
        batch = models.largest_batch(entry, size, torch.bfloat16, device, limit)
        rows.append(
            {"kind": "largest batch", "model": size.name, "provider": entry.name, "batch": batch}
        )
    return rows


def _profile(device: torch.device, size: Size) -> list[dict]:
    """Where one training step goes: device time by kernel, ours and timm's."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities = [ProfilerActivity.CUDA]
    rows = []
    for entry in models.entries(device)[:2]:
        if entry.absent:
            continue
        module = models._seeded(entry.build, size).to(device)
        step = models.make_step(module, Task("train", size, size.batch, torch.bfloat16), device)
        for _ in range(3):
            step()
        harness.synchronize(device)
        with profile(activities=activities) as trace:
            step()
            harness.synchronize(device)
        attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        events = [(getattr(e, attribute), e.count, e.key) for e in trace.key_averages()]
        events = sorted((e for e in events if e[0] > 0), reverse=True)
        rows += [
            {
                "kind": "profile",
                "model": size.name,
                "provider": entry.name,
                "kernel": key[:120],
                "calls": count,
                "us": us,
            }
            for us, count, key in events[:40]
        ]
        del module, step
        harness.release(device)
    return rows


FAULTS = {
    "fault raise": lambda d, c: _raise(RuntimeError("asked to fail")),
    "fault memory": lambda d, c: _raise(torch.OutOfMemoryError("asked to run out")),
    "fault exit": lambda d, c: os._exit(7),
    "fault hang": lambda d, c: _hang(),
}


def faults() -> list[Step]:
    """Steps that fail in every way a step can, to try the driver with."""
    return [Step("faults", key, 2.0, run) for key, run in FAULTS.items()]


def _raise(error: Exception) -> list[dict]:
    raise error


def _hang() -> list[dict]:
    while True:
        time.sleep(1)
