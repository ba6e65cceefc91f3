"""Checks whether a module may be bypassed: fused ops read its parameters and never call it.

A replaced layer, a hook, a patched forward or a quantized weight would be ignored silently; these
functions detect them, and the caller then calls the modules themselves.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.module import _has_any_global_hook

# The names under which torch.compile, FSDP and activation checkpointing hold a wrapped module.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_TENSORS = (nn.Parameter, Tensor, type(None))
_LAYERS = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Conv2d)
# None where another library had already patched the class.
_FORWARDS = tuple(
    f if f.__module__ == cls.__module__ and not hasattr(f, "__wrapped__") else None
    for cls in _LAYERS
    for f in (cls.forward,)
)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside any of these wrappers."""
    inner = next((m for name in WRAPPERS if (m := module._modules.get(name)) is not None), None)
    return module if inner is None else unwrapped(inner)


def bare_name(name: str, wrappers: tuple[str, ...] = WRAPPERS) -> str:
    """A dotted name of a module or tensor without the parts that these wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in wrappers)


def fetch(module: nn.Module, name: str) -> Any:
    """getattr(module, name), in less time where that is a parameter or a submodule."""
    # As in getattr, a property or an entry of __dict__ goes first.
    if name in module.__dict__ or hasattr(type(module), name):
        return getattr(module, name)
    found = module._parameters.get(name)
    if found is None:
        found = module._modules.get(name)
    return getattr(module, name) if found is None else found


def weight_and_bias(module: nn.Module) -> tuple[Any, Any]:
    return fetch(module, "weight"), fetch(module, "bias")


def why_not_fused(**parts: tuple[Any, tuple[type, ...]]) -> str | None:
    """Return why a fused op cannot replace these modules, or None.

    parts: by name, each module and the classes of which the op implements the forward.
    """
    if reason := why_not_any():
        return reason
    for name, (module, kinds) in parts.items():
        cls = type(module)
        if cls not in kinds and not any(
            issubclass(cls, kind) and cls.forward is kind.forward for kind in kinds
        ):
            return f"{name} is {cls.__name__}"
        if module.__dict__.get("eps", 0.0) is None:
            return f"{name} has no eps"
        if reason := why_not_plain(name, module, bool(module._forward_hooks)):
            return reason
    return None


def why_not_patches(conv: Any) -> str | None:
    """Return why a Conv2d is not a projection of non-overlapping patches, or None."""
    if conv.stride != conv.kernel_size:
        return f"kernel {conv.kernel_size} overlaps with stride {conv.stride}"
    plain = conv.padding in (0, (0, 0), "valid") and conv.dilation == (1, 1) and conv.groups == 1
    return None if plain else "padded, dilated or grouped"


def why_not_any() -> str | None:
    """Return why no module can be bypassed, or None: a global hook that reads activations, or a
    patch of a whole class, as some LoRA loaders, quantizers and profilers make."""
    if _has_any_global_hook() and has_observing_hooks():
        return "a global module hook is registered"
    return _why_patched()


def _why_patched() -> str | None:
    for cls, forward in zip(_LAYERS, _FORWARDS, strict=True):
        if cls.forward is not forward:
            return f"nn.{cls.__name__}.forward is patched"
    return None


def why_not_plain(name: str, module: nn.Module, hooked: bool) -> str | None:
    """Return why a module of a known kind cannot be bypassed. hooked: forward hooks would fire."""
    if "forward" in module.__dict__:
        return f"{name} has its forward replaced"
    before = module._forward_pre_hooks
    if hooked or before or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has hooks"
    return why_not_tensors(name, module)


def why_not_tensors(name: str, module: nn.Module) -> str | None:
    """Return why the module's own parameters are no kernel's operands: a subclass may have no
    storage, or a meaning of its own."""
    for parameter in module._parameters.values():
        kind = type(parameter)
        # torch.compile's fake and functional tensors count as plain.
        if kind not in _TENSORS and not kind.__module__.startswith("torch._subclasses."):
            return f"{name} holds a {kind.__name__}"
    return None


def all_plain(*parts: tuple[Any, tuple[type, ...]]) -> bool:
    """Return whether each module is exactly of one of its kinds, unhooked and unpatched.

    This fast path for the usual case costs a tenth of `why_not_fused`.
    """
    if _has_any_global_hook() or _why_patched():
        return False
    for m, kinds in parts:
        if type(m) not in kinds or "forward" in m.__dict__:
            return False
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return False
    return True


# Hooks that read no activations, only names and parameters: FlopCounterMode's, fully_shard's.
_BLIND = ("torch.utils.module_tracker", "torch.distributed.fsdp.")


def has_observing_hooks(*modules: nn.Module) -> bool:
    """Return whether a hook on one of the modules, or a global one, sees inputs or outputs."""
    tables = [
        torch_module._global_forward_pre_hooks,
        torch_module._global_forward_hooks,
        torch_module._global_backward_pre_hooks,
        torch_module._global_backward_hooks,
    ]
    for m in modules:
        tables += [m._forward_pre_hooks, m._forward_hooks, m._backward_pre_hooks, m._backward_hooks]
    hooks = [hook for table in tables if table for hook in table.values()]
    return not all(str(getattr(hook, "__module__", "")).startswith(_BLIND) for hook in hooks)


def uses_methods_of(module: Any, kinds: tuple[type, ...], *methods: str) -> bool:
    """Return whether module's methods are those of one of the kinds, not overridden or patched."""
    patched = any(m in vars(module) for m in methods)
    return not patched and any(
        isinstance(module, kind)
        and all(getattr(type(module), m) is getattr(kind, m) for m in methods)
        for kind in kinds
    )
