"""Compile kernels ahead of time, with no GPU, and read what the machine code costs.

A case is one kernel with the types and constants of one launch. `compile_case` builds its cubin for
an architecture and reads registers, spills, shared memory and the matrix instructions in it.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHS = (80, 90, 100, 120)


@dataclass(frozen=True)
class Limits:
    """Per SM, from the CUDA programming guide: shared bytes an SM, a block; threads."""

    shared_sm: int
    shared_block: int
    threads: int
    registers: int = 65536


LIMITS = {
    80: Limits(167_936, 166_912, 2048),
    90: Limits(233_472, 232_448, 2048),
    100: Limits(233_472, 232_448, 2048),
    120: Limits(102_400, 101_376, 1536),
}


@dataclass(frozen=True)
class Case:
    """One launch to compile: `args` gives a type ("*bf16", "i32", "i32:16", "fp32") to each argument.

    Constants go in `constexprs`, absent pointers with value None; ":16" says divisible by 16.
    """

    name: str
    kernel: Any
    args: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class Cost:
    """What one compiled case costs; spills in bytes a thread, shared memory in bytes a CTA."""

    name: str
    arch: int
    registers: int
    spills: int
    shared: int
    ctas_per_sm: int
    hgmma: int
    hmma: int
    tma_loads: int
    tcgen05: int


def compile_case(case: Case, arch: int) -> Cost:
    """Build the case for `arch` (90 is sm_90) and read its cost."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    names = case.kernel.arg_names
    missing = set(names) - set(case.args) - set(case.constexprs)
    if missing:
        raise ValueError(f"{case.name}: no type or constant for {sorted(missing)}")
    signature, attrs = {}, {}
    for i, name in enumerate(names):
        if name in case.constexprs:
            signature[name] = "constexpr"
            continue
        kind, _, divisor = case.args[name].partition(":")
        signature[name] = kind
        if kind.startswith("*") or divisor == "16":
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, dict(case.constexprs), attrs)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", cubin)
        sass = _tool("nvdisasm", "-c", cubin)
    registers = int(_field(r"REG:(\d+)", usage))
    stack = int(_field(r"STACK:(\d+)", usage)) if re.search(r"\b(LDL|STL)\b", sass) else 0
    shared, warps, limits = compiled.metadata.shared, case.num_warps, LIMITS[arch]
    # Registers are given out to warps in units of 256; every CTA takes 1 KiB of shared memory more.
    by_registers = limits.registers // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = limits.shared_sm // (shared + 1024)
    by_threads = limits.threads // (32 * warps)
    return Cost(
        case.name,
        arch,
        registers,
        stack,
        shared,
        min(by_registers, by_shared, by_threads),
        len(re.findall(r"\bHGMMA\b", sass)),
        len(re.findall(r"\bHMMA\b", sass)),
        len(re.findall(r"\bUTMALDG\b", sass)),
        len(re.findall(r"\bUT[A-Z]*MMA\b", sass)),
    )


def _tool(name: str, *args: Any) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run(
        [tool, *map(str, args)], check=True, capture_output=True, text=True
    ).stdout


def _field(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"no {pattern} in the compiler's report: {text[:200]}")
    return match.group(1)
