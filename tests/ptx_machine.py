"""Emulate on the CPU the PTX that Triton compiles a kernel to, program by program, warp by warp.

Triton's interpreter runs a kernel's source. This runs the compiler's output, and so covers layouts,
shared memory, fused multiply-adds and asynchronous work. wgmma reads its operands when it is waited
for, which is as late as hardware may; a copy into shared memory is made as soon as it is issued,
or, with `late`, when it is waited for. So memory that is overwritten or read too soon shows as
wrong numbers. A warp runs until it must wait for others; warps take turns from the first to the
last or, with `late`, from the last to the first. Shared memory and registers start as NaN, and an
access outside of every tensor's storage is an error.

    PTX_MACHINE=90 pytest -n0 tests/test_gemm_tma.py    (with `late`: PTX_MACHINE=90-late)
"""

import contextlib
import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
from fastvit_kernels import aot, tuned
from ptx_async import Barrier
from ptx_ops import ALL, LANES, UINT, Lanes, decode, register_dtype
from ptx_program import Instruction, Program, parse
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvit import backend

SMS = 2  # so that persistent programs take several tiles
NAN = 0x7FC5_7FC5_7FC5_7FC5  # as bfloat16, float16 and float32


class Memory:
    """Buffers of bytes at their addresses."""

    def __init__(self, buffers: dict[int, np.ndarray]) -> None:
        self.starts = np.array(sorted(buffers), np.int64)
        self.buffers = [buffers[start] for start in sorted(buffers)]

    def _touched(
        self, address: Lanes, bits: int, mask: Lanes
    ) -> Iterator[tuple[np.ndarray, Lanes, Lanes]]:
        """Yield each accessed buffer, as unsigned integers, with indices and their lanes."""
        lanes = np.flatnonzero(mask)
        if lanes.size == 0:
            return
        at, size = address[lanes].astype(np.int64), bits // 8
        owner = np.searchsorted(self.starts, at, side="right") - 1
        for n in {int(owner[0])} if (owner == owner[0]).all() else set(owner.tolist()):
            mine = owner == n
            offset, buffer = at[mine] - self.starts[n], self.buffers[n]
            if n < 0 or (offset + size > buffer.size).any():
                raise IndexError(f"{size} bytes at {hex(int(at[mine].max()))} are in no buffer")
            if (at[mine] % size).any():
                raise IndexError(f"{size} bytes at {hex(int(at[mine][0]))} are not aligned")
            yield buffer[: buffer.size // size * size].view(UINT[bits]), offset // size, lanes[mine]

    def load(self, address: Lanes, bits: int, mask: Lanes) -> Lanes:
        raw = np.zeros(32, UINT[bits])
        for buffer, index, lanes in self._touched(address, bits, mask):
            raw[lanes] = buffer[index]
        return raw

    def store(self, address: Lanes, raw: Lanes, mask: Lanes) -> None:
        for buffer, index, lanes in self._touched(address, 8 * raw.itemsize, mask):
            buffer[index] = raw[lanes]


class Parameters:
    """The .param space: the arguments of a kernel, one at each address."""

    def __init__(self) -> None:
        self.values: dict[int, int] = {}

    def load(self, address: Lanes, bits: int, mask: Lanes) -> Lanes:
        return np.full(32, self.values[int(address[0])] & (1 << bits) - 1, UINT[bits])


@dataclass
class Box:
    """A TMA descriptor: the matrix in global memory, the tile to load and its swizzle in bytes."""

    base: int
    shape: tuple[int, int]
    stride: int
    size: int
    tile: tuple[int, int]
    swizzle: int

    def load(self, row: int, column: int, memory: Memory) -> np.ndarray:
        rows, columns = np.ix_(row + np.arange(self.tile[0]), column + np.arange(self.tile[1]))
        inside = (rows >= 0) & (rows < self.shape[0]) & (columns >= 0) & (columns < self.shape[1])
        start = int(np.searchsorted(memory.starts, self.base, side="right")) - 1
        buffer, first = memory.buffers[start], (self.base - int(memory.starts[start])) // self.size
        elements = buffer[: buffer.size // self.size * self.size].view(UINT[8 * self.size])
        index = np.where(inside, first + rows * self.stride + columns, 0)
        return np.where(inside, elements[index], 0)


@dataclass
class Arguments:
    memory: Memory
    parameters: Parameters
    addresses: dict[str, int]  # of parameters, by name
    boxes: dict[int, Box]  # by the address of their parameter


class CTA:
    """A running program, with all of its warps."""

    def __init__(
        self,
        program: Program,
        arguments: Arguments,
        pid: tuple[int, ...],
        grid: tuple[int, ...],
        early: bool,
    ) -> None:
        self.program, self.early, self.descriptors = program, early, arguments.boxes
        self.shared = np.full(program.shared, 0xFF, np.uint8)
        self.spaces = {
            "global": arguments.memory,
            "shared": Memory({0: self.shared}),
            "param": arguments.parameters,
        }
        self.names = {**arguments.addresses, "global_smem": 0}
        for k, axis in enumerate("xyz"):
            self.names |= {f"%ctaid.{axis}": pid[k], f"%nctaid.{axis}": grid[k]}
        self.barriers: dict[int, Barrier] = {}
        self.tma: list[tuple[int, Callable[[], None]]] = []
        self.warps = [Warp(self, index) for index in range(program.warps)]

    def space(self, name: str) -> Any:
        return self.spaces[name.partition("::")[0]]

    def arrive_copies(self, barrier: int) -> None:
        """Make the pending copies that arrive at this barrier."""
        waiting, self.tma = self.tma, []
        for at, copy in waiting:
            if at == barrier:
                copy()
            else:
                self.tma.append((at, copy))

    def run(self) -> None:
        turns = self.warps if self.early else self.warps[::-1]
        while any(w.state != "exited" for w in self.warps):
            moved = False
            for w in turns:
                moved |= w.run()
            if all(w.state == "at a barrier" for w in self.warps):
                for w in self.warps:
                    w.state = "running"
            elif not moved:
                states = {f"{w.state}: {w.instruction.text}" for w in self.warps}
                raise RuntimeError(f"no warp can go on: {states}")


class Warp:
    def __init__(self, cta: CTA, index: int) -> None:
        self.cta, self.index, self.pc, self.state = cta, index, 0, "running"
        self.registers: dict[str, Lanes] = {"%tid.x": (LANES + 32 * index).astype(np.uint32)}
        self.active = ALL
        self.joins: list[tuple[int, Lanes]] = []  # where diverged lanes reconverge
        # Committed groups, and last the open one.
        self.products: list[list[Callable[[], None]]] = [[]]
        self.copies: list[list[Callable[[], None]]] = [[]]

    @property
    def instruction(self) -> Instruction:
        return self.cta.program.instructions[self.pc]

    def read(self, token: str, kind: str) -> Lanes:
        raw = self.registers.get(token)
        if raw is None:
            raw = _constant(token) if token not in self.cta.names else None
            if raw is None:
                raw = np.full(32, self.cta.names.get(token, NAN), np.uint64)
        return decode(raw, kind)

    def write(self, token: str, values: Lanes, mask: Lanes) -> None:
        if token == "_":
            return
        if values.dtype != bool:
            values = values.astype(register_dtype(token), copy=False)
        if mask is not ALL:
            values = np.where(mask, values, self.registers.get(token, np.zeros_like(values)))
        self.registers[token] = values

    def address(self, token: str) -> Lanes:
        base, offset = _place(token)
        return self.read(base, "b64").astype(np.int64) + offset

    def finish_products(self, keep: int) -> None:
        while len(self.products) > keep + 1:
            for multiply in self.products.pop(0):
                multiply()

    def run(self) -> bool:
        """Run up to the next wait; returns whether there was anything to do."""
        first, program = self.pc, self.cta.program
        if self.state != "running":
            return False
        while True:
            while self.joins and self.pc == self.joins[-1][0]:
                self.active = self.joins.pop()[1]
            i = program.instructions[self.pc]
            mask = self.active
            if i.predicate is not None:
                taken = self.read(i.predicate, "pred")
                mask = self.active & (~taken if i.negated else taken)
                mask = ALL if mask.all() else mask
            if i.label is not None:
                at = self.pc
                self._branch(program.labels[i.label], mask)
                if i.label[1] and self.pc < at:  # a wait for an mbarrier: let the others run
                    return self.pc != first
                continue
            self.pc += 1
            if i.parts[0] in ("bar", "barrier"):
                if "warp" in i.parts:
                    continue
                assert not self.joins, f"some lanes alone reach {i.text}"
                self.state = "at a barrier"
                return True
            if i.parts[0] in ("ret", "exit"):
                self.finish_products(0)
                self.state = "exited"
                return True
            if i.run is None:
                raise NotImplementedError(i.text)
            if mask is ALL or mask.any() or i.parts[0] == "wgmma":
                try:
                    i.run(self, i, mask)
                except Exception as error:
                    raise RuntimeError(f"warp {self.index} at {i.text}: {error}") from error

    def _branch(self, target: int, mask: Lanes) -> None:
        if not mask.any():
            self.pc += 1
        elif (mask == self.active).all():
            assert not self.joins or target <= self.joins[-1][0], "lanes part for good"
            self.pc = target
        else:
            assert target > self.pc, "some lanes alone go round again"
            self.joins.append((target, self.active))
            self.active = self.active & ~mask
            self.pc += 1


@cache
def _place(token: str) -> tuple[str, int]:
    """(register or name, offset) of an address such as `[%rd1+-16]`."""
    base, _, offset = token.strip("[] ").partition("+")
    return base.strip(), int(offset or "0", 0)


@cache
def _constant(token: str) -> Lanes | None:
    """The bits of an immediate operand; None for a register."""
    if re.match(r"0[fFdD][0-9a-fA-F]+$", token):
        return np.full(32, int(token[2:], 16), np.uint64)
    if re.match(r"-?\d", token):
        return np.full(32, int(token.rstrip("U"), 0) & 2**64 - 1, np.uint64)
    return None


@cache
def compiled(case: aot.Case, arch: int) -> Program:
    kernel = aot.build(case, arch)
    boxes = getattr(kernel.metadata, "tensordesc_meta", None) or []
    return Program(*parse(kernel.asm["ptx"]), kernel.metadata.shared, case.num_warps, boxes)


def arguments(program: Program, values: list[Any]) -> Arguments:
    """Lay out a kernel's arguments. values: of those that are no constexpr, in order."""
    buffers: dict[int, np.ndarray] = {}
    out = Arguments(Memory({}), Parameters(), {}, {})
    names = iter(program.parameters)

    def add(value: int) -> int:
        address = 0x1000 * (len(out.addresses) + 1)
        out.addresses[next(names)] = address
        out.parameters.values[address] = value
        return address

    def storage(t: torch.Tensor) -> int:
        start, size = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
        if size:
            buffers[start] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))
        return t.data_ptr()

    boxes = iter(program.boxes)
    for value in values:
        if isinstance(value, TensorDescriptor):
            t, box = value.base, next(boxes)
            tile, width = tuple(box["block_size"]), {0: 16, 1: 32, 2: 64, 3: 128}[box["swizzle"]]
            shape, stride = (value.shape[0], value.shape[1]), value.strides[0]
            at = add(0)
            out.boxes[at] = Box(storage(t), shape, stride, t.element_size(), tile, width)
            for number in (*value.shape, *value.strides):
                add(int(number))
        elif isinstance(value, torch.Tensor):
            add(storage(value))
        else:
            add(int(np.float32(value).view(np.uint32)) if isinstance(value, float) else int(value))
    for _ in range(len(program.parameters) - len(out.addresses)):
        add(0)  # scratch memory, which no kernel uses
    out.memory = Memory(buffers)
    return out


@contextlib.contextmanager
def running(arch: int, late: bool) -> Iterator[None]:
    """Emulate every launch of the body, on CPU tensors."""

    def run(kernel: Any, values: dict[str, Any], options: dict[str, Any], grid: Any) -> None:
        case = replace(aot.case_of(kernel, values, options, grid), programs=0)
        program = compiled(case, arch)
        given = arguments(program, [values[name] for name, _ in case.types])
        grid = (*grid, 1, 1)[:3]
        with np.errstate(all="ignore"):
            for z, y, x in product(*map(range, grid[::-1])):
                CTA(program, given, (x, y, z), grid, early=not late).run()

    interpret, backend.INTERPRET = backend.INTERPRET, True
    try:
        with aot.intercept(arch, run), tuned.target(arch, SMS):
            yield
    finally:
        backend.INTERPRET = interpret
