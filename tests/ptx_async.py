"""PTX instructions of whole warps and of asynchronous units: copies into shared memory, mbarriers,
matrices in registers and in shared memory, and their products.
"""

import re
from typing import Any

import numpy as np
from ptx_ops import ALL, LANES, UINT, Lanes, bits, decode, encode, op, vector


@op("mbarrier")
def _mbarrier(w: Any, i: Any, mask: Lanes) -> None:
    what, barriers = i.parts[1], w.cta.barriers
    place = i.operands[1 if what in ("arrive", "try_wait") else 0]
    at = int(w.address(place)[mask][0])
    if what == "init":
        barriers[at] = Barrier(int(w.read(i.operands[1], "u32")[0]))
    elif what == "inval":
        del barriers[at]
    elif what == "arrive":
        expected = int(w.read(i.operands[2], "u32")[0]) if "expect_tx" in i.parts else 0
        barriers[at].arrive(int(mask.sum()), expected)
    else:
        w.cta.arrive_copies(at)
        done = barriers[at].phase != int(w.read(i.operands[2], "u32")[0]) & 1
        w.write(i.operands[0], np.full(32, done), mask)


class Barrier:
    """An mbarrier: a phase ends when `count` threads and all expected bytes have arrived."""

    def __init__(self, count: int) -> None:
        self.count, self.pending, self.bytes, self.phase = count, count, 0, 0

    def arrive(self, threads: int, expected: int) -> None:
        self.pending -= threads
        self.bytes += expected
        assert self.pending >= 0, "more threads arrived at an mbarrier than it was made for"
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase ^ 1, self.count


@op("cp")
def _copy(w: Any, i: Any, mask: Lanes) -> None:
    if "bulk" in i.parts:
        if "tensor" in i.parts:
            _tma_load(w, i, int(np.flatnonzero(mask)[0]))
    elif "commit_group" in i.parts:
        w.copies.append([])
    elif "wait_group" in i.parts or "wait_all" in i.parts:
        keep = int(i.operands[0]) if i.operands else 0
        while len(w.copies) > keep + 1:
            for copy in w.copies.pop(0):
                copy()
    else:
        _copy_rows(w, i, mask)


def _copy_rows(w: Any, i: Any, mask: Lanes) -> None:
    to, source, size = w.address(i.operands[0]), w.address(i.operands[1]), int(i.operands[2], 0)
    given = w.read(i.operands[3], "u32") if len(i.operands) > 3 else np.full(32, size)

    def copy() -> None:
        for k in range(0, size, 4):
            raw = w.cta.space("global").load(source + k, 32, mask & (given > k))
            w.cta.space("shared").store(to + k, raw, mask)

    if w.cta.early:
        copy()
    else:
        w.copies[-1].append(copy)


def _tma_load(w: Any, i: Any, lane: int) -> None:
    """Copy a box of a matrix into swizzled shared memory, with zeros past the matrix's edges."""
    to = int(w.address(i.operands[0])[lane])
    barrier = int(w.address(i.operands[2])[lane])
    descriptor, corner = re.fullmatch(r"\[\s*(%\w+)\s*,\s*(\{.*\})\s*\]", i.operands[1]).groups()  # type: ignore[union-attr]
    box = w.cta.descriptors[int(w.read(descriptor, "b64")[lane])]
    x, y = (int(w.read(token, "s32")[lane]) for token in vector(corner))

    def copy() -> None:
        tile = box.load(y, x, w.cta.space("global"))
        at = to + np.arange(tile.size).reshape(tile.shape) * tile.itemsize
        w.cta.shared.view(tile.dtype)[swizzle(at, box.swizzle) // tile.itemsize] = tile
        w.cta.barriers[barrier].arrive(0, -tile.nbytes)

    if w.cta.early:
        copy()
    else:
        w.cta.tma.append((barrier, copy))


def swizzle(address: Lanes, width: int) -> Lanes:
    """Swizzle addresses: XOR the 16-byte index within `width` with that of the 128-byte line."""
    return address ^ (address >> 3 & (width // 16 - 1) * 16)


@op("ldmatrix", "stmatrix")
def _matrix(w: Any, i: Any, mask: Lanes) -> None:
    """Load or store 8 x 8 matrices of 16-bit elements; each lane's address is that of a row."""
    loads, count = i.parts[0] == "ldmatrix", int(i.parts[4][1:])
    registers, place = i.operands if loads else reversed(i.operands)
    address, halves = w.address(place)[: 8 * count], w.cta.shared.view(np.uint16)
    assert not (address % 16).any(), f"rows of 16 bytes, aligned alike, for {i.text}"
    places = (address[:, None] + 2 * np.arange(8)).reshape(count, 8, 8) // 2
    if "trans" in i.parts:
        places = places.transpose(0, 2, 1)
    row, column = LANES // 4, LANES % 4 * 2
    for token, at in zip(vector(registers), places, strict=True):
        low, high = at[row, column], at[row, column + 1]
        if loads:
            w.write(token, halves[low] | halves[high].astype(np.uint32) << 16, ALL)
        else:
            value = w.read(token, "b32")
            halves[low], halves[high] = value & 0xFFFF, value >> 16


def _fragment(w: Any, tokens: list[str], kind: str, groups: int) -> Lanes:
    """The matrix (8 groups, K) in registers: each holds 8 rows of 16 bytes, 4 a lane; registers run
    over the groups of 8 rows first, then along K.
    """
    each = 32 // bits(kind)
    matrix = np.zeros((8 * groups, len(tokens) // groups * 4 * each), np.float32)
    for k, token in enumerate(tokens):
        values = decode(w.read(token, "b32"), kind if each == 1 else kind + "x2")
        row, column = LANES // 4 + k % groups * 8, (k // groups * 4 + LANES % 4) * each
        for e, value in enumerate(np.atleast_2d(values)):
            matrix[row, column + e] = value
    return matrix


def product(a: Lanes, b: Lanes) -> Lanes:
    with np.errstate(all="ignore"):
        return (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.float32)


def accumulate(w: Any, tokens: list[str], addends: list[str], value: Lanes) -> None:
    """Write value (16, 2 len(tokens)) plus addends: of 8 columns a lane has two, in two rows."""
    for k, token in enumerate(tokens):
        part = value[LANES // 4 + k % 4 // 2 * 8, k // 4 * 8 + LANES % 4 * 2 + k % 2]
        if addends:
            part = w.read(addends[k], "f32") + part
        w.write(token, encode(part, "f32"), ALL)


@op("mma")
def _mma(w: Any, i: Any, mask: Lanes) -> None:
    kind = i.parts[-2]
    d, a, b, c = (vector(token) for token in i.operands)
    accumulate(w, d, c, product(_fragment(w, a, kind, 2), _fragment(w, b, kind, 1)))


@op("wgmma")
def _wgmma(w: Any, i: Any, mask: Lanes) -> None:
    """Each warp multiplies 16 of its warpgroup's 64 rows, deferred until it waits."""
    what = i.parts[1]
    if what == "fence":
        return
    if what == "commit_group":
        w.products.append([])
        return
    if what == "wait_group":
        w.finish_products(int(i.operands[0]))
        return
    kind, N = i.parts[-1], int(re.search(r"m64n(\d+)k", i.text)[1])  # type: ignore[index]
    d, (a, b, adds) = vector(i.operands[0]), i.operands[1:4]
    transposed = [token == "1" for token in i.operands[6:]]  # a, unless it is in registers, and b
    b_at, b_major = int(w.read(b, "b64")[0]), bool(transposed) and transposed[-1]
    added = d if w.read(adds, "pred")[0] else []
    if a.startswith("{"):
        left = _fragment(w, vector(a), kind, 2)
    else:
        left, a_at = None, int(w.read(a, "b64")[0])
        a_major = len(transposed) > 1 and transposed[0]

    def multiply() -> None:
        rows = slice(16 * (w.index % 4), 16 * (w.index % 4) + 16)
        x = matrix(w, a_at, 64, kind, a_major)[rows] if left is None else left
        accumulate(w, d, added, product(x, matrix(w, b_at, N, kind, b_major)))

    w.products[-1].append(multiply)


def matrix(w: Any, descriptor: int, rows: int, kind: str, transposed: bool) -> Lanes:
    """The matrix (rows, K), 32 bytes along K, at a descriptor in shared memory (PTX ISA,
    "Asynchronous warpgroup level matrix shared memory layout"). transposed: contiguous along rows.
    """
    size, width = bits(kind) // 8, {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62 & 3]
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    row, k = np.arange(rows)[:, None], np.arange(32 // size)[None, :]
    if transposed:
        byte = row * size
        at = byte // width * leading + byte % width + k // 8 * stride + k % 8 * width
    else:
        byte = k * size
        at = row // 8 * stride + row % 8 * width + byte // width * leading + byte % width
    raw = w.cta.shared.view(UINT[8 * size])[swizzle(start + at, width) // size]
    return decode(raw, kind)
