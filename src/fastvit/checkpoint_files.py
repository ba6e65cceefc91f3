"""Read a checkpoint from a file, a folder or the hub: tensors and the config beside them.

Only tensors and plain containers are unpickled (`weights_only=True`, `allow_pickle=False`).
"""

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file as load_safetensors

from fastvit.errors import UsageError
from fastvit.saving import FORMAT

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".npz")
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
CONFIGS = ("config.json", "open_clip_config.json")
PREPROCESSOR = "preprocessor_config.json"
_LFS = b"version https://git-lfs"
_PAGE = (b"<!doctype", b"<html", b"<head", b"<?xml")
_SHARD = re.compile(r"-\d+-of-(\d+)\.")
_HUB = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass
class Source:
    """A checkpoint as read. name: for messages; state: tensors, or numpy arrays of an npz; config,
    preprocessor: the JSON beside it; notes: what was not read."""

    name: str
    state: Mapping[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_source(source: str | Path | Mapping[str, Any]) -> Source:
    """Read a file, folder, hub id ('owner/name', 'hf-hub:owner/name@revision') or state dict."""
    if isinstance(source, Mapping):
        return Source("the state dict", source)
    if not isinstance(source, (str, Path)):
        raise UsageError(
            "checkpoint: source must be a path, a hub id or a state dict, got "
            f"{type(source).__name__}"
        )
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if path.is_file() and path.name.endswith(".index.json"):
        return _read_whole(path.parent, path, str(path))
    if path.is_file():
        if (part := _SHARD.search(path.name)) and int(part[1]) > 1:
            raise UsageError(
                f"checkpoint: {path} is one of {int(part[1])} shards; pass its folder, or the "
                ".index.json beside it"
            )
        config, notes = _sidecar_config(path.with_suffix(".json"))
        config = config or _config_in(path.parent, path)
        preprocessor = _json(path.parent / PREPROCESSOR) if _is_standard(path) else {}
        return Source(str(path), read_file(path), config, preprocessor, notes)
    name = str(source).removeprefix("hf-hub:").removeprefix("hf_hub:")
    if _HUB.fullmatch(name) and path.suffix.lower() not in SUFFIXES:
        return _read_hub(name)
    raise UsageError(
        f"checkpoint: {source} is neither a file, nor a folder, nor a hub id such as owner/name"
    )


def read_file(path: Path) -> Mapping[str, Any]:
    """Load the tensors of one file to the CPU."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"checkpoint: {path} must end in one of {', '.join(SUFFIXES)}")
    size = f"{path.stat().st_size:,} bytes"
    try:
        with path.open("rb") as file:
            head = file.read(512)
            if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGE):
                raise UsageError(
                    f"checkpoint: {path} is a web page, no checkpoint; {size}. Download the file "
                    "that the page is about"
                )
            if head.startswith(_LFS):
                raise UsageError(
                    f"checkpoint: {path} is a pointer of Git LFS, not the file; run git lfs pull"
                )
        if suffix == ".safetensors":
            return load_safetensors(path)
        if suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
    except UsageError:
        raise
    except Exception as error:  # readers of damaged files raise anything
        raise UsageError(
            f"checkpoint: {path} is truncated or not a {path.suffix} file ({error}); {size}"
        ) from error
    return _read_torch(path, size)


# Safe types that training scripts save beside the weights: their arguments, a Namespace, and their
# metrics, numpy scalars. numpy 2 and earlier rebuild a scalar from different module paths, and each
# dtype has a class.
_PLAIN: list[Any] = [argparse.Namespace, np.dtype]
_scalar = np.float64(0).__reduce__()[0]
_PLAIN += [(_scalar, f"numpy.{module}.multiarray.scalar") for module in ("_core", "core")]
_PLAIN += [type(np.dtype(kind)) for kind in "?bhilBHILefd"]


def _read_torch(path: Path, size: str) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals(_PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about TorchScript, which is refused below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        said = re.search(r"WeightsUnpickler error:\s*([^\n]+)", str(error))
        reason = said[1].strip() if said else str(error).splitlines()[0]
        raise UsageError(
            f"checkpoint: {path} holds more than tensors, or is damaged, and fastvit unpickles "
            f"nothing else: {reason}. Load it where you trust it and pass the state dict"
        ) from error
    except Exception as error:  # the unpickler of a damaged file raises anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "TorchScript" in str(error):
            raise UsageError(
                f"checkpoint: {path} is a TorchScript archive, which is a program; pass "
                "torch.jit.load(path).state_dict()"
            ) from error
        raise UsageError(
            f"checkpoint: {path} is truncated or not a file of torch.save ({reason}); {size}"
        ) from error
    if not isinstance(state, Mapping):
        raise UsageError(f"checkpoint: {path} holds a {type(state).__name__}, not a state dict")
    return state


def _read_folder(folder: Path) -> Source:
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise UsageError(f"checkpoint: {folder} holds none of {', '.join(WEIGHTS)}")
    return _read_whole(folder, weights, str(folder))


def _read_whole(folder: Path, weights: Path, name: str) -> Source:
    """Read the weights in `folder`, one file or all shards of an index, and the configs there."""
    if weights.name.endswith(".index.json"):
        state: dict[str, Any] = {}
        for shard in _shards(weights):
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise UsageError(f"checkpoint: {weights} names {shard}, which is not beside it")
            state.update(read_file(folder / shard))
        lacking = sorted(_json(weights)["weight_map"].keys() - state.keys())
        if lacking:
            raise UsageError(
                f"checkpoint: {weights} names tensors that its shards do not hold: "
                f"{', '.join(lacking)}"
            )
    else:
        state = dict(read_file(weights))
    config, notes = _sidecar_config(folder / "model.json")
    config = config or _config_in(folder, weights)
    return Source(name, state, config, _json(folder / PREPROCESSOR), notes)


def _shards(index: Path) -> list[str]:
    """The shard files that an index names, sorted."""
    files = _json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
        raise UsageError(f"checkpoint: {index} holds no 'weight_map' of tensors to files")
    return sorted(set(files.values()))


def _config_in(folder: Path, weights: Path) -> dict[str, Any]:
    """The config in `folder` if the weights file has a standard name, else {}."""
    if not _is_standard(weights):
        return {}
    return next((found for name in CONFIGS if (found := _json(folder / name))), {})


def _is_standard(weights: Path) -> bool:
    return weights.name in WEIGHTS or weights.name.startswith("model")


# A JSON object with one of these keys is a config, ours or another library's.
_CONFIG_KEYS = {"format", "architecture", "architectures", "model_type", "model_cfg", "hidden_size"}
_OUR_CONFIG_START = f'{{\n  "format": "{FORMAT}"'  # how save_checkpoint begins a config


def _sidecar_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The config in NAME.json beside NAME.safetensors, or a note if that is something else, such as
    a log. A truncated config of ours raises."""
    if not path.is_file():
        return {}, []
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    if _OUR_CONFIG_START.startswith(text[: len(_OUR_CONFIG_START)]):
        return _json(path), []
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, dict) and value.keys() & _CONFIG_KEYS:
        return value, []
    return {}, [f"{path} is no config, and was not read"]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UsageError(f"checkpoint: {path} is truncated or not JSON ({error})") from error
    return value if isinstance(value, dict) else {}


def _read_hub(name: str) -> Source:
    """Download what is needed into huggingface_hub's cache, or find it there when offline."""
    said = f"checkpoint: {name} is no file or folder here, and as a hub id"
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise UsageError(
            f"{said} it needs huggingface_hub; install it with: pip install 'fastvit[hub]'"
        ) from error
    repository, _, revision = name.partition("@")
    unreachable: Exception | None = None
    unknown: list[str] = []

    def find(file: str) -> Path | None:
        nonlocal unreachable
        if unreachable is None:
            try:
                return Path(hub.hf_hub_download(repository, file, revision=revision or None))
            except LocalEntryNotFoundError as error:
                unreachable = error  # do not wait for a timeout per file
            except EntryNotFoundError:
                return None
            except Exception as error:
                raise UsageError(f"{said}: {error}") from error
        cached = hub.try_to_load_from_cache(repository, file, revision=revision or None)
        if cached is None:
            unknown.append(file)
        return Path(cached) if isinstance(cached, str) else None

    for file in (*CONFIGS, PREPROCESSOR):
        find(file)
    weights = next((path for file in WEIGHTS if (path := find(file))), None)
    offline = "the hub is out of reach or HF_HUB_OFFLINE is set"
    if weights is None:
        where = "is not in the cache, and " + offline
        where = where if unreachable else f"holds none of {', '.join(WEIGHTS)}"
        raise UsageError(f"{said} it {where}") from unreachable
    for shard in _shards(weights) if weights.name.endswith(".index.json") else ():
        if find(shard) is None:
            why = f"; {offline}" if unreachable else ""
            raise UsageError(f"{said} it lacks {shard}, of its index{why}") from unreachable
    read = _read_folder(weights.parent)
    # The hub may have a config that is not cached: without it the architecture may be a guess.
    lost = [] if read.config else [file for file in unknown if file == CONFIGS[0]]
    notes = [f"{file} is not in the cache, and {offline}: read without it" for file in lost]
    return Source(name, read.state, read.config, read.preprocessor, [*read.notes, *notes])
