"""Launch configurations: one literal table per kernel, one look-up each.

Lines are chosen from what the compiled code shows (registers, spills, shared memory, HGMMA); a
line measured on a GPU carries the device, date and milliseconds. Look-up: exact architecture, then
the same major, then the default, which fits 64 KiB of shared memory. Architecture 0 is the
interpreter, where few large programs are fastest.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from fastvit_kernels import dw_plan
from fastvit_kernels.dw_plan import Plan


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
    CTAS: int = 1  # resident programs per SM, of a persistent kernel
    STAGGER: int = 0  # nanoseconds that the later half of the programs starts after the others
    tma: bool = False
    maxnreg: int | None = None  # registers a thread may have at most; None: as ptxas sees fit


T = TypeVar("T")
Choose = TypeVar("Choose", bound=Callable)
_forget: list[Callable[[], None]] = []


def choice(choose: Choose) -> Choose:
    """Remember what `choose` answers: every launch asks."""
    cached = functools.lru_cache(maxsize=4096)(choose)
    _forget.append(cached.cache_clear)
    return cached  # type: ignore[return-value]


def when_forgotten(clear: Callable[[], None]) -> None:
    """Call clear() too where choices are forgotten: for what was made of them."""
    _forget.append(clear)


def forget_choices() -> None:
    """For after a table was edited."""
    for clear in _forget:
        clear()


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

# Forward and dX products of 16 bits, in four sizes of tile that `gemm_class` chooses from, and
# those of float32. "tma_.." serve plain operands. SUBTILES keeps the epilogues from spilling.
# "tiny" is for the few rows of one image, where an SM waits for its loads: many programs, and much
# on its way to each.
GEMM: dict[int, dict[str, Config]] = {
    0: {
        **{name: Config(128, 128, 128) for name in ("wide", "square", "small", "float32")},
        "tma_wide": Config(128, 256, 128, SUBTILES=4, tma=True),
        "tma_square": Config(128, 128, 128, tma=True),
    },
    80: {
        "wide": Config(128, 128, 32, num_warps=8, num_stages=4, SUBTILES=2),
        "square": Config(128, 128, 32, num_warps=8, num_stages=4, SUBTILES=2),
        "small": Config(64, 64, 64, num_warps=4, num_stages=3),
        "tiny": Config(64, 32, 64, num_warps=4, num_stages=3),
        "float32": Config(64, 64, 32, num_warps=4, num_stages=3),
    },
    90: {
        "tma_wide": Config(128, 256, 64, num_warps=8, num_stages=4, SUBTILES=4, tma=True),
        "tma_square": Config(128, 128, 64, num_warps=8, num_stages=6, SUBTILES=2, tma=True),
        "tma_gelu": Config(
            128, 128, 64, num_warps=4, num_stages=3, SUBTILES=2, CTAS=2, STAGGER=4000, tma=True
        ),
        "tma_dgelu": Config(
            128, 128, 64, num_stages=3, num_warps=8, SUBTILES=8, CTAS=2, STAGGER=4000, tma=True
        ),
        "tma_residual": Config(
            128,
            128,
            64,
            num_warps=4,
            num_stages=3,
            GROUP_M=4,
            SUBTILES=4,
            CTAS=2,
            STAGGER=4000,
            tma=True,
        ),
        "wide": Config(128, 256, 64, num_warps=8, num_stages=3, SUBTILES=4),
        "square": Config(128, 128, 64, num_warps=8, num_stages=4, SUBTILES=2),
        "small": Config(64, 64, 64, num_warps=4, num_stages=4),
        "tiny": Config(64, 32, 64, num_warps=4, num_stages=6),
        "float32": Config(128, 128, 32, num_warps=8, num_stages=3, SUBTILES=2),
    },
    100: {
        "tma_wide": Config(128, 256, 64, num_warps=8, num_stages=4, SUBTILES=4, tma=True),
        "tma_square": Config(
            128, 128, 64, num_warps=8, num_stages=6, SUBTILES=2, tma=True, maxnreg=255
        ),
        "wide": Config(128, 128, 64, num_warps=8, num_stages=4, SUBTILES=2),
        "square": Config(128, 128, 64, num_warps=8, num_stages=4, SUBTILES=2),
        "small": Config(64, 64, 32, num_warps=4, num_stages=4),
        "tiny": Config(64, 32, 64, num_warps=4, num_stages=6),
        "float32": Config(64, 64, 32, num_warps=4, num_stages=3),
    },
    120: {
        "wide": Config(128, 64, 32, num_warps=4, num_stages=3, SUBTILES=2),
        "square": Config(128, 64, 32, num_warps=4, num_stages=3, SUBTILES=2),
        "small": Config(64, 64, 64, num_warps=4, num_stages=3),
        "tiny": Config(64, 32, 64, num_warps=4, num_stages=4, maxnreg=255),
        "float32": Config(64, 32, 32, num_warps=4, num_stages=2, maxnreg=128),
    },
}

# The patch embedding's two products of this family, whose pixels are loaded through addresses;
# "gather": one or two pixels at an address.
PATCH_EMBED: dict[int, dict[str, Config]] = {
    0: {
        name: Config(128, 128, 128)
        for name in ("square", "small", "float32", "gather", "gather_float32")
    },
    80: {
        **{name: GEMM[80][name] for name in ("square", "small", "float32")},
        "gather": Config(64, 64, 32, num_warps=8, num_stages=3),
        "gather_float32": Config(64, 64, 32, num_warps=4, num_stages=2),
    },
    90: {name: GEMM[90][name] for name in ("square", "small", "float32")},
    100: {
        "square": Config(128, 64, 64, num_warps=8, num_stages=4),
        "small": Config(64, 64, 32, num_warps=8, num_stages=4),
        "float32": Config(64, 64, 32, num_warps=8, num_stages=3),
    },
    120: {
        "square": GEMM[120]["square"],
        "small": GEMM[120]["small"],
        "float32": Config(64, 32, 32, num_warps=4, num_stages=3),
    },
}
PATCH_GATHER_DW = Config(32, 64, 64, num_warps=4, num_stages=3)

# dW: BLOCK_M is the step along the reduction, BLOCK_N x BLOCK_K the tile of dW.
GEMM_DW: dict[int, dict[str, Config]] = {
    0: {
        "tma": Config(64, 128, 128, tma=True),
        "16-bit": Config(64, 128, 128),
        "float32": Config(64, 128, 128),
    },
    80: {
        "16-bit": Config(32, 128, 128, num_warps=8, num_stages=4),
        # float32 pixels and gradients under autocast: sm_86 and sm_89 have 99 KiB for a block.
        "patch_embed": Config(32, 128, 128, num_warps=8, num_stages=3),
        "float32": Config(32, 64, 32, num_warps=4, num_stages=3, CTAS=4),
    },
    90: {
        "tma": Config(64, 128, 256, num_warps=8, num_stages=4, tma=True),
        "tma_square": Config(64, 128, 128, num_warps=8, num_stages=6, tma=True),
        "16-bit": Config(32, 128, 128, num_warps=8, num_stages=3),
        "patch_embed": Config(64, 128, 128, num_warps=8, num_stages=3),
        "float32": Config(32, 64, 32, num_warps=4, num_stages=3, CTAS=4),
    },
    100: {
        "tma": Config(64, 128, 128, num_warps=8, num_stages=6, tma=True),
        "16-bit": Config(64, 128, 128, num_warps=8, num_stages=3),
        "float32": Config(32, 64, 32, num_warps=8, num_stages=3, CTAS=2),
    },
    120: {
        "16-bit": Config(32, 128, 128, num_warps=8, num_stages=3),
        "float32": Config(32, 64, 32, num_warps=4, num_stages=3, CTAS=4),
    },
}

# The MLP of short rows in one kernel: BLOCK_N hidden columns at a time, rows cut into pieces of
# BLOCK_K columns, their sums into SUBTILES of those; named by the longest row.
MLP_NARROW: dict[int, dict[str, Config]] = {
    DEFAULT: {},
    90: {
        "fwd_192": Config(128, 64, 64, num_warps=8, num_stages=3, tma=True),
        "bwd_192": Config(128, 32, 64, num_warps=8, num_stages=4, SUBTILES=2, tma=True),
    },
}

REDUCE_NORM = Config(BLOCK_M=64, BLOCK_N=32)
SWIGLU = Config(BLOCK_M=4, BLOCK_N=512, num_warps=4)
SUM_BATCH = Config(BLOCK_M=16, BLOCK_N=128, num_warps=4)


def norm_way(M: int, N: int, compute: torch.dtype) -> str:
    """How LayerNorm of x (M, K) enters the product (M, N) that follows it.

    "fold"  by the product's epilogue (`layernorm_fold`), 2 instructions an element of the output;
            the weight is read and written once more.
    "row"   by the row kernel, which writes the norm for the product to read: M K elements more, and
            2 N K fewer.
    "load"  by the product, as it loads its tiles of x: about 5 instructions an element for each
            column of tiles, and operands that come from registers. For float32 products, where
            both are small beside the arithmetic.
    """
    if compute == torch.float32:
        return "load"
    return "fold" if M >= 4 * N else "row"


def keeps_rows(M: int, C: int, compute: torch.dtype) -> bool:
    """Whether the op that writes rows (M, C) tells of them to a norm that may follow: where it
    would be folded into a product at least as wide as a block's.
    """
    return norm_way(M, 3 * C, compute) == "fold"


def mlp_narrow(
    kernel: str, M: int, C: int, dtype: torch.dtype, device_index: int | None
) -> Config | None:
    """The configuration of the one-kernel MLP, "fwd" or "bwd"; None where its products run alone.

    A program takes all of both weights through its SM, whatever its rows: with programs for fewer
    than half of the SMs that takes longer than three launches do (mlp_narrow.py has the figures).
    """
    config = look_up(MLP_NARROW, arch(device_index)).get(f"{kernel}_192", Config(0, 0))
    if dtype == torch.float32 or C > 192 or not config.BLOCK_M:
        return None
    return config if 2 * -(-M // config.BLOCK_M) >= num_sms(device_index) else None


def gemm(
    M: int,
    N: int,
    dtype: torch.dtype,
    device_index: int | None,
    tma: bool = False,
    epilogue: str = "none",
) -> Config:
    """The configuration of one forward or dX product. tma: TMA can take its operands."""
    return _gemm(M, N, dtype, tma, epilogue, arch(device_index), num_sms(device_index))


@choice
def _gemm(
    M: int, N: int, dtype: torch.dtype, tma: bool, epilogue: str, arch: int, sms: int
) -> Config:
    table = look_up(GEMM, arch)
    if not tma or dtype == torch.float32:
        return table[gemm_class(M, N, dtype, sms, table)]
    table = table | {k.removeprefix("tma_"): c for k, c in table.items() if c.tma}
    config = table[gemm_class(M, N, dtype, sms, table)]
    # A long epilogue has a line of its own, where all its programs have several tiles.
    own = table.get({"fold": "gelu"}.get(epilogue, epilogue), config)
    tiles = -(-M // own.BLOCK_M) * -(-N // own.BLOCK_N)
    return own if config.tma and tiles >= 2 * own.CTAS * sms else config


def patch_embed(
    M: int, N: int, dtype: torch.dtype, access: str, device_index: int | None
) -> Config:
    """The configuration of the patch embedding's forward and dimages products."""
    table = look_up(PATCH_EMBED, arch(device_index))
    if access == "gather":
        name = "gather_float32" if dtype == torch.float32 else "gather"
        return table.get(name, PATCH_EMBED[DEFAULT][name])
    return table[gemm_class(M, N, dtype, num_sms(device_index), table)]


# Of the tensor cores' rate, what a tile of each class reaches: larger ones load less per product.
_RATES = {"wide": 1.0, "square": 0.9, "small": 0.55, "tiny": 0.35}


def gemm_class(M: int, N: int, dtype: torch.dtype, sms: int, table: dict[str, Config]) -> str:
    """The class of least estimated time: the tiles of the busiest SM at the rate of their size."""
    if dtype == torch.float32:
        return "float32"

    def cost(name: str) -> float:
        block_m, block_n = table[name].BLOCK_M, table[name].BLOCK_N
        tiles = -(-M // block_m) * -(-N // block_n)
        return -(-tiles // sms) * block_m * block_n / _RATES[name]

    return min((name for name in _RATES if name in table), key=cost)


def gemm_dw(
    M: int, N: int, K: int, dtype: torch.dtype, device_index: int | None, tma: bool = False
) -> tuple[Config, Plan]:
    """The configuration of dW, and who sums what of it."""
    return _gemm_dw(M, N, K, dtype, tma, arch(device_index), num_sms(device_index))


@choice
def _gemm_dw(
    M: int, N: int, K: int, dtype: torch.dtype, tma: bool, arch: int, sms: int
) -> tuple[Config, Plan]:
    table = look_up(GEMM_DW, arch)
    names = ("float32",) if dtype == torch.float32 else ("16-bit",)
    if tma and "tma" in table:
        names = tuple(name for name in table if name.startswith("tma"))
    part_steps = _part_steps(dtype)

    def planned(config: Config) -> tuple[float, Plan]:
        tiles, steps = _dw_tiles(M, N, K, config)
        programs = sms * config.CTAS if arch else max(2, 2 * tiles - 1)
        found = dw_plan.plan(tiles, steps, programs, part_steps / config.BLOCK_M if arch else 0)
        area = config.BLOCK_M * config.BLOCK_N * config.BLOCK_K
        cost = dw_plan.time(found, part_steps / config.BLOCK_M) * area
        return cost / (1.0 if config.BLOCK_K == 256 else 0.85), found

    config = min((table[name] for name in names), key=lambda config: planned(config)[0])
    return config, planned(config)[1]


def dw_columns(plan: Plan, num_n: int, device_index: int | None) -> int:
    """Columns of tiles, `num_n` tiles each, that share the sums of db: as many as can, or one, in
    an eighth of a step for each step that is summed. Who shares walks over a stretch in three loops
    instead of one, whose starts and ends take about as long as 4 steps.
    """
    return _dw_columns(plan, num_n, arch(device_index))


@choice
def _dw_columns(plan: Plan, num_n: int, arch: int) -> int:
    columns, whole = plan.columns(num_n), plan.tiles // plan.programs
    alone = plan.steps * max(1, num_n // plan.programs) if whole else plan.longest()
    shared = plan.longest() / columns + 8 * 4 * (whole + 1)
    return columns if shared < alone or arch == 0 else 1


def _dw_tiles(M: int, N: int, K: int, config: Config) -> tuple[int, int]:
    """Tiles of dW, and steps along M."""
    tiles = -(-N // config.BLOCK_N) * -(-K // config.BLOCK_K)
    return tiles, -(-M // config.BLOCK_M)


def _part_steps(dtype: torch.dtype) -> int:
    """Rows whose product takes as long as a slab's write and read do: 8 bytes an element at 25 GB/s
    for each SM of an H100, against 2 FLOPs a row at 6 TFLOP/s, an eighth of that in float32.
    """
    return 120 if dtype == torch.float32 else 960


def patch_embed_dw(
    M: int, N: int, K: int, dtype: torch.dtype, device_index: int | None, gather: bool
) -> tuple[Config, Plan]:
    """The same of the patch embedding's dW, whose one operand are pixels."""
    config, _ = gemm_dw(M, N, K, dtype, device_index)
    if dtype != torch.float32:
        config = look_up(GEMM_DW, arch(device_index)).get("patch_embed", config)
    if gather and arch(device_index):
        config = PATCH_GATHER_DW
    parts = slabs(M, N, K, config, arch(device_index), num_sms(device_index))
    return config, dw_plan.even(*_dw_tiles(M, N, K, config), parts)


def reduce_slabs(*tile_widths: int) -> Config:
    """Rows and columns of the tiles that are added at a time: columns divide both tiles' widths."""
    width = min(256, *tile_widths)
    # Bounded, for ptxas spills to make room for more CTAs than there are programs.
    return Config(0, BLOCK_N=1024 // width, BLOCK_K=width, num_warps=8, maxnreg=64)


@choice
def slabs(M: int, N: int, K: int, config: Config, arch: int, sms: int) -> int:
    """How many slabs dW is cut into: those of least estimated time, in steps along M.

    Programs run in waves of one per SM; each takes its rows and about 4 steps to begin and end; a
    slab is written and read once as float32, which for 2^21 elements takes the time of some 16
    steps of 128 x 128 x 64 (H100: 5 us against 0.3 us each).
    """
    if arch == 0:
        return 2
    tiles, steps = -(-N // config.BLOCK_N) * -(-K // config.BLOCK_K), -(-M // config.BLOCK_M)
    step = config.BLOCK_M * config.BLOCK_N * config.BLOCK_K
    traffic = 16 * N * K / 2**21 * 2**20 / step

    def cost(S: int) -> float:
        waves = -(-tiles * S // sms)
        return waves * (-(-steps // S) + 4) + traffic * S

    return min(range(1, max(2, min(64, steps // 8 + 1))), key=cost)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@choice
def layernorm_fwd(C: int) -> Config:
    """Whole rows, about 4096 elements a program; BLOCK_N is the padded row."""
    block_c = _power_of_two(C)
    return Config(max(1, 4096 // block_c), block_c, num_warps=4 if block_c <= 2048 else 8)


def layernorm_bwd(
    M: int, C: int, dtype: torch.dtype, device_index: int | None
) -> tuple[Config, int]:
    """Whole rows of x, and the number of programs, each of which owns a run of rows: as many as
    the SMs hold, by registers. Loads go two steps ahead where an SM's share of the bandwidth is
    large, or one.
    """
    block_c, part = _power_of_two(C), arch(device_index) // 10
    if block_c > 4096:  # rows that shared memory would not hold twice
        config, per_sm = Config(1, block_c, num_warps=8, num_stages=1), 1
    else:
        num_warps = min(16, max(4, block_c // 256))
        per_sm = {4: 4, 8: 2, 16: 1}[num_warps]
        if num_warps == 4 and (dtype == torch.float32 or part in (10, 12)):
            per_sm = 3
        config = Config(
            max(1, 2048 // block_c),
            block_c,
            num_warps=num_warps,
            num_stages=3 if part in (9, 10) else 2,
            maxnreg=65536 // (32 * num_warps * per_sm) // 8 * 8,
        )
    return config, min(-(-M // config.BLOCK_M), per_sm * num_sms(device_index))


# Attention. "fwd_resident" and ".._keys" hold every key of a row, at most BLOCK_N of them; the
# others walk over the keys (fwd, dq) or over the queries (dkv) in blocks, "fwd_small" where there
# are so few programs that none takes registers from another, "dkv_fewer_queries" over no more than
# ATTENTION_FEWER_QUERIES. "_to_128" serves head dims over 64, "_to_112" those over 80 that are
# several blocks of columns, "_72" that one alone; "_dropout" rows with dropout, whose random
# numbers take registers.
_ATTENTION_MMA = {
    "fwd_resident": Config(32, 256, num_warps=4, num_stages=1),
    "fwd_resident_to_128": Config(64, 64, num_warps=4, num_stages=1),
    "fwd": Config(128, 64, num_warps=8, num_stages=2),
    "fwd_to_128": Config(128, 32, num_warps=8, num_stages=2),
    "fwd_small": Config(64, 32, num_warps=4, num_stages=2, maxnreg=255),
    "dq": Config(64, 32, num_warps=4, num_stages=2),
    "dq_to_128": Config(64, 32, num_warps=8, num_stages=2),
    "dkv": Config(32, 64, num_warps=4, num_stages=2),
    "dkv_to_112": Config(16, 32, num_warps=4, num_stages=2),
    "dkv_to_128": Config(32, 64, num_warps=8, num_stages=2),
    "dq_to_128_dropout": Config(64, 32, num_warps=8, num_stages=1),
    "dkv_dropout": Config(16, 64, num_warps=4, num_stages=2),
    "dkv_to_128_dropout": Config(16, 64, num_warps=8, num_stages=2),
    # Head dims whose own pieces of columns leave fewer registers than those of their class.
    "fwd_resident_56": Config(32, 256, num_warps=8, num_stages=1),
    "fwd_56_dropout": Config(128, 32, num_warps=8, num_stages=2),
    "fwd_104_dropout": Config(128, 16, num_warps=8, num_stages=2),
    "fwd_120_dropout": Config(128, 16, num_warps=8, num_stages=2),
    "dq_104": Config(32, 32, num_warps=8, num_stages=2),
    "dkv_72": Config(32, 32, num_warps=8, num_stages=2),
    "fwd_small_120": Config(64, 32, num_warps=8, num_stages=2),
    "dkv_104_dropout": Config(16, 32, num_warps=8, num_stages=2),
    "float32": Config(32, 16, num_warps=4, num_stages=1),
}
_ATTENTION_WGMMA = {
    "fwd_resident": Config(64, 256, num_warps=4, num_stages=1),
    "fwd_resident_to_128": Config(64, 128, num_warps=4, num_stages=1),
    "bwd_64_keys": Config(64, 64, num_warps=4, num_stages=1),
    "bwd_128_keys": Config(64, 128, num_warps=8, num_stages=1),
    "bwd_64_keys_to_128": Config(64, 64, num_warps=8, num_stages=1),
    "bwd_128_keys_to_128": Config(0, 0),
    "fwd": Config(128, 128, num_warps=8, num_stages=2),
    "fwd_to_128": Config(128, 64, num_warps=8, num_stages=2),
    "fwd_small": Config(64, 64, num_warps=4, num_stages=2, maxnreg=255),
    "dq_beside": Config(64, 64, num_warps=4, num_stages=2),
    "dkv_beside": Config(32, 64, num_warps=4, num_stages=2),
    "dq_beside_to_128": Config(0, 0),
    "dq": Config(64, 64, num_warps=4, num_stages=2),
    "dq_to_128": Config(64, 64, num_warps=4, num_stages=1),
    "dkv": Config(64, 64, num_warps=4, num_stages=2),
    "dkv_to_128": Config(32, 64, num_warps=8, num_stages=1),
    # Head dims whose own pieces of columns leave fewer registers than those of their class.
    "fwd_resident_48": Config(64, 128, num_warps=4, num_stages=1),
    "fwd_resident_88": Config(64, 64, num_warps=4, num_stages=1),
    "fwd_resident_104": Config(64, 64, num_warps=4, num_stages=1),
    "bwd_64_keys_120": Config(0, 0),
    "fwd_104": Config(128, 32, num_warps=8, num_stages=2),
    "fwd_120": Config(128, 32, num_warps=8, num_stages=2),
    "dq_88": Config(64, 64, num_warps=4, num_stages=1),
    "dq_96": Config(64, 64, num_warps=4, num_stages=1),
    "dq_88_dropout": Config(64, 32, num_warps=4, num_stages=1),
    "dq_96_dropout": Config(64, 32, num_warps=4, num_stages=1),
    "dq_to_112": Config(64, 32, num_warps=4, num_stages=1),
    "dq_120": Config(64, 64, num_warps=8, num_stages=1),
    "dkv_104": Config(16, 64, num_warps=8, num_stages=1),
    "dkv_120": Config(16, 64, num_warps=8, num_stages=1),
    "dq_104_dropout": Config(64, 32, num_warps=8, num_stages=1),
    "dq_120_dropout": Config(64, 32, num_warps=8, num_stages=1),
    "fwd_dropout": Config(128, 64, num_warps=8, num_stages=2),
    "fwd_to_112_dropout": Config(128, 32, num_warps=8, num_stages=2),
    "dq_to_128_dropout": Config(64, 32, num_warps=4, num_stages=1),
    "dkv_dropout": Config(32, 64, num_warps=4, num_stages=2),
    "dkv_to_128_dropout": Config(16, 64, num_warps=8, num_stages=1),
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
        "dq_beside_to_128": Config(0, 0),
        "dq": Config(128, 128),
        "dkv": Config(128, 128),
    },
    80: _ATTENTION_MMA
    | {
        # Over 176 keys no third CTA fits beside two, whatever its registers.
        "fwd_fewer_keys_64": Config(32, 176, num_warps=4, num_stages=1),
        "fwd_resident_64": Config(32, 256, num_warps=4, num_stages=1, maxnreg=255),
        "fwd_resident_32": Config(32, 256, num_warps=4, num_stages=1, maxnreg=168),
        "dq_to_128": Config(64, 32, num_warps=8, num_stages=1),
        "dq_40": Config(64, 32, num_warps=4, num_stages=2, maxnreg=255),
        "dq_72": Config(64, 32, num_warps=8, num_stages=2),
        "dq_80": Config(64, 32, num_warps=8, num_stages=2),
        "dq_to_112": Config(64, 32, num_warps=8, num_stages=2),
        "dq_112_dropout": Config(32, 32, num_warps=8, num_stages=2),
        "fwd_88_dropout": Config(128, 16, num_warps=8, num_stages=2),
        "fwd_small_32": Config(64, 32, num_warps=8, num_stages=2),
        "fwd_small_72_dropout": Config(64, 32, num_warps=8, num_stages=2),
        "fwd_small_104_dropout": Config(32, 32, num_warps=4, num_stages=2),
        "fwd_small_96": Config(64, 32, num_warps=8, num_stages=2),
    },
    90: _ATTENTION_WGMMA
    | {
        "fwd_fewer_keys_64": Config(64, 224, num_warps=4, num_stages=3),
        "fwd_resident_64": Config(64, 256, num_warps=4, num_stages=2),
        "fwd_64": Config(64, 64, num_warps=4, num_stages=3),
        "dq_64": Config(64, 64, num_warps=4, num_stages=3),
        # H200, dQ, dK and dV in us, by this and by dkv: 534 and 567 of 256 x 197 tokens, 997
        # and 1016 of 87 x 577, 1347 and 1238 of 36 x 1370, 12 heads.
        "dkv_fewer_queries_64": Config(32, 64, num_warps=4, num_stages=3),
        "fwd_80": Config(64, 64, num_warps=4, num_stages=2),
        "dq_80": Config(64, 32, num_warps=4, num_stages=3),
        "dkv_80": Config(32, 64, num_warps=4, num_stages=1),
        # Not timed: as at 80, where 4 warps take half the time of 8.
        "fwd_72": Config(64, 64, num_warps=4, num_stages=2),
        "fwd_fewer_keys_72": Config(64, 32, num_warps=4, num_stages=1, maxnreg=96),
        "dkv_72": Config(32, 64, num_warps=4, num_stages=2),
        "fwd_72_dropout": Config(128, 64, num_warps=8, num_stages=2),
        "dkv_72_dropout": Config(16, 64, num_warps=8, num_stages=1),
        "fwd_64_dropout": Config(128, 64, num_warps=8, num_stages=2),
        "dq_64_dropout": Config(64, 64, num_warps=4, num_stages=2),
        "fwd_80_dropout": Config(128, 64, num_warps=8, num_stages=2),
        "dq_80_dropout": Config(64, 32, num_warps=4, num_stages=1),
        "dkv_80_dropout": Config(16, 64, num_warps=8, num_stages=1),
        # With two stages ptxas has each wgmma of these wait for the one before.
        "dkv_dropout": Config(32, 64, num_warps=4, num_stages=1),
        "fwd_96_dropout": Config(128, 32, num_warps=8, num_stages=1),
        "fwd_104_dropout": Config(128, 16, num_warps=8, num_stages=2),
        "fwd_small_104_dropout": Config(64, 32, num_warps=8, num_stages=2),
        "fwd_small_120_dropout": Config(64, 64, num_warps=8, num_stages=2),
        "fwd_small_128_dropout": Config(64, 64, num_warps=8, num_stages=2),
        "dq_120": Config(64, 32, num_warps=8, num_stages=1),
        "dq_120_dropout": Config(64, 16, num_warps=8, num_stages=1),
        "dkv_120_dropout": Config(16, 32, num_warps=4, num_stages=1),
        "dkv_88": Config(16, 64, num_warps=8, num_stages=1),
        "fwd_small_112_dropout": Config(64, 32, num_warps=4, num_stages=2),
        "fwd_128_dropout": Config(128, 32, num_warps=8, num_stages=2),
        "dq_128": Config(64, 32, num_warps=4, num_stages=1),
        "fwd_56_dropout": Config(128, 32, num_warps=8, num_stages=2),
        "fwd_resident_40": Config(64, 128, num_warps=4, num_stages=1),
        "fwd_resident_56": Config(64, 128, num_warps=8, num_stages=1),
        "fwd_resident_120": Config(64, 112, num_warps=4, num_stages=1),
        "bwd_64_keys_40": Config(64, 64, num_warps=4, num_stages=1, maxnreg=255),
        "bwd_128_keys_56": Config(32, 128, num_warps=8, num_stages=1),
    },
    100: _ATTENTION_WGMMA
    | {
        "fwd_resident_40": Config(64, 256, num_warps=8, num_stages=1),
        "fwd_resident_56": Config(64, 128, num_warps=8, num_stages=1),
        "fwd_resident_72": Config(64, 128, num_warps=8, num_stages=1),
        "fwd_resident_88": Config(64, 128, num_warps=8, num_stages=1),
        "fwd_resident_120": Config(64, 128, num_warps=8, num_stages=1),
        "fwd_40": Config(128, 64, num_warps=8, num_stages=2),
        "fwd_to_128": Config(128, 64, num_warps=8, num_stages=1),
        "fwd_120": Config(128, 32, num_warps=8, num_stages=1),
        "fwd_small_120_dropout": Config(64, 32, num_warps=4, num_stages=2),
        "fwd_72_dropout": Config(128, 32, num_warps=8, num_stages=2),
        "fwd_128": Config(128, 64, num_warps=8, num_stages=1, maxnreg=255),
        "dkv_80_dropout": Config(32, 64, num_warps=8, num_stages=1, maxnreg=255),
        "dkv_128_dropout": Config(16, 64, num_warps=8, num_stages=1, maxnreg=255),
    },
    120: _ATTENTION_MMA
    | {
        "fwd_small_72": Config(64, 32, num_warps=8, num_stages=2),
        "fwd_small_88_dropout": Config(32, 32, num_warps=4, num_stages=2),
        "fwd_small_104": Config(32, 32, num_warps=4, num_stages=2),
        "fwd_small_120": Config(32, 32, num_warps=4, num_stages=2),
        "fwd_small_16_dropout": Config(64, 32, num_warps=4, num_stages=1),
        "fwd_88_dropout": Config(128, 16, num_warps=8, num_stages=2),
        "dq_32_dropout": Config(64, 32, num_warps=8, num_stages=2),
        "dq_40": Config(64, 32, num_warps=4, num_stages=2, maxnreg=255),
        "dq_40_dropout": Config(64, 32, num_warps=8, num_stages=2),
        "dq_112": Config(32, 32, num_warps=8, num_stages=2),
        "dq_128": Config(64, 32, num_warps=8, num_stages=2, maxnreg=255),
        "dkv_80_dropout": Config(16, 64, num_warps=8, num_stages=2),
        "dkv_24": Config(32, 64, num_warps=4, num_stages=1),
        "dkv_24_dropout": Config(16, 64, num_warps=4, num_stages=2),
        "dkv_56": Config(32, 64, num_warps=8, num_stages=2),
        "dkv_56_dropout": Config(32, 64, num_warps=8, num_stages=1),
        "dkv_80": Config(32, 64, num_warps=8, num_stages=1),
        "dkv_88": Config(16, 32, num_warps=8, num_stages=2),
        "dkv_96": Config(16, 32, num_warps=4, num_stages=1),
        "float32": Config(16, 16, num_warps=4, num_stages=1),
    },
}


# Head dims at which ptxas spills some registers so that one CTA more fits the SM, unless it is told
# how many a thread may have: in the kernels of `attention` and its maps, or in the one named.
ATTENTION_BOUNDED: dict[int, tuple[int | str, ...]] = {
    DEFAULT: (),
    100: (16, 24, 32, 40, 48, 56, 72, 88, 96, 104, 112, 120),
    120: ("maps_56", "qk_128"),
}

# Up to this many keys, where heads are few, the programs of dq_beside and dkv_beside share one
# launch, where a table has these lines; but each key tile then computes its own delta. H200, D =
# 64, 12 heads, us together and apart: 1 x 197 tokens 11 and 15, 16 x 197 54 and 41, 131 x 384 833
# and 719.
ATTENTION_SIDE_BY_SIDE = 384

# Up to this many queries dkv_fewer_queries serves, where a table has it: beyond, its smaller steps
# cost more than they win (its line has the times).
ATTENTION_FEWER_QUERIES = 640


def attention(kernel: str, D: int, dtype: torch.dtype, arch: int, dropout: bool = False) -> Config:
    """The configuration of one attention kernel at head dim D; BLOCK_N 0 where it never serves."""
    table = look_up(ATTENTION, arch)
    one_launch = any(word in kernel for word in ("resident", "keys", "beside"))
    if dtype == torch.float32 and arch != 0:
        return Config(0, 0) if one_launch else table["float32"]
    widths = (f"_{D}", *("_to_112",) * (80 < D <= 112), *("_to_128",) * (D > 64), "")
    kinds = ("_dropout", "") if dropout else ("",)
    names = (kernel + width + kind for width in widths for kind in kinds)
    config = next((table[name] for name in names if name in table), Config(0, 0))
    bound = attention_bound(D, arch)
    return replace(config, maxnreg=bound) if bound else config


def attention_bound(of: int | str, arch: int) -> int | None:
    """Registers a thread may have at a head dim, or in the kernel named; None: ptxas decides."""
    return 255 if of in look_up(ATTENTION_BOUNDED, arch) else None


def attention_maps_bound(D: int, device_index: int | None) -> int | None:
    """`attention_bound` of the maps."""
    part = arch(device_index)
    return attention_bound(D, part) or attention_bound(f"maps_{D}", part)


def attention_qk(D: int, device_index: int | None) -> Config:
    """Tokens a program has in hand, and pairs of channels padded: 1024 pairs, eight a thread."""
    part, pairs = arch(device_index), _power_of_two(D // 2)
    bound = attention_bound(f"qk_{D}", part)
    return Config((4096 if part == 0 else 1024) // pairs, pairs, num_warps=4, maxnreg=bound)


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
