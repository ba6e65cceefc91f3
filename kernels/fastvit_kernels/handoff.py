"""When an op may pass on to the next op what it knows of the residual stream. No Triton here.

`row_statistics` are wrong as soon as their tensor changes. A change in place usually shows in the
tensor's version, but not one by a collective, through `.data` or by a user's own kernel. So they
are passed on only inside `allowed()`, which our blocks enter where no other code can run between.
"""

import functools
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch


class _State(threading.local):
    depth = 0
    kept: Any = None  # of `row_statistics`


state = _State()


class _Allowed:
    def __enter__(self) -> None:
        state.depth += 1

    def __exit__(self, *error: Any) -> None:
        state.depth -= 1
        if not state.depth:
            forget()


def allowed() -> Any:
    """A context in which ops pass on statistics; empty under torch.compile, which has none."""
    return nullcontext() if torch.compiler.is_compiling() else _Allowed()


def within(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Run a module's forward inside `allowed()`."""

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # Dynamo takes no context inside a checkpointed block
            return forward(*args, **kwargs)
        with _Allowed():
            return forward(*args, **kwargs)

    return wrapped


def forget() -> None:
    """Drop what the last op left: other code may have changed its output since."""
    state.kept = None
