"""Labelled images, in memory or on disk, and the three splits of a data set.

Images are uint8 (N, C, H, W) until a batch reaches the model. Splits depend on the data alone, not
on a run's seed: settings are chosen on `val`, and `test` is only used at the end.
"""

import math
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastvit.augment import Augment
from fastvit.errors import UsageError
from fastvit.read_image import read_image

SPLIT_SEED = 20210603
TEST_SHARE, VAL_SHARE = 0.2, 0.1


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
