"""Train a ViT on labelled images: AdamW, warm-up and cosine, label smoothing, light augmentation.

Each epoch is seeded from (seed, epoch) and ends by saving the whole state, so that a killed run
resumes to exactly the result of an uninterrupted one.
"""

import dataclasses
import math
import sys
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.backend import backend_report
from fastvit.dataset import DataSet, Split
from fastvit.errors import UsageError
from fastvit.model import ViT
from fastvit.param_groups import param_groups
from fastvit.presets import PRESETS
from fastvit.saving import replacing

STATE = "state.pt"


@dataclass(frozen=True)
class Settings:
    """The settings that determine a run's result. model: the arguments of `fastvit.ViT`."""

    data: str
    model: dict[str, Any]
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 0.05
    warmup: float = 0.1
    label_smoothing: float = 0.1
    clip: float = 1.0
    seed: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
            if getattr(self, name) >= 2**31:
                raise UsageError(f"{name} must be below 2**31, got {getattr(self, name)}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise UsageError(f"lr must be positive, got {self.lr}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise UsageError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"seed must be in [0, 2**31), got {self.seed}")


# Default settings for each kind of data, chosen on validation splits.
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": dict(
        epochs=40,
        batch_size=64,
        lr=2e-3,
        model=dict(image_size=8, patch_size=2, dim=64, depth=4, heads=4, mlp_dim=128),
    ),
    "fashion-mnist": dict(
        epochs=8,
        batch_size=128,
        lr=3e-3,
        model=dict(image_size=28, patch_size=7, dim=64, depth=3, heads=2, mlp_dim=128),
    ),
    "folder": dict(
        epochs=50,
        batch_size=64,
        lr=1e-3,
        model=dict(image_size=64, patch_size=8, dim=192, depth=6, heads=3, mlp_dim=768),
    ),
}


def make_settings(data: str, preset: str | None = None, **given: Any) -> Settings:
    """The data set's defaults, with a preset's architecture if named, overridden by `given`.

    given: fields of Settings, and `model`, a dict of ViT arguments.
    """
    kind = data.partition(":")[0]
    if kind not in DEFAULTS:
        raise UsageError(f"--data must be one of {', '.join(DEFAULTS)} (:PATH), got {data!r}")
    defaults = DEFAULTS[kind]
    model = dict(defaults["model"])
    if preset is not None:
        if preset not in PRESETS:
            raise UsageError(f"--model must be one of {', '.join(PRESETS)}, got {preset!r}")
        model = dict(PRESETS[preset])
    chosen = given.pop("model", {})
    if "dim" in chosen and "mlp_dim" not in chosen:
        chosen = {**chosen, "mlp_dim": chosen["dim"] * model["mlp_dim"] // model["dim"]}
    return Settings(**{**defaults, "data": data, "model": {**model, **chosen}, **given})


def make_model(settings: Settings, data: DataSet) -> ViT:
    """Create a ViT for `data`; its weights depend on the seed alone."""
    torch.manual_seed(settings.seed)
    sizes = {"num_classes": len(data.classes), "channels": data.channels}
    try:
        model = ViT(**{**settings.model, **sizes})
    except ValueError as error:
        raise UsageError(str(error)) from error
    init_small(model)
    return model


def init_small(model: ViT) -> None:
    """Initialize weights for training from scratch at any width.

    A std of 0.02 suits dim 768. In a narrow model it leaves the residual branches near zero and the
    positions far below the patch embeddings: for epochs it learns as if patches had no positions.
    """
    if model.pos_embed is not None:
        nn.init.trunc_normal_(model.pos_embed, std=0.5)
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)


@dataclass
class Run:
    """A training run: model, optimizer and history; `fit` trains the remaining epochs.

    amp and compile are saved with the state, since they change the result's last bits.
    history: per finished epoch, loss and accuracy in training and validation, and images/s.
    """

    settings: Settings
    data: DataSet
    model: ViT
    device: torch.device
    amp: bool
    compile: bool = False

    def __post_init__(self) -> None:
        self.model.to(self.device)
        self.optimizer = make_optimizer(self.model, self.settings)
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        shape = (self.data.channels, 1, 1)
        self._mean = torch.tensor(self.data.mean, device=self.device).view(shape)
        self._std = torch.tensor(self.data.std, device=self.device).view(shape)
        self._prepare_forward()

    def _prepare_forward(self) -> None:
        """Set what depends on amp and compile."""
        self.backend = self._backend()
        self.forward: Any = torch.compile(self.model) if self.compile else self.model

    @property
    def steps_per_epoch(self) -> int:
        return max(len(self.data.train) // self.settings.batch_size, 1)

    def fit(self, folder: Path) -> None:
        """Train the remaining epochs, writing FOLDER/state.pt after each."""
        from tqdm import tqdm

        epochs = self.settings.epochs
        interactive = sys.stderr.isatty()
        bar = tqdm(
            total=epochs * self.steps_per_epoch,
            initial=len(self.history) * self.steps_per_epoch,
            unit="step",
            dynamic_ncols=True,
            disable=not interactive,
            bar_format="{desc} {bar} {percentage:3.0f}% [{elapsed}<{remaining}]{postfix}",
        )
        with bar:
            while len(self.history) < epochs:
                epoch = len(self.history)
                start = time.perf_counter()
                entry = self.train_epoch(epoch, bar)
                self.seconds += time.perf_counter() - start
                self.history.append(entry)
                self.save_state(folder / STATE)
                bar.set_postfix_str(self._summary(entry))
                if not interactive and (len(self.history) % max(epochs // 10, 1) == 0):
                    line = f"epoch {epoch + 1:3d}/{epochs}  {self._summary(entry)}"
                    print(line, file=sys.stderr, flush=True)

    def _summary(self, entry: dict[str, float]) -> str:
        return (
            f"loss {entry['train_loss']:.3f}, accuracy {entry['train_accuracy']:.1%}, "
            f"validation {entry['val_accuracy']:.1%}, {entry['images_per_second']:,.0f} images/s, "
            f"backend {self.backend.partition(' ')[0]}"
        )

    def train_epoch(self, epoch: int, bar: Any = None) -> dict[str, float]:
        """Train for one pass over the training split, then evaluate on the validation split."""
        torch.manual_seed(_epoch_seed(self.settings.seed, epoch))
        generator = torch.Generator().manual_seed(_epoch_seed(self.settings.seed, epoch) + 1)
        order = torch.randperm(len(self.data.train), generator=generator)
        order = order[: self.steps_per_epoch * self.settings.batch_size]
        self.model.train()
        total = torch.zeros(2, device=self.device)
        count, start = 0, time.perf_counter()
        for step, (images, labels) in enumerate(
            self.data.train.batches(order, self.settings.batch_size)
        ):
            images, labels = images.to(self.device), labels.to(self.device)
            images = self.normalised(self.data.augment(images.float() / 255, generator))
            loss, correct = self.train_step(images, labels, epoch * self.steps_per_epoch + step)
            total += torch.stack([loss * len(labels), correct])
            count += len(labels)
            if bar is not None:
                if not bar.disable:
                    rate = count / (time.perf_counter() - start)
                    bar.set_description_str(f"epoch {epoch + 1}/{self.settings.epochs}", False)
                    bar.set_postfix_str(self._running(total, count, rate), False)
                bar.update()
        if not count:
            raise UsageError(f"{self.data.name}: no training image could be read")
        mean_loss, accuracy = (total / count).tolist()
        if not math.isfinite(mean_loss):
            raise UsageError(
                f"the loss is {mean_loss} in epoch {epoch + 1}: training diverged; "
                f"lower --lr (now {self.settings.lr:g})"
            )
        rate = count / (time.perf_counter() - start)
        val_loss, val_accuracy = self.evaluate(self.data.val)
        return {
            "train_loss": mean_loss,
            "train_accuracy": accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "images_per_second": rate,
        }

    def _running(self, total: Tensor, count: int, rate: float) -> str:
        if self.device.type == "cuda":  # reading `total` would synchronize the GPU
            return f"{rate:,.0f} images/s, backend {self.backend.partition(' ')[0]}"
        loss, accuracy = (total / count).tolist()
        return (
            f"loss {loss:.3f}, accuracy {accuracy:.1%}, {rate:,.0f} images/s, "
            f"backend {self.backend.partition(' ')[0]}"
        )

    def train_step(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """One optimizer step. Returns loss and number of correct predictions, without a sync."""
        settings = self.settings
        lr = learning_rate(settings, step, settings.epochs * self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.autocast():
            logits = self.forward(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=settings.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        return loss.detach(), (logits.detach().argmax(-1) == labels).sum()

    @torch.no_grad()
    def evaluate(self, split: Split) -> tuple[float, float]:
        """Cross-entropy, without label smoothing, and accuracy on a split."""
        self.model.eval()
        total, count = torch.zeros(2, device=self.device), 0
        for images, labels in split.batches(torch.arange(len(split)), 512):
            labels = labels.to(self.device)
            logits = self.logits(images)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            total += torch.stack([loss, (logits.argmax(-1) == labels).sum()])
            count += len(labels)
        if not count:
            raise UsageError(f"{self.data.name}: no image of a held-out split could be read")
        loss, accuracy = (total / count).tolist()
        return loss, accuracy

    def logits(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) -> float32 logits."""
        with self.autocast():
            return self.model(self.normalised(images.to(self.device).float() / 255)).float()

    def normalised(self, images: Tensor) -> Tensor:
        """Normalize pixels in 0..1 by the data's mean and std."""
        return (images - self._mean) / self._std

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 autocast if `amp`."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.amp else nullcontext()

    def save_state(self, path: Path) -> None:
        """Write everything that `resume` needs to one file, atomically."""
        state = {
            "settings": dataclasses.asdict(self.settings),
            "amp": self.amp,
            "compile": self.compile,
            "data": self.data.describe(),
            "classes": list(self.data.classes),
            "mean": list(self.data.mean),
            "std": list(self.data.std),
            "files": self.data.files,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "seconds": self.seconds,
        }
        with replacing(path) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # PyTorch's error for a full disk
                raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from error

    def resume(self, state: dict[str, Any]) -> None:
        """Restore a state of `load_state`, with its amp and compile; the data must be unchanged."""
        data = self.data
        now = {"data": data.describe(), "classes": list(data.classes), "files": data.files}
        for name, value in now.items():
            was = state[name]
            if name == "files" and was != value:
                raise UsageError(
                    f"--resume: the data changed: the files of {self.settings.data} have other "
                    "names than when the run began, or are in other folders"
                )
            if was != value:
                raise UsageError(f"--resume: the data changed: it was {was!r}, now it is {value!r}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history, self.seconds = state["history"], state["seconds"]
        self.amp, self.compile = state["amp"], state["compile"]
        self._prepare_forward()

    def _backend(self) -> str:
        """The backend that runs the training step, with the reason if it is not Triton."""
        height, width = self.data.image_size
        images = torch.zeros(1, self.data.channels, height, width, device=self.device)
        with self.autocast():
            choices = backend_report(self.model, images).choices
        served = {c.backend for c in choices}
        reasons = dict.fromkeys(c.reason for c in choices if c.reason)
        name = served.pop() if len(served) == 1 else "mixed"
        return f"{name} ({'; '.join(reasons)})" if reasons else name


STATE_KEYS = "data classes files amp compile model optimizer history seconds".split()


def load_state(folder: Path) -> tuple[Settings, dict[str, Any]]:
    """Load the settings and the state of the run in `folder`."""
    path = folder / STATE
    if not path.is_file():
        raise UsageError(
            f"--resume: {folder} holds no {STATE}; no epoch of a run was finished there"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        settings = Settings(**state["settings"])
        if missing := [name for name in STATE_KEYS if name not in state]:
            raise KeyError(*missing)
        return settings, state
    except Exception as error:  # the unpickler of a damaged file raises anything
        raise UsageError(f"--resume: {path} is damaged or not a run's state: {error}") from error


def make_optimizer(model: ViT, settings: Settings) -> torch.optim.AdamW:
    """AdamW that decays only matrices, not biases, norms, positions or tokens."""
    groups = param_groups(model, settings.lr, settings.weight_decay)
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def learning_rate(settings: Settings, step: int, total: int) -> float:
    """Linear warm-up over the first `warmup` of all steps, then half a cosine down to 0."""
    warmup = max(round(settings.warmup * total), 1)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def choose_device(name: str) -> torch.device:
    """'auto' is the GPU if there is one. Raises UsageError for 'cuda' without a GPU."""
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu or cuda, got {name!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # e.g. of an old driver; 'cuda' raises below
        available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UsageError("--device cuda was asked for, but PyTorch finds no NVIDIA GPU here")
    return torch.device("cuda" if name != "cpu" and available else "cpu")


def _epoch_seed(seed: int, epoch: int) -> int:
    return 2 * (seed * 1_000_003 + epoch)
