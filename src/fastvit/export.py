"""Export a `fastvit.ViT` under the tensor names, and as the files, of timm and transformers."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save

from fastvit.checkpoint_files import CONFIGS, PREPROCESSOR, SUFFIXES, WEIGHTS
from fastvit.errors import UsageError
from fastvit.export_hf import preprocessor, to_hf
from fastvit.export_rules import State
from fastvit.export_timm import timm_config, to_timm
from fastvit.model import ViT
from fastvit.saving import current_architecture, json_value, replacing, replacing_folder, weights_of

DIALECTS = ("timm", "hf")
# Files of a checkpoint or a run.
_TAKEN = (*WEIGHTS, *CONFIGS, PREPROCESSOR, "model.json", "state.pt")


def export_checkpoint(model: ViT, dialect: str, path: str | Path | None = None) -> State:
    """Return the model's tensors under the keys of `dialect`, "timm" or "hf"; save them to `path`.

    A path that ends in .safetensors gets the tensors alone; any other becomes a folder with
    config.json and model.safetensors, for `timm.create_model("local-dir:PATH")` or transformers'
    `from_pretrained(PATH)`, with a preprocessor_config.json. "hf" is ViT, Dinov2,
    Dinov2WithRegisters, DINOv3ViT, SiglipVision or CLIPVision, whichever can represent this model.
    Raises UsageError if the dialect cannot, or if `path` already holds a checkpoint; only a
    .safetensors file without a config is replaced.
    """
    if not isinstance(model, ViT):
        raise TypeError(f"model must be a fastvit.ViT, got {type(model).__name__}")
    if dialect not in DIALECTS:
        raise UsageError(f"dialect must be one of {DIALECTS}, got {dialect!r}")
    state = weights_of(model)
    model = current_architecture(model, state)
    path = None if path is None else Path(path)
    bare = path is None or path.suffix.lower() == ".safetensors"
    if path is not None and not bare and path.suffix.lower() in SUFFIXES and not path.is_dir():
        raise UsageError(f"export_checkpoint: expected a folder or .safetensors, got {path}")
    if dialect == "timm":
        state, config = to_timm(model, state), {} if bare else timm_config(model)
    else:
        state, config = to_hf(model, state)
    state = {k: v.contiguous().clone() for k, v in state.items()}
    if path is None:
        return state
    data = save(state, metadata={"format": "pt"})
    if bare:
        if path.exists() and path.with_suffix(".json").exists():
            raise UsageError(
                f"export_checkpoint: {path} already holds a checkpoint, with its config beside it; "
                "choose another name"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, data)
        return state
    if path.is_file():
        raise UsageError(f"export_checkpoint: {path} is a file; expected a folder or .safetensors")
    there = sorted(f.name for f in path.iterdir() if f.name in _TAKEN) if path.is_dir() else []
    if there:
        raise UsageError(
            f"export_checkpoint: {path} already holds a checkpoint ({', '.join(there)}); choose "
            "another folder"
        )
    files = {"model.safetensors": data, "config.json": _json(config)}
    if dialect == "hf":
        files[PREPROCESSOR] = _json(preprocessor(model))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        for name, content in files.items():
            _write(path / name, content)
        return state
    with replacing_folder(path) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return state


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, default=json_value) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)
