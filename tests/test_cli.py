"""The command line: train, resume, predict, and the errors for bad input."""

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from processes import env_here
from safetensors.torch import load_file
from test_data import break_one, write_fashion, write_folder

import fastvit
from fastvit.cli import main

TINY = ["--dim", "32", "--depth", "1", "--heads", "2", "--device", "cpu"]
DIGITS = ["train", *TINY, "--epochs", "2", "--lr", "4e-3"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """The folder of a tiny trained run, with one image of the digit 1 as one.png."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    assert main([*DIGITS, "--epochs", "10", "--out", str(folder)]) == 0
    from sklearn.datasets import load_digits

    pixels = load_digits(return_X_y=True)[0][1].reshape(8, 8)
    Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(folder / "one.png")
    return folder


def test_train_writes_everything(digits_run):
    names = {"model.safetensors", "model.json", "curves.png", "attention.png", "state.pt"}
    assert set(os.listdir(digits_run)) == names | {"one.png"}
    config = json.loads((digits_run / "model.json").read_text())
    assert config["classes"] == [str(i) for i in range(10)]
    assert len(config["mean"]) == len(config["std"]) == 1
    assert config["model"]["dim"] == 32 and config["model"]["image_size"] == 8
    assert 0.4 < config["results"]["test_accuracy"] <= 1
    for name in ("curves.png", "attention.png"):
        with Image.open(digits_run / name) as image:
            assert min(image.size) > 300
            assert np.asarray(image.convert("L")).std() > 10


def test_train_says_what_it_did(capsys):
    assert main(DIGITS) == 0
    captured = capsys.readouterr()
    for wanted in (
        r"data     digits: 1,259 train, 179 validation and 359 test images, 1x8x8, 10 classes",
        r"backend  reference \(",
        r"validation accuracy  \d+\.\d\d% of 179",
        r"test accuracy        \d+\.\d\d% of 359",
        r"wrote                runs/digits/model\.safetensors",
    ):
        assert re.search(wanted, captured.out), captured.out
    assert re.search(
        r"epoch   2/2  loss \d.*accuracy .*validation .*images/s, backend reference", captured.err
    )


def test_same_seed_same_checkpoint_and_a_folder_of_its_own():
    for _ in range(2):
        assert main(DIGITS) == 0
    assert main([*DIGITS, "--seed", "1"]) == 0
    first, second, other = (
        load_file(f"runs/digits{n}/model.safetensors") for n in ("", "-2", "-3")
    )
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_train_refuses_a_folder_in_use(capsys, digits_run):
    assert main([*DIGITS, "--out", str(digits_run)]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_killed_process_resumes_to_the_same_result():
    """SIGKILL in the middle of a real process, then --resume."""
    command = [*DIGITS, "--epochs", "8"]
    assert main([*command, "--out", "whole"]) == 0
    process = start(*command, "--out", "killed", stderr=subprocess.DEVNULL)
    wait_for("killed/state.pt")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not os.path.exists("killed/model.safetensors")
    assert main(["train", "--resume", "killed", "--device", "cpu"]) == 0
    whole, resumed = (load_file(f"{name}/model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def start(*arguments, **more):
    return subprocess.Popen(
        [sys.executable, "-m", "fastvit", *arguments],
        stdout=subprocess.DEVNULL,
        env=env_here(OMP_NUM_THREADS="1"),
        **more,
    )


def wait_for(path):
    deadline = time.monotonic() + 60
    while not os.path.exists(path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert os.path.exists(path)


def test_a_folder_has_one_run_at_a_time(capsys):
    """A second run is refused, whether new or resumed; SIGTERM ends the first as ctrl-c does."""
    command = [*DIGITS, "--epochs", "9999", "--out", "run"]
    running = start(*command, stderr=subprocess.PIPE, text=True)
    try:
        wait_for("run/state.pt")
        assert main([*DIGITS, "--out", "run", "--data", "folder:unread"]) == 2
        assert "run is in use: another run is being trained there" in capsys.readouterr().err
        assert main(["train", "--resume", "run", "--device", "cpu"]) == 2
        assert "run is in use: another run is being trained there" in capsys.readouterr().err
        running.send_signal(signal.SIGTERM)
        error = running.communicate(timeout=60)[1]
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 130, error
    assert "interrupted; go on with: fastvit train --resume run" in error
    assert os.listdir("run") == ["state.pt"]
    for name in (".state.pt.abcd_123.pt", ".curves.png.abcd_123.png", ".state.pt.mine.pt"):
        with open(f"run/{name}", "w") as file:
            file.write("half")
    assert main([*DIGITS, "--out", "run"]) == 2
    assert "--out run already holds a run" in capsys.readouterr().err
    left = {name for name in os.listdir("run") if name.startswith(".")}
    assert left == {".state.pt.mine.pt"}, "what a killed run left is swept, and nothing else"


def test_a_folder_held_in_a_forked_worker_is_let_go(tmp_path):
    from fastvit.errors import UsageError
    from fastvit.saving import lock_folder

    script = """
import os, sys, time
from pathlib import Path
from fastvit.saving import lock_folder
with lock_folder(Path(sys.argv[1])) as held:
    assert held
    if os.fork() == 0:
        time.sleep(30)
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
    os._exit(0)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        env=env_here(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin and process.stdout
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="is in use"), lock_folder(tmp_path):
            pass
        process.stdin.close()
        process.wait(30)
        with lock_folder(tmp_path) as held:  # the forked child is still alive
            assert held
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


def test_resume_takes_no_other_settings(capsys, digits_run):
    for extra in (["--lr", "1"], ["--batch-size", "3"], ["--data", "digits"], ["--strict"]):
        assert main(["train", "--resume", str(digits_run), *extra]) == 2
        assert f"leave out {extra[0]}" in capsys.readouterr().err
    for extra in (["--amp", "off"], ["--amp", "bf16"], ["--compile"]):
        assert main(["train", "--resume", str(digits_run), *extra]) == 2
        assert f"leave out {extra[0]}" in capsys.readouterr().err
    assert main(["train", "--resume", "nowhere"]) == 2
    assert "nowhere holds no state.pt" in capsys.readouterr().err


def test_resume_of_a_folder_from_elsewhere_and_of_other_files(tmp_path, capsys, monkeypatch):
    write_folder(tmp_path / "images")
    fast = [*DIGITS, "--epochs", "1", "--image-size", "16"]
    assert main([*fast, "--data", "folder:images", "--out", "run"]) == 0
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    resume = ["train", "--resume", str(tmp_path / "run"), "--device", "cpu"]
    assert main(resume) == 0
    (tmp_path / "images" / "cat").rename(tmp_path / "images" / "emu")
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert main(resume) == 2
    assert "the data changed: it was ['cat', 'dog'], now it is ['dog'," in capsys.readouterr().err
    (tmp_path / "images" / "emu").rename(tmp_path / "images" / "cat")
    (tmp_path / "images" / "cat" / "1.png").rename(tmp_path / "images" / "cat" / "x.png")
    assert main(resume) == 2
    assert "have other names than when the run began" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights


def test_resume_keeps_the_precision(capsys):
    assert main([*DIGITS, "--epochs", "1", "--amp", "bf16", "--out", "new"]) == 0
    assert main(["train", "--resume", "new", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("cpu, bfloat16 autocast") == 2
    assert main(["train", "--resume", "new", "--device", "cpu", "--amp", "bf16"]) == 2
    assert "leave out --amp" in capsys.readouterr().err


@pytest.mark.parametrize("finished", [False, True])
def test_interrupted(monkeypatch, capsys, finished):
    from fastvit.train import Run

    def interrupt(self, folder):
        if finished:
            self.save_state(folder / "state.pt")
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "fit", interrupt)
    assert main(DIGITS) == 130
    again = "go on with: fastvit train --resume runs/digits" if finished else "before its first"
    assert f"interrupted; {again}" in capsys.readouterr().err


def test_train_on_fashion_mnist_and_on_a_folder(tmp_path, capsys):
    (tmp_path / "fashion").mkdir()
    write_fashion(tmp_path / "fashion")
    write_folder(tmp_path / "images", ("cat", "dog"), count=12)
    break_one(tmp_path / "images")
    fast = [*TINY, "--epochs", "1", "--batch-size", "8"]
    assert main(["train", "--data", f"fashion-mnist:{tmp_path}/fashion", *fast]) == 0
    images = [*fast, "--data", f"folder:{tmp_path}/images", "--image-size", "16x32"]
    assert main(["train", *images, "--patch-size", "8"]) == 0
    assert "skipped  2 files" in capsys.readouterr().err
    config = json.loads((tmp_path / "runs/folder/model.json").read_text())
    assert config["model"]["image_size"] == [16, 32] and config["classes"] == ["cat", "dog"]
    assert config["results"]["skipped_files"] == 2
    assert main(["predict", "runs/folder", "images/dog/1.png"]) == 0
    assert re.search(r"^  +\d+\.\d%  (cat|dog)$", capsys.readouterr().out, re.M)
    assert main(["train", *images, "--strict"]) == 2
    assert "cannot be read as an image" in capsys.readouterr().err


def test_test_accuracy_is_of_what_was_used(tmp_path, capsys, monkeypatch):
    """A streamed folder finds broken files while it reads; accuracy is over the readable ones."""
    from fastvit import cli
    from fastvit.dataset import ImageFiles
    from fastvit.image_folder import load_folder

    def streamed(spec, *sizes):
        return load_folder(tmp_path / "images", (16, 16), memory_limit=0, workers=0)

    write_folder(tmp_path / "images", count=10)
    data = streamed("")
    for split, count in ((data.test, 2), (data.val, 1)):
        assert isinstance(split, ImageFiles)
        for path in split.paths[:count]:
            path.write_text("hello")
    monkeypatch.setattr(cli, "load_data", streamed)
    options = ["--data", "folder:images", "--image-size", "16", "--epochs", "1"]
    assert main([*DIGITS, *options]) == 0
    out = capsys.readouterr().out
    assert re.search(r"validation accuracy .* of 1$", out, re.M)
    assert re.search(r"test accuracy .* of 2$", out, re.M), out


def test_the_attention_figure_shows_images_that_can_be_read(tmp_path, capsys, monkeypatch):
    """Of a streamed folder, whose broken files only the test finds."""
    from fastvit import cli
    from fastvit.dataset import ImageFiles
    from fastvit.image_folder import load_folder

    def streamed(spec, *sizes):
        return load_folder(tmp_path / "images", (16, 16), memory_limit=0, workers=0)

    write_folder(tmp_path / "images", count=100)
    split = streamed("").test
    assert isinstance(split, ImageFiles)
    for path in split.paths[:-1]:
        path.write_text("hello")
    monkeypatch.setattr(cli, "load_data", streamed)
    options = ["--data", "folder:images", "--image-size", "16", "--epochs", "1"]
    assert main([*DIGITS, *options]) == 0
    assert re.search(r"test accuracy .* of 1$", capsys.readouterr().out, re.M)
    assert (tmp_path / "runs/folder/attention.png").exists()


def test_out_of_memory_is_one_line(capsys, monkeypatch):
    from fastvit.train import Run

    def fit(self, folder):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

    monkeypatch.setattr(Run, "fit", fit)
    assert main([*DIGITS, "--batch-size", "1000"]) == 2
    error = capsys.readouterr().err
    assert "error: out of memory with batches of 1000; lower --batch-size" in error


def test_predict_refuses_what_no_image_file_holds(capsys, digits_run, tmp_path):
    from fastvit import ViT
    from fastvit.saving import save_checkpoint

    sizes = dict(image_size=8, patch_size=4, dim=16, depth=1, heads=2, mlp_dim=16, num_classes=2)
    for options, message in (
        ({"channels": 4}, "it takes images of 4 channels; files have 1 or 3"),
        ({"pool": "none"}, "with pool 'none' it classifies each patch, not the image"),
        ({"num_classes": 0}, "it has no classifier"),
    ):
        model = ViT(**{**sizes, **options})
        mean = [0.5] * model.config["channels"]
        save_checkpoint("m.safetensors", model, classes=["a", "b"], mean=mean, std=mean)
        assert main(["predict", "m.safetensors", str(digits_run / "one.png")]) == 2
        assert message in capsys.readouterr().err


def test_predict_refuses_embeddings(capsys, digits_run, tmp_path):
    model = fastvit.ViT(image_size=8, patch_size=4, dim=16, depth=1, heads=2, mlp_dim=16)
    clip = fastvit.ViT(**{**model.config, "pre_norm": True, "num_classes": 5, "activation": "gelu"})
    with torch.no_grad():
        clip.get_parameter("head.bias").zero_()
    fastvit.export_checkpoint(clip, "hf", "clip")
    assert main(["predict", "clip", str(digits_run / "one.png")]) == 2
    assert "its head projects to embeddings" in capsys.readouterr().err


def test_a_state_is_a_checkpoint_of_its_run(digits_run, tmp_path):
    assert main([*DIGITS[:-4], "--epochs", "1", "--lr", "4e-3"]) == 0
    run = fastvit.load_checkpoint("runs/digits")
    state = fastvit.load_checkpoint("runs/digits/state.pt")
    for name in ("mean", "std", "label_names"):
        assert state.default_cfg[name] == run.default_cfg[name]


def test_predict_prints_the_top_five(capsys, digits_run):
    image = str(digits_run / "one.png")
    assert main(["predict", str(digits_run / "model.safetensors"), image, image]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and lines[0] == lines[6] == image and lines[1:6] == lines[7:]
    found = [re.fullmatch(r" +(\d+\.\d)%  (\d)", line) for line in lines[1:6]]
    shares = [float(m[1]) for m in found if m]
    assert len(shares) == 5 and shares == sorted(shares, reverse=True) and sum(shares) <= 100.3
    assert main(["predict", str(digits_run), image, "--top", "99"]) == 0
    shares = [float(s) for s in re.findall(r"(\d+\.\d)%", capsys.readouterr().out)]
    assert len(shares) == 10 and sum(shares) == pytest.approx(100, abs=0.6)


def test_predict_prints_names_that_stdout_cannot_encode(digits_run, tmp_path, monkeypatch):
    pixels = (digits_run / "one.png").read_bytes()
    names = ("\u00e9.png", os.fsdecode(b"\xff.png"), "plain.png")
    for name in names:
        (tmp_path / name).write_bytes(pixels)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["predict", str(digits_run), *names, "--top", "1"]) == 0
    lines = written.getvalue().decode().splitlines()
    assert lines[::2] == [r"\xe9.png", r"\udcff.png", "plain.png"]


def test_predict_ends_quietly_where_nobody_reads_on(capfd, digits_run, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["predict", str(digits_run), str(digits_run / "one.png")]) == 141
    assert capfd.readouterr().err == ""


def test_predict_goes_on_past_an_unreadable_image(capsys, digits_run, tmp_path):
    (tmp_path / "bad.png").write_text("hello")
    arguments = ["bad.png", "gone.png", str(digits_run / "one.png")]
    assert main(["predict", str(digits_run), *arguments]) == 1
    captured = capsys.readouterr()
    assert "bad.png: cannot be read as an image" in captured.err
    assert "gone.png: there is no such file" in captured.err
    assert str(digits_run / "one.png") in captured.out


def test_predict_with_a_damaged_checkpoint(capsys, digits_run, tmp_path):
    raw = (digits_run / "model.safetensors").read_bytes()
    config = json.loads((digits_run / "model.json").read_text())
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(raw[: len(raw) // 2])
    (tmp_path / "cut.json").write_text(json.dumps(config))
    assert main(["predict", str(cut), "x.png"]) == 2
    assert "cut.safetensors is truncated" in capsys.readouterr().err
    cut.write_bytes(raw)
    for name, value in (("mean", ["a"]), ("std", [0.0]), ("std", [None])):
        (tmp_path / "cut.json").write_text(json.dumps({**config, name: value}))
        assert main(["predict", str(cut), "x.png"]) == 2
        assert f"its config's {name} must be" in capsys.readouterr().err


def test_predict_takes_checkpoints_of_other_libraries(capsys, digits_run, tmp_path):
    """The same probabilities from timm's and transformers' formats, with and without names."""
    image = str(digits_run / "one.png")
    assert main(["predict", str(digits_run), image]) == 0
    expected = capsys.readouterr().out
    for dialect in ("timm", "hf"):
        assert main(["convert", str(digits_run), dialect, "--to", dialect]) == 0
        capsys.readouterr()
        assert main(["predict", dialect, image]) == 0
        assert capsys.readouterr().out == expected
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    del config["pretrained_cfg"]["label_names"]
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    assert main(["predict", "timm", image]) == 0
    unnamed = capsys.readouterr().out
    assert re.sub(r"%  class (\d)", r"%  \1", unnamed) == expected and "class 1" in unnamed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "cifar"], "--data must be"),
        (["--data", "folder:nowhere"], "nowhere is not a folder"),
        (["--data", "fashion-mnist:nowhere"], "nowhere is not a folder"),
        (["--heads", "5"], "dim 32 is not a multiple of heads 5"),
        (["--patch-size", "3"], "not a multiple of patch_size"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--batch-size", "99999999999999999999"], "batch_size must be below 2**31, got 9999"),
        (["--model", "vit_nano"], "--model must be one of"),
        (["--workers", "-1"], "--workers must not be negative"),
        (["--weight-decay", "nan"], "weight_decay must not be negative, got nan"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert main([*DIGITS, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastvit train: error: ") and message in error
    assert "Traceback" not in error and not os.path.exists("runs")


@pytest.mark.parametrize("module", ["matplotlib", "tqdm", "sklearn"])
def test_missing_extra_is_named_before_any_work(monkeypatch, capsys, module):
    from fastvit import errors

    find_spec = errors.find_spec
    monkeypatch.setattr(errors, "find_spec", lambda m: None if m == module else find_spec(m))
    assert main(DIGITS) == 2
    error = capsys.readouterr().err
    assert {"sklearn": "scikit-learn"}.get(module, module) in error
    assert "pip install 'fastvit[train]'" in error and not os.path.exists("runs")


def test_usage(capsys):
    for arguments in ([], ["fly"], ["train", "--image-size", "8x"], ["predict", "x"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and "torch" in capsys.readouterr().out


def test_class_names_are_not_tex(tmp_path, capsys):
    write_folder(tmp_path / "data", ("a$^$", "$\\frac$"))
    assert main([*DIGITS, "--data", "folder:data", "--image-size", "16", "--out", "run"]) == 0
    assert (tmp_path / "run" / "attention.png").is_file()


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [(KeyboardInterrupt(), 130, "interrupted"), (OSError(28, "No space left"), 2, "No space left")],
    ids=["ctrl-c", "full disk"],
)
def test_what_ends_a_command_from_outside_is_one_line(monkeypatch, capsys, error, status, said):
    from fastvit import cli

    def stop(*args):
        raise error

    monkeypatch.setattr(cli, "load_data", stop)
    assert main(DIGITS) == status
    assert said in capsys.readouterr().err


def test_a_model_without_cls_says_whose_attention_it_draws(monkeypatch):
    from fastvit import plots

    seen = []
    monkeypatch.setattr(plots, "plot_attention", lambda *args: seen.append((args[4], args[2])))
    preset = ["--model", "vit_base_patch16_siglip_224", "--image-size", "8", "--patch-size", "4"]
    assert main([*DIGITS, *preset, "--epochs", "1"]) == 0
    ((title, maps),) = seen
    assert title.startswith("Where patches look") and "<cls> looks" not in title
    assert torch.allclose(maps.sum((1, 2)), torch.ones(len(maps)), atol=1e-5)


def test_a_full_disk_is_one_line_and_leaves_no_half_of_a_file(capsys, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # like a full disk
    try:
        assert main([*DIGITS, "--out", "run"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fastvit train: error: cannot write run/state.pt: ")
    assert os.listdir(tmp_path / "run") == []
