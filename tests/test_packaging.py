"""The wheel and the sdist hold both packages, and the wheel works without the checkout."""

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"fastvit": ROOT / "src", "fastvit_kernels": ROOT / "kernels"}
if importlib.util.find_spec("hatchling") is None:
    pytest.skip("hatchling is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def modules() -> set[str]:
    return {
        f"{name}/{path.name}"
        for name, parent in PACKAGES.items()
        for path in (parent / name).iterdir()
        if path.suffix == ".py" or path.name == "py.typed"
    }


def test_wheel(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info" not in n}
        archive.extractall(tmp_path)
    assert names == modules()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(tmp_path)}
    code = (
        "import fastvit, fastvit_kernels, torch;"
        "print(fastvit.__file__, fastvit_kernels.__file__);"
        "model = fastvit.ViT(image_size=32, patch_size=16, dim=32, depth=1, heads=2, mlp_dim=64);"
        "assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(tmp_path)) for path in done.stdout.split())


def test_sdist(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {f"{PACKAGES[m.split('/')[0]].name}/{m}" for m in modules()}
    expected |= {f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py")}
    expected |= {"pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt"}
    assert expected <= names, expected - names
