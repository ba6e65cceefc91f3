"""`FlopCounterMode` counts the kernels' products as it counts eager's."""

import importlib
from typing import Any

import pytest
import torch
from fastvit_kernels import flops, library
from test_gradient_copy import model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastvit
from fastvit import ops


def counted(function: Any, backend: str) -> int:
    with (
        fastvit.use_backend(backend),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("rope", [None, "eva"], ids=["one op", "three ops"])
@pytest.mark.parametrize(
    "what", ["forward", "images want gradients", "frozen", "norms alone", "recompute"]
)
def test_a_model(what: str, rope: str | None, device: torch.device) -> None:
    """Its attention is one op; three with rope."""
    vit = model(1, registers=1, pool="mean", rope=rope).to(device)
    if what == "recompute":
        vit.set_mlp_recompute()
    if what == "frozen":
        block: Any = vit.blocks[0]
        for part in (vit.patch_embed, block.attn.proj, block.norm2, block.mlp):
            part.requires_grad_(False)
    if what == "norms alone":
        vit.requires_grad_(False)
        for name, p in vit.named_parameters():
            p.requires_grad_("norm" in name)
    images = torch.randn(3, 3, 16, 16, device=device)
    images.requires_grad_(what == "images want gradients")

    def run() -> None:
        with torch.set_grad_enabled(what != "forward"):
            out = vit(images).sum()
        if what != "forward":
            out.backward()

    # Backward recomputes the scores: 3 images, 2 heads of 16 channels, 18 tokens.
    again = 2 * 3 * 2 * 16 * 18 * 18 if what != "forward" else 0
    assert counted(run, "triton") == counted(run, "reference") + again


def test_attention_alone(device: torch.device) -> None:
    qkv = torch.randn(1, 12, 3, 2, 16, device=device, requires_grad=True)
    bounds = torch.tensor([0, 4, 12], dtype=torch.int32, device=device)
    q, k, v = qkv.unbind(2)
    unit = 2 * 2 * 16
    for function, expected in (
        (lambda: ops.attention(q, k, v).sum().backward(), 7 * 144),
        (lambda: ops.attention_packed(qkv[0], bounds, 8).sum().backward(), 7 * (16 + 64)),
        (lambda: ops.attention_qkv(qkv, norm_kind="rmsnorm").sum().backward(), 7 * 144),
        (lambda: ops.attention_maps(q, k, rows=(0, 3)), 2 * 2 * 12),
    ):
        assert counted(function, "triton") == unit * expected
    # Bounds that are fake tensors have no values: every sequence is counted as the longest.
    count = flops.counts("attention_fwd", library.launchers["attention_fwd"])
    with FakeTensorMode():
        q, bounds = torch.empty(1, 12, 2, 16), torch.empty(3, dtype=torch.int32)
        assert count(q, q, q, 0.25, None, bounds, 8) == unit * 2 * 2 * 8 * 8


OPS = ("attention_maps", "attention_qk", "layernorm_attention", "layernorm_mlp", "patch_embed")
OPS += ("swiglu",)


def test_every_op_has_a_formula() -> None:
    for op in OPS:
        importlib.import_module(f"fastvit_kernels.{op}")
    without = set(library.launchers) - set(flops.FORMULAS)
    assert without == {"attention_qk", "swiglu_fwd", "swiglu_bwd"}  # no products
