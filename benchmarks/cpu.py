"""fastvit's reference backend against timm eager on a CPU: `python benchmarks/cpu.py`.

Both models have the same weights and take turns in one process. results/cpu.json keeps the median
times, and the median of the ratio within a round, which other load on the machine hardly affects,
with its 95 % confidence interval.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import clone
import torch
from checks import dtype_name

from benchmarks import machine, models, report
from benchmarks.gpu import read_json, write_json
from benchmarks.models import Task
from benchmarks.workloads import SIZES

CPU = torch.device("cpu")
BATCHES = {"Ti/16": 4, "B/16": 1}
LONGER = {("Ti/16", "infer"): 1, ("Ti/16", "train"): 2, ("B/16", "infer"): 2, ("B/16", "train"): 4}


def measure(seconds: float, names: Sequence[str]) -> list[dict]:
    rows = []
    limits = machine.ceilings(CPU)
    pair = models.entries(CPU)[:2]
    for name in names:
        for kind in ("infer", "train"):
            for dtype in (torch.float32, torch.bfloat16):
                task = Task(kind, SIZES[name], BATCHES[name], dtype)
                ours, timm = sorted(
                    # Slower steps get more seconds, so that all have about as many rounds.
                    models.run(task, CPU, limits, seconds * LONGER[name, kind], pair, (9, 400)),
                    key=lambda r: not r["provider"].startswith("fastvit"),
                )
                for row in (ours, timm):
                    if row["status"] != "ok":
                        raise RuntimeError(f"{task.key}: {row['provider']}: {row['reason']}")
                pairs = zip(timm["seconds"], ours["seconds"], strict=True)
                ratio = interval([t / o for t, o in pairs])
                rows.append(
                    {
                        "model": name,
                        "kind": kind,
                        "batch": task.batch,
                        "dtype": dtype_name(dtype),
                        "fastvit_ms": ours["median_ms"],
                        "fastvit_iqr_ms": ours["iqr_ms"],
                        "timm_ms": timm["median_ms"],
                        "timm_iqr_ms": timm["iqr_ms"],
                        "rounds": ours["rounds"],
                        "ratio": ratio,
                    }
                )
                print(f"{task.key}: timm / fastvit {ratio}", flush=True)
    return rows


def interval(values: list[float]) -> dict[str, float]:
    """The median, and the order statistics between which it lies with 95 % confidence."""
    ordered, n = sorted(values), len(values)
    reach = 0.98 * n**0.5
    low, high = max(0, int(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach) - 1)
    return {"low": ordered[low], "median": statistics.median(ordered), "high": ordered[high]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="per comparison")
    parser.add_argument("--models", nargs="*", default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument("--out", type=Path, default=clone.RESULTS / "cpu.json")
    args = parser.parse_args()
    kept = read_json(args.out, {"rows": []})["rows"]
    kept = [row for row in kept if row["model"] not in args.models]
    rows = [*kept, *measure(args.seconds, args.models)]
    write_json(args.out, {"environment": machine.environment(CPU), "rows": rows})
    print(report.cpu_table({"rows": rows}))


if __name__ == "__main__":
    main()
