"""What exports to timm and to transformers share."""

import logging
from typing import NoReturn

from torch import Tensor

from fastvit.errors import UsageError
from fastvit.model import ViT
from fastvit.pos_embed import Resample

log = logging.getLogger("fastvit")
State = dict[str, Tensor]


def refuse(dialect: str, what: str) -> NoReturn:
    raise UsageError(f"export_checkpoint: {dialect} has no place for {what}")


def fit_patch_bias(dialect: str, state: State, pre_norm: bool) -> None:
    """Add a zero patch bias, or with pre_norm drop a zero one, as timm and CLIP expect."""
    weight, bias = (state.get(f"patch_embed.proj.{kind}") for kind in ("weight", "bias"))
    assert weight is not None
    if not pre_norm:
        state.setdefault("patch_embed.proj.bias", weight.new_zeros(len(weight)))
    elif bias is not None:
        if bias.any():
            refuse(dialect, "a patch bias (patch_bias) with pre_norm")
        del state["patch_embed.proj.bias"]


def note_resample(model: ViT, native: Resample, kind: str) -> None:
    if model.resample != native:
        log.warning(
            "export: at another image size than %s, %s resamples positions by %s, this model by %s",
            model.patch_embed.img_size,
            kind,
            native,
            model.resample,
        )
