"""Launch configurations: one literal table per kernel, one look-up each.

Lines are chosen from what the compiled code shows (registers, spills, shared memory, HGMMA); a
line measured on a GPU carries the device, date and milliseconds. Look-up: exact architecture, then
the same major, then the default, which fits 64 KiB of shared memory. Architecture 0 is the
interpreter, where few large programs are fastest.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options of one kernel; a kernel uses the fields it has."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int = 0
    num_warps: int = 4
    num_stages: int = 2
    GROUP_M: int = 8
    SUBTILES: int = 1


T = TypeVar("T")


_target: tuple[int, int] | None = None


@contextlib.contextmanager
def target(arch: int, sms: int) -> Iterator[None]:
    """Choose for another GPU than the one at hand: what the ahead-of-time compiler needs."""
    global _target
    before, _target = _target, (arch, sms)
    try:
        yield
    finally:
        _target = before


def arch(device_index: int | None) -> int:
    """Compute capability as one integer (90 is Hopper); 0 in the interpreter."""
    return _target[0] if _target else _device(device_index)[0]


def num_sms(device_index: int | None) -> int:
    return _target[1] if _target else _device(device_index)[1]


@functools.cache
def _device(index: int | None) -> tuple[int, int]:
    if index is None or not torch.cuda.is_available():
        return 0, 2
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor, torch.cuda.get_device_properties(index).multi_processor_count


def look_up(table: dict[int, T], arch: int) -> T:
    """The line of `arch`, else of the newest architecture of its major, else the default's."""
    if arch in table:
        return table[arch]
    same_major = [a for a in table if a // 10 == arch // 10 and 0 < a <= arch]
    return table[max(same_major)] if same_major else table[DEFAULT]


DEFAULT = 80

# Forward and dX products. "wide": enough 128 x 256 tiles for every SM; "square": enough 128 x 128;
# "small": few rows; "float32": four bytes an element. An epilogue may have its own "square" line.
GEMM: dict[int, dict[str, Config]] = {
    0: {name: Config(128, 128, 128) for name in ("wide", "square", "small", "float32")},
    80: {
        "wide": Config(128, 128, 32, num_warps=8, num_stages=4),
        "square": Config(128, 128, 32, num_warps=8, num_stages=4),
        "small": Config(64, 64, 64, num_warps=4, num_stages=3),
        "float32": Config(64, 64, 32, num_warps=4, num_stages=3),
    },
    90: {
        "wide": Config(128, 256, 64, num_warps=8, num_stages=3, SUBTILES=2),
        "square": Config(128, 128, 64, num_warps=8, num_stages=4),
        "small": Config(64, 64, 64, num_warps=4, num_stages=4),
        "float32": Config(128, 128, 32, num_warps=8, num_stages=3),
    },
    100: {
        "wide": Config(128, 128, 64, num_warps=8, num_stages=4),
        "square": Config(128, 128, 64, num_warps=8, num_stages=4),
        "patch_embed": Config(128, 64, 64, num_warps=8, num_stages=4),
        "small": Config(64, 64, 32, num_warps=4, num_stages=4),
        "float32": Config(64, 64, 32, num_warps=4, num_stages=3),
    },
    120: {
        "wide": Config(128, 64, 32, num_warps=4, num_stages=3),
        "square": Config(128, 64, 32, num_warps=4, num_stages=3),
        "small": Config(64, 64, 64, num_warps=4, num_stages=3),
        "float32": Config(64, 32, 32, num_warps=4, num_stages=2),
    },
}

# Images whose pixels are loaded one or two at an address.
PATCH_GATHER = Config(64, 64, 32, num_warps=8, num_stages=3)
PATCH_GATHER_DW = Config(32, 64, 64, num_warps=8, num_stages=3)

# dW: BLOCK_M is the step along the reduction, BLOCK_N x BLOCK_K the tile of dW.
GEMM_DW: dict[int, dict[str, Config]] = {
    0: {"16-bit": Config(64, 128, 128), "float32": Config(64, 128, 128)},
    80: {
        "16-bit": Config(32, 128, 128, num_warps=8, num_stages=4),
        "float32": Config(32, 64, 32, num_warps=4, num_stages=3),
    },
    90: {
        "16-bit": Config(64, 128, 128, num_warps=8, num_stages=3),
        "float32": Config(32, 64, 32, num_warps=4, num_stages=3),
    },
    100: {
        "16-bit": Config(64, 128, 128, num_warps=8, num_stages=3),
        "float32": Config(32, 64, 32, num_warps=4, num_stages=3),
    },
    120: {
        "16-bit": Config(32, 128, 128, num_warps=8, num_stages=3),
        "float32": Config(32, 64, 32, num_warps=4, num_stages=3),
    },
}

REDUCE_SLABS = Config(BLOCK_M=0, BLOCK_N=4, BLOCK_K=256, num_warps=4)
SUM_ROWS = Config(BLOCK_M=64, BLOCK_N=32, num_warps=4)
SUM_BATCH = Config(BLOCK_M=16, BLOCK_N=128, num_warps=4)


def gemm(
    M: int, N: int, K: int, dtype: torch.dtype, epilogue: str, device_index: int | None
) -> Config:
    """The configuration of one forward or dX product."""
    table = look_up(GEMM, arch(device_index))
    if epilogue == "patch_gather" and arch(device_index):
        return PATCH_GATHER
    name = gemm_class(M, N, dtype, epilogue, num_sms(device_index))
    return table[epilogue] if name == "square" and epilogue in table else table[name]


def gemm_class(M: int, N: int, dtype: torch.dtype, epilogue: str, sms: int) -> str:
    if dtype == torch.float32:
        return "float32"
    # dGELU with a scaled operand and the address arithmetic of pixels spill on 128 x 256.
    heavy = epilogue in ("dgelu", "patch_embed")
    classes = (("square", 128),) if heavy else (("wide", 256), ("square", 128))
    for name, block_n in classes:
        if -(-M // 128) * -(-N // block_n) >= sms:
            return name
    return "small"


def gemm_dw(
    M: int, N: int, K: int, dtype: torch.dtype, device_index: int | None, gather: bool = False
) -> tuple[Config, int]:
    """The configuration of dW and the number of slabs: about two programs per SM."""
    table = look_up(GEMM_DW, arch(device_index))
    config = table["float32" if dtype == torch.float32 else "16-bit"]
    if gather and arch(device_index):
        config = PATCH_GATHER_DW
    tiles = -(-N // config.BLOCK_N) * -(-K // config.BLOCK_K)
    if arch(device_index) == 0:
        return config, 2
    splits = max(1, 2 * num_sms(device_index) // tiles)
    return config, min(splits, max(1, M // (8 * config.BLOCK_M)))


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def row_stats(C: int) -> Config:
    """Whole rows, about 4096 elements a program; BLOCK_N is the padded row."""
    block_c = _power_of_two(C)
    return Config(max(1, 4096 // block_c), block_c, num_warps=4 if block_c <= 2048 else 8)


def layernorm_bwd(M: int, C: int, device_index: int | None) -> tuple[Config, int]:
    """Whole rows, and the number of programs, each of which owns a run of rows."""
    block_c = _power_of_two(C)
    config = Config(max(1, 2048 // block_c), block_c, num_warps=4 if block_c <= 1024 else 8)
    return config, min(-(-M // config.BLOCK_M), 4 * num_sms(device_index))


# Attention. "fwd_resident" and "bwd_.._keys" hold every key of a row, at most BLOCK_N of them; the
# others walk over the keys (fwd, dq) or over the queries (dkv) in blocks. "_128" serves head dims
# over 64, "_112" those over 80 that are several blocks of columns, "_72" that one alone; "_dropout"
# rows with dropout, whose random numbers take registers.
_ATTENTION_MMA = {
    "fwd_resident": Config(32, 256, num_warps=4, num_stages=1),
    "fwd_resident_128": Config(64, 64, num_warps=4, num_stages=1),
    "fwd": Config(128, 64, num_warps=8, num_stages=2),
    "fwd_128": Config(128, 32, num_warps=8, num_stages=2),
    "fwd_small": Config(64, 32, num_warps=4, num_stages=2),
    "dq": Config(64, 32, num_warps=4, num_stages=2),
    "dq_128": Config(64, 32, num_warps=8, num_stages=2),
    "dkv": Config(32, 64, num_warps=4, num_stages=2),
    "dkv_112": Config(16, 32, num_warps=4, num_stages=2),
    "dkv_128": Config(32, 64, num_warps=8, num_stages=2),
    "dq_128_dropout": Config(64, 32, num_warps=8, num_stages=1),
    "dkv_dropout": Config(16, 64, num_warps=4, num_stages=2),
    "dkv_128_dropout": Config(16, 64, num_warps=8, num_stages=2),
    "float32": Config(16, 16, num_warps=4, num_stages=1),
}
_ATTENTION_WGMMA = {
    "fwd_resident": Config(64, 256, num_warps=4, num_stages=1),
    "fwd_resident_128": Config(64, 128, num_warps=4, num_stages=1),
    "bwd_64_keys": Config(64, 64, num_warps=4, num_stages=1),
    "bwd_128_keys": Config(64, 128, num_warps=8, num_stages=1),
    "bwd_64_keys_128": Config(64, 64, num_warps=8, num_stages=1),
    "bwd_128_keys_128": Config(0, 0),
    "fwd": Config(128, 128, num_warps=8, num_stages=2),
    "fwd_128": Config(128, 64, num_warps=8, num_stages=2),
    "fwd_small": Config(64, 64, num_warps=4, num_stages=2),
    "dq_beside": Config(64, 64, num_warps=4, num_stages=2),
    "dkv_beside": Config(32, 64, num_warps=4, num_stages=2),
    "dq_beside_128": Config(0, 0),
    "dq": Config(64, 64, num_warps=4, num_stages=2),
    "dq_128": Config(64, 64, num_warps=4, num_stages=1),
    "dkv": Config(64, 64, num_warps=4, num_stages=2),
    "dkv_128": Config(32, 64, num_warps=8, num_stages=1),
    # Head dims whose own pieces of columns leave fewer registers than those of their class.
    "fwd_resident_48": Config(64, 128, num_warps=4, num_stages=1),
    "fwd_resident_88": Config(64, 64, num_warps=4, num_stages=1),
    "fwd_resident_104": Config(64, 64, num_warps=4, num_stages=1),
    "bwd_64_keys_120": Config(0, 0),
    "fwd_104": Config(128, 32, num_warps=8, num_stages=2),
    "dq_88": Config(64, 64, num_warps=4, num_stages=1),
    "dq_96": Config(64, 64, num_warps=4, num_stages=1),
    "dq_112": Config(64, 32, num_warps=4, num_stages=1),
    "dq_120": Config(64, 64, num_warps=8, num_stages=1),
    "dkv_104": Config(16, 64, num_warps=8, num_stages=1),
    "dkv_120": Config(16, 64, num_warps=8, num_stages=1),
    "fwd_dropout": Config(128, 64, num_warps=8, num_stages=2),
    "fwd_112_dropout": Config(128, 32, num_warps=8, num_stages=2),
    "dq_128_dropout": Config(64, 32, num_warps=4, num_stages=1),
    "dkv_dropout": Config(32, 64, num_warps=4, num_stages=2),
    "dkv_128_dropout": Config(16, 64, num_warps=8, num_stages=1),
    "float32": Config(16, 32, num_warps=8, num_stages=1),
}
ATTENTION: dict[int, dict[str, Config]] = {
    0: {
        "fwd_resident": Config(64, 256),
        "bwd_64_keys": Config(64, 64),
        "bwd_128_keys": Config(64, 128),
        "fwd": Config(128, 128),
        "fwd_small": Config(64, 128),
        "dq_beside": Config(128, 128),
        "dkv_beside": Config(128, 128),
        "dq_beside_128": Config(0, 0),
        "dq": Config(128, 128),
        "dkv": Config(128, 128),
    },
    80: _ATTENTION_MMA
    | {
        "dq_128": Config(64, 32, num_warps=8, num_stages=1),
        "dq_72": Config(64, 32, num_warps=8, num_stages=2),
        "dq_80": Config(64, 32, num_warps=8, num_stages=2),
        "dq_112": Config(64, 32, num_warps=8, num_stages=2),
    },
    90: _ATTENTION_WGMMA,
    100: _ATTENTION_WGMMA
    | {
        "fwd_128": Config(128, 64, num_warps=8, num_stages=1),
        "fwd_small_72": Config(64, 64, num_warps=4, num_stages=1),
        "dkv_96": Config(32, 64, num_warps=8, num_stages=2),
    },
    120: _ATTENTION_MMA,
}


# Up to this many keys the programs of dq_beside and dkv_beside share one launch, where a table has
# these lines: about where a backward of an H100 stops waiting for memory (computed: 12 passes over
# tensors the size of q become 8, while each key tile's delta costs a fifth more arithmetic).
ATTENTION_SIDE_BY_SIDE = 384


def attention(kernel: str, D: int, dtype: torch.dtype, arch: int, dropout: bool = False) -> Config:
    """The configuration of one attention kernel at head dim D; BLOCK_N 0 where it never serves."""
    table = look_up(ATTENTION, arch)
    one_launch = any(word in kernel for word in ("resident", "keys", "beside"))
    if dtype == torch.float32 and arch != 0:
        return Config(0, 0) if one_launch else table["float32"]
    widths = (f"_{D}", *("_112",) * (80 < D <= 112), *("_128",) * (D > 64), "")
    kinds = ("_dropout", "") if dropout else ("",)
    names = (kernel + width + kind for width in widths for kind in kinds)
    return next((table[name] for name in names if name in table), Config(0, 0))


def attention_qk(D: int, device_index: int | None) -> Config:
    """Tokens a program has in hand, and pairs of channels padded: 1024 pairs, eight a thread."""
    pairs = _power_of_two(D // 2)
    return Config((4096 if arch(device_index) == 0 else 1024) // pairs, pairs, num_warps=4)


def attention_qk_groups(blocks: int, H: int, device_index: int | None) -> int:
    """Programs that share the heads of a block of tokens: more than one where blocks are few."""
    return min(H, -(-2 * num_sms(device_index) // (2 * blocks)))


def attention_qk_run(blocks: int, device_index: int | None) -> int:
    """Blocks of tokens that a program walks over in backward: two waves of four CTAs an SM."""
    return -(-2 * blocks // (8 * num_sms(device_index)))


def attention_maps_splits(programs: int, tiles: int, device_index: int | None) -> int:
    """Programs that share the keys, `tiles` tiles of them, of a few rows: a power of two."""
    splits = 1
    while 2 * splits <= tiles and 2 * splits * programs <= 2 * num_sms(device_index):
        splits *= 2
    return splits
