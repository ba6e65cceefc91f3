"""The error for input that a person can correct, and the check for optional packages."""

from importlib.util import find_spec

_PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow"}


class UsageError(ValueError):
    """Input at fault: bad data, settings or checkpoint. The command line prints it bare."""


def need(purpose: str, *modules: str) -> None:
    """Raise before any work when a package of the `train` extra is missing."""
    missing = [_PACKAGES.get(m, m) for m in modules if find_spec(m) is None]
    if missing:
        raise UsageError(
            f"{purpose} needs {' and '.join(missing)}; install with: pip install 'fastvit[train]'"
        )
