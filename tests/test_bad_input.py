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


def test_missing_root(capsys, tmp_path, monkeypatch):
    text = fails(capsys, *train(f"--config.data.root={tmp_path}/none", f"--workdir={tmp_path}/w"))
    assert f"data root {tmp_path}/none does not exist" in text and "--config.data.root" in text
    assert "data.root is not set" in fails(capsys, *train(f"--workdir={tmp_path}/w"))
    monkeypatch.setenv("VLA_DATA_ROOT", f"{tmp_path}/nowhere")  # what launchers set, whose line names no data
    assert "nowhere does not exist" in fails(capsys, *train(f"--workdir={tmp_path}/w"))


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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=0", "train.steps is 0; it must be at least 1"),
        ("train.log_every=0", "train.log_every is 0"),
        ("train.save_every=0", "train.save_every is 0"),
        ("train.eval_batches=0", "train.eval_batches is 0"),
        ("train.lr=nan", "train.lr is nan; it must be at least 0"),
        ("train.lr=inf", "train.lr is inf"),
        ("pack.rows=-8", "pack.rows is -8"),
        ("pack.group=0", "pack.group is 0"),
        ("pack.samples=0", "pack.samples is 0"),
        ("pack.targets=1000", "pack.targets 1000 is above pack.length 256"),
        ("data.threads=-1", "data.threads is -1"),
        ("data.resize=nearest", "data.resize is 'nearest'; allowed: linear, antialias"),
        ("data.max_skipped=2", "data.max_skipped is 2.0; it must be from 0 to 1"),
        ("data.history=0", "data.history is 0"),
        ("augment.crop=0", "augment.crop is 0.0"),
        ("augment.where=cloud", "augment.where is 'cloud'"),
        ("data.prefetch=0", "data.prefetch is 0"),
        ("data.chunk_s=nan", "data.chunk_s is nan"),
        ("data.chunk_s=-1", "data.chunk_s is -1"),
        ("data.max_chunk=0", "data.max_chunk is 0"),
        ("data.holdout=5", "data.holdout is 5.0; it must be from 0 to 0.9"),
    ],
)
def test_numbers_out_of_range(capsys, tmp_path, override, message):
    assert message in fails(capsys, *train(f"--config.{override}", f"--workdir={tmp_path}/w"))
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(arg=''):\n    return 3\n", "get_config"),
        ("def get_config(\n", "SyntaxError"),
        ("def get_config(arg=''):\n    return 1 / 0\n", "division by zero"),
    ],
)
def test_config_files_that_are_none(capsys, tmp_path, text, message):
    (tmp_path / "c.py").write_text(text)
    assert message in fails(capsys, "config", f"--config={tmp_path}/c.py")


def test_workdir_that_cannot_be(capsys, tmp_path, real_data):
    (tmp_path / "file").touch()
    text = fails(capsys, *train(f"--config.data.root={real_data}", f"--workdir={tmp_path}/file"))
    assert f"workdir {tmp_path}/file cannot be made" in text
    assert "--workdir: is empty" in fails(capsys, *train("--workdir="))


def test_eval_leaves_no_folder_behind(capsys, tmp_path, real_data):
    argv = ["eval", "--config=configs/debug.py:bridge", f"--config.data.root={real_data}", f"--workdir={tmp_path}/typo"]
    assert "holds no run" in fails(capsys, *argv) and not (tmp_path / "typo").exists()


def test_paths_that_cannot_be_written(capsys, tmp_path, real_data):
    (tmp_path / "file").touch()
    here = [f"--config.data.root={real_data}", f"--config.data.index_dir={tmp_path}/file/ix"]
    assert f"{tmp_path}/file" in fails(capsys, *train(*here, f"--workdir={tmp_path}/w"))


def test_commands_and_counts(capsys):
    assert "Did you mean train?" in fails(capsys, "trian")
    for share in ("nan", "5", "-1", "x"):
        assert "--holdout" in fails(capsys, "data", "stats", "bridge_dataset", "--root=none", f"--holdout={share}")
    assert "above 0" in fails(capsys, "demo", "--episodes=0") and "above 0" in fails(capsys, "demo", "--steps=-1")


def test_views_that_no_camera_has(capsys, tmp_path, real_data):
    text = fails(capsys, *train(f"--config.data.root={real_data}", "--config.data.views=('bse',)", f"--workdir={tmp_path}/w"))
    assert "bridge_dataset has none of the views bse; it has" in text
