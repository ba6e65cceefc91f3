"""`python -m fastvit_kernels.report`: what every kernel costs on every architecture, with no GPU.

The cases are the launches of real models: one encoder block and the stem, forward and backward, at
each width, dtype and residual dtype in `MODELS`, recorded from the launchers themselves; and those
of attention alone, with every option, at head dim 64 (--head-dim D: at D instead).
`--traffic MODEL` counts launches, bytes and FLOPs instead, of fastvit and of eager PyTorch.
`--update` writes both tables into benchmarks/results, which the tests compare later kernels with;
with --arch or --only it replaces those rows of the compile table alone.
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton

from fastvit_kernels import (
    aot,
    attention,
    attention_maps,
    attention_qk,
    layernorm_attention,
    layernorm_linear,
    layernorm_mlp,
    linear_residual,
    patch_embed,
    swiglu,
    traffic,
    tuned,
)


@dataclasses.dataclass(frozen=True)
class Workload:
    """One training step of one block and the stem."""

    name: str
    dim: int
    heads: int
    mlp_dim: int
    batch: int = 256
    patch: int = 16
    image: int = 224
    dtype: torch.dtype = torch.bfloat16
    residual_dtype: torch.dtype = torch.bfloat16
    branch: bool = False  # LayerScale and drop path
    tf32: bool = False  # torch.backends.cuda.matmul.allow_tf32


MODELS = (
    Workload("B/16", 768, 12, 3072),
    Workload("B/16 autocast", 768, 12, 3072, residual_dtype=torch.float32, branch=True),
    Workload("B/16 batch 48", 768, 12, 3072, batch=48),
    Workload("B/16 batch 48 autocast", 768, 12, 3072, batch=48, residual_dtype=torch.float32),
    Workload("Ti/16 batch 1", 192, 3, 768, batch=1),
    Workload("Ti/16 batch 1 autocast", 192, 3, 768, batch=1, residual_dtype=torch.float32),
    Workload("Ti/16", 192, 3, 768),
    Workload("Ti/16 autocast", 192, 3, 768, residual_dtype=torch.float32, branch=True),
    Workload("S/16", 384, 6, 1536),
    Workload("S/16 autocast", 384, 6, 1536, residual_dtype=torch.float32, branch=True),
    Workload("so400m/14", 1152, 16, 4304, patch=14),
    Workload("H/14 autocast", 1280, 16, 5120, patch=14, residual_dtype=torch.float32),
    Workload("g/14", 1408, 16, 6144, patch=14),
    Workload("giant-opt/16", 1536, 16, 6144, image=256),
    Workload("7B/16", 4096, 32, 8192, image=256, batch=32),
    Workload("S/16 float32", 384, 6, 1536, dtype=torch.float32, residual_dtype=torch.float32),
    Workload("H/14 float32", 1280, 16, 5120, 32, 14, 224, torch.float32, torch.float32),
    Workload("7B/16 float32", 4096, 32, 8192, 4, 16, 256, torch.float32, torch.float32),
    Workload("B/16 TF32", 768, 12, 3072, 256, 16, 224, torch.float32, torch.float32, tf32=True),
)
# Attention alone, in bfloat16: rows of every length, and separately every option. The committed
# table has head dim 64 and, through MODELS, those of published models. --head-dim compiles any head
# dim, with dropout at every length too; a slow test checks them all for spills.
# Lengths left out are cut into tiles like others: 513 to 640 like the 128 before, from 769 like the
# last 128.
LENGTHS = (*range(1, 513), *range(641, 769))
HEAD_DIMS = range(16, 129, 8)
ATTENTION = {f"attention D{D}": D for D in HEAD_DIMS}
OPTIONS = {f"attention options D{D}": D for D in HEAD_DIMS}
REGIMES = {f"attention regimes D{D}": D for D in HEAD_DIMS}
ALONE = (ATTENTION, OPTIONS, REGIMES)
TABLE = (*(w.name for w in MODELS), "attention D64", "attention options D64", "SwiGLU")
# A few launches per architecture: CI compiles those of sm_90 at each change, `make test-all` all.
CI = {
    80: ("B/16 autocast",),
    90: ("B/16 autocast", "S/16 float32", "attention options D64"),
    100: ("B/16 autocast", "attention options D64"),
    120: ("B/16 autocast",),
}


def run(w: Workload) -> None:
    """Call every launcher of a block and the stem, forward and backward, on meta tensors."""

    def new(*shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or w.dtype, device="meta")

    side = w.image // w.patch
    N, D, M = side * side + 1, w.dim // w.heads, w.batch * (side * side + 1)
    master = w.residual_dtype
    images = new(w.batch, 3, w.image, w.image, dtype=master)
    pos = new(side * side, w.dim, dtype=master)
    conv = new(w.dim, 3, w.patch, w.patch)
    vector, prefix = new(w.dim, dtype=master), new(1, w.dim, dtype=master)
    tokens = new(w.batch, N, w.dim, dtype=master)
    for pixels in (images, images.transpose(2, 3)):
        patch_embed._fwd(pixels, conv, vector, pos, prefix, master)
        params = conv.to(master), vector, pos, prefix
        patch_embed._bwd(tokens, pixels, conv, *params, [True] * 5)

    x, rows = new(M, w.dim, dtype=master), new(M, dtype=torch.float32)
    qkv_w, qkv_b = new(3 * w.dim, w.dim), new(3 * w.dim, dtype=master)
    norm = (rows, rows, vector, vector)
    qkv = (qkv_w, qkv_w.to(master), qkv_b)
    path_scale = new(w.batch, dtype=torch.float32) if w.branch else None
    # dx comes with a copy for the branch that made x (`gradient_copy`) where the two differ, except
    # in a model's first block.
    copies = [(False, None)]
    copies += [(True, path_scale)] if w.branch or w.dtype != master else []
    for copy in copies:
        for trained in ([True] * 4, [True, True, False, False]):
            layernorm_linear._bwd(new(M, 3 * w.dim), x, x, *norm, *qkv, False, trained, *copy)

    q, k, v = new(w.batch, N, 3, w.heads, D).unbind(2)
    o, lse = attention._fwd(q, k, v, 0.125)
    attention._bwd(o, q, k, v, o, lse, 0.125)

    layer_scale = vector if w.branch else None
    branch = (layer_scale, path_scale)
    proj, out = new(w.dim, w.dim), new(M, w.dim)
    keeps = tuned.keeps_row_statistics(M, w.dim, w.dtype)
    _, *kept = linear_residual._fwd(out, proj, vector, x, *branch, master, keeps)
    # The statistics of x's rows come from the op before, except in a model's first block.
    told: list[Any] = [(None, None), *([(*kept, None)[:2]] if keeps else [])]
    for known in told:
        layernorm_linear._fwd(x, vector, vector, *qkv[1:], *known, 1e-6, False, w.dtype, True)
    linear_residual._bwd(out, out, proj, proj.to(master), vector, layer_scale, [True] * 3)

    packed = new(w.batch, N, 3 * w.dim)
    x3, out3 = (t.view(w.batch, N, w.dim) for t in (x, out))
    linears, options = (*qkv[1:], proj.to(master), vector), (w.heads, 0.125, 1e-6, False, w.dtype)
    for known in told:
        layernorm_attention._fwd(
            x3, vector, vector, *linears, *branch, *known, *options, True, master, keeps
        )
    saved = (packed, o, lse, *norm, *qkv, proj, proj.to(master), vector, layer_scale)
    layernorm_attention._bwd(x3, out3, x3, *saved, 0.125, False, [True] * 7, False, None)

    fc1, fc1_b, fc2 = new(w.mlp_dim, w.dim), new(w.mlp_dim, dtype=master), new(w.dim, w.mlp_dim)
    for act in ("gelu", "gelu_tanh", "quick_gelu"):
        fc = (fc1.to(master), fc1_b, fc2.to(master), vector)
        options = (1e-6, False, act, w.dtype, True, True, master, keeps)
        for known in told:
            layernorm_mlp._fwd(x, vector, vector, *fc, *branch, *known, *options)
        fc1_saved, fc2_saved = (fc1, fc1.to(master), fc1_b), (fc2, fc2.to(master), vector)
        saved = (x, new(M, w.mlp_dim), *norm, *fc1_saved, *fc2_saved)
        options = (layer_scale, 1e-6, False, act, [True] * 7)
        for copy in copies:
            layernorm_mlp._bwd(x, out, *saved, *options, *copy)


def run_swiglu(F: int = 4096) -> None:
    """Call SwiGLU's launchers as ViT-g's MLP does, in bf16 and float32."""
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.empty(65792, 2 * F, dtype=dtype, device="meta")
        swiglu._bwd(swiglu._fwd(x), x)


def run_attention(D: int, H: int = 12) -> None:
    """Call attention's launchers for rows of every length, with many heads and with few."""
    for B, N in product((256, 1), LENGTHS):
        q, k, v = torch.empty(B, N, 3, H, D, dtype=torch.bfloat16, device="meta").unbind(2)
        o, lse = attention._fwd(q, k, v, 0.125)
        attention._bwd(o, q, k, v, o, lse, 0.125)


def run_attention_regimes(D: int, H: int = 12) -> None:
    """As `run_attention`: dense rows with dropout; padded and packed ones with and without it."""

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    seed = new(1, dtype=torch.int64)
    for B in (256, 1):
        lengths, cu_seqlens = new(B, dtype=torch.int32), new(B + 1, dtype=torch.int32)
        batches = [((new(B, N, 3, H, D), None, None, 0), (0.1, seed)) for N in LENGTHS]
        for N in (197, 577):
            padded = (new(B, N, 3, H, D), lengths, None, 0)
            packed = (new(1, B * N, 3, H, D), None, cu_seqlens, N)
            batches += product((padded, packed), ((0.0, None), (0.1, seed)))
        for (qkv, *sequences), dropout in batches:
            q, k, v = qkv.unbind(2)
            options = (*sequences, *dropout)
            o, lse = attention._fwd(q, k, v, 0.125, *options)
            attention._bwd(o, q, k, v, o, lse, 0.125, *options)


def run_attention_options(D: int, B: int = 256, N: int = 197, H: int = 12) -> None:
    """Call the launchers of padded and packed rows, dropout, QK-norm, RoPE and attention maps."""

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    lengths, cu_seqlens = new(B, dtype=torch.int32), new(B + 1, dtype=torch.int32)
    rows, packed, seed = new(B, N, 3, H, D), new(1, B * N, 3, H, D), new(1, dtype=torch.int64)
    for qkv, options in (
        (rows, (lengths, None, 0, 0.0, None)),
        (packed, (None, cu_seqlens, N, 0.0, None)),
        (rows, (None, None, 0, 0.1, seed)),
        (packed, (None, cu_seqlens, N, 0.1, seed)),
    ):
        q, k, v = qkv.unbind(2)
        o, lse = attention._fwd(q, k, v, 0.125, *options)
        attention._bwd(o, q, k, v, o, lse, 0.125, *options)
    q, k, _ = rows.unbind(2)
    lse = new(B, H, N, dtype=torch.float32)
    for known in (lse, None):
        attention_maps._maps(q, k, known, new(1, dtype=torch.int32), 0.125)
    weight, table = new(D, dtype=torch.float32), new(N - 1, D // 2, dtype=torch.float32)
    for weights, tables, norm, interleaved in (
        ([weight] * 4, [table] * 2, "layernorm", False),
        ([weight, None] * 2, [table] * 2, "rmsnorm", True),
        ([weight] * 4, [None] * 2, "layernorm", False),
        ([None] * 4, [table] * 2, None, False),
        ([None] * 4, [table] * 2, None, True),
    ):
        attention_qk._fwd(rows, *weights, *tables, 1e-6, norm, interleaved)
        two = weights[::2]
        attention_qk._bwd_in_place(rows, rows, *two, *tables, 1e-6, norm, interleaved)


def cases(arch: int, names: Iterable[str] | None = None) -> list[aot.Case]:
    """Distinct launches of the named workloads (default: those of `TABLE`) on `arch`."""
    found: dict[str, aot.Case] = {}
    runs = [(w.name, w.tf32, functools.partial(run, w)) for w in MODELS]
    runs += [(n, False, functools.partial(run_attention, D)) for n, D in ATTENTION.items()]
    runs += [(n, False, functools.partial(run_attention_options, D)) for n, D in OPTIONS.items()]
    runs += [(n, False, functools.partial(run_attention_regimes, D)) for n, D in REGIMES.items()]
    runs.append(("SwiGLU", False, run_swiglu))
    for name, tf32, launch in runs:
        if name not in (TABLE if names is None else names):
            continue
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            with aot.record(arch) as launches:
                launch()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        for case in launches:
            case = dataclasses.replace(case, name=f"{case.name} {describe(case)}", programs=0)
            if found.setdefault(case.name, case) != case:
                raise RuntimeError(f"two launches are both called {case.name!r}; see `describe`")
    return list(found.values())


# Constants that become a word of the case's name unless they are False, None or 0.
_WORDS = {
    "PROLOGUE": "{}",
    "EPILOGUE": "{}",
    "PART": "{}",
    "ACTIVATION": "{}",
    "B_TRANSPOSED": "b^T",
    "D": "D{}",
    "C": "C{}",
    "KEYS": "keys {}",
    "TAIL_M": "tail_m {}",
    "TAIL_N": "tail_n {}",
    "STEP_N": "step_n {}",
    "STEP_TAIL_N": "then {}",
    "STEP_M": "step_m {}",
    "STEP_TAIL_M": "then {}",
    "SPLITS": "splits {}",
    "TILE_N": "tiles {}",
    "TILE_K": "by {}",
    "TILE_N2": "and {}",
    "TILE_K2": "by {}",
    "P_H": "patch {}",
    "VEC": "vec {}",
    "PACKED": "packed",
    "HAS_LENGTHS": "padded",
    "NORM": "{}",
    "INTERLEAVED": "neighbours",
    "PIECES": "of {} parts",
    "WIDTH": "by {}",
    "KNOWN": "known",
    "STAGGER": "staggered",
    "RMS": "rms",
}
# Pointers that may be None, for which less code is compiled.
_OPTIONAL = {"copy", "y", "h", "residual", "layer_scale", "slabs2", "norm_rows"}
_ALWAYS_FLOAT32 = {"mean", "rstd", "lse", "delta", "path_scale", "slabs", "db_slabs"}
_ALWAYS_FLOAT32 |= {"cos", "sin", "dparams", "maps", "parts"}
_ALWAYS_FLOAT32 |= {"sums", "folded_bias", "shift", "scale"}
_INTEGERS = {"cu_seqlens", "lengths", "rows", "seed"}


def describe(case: aot.Case) -> str:
    """One line that distinguishes the cases of a kernel."""
    constants = dict(case.constants)
    if "EPILOGUE" in constants and constants["EPILOGUE"] not in ("gelu", "dgelu"):
        constants.pop("ACTIVATION", None)
    words = [word.format(constants[k]) for k, word in _WORDS.items() if constants.get(k)]
    specialized = {p.name for p in case.kernel.params if not p.do_not_specialize}
    ragged = {name for name, kind in case.types if kind == "i32"} & specialized & {"N", "K", "C"}
    words += [f"ragged {name}" for name in sorted(ragged)]
    words += ["K in part"] if constants.get("EVEN_K") is False else []
    blocks = [constants.get(f"BLOCK_{x}") for x in ("B", "M", "N", "F", "K", "C", "T")]
    words.append("x".join(str(b) for b in blocks if b))
    pointers: dict[str, list[str]] = {}
    for name, kind in case.types:
        name = name.removesuffix("_ptr").removesuffix("_desc")
        kind = kind.replace("tensordesc<", "*").partition("[")[0]
        if kind.startswith("*") and name not in _ALWAYS_FLOAT32 | _INTEGERS:
            pointers.setdefault(kind[1:], []).append(name)
    if len(pointers) == 1:
        ((kind, names),) = pointers.items()
        words += [kind, *(name for name in names if name in _OPTIONAL)]
    else:
        words += [" ".join([kind, *names]) for kind, names in sorted(pointers.items())]
    given = {"seed_ptr": "dropout", "cos_ptr": "rope"}
    if case.name == "attention_maps":
        given = {"lse_ptr": "lse"}
    if case.name in ("layernorm_bwd", "mlp_narrow_bwd"):
        given = {"path_scale_ptr": "path_scale"}
    if case.name.startswith("gemm"):
        given = {"sums_ptr": "folded", "parts_ptr": "parts"}
    types = dict(case.types)
    words += [word for name, word in given.items() if name in types]
    if constants.get("PRECISION") == "tf32":
        words.append("tf32")
    if "COMPUTE" in constants:
        words.append(f"in {constants['COMPUTE']}")
    words += [f"{case.num_warps}w", f"{case.num_stages}s"]
    return " ".join([*words, *([f"{case.maxnreg}r"] if case.maxnreg else [])])


def costs(selected: list[tuple[aot.Case, int]], jobs: int) -> list[aot.Cost]:
    """Compile each (case, arch) of `selected`, in `jobs` processes."""
    if jobs == 1:
        return [aot.compile_case(case, arch) for case, arch in selected]
    with ProcessPoolExecutor(jobs, initializer=_end_with_parent) as pool:
        keys = [(case.name, arch) for case, arch in selected]
        return list(pool.map(_compile_named, keys, chunksize=4))


def _end_with_parent() -> None:
    """End a worker whose parent was killed: it would wait for its next case for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_by_name: dict[tuple[str, int], aot.Case] = {}


def _compile_named(key: tuple[str, int]) -> aot.Cost:
    _, arch = key
    if key not in _by_name:
        every = (*TABLE, *(name for family in ALONE for name in family))
        _by_name.update({(case.name, arch): case for case in cases(arch, every)})
    return aot.compile_case(_by_name[key], arch)


def table(rows: list[aot.Cost]) -> str:
    head = ("arch", "regs", "spill", "shared", "CTAs", "HGMMA", "serial", "stray", "HMMA")
    head += ("tcgen05", "TMA", "kernel")
    lines = [head] + [
        (
            f"sm_{c.arch}",
            c.registers,
            c.spills,
            c.shared,
            c.ctas_per_sm,
            c.hgmma,
            c.serial,
            c.stray,
            c.hmma,
            c.tcgen05,
            c.tma_loads,
            c.name,
        )
        for c in rows
    ]
    return "\n".join(
        "  ".join([*(f"{cell!s:>7}" for cell in line[:-1]), str(line[-1])]) for line in lines
    )


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
COMPILE_TABLE = RESULTS / "compile_report.json"
TRAFFIC_TABLE = RESULTS / "traffic.json"
# Models in the committed traffic table, in plain bf16 (False) or under autocast (True).
TRAFFIC = {"vit_base_patch16_224": (False, True), "vit_large_patch16_224": (True,)}


def merged(rows: list[aot.Cost], archs: Iterable[int], only: str) -> list[aot.Cost]:
    """The committed table with `rows` in place of those that `archs` and `only` select."""
    table = json.loads(COMPILE_TABLE.read_text()) if COMPILE_TABLE.exists() else {}
    before = table["rows"] if table.get("triton") == triton.__version__ else []
    kept = [
        aot.Cost(**row) for row in before if row["arch"] not in archs or only not in row["name"]
    ]
    return sorted([*kept, *rows], key=lambda c: (c.arch, c.name))


def to_json(rows: list[aot.Cost]) -> str:
    """JSON with one line per row, for readable diffs of the committed table."""
    lines = ",\n".join(json.dumps(dataclasses.asdict(c)) for c in rows)
    return f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n'


def worse(rows: list[dict[str, Any]], committed: dict[str, Any]) -> list[str]:
    """One line for each cost in `rows` that is above the committed table's, and for each new row.

    Empty if the table was made by another version of triton, whose compiler differs.
    """
    if committed["triton"] != triton.__version__:
        return []
    before = {(row["arch"], row["name"]): row for row in committed["rows"]}
    lines = []
    for row in rows:
        label = f"sm_{row['arch']} {row['name']}"
        old = before.get((row["arch"], row["name"]))
        if old is None:
            lines.append(f"{label}: not in the table")
            continue
        lines += [
            f"{label}: {cost} {old[cost]} -> {row[cost]}"
            for cost in ("registers", "spills", "shared", "serial")
            if row[cost] > old[cost]
        ]
    return lines


def traffic_summary() -> dict[str, Any]:
    """Totals for the models in `TRAFFIC` at batch 256."""
    return {
        f"{model}{' autocast' if autocast else ''}": traffic.summary(
            traffic.sizes(model, 256, autocast)
        )
        for model, modes in TRAFFIC.items()
        for autocast in modes
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastvit_kernels.report", description=__doc__)
    parser.add_argument("--arch", type=int, action="append", choices=aot.ARCHS)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--ci", action="store_true", help="a few launches only")
    parser.add_argument(
        "--head-dim",
        type=int,
        action="append",
        metavar="D",
        help="attention alone at this head dim; may be repeated",
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser.add_argument("--update", action="store_true", help="rewrite the committed tables")
    parser.add_argument("--traffic", metavar="MODEL", help="such as vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--autocast", action="store_true", help="float32 residual stream")
    parser.add_argument("--part", choices=traffic.PARTS, default="H100")
    args = parser.parse_args(argv)
    if args.traffic:
        try:
            s = traffic.sizes(args.traffic, args.batch, args.autocast)
        except ValueError as error:
            parser.error(str(error))
        if args.batch < 1 or s.image < s.patch:
            parser.error("--traffic needs a batch, and images of at least one patch")
        part = traffic.PARTS[args.part]
        print(traffic.table(args.traffic, args.batch, args.autocast, part))
        return 0
    if args.update and args.ci:
        parser.error("--update does not go with --ci, which leaves out most models")
    if args.update and not RESULTS.is_dir():
        parser.error(f"--update needs a checkout: there is no {RESULTS}")
    names = None
    if args.head_dim is not None:
        for D in args.head_dim:
            if D not in HEAD_DIMS:
                parser.error(f"--head-dim must be a multiple of 8 in 16..128, got {D}")
        names = [n for family in ALONE for n, D in family.items() if D in args.head_dim]
    if args.head_dim is not None and (args.ci or args.update):
        parser.error("--head-dim goes with neither --ci nor --update")
    selected = [
        (case, arch)
        for arch in args.arch or aot.ARCHS
        for case in cases(arch, CI[arch] if args.ci else names)
        if args.only in case.name
    ]
    rows = costs(selected, args.jobs)
    print(f"triton {triton.__version__}, {len(rows)} cases; spills and shared memory in bytes")
    print(table(rows))
    if args.json:
        args.json.write_text(to_json(rows))
    if args.update:
        COMPILE_TABLE.write_text(to_json(merged(rows, args.arch or aot.ARCHS, args.only)))
        TRAFFIC_TABLE.write_text(json.dumps(traffic_summary(), indent=1) + "\n")
    return 1 if any(c.spills for c in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
