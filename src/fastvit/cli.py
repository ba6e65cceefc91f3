"""The command line. For each subcommand `add_*` declares it and another function runs it."""

import argparse
import contextlib
import io
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastvit.arguments import pair
from fastvit.backend import versions
from fastvit.checkpoints import load_checkpoint
from fastvit.cli_checkpoints import add_convert, add_info, parse_size
from fastvit.data import absolute, load_data
from fastvit.errors import UsageError, need
from fastvit.presets import PRESETS
from fastvit.saving import lock_folder, remove_stale_temporaries
from fastvit.train import (
    STATE,
    Run,
    Settings,
    choose_device,
    load_state,
    make_model,
    make_settings,
)

MODEL_OPTIONS = ("dim", "depth", "heads", "mlp_dim", "patch_size", "image_size", "drop_path")
RUN_OPTIONS = ("epochs", "batch_size", "lr", "weight_decay", "label_smoothing", "seed", "strict")
PICTURES = ("curves.png", "attention.png")
FILES = (STATE, "model.safetensors", "model.json", *PICTURES)  # what a run writes


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. Returns the exit status: 0, 1 for unreadable images, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="fastvit", description="Train, use and convert Vision Transformers."
    )
    parser.add_argument("--version", action="version", version=versions())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_train, add_predict, add_convert, add_info):
        add(commands)
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # to print file names that it cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = args.run(args)
        print(end="", flush=True)
        return status
    except BrokenPipeError:  # stdout was closed, as by `fastvit predict ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 128 + 13  # the shell's status for a process that SIGPIPE killed
    except (UsageError, OSError) as error:  # OSError: a full disk, a folder without permission
        print(f"fastvit {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def add_train(commands: Any) -> None:
    """Declare `fastvit train`."""
    parser = commands.add_parser(
        "train",
        help="train a ViT on images and evaluate it",
        description="Train a ViT and evaluate it on held-out images. With no options: on the "
        "handwritten digits inside scikit-learn, nothing downloaded.",
    )
    parser.set_defaults(run=train)
    parser.add_argument("--data", help="digits (default), fashion-mnist:PATH or folder:PATH")
    parser.add_argument("--out", type=Path, help="a new folder for the run (default runs/DATA)")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in DIR")

    where = parser.add_argument_group("where it runs")
    where.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    where.add_argument(
        "--amp", choices=("auto", "bf16", "off"), help="auto (default): bf16 on a GPU"
    )
    where.add_argument("--compile", action="store_true", default=None, help="through torch.compile")
    where.add_argument("--workers", type=int, help="reader processes (default: cores, up to 8)")

    model = parser.add_argument_group("model (defaults depend on the data)")
    model.add_argument("--model", metavar="PRESET", help=f"{next(iter(PRESETS))}, ...")
    for name in ("dim", "depth", "heads", "mlp-dim"):
        model.add_argument(f"--{name}", type=int, metavar="N")
    for name in ("patch-size", "image-size"):
        model.add_argument(f"--{name}", type=parse_size, metavar="N|HxW")
    model.add_argument("--drop-path", type=float, metavar="RATE")

    recipe = parser.add_argument_group("training (defaults depend on the data)")
    for name in ("epochs", "batch-size"):
        recipe.add_argument(f"--{name}", type=int, metavar="N")
    recipe.add_argument("--lr", type=float, help="peak learning rate")
    recipe.add_argument("--weight-decay", type=float, metavar="RATE")
    recipe.add_argument("--label-smoothing", type=float, metavar="RATE")
    recipe.add_argument("--seed", type=int, metavar="N")
    recipe.add_argument(
        "--strict", action="store_true", default=None, help="stop at an image that is broken"
    )


def train(args: argparse.Namespace) -> int:
    """Run `fastvit train`: train, test, write the checkpoint and the figures."""
    need("fastvit train", "matplotlib", "tqdm")
    device = choose_device(args.device)
    if args.workers is not None and args.workers < 0:
        raise UsageError(f"--workers must not be negative, got {args.workers}")
    with contextlib.ExitStack() as stack, _sigterm_as_interrupt():
        return _train(args, device, stack)


def _train(args: argparse.Namespace, device: torch.device, stack: contextlib.ExitStack) -> int:
    given: Path | None = args.resume or args.out
    held = given if given is not None and given.is_dir() else None
    if held is not None:
        _lock(held, stack)
    settings, state = _settings(args)
    if args.out is not None:
        _check_free(args.out)
    data = load_data(
        settings.data,
        pair("image_size", settings.model["image_size"]),
        settings.strict,
        args.workers,
    )
    model = make_model(settings, data)
    folder = held or _new_folder(args.out, settings.data)
    if held is None:
        _lock(folder, stack)
        _check_free(folder)  # again: another run may have finished here while the data was read
    amp = args.amp == "bf16" or (args.amp in (None, "auto") and device.type == "cuda")
    run = Run(settings, data, model, device, amp, bool(args.compile))
    if state is not None:
        run.resume(state)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"data     {data.describe()}")
    print(f"model    {_describe(settings)}, {parameters:,} parameters")
    print(f"device   {device.type}, {'bfloat16 autocast' if run.amp else 'float32'}; {versions()}")
    print(f"backend  {run.backend}")
    print(f"out      {folder}", flush=True)
    try:
        run.fit(folder)
    except KeyboardInterrupt:
        if (folder / STATE).is_file():
            again = f"go on with: fastvit train --resume {shlex.quote(str(folder))}"
        else:
            again = "before its first epoch was done"
        print(f"\ninterrupted; {again}", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise UsageError(
                f"out of memory with batches of {settings.batch_size}; lower --batch-size"
            ) from error
        raise
    _finish(run, folder)
    return 0


def _lock(folder: Path, stack: contextlib.ExitStack) -> None:
    """Lock the folder against other runs and delete the partial files of killed ones."""
    if stack.enter_context(lock_folder(folder)):
        remove_stale_temporaries(folder, FILES)


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM, which schedulers send to end a run, like ctrl-c."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # only the main thread can set handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _settings(args: argparse.Namespace) -> tuple[Settings, dict[str, Any] | None]:
    """The run's settings, and the state to resume from or None."""
    given = {name: getattr(args, name) for name in RUN_OPTIONS}
    chosen = {name: getattr(args, name) for name in MODEL_OPTIONS}
    given, chosen = ({k: v for k, v in d.items() if v is not None} for d in (given, chosen))
    if args.resume is not None:
        settings, state = load_state(args.resume)
        others = ("data", "model", "out", "amp", "compile")
        fixed = [*given, *chosen, *(name for name in others if getattr(args, name) is not None)]
        if fixed:
            option = fixed[0].replace("_", "-")
            raise UsageError(f"--resume takes the run's own settings; leave out --{option}")
        return settings, state
    data = absolute(args.data or "digits")  # the run may be resumed from anywhere
    return make_settings(data, args.model, model=chosen, **given), None


def _finish(run: Run, folder: Path) -> None:
    """Test, write the checkpoint and the two figures, and print results and paths."""
    from fastvit.plots import plot_curves
    from fastvit.saving import save_checkpoint

    data = run.data
    test_loss, test_accuracy = run.evaluate(data.test)
    val_accuracy = run.history[-1]["val_accuracy"]
    results = {
        "test_accuracy": test_accuracy,
        "test_loss": test_loss,
        "val_accuracy": val_accuracy,
        "epochs": len(run.history),
        "training_seconds": round(run.seconds, 1),
        "skipped_files": data.skipped,
        "backend": run.backend,
    }
    checkpoint = save_checkpoint(
        folder / "model.safetensors",
        run.model,
        classes=list(data.classes),
        mean=list(data.mean),
        std=list(data.std),
        data=data.name,
        results=results,
    )
    title = f"{data.name}: test accuracy {test_accuracy:.1%}"
    plot_curves(folder / "curves.png", run.history, title)
    _plot_attention(run, folder / "attention.png")
    if data.skipped:
        print(f"skipped  {data.skipped} files that could not be read", file=sys.stderr)
    print(f"validation accuracy  {val_accuracy:.2%} of {len(data.val.readable):,}")
    print(f"test accuracy        {test_accuracy:.2%} of {len(data.test.readable):,}")
    print(f"training took        {run.seconds:.1f} s, backend {run.backend}")
    for path in (checkpoint, *(folder / name for name in PICTURES)):
        print(f"wrote                {path}")


def _plot_attention(run: Run, path: Path, count: int = 12) -> None:
    from fastvit.plots import plot_attention

    test = run.data.test
    readable = test.readable
    order = readable[torch.linspace(0, len(readable) - 1, min(count, len(readable))).long()]
    images, labels = next(iter(test.batches(order, count)))
    model, classes = run.model.eval(), run.data.classes
    probabilities, predicted = run.logits(images).softmax(-1).max(-1)
    x = run.normalised(images.to(run.device).float() / 255)
    whose = "<cls> looks" if model.has_class_token else "patches look"
    with run.autocast():
        rows = "cls" if model.has_class_token else "all"
        maps = model.attention_maps(x, rows=rows)[:, 0].mean((1, 2))
    maps = maps[:, model.num_prefix_tokens :].unflatten(1, model.patch_embed.grid_size)
    captions = [
        (classes[true], classes[guess], p)
        for true, guess, p in zip(
            labels.tolist(), predicted.tolist(), probabilities.tolist(), strict=True
        )
    ]
    title = f"Where {whose} (last layer, mean of its heads), and the predicted class"
    plot_attention(path, images.cpu(), maps.float().cpu(), captions, title)


def _check_free(out: Path) -> None:
    if (out / STATE).exists() or (out / "model.safetensors").exists():
        raise UsageError(
            f"--out {out} already holds a run; choose another folder, "
            f"or go on with it: --resume {out}"
        )


def _new_folder(out: Path | None, data: str) -> Path:
    """Make the run's folder: `out`, or the next free runs/DATA."""
    if out is not None:
        candidates = [out]
    else:
        kind = data.partition(":")[0]
        candidates = [Path("runs") / (kind if i == 1 else f"{kind}-{i}") for i in range(1, 10_000)]
    for folder in candidates:
        try:
            folder.mkdir(parents=True, exist_ok=out is not None)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"--out: cannot make {folder}: {error}") from error
    raise UsageError(f"--out: cannot make {candidates[0]}: a file of that name is in the way")


def _describe(settings: Settings) -> str:
    m = settings.model
    patch = "x".join(map(str, pair("patch_size", m["patch_size"])))
    return (
        f"ViT, patch {patch}, dim {m['dim']}, depth {m['depth']}, {m['heads']} heads, "
        f"{settings.epochs} epochs of batch {settings.batch_size}, lr {settings.lr:g}, "
        f"seed {settings.seed}"
    )


def add_predict(commands: Any) -> None:
    """Declare `fastvit predict`."""
    parser = commands.add_parser(
        "predict",
        help="the most probable classes of image files",
        description="Print the most probable classes of each image.",
    )
    parser.set_defaults(run=predict)
    parser.add_argument("checkpoint", help="a run's folder, a checkpoint file or a hub id")
    parser.add_argument("images", type=Path, nargs="+", metavar="image")
    parser.add_argument("--top", type=int, default=5, metavar="N")
    parser.add_argument("--invert", action="store_true", help="for dark strokes on a light ground")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def predict(args: argparse.Namespace) -> int:
    """Run `fastvit predict`. Returns exit status 1 if an image could not be read."""
    from fastvit.predict import predict as predictions

    need("fastvit predict", "PIL")
    if args.top < 1:
        raise UsageError(f"--top must be at least 1, got {args.top}")
    model = load_checkpoint(args.checkpoint).to(choose_device(args.device))
    status = 0
    for path, answer in predictions(model, args.images, args.top, args.invert):
        if isinstance(answer, UsageError):
            print(f"fastvit predict: {answer}", file=sys.stderr)
            status = 1
            continue
        print(path)
        for name, probability in answer:
            print(f"  {probability:6.1%}  {name}")
    return status
