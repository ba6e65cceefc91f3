"""The commands `fastvit convert` and `fastvit info`."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import close, randomize_weights
from processes import run_python

import fastvit
from fastvit.cli import main
from fastvit.saving import save_checkpoint

NARROW: dict[str, Any] = dict(dim=32, depth=2, heads=2, mlp_dim=64, image_size=32, patch_size=8)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A narrow ViT as a bare .pth, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    model = randomize_weights(fastvit.ViT(**NARROW, num_classes=5))
    torch.save(model.state_dict(), "vit.pth")
    return tmp_path / "vit.pth"


def test_convert_to_timm_and_to_transformers(file: Path, capsys: pytest.CaptureFixture) -> None:
    timm: Any = pytest.importorskip("timm")
    hf: Any = pytest.importorskip("transformers")
    state, images = torch.load(file), torch.randn(2, 3, 32, 32)
    ours = fastvit.load_checkpoint(file, heads=2)
    assert main(["convert", str(file), "out/hf", "--to", "hf", "--heads", "2"]) == 0
    printed = capsys.readouterr().out
    assert "vit.pth: read as timm" in printed and "wrote out/hf: 40 tensors for hf" in printed
    theirs = hf.ViTForImageClassification.from_pretrained("out/hf").eval()
    close("logits", theirs(images).logits, ours(images))
    assert main(["convert", "out/hf", "out/timm", "--to", "timm"]) == 0
    theirs = timm.create_model("local-dir:out/timm", pretrained=True).eval()
    close("logits", theirs(images), ours(images))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert main(["convert", "out/timm", "one.safetensors", "--to", "timm"]) == 0
    back = fastvit.load_checkpoint("one.safetensors", heads=2).state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    mode = Path("out/hf").stat().st_mode & 0o777, Path("one.safetensors").stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    assert mode == (0o777 & ~umask, 0o666 & ~umask)


def test_convert_writes_all_or_nothing(file: Path, capsys: pytest.CaptureFixture) -> None:
    Path("there").mkdir()
    Path("there/mine.txt").write_text("mine")
    Path("one.safetensors").write_bytes(b"mine")
    rope = fastvit.ViT(**NARROW, rope="eva")
    save_checkpoint("rope.safetensors", rope)
    for arguments, message in (
        ([str(file), "there", "--to", "hf"], "there already exists; choose another name"),
        ([str(file), "one.safetensors", "--to", "hf"], "one.safetensors already exists"),
        ([str(file), "there/mine.txt/x", "--to", "hf"], "cannot write there/mine.txt/x"),
        ([str(file), "out.pth", "--to", "timm"], "a folder or .safetensors, got out.pth"),
        (["absent.pth", "new", "--to", "hf"], "absent.pth is neither a file, nor a folder"),
        (["rope.safetensors", "new", "--to", "hf"], "transformers has no place for this RoPE"),
    ):
        assert main(["convert", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert Path("one.safetensors").read_bytes() == b"mine"
    assert sorted(p.name for p in Path().iterdir()) == sorted(
        ["vit.pth", "there", "one.safetensors", "rope.safetensors", "rope.json"]
    )
    with pytest.raises(SystemExit):
        main(["convert", str(file), "new", "--to", "onnx"])
    with pytest.raises(SystemExit):
        main(["convert", str(file), "new"])


def test_a_killed_conversion_leaves_nothing_at_its_target(file: Path) -> None:
    script = """
import os, signal, sys, pathlib
from fastvit.cli import main
from fastvit.saving import save_checkpoint
write = pathlib.Path.write_bytes
def die(path, data):
    write(path, data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.write_bytes = die
main(["convert", "vit.pth", sys.argv[1], "--to", "timm"])
"""
    done = run_python(script, "out")
    assert done.returncode == -signal.SIGKILL and not Path("out").exists()
    assert main(["convert", "vit.pth", "out", "--to", "timm"]) == 0


def test_info(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["info", str(file)]) == 0
    printed = capsys.readouterr().out
    for line in (
        f"checkpoint {file}",
        "dialect    timm",
        "preset     none of this architecture",
        "parameters 24,069 in 32 tensors",
        "classes    5",
        "images     3 x 32 x 32, mean (0.5, 0.5, 0.5)",
        "note: heads 1 guessed, 32 wide; pass heads= if it is not so",
    ):
        assert line in printed, printed
    assert "heads=1" in printed
    assert main(["info", str(file), "--heads", "2", "--activation", "gelu_tanh"]) == 0
    printed = capsys.readouterr().out
    assert "heads=2" in printed and "activation='gelu_tanh'" in printed
    assert "guessed" not in printed
    tiny = fastvit.create_model("vit_tiny_patch16_224")
    fastvit.export_checkpoint(tiny, "hf", tmp_path / "tiny")
    assert main(["info", str(tmp_path / "tiny")]) == 0
    printed = capsys.readouterr().out
    assert "dialect    hf vit" in printed and "preset     vit_tiny_patch16_224" in printed
    assert main(["info", "absent/name.pth"]) == 2
    assert capsys.readouterr().err.startswith("fastvit info: error: checkpoint: absent/name.pth")


def test_the_names_of_the_classes_go_along(file: Path, capsys: pytest.CaptureFixture) -> None:
    model = fastvit.ViT(**NARROW, num_classes=3)
    names = ["cat", "dog", "emu"]
    save_checkpoint("run/model.safetensors", model, classes=names, mean=[0.5] * 3, std=[0.5] * 3)
    assert main(["convert", "run", "hf", "--to", "hf"]) == 0
    config = json.loads(Path("hf/config.json").read_text())
    assert config["id2label"] == {"0": "cat", "1": "dog", "2": "emu"}
    assert config["label2id"] == {"cat": 0, "dog": 1, "emu": 2}
    assert main(["convert", "run", "timm", "--to", "timm"]) == 0
    config = json.loads(Path("timm/config.json").read_text())
    assert config["pretrained_cfg"]["label_names"] == names
    assert main(["convert", "timm", "again", "--to", "hf"]) == 0
    assert json.loads(Path("again/config.json").read_text())["id2label"]["2"] == "emu"
    # Class names are dropped where the model has another number of classes.
    other = fastvit.load_checkpoint("run", num_classes=2)
    fastvit.export_checkpoint(other, "hf", "two")
    fastvit.export_checkpoint(other, "timm", "two timm")
    config = json.loads(Path("two/config.json").read_text())
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
    assert "cat" not in Path("two timm/config.json").read_text()


def test_our_own_runs_are_checkpoints_too(file: Path, capsys: pytest.CaptureFixture) -> None:
    """The output of `fastvit train`, config included, loads by file and by folder."""
    model = randomize_weights(
        fastvit.ViT(**{**NARROW, "image_size": (16, 32)}, rope="dinov3", num_classes=4)
    )
    mean = [0.1, 0.2, 0.3]
    save_checkpoint("run/model.safetensors", model, mean=mean, std=mean)
    images = torch.randn(2, 3, 16, 32)
    for path in ("run", "run/model.safetensors"):
        again = fastvit.load_checkpoint(path)
        settled = {"fc_norm": False, "patch_bias": True}
        assert again.config == {**model.config, **settled}
        assert again.default_cfg["mean"] == tuple(mean)
        assert torch.equal(again(images), model(images))
    assert main(["info", "run"]) == 0
    assert "dialect    fastvit" in capsys.readouterr().out
    text = Path("run/model.json").read_text()
    Path("run/model.json").write_text(text[: len(text) // 2])
    assert main(["info", "run"]) == 2
    assert "model.json is truncated or not JSON" in capsys.readouterr().err
