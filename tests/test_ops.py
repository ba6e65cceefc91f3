"""Dispatch and bad input of `fastvit.ops`: errors name the argument, its value and the expected."""

import os
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastvit_kernels.operands import precision
from parity import results
from processes import run_python
from test_strides import OPS, qk_params
from torch.autograd import forward_ad

import fastvit
from fastvit import backend, ops, reference
from fastvit.errors import UsageError


def _qkv(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


def test_auto_takes_the_reference_on_cpu_and_says_why() -> None:
    model = fastvit.ViT(image_size=8, patch_size=4, dim=32, depth=2, heads=2, mlp_dim=64)
    report = fastvit.backend_report(model, torch.randn(1, 3, 8, 8))
    assert [c.op for c in report.choices] == [
        "patch_embed",
        "layernorm_attention",
        "layernorm_mlp",
        "layernorm_linear",
        "attention",
        "linear_residual",
        "layernorm_mlp",
    ]
    assert {c.backend for c in report.choices} == {"reference"}
    assert all(c.reason for c in report.choices)
    assert "attention" in str(report) and "reference" in str(report)


def test_projections_stay_beside_attention_that_has_no_kernel() -> None:
    """A head dim of 144: the branch runs as three ops, of which attention alone falls back."""
    model = fastvit.ViT(image_size=16, patch_size=8, dim=288, depth=2, heads=2, mlp_dim=32)
    choices = fastvit.backend_report(model, torch.zeros(1, 3, 16, 16)).choices
    parts = ["layernorm_linear", "attention", "linear_residual", "layernorm_mlp"]
    assert [c.op for c in choices] == ["patch_embed", *parts, *parts]


def test_explicit_triton_raises_with_the_reason(device: torch.device) -> None:
    with fastvit.use_backend("triton"):
        with pytest.raises(RuntimeError, match=r"attention: backend 'triton'.*head dim 12 .*\(1,"):
            ops.attention_qkv(_qkv(1, 5, 3, 2, 12).to(device))
        args = {k: v.to(device) for k, v in BRANCH.items() if k != "heads"}
        with pytest.raises(RuntimeError, match=r"^attention: .*'triton'.*head dim 8 .*"):
            branch(X.to(device), **args, heads=2)
        with pytest.raises(RuntimeError, match=r"^attention: .*scale -1.0 is not pos"):
            branch(X.to(device), **args, scale=-1.0)
        with pytest.raises(RuntimeError, match=r"float64 is not float32, float16 or bfloat16"):
            ops.attention_qkv(_qkv(1, 5, 3, 2, 16, dtype=torch.float64).to(device))


def test_use_backend_nests_and_restores() -> None:
    before = backend._backend
    with fastvit.use_backend("reference"):
        with pytest.raises(KeyError), fastvit.use_backend("triton"):
            raise KeyError
        assert backend._backend == "reference"
    assert backend._backend == before
    with pytest.raises(ValueError, match="'cuda' is unknown; expected one of"):
        with fastvit.use_backend("cuda"):
            pass


@pytest.mark.parametrize(
    ("env", "code", "expected"),
    [
        ({"FASTVIT_BACKEND": "cuda"}, "import fastvit", "FASTVIT_BACKEND: backend 'cuda'"),
        (
            {"FASTVIT_BACKEND": "triton", "TRITON_INTERPRET": "0"},
            "import fastvit, torch; fastvit.ops.attention_qkv(torch.randn(1, 2, 3, 1, 16))",
            "the input is on cpu",
        ),
    ],
)
def test_environment(env: dict[str, str], code: str, expected: str) -> None:
    run = run_python(code, env={"PYTHONPATH": os.pathsep.join(sys.path), "PATH": "", **env})
    assert run.returncode == 1
    assert expected in run.stderr.splitlines()[-1]


def test_imports_and_runs_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import fastvit, torch\n"
        "x = torch.randn(1, 5, 3, 1, 16)\n"
        "print(fastvit.ops.attention_qkv(x).shape)\n"
        "with fastvit.use_backend('triton'): fastvit.ops.attention_qkv(x)"
    )
    run = run_python(code, env={"PYTHONPATH": os.pathsep.join(sys.path), "PATH": ""})
    assert "torch.Size([1, 5, 1, 16])" in run.stdout
    assert "triton is not installed" in run.stderr


X = torch.randn(2, 5, 32)
W = torch.randn(48, 32)
N32, N48 = torch.ones(32), torch.ones(48)
BRANCH: dict[str, Any] = {"norm_weight": N32, "norm_bias": N32, "qkv_weight": W, "heads": 1}
BRANCH |= {"qkv_bias": N48, "proj_weight": W[:16].T, "proj_bias": N32}
IMAGES = torch.randn(2, 3, 8, 12)
KERNEL = torch.randn(16, 3, 4, 4)


def branch(x: torch.Tensor, **changed: Any) -> torch.Tensor:
    return ops.layernorm_attention(x, **BRANCH | changed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.patch_embed(IMAGES[0], KERNEL), r"images must be \(B, 3, H, W\), got \(3,"),
        (lambda: ops.patch_embed(IMAGES[:, :2], KERNEL), r"images must be \(B, 3, H, W\), got"),
        (lambda: ops.patch_embed(IMAGES[..., :10], KERNEL), r"8x10 is not a multiple of .* 4x4"),
        (lambda: ops.patch_embed(IMAGES, KERNEL, N32), r"bias must be \(16,\), got \(32,\)"),
        (lambda: ops.patch_embed(IMAGES, KERNEL, pos=X[0]), r"pos must be \(6, 16\), got"),
        (lambda: ops.patch_embed(IMAGES, KERNEL, prefix=X[0]), r"prefix must be \(P, 16\)"),
        (lambda: ops.layernorm_linear(X, N32, N32, W[:, :16]), r"x must end in 16, got \(2, 5, 32"),
        (lambda: ops.layernorm_linear(X, N48, N32, W), r"norm_weight must be \(32,\), got \(48,\)"),
        (lambda: ops.layernorm_linear(X, N32, N32, W, N32), r"bias must be \(48,\), got"),
        (lambda: ops.attention(X, X, X), r"q must have 4 dimensions, got \(2, 5, 32\)"),
        (
            lambda: ops.attention(X[None], X[None, :, :3], X[None]),
            r"k must be \(1, 2, 5, 32\), got \(1, 2, 3, 32\)",
        ),
        (lambda: ops.attention_qkv(X), r"qkv must be \(B, N, 3, H, D\), got"),
        (lambda: ops.linear_residual(X, W, None, X), r"residual must be \(2, 5, 48\), got"),
        (
            lambda: ops.linear_residual(X, W, None, X.repeat(1, 1, 2)[..., :48], N48, N48),
            r"path_scale must be \(2,\), got \(48,\)",
        ),
        (
            lambda: ops.layernorm_mlp(X, N32, N32, W, N48, W, N32),
            r"fc2_weight must be \(32, 48\), got \(48, 32\)",
        ),
        (lambda: branch(X[0]), r"layernorm_attention: x must have 3 dimensions, got \(5, 32\)"),
        (lambda: branch(X[..., :16]), r"x must end in 32, got \(2, 5, 16\)"),
        (lambda: branch(X, qkv_weight=X), r"qkv_weight must have 2 dimensions, got \(2, 5, 32\)"),
        (lambda: branch(X, heads=3), r"heads must divide a third of qkv_weight's 48 rows, got 3"),
        (lambda: branch(X, heads=0), r"heads must divide a third of qkv_weight's 48 rows, got 0"),
        (lambda: branch(X, norm_weight=N48), r"norm_weight must be \(32,\), got \(48,\)"),
        (lambda: branch(X, norm_kind="rmsnorm"), "norm_bias must be None: RMSNorm has no bias"),
        (lambda: branch(X, norm_kind="batchnorm"), r"norm 'batchnorm' is unknown; expected"),
        (lambda: branch(X, qkv_bias=N32), r"qkv_bias must be \(48,\), got \(32,\)"),
        (lambda: branch(X, proj_weight=W[:16]), r"proj_weight must be \(32, 16\), got \(16, 32"),
        (lambda: branch(X, proj_bias=N48), r"proj_bias must be \(32,\), got \(48,\)"),
        (lambda: branch(X, layer_scale=N48), r"layer_scale must be \(32,\), got \(48,\)"),
        (lambda: branch(X, path_scale=N32), r"path_scale must be \(2,\), got \(32,\)"),
        (
            lambda: ops.patch_embed(IMAGES[:, :, :0], KERNEL),
            r"at least one patch, got \(2, 3, 0, 12",
        ),
        (
            lambda: ops.layernorm_linear(X, N32, N32, W, norm_kind="rmsnorm"),
            "norm_bias must be None: RMSNorm has no bias",
        ),
        (
            lambda: ops.layernorm_mlp(X, N32, N32, W, N48, W.T, N32, activation="relu"),
            r"activation 'relu' is unknown; expected",
        ),
    ],
)
def test_bad_shapes(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


Q = torch.randn(1, 5, 2, 16)
QKV = torch.randn(8, 3, 2, 16)
N64 = torch.ones(32, dtype=torch.float64)
NONE: Any = None
NUMPY: Any = Q.numpy()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.patch_embed(IMAGES.byte(), KERNEL), r"images is torch.uint8; .*images\.float"),
        (lambda: ops.patch_embed(IMAGES > 0, KERNEL), r"patch_embed: images is torch.bool; exp"),
        (lambda: ops.layernorm_linear(X.int(), N32, N32, W), r"x is torch.int32; expected float"),
        (lambda: ops.swiglu(X.long()), r"swiglu: x is torch.int64; expected floating point"),
        (lambda: ops.attention(Q.int(), Q.int(), Q.int()), r"attention: q is torch.int32; exp"),
        (lambda: ops.attention(Q + 0j, Q + 0j, Q + 0j), r"attention: q is torch.complex64; exp"),
        (lambda: ops.attention(NONE, Q, Q), r"attention: q must be a tensor, got NoneType"),
        (lambda: ops.attention(Q, NONE, Q), r"attention: k must be a tensor, got NoneType"),
        (lambda: ops.attention(NUMPY, Q, Q), r"q must be a tensor, got ndarray"),
        (lambda: ops.attention(Q, Q.to("meta"), Q), r"attention: k is on meta, expected cpu"),
        (lambda: ops.layernorm_linear(X, N32, N32, W.to("meta")), r"weight is on meta, expected"),
        (
            lambda: ops.layernorm_linear(X, N64, N32, W),
            r"layernorm_linear: norm_weight is torch.float64; expected x's torch.float32",
        ),
        (
            lambda: ops.layernorm_mlp(X.bfloat16(), N32, N32.half(), W, N48, W.T, N32),
            r"norm_bias is torch.float16; expected x's torch.bfloat16 or torch.float32",
        ),
        (lambda: ops.layernorm_linear(X[0, 0, 0], N32, N32, W), r"x must end in 32, got \(\)"),
        (lambda: branch(X.int()), r"layernorm_attention: x is torch.int32; expected floating"),
        (lambda: branch(NONE), r"layernorm_attention: x must be a tensor, got NoneType"),
        (lambda: branch(X, qkv_weight=NONE), r"qkv_weight must be a tensor, got NoneType"),
        (lambda: branch(X, proj_weight=NONE), r"proj_weight must be a tensor, got NoneType"),
        (lambda: branch(X, qkv_weight=W.to("meta")), r"qkv_weight is on meta, expected cpu"),
        (lambda: branch(X, proj_bias=N32.to("meta")), r"proj_bias is on meta, expected cpu"),
        (
            lambda: branch(X, norm_weight=N64),
            r"layernorm_attention: norm_weight is torch.float64; expected x's torch.float32",
        ),
        (lambda: ops.patch_embed(IMAGES, KERNEL[:, :, :0]), r"weight .* >= 1, got \(16, 3, 0, 4"),
        (lambda: ops.swiglu(X[..., :0]), r"x must end in an even size >= 2, got \(2, 5, 0\)"),
        (lambda: ops.linear_residual(X, W, None, NONE), r"residual must be a tensor, got NoneType"),
        (
            lambda: ops.linear_residual(X, W[:32], None, X, dropout=-1.0),
            r"linear_residual: dropout must be in \[0, 1\), got -1.0",
        ),
        (
            lambda: ops.layernorm_mlp(X, N32, N32, W, N48, W.T, N32, dropout=2.0),
            r"layernorm_mlp: dropout must be in \[0, 1\), got 2.0",
        ),
        (
            lambda: ops.attention_packed(QKV, torch.tensor([0, 8]), 8, dropout=1.0),
            r"attention: dropout must be in \[0, 1\), got 1.0",
        ),
    ],
)
def test_bad_operands(call, message: str, autocast: bool, backend: str) -> None:
    with fastvit.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("bounds", "max_seqlen", "message"),
    [
        ([0, 3, 6], 5, r"cu_seqlens must rise from 0 to 8, got \[0, 3, 6\]"),
        ([0, 3, 20], 17, r"cu_seqlens must rise from 0 to 8, got \[0, 3, 20\]"),
        ([2, 5, 8], 5, r"cu_seqlens must rise from 0 to 8"),
        ([0, 6, 3, 8], 6, r"cu_seqlens must rise from 0 to 8"),
        ([*range(9), 7], 6, r"got \[0, 1, 2, 3, \.\.\., 7, 8, 7\]"),
        ([0], 5, r"cu_seqlens holds no sequence, but qkv has 8 rows"),
        ([0, 3, 8], 4, r"max_seqlen is 4, but a sequence has 5 rows"),
    ],
)
def test_bad_bounds(bounds: list[int], max_seqlen: int, message: str, backend: str) -> None:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    with fastvit.use_backend(backend), pytest.raises(UsageError, match=message):
        ops.attention_packed(QKV, cu_seqlens, max_seqlen)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("norm_kind", [None, "layernorm"])
def test_no_sequences(norm_kind: str | None, backend: str, device: torch.device) -> None:
    bounds = torch.zeros(1, dtype=torch.int32, device=device)
    with fastvit.use_backend(backend):
        out = ops.attention_packed(QKV[:0].to(device), bounds, 1, norm_kind=norm_kind)
    assert out.shape == (0, 2, 16) and out.dtype == QKV.dtype


def test_mixed_dtypes_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"x is torch.float32 but weight is torch.bfloat16"):
        ops.layernorm_linear(X, N32, N32, W.bfloat16())
    with pytest.raises(TypeError, match=r"q is torch.float32 but v is torch.float16"):
        ops.attention(X[None], X[None], X[None].half())
    with pytest.raises(TypeError, match=r"x is torch.float32 but fc2_bias is torch.float64"):
        ops.layernorm_mlp(X, N32, N32, W, N48, W.T, N64)
    with pytest.raises(TypeError, match=r"x is torch.float32 but proj_weight is torch.bfloat16"):
        branch(X, proj_weight=W[:16].T.bfloat16())


def _model_and_images(device: torch.device) -> tuple[fastvit.ViT, torch.Tensor]:
    model = fastvit.ViT(
        image_size=8, patch_size=4, dim=16, depth=2, heads=2, mlp_dim=32, num_classes=3
    )
    return model.to(device).eval(), torch.randn(2, 3, 8, 8, device=device)


def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let 'auto' take the kernels wherever they can run, the interpreter included."""
    decide = ops.choose_triton

    def choose(op: str, x: torch.Tensor, dtype: torch.dtype, unsupported: str | None) -> bool:
        if backend._why_not_triton(x, dtype) or unsupported:
            return decide(op, x, dtype, unsupported)
        with fastvit.use_backend("triton"):
            return decide(op, x, dtype, unsupported)

    monkeypatch.setattr(ops, "choose_triton", choose)


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_jit_trace_takes_the_reference(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    _as_on_a_gpu(monkeypatch)
    model, images = _model_and_images(device)
    expected = model(images)
    traced: Any = torch.jit.trace(model, torch.randn_like(images))
    torch.testing.assert_close(traced(images), expected)
    with fastvit.use_backend("triton"), pytest.raises(RuntimeError, match=r"torch\.jit\.trace"):
        torch.jit.trace(model, images, check_trace=False)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_torch_func_takes_the_reference(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    _as_on_a_gpu(monkeypatch)
    model, images = _model_and_images(device)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    model.set_mlp_recompute()
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images)
    model(images).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(each[name].sum(0), p.grad, rtol=1e-3, atol=1e-4)
    with fastvit.use_backend("triton"), pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(loss)(parameters, images[0])


@pytest.mark.parametrize(
    ("switch", "expected"),
    [
        (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), "tf32"),
        (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
        (lambda: torch.set_float32_matmul_precision("highest"), "ieee"),
        (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), "tf32"),
        (lambda: setattr(torch.backends, "fp32_precision", "tf32"), "tf32"),
        (lambda: setattr(torch.backends, "fp32_precision", "ieee"), "ieee"),
    ],
)
def test_float32_products_follow_every_switch_of_pytorch(
    switch: Callable[[], None], expected: str
) -> None:
    matmul: Any = torch.backends.cuda.matmul
    matmul.fp32_precision = "none"
    try:
        switch()
        assert precision(torch.float32) == expected and precision(torch.bfloat16) == "ieee"
    finally:  # the old switches can be read again once both agree
        setattr(torch.backends, "fp32_precision", "none")  # noqa: B010
        matmul.allow_tf32 = False


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_forward_mode_takes_the_reference(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels would drop the tangent."""
    _as_on_a_gpu(monkeypatch)
    x, tangent, weight = (t.to(device) for t in (X, torch.randn_like(X), W))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        got = forward_ad.unpack_dual(ops.layernorm_linear(dual, None, None, weight)).tangent
        with fastvit.use_backend("triton"):
            with pytest.raises(RuntimeError, match="forward-mode"):
                ops.layernorm_linear(dual, None, None, weight)
            with pytest.raises(RuntimeError, match="forward-mode"):
                branch(dual, **{k: v.to(device) for k, v in BRANCH.items() if k != "heads"})
    eager = partial(reference.layernorm_linear, norm_weight=None, norm_bias=None, weight=weight)
    torch.testing.assert_close(got, torch.func.jvp(eager, (x,), (tangent,))[1])


@pytest.mark.parametrize(
    ("op", "names"),
    [
        ("linear_residual", ["path_scale"]),
        ("layernorm_attention", ["path_scale"]),
        ("layernorm_mlp", ["path_scale"]),
        ("attention_qkv", ["cos", "sin"]),
        ("attention_packed", ["cos", "sin"]),
    ],
)
def test_gradients_the_kernels_lack_are_the_references(
    op: str, names: list[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    _as_on_a_gpu(monkeypatch)
    args = OPS[op]() | (qk_params(9) if op == "attention_packed" else {})
    for name in names:
        args[name].requires_grad_()
    got, expected = (results(getattr(f, op), args, device) for f in (ops, reference))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])
    given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    with fastvit.use_backend("triton"):
        with pytest.raises(RuntimeError, match=f"no gradient of {' and '.join(names)}"):
            getattr(ops, op)(**given)
        with torch.no_grad():
            getattr(ops, op)(**given)


def test_a_gpu_of_another_maker_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm's tensors say is_cuda too."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    x: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    assert backend._why_not_triton(x, torch.bfloat16) == "the GPU is not NVIDIA's"


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_draws_drop_path_for_each_sample() -> None:
    model = fastvit.ViT(
        image_size=8, patch_size=4, dim=16, depth=2, heads=2, mlp_dim=32, drop_path=0.5
    )
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    images = torch.randn(1, 3, 8, 8).expand(32, -1, -1, -1)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="different")
    grads = each(parameters, images)["blocks.1.mlp.fc2.bias"]
    dropped = (grads == 0).all(dim=1)
    assert 0 < int(dropped.sum()) < 32
