"""`accelerate(model)`: run the ViT you already have on fastvit.ops; `restore` undoes it.

A rerouted module's `__class__` becomes a generated subclass of its class, with our `forward`. All
that the module holds stays: parameters (the same objects), buffers, names, state dict, hooks,
training flag, and `isinstance`. Setting `forward` on the instance would be worse: it is not
pickled, it hides transformers' gradient checkpointing and FSDP's class, and Dynamo guards on it by
identity. `copy.deepcopy`, `pickle` and `torch.save(model)` keep the module rerouted; loading then
needs fastvit, unless `restore` was called first.
"""

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Proxy

from fastvit.halves import dotted, peer_class
from fastvit.model import ViT
from fastvit.reroute import CORE, REROUTES, STEMS, Reroute

log = logging.getLogger("fastvit")
SUPPORTED = (
    "timm VisionTransformer, transformers ViTModel, Dinov2Model, Dinov2WithRegistersModel and "
    "their heads, torchvision VisionTransformer, vit-pytorch ViT"
)


@dataclass(frozen=True)
class Row:
    """One part of one module, whether it was taken, and why not. For a part that is taken, the
    reason says when its original forward runs nevertheless."""

    module: str
    kind: str
    part: str
    taken: bool
    reason: str


@dataclass
class Report:
    """What `accelerate` took and left. `print` merges equal rows of numbered modules."""

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
    and hooks on the model, its blocks, stem, norm and head stay valid. Returns a `Report`.

    The original modules still run whatever the ops do not support: other norms and activations,
    dropout in training except on attention probabilities (at the model's rate; on a GPU the kernel
    draws), attention masks, `output_attentions`. This is decided at every call, separately for a
    block's attention and MLP, so a hook, mask or LoRA layer added later takes effect: the half
    that it is on then runs the original modules. Raises TypeError if no known ViT is found.

    Call it before FSDP2's `fully_shard`, and before or after DDP and `torch.compile`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}; {SUPPORTED}")
    if isinstance(model, ViT):
        raise TypeError("model is a fastvit.ViT, which already runs on fastvit.ops")
    found = _find(model)
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
            _set_class(module, _subclass(type(module)))
            changed = True
        # Report the attention core only where the whole attention half was not taken.
        owners = (name.rpartition(".")[0], name.rpartition(".")[0].rpartition(".")[0], name)
        if not (rows and rows[0].part == CORE and covered.intersection(owners)):
            report.rows += rows
    report.already = not changed and bool(report.taken)
    return report


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`: every module gets its original class back. Returns `model`."""
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
        _set_class(module, peer_class(module))
    return model


def _set_class(module: nn.Module, cls: type) -> None:
    module.__class__ = cls
    # Dynamo of torch 2.11 sees a module as unchanged until its __dict__ is written to.
    vars(module)["_fastvit"] = None
    del vars(module)["_fastvit"]


def _find(model: nn.Module) -> dict[str, tuple[nn.Module, Reroute]]:
    """Return by name the modules that their class or their owner's reroutes, outermost first."""
    found: dict[str, tuple[nn.Module, Reroute]] = {}
    for name, module in model.named_modules():
        cls = dotted(peer_class(module))
        if cls in STEMS:
            attribute, reroute = STEMS[cls]
            stem = f"{name}.{attribute}" if name else attribute
            found[stem] = (getattr(module, attribute), reroute)
        if cls in REROUTES:
            found[name] = (module, REROUTES[cls])
    return found


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
    except (AttributeError, IndexError, TypeError) as error:
        return [Row(name, kind, "all", False, f"unknown layout: {error}")]


@functools.cache
def _subclass(peer: type) -> type:
    """Return a subclass of `peer` with its name and our forward, pickled as `peer`."""
    reroute = REROUTES.get(dotted(peer)) or _STEM_OF[peer.__name__]
    namespace: dict[str, Any] = {
        "forward": _or_peer_in_fx(reroute.forward),
        "__reduce_ex__": _reduce_ex,
        "__module__": peer.__module__,
        "__qualname__": peer.__qualname__,
        "__doc__": peer.__doc__,
        "_fastvit_peer": peer,
    }
    return type(peer)(peer.__name__, (peer,), namespace)


def _or_peer_in_fx(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, but the peer's own where torch.fx traces: ours depends on shapes and hooks."""

    @functools.wraps(forward)
    def either(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, Proxy) for a in (*args, *kwargs.values())):
            _warn_of_fx()
            return self._fastvit_peer.forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    return either


@functools.cache
def _warn_of_fx() -> None:
    log.warning("accelerate: torch.fx traces the original forward; its graph is not accelerated")


_STEM_OF = {"Conv2d": STEMS["timm.layers.patch_embed.PatchEmbed"][1]}
_STEM_OF["Sequential"] = STEMS["vit_pytorch.vit.ViT"][1]


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Make pickle and deepcopy rebuild the generated class from the importable original."""
    _, _, *state = object.__reduce_ex__(self, max(int(protocol), 2))
    return (_rebuild, (peer_class(self),), *state)


def _rebuild(peer: type) -> Any:
    return object.__new__(_subclass(peer))
