"""Pytest set-up of the benchmarks: warnings raised by peers are ignored.

Unlike in tests/, the interpreter stays off and memory is not filled with NaN.
"""

import clone  # noqa: F401
import pytest

_PEERS = (
    "torch._inductor",
    "torch._dynamo",
    "transformer_engine",
    "xformers",
    "flash_attn",
    "timm",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for module in _PEERS:
            item.add_marker(pytest.mark.filterwarnings(f"ignore:::{module}"))
