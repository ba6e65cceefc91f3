"""The steps of `gpu.py`, most valuable first: each one measures one thing and returns rows."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from clone import PATHS, ROOT

from benchmarks import (
    bench_attention,
    bench_block,
    bench_gemm,
    bench_layernorm_attention,
    bench_layernorm_linear,
    bench_layernorm_mlp,
    bench_linear_residual,
    bench_patch_embed,
    bench_swiglu,
    harness,
    models,
    numerics,
    peers,
    tune,
)
from benchmarks.harness import Case
from benchmarks.machine import Ceilings
from benchmarks.models import Task
from benchmarks.workloads import INFERENCE_BATCHES, SIZES, TOY, Size

PARTS = ("parity", "ops", "train", "infer", "numerics", "autotune", "tune")
OPS = (
    bench_block,
    bench_attention,
    bench_layernorm_attention,
    bench_layernorm_mlp,
    bench_layernorm_linear,
    bench_linear_residual,
    bench_patch_embed,
)


@dataclass(frozen=True)
class Step:
    """`run(device, ceilings)` returns rows; the worker is killed after `limit` seconds."""

    part: str
    key: str
    limit: float
    run: Callable[[torch.device, Ceilings], list[dict[str, Any]]]


def steps(device: torch.device, out: Path) -> list[Step]:
    """All steps, most valuable first; on a CPU the same code paths at toy sizes.

    out: folder in which the tuner keeps its record.
    """
    cuda = device.type == "cuda"
    base = SIZES["B/16"] if cuda else TOY
    batches = INFERENCE_BATCHES if cuda else (2,)
    others = [SIZES[n] for n in ("L/16", "S/16", "DINOv2-L/14 518", "H/14", "B/16 384", "Ti/16")]
    others = others if cuda else []
    first, later = _ops(device)
    return [
        *(Step("parity", f"check {c.key}", 60, _check(c)) for c in _small(device)),
        _train(base),
        _infer(base, batches[-1]),
        # The CPU's time, which GPUs wait for in small batches, and what is left without it.
        *(_train(replace(base, batch=batch), "graph") for batch in ((64, 16) if cuda else ())),
        Step("train", f"profile {base.name}", 60, lambda d, _: _profile(d, base)),
        *first,
        _train(base, "compiled"),
        *(_op("ops", case, "compiled") for case in bench_block.cases(device)[:2]),
        *(_infer(base, batch) for batch in batches[:-1]),
        _infer(base, batches[-1], "compiled"),
        *(Step("parity", f"pytest {t.stem}", 150, _pytest(t)) for t in op_tests(device)),
        *(_infer(base, batch, "graph") for batch in batches[:2]),
        _train(base, "graph"),
        *(_train(size) for size in others),
        Step("numerics", "ops", 90, lambda d, _: numerics.ops(d)),
        Step("numerics", "models", 120, lambda d, _: numerics.models(d, numerics.sizes(d))),
        *(Step("train", f"largest batch {s.name}", 120, _largest(s)) for s in (base, *others[:1])),
        Step("parity", "sanitizer", 200, _sanitizer),
        *(_train(size, "compiled") for size in others),
        *(_infer(base, batch, "compiled") for batch in batches[:-1]),
        *later,
        *(_infer(size, batch) for size in others for batch in batches[::-1]),
        Step(
            "numerics",
            "training curve",
            300,
            lambda d, _: numerics.curves(d, numerics.STEPS if cuda else 10, 5 if cuda else 2),
        ),
        _model("autotune", Task("train", base, base.batch, torch.bfloat16), "max-autotune", 300),
        *(
            _op("autotune", case, which)
            for module in OPS
            for case in module.cases(device)[:2]
            for which in ("compiled", "max-autotune")
            if (module, which) != (bench_block, "compiled")
        ),
        *(
            Step("tune", line.key, 150, _tune(line, out))
            for line in tune.lines(tune.arch_of(device))
            if cuda or line.name == "float32"
        ),
    ]


def _train(size: Size, which: str = "eager") -> Step:
    return _model("train", Task("train", size, size.batch, torch.bfloat16), which)


def _infer(size: Size, batch: int, which: str = "eager") -> Step:
    return _model("infer", Task("infer", size, batch, torch.bfloat16), which)


def _model(part: str, task: Task, which: str, limit: float = 200) -> Step:
    """A step that times whole models. which: "eager", all that need no compiling; "graph",
    "compiled" or "max-autotune", ours and timm, eager and in that mode.
    """
    own = (models._fastvit, models._timm)

    def chosen(device: torch.device) -> list[models.Entry]:
        entries = models.entries(device, autotune=which == "max-autotune")
        if which == "eager":
            return [e for e in entries if e.mode is None and not e.graph]
        if which == "graph":
            return [e for e in entries if e.build in own and e.mode is None]
        mode = "default" if which == "compiled" else which
        return [e for e in entries if e.build in own and e.mode in (None, mode) and not e.graph]

    def run(device: torch.device, ceilings: Ceilings) -> list[dict]:
        seconds = 0.05 if device.type != "cuda" else 1.0 if task.kind == "infer" else 2.0
        batch = task.batch
        while True:
            try:
                smaller = replace(task, batch=batch)
                return _rows(models.run(smaller, device, ceilings, seconds, chosen(device)))
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                batch //= 2

    return Step(part, task.key + (f" {which}" if which != "eager" else ""), limit, run)


def _tune(line: tune.Line, out: Path) -> Callable[..., list[dict]]:
    def run(device: torch.device, _: Ceilings) -> list[dict]:
        seconds, budget = (0.05, 100) if device.type == "cuda" else (0.01, 2)
        path = tune.result_path(out, device)
        record = tune.tune(line, path, device, seconds, time.time() + budget)
        row = {"kind": "tuned line", "line": tune.printed(line, record, device)}
        return [row | {"unfinished": not record.get("finished", True)}]

    return run


def _ops(device: torch.device) -> tuple[list[Step], list[Step]]:
    """(steps of the first shape of every op, steps of all other shapes)."""
    first: list[Step] = []
    later: list[Step] = []
    for module in (*OPS, bench_gemm, bench_swiglu):
        for i, case in enumerate(module.cases(device)):
            (first if i < 2 else later).append(_op("ops", case))
    return first, later


def _op(part: str, case: Case, which: str = "eager") -> Step:
    """A step that times one op. which: "eager", ours and the peers that need no compiling; else
    ours, the first peer and those of torch.compile in that mode.
    """
    slow = [p for p in case.providers if "torch.compile" in p.name]
    quick = [p for p in case.providers if p not in slow]
    if which != "eager":
        quick = quick[:2] + [p for p in slow if ("max-autotune" in p.name) == (which != "compiled")]
    case = replace(case, providers=quick)

    def run(device: torch.device, ceilings: Ceilings) -> list[dict]:
        seconds = 0.4 if device.type == "cuda" else 0.02
        return _rows(harness.run(case, device, ceilings, seconds))

    key = case.key + (f" {which}" if which != "eager" else "")
    return Step(part, key, {"eager": 90, "compiled": 120}.get(which, 200), run)


def _small(device: torch.device) -> Iterator[Case]:
    """Our ops alone, forward and backward, at ViT-B's shape and, but for the block, an odd one."""
    own = peers.ours_name(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    batch = 64 if device.type == "cuda" else 2
    for module in OPS:
        if module is bench_attention:
            shapes = [(batch, 197, 12, 64), (3, 50, 2, 80)]
        else:
            shapes = [("B", batch, 768)] + [("odd", 3, 72)] * (module is not bench_block)
        for case in (module.case(device, *shape, dtype, True) for shape in shapes):
            yield replace(case, providers=[p for p in case.providers if p.name == own])


def _check(case: Case) -> Callable[..., list[dict]]:
    def run(device: torch.device, ceilings: Ceilings) -> list[dict]:
        return _rows(harness.run(case, device, ceilings, 0.0))

    return run


def _rows(rows: list[dict]) -> list[dict]:
    """The rows without the times of single rounds; median and spread are kept."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def op_tests(device: torch.device) -> list[Path]:
    """The test files that use the fixture `device`, and so run on a GPU; on a CPU just one."""
    if device.type != "cuda":
        return [ROOT / "tests" / "test_ops.py"]
    found = sorted((ROOT / "tests").glob("test_*.py"))
    return [t for t in found if re.search(r"\bdevice: torch\.device\b", t.read_text())]


def _pytest(test: Path) -> Callable[..., list[dict]]:
    """A step that runs one file of parity tests in a subprocess, on this device."""

    def run(device: torch.device, _: Ceilings) -> list[dict]:
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--maxfail=20"]
        if device.type == "cuda" and find_spec("xdist") is not None:
            command += ["-n", str(min(8, os.cpu_count() or 1))]  # compiling is most of the work
        # Not the project's configuration, which uses plug-ins that may not be installed here.
        with tempfile.NamedTemporaryFile("w", suffix=".ini") as config:
            config.write(
                "[pytest]\npythonpath = src kernels tests . benchmarks\n"
                "markers =\n    gpu: needs an NVIDIA GPU\n    slow: slow\n"
            )
            config.flush()
            command += ["-p", "no:cacheprovider", "-c", config.name, f"--rootdir={ROOT}", str(test)]
            code, out = _outcome(command, 140)
        words = r"(\d+) (passed|failed|skipped|errors?)"
        counts = {word: int(n) for n, word in re.findall(words, out)}
        status = "ok" if code == 0 else "out of time" if code is None else "failed"
        row = {"kind": "pytest", "shape": test.stem, "status": status, **counts}
        return [row | {"output": out[-6000:]}]

    return run


def _sanitizer(device: torch.device, _: Ceilings) -> list[dict]:
    """Run every op once under compute-sanitizer's memcheck, which finds accesses out of bounds."""
    row: dict[str, Any] = {"kind": "compute-sanitizer", "shape": "memcheck"}
    found = shutil.which("compute-sanitizer") or shutil.which(
        "/usr/local/cuda/bin/compute-sanitizer"
    )
    if device.type != "cuda" or found is None:
        reason = peers.missing(device=device) or "compute-sanitizer is not on the PATH"
        return [row | {"status": "absent", "reason": reason}]
    command = [found, "--tool", "memcheck", "--error-exitcode", "99"]
    command += [sys.executable, str(ROOT / "benchmarks" / "touch.py")]
    # Without the caching allocator each tensor is a separate allocation, with checked bounds.
    code, out = _outcome(command, 190, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    status = {0: "ok", 99: "failed", None: "out of time"}.get(code, "error")
    return [
        row | {"status": status, "reason": out.strip().split("\n")[-1][:200], "output": out[-6000:]}
    ]


def _outcome(
    command: list[str], seconds: float, env: dict[str, str] | None = None
) -> tuple[int | None, str]:
    """Run a command in a subprocess: (exit code, or None if it timed out; its output)."""
    # The child sets PR_SET_PDEATHSIG, so that it ends with this process, then execs the command: a
    # preexec_fn, which runs between fork and exec, could deadlock since CUDA has started threads.
    if sys.platform == "linux":
        become = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); "
        become += "os.getppid() == int(sys.argv[1]) and os.execvp(sys.argv[2], sys.argv[2:])"
        command = [sys.executable, "-c", become, str(os.getpid()), *command]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
        )
        return done.returncode, done.stdout.decode(errors="replace")
    except subprocess.TimeoutExpired as late:
        return None, (late.stdout or b"").decode(errors="replace")


def _largest(size: Size) -> Callable[..., list[dict]]:
    def run(device: torch.device, _: Ceilings) -> list[dict]:
        limit = 1 << 14 if device.type == "cuda" else 4
        rows = []
        for entry in models.entries(device)[:2]:
            if entry.absent:
                continue
            batch = models.largest_batch(entry, size, torch.bfloat16, device, limit)
            row = {"kind": "largest batch", "model": size.name, "provider": entry.name}
            rows.append(row | {"batch": batch})
        return rows

    return run


def _profile(device: torch.device, size: Size) -> list[dict]:
    """Device time of one training step by kernel, ours and timm's."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities = [ProfilerActivity.CUDA]
    rows = []
    for entry in models.entries(device)[:2]:
        if entry.absent:
            continue
        module = models.seeded(entry.build, size, device)
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
    """Steps that fail in every way a step can, to test the driver."""
    return [Step("faults", key, 2.0, run) for key, run in FAULTS.items()]


def _raise(error: Exception) -> list[dict]:
    raise error


def _hang() -> list[dict]:
    while True:
        time.sleep(1)
