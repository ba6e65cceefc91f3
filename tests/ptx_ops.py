"""PTX instructions on the lanes of a warp, as the PTX ISA specifies them."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

Lanes = np.ndarray  # (32,), or (2, 32) for packed halves
LANES = np.arange(32)
ALL = np.ones(32, bool)
UINT = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
# By register class; immediates and addresses come as 64 bits.
REGISTERS = {"p": np.bool_, "rs": np.uint16, "rd": np.uint64, "fd": np.uint64}
_CLASS = re.compile(r"%([a-z]+)\d")
Op = Callable[[Any, Any, Lanes], None]  # (Warp, Instruction, active lanes)
OPS: dict[str, Op] = {}


@cache
def bits(kind: str) -> int:
    """The bits of one number of this kind, in memory or in a register."""
    return {"bf16": 16, "tf32": 32}.get(kind) or int(re.sub(r"\D", "", kind))


@cache
def register_dtype(name: str) -> Any:
    return REGISTERS.get(_CLASS.match(name)[1], np.uint32)  # type: ignore[index]


def decode(raw: Lanes, kind: str) -> Lanes:
    """Convert register bits to numbers; bfloat16 and float16 become float32."""
    if kind == "pred":
        return raw.astype(bool)
    if kind.endswith("x2"):
        half = kind[:-2]
        return np.stack([decode(raw, half), decode(raw >> 16, half)])
    raw = raw.astype(UINT[bits(kind)], copy=False)
    if kind == "bf16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float32)
    if kind == "tf32":
        return (raw & np.uint32(0xFFFFE000)).view(np.float32)
    return (
        raw if kind[0] in "bu" else raw.view(f"{'i' if kind[0] == 's' else 'f'}{bits(kind) // 8}")
    )


def encode(values: Lanes, kind: str) -> Lanes:
    """Convert numbers to register bits, rounding to nearest."""
    if kind == "pred":
        return values.astype(bool)
    if kind.endswith("x2"):
        low, high = (encode(v, kind[:-2]).astype(np.uint32) for v in values)
        return low | high << 16
    if kind == "bf16":
        raw = values.astype(np.float32).view(np.uint32).astype(np.uint64)
        rounded = (raw + 0x7FFF + (raw >> 16 & 1)) >> 16
        return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    if kind == "tf32":
        raw = values.astype(np.float32).view(np.uint32).astype(np.uint64)
        return ((raw + 0x1000) & 0xFFFFE000).astype(np.uint32)
    if kind[0] == "f":
        return values.astype(f"f{bits(kind) // 8}").view(UINT[bits(kind)])
    # Signed, so that a wider register is sign-extended.
    return values.astype(f"{'i' if kind[0] == 's' else 'u'}{bits(kind) // 8}")


def op(*names: str) -> Callable[[Op], Op]:
    def register(function: Op) -> Op:
        for name in names:
            OPS[name] = function
        return function

    return register


def elementwise(names: str, function: Callable[..., Lanes]) -> None:
    """Register instructions name{.modifier}.kind d, a, b ...: d = function(a, b, ...)."""

    def run(w: Any, i: Any, mask: Lanes) -> None:
        kind = i.parts[-1]
        values = [w.read(token, kind) for token in i.operands[1:]]
        w.write(i.operands[0], encode(function(*values), kind), mask)

    for name in names.split():
        OPS[name] = run


def _divide(a: Lanes, b: Lanes) -> Lanes:
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, b.dtype.type(1), b)
    return (a - np.fmod(a, b)) // b


def _remainder(a: Lanes, b: Lanes) -> Lanes:
    return np.fmod(a, np.where(b == 0, b.dtype.type(1), b))


def _shift_left(a: Lanes, n: Lanes) -> Lanes:
    return np.where(n < a.itemsize * 8, a << np.minimum(n, a.itemsize * 8 - 1).astype(a.dtype), 0)


def _shift_right(a: Lanes, n: Lanes) -> Lanes:
    last = a.itemsize * 8 - 1
    shifted = a >> np.minimum(n, last).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(n > last, 0, shifted)


def _double(function: Callable[[Lanes], Lanes]) -> Callable[[Lanes], Lanes]:
    return lambda a: function(a.astype(np.float64))


elementwise("add", np.add)
elementwise("sub", np.subtract)
elementwise("div", _divide)
elementwise("rem", _remainder)
elementwise("neg", np.negative)
elementwise("abs", np.abs)
elementwise("not", np.invert)
elementwise("and", np.bitwise_and)
elementwise("or", np.bitwise_or)
elementwise("xor", np.bitwise_xor)
elementwise("ex2", _double(np.exp2))
elementwise("lg2", _double(np.log2))
elementwise("rcp", _double(np.reciprocal))
elementwise("sqrt", _double(np.sqrt))
elementwise("rsqrt", _double(lambda a: 1 / np.sqrt(a)))
elementwise("tanh", _double(np.tanh))


@op("shl", "shr")
def _shift(w: Any, i: Any, mask: Lanes) -> None:
    kind = i.parts[-1]
    a, n = w.read(i.operands[1], kind), w.read(i.operands[2], "u32")
    shifted = _shift_left(a, n) if i.parts[0] == "shl" else _shift_right(a, n)
    w.write(i.operands[0], encode(shifted, kind), mask)


@op("max", "min")
def _extreme(w: Any, i: Any, mask: Lanes) -> None:
    kind, nan = i.parts[-1], "NaN" in i.parts
    a, b = (w.read(token, kind) for token in i.operands[1:])
    if i.parts[0] == "max":
        function = np.maximum if nan or a.dtype.kind != "f" else np.fmax
    else:
        function = np.minimum if nan or a.dtype.kind != "f" else np.fmin
    w.write(i.operands[0], encode(function(a, b), kind), mask)


@op("mul", "mad", "fma")
def _multiply(w: Any, i: Any, mask: Lanes) -> None:
    kind = i.parts[-1]
    a, b = (w.read(token, kind) for token in i.operands[1:3])
    if kind == "f32" and i.parts[0] == "fma":
        a, b = a.astype(np.float64), b.astype(np.float64)
    elif "wide" in i.parts or "hi" in i.parts:
        wide = f"{kind[0]}{2 * bits(kind)}"
        a, b = (x.astype("i8" if kind[0] == "s" else "u8") for x in (a, b))
        kind = wide if "wide" in i.parts else kind
    result = a * b
    if "hi" in i.parts:
        result = result >> bits(kind)
    if len(i.operands) > 3:
        result = result + w.read(i.operands[3], kind)
    w.write(i.operands[0], encode(result, kind), mask)


@op("bfe")
def _bit_field(w: Any, i: Any, mask: Lanes) -> None:
    kind = i.parts[-1]
    a, first, size = (w.read(token, "u32").astype(np.int64) for token in i.operands[1:])
    field = a >> first & (1 << size) - 1
    if kind[0] == "s":
        field = np.where(field >> (size - 1) & 1, field - (1 << size), field)
    w.write(i.operands[0], encode(field, kind), mask)


@op("prmt")
def _permute(w: Any, i: Any, mask: Lanes) -> None:
    a, b, selector = (w.read(token, "b32").astype(np.uint64) for token in i.operands[1:4])
    both, result = a | b << 32, np.zeros(32, np.uint64)
    for k in range(4):
        choice = selector >> 4 * k & 15
        byte = both >> (choice & 7) * 8 & 255
        sign = np.where(byte & 128, 255, 0).astype(np.uint64)
        result |= np.where(choice & 8, sign, byte) << 8 * k
    w.write(i.operands[0], result, mask)


_COMPARE = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal},
    **{"gt": np.greater, "ge": np.greater_equal},
    **{"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
}


@op("setp")
def _compare(w: Any, i: Any, mask: Lanes) -> None:
    name, kind = i.parts[1], i.parts[-1]
    a, b = (w.read(token, kind) for token in i.operands[1:3])
    unordered = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(a.shape, bool)
    if name in ("nan", "num"):
        result = unordered if name == "nan" else ~unordered
    elif name in _COMPARE:
        result = _COMPARE[name](a, b) & ~unordered
    else:
        result = _COMPARE[name[:-1]](a, b) | unordered
    if "and" in i.parts or "or" in i.parts:
        other = w.read(i.operands[3], "pred")
        result = result & other if "and" in i.parts else result | other
    targets = i.operands[0].split("|")
    for target, value in zip(targets, np.atleast_2d(result), strict=True):
        w.write(target.strip(), value, mask)


@op("selp")
def _select(w: Any, i: Any, mask: Lanes) -> None:
    a, b = (w.read(token, i.parts[-1]) for token in i.operands[1:3])
    chosen = np.where(w.read(i.operands[3], "pred"), a, b)
    w.write(i.operands[0], encode(chosen, i.parts[-1]), mask)


@op("cvt")
def _convert(w: Any, i: Any, mask: Lanes) -> None:
    to, source = i.parts[-2:]
    if to.endswith("x2"):  # the first source is the upper half
        values = np.stack([w.read(token, source) for token in reversed(i.operands[1:])])
    else:
        values = w.read(i.operands[1], source)
    if values.dtype.kind == "f" and to[0] in "su":
        toward = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}
        values = next(toward[p] for p in i.parts if p in toward)(values)
    w.write(i.operands[0], encode(values, to), mask)


@op("mov")
def _move(w: Any, i: Any, mask: Lanes) -> None:
    kind, (to, source) = i.parts[-1], i.operands
    if source.startswith("{"):
        pieces = vector(source)
        size = bits(kind) // len(pieces)
        parts = [w.read(token, f"b{size}").astype(np.uint64) for token in pieces]
        w.write(to, sum(part << size * k for k, part in enumerate(parts)), mask)  # type: ignore[arg-type]
    elif to.startswith("{"):
        value, pieces = w.read(source, kind).astype(np.uint64), vector(to)
        size = bits(kind) // len(pieces)
        for k, token in enumerate(pieces):
            w.write(token, encode(value >> size * k, f"b{size}"), mask)
    else:
        w.write(to, w.read(source, kind), mask)


@op("cvta")
def _to_address(w: Any, i: Any, mask: Lanes) -> None:
    w.write(i.operands[0], w.read(i.operands[1], "b64"), mask)


def vector(token: str) -> list[str]:
    return [t.strip() for t in token.strip("{} ").split(",")]


@op("ld")
def _load(w: Any, i: Any, mask: Lanes) -> None:
    kind, memory = i.parts[-1], w.cta.space(i.parts[1])
    address = w.address(i.operands[1])
    for k, token in enumerate(vector(i.operands[0])):
        raw = memory.load(address + k * bits(kind) // 8, bits(kind), mask)
        w.write(token, encode(decode(raw, kind), kind), mask)


@op("st")
def _store(w: Any, i: Any, mask: Lanes) -> None:
    kind, memory = i.parts[-1], w.cta.space(i.parts[1])
    address = w.address(i.operands[0])
    for k, token in enumerate(vector(i.operands[1])):
        raw = encode(w.read(token, kind), kind)
        memory.store(address + k * bits(kind) // 8, raw.view(UINT[bits(kind)]), mask)


@op("shfl")
def _shuffle(w: Any, i: Any, mask: Lanes) -> None:
    k = w.read(i.operands[2], "u32").astype(int)
    lane = {"bfly": LANES ^ k, "idx": k, "down": LANES + k, "up": LANES - k}[i.parts[2]]
    lane = np.where((lane < 0) | (lane > 31), LANES, lane)
    w.write(i.operands[0].split("|")[0], w.read(i.operands[1], "b32")[lane], mask)


@op("redux")
def _reduce(w: Any, i: Any, mask: Lanes) -> None:
    kind = i.parts[-1]
    function = {"max": np.max, "min": np.min, "add": np.sum, "or": np.bitwise_or.reduce}[i.parts[2]]
    value = function(w.read(i.operands[1], kind))
    w.write(i.operands[0], encode(np.full(32, value), kind), mask)


@op("elect")
def _elect(w: Any, i: Any, mask: Lanes) -> None:
    lane, predicate = i.operands[0].split("|")
    w.write(lane, np.zeros(32, np.uint32), mask)
    w.write(predicate, LANES == 0, mask)


@op("createpolicy")
def _policy(w: Any, i: Any, mask: Lanes) -> None:
    w.write(i.operands[0], np.zeros(32, np.uint64), mask)


@op("fence", "membar", "prefetch", "griddepcontrol")
def _nothing(w: Any, i: Any, mask: Lanes) -> None:
    """Do nothing: all accesses are made in order here."""
