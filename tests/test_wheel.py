"""The wheel alone, in a clean environment and outside the checkout, has configs/, data/ and launch/ and works."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(REPO)], check=True, capture_output=True
    )
    return next(out.glob("*.whl"))


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert len(tops) == 2 and "vla_jax" in tops  # nothing called configs or data lands in site-packages
    for wanted in ("configs/debug.py", "data/cards/bridge_dataset.yaml", "data/text/default.model", "launch/local.sh"):
        assert f"vla_jax/_assets/{wanted}" in names


def test_installed_wheel_works_elsewhere(wheel, tmp_path, real_data):
    """Dependencies come from this environment by a .pth line; the package itself only from the wheel."""
    venv.create(tmp_path / "env", with_pip=False)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(tmp_path / "env"), "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True
    )
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    script = str(tmp_path / "env" / "bin" / "vla-jax")
    python = str(tmp_path / "env" / "bin" / "python")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu", "VLA_CACHE": str(tmp_path / "cache")}

    def run(*argv):
        done = subprocess.run([script, *argv], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    where = subprocess.run(
        [python, "-c", "import vla_jax; print(vla_jax.__file__)"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert where.stdout.startswith(str(site))
    assert "bridge_dataset" in run("data", "list")
    small = ["--config=configs/debug.py:bridge", f"--config.data.root={real_data}", "--config.model.preset=tiny", "--config.train.steps=1"]
    run("train", *small, "--workdir=run")
    run("export", "run", "out")
    assert (tmp_path / "out" / "params.safetensors").is_file()
