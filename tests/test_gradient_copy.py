"""A gradient carries a copy for the residual branch between ops: it is used, and never stale."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checks import check
from fastvit_kernels import gradient_copy
from parity import leaf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastvit
from fastvit import ops

Edit = Callable[[fastvit.ViT], None]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For each backward that asked for a copy, whether it got one."""
    found: list[bool] = []
    attached = gradient_copy.attached

    def watch(grad: Tensor, request: gradient_copy.CopyRequest | None) -> Tensor | None:
        copy = attached(grad, request)
        if request is not None:
            found.append(copy is not None)
        return copy

    monkeypatch.setattr(gradient_copy, "attached", watch)
    yield found


def model(depth: int = 2, **options) -> fastvit.ViT:
    torch.manual_seed(1)
    sizes = {
        "image_size": 16,
        "patch_size": 4,
        "dim": 32,
        "depth": depth,
        "heads": 2,
        "mlp_dim": 64,
    }
    return fastvit.ViT(**sizes, num_classes=5, **options)


def gradients(
    vit: fastvit.ViT, device: torch.device, backend: str, dtype: torch.dtype, autocast: bool
) -> dict[str, Tensor]:
    vit = vit.to(device=device, dtype=dtype)
    torch.manual_seed(2)
    images = torch.randn(2, 3, 16, 16).to(device, dtype)
    with fastvit.use_backend(backend), torch.autocast(device.type, torch.bfloat16, autocast):
        # All tokens, so that the last block gets a gradient of each.
        features = vit.forward_features(images)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
    (features * weights.to(features)).sum().backward()
    return {name: p.grad for name, p in vit.named_parameters() if p.grad is not None}


def check_model(build: Callable[[], fastvit.ViT], device: torch.device) -> None:
    got = gradients(build(), device, "triton", torch.float32, True)
    eager = gradients(build(), device, "reference", torch.float32, True)
    truth = gradients(build(), device, "reference", torch.float64, False)
    assert got.keys() == truth.keys()
    for name, grad in got.items():
        check(name, grad, eager[name], truth[name], torch.bfloat16)


# Attention is one op; with rope it is three.
ways = pytest.mark.parametrize("rope", [None, "eva"], ids=["one op", "three ops"])


@ways
def test_every_op_of_the_body_takes_one(
    rope: str | None, taken: list[bool], device: torch.device
) -> None:
    check_model(lambda: model(rope=rope), device)
    # Two per block; the last MLP gets its gradient from the final norm, which makes no copy.
    assert taken == [False, *[True] * 3]


@ways
def test_layer_scale_and_drop_path(
    rope: str | None, taken: list[bool], device: torch.device
) -> None:
    check_model(lambda: model(layer_scale=0.5, rope=rope), device)
    assert taken == [False, *[True] * 3]
    taken.clear()
    check_model(lambda: model(layer_scale=0.5, drop_path=0.5, rope=rope).train(), device)
    assert taken == [False, *[True] * 3]


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_one_dtype_drop_path_alone(
    dtype: torch.dtype, rope: str | None, taken: list[bool], device: torch.device
) -> None:
    gradients(model(layer_scale=0.5, rope=rope), device, "triton", dtype, False)
    assert not taken

    def build() -> fastvit.ViT:
        return model(drop_path=0.5, rope=rope).train()

    got, eager = (gradients(build(), device, b, dtype, False) for b in ("triton", "reference"))
    truth = gradients(build(), device, "reference", torch.float64, False)
    # The first block drops nothing.
    assert taken == [False, True]
    for name, grad in got.items():
        check(name, grad, eager[name], truth[name])


def test_the_copy_of_another_wish_is_not_taken() -> None:
    request = gradient_copy.CopyRequest(torch.bfloat16, torch.ones(2))
    other = gradient_copy.CopyRequest(torch.bfloat16, torch.zeros(2))
    grad = torch.randn(2, 3, 4)
    gradient_copy.attach(grad, grad.bfloat16(), request)
    assert gradient_copy.attached(grad, other) is None
    assert gradient_copy.attached(grad, request) is not None
    assert not gradient_copy.branch_gradient(grad, other, torch.bfloat16, other.path_scale).any()


@pytest.mark.parametrize("in_place", [False, True])
def test_the_copy_of_another_gradient_is_not_taken(
    in_place: bool, taken: list[bool], device: torch.device
) -> None:
    """A hook on the op that made x, unlike one on x, does not keep the copy from being made."""
    o, x = leaf(2, 9, 16).to(device), leaf(2, 9, 16).to(device)
    weight = leaf(16, 16).detach().to(device)
    originals: list[Tensor] = []  # alive, so that the copy is still there

    def triple(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        originals.extend(grads)
        return (grads[0].mul_(3) if in_place else grads[0] * 3,)

    with fastvit.use_backend("triton"), torch.autocast(device.type, torch.bfloat16):
        stream = ops.linear_residual(o, weight, None, x)
        assert stream.grad_fn is not None
        stream.grad_fn.register_prehook(triple)
        out = ops.layernorm_linear(stream, None, None, weight)
        do, dx = torch.autograd.grad(out.float().square().sum(), (o, x))
        assert taken == [False]
        (expected,) = torch.autograd.grad(ops.linear_residual(o, weight, None, x), o, dx)
    assert torch.equal(do, expected)


def edit_output(edit: Callable[[Tensor], Tensor | None]) -> Callable[[], fastvit.ViT]:
    """Build a model with `edit` as gradient hook on the first block's output."""

    def build() -> fastvit.ViT:
        vit = model()

        def watch(block: nn.Module, args: tuple, x: Tensor) -> None:
            x.register_hook(edit)

        vit.blocks[0].register_forward_hook(watch)
        return vit

    return build


def test_a_hook_that_gives_another_gradient(taken: list[bool], device: torch.device) -> None:
    check_model(edit_output(lambda grad: grad * 3), device)
    assert False in taken[1:]


def test_a_hook_that_changes_the_gradient_in_place(taken: list[bool], device: torch.device) -> None:
    def triple(grad: Tensor) -> None:
        grad.mul_(3)

    check_model(edit_output(triple), device)
    assert False in taken[1:]


@pytest.mark.parametrize("late", [False, True])
def test_a_hook_that_changes_the_gradient_unseen(
    late: bool, taken: list[bool], device: torch.device
) -> None:
    """As an in-place collective does: no version shows it."""

    def triple(grad: Tensor) -> None:
        grad.data.mul_(3)

    seen: list[Tensor] = []

    def build() -> fastvit.ViT:
        vit = model()
        vit.blocks[0].register_forward_hook(lambda module, args, x: seen.append(x))
        vit.blocks[1].register_forward_hook(lambda *_: seen[-1].register_hook(triple) and None)
        return vit

    check_model(build if late else edit_output(triple), device)
    assert False in taken[1:]


def test_a_gradient_for_the_user_is_a_plain_tensor(device: torch.device, tmp_path: Path) -> None:
    vit = model().to(device)
    images = torch.randn(2, 3, 16, 16, device=device)
    seen: list[Tensor] = []
    vit.blocks[0].register_forward_hook(lambda module, args, x: seen.append(x))
    with fastvit.use_backend("triton"), torch.autocast(device.type, torch.bfloat16):
        logits = vit(images)
    (grad,) = torch.autograd.grad(logits.float().sum(), seen)
    assert not vars(grad)
    torch.save(grad, tmp_path / "grad.pt")
    assert torch.equal(torch.load(tmp_path / "grad.pt"), grad)


def test_two_uses_add_up(device: torch.device) -> None:
    def build() -> fastvit.ViT:
        vit = model(3)
        kept: list[Tensor] = []

        def keep(block: nn.Module, args: tuple, x: Tensor) -> None:
            kept.append(x)

        def add(block: nn.Module, args: tuple, x: Tensor) -> Tensor:
            return x + 2 * kept.pop()

        vit.blocks[0].register_forward_hook(keep)
        vit.blocks[2].register_forward_hook(add)
        return vit

    check_model(build, device)


@ways
def test_checkpointed_blocks(rope: str | None, device: torch.device) -> None:
    def build() -> fastvit.ViT:
        vit = model(rope=rope)
        vit.set_grad_checkpointing(True)
        return vit.train()

    check_model(build, device)


@ways
def test_frozen_blocks(rope: str | None, device: torch.device) -> None:
    def build() -> fastvit.ViT:
        vit = model(3, rope=rope)
        vit.blocks[1].requires_grad_(False)
        vit.blocks[2].requires_grad_(False)
        return vit

    check_model(build, device)


def test_blocks_checkpointed_by_others(device: torch.device) -> None:
    """Recomputation has no statistics of the rows before it, but must save as many tensors."""
    vit = fastvit.ViT(
        image_size=16, patch_size=4, dim=16, depth=2, heads=1, mlp_dim=16, num_classes=2
    )
    vit = vit.to(device)
    images = torch.randn(12, 3, 16, 16, device=device)
    grads = []
    for checkpointed in (False, True):
        for block in vit.blocks if checkpointed else ():
            run = block.forward
            block.forward = functools.partial(checkpoint, run, use_reentrant=False)
        vit.zero_grad()
        with fastvit.use_backend("triton"):
            with torch.autocast(device.type, torch.bfloat16):
                loss = vit(images).float().square().sum()
            loss.backward()
        grads.append([p.grad.clone() for p in vit.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= 0.02 * a.norm()
