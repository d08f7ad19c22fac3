"""The report on tokenizers, every column against plain numpy on the recorded actions; and what a run does with its settings."""

import dataclasses
import json

import numpy as np
import pytest

from vla_jax import cli, config, report
from vla_jax.data import source, tokenization
from vla_jax.tokens import actions, bins, files
from vla_jax.train import evaluate, loop, metrics
from vla_jax.types import UserError

WIDE = ["tokens.action_vocab=512", "tokens.action_scale=10", "data.chunk_s=1"]


@pytest.fixture(scope="module")
def opened(real_data, tmp_path_factory):
    base = tmp_path_factory.mktemp("tokenization")
    c = config.load("configs/debug.py:bridge", [f"data.root={real_data}", f"data.index_dir={base / 'ix'}", *WIDE])[0]
    return source.open_source(c, tokens_per_image=36, rows=False)


def recorded(opened):
    """(chunks in robot units [n 5 7], mask, low, high) of the held-out episodes, from index and statistics alone."""
    ix, s = opened.indexes[0], opened.statistics[0]["action"]
    held = ix.held_out(opened.config.data.holdout)
    raw, mask = [], []
    for e in np.flatnonzero(held):
        first, end = ix.episode_start[e], ix.episode_start[e + 1]
        for f in range(first, end):
            at = np.arange(f, f + 5)
            raw.append(ix.action[np.minimum(at, end - 1)])
            mask.append(at < end)
    low, high = np.array(s.q01, np.float64), np.array(s.q99, np.float64)
    low[6], high[6] = 0, 1
    return np.array(raw, np.float64), np.array(mask), low, high


@pytest.mark.parametrize("which", ["own", "narrow", "bins"])
def test_every_column_by_plain_numpy(opened, which):
    """narrow: fitted to a tenth of the range, so that much is clamped, on both sides."""
    action = opened.layout.action
    if which == "narrow":
        action = dataclasses.replace(actions.fit([c / 10 for c in source.fit_chunks(opened)], vocab_size=90, scale=10.0), max_coef=3)
        action = dataclasses.replace(action, merges=())
    if which == "bins":
        action = bins.uniform(64)
    (row,) = tokenization.measure(opened.held_out(), action)
    raw, mask, low, high = recorded(opened)
    exact = 2 * (raw - low) / (high - low) - 1
    chunks = np.clip(exact, -1.5, 1.5).astype(np.float32)
    ids = [action.encode(c) for c in chunks]
    back = np.stack([action.decode(i, steps=5, dims=7)[0] for i in ids]).astype(np.float64)
    n = np.array([len(i) for i in ids])
    whole = mask.all(axis=1)
    want = {
        "chunk": [5, 7],
        "chunks": len(raw),
        "tokens": n.mean(),
        "p50": sorted(n)[(len(n) - 1) // 2 + ((len(n) - 1) % 2)],
        "p95": sorted(n)[int(np.ceil(0.95 * (len(n) - 1)))],
        "max": n.max(),
        "ratio": 35 / n.mean(),
        "ratio_whole": 35 / n[whole].mean(),
        "rmse": np.sqrt(np.mean((back - exact)[mask] ** 2)),
        "clipped": np.mean(np.abs(exact[mask]) > 1.5),
        "valid": 1.0,
        "used": len({i for seq in ids for i in seq.tolist()}),
    }
    for key, value in want.items():
        assert row[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    inside = (back + 1) / 2 * (high - low) + low
    np.testing.assert_allclose(list(row["error"].values()), np.abs(inside - raw)[mask].mean(axis=0), rtol=1e-3, atol=1e-6)
    if which == "bins":
        below, above = (chunks < -1).sum(), (chunks > 1).sum()
        share = np.mean(((chunks < -1) | (chunks > 1)).reshape(len(chunks), -1).any(axis=1))
    else:
        plain = np.rint(10 * np.einsum("fk,nka->nfa", actions.dct_matrix(5), chunks.astype(np.float64)))
        out = (plain < action.min_coef) | (plain > action.max_coef)
        below, above, share = (
            (plain < action.min_coef).sum(),
            (plain > action.max_coef).sum(),
            np.mean(out.reshape(len(out), -1).any(axis=1)),
        )
    assert (row["clamped_low"], row["clamped_high"]) == pytest.approx((below / chunks.size, above / chunks.size))
    assert row["clamped_chunks"] == pytest.approx(share) and (which == "own" or min(below, above) > 0)
    assert 0 < row["clipped"] < 0.05 and whole.any() and not whole.all()


def test_the_ratio_of_the_paper_within_what_the_sample_allows(opened):
    """FAST's table has 35 -> 20 tokens (1.75) for Bridge, one-second chunks at scale 10; five held-out episodes here, without the chunks that
    reach past an episode's end: 1.6 to 2.1. Rounding alone predicts an rmse of 1 / (10 sqrt 12) = 0.0289 for what is not clipped."""
    (row,) = tokenization.measure(opened.held_out(), opened.layout.action)
    assert 1.6 < row["ratio_whole"] < 2.1
    chunks = np.stack(source.fit_chunks(opened))
    back = opened.layout.action.decode_batch(opened.layout.action.encode_batch(chunks), steps=5, dims=7)[0]
    assert 0.024 < np.sqrt(np.mean((back - chunks) ** 2)) < 0.031


def test_vocabularies_of_the_sweep(opened):
    """Each is the same as one fitted for its size alone; what the data cannot fill says so by its number of ids."""
    chunks = source.fit_chunks(opened)
    for scale in tokenization.SCALES:
        made = tokenization.fits(chunks, scale)
        assert list(made) == [512, 1024, 2048]
        for vocab, action in made.items():
            assert action == actions.fit(chunks, vocab_size=vocab, scale=scale) and action.vocab_size <= vocab
    assert tokenization.fits(chunks, 1e5) == {}
    rows = tokenization.beside(opened, opened.held_out(), sweep=True)
    assert [r["tokenizer"] for r in rows if r["tokenizer"].endswith("x20")] == ["fast 512 x20", "fast 1024 x20", "fast 2048 x20"]
    assert [r["tokenizer"] for r in rows if r["tokenizer"].endswith("*")] == [f"fast {opened.layout.action.vocab_size} x10 *"]


def test_picture_shows_what_the_rows_say(opened, tmp_path, monkeypatch):
    import matplotlib.axes

    drawn = []
    plot = matplotlib.axes.Axes.plot
    monkeypatch.setattr(
        matplotlib.axes.Axes, "plot", lambda self, x, y, *a, **k: (drawn.append((k["label"], x, y)), plot(self, x, y, *a, **k))[1]
    )
    rows = tokenization.beside(opened, opened.held_out(), sweep=False)
    report.tokens_picture(rows, tmp_path / "t.png")
    assert {(label, x[0], y[0]) for label, x, y in drawn} == {(report._kind(r), r["tokens"], r["rmse"]) for r in rows}
    with pytest.raises(UserError, match="no picture format; there are .*png"):
        report.check_picture("t.foo")


def test_commands_refuse_before_the_work_and_write_nothing(capsys, real_data, tmp_path):
    here = ["--config=configs/debug.py:bridge", f"--config.data.root={real_data}", f"--config.data.index_dir={tmp_path / 'ix'}"]

    def refused(*argv):
        assert cli.main(["tokens", *argv]) == 2
        return capsys.readouterr().err

    out = f"--out={tmp_path / 't.json'}"
    assert "no picture format" in refused("fit", *here, out, f"--plot={tmp_path / 'p.foo'}")
    assert "folder of" in refused("inspect", *here, f"--json={tmp_path / 'none' / 't.json'}")
    assert "below the" in refused("fit", *here, out, "--config.tokens.action_vocab=10")
    assert not (tmp_path / "t.json").exists()
    assert cli.main(["tokens", "fit", *here, out, "--config.pack.targets=10"]) == 0  # rows are no affair of a tokenizer's
    capsys.readouterr()
    fitted = f"--config.tokens.action_path={tmp_path / 't.json'}"
    assert "fitted already" in refused("fit", *here, f"--out={tmp_path / 'u.json'}", fitted)
    assert "tokens.action is bins: set --config.tokens.action=fast" in refused("inspect", *here, fitted, "--config.tokens.action=bins")
    assert "does not exist" in refused("inspect", *here, f"--config.tokens.action_path={tmp_path / 'none.json'}")
    for limit, layout in (
        (20, []),
        (30, ["--config.tokens.layout=openpi", "--config.tokens.state=text", "--config.tokens.text_model=default"]),
    ):
        assert "tokens.limit" in refused("inspect", *here, f"--config.tokens.limit={limit}", *layout)
    assert cli.main(["tokens", "inspect", *here, "--config.tokens.limit=38"]) == 0
    assert "tokens.limit 38 cuts" in capsys.readouterr().out


def test_a_run_counts_what_it_cuts_and_takes_the_tokenizer_that_it_is_given(tiny, tmp_path):
    """And goes on when tokenizer or text model have moved: they are compared by content."""
    given = actions.fit([np.random.default_rng(0).uniform(-1, 1, (4, 3)) for _ in range(30)], vocab_size=64, scale=3.0)
    files.save(given, tmp_path / "given.json")
    settings = ["train.steps=2", "tokens.limit=9", f"tokens.action_path={tmp_path / 'given.json'}", "train.log_every=1"]
    c = tiny(*settings)
    run = loop.prepare(c, tmp_path / "run")
    assert run.source.layout.action == given
    loop.train(run, quiet=True)
    lines = [line for line in metrics.read(tmp_path / "run") if "train/loss" in line]
    cut = {k.removeprefix("train/truncated/"): v for k, v in lines[-1].items() if k.startswith("train/truncated/")}
    assert cut and set(cut) <= set(run.source.names) and all(v > 0 for v in cut.values())
    found = evaluate.run(c, tmp_path / "run", frames=2)
    assert any(0 < found[name].get("truncated", 0) <= 1 for name in run.source.names)
    (tmp_path / "given.json").rename(tmp_path / "moved.json")
    moved = tiny("train.steps=3", *settings[1:2], f"tokens.action_path={tmp_path / 'moved.json'}", settings[3])
    loop.train(loop.prepare(moved, tmp_path / "run"), quiet=True)
    other = tiny("train.steps=4", *settings[1:2], "tokens.action_path=", settings[3])
    files.save(bins.uniform(16), tmp_path / "other.json")
    with pytest.raises(UserError, match="tokens.action is fast"):
        loop.prepare(
            dataclasses.replace(other, tokens=dataclasses.replace(other.tokens, action_path=str(tmp_path / "other.json"))), tmp_path / "run"
        )


def test_json_is_what_the_table_says(capsys, real_data, tmp_path):
    here = ["--config=configs/debug.py:bridge", f"--config.data.root={real_data}", f"--config.data.index_dir={tmp_path / 'ix'}"]
    assert cli.main(["tokens", "inspect", *here, f"--json={tmp_path / 't.json'}"]) == 0
    shown, rows = capsys.readouterr().out, json.loads((tmp_path / "t.json").read_text())
    assert tokenization.table(rows) in shown and len(rows) == 3 and {r["chunks"] for r in rows} == {50}  # held out, of 250
