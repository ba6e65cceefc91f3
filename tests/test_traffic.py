"""The traffic count against closed forms, timm's block and the writes of the kernels."""

import json
from typing import Any

import pytest
import torch
from fastvit_kernels import traffic
from processes import env_compiled, run_python


def run(code: str) -> Any:
    """Run `code` in a process without the interpreter and return the JSON that it prints."""
    code = f"import json\nfrom fastvit_kernels import traffic\n{code}"
    done = run_python(code, env=env_compiled())
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def tables() -> dict[str, Any]:
    return run(
        "from fastvit_kernels import report\nprint(json.dumps(report.traffic_summary()))",
    )


def test_no_more_than_the_committed_table(tables: dict[str, Any]) -> None:
    from fastvit_kernels.report import TRAFFIC_TABLE

    committed = json.loads(TRAFFIC_TABLE.read_text())
    assert tables.keys() == committed.keys()
    lines = [
        f"{model} {where}: {key} {committed[model][where]['fastvit'][key]} -> {value}"
        for model, table in tables.items()
        for where, both in table.items()
        for key, value in both["fastvit"].items()
        if value > committed[model][where]["fastvit"][key]
    ]
    assert not lines, (
        "more than the committed table says; where that is meant, "
        "`python -m fastvit_kernels.report --update`\n" + "\n".join(lines)
    )


def test_less_than_eager(tables: dict[str, Any]) -> None:
    for model, table in tables.items():
        for where, both in table.items():
            ours, eager = both["fastvit"], both["eager"]
            assert ours["bytes"] < 0.75 * eager["bytes"], (model, where)
        assert table["block"]["fastvit"]["saved"] < 0.7 * table["block"]["eager"]["saved"], model


def test_saved_bytes_and_flops_are_the_formula() -> None:
    """Saved: x, x_mid, qkv, o, u, and float32 mean and rstd twice and lse."""
    found = run(
        """
found = []
for autocast in (False, True):
    s = traffic.sizes("vit_small_patch16_224", 32, autocast)
    ours, eager = traffic.steps(s)["block"]
    flops = [[sum(p.flops for p in ps) for ps in (x.forward, x.backward)] for x in (ours, eager)]
    found.append([ours.saved, *flops])
print(json.dumps(found))"""
    )
    M, C, H, hidden = 32 * 197, 384, 6, 1536
    gemms, scores = 2 * M * C * (4 * C + 2 * hidden), 4 * M * 197 * C
    weights = 2 * C * (4 * C + 2 * hidden)
    for (saved, ours, eager), stream in zip(found, (2, 4), strict=True):
        cast = weights if stream == 4 else 0
        assert saved == M * (2 * C * stream + 2 * (4 * C + hidden) + 4 * (4 + H)) + cast
        assert ours[0] == eager[0] == gemms + scores
        assert eager[1] == 2 * gemms + 5 * scores // 2
        # Long rows compute their scores and dp twice.
        assert ours[1] - 2 * gemms in (5 * scores // 2, 7 * scores // 2)


def test_narrow_mlp_moves_its_ends_and_what_backward_reads() -> None:
    """One launch moves x, out and u; in backward one moves dout, u, x, dx, y, du and h."""
    forward, backward, inference = run(
        """
s = traffic.sizes("vit_tiny_patch16_224", 256)
ours = traffic.steps(s)["block"][0]
found = [[[p.name, p.bytes, p.flops] for p in passes if "layernorm_mlp" in p.op]
         for passes in (ours.forward, ours.backward)]
import torch
from fastvit_kernels import aot, layernorm_mlp
passes = []
def keep(kernel, values, *_):
    passes.append(traffic.launch_cost(aot.kernel_name(kernel), values))
with aot.intercept(90, keep), torch.no_grad():
    tensors = {k: torch.empty(n, dtype=s.dtype, device="meta")
               for k, n in traffic.block_shapes(s).items()}
    names = "norm2_weight norm2_bias fc1_weight fc1_bias fc2_weight fc2_bias".split()
    layernorm_mlp.layernorm_mlp(tensors["x"], *(tensors[k] for k in names), None, None, 1e-6,
                                False, "gelu", False, s.dtype)
found.append([[p.name, p.bytes, p.flops] for p in passes])
print(json.dumps(found))"""
    )
    M, C, F = 256 * 197, 192, 768
    weights, vectors, stats = 2 * 2 * C * F, 2 * (F + 3 * C), 8 * M
    products = 4 * M * C * F
    first = 2 * M * 2 * C + weights + vectors + stats
    assert forward == [["mlp_narrow_fwd", first + 2 * M * F, products]]
    assert inference == [["mlp_narrow_fwd", first, products]]
    norm_rows = 2 * 4 * C * -(-M // 128)
    moved = 2 * M * (4 * C + 3 * F) + weights + 2 * 2 * C + stats + norm_rows
    assert backward[0] == ["mlp_narrow_bwd", moved, products]
    assert [name for name, *_ in backward[1:]] == ["gemm_dw", "gemm_dw", "reduce_slabs"]


def test_eager_is_timms_block() -> None:
    pytest.importorskip("timm")
    ours, timms = run(
        """
import torch, torch.nn.functional as F, torchvision_shim
torchvision_shim.install()
from timm.models.vision_transformer import Block
s = traffic.sizes("vit_tiny_patch16_224", 4)
flash = torch.ops.aten._scaled_dot_product_flash_attention
F.scaled_dot_product_attention = lambda q, k, v, **_: flash(q, k, v)[0]
module = Block(s.dim, s.heads, qkv_bias=True).to("meta", s.dtype)

def forward(s, x, **p):
    names = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    split = (k.rsplit("_", 1) + [v] for k, v in p.items())
    state = {f"{names.get(name, name)}.{kind}": v for name, kind, v in split}
    return torch.func.functional_call(module, state, (x,), strict=True)

steps = (traffic.count(f, traffic.block_shapes(s), s) for f in (traffic.block_eager, forward))
print(json.dumps([[[[p.name, p.bytes] for p in step.forward],
                   [[p.name, p.bytes] for p in step.backward], step.saved] for step in steps]))"""
    )
    assert ours == timms


def test_kernels_write_what_the_count_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the launchers in the interpreter and see which arguments change."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    from fastvit_kernels import attention, layernorm_linear, swiglu, tuned

    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    seen = set()
    launch = interpreter.InterpretedFunction.run

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        values = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        tensors = {k: v for k, v in values.items() if isinstance(v, torch.Tensor)}
        before = {k: v.clone() for k, v in tensors.items()}
        launch(self, *args, **kwargs)
        changed = {
            k.removesuffix("_ptr")
            for k, v in tensors.items()
            if not torch.equal(v.nan_to_num(7.5), before[k].nan_to_num(7.5))
        }
        name = self.__name__.strip("_").removesuffix("_kernel")
        expected = traffic.written_by(name, values) & {k.removesuffix("_ptr") for k in tensors}
        assert changed == expected, name
        seen.add(name)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", watched)

    def step(function: Any, s: traffic.Sizes, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            k: torch.randn(shape, dtype=s.residual_dtype).requires_grad_()
            for k, shape in shapes.items()
        }
        out = function(s, **tensors)
        out.backward(torch.randn_like(out))

    def narrow(kernel: str, M: int, C: int, dtype: torch.dtype, device_index: int | None) -> Any:
        return tuned.Config(64, 64, 64) if dtype != torch.float32 else None

    float32 = (torch.float32, torch.float32)
    small = traffic.Sizes(2, 16, 4, 32, 2, 64, *float32)
    autocast = traffic.Sizes(2, 36, 4, 32, 2, 64, torch.bfloat16, torch.float32)
    many = traffic.Sizes(25, 16, 4, 32, 2, 64, torch.bfloat16, torch.bfloat16)  # folded norms
    for s in (small, autocast, many):
        step(traffic.block, s, traffic.block_shapes(s))
    step(traffic.stem, small, traffic.stem_shapes(small))
    monkeypatch.setattr(tuned, "mlp_narrow", narrow)
    step(traffic.block, autocast, traffic.block_shapes(autocast))
    for N in (130, 260):
        qkv = torch.randn(2, N, 3, 2, 16, requires_grad=True)
        attention.attention_qkv(qkv).square().sum().backward()
    swiglu.swiglu(torch.randn(5, 32, requires_grad=True)).sum().backward()
    x, weight, frozen = (
        torch.randn(2, 5, 32),
        torch.ones(32, requires_grad=True),
        torch.ones(16, 32),
    )
    layernorm_linear.layernorm_linear(
        x, weight, torch.zeros(32, requires_grad=True), frozen, None, 1e-6, False, torch.float32
    )[0].sum().backward()
    assert seen == set(traffic.WRITES)


def test_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'vit_gigantic' is unknown; expected vit_\(tiny"):
        traffic.sizes("vit_gigantic", 1)
