"""The measurement harness: cases, parity before timing, interleaved rounds, floors.

A case is one op or model at one shape; its providers are ours and the peers, all called with the
same arguments. `run` checks each provider against float64, times those that pass in turn, round by
round, and returns one row per provider. A provider that is absent, raises, runs out of memory or
fails parity gets a row that says so, and no time.
"""

import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from checks import disagreement, dtype_name
from torch import Tensor

from benchmarks.machine import Ceilings

L2_FLUSH_BYTES = 256 << 20
SLEEP_CLOCK_HZ = 2e9


@dataclass(frozen=True)
class Work:
    """The least work of a case: FLOPs on real tokens, bytes moved, exponentials.

    bytes: each input read once, each output written once.
    """

    flops: float
    bytes: float = 0.0
    exps: float = 0.0

    def floor_ms(self, ceilings: Ceilings, dtype: torch.dtype) -> float:
        """The longest of the times that FLOPs, bytes and exponentials take at their rates."""
        times = [self.flops / ceilings.flops[dtype_name(dtype)], self.bytes / ceilings.bandwidth]
        if ceilings.exps:
            times.append(self.exps / ceilings.exps)
        return 1e3 * max(times)


@dataclass(frozen=True)
class Provider:
    """An implementation to measure. absent: why it cannot run here, or None."""

    name: str
    call: Callable[..., Any] | None
    absent: str | None = None


@dataclass(frozen=True)
class Case:
    """One thing to measure. `inputs(device, dtype)` draws fresh random arguments for `reference`.

    With `backward`, gradients of every floating tensor argument are computed and checked too.
    """

    op: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[torch.device, torch.dtype], tuple[Any, ...]]
    reference: Callable[..., Tensor]
    providers: Sequence[Provider]
    work: Work
    backward: bool = False

    @property
    def key(self) -> str:
        passes = "forward+backward" if self.backward else "forward"
        return f"{self.op} {self.shape} {dtype_name(self.dtype)} {passes}"


@dataclass
class Samples:
    """Seconds of each round, and the launch overhead: microseconds until a call returns."""

    seconds: list[float] = field(default_factory=list)
    launch_us: float = 0.0


def run(case: Case, device: torch.device, ceilings: Ceilings, seconds: float) -> list[dict]:
    """Check and then time, interleaved, all providers; returns one row for each, in their order."""
    release(device)
    torch.manual_seed(0)
    args = case.inputs(device, case.dtype)
    rows = {p.name: _row(case, p) for p in case.providers}
    try:
        truth, eager = _oracle(case, args)
    except torch.OutOfMemoryError as error:
        truth = eager = None
        for row in rows.values():
            row.setdefault("status", "failed")
            row.setdefault("reason", f"the float64 oracle ran out of memory: {error}"[:200])
    calls: dict[str, Callable[[], Any]] = {}
    for provider in case.providers:
        if provider.call is None or truth is None or eager is None:
            continue
        row = rows[provider.name]
        row.update(check_provider(case, provider, args, eager, truth))
        if "status" not in row:
            try:
                calls[provider.name] = _caller(case, provider.call, args)
            except Exception as error:
                row.update(status="error", reason=describe(error))
    del truth, eager
    samples = measure(calls, device, seconds, hide_launch=True)
    for name, call in calls.items():
        rows[name].update(_timed(case, samples[name], ceilings))
        rows[name]["peak_mb"] = peak_mb(call, device)
    return list(rows.values())


def check_provider(
    case: Case, provider: Provider, args: tuple, eager: list[Tensor], truth: list[Tensor]
) -> dict:
    """{} if the provider is as close to float64 as the rule asks, else its status and the reason.

    On a GPU the third call is checked: from it on, as when timed, ours replays a recorded recipe.
    """
    assert provider.call is not None
    try:
        for _ in range(3 if args[0].is_cuda else 1):
            got = _results(case, provider.call, args)
    except torch.OutOfMemoryError as error:
        return {"status": "out of memory", "reason": str(error)[:200]}
    except Exception as error:
        return {"status": "error", "reason": describe(error)}
    if len(got) != len(truth):
        return {"status": "failed parity", "reason": f"{len(got)} results, not {len(truth)}"}
    for i, (g, e, t) in enumerate(zip(got, eager, truth, strict=True)):
        finite = bool(g.isfinite().all())  # as nothing that is timed may hide behind float64's NaNs
        reason = disagreement(g, e, t, l2_from=0) if finite else "not finite"
        if reason:
            return {"status": "failed parity", "reason": f"{_name(i)}: {reason}"}
    return {}


def measure(
    calls: dict[str, Callable[[], Any]],
    device: torch.device,
    seconds: float,
    hide_launch: bool = False,
    rounds: tuple[int, int] = (5, 100),
) -> dict[str, Samples]:
    """Time the calls in turn, round by round, so that clock drift affects all alike.

    On a GPU: device time between two events, L2 flushed before each call; with hide_launch the
    device first sleeps, so that the CPU runs ahead and launch overhead is not measured. On a CPU:
    wall time, or with one thread its CPU time, which other processes do not lengthen.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    samples = {name: Samples() for name in calls}
    if not calls:
        return samples
    cost = 0.0
    for name, call in calls.items():
        cost += _warm_up(call, device, samples[name])
    count = max(rounds[0], min(rounds[1], int(seconds / max(cost, 1e-9))))
    names = list(calls)
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device) if _cuda(device) else None
    events: list[tuple[str, Any, Any]] = []
    for r in range(count):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            if flush is None:
                start = clock()
                calls[name]()
                samples[name].seconds.append(clock() - start)
                continue
            flush.zero_()
            if hide_launch:
                wait = min(2e-5 + 2e-6 * samples[name].launch_us, 0.02)
                torch.cuda._sleep(int(wait * SLEEP_CLOCK_HZ))
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[name]()
            end.record()
            events.append((name, start, end))
    synchronize(device)
    for name, start, end in events:
        samples[name].seconds.append(start.elapsed_time(end) / 1e3)
    return samples


def _warm_up(call: Callable[[], Any], device: torch.device, samples: Samples) -> float:
    """Warm a call up and return the seconds it then takes; sets samples.launch_us."""
    for _ in range(3 if _cuda(device) else 1):
        call()
    synchronize(device)
    start = time.perf_counter()
    call()
    samples.launch_us = 1e6 * (time.perf_counter() - start)
    synchronize(device)
    return time.perf_counter() - start


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and interquartile range in milliseconds."""
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "iqr_ms": 1e3 * (high - low),
        "rounds": len(seconds),
    }


def peak_mb(call: Callable[[], Any], device: torch.device) -> float | None:
    """Device memory one call takes beyond what was allocated before it; None without a GPU."""
    if not _cuda(device):
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def saved_mb(forward: Callable[[], Any], parameters: Sequence[Tensor] = ()) -> float:
    """Memory that autograd keeps between forward and backward, parameters not counted."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # an op's own output with its grad_fn would be a cycle, never freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()  # alive until counted, so that no address is used twice
    total = sum(kept.values()) / 1e6
    del out
    return total


def synchronize(device: torch.device) -> None:
    if _cuda(device):
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Free what earlier cases held, with their compiled code: Dynamo keeps 8 versions at most."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    free_cache(device)


def free_cache(device: torch.device) -> None:
    """Free cached memory, but keep compiled code."""
    if _cuda(device):
        torch.cuda.empty_cache()


def describe(error: BaseException) -> str:
    """An error in one line: its type, message and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
    message = (str(error).strip() or "no message").splitlines()[0][:300]
    return f"{type(error).__name__}: {message}{where}"


def _cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _row(case: Case, provider: Provider) -> dict:
    row: dict[str, Any] = {
        "op": case.op,
        "shape": case.shape,
        "dtype": dtype_name(case.dtype),
        "pass": "forward+backward" if case.backward else "forward",
        "provider": provider.name,
    }
    if provider.call is None:
        row |= {"status": "absent", "reason": provider.absent}
    return row


def _timed(case: Case, samples: Samples, ceilings: Ceilings) -> dict:
    row: dict[str, Any] = {"status": "ok", **spread(samples.seconds)}
    ms, floor = row["median_ms"], case.work.floor_ms(ceilings, case.dtype)
    return row | {
        "seconds": samples.seconds,
        "launch_us": samples.launch_us,
        "tflops": case.work.flops / ms / 1e9,
        "gbps": case.work.bytes / ms / 1e6,
        "floor_ms": floor,
        "times_floor": ms / floor,
    }


def _leaves(args: tuple) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor) and a.requires_grad]


def _caller(case: Case, call: Callable[..., Tensor], args: tuple) -> Callable[[], Any]:
    if not case.backward:
        inert = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)

        def forward() -> Any:
            with torch.no_grad():
                return call(*inert)

        return forward
    leaves = _leaves(args)
    dout = torch.randn_like(call(*args).detach())
    return lambda: torch.autograd.grad(call(*args), leaves, dout)


def _results(
    case: Case, call: Callable[..., Tensor], args: tuple, like: torch.dtype | None = None
) -> list[Tensor]:
    """[out, gradients...] for a fixed random dout; like: the dtype it is first rounded to."""
    if not case.backward:
        with torch.no_grad():
            return [call(*args)]
    out = call(*args)
    generator = torch.Generator(out.device).manual_seed(1)
    dout = torch.randn(out.shape, generator=generator, device=out.device).to(like or out.dtype)
    return [out.detach(), *torch.autograd.grad(out, _leaves(args), dout.to(out.dtype))]


def _oracle(case: Case, args: tuple) -> tuple[list[Tensor], list[Tensor]]:
    """(truth in float64, eager in the case's dtype)."""
    eager = _results(case, case.reference, args)
    wide = tuple(_double(a) for a in args)
    return _results(case, case.reference, wide, eager[0].dtype), eager


def _double(a: Any) -> Any:
    if not isinstance(a, Tensor) or not a.is_floating_point():
        return a
    return a.detach().double().requires_grad_(a.requires_grad)


def _name(i: int) -> str:
    return "output" if i == 0 else f"gradient {i}"
