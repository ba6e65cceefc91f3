"""Estimate attention's times on an H100 or H200 with no GPU, from the machine code.

`python benchmarks/simulate.py 87x577x12x64 ...` (batch x tokens x heads x head dim, bfloat16)
compiles the launches of forward and backward for sm_90 and runs their instructions on a model of
one quarter of an SM: ptxas's own stall counts and scoreboards order the instructions of a warp; its
pipes, wgmma, shared memory, L2 and HBM are queues. Branches are not computed: a program takes each
loop over tiles as often as its shape says, every other loop once, and all programs are taken to be
like the first of a full tile. `--calibrate` compares with the times in results/nvidia-h200.json.

An estimate is no measurement: it ranks configurations, and says what a kernel waits for. Copied
into a checkout of d6448cf, whose attention the H200 ran, and with its triton, 3.6, this file gives
with --calibrate, forward / backward in us, each with the measured time in brackets: 256x197x12x64
153 (181) / 517 (529), 87x577x12x64 314 (310) / 969 (1001), 36x1370x12x64 624 (607) / 2057 (1918).
"""

import argparse
import copy
import math
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import clone
import torch
from fastvit_kernels import aot, attention, report

from benchmarks.gpu import read_json

# What follows is taken from the programming guide, or assumed, but for L2's rate, the one number
# fitted to the times in the docstring.
CLOCK = 1.755e9  # Hz
SMS = 132
LAUNCH = 500  # cycles from the end of one program to the start of the next in its place
SHARED, L2, HBM = 128, 25, 4.2e12 / SMS / CLOCK  # bytes per cycle of a whole SM
L2_LATENCY, HBM_LATENCY, WGMMA_LATENCY = 280, 600, 30  # cycles
# The pipe of an instruction, and the cycles that one warp's occupies it; all others: "alu", 2.
PIPES = {
    **dict.fromkeys(("FADD", "FMUL", "FFMA"), ("fma", 1)),
    "IMAD": ("fma", 2),
    "MUFU": ("mufu", 8),
    **dict.fromkeys(
        ("LDG", "LDGSTS", "STG", "LDS", "LDSM", "STS", "STSM", "LDC", "S2R"), ("lsu", 2)
    ),
    "SHFL": ("lsu", 4),
    "HMMA": ("tensor", 8),
    "R2UR": ("uniform", 2),
}
FREE = set("HGMMA BAR DEPBAR LDGDEPBAR WARPGROUP MEMBAR BRA EXIT NOP FENCE".split())
RESULT = {"mufu": 18, "tensor": 24, "alu": 4, "fma": 4, "uniform": 12}  # cycles after the pipe
# Cycles of work that a pipe takes on ahead of its time.
QUEUED = {"mufu": 64, "tensor": 16, "alu": 0, "fma": 0, "uniform": 64, "lsu": 64}
_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?(\S+)\s*(.*?);?\s*/\* 0x\w+ \*/")
_CONTROL = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/")


@dataclass
class Instruction:
    """One SASS instruction. stall: cycles to the warp's next; write, read: scoreboard that it
    releases with its result or its operands, 7 for none; wait: bits of those it waits for.
    """

    name: str
    operands: str
    predicated: bool
    stall: int = 1
    write: int = 7
    read: int = 7
    wait: int = 0
    target: int | None = None  # of a branch

    def __post_init__(self) -> None:
        self.op = self.name.partition(".")[0]
        uniform = self.op.startswith("U")
        self.pipe, self.cost = PIPES.get(self.op, ("uniform" if uniform else "alu", 2))
        width = re.search(r"\.(128|64|4|2)\b", self.name)
        self.bytes = 32 * {"128": 16, "64": 8, "4": 16, "2": 8}.get(width[1] if width else "", 4)
        if self.op in FREE or (self.name == "LDS" and "[RZ]" in self.operands):
            self.pipe = ""
        if self.op == "HGMMA":
            rows, columns, depth = map(int, re.findall(r"\d+", self.name.split(".")[1]))
            self.cost = columns * depth / 32
            from_shared = "gdesc" in self.operands.split(",")[1]
            self.bytes = 2 * depth * (columns + rows * from_shared)


def instructions(cubin: bytes) -> list[Instruction]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = aot._tool("nvdisasm", "-c", "-hex", file.name)
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := _LINE.match(line):
            code.append(Instruction(found[1], found[2], "@" in line))
        elif code and (control := _CONTROL.match(line)):
            bits = int(control[1], 16) >> 41
            last = code[-1]
            last.stall, last.write, last.read = bits & 15, bits >> 5 & 7, bits >> 8 & 7
            last.wait = bits >> 11 & 63
    for instruction in code:
        if instruction.op == "BRA" and (to := re.search(r"\.L_x_\d+", instruction.operands)):
            instruction.target = labels[to[0]]
    return code


def path(code: Sequence[Instruction], steps: int, stages: int, resident: bool) -> list[Instruction]:
    """What a program of a full tile runs: its loop over tiles `steps` times, every other loop once.
    The loads of tiles past the last, which are predicated off, move no bytes.
    """
    backward = [(c.target, i) for i, c in enumerate(code) if c.target is not None and c.target <= i]
    loops = [(s, e) for s, e in backward if any(c.op.endswith("MMA") for c in code[s:e])]
    if not loops:
        return list(code)
    start, end = loops[0]
    # The variants for other tiles begin behind the first one's last store.
    others = [s for s, e in loops[1:] if any(c.op == "LDGSTS" for c in code[s:e])]
    stop = len(code) if resident else min(others, default=len(code))
    taken: list[Instruction] = []
    i = passes = 0
    while i < stop:
        c = code[i]
        if c.op == "LDGSTS" and start <= i <= end and passes > steps - stages:
            c = copy.copy(c)
            c.bytes = 0
        taken.append(c)
        if c.op == "EXIT" and (not c.predicated or (passes >= steps and not resident)):
            break
        if i == end:
            passes += 1
            i = start if passes < steps else i + 1
        elif c.op == "BRA" and not c.predicated and c.target is not None and c.target > i:
            i = c.target
        else:
            i += 1
    stores = [n for n, c in enumerate(taken) if c.op == "STG"]
    return taken[: stores[-1] + 1]


@dataclass
class _Warp:
    program: int
    next: float  # the cycle at which it may issue
    at: int = 0
    last: float = 0.0
    blocked: bool = False
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * 6)
    loads: list[float] = field(default_factory=list)  # when each group of cp.async is done
    load: float = 0.0
    products: list[float] = field(default_factory=list)  # and each group of wgmma


class Quadrant:
    """A quarter of an SM; the other three do the same at the same time."""

    def __init__(self, taken: Sequence[Instruction], hbm_share: float) -> None:
        self.taken, self.hbm_share = taken, hbm_share
        self.cycles = 0.0
        # When each pipe or queue is free again, how long it was not, and what for no warp issued.
        self.free: defaultdict[str, float] = defaultdict(float)
        self.busy: defaultdict[str, float] = defaultdict(float)
        self.waited: defaultdict[str, float] = defaultdict(float)

    def use(self, resource: str, cycle: float, cycles: float) -> float:
        """Occupy a pipe or queue; returns when it is done."""
        self.free[resource] = max(self.free[resource], cycle) + cycles
        self.busy[resource] += cycles
        return self.free[resource]

    def run(self, resident: int, warps: int, programs: int) -> float:
        """Cycles per program: `resident` at a time, each of `warps` warps here."""
        ready: list[_Warp] = []
        barriers: dict[tuple[int, int], list[_Warp]] = {}
        left: Counter[int] = Counter()
        ends: list[float] = []
        started = 0

        def start(cycle: float) -> None:
            nonlocal started
            ready.extend(_Warp(started, cycle) for _ in range(warps))
            left[started] = warps
            started += 1

        for n in range(min(resident, programs)):
            start(n * 130.0)
        now = 0.0
        while ready:
            able = [(*self.earliest(w, now), w.last, w) for w in ready if not w.blocked]
            cycle, why, _, warp = min(able, key=lambda a: (a[0], a[2]))
            if cycle > now:
                self.waited[why] += cycle - now
            now = self.issue(warp, cycle)
            if self.taken[warp.at - 1].op == "BAR":
                waiting = barriers.setdefault((warp.program, warp.at), [])
                waiting.append(warp)
                warp.blocked = len(waiting) < warps
                if not warp.blocked:
                    for other in waiting:
                        other.blocked, other.next = False, max(other.next, cycle + 18)
                    waiting.clear()
            if warp.at == len(self.taken):
                ready.remove(warp)
                left[warp.program] -= 1
                if not left[warp.program]:
                    ends.append(cycle)
                    if started < programs:
                        start(cycle + LAUNCH)
        self.cycles = ends[-1]
        if programs <= resident:
            return ends[-1] / programs
        # Without the first of each place, which find the SM empty.
        return (ends[-1] - ends[resident - 1]) / (programs - resident)

    def earliest(self, warp: _Warp, now: float) -> tuple[float, str]:
        """The first cycle at which a warp's next instruction can issue, and what it waits for."""
        c = self.taken[warp.at]
        times = {"stalls": warp.next}
        times["results"] = max(
            (t for bit, t in enumerate(warp.scoreboards) if c.wait >> bit & 1), default=0.0
        )
        if c.op == "DEPBAR" or c.name.startswith("WARPGROUP.DEPBAR"):
            groups, kind = (warp.loads, "loads") if c.op == "DEPBAR" else (warp.products, "wgmma")
            allowed = int(c.operands.split(",")[1], 16)
            times[kind] = max(groups[: max(0, len(groups) - allowed)], default=0.0)
        if c.pipe:
            times[c.pipe] = self.free[c.pipe] - QUEUED[c.pipe]
        why = max(times, key=lambda name: times[name])
        return max(times[why], now), why

    def issue(self, warp: _Warp, cycle: float) -> float:
        """Issue a warp's next instruction; returns the cycle after."""
        c = self.taken[warp.at]
        self.busy["issue"] += 1
        done = self.use(c.pipe, cycle, c.cost) if c.pipe else cycle
        done += RESULT.get(c.pipe, 0)
        stall = max(1, c.stall)
        if c.op == "HGMMA":
            # Its bytes are those of a warpgroup, of which one warp is here.
            fed = self.use("shared", cycle, c.bytes / SHARED)
            done = max(self.use("tensor", cycle + 4, c.cost), fed)
            self.free["tensor"] = done
            done += WGMMA_LATENCY
            if "gsb0" in c.operands:
                warp.products.append(done)
        elif c.op in ("LDG", "LDGSTS"):
            done = self.use("L2", cycle, c.bytes / (L2 / 4)) + L2_LATENCY
            far = self.use("HBM", cycle, c.bytes * self.hbm_share / (HBM / 4))
            done = max(done, far + HBM_LATENCY * (self.hbm_share > 0))
            if c.op == "LDGSTS":
                self.use("shared", cycle, c.bytes / (SHARED / 4))
                warp.load, done = max(warp.load, done), cycle + 20
        elif c.op == "LDGDEPBAR":
            warp.loads.append(max(warp.load, cycle))
            warp.load = 0.0
        elif c.op == "STG":
            self.use("HBM", cycle, c.bytes / (HBM / 4))
            done = cycle + 30
        elif c.op in ("LDS", "LDSM", "STS", "STSM") and c.pipe:
            done = self.use("shared", cycle, c.bytes / (SHARED / 4)) + 26
        elif c.pipe == "lsu":
            done += 24
        elif c.op == "MEMBAR":
            stall = max(stall, 12)
        for scoreboard, released in ((c.write, done), (c.read, cycle + 12)):
            if scoreboard < 6:
                held = done if c.op == "HGMMA" else released
                warp.scoreboards[scoreboard] = max(warp.scoreboards[scoreboard], held)
        warp.last, warp.next, warp.at = cycle, cycle + stall, warp.at + 1
        return cycle + 1


@dataclass
class Estimate:
    name: str
    us: float
    busy: dict[str, float]  # share of the cycles
    waited: dict[str, float]


def estimate(case: aot.Case, N: int) -> Estimate:
    """The time of one launch of attention over sequences of N tokens. NotImplementedError where the
    programs of one launch do different things, as in backward of few heads.
    """
    constants = dict(case.constants)
    if constants.get("PART") == "both":
        raise NotImplementedError("dQ, dK and dV share the launch")
    if constants.get("SPLITS", 1) > 1:
        raise NotImplementedError("programs share the queries of one head")
    cost = aot.compile_case(case, 90)
    resident = "KEYS" in constants
    part = constants.get("PART")
    steps = {"dq": "STEP_N", "dkv": "STEP_M", None: "BLOCK_M" if resident else "BLOCK_N"}
    code = instructions(aot.build(case, 90).asm["cubin"])
    taken = path(code, N // constants[steps[part]], case.num_stages, resident)
    owned = 1 if resident else N / constants["BLOCK_N" if part == "dkv" else "BLOCK_M"]
    # 1.3: q, and in backward do and o, are read once beside k and v.
    quadrant = Quadrant(taken, min(1.0, 1.3 / owned))
    per_sm = max(1.0, case.programs / SMS)
    ctas = cost.ctas_per_sm
    programs = 3 * ctas if per_sm > ctas else math.ceil(per_sm)
    each = quadrant.run(ctas, max(1, case.num_warps // 4), programs)
    busy, waited = (
        {name: cycles / quadrant.cycles for name, cycles in Counter(counts).most_common()}
        for counts in (quadrant.busy, quadrant.waited)
    )
    name = f"{case.name.removeprefix('attention_')} {report.describe(case)}"
    return Estimate(name, each * per_sm / CLOCK * 1e6, busy, waited)


def launches(B: int, N: int, H: int, D: int) -> list[aot.Case]:
    """Those of forward, then of backward."""
    with aot.record(90) as cases:
        q, k, v = torch.empty(B, N, 3, H, D, dtype=torch.bfloat16, device="meta").unbind(2)
        o, lse = attention._fwd(q, k, v, D**-0.5)
        attention._bwd(o, q, k, v, o, lse, D**-0.5)
    return cases


def measured() -> dict[tuple[int, ...], tuple[float, float]]:
    """Microseconds of forward, and of forward and backward, by (B, N, H, D)."""
    found: dict[tuple[int, ...], dict[str, float]] = {}
    for key, step in read_json(clone.RESULTS / "nvidia-h200.json", {"steps": {}})["steps"].items():
        if shape := re.match(r"attention B(\d+) N(\d+) H(\d+) D(\d+) bfloat16", key):
            row = next(r for r in step["rows"] if r["provider"] == "fastvit")
            times = found.setdefault(tuple(map(int, shape.groups())), {})
            times[row["pass"]] = row["median_ms"] * 1e3
    return {s: (t["forward"], t["forward+backward"]) for s, t in found.items() if len(t) == 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shapes", nargs="*", help="batch x tokens x heads x head dim: 87x577x12x64")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="compare with times of an H200, perhaps of other code",
    )
    args = parser.parse_args()
    if not (args.shapes or args.calibrate):
        parser.error("shapes: expected some like 87x577x12x64, or --calibrate")
    for text in args.shapes:
        if re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", text) is None:
            parser.error(f"shapes: expected four numbers like 87x577x12x64, got {text}")
        B, N, H, D = map(int, text.split("x"))
        if D not in report.HEAD_DIMS:
            parser.error(f"shapes: the head dim must be a multiple of 8 in 16..128, got {text}")
        for case in launches(B, N, H, D):
            try:
                e = estimate(case, N)
            except NotImplementedError as error:
                print(f"      - us  {case.name.removeprefix('attention_')}: {error}")
                continue
            print(f"{e.us:7.0f} us  {e.name}")
            for title, shares in (("busy", e.busy), ("waits", e.waited)):
                most = ", ".join(f"{name} {s:.0%}" for name, s in shares.items() if s > 0.02)
                print(f"    {title}: {most}")
    if args.calibrate:
        print("batch x tokens x heads x head dim: forward, backward; estimated / measured in us")
        for (B, N, H, D), (forward, both) in measured().items():
            try:
                first, *rest = (estimate(case, N).us for case in launches(B, N, H, D))
            except NotImplementedError as error:
                print(f"{B}x{N}x{H}x{D}: {error}")
                continue
            pairs = (first, forward), (sum(rest), both - forward)
            print(f"{B}x{N}x{H}x{D}: " + ", ".join(f"{e:.0f} / {m:.0f}" for e, m in pairs))


if __name__ == "__main__":
    main()
