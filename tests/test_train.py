"""The training loop: it learns, repeats bitwise, and resumes as if never stopped."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvit import load_checkpoint
from fastvit.augment import Augment
from fastvit.data import DataSet, Images
from fastvit.errors import UsageError
from fastvit.train import (
    Run,
    choose_device,
    learning_rate,
    load_state,
    make_model,
    make_optimizer,
    make_settings,
)

MODEL = dict(image_size=8, patch_size=4, dim=32, depth=2, heads=2, mlp_dim=32, drop_path=0.1)


def stripes(count: int = 96) -> DataSet:
    """A data set in which images of class c are bright in row 2 c."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 4
    images[torch.arange(count), 0, 2 * labels] = 255
    train, val, test = (
        Images(*part)
        for part in zip(images.split(count // 3), labels.split(count // 3), strict=True)
    )
    names = ("a", "b", "c", "d")
    return DataSet("stripes", names, 1, (8, 8), train, val, test, Augment(flip=True, shift=0.05))


def start(seed: int = 0, amp: bool = False, **given) -> Run:
    settings = make_settings(
        "digits", **{**dict(epochs=4, batch_size=8, lr=3e-3, seed=seed, model=MODEL), **given}
    )
    data = stripes()
    return Run(settings, data, make_model(settings, data), torch.device("cpu"), amp)


def weights(run: Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def without_speed(history):
    return [{k: v for k, v in entry.items() if "second" not in k} for entry in history]


def test_it_learns(tmp_path):
    run = start(epochs=20, lr=5e-3, model={**MODEL, "drop_path": 0.0, "patch_size": 2})
    run.fit(tmp_path)
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]
    assert run.evaluate(run.data.test)[1] > 0.9
    assert len(run.history) == 20 and run.seconds > 0
    assert run.backend.startswith("reference (")


def test_one_seed_one_result_two_seeds_two(tmp_path):
    runs = [start(seed) for seed in (0, 0, 1)]
    for i, run in enumerate(runs):
        torch.manual_seed(100 + i)  # the global state before a run must not matter
        run.fit(tmp_path)
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    assert without_speed(runs[0].history) == without_speed(runs[1].history)
    assert not torch.equal(weights(runs[0]), weights(runs[2]))


@pytest.mark.parametrize("step", [5, 9], ids=["epoch-1", "epoch-2"])
def test_a_killed_run_resumes_to_the_same_result(tmp_path, step):
    whole = start()
    whole.fit(tmp_path)

    class Killed(BaseException):
        pass

    (tmp_path / "killed").mkdir()
    victim, train_step = start(), Run.train_step

    def fatal(images, labels, at):
        if at == step:
            raise Killed
        return train_step(victim, images, labels, at)

    victim.train_step = fatal  # type: ignore[method-assign]
    with pytest.raises(Killed):
        victim.fit(tmp_path / "killed")
    settings, state = load_state(tmp_path / "killed")
    assert settings == victim.settings and len(state["history"]) == step // 4
    data = stripes()
    again = Run(settings, data, make_model(settings, data), torch.device("cpu"), amp=False)
    again.resume(state)
    again.fit(tmp_path / "killed")
    assert torch.equal(weights(again), weights(whole))
    assert without_speed(again.history) == without_speed(whole.history)


def test_resume_takes_up_amp_and_compile(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: lambda images: model(images))
    whole, first = start(epochs=2, amp=True), start(epochs=2, amp=True)
    whole.fit(tmp_path)
    first.history.append(first.train_epoch(0))
    first.compile = True
    first.save_state(tmp_path / "state.pt")
    state = load_state(tmp_path)[1]
    again = start(epochs=2)
    again.resume(state)
    assert again.amp and again.compile and again.forward is not again.model
    again.resume({**state, "compile": False})
    assert again.forward is again.model
    again.fit(tmp_path)
    assert torch.equal(weights(again), weights(whole))


def test_resume_refuses_other_data_and_damaged_state(tmp_path):
    run = start(epochs=1)
    run.fit(tmp_path)
    state = load_state(tmp_path)[1]
    run.data = dataclasses.replace(run.data, classes=("a", "b"))
    with pytest.raises(UsageError, match="the data changed"):
        run.resume(state)
    run.data = dataclasses.replace(run.data, classes=("d", "c", "b", "a"))  # as many as before
    with pytest.raises(UsageError, match=r"changed: it was \['a', .*, now it is \['d', 'c'"):
        run.resume(state)
    run.data = dataclasses.replace(run.data, classes=tuple("abcd"), files="of other names")
    with pytest.raises(UsageError, match="the files of digits have other names"):
        run.resume(state)
    del state["files"]
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(UsageError, match="damaged or not a run's state: 'files'"):
        load_state(tmp_path)
    run.fit(tmp_path)
    raw = (tmp_path / "state.pt").read_bytes()
    for keep in (0, 100, len(raw) - 50):
        (tmp_path / "state.pt").write_bytes(raw[:keep])
        with pytest.raises(UsageError, match="damaged"):
            load_state(tmp_path)
    with pytest.raises(UsageError, match=r"holds no state\.pt"):
        load_state(tmp_path / "none")


def test_the_state_of_a_run_is_a_checkpoint(tmp_path):
    """Its settings give what the tensors do not show: 4 heads of 8, and norm_eps 1e-3."""
    run = start(model={**MODEL, "heads": 4, "norm_eps": 1e-3})
    run.save_state(tmp_path / "state.pt")
    model = load_checkpoint(tmp_path / "state.pt")
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(images), run.model.eval()(images))
    assert model.config["heads"] == 4 and not model.load_report.notes


def test_divergence_is_an_error_and_keeps_the_last_state(tmp_path):
    run = start()
    run.data.mean, run._mean = (math.nan,), torch.full((1, 1, 1), math.nan)
    with pytest.raises(UsageError, match=r"the loss is nan in epoch 1.*--lr"):
        run.fit(tmp_path)
    assert not (tmp_path / "state.pt").exists()


def test_bfloat16_autocast_trains(tmp_path):
    run = start(epochs=1)
    run.amp = True
    run.fit(tmp_path)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert run.logits(run.data.test.images[:2]).dtype == torch.float32  # type: ignore[union-attr]


def test_a_step_is_of_a_smoothed_loss_clipped_and_at_the_rate_of_the_whole_run():
    run = start(model={**MODEL, "drop_path": 0.0}, label_smoothing=0.3, clip=0.01)
    alone = copy.deepcopy(run.model)
    optimizer = make_optimizer(alone, run.settings)
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 4
    mean, std = (torch.tensor(v)[:, None, None] for v in (run.data.mean, run.data.std))
    assert torch.equal(run.normalised(images), (images - mean) / std)
    for step in (6, 7):  # of 16, in the second epoch
        run.train_step(images, labels, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.settings, step, 16)
        optimizer.zero_grad()
        F.cross_entropy(alone(images), labels, label_smoothing=0.3).backward()
        nn.utils.clip_grad_norm_(alone.parameters(), 0.01)
        optimizer.step()
    for got, expected in zip(run.model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got, expected)
        # Adam's step hardly depends on the gradient's length, but its running mean does.
        means = (o.state[p]["exp_avg"] for o, p in ((run.optimizer, got), (optimizer, expected)))
        torch.testing.assert_close(*means)


def test_evaluation_is_without_dropout():
    run = start(model={**MODEL, "dropout": 0.5})
    run.model.train()
    assert run.evaluate(run.data.val) == run.evaluate(run.data.val)


def test_learning_rate_warms_up_then_falls_to_zero():
    settings = make_settings("digits", lr=1.0)
    rates = [learning_rate(settings, step, 100) for step in range(101)]
    assert rates[:11] == pytest.approx([0.1 * (i + 1) for i in range(10)] + [1.0])
    assert rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0.0)
    assert learning_rate(settings, 0, 1) == 1.0


def test_optimizer_decays_matrices_alone():
    run = start(weight_decay=0.3)
    spared, decayed = make_optimizer(run.model, run.settings).param_groups
    names = {id(p): name for name, p in run.model.named_parameters()}
    assert decayed["weight_decay"] == 0.3 and spared["weight_decay"] == 0.0
    assert all(names[id(p)].endswith("weight") for p in decayed["params"])
    kept = {names[id(p)] for p in spared["params"]}
    assert {"pos_embed", "cls_token", "norm.weight", "head.bias"} <= kept
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_settings():
    preset = make_settings("digits", "vit_tiny_patch16_224", model=dict(image_size=32))
    assert preset.model["dim"] == 192 and preset.model["image_size"] == 32
    wide = make_settings("digits", model=dict(dim=128))
    assert wide.model["mlp_dim"] == 2 * make_settings("digits").model["mlp_dim"]
    for bad, message in (
        (dict(epochs=0), "epochs must be at least 1, got 0"),
        (dict(batch_size=-1), "batch_size"),
        (dict(lr=0.0), "lr must be positive"),
        (dict(lr=math.nan), "lr must be positive"),
        (dict(label_smoothing=1.0), "label_smoothing"),
        (dict(weight_decay=-0.1), "weight_decay"),
        (dict(seed=-1), "seed"),
    ):
        with pytest.raises(UsageError, match=message):
            make_settings("digits", None, **bad)
    with pytest.raises(UsageError, match="--model must be one of"):
        make_settings("digits", "vit_nano")
    with pytest.raises(UsageError, match="dim 32 is not a multiple of heads 5"):
        make_model(make_settings("digits", model={**MODEL, "heads": 5}), stripes())


def test_device():
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no NVIDIA GPU"):
            choose_device("cuda")
