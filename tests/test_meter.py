"""Where the time goes, over restarts, and what is written of it."""

import json
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from vla_jax import cli
from vla_jax.data.mixture import BLOCK, Sampler
from vla_jax.train import loop, meter, metrics
from vla_jax.types import UserError


def lines(workdir, key="train/loss"):
    return [x for x in metrics.read(workdir) if key in x]


def test_shares_add_up(tmp_path):
    m = meter.Meter(tmp_path)
    with m.waiting("data"):
        time.sleep(0.05)
    with m.waiting("checkpoint"):
        time.sleep(0.02)
    m.steps = 2
    got = m.window()
    assert sum(got["time"].values()) == pytest.approx(1.0)
    assert 0.05 <= got["time"]["data"] * got["seconds"] < 0.08 and got["time"]["checkpoint"] * got["seconds"] >= 0.02
    assert got["step_s"] == pytest.approx(got["time"]["device"] * got["seconds"] / 2)
    assert m.productive == pytest.approx(got["time"]["device"] * got["seconds"])
    assert m.window()["time"]["data"] == 0.0


def test_goodput_over_restarts(tmp_path):
    """A run that began 100 s ago, of which 30 s are in its checkpoint: what was lost or away does not count."""
    (tmp_path / metrics.FILE).write_text(json.dumps({"step": 0, "time": time.time() - 100}) + "\n")
    m = meter.Meter(tmp_path, productive=30.0)
    m.steps = 1
    assert m.window()["goodput"] == pytest.approx(0.30, abs=0.01)


@pytest.mark.parametrize("text", ["", '{"step": 0, "ti', "7\n", None])
def test_goodput_where_the_first_line_is_gone(tmp_path, text):
    """The checkpoint says when the run began; without one too, it is not better than what is known."""
    if text is not None:
        (tmp_path / metrics.FILE).write_text(text)
    m = meter.Meter(tmp_path, 30.0, time.time() - 100)
    assert m.window()["goodput"] == pytest.approx(0.30, abs=0.01)
    m = meter.Meter(tmp_path)
    time.sleep(0.01)
    with m.waiting("data"):
        time.sleep(0.04)
    assert 0 < m.window()["goodput"] < 0.6


def test_a_half_written_line_takes_no_other_with_it(tiny, tmp_path):
    """A process was killed while it wrote; and something that is no text got in."""
    (tmp_path / metrics.FILE).write_bytes(b'{"step": 1, "time": 5.0}\n\xff\xfe\n7\n{"step": 20, "train/lo')
    with metrics.Writer(tmp_path, tiny(), first=10, quiet=True) as writer:
        writer.log(10, {"a": 1.0})
        writer.log(11, {"a": 2.0})
    assert [x["step"] for x in metrics.read(tmp_path)] == [1, 10, 11] and metrics.began(tmp_path) == 5.0
    assert cli.main(["runs", str(tmp_path), f"--out={tmp_path / 'p.html'}"]) == 0


def test_a_full_disk_costs_no_line(tiny, tmp_path, capfd):
    """Lines wait while there is no room (/dev/full has none), once said; then they are all there, in order."""
    with metrics.Writer(tmp_path, tiny(), first=0, quiet=True) as writer:
        writer.log(1, {"a": 1.0})
        path, writer._path = writer._path, Path("/dev/full")
        writer.log(2, {"a": 2.0})
        writer.log(3, {"a": 3.0})
        writer._path = path
        writer.log(4, {"a": 4.0})
        writer._path = Path("/dev/full")
        writer.log(5, {"a": 5.0})
        writer._path = path
    assert [(x["step"], x["a"]) for x in metrics.read(tmp_path)] == [(n, float(n)) for n in range(1, 6)]
    assert capfd.readouterr().err.count("cannot be written (No space left on device)") == 2


def test_tensorboards_files(tmp_path, monkeypatch):
    """Read back record by record; after a write that failed in its middle a new file is begun."""
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event

    board, real = metrics._Board(tmp_path), EventsWriter.write_event
    board.write(1, {"train/loss": 2.5, "n": 3})

    def cut(self, event):
        self._py_recordio_writer.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(EventsWriter, "write_event", cut)
        with pytest.raises(OSError, match="No space"):
            board.write(2, {"train/loss": 2.0})
    assert EventsWriter.write_event is real
    board.write(3, {"train/loss": 1.5})
    board.close()
    found = {}
    for file in tmp_path.iterdir():
        data, at = file.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            record, at = data[at + 12 : at + 12 + size], at + 16 + size
            if record != b"half":
                event = Event.FromString(record)
                found |= {(event.step, v.tag): v.simple_value for v in event.summary.value}
    assert found == {(1, "train/loss"): 2.5, (1, "n"): 3.0, (3, "train/loss"): 1.5}
    assert len(list(tmp_path.iterdir())) == 2


def test_saving_goes_on_beside_the_steps_and_ema_is_evaluated(tiny, tmp_path, monkeypatch):
    """save returns before its step is complete; what is evaluated is the average, where one is kept."""
    from vla_jax.train import checkpoint, evaluate

    saves, seen, real = [], [], checkpoint.Checkpointer.save

    def save(self, step, *args, **more):
        real(self, step, *args, **more)
        saves.append(self._manager.is_saving_in_progress())

    monkeypatch.setattr(checkpoint.Checkpointer, "save", save)
    monkeypatch.setattr(evaluate.Evaluation, "__call__", lambda self, params: seen.append(params) or {})
    final = loop.train(
        loop.prepare(tiny("train.steps=2", "train.save_every=1", "train.eval_every=2", "train.ema=0.9"), tmp_path), quiet=True
    )
    assert len(saves) == 2 and any(saves)
    assert len(seen) == 1 and seen[0] is final.ema


def test_metrics_of_a_run_and_of_its_resumption(tiny, tmp_path):
    """Everything a person steers by is there; what is counted over the whole run goes on after a restart."""
    over = ("train.log_every=1", "train.eval_every=2", "train.eval_frames=2", "train.save_every=2", "train.steps=4")
    c = tiny(*over)
    loop.train(loop.prepare(c, tmp_path / "whole"), quiet=True)
    from test_train import stop_after

    run = loop.prepare(c, tmp_path / "halves")
    stop_after(run, 3)  # step 3 is lost: the checkpoint is of step 2
    loop.train(loop.prepare(c, tmp_path / "halves"), quiet=True)
    whole, halves = lines(tmp_path / "whole"), lines(tmp_path / "halves")
    assert [x["step"] for x in halves] == [1, 2, 3, 3, 4]
    a, b = whole[-1], halves[-1]
    for key in ("train/seen/samples", "train/seen/tokens", *(k for k in a if k.startswith("train/epochs/"))):
        assert a[key] == b[key] > 0
    sizes = [x["train/samples"] for x in whole]
    assert a["train/seen/samples"] == sum(sizes)
    want = {
        "loss",
        "grad_norm",
        "lr",
        "samples_per_s",
        "tokens_per_s",
        "step_s",
        "model_tflops",
        "goodput",
        "memory/host_gib",
        "skipped_steps",
    }
    want |= {f"norm/{what}/{group}" for what in ("grad", "update", "param") for group in ("vision", "language", "expert")}
    want |= {f"time/{what}" for what in ("data", "device", "checkpoint", "eval", "compile")} | {"slots_used", "tokens", "samples"}
    assert want <= {k.removeprefix("train/") for k in a}
    names = ("tabletop_slider", "tabletop_arm", "tabletop_bimanual")
    assert any(f"train/dataset/{n}/nll" in a and f"train/dataset/{n}/accuracy" in a for n in names)
    evals = lines(tmp_path / "whole", "eval/tabletop_arm/nll")
    assert [x["step"] for x in evals] == [2, 4]
    assert all(
        np.isfinite(x[f"eval/{n}/mae/{u}"]) and x[f"eval/{n}/baseline/{u}"] > 0 for x in evals for n, u in (("tabletop_arm", "rad"),)
    )
    assert 0 < a["train/goodput"] <= 1
    began = min(x["time"] for x in metrics.read(tmp_path / "halves"))
    done = sum(x["train/time/device"] * x["train/seconds"] for x in halves if x["step"] in (1, 2, 4) or x is halves[-2])
    assert b["train/goodput"] == pytest.approx(done / (b["time"] - began), rel=0.1)  # the first step 3 was lost, and does not count


def test_waiting_for_data_is_what_devices_stand_idle_for(tiny, tmp_path, monkeypatch):
    """Batches that take 0.2 s beside steps that take 0.12, on a platform that runs steps while the host goes on: a share of 0.4 is waited
    for, and a step is said to take what it takes."""
    import jax

    from vla_jax.train import step

    real = step.make_train_step
    ends = [0.0]

    class Later:
        def __init__(self, value):
            ends[0] = max(time.perf_counter(), ends[0]) + 0.12
            self.value, self.at = value, ends[0]

        def block_until_ready(self):
            time.sleep(max(self.at - time.perf_counter(), 0))
            return self

        def is_ready(self):
            return time.perf_counter() >= self.at

        def __array__(self, *args, **kwargs):
            self.block_until_ready()
            return np.asarray(self.value)

    def slow(*args, **kwargs):
        made, kept = real(*args, **kwargs), []

        def one(s, b):
            if not kept:
                kept[:] = jax.block_until_ready(made(s, b))
            return kept[0], kept[1] | {"loss": Later(kept[1]["loss"])}

        return one

    run = loop.prepare(tiny("train.steps=12", "train.log_every=6", "data.holdout=0", "train.save_every=12"), tmp_path)
    monkeypatch.setattr(step, "make_train_step", slow)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    made = loop.feed.to_device
    monkeypatch.setattr(loop.feed, "to_device", lambda *a: (time.sleep(0.2), made(*a))[1])
    loop.train(run, quiet=True)
    last = lines(tmp_path)[-1]
    assert 0.2 < last["train/time/data"] < 0.55 and 0.1 < last["train/step_s"] < 0.2, last


def test_epochs_by_a_plain_count():
    sampler = Sampler.make(3, (10, 50, 7), (1.0, 2.0, 0.5))
    for n in (0, 1, 100, BLOCK, BLOCK + 17, 3 * BLOCK + 5):
        drawn = sampler.draw(np.arange(n))[0]
        np.testing.assert_array_equal(sampler.counts(n), np.bincount(drawn, minlength=3))


def test_mfu_where_the_peak_is_known(tiny, tmp_path, monkeypatch):
    from vla_jax import hardware
    from vla_jax.models import flops

    run = loop.prepare(tiny(), tmp_path)
    work = {"tokens": 100, "patches": 36, "pairs": 2000, "targets": 30}
    assert "mfu" not in meter.utilisation(run.cfg, work, 0.1)
    monkeypatch.setattr(hardware, "of_kind", lambda kind: hardware.Chip("x", ("x",), 1e12))
    got = meter.utilisation(run.cfg, work, 0.1)
    assert got["mfu"] == pytest.approx(flops.model(run.cfg, work) / 0.1 / 8 / 1e12) and got["model_tflops"] == pytest.approx(got["mfu"])


def test_a_trace_of_the_steps_asked_for(tiny, tmp_path, monkeypatch):
    calls = []
    import jax

    start, stop = jax.profiler.start_trace, jax.profiler.stop_trace
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *a, **k: (calls.append("start"), start(*a, **k)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (calls.append("stop"), stop()))
    loop.train(loop.prepare(tiny("train.steps=4"), tmp_path), quiet=True, profile=(2, 3))
    assert calls == ["start", "stop"] and list((tmp_path / "profile").rglob("*.xplane.pb"))
    with pytest.raises(UserError, match="--profile=5:6: the run has 4 steps"):
        loop.train(loop.prepare(tiny("train.steps=4"), tmp_path / "b"), quiet=True, profile=(5, 6))
    for text in ("3:2", "x", "0:4", "4"):
        assert cli.main(["train", "--config=configs/demo.py", f"--workdir={tmp_path}", f"--profile={text}"]) == 2


def test_wandb_when_asked_for(tiny, tmp_path, monkeypatch):
    """One run of theirs for one of ours, over restarts; a stand-in takes what they would get."""
    seen = []

    class Theirs:
        def log(self, values, step):
            seen.append((step, values))

        def finish(self, exit_code):
            seen.append(("finish", exit_code))

    made = []
    fake = types.SimpleNamespace(
        init=lambda **settings: (made.append(settings), Theirs())[1], util=types.SimpleNamespace(generate_id=lambda: f"id{len(made)}")
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for steps in (2, 4):
        loop.train(loop.prepare(tiny(f"train.steps={steps}", "train.log_every=2", "train.wandb=robots"), tmp_path / "w"), quiet=True)
    assert [m["id"] for m in made] == ["id0", "id0"] and made[0]["project"] == "robots" and made[1]["resume"] == "allow"
    assert made[0]["config"]["model"]["preset"] == "tiny"
    assert [s for s, v in seen if s != "finish" and "train/loss" in v] == [2, 4] and seen[-1] == ("finish", 0)
    assert all(isinstance(x, (int, float)) for s, v in seen if s != "finish" for x in v.values())


def test_wandb_that_is_not_installed(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        loop.train(loop.prepare(tiny("train.steps=1", "train.wandb=robots"), tmp_path), quiet=True)


def test_the_runs_page(tiny, tmp_path, capsys):
    loop.train(loop.prepare(tiny("train.steps=2", "train.log_every=1"), tmp_path / "a"), quiet=True)
    assert cli.main(["runs", str(tmp_path / "a"), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page and "tabletop_arm" in page
    assert cli.main(["runs", str(tmp_path / "gone"), "--out", str(tmp_path / "page.html")]) == 2
    assert "gone" in capsys.readouterr().err
