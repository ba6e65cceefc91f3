"""What the readers of `dialects` share: their result, key patterns and postprocessing."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvit.errors import UsageError
from fastvit.pos_embed import Resample
from fastvit.shapes import check_tensors

State = dict[str, Tensor]
Config = Mapping[str, Any]
Rules = list[tuple[str, str | None]]
Ranks = dict[str, tuple[int, ...]]
EVA_POOL = (
    "the attention pooling of timm's Eva reads <cls> and registers too, fastvit's the patches alone"
)


@dataclass
class Reading:
    """A checkpoint under our names. known: `fastvit.ViT` arguments fixed by its config or dialect;
    dropped: keys without a counterpart in a ViT; notes: what was folded or guessed; data: image
    preprocessing."""

    dialect: str
    state: State
    known: dict[str, Any] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    head_without_bias: bool = False  # the head is a projection, as in CLIP


# Tensors that nearly every dialect has outside its blocks, and their allowed ranks.
ALWAYS: Ranks = {"cls_token": (3,), "pos_embed": (3,), "patch_embed.proj.bias": (1,)}
BIASED: dict[str, Any] = dict(qkv_bias=True, proj_bias=True, mlp_bias=True)
PARAM = r"(weight|bias)"
BLOCK = r"blocks\.(\d+)\."


def refuse_distilled(state: State, token: str) -> None:
    if token in state:
        raise UsageError(
            f"checkpoint: a distilled DeiT (key {token!r}) has two heads, which "
            "fastvit.ViT does not hold"
        )


def finish(
    dialect: str,
    state: State,
    outside: State,
    rules: Rules,
    known: dict[str, Any],
    data: dict[str, Any],
    always: Ranks | None = None,
) -> Reading:
    """Rename each key by the first pattern that matches all of it. Raises UsageError for keys that
    no pattern matches, and for tensors of `always` that are missing or of another rank."""
    patterns = [(re.compile(pattern), new) for pattern, new in rules]
    reading = Reading(dialect, {}, known, list(outside), data=dict(data))
    unknown = []
    for key, value in state.items():
        for pattern, new in patterns:
            match = pattern.fullmatch(key)
            if match is None:
                continue
            if new is None:
                reading.dropped.append(key)
            else:
                reading.state[match.expand(new)] = value
            break
        else:
            unknown.append(key)
    if unknown:
        raise UsageError(
            f"checkpoint: read as {dialect}, but it has the unexpected {', '.join(unknown)}"
        )
    lacking = [name for name in always or () if name not in reading.state]
    if lacking:
        raise UsageError(f"checkpoint: read as {dialect}, but it lacks {', '.join(lacking)}")
    check_tensors(reading.state, always)
    return reading


def adopt_head(reading: Reading, outside: State, name: str) -> None:
    """Take the Linear `name` outside the backbone, if it is there, as the head."""
    for kind in ("weight", "bias"):
        if f"{name}.{kind}" in outside:
            reading.state[f"head.{kind}"] = outside[f"{name}.{kind}"]
            reading.dropped.remove(f"{name}.{kind}")


def is_bare(config: Config) -> bool:
    """True if no config came with the tensors; `channels` is from the caller."""
    return not config.keys() - {"channels"}


def tensor_of(name: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # bfloat16, which numpy lacks
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).float()
    if array.dtype.kind not in "fiu":
        raise UsageError(f"checkpoint: {name} has dtype {array.dtype}, expected numbers")
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def options_of(how: Resample) -> dict[str, Any]:
    return {k: v for k, v in vars(how).items() if v != getattr(Resample(), k)}


def fold_prefix(reading: Reading, registers: bool) -> None:
    """With registers, DINOv2 adds positions to <cls> and patches only: fold <cls>'s into it."""
    if registers:
        cls, pos = (reading.state[name] for name in ("cls_token", "pos_embed"))
        if not pos.shape[1] or cls.shape != pos[:, :1].shape:
            raise UsageError(
                f"checkpoint: cls_token is {tuple(cls.shape)}, pos_embed {tuple(pos.shape)}; "
                "expected (1, 1, dim) and a row for each patch and one for <cls>"
            )
        reading.state["cls_token"] = reading.state["cls_token"] + pos[:, :1]
        reading.state["pos_embed"] = pos[:, 1:]
        reading.known["no_embed_class"] = True


def concat_parts(
    state: State,
    parts: tuple[str, ...],
    name: str,
    within: str = "mlp.fc1.",
    bare_keys: bool = False,
) -> None:
    """Concatenate blocks.i.attn.{q, k, v}.* to blocks.i.attn.qkv.*, or likewise other parts.

    bare_keys: k may lack a bias; those of q and v then become q_bias and v_bias.
    """
    for i in sorted({k.split(".")[1] for k in state if k.startswith("blocks.")}, key=int):
        block = f"blocks.{i}."
        for kind in ("weight", "bias"):
            found = {p: state.pop(f"{block}{within}{p}.{kind}", None) for p in parts}
            tensors = {p: t for p, t in found.items() if t is not None}
            if len({tuple(t.shape) for t in tensors.values()}) > 1:
                shapes = ", ".join(f"{p} {tuple(t.shape)}" for p, t in tensors.items())
                raise UsageError(
                    f"checkpoint: {block}{within}*.{kind} are {shapes}; expected one shape"
                )
            if len(tensors) == len(parts):
                state[f"{block}{name}.{kind}"] = torch.cat([*tensors.values()])
            elif bare_keys and kind == "bias" and tensors.keys() == {"q", "v"}:
                state[f"{block}attn.q_bias"], state[f"{block}attn.v_bias"] = tensors.values()
            elif tensors:
                lacking = ", ".join(f"{block}{within}{p}.{kind}" for p in parts if p not in tensors)
                raise UsageError(f"checkpoint: it lacks {lacking}")
