"""Checks of `fastvit.ViT`'s arguments. Every error names the argument, what came and what was
expected."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from torch import nn
from torch.fx import Proxy

from fastvit import ops
from fastvit.errors import UsageError
from fastvit.op_checks import NORMS
from fastvit.pos_embed import Grid
from fastvit.rope import FORMS

POOLS = ("cls", "mean", "max", "avgmax", "cls_mean", "map", "none")
POS_EMBEDS = ("learned", "none")
HEAD_ACTIVATIONS = {"gelu": nn.GELU, "tanh": nn.Tanh}
MLPS = ("mlp", "swiglu", "swiglu_packed")
FLAGS = (
    "class_token",
    "no_embed_class",
    "qk_norm",
    "pre_norm",
    "final_norm",
    "crop_remainder",
    "proj_bias",
    "mlp_bias",
    "dynamic_img_size",
)
RATES = ("dropout", "emb_dropout", "drop_path", "head_dropout", "patch_dropout")
OWN_RATES = ("attn_dropout", "proj_dropout", "mlp_dropout")  # None: `dropout`


def check_arguments(config: Mapping[str, Any]) -> None:
    """Raise ValueError for the first argument of `ViT` that is out of range or contradicts others.

    `image_size`, `patch_size` and `rope_grid` are checked where they become pairs.
    """

    def take(*names: str) -> dict[str, Any]:
        return {name: config[name] for name in names}

    def given(*names: str) -> dict[str, Any]:
        return {name: config[name] for name in names if config[name] is not None}

    check_sizes(1, **take("channels", "dim", "depth", "heads", "mlp_dim"))
    check_sizes(1, **given("dim_head", "head_hidden_dim"))
    check_sizes(0, **take("num_classes", "registers"))
    check_rates(**take(*RATES), **given(*OWN_RATES))
    check_positive(**take("norm_eps"), **given("layer_scale", "rope_theta"))
    check_choice(POOLS, **take("pool"))
    check_choice(POS_EMBEDS, **take("pos_embed"))
    check_choice(NORMS, **take("norm"))
    check_choice(MLPS, **take("mlp"))
    check_choice(ops.ACTIVATIONS, **take("activation"))
    check_choice(tuple(HEAD_ACTIVATIONS), **take("head_activation"))
    check_choice((True, False, "qv"), **take("qkv_bias"))
    check_choice((None, *FORMS), **take("rope"))
    check_choice((True, False), **take(*FLAGS))
    check_choice((True, False, None), **take("fc_norm", "patch_bias"))
    pool, dim, heads = config["pool"], config["dim"], config["heads"]
    if not config["class_token"] and pool in ("cls", "cls_mean"):
        raise ValueError(f"pool {pool!r} needs class_token=True")
    if config["dim_head"] is None and dim % heads:
        raise ValueError(f"dim {dim} is not a multiple of heads {heads}; pass dim_head")
    if pool == "map" and dim % heads:
        raise ValueError(f"pool 'map' needs dim {dim} to be a multiple of heads {heads}")


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """An int or a (height, width) pair as a pair of positive ints."""
    sizes = (value, value) if not isinstance(value, Iterable) else tuple(value)
    if len(sizes) != 2 or not all(_is_int(s) and s > 0 for s in sizes):
        raise ValueError(f"{name} must be a positive int or a pair of them, got {value!r}")
    return int(sizes[0]), int(sizes[1])


def check_sizes(least: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if not _is_int(size) or size < least:
            raise ValueError(f"{name} must be an int >= {least}, got {size!r}")


def check_rates(**rates: float) -> None:
    for name, rate in rates.items():
        if not _is_real(rate) or not 0.0 <= rate < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {rate!r}")


def check_positive(**values: float) -> None:
    for name, value in values.items():
        if not _is_real(value) or not 0.0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value!r}")


def check_choice(choices: tuple[Any, ...], **values: Any) -> None:
    for name, value in values.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def grid_of(
    name: str, size: tuple[int, int], patch_size: tuple[int, int], crop: bool = False
) -> Grid:
    """Return the patches per side; raise if there is a remainder that `crop` does not allow."""
    for side, word in enumerate(("height", "width")):
        if size[side] % patch_size[side] and not (crop and size[side] > patch_size[side]):
            raise ValueError(
                f"{name} {size} is not a multiple of patch_size {patch_size} in {word}"
            )
    return size[0] // patch_size[0], size[1] // patch_size[1]


def check_unmasked(attn_mask: Any, is_causal: Any) -> None:
    if isinstance(attn_mask, Proxy):  # symbolic tracing sets every argument
        raise UsageError(
            "torch.fx cannot trace a fastvit.ViT symbolically; use its forward_intermediates, "
            "torch.export or torch.compile"
        )
    if attn_mask is not None:
        raise UsageError(
            f"attn_mask must be None, got {type(attn_mask).__name__}; attention is unmasked"
        )
    if is_causal:
        raise UsageError(f"is_causal must be False, got {is_causal!r}; attention is unmasked")


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
