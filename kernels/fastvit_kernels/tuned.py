"""Launch configurations: one literal table per kernel, one look-up."""

import functools
from dataclasses import dataclass

import torch


@functools.cache
def arch(device_index: int | None = None) -> int:
    """Compute capability as one integer (90 is Hopper); 0 in the interpreter."""
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


@functools.cache
def num_sms(device_index: int | None = None) -> int:
    if not torch.cuda.is_available():
        return 4
    return torch.cuda.get_device_properties(device_index).multi_processor_count


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options of one kernel."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int = 0
    num_warps: int = 4
    num_stages: int = 2
