"""Tables and plots from committed results: `python benchmarks/report.py` rewrites the README's.

Every figure in the README between the markers comes from the JSON files in results/; a test
compares the two.
"""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import clone

MARKERS = "<!-- {0}:start -->", "<!-- {0}:end -->"
NOTHING = (
    "No GPU has been measured yet; `python benchmarks/gpu.py` on a machine with one writes the "
    "figures that belong here."
)


def rows(result: dict, part: str) -> list[dict]:
    """All rows of the successful steps of one part."""
    found: dict[Any, dict] = {}
    for step in result["steps"].values():
        if step["part"] == part and step["status"] == "ok":
            for row in step["rows"]:
                # Steps of compiled models time the eager ones again: the later row counts.
                names = tuple(row.get(k) for k in ("kind", "model", "batch", "provider"))
                found[names if "images_per_s" in row else len(found)] = row
    return list(found.values())


def measured(results: Path) -> dict[Path, dict]:
    """The results of gpu.py, by file; the folder holds other tables too."""
    found = {path: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    return {path: result for path, result in found.items() if "steps" in result}


def table(header: Sequence[str], lines: list[list[str]]) -> str:
    out = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(out + ["| " + " | ".join(line) + " |" for line in lines])


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits; all digits from 1000 on; '-' for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _state(row: dict) -> str:
    return f"{row['status']}: {row.get('reason', '')}".rstrip(": ")


def models_table(found: list[dict]) -> str:
    """Table of whole models; absent providers are left out, failed ones give the reason."""
    lines = []
    for r in found:
        if "images_per_s" in r:
            lines.append(
                [
                    r["model"],
                    str(r["batch"]),
                    r["provider"],
                    number(r["median_ms"]),
                    number(r["iqr_ms"], 2),
                    number(r["images_per_s"]),
                    number(r["mfu_of_measured"], 2),
                    number(r["times_floor"]),
                    number(r["peak_mb"]),
                    number(r.get("saved_mb")),
                    number(r["joules_per_image"]),
                ]
            )
        elif r.get("status") not in (None, "absent"):
            lines.append([r["model"], str(r["batch"]), r["provider"], _state(r), *["-"] * 7])
    header = "model,batch,provider,ms,IQR,images/s,MFU,ms / floor,peak MB"
    header += ",MB for backward,J/image"
    return table(header.split(","), lines)


def ops_table(found: list[dict]) -> str:
    lines = []
    for r in found:
        name = [r["op"], f"{r['shape']} {r['pass']}", r["provider"]]
        if r["status"] == "ok":
            figures = [number(r[k]) for k in ("median_ms", "tflops", "gbps", "times_floor")]
            figures += [number(r["launch_us"]), number(r["peak_mb"])]
            lines.append(name + figures)
        elif r["status"] != "absent":
            lines.append([*name, _state(r), *["-"] * 5])
    header: str = "op,shape,provider,ms,TFLOP/s,GB/s,ms / floor,launch us,peak MB"
    return table(header.split(","), lines)


def _against_best(found: list[dict]) -> list[tuple[dict, dict]]:
    """Ours and the fastest peer of each op and shape that both were timed on."""
    groups: dict[tuple, list[dict]] = {}
    for r in found:
        if r["status"] == "ok":
            groups.setdefault((r["op"], r["shape"], r["dtype"], r["pass"]), []).append(r)
    pairs = []
    for group in groups.values():
        ours = [r for r in group if r["provider"] == "fastvit"]
        peers = [r for r in group if not r["provider"].startswith("fastvit")]
        if ours and peers:
            pairs.append((ours[0], min(peers, key=lambda r: r["median_ms"])))
    return pairs


def peers_table(found: list[dict]) -> str:
    """Table of each op and its fastest peer; for plain GEMMs only the range of ratios."""
    lines, ratios = [], []
    for own, best in _against_best(found):
        ratio = best["median_ms"] / own["median_ms"]
        if own["op"] == "gemm":
            ratios.append(ratio)
            continue
        times = [number(own["median_ms"]), best["provider"], number(best["median_ms"])]
        lines.append([own["op"], f"{own['shape']} {own['pass']}", *times, f"{ratio:.2f}x"])
    out = [table("op,shape,ms,fastest peer,peer ms,speedup".split(","), lines)]
    if ratios:
        low, high = min(ratios), max(ratios)
        out.append(
            f"Bare products (`bench_gemm`, {len(ratios)} shapes): {low:.2f}x to {high:.2f}x "
            "cuBLAS's speed."
        )
    return "\n\n".join(out)


def profile_line(found: list[dict]) -> str:
    """Kernel time of one training step by provider; '' if none was profiled."""
    totals: dict[tuple[str, str], float] = {}
    for r in found:
        if r.get("kind") == "profile":
            name = r["model"], r["provider"]
            totals[name] = totals.get(name, 0.0) + r["us"] / 1e3
    times = [f"{model} {provider} {number(ms)} ms" for (model, provider), ms in totals.items()]
    return f"Kernel time of one training step, profiled: {', '.join(times)}." if times else ""


def parity_table(result: dict) -> str:
    lines = []
    for key, step in result["steps"].items():
        if step["part"] != "parity":
            continue
        if step["status"] != "ok":
            lines.append([key, step["status"], step.get("error", "")])
        for r in step.get("rows", ()):
            if r.get("kind") == "pytest":
                words = ("passed", "failed", "skipped", "error", "errors")
                counts = ", ".join(f"{r[w]} {w}" for w in words if w in r)
                lines.append([key, r["status"], counts])
            else:
                lines.append([key, r["status"], str(r.get("reason", ""))])
    return table(["check", "status", "detail"], lines)


def failures(result: dict) -> list[str]:
    """A line for each step that failed."""
    return [
        f"{key}: {step.get('error', step['status'])}"
        for key, step in result["steps"].items()
        if step["status"] != "ok"
    ]


def provenance(result: dict) -> str:
    e = result["environment"]
    known = [f"{k} {e[k]}" for k in ("driver", "cuda", "torch", "triton", "timm") if e.get(k)]
    codes = [step["code"] for step in result["steps"].values()]
    earlier = sum(code != e["code"] for code in codes)
    mixed = f", {earlier} of {len(codes)} steps by earlier code" if earlier else ""
    return f"{e['device']}, {', '.join(known)}, commit {e['commit']}{mixed}"


def ceilings_line(result: dict) -> str:
    c = result["ceilings"]
    rates = ", ".join(f"{k} {number(v / 1e12)} TFLOP/s" for k, v in c["flops"].items())
    return (
        f"Measured in the last run: matrix products {rates}; copy {c['bandwidth'] / 1e9:.0f} GB/s. "
        "MFU is relative to that rate. A floor is the longer of FLOPs at that rate and bytes at "
        "that bandwidth. Both are by the rates of a row's own run. For every provider, FLOPs are "
        "those of all tokens in all blocks."
    )


def device_report(result: dict) -> str:
    """All results of one GPU, as Markdown."""
    from benchmarks import numerics

    out = [f"# {result['environment']['device']}", provenance(result), ceilings_line(result)]
    out += ["## Parity", parity_table(result)]
    for title, part in (("Training step", "train"), ("max-autotune", "autotune")):
        steps = [r for r in rows(result, part) if r.get("kind") == "train"]
        out += [f"## {title}", models_table(steps)] if steps else []
    if rows(result, "infer"):
        out += ["## Inference", models_table(rows(result, "infer"))]
    batches = [r for r in rows(result, "train") if r.get("kind") == "largest batch"]
    if batches:
        lines = [[r["model"], r["provider"], str(r["batch"])] for r in batches]
        out += ["## Largest training batch", table(["model", "provider", "batch"], lines)]
    if rows(result, "ops"):
        out += ["## Ops", ops_table(rows(result, "ops"))]
    profile = [r for r in rows(result, "train") if r.get("kind") == "profile"]
    if profile:
        lines = [[r["provider"], number(r["us"]), str(r["calls"]), r["kernel"]] for r in profile]
        lines = [[*line[:3], f"`{line[3].replace('|', ' ')}`"] for line in lines]
        out += [
            "## One training step by kernel",
            table(["provider", "us", "calls", "kernel"], lines),
        ]
    exact = rows(result, "numerics")
    if exact:
        out += ["## Error against float64, ours / eager", numerics.table(exact)]
        out += [numerics.curve_line(r) for r in exact if r["kind"] == "training curve"]
    if rows(result, "tune"):
        lines = [r["line"] for r in rows(result, "tune")]
        out += ["## Lines for tuned.py", "\n".join(["```", *lines, "```"])]
    bad = failures(result)
    out += ["## Steps that failed", "\n".join(f"- {line}" for line in bad)] if bad else []
    return "\n\n".join(out) + "\n"


def write_device_report(path: Path) -> None:
    """Write <gpu>.md and its plots next to <gpu>.json."""
    result = json.loads(path.read_text())
    path.with_suffix(".md").write_text(device_report(result))
    if find_spec("matplotlib") is not None:
        from benchmarks import figures

        figures.draw(result, path)


def summary(result: dict) -> str:
    """The text that gpu.py prints last: a line per comparison of ours with the best peer."""
    out = [provenance(result), ceilings_line(result), ""]
    groups: dict[str, list[dict]] = {}
    for part in ("train", "infer", "autotune", "ops"):
        for r in rows(result, part):
            if "provider" in r and "status" in r:
                name = (
                    f"{r['kind']} {r['model']} b{r['batch']}"
                    if "model" in r
                    else (f"{r['op']} {r['shape']} {r['pass']}")
                )
                groups.setdefault(f"{part} {name}", []).append(r)
    for name, group in groups.items():
        ours = [r for r in group if r["provider"].startswith("fastvit")]
        own = min((r["median_ms"] for r in ours if r["status"] == "ok"), default=None)
        peers = [r for r in group if r["status"] == "ok" and r not in ours]
        best = min(peers, key=lambda r: r["median_ms"], default=None)
        if own is None:
            out.append(f"{name[:52]:52}  {'; '.join(_state(r) for r in ours)[:90]}")
        elif best is None:
            out.append(f"{name[:52]:52}  {own:9.3f} ms")
        else:
            ratio = best["median_ms"] / own
            out.append(
                f"{name[:52]:52}  {own:9.3f} ms  {ratio:5.2f}x of {best['provider']}"
                f" ({best['median_ms']:.3f} ms)"
            )
    checks = [
        r
        for step in result["steps"].values()
        if step["part"] == "parity"
        for r in step.get("rows", [step])
    ]
    checks = [r for r in checks if r["status"] != "absent"]
    good = sum(r["status"] == "ok" for r in checks)
    out += ["", f"parity: {good} of {len(checks)} checks pass"]
    out += [
        f"  {r.get('op', '')} {r.get('shape', r.get('kind', ''))} {r.get('dtype', '')}: {_state(r)}"
        for r in checks
        if r["status"] != "ok"
    ]
    out += [r["line"] for r in rows(result, "tune")]
    return "\n".join(out + [f"FAILED {line}" for line in failures(result)])


def cpu_table(result: dict) -> str:
    """Table of fastvit's reference backend and timm eager, measured interleaved."""
    lines = [
        [
            r["model"],
            r["kind"],
            r["dtype"],
            number(r["fastvit_ms"]),
            number(r["timm_ms"]),
            "{median:.3f}x ({low:.3f} to {high:.3f})".format(**r["ratio"]),
        ]
        for r in result["rows"]
    ]
    return table(
        ["model", "pass", "dtype", "fastvit ms", "timm ms", "timm / fastvit (95 % interval)"],
        lines,
    )


def traffic_table(tables: dict) -> str:
    """Table of one encoder block, forward and backward: launches, bytes moved and bytes saved."""
    lines = []
    for name, parts in tables.items():
        own, eager = parts["block"]["fastvit"], parts["block"]["eager"]
        pairs = [
            f"{own['launches_forward']} + {own['launches_backward']}",
            f"{eager['launches_forward']} + {eager['launches_backward']}",
        ]
        for key in ("bytes", "saved"):
            fewer = 1 - own[key] / eager[key]
            pairs.append(f"{own[key] / 1e9:.2f} / {eager[key] / 1e9:.2f} GB ({fewer:.0%} less)")
        lines.append([name, *pairs])
    header = ["block of", "launches", "eager's", "moved, ours / eager", "kept for backward"]
    return table(header, lines)


def compile_line(report: dict) -> str:
    """A sentence: how many launches compile, for which architectures, how many spill registers."""
    found = report["rows"]
    archs = ", ".join(f"sm_{a}" for a in sorted({r["arch"] for r in found}))
    spilled = sum(r["spills"] > 0 for r in found)
    wgmma = sum(r["hgmma"] > 0 for r in found if r["arch"] == 90)
    serial = sum(r["serial"] > 0 for r in found)
    return (
        f"Of {len(found)} launches compiled for {archs} (triton {report['triton']}), {spilled} "
        f"spill registers; {wgmma} on sm_90 hold wgmma instructions, serialized by ptxas in "
        f"{serial}."
    )


def without_gpu(results: Path) -> list[str]:
    """Markdown of the results that need no GPU: traffic, compiled code, numerics, if committed."""
    from benchmarks import numerics

    out = []
    names = ("traffic.json", "compile_report.json", "numerics.json")
    traffic, compiled, exact = (results / name for name in names)
    if traffic.exists():
        out.append(
            "Counted, not timed: launches (forward + backward) and bytes of one block, where "
            "eager's attention is counted as FlashAttention 2:"
        )
        out.append(traffic_table(json.loads(traffic.read_text())))
    if compiled.exists():
        out.append(compile_line(json.loads(compiled.read_text())))
    if exact.exists():
        found = json.loads(exact.read_text())["rows"]
        whole = [r for r in found if "logits" in r]
        out.append(
            f"Small models, ours ({found[0]['ours']}) / eager, against float64: {numerics.NOTE} "
            "Each op, and gradients layer by layer: `benchmarks/results/numerics.md`."
        )
        out.append(numerics.table(whole))
        out += [numerics.curve_line(r) for r in found if r["kind"] == "training curve"]
        out.append("![loss of the training run](benchmarks/results/training-curve.png)")
    return out


def headline(results: Path = clone.RESULTS) -> str:
    """One sentence per GPU: ours and timm eager, in inference and in a training step."""
    out = []
    for result in measured(results).values():
        found = [r for r in rows(result, "infer") if "images_per_s" in r]
        by = {(r["model"], r["batch"], r["provider"]): r for r in found}
        lines = []
        for (model, batch, provider), ours in by.items():
            timm = by.get((model, batch, "timm eager (SDPA)"))
            if provider == "fastvit" and timm:
                rates, memory = (
                    [number(r[key]) for r in (ours, timm)] for key in ("images_per_s", "peak_mb")
                )
                lines.append(
                    f"{model} inference in bfloat16 at batch {batch}: **{rates[0]} images/s** in "
                    f"{memory[0]} MB; timm with SDPA: {rates[1]} in {memory[1]} MB."
                )
        lines.append(profile_line(rows(result, "train")))
        out.append(f"{provenance(result)}: {' '.join(lines)}".strip())
    return "\n\n".join(out) or NOTHING


def readme(results: Path = clone.RESULTS) -> str:
    """The text of the README's results section."""
    out = []
    gpus = measured(results)
    if not gpus:
        out.append(NOTHING)
    for path, result in gpus.items():
        out.append(f"{provenance(result)}. {ceilings_line(result)}")
        for part, name in (("train", "Training"), ("infer", "Inference")):
            found = [r for r in rows(result, part) if "images_per_s" in r]
            # Without a row of ours there is nothing to compare.
            ours = {(r["model"], r["batch"]) for r in found if r["provider"] == "fastvit"}
            found = [r for r in found if (r["model"], r["batch"]) in ours]
            out += [f"{name}:", models_table(found)] if found else []
        out += [line for line in [profile_line(rows(result, "train"))] if line]
        pairs = rows(result, "ops")
        out += [peers_table(pairs)] if _against_best(pairs) else []
        out.append(f"All figures: `benchmarks/results/{path.stem}.md`.")
    out += without_gpu(results)
    cpu = results / "cpu.json"
    if cpu.exists():
        result = json.loads(cpu.read_text())
        e = result["environment"]
        threads = "CPU time of one thread" if e["threads"] == 1 else f"{e['threads']} threads"
        out.append(
            f"Without a GPU the eager reference runs. On {e['device']} ({threads}, torch "
            f"{e['torch']}), interleaved with timm {e['timm']} in one process:"
        )
        out.append(cpu_table(result))
    return "\n\n".join(out)


def fill(text: str, **blocks: str) -> str:
    """`text` with each block between the markers of its name."""
    for name, block in blocks.items():
        start, end = (marker.format(name) for marker in MARKERS)
        if start not in text or end not in text:
            raise ValueError(f"the README has no {start} ... {end}")
        head, rest = text.split(start, 1)
        text = f"{head}{start}\n{block}\n{end}{rest.split(end, 1)[1]}"
    return text


def main() -> None:
    path = clone.ROOT / "README.md"
    path.write_text(fill(path.read_text(), headline=headline(), results=readme()))
    exact = clone.RESULTS / "numerics.json"
    if exact.exists():
        from benchmarks import numerics

        document = numerics.document(json.loads(exact.read_text()))
        exact.with_suffix(".md").write_text(document)
    for result in measured(clone.RESULTS):
        write_device_report(result)


if __name__ == "__main__":
    main()
