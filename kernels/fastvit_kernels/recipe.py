"""A recipe: Python source that repeats a launcher's allocations and launches for other tensors.

Tensor i is `t<i>` there and its address `p<i>`: first the launcher's arguments, then the tensors it
makes, in order. Straight-line code takes less time than a loop over the steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvit_kernels import launch


class TensorRef(NamedTuple):
    """Where a tensor lies: `offset` bytes into tensor `index`. whole: it is that tensor."""

    index: int
    offset: int
    shape: torch.Size
    strides: tuple[int, ...]
    whole: bool

    def source(self, code: "_Code") -> str:
        found = f"t{self.index}"
        if self.whole:
            return found
        layout = code.name(tuple(self.shape)), code.name(self.strides)
        return f"view_at({found}, {', '.join(layout)}, {self.offset})"

    @property
    def address(self) -> str:
        return f"p{self.index} + {self.offset}" if self.offset else f"p{self.index}"


def _view_at(t: Tensor, shape: Any, strides: Any, offset: int) -> Tensor:
    """A view of t's memory that begins `offset` bytes behind t."""
    return t.as_strided(shape, strides, t.storage_offset() + offset // t.element_size())


class Allocation(NamedTuple):
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    has_version_counter: bool  # although it is made in inference mode

    def source(self, code: "_Code") -> str:
        shape, strides, dtype, device = map(code.name, self[:4])
        make = "empty_with_version" if self.has_version_counter else "empty_strided"
        return code.made(f"{make}({shape}, {strides}, dtype={dtype}, device={device})")


def _empty_with_version(*args: Any, **kwargs: Any) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty_strided(*args, **kwargs)


class Call(NamedTuple):
    """A call of a PyTorch op. makes: its result is a new tensor, not one of its arguments."""

    op: Any
    args: tuple
    options: dict[str, Any]
    makes: bool

    def source(self, code: "_Code") -> str:
        def found(arg: Any) -> str:
            return arg.source(code) if isinstance(arg, TensorRef) else code.name(arg)

        args = [*map(found, self.args), *(f"{k}={found(a)}" for k, a in self.options.items())]
        call = f"{code.name(self.op)}({', '.join(args)})"
        return code.made(call) if self.makes else call


class Launch(NamedTuple):
    """A kernel launch. places: for each tensor in args its index and place; for each TMA descriptor
    the index, its base's place and the descriptor.
    """

    launch_fn: launch.LaunchFn
    args: tuple
    places: list[tuple[int, TensorRef, TensorDescriptor | None]]
    compiled: bool

    def source(self, code: "_Code") -> str:
        args = [code.name(a) for a in self.args]
        for i, place, descriptor in self.places:
            args[i] = place.address if self.compiled else place.source(code)
            if descriptor is not None:
                base = f"Address({args[i]})" if self.compiled else args[i]
                args[i] = f"moved({code.name(descriptor)}, {base})"
        stream = "stream" if self.compiled else None
        return f"{code.name(self.launch_fn)}({stream}, ({', '.join(args)},))"


class Release(NamedTuple):
    index: int

    def source(self, _: Any) -> str:
        return f"t{self.index} = None"


class _Address:
    """A TMA descriptor's base as far as Triton's launcher reads it."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value

    def data_ptr(self) -> int:
        return self.value


def moved(descriptor: TensorDescriptor, base: Any) -> TensorDescriptor:
    """The descriptor with another base, without the checks that the original has passed."""
    moved = object.__new__(TensorDescriptor)
    moved.__dict__.update(descriptor.__dict__, base=base)
    return moved


class _Code:
    """What the source of one recipe's steps shares: its constants, and which tensor comes next."""

    def __init__(self, inputs: int, addressed: set[int]) -> None:
        self.count, self.addressed = inputs, addressed
        self.constants: dict[str, Any] = {
            "empty_strided": torch.empty_strided,
            "empty_with_version": _empty_with_version,
            "view_at": _view_at,
            "moved": moved,
            "Address": _Address,
            "current_stream": launch.current_stream,
        }

    def name(self, constant: Any) -> str:
        """The source of a constant."""
        if constant is None or type(constant) in (int, bool):
            return repr(constant)
        name = f"c{len(self.constants)}"
        self.constants[name] = constant
        return name

    def made(self, value: str) -> str:
        """The source of the next tensor's making."""
        i, self.count = self.count, self.count + 1
        made = f"t{i} = {value}"
        return f"{made}; p{i} = t{i}.data_ptr()" if i in self.addressed else made


class Program(NamedTuple):
    """The steps of a launcher of `inputs` tensors, and its results, in a list, tuple or alone."""

    name: str
    inputs: int
    steps: list[Any]
    results: list[TensorRef]
    form: type

    def function(self) -> Callable[..., Any]:
        """A function of the `inputs` tensors that does the steps and returns the results."""
        launches = [step for step in self.steps if isinstance(step, Launch) and step.compiled]
        addressed = {place.index for step in launches for _, place, _ in step.places}
        code = _Code(self.inputs, addressed)
        lines = [f"p{i} = t{i}.data_ptr()" for i in range(self.inputs) if i in addressed]
        lines += ["stream = current_stream()"] if launches else []
        lines += [step.source(code) for step in self.steps]
        found = ", ".join(place.source(code) for place in self.results)
        if self.form in (list, tuple):
            found = f"[{found}]" if self.form is list else f"({found},)"
        arguments = ", ".join(f"t{i}" for i in range(self.inputs))
        source = "\n    ".join([f"def repeat({arguments}):", *lines, f"return {found}"])
        exec(compile(source, f"<recipe of {self.name}>", "exec"), code.constants)
        return code.constants["repeat"]
