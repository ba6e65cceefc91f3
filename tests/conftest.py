"""Device, NaN-filled memory and seeds for every test; without a GPU, Triton's interpreter."""

import os
from collections.abc import Iterator

import pytest
import torch
import torchvision_shim
from interpreter import round_to_bfloat16_as_a_gpu_does

PTX_MACHINE = os.environ.get("PTX_MACHINE")
# cuBLAS, which the eager reference calls, is deterministic only with a fixed workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not torch.cuda.is_available():
    # Read when triton is first imported, so it must be set before any kernel module is.
    os.environ.setdefault("TRITON_INTERPRET", "0" if PTX_MACHINE else "1")
    torch.set_num_threads(1)
torchvision_shim.install()
round_to_bfloat16_as_a_gpu_does()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, else the CPU with Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def _ptx_machine() -> Iterator[None]:
    """PTX_MACHINE=90 or 90-late: run the PTX of kernels on the CPU; see `ptx_machine`."""
    if PTX_MACHINE is None:
        yield
        return
    import ptx_machine

    arch, _, late = PTX_MACHINE.partition("-")
    with ptx_machine.running(int(arch), late == "late"):
        yield


@pytest.fixture(scope="session")
def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@pytest.fixture(autouse=True)
def _each_launcher_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay no recipes, since tests patch what launchers look up; `test_replay` checks recipes."""
    if torch.cuda.is_available():
        from fastvit_kernels import replay

        monkeypatch.setattr(replay, "run", lambda launcher, args: launcher(*args))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison():
    """Fill torch.empty with NaN, so that elements which no kernel has written show."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _ieee_float32():
    """float32 products are IEEE unless a test says otherwise."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
