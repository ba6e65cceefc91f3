"""Make torchvision importable with a CPU build of torch, where its C++ library cannot be loaded.

timm imports torchvision when it is installed, and the wheel on PyPI is built against CUDA torch.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None


def install() -> None:
    global _library
    spec = find_spec("torchvision")
    if _library is not None or spec is None or spec.origin is None:
        return
    # _C.so, from torchvision 0.29 on _C_stable.so.
    if not any(_loads(library) for library in Path(spec.origin).parent.glob("_C*.so")):
        _library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            _library.define(schema)


def _loads(library: Path) -> bool:
    try:
        torch.ops.load_library(library)
    except OSError:
        return False
    return True
