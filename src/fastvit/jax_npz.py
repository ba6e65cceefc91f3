"""Checkpoints of vit_jax and big_vision: .npz files of flax parameters, read into our names.

Four styles: bare names, `opt/target/`, `params/`, `params/img/`; blocks numbered, or scanned with
depth as a leading axis. Kernels are (in, out), heads split off: (in, heads, head dim).
"""

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fastvit.dialects import INCEPTION, Reading, tensor_of
from fastvit.errors import UsageError
from fastvit.pos_embed import JAX

PREFIXES = ("params/img/", "opt/target/", "params/", "")
Arrays = Mapping[str, np.ndarray]


def is_jax(arrays: Mapping[str, object]) -> bool:
    return any(f"{prefix}embedding/kernel" in arrays for prefix in PREFIXES)


def read_jax(arrays: Arrays) -> Reading:
    """arrays: what numpy.load gives. Raises UsageError for keys that do not belong to a ViT."""
    prefix = next(p for p in PREFIXES if f"{p}embedding/kernel" in arrays)
    rest = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    outside = [k for k in arrays if not k.startswith(prefix)]
    rest = {k: tensor_of(k, v) for k, v in rest.items()}
    if "Transformer/encoderblock/LayerNorm_0/scale" in rest:
        rest = _unscan(rest)
    big_vision = "pos_embedding" in rest
    state: dict[str, Tensor] = {}
    take = rest.pop

    kernel = take("embedding/kernel")
    if kernel.ndim == 2:  # a Dense over (row, column, channel)
        p = round((len(kernel) / 3) ** 0.5)
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
    heads = 0
    for i in range(_depth(rest)):
        block, ours = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        attention, mlp = (
            next(k for k in rest if k.startswith(f"{block}{name}_")).split("/")[2]
            for name in ("MultiHeadDotProductAttention", "MlpBlock")
        )
        second = "LayerNorm_2" if f"{block}LayerNorm_2/scale" in rest else "LayerNorm_1"
        _norm(state, rest, f"{ours}norm1", f"{block}LayerNorm_0")
        _norm(state, rest, f"{ours}norm2", f"{block}{second}")
        heads = rest[f"{block}{attention}/query/bias"].shape[0]
        q, k, v = (_split_heads(rest, f"{block}{attention}/{n}") for n in ("query", "key", "value"))
        for kind, parts in zip(("weight", "bias"), zip(q, k, v, strict=True), strict=True):
            state[f"{ours}attn.qkv.{kind}"] = torch.cat(parts)
        out = f"{block}{attention}/out"
        state[f"{ours}attn.proj.weight"] = take(f"{out}/kernel").flatten(0, 1).mT
        state[f"{ours}attn.proj.bias"] = take(f"{out}/bias")
        for n in (0, 1):
            _dense(state, rest, f"{ours}mlp.fc{n + 1}", f"{block}{mlp}/Dense_{n}")
    known = {"heads": heads, "resample": vars(JAX)}
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


def _unscan(rest: dict[str, Tensor]) -> dict[str, Tensor]:
    scanned = "Transformer/encoderblock/"
    out = {}
    for name, value in rest.items():
        if not name.startswith(scanned):
            out[name] = value
            continue
        for i, part in enumerate(value):
            out[f"Transformer/encoderblock_{i}/{name.removeprefix(scanned)}"] = part
    return out


def _depth(rest: Mapping[str, Tensor]) -> int:
    found = [re.match(r"Transformer/encoderblock_(\d+)/", k) for k in rest]
    return 1 + max((int(m[1]) for m in found if m), default=-1)


def _norm(state: dict[str, Tensor], rest: dict[str, Tensor], ours: str, theirs: str) -> None:
    state[f"{ours}.weight"] = rest.pop(f"{theirs}/scale")
    state[f"{ours}.bias"] = rest.pop(f"{theirs}/bias")


def _dense(state: dict[str, Tensor], rest: dict[str, Tensor], ours: str, theirs: str) -> None:
    state[f"{ours}.weight"] = rest.pop(f"{theirs}/kernel").mT
    state[f"{ours}.bias"] = rest.pop(f"{theirs}/bias")


def _split_heads(rest: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """(C, heads, D) and (heads, D) as the weight and the bias of a Linear."""
    return rest.pop(f"{name}/kernel").flatten(1).mT, rest.pop(f"{name}/bias").flatten()


def _map_head(state: dict[str, Tensor], rest: dict[str, Tensor]) -> None:
    attention = "MAPHead_0/MultiHeadDotProductAttention_0"
    state["attn_pool.latent"] = rest.pop("MAPHead_0/probe")
    q, k, v = (_split_heads(rest, f"{attention}/{n}") for n in ("query", "key", "value"))
    for i, kind in enumerate(("weight", "bias")):
        state[f"attn_pool.q.{kind}"] = q[i]
        state[f"attn_pool.kv.{kind}"] = torch.cat([k[i], v[i]])
    state["attn_pool.proj.weight"] = rest.pop(f"{attention}/out/kernel").flatten(0, 1).mT
    state["attn_pool.proj.bias"] = rest.pop(f"{attention}/out/bias")
    _norm(state, rest, "attn_pool.norm", "MAPHead_0/LayerNorm_0")
    for n in (0, 1):
        _dense(state, rest, f"attn_pool.mlp.fc{n + 1}", f"MAPHead_0/MlpBlock_0/Dense_{n}")
