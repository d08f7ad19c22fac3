"""Each fault of the user: one message with what, where and what to do, exit code 2, no traceback."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vla_jax import cli

REPO = Path(__file__).resolve().parent.parent


def fails(capsys, *argv):
    capsys.readouterr()
    assert cli.main(list(argv)) == 2
    text = capsys.readouterr().err
    assert text.startswith("vla-jax: ") and "Traceback" not in text
    return text


def train(*more):
    return ("train", "--config=configs/debug.py:bridge", *more)


def test_missing_root(capsys, tmp_path):
    text = fails(capsys, *train(f"--config.data.root={tmp_path}/none", f"--workdir={tmp_path}/w"))
    assert f"data root {tmp_path}/none does not exist" in text and "--config.data.root" in text
    assert "data.root is not set" in fails(capsys, *train(f"--workdir={tmp_path}/w"))


def test_folder_without_the_dataset(capsys, tmp_path):
    (tmp_path / "other").mkdir()
    text = fails(capsys, *train(f"--config.data.root={tmp_path}", f"--workdir={tmp_path}/w"))
    assert "bridge_dataset 1.0.0 is not at" in text and "other" in text


def test_folder_that_is_no_tfds_directory(capsys, tmp_path):
    (tmp_path / "bridge_dataset" / "1.0.0").mkdir(parents=True)
    text = fails(capsys, *train(f"--config.data.root={tmp_path}", f"--workdir={tmp_path}/w"))
    assert "is no TFDS directory: dataset_info.json and features.json missing" in text


def test_card_key_absent_from_features(capsys, tmp_path, real_data):
    folder = tmp_path / "bridge_dataset" / "1.0.0"
    shutil.copytree(real_data / "bridge_dataset" / "1.0.0", folder)
    folder.chmod(0o755)
    (folder / "features.json").chmod(0o644)
    (folder / "features.json").write_text((folder / "features.json").read_text().replace('"image_0"', '"image_7"'))
    text = fails(capsys, *train(f"--config.data.root={tmp_path}", f"--config.data.index_dir={tmp_path}/ix", f"--workdir={tmp_path}/w"))
    assert "key 'observation/image_0' is not in features.json" in text and "image_7" in text
    assert "image_0" in fails(capsys, "data", "check", "bridge_dataset", f"--root={tmp_path}")


def test_batch_not_divisible_by_the_mesh(capsys, tmp_path):
    text = fails(capsys, *train("--config.pack.rows=12", f"--workdir={tmp_path}/w"))
    assert "pack.rows = 12 is not divisible by data*fsdp = 1*8 = 8" in text and "Nearest: 8, 16" in text


def test_mesh_that_is_not_the_devices(capsys, tmp_path):
    assert "data*fsdp*tensor = 3 * 2 * 1 = 6, but there are 8 devices" in fails(
        capsys, *train("--config.mesh.data=3", "--config.mesh.fsdp=2", f"--workdir={tmp_path}/w")
    )


def test_unknown_key_option_and_command(capsys, tmp_path):
    assert "Did you mean 'pack.rows'?" in fails(capsys, *train("--config.pack.row=1", f"--workdir={tmp_path}/w"))
    assert "unrecognized arguments: --workdr=x" in fails(capsys, *train("--workdir=x", "--workdr=x"))
    assert "invalid choice: 'trian'" in fails(capsys, "trian")
    assert "no file configs/nope.py" in fails(capsys, "config", "--config=configs/nope.py")


def test_folder_of_another_model(capsys, tmp_path, real_data):
    here = (
        f"--config.data.root={real_data}",
        f"--config.data.index_dir={tmp_path}/ix",
        "--config.train.steps=1",
        "--config.mesh.fsdp=8",
        f"--workdir={tmp_path}/w",
    )
    assert cli.main(list(train("--config.model.preset=tiny", *here))) == 0
    text = fails(capsys, *train("--config.model.preset=debug", *here))
    assert "another config (model.preset: 'tiny' -> 'debug')" in text and "--workdir" in text


def test_export_of_nothing_and_of_a_damaged_export(capsys, tmp_path):
    assert "holds no run" in fails(capsys, "export", str(tmp_path), str(tmp_path / "out"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "is not empty" in fails(capsys, "export", str(tmp_path / "run"), str(tmp_path / "full"))
    assert "no finished checkpoint" in fails(capsys, "export", str(tmp_path / "run"), str(tmp_path / "out"))
    assert "what follows @ is a step number" in fails(capsys, "export", f"{tmp_path}/run@x", str(tmp_path / "out"))


@pytest.mark.parametrize("argv", [["train", "--config=configs/debug.py", "--workdir=w"], ["data", "check", "nothing", "--root=/"]])
def test_the_program_itself(argv, tmp_path):
    """As a person calls it: exit code 2, one message, no traceback."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-m", "vla_jax.cli", *argv], capture_output=True, text=True, cwd=tmp_path, env=env, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("vla-jax: ") == 1
