"""Whole models: the ones compared, and one row for each in inference or a training step."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from checks import dtype_name
from torch import Tensor, nn

import fastvit
from benchmarks import harness, peers
from benchmarks.harness import Work
from benchmarks.machine import Ceilings, Energy
from benchmarks.workloads import Size

CLASSES = 1000
PARITY_BATCH = 4


@dataclass(frozen=True)
class Entry:
    """A model to measure: `build` makes the eager module; `mode` is torch.compile's, if any."""

    name: str
    build: Callable[[Size], nn.Module]
    mode: str | None = None
    graph: bool = False
    absent: str | None = None


@dataclass(frozen=True)
class Task:
    """'infer' (weights and images in dtype) or 'train' (float32 weights, autocast to dtype)."""

    kind: str
    size: Size
    batch: int
    dtype: torch.dtype

    @property
    def key(self) -> str:
        return f"{self.kind} {self.size.name} batch {self.batch} {dtype_name(self.dtype)}"

    @property
    def work(self) -> Work:
        flops = (3 if self.kind == "train" else 1) * self.batch * self.size.flops
        return Work(flops, self.size.bytes(self.kind, self.batch, self.dtype.itemsize))


def entries(device: torch.device, autotune: bool = False) -> list[Entry]:
    """Ours and the peers; those that compile for minutes are absent without `autotune`."""
    gpu = peers.missing(device=device)
    name = peers.ours_name(device)
    timm, vp = (peers.missing(m, device=device, gpu=False) for m in ("timm", "vit_pytorch"))
    tv, hf = (peers.missing(m, device=device, gpu=False) for m in ("torchvision", "transformers"))
    late = gpu or (None if autotune else "left out: compiles for minutes; --only autotune")
    return [
        Entry(name, _fastvit),
        Entry("timm eager (SDPA)", _timm, absent=timm),
        Entry(f"{name} + torch.compile", _fastvit, "default", absent=gpu),
        Entry("timm + torch.compile", _timm, "default", absent=gpu or timm),
        Entry(f"{name} + CUDA graph", _fastvit, graph=True, absent=gpu),
        Entry("timm + torch.compile max-autotune", _timm, "max-autotune", absent=late or timm),
        Entry("Hugging Face ViT (sdpa)", _hugging_face, absent=hf),
        Entry("torchvision", _torchvision, absent=tv),
        Entry("vit-pytorch", _vit_pytorch, absent=vp),
        Entry("timm + torchao int8", _torchao, absent=peers.missing("torchao", device=device)),
    ]


def run(
    task: Task,
    device: torch.device,
    ceilings: Ceilings,
    seconds: float,
    chosen: list[Entry] | None = None,
    rounds: tuple[int, int] = (3, 60),
) -> list[dict]:
    """One row per entry: parity on a small batch, then steps timed interleaved, then memory."""
    harness.release(device)
    rows: dict[str, dict] = {}
    steps: dict[str, Callable[[], Any]] = {}
    modules: dict[str, nn.Module] = {}
    used: dict[str, Entry] = {}
    tolerance: float | None = None
    for entry in _timm_first(entries(device) if chosen is None else chosen):
        row = rows[entry.name] = _row(task, entry)
        if entry.absent:
            row |= {"status": "absent", "reason": entry.absent}
            continue
        try:
            # The truth is a float64 copy of the model itself; for ours, which loads timm's weights,
            # it is timm's model.
            module = seeded(entry.build, task.size, device)
            error = _error(module, _truth_of(entry, module, task, device), task, device)
            row["relative_error"] = error
            if tolerance is None and entry.build is _timm:
                tolerance = 2 * error + torch.finfo(task.dtype).eps
            allowed = tolerance if tolerance is not None else 4 * torch.finfo(task.dtype).eps
            if not error <= allowed:
                reason = f"relative error {error:.2e}, allowed {allowed:.2e}"
                row |= {"status": "failed parity", "reason": reason}
                continue
            steps[entry.name] = make_step(module, task, device, entry.mode, entry.graph)
            modules[entry.name], used[entry.name] = module, entry
            reason = _differs(steps[entry.name], module, task, device, allowed)
            if reason:
                row |= {"status": "failed parity", "reason": reason}
        except torch.OutOfMemoryError as oom:
            row |= {"status": "out of memory", "reason": str(oom)[:200]}
        except Exception as failure:
            row |= {"status": "error", "reason": harness.describe(failure)}
        if "status" in row:
            steps.pop(entry.name, None)
            harness.free_cache(device)
    samples = harness.measure(steps, device, seconds, rounds=rounds)
    for name, step in steps.items():
        rows[name] |= _timed(task, samples[name], ceilings)
        # A captured graph allocated its memory earlier; compiled code saves other tensors for
        # backward than its module, which `_saved_mb` runs.
        entry = used[name]
        whole = entry.graph or entry.mode == "max-autotune"
        rows[name] |= {"peak_mb": None, "joules_per_image": None}
        try:
            rows[name]["peak_mb"] = None if whole else harness.peak_mb(step, device)
            rows[name]["joules_per_image"] = joules_per_image(step, task, device, rows[name])
            if task.kind == "train" and not (entry.graph or entry.mode):
                rows[name]["saved_mb"] = _saved_mb(modules[name], task, device)
        except Exception as failure:  # the time measured remains valid
            rows[name]["reason"] = harness.describe(failure)
    return list(rows.values())


def _differs(
    step: Callable[[], Any], module: nn.Module, task: Task, device: torch.device, allowed: float
) -> str | None:
    """None if the step as timed (compiled, captured) agrees with its module, else the reason.

    Compares logits or, in training, losses. Compiles the step as a side effect, so that a failure
    is recorded for this entry alone.
    """
    for _ in range(2):
        got = step()
    images, labels = _batch(task, task.batch, device)
    backend, kind = peers.backend(device), device.type
    train = task.kind == "train"
    autocast = train and task.dtype != torch.float32
    images = images if train else images.to(task.dtype)
    with torch.no_grad(), fastvit.use_backend(backend), torch.autocast(kind, task.dtype, autocast):
        want = _logits(module(images))
        want = F.cross_entropy(want, labels) if train else want
    error = float((got.detach().double() - want.double()).norm() / want.double().norm())
    return None if error <= 2 * allowed else f"as timed: off by {error:.2e}, allowed {allowed:.2e}"


def make_step(
    module: nn.Module,
    task: Task,
    device: torch.device,
    mode: str | None = None,
    graph: bool = False,
) -> Callable[[], Any]:
    """A callable that runs one batch of inference, or one whole training step, on random images."""
    images, labels = _batch(task, task.batch, device)
    backend = peers.backend(device)
    if task.kind == "infer":
        module = module.to(task.dtype).eval()
        images = images.to(task.dtype)
    model = torch.compile(module, mode=mode, dynamic=False) if mode else module

    @torch.no_grad()
    def infer() -> Any:
        if mode:
            torch.compiler.cudagraph_mark_step_begin()
        with fastvit.use_backend(backend):
            return _logits(model(images))

    if task.kind == "infer":
        return _graphed(infer) if graph else infer
    module.train()
    parameters = list(module.parameters())
    # With a learning rate of 0 the optimizer does all its work but weights do not change: every
    # step has the same loss, which `_differs` checks.
    optimizer = torch.optim.AdamW(
        parameters, lr=0.0, weight_decay=0.0, fused=True, capturable=graph
    )
    autocast = task.dtype != torch.float32

    def train() -> Any:
        if mode:
            torch.compiler.cudagraph_mark_step_begin()
        with fastvit.use_backend(backend), torch.autocast(device.type, task.dtype, autocast):
            loss = F.cross_entropy(_logits(model(images)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return _graphed(train) if graph else train


def largest_batch(
    entry: Entry, size: Size, dtype: torch.dtype, device: torch.device, limit: int = 1 << 14
) -> int:
    """The largest batch, to an eighth, whose training step fits in memory; 0 if none does."""
    module = seeded(entry.build, size, device)

    def fits(batch: int) -> bool:
        try:
            make_step(module, Task("train", size, batch, dtype), device)()
            harness.synchronize(device)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            module.zero_grad(set_to_none=True)
            harness.free_cache(device)

    best = 0
    while best < limit and fits(max(1, 2 * best)):
        best = max(1, 2 * best)
    step = best // 2
    while best < limit and step >= max(1, best // 8):
        if fits(best + step):
            best += step
        step //= 2
    return best


def joules_per_image(
    step: Callable[[], Any], task: Task, device: torch.device, row: dict
) -> float | None:
    """Mean over about a second of steps; None where NVML does not report energy."""
    meter = Energy(device)
    if meter.joules() is None:
        return None
    count = max(1, int(1000 / row["median_ms"]))
    harness.synchronize(device)
    before = meter.joules()
    for _ in range(count):
        step()
    harness.synchronize(device)
    after = meter.joules()
    if before is None or after is None:
        return None
    return (after - before) / (count * task.batch)


def _graphed(step: Callable[[], Any]) -> Callable[[], Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay(_: Any = step) -> Any:  # the step owns the tensors whose addresses were captured
        graph.replay()
        return out

    return replay


def _batch(task: Task, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(1)
    side = task.size.image
    images = torch.randn(batch, 3, side, side, generator=generator, device=device)
    labels = torch.randint(CLASSES, (batch,), generator=generator, device=device)
    return images, labels


def _logits(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


def seeded(build: Callable[[Size], nn.Module], size: Size, device: torch.device) -> nn.Module:
    """Build the module on the device, with weights drawn from seed 0."""
    torch.manual_seed(0)
    with device:
        return build(size).to(device)


def _truth_of(entry: Entry, module: nn.Module, task: Task, device: torch.device) -> nn.Module:
    if entry.build is _fastvit and not _no_timm():
        return seeded(_timm, task.size, device)
    return copy.deepcopy(module)


def _error(module: nn.Module, truth: nn.Module, task: Task, device: torch.device) -> float:
    """Relative L2 error against float64, of the logits or, in training, of all gradients."""
    images, labels = _batch(task, min(PARITY_BATCH, task.batch), device)
    truth = truth.double()
    backend = peers.backend(device)
    if task.kind == "infer":
        copied = copy.deepcopy(module).to(task.dtype).eval()
        # Both models have the rounded weights, so that the error is that of the arithmetic.
        rounded = truth.to(task.dtype).double().eval()
        with torch.no_grad(), fastvit.use_backend(backend):
            got = _logits(copied(images.to(task.dtype))).double()
        with torch.no_grad(), fastvit.use_backend("reference"):
            want = _logits(rounded(images.to(task.dtype).double()))
        return float((got - want).norm() / want.norm())
    autocast = task.dtype != torch.float32
    with fastvit.use_backend(backend), torch.autocast(device.type, task.dtype, autocast):
        loss = F.cross_entropy(_logits(module(images)), labels)
    loss.backward()
    with fastvit.use_backend("reference"):
        F.cross_entropy(_logits(truth(images.double())), labels).backward()
    square = error = 0.0
    for name, want in _gradients(truth):
        got = module.get_parameter(name).grad
        assert got is not None, f"{name} got no gradient"
        error += float((got.double() - want).square().sum())
        square += float(want.square().sum())
    module.zero_grad(set_to_none=True)
    return (error / square) ** 0.5


def _gradients(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad


def _saved_mb(module: nn.Module, task: Task, device: torch.device) -> float:
    images, labels = _batch(task, task.batch, device)
    autocast = task.dtype != torch.float32

    def forward() -> Tensor:
        with (
            fastvit.use_backend(peers.backend(device)),
            torch.autocast(device.type, task.dtype, autocast),
        ):
            return F.cross_entropy(_logits(module(images)), labels)

    return harness.saved_mb(forward, list(module.parameters()))


def _row(task: Task, entry: Entry) -> dict:
    return {
        "kind": task.kind,
        "model": task.size.name,
        "batch": task.batch,
        "dtype": dtype_name(task.dtype),
        "provider": entry.name,
    }


def _timed(task: Task, samples: harness.Samples, ceilings: Ceilings) -> dict:
    row: dict[str, Any] = {"status": "ok", **harness.spread(samples.seconds)}
    ms = row["median_ms"]
    floor = task.work.floor_ms(ceilings, task.dtype)
    rate = ceilings.flops[dtype_name(task.dtype)]
    return row | {
        "seconds": samples.seconds,
        "launch_us": samples.launch_us,
        "images_per_s": 1e3 * task.batch / ms,
        "tflops": task.work.flops / ms / 1e9,
        "floor_ms": floor,
        "times_floor": ms / floor,
        "mfu_of_measured": 1e3 * task.work.flops / rate / ms,
    }


def _timm_first(chosen: list[Entry]) -> list[Entry]:
    """Put timm eager first: its error sets the tolerance for the others."""
    return sorted(chosen, key=lambda e: not (e.build is _timm and e.mode is None))


def _no_timm() -> str | None:
    return peers.missing("timm", device=torch.device("cpu"), gpu=False)


def _timm(size: Size) -> nn.Module:
    vit: Any = import_module("timm.models.vision_transformer").VisionTransformer
    module = vit(
        img_size=size.image,
        patch_size=size.patch,
        embed_dim=size.dim,
        depth=size.depth,
        num_heads=size.heads,
        init_values=size.layer_scale,
        num_classes=CLASSES,
    )
    return randomize_weights(module)


def _fastvit(size: Size) -> nn.Module:
    module = fastvit.ViT(num_classes=CLASSES, **size.arguments())
    if _no_timm():
        return randomize_weights(module)
    torch.manual_seed(0)
    module.load_state_dict(_timm(size).state_dict(), strict=True)
    return module


def _hugging_face(size: Size) -> nn.Module:
    transformers: Any = import_module("transformers")
    config = transformers.ViTConfig(
        image_size=size.image,
        patch_size=size.patch,
        hidden_size=size.dim,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.dim,
        num_labels=CLASSES,
        attn_implementation="sdpa",
    )
    return randomize_weights(transformers.ViTForImageClassification(config))


def _torchvision(size: Size) -> nn.Module:
    vit: Any = import_module("torchvision.models").VisionTransformer
    return randomize_weights(
        vit(size.image, size.patch, size.depth, size.heads, size.dim, 4 * size.dim)
    )


def _vit_pytorch(size: Size) -> nn.Module:
    vit: Any = import_module("vit_pytorch").ViT
    arguments = {k: v for k, v in size.arguments().items() if k != "layer_scale"}
    return randomize_weights(vit(num_classes=CLASSES, dim_head=size.dim // size.heads, **arguments))


def _torchao(size: Size) -> nn.Module:
    quantization: Any = import_module("torchao.quantization")
    module = _timm(size)
    quantization.quantize_(module, quantization.Int8DynamicActivationInt8WeightConfig())
    return module


@torch.no_grad()
def randomize_weights(module: nn.Module) -> nn.Module:
    """Draw zero heads, biases and tiny LayerScales at random: they would hide a wrong branch."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1 and not name.endswith("weight"):
            gain = 0.5 if name.endswith("gamma") else 0.0
            parameter.copy_(gain + 0.02 * torch.randn_like(parameter))
        elif "head" in name and not bool(parameter.any()):
            parameter.normal_(std=0.02)
    return module
