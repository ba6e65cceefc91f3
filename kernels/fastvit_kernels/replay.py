"""Record the allocations and launches of a launcher, and replay them for other tensors.

What a launcher of `library` allocates and launches depends only on its tensors' shapes, strides and
dtypes, its other arguments and a few switches (`_cache_key`). Working it out on the CPU takes
several times as long as the launches themselves, and in small batches and small models the GPU
waits for it. So the second call with the same key is recorded as a recipe, and later calls replay
its allocations and launches with the addresses of their own tensors. Shapes that occur once are not
recorded.

A recipe refers to tensors by number: first the launcher's arguments, then the tensors it makes, in
order. Replay drops each tensor after its last use, no later than the launcher does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvit_kernels import launch, tuned
from fastvit_kernels.common import INTERPRET
from fastvit_kernels.operands import precision

MAX_RECIPES = 4096  # recipes kept
_SEEN = object()  # marks a key of which one call was made
_recipes: dict[tuple, Any] = {}
tuned.on_clear(_recipes.clear)


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


def _moved(descriptor: TensorDescriptor, base: Any) -> TensorDescriptor:
    """The descriptor with another base, without the checks that the original has passed."""
    moved = object.__new__(TensorDescriptor)
    moved.__dict__.update(descriptor.__dict__, base=base)
    return moved


class _Code:
    """Python source of a recipe, in which tensor i is `t<i>` and its address `p<i>`, and the
    constants that the source names.
    """

    def __init__(self, inputs: int, addressed: set[int]) -> None:
        self.count, self.addressed = inputs, addressed
        self.constants: dict[str, Any] = {
            "empty_strided": torch.empty_strided,
            "empty_with_version": _empty_with_version,
            "view_at": _view_at,
            "moved": _moved,
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


def _function(
    inputs: int, steps: list[Any], results: list[TensorRef], form: type
) -> Callable[..., Any]:
    """A function of `inputs` tensors that does the steps: straight-line code takes half the time of
    a loop over them.
    """
    launches = [step for step in steps if isinstance(step, Launch) and step.compiled]
    addressed = {place.index for step in launches for _, place, _ in step.places}
    code = _Code(inputs, addressed)
    lines = [f"p{i} = t{i}.data_ptr()" for i in range(inputs) if i in addressed]
    lines += ["stream = current_stream()"] if launches else []
    lines += [step.source(code) for step in steps]
    found = ", ".join(place.source(code) for place in results)
    if form in (list, tuple):
        found = f"[{found}]" if form is list else f"({found},)"
    arguments = ", ".join(f"t{i}" for i in range(inputs))
    source = "\n    ".join([f"def repeat({arguments}):", *lines, f"return {found}"])
    exec(source, code.constants)
    return code.constants["repeat"]


class Recipe(NamedTuple):
    """What a launcher does. repeat(*tensors) does it to other tensors."""

    steps: list[Any]
    repeat: Callable[..., Any]


_ALLOCATE = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
}


class Recorder(TorchDispatchMode):
    """Record the steps of a launcher. lost: it did something that a recipe cannot express."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.steps: list[Any] = []
        self.lost = self.busy = False
        self.inference = torch.is_inference_mode_enabled()
        self.counted: list[tuple[torch.Size, tuple[int, ...]]] = []
        self.numbers = WeakTensorKeyDictionary()
        for t in inputs:
            self._count(t)

    def __enter__(self) -> "Recorder":
        launch.recording.recorder = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        launch.recording.recorder = None
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if not self.busy:
            self._see(func, args, kwargs or {}, made)
        return made

    def _see(self, func: Any, args: Any, options: dict[str, Any], made: Any) -> None:
        tensors = list(made) if isinstance(made, (list, tuple)) else [made]
        base = next((a for a in args if isinstance(a, Tensor)), None)
        if func in _ALLOCATE:
            place = self._count(made)
            has_version_counter = self.inference and not made.is_inference()
            kind = (made.dtype, made.device, has_version_counter)
            self.steps.append(Allocation(place.shape, place.strides, *kind))
        elif func.is_view and base is not None and all(_shares(t, base) for t in tensors):
            for t in tensors:
                self.numbers[t] = self.numbers.get(base)
        elif isinstance(made, Tensor):
            makes = made not in self.numbers
            places = [self._place(a) if isinstance(a, Tensor) else a for a in args]
            options = {
                k: self._place(a) if isinstance(a, Tensor) else a for k, a in options.items()
            }
            self.steps.append(Call(func, tuple(places), options, makes))
            if makes:
                self._count(made)
        else:
            self.lost = True

    def launch(self, launch_fn: launch.LaunchFn, stream: Any, args: tuple, compiled: bool) -> Any:
        places = []
        for i, arg in enumerate(args):
            if isinstance(arg, TensorDescriptor):
                places.append((i, self._place(arg.base), _moved(arg, None)))
            elif isinstance(arg, Tensor):
                places.append((i, self._place(arg), None))
        self.steps.append(Launch(launch_fn, _without_tensors(args), places, compiled))
        self.busy = True
        try:
            return launch_fn(stream, args)
        finally:
            self.busy = False

    def _count(self, t: Tensor) -> TensorRef:
        self.numbers[t] = len(self.counted), t.data_ptr()
        self.counted.append((t.shape, t.stride()))
        return self._place(t)

    def _place(self, t: Tensor) -> Any:
        found = self.numbers.get(t)
        if found is None:
            self.lost = True
            return None
        number, start = found
        offset = t.data_ptr() - start
        whole = offset == 0 and (t.shape, t.stride()) == self.counted[number]
        return TensorRef(number, offset, t.shape, t.stride(), whole)

    def recipe(self, inputs: int, result: Any) -> Recipe | None:
        """The recipe of a launcher with `inputs` tensors that returned `result`, None if none."""
        form = type(result)
        results = [self._place(t) for t in (result if form in (list, tuple) else [result])]
        if self.lost or any(place.index < inputs for place in results):
            return None
        steps: list[Any] = []
        used = {place.index for place in results} | set(range(inputs))
        made = len(self.counted)
        for step in reversed(self.steps):
            places = {place.index for place in _places(step)}
            if _makes(step):
                made -= 1
                places.add(made)
            steps += [*map(Release, sorted(places - used)), step]
            used |= places
        steps.reverse()
        return Recipe(steps, _function(inputs, steps, results, form))


def _shares(t: Tensor, base: Tensor) -> bool:
    return t.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


def _without_tensors(args: tuple) -> tuple:
    return tuple(None if isinstance(a, (Tensor, TensorDescriptor)) else a for a in args)


def _places(step: Any) -> list[TensorRef]:
    if isinstance(step, Launch):
        return [place for _, place, _ in step.places]
    if isinstance(step, Call):
        return [a for a in (*step.args, *step.options.values()) if isinstance(a, TensorRef)]
    return []


def _makes(step: Any) -> bool:
    return isinstance(step, Allocation) or (isinstance(step, Call) and step.makes)


def run(launcher: Callable[..., Any], args: tuple) -> Any:
    """launcher(*args), replayed from its recipe where there is one."""
    if INTERPRET.value or not launch.launches_directly():
        return launcher(*args)
    return replay(launcher, args)


def replay(launcher: Callable[..., Any], args: tuple) -> Any:
    """`run` without its check that launches go to Triton itself."""
    key, tensors = _cache_key(launcher, args)
    if key is None or launch.recording.recorder is not None:
        return launcher(*args)
    recipe = _recipes.get(key)
    if type(recipe) is Recipe:
        return recipe.repeat(*tensors)
    if recipe is None:
        if len(_recipes) >= MAX_RECIPES:
            _recipes.clear()
        _recipes[key] = _SEEN
    if recipe is not _SEEN:
        return launcher(*args)
    result, recipe = record(launcher, args, tensors)
    _recipes[key] = recipe or False
    return result


def record(
    launcher: Callable[..., Any], args: tuple, tensors: list[Tensor]
) -> tuple[Any, Recipe | None]:
    """launcher(*args) and its recipe. tensors: those among args, in order."""
    with Recorder(tensors) as watch:
        result = launcher(*args)
    return result, watch.recipe(len(tensors), result)


def _cache_key(launcher: Callable[..., Any], args: tuple) -> tuple[tuple | None, list[Any]]:
    """The key of a call's recipe, None if it must not be replayed, and the call's tensors."""
    tensors: list[Any] = []
    facts: list[Any] = [launcher, args[0].device, torch.is_inference_mode_enabled()]
    addresses, wide = 0, False
    for arg in args:
        if isinstance(arg, Tensor):
            dtype = arg.dtype
            wide = wide or dtype is torch.float32
            tensors.append(arg)
            addresses |= arg.data_ptr()
            facts += (dtype, arg.shape, None if arg.is_contiguous() else arg.stride())
        else:
            facts.append(tuple(arg) if type(arg) is list else arg)
    if addresses % 16:
        return None, tensors
    if wide:
        facts.append(precision(torch.float32))
    if len({id(t) for t in tensors}) < len(tensors):
        ids = [id(t) for t in tensors]
        facts.append(tuple(map(ids.index, ids)))
    return tuple(facts), tensors
