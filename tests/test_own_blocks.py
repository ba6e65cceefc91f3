"""`model.blocks` is called as one module: its hooks fire as in timm, and its wrappers run."""

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from peers import assert_same, timm_twins
from torch import Tensor, nn

from fastvit.errors import UsageError

SMALL: dict[str, Any] = dict(img_size=32, embed_dim=48, num_heads=3, depth=3, num_classes=5)
NAMES = {"learned": "vit_tiny_patch16_224", "rope": "vit_small_patch16_dinov3_qkvb"}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_hooks_see_and_change_what_they_do_in_timm() -> None:
    seen: dict[str, list[Tensor]] = {"pre": [], "out": [], "grad": []}

    def pre(module: nn.Module, args: Any) -> Any:
        seen["pre"].append(args[0].detach())
        return (args[0] * 1.25,)

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        seen["out"].append(out.detach())
        return out * torch.linspace(0.5, 1.5, out.shape[-1])

    models = timm_twins(NAMES["learned"], **SMALL)
    for model in models:
        model.blocks.register_forward_pre_hook(pre)
        model.blocks.register_forward_hook(hook)
        model.blocks.register_full_backward_hook(lambda m, gi, go: seen["grad"].append(go[0]))
    logits = [model(IMAGES) for model in models]
    for out in logits:
        out.square().sum().backward()
    assert_same(*logits)
    for name, (theirs, ours) in seen.items():
        assert theirs.shape == ours.shape, name
        assert_same(theirs, ours)


def test_hooks_fire_with_rope_and_checkpointing() -> None:
    _, model = timm_twins(NAMES["rope"], **SMALL)
    expected, seen = model(IMAGES), []
    model.blocks.register_forward_pre_hook(lambda m, args: (args[0] * 1.0,))
    model.blocks.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    assert_same(expected, model(IMAGES))
    model.set_grad_checkpointing()
    out = model(IMAGES)
    out.sum().backward()
    assert_same(expected, out)
    assert seen == [(3, 9, 48)] * 2


class Wrapper(nn.Module):
    """A user-defined wrapper of the blocks that passes its arguments on."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = blocks, 0

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        self.calls += 1
        return self.inner(x, **kwargs) * 1.5


def compiled(blocks: nn.Module) -> Any:
    return torch.compile(blocks, backend="eager")


def checkpointed(blocks: nn.Module) -> Any:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(blocks)


WRAPS: dict[str, Callable[[nn.Module], Any]] = {
    "compile": compiled,
    "checkpoint": checkpointed,
    "wrapper": Wrapper,
    "plain": lambda blocks: nn.Sequential(*blocks.children()),
    "list": lambda blocks: nn.ModuleList(blocks.children()),
    "slice": lambda blocks: cast(nn.Sequential, blocks)[:2],
}


# Dynamo reads .grad of a non-leaf tensor and hides the warning, unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("wrap", WRAPS)
def test_what_wraps_the_blocks_runs(wrap: str, kind: str) -> None:
    models = timm_twins(NAMES[kind], **SMALL)
    own = models[1]
    twin = copy.deepcopy(own)
    if wrap == "wrapper":
        twin.blocks.register_forward_hook(lambda m, args, out: out * 1.5)
    if wrap == "slice":
        twin.blocks = nn.Sequential(*twin.blocks[:2])
    own.blocks = WRAPS[wrap](own.blocks)
    for model in (twin, own):
        model(IMAGES).square().sum().backward()
    expected, got = twin(IMAGES), own(IMAGES)
    assert_same(expected, got)
    for a, b in zip(twin.parameters(), own.parameters(), strict=True):
        assert_same(a.grad, b.grad)
    own.set_grad_checkpointing()
    assert_same(expected, own(IMAGES))
    if wrap == "wrapper":
        assert own.blocks.calls == 3
        with pytest.raises(UsageError, match="blocks is a Wrapper; expected"):
            own.forward_intermediates(IMAGES)
        return
    for options in ({"indices": 2}, {"indices": [0], "stop_early": True}):
        for a, b in zip(
            twin.forward_intermediates(IMAGES, intermediates_only=True, **options),
            own.forward_intermediates(IMAGES, intermediates_only=True, **options),
            strict=True,
        ):
            assert_same(a, b)
    maps = own.attention_maps(IMAGES, layers=[0, -1])
    assert_same(twin.attention_maps(IMAGES, layers=[0, -1]), maps)


def test_a_wrapper_that_takes_x_alone() -> None:
    class Alone(nn.Module):
        def __init__(self, blocks: nn.Module) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x)

    models = timm_twins(NAMES["learned"], **SMALL)
    for model in models:
        model.blocks = Alone(model.blocks)
    assert_same(*(model(IMAGES) for model in models))
    _, own = timm_twins(NAMES["rope"], **SMALL)
    own.blocks = Alone(own.blocks)
    with pytest.raises(TypeError, match=r"Alone.*unexpected keyword argument 'rope'"):
        own(IMAGES)


@pytest.mark.parametrize("kind", NAMES)
def test_a_hook_on_a_block_keeps_rope(kind: str) -> None:
    models = timm_twins(NAMES[kind], **SMALL)
    seen: list[Tensor] = []

    def pre(module: nn.Module, args: Any) -> Any:
        seen.append(args[0].detach())
        return (args[0] * 1.25,)

    for model in models:
        model.blocks[1].register_forward_pre_hook(pre)
    assert_same(*(model(IMAGES) for model in models))
    assert_same(*seen)
