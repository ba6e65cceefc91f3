"""`accelerate(model)`: run the ViT you already have on fastvit.ops; `restore` undoes it.

A rerouted module gets a subclass of its own class, whose `forward` is ours, as its `__class__`.
So nothing that a module holds changes: parameters (the same objects), buffers, names, state dict,
hooks, training flag, and `isinstance`. A `forward` set on the instance would serve less well: it
is not pickled, it hides transformers' gradient checkpointing and FSDP's class, and Dynamo guards
on it by identity. `copy.deepcopy`, `pickle` and `torch.save(model)` keep the module rerouted
(loading then needs fastvit; call `restore` first to do without).
"""

import functools
import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastvit.halves import dotted, peer_class
from fastvit.model import ViT
from fastvit.reroute import CORE, REROUTES, STEMS, Reroute

SUPPORTED = (
    "timm VisionTransformer, transformers ViTModel, Dinov2Model, Dinov2WithRegistersModel and "
    "their heads, torchvision VisionTransformer, vit-pytorch ViT"
)


@dataclass(frozen=True)
class Row:
    """One part of one module: taken or left, and why. The reason beside a part that is taken says
    when the peer's own forward serves it all the same."""

    module: str
    kind: str
    part: str
    taken: bool
    reason: str


@dataclass
class Report:
    """What `accelerate` took and left; `print` shows it, equal rows of numbered modules as one."""

    rows: list[Row] = field(default_factory=list)
    already: bool = False

    @property
    def taken(self) -> list[Row]:
        return [row for row in self.rows if row.taken]

    @property
    def left(self) -> list[Row]:
        return [row for row in self.rows if not row.taken]

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], int] = {}
        for row in self.rows:
            name = re.sub(r"\d+", "*", row.module, count=1) or "(model)"
            cells = (name, row.kind, row.part, "taken" if row.taken else "left", row.reason)
            groups[cells] = groups.get(cells, 0) + 1
        table = [("module", "class", "part", "state", "why not", "count")]
        table += [(*cells, str(n)) for cells, n in groups.items()]
        table = [(*row[:3], row[5], *row[3:5]) for row in table]
        widths = [max(len(row[i]) for row in table) for i in range(6)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in table]
        end = f"{len(self.taken)} of {len(self.rows)} parts run on fastvit.ops"
        end += "; the model was accelerated before, nothing changed" if self.already else ""
        return "\n".join(line.rstrip() for line in [*lines, end])


def accelerate(model: nn.Module) -> Report:
    """Reroute the blocks, attention, MLPs and patch projection of `model` through fastvit.ops.

    model: a live timm `VisionTransformer`, transformers `ViTModel`, `Dinov2Model`,
    `Dinov2WithRegistersModel` or a head on them, torchvision `VisionTransformer`, vit-pytorch
    `ViT`, or any module that holds one. It is changed in place; parameters, state dict, optimizer,
    hooks on the model, its blocks, stem, norm and head stay as they were. Returns a `Report`.

    What an op cannot do stays the peer's own: other norms and activations, dropout in training but
    of attention's probabilities (at the peer's rate; the kernel draws on a GPU), attention masks,
    `output_attentions`. It is decided again at every call, half a block at a time, so that a hook,
    a mask or a LoRA layer that comes later is honoured: the half it touches then runs the peer's
    own modules. Raises TypeError where there is nothing to take.

    Call it before FSDP2's `fully_shard`, and before or after DDP and `torch.compile`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}; {SUPPORTED}")
    if isinstance(model, ViT):
        raise TypeError("model is a fastvit.ViT, which already runs on fastvit.ops")
    found = dict(_find(model))
    if not found:
        raise TypeError(
            f"model is {dotted(type(model))}, which holds no ViT that is known; "
            f"expected {SUPPORTED}"
        )
    report, changed, covered = Report(), False, set()
    for name, (module, reroute) in found.items():
        rows = _rows(name, module, reroute)
        covered.update(row.module for row in rows if row.taken and row.part == "attention")
        if any(row.taken for row in rows) and not hasattr(type(module), "_fastvit_peer"):
            _become(module, _subclass(type(module)))
            changed = True
        # The core serves where the whole attention half does not: told only there.
        owners = (name.rpartition(".")[0], name.rpartition(".")[0].rpartition(".")[0], name)
        if not (rows and rows[0].part == CORE and covered.intersection(owners)):
            report.rows += rows
    report.already = not changed and bool(report.taken)
    return report


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`: every module gets its own class back. Returns `model`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    modules = [m for m in model.modules() if hasattr(type(m), "_fastvit_peer")]
    for module in modules:
        if "_fastvit_peer" not in vars(type(module)):
            raise RuntimeError(
                f"{type(module).__name__} got its class after fastvit.accelerate, from FSDP or a "
                "parametrization; undo that before fastvit.restore"
            )
    for module in modules:
        _become(module, peer_class(module))
    return model


def _become(module: nn.Module, cls: type) -> None:
    module.__class__ = cls
    # Dynamo of torch 2.11 looks no further at a module whose dictionary nobody wrote to.
    vars(module)["_fastvit"] = None
    del vars(module)["_fastvit"]


def _find(model: nn.Module) -> "list[tuple[str, tuple[nn.Module, Reroute]]]":
    """Every module that a peer's class name or its owner's says can be rerouted, outside in."""
    found: dict[str, tuple[nn.Module, Reroute]] = {}
    for name, module in model.named_modules():
        cls = dotted(peer_class(module))
        if cls in STEMS:
            attribute, reroute = STEMS[cls]
            stem = f"{name}.{attribute}" if name else attribute
            found[stem] = (getattr(module, attribute), reroute)
        if cls in REROUTES:
            found[name] = (module, REROUTES[cls])
    return list(found.items())


def _rows(name: str, module: nn.Module, reroute: Reroute) -> list[Row]:
    kind = peer_class(module).__name__
    if "forward" in vars(module):
        return [Row(name, kind, "all", False, "its forward was replaced on the instance")]
    try:
        parts = reroute.parts(module)
        rows = []
        for inner, part, why_not in parts:
            path = ".".join(filter(None, (name, inner)))
            reason = why_not(False)
            rows.append(Row(path, kind, part, reason is None, reason or why_not(True) or ""))
        return rows
    except AttributeError as error:
        return [Row(name, kind, "all", False, f"unknown layout: {error}")]


@functools.cache
def _subclass(peer: type) -> type:
    """A subclass of `peer` with its name, our forward, and pickling by the peer's class."""
    reroute = REROUTES.get(dotted(peer)) or _STEM_OF[peer.__name__]
    namespace: dict[str, Any] = {
        "forward": reroute.forward,
        "__reduce_ex__": _reduce_ex,
        "__module__": peer.__module__,
        "__qualname__": peer.__qualname__,
        "__doc__": peer.__doc__,
        "_fastvit_peer": peer,
    }
    return type(peer)(peer.__name__, (peer,), namespace)


_STEM_OF = {"Conv2d": STEMS["timm.layers.patch_embed.PatchEmbed"][1]}
_STEM_OF["Sequential"] = STEMS["vit_pytorch.vit.ViT"][1]


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Pickle and deepcopy rebuild the generated class from the peer's, which has a name."""
    _, _, *state = object.__reduce_ex__(self, max(int(protocol), 2))
    return (_rebuild, (peer_class(self),), *state)


def _rebuild(peer: type) -> Any:
    return object.__new__(_subclass(peer))
