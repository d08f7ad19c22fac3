"""Every command that only looks, as a person calls it, on the real sample."""

import json

import pytest

from vla_jax import cli


def out(capsys, *argv):
    capsys.readouterr()
    assert cli.main(list(argv)) == 0
    return capsys.readouterr().out


@pytest.fixture
def where(real_data, tmp_path):
    return [f"--root={real_data}", f"--index-dir={tmp_path / 'ix'}"]


def test_data_commands(capsys, where):
    assert "bridge_dataset" in out(capsys, "data", "list")
    assert "fits" in out(capsys, "data", "check", "bridge_dataset", *where)
    assert "25 episodes, 250 frames, skipped nothing" in out(capsys, "data", "index", "bridge_dataset", *where)
    stats = json.loads(out(capsys, "data", "stats", "bridge_dataset", "--holdout=0.2", *where))["bridge_dataset"]
    assert stats["action"]["count"] == 200 and len(stats["state"]["mean"]) == 7
    shown = out(capsys, "data", "inspect", "bridge_dataset", "--episode=1", "--steps=2", *where)
    assert "10 steps at 5 Hz" in shown and "gripper [1, ee, binary]" in shown
    assert cli.main(["data", "inspect", "bridge_dataset", "--episode=25", *where]) == 2


def test_tokens_commands(capsys, real_data, tmp_path):
    here = ["--config=configs/debug.py:bridge", f"--config.data.root={real_data}", f"--config.data.index_dir={tmp_path / 'ix'}"]
    assert "ratio" in out(capsys, "tokens", "inspect", *here)
    assert "vocabulary 24 " in out(capsys, "tokens", "fit", *here, f"--out={tmp_path / 't.json'}")
    fitted = out(capsys, "tokens", "inspect", *here, f"--config.tokens.action_path={tmp_path / 't.json'}")
    assert fitted == out(capsys, "tokens", "inspect", *here)
    assert cli.main(["tokens", "fit", *here, f"--out={tmp_path / 't.json'}"]) == 2  # never written over
