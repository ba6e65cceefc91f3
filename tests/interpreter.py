"""Triton's interpreter, made to round as a GPU does."""

import os
from importlib.util import find_spec

import numpy as np
import torch


def round_to_bfloat16_as_a_gpu_does() -> None:
    """Patch the interpreter, which truncates float32 to bfloat16, to round to nearest as hardware
    does: truncation doubles the error. Does nothing if the interpreter is off.
    """
    if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def nearest(data, src, dst, rounding_mode):
        if (src.name, dst.name) == ("fp32", "bf16"):
            rounded = torch.from_numpy(np.array(data, dtype=np.float32)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        if (src.name, dst.name) == ("bf16", "fp32"):
            return np.left_shift(data.astype(np.uint32), 16, dtype=np.uint32)
        return convert(data, src, dst, rounding_mode)

    interpreter._convert_float = nearest
