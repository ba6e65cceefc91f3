"""fastvit's own checkpoint format: weights in NAME.safetensors, the config in NAME.json beside it.

Each file is written to a temporary file first and moved into place, so that a killed process leaves
the old file or the new one, never half of one.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from fastvit.errors import UsageError
from fastvit.model import ViT
from fastvit.plain import bare_name
from fastvit.pos_embed import Resample

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = "fastvit"
VERSION = 1


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces `path` when the body succeeds."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp's are private to the owner
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which must not exist, that becomes `path` when the
    body succeeds."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# File descriptors of the folders that this process has locked; forked workers close their copies.
_locked_fds: set[int] = set()


def _close_locks() -> None:
    while _locked_fds:
        os.close(_locked_fds.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[bool]:
    """Lock `folder` against other training runs. The system unlocks it when this process ends,
    however it ends. Yields False where folders cannot be locked. Raises UsageError if in use."""
    handle = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    try:
        if handle is not None:
            _locked_fds.add(handle)
        yield handle is not None and _locks(handle, folder)
    finally:
        if handle is not None:
            _locked_fds.discard(handle)
            os.close(handle)


def _locks(handle: int, folder: Path) -> bool:
    assert fcntl is not None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"{folder} is in use: another run is being trained there") from error
    except OSError:  # some network file systems
        return False
    return True


def remove_stale_temporaries(folder: Path, names: Iterable[str]) -> None:
    """Delete temporary files of `replacing` that killed processes left in a folder we locked."""
    for name in names:
        stem, suffix = re.escape(f".{name}."), re.escape(Path(name).suffix)
        for path in folder.iterdir():
            if re.fullmatch(rf"{stem}[a-z0-9_]{{8}}{suffix}", path.name):
                path.unlink(missing_ok=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def weights_of(model: ViT) -> dict[str, torch.Tensor]:
    """The model's tensors on the CPU, without the names that wrappers such as FSDP insert."""
    return {bare_name(k): v.detach().cpu() for k, v in model.state_dict().items()}


def current_architecture(model: ViT, weights: dict[str, torch.Tensor]) -> ViT:
    """A ViT with the model's arguments and its current depth, classes and pool, on the meta device.
    Raises UsageError if its activations, or the names or shapes of its tensors, differ."""
    head = next((weights[k] for k in ("head.weight", "head.2.weight") if k in weights), ())
    blocks = {k.split(".")[1] for k in weights if k.startswith("blocks.")}
    arguments = {
        **model.config,
        "depth": len(blocks),
        "num_classes": len(head),
        "pool": model.pool,
        "head_hidden_dim": model.config["head_hidden_dim"] if "head.2.weight" in weights else None,
    }
    try:
        with torch.device("meta"):
            made = ViT(**arguments)
    except ValueError as error:
        raise UsageError(f"the model's modules are not those of its arguments: {error}") from error
    want, have = _parts(made, made.state_dict()), _parts(model, weights)
    for name in sorted(want.keys() | have.keys()):
        if want.get(name) != have.get(name):
            raise UsageError(
                f"the model's modules are not those of its arguments: {name} is "
                f"{have.get(name, 'absent')}, expected {want.get(name, 'no such')}; save its "
                "state_dict() instead"
            )
    made.default_cfg.update(model.default_cfg, num_classes=made.num_classes)
    return made


def _parts(model: ViT, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What arguments must reproduce: the shapes of the tensors, the activations and the norms."""
    shown = {
        bare_name(name): str(m)
        for name, m in model.named_modules(remove_duplicate=False)
        if name.endswith("mlp.act") or isinstance(m, (nn.LayerNorm, nn.RMSNorm))
    }
    return {**{k: tuple(v.shape) for k, v in weights.items()}, **shown}


def save_checkpoint(path: Path | str, model: ViT, **details: Any) -> Path:
    """Write PATH (.safetensors) and its .json: the model's config and `details`. Returns PATH."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UsageError(f"a checkpoint's name must end in .safetensors, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Clone, since safetensors refuses tensors that share memory.
    weights = {k: v.clone() for k, v in weights_of(model).items()}
    arguments = current_architecture(model, weights).config
    config = {"format": FORMAT, "version": VERSION, "model": arguments, **details}
    text = json.dumps(config, indent=2, default=json_value) + "\n"
    with replacing(path) as temporary:
        temporary.write_bytes(save(weights, metadata={"format": "pt"}))
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(text)
    return path


def json_value(value: Any) -> Any:
    """Convert for json.dumps: a `Resample`, a path, or a number or array of numpy or torch. Raises
    UsageError for anything else."""
    if isinstance(value, Resample):
        return vars(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise UsageError(f"a config in JSON cannot hold {value!r}, of type {type(value).__name__}")
