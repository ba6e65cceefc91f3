"""The exception for invalid user input, and the check for optional packages."""

from importlib.util import find_spec

_PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow"}


class UsageError(ValueError):
    """Invalid data, settings or checkpoint. The command line prints it without a traceback."""


def need(purpose: str, *modules: str) -> None:
    """Raise UsageError if a package of the `train` extra is missing. Call it before any work."""
    missing = [_PACKAGES.get(m, m) for m in modules if find_spec(m) is None]
    if missing:
        raise UsageError(
            f"{purpose} needs {' and '.join(missing)}; install with: pip install 'fastvit[train]'"
        )
