"""The machine: names and versions, measured ceilings, energy."""

import ast
import ctypes
import hashlib
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from checks import dtype_name
from clone import ROOT

CODE = ("src", "kernels")
# Exponentials per clock of one SM's special-function units (CUDA programming guide, arithmetic
# throughput table).
EXPS_PER_CLOCK = 16


@dataclass(frozen=True)
class Ceilings:
    """Measured in the same run: matrix-product FLOP/s by dtype, copy bytes/s; computed: exps/s."""

    flops: dict[str, float]
    bandwidth: float
    exps: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def ceilings(device: torch.device) -> Ceilings:
    """Measure the ceilings: the best of several large products per dtype and of several copies."""
    cuda = device.type == "cuda"
    size, count = (8192, 10) if cuda else (512, 3)
    flops = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = _best(lambda a=a, b=b: a @ b, device, count)
        flops[dtype_name(dtype)] = 2 * size**3 / seconds
    source = torch.randn((256 << 20) if cuda else (4 << 20), device=device)
    target = torch.empty_like(source)
    seconds = _best(lambda: target.copy_(source), device, count)
    bandwidth = 2 * source.nbytes / seconds
    return Ceilings(flops, bandwidth, _exps_per_second(device) if cuda else None)


def _best(call: Callable[[], Any], device: torch.device, count: int) -> float:
    call()
    times = []
    for _ in range(count):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return min(times)


def _exps_per_second(device: torch.device) -> float | None:
    clock = _query("clocks.max.sm", device)
    if clock is None:
        return None
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    try:
        return EXPS_PER_CLOCK * sms * float(clock.split()[0]) * 1e6
    except ValueError:  # "[N/A]"
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to judge or repeat a figure."""
    names = ("triton", "timm", "transformers", "torchvision", "vit-pytorch", "numpy")
    env: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "driver": _query("driver_version", device),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "code": code_digest(),
        **{name: _version(name) for name in names},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        env["capability"] = f"{properties.major}.{properties.minor}"
        env["sms"] = properties.multi_processor_count
        env["memory_gb"] = round(properties.total_memory / 1e9, 1)
        env["power_limit"] = _query("power.limit", device)
    return env


def slug(name: str) -> str:
    """A device's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The commit measured, with '+' if its code has been changed; 'unknown' outside git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--", *CODE], capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip()[:12] + ("+" if dirty.stdout.strip() else "")


def code_digest(without: Sequence[str] = ()) -> str:
    """A hash of the code that figures depend on, by which outdated figures are recognized: of the
    syntax tree without docstrings, so that prose may change.
    """
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name in without:
                continue
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                body = getattr(node, "body", None)
                first = body[0] if isinstance(body, list) and body else None
                if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                    first.value.value = None
            digest.update(path.relative_to(ROOT).as_posix().encode() + ast.dump(tree).encode())
    return digest.hexdigest()[:12]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _uuid(device: torch.device) -> str:
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"


def _query(what: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    command = [
        "nvidia-smi",
        f"--id={_uuid(device)}",
        f"--query-gpu={what}",
        "--format=csv,noheader",
    ]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = found.stdout.strip().splitlines()
    return lines[0] if found.returncode == 0 and lines else None


class Energy:
    """Joules the GPU has drawn, read from NVML; `joules()` is None where NVML gives none."""

    def __init__(self, device: torch.device) -> None:
        self._handle: ctypes.c_void_p | None = None
        if device.type != "cuda":
            return
        handle = ctypes.c_void_p()
        try:
            self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
            name = _uuid(device).encode()
            if self._nvml.nvmlInit_v2() == 0:
                if self._nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)) == 0:
                    self._handle = handle
        except (OSError, AttributeError):
            return  # no NVML, or one without these functions

    def joules(self) -> float | None:
        if self._handle is None:
            return None
        millijoules = ctypes.c_ulonglong()
        code = self._nvml.nvmlDeviceGetTotalEnergyConsumption(
            self._handle, ctypes.byref(millijoules)
        )
        return millijoules.value / 1e3 if code == 0 else None
