"""Patch embedding against float64: forward and every gradient, any geometry and layout."""

from typing import Any

import pytest
import torch
from checks import dtype_name
from parity import (
    DTYPES,
    check_compiles,
    check_parity,
    check_plain_backward,
    check_repeatable,
    leaf,
)

import fastvit
from fastvit import ops


def arguments(B: int, C: int, H: int, W: int, p_h: int, p_w: int, dim: int, P: int) -> dict:
    return {
        "images": leaf(B, C, H, W),
        "weight": leaf(dim, C, p_h, p_w, scale=0.1),
        "bias": leaf(dim),
        "pos": leaf((H // p_h) * (W // p_w), dim),
        "prefix": leaf(P, dim) if P else None,
    }


GEOMETRIES = {
    "16x16": (2, 3, 32, 48, 16, 16, 64, 1),
    "14x14": (2, 3, 28, 42, 14, 14, 32, 1),
    "registers": (1, 1, 8, 8, 4, 4, 24, 5),
    "3x2 no prefix": (3, 5, 6, 10, 3, 2, 72, 0),
    "one pixel": (2, 4, 3, 5, 1, 1, 8, 1),
    "one patch": (1, 3, 8, 16, 8, 16, 136, 1),
    "33 images": (33, 1, 2, 2, 2, 2, 8, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_parity(geometry: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    check_parity("patch_embed", arguments(*geometry), dtype, device)


@pytest.mark.parametrize("absent", ["bias", "pos", "prefix"])
def test_without(absent: str, device: torch.device) -> None:
    args = arguments(2, 3, 8, 12, 4, 4, 16, 2)
    check_parity("patch_embed", {**args, absent: None}, device=device)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_float32_images_are_those_of_16_bits(training: bool, device: torch.device) -> None:
    args = {k: t.to(device) for k, t in arguments(2, 3, 32, 16, 8, 8, 40, 1).items()}
    args["images"] = args["images"].detach()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        given = {**args, "images": args["images"].to(dtype)}
        given["weight"] = args["weight"].detach().clone().requires_grad_()
        with torch.set_grad_enabled(training), torch.autocast(device.type, torch.bfloat16):
            with fastvit.use_backend("triton"):
                out = ops.patch_embed(**given)
        if training:
            out.sum().backward()
        found.append((out.detach(), given["weight"].grad))
    for one, other in zip(*found, strict=True):
        assert (one is other is None) or torch.equal(one, other)


def test_autocast(device: torch.device) -> None:
    args = arguments(2, 3, 32, 16, 8, 8, 40, 1)
    check_parity("patch_embed", args, torch.bfloat16, device, autocast=True)
    bare = {**args, "pos": None, "prefix": None}
    check_parity("patch_embed", bare, torch.bfloat16, device, autocast=True)


def test_prefix_and_positions_of_two_dtypes(device: torch.device) -> None:
    args = arguments(2, 3, 8, 12, 4, 4, 16, 2)
    args["prefix"] = args["prefix"].detach().bfloat16().requires_grad_()
    check_parity("patch_embed", args, torch.bfloat16, device, autocast=True)


def test_layouts(device: torch.device) -> None:
    args = arguments(2, 3, 16, 32, 8, 8, 16, 1)
    images = args["images"].detach()
    for layout in (
        images.contiguous(memory_format=torch.channels_last),
        images.transpose(2, 3).contiguous().transpose(2, 3),
        leaf(2, 3, 17, 35, grad=False)[:, :, 1:, 3:],
        leaf(2, 6, 16, 32, grad=False)[:, ::2],
    ):
        check_parity("patch_embed", {**args, "images": layout.requires_grad_()}, device=device)


def test_channels_last_is_read_in_place_by_whole_runs(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastvit_kernels import patch_embed

    given = []

    def launch(images: torch.Tensor, *args: Any) -> torch.Tensor:
        given.append(images)
        return patch_embed._fwd(images, *args)

    monkeypatch.setattr(patch_embed, "patch_embed_fwd", launch)
    args = {k: v.detach().to(device) for k, v in arguments(2, 3, 16, 32, 8, 8, 16, 1).items()}
    args["images"] = args["images"].contiguous(memory_format=torch.channels_last)
    patch_embed.patch_embed(**args, dtype=torch.float32)
    assert given[0].data_ptr() == args["images"].data_ptr()
    assert patch_embed.vector_width(given[0], 8 * 3) == 8


def test_images_without_gradient(device: torch.device) -> None:
    args = arguments(2, 3, 8, 8, 4, 4, 16, 1)
    check_parity("patch_embed", {**args, "images": args["images"].detach()}, device=device)


def test_frozen_parameters_get_no_gradient(device: torch.device) -> None:
    args = arguments(2, 3, 8, 8, 4, 4, 16, 1)
    for frozen in (
        ("weight", "bias"),
        ("weight",),
        ("pos",),
        ("prefix", "images"),
        ("bias", "pos"),
    ):
        some = {k: v.detach() if k in frozen else v for k, v in args.items()}
        check_parity("patch_embed", some, device=device)


def test_parameters_at_any_strides(device: torch.device) -> None:
    args = arguments(2, 3, 8, 12, 4, 4, 16, 2)
    args["weight"] = args["weight"].detach().contiguous(memory_format=torch.channels_last)
    args["bias"] = leaf(16, 2, grad=False)[:, 1]
    args["pos"], args["prefix"] = leaf(16, 6, grad=False).t(), leaf(16, 2, grad=False).t()
    check_parity("patch_embed", {k: v.requires_grad_() for k, v in args.items()}, device=device)


def test_empty_batch(device: torch.device) -> None:
    args = {k: v.detach().to(device) for k, v in arguments(1, 3, 8, 8, 4, 4, 16, 1).items()}
    weight = args["weight"].requires_grad_()
    with fastvit.use_backend("triton"):
        out = ops.patch_embed(**{**args, "images": args["images"][:0]})
    assert out.shape == (0, 5, 16)
    out.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_nan_stays_in_its_patch(device: torch.device) -> None:
    args = {k: v.detach().to(device) for k, v in arguments(2, 3, 8, 8, 4, 4, 16, 1).items()}
    args["images"][1, 2, 5, 6] = float("nan")
    with fastvit.use_backend("triton"):
        nan = ops.patch_embed(**args).isnan()
    assert nan[1, 4].all() and int(nan.sum()) == 16


def test_nan_weight_spares_the_prefix(device: torch.device) -> None:
    args = {k: v.detach().to(device) for k, v in arguments(2, 3, 8, 8, 4, 4, 16, 2).items()}
    args["weight"][3, 0, 1, 1] = float("nan")
    with fastvit.use_backend("triton"):
        nan = ops.patch_embed(**args).isnan()
    assert nan[:, 2:, 3].all() and int(nan.sum()) == 2 * 4


def test_repeatable_compiled_and_first_order(device: torch.device) -> None:
    args = arguments(3, 3, 16, 16, 4, 4, 24, 1)
    check_repeatable("patch_embed", args, torch.bfloat16, device)
    check_compiles("patch_embed", args, device)
    check_plain_backward("patch_embed", args, device)


def test_vector_width_asks_for_aligned_runs() -> None:
    from fastvit_kernels.patch_embed import vector_width

    images = torch.empty(2, 3, 32, 32)
    assert vector_width(images, 16) == 8
    assert vector_width(images, 14) == 2
    assert vector_width(images, 7) == 1
    assert vector_width(images.contiguous(memory_format=torch.channels_last), 16) == 1
    assert vector_width(torch.empty(2, 3, 32, 36)[..., 4:], 16) == 4
