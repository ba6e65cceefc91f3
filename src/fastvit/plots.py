"""The two figures of a run: its training curves and attention maps."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.saving import replacing

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
TRAIN, VAL = "#3b6fd4", "#e07b39"


def plot_curves(path: Path, history: Sequence[dict[str, float]], title: str) -> None:
    """Plot training and validation loss and accuracy by epoch."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title, parse_math=False, fontsize=11, color=INK)
    epochs = range(1, len(history) + 1)
    marker = "o" if len(history) < 3 else None
    for axis, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        train = "training, augmented" + (", smoothed labels" if quantity == "loss" else "")
        for split, label, colour in (("train", train, TRAIN), ("val", "validation", VAL)):
            values = [entry[f"{split}_{quantity}"] for entry in history]
            last = f"{values[-1]:.1%}" if quantity == "accuracy" else f"{values[-1]:.3f}"
            axis.plot(
                epochs, values, color=colour, lw=1.8, marker=marker, label=f"{label} ({last})"
            )
        axis.set_xlabel("epoch", color=MUTED)
        axis.set_title(quantity, loc="left", fontsize=10, color=INK)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(color=GRID, lw=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(colors=MUTED, labelsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GRID)
        axis.legend(frameon=False, fontsize=9, labelcolor=INK)
        if quantity == "accuracy":
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)


def plot_attention(
    path: Path,
    images: Tensor,
    maps: Tensor,
    captions: Sequence[tuple[str, str, float]],
    title: str,
    columns: int = 6,
) -> None:
    """Plot each image beside the same image overlaid with its attention map.

    images: uint8 (B, C, H, W); maps: (B, h, w), attention by patch; captions: per image the
    true class, the predicted class and its probability.
    """
    from matplotlib.figure import Figure

    count, _, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    aspect = 2 * width / height
    figure = Figure(
        figsize=(max(2.3 * columns, 5.5), rows * (2.3 / aspect + 0.3) + 0.4), layout="constrained"
    )
    figure.suptitle(title, parse_math=False, fontsize=11, color=INK)
    figure.get_layout_engine().set(wspace=0.06, hspace=0.08)  # pyright: ignore
    overlays = overlay(images, maps)
    for i, axis in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axis.set_axis_off()
        if i >= count:
            continue
        image = images[i].float().div(255).expand(3, -1, -1)
        size = overlays.shape[-2:]
        image = F.interpolate(image[None], size, mode="nearest")[0]
        gap = torch.ones(3, size[0], max(size[1] // 24, 1))
        axis.imshow(torch.cat([image, gap, overlays[i]], dim=2).permute(1, 2, 0).numpy())
        true, predicted, probability = captions[i]
        right = true == predicted
        text = f"{predicted}  {probability:.0%}" if right else f"{predicted}, is {true}"
        axis.set_title(text, parse_math=False, fontsize=9, color=INK if right else "#c0392b", pad=3)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)


def overlay(images: Tensor, maps: Tensor) -> Tensor:
    """The images in dimmed grey under their maps in colour: (B, 3, H', W') in 0..1."""
    from matplotlib import colormaps

    height, width = images.shape[-2:]
    factor = max(1, round(112 / min(height, width)))
    size = (height * factor, width * factor)
    heat = F.interpolate(maps[:, None].float(), size, mode="bilinear")[:, 0]
    low, high = (f(heat, dim=(1, 2), keepdim=True) for f in (torch.amin, torch.amax))
    heat = (heat - low) / (high - low).clamp_min(1e-12)
    colour = torch.from_numpy(colormaps["inferno"](heat.numpy())[..., :3]).permute(0, 3, 1, 2)
    grey = F.interpolate(images.float().mean(1, keepdim=True) / 255, size, mode="nearest")
    return (0.35 * grey + 0.65 * colour.float()).clamp(0, 1)
