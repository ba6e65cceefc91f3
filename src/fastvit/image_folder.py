"""Data sets of image files: a folder per class, with or without train, val and test above."""

import hashlib
import math
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from fastvit.augment import Augment
from fastvit.dataset import DataSet, ImageFiles, split_indices
from fastvit.errors import UsageError, need

MEMORY_LIMIT = 2 << 30
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
VAL_NAMES = ("val", "valid", "validation")  # the first that exists is the validation folder


def load_folder(
    path: Path,
    image_size: tuple[int, int] = (64, 64),
    strict: bool = False,
    workers: int = 1,
    memory_limit: int = MEMORY_LIMIT,
) -> DataSet:
    """Load images from PATH/CLASS/*, or from PATH/train/CLASS/* beside PATH/val or PATH/test.

    With one tree, fixed shares of each class are validation and test. With PATH/train, the test
    split is PATH/test, or PATH/val if there is no PATH/test; validation is PATH/val if both exist,
    else a share of train. PATH/valid or PATH/validation is read if there is no PATH/val. Sets over
    `memory_limit` bytes are streamed from disk.
    """
    need("--data folder", "PIL")
    if not path.is_dir():
        raise UsageError(f"--data folder: {path} is not a folder")
    for_val = [name for name in VAL_NAMES if (path / name).is_dir()]
    held_out = [path / name for name in ("test", *for_val[:1]) if (path / name).is_dir()]
    laid_out = (path / "train").is_dir() and bool(held_out)
    root = path / "train" if laid_out else path
    if laid_out and len(for_val) > 1:
        unused = ", ".join(for_val[1:])
        print(f"{path}: validation is {for_val[0]}; not used: {unused}", file=sys.stderr)
    classes = _class_names(root)
    paths, labels = _list_images(root, classes, training=True)

    def files(paths: list[Path], labels: Tensor) -> ImageFiles:
        return ImageFiles(paths, labels, image_size, strict, workers)

    def chosen(indices: Tensor) -> ImageFiles:
        return files([paths[i] for i in indices.tolist()], labels[indices])

    if laid_out:
        test = files(*_list_images(held_out[0], classes))
        if len(held_out) == 2:
            train, val = files(paths, labels), files(*_list_images(held_out[1], classes))
        else:
            train, val = (chosen(i) for i in split_indices(labels, test_share=0.0)[:2])
    else:
        train, val, test = (chosen(i) for i in split_indices(labels))
    for name, split in (("training", train), ("validation", val), ("test", test)):
        if not len(split):
            raise UsageError(
                f"{path}: too few images for a {name} split ({len(paths)} in {len(classes)} "
                "classes; a class needs at least three)"
            )
    names = ["\n".join(str(p.relative_to(path)) for p in s.paths) for s in (train, val, test)]
    digest = hashlib.sha256(os.fsencode("\n\n".join(names))).hexdigest()
    augment = Augment(flip=True, shift=0.08, scale=0.1, padding="border")
    total = sum(map(len, (train, val, test))) * 3 * math.prod(image_size)
    shape = (path.name or "folder", classes, 3, image_size)
    if total > memory_limit:
        return DataSet(*shape, train, val, test, augment, files=digest)
    loaded = train.load(), val.load(), test.load()
    for name, split in zip(("training", "validation", "test"), loaded, strict=True):
        if not len(split):
            raise UsageError(f"{path}: no image of the {name} split could be read")
    skipped = sum(len(split.skipped) for split in (train, val, test))
    if skipped:
        print(
            f"{path}: skipped {skipped} of {total // (3 * math.prod(image_size))} files that "
            "could not be read",
            file=sys.stderr,
        )
    return DataSet(*shape, *loaded, augment, skipped_in_loading=skipped, files=digest)


def _class_names(root: Path) -> tuple[str, ...]:
    classes = tuple(sorted(p.name for p in _folders(root)))
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        raise UsageError(
            f"{root}: expected a subfolder with images per class, at least two; found {found}"
        )
    # Split folders under other names would be read as classes, with "train" as one of them.
    nested = [c for c in classes if _folders(root / c) and not _images_in(root / c, deep=False)]
    if len(nested) == len(classes) or "train" in nested:
        name = "train" if "train" in nested else nested[0]
        raise UsageError(
            f"{root}: {name!r} holds folders, not images; expected a subfolder with images per "
            f"class, or train beside test, {' or '.join(VAL_NAMES)}; found {', '.join(classes[:4])}"
        )
    return classes


def _images_in(folder: Path, deep: bool = True) -> list[Path]:
    """The image files in `folder` and below; follows links, but reads each folder only once."""
    found: list[Path] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = [] if real in seen or not deep else sorted(folders)
        if real not in seen:
            images = (n for n in names if n.lower().endswith(IMAGE_SUFFIXES))
            found += [Path(here) / name for name in images if not name.startswith(".")]
        seen.add(real)
    return sorted(found)


def _list_images(
    root: Path, classes: tuple[str, ...], training: bool = False
) -> tuple[list[Path], Tensor]:
    """Every image file under root/CLASS, in a fixed order, and its class."""
    unknown = sorted({p.name for p in _folders(root)} - set(classes))
    if unknown:
        raise UsageError(f"{root}: class {unknown[0]!r} is not among those of the training folder")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _images_in(root / name)
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise UsageError(f"{root}: no images ({', '.join(IMAGE_SUFFIXES)}) in its subfolders")
    empty = set(range(len(classes))) - set(labels)
    if empty and training:
        raise UsageError(f"{root}: class {classes[min(empty)]!r} has no images")
    return paths, torch.tensor(labels)


def _folders(root: Path) -> list[Path]:
    return [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
