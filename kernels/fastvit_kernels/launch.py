"""Launch kernels with little CPU overhead.

A ViT block makes 7 launches forward and 14 backward, of some 25 arguments each; in small batches
and small models the GPU waits for them. Triton binds and classifies every argument of every call;
here a compiled kernel is cached under the few facts that Triton specializes on, and is called with
the arguments as they are. `replay` goes further and repeats all launches of a call of an op.
"""

import threading
from collections.abc import Callable
from typing import Any, Protocol

from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_TRITON_RUN = JITFunction.run
_general: dict[int, tuple[bool, ...]] = {}

LaunchFn = Callable[[Any, Any], Any]  # launch_fn(stream, args) launches


class Recorder(Protocol):
    def launch(self, launch_fn: LaunchFn, stream: Any, args: tuple, compiled: bool) -> Any:
        """Call launch_fn(stream, args) and record it. compiled: args may be addresses."""
        ...


class _Recording(threading.local):
    recorder: Recorder | None = None  # records the launches of this thread


recording = _Recording()
_compiled: dict[tuple, tuple[Any, tuple]] = {}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def only_multiples_of_8(*sizes: int) -> bool:
    """BY_8 for `common.multiple_of_8`: 8 divides all these sizes and strides, but 16 does not."""
    return all(n % 8 == 0 for n in sizes) and any(n % 16 for n in sizes)


def launches_directly() -> bool:
    """True if JITFunction.run is Triton's own and no launch hook is set, as profilers set them."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return JITFunction.run is _TRITON_RUN and not any(getattr(h, "calls", h) for h in hooks)


def current_stream() -> Any:
    return driver.active.get_current_stream(driver.active.get_current_device())


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants), with less overhead. args: all arguments that are not
    constexpr, in order; constants: the constexprs, num_warps, num_stages and maxnreg.
    """

    def by_triton(_: Any, args: Any) -> Any:
        return kernel[grid](*args, **constants)

    # Interpreted, or Triton's launch is replaced (by `aot` or the tuner) or has hooks.
    if type(kernel) is not JITFunction or not launches_directly():
        _run_or_record(by_triton, None, args, False)
        return
    # All that Triton specializes on: the device, the constants, and facts about each argument.
    device = driver.active.get_current_device()
    key: list[Any] = [id(kernel), device, *constants]
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
            if isinstance(arg, float):  # numpy's, which Triton takes for no number
                args = tuple(float(a) if isinstance(a, float) else a for a in args)
                return launch(kernel, grid, *args, **constants)
            key.append(arg.dtype)
            addresses |= arg.data_ptr()
    if addresses % 16:
        _run_or_record(by_triton, None, args, False)
        return
    found = _compiled.get(tuple(key))
    if found is None:
        compiled = _run_or_record(by_triton, None, args, False)
        rest = tuple(constants[p.name] for p in kernel.params[len(args) :])
        _compiled[tuple(key)] = compiled, rest
        return
    _run_or_record(_bind(*found, grid), driver.active.get_current_stream(device), args, True)


def _bind(compiled: Any, rest: tuple, grid: tuple[int, ...]) -> LaunchFn:
    """A function that launches what Triton compiled; rest: the constexprs."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    x, y, z = (*grid, 1, 1)[:3]

    def launch_fn(stream: Any, args: Any) -> None:
        run(x, y, z, stream, function, metadata, None, None, None, *args, *rest)

    return launch_fn


def _run_or_record(launch_fn: LaunchFn, stream: Any, args: tuple, compiled: bool) -> Any:
    if recording.recorder is None:
        return launch_fn(stream, args)
    return recording.recorder.launch(launch_fn, stream, args, compiled)


def _is_general(kernel: Any) -> tuple[bool, ...]:
    """For each argument, whether the kernel is not specialized on its value."""
    if id(kernel) not in _general:
        _general[id(kernel)] = tuple(p.do_not_specialize for p in kernel.params)
    return _general[id(kernel)]
