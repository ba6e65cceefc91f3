"""The harness tells right from wrong and survives failures; the README says what was measured."""

import contextlib
import json
import os
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import clone
import pytest
import torch
from processes import run_python

import fastvit
from benchmarks import (
    bench_attention,
    bench_gemm,
    bench_linear_residual,
    gpu_steps,
    harness,
    models,
    numerics,
    report,
    tune,
)
from benchmarks.harness import Provider, Work
from benchmarks.machine import Ceilings
from benchmarks.models import Entry, Task
from benchmarks.workloads import SIZES, TOY
from fastvit import ops, reference

CPU = torch.device("cpu")
CEILINGS = Ceilings({"float32": 1e9, "bfloat16": 1e9}, 1e9)
ROOT = Path(__file__).parents[1]
MODELS = pytest.mark.skipif(models.entries(CPU)[1].absent is not None, reason="timm is absent")


def _raise(error: Exception):
    def call(*_):
        raise error

    return call


@pytest.fixture
def rows() -> dict[str, dict]:
    good = reference.attention_qkv
    providers = [
        Provider("good", good),
        Provider("wrong", lambda qkv: good(qkv) * 1.01),
        Provider("one element", lambda qkv: _spoil(good(qkv))),
        Provider("nan", lambda qkv: good(qkv) * float("nan")),
        Provider("wrong gradient", lambda qkv: good(qkv) + 0.1 * (qkv - qkv.detach())[:, :, 0]),
        Provider("shape", lambda qkv: good(qkv)[:1]),
        Provider("memory", _raise(torch.OutOfMemoryError("too much"))),
        Provider("bug", _raise(ValueError("a bug"))),
        Provider("elsewhere", None, "needs a moon"),
    ]
    case = bench_attention.case(CPU, 2, 17, 2, 16, torch.float32, backward=True)
    found = harness.run(replace(case, providers=providers), CPU, CEILINGS, 0.01)
    return {row["provider"]: row for row in found}


def _spoil(o: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros_like(o)
    mask[-1, -1, -1, -1] = 0.01
    return o + mask


def test_only_what_is_right_is_timed(rows: dict[str, dict]) -> None:
    status = {name: row["status"] for name, row in rows.items()}
    assert status == {
        "good": "ok",
        "wrong": "failed parity",
        "one element": "failed parity",
        "nan": "failed parity",
        "wrong gradient": "failed parity",
        "shape": "failed parity",
        "memory": "out of memory",
        "bug": "error",
        "elsewhere": "absent",
    }
    assert [name for name, row in rows.items() if "median_ms" in row] == ["good"]
    assert "a bug" in rows["bug"]["reason"] and rows["elsewhere"]["reason"] == "needs a moon"
    assert rows["wrong gradient"]["reason"].startswith("gradient 1")


def test_distance_to_the_floor(rows: dict[str, dict]) -> None:
    good = rows["good"]
    flops, moved = 14 * 2 * 2 * 17 * 17 * 16, 12 * 2 * 17 * 2 * 16 * 4 + 8 * 2 * 17 * 2
    assert good["floor_ms"] == pytest.approx(1e3 * max(flops, moved) / 1e9)
    assert good["times_floor"] == pytest.approx(good["median_ms"] / good["floor_ms"])
    assert good["tflops"] == pytest.approx(flops / good["median_ms"] / 1e9)


def test_the_floor_is_the_slowest_unit() -> None:
    limits = Ceilings({"bfloat16": 100.0}, 10.0, 1.0)
    bf16 = torch.bfloat16
    assert Work(200, 10, 1).floor_ms(limits, bf16) == 2000
    assert Work(200, 50, 1).floor_ms(limits, bf16) == 5000
    assert Work(200, 50, 7).floor_ms(limits, bf16) == 7000


def test_providers_take_turns() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples = harness.measure(calls, CPU, 0.0, rounds=(4, 4))
    assert "".join(order[6:]) == "abc" + "bca" + "cab" + "abc"
    assert all(len(s.seconds) == 4 for s in samples.values())


def test_saved_for_backward_counts_each_buffer_once() -> None:
    x = torch.randn(1000, requires_grad=True)
    weight = torch.randn(1000, requires_grad=True)
    # exp saves y, the product saves y and weight: y counts once, the parameter not at all.
    kept = harness.saved_mb(lambda: (lambda y: y * weight)(x.exp()), [x, weight])
    assert kept == pytest.approx(4000 / 1e6)


def test_saved_memory_is_freed_once_counted() -> None:
    """Though exp saves its own output, which holds the graph."""
    made: list[weakref.ref] = []
    x = torch.ones(64, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x.exp()
        made.append(weakref.ref(y))
        return y

    assert harness.saved_mb(forward) > 0
    assert made[0]() is None


@pytest.mark.parametrize("name", SIZES)
def test_model_flops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with the products that PyTorch counts in the model, run on all tokens."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    size = SIZES[name]
    monkeypatch.setattr(
        fastvit.ViT, "init_weights", lambda self, **_: None
    )  # it reads values, which fake tensors lack
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FakeTensorMode(), torch.no_grad(), fastvit.use_backend("reference"), math:
        model = fastvit.ViT(num_classes=1000, **size.arguments()).requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            model.forward_head(model.forward_features(torch.empty(1, 3, size.image, size.image)))
    assert counter.get_total_flops() == pytest.approx(size.flops, rel=1e-3)
    assert sum(p.numel() for p in model.parameters()) == size.parameters


@pytest.mark.parametrize("product", bench_gemm.PRODUCTS)
def test_bare_products_agree(product: str) -> None:
    case = bench_gemm.case(CPU, "odd", 197, 64, 40, torch.float32, product)
    args = case.inputs(CPU, torch.float32)
    provider = Provider("fastvit", bench_gemm.ours(product))
    truth, eager = harness._oracle(case, args)
    assert harness.check_provider(case, provider, args, eager, truth) == {}
    wrong = Provider("wrong", lambda a, b: 1.01 * bench_gemm.PRODUCTS[product](a, b))
    assert harness.check_provider(case, wrong, args, eager, truth)["status"] == "failed parity"
    nan = Provider("nan", lambda a, b: bench_gemm.PRODUCTS[product](a, b) * float("nan"))
    everywhere = [[t * float("nan") for t in tensors] for tensors in (eager, truth)]
    found = harness.check_provider(case, nan, args, *everywhere)
    assert found["reason"].endswith("not finite"), "nor where float64 is not"


@MODELS
@pytest.mark.parametrize("kind", ["infer", "train"])
def test_models_agree_or_are_not_timed(kind: str) -> None:
    def wrong(size):
        module = models._fastvit(size)
        with torch.no_grad():
            module.get_parameter("blocks.1.mlp.fc2.weight").mul_(1.05)
        return module

    def truth_is_timm(entry, module, task, device):
        return models.seeded(models._timm, task.size, device)

    entries = [
        *(e for e in models.entries(CPU) if not e.absent),
        Entry("broken", _raise(ValueError("a bug"))),
    ]
    task = Task(kind, TOY, 2, torch.float32)
    found = {r["provider"]: r for r in models.run(task, CPU, CEILINGS, 0.01, entries)}
    assert found.pop("broken")["status"] == "error"
    assert {r["status"] for r in found.values()} == {"ok"}, found
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "_truth_of", truth_is_timm)
        pair = [models.entries(CPU)[1], Entry("wrong", wrong)]
        rows = models.run(task, CPU, CEILINGS, 0.01, pair)
    assert [r["status"] for r in rows] == ["ok", "failed parity"]


@MODELS
def test_gpu_script_survives_a_kill_and_every_failure(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--cpu", "--out", str(tmp_path)]
    match = "fault|attention B3|train toy batch 4 bfloat16$"
    command += ["--budget", "150", "--faults", "--match", match]
    path = tmp_path / "cpu-dry-run.json"
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    worker, deadline = 0, time.time() + 100
    while not worker and time.time() < deadline:
        time.sleep(0.1)
        # Between two workers, as after the fault that ends one, there is no number of one.
        with contextlib.suppress(FileNotFoundError, ValueError):
            if json.loads(path.read_text())["steps"]:
                worker = int((tmp_path / "worker.pid").read_text())
    killed.kill()
    killed.wait()
    assert worker, "no step had a result, or no worker ran"
    before = json.loads(path.read_text())["steps"]
    assert before
    for _ in range(100):
        if not _alive(worker):
            break
        time.sleep(0.1)
    assert not _alive(worker), "the worker outlived its driver"
    first = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert first.returncode == 0, first.stderr
    steps = json.loads(path.read_text())["steps"]
    assert {k: steps[k] for k in before} == before  # measured once, not again
    assert {k: s["status"] for k, s in steps.items() if s["part"] == "faults"} == {
        "fault raise": "error",
        "fault memory": "error",
        "fault exit": "its process ended with code 7",
        "fault hang": "ended after 2 s",
    }
    others = [s for s in steps.values() if s["part"] != "faults"]
    assert len(others) == 2 and {s["status"] for s in others} == {"ok"}
    assert "asked to fail" in steps["fault raise"]["traceback"]
    assert "# " in path.with_suffix(".md").read_text()


def test_a_worker_whose_driver_ended_before_it_began_does_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--cpu", "--out", str(tmp_path)]
    env = {**os.environ, "FASTVIT_BENCH_DRIVER": "1", "FASTVIT_BENCH_START": "0"}
    done = subprocess.run([*command, "--worker"], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "the driver has ended" in done.stderr, done.stderr
    assert not any(tmp_path.iterdir())


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_plan_of_a_gpu_run(tmp_path: Path) -> None:
    """The steps for a GPU, built without one: every part, unique keys, the tests of every op."""
    cuda = torch.device("cuda")
    steps = gpu_steps.steps(cuda, tmp_path)
    assert {s.part for s in steps} == set(gpu_steps.PARTS)
    assert len({s.key for s in steps}) == len(steps)
    tests = {t.stem for t in gpu_steps.op_tests(cuda)}
    ops = {"attention", "attention_ragged", "gemm_ops", "patch_embed"}
    assert {f"test_{op}" for op in ops} <= tests
    keys = [s.key for s in steps]
    for size in SIZES.values():
        assert f"train {size.name} batch {size.batch} bfloat16" in keys
    for batch in (1, 8, 64, 256):
        assert f"infer B/16 batch {batch} bfloat16" in keys


LINE = tune.Line("GEMM", 0, "small")


def test_search_climbs_resumes_and_keeps_to_its_time() -> None:
    calls: list[tune.Config] = []

    def try_out(config: tune.Config) -> dict:
        calls.append(config)
        if config.num_warps == 2:
            return {"status": "failed parity", "ratio": 0.1}
        if config.BLOCK_N == 256:
            return {"status": "error", "reason": "out of shared memory"}
        ms = abs(config.BLOCK_K - 32) + abs(config.num_stages - 4) + config.num_warps
        return {"status": "ok", "ratio": ms / 102, "ms": {"a": {"old": 102.0, "new": ms}}}

    record: dict = {}
    tune.search(LINE, record, try_out, lambda: None, deadline=0.0)
    assert not calls and not record["finished"]
    end = time.time() + 100
    saved: list[str] = []
    half = 5

    def save() -> None:
        saved.append(json.dumps(record))
        if len(saved) == half:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune.search(LINE, record, try_out, save, end)
    record = json.loads(saved[-1])
    tune.search(LINE, record, try_out, lambda: None, end)
    assert len(set(calls)) == len(calls), "a configuration was tried twice"
    best = tune.parse(record["best"])
    assert record["finished"] and (best.BLOCK_K, best.num_stages, best.num_warps) == (32, 4, 4)
    assert record["best"] in tune.printed(LINE, record, CPU)
    done = len(calls)
    tune.search(LINE, record, try_out, lambda: None, end)
    assert len(calls) == done


def test_a_product_through_tma_meets_its_rivals() -> None:
    line = tune.Line("GEMM", 90, "tma_wide")
    around = tune.neighbours(line, line.config)
    assert set(tune.ALTERNATIVES["tma_wide"]) < set(around)


def test_neighbours_of_attention_have_room_for_more_ctas_or_leave_it_to_another_kernel() -> None:
    configs = {name: tune.Line("ATTENTION", 90, name).config for name in ("fwd", "bwd_64_keys")}
    around = {
        name: tune.neighbours(tune.Line("ATTENTION", 90, name), config)
        for name, config in configs.items()
    }
    for name, config in configs.items():
        assert {replace(config, maxnreg=n) for n in tune.REGISTERS} < set(around[name])
    assert tune.NO_KERNEL in around["bwd_64_keys"] and tune.NO_KERNEL not in around["fwd"]


def test_neighbours_of_attention_own_more_rows_in_more_warps() -> None:
    long, dkv = (tune.Line("ATTENTION", 90, name) for name in ("fwd_long", "dkv"))
    assert replace(long.config, BLOCK_M=64, num_warps=4) in tune.neighbours(long, long.config)
    assert replace(dkv.config, BLOCK_N=128, num_warps=8) in tune.neighbours(dkv, dkv.config)


@pytest.mark.parametrize("config", [LINE.config, tune.Config(64, 32, 16, 8, 3, SUBTILES=2)])
def test_a_line_is_printed_as_it_is_written(config: tune.Config) -> None:
    assert tune.parse(tune.literal(config)) == config


def test_a_wrong_candidate_is_not_timed() -> None:
    case = bench_attention.case(CPU, 1, 17, 1, 16, torch.float32, backward=False)
    baseline, wrong = LINE.config, tune.Config(16, 16, 16)

    def op(qkv: torch.Tensor) -> torch.Tensor:
        return reference.attention_qkv(qkv) * (1.01 if LINE.config == wrong else 1.0)

    job = tune.Job.of(replace(case, providers=[Provider("ours", op)]), CPU)
    found = tune.evaluate(LINE, wrong, [job], CPU, 0.0)
    assert found["status"] == "failed parity" and "ratio" not in found
    right = tune.evaluate(LINE, tune.Config(32, 32, 32), [job], CPU, 0.0)
    assert right["status"] == "ok" and right["ratio"] > 0 and LINE.config == baseline


def test_which_lines_a_workload_reads() -> None:
    every = tune.lines(0)
    before = [line.config for line in every]
    found = []
    for backward in (False, True):
        case = bench_attention.case(CPU, 1, 300, 1, 16, torch.float16, backward)
        case = replace(case, providers=[Provider("", ops.attention_qkv)])
        found.append(tune.reads(case, every, CPU))
    assert found[0] == {"ATTENTION 0 fwd"} < found[1]
    assert all(key.startswith("ATTENTION") for key in found[1])
    case = bench_linear_residual.case(CPU, "odd", 1, 72, torch.float32, backward=True)
    found = tune.reads(replace(case, providers=[Provider("", ops.linear_residual)]), every, CPU)
    assert found == {"GEMM 0 float32", "GEMM_DW 0 float32"}
    assert [line.config for line in every] == before


@pytest.mark.slow
def test_training_stays_within_the_noise_of_eager() -> None:
    (row,) = numerics.curves(CPU, steps=30, seeds=4)
    assert row["ours"] == "Triton, interpreted" and len(row["loss"]) == 30
    assert row["apart"] < row["noise"] and row["agreement"] > 0.9


def test_committed_training_run_is_within_the_noise_of_eager() -> None:
    result = json.loads((clone.RESULTS / "numerics.json").read_text())
    row = next(r for r in result["rows"] if r["kind"] == "training curve")
    assert row["steps"] == len(row["loss"]) == 300 and row["apart"] < row["noise"]
    smooth = [numerics._smoothed(curve) for curve in row["loss_eager"]]
    assert row["apart"] == pytest.approx(
        numerics._distance(numerics._smoothed(row["loss"]), smooth[0])
    )


def test_gpu_script_refuses_to_pass_off_a_dry_run() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "--out" in done.stderr
    committed = [json.loads(p.read_text()) for p in clone.RESULTS.glob("*.json")]
    kinds = {r["environment"]["kind"] for r in committed if "steps" in r}
    assert kinds <= {"cuda"}


def test_readme_says_what_the_results_say() -> None:
    text = (ROOT / "README.md").read_text()
    written = report.fill(text, headline=report.headline(), results=report.readme())
    assert text == written, "run: python benchmarks/report.py"


def test_readme_without_gpu_results_says_so(tmp_path: Path) -> None:
    assert report.readme(tmp_path) == report.headline(tmp_path) == report.NOTHING
    with pytest.raises(ValueError, match="results:start"):
        report.fill("no markers", results="block")


def test_import_is_light() -> None:
    code = (
        "import sys, time; clock = time.process_time; start = clock(); import torch; "
        "between = clock(); before = set(sys.modules); import fastvit; "
        "print((clock() - between) / (between - start)); "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    share, packages = done.stdout.splitlines()
    assert set(packages.split()) <= {"fastvit", "fastvit_kernels", "einops", "safetensors"}
    # As a share of torch's own import: seconds would depend on the machine and its load.
    assert float(share) < 0.1, f"import fastvit takes {float(share):.0%} of what import torch takes"
