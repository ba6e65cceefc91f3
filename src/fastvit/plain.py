"""Whether a module may be skipped: our ops read its parameters and never call it.

A layer that somebody put in place of ours, a hook, a replaced forward or a quantized weight would
be passed over in silence; the functions here tell, and the caller then runs the modules themselves.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.module import _has_any_global_hook

# Where torch.compile, FSDP and activation checkpointing hold the module that they wrap.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_TENSORS = (nn.Parameter, Tensor, type(None))


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside such wrappers, which run it as it is."""
    inner = next((m for name in WRAPPERS if (m := module._modules.get(name)) is not None), None)
    return module if inner is None else unwrapped(inner)


def why_not_fused(*kinds: type[nn.Module], **modules: Any) -> str | None:
    """Why a fused op cannot do the work of these modules, each of one of the kinds; or None."""
    if _has_any_global_hook() and watched():
        return "a global module hook is registered"
    for name, module in modules.items():
        cls = type(module)
        if cls not in kinds and not any(
            issubclass(cls, kind) and cls.forward is kind.forward for kind in kinds
        ):
            return f"{name} is {cls.__name__}"
        if reason := why_not_plain(name, module, bool(module._forward_hooks)):
            return reason
    return None


def why_not_plain(name: str, module: nn.Module, hooked: bool) -> str | None:
    """Why a module of a known kind cannot be skipped. hooked: whether a forward hook would fire."""
    if "forward" in module.__dict__:
        return f"{name} has its forward replaced"
    before = module._forward_pre_hooks
    if hooked or before or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has hooks"
    kind = type(module._parameters.get("weight"))
    # A compiler's stand-ins are plain tensors to it.
    if kind not in _TENSORS and not kind.__module__.startswith("torch._subclasses."):
        return f"{name} holds a {kind.__name__}"
    return None


def are_bare(kinds: tuple[type, ...], *modules: Any) -> bool:
    """Whether each module is just of one of the kinds, and nobody hooked or patched any: what is so
    nearly always, at a tenth of the cost of the reasons why not.
    """
    if _has_any_global_hook():
        return False
    for m in modules:
        if type(m) not in kinds or "forward" in m.__dict__:
            return False
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return False
    return True


# These hooks follow names and parameters, and read no vector: FlopCounterMode's, fully_shard's.
_BLIND = ("torch.utils.module_tracker", "torch.distributed.fsdp.")


def watched(*modules: nn.Module) -> bool:
    """Whether a hook on one of the modules, or on all there are, sees what goes in or comes out."""
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


def runs(module: Any, kinds: tuple[type, ...], *methods: str) -> bool:
    """Whether module has these methods from one of the kinds: no subclass's, no patched ones."""
    patched = any(m in vars(module) for m in methods)
    return not patched and any(
        isinstance(module, kind)
        and all(getattr(type(module), m) is getattr(kind, m) for m in methods)
        for kind in kinds
    )
