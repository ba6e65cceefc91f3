"""Read image files of any format that Pillow knows."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvit.errors import UsageError, need


def read_image(
    path: Path, size: tuple[int, int], channels: int = 3, invert: bool = False
) -> Tensor:
    """Read an image upright, cropped to the aspect ratio of `size` and resized: uint8 (C, H, W)."""
    need("reading images", "PIL")
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(_eight_bits(image))
            upright = upright.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # decoders raise anything from OSError to SyntaxError
        raise UsageError(f"{path}: {_reason(error)}") from error
    height, width = size
    fitted = ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC)
    if invert:
        fitted = ImageOps.invert(fitted)
    pixels = np.array(fitted, dtype=np.uint8)
    return torch.from_numpy(pixels.reshape(height, width, channels)).permute(2, 0, 1).contiguous()


def _eight_bits(image: Any) -> Any:
    """Scale 16-bit pixels to 8 bits, since Pillow's convert would clip them. Raises ValueError for
    deeper pixels, whose white level is unknown."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        from PIL import Image

        exif = image.getexif()
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
        image.info["exif"] = exif.tobytes()
    elif mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {mode!r}, which has no white; save it as 8 bits")
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return f"cannot be read as an image ({type(error).__name__}: {error})"
