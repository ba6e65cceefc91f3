"""Run all measurements on a GPU: `python benchmarks/gpu.py [--budget SECONDS]`.

Parity, training and inference steps, ops against peers: the most valuable first, each result
written as soon as it is measured, so that a killed run loses nothing and the next one resumes.
Steps run in a worker process; a step that crashes or hangs loses only its own result.
Needs torch and triton; measures timm and the other peers if installed. Nothing is downloaded.
"""

import argparse
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import clone
import torch

if "--cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

from benchmarks import harness, machine, report

# After these errors the CUDA context is lost, and all later steps would fail too.
FATAL = ("CUDA error", "device-side assert", "illegal memory access", "unspecified launch failure")


def write_json(path: Path, content: Any) -> None:
    """Write atomically: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def read_json(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return default


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=520.0, help="seconds for everything")
    parser.add_argument("--only", default="", help="parts, comma-separated; see --list")
    parser.add_argument("--match", default="", help="only steps whose key matches this pattern")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    parser.add_argument("--cpu", action="store_true", help="dry run on toy sizes; needs --out")
    parser.add_argument("--again", action="store_true", help="remeasure steps that have a result")
    parser.add_argument("--list", action="store_true", help="print the steps and end")
    parser.add_argument("--faults", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.cpu and args.out is None:
        parser.error("--cpu is a dry run: name another place for its figures with --out")
    args.out = (args.out or clone.RESULTS).resolve()
    return args


def result_path(args: argparse.Namespace) -> Path:
    name = "cpu-dry-run" if args.cpu else torch.cuda.get_device_name()
    return args.out / f"{machine.slug(name)}.json"


def chosen_steps(args: argparse.Namespace) -> list[Any]:
    from benchmarks import gpu_steps

    found = gpu_steps.steps(torch.device("cpu" if args.cpu else "cuda"), args.out)
    found = [*gpu_steps.faults(), *found] if args.faults else found
    parts = [p for p in args.only.split(",") if p]
    known = {s.part for s in found} | set(gpu_steps.PARTS)
    unknown = [p for p in parts if p not in known]
    if unknown:
        raise SystemExit(f"--only: unknown {', '.join(unknown)}; expected {', '.join(known)}")
    return [s for s in found if (not parts or s.part in parts) and re.search(args.match, s.key)]


def done(result: dict, step: Any, code: str, args: argparse.Namespace) -> bool:
    """True if a step has a complete result of the same code; with --again, of this run."""
    old = result["steps"].get(step.key)
    if old is None or any(row.get("unfinished") for row in old.get("rows", ())):
        return False
    return old["when"] >= args.start if args.again else old["code"] == code


def die_with(parent: int) -> None:
    """Have Linux kill this process when its parent ends, for whatever reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        # A parent that ended before the line above sends no signal.
        if os.getppid() != parent:
            raise SystemExit("the driver has ended")


def work(args: argparse.Namespace) -> int:
    """The worker process: run the steps in order and record each; returns the exit code.

    Ends early when time is up, or with code 3 when the CUDA context is lost.
    """
    die_with(int(os.environ["FASTVIT_BENCH_DRIVER"]))
    device = torch.device("cpu" if args.cpu else "cuda")
    path = result_path(args)
    result = read_json(path, {"steps": {}})
    environment = machine.environment(device)
    result["environment"] = environment
    limits = machine.ceilings(device)
    result["ceilings"] = limits.as_dict()
    write_json(path, result)
    for step in chosen_steps(args):
        if done(result, step, environment["code"], args):
            continue
        if time.time() > args.start + args.budget - 5:
            break
        running = {"key": step.key, "part": step.part, "since": time.time(), "limit": step.limit}
        write_json(args.out / "running.json", running)
        print(f"{time.time() - args.start:6.0f} s  {step.part}: {step.key}", flush=True)
        record: dict[str, Any] = {"part": step.part, "code": environment["code"]}
        begin = time.time()
        try:
            record |= {"status": "ok", "rows": step.run(device, limits)}
        except Exception as error:
            import traceback

            record |= {"status": "error", "error": harness.describe(error)}
            record["traceback"] = traceback.format_exc()[-6000:]
        record |= {"when": begin, "seconds": round(time.time() - begin, 2)}
        result["steps"][step.key] = record
        write_json(path, result)
        (args.out / "running.json").unlink(missing_ok=True)
        try:
            path.with_suffix(".md").write_text(report.device_report(result))
        except Exception as error:
            print(f"the report could not be written: {harness.describe(error)}", flush=True)
        if any(word in json.dumps(record) for word in FATAL):
            return 3
    return 0


def drive(args: argparse.Namespace) -> None:
    """Keep a worker running; record a step that exceeds its limit or crashes the worker."""
    running, pid = args.out / "running.json", args.out / "worker.pid"
    running.unlink(missing_ok=True)
    path = result_path(args)
    forward = [a for a in sys.argv[1:] if a != "--worker"]
    # Each worker imports torch, so another one starts only if enough time is left.
    while time.time() < args.start + args.budget - 15:
        command = [sys.executable, __file__, *forward, "--worker"]
        env = {**os.environ, "FASTVIT_BENCH_START": str(args.start)}
        env["FASTVIT_BENCH_DRIVER"] = str(os.getpid())
        paths = [*clone.PATHS, env.get("PYTHONPATH", "")]
        env["PYTHONPATH"] = os.pathsep.join(paths).rstrip(os.pathsep)
        worker = subprocess.Popen(command, env=env, start_new_session=True)
        pid.write_text(str(worker.pid))
        try:
            why = watch(worker, running, args.start + args.budget)
        finally:
            end(worker)
            pid.unlink(missing_ok=True)
        lost = read_json(running, None)
        running.unlink(missing_ok=True)
        if lost is not None:
            result = read_json(path, {"steps": {}})
            result["steps"][lost["key"]] = {
                "part": lost["part"],
                "status": why,
                "code": machine.code_digest(),
                "when": lost["since"],
                "seconds": round(time.time() - lost["since"], 2),
            }
            if why == "budget spent":  # not the step's fault: the next run measures it
                del result["steps"][lost["key"]]
            write_json(path, result)
        elif worker.returncode != 3:
            break


def end(worker: subprocess.Popen) -> None:
    """Kill the worker and its child processes."""
    if worker.poll() is None:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def watch(worker: subprocess.Popen, running: Path, deadline: float) -> str:
    """Wait for the worker to end, and return why it did."""
    while worker.poll() is None:
        time.sleep(0.2)
        state = read_json(running, None)
        if time.time() > deadline:
            end(worker)
            return "budget spent"
        if state and time.time() - state["since"] > state["limit"]:
            end(worker)
            return f"ended after {state['limit']:.0f} s"
    return f"its process ended with code {worker.returncode}"


def main() -> None:
    args = arguments()
    args.start = float(os.environ.get("FASTVIT_BENCH_START", time.time()))
    if args.worker:
        sys.exit(work(args))
    if not args.cpu and not torch.cuda.is_available():
        sys.exit("gpu.py: no NVIDIA GPU here; try --cpu --out DIR for a dry run on toy sizes")
    if args.list:
        for step in chosen_steps(args):
            print(f"{step.part:9} {step.key}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worker ends too
    drive(args)
    path = result_path(args)
    if not path.exists():
        sys.exit("gpu.py: the worker ended before its first result; its errors are above")
    report.write_device_report(path)
    print(report.summary(read_json(path, {"steps": {}})))
    print(f"{path} ({time.time() - args.start:.0f} s)")


if __name__ == "__main__":
    main()
