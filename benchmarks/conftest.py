"""Pytest set-up of the benchmarks: warnings raised by peers are ignored.

Unlike in tests/, the interpreter stays off and memory is not filled with NaN.
"""

import pytest
import torchvision_shim

# timm imports torchvision, whose wheel may be built for another torch.
torchvision_shim.install()

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
