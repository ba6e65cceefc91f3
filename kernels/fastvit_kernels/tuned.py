"""Launch configurations: one literal table per kernel family, each with a look-up function.
`tuned_attention` has those of attention.

Lines are chosen by what the compiled code shows (registers, spills, shared memory, HGMMA) or by
times on a GPU (benchmarks/tune.py). A look-up takes the lines of the exact architecture, else of
the newest older one of the same major version (sm_80's lines also serve sm_86 and sm_89), else of
sm_80. Architecture 0 is the interpreter, where few large programs are fastest.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from fastvit_kernels import dw_plan
from fastvit_kernels.dw_plan import Plan
from fastvit_kernels.launch import cdiv


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options of one kernel, which reads only the fields it needs."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int = 0
    num_warps: int = 4
    num_stages: int = 2
    GROUP_M: int = 8
    SUBTILES: int = 1
    CTAS: int = 1  # resident programs per SM of a persistent kernel
    STAGGER: int = 0  # nanoseconds by which the second half of the programs starts later
    tma: bool = False
    maxnreg: int | None = None  # limit of registers per thread; None: ptxas decides


T = TypeVar("T")
Choose = TypeVar("Choose", bound=Callable)
_forget: list[Callable[[], None]] = []


def memoized(choose: Choose) -> Choose:
    """Memoize `choose`, which takes long beside a launch."""
    cached = functools.lru_cache(maxsize=4096)(choose)
    _forget.append(cached.cache_clear)
    return cached  # type: ignore[return-value]


def on_clear(clear: Callable[[], None]) -> None:
    """Have `clear_choices` call `clear` too: for caches that were built from choices."""
    _forget.append(clear)


def clear_choices() -> None:
    """Clear all memoized choices; needed after a table was edited."""
    for clear in _forget:
        clear()


_target: tuple[int, int] | None = None


@contextlib.contextmanager
def target(arch: int, sms: int) -> Iterator[None]:
    """Choose for this GPU instead of the one at hand, as ahead-of-time compilation needs."""
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
    """The entry of `arch`, else of the newest older one of the same major, else the default."""
    if arch in table:
        return table[arch]
    same_major = [a for a in table if a // 10 == arch // 10 and 0 < a <= arch]
    return table[max(same_major)] if same_major else table[DEFAULT]


DEFAULT = 80

# Forward and dX products: four tile sizes for 16-bit operands, of which `gemm_class` chooses one,
# and one for float32. "tma_*" needs operands that TMA can load, without a prologue. SUBTILES keeps
# the epilogues from spilling. "tiny" is for the few rows of one image, where load latency bounds an
# SM: many programs, each with many loads in flight.
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

# The patch embedding's forward and dimages products, which address pixels through pointers;
# "gather": one or two pixels per access.
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
        # Pixels may be float32 (autocast), and a CTA has 99 KiB of shared memory on sm_86, sm_89.
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

# The one-kernel MLP of narrow rows: BLOCK_N hidden columns per step; rows are cut into pieces of
# BLOCK_K columns as operands and of BLOCK_K / SUBTILES as sums. Names end in the widest row served.
MLP_NARROW: dict[int, dict[str, Config | None]] = {
    DEFAULT: {},
    90: {
        "fwd_192": Config(128, 64, 64, num_warps=8, num_stages=3),
        "bwd_192": Config(128, 32, 64, num_warps=8, num_stages=4, SUBTILES=2),
    },
}

REDUCE_NORM = Config(BLOCK_M=64, BLOCK_N=32)
SWIGLU = Config(BLOCK_M=4, BLOCK_N=512, num_warps=4)
SUM_BATCH = Config(BLOCK_M=16, BLOCK_N=128, num_warps=4)


def norm_placement(M: int, N: int, compute: torch.dtype) -> str:
    """Where LayerNorm of x (M, K) is applied for the product (M, N) that follows it.

    "fold"  in the product's epilogue (`layernorm_fold`): 2 instructions per output element; the
            weight is read and written once more.
    "row"   in the row kernel, which writes the normed x for the product to read: M K elements more
            than "fold" moves, and 2 N K fewer.
    "load"  in the product as it loads tiles of x: about 5 instructions per element for each column
            of tiles, and operands that come from registers. For float32 products, where both cost
            little next to the arithmetic.
    """
    if compute == torch.float32:
        return "load"
    return "fold" if M >= 4 * N else "row"


def keeps_row_statistics(M: int, C: int, compute: torch.dtype) -> bool:
    """True if the op that writes rows (M, C) also writes their statistics (`row_statistics`): where
    a norm that follows would be folded into a product of 3 C columns, as QKV's is.
    """
    return norm_placement(M, 3 * C, compute) == "fold"


def mlp_narrow(
    kernel: str, M: int, C: int, dtype: torch.dtype, device_index: int | None
) -> Config | None:
    """The configuration of the one-kernel MLP, "fwd" or "bwd"; None if its products are launched
    separately.

    Each program reads both weights whole, however few rows it has: with programs for fewer than
    half of the SMs that takes longer than three launches (figures in mlp_narrow.py).
    """
    config = look_up(MLP_NARROW, arch(device_index)).get(f"{kernel}_192")
    if config is None or dtype == torch.float32 or C > 192:
        return None
    return config if 2 * cdiv(M, config.BLOCK_M) >= num_sms(device_index) else None


def gemm(
    M: int,
    N: int,
    dtype: torch.dtype,
    device_index: int | None,
    tma: bool = False,
    epilogue: str = "none",
) -> Config:
    """The configuration of one forward or dX product. tma: TMA can load its operands."""
    table, sms = look_up(GEMM, arch(device_index)), num_sms(device_index)
    if not tma or dtype == torch.float32:
        return table[gemm_class(M, N, dtype, sms, table)]
    table = table | {k.removeprefix("tma_"): c for k, c in table.items() if c.tma}
    config = table[gemm_class(M, N, dtype, sms, table)]
    # A long epilogue has its own line, used where every program has at least two tiles.
    own = table.get({"fold": "gelu"}.get(epilogue, epilogue), config)
    tiles = cdiv(M, own.BLOCK_M) * cdiv(N, own.BLOCK_N)
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


# Fraction of the tensor cores' rate that each class reaches: larger tiles load less per product.
_RATES = {"wide": 1.0, "square": 0.9, "small": 0.55, "tiny": 0.35}


def gemm_class(M: int, N: int, dtype: torch.dtype, sms: int, table: dict[str, Config]) -> str:
    """The class of least estimated time: the busiest SM's tiles at the rate of their class."""
    if dtype == torch.float32:
        return "float32"

    def cost(name: str) -> float:
        block_m, block_n = table[name].BLOCK_M, table[name].BLOCK_N
        tiles = cdiv(M, block_m) * cdiv(N, block_n)
        return cdiv(tiles, sms) * block_m * block_n / _RATES[name]

    return min((name for name in _RATES if name in table), key=cost)


def gemm_dw(
    M: int, N: int, K: int, dtype: torch.dtype, device_index: int | None, tma: bool = False
) -> tuple[Config, Plan]:
    """The configuration of dW, and how its reduction is split over programs (`dw_plan`)."""
    return _gemm_dw(M, N, K, dtype, tma, arch(device_index), num_sms(device_index))


@memoized
def _gemm_dw(
    M: int, N: int, K: int, dtype: torch.dtype, tma: bool, arch: int, sms: int
) -> tuple[Config, Plan]:
    table = look_up(GEMM_DW, arch)
    names = ("float32",) if dtype == torch.float32 else ("16-bit",)
    if tma and "tma" in table:
        names = tuple(name for name in table if name.startswith("tma"))
    part_steps = _part_steps(dtype)

    def planned(config: Config) -> tuple[float, Config, Plan]:
        tiles, steps = _dw_tiles(M, N, K, config)
        programs = sms * config.CTAS if arch else max(2, 2 * tiles - 1)
        found = dw_plan.plan(tiles, steps, programs, part_steps / config.BLOCK_M if arch else 0)
        area = config.BLOCK_M * config.BLOCK_N * config.BLOCK_K
        cost = dw_plan.time(found, part_steps / config.BLOCK_M) * area
        return cost / (1.0 if config.BLOCK_K == 256 else 0.85), config, found

    _, config, plan = min((planned(table[name]) for name in names), key=lambda found: found[0])
    return config, plan


def dw_columns(plan: Plan, num_n: int, device_index: int | None) -> int:
    """How many columns of tiles, of `num_n` tiles each, share the sums of db: as many as can, or
    one. A step with sums takes an eighth longer; a program that shares runs three loops over each
    stretch of rows instead of one, whose prologues and epilogues cost about 4 steps.
    """
    columns, whole = plan.columns(num_n), plan.tiles // plan.programs
    alone = plan.steps * max(1, num_n // plan.programs) if whole else plan.longest()
    shared = plan.longest() / columns + 8 * 4 * (whole + 1)
    return columns if shared < alone or arch(device_index) == 0 else 1


def _dw_tiles(M: int, N: int, K: int, config: Config) -> tuple[int, int]:
    """Tiles of dW, and steps along M."""
    return cdiv(N, config.BLOCK_N) * cdiv(K, config.BLOCK_K), cdiv(M, config.BLOCK_M)


def _part_steps(dtype: torch.dtype) -> int:
    """Rows of the reduction that take as long as writing and reading one slab: per element and SM
    of an H100, 8 bytes at 25 GB/s against 2 FLOPs a row at 6 TFLOP/s (float32: an eighth).
    """
    return 120 if dtype == torch.float32 else 960


def patch_embed_dw(
    M: int, N: int, K: int, dtype: torch.dtype, device_index: int | None, gather: bool
) -> tuple[Config, Plan]:
    """`gemm_dw` for the patch embedding, one operand of which is loaded from the images."""
    config, _ = gemm_dw(M, N, K, dtype, device_index)
    if dtype != torch.float32:
        config = look_up(GEMM_DW, arch(device_index)).get("patch_embed", config)
    if gather and arch(device_index):
        config = PATCH_GATHER_DW
    parts = slabs(M, N, K, config, arch(device_index), num_sms(device_index))
    return config, dw_plan.even(*_dw_tiles(M, N, K, config), parts)


def reduce_slabs(*tile_widths: int) -> Config:
    """Rows of dW per program and columns added at a time, which divide the width of all tiles."""
    width = min(256, *tile_widths)
    # Bounded: else ptxas spills to make room for more CTAs than there are programs.
    return Config(0, BLOCK_N=1024 // width, BLOCK_K=width, num_warps=8, maxnreg=64)


@memoized
def slabs(M: int, N: int, K: int, config: Config, arch: int, sms: int) -> int:
    """The number of slabs for dW that takes the least estimated time, in steps along M.

    Programs run in waves of one per SM; each takes its own steps and about 4 to start and finish. A
    slab is written and read once in float32, which for 2^21 elements takes as long as about 16
    steps of 128 x 128 x 64 (H100: 5 us against 0.3 us each).
    """
    if arch == 0:
        return 2
    tiles, steps = _dw_tiles(M, N, K, config)
    step = config.BLOCK_M * config.BLOCK_N * config.BLOCK_K
    traffic = 8 * N * K / step  # 16 steps of 2^20 products for 2^21 elements

    def cost(S: int) -> float:
        waves = cdiv(tiles * S, sms)
        return waves * (cdiv(steps, S) + 4) + traffic * S

    return min(range(1, max(2, min(64, steps // 8 + 1))), key=cost)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def layernorm_fwd(C: int) -> Config:
    """Whole rows, about 4096 elements a program; BLOCK_N is the padded row length."""
    block_c = _power_of_two(C)
    return Config(max(1, 4096 // block_c), block_c, num_warps=4 if block_c <= 2048 else 8)


def layernorm_bwd(
    M: int, C: int, dtype: torch.dtype, device_index: int | None
) -> tuple[Config, int]:
    """The configuration, of whole rows of x, and the number of programs, each of which owns a run
    of rows: as many as the SMs' registers hold. Loads run two steps ahead where an SM's share of
    the bandwidth is large, else one.
    """
    block_c, part = _power_of_two(C), arch(device_index) // 10
    if block_c > 4096:  # shared memory would not hold such rows twice
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
    return config, min(cdiv(M, config.BLOCK_M), per_sm * num_sms(device_index))
