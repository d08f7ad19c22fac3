"""Every command that only looks, as a person calls it, on the real sample."""

import json
import sys

import pytest

from vla_jax import cli, distributed


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
    shown = out(capsys, "tokens", "inspect", *here)
    assert "fast 24 x4" in shown and "bins 256" in shown and "quantile" in shown and "dx m" in shown
    fit = out(capsys, "tokens", "fit", *here, f"--out={tmp_path / 't.json'}")
    assert "fast 24 x4, " in fit and "valid" in fit
    assert out(capsys, "tokens", "inspect", *here, f"--config.tokens.action_path={tmp_path / 't.json'}") == shown
    assert cli.main(["tokens", "fit", *here, f"--out={tmp_path / 't.json'}"]) == 2  # never written over
    files = [f"--json={tmp_path / 't.table'}", f"--plot={tmp_path / 't.png'}"]
    room = ["--config.tokens.action_vocab=512", "--config.tokens.action_scale=10", "--config.pack.targets=200"]
    swept = out(capsys, "tokens", "inspect", *here, *room, "--sweep", *files)
    rows = json.loads((tmp_path / "t.table").read_text())
    assert {r["tokenizer"].split()[2] for r in rows if r["tokenizer"].startswith("fast")} == {"x5", "x10", "x20"}
    assert all(r["tokenizer"] in swept for r in rows) and (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"


def test_bench_tokens_refuses_without_its_peers(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert cli.main(["bench", "tokens"]) == 2
    assert "tokenizers is not installed" in capsys.readouterr().err


def test_a_value_that_is_no_option_brings_no_guess(capsys):
    assert cli.main(["rollout", "x", "--env=tabletop", "--out=y", "--episodes", "0"]) == 2
    said = capsys.readouterr().err
    assert "must be a whole number above 0, got '0'" in said and "Did you mean" not in said
    for p in ("", "0"):
        assert cli.main(["data", p]) == 2
    assert "Did you mean ?" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["serve"], ["rollout", "--env=tabletop", "--out=ro"], ["dry-run", "--state=1", "--prompt=a", "--out=p.svg"]]
)
def test_what_acts_keeps_its_compiled_programs(capsys, monkeypatch, tmp_path, argv):
    if argv == ["serve"]:
        pytest.importorskip("websockets")
    kept = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "keep_compiled", lambda: kept.append(argv))
    assert cli.main([argv[0], str(tmp_path / "none"), *argv[1:]]) == 2
    assert kept == [argv] and "none" in capsys.readouterr().err


@pytest.mark.parametrize("asked", ["abc", "2", "1", "124", "256", "-3"])
def test_an_exit_code_that_cannot_be_is_refused(capsys, monkeypatch, asked):
    monkeypatch.setenv("VLA_RESUMABLE_EXIT", asked)
    assert cli.main(["data", "list"]) == 2
    assert f"VLA_RESUMABLE_EXIT={asked}" in capsys.readouterr().err
