"""The implementations measured against fastvit, op by op. An absent one carries the reason.

Each provider takes the arguments of the `fastvit.ops` function of its op. Where a peer has no fused
form, it is called as its users would write it.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from fastvit_kernels import handoff
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastvit
from benchmarks.harness import Provider
from fastvit import ops, reference

NEEDS_GPU = "needs an NVIDIA GPU"


def missing(*modules: str, device: torch.device, gpu: bool = True) -> str | None:
    """The reason why a peer that needs these modules is absent, or None."""
    if gpu and device.type != "cuda":
        return NEEDS_GPU
    for module in modules:
        if find_spec(module) is None:
            return f"{module} is not installed"
    return None


def backend(device: torch.device) -> str:
    """The backend of fastvit that is measured, by name: 'auto' could fall back silently."""
    return "triton" if device.type == "cuda" else "reference"


def ours_name(device: torch.device) -> str:
    return "fastvit" if device.type == "cuda" else "fastvit (reference)"


def ours(op: Callable[..., Tensor], device: torch.device) -> Provider:
    def call(*args: Any) -> Tensor:
        with fastvit.use_backend(backend(device)):
            return op(*args)

    return Provider(ours_name(device), call)


def entry(name: str, absent: str | None, make: Callable[[], Callable[..., Any]]) -> Provider:
    """A provider that is built only if it can run; if building fails, the error is the reason."""
    if absent:
        return Provider(name, None, absent)
    try:
        return Provider(name, make())
    except Exception as error:
        return Provider(name, None, f"{type(error).__name__}: {error}".splitlines()[0][:200])


def compiled(eager: Callable[..., Tensor], mode: str, device: torch.device) -> Provider:
    def make() -> Callable[..., Tensor]:
        return torch.compile(eager, mode=mode, dynamic=False)

    # Without CUDA graphs: their static output buffers would be overwritten between rounds.
    label = "max-autotune" if "max" in mode else mode
    return entry(f"torch.compile {label}", missing(device=device), make)


COMPILED = ("default", "max-autotune-no-cudagraphs")


def sdpa_qkv(qkv: Tensor) -> Tensor:
    """SDPA, written as in timm: (B, N, 3, H, D) -> (B, N, H, D) through (B, H, N, D)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def attention(device: torch.device) -> list[Provider]:
    gpu = missing(device=device)
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    return [
        ours(ops.attention_qkv, device),
        Provider("timm eager (SDPA)", sdpa_qkv),
        *(
            entry(f"SDPA {name}", None if name == "math" else gpu, lambda which=which: _sdpa(which))
            for name, which in backends.items()
        ),
        entry("flex_attention", gpu, _flex),
        entry("xformers", missing("xformers", device=device), _xformers),
        entry("flash-attn", missing("flash_attn", device=device), _flash_attn),
    ]


def layernorm_attention(device: torch.device) -> list[Provider]:
    return [
        ours(ops.layernorm_attention, device),
        Provider("timm eager (SDPA)", attention_branch),
        *(compiled(attention_branch, mode, device) for mode in COMPILED),
    ]


def attention_branch(
    x: Tensor,
    nw: Tensor,
    nb: Tensor,
    w: Tensor,
    b: Tensor,
    proj: Tensor,
    proj_b: Tensor,
    heads: int,
) -> Tensor:
    qkv = F.linear(F.layer_norm(x, x.shape[-1:], nw, nb, 1e-6), w, b)
    o = sdpa_qkv(qkv.unflatten(-1, (3, heads, -1))).flatten(2)
    return x + F.linear(o, proj, proj_b)


def _sdpa(which: SDPBackend) -> Callable[..., Tensor]:
    def call(qkv: Tensor) -> Tensor:
        with sdpa_kernel(which):
            return sdpa_qkv(qkv)

    return call


def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    flex = torch.compile(flex_attention, dynamic=False)

    def call(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return flex(q, k, v).transpose(1, 2).contiguous()

    return call


def _xformers() -> Callable[..., Tensor]:
    xops: Any = import_module("xformers.ops")
    return lambda qkv: xops.memory_efficient_attention(*qkv.unbind(2))


def _flash_attn() -> Callable[..., Tensor]:
    return import_module("flash_attn").flash_attn_qkvpacked_func


def conv_patches(
    images: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, prefix: Tensor
) -> Tensor:
    """The patch embedding, written as in timm: convolution, flatten, transpose, cat, add."""
    x = F.conv2d(images, weight, bias, stride=weight.shape[-2:]).flatten(2).transpose(1, 2)
    x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)
    return x + torch.cat([torch.zeros_like(prefix), pos])


def patch_embed(device: torch.device) -> list[Provider]:
    return [
        ours(ops.patch_embed, device),
        Provider("conv2d + flatten + cat + add", conv_patches),
        *(compiled(conv_patches, mode, device) for mode in COMPILED),
    ]


def norm_linear(x: Tensor, nw: Tensor, nb: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.layer_norm(x, x.shape[-1:], nw, nb, 1e-6), weight, bias)


def norm_addmm(x: Tensor, nw: Tensor, nb: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm, then a linear layer with the bias in cuBLASLt's epilogue."""
    y = F.layer_norm(x, x.shape[-1:], nw, nb, 1e-6)
    return torch.addmm(bias, y.flatten(0, -2), weight.t()).view(*x.shape[:-1], -1)


def layernorm_linear(device: torch.device) -> list[Provider]:
    return [
        ours(ops.layernorm_linear, device),
        Provider("eager", norm_linear),
        Provider("addmm", norm_addmm),
        *(compiled(norm_linear, mode, device) for mode in COMPILED),
        entry("Liger LayerNorm + linear", missing("liger_kernel", device=device), _liger_norm),
        entry("TransformerEngine", missing("transformer_engine", device=device), _te_norm_linear),
    ]


def _liger_norm() -> Callable[..., Tensor]:
    norm = import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction.apply
    return lambda x, nw, nb, weight, bias: F.linear(norm(x, nw, nb, 1e-6), weight, bias)


def _te_norm_linear() -> Callable[..., Tensor]:
    te: Any = import_module("transformer_engine.pytorch")

    @functools.cache
    def module(features: int, out: int, dtype: torch.dtype) -> Any:
        return te.LayerNormLinear(features, out, eps=1e-6, params_dtype=dtype)

    def call(x: Tensor, nw: Tensor, nb: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        names = {"layer_norm_weight": nw, "layer_norm_bias": nb, "weight": weight, "bias": bias}
        layer = module(weight.shape[1], weight.shape[0], x.dtype)
        return torch.func.functional_call(layer, names, (x,))

    return call


def swiglu(device: torch.device) -> list[Provider]:
    return [
        ours(ops.swiglu, device),
        Provider("eager", reference.swiglu),
        *(compiled(reference.swiglu, mode, device) for mode in COMPILED),
    ]


def linear_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return residual + F.linear(x, weight, bias)


def addmm_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """The residual is added by the GEMM (beta = 1), the bias in a separate pass."""
    y = torch.addmm(residual.flatten(0, -2), x.flatten(0, -2), weight.t())
    return (y + bias).view_as(residual)


def linear_residual(device: torch.device) -> list[Provider]:
    return [
        ours(ops.linear_residual, device),
        Provider("eager", linear_add),
        Provider("addmm", addmm_add),
        *(compiled(linear_add, mode, device) for mode in COMPILED),
    ]


def mlp(
    x: Tensor, nw: Tensor, nb: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    hidden = F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], nw, nb, 1e-6), w1, b1))
    return x + F.linear(hidden, w2, b2)


def mlp_addmm(
    x: Tensor, nw: Tensor, nb: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    """Bias in cuBLASLt's epilogue. Its GELU epilogue is the tanh form: see `mlp_addmm_gelu`."""
    y = F.layer_norm(x, x.shape[-1:], nw, nb, 1e-6).flatten(0, -2)
    hidden = F.gelu(torch.addmm(b1, y, w1.t()))
    return x + torch.addmm(b2, hidden, w2.t()).view_as(x)


def mlp_addmm_gelu(
    x: Tensor, nw: Tensor, nb: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    """Bias and tanh-GELU in cuBLASLt's epilogue: fast, but another function than erf-GELU."""
    y = F.layer_norm(x, x.shape[-1:], nw, nb, 1e-6).flatten(0, -2)
    hidden = torch.ops.aten._addmm_activation(b1, y, w1.t(), use_gelu=True)
    return x + torch.addmm(b2, hidden, w2.t()).view_as(x)


def layernorm_mlp(device: torch.device, backward: bool) -> list[Provider]:
    no_grad = "_addmm_activation has no backward" if backward else missing(device=device)
    return [
        ours(ops.layernorm_mlp, device),
        Provider("eager", mlp),
        Provider("addmm", mlp_addmm),
        entry("cuBLASLt GELU epilogue (tanh)", no_grad, lambda: mlp_addmm_gelu),
        *(compiled(mlp, mode, device) for mode in COMPILED),
        entry("TransformerEngine", missing("transformer_engine", device=device), _te_mlp),
    ]


def _te_mlp() -> Callable[..., Tensor]:
    te: Any = import_module("transformer_engine.pytorch")

    @functools.cache
    def module(features: int, hidden: int, dtype: torch.dtype) -> Any:
        return te.LayerNormMLP(features, hidden, eps=1e-6, params_dtype=dtype)

    def call(x: Tensor, nw: Tensor, nb: Tensor, w1: Tensor, b1: Tensor, *second: Tensor) -> Tensor:
        names = ("layer_norm_weight", "layer_norm_bias", "fc1_weight", "fc1_bias")
        names = (*names, "fc2_weight", "fc2_bias")
        layer = module(x.shape[-1], w1.shape[0], x.dtype)
        values: dict[str, Tensor] = dict(zip(names, (nw, nb, w1, b1, *second), strict=True))
        return x + torch.func.functional_call(layer, values, (x,))

    return call


def chain(room: Any) -> Callable[..., Tensor]:
    """An encoder block of `room`'s ops, `fastvit.ops` or `fastvit.reference`.

    x: (B, N, C), then weight and bias of norm1, qkv, proj, norm2, fc1, fc2; 64 channels a head.
    """

    def block(x: Tensor, *parameters: Tensor) -> Tensor:
        nw, nb, w, b, proj, proj_b, *mlp = parameters
        with handoff.allowed():  # as in `fastvit.layers.Block`
            x = room.layernorm_attention(x, nw, nb, w, b, proj, proj_b, x.shape[-1] // 64)
            return room.layernorm_mlp(x, *mlp)

    return block


def block(device: torch.device) -> list[Provider]:
    timm = missing("timm", device=device, gpu=False)
    mine = ours(chain(ops), device)

    def compiled_ours() -> Callable[..., Tensor]:
        call = ours(torch.compile(chain(ops), dynamic=False), device).call
        assert call is not None
        return call

    return [
        mine,
        entry("timm eager (SDPA)", timm, _timm_block),
        Provider("nn.TransformerEncoderLayer", _torch_block()),
        entry(f"{mine.name} + torch.compile", missing(device=device), compiled_ours),
        *(compiled(chain(reference), mode, device) for mode in COMPILED),
    ]


def _timm_block() -> Callable[..., Tensor]:
    layer: Any = import_module("timm.models.vision_transformer").Block
    norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    return _functional(
        lambda width: layer(width, width // 64, qkv_bias=True, norm_layer=norm),
        "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2",
    )


def _torch_block() -> Callable[..., Tensor]:
    layer = functools.partial(
        torch.nn.TransformerEncoderLayer,
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=1e-6,
        batch_first=True,
        norm_first=True,
    )
    return _functional(
        lambda width: layer(width, width // 64, 4 * width),
        "norm1 self_attn.in_proj_ self_attn.out_proj norm2 linear1 linear2",
    )


def _functional(make: Callable[[int], torch.nn.Module], names: str) -> Callable[..., Tensor]:
    """The module make(width) as a function of x and of the weight and bias of each name."""
    module = functools.cache(make)
    words = [name if name.endswith("_") else f"{name}." for name in names.split()]
    keys = [word + part for word in words for part in ("weight", "bias")]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        with torch.device("meta"):  # the parameters come with the call
            own = module(x.shape[-1])
        return torch.func.functional_call(own, dict(zip(keys, parameters, strict=True)), (x,))

    return call
