"""Models of other libraries ("peers") compute after `fastvit.accelerate` what they did before."""

import copy
import io
import pickle
import re
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import torchvision_shim
from checks import check
from peers import weights
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastvit

PARTS = {"layernorm_linear": 2, "attention": 2, "linear_residual": 2}  # of layernorm_attention
OPS = {"layernorm_attention": 2, "layernorm_mlp": 2}
STEM = {"patch_embed": 1}
HEAD = {"layernorm_linear": 1}  # of vit-pytorch
GATED = {"layernorm_attention": 2, "layernorm_linear": 2, "linear_residual": 2, "swiglu": 2}


def timm_vit(**kwargs):
    vit = pytest.importorskip("timm.models.vision_transformer")
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    return vit.VisionTransformer(**{**args, "num_classes": 10, **kwargs})


def timm_gated(kind, **kwargs):
    mlp = getattr(pytest.importorskip("timm.layers"), kind)
    return timm_vit(mlp_layer=mlp, act_layer=None if kind == "GluMlp" else nn.SiLU, **kwargs)


def _hf(config, model, **kwargs):
    transformers = pytest.importorskip("transformers")
    args = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    args |= {"image_size": 32, "patch_size": 8, "num_labels": 10, **kwargs}
    return getattr(transformers, model)(getattr(transformers, config)(**args))


hf_vit = partial(_hf, "ViTConfig", "ViTForImageClassification", intermediate_size=128)
hf_dinov2 = partial(_hf, "Dinov2Config", "Dinov2ForImageClassification", mlp_ratio=2)
hf_registers = partial(
    _hf, "Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification", mlp_ratio=2
)


def torchvision_vit(**kwargs):
    vit = pytest.importorskip("torchvision.models.vision_transformer")
    return vit.VisionTransformer(
        **{
            "image_size": 32,
            "patch_size": 8,
            "num_layers": 2,
            "num_heads": 2,
            "hidden_dim": 64,
            "mlp_dim": 128,
            "num_classes": 10,
            **kwargs,
        }
    )


def vit_pytorch_vit(**kwargs):
    vit = pytest.importorskip("vit_pytorch")
    args = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 64, "depth": 2}
    return vit.ViT(**{**args, "heads": 2, "mlp_dim": 128, "dim_head": 32, **kwargs})


# name: (constructor, op calls per forward). The counts prove that the ops ran, not the peer's code.
PEERS = {
    "timm": (timm_vit, OPS | STEM),
    "timm_layer_scale": (partial(timm_vit, init_values=0.5, qkv_bias=False), OPS | STEM),
    "timm_registers_mean": (
        partial(timm_vit, reg_tokens=3, global_pool="avg", act_layer="gelu_tanh"),
        OPS | STEM,
    ),
    "timm_qk_norm": (
        partial(timm_vit, qk_norm=True),
        {"attention": 2, "layernorm_mlp": 2} | STEM,
    ),
    "timm_rmsnorm": (partial(timm_vit, norm_layer="rmsnorm"), OPS | STEM),
    "timm_simplenorm": (partial(timm_vit, norm_layer="simplenorm"), {"attention": 2} | STEM),
    "timm_quick_gelu": (partial(timm_vit, act_layer="quick_gelu"), OPS | STEM),
    "timm_relu": (partial(timm_vit, act_layer="relu"), {"layernorm_attention": 2} | STEM),
    "hf_vit": (hf_vit, OPS | STEM),
    "hf_vit_eager": (partial(hf_vit, attn_implementation="eager", qkv_bias=False), OPS | STEM),
    "hf_vit_quick": (partial(hf_vit, hidden_act="quick_gelu"), OPS | STEM),
    "hf_vit_tanh": (partial(hf_vit, hidden_act="gelu_pytorch_tanh"), OPS | STEM),
    "hf_dinov2": (hf_dinov2, OPS | STEM),
    "hf_dinov2_swiglu": (partial(hf_dinov2, use_swiglu_ffn=True), GATED | STEM),
    "timm_swiglu": (partial(timm_gated, "SwiGLU"), GATED | STEM),
    "timm_swiglu_packed": (partial(timm_gated, "SwiGLUPacked"), GATED | STEM),
    "timm_glu": (partial(timm_gated, "GluMlp"), {"layernorm_attention": 2} | STEM),
    "hf_registers": (hf_registers, OPS | STEM),
    "torchvision": (torchvision_vit, OPS | STEM),
    "vit_pytorch": (vit_pytorch_vit, OPS | HEAD),
    "vit_pytorch_mean": (partial(vit_pytorch_vit, pool="mean"), OPS | HEAD),
}
MAIN = ("timm_layer_scale", "hf_vit", "hf_dinov2", "torchvision", "vit_pytorch")


def make(name_or_model, train=False):
    """The peer with noise on every parameter, so that no bias, gamma or head is trivial."""
    model = PEERS[name_or_model][0]() if isinstance(name_or_model, str) else name_or_model
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.train(train)


def images(batch=3, **kwargs):
    return torch.randn(batch, 3, 32, 32, **kwargs)


def tensors(model, x):
    """The peer's logits and, where it exposes them, its features, by name."""
    out = model(x)
    if not isinstance(out, torch.Tensor):
        body = getattr(model, model.base_model_prefix)
        return {"logits": out.logits, "features": body(x).last_hidden_state}
    if hasattr(model, "forward_features"):
        return {"logits": out, "features": model.forward_features(x)}
    return {"logits": out}


def loss(out):
    """A mean in which every element counts differently, those of different images too."""
    return (out * weights(out[None])).mean()


def grads(model, x):
    out = tensors(model, x)["logits"]
    loss(out).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def served(model, x):
    return Counter(c.op for c in fastvit.backend_report(model, x).choices)


def close(got, expected, bound=1e-5):
    assert got.keys() == expected.keys()
    for name, e in expected.items():
        g, e = (
            t.detach() if isinstance(t, torch.Tensor) else t[0].detach() for t in (got[name], e)
        )
        assert g.shape == e.shape, name
        error = float((g - e).abs().max()) if e.numel() else 0.0
        assert error <= bound, f"{name}: off by {error:.2e}"


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", PEERS)
def test_features_logits_and_gradients(name, train):
    model, x = make(name, train), images()
    expected, expected_grads = tensors(model, x), grads(model, x)
    assert served(model, x) == {}
    fastvit.accelerate(model)
    assert served(model, x) == PEERS[name][1]
    close(tensors(model, x), expected)
    close(grads(model, x), expected_grads)
    assert len(expected_grads) >= 20


@pytest.mark.parametrize("name", MAIN)
def test_restore_is_bitwise_and_keeps_every_object(name):
    model, x = make(name), images()
    expected, keys = tensors(model, x), list(model.state_dict())
    parameters, classes = list(model.parameters()), [type(m) for m in model.modules()]
    report = fastvit.accelerate(model)
    assert report.taken and not report.already
    assert fastvit.accelerate(model).already
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [type(m) for m in model.modules()] != classes
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
    assert fastvit.restore(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert served(model, x) == {}
    got = tensors(model, x)
    assert all(torch.equal(got[k], expected[k]) for k in expected)
    assert fastvit.restore(model) is model


@pytest.mark.parametrize("name", MAIN)
def test_deepcopy_pickle_and_save(name):
    model, x = make(name), images()
    fastvit.accelerate(model)
    expected, buffer = tensors(model, x), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "save": torch.load(buffer, weights_only=False),
    }
    for kind, other in copies.items():
        got = tensors(other, x)
        assert all(torch.equal(got[k], expected[k]) for k in expected), kind
        assert served(other, x) == PEERS[name][1], kind
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        assert not torch.equal(tensors(other, x)["logits"], expected["logits"]), kind
    assert torch.equal(tensors(model, x)["logits"], expected["logits"])


@pytest.mark.parametrize("name", MAIN)
def test_autocast(name):
    model, x = make(name), images()
    truth = tensors(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        eager = tensors(model, x)
        fastvit.accelerate(model)
        got = tensors(model, x)
    for key, t in truth.items():
        check(key, got[key], eager[key], t)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MAIN)
def test_compile_fullgraph(name, train):
    model, x = make(name, train), images()
    expected, expected_grads = tensors(model, x), grads(model, x)
    fastvit.accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    logits = out if isinstance(out, torch.Tensor) else out.logits
    close({"logits": logits}, {"logits": expected["logits"]})
    loss(logits).backward()
    close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected_grads)


# The default in torch 2.11: Dynamo rechecks a module's guards only if its __dict__ has changed.
@torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True)
def test_recompiles_after_accelerate_and_restore():
    model, x = make("timm"), images()
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = compiled(x)
    fastvit.accelerate(compiled)
    traced = Counter()
    before = fastvit.ops.layernorm_mlp
    try:
        fastvit.ops.layernorm_mlp = lambda *a: traced.update(mlp=1) or before(*a)
        close({"y": compiled(x)}, {"y": expected})
    finally:
        fastvit.ops.layernorm_mlp = before
    assert traced["mlp"] == 2
    fastvit.restore(compiled)
    assert torch.equal(compiled(x), expected)


def timm_unscaled():
    model = timm_vit(drop_path_rate=0.5)
    for block in model.blocks[1:]:  # the first has rate 0 and no DropPath
        block.drop_path1.scale_by_keep = block.drop_path2.scale_by_keep = False
    return model


@pytest.mark.parametrize(
    ("build", "calls"),
    [
        (partial(timm_vit, drop_path_rate=0.5, init_values=0.5), 5),
        (timm_unscaled, 5),
        (partial(timm_vit, drop_path_rate=0.5, init_values=0.5, attn_drop_rate=0.2), 9),
        (partial(hf_dinov2, drop_path_rate=0.5), 5),
        (partial(hf_registers, drop_path_rate=0.5), 5),
    ],
    ids=["timm", "timm-unscaled", "timm-attention-dropout", "dinov2", "registers"],
)
def test_drop_path_draws_as_the_peer(build, calls):
    model, x = make(build(), train=True), images(16)
    torch.manual_seed(1)
    expected = grads(model, x)
    fastvit.accelerate(model)
    assert sum(served(model, x).values()) == calls
    torch.manual_seed(1)
    close(grads(model, x), expected)
    torch.manual_seed(2)
    other = grads(model, x)
    assert any(not torch.allclose(other[n], expected[n]) for n in other)


@pytest.mark.parametrize(
    "build",
    [
        partial(timm_vit, attn_drop_rate=0.2, proj_drop_rate=0.1, drop_path_rate=0.2),
        partial(timm_vit, proj_drop_rate=0.1),
        partial(hf_vit, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2),
        partial(hf_vit, hidden_dropout_prob=0.1),
        partial(hf_dinov2, attention_probs_dropout_prob=1.0),
        partial(torchvision_vit, dropout=0.1, attention_dropout=0.1),
        partial(torchvision_vit, dropout=0.1),
        partial(vit_pytorch_vit, dropout=0.1),
    ],
    ids=[
        "timm",
        "timm-proj",
        "vit",
        "vit-hidden",
        "dinov2-all",
        "torchvision",
        "tv-mlp",
        "vit_pytorch",
    ],
)
def test_dropout_in_training_is_the_peers_own(build):
    model, x = make(build(), train=True), images()
    torch.manual_seed(1)
    expected = grads(model, x)
    report = fastvit.accelerate(model)
    assert any("in training" in row.reason for row in report.taken)
    torch.manual_seed(1)
    close(grads(model, x), expected)
    calls = served(model.eval(), x)
    assert calls["layernorm_mlp"] == calls["layernorm_attention"] == 2


def without_fused_attention(model):
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


def only_attention_dropout(model):
    """Turn off all other dropout: vit-pytorch has one rate for the whole block."""
    for name, m in model.named_modules():
        if isinstance(m, nn.Dropout) and not name.endswith("0.dropout"):
            m.p = 0.0
    return model


DROPPED = PARTS | {"layernorm_mlp": 2}
ATTENTION_DROPOUT = {
    "timm": (lambda p: timm_vit(attn_drop_rate=p), DROPPED | STEM),
    "timm_math": (lambda p: without_fused_attention(timm_vit(attn_drop_rate=p)), DROPPED | STEM),
    "timm_qk_norm": (
        lambda p: timm_vit(attn_drop_rate=p, qk_norm=True),
        {"attention": 2, "layernorm_mlp": 2} | STEM,
    ),
    "hf_vit": (lambda p: hf_vit(attention_probs_dropout_prob=p), DROPPED | STEM),
    "hf_vit_eager": (
        lambda p: hf_vit(attention_probs_dropout_prob=p, attn_implementation="eager"),
        DROPPED | STEM,
    ),
    "hf_dinov2": (lambda p: hf_dinov2(attention_probs_dropout_prob=p), DROPPED | STEM),
    "torchvision": (lambda p: torchvision_vit(attention_dropout=p), DROPPED | STEM),
    "vit_pytorch": (
        lambda p: only_attention_dropout(vit_pytorch_vit(dropout=p)),
        DROPPED | {"layernorm_linear": 3},
    ),
}


@pytest.mark.parametrize("name", ATTENTION_DROPOUT)
def test_attention_dropout_runs_in_the_op(name):
    """The reference draws as the peers do: one seed must give equal results after acceleration."""
    build, ops = ATTENTION_DROPOUT[name]
    model, x = make(build(0.3), train=True), images()
    torch.manual_seed(1)
    expected = grads(model, x)
    expected_eval = tensors(model.eval(), x)
    model.train()
    report = fastvit.accelerate(model)
    assert not any("dropout" in row.reason for row in report.rows)
    assert served(model, x) == ops
    torch.manual_seed(1)
    close(grads(model, x), expected)
    torch.manual_seed(2)
    other = grads(model, x)
    assert any(not torch.allclose(other[n], expected[n], atol=1e-3) for n in other)
    close(tensors(model.eval(), x), expected_eval)


def test_attention_dropout_of_the_kernel_has_the_peers_mean_and_variance(device):
    """Over many draws: mean a v, variance p / (1 - p) a^2 v^2, each summed over the keys."""
    rate, draws = 0.25, 64
    model = make(timm_vit(depth=1, attn_drop_rate=rate), train=True).to(device)
    attention = model.blocks[0].attn
    with torch.no_grad():
        attention.proj.weight.copy_(torch.eye(64))
        attention.proj.bias.zero_()
    x = torch.randn(1, 17, 64, device=device)
    qkv = attention.qkv(x).detach().double().view(17, 3, 2, 32)
    q, k, v = qkv.permute(1, 2, 0, 3)
    a = (q @ k.mT * attention.scale).softmax(-1)
    mean, variance = a @ v, rate / (1 - rate) * a**2 @ v**2
    fastvit.accelerate(model)
    with fastvit.use_backend("triton"), torch.no_grad():
        o = attention(x.expand(draws, -1, -1))
    o = o.double().view(draws, 17, 2, 32).transpose(1, 2)
    z = (o.mean(0) - mean) / (variance / draws).sqrt()
    assert 0.8 < z.square().mean() < 1.25
    assert 0.95 < o.var(0).sum() / variance.sum() < 1.05


def test_projection_dropout_keeps_attention_itself():
    model = make(timm_vit(proj_drop_rate=0.1), train=True)
    fastvit.accelerate(model)
    assert served(model, images()) == {"patch_embed": 1, "attention": 2}


def test_monte_carlo_dropout_stays_on():
    model, x = make(vit_pytorch_vit(dropout=0.5)), images()
    fastvit.accelerate(model)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", ["timm", "hf_vit", "hf_dinov2"])
def test_gradient_checkpointing(name):
    model, x = make(name, train=True), images()
    expected = grads(model, x)
    fastvit.accelerate(model)
    calls = Counter()
    before = fastvit.ops.layernorm_mlp
    if name == "timm":
        model.set_grad_checkpointing()
    else:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    try:
        fastvit.ops.layernorm_mlp = lambda *a: calls.update(mlp=1) or before(*a)
        close(grads(model, x), expected)
    finally:
        fastvit.ops.layernorm_mlp = before
    # Two per forward: `grads` runs forward twice, and its backward recomputes one of them.
    assert calls["mlp"] == 6


@pytest.mark.parametrize("name", MAIN)
def test_outer_hooks_fire_with_the_same_values(name):
    model, x = make(name), images()
    wanted = re.compile(
        r"|patch_embed|blocks\.\d|norm|head|heads|mlp_head|classifier|\w+\.layernorm"
        r"|\w+\.embeddings(\.patch_embeddings)?(\.projection)?|\w+\.(encoder\.)?layers?\.\d"
        r"|conv_proj|encoder\.(layers\.encoder_layer_\d|ln)|to_patch_embedding|transformer"
    )
    seen = []

    def watch(path, module, args, output):
        seen.append((path, args[0], output))

    for path, module in model.named_modules():
        if wanted.fullmatch(path):
            module.register_forward_hook(partial(watch, path))
    model(x)
    expected, seen = seen, []
    assert len(expected) >= 4
    fastvit.accelerate(model)
    assert served(model, x) == PEERS[name][1]
    seen.clear()
    model(x)
    assert [s[0] for s in seen] == [e[0] for e in expected]
    for (path, a, b), (_, c, d) in zip(seen, expected, strict=True):
        close({path: a, f"{path} out": b}, {path: c, f"{path} out": d})


def _inner(model):
    """The modules inside the second block, which the fused path does not call."""
    ends = ("blocks.1", "layers.1", "layer.1", "encoder_layer_1")
    block = next(m for n, m in model.named_modules() if n.endswith(ends))
    return {n: m for n, m in block.named_modules() if n and not isinstance(m, nn.ModuleList)}


@pytest.mark.parametrize("name", MAIN)
def test_a_later_inner_hook_fires_and_costs_one_half(name):
    model, x = make(name), images()
    fired = Counter()
    plain = {}
    for path, module in _inner(model).items():
        with module.register_forward_hook(lambda m, a, o, path=path: fired.update([path])):
            model(x)
        plain[path] = fired.pop(path, 0)
    expected = tensors(model, x)
    fastvit.accelerate(model)
    fused = Counter(PEERS[name][1])
    for path, module in _inner(model).items():
        with module.register_forward_hook(lambda m, a, o, path=path: fired.update([path])):
            close({"logits": tensors(model, x)["logits"]}, {"logits": expected["logits"]})
            fired.clear()
            model(x)
            assert fired[path] == plain[path], path
            if plain[path]:
                calls = served(model, x)
                attention = calls.pop("attention", 0)  # its core alone
                lost = fused - calls
                assert lost <= Counter(("layernorm_attention", "layernorm_mlp")), path
                assert lost.total() == plain[path], path  # of both halves: dropout, drop path
                assert attention <= lost["layernorm_attention"] and calls <= fused, path
        assert served(model, x) == fused, path


def test_other_hooks_and_replacements_are_honoured():
    model, x = make("timm"), images()
    expected = model(x)
    fastvit.accelerate(model)
    mlp = model.blocks[0].mlp
    with mlp.fc1.register_forward_pre_hook(lambda m, args: (args[0] * 0,)):
        assert not torch.allclose(model(x), expected)
    got = []
    with mlp.fc1.register_full_backward_hook(lambda m, gi, go: got.append(1)):
        model(x).sum().backward()
    with nn.modules.module.register_module_forward_hook(lambda m, a, o: got.append(type(m))):
        model(x)
    assert 1 in got and nn.LayerNorm in {c.__mro__[1] for c in got[1:]} | set(got[1:])
    mlp.fc1.forward = lambda x: x.new_zeros(*x.shape[:-1], 256)
    assert not torch.allclose(model(x), expected)
    del mlp.fc1.forward

    class Adapted(nn.Module):  # like LoRA: a module that replaces a Linear
        def __init__(self, base):
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x):
            return self.base(x) + 1.0

    model.blocks[0].attn.qkv = Adapted(model.blocks[0].attn.qkv)
    changed = model(x)
    assert not torch.allclose(changed, expected)
    assert torch.equal(fastvit.restore(model)(x), model(x))
    close({"y": model(x)}, {"y": changed})


@pytest.mark.parametrize("name", MAIN)
def test_global_hooks_fire_as_often_as_before(name):
    """FLOP counters and module tracers hook all modules at once."""
    model, x = make(name), images()
    fired: list[nn.Module] = []

    def run() -> list[nn.Module]:
        fired.clear()
        with nn.modules.module.register_module_forward_hook(lambda m, a, o: fired.append(m)):
            model(x)
        return list(fired)

    before = run()
    fastvit.accelerate(model)
    assert run() == before


def test_timm_masks_and_other_sizes():
    model, x = make(timm_vit(dynamic_img_size=True)), images()
    wide = torch.randn(2, 3, 48, 24)
    mask = torch.rand(17, 17) > 0.3
    mask.fill_diagonal_(True)
    calls = [partial(model, x, attn_mask=mask), partial(model, x, is_causal=True)]
    calls += [partial(model, wide), partial(model, x)]
    expected = [call() for call in calls]
    fastvit.accelerate(model)
    for call, e in zip(calls, expected, strict=True):
        close({"y": call()}, {"y": e})
    assert not torch.allclose(expected[0], expected[-1], atol=1e-3)


@pytest.mark.parametrize("build", [hf_vit, hf_dinov2, hf_registers], ids=["vit", "dinov2", "reg"])
def test_transformers_outputs_and_masks(build):
    model, x = make(build(attn_implementation="eager")), images()
    keys = {"output_attentions": True, "output_hidden_states": True}
    expected = model(x, **keys)
    fastvit.accelerate(model)
    got = model(x, **keys)
    assert len(got.attentions) == 2 and len(got.hidden_states) == 3
    for kind in ("attentions", "hidden_states"):
        for i in range(len(expected[kind])):
            close({kind: got[kind][i]}, {kind: expected[kind][i]})
    # Hooks that transformers leaves on the modules do not disable the fused path.
    assert served(model, x) == OPS | STEM
    only_hidden = model(x, output_hidden_states=True)
    close({"h": only_hidden.hidden_states[1]}, {"h": expected.hidden_states[1]})
    fastvit.restore(model)
    tokens = expected.hidden_states[0].shape[1]
    mask = torch.arange(tokens).expand(3, -1) < tokens - 4
    try:
        masked = model(x, attention_mask=mask).logits
    except TypeError:
        return
    fastvit.accelerate(model)
    close({"y": model(x, attention_mask=mask).logits}, {"y": masked})
    if build is hf_vit:  # older Dinov2 takes the mask and ignores it
        assert not torch.allclose(masked, expected.logits, atol=1e-4)


def test_a_transformers_layer_that_is_told_to_be_causal():
    layer, x = make(hf_vit()).vit.layers[0], torch.randn(2, 17, 64)
    plain, expected = layer(x), layer(x, is_causal=True)
    fastvit.accelerate(layer)
    close(
        {"plain": layer(x), "causal": layer(x, is_causal=True)},
        {"plain": plain, "causal": expected},
    )
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_torchvision_attention_to_a_zero_token():
    model, x = make("torchvision"), images()
    plain = model(x)
    model.encoder.layers[0].self_attention.add_zero_attn = True
    expected = model(x)
    assert "add_zero_attn" in str(fastvit.accelerate(model))
    close({"y": model(x)}, {"y": expected})
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_transformers_custom_attention_is_left():
    model, x = make(hf_vit()), images()
    model.vit.config._attn_implementation = "mine"
    report = fastvit.accelerate(model)
    assert [r.part for r in report.left] == ["attention", "attention core"] * 2
    assert "'mine'" in report.left[0].reason
    model.vit.config._attn_implementation = "sdpa"
    assert served(model, x) == OPS | STEM  # decided again at each call


def test_vit_pytorch_wrappers():
    pytest.importorskip("vit_pytorch")
    from vit_pytorch.extractor import Extractor
    from vit_pytorch.recorder import Recorder

    model, x = make("vit_pytorch"), images()
    results = []
    for accelerated in (False, True):
        if accelerated:
            fastvit.accelerate(model)
        recorder = Recorder(model)
        logits, attention = recorder(x)
        recorder.eject()
        extractor = Extractor(model)
        _, tokens = extractor(x)
        extractor.eject()
        # MAE and SimMIM slice the stem; nn.Sequential builds a slice with the stem's own class.
        stem = model.to_patch_embedding
        parts = stem[1:](stem[0](x))
        results.append({"logits": logits, "maps": attention, "tokens": tokens, "parts": parts})
    close(results[1], results[0])


def test_a_flop_count_leaves_the_ops_in_place():
    """Its global hooks read no activations: counted is what runs."""
    model, x = fastvit_model(make("timm")), images()
    with FlopCounterMode(display=False) as counter:
        assert served(model, x) == PEERS["timm"][1]
    with FlopCounterMode(display=False) as expected:
        make("timm")(x)
    assert counter.get_total_flops() == expected.get_total_flops()


def fastvit_model(model):
    fastvit.accelerate(model)
    return model


def test_an_unknown_layout_is_reported():
    model = make("vit_pytorch")
    feed_forward = model.transformer.layers[0][1]
    feed_forward.net = feed_forward.net[:5]  # without the last dropout
    x = images()
    y = model(x)
    assert "unknown layout" in str(fastvit.accelerate(model))
    close({"y": model(x)}, {"y": y})


def test_fx_traces_the_peers_own_forward(caplog):
    torchvision_shim.install()
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, x = make("timm"), images()
    expected = {"a": model.blocks[0](model.norm_pre(model._pos_embed(model.patch_embed(x))))}
    fastvit.accelerate(model)
    extract = feature_extraction.create_feature_extractor(model, {"blocks.0": "a"})
    close(extract(x), expected)
    assert "not accelerated" in caplog.text


def test_report_names_what_is_left():
    report = fastvit.accelerate(make("timm_simplenorm"))
    text = str(report)
    assert "norm is SimpleNorm" in text and "blocks.*" in text
    assert "3 of 7 parts run on fastvit.ops" in text
    assert {r.part for r in report.taken} == {"patch projection", "attention core"}
    text = str(fastvit.accelerate(make("timm_glu")))
    assert "the gate comes last" in text
    gated = make("hf_dinov2_swiglu")
    gated.dinov2.encoder.layer[1].mlp.up_proj.register_forward_hook(lambda m, a, o: None)
    left = [(r.module, r.part, r.reason) for r in fastvit.accelerate(gated).left]
    assert left == [("dinov2.encoder.layer.1", "mlp", "projection has hooks")]
    text = str(fastvit.accelerate(make("timm_relu")))
    assert "activation is ReLU" in text
    text = str(fastvit.accelerate(make(timm_vit(num_heads=8))))
    assert "head dim 8 is not" in text
    unlike = make(hf_vit())
    for layer in unlike.vit.layers:
        layer.attention.k_proj.bias = None
    x = images()
    y = unlike(x).logits
    report = fastvit.accelerate(unlike)
    assert "only some of q, k and v have a bias" in str(report)
    close({"y": unlike(x).logits}, {"y": y})
    hooked = make("timm")
    hooked.blocks[0].norm1.register_forward_hook(lambda m, a, o: None)
    report = fastvit.accelerate(hooked)
    left = [(r.module, r.part, r.reason) for r in report.left]
    assert left == [("blocks.0", "attention", "norm has hooks")]
    assert len(report.taken) == 5  # of block 0, the attention core replaces the half


def test_wrong_types():
    weights: Any = {}
    with pytest.raises(TypeError, match=r"got dict.*timm VisionTransformer"):
        fastvit.accelerate(weights)
    with pytest.raises(TypeError, match=r"torch\.nn.*Linear, which holds no ViT.*vit-pytorch"):
        fastvit.accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="already runs on"):
        fastvit.accelerate(fastvit.ViT(dim=32, depth=1, heads=1, mlp_dim=32, image_size=32))


def test_inside_another_module_and_distributed(tmp_path):
    model, x = make("hf_vit", train=True), images()
    expected = grads(model, x)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        fastvit.accelerate(wrapped)
        out = wrapped(x).logits
        loss(out).backward()
    finally:
        torch.distributed.destroy_process_group()
    close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)


def _two_ranks(rank, folder, after):
    """Run one rank of two; accelerate the model before DDP wraps it, or (`after`) inside DDP."""
    torchvision_shim.install()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = make("timm_layer_scale", train=True), images(4)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    if not after:
        fastvit.accelerate(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    if after:
        fastvit.accelerate(wrapped)
    assert served(wrapped, x) == PEERS["timm_layer_scale"][1]
    wrapped(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    torch.save({n: p.grad for n, p in model.named_parameters()}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before DDP", "inside DDP"])
def test_two_ranks_give_the_gradient_of_the_whole_batch(after, tmp_path):
    torch.manual_seed(0)
    model, x = make("timm_layer_scale", train=True), images(4)
    torch.multiprocessing.spawn(  # pyright: ignore[reportPrivateImportUsage]
        _two_ranks, (tmp_path, after), nprocs=2
    )
    model(x).square().mean().backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    for rank in range(2):
        close(torch.load(tmp_path / f"{rank}.pt"), expected)


@pytest.mark.parametrize("name", MAIN)
def test_optimizer_made_before(name):
    model, x = make(name, train=True), images()
    twin = copy.deepcopy(model)
    for m in (model, twin):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        if m is model:
            fastvit.accelerate(m)
        for _ in range(3):
            for n, g in grads(m, x).items():
                m.get_parameter(n).grad = g
            optimizer.step()
    close(tensors(model, x), tensors(twin, x), 5e-5)
    close(dict(model.named_parameters()), dict(twin.named_parameters()))


def logits_and_gradients(model, x):
    """Logits and gradients of one forward and backward. Those of q, k and v are joined, as in the
    packed op: k's bias alone has only rounding errors, since softmax ignores a shift of its row."""
    out = model(x)
    out = out if isinstance(out, torch.Tensor) else out.logits
    loss(out).backward()
    found = {"logits": out}
    for n, p in model.named_parameters():
        if p.grad is not None:
            n = re.sub("[qkv]_proj", "qkv", n)
            found[n] = torch.cat([found[n], p.grad]) if n in found else p.grad
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", MAIN)
def test_triton_backend(name, device):
    model, x = make(name, train=True).to(device), images(1).to(device)
    truth = logits_and_gradients(copy.deepcopy(model).double(), x.double())
    eager = logits_and_gradients(model, x)
    fastvit.accelerate(model)
    assert served(model, x) == PEERS[name][1]
    with fastvit.use_backend("triton"):  # raises where no kernel can run
        got = logits_and_gradients(model, x)
    for key in truth:
        check(key, got[key], eager[key], truth[key])
