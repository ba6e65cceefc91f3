"""Record launches with a fake driver, and compare those of `launch` and of the recipes of `replay`
with the launches that Triton itself makes.

A script, to be run without TRITON_INTERPRET; prints how many launches agreed.
"""

from typing import Any, cast

import torch
from fastvit_kernels import (
    attention,
    attention_plan,
    gemm,
    gemm_dw,
    launch,
    layernorm,
    layernorm_attention,
    layernorm_fold,
    layernorm_linear,
    layernorm_mlp,
    linear_residual,
    mlp_narrow,
    parameter_grads,
    patch_embed,
    replay,
    swiglu,
    tuned,
)
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

made: list[tuple] = []


class Driver:
    """The methods of a driver that Triton calls before a launch."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Compiled:
    """A fake compiled kernel of one specialization, which records its launches in `made`."""

    function = packed_metadata = None

    def __init__(self, name: str, key: Any) -> None:
        self.key = name, str(key)

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        made.append((self.key, (x, y, z), [_value(a) for a in rest[6:]]))


class Address(int):
    """The address of a tensor or of bytes behind it; of: the tensor."""

    of: Tensor

    def __add__(self, offset: int) -> "Address":
        moved = Address(int(self) + offset)
        moved.of = self.of
        return moved


def data_ptr(t: Tensor) -> Address:
    address = Address(torch._C.TensorBase.data_ptr(t))
    address.of = t
    return address


def _value(arg: Any) -> Any:
    """What is the same in every run: for a tensor dtype, size of its storage and offset in it."""
    if isinstance(arg, TensorDescriptor):
        sizes = tuple(arg.shape), tuple(arg.strides), tuple(arg.block_shape)
        return _value(arg.base.data_ptr()), *sizes
    if isinstance(arg, Tensor):
        arg = data_ptr(arg)
    if not isinstance(arg, Address):
        return arg
    storage = arg.of.untyped_storage()
    return arg.of.dtype, storage.nbytes(), int(arg) - storage.data_ptr()


def compile_nothing(kernel: Any, key: Any, *args: Any, **kwargs: Any) -> Compiled:
    compiled = Compiled(kernel.fn.__name__, key)
    kernel.device_caches[0][0][key] = compiled
    return compiled


def block(x: Tensor, C: int, dtype: torch.dtype, at: int, H: int = 2) -> None:
    """Run a block forward and backward; at: offset of parameters in their storage, in elements."""

    def leaf(*shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        return torch.zeros(size + at)[at:].view(shape).to(x.dtype).requires_grad_()

    F = 4 * C
    qkv, fork = layernorm_linear.layernorm_linear(
        x, leaf(C), leaf(C), leaf(3 * C, C), leaf(3 * C), 1e-6, False, dtype
    )
    packed = qkv.view(*x.shape[:2], 3, H, C // H)
    o = attention.attention_qkv(packed).flatten(2)
    path_scale = torch.ones(len(x)) if at else None
    y = linear_residual.linear_residual(o, leaf(C, C), leaf(C), fork, leaf(C), path_scale, dtype)
    params = (leaf(C), leaf(C), leaf(3 * C, C), leaf(3 * C), leaf(C, C), leaf(C))
    for layer_scale in (leaf(C), None):
        branch = (layer_scale, path_scale, H, None, 1e-6, False, dtype)
        y = layernorm_attention.layernorm_attention(y, *params, *branch)
    params = (leaf(C), leaf(C), leaf(F, C), leaf(F), leaf(C, F), None)
    for activation in ("gelu", "gelu_tanh"):
        options = (1e-6, False, activation, False, dtype)
        y = layernorm_mlp.layernorm_mlp(y, *params, None, path_scale, *options)
    y = swiglu.swiglu(y)
    y.backward(torch.zeros_like(y))


def everything() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, w = torch.zeros(1, 8, 16, dtype=dtype), torch.ones(16, dtype=dtype)
        for norm in ((w, None), (None, w)):
            layernorm_linear.layernorm_linear(
                x, *norm, w.expand(16, 16).clone(), None, 1e-6, False, dtype
            )
            weights = (w.expand(48, 16).clone(), None, w.expand(16, 16).clone(), None)
            layernorm_attention.layernorm_attention(
                x, *norm, *weights, None, None, 1, None, 1e-6, False, dtype
            )
        for B, N, C, at in (
            (2, 5, 64, 0),
            (3, 197, 64, 0),
            (3, 400, 48, 1),
            (3, 400, 48, 0),
            (1, 17, 128, 0),
            (43, 197, 64, 0),
        ):
            for x_dtype in {dtype, torch.float32}:
                x = torch.zeros(B, N, C, dtype=x_dtype, requires_grad=True)
                block(x, C, dtype, at)
        images = torch.zeros(2, 3, 32, 48, dtype=dtype)
        weight = torch.zeros(64, 3, 16, 16, dtype=dtype, requires_grad=True)
        tokens = patch_embed.patch_embed(images, weight, None, None, None, dtype)
        tokens.backward(torch.zeros_like(tokens))


if __name__ == "__main__":
    driver.set_active(cast(Any, Driver()))
    JITFunction._do_compile = cast(Any, compile_nothing)
    tuned._device = lambda index: (90, 132)

    def tritons(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        kernel[grid](*args, **constants)

    def launches() -> list[tuple]:
        global made
        made = []
        everything()
        return made

    torch.Tensor.data_ptr = data_ptr  # type: ignore[method-assign]
    first = launches()
    kept = len(launch._compiled)
    second = launches()
    assert len(launch._compiled) == kept, "the same launches were not found again"
    recipes = list(replay._recipes.values())
    assert all(map(callable, recipes)), "some launcher has no recipe"
    used: list[Any] = []

    def noting(recipe: Any) -> Any:
        return lambda *tensors: used.append(recipe) or recipe(*tensors)

    replay._recipes.update({key: noting(recipe) for key, recipe in replay._recipes.items()})
    replayed = launches()
    assert {id(r) for r in used} == {id(r) for r in recipes}, "some recipe was not used"
    # A replacement of JITFunction.run gets every launch, even those cached, and none is cached.
    seen: list[Any] = []
    run, JITFunction.run = JITFunction.run, cast(Any, lambda *args, **kwargs: seen.append(args))
    assert launches() == []
    JITFunction.run = run
    assert (len(seen), len(launch._compiled)) == (len(first), kept)
    rows = (layernorm, layernorm_fold, mlp_narrow, patch_embed, swiglu)
    for module in (attention_plan, gemm, gemm_dw, parameter_grads, *rows):
        setattr(module, "launch", tritons)  # noqa: B010
    replay.run = lambda launcher, args: launcher(*args)
    expected = launches()
    for made_so in (first, second, replayed):
        assert made_so == expected, next(
            pair for pair in zip(made_so, expected, strict=True) if pair[0] != pair[1]
        )
    print(f"{len(expected)} launches of {kept} kinds agree, by {len(recipes)} recipes")
