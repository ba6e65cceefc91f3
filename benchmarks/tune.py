"""Search the launch configurations of `fastvit_kernels/tuned*.py` on the GPU at hand.

`python benchmarks/tune.py [--budget SECONDS] [--match PATTERN]` searches the lines (entries) of its
tables one by one, by hill climbing: a line's neighbours, one field halved or doubled, are checked
against float64 and then timed in turn with the current line, on up to four workloads whose launches
read it; the search moves to the best of them until none is faster. Each result is recorded at once
and never measured again, so a killed search resumes. Prints the lines to put into those files.
"""

import argparse
import contextlib
import datetime
import functools
import math
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import clone

if "--cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from fastvit_kernels import tuned, tuned_attention
from fastvit_kernels.tuned import Config
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import fastvit
from benchmarks import (
    bench_attention,
    bench_layernorm_linear,
    bench_layernorm_mlp,
    bench_linear_residual,
    bench_patch_embed,
    harness,
    machine,
)
from benchmarks.gpu import read_json, write_json
from benchmarks.harness import Case, Provider

GAIN = 0.99  # a change must take less than this share of the time, else it may be noise
TILES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
FIELDS = {  # fields to search, for tables whose kernels do not use all of them
    "GEMM_DW": (*TILES, "CTAS"),
    "ATTENTION": ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
    "MLP_NARROW": (*TILES, "SUBTILES"),
}
BOUNDS = {
    "num_warps": (1, 16),
    "num_stages": (1, 6),
    "GROUP_M": (1, 32),
    "SUBTILES": (1, 8),
    "CTAS": (1, 4),  # of a persistent kernel
}
# Configurations that no single step from a line reaches. With two CTAs per SM, the epilogue of one
# overlaps the main loop of the other, at a third more loads.
ALTERNATIVES = {"tma_wide": (Config(128, 128, 64, num_stages=3, CTAS=2, tma=True),)}
NO_KERNEL = Config(0, 0)  # stands for None in a table: separate launches are faster
OPTIONAL = re.compile(
    r"MLP_NARROW|ATTENTION (fwd_resident|fwd_fewer|bwd_|dq_beside|\w+_(long|even))"
)
REGISTERS = (96, 128, 168)  # of a thread, with which five, four and three CTAs of 4 warps fit an SM
TILE = 128 * 256  # largest accumulator, in elements, that fits the registers of one program
TABLES: dict[str, dict[int, dict[str, Config | None]]] = {
    name: table
    for module in (tuned, tuned_attention)
    for name, table in vars(module).items()
    if isinstance(table, dict) and isinstance(table.get(tuned.DEFAULT), dict)
}


@dataclass(frozen=True)
class Line:
    """One entry of one of `TABLES`, which launches read."""

    table: str
    arch: int
    name: str

    @property
    def key(self) -> str:
        return f"{self.table} {self.arch} {self.name}"

    @property
    def config(self) -> Config:
        return self._entries()[self.name] or NO_KERNEL

    def _entries(self) -> dict[str, Config | None]:
        return tuned.look_up(TABLES[self.table], self.arch)

    @contextlib.contextmanager
    def using(self, config: Config) -> Iterator[None]:
        entries = self._entries()
        before = entries[self.name]
        entries[self.name] = None if config == NO_KERNEL else config
        tuned.clear_choices()
        try:
            yield
        finally:
            entries[self.name] = before
            tuned.clear_choices()


def lines(arch: int) -> list[Line]:
    """Every line used on this architecture that has a kernel."""
    found = [
        Line(name, arch, line)
        for name, table in TABLES.items()
        for line in tuned.look_up(table, arch)
    ]
    return [line for line in found if line.config != NO_KERNEL]


def neighbours(line: Line, config: Config) -> list[Config]:
    """Configurations to try next: one field halved or doubled, one stage more or less, the line's
    ALTERNATIVES, for attention other register limits and other numbers of warps with as many rows
    each, and no kernel at all where another serves.
    """
    if config == NO_KERNEL:
        return []
    found = [NO_KERNEL] if OPTIONAL.search(f"{line.table} {line.name}") else []
    if line.table == "ATTENTION":
        limits = [None, *REGISTERS]
        found += [replace(config, maxnreg=n) for n in limits if n != config.maxnreg]
        # Twice or half the rows that a program owns, in twice or half the warps.
        owned = "BLOCK_N" if line.name.startswith("dkv") else "BLOCK_M"
        rows, warps = getattr(config, owned), config.num_warps
        pairs = (rows * 2, warps * 2), (rows // 2, warps // 2)
        found += [
            replace(config, **{owned: rows}, num_warps=warps)
            for rows, warps in pairs
            if rows <= 256 and 4 <= warps <= 16
        ]
    if line.table == "GEMM" and config.tma:
        found += [rival for rival in ALTERNATIVES.get(line.name, ()) if rival != config]
    extra = ("GROUP_M", "SUBTILES", *(("CTAS",) if getattr(config, "tma", False) else ()))
    for field in FIELDS.get(line.table, TILES + extra):
        value = getattr(config, field)
        # The number of keys that a kernel holds decides when it is chosen: not a field to tune.
        if value == 0 or (field == "BLOCK_N" and re.search("resident|keys", line.name)):
            continue
        steps = (value - 1, value + 1) if field == "num_stages" else (value // 2, value * 2)
        low, high = BOUNDS.get(field, (16, 256))
        found += [replace(config, **{field: v}) for v in steps if low <= v <= high]
    return [c for c in found if plausible(line.table, c)]


def plausible(table: str, config: Config) -> bool:
    """True if the accumulator fits the registers; the compiler refuses what else does not fit."""
    rows = config.BLOCK_K if table == "GEMM_DW" else config.BLOCK_M
    return rows * config.BLOCK_N <= min(TILE, 4096 * config.num_warps)


def literal(config: Config) -> str:
    """The source text, as in a table: tile sizes by position, the rest by name unless default."""
    if config == NO_KERNEL:
        return "None"
    sizes = [config.BLOCK_M, config.BLOCK_N, *([config.BLOCK_K] if config.BLOCK_K else [])]
    named = [
        f"{k}={v}"
        for k, v in asdict(config).items()
        if not k.startswith("BLOCK") and (v != getattr(NO_KERNEL, k) or k.startswith("num"))
    ]
    return f"Config({', '.join([*map(str, sizes), *named])})"


@dataclass
class Job:
    """A workload whose launches read a line: its call and the expected results."""

    case: Case
    args: tuple[Any, ...]
    eager: list[torch.Tensor]
    truth: list[torch.Tensor]

    @classmethod
    def of(cls, case: Case, device: torch.device) -> "Job":
        torch.manual_seed(0)
        args = case.inputs(device, case.dtype)
        truth, eager = harness._oracle(case, args)
        return cls(case, args, eager, truth)

    def call(self, *args: Any) -> Any:
        with fastvit.use_backend("triton"):
            return self.case.providers[0].call(*args)  # type: ignore[misc]


def evaluate(
    line: Line, config: Config, jobs: Sequence[Job], device: torch.device, seconds: float
) -> dict[str, Any]:
    """Check `config` on every job, then time it in turn with the current line; ratio: new / old."""
    for job in jobs:
        with line.using(config), poisoned():
            provider = Provider("candidate", job.call)
            wrong = harness.check_provider(job.case, provider, job.args, job.eager, job.truth)
        if wrong:
            return {**wrong, "workload": job.case.key}
    ratios, ms = [], {}
    for job in jobs:
        step = harness._caller(job.case, job.call, job.args)
        calls = {name: _with(line, c, step) for name, c in (("old", line.config), ("new", config))}
        samples = harness.measure(calls, device, seconds, hide_launch=True, rounds=(5, 40))
        pairs = zip(samples["new"].seconds, samples["old"].seconds, strict=True)
        ratios.append(statistics.median(new / old for new, old in pairs))
        ms[job.case.key] = {k: 1e3 * statistics.median(s.seconds) for k, s in samples.items()}
    return {"status": "ok", "ratio": math.exp(statistics.fmean(map(math.log, ratios))), "ms": ms}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill torch.empty with NaN, lest results of an earlier configuration pass for new ones."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)


def _with(line: Line, config: Config, step: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with line.using(config):
            return step()

    return call


def search(
    line: Line,
    record: dict[str, Any],
    try_out: Callable[[Config], dict[str, Any]],
    save: Callable[[], None],
    deadline: float,
    prepare: Callable[[list[Config]], None] = lambda configs: None,
) -> dict[str, Any]:
    """Climb from the current line. record: {"standing", "tried", "best", "finished"}, updated in
    place and returned.

    prepare is called with the configurations about to be tried, to compile them in parallel.
    """
    baseline = literal(line.config)
    if record.get("baseline") != baseline:  # the table has changed: the ratios are to another line
        record.clear()
        record |= {"baseline": baseline, "tried": {}, "best": baseline, "finished": False}
    tried = record["tried"]
    tried.setdefault(baseline, {"status": "ok", "ratio": 1.0})
    best = parse(record["best"])
    while not record["finished"]:
        around = neighbours(line, best)
        fresh = [config for config in around if literal(config) not in tried]
        if fresh and time.time() < deadline:
            prepare(fresh)
        for config in fresh:
            if time.time() > deadline:
                return record
            tried[literal(config)] = try_out(config)
            save()
        good = [c for c in around if tried[literal(c)]["status"] == "ok"]
        ahead = min(good, key=lambda c: tried[literal(c)]["ratio"], default=best)
        if tried[literal(ahead)]["ratio"] < GAIN * tried[literal(best)]["ratio"]:
            best, record["best"] = ahead, literal(ahead)
        else:
            record["finished"] = True
        save()
    return record


def parse(text: str) -> Config:
    """The inverse of `literal`."""
    return eval(text, {"Config": Config}) or NO_KERNEL


def workloads(device: torch.device) -> list[Case]:
    """The ops that lines are timed on: many tokens and few, 16-bit and float32."""
    rows = (bench_layernorm_mlp, bench_layernorm_linear, bench_linear_residual, bench_patch_embed)
    if device.type != "cuda":
        f16, f32 = torch.float16, torch.float32
        return [
            *(module.case(device, "small", 1, 16, f32, True) for module in rows[1:3]),
            bench_attention.case(device, 1, 33, 1, 16, f16, True),
        ]
    bf16, f32 = torch.bfloat16, torch.float32
    sizes = (("B", 256, 768), ("L", 128, 1024), ("S", 256, 384), ("B", 8, 768), ("B", 1, 768))
    sizes += (("Ti", 256, 192),)
    shapes = [*((*size, bf16) for size in sizes), ("S", 8, 384, bf16), ("B", 8, 768, f32)]
    tokens = [(256, 197, 12, 64), (512, 50, 12, 64), (256, 128, 12, 64), (1, 197, 12, 64)]
    tokens += [(64, 577, 16, 64), (1, 577, 12, 64), (64, 257, 16, 80), (512, 50, 12, 80)]
    tokens += [(256, 128, 12, 80), (16, 577, 12, 128), (36, 1370, 12, 64), (64, 729, 16, 72)]
    passes = (False, True)
    return [
        *(m.case(device, *shape, passed) for shape in shapes for m in rows for passed in passes),
        *(bench_attention.case(device, *t, bf16, passed) for t in tokens for passed in passes),
        bench_attention.case(device, 8, 197, 12, 64, f32, True),
    ]


def reads(case: Case, every: Sequence[Line], device: torch.device) -> set[str]:
    """The keys of the lines that the launches of a workload read."""
    seen: set[int] = set()

    def note(run: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        seen.add(kwargs.get("num_stages", 0))

    with contextlib.ExitStack() as stack:
        # Each line gets a unique num_stages, by which launches identify it; nothing is compiled.
        for i, line in enumerate(every):
            stack.enter_context(line.using(replace(line.config, num_stages=100 + i)))
        stack.enter_context(launching(note))
        _run_once(case, device)
    return {line.key for i, line in enumerate(every) if 100 + i in seen}


@contextlib.contextmanager
def launching(how: Callable[..., Any]) -> Iterator[None]:
    """In the body every launch calls how(run, kernel, ...) instead of run(kernel, ...)."""
    with contextlib.ExitStack() as stack:
        kinds: tuple[Any, ...] = (JITFunction, InterpretedFunction)
        for kind in kinds:
            stack.callback(setattr, kind, "run", kind.run)
            kind.run = functools.partialmethod(_pass_to, how, kind.run)
        yield


def _pass_to(kernel: Any, how: Callable[..., Any], run: Any, *args: Any, **kwargs: Any) -> Any:
    return how(run, kernel, *args, **kwargs)


def _run_once(case: Case, device: torch.device) -> None:
    call = case.providers[0].call
    assert call is not None
    with fastvit.use_backend("triton"):
        harness._caller(case, call, case.inputs(device, case.dtype))()


def compile_only(line: Line, config: Config, index: int) -> None:
    """Compile what workload `index` launches into Triton's disk cache; runs in a process pool."""
    case = _with_kernel(workloads(torch.device("cuda"))[index])

    def compiled(run: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        run(*args, **kwargs | {"warmup": True})

    with line.using(config), launching(compiled):
        _run_once(case, torch.device("cuda"))


def prepare(line: Line, configs: list[Config], indices: list[int], seconds: float) -> None:
    """Compile for all configurations in parallel, at most `seconds`; failures show when tried."""
    pool = _pool()
    jobs = [pool.apply_async(compile_only, (line, c, i)) for c in configs for i in indices]
    end = time.time() + seconds
    for job in jobs:
        job.wait(max(0.0, end - time.time()))


@functools.cache
def _pool() -> Any:
    return multiprocessing.get_context("spawn").Pool(min(8, os.cpu_count() or 1))


@functools.cache
def _readers(device: torch.device) -> dict[str, list[int]]:
    """For each line's key, the indices of the workloads whose launches read it."""
    every = lines(arch_of(device))
    found: dict[str, list[int]] = {}
    for i, case in enumerate(workloads(device)):
        for key in reads(_with_kernel(case), every, device):
            found.setdefault(key, []).append(i)
    return found


def _with_kernel(case: Case) -> Case:
    op = getattr(fastvit.ops, "attention_qkv" if case.op == "attention" else case.op)
    return replace(case, providers=[Provider(case.op, op)])


def tune(
    line: Line, path: Path, device: torch.device, seconds: float, deadline: float
) -> dict[str, Any]:
    """Start or resume the search of one line; returns its record, which is kept in `path`."""
    state = read_json(path, {})
    digest = machine.code_digest(without=("tuned.py", "tuned_attention.py"))
    if state.get("code") != digest:
        state = {"code": digest, "device": _device_name(device), "lines": {}}
    record = state["lines"].setdefault(line.key, {})
    every = workloads(device)
    readers = _readers(device).get(line.key, [])
    # A forward reads fewer lines than a backward, so its time depends more on each.
    readers = ([i for i in readers if not every[i].backward] or readers)[:4]
    if not readers:
        return {"unread": "no workload reads this line"}
    jobs = [Job.of(_with_kernel(every[i]), device) for i in readers]

    def try_out(config: Config) -> dict[str, Any]:
        return evaluate(line, config, jobs, device, seconds)

    def side_by_side(configs: list[Config]) -> None:
        if device.type == "cuda":
            prepare(line, configs, readers, min(60.0, deadline - time.time()))

    return search(line, record, try_out, lambda: write_json(path, state), deadline, side_by_side)


def printed(line: Line, record: dict[str, Any], device: torch.device) -> str:
    """The line for its table, with the device, date and times of its search."""
    if "unread" in record:
        return f"# {line.key}: {record['unread']}"
    best = record["tried"][record["best"]]
    times = ", ".join(f"{m['new']:.4g} ms, was {m['old']:.4g}" for m in best.get("ms", {}).values())
    counts = f"{len(record['tried'])} tried" + ("" if record["finished"] else ", not finished")
    day = datetime.datetime.now(datetime.timezone.utc).date()
    note = f"{_device_name(device)}, {day}: {times or 'as it stood'} ({counts})"
    return f'{line.table}[{line.arch}]  "{line.name}": {record["best"]},  # {note}'


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def result_path(out: Path, device: torch.device) -> Path:
    return out / f"tune-{machine.slug(_device_name(device))}.json"


def arch_of(device: torch.device) -> int:
    return tuned.arch(device.index or 0 if device.type == "cuda" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for everything")
    parser.add_argument("--match", default="", help="only lines whose key matches this pattern")
    parser.add_argument("--out", type=Path, default=clone.RESULTS)
    parser.add_argument("--cpu", action="store_true", help="dry run in the interpreter")
    args = parser.parse_args()
    start = time.time()
    if not args.cpu and not torch.cuda.is_available():
        sys.exit("tune.py: no NVIDIA GPU here; try --cpu --out DIR for a dry run")
    if args.cpu and args.out.resolve() == clone.RESULTS:
        sys.exit("tune.py: --cpu is a dry run: name another place for its figures with --out")
    device = torch.device("cpu" if args.cpu else "cuda")
    chosen = [line for line in lines(arch_of(device)) if re.search(args.match, line.key)]
    path = result_path(args.out, device)
    for i, line in enumerate(chosen):
        left = start + args.budget - time.time()
        if left <= 0:
            break
        deadline = time.time() + left / (len(chosen) - i)
        try:
            print(printed(line, tune(line, path, device, 0.05, deadline), device), flush=True)
        except Exception as error:  # the other lines can still be searched
            print(f"# {line.key}: {harness.describe(error)}", flush=True)


if __name__ == "__main__":
    main()
