"""Load checkpoints of any library into `fastvit.ViT`; `fastvit.export` is the way back."""

import inspect
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvit.arguments import check_sizes, pair
from fastvit.checkpoint_files import Source, read_source
from fastvit.dialect_rules import EVA_POOL, Reading
from fastvit.dialects import read
from fastvit.errors import UsageError
from fastvit.jax_npz import is_jax, read_jax
from fastvit.model import TIMM_POOLS, ViT
from fastvit.plain import bare_name
from fastvit.pos_embed import Resample, resample_patches, resample_positions
from fastvit.presets import DATA, PRESETS
from fastvit.saving import FORMAT, VERSION
from fastvit.shapes import check_complete, infer
from fastvit.timm_kwargs import translate

State = dict[str, Tensor]
# timm models that are not presets but plain ViTs, so that tensor shapes give the architecture.
# Heads of those among them whose sizes suggest another number.
_HEADS_OF = {"vit_giant_patch16_radio_v3": 24, "test_vit": 2, "test_vit2": 2}
# Other timm models use the same tensor names but compute something else (post-norm, other RoPE).
PLAIN = (
    *("flexivit_*", "vit_*_gap_*", "vit_*_clip_*", "vit_*_plus_???", "vit_*_miil", "vit_*_36x1_*"),
    *("vit_*_tipsv2", "vit_*_radio_v?", "vit_intern300m_*", "vit_so150m_*", "vit_*_siglip_*"),
    *("vit_*_lingbot", "eva_large_*", "test_vit", "test_vit2", "test_vit4"),
)
# Arguments that tensors do not show: `load_weights` keeps the model's and notes a difference.
NOT_IN_TENSORS = (
    "norm_eps",
    "activation",
    "heads",
    "rope",
    "rope_theta",
    "head_activation",
    "pool",
)
# timm argument that a config sets to None -> the arguments of its preset that this resets.
_NONE_RESETS: dict[str, dict[str, Any]] = {
    "ref_feat_shape": {"rope_grid": None},
    "norm_layer": {"norm_eps": 1e-6},
    "act_layer": {"activation": "gelu"},
    "init_values": {"layer_scale": None},
    "pos_embed": {"pos_embed": "none"},
}
# Arguments that take ViT's defaults where a complete config does not name them.
_DEFAULT = ("class_token", "pos_embed", "no_embed_class", "norm")
_DEFAULT += ("qkv_bias", "proj_bias", "mlp_bias")
_SIGNATURE = inspect.signature(ViT).parameters
log = logging.getLogger("fastvit")


@dataclass
class LoadReport:
    """What `load_checkpoint` or `load_weights` read, adapted and left out; `print` shows it."""

    source: str
    dialect: str
    adapted: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    projection: bool = False  # the head gives embeddings, as in CLIP, and no classes

    def __str__(self) -> str:
        lines = [f"{self.source}: read as {self.dialect}"]
        lines += [f"adapted: {line}" for line in self.adapted]
        lines += [f"note: {line}" for line in self.notes]
        if self.dropped:
            some = ", ".join(self.dropped[:4])
            more = f" and {len(self.dropped) - 4} more" if len(self.dropped) > 4 else ""
            lines.append(f"left out: {some}{more}")
        return "\n".join(lines)


def load_checkpoint(source: str | Path | Mapping[str, Any], **kwargs: Any) -> ViT:
    """Build a `fastvit.ViT` with the weights of `source`, in eval mode, float32, on the CPU.

    source: a file (.safetensors; .pth, .pt, .bin, read with weights_only=True; .npz; the index of
    shards), a folder of `save_pretrained` or of `fastvit train`, a hub id ("timm/...",
    "facebook/dinov2-base"; the cache and HF_HUB_OFFLINE are respected), or a state dict. If it
    holds two ViTs, the teacher or the averaged weights are taken. Dialect and architecture come
    from keys, shapes and the config beside the weights. kwargs, under timm's names or ours,
    override them: tensors are adapted to other num_classes, image_size or channels as timm does.
    Changes are logged to "fastvit" and kept in `model.load_report`. Raises UsageError, a
    ValueError, for what cannot be loaded.
    """
    read_from = read_source(source)
    reading, arguments = interpret(read_from, kwargs)
    override = translate(kwargs, arguments)
    if reading.dialect == "timm" and not read_from.config:
        _note_assumed(reading, arguments, override)
    try:
        # Random initialization is slow for large models, and would be overwritten.
        with torch.device("meta"):
            model = ViT(**{**arguments, **override})
        model.to_empty(device="cpu")
    except (TypeError, ValueError) as error:
        raise UsageError(f"checkpoint: {read_from.name}: {error}") from error
    channels = model.patch_embed.proj.in_channels
    for name in ("mean", "std"):
        value = reading.data.get(name)
        if value is None:
            continue
        numbers = isinstance(value, tuple) and all(isinstance(v, (int, float)) for v in value)
        if not numbers or (name == "std" and min(value, default=1) <= 0):
            kind = "positive numbers" if name == "std" else "numbers"
            raise UsageError(
                f"checkpoint: {read_from.name}: its config's {name} must be {kind}, got {value!r}"
            )
        if len(value) != channels:
            del reading.data[name]
            default = model.default_cfg[name]
            reading.notes.append(f"{name} {value} is not of {channels} channels; {default} taken")
    may_lack = {name for name, _ in model.head.named_parameters(prefix="head")}
    if _fit(model, reading, arguments, read_from.name, may_lack, head="fresh"):
        model.reset_head()
    reading.data["input_size"] = (channels, *model.patch_embed.img_size)
    model.default_cfg.update(reading.data, num_classes=model.num_classes)
    return model.eval()


def _note_assumed(reading: Reading, arguments: dict[str, Any], override: dict[str, Any]) -> None:
    """Note which arguments were assumed, as keys and shapes of a timm state dict lack them."""
    names = [n for n in ("norm_eps", "activation", "pool") if n not in override]
    defaults = {"norm_eps": 1e-6, "activation": "gelu"}
    said = [f"{n} {arguments.get(n, defaults.get(n))!r}" for n in names]
    if said:
        reading.notes.append(f"no config: {', '.join(said)} assumed; pass what is otherwise")


def load_weights(
    model: ViT, source: str | Path | Mapping[str, Any], strict: bool = True
) -> LoadReport:
    """Copy the weights of `source` into an existing model. source: as for `load_checkpoint`.

    Where the source leaves its architecture open, the model's own arguments decide. Position table,
    patch kernel and channels are adapted to the model. strict: missing or unexpected keys raise one
    UsageError that lists them; but a head may be missing, or is skipped if it is for another number
    of classes, and the model then keeps its own. What was adapted, and settings that differ between
    checkpoint and model without showing in tensors (norm_eps, activation, ...), are logged and
    returned. Nothing is written unless everything fits.
    """
    if not isinstance(model, ViT):
        raise TypeError(f"model must be a fastvit.ViT, got {type(model).__name__}")
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("model is on the meta device; call model.to_empty(device=...) first")
    read_from = read_source(source)
    own = {k: model.config[k] for k in ("heads", "no_embed_class", "rope", "pos_embed", "channels")}
    own.update(image_size=model.patch_embed.img_size, **({} if strict else {"num_classes": None}))
    reading, arguments = interpret(read_from, own)
    may_lack = {k for k in _tensors(model) if k.startswith("head.") or not strict}
    for name in NOT_IN_TENSORS:
        theirs, mine = reading.known.get(name, model.config[name]), model.config[name]
        if theirs != mine:
            reading.notes.append(f"{name} is {theirs!r} there and stays {mine!r} here")
    _fit(model, reading, arguments, read_from.name, may_lack, strict)
    return model.load_report


def interpret(source: Source, kwargs: Mapping[str, Any]) -> tuple[Reading, dict[str, Any]]:
    """Read a source into tensors under our names and the `ViT` arguments they belong to."""
    config = source.config or _settings_in(source.state)
    try:
        return _interpret(source, config, kwargs)
    except UsageError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if not config:
            raise
        raise UsageError(f"checkpoint: {source.name}: its config is malformed: {error}") from error


def _interpret(
    source: Source, config: dict[str, Any], kwargs: Mapping[str, Any]
) -> tuple[Reading, dict[str, Any]]:
    ours = config.get("format") == FORMAT and isinstance(config.get("model"), dict)
    timm = "architecture" in config and "pretrained_cfg" in config
    if is_jax(source.state):
        try:
            reading = read_jax({k: np.asarray(v) for k, v in source.state.items()})
        except KeyError as error:
            raise UsageError(f"checkpoint: {source.name} lacks {error}") from error
    else:
        given = {} if ours or timm else dict(config)
        if channels := kwargs.get("channels", kwargs.get("in_chans")):
            given["channels"] = channels
        reading = read(source.state, given)
    if ours:
        if config.get("version") != VERSION:
            raise UsageError(
                f"checkpoint: {source.name}: its config is of version {config.get('version')!r}, "
                f"expected {VERSION}"
            )
        reading.dialect = "fastvit"
        pairs = {k: tuple(v) for k, v in config["model"].items() if isinstance(v, list)}
        reading.known = _with_defaults({**config["model"], **pairs})
        stated = {k: config.get(k) for k in ("mean", "std")}
        reading.data = {k: tuple(v) for k, v in stated.items() if isinstance(v, list)}
        if isinstance(config.get("classes"), list):
            reading.data["label_names"] = config["classes"]  # timm's word
    elif timm:
        _timm_config(reading, config)
    if isinstance(names := config.get("id2label"), Mapping):
        reading.data["label_names"] = [names[i] for i in sorted(names, key=int)]
    if not ours and not timm:
        _read_preprocessing(reading, source.preprocessor, config.get("preprocess_cfg") or {})
    heads = kwargs.get("heads", kwargs.get("num_heads"))
    hints = {} if heads is None else {"heads": heads}
    size = kwargs.get("image_size", kwargs.get("img_size"))
    try:
        check_sizes(1, **hints)
        size = None if size is None else pair("image_size", size)
    except ValueError as error:
        raise UsageError(f"checkpoint: {error}") from error
    if reading.dialect == "timm" and "pos_embed" not in reading.state:
        if not {"rope", "pos_embed"} & {*reading.known, *kwargs}:
            raise UsageError(
                f"checkpoint: {source.name} has no position table, so its positions are in "
                "computed rotations, of which the tensors say nothing; pass rope= with "
                "rope_theta=, or pos_embed='none' for a model without positions"
            )
    if reading.head_without_bias and "head.weight" in reading.state:
        weight = reading.state["head.weight"]
        reading.state.setdefault("head.bias", weight.new_zeros(len(weight) if weight.ndim else 0))
    check_complete(reading.state, {k: v for k, v in reading.known.items() if k not in kwargs})
    wanted = {"image_size": size, "no_embed_class": kwargs.get("no_embed_class")}
    arguments, notes = infer(reading.state, {**reading.known, **hints}, wanted)
    reading.notes = [*source.notes, *reading.notes, *notes]
    return reading, arguments


def _read_preprocessing(
    reading: Reading, preprocessor: Mapping[str, Any], open_clip: Mapping[str, Any]
) -> None:
    """Take mean, std and interpolation from transformers' or open_clip's config, if given."""
    resample = {2: "bilinear", 3: "bicubic"}.get(preprocessor.get("resample", 0))  # Pillow's
    found = {
        "mean": preprocessor.get("image_mean", open_clip.get("mean")),
        "std": preprocessor.get("image_std", open_clip.get("std")),
        "interpolation": resample or open_clip.get("interpolation"),
    }
    for name, value in found.items():
        if isinstance(value, (list, str)):
            reading.data[name] = tuple(value) if isinstance(value, list) else value


def _settings_in(state: Mapping[str, Any]) -> dict[str, Any]:
    """The config in a state.pt of `fastvit train`, which holds the run's settings, or {}."""
    settings = state.get("settings")
    model = settings.get("model") if isinstance(settings, Mapping) else None
    if not isinstance(model, Mapping) or not model.keys() <= _SIGNATURE.keys():
        return {}
    details = {k: state[k] for k in ("classes", "mean", "std") if k in state}
    return {"format": FORMAT, "version": VERSION, "model": dict(model), **details}


def _with_defaults(known: dict[str, Any]) -> dict[str, Any]:
    """Fill in ViT's defaults in the arguments of a complete config."""
    known = {**{n: _SIGNATURE[n].default for n in _DEFAULT}, **known}
    if known.get("patch_bias") is None:
        known["patch_bias"] = not known.get("pre_norm", False)
    return known


def _timm_config(reading: Reading, config: Mapping[str, Any]) -> None:
    """Add what timm's config.json says beyond shapes: preset, arguments, preprocessing."""
    architecture = config["architecture"].partition(".")[0]
    preset = PRESETS.get(architecture, {})
    if not preset:
        if "rope" in architecture or not any(fnmatch(architecture, p) for p in PLAIN):
            raise UsageError(
                f"checkpoint: timm's {architecture!r} is not among the models that fastvit knows, "
                "and the names of its tensors do not tell what it computes. Where it is a plain "
                "ViT, pass its state dict alone"
            )
        reading.notes.append(f"{architecture!r} is no preset of fastvit; taken from the shapes")
        if architecture in _HEADS_OF:
            reading.known["heads"] = _HEADS_OF[architecture]
    given = config.get("model_args") or {}
    try:
        args = translate({k: v for k, v in given.items() if v is not None}, preset)
    except ValueError as error:
        raise UsageError(f"checkpoint: {architecture}: {error}") from error
    if "attn_pool.latent" in reading.state and (
        preset.get("rope") or preset.get("qkv_bias") == "qv"
    ):
        raise UsageError(f"checkpoint: {architecture}: {EVA_POOL}")
    if preset:  # complete: what was inferred from the keys alone was a guess
        reading.known = {k: v for k, v in reading.known.items() if k == "head_activation"}
    # RADIO has no final norm; a preset has one, unless the arguments say otherwise.
    known = {**reading.known, **(preset or {"final_norm": False})}
    for name in (k for k, v in given.items() if v is None):
        known.update(_NONE_RESETS.get(name, {}))
    known.update(args)
    known = _with_defaults(known) if preset else known
    if config.get("num_classes"):
        known["num_classes"] = config["num_classes"]
    pretrained = config.get("pretrained_cfg") or {}
    size = pretrained.get("input_size")
    if size and "image_size" not in args:
        known["image_size"] = tuple(size[1:])
    pool = config.get("global_pool") or pretrained.get("global_pool")
    if pool and "pool" not in args:
        known["pool"] = TIMM_POOLS.get(pool, pool)
    reading.known = known
    reading.data.update(DATA.get(architecture, {}))
    for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode", "tag", "label_names"):
        value = pretrained.get(name)
        if value is not None:
            reading.data[name] = tuple(value) if isinstance(value, list) else value
    reading.data["architecture"] = architecture


def _fit(
    model: ViT,
    reading: Reading,
    arguments: Mapping[str, Any],
    name: str,
    may_lack: set[str],
    strict: bool = True,
    head: str = "left as it was",
) -> set[str]:
    """Adapt the tensors to the model, check every key and shape, then copy.

    Returns the absent keys that `may_lack` allows. head: how the report describes a head that the
    checkpoint did not fill.
    """
    report = LoadReport(name, reading.dialect, [], reading.dropped, reading.notes)
    report.projection = reading.head_without_bias and "head.weight" in reading.state
    expected = _tensors(model)
    state = adapt(reading.state, model, arguments, report.adapted)
    lacking = expected.keys() - state.keys()
    unexpected = sorted(state.keys() - expected.keys())
    missing = sorted(lacking - may_lack)
    wrong = [
        f"{k} is {tuple(state[k].shape)}, expected {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    problems = []
    if missing:
        without = (
            "; without a final norm it is final_norm=False" if "norm.weight" in missing else ""
        )
        problems.append(f"it lacks {', '.join(missing)}{without}")
    if unexpected and strict:
        problems.append(f"it has the unexpected {', '.join(unexpected)}")
    problems += wrong
    if problems:
        raise UsageError(f"checkpoint: {name}, read as {reading.dialect}: {'; '.join(problems)}")
    if unexpected:
        report.dropped = [*report.dropped, *unexpected]
    if any(k.startswith("head.") for k in lacking):
        report.adapted.append(f"head: {head}, for {model.num_classes} classes")
    if left := sorted(k for k in lacking if not k.startswith("head.")):
        report.adapted.append(f"left as they were: {', '.join(left)}")
    with torch.no_grad():
        for key, tensor in expected.items():
            if key in state:
                tensor.copy_(state[key])
    model.load_report = report
    for line in (*report.adapted, *report.notes):
        log.warning("%s: %s", name, line)
    return lacking & expected.keys()


def _tensors(model: ViT) -> State:
    """The model's tensors, without the names that wrappers insert, such as `_orig_mod`."""
    return {bare_name(k): v for k, v in model.state_dict().items()}


def adapt(state: State, model: ViT, arguments: Mapping[str, Any], changes: list[str]) -> State:
    """Adapt the tensors of a ViT of `arguments` to `model`, as timm does.

    Channels are summed or repeated, the patch kernel and the position table resampled, a head for
    other classes left out, the final norm put before or after the pooling. changes: the list that
    gets a line for each change.
    """
    out = dict(state)
    stem = model.patch_embed
    kernel = out["patch_embed.proj.weight"]
    if kernel.shape[1] != stem.proj.in_channels:
        changes.append(f"channels: {kernel.shape[1]} to {stem.proj.in_channels}")
        kernel = adapt_channels(_at_least_float32(kernel), stem.proj.in_channels)
    if tuple(kernel.shape[-2:]) != stem.patch_size:
        changes.append(f"patch_size: {tuple(kernel.shape[-2:])} to {stem.patch_size}")
        kernel = resample_patches(_at_least_float32(kernel), stem.patch_size, Resample())
    out["patch_embed.proj.weight"] = kernel
    if "pos_embed" in out and model.pos_embed is not None:
        _adapt_positions(out, model, arguments, changes)
    own = _tensors(model)
    for name in ("head.weight", "head.0.weight", "head.2.weight"):
        if name in out and (name not in own or len(out[name]) != len(own[name])):
            changes.append(
                f"head: the checkpoint's, for {arguments['num_classes']} classes, left out"
            )
            out = {k: v for k, v in out.items() if not k.startswith("head.")}
    for have, want in (("norm", "fc_norm"), ("fc_norm", "norm")):
        if f"{want}.weight" in own and f"{want}.weight" not in out and f"{have}.weight" in out:
            changes.append(f"{have} taken for {want}")
            for kind in ("weight", "bias"):
                if f"{have}.{kind}" in out:
                    out[f"{want}.{kind}"] = out.pop(f"{have}.{kind}")
    if model.attn_pool is None and "attn_pool.latent" in out:
        changes.append(f"attention pooling left out, for pool {model.pool!r}")
        out = {k: v for k, v in out.items() if not k.startswith("attn_pool.")}
    return out


def _adapt_positions(
    out: State, model: ViT, arguments: Mapping[str, Any], changes: list[str]
) -> None:
    size, patch = (pair(name, arguments[name]) for name in ("image_size", "patch_size"))
    old, new = (size[0] // patch[0], size[1] // patch[1]), model.patch_embed.grid_size
    alone = bool(arguments.get("no_embed_class"))
    prefix = 0 if alone else arguments["registers"] + bool(arguments["class_token"])
    own, table = out["pos_embed"][0].tensor_split([prefix])
    if old != new:
        changes.append(f"positions: grid {old} to {new} ({model.resample})")
        own, table = _at_least_float32(own), _at_least_float32(table)
        table = resample_positions(table, old, new, model.resample)
    if model.no_embed_class and prefix:
        tokens = [t for t in ("cls_token", "reg_token") if t in out]
        for token, pos in zip(tokens, own.split([out[t].shape[1] for t in tokens]), strict=True):
            out[token] = out[token] + pos[None]
        own = own[:0]
    elif not model.no_embed_class and alone and model.num_prefix_tokens:
        own = table.new_zeros(model.num_prefix_tokens, table.shape[1])
    out["pos_embed"] = torch.cat([own, table])[None]


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def adapt_channels(kernel: Tensor, channels: int) -> Tensor:
    """As timm: sum the channels to get one, else repeat them and scale by old / new."""
    if channels == 1:
        return kernel.sum(dim=1, keepdim=True)
    old = kernel.shape[1]
    repeated = kernel.repeat(1, math.ceil(channels / old), 1, 1)[:, :channels]
    return repeated * (old / channels)
