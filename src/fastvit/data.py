"""The data sets of the command line: scikit-learn's digits, Fashion-MNIST files, image folders."""

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvit.augment import Augment
from fastvit.dataset import DataSet, Images, split_indices
from fastvit.errors import UsageError, need
from fastvit.image_folder import load_folder

FASHION_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
FORMS = "digits, fashion-mnist:PATH or folder:PATH"


def load_data(
    spec: str,
    image_size: tuple[int, int] | None = None,
    strict: bool = False,
    workers: int | None = None,
) -> DataSet:
    """Load the data set `spec`: digits, fashion-mnist:PATH or folder:PATH.

    image_size: (height, width) to resize to; None is 8x8, 28x28 and 64x64 respectively.
    """
    kind, _, path = spec.partition(":")
    if spec == "digits":
        return load_digits(image_size or (8, 8))
    if kind == "fashion-mnist" and path:
        return load_fashion_mnist(Path(path).expanduser(), image_size or (28, 28))
    if kind == "folder" and path:
        workers = min(8, os.cpu_count() or 1) if workers is None else workers
        return load_folder(Path(path).expanduser(), image_size or (64, 64), strict, workers)
    hint = (
        " (Debian's package dataset-fashion-mnist puts them in /usr/share/datasets/fashion-mnist)"
        if kind == "fashion-mnist"
        else ""
    )
    raise UsageError(f"--data must be {FORMS}, got {spec!r}{hint}")


def absolute(spec: str) -> str:
    """Make the path in `spec` absolute, so that it names the same data from any directory."""
    kind, _, path = spec.partition(":")
    return f"{kind}:{os.path.abspath(os.path.expanduser(path))}" if path else spec


def load_digits(image_size: tuple[int, int] = (8, 8)) -> DataSet:
    """Load the 1,797 handwritten digits, 8x8, that scikit-learn ships."""
    need("--data digits", "sklearn")
    from sklearn.datasets import load_digits as sklearn_digits

    pixels, labels = sklearn_digits(return_X_y=True)
    images = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    everything = Images(images, torch.from_numpy(np.asarray(labels, dtype=np.int64)))
    everything = everything.resized(image_size)
    train, val, test = (_take(everything, i) for i in split_indices(everything.labels))
    classes = tuple(str(digit) for digit in range(10))
    augment = Augment(shift=0.1, rotate=12, scale=0.1, padding="zeros")
    return DataSet("digits", classes, 1, image_size, train, val, test, augment)


def load_fashion_mnist(path: Path, image_size: tuple[int, int] = (28, 28)) -> DataSet:
    """Load Fashion-MNIST from its four IDX files; the test split is the published one."""
    if not path.is_dir():
        raise UsageError(f"--data fashion-mnist: {path} is not a folder")
    published, held_out = (_idx_pair(path, stem).resized(image_size) for stem in ("train", "t10k"))
    train, val, _ = split_indices(published.labels, test_share=0.0)
    augment = Augment(flip=True, padding="zeros")
    return DataSet(
        "fashion-mnist",
        FASHION_CLASSES,
        1,
        image_size,
        _take(published, train),
        _take(published, val),
        held_out,
        augment,
    )


def _idx_pair(path: Path, stem: str) -> Images:
    images = read_idx(_idx_file(path, f"{stem}-images", 3), 3)
    labels_path = _idx_file(path, f"{stem}-labels", 1)
    labels = read_idx(labels_path, 1)
    if len(images) != len(labels) or not len(images):
        raise UsageError(f"{path}: {len(images)} {stem} images but {len(labels)} labels")
    if labels.max() >= len(FASHION_CLASSES):
        raise UsageError(f"{labels_path}: label {labels.max()} is out of range 0..9")
    return Images(torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64)))


def _idx_file(path: Path, stem: str, rank: int) -> Path:
    names = [f"{stem}{dash}idx{rank}-ubyte{gz}" for dash in "-." for gz in ("", ".gz")]
    for name in names:
        if (path / name).is_file():
            return path / name
    raise UsageError(f"{path} holds no {names[0]} (plain or .gz)")


def read_idx(path: Path, rank: int) -> np.ndarray:
    """Read an IDX file of bytes, plain or gzipped: uint8, `rank` dimensions, big-endian sizes."""
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"{path}: damaged gzip file ({error})") from error
    header = 4 + 4 * rank
    if raw[:4] != bytes((0, 0, 8, rank)):
        raise UsageError(
            f"{path}: not an IDX file of bytes with {rank} dimensions: it starts with "
            f"{raw[:4].hex() or 'nothing'}, expected 000008{rank:02x}"
        )
    if len(raw) < header:
        raise UsageError(f"{path}: truncated in its header, {len(raw)} of {header} bytes")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", rank, 4))
    if len(raw) != header + math.prod(shape):
        raise UsageError(
            f"{path}: {len(raw)} bytes, but its header {shape} asks for {header + math.prod(shape)}"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


def _take(images: Images, indices: Tensor) -> Images:
    return Images(images.images[indices], images.labels[indices])
