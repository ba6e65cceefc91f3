"""Compile kernels ahead of time, with no GPU, and read from the machine code what they cost.

`record` runs the real launchers on meta tensors and records their launches instead of making them,
so that a case cannot differ from what a user's GPU would run. `compile_case` builds a case's cubin
for an architecture and reads its registers, spills, shared memory and matrix instructions.
"""

import contextlib
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# Importing `launch` saves Triton's own JITFunction.run, before `intercept` replaces it.
from fastvit_kernels import launch as _launch  # noqa: F401
from fastvit_kernels import tuned
from fastvit_kernels.sass import stray_descriptors

ARCHS = (80, 90, 100, 120)


@dataclass(frozen=True)
class Limits:
    """A GPU's limits, from the CUDA programming guide: SMs; shared bytes per SM and per block;
    threads and registers per SM.
    """

    sms: int
    shared_sm: int
    shared_block: int
    threads: int
    registers: int = 65536


LIMITS = {  # A100, H100 and H200, B200, RTX 5090
    80: Limits(108, 167_936, 166_912, 2048),
    90: Limits(132, 233_472, 232_448, 2048),
    100: Limits(148, 233_472, 232_448, 2048),
    120: Limits(170, 102_400, 101_376, 1536),
}
_POINTEES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Case:
    """One launch. types: in Triton's notation ("*bf16", "i32"), with ":16" if divisible by 16."""

    name: str
    kernel: Any
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    maxnreg: int | None
    programs: int


_OPTIONS = {"num_warps": 4, "num_stages": 3, "maxnreg": None}  # and Triton's defaults


@contextlib.contextmanager
def intercept(arch: int, keep: Callable[..., None]) -> Iterator[None]:
    """Pass every launch of the body to `keep`, as a GPU of `arch` would get it; launch nothing.

    keep(kernel, values, options, grid): values by argument name; options with the keys of
    `_OPTIONS`.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")

    def kept(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name, value) for name, value in _OPTIONS.items()}
        names = (p.name for p in kernel.params)
        keep(kernel, {**dict(zip(names, args, strict=False)), **kwargs}, options, grid)

    run, JITFunction.run = JITFunction.run, kept
    try:
        with tuned.target(arch, LIMITS[arch].sms):
            yield
    finally:
        JITFunction.run = run


@contextlib.contextmanager
def record(arch: int) -> Iterator[list[Case]]:
    """Collect the launches that the body would make on a GPU of `arch`, as cases."""
    cases: list[Case] = []

    def keep(*launch: Any) -> None:
        cases.append(case_of(*launch))

    with intercept(arch, keep):
        yield cases


def case_of(
    kernel: Any, values: dict[str, Any], options: dict[str, Any], grid: tuple[int, ...]
) -> Case:
    """The case of a launch with the arguments that `intercept` passes to `keep`."""
    types, constants = [], []
    for p in kernel.params:
        value = values[p.name]
        kind = None if p.is_constexpr else _type(value, not p.do_not_specialize)
        if kind is None:
            constants.append((p.name, value))
        else:
            types.append((p.name, kind))
    kinds = tuple(types), tuple(constants)
    return Case(kernel_name(kernel), kernel, *kinds, programs=math.prod(grid), **options)


def kernel_name(kernel: Any) -> str:
    """The kernel's short name: `gemm_dw` for `_gemm_dw_kernel`."""
    return kernel.fn.__name__.strip("_").removesuffix("_kernel")


def _type(value: Any, specialize: bool = True) -> str | None:
    """The type that Triton gives an argument; None if it becomes a constant (None and 1)."""
    if isinstance(value, torch.Tensor):
        return "*" + _POINTEES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_POINTEES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, float):
        return "fp32"
    if value is None or (value == 1 and specialize):
        return None
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    return f"{kind}:16" if value % 16 == 0 and specialize else kind


@dataclass(frozen=True)
class Cost:
    """What one compiled case costs; spills in bytes per thread, shared memory in bytes per CTA.

    serial: wgmma instructions that ptxas makes wait for one another; stray: wgmma and tcgen05
    products that would read from a wrong address (`sass`).
    """

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
    serial: int = 0
    stray: int = 0


def build(case: Case, arch: int) -> Any:
    """Triton's compiled kernel for `arch` (90 is sm_90)."""
    types = dict(case.types)
    signature, attrs = {}, {}
    for i, name in enumerate(case.kernel.arg_names):
        kind, _, divisor = types.get(name, "constexpr").partition(":")
        signature[name] = kind
        if kind.startswith("*") or divisor == "16":
            attrs[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(case.kernel, signature, dict(case.constants), attrs),
        target=GPUTarget("cuda", arch, 32),
        options={name: getattr(case, name) for name in _OPTIONS},
    )


def compile_case(case: Case, arch: int) -> Cost:
    """Build the case and read its cost from the machine code."""
    compiled = build(case, arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", cubin)
        sass = _tool("nvdisasm", "-c", cubin)
    registers = int(_field(r"REG:(\d+)", usage))
    stack = int(_field(r"STACK:(\d+)", usage)) if re.search(r"\b(LDL|STL)\b", sass) else 0
    shared, warps, limits = compiled.metadata.shared, case.num_warps, LIMITS[arch]
    # Warps get registers in units of 256; every CTA takes 1 KiB of shared memory on top.
    by_registers = limits.registers // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = limits.shared_sm // (shared + 1024)
    by_threads = limits.threads // (32 * warps)
    hgmma = len(re.findall(r"\bHGMMA\b", sass))
    waits = len(re.findall(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x0\b", sass))
    return Cost(
        case.name,
        arch,
        registers,
        stack,
        shared,
        min(by_registers, by_shared, by_threads),
        hgmma,
        len(re.findall(r"\bHMMA\b", sass)),
        len(re.findall(r"\bUTMALDG\b", sass)),
        len(re.findall(r"\bUT[A-Z]*MMA\b", sass)),
        hgmma if 2 < hgmma <= waits else 0,
        stray_descriptors(sass, arch) if arch in (90, 100) else 0,
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
