"""Labelled images in three splits: scikit-learn's digits, Fashion-MNIST files, image folders.

Images are uint8 (N, C, H, W) until a batch reaches the model. Splits depend on the data alone, not
on a run's seed: settings are chosen on `val`, and `test` is only used at the end.
"""

import gzip
import hashlib
import math
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastvit.augment import Augment
from fastvit.errors import UsageError, need

SPLIT_SEED = 20210603
TEST_SHARE, VAL_SHARE = 0.2, 0.1
MEMORY_LIMIT = 2 << 30
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
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
VAL_NAMES = ("val", "valid", "validation")  # the first that exists is the validation folder
FORMS = "digits, fashion-mnist:PATH or folder:PATH"


@dataclass
class Images:
    """Images in memory. images: uint8 (N, C, H, W); labels: int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def readable(self) -> Tensor:
        """Indices of the images; for ImageFiles, of those that could be read so far."""
        return torch.arange(len(self))

    def batches(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images of `order`, `batch_size` at a time, and their labels."""
        for chosen in order.split(batch_size):
            yield self.images[chosen], self.labels[chosen]

    def resized(self, size: tuple[int, int]) -> "Images":
        """Resize to (height, width), antialiased."""
        if tuple(self.images.shape[-2:]) == size:
            return self
        parts = [
            F.interpolate(part.float(), size, mode="bilinear", antialias=True)
            for part in self.images.split(1024)
        ]
        return Images(torch.cat(parts).round().clamp(0, 255).byte(), self.labels)


@dataclass
class ImageFiles(Dataset):
    """Images on disk, read as RGB at `size` (height, width), by worker processes when streamed.

    A file that cannot be read is named on stderr, kept in `skipped` and left out of its batch; with
    `strict` it raises instead.
    """

    paths: list[Path]
    labels: Tensor
    size: tuple[int, int]
    strict: bool = False
    workers: int = 0
    skipped: set[Path] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def readable(self) -> Tensor:
        """Indices of the files but those that could not be read so far."""
        read = [i for i, path in enumerate(self.paths) if path not in self.skipped]
        return torch.tensor(read, dtype=torch.int64)

    def __getitem__(self, index: int) -> tuple[Tensor | None, int, str]:
        try:
            return read_image(self.paths[index], self.size), index, ""
        except UsageError as error:
            return None, index, str(error)

    def batches(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the readable images of `order`, up to `batch_size` at a time, and their labels."""
        loader = DataLoader(
            self,
            batch_sampler=[part.tolist() for part in order.split(batch_size)],
            num_workers=self.workers,
            collate_fn=self._collate,
            generator=torch.Generator(),  # else it draws from the global one
        )
        for collated in loader:
            batch = self._readable(*collated)
            if len(batch):
                yield batch.images, batch.labels

    def load(self) -> Images:
        """Read all readable images into memory."""
        with ThreadPoolExecutor(max(self.workers, 1)) as pool:
            return self._readable(*self._collate(pool.map(self.__getitem__, range(len(self)))))

    def _collate(
        self, items: Iterable[tuple[Tensor | None, int, str]]
    ) -> tuple[Tensor, list[int], list[tuple[int, str]]]:
        """Stack the readable images: a worker sends one tensor, since each takes an open file.
        Returns them, their indices, and index and reason of the others.
        """
        items = list(items)
        images = [image for image, _, _ in items if image is not None]
        chosen = [index for image, index, _ in items if image is not None]
        empty = torch.empty((0, 3, *self.size), dtype=torch.uint8)
        failed = [(index, reason) for image, index, reason in items if image is None]
        return torch.stack(images) if images else empty, chosen, failed

    def _readable(self, images: Tensor, chosen: list[int], failed: list[tuple[int, str]]) -> Images:
        for index, reason in failed:
            if self.paths[index] in self.skipped:
                continue
            if self.strict:
                raise UsageError(f"{reason} (--strict)")
            self.skipped.add(self.paths[index])
            print(f"skipped: {reason}", file=sys.stderr)
        return Images(images, self.labels[chosen])


Split = Images | ImageFiles


@dataclass
class DataSet:
    """Three splits of a data set, its classes, and the shape and statistics of its images."""

    name: str
    classes: tuple[str, ...]
    channels: int
    image_size: tuple[int, int]
    train: Split
    val: Split
    test: Split
    augment: Augment
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    skipped_in_loading: int = 0
    files: str = ""  # digest of all file names and their splits; "" without files

    def __post_init__(self) -> None:
        if not self.mean:
            self.mean, self.std = statistics(self.train)

    @property
    def skipped(self) -> int:
        """Number of files that could not be read so far."""
        splits = (self.train, self.val, self.test)
        streamed = sum(len(s.skipped) for s in splits if isinstance(s, ImageFiles))
        return self.skipped_in_loading + streamed

    def describe(self) -> str:
        """One line with sizes, image shape and classes."""
        height, width = self.image_size
        return (
            f"{self.name}: {len(self.train):,} train, {len(self.val):,} validation and "
            f"{len(self.test):,} test images, {self.channels}x{height}x{width}, "
            f"{len(self.classes)} classes"
        )


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


def split_indices(
    labels: Tensor, test_share: float = TEST_SHARE, val_share: float = VAL_SHARE
) -> tuple[Tensor, Tensor, Tensor]:
    """Train, validation and test indices, class by class, the same in every run.

    A class of three images or more has at least one in each split whose share is not 0.
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        least = 1 if len(members) >= 3 else 0
        test, val = (
            max(round(share * len(members)), least) if share else 0
            for share in (test_share, val_share)
        )
        for part, chosen in zip(
            parts,
            members.tensor_split([len(members) - test - val, len(members) - test]),
            strict=True,
        ):
            part.append(chosen)
    train, val, test = (torch.cat(part).sort().values for part in parts)
    return train, val, test


def statistics(split: Split, sample: int = 2048) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of each channel, of pixels in 0..1, over at most `sample` images."""
    step = math.ceil(len(split) / sample)
    total = torch.zeros(0)
    square, count = total, 0
    for images, _ in split.batches(torch.arange(0, len(split), step), 256):
        x = images.double() / 255
        total = x.sum((0, 2, 3)) + (total if count else 0)
        square = x.square().sum((0, 2, 3)) + (square if count else 0)
        count += x.shape[0] * x.shape[2] * x.shape[3]
    if not count:
        raise UsageError("no image of the training split could be read")
    mean = total / count
    std = (square / count - mean.square()).clamp_min(1e-6).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


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


def read_image(
    path: Path, size: tuple[int, int], channels: int = 3, invert: bool = False
) -> Tensor:
    """Read an image upright, cropped to the aspect ratio of `size` and resized: uint8 (C, H, W)."""
    need("reading images", "PIL")
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(_eight_bits(image))
            upright = upright.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # decoders raise anything from OSError to SyntaxError
        raise UsageError(f"{path}: {_reason(error)}") from error
    height, width = size
    fitted = ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC)
    if invert:
        fitted = ImageOps.invert(fitted)
    pixels = np.array(fitted, dtype=np.uint8)
    return torch.from_numpy(pixels.reshape(height, width, channels)).permute(2, 0, 1).contiguous()


def _eight_bits(image: Any) -> Any:
    """Scale 16-bit pixels to 8 bits, since Pillow's convert would clip them. Raises ValueError for
    deeper pixels, whose white level is unknown."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        from PIL import Image

        exif = image.getexif()
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
        image.info["exif"] = exif.tobytes()
    elif mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {mode!r}, which has no white; save it as 8 bits")
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return f"cannot be read as an image ({type(error).__name__}: {error})"


def _take(images: Images, indices: Tensor) -> Images:
    return Images(images.images[indices], images.labels[indices])
