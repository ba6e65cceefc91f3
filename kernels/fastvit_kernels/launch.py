"""Launch kernels at little cost to the CPU.

A ViT block makes 7 launches forward and 15 backward, of some 25 arguments each; in small batches
and small models the GPU waits for them. Triton binds and classifies every argument of every call;
here what it compiled is kept under the few facts that it compiles for, and is called with the
arguments as they are.
"""

from typing import Any

from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_TRITONS_RUN = JITFunction.run
_compiled: dict[tuple, tuple[Any, tuple]] = {}
_general: dict[int, tuple[bool, ...]] = {}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def by_eights(*sizes: int) -> bool:
    """What to tell `common.eights` of sizes and strides: 8 divides them all, 16 not."""
    return all(n % 8 == 0 for n in sizes) and any(n % 16 for n in sizes)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants). args: all arguments that are no constexpr, in order;
    constants: the constexprs, num_warps, num_stages and maxnreg.
    """
    # Interpreted, or the ahead-of-time compiler or the tuner stands in for Triton's launch.
    if type(kernel) is not JITFunction or JITFunction.run is not _TRITONS_RUN:
        kernel[grid](*args, **constants)
        return
    # What Triton compiles anew for: the device, constants, and the facts about each argument.
    key: list[Any] = [id(kernel), driver.active.get_current_device(), *constants]
    key += constants.values()
    addresses = 0
    for arg, general in zip(args, _is_general(kernel), strict=False):
        kind = type(arg)
        if arg is None:
            key.append(None)
        elif kind is int:
            key.append(arg >> 31 if general else arg)
        elif kind is TensorDescriptor:
            key.append(arg.base.dtype)
        elif kind is not float:
            key.append(arg.dtype)
            addresses |= arg.data_ptr()
    if addresses % 16:
        kernel[grid](*args, **constants)
        return
    found = _compiled.get(tuple(key))
    if found is None:
        compiled = kernel[grid](*args, **constants)
        rest = tuple(constants[p.name] for p in kernel.params[len(args) :])
        _compiled[tuple(key)] = compiled, rest
        return
    compiled, rest = found
    compiled[(*grid, 1, 1)](*args, *rest)


def _is_general(kernel: Any) -> tuple[bool, ...]:
    """Of each argument, whether the kernel is compiled for any value of it."""
    if id(kernel) not in _general:
        _general[id(kernel)] = tuple(p.do_not_specialize for p in kernel.params)
    return _general[id(kernel)]
