"""Which attention kernels run on sequences of N tokens, with which tiles and how many programs.

Where all sequences have N tokens, the last tile is one power of two or the sum of two, at least 16
(`round_up`), so N = 197 costs 208 x 208 scores in forward. The share of scores that forward wastes
at head dim 64 is 39 % at N = 50, 10 % at 197, 11 % at 257, 5 % at 577, 7 % at 785, 2 % at 1029 and
3 % at 1370 on sm_90 (4 % and 1 % at 785 and 1370 where a tile of 32 rows costs half one of 64:
`mma_rows`). dQ, whose tiles of 128 queries there are whole, wastes 12 %, 14 %, 12 % and 3 % at 577,
785, 1029 and 1370.
"""

from dataclasses import dataclass
from typing import Any

import torch

from fastvit_kernels import limits, tuned, tuned_attention
from fastvit_kernels.attention_long import _attention_fwd_kernel
from fastvit_kernels.attention_long_bwd import _attention_bwd_kernel
from fastvit_kernels.attention_resident import (
    _attention_bwd_resident_kernel,
    _attention_fwd_resident_kernel,
)
from fastvit_kernels.launch import cdiv, launch
from fastvit_kernels.tuned_attention import mma_rows


@dataclass(frozen=True)
class Launch:
    """One kernel launch of a pass: its constexprs, config and programs per head."""

    kernel: Any
    programs: int
    constants: dict[str, Any]
    config: tuned.Config

    def __call__(self, heads: int, batch: int, *args: Any, **constants: Any) -> None:
        # Under torch.compile, `ops` skips this check, which would become a guard.
        if batch > limits.BATCH_MAX:
            raise RuntimeError(
                f"attention: batch {batch} is over {limits.BATCH_MAX} in compiled code; "
                "compile it under fastvit.use_backend('reference')"
            )
        launch(
            self.kernel,
            (self.programs, heads, batch),
            *args,
            **self.constants,
            **constants,
            num_warps=self.config.num_warps,
            num_stages=self.config.num_stages,
            maxnreg=self.config.maxnreg,
        )


def round_up(n: int, pieces: int, largest: int, least: int = 16) -> int:
    """The padded length of n rows: the least multiple of 16, at least n, that consists of tiles of
    `largest` and a tail of at most `pieces` powers of two: 16, or `least` and more.
    """
    n = cdiv(n, 16) * 16
    if n % least > 16:
        n = cdiv(n, least) * least
    while (n % largest).bit_count() > pieces:
        n += n & -n
    return n


@tuned.memoized
def plan_fwd(
    heads: int,
    N: int,
    D: int,
    dtype: torch.dtype,
    ragged: bool,
    arch: int,
    sms: int,
    dropout: bool = False,
) -> Launch:
    """The forward launch for `heads` = B * H heads of N tokens.

    With dropout the keys are never all held: Philox takes most of the time and many registers.
    """
    for kernel in () if ragged or dropout else ("fwd_fewer_keys", "fwd_resident"):
        resident = tuned_attention.find(kernel, D, dtype, arch)
        if resident is not None and N <= resident.BLOCK_N:
            # Few heads: one program per query tile, although each then loads all keys.
            splits = cdiv(N, resident.BLOCK_M) if heads * 2 <= sms else 1
            constants = _resident(N, resident, 2, mma_rows(arch))
            constants |= {"SPLITS": splits, "MASK_FROM": _mask_from(constants["KEYS"])}
            return Launch(_attention_fwd_resident_kernel, splits, constants, resident)
    config = tuned_attention.config("fwd", D, dtype, arch, dropout)
    long = None if dropout else _long("fwd_long", heads, N, D, dtype, arch, sms)
    if heads * cdiv(N, config.BLOCK_M) < sms:
        config = tuned_attention.config("fwd_small", D, dtype, arch, dropout)
    elif long is not None:
        config = long
    whole, spare = config is long and D > 64, D <= 64
    args = config, "N", N, ragged, 2, mma_rows(arch)
    sizes = _sizes("M", *args, always=dropout, whole=whole, spare=spare)
    return Launch(_attention_fwd_kernel, _programs(N, sizes, "M", ragged), sizes, config)


@tuned.memoized
def plan_bwd(
    heads: int,
    N: int,
    D: int,
    dtype: torch.dtype,
    ragged: bool,
    arch: int,
    sms: int,
    dropout: bool = False,
) -> list[Launch]:
    """The backward launches: one for short sequences, else dQ and delta, then dK and dV."""
    few = heads * 2 <= sms
    several = ragged or dropout or few
    for kernel in () if several else ("bwd_64_keys", "bwd_128_keys"):
        resident = tuned_attention.find(kernel, D, dtype, arch)
        if resident is not None and N <= resident.BLOCK_N:
            # Head dims of several column blocks leave no registers for a tail in two pieces; at
            # head dim 16 it is not worth a serialized wgmma.
            constants = _resident(N, resident, 2 if D in (32, 64) else 1)
            return [Launch(_attention_bwd_resident_kernel, 1, constants, resident)]
    beside = few and N <= tuned_attention.SIDE_BY_SIDE and not dropout
    beside = beside and tuned_attention.find("dq_beside", D, dtype, arch) is not None
    names = ("dq_beside", "dkv_beside") if beside else ("dq", "dkv")
    dq, dkv = (tuned_attention.config(name, D, dtype, arch, dropout) for name in names)
    long = None
    if not (dropout or beside):
        long = _long("dq_long", heads, N, D, dtype, arch, sms)
        dq = long or dq
        dkv = (None if ragged else tuned_attention.find("dkv_even", D, dtype, arch)) or dkv
    rows = mma_rows(arch)
    pieces = 2 if D <= 64 else 1  # wider tiles leave no registers for a tail in two pieces
    dq_sizes = _sizes("M", dq, "N", N, ragged, pieces, rows, "STEP_", whole=dq is long)
    dkv_sizes = _sizes("N", dkv, "M", N, ragged, pieces, rows, "STEP_", always=beside)
    programs = [_programs(N, dq_sizes, "M", ragged), _programs(N, dkv_sizes, "N", ragged)]
    if beside:
        constants = {"PART": "both"} | dq_sizes | dkv_sizes
        return [Launch(_attention_bwd_kernel, sum(programs), constants, dq)]
    to_dq = {"PART": "dq"} | dict.fromkeys(dkv_sizes, 0) | dq_sizes
    to_dkv = {"PART": "dkv"} | dict.fromkeys(dq_sizes, 0) | dkv_sizes
    return [
        Launch(_attention_bwd_kernel, programs[0], to_dq, dq),
        Launch(_attention_bwd_kernel, programs[1], to_dkv, dkv),
    ]


def _long(
    kernel: str, heads: int, N: int, D: int, dtype: torch.dtype, arch: int, sms: int
) -> tuned.Config | None:
    """The configuration of a kernel for many tokens and many programs, None for others."""
    config = tuned_attention.find(kernel, D, dtype, arch) if N >= tuned_attention.LONG else None
    fills = config is not None and heads * cdiv(N, config.BLOCK_M) >= 2 * sms
    return config if fills else None


def _resident(N: int, config: tuned.Config, pieces: int, rows: int = 16) -> dict[str, Any]:
    block_m = config.BLOCK_M
    return {
        "HAS_FULL": N >= block_m,
        "BLOCK_M": block_m,
        "TAIL_M": round_up(N % block_m, 1, block_m, min(rows, block_m)),
        "KEYS": _keys(N, pieces),
    }


def _keys(N: int, pieces: int) -> int:
    return max(32, round_up(N, pieces, 128))


def _mask_from(keys: int) -> int:
    """The most keys that all sequences padded to `keys`, in two pieces, have more of."""
    return max((n for n in range(0, keys, 16) if _keys(n, 2) < keys), default=0)


def _sizes(
    owned: str,
    config: tuned.Config,
    walked: str,
    N: int,
    ragged: bool,
    pieces: int,
    rows: int,
    step: str = "",
    always: bool = False,
    whole: bool = False,
    spare: bool = False,
) -> dict[str, int]:
    """Tile sizes of a kernel whose programs each own a block of one side (M queries or N keys) and
    loop over the other; `rows` are `mma_rows`.

    always: compile the inner tail loop even where there is no tail (it then runs zero iterations).
    Without it ptxas serializes the wgmmas of some kernels.

    Where registers are limited, for one more CTA per SM, tails must do with those of the main loop,
    at every N: the owned one has 16 rows or a whole tile, the other is walked in steps of 16.
    whole: the owned one is a whole tile, since 16 rows spill too. spare: registers suffice for any.
    """
    blocks = {"M": config.BLOCK_M, "N": config.BLOCK_N}
    limited = config.maxnreg is not None and config.maxnreg < 255 and not spare
    sizes = {}
    for side, prefix in ((owned, ""), (walked, step)):
        block = blocks[side]
        if side == walked and limited:
            tail = 16
        elif ragged or (whole and side == owned):
            tail = block if ragged or N % block else 0
        elif side == owned:
            tail = round_up(N % block, pieces, block, block if limited else min(rows, block))
        else:
            tail = round_up(N % block, pieces, block)
            tail = tail or block if always else tail
        names = (f"BLOCK_{side}", f"TAIL_{side}")
        if prefix:
            names = (f"STEP_{side}", f"STEP_TAIL_{side}")
        sizes |= dict(zip(names, (block, tail), strict=True))
    return sizes


def _programs(N: int, sizes: dict[str, int], owned: str, ragged: bool) -> int:
    block, tail = sizes[f"BLOCK_{owned}"], sizes[f"TAIL_{owned}"]
    if ragged:
        return cdiv(N, block)
    return N // block + tail // block + (tail % block).bit_count()
