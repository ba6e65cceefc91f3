"""Launch configurations of attention: the table, and the limits at which one kernel takes over from
another. `tuned` says how lines are chosen and looked up.
"""

from dataclasses import replace

import torch
import triton

from fastvit_kernels.launch import cdiv
from fastvit_kernels.tuned import DEFAULT, Config, arch, look_up, num_sms

# "fwd_resident", "fwd_fewer_keys" and "bwd_*_keys" hold all keys of a row, at most BLOCK_N of them;
# the others loop over blocks of keys (fwd, dq) or of queries (dkv). "fwd_small": so few programs
# that none takes registers from another; "*_long": LONG tokens or more; "dkv_even": sequences of
# one length, without dropout; lengths known only at run time take registers.
# Suffixes: "_to_128" serves head dims over 64, "_to_112" those of 88 to 112 (several blocks of
# columns each), "_72" that one alone; "_dropout" rows with dropout, whose random numbers take
# registers. None: no kernel.
_MMA: dict[str, Config | None] = {
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
    # Head dims whose blocks of columns leave fewer registers than others of their class.
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
_WGMMA: dict[str, Config | None] = {
    "fwd_resident": Config(64, 256, num_warps=4, num_stages=1),
    "fwd_resident_to_128": Config(64, 128, num_warps=4, num_stages=1),
    "bwd_64_keys": Config(64, 64, num_warps=4, num_stages=1),
    "bwd_128_keys": Config(64, 128, num_warps=8, num_stages=1),
    "bwd_64_keys_to_128": Config(64, 64, num_warps=8, num_stages=1),
    "bwd_128_keys_to_128": None,
    "fwd": Config(128, 128, num_warps=8, num_stages=2),
    "fwd_to_128": Config(128, 64, num_warps=8, num_stages=2),
    "fwd_small": Config(64, 64, num_warps=4, num_stages=2, maxnreg=255),
    "dq_beside": Config(64, 64, num_warps=4, num_stages=2),
    "dkv_beside": Config(32, 64, num_warps=4, num_stages=2),
    "dq_beside_to_128": None,
    "dq": Config(64, 64, num_warps=4, num_stages=2),
    "dq_to_128": Config(64, 64, num_warps=4, num_stages=1),
    "dkv": Config(64, 64, num_warps=4, num_stages=2),
    "dkv_to_128": Config(32, 64, num_warps=8, num_stages=1),
    # Head dims whose blocks of columns leave fewer registers than others of their class.
    "fwd_resident_48": Config(64, 128, num_warps=4, num_stages=1),
    "fwd_resident_88": Config(64, 64, num_warps=4, num_stages=1),
    "fwd_resident_104": Config(64, 64, num_warps=4, num_stages=1),
    "bwd_64_keys_120": None,
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
    "float32": Config(16, 32, num_warps=8, num_stages=1, maxnreg=255),
}
ATTENTION: dict[int, dict[str, Config | None]] = {
    0: {
        "fwd_resident": Config(64, 256),
        "bwd_64_keys": Config(64, 64),
        "bwd_128_keys": Config(64, 128),
        "fwd": Config(128, 128),
        "fwd_small": Config(64, 128),
        "dq_beside": Config(128, 128),
        "dkv_beside": Config(128, 128),
        "dq_beside_to_128": None,
        "dq": Config(128, 128),
        "dkv": Config(128, 128),
    },
    80: _MMA
    | {
        # Over 176 keys shared memory has no room for a third CTA, however few registers it takes.
        "fwd_fewer_keys_64": Config(32, 176, num_warps=4, num_stages=1),
        # Over 224 keys sm_86 and sm_89, which share this table, have too little shared memory.
        "fwd_resident_64": Config(32, 224, num_warps=4, num_stages=1, maxnreg=255),
        "fwd_resident_56": Config(32, 224, num_warps=8, num_stages=1),
        "fwd_resident_48": Config(32, 208, num_warps=4, num_stages=1),
        "fwd_resident_40": Config(32, 176, num_warps=4, num_stages=1, maxnreg=255),
        "fwd_resident_24": Config(32, 224, num_warps=4, num_stages=1, maxnreg=255),
        "fwd_resident_32": Config(32, 224, num_warps=4, num_stages=1, maxnreg=255),
        "fwd_32": Config(128, 64, num_warps=8, num_stages=2, maxnreg=255),
        "fwd_40": Config(128, 64, num_warps=8, num_stages=2, maxnreg=255),
        "dq_to_128": Config(64, 32, num_warps=8, num_stages=1),
        "dq_64": Config(64, 32, num_warps=4, num_stages=2, maxnreg=128),
        "dq_64_dropout": Config(64, 32, num_warps=4, num_stages=2),
        "dq_40": Config(64, 32, num_warps=4, num_stages=2, maxnreg=255),
        "dq_56": Config(64, 32, num_warps=4, num_stages=2, maxnreg=255),
        "dkv_24": Config(32, 64, num_warps=4, num_stages=2, maxnreg=255),
        "dkv_56": Config(32, 64, num_warps=4, num_stages=2, maxnreg=255),
        "dkv_56_dropout": Config(16, 64, num_warps=4, num_stages=2),
        "dkv_24_dropout": Config(16, 64, num_warps=4, num_stages=2),
        "dq_72": Config(64, 32, num_warps=8, num_stages=2),
        "dq_80": Config(64, 32, num_warps=8, num_stages=2),
        "dq_to_112": Config(64, 32, num_warps=8, num_stages=2),
        "dq_112_dropout": Config(32, 32, num_warps=8, num_stages=2),
        "fwd_88_dropout": Config(128, 16, num_warps=8, num_stages=2),
        "fwd_small_32": Config(64, 32, num_warps=8, num_stages=2),
        "fwd_small_72_dropout": Config(64, 32, num_warps=8, num_stages=2),
        "fwd_small_104_dropout": Config(32, 32, num_warps=4, num_stages=2),
        "fwd_small_96": Config(64, 32, num_warps=8, num_stages=2),
        "fwd_small_120": Config(64, 32, num_warps=8, num_stages=1),
        "fwd_small_120_dropout": Config(64, 32, num_warps=8, num_stages=2),
        "float32": Config(32, 16, num_warps=4, num_stages=1, maxnreg=255),
    },
    90: _WGMMA
    | {
        "fwd_fewer_keys_64": Config(64, 224, num_warps=4, num_stages=3),
        "fwd_resident_64": Config(64, 256, num_warps=4, num_stages=2),
        # With two stages Triton issues a tile's load after the products of the tile before and then
        # waits for it, with nothing to hide it but other programs. So three, where no CTA is lost.
        "fwd": Config(64, 64, num_warps=4, num_stages=3),
        "fwd_long": Config(128, 64, num_warps=8, num_stages=3, maxnreg=128),
        "dq_long": Config(128, 32, num_warps=8, num_stages=3, maxnreg=128),
        "dkv": Config(32, 64, num_warps=4, num_stages=3),
        "dq_64": Config(64, 64, num_warps=4, num_stages=2, maxnreg=128),
        "dkv_even_64": Config(32, 64, num_warps=4, num_stages=3, maxnreg=128),
        "dq_long_64": Config(128, 64, num_warps=8, num_stages=3, maxnreg=128),
        # Timed at 80 alone, where 4 warps for 64 rows take half the time of 8: as many warps an SM,
        # or more, in CTAs that do not wait for each other. So in dK and dV.
        "fwd_to_128": Config(64, 64, num_warps=4, num_stages=2),
        "fwd_104": Config(64, 64, num_warps=4, num_stages=2),
        "fwd_120": Config(64, 32, num_warps=4, num_stages=3),
        "fwd_128": Config(64, 32, num_warps=4, num_stages=3),
        "fwd_long_56": Config(128, 32, num_warps=8, num_stages=3, maxnreg=128),
        "fwd_long_to_128": Config(128, 32, num_warps=8, num_stages=3, maxnreg=128),
        "fwd_long_72": Config(128, 64, num_warps=8, num_stages=3, maxnreg=128),
        "fwd_long_80": Config(128, 64, num_warps=8, num_stages=3, maxnreg=128),
        "dq_to_128": Config(64, 32, num_warps=4, num_stages=3),
        "dq_to_112": Config(64, 32, num_warps=4, num_stages=3),
        "dq_to_112_dropout": Config(64, 32, num_warps=4, num_stages=1),
        "dq_88": Config(64, 32, num_warps=4, num_stages=3),
        "dq_96": Config(64, 32, num_warps=4, num_stages=3),
        "dq_long_to_128": None,
        "dq_long_72": Config(128, 32, num_warps=8, num_stages=3, maxnreg=128),
        "dq_long_80": Config(128, 32, num_warps=8, num_stages=3, maxnreg=128),
        "dq_long_96": Config(128, 32, num_warps=8, num_stages=3, maxnreg=128),
        "dkv_to_128": Config(32, 64, num_warps=4, num_stages=3),
        "dkv_128": Config(16, 64, num_warps=4, num_stages=3),
        "dkv_128_dropout": Config(16, 64, num_warps=8, num_stages=1),
        "dkv_even_80": Config(32, 64, num_warps=4, num_stages=3, maxnreg=168),
        "dkv_even_128": Config(32, 64, num_warps=4, num_stages=3),
        "dkv_104": Config(32, 64, num_warps=4, num_stages=3),
        "dkv_120": Config(32, 64, num_warps=4, num_stages=3),
        "dkv_104_dropout": Config(16, 64, num_warps=8, num_stages=1),
        "fwd_120_dropout": Config(128, 32, num_warps=8, num_stages=2),
        "dq_88_dropout": Config(64, 32, num_warps=8, num_stages=1),
        "fwd_fewer_keys_72": Config(64, 32, num_warps=4, num_stages=1, maxnreg=96),
        "fwd_72_dropout": Config(128, 32, num_warps=8, num_stages=2),
        "fwd_64_dropout": Config(64, 32, num_warps=4, num_stages=3),
        "dq_64_dropout": Config(64, 64, num_warps=4, num_stages=3),
        "fwd_80_dropout": Config(128, 64, num_warps=8, num_stages=2),
        "fwd_88_dropout": Config(64, 32, num_warps=4, num_stages=3),
        # With two stages ptxas has each wgmma of these two wait for the one before.
        "dkv_dropout": Config(32, 64, num_warps=4, num_stages=1),
        "fwd_96_dropout": Config(128, 32, num_warps=8, num_stages=1),
        "fwd_104_dropout": Config(128, 16, num_warps=8, num_stages=2),
        "fwd_small_104_dropout": Config(64, 32, num_warps=8, num_stages=2),
        "fwd_small_120_dropout": Config(64, 64, num_warps=8, num_stages=2),
        "fwd_small_128_dropout": Config(64, 64, num_warps=8, num_stages=2),
        "dq_120": Config(64, 32, num_warps=4, num_stages=3),
        "dq_120_dropout": Config(64, 16, num_warps=8, num_stages=1),
        "dkv_120_dropout": Config(16, 32, num_warps=4, num_stages=1),
        "fwd_small_112_dropout": Config(64, 32, num_warps=4, num_stages=2),
        "fwd_128_dropout": Config(128, 32, num_warps=8, num_stages=2),
        "dq_128": Config(64, 32, num_warps=4, num_stages=1),
        "fwd_56_dropout": Config(64, 32, num_warps=4, num_stages=3),
        "fwd_resident_40": Config(64, 128, num_warps=4, num_stages=1),
        "fwd_resident_56": Config(64, 128, num_warps=8, num_stages=1),
        "fwd_resident_120": Config(64, 112, num_warps=4, num_stages=1),
        "bwd_64_keys_40": Config(64, 64, num_warps=4, num_stages=1, maxnreg=255),
        "bwd_128_keys_56": Config(32, 128, num_warps=8, num_stages=1),
    },
    100: _WGMMA
    | {
        "fwd_resident_40": Config(64, 256, num_warps=8, num_stages=1),
        "fwd_resident_56": Config(64, 128, num_warps=8, num_stages=1),
        "fwd_resident_72": Config(64, 128, num_warps=8, num_stages=1),
        "fwd_resident_88": Config(64, 128, num_warps=8, num_stages=1),
        "fwd_resident_120": Config(64, 128, num_warps=8, num_stages=1),
        "fwd_40": Config(128, 64, num_warps=8, num_stages=2),
        "fwd_80": Config(128, 64, num_warps=8, num_stages=1, maxnreg=128),
        "fwd_80_dropout": Config(128, 32, num_warps=8, num_stages=2),
        "fwd_to_128": Config(128, 64, num_warps=8, num_stages=1),
        "fwd_120": Config(128, 32, num_warps=8, num_stages=1),
        "fwd_small_120_dropout": Config(64, 32, num_warps=4, num_stages=2),
        "fwd_72_dropout": Config(128, 32, num_warps=8, num_stages=2),
        "fwd_128": Config(128, 64, num_warps=8, num_stages=1, maxnreg=255),
        "dkv_80_dropout": Config(32, 64, num_warps=8, num_stages=1, maxnreg=255),
        "dkv_128_dropout": Config(16, 64, num_warps=8, num_stages=1, maxnreg=255),
    },
    120: _MMA
    | {
        "fwd_resident_64": Config(32, 224, num_warps=4, num_stages=1),
        "fwd_resident_56": Config(32, 160, num_warps=8, num_stages=1),
        "fwd_resident_48": Config(32, 208, num_warps=4, num_stages=1),
        "fwd_resident_40": Config(32, 176, num_warps=4, num_stages=1, maxnreg=255),
        "fwd_resident_32": Config(32, 224, num_warps=4, num_stages=1, maxnreg=255),
        "fwd_resident_24": Config(32, 224, num_warps=4, num_stages=1, maxnreg=255),
        "fwd_32": Config(128, 64, num_warps=8, num_stages=2, maxnreg=255),
        "fwd_40": Config(128, 64, num_warps=8, num_stages=2, maxnreg=255),
        "fwd_80": Config(128, 32, num_warps=8, num_stages=2, maxnreg=255),
        "fwd_104": Config(64, 32, num_warps=8, num_stages=2),
        "fwd_112": Config(64, 32, num_warps=8, num_stages=2),
        "fwd_small_112": Config(64, 32, num_warps=8, num_stages=2),
        "fwd_small_72": Config(64, 32, num_warps=8, num_stages=2),
        "fwd_small_88_dropout": Config(32, 32, num_warps=4, num_stages=2),
        "fwd_small_104": Config(32, 32, num_warps=4, num_stages=2),
        "fwd_small_120": Config(32, 32, num_warps=4, num_stages=2),
        "fwd_small_16_dropout": Config(64, 32, num_warps=4, num_stages=1),
        "fwd_88_dropout": Config(128, 16, num_warps=8, num_stages=2),
        "dq_32_dropout": Config(64, 32, num_warps=8, num_stages=2),
        "dq_64": Config(64, 32, num_warps=4, num_stages=2, maxnreg=168),
        "dq_64_dropout": Config(64, 32, num_warps=4, num_stages=2, maxnreg=255),
        "dq_40": Config(64, 32, num_warps=4, num_stages=2, maxnreg=255),
        "dq_40_dropout": Config(64, 32, num_warps=8, num_stages=2),
        "dq_112": Config(32, 32, num_warps=8, num_stages=2),
        "dq_128": Config(64, 32, num_warps=8, num_stages=2, maxnreg=255),
        "dkv_80_dropout": Config(16, 64, num_warps=8, num_stages=2),
        "dkv_24": Config(32, 64, num_warps=4, num_stages=1),
        "dkv_48": Config(32, 64, num_warps=4, num_stages=2, maxnreg=255),
        "dkv_48_dropout": Config(16, 64, num_warps=4, num_stages=2),
        "fwd_small_104_dropout": Config(32, 32, num_warps=4, num_stages=2, maxnreg=255),
        "dkv_24_dropout": Config(16, 64, num_warps=4, num_stages=2),
        "dkv_56": Config(32, 64, num_warps=8, num_stages=2),
        "dkv_56_dropout": Config(32, 64, num_warps=8, num_stages=1),
        "dkv_80": Config(32, 64, num_warps=8, num_stages=1),
        "dkv_88": Config(16, 32, num_warps=8, num_stages=1),
        "dkv_88_dropout": Config(16, 32, num_warps=8, num_stages=2),
        "dkv_96": Config(16, 32, num_warps=4, num_stages=1),
        "float32": Config(16, 16, num_warps=4, num_stages=1, maxnreg=255),
    },
}


# Head dims at which ptxas, unless maxnreg bounds it, spills registers to fit one more CTA on an SM:
# as a number in the kernels of `attention` and its maps, as a string in the one kernel it names.
BOUNDED: dict[int, tuple[int | str, ...]] = {
    DEFAULT: (),
    100: (16, 24, 32, 40, 48, 56, 72, 88, 96, 104, 112, 120),
    120: ("maps_56", "qk_128"),
}

# Rows of the products that tensor cores read from shared memory. A last tile of fewer, but more
# than 16, takes mma.sync: in forward on sm_90 a third more instructions than one of 64, and for 209
# to 224 keys the shared memory of a second CTA; on sm_100 up to half again as many registers.
MMA_ROWS: dict[int, int] = {DEFAULT: 16, 90: 64, 100: 64}

# Up to this many keys, where heads are few and the table has "dq_beside", the programs of
# "dq_beside" and "dkv_beside" share one launch, in which each key tile computes delta itself. H200,
# D = 64, 12 heads, us for one launch / for two: 1 x 197 tokens 11 / 15, 16 x 197 54 / 41, 131 x 384
# 833 / 719.
SIDE_BY_SIDE = 384

# From this many tokens on, programs without dropout own 128 queries instead of 64, where a table
# has lines for that and every SM gets two: each key is then read from L2 half as often. With 64,
# forward on an H200 reads 5.0 TB/s of keys and values at 577 tokens and 5.5 TB/s at 1370 (bytes
# computed, times measured), about what its L2 delivers. This limit, those lines and the three
# stages of sm_90 are chosen by `benchmarks/simulate.py`, not timed.
LONG = 320


def find(
    kernel: str, D: int, dtype: torch.dtype, arch: int, dropout: bool = False
) -> Config | None:
    """The configuration of one attention kernel at head dim D; None if it does not serve there."""
    table = look_up(ATTENTION, arch)
    optional = any(word in kernel for word in ("resident", "keys", "beside", "long", "even"))
    if dtype == torch.float32 and arch != 0:
        return None if optional else table["float32"]
    widths = (f"_{D}", *("_to_112",) * (80 < D <= 112), *("_to_128",) * (D > 64), "")
    kinds = ("_dropout", "") if dropout else ("",)
    names = (kernel + width + kind for width in widths for kind in kinds)
    found = next((table[name] for name in names if name in table), None)
    maxnreg = max_registers(D, arch)
    return replace(found, maxnreg=maxnreg) if found and maxnreg else found


def config(kernel: str, D: int, dtype: torch.dtype, arch: int, dropout: bool = False) -> Config:
    """`find` of a kernel that serves: "fwd", "fwd_small", "dq" and "dkv" do so everywhere."""
    found = find(kernel, D, dtype, arch, dropout)
    assert found is not None
    return found


def mma_rows(arch: int) -> int:
    return look_up(MMA_ROWS, arch)


def max_registers(of: int | str, arch: int) -> int | None:
    """Limit of registers per thread at head dim or in kernel `of`; None: ptxas decides."""
    return 255 if of in look_up(BOUNDED, arch) else None


def maps_max_registers(D: int, device_index: int | None) -> int | None:
    """`max_registers` of the attention maps kernel."""
    part = arch(device_index)
    return max_registers(D, part) or max_registers(f"maps_{D}", part)


def qk(D: int, device_index: int | None) -> Config:
    """Tokens per block, and a head's channel pairs, padded: 1024 pairs a block, 8 per thread."""
    part, pairs = arch(device_index), triton.next_power_of_2(D // 2)
    tokens = (4096 if part == 0 else 1024) // pairs
    return Config(tokens, pairs, num_warps=4, maxnreg=max_registers(f"qk_{D}", part))


def qk_groups(blocks: int, H: int, device_index: int | None) -> int:
    """How many programs split the heads of one block of tokens: several where blocks are few."""
    return min(H, cdiv(num_sms(device_index), blocks))


def qk_run(blocks: int, device_index: int | None) -> int:
    """Blocks of tokens per program in backward: for q and k together, two waves of programs at four
    CTAs per SM.
    """
    return cdiv(2 * blocks, 8 * num_sms(device_index))


def maps_splits(programs: int, tiles: int, device_index: int | None) -> int:
    """How many programs split the keys of one block of rows, `tiles` tiles: a power of two."""
    splits = 1
    while 2 * splits <= tiles and 2 * splits * programs <= 2 * num_sms(device_index):
        splits *= 2
    return splits
