"""Translate vit_jax and big_vision checkpoints, .npz files of flax parameters, into our names.

Keys have no prefix or `opt/target/`, `params/` or `params/img/`. Blocks are numbered, or scanned:
stacked along a leading depth axis. Kernels are (in, out), in attention (in, heads, head dim).
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvit.dialect_rules import Reading, tensor_of
from fastvit.errors import UsageError
from fastvit.pos_embed import JAX
from fastvit.presets import INCEPTION

PREFIXES = ("params/img/", "opt/target/", "params/", "")
Arrays = Mapping[str, np.ndarray]


def is_jax(arrays: Mapping[str, object]) -> bool:
    return any(f"{prefix}embedding/kernel" in arrays for prefix in PREFIXES)


def read_jax(arrays: Arrays) -> Reading:
    """Translate the arrays of numpy.load. Raises UsageError for keys that no ViT has."""
    prefix = next(p for p in PREFIXES if f"{p}embedding/kernel" in arrays)
    rest = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    outside = [k for k in arrays if not k.startswith(prefix)]
    rest = {k: tensor_of(k, v) for k, v in rest.items()}
    if any(k.startswith(_SCANNED) for k in rest):
        rest = _unscan(rest)
    _check_ranks(rest)
    big_vision = "pos_embedding" in rest
    state: dict[str, Tensor] = {}
    take = rest.pop

    kernel = take("embedding/kernel")
    if kernel.ndim == 2:  # a Dense over flattened (row, column, channel)
        p = round((len(kernel) / 3) ** 0.5)
        if p * p * 3 != len(kernel):
            raise UsageError(
                f"checkpoint: embedding/kernel is {tuple(kernel.shape)}, expected rows for square "
                "patches of three channels"
            )
        kernel = kernel.reshape(p, p, 3, -1)
    state["patch_embed.proj.weight"] = kernel.permute(3, 2, 0, 1)
    state["patch_embed.proj.bias"] = take("embedding/bias")
    if "cls" in rest:
        state["cls_token"] = take("cls")
    pos = take("pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding")
    if pos.shape[0] != 1:  # big_vision's NaFlex keeps the grid: (rows, columns, C)
        pos = pos.flatten(0, 1)[None]
    state["pos_embed"] = pos
    _norm(state, rest, "norm", "Transformer/encoder_norm")
    heads = None
    for i in range(_depth(rest)):
        block, ours = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        attention, mlp = (
            _numbered(rest, f"{block}{name}")
            for name in ("MultiHeadDotProductAttention", "MlpBlock")
        )
        second = "LayerNorm_2" if f"{block}LayerNorm_2/scale" in rest else "LayerNorm_1"
        _norm(state, rest, f"{ours}norm1", f"{block}LayerNorm_0")
        _norm(state, rest, f"{ours}norm2", f"{block}{second}")
        q, k, v = (_split_heads(rest, f"{block}{attention}/{n}") for n in ("query", "key", "value"))
        heads = heads or q.heads
        state[f"{ours}attn.qkv.weight"], state[f"{ours}attn.qkv.bias"] = _joined(q, k, v)
        out = f"{block}{attention}/out"
        state[f"{ours}attn.proj.weight"] = take(f"{out}/kernel").flatten(0, 1).mT
        state[f"{ours}attn.proj.bias"] = take(f"{out}/bias")
        for n in (0, 1):
            _dense(state, rest, f"{ours}mlp.fc{n + 1}", f"{block}{mlp}/Dense_{n}")
    known: dict[str, Any] = {"heads": heads, "resample": vars(JAX)}
    if not big_vision:
        known["no_embed_class"] = False
    if "MAPHead_0/probe" in rest:
        _map_head(state, rest)
    if "pre_logits/kernel" in rest:
        _dense(state, rest, "head.0", "pre_logits")
        _dense(state, rest, "head.2", "head")
        known["head_activation"] = "tanh"
    elif "head/kernel" in rest:
        _dense(state, rest, "head", "head")
    if rest:
        raise UsageError(
            f"checkpoint: read as {'big_vision' if big_vision else 'vit_jax'}, but it has the "
            f"unexpected {', '.join(prefix + k for k in rest)}"
        )
    name = "big_vision" if big_vision else "vit_jax"
    known["activation"] = "gelu_tanh"
    note = "activation 'gelu_tanh', which flax's gelu is; timm runs most such weights with 'gelu'"
    return Reading(name, state, known, outside, [note], dict(INCEPTION))


_SCANNED = "Transformer/encoderblock/"


def _unscan(rest: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, value in rest.items():
        if not name.startswith(_SCANNED):
            out[name] = value
            continue
        if not value.ndim:
            raise UsageError(f"checkpoint: {name} is (), expected depth as its first dimension")
        for i, part in enumerate(value):
            out[f"Transformer/encoderblock_{i}/{name.removeprefix(_SCANNED)}"] = part
    return out


# Allowed ranks by the end of an array's name; the first match is used.
_RANKS = (
    (r"embedding/kernel", (2, 4)),
    (r"(query|key|value|out)/kernel", (3,)),
    (r"(query|key|value)/bias", (2,)),
    (r"kernel", (2,)),
    (r"bias|scale", (1,)),
    (r"cls|pos_embedding|probe", (3,)),
)


def _check_ranks(rest: Mapping[str, Tensor]) -> None:
    for name, value in rest.items():
        ranks = next((r for end, r in _RANKS if re.fullmatch(rf"(.*/)?({end})", name)), None)
        if ranks and (value.ndim not in ranks or not value.numel()):
            raise UsageError(
                f"checkpoint: {name} is {tuple(value.shape)}, expected "
                f"{' or '.join(map(str, ranks))} dimensions, none of them 0"
            )


def _numbered(rest: Mapping[str, Tensor], name: str) -> str:
    """The numbered flax module, such as MlpBlock_0, for the path `name` of MlpBlock."""
    found = next((k for k in rest if k.startswith(f"{name}_")), None)
    if found is None:
        raise KeyError(f"{name}_*")
    return found.split("/")[2]


def _depth(rest: Mapping[str, Tensor]) -> int:
    found = [re.match(r"Transformer/encoderblock_(\d+)/", k) for k in rest]
    return 1 + max((int(m[1]) for m in found if m), default=-1)


def _norm(state: dict[str, Tensor], rest: dict[str, Tensor], ours: str, theirs: str) -> None:
    state[f"{ours}.weight"] = rest.pop(f"{theirs}/scale")
    state[f"{ours}.bias"] = rest.pop(f"{theirs}/bias")


def _dense(state: dict[str, Tensor], rest: dict[str, Tensor], ours: str, theirs: str) -> None:
    state[f"{ours}.weight"] = rest.pop(f"{theirs}/kernel").mT
    state[f"{ours}.bias"] = rest.pop(f"{theirs}/bias")


class _Part(NamedTuple):
    """q, k or v as a Linear. weight: (heads * D, C); bias: (heads * D,)."""

    weight: Tensor
    bias: Tensor
    heads: int


def _split_heads(rest: dict[str, Tensor], name: str) -> _Part:
    """Reshape kernel (C, heads, D) and bias (heads, D) to the weight and bias of a Linear."""
    kernel, bias = rest.pop(f"{name}/kernel"), rest.pop(f"{name}/bias")
    if kernel.shape[1:] != bias.shape:
        raise UsageError(
            f"checkpoint: {name}/kernel is {tuple(kernel.shape)}, its bias {tuple(bias.shape)}; "
            "expected (dim, heads, head dim) and (heads, head dim)"
        )
    return _Part(kernel.flatten(1).mT, bias.flatten(), len(bias))


def _joined(*parts: _Part) -> tuple[Tensor, Tensor]:
    shapes = [tuple(p.weight.shape) for p in parts]
    if len(set(shapes)) > 1:
        raise UsageError(f"checkpoint: query, key and value are {shapes}; expected one shape")
    return torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])


def _map_head(state: dict[str, Tensor], rest: dict[str, Tensor]) -> None:
    attention = "MAPHead_0/MultiHeadDotProductAttention_0"
    state["attn_pool.latent"] = rest.pop("MAPHead_0/probe")
    q, k, v = (_split_heads(rest, f"{attention}/{n}") for n in ("query", "key", "value"))
    state["attn_pool.q.weight"], state["attn_pool.q.bias"] = q.weight, q.bias
    state["attn_pool.kv.weight"], state["attn_pool.kv.bias"] = _joined(k, v)
    state["attn_pool.proj.weight"] = rest.pop(f"{attention}/out/kernel").flatten(0, 1).mT
    state["attn_pool.proj.bias"] = rest.pop(f"{attention}/out/bias")
    _norm(state, rest, "attn_pool.norm", "MAPHead_0/LayerNorm_0")
    for n in (0, 1):
        _dense(state, rest, f"attn_pool.mlp.fc{n + 1}", f"MAPHead_0/MlpBlock_0/Dense_{n}")
