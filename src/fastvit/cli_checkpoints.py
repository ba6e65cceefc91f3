"""The commands `fastvit convert` and `fastvit info`, for checkpoints of any library."""

import argparse
import inspect
import logging
from pathlib import Path
from typing import Any

from fastvit.checkpoints import load_checkpoint
from fastvit.errors import UsageError
from fastvit.export import DIALECTS, export_checkpoint
from fastvit.model import ViT
from fastvit.ops import ACTIVATIONS
from fastvit.presets import PRESETS

OVERRIDES = ("heads", "image_size", "activation")
_DEFAULTS = {k: p.default for k, p in inspect.signature(ViT).parameters.items()}
_IMAGE = ("image_size", "num_classes", "dynamic_img_size", "crop_remainder", "channels")


def add_convert(commands: Any) -> None:
    """Declare `fastvit convert`."""
    parser = commands.add_parser(
        "convert",
        help="rewrite a checkpoint of any library for timm or transformers",
        description="Read a checkpoint of timm, transformers, torchvision, DINOv2, DINOv3, DeiT "
        "III, CLIP, vit_jax, big_vision or fastvit, and write it for timm or transformers.",
    )
    parser.set_defaults(run=convert)
    _add_input(parser)
    parser.add_argument(
        "out", type=Path, help="a new folder, with its config, or a new .safetensors file"
    )
    parser.add_argument("--to", required=True, choices=DIALECTS)


def add_info(commands: Any) -> None:
    """Declare `fastvit info`."""
    parser = commands.add_parser(
        "info",
        help="what a checkpoint holds",
        description="Print the dialect, the architecture and the preprocessing of a checkpoint.",
    )
    parser.set_defaults(run=info)
    _add_input(parser)


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a file, a folder, or a hub id such as owner/name")
    group = parser.add_argument_group("where neither keys nor config say it")
    group.add_argument("--heads", type=int, metavar="N")
    group.add_argument("--image-size", type=parse_size, metavar="N|HxW")
    group.add_argument("--activation", choices=ACTIVATIONS)


def convert(args: argparse.Namespace) -> int:
    """Run `fastvit convert`: write all of OUT or nothing, and never overwrite."""
    out: Path = args.out
    if out.exists():
        raise UsageError(f"{out} already exists; choose another name")
    model = _load(args)
    print(model.load_report)
    try:
        state = export_checkpoint(model, args.to, out)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error}") from error
    print(f"wrote {out}: {len(state)} tensors for {args.to}")
    return 0


def info(args: argparse.Namespace) -> int:
    """Run `fastvit info`."""
    model = _load(args)
    config, report = model.config, model.load_report
    parameters = sum(p.numel() for p in model.parameters())
    chosen = {k: v for k, v in config.items() if not _same(k, v, _DEFAULTS[k])}
    data = {k: model.default_cfg.get(k) for k in ("mean", "std", "interpolation", "crop_pct")}
    lines = {
        "checkpoint": report.source,
        "dialect": report.dialect,
        "preset": preset_of(config) or "none of this architecture",
        "parameters": f"{parameters:,} in {len(model.state_dict())} tensors",
        "classes": str(model.num_classes),
        "images": f"{_size(model)}, {', '.join(f'{k} {v}' for k, v in data.items() if v)}",
        "arguments": ", ".join(f"{k}={v!r}" for k, v in chosen.items()) or "ViT's defaults",
    }
    for name, value in lines.items():
        print(f"{name:<11}{value}")
    for line in str(report).splitlines()[1:]:
        print(line)
    return 0


def preset_of(config: dict[str, Any]) -> str | None:
    """The first preset of this architecture, ignoring image size and number of classes."""
    architecture = [k for k in _DEFAULTS if k not in (*_IMAGE, "resample", "layer_scale")]
    for name, preset in PRESETS.items():
        whole = {**_DEFAULTS, **preset}
        scaled = [c["layer_scale"] is not None for c in (whole, config)]  # with any initial value
        if scaled[0] == scaled[1] and all(_same(k, whole[k], config[k]) for k in architecture):
            return name
    return None


def _same(name: str, a: Any, b: Any) -> bool:
    """True if equal. None for fc_norm or patch_bias is a derived default and matches any value."""
    return a == b or (name in ("fc_norm", "patch_bias") and None in (a, b))


def _load(args: argparse.Namespace) -> ViT:
    given = {k: getattr(args, k) for k in OVERRIDES}
    log = logging.getLogger("fastvit")
    level = log.level
    log.setLevel(logging.ERROR)  # its report is printed instead
    try:
        return load_checkpoint(args.checkpoint, **{k: v for k, v in given.items() if v is not None})
    finally:
        log.setLevel(level)


def _size(model: ViT) -> str:
    height, width = model.patch_embed.img_size
    return f"{model.patch_embed.proj.in_channels} x {height} x {width}"


def parse_size(text: str) -> int | tuple[int, int]:
    """Parse '8' or '32x64' (height x width)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"expected N or HEIGHTxWIDTH, got {text!r}")
    sizes = [int(p) for p in parts]
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])
