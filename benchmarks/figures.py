"""Plots of one GPU's results: throughput against peers, roofline, memory, time by op."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import report

OURS, PEER = "#2a6f97", "#b8c4cc"


def draw(result: dict, path: Path) -> None:
    """Write <gpu>-throughput, -memory, -roofline, -block and -training.png, each if it has data."""
    title = result["environment"]["device"]
    train = [r for r in report.rows(result, "train") if r.get("images_per_s")]
    infer = [r for r in report.rows(result, "infer") if r.get("images_per_s")]
    ops = [r for r in report.rows(result, "ops") if r["status"] == "ok"]
    stem = path.with_suffix("")
    if train or infer:
        _bars(train + infer, "images_per_s", f"images/s, {title}", f"{stem}-throughput.png")
    if any(r["peak_mb"] for r in train):
        _bars(train, "peak_mb", f"peak memory of a step, MB, {title}", f"{stem}-memory.png")
    if ops:
        _roofline(result, ops, title, f"{stem}-roofline.png")
        _split(ops, title, f"{stem}-block.png")
    for row in report.rows(result, "numerics"):
        if row["kind"] == "training curve":
            curves(row, Path(f"{stem}-training.png"))


def _bars(rows: list[dict], value: str, title: str, name: str) -> None:
    groups: dict[str, list[dict]] = {}
    for r in rows:
        groups.setdefault(f"{r['kind']} {r['model']} batch {r['batch']}", []).append(r)
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(8, 0.4 + 0.3 * len(rows) + 0.5 * len(groups)), squeeze=False
    )
    for axis, (group, found) in zip(axes[:, 0], groups.items(), strict=True):
        found = sorted(found, key=lambda r: r[value] or 0)
        colours = [OURS if r["provider"].startswith("fastvit") else PEER for r in found]
        widths = [r[value] or 0 for r in found]
        bars = axis.barh([r["provider"] for r in found], widths, color=colours)
        axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
        axis.set_title(group, fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
        axis.margins(x=0.12)
    _save(figure, title, name)


def _roofline(result: dict, ops: list[dict], title: str, name: str) -> None:
    limits = result["ceilings"]
    ops = [r for r in ops if r["gbps"] and r["provider"].startswith("fastvit")]
    if not ops:
        return
    rate, bandwidth = limits["flops"][ops[0]["dtype"]] / 1e12, limits["bandwidth"] / 1e12
    figure, axis = plt.subplots(figsize=(7, 4.5))
    low, high = 1.0, 1e4
    corner = rate / bandwidth
    axis.plot([low, corner, high], [low * bandwidth, rate, rate], color="black", linewidth=1)
    for op in dict.fromkeys(r["op"] for r in ops):
        mine = [r for r in ops if r["op"] == op]
        x = [1e3 * r["tflops"] / r["gbps"] for r in mine]
        axis.scatter(x, [r["tflops"] for r in mine], s=16, label=op)
    axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte that must move", ylabel="TFLOP/s")
    axis.legend(fontsize=7)
    _save(figure, f"fastvit's ops under the measured roof, {title}", name)


def _split(ops: list[dict], title: str, name: str) -> None:
    """Plot a block's time by op, fastvit and eager: each op's first shape, forward + backward."""
    first: dict[str, dict[str, float]] = {}
    for op in ("layernorm_linear", "attention", "linear_residual", "layernorm_mlp"):
        mine = [r for r in ops if r["op"] == op and r["pass"] == "forward+backward"]
        if mine:
            shape = mine[0]["shape"]
            first[op] = {r["provider"]: r["median_ms"] for r in mine if r["shape"] == shape}
    figure, axis = plt.subplots(figsize=(7, 3))
    for row, pick in enumerate(("fastvit", "eager")):
        left = 0.0
        for i, (op, times) in enumerate(first.items()):
            named = [ms for provider, ms in times.items() if pick in provider]
            ms = min(named or [t for p, t in times.items() if not p.startswith("fastvit")] or [0.0])
            axis.barh(row, ms, left=left, color=f"C{i}", label=op if row == 0 else None)
            left += ms
    axis.set_yticks([0, 1], ["fastvit", "eager"])
    axis.set_xlabel("ms, forward + backward")
    axis.legend(fontsize=7)
    _save(figure, f"time by op, {title}", name)


def curves(row: dict, name: Path) -> None:
    """Plot the loss of a training run: ours, and eager with several seeds."""
    figure, axis = plt.subplots(figsize=(7, 3.5))
    for i, curve in enumerate(row["loss_eager"]):
        label = "eager, same start" if i == 0 else "eager, other seeds" if i == 1 else None
        axis.plot(curve, color="black" if i == 0 else PEER, linewidth=0.8, label=label)
    axis.plot(row["loss"], color=OURS, linewidth=0.8, linestyle="--", label=row["ours"])
    axis.set(xlabel="step", ylabel="loss")
    axis.legend(fontsize=7)
    _save(figure, f"{row['model']}, bf16, batch {row['batch']}", str(name))


def _save(figure: Any, title: str, name: str) -> None:
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(name, dpi=130)
    plt.close(figure)
