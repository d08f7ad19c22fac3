"""Which checkpoints stay, onto what they can be restored, and whose a folder is."""

import dataclasses
import errno
import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from vla_jax import config, distributed, tree
from vla_jax.train import checkpoint, evaluate, loop, optim, resume, state
from vla_jax.types import UserError


def kept(workdir) -> list[int]:
    return sorted(int(d.name) for d in (workdir / "checkpoints").iterdir() if d.name.isdigit())


@pytest.mark.parametrize(
    "over, expected",
    [
        (("train.keep=1",), [8]),
        (("train.keep=2",), [7, 8]),
        (("train.keep=1", "train.keep_every=3"), [3, 6, 8]),
        (("train.keep=1", "train.keep_best=2"), [2, 6, 8]),
        (("train.keep=2", "train.keep_every=5", "train.keep_best=1"), [5, 6, 7, 8]),
    ],
)
def test_retention(tiny, tmp_path, monkeypatch, over, expected):
    """Eight steps, all saved, every second one evaluated: 0.3, 0.9, 0.2, 0.8 at steps 2, 4, 6, 8."""
    losses = iter([0.3, 0.9, 0.2, 0.8])
    monkeypatch.setattr(evaluate.Evaluation, "__call__", lambda self, params: {"a": {"nll": next(losses)}})
    c = tiny("train.steps=8", "train.save_every=1", "train.eval_every=2", *over)
    loop.train(loop.prepare(c, tmp_path), quiet=True)
    assert kept(tmp_path) == expected


def test_the_best_stay_over_restarts(tiny, tmp_path, monkeypatch):
    """0.1 and 0.9; started again: 0.8 and 0.7. A best step that is damaged has no loss any more, and harms nothing."""
    losses = iter([0.1, 0.9, 0.8, 0.7, 0.75, 0.78])
    monkeypatch.setattr(evaluate.Evaluation, "__call__", lambda self, params: {"a": {"nll": next(losses)}})
    of = lambda steps: tiny(f"train.steps={steps}", "train.save_every=2", "train.eval_every=2", "train.keep=1", "train.keep_best=1")
    for steps, expected in ((4, [2, 4]), (8, [2, 8])):
        loop.train(loop.prepare(of(steps), tmp_path), quiet=True)
        assert kept(tmp_path) == expected
    (tmp_path / "checkpoints/2/meta/metadata").write_text("{")
    loop.train(loop.prepare(of(12), tmp_path), quiet=True)
    assert kept(tmp_path) == [8, 12]


def test_the_loss_by_which_the_best_are_chosen():
    assert evaluate.loss({}) is None
    assert evaluate.loss({"a": {"nll": 1.0}, "b": {"nll": 2.0, "flow": 0.5}}) == pytest.approx(1.75)


@pytest.mark.parametrize(
    "over",
    [("mesh.data=8", "mesh.fsdp=1"), ("mesh.data=1", "mesh.fsdp=8"), ("mesh.fsdp=2", "mesh.tensor=2"), ("train.moment_dtype=bfloat16",)],
)
def test_onto_another_mesh_or_dtype(tiny, tmp_path, over):
    """Restored as it was saved, rounded where the first moment has another dtype; and the run goes on."""
    base = ("train.steps=2", "train.save_every=2")
    loop.train(loop.prepare(tiny(*base), tmp_path), quiet=True)
    run = loop.prepare(tiny(*base), tmp_path)
    host = lambda tree: jax.tree.map(np.asarray, tree)

    def newest(run):
        abstract, where = state.shardings(run.cfg, optim.make(run.config.train), run.mesh, with_ema=False)
        with checkpoint.Checkpointer(tmp_path) as saved:
            return abstract, resume.newest(saved, run.config, run.source, abstract, where)[2]

    before = host(newest(run)[1])
    other = loop.prepare(tiny(*base, *over), tmp_path)
    abstract, after = newest(other)
    jax.tree.map(lambda a, x: np.testing.assert_equal(a.dtype, x.dtype), abstract, after)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.astype(y.dtype), y), before, host(after))
    final = loop.train(loop.prepare(tiny("train.steps=3", "train.save_every=2", *over), tmp_path), quiet=True)
    assert int(final.step) == 3


def test_a_folder_belongs_to_one_config_from_its_first_start(tiny, tmp_path):
    """Before there is any checkpoint; a half-written note is none, and what does not change what is learned may differ."""
    c = tiny("train.steps=1")
    resume.remember(c, tmp_path)
    resume.remember(dataclasses.replace(c, train=dataclasses.replace(c.train, steps=9, keep=5, hang_s=1.0)), tmp_path)
    with pytest.raises(UserError, match=r"another config \(train.lr: "):
        resume.remember(dataclasses.replace(c, train=dataclasses.replace(c.train, lr=1.0)), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text()[:100])
    resume.remember(c, tmp_path)
    for odd in ("[]", "{}", '{"train": 3}', "null"):
        file.write_text(odd)
        try:
            resume.remember(c, tmp_path)
        except UserError as e:
            assert "config" in str(e)


def test_a_run_goes_on_with_what_it_began_with(tiny, tmp_path):
    """Wherever that lies by now, or if it is gone; before the first checkpoint another may be named."""
    a, b, moved, run = (tmp_path / x for x in ("a", "b", "moved", "run"))
    for folder in (a, b, run):
        folder.mkdir()
        (folder / "SHA256SUMS").write_text(f"of {folder.name}")
    of = lambda folder: tiny(f"model.init={folder}")
    resume.remember(of(b), run)
    resume.remember(of(a), run)
    (run / "checkpoints" / "2").mkdir(parents=True)
    resume.remember(of(a), run)
    a.rename(moved)
    resume.remember(of(moved), run)
    resume.remember(of(a), run)
    for other in (b, run):
        with pytest.raises(UserError, match="did not begin with what model.init"):
            resume.remember(of(other), run)
    (run / "init.sha256").unlink()  # a run that began with random weights
    with pytest.raises(UserError, match="did not begin with what model.init"):
        resume.remember(of(moved), run)


def test_no_whole_checkpoint_is_no_new_beginning(tiny, tmp_path):
    """All damaged: refused, with the reasons; nothing is overwritten."""
    c = tiny("train.steps=2", "train.save_every=1")
    loop.train(loop.prepare(c, tmp_path), quiet=True)
    for step in (1, 2):
        meta = tmp_path / "checkpoints" / str(step) / "meta" / "metadata"
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "vocab": 7}))
    with pytest.raises(UserError, match=r"none of the checkpoints .* is whole \(2, 1"):
        loop.train(loop.prepare(c, tmp_path), quiet=True)
    assert kept(tmp_path) == [1, 2]


def test_a_save_that_fails_costs_that_step_alone(tiny, tmp_path, monkeypatch, capfd):
    """The store refuses the second of three steps when it is asked, or the first while it writes; what is left of it is removed."""
    c = tiny("train.steps=3", "train.save_every=1", "train.keep=5")
    real_wait = ocp.CheckpointManager.wait_until_finished
    for when, lost in (("save", 2), ("wait_until_finished", 1)):
        real, calls = getattr(ocp.CheckpointManager, when), []

        def refuse(self, *args, real=real, calls=calls, lost=lost, **more):
            calls.append(1)
            out = real(self, *args, **more)
            if len(calls) == 2:
                real_wait(self)
                (self.directory / str(lost)).rename(self.directory / f"{lost}.orbax-checkpoint-tmp")  # it never came to its name
                raise OSError(28, "No space left on device")
            return out

        with monkeypatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, when, refuse)
            loop.train(loop.prepare(c, tmp_path / when), quiet=True)
        assert kept(tmp_path / when) == [s for s in (1, 2, 3) if s != lost] and not list((tmp_path / when / "checkpoints").glob("*tmp*"))
        said = capfd.readouterr().err
        assert f"checkpoints/{lost} could not be written (OSError: [Errno 28]" in said
        assert f"it can be resumed from: {'[1]' if lost == 2 else 'its start only'}" in said


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_parameters_for_export_need_no_such_mesh(tiny, tmp_path, ema):
    """Saved on eight devices, read by a process that has one: a pod's run is exported on a desk."""
    trained = loop.train(loop.prepare(tiny("train.steps=2", "train.save_every=2", f"train.ema={ema}"), tmp_path / "run"), quiet=True)
    program = (
        "import sys, jax, numpy as np\nfrom vla_jax import tree\nfrom vla_jax.train.checkpoint import Checkpointer\n"
        "assert jax.device_count() == 1\nnp.savez(sys.argv[2], **tree.flatten(Checkpointer(sys.argv[1]).params(2)))"
    )
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    argv = [sys.executable, "-c", program, str(tmp_path / "run"), str(tmp_path / "got.npz")]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    expected, got = tree.flatten(trained.ema or trained.params), np.load(tmp_path / "got.npz")
    assert set(got) == set(expected) and all(np.array_equal(got[k], expected[k]) and got[k].dtype == expected[k].dtype for k in got)


def test_an_old_step_that_cannot_be_removed_costs_no_new_one(tiny, tmp_path, monkeypatch, capfd):
    """Orbax removes old steps in the breath in which it finishes the new one."""
    real = shutil.rmtree

    def rmtree(path, *args, **more):
        if str(path).rstrip("/").endswith("checkpoints/2"):
            raise OSError(39, "Directory not empty")
        real(path, *args, **more)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    loop.train(loop.prepare(tiny("train.steps=8", "train.save_every=2", "train.keep=1"), tmp_path), quiet=True)
    assert {2, 8} <= set(kept(tmp_path))
    assert "an older one could not be removed" in (said := capfd.readouterr().err) and "could not be written" not in said


@pytest.mark.parametrize("times", [1, 9])
def test_a_last_save_that_fails_is_no_finished_run(tiny, tmp_path, monkeypatch, times):
    """Tried once more; if that fails, too, the run ends as one that has to be started again."""
    real, left = ocp.CheckpointManager.save, [times]

    def save(self, step, *args, **more):
        if step == 4 and left[0]:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        return real(self, step, *args, **more)

    c = tiny("train.steps=4", "train.save_every=2")
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", save)
        if times == 1:
            loop.train(loop.prepare(c, tmp_path), quiet=True)
        else:
            with pytest.raises(OSError, match=r"holds steps \[2\], and the run was at 4"):
                loop.train(loop.prepare(c, tmp_path), quiet=True)
    loop.train(loop.prepare(c, tmp_path), quiet=True)  # with room again
    assert kept(tmp_path) == [2, 4]


def test_storage_that_does_not_answer_is_no_damage(tiny, tmp_path, monkeypatch):
    """A read that fails once is tried again; one that goes on failing ends the start and leaves the step where it is."""
    monkeypatch.setattr(checkpoint.time, "sleep", lambda s: None)
    c = tiny("train.steps=3", "train.save_every=2")
    loop.train(loop.prepare(c, tmp_path), quiet=True)
    real, left = ocp.StandardCheckpointHandler.restore, [1]

    def restore(self, *args, **more):
        if left[0]:
            left[0] -= 1
            raise ConnectionResetError(104, "Connection reset by peer")
        return real(self, *args, **more)

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", restore)
    final = loop.train(loop.prepare(tiny("train.steps=4", "train.save_every=2"), tmp_path), quiet=True)
    assert int(final.step) == 4 and not (tmp_path / "damaged").exists()
    left[0] = 99
    with pytest.raises(UserError, match="cannot be read now .ConnectionResetError") as caught:
        loop.train(loop.prepare(tiny("train.steps=5", "train.save_every=2"), tmp_path), quiet=True)
    assert caught.value.passes and 4 in kept(tmp_path) and not (tmp_path / "damaged").exists()


class Odd(Exception):
    """As gcsfs, aiohttp and google-auth have their own."""


@pytest.mark.parametrize(
    ("problem", "passes"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (OSError(errno.EMFILE, "Too many open files"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (MemoryError(), True),
        (PermissionError(errno.EACCES, "Permission denied"), True),
        (ValueError("UNAVAILABLE: Error reading gs://b/a: connection refused"), True),
        (ValueError("DATA_LOSS: Error reading local file: CRC-32C checksum verification failed"), False),
        (OSError(errno.EIO, "Input/output error"), False),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), False),
        (json.JSONDecodeError("Expecting value", "", 0), False),
    ],
)
def test_what_passes_is_told_from_damage(problem, passes):
    assert checkpoint._passes(problem, remote=False) is passes


@pytest.mark.parametrize(
    ("problem", "passes"),
    [
        (Odd("503, Service Unavailable"), True),
        (socket.gaierror(-2, "Name or service not known"), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (ValueError("DATA_LOSS: CRC-32C checksum verification failed"), False),
        (ValueError("UNAVAILABLE: Error reading gs://b/a: connection refused"), True),
        (FileNotFoundError("vla/run/checkpoints/2/meta/metadata"), False),
        (json.JSONDecodeError("Expecting value", "", 0), False),
        (KeyError("ocdbt"), False),
        (TypeError("Meta.__init__() got an unexpected keyword argument"), False),
    ],
)
def test_of_a_store_everything_passes_but_what_contents_give(problem, passes):
    assert checkpoint._passes(problem, remote=True) is passes


def test_what_may_be_whole_is_not_removed(tmp_path, monkeypatch):
    """A save fails, and the store does not say whether the step is finished: it stays, and is judged at the next start."""
    (tmp_path / "checkpoints").mkdir()
    found = checkpoint.Checkpointer(tmp_path, config.Train())
    for told, stays in ((None, True), (False, False)):
        (tmp_path / "checkpoints" / "4").mkdir(exist_ok=True)
        monkeypatch.setattr(checkpoint, "_finished", lambda step, told=told: told)
        found._writing = 4
        found._give_up(OSError("no answer"))
        assert (tmp_path / "checkpoints" / "4").exists() is stays
    found.close()


def test_steps_are_those_that_any_process_sees(tmp_path, monkeypatch):
    """One whose listing is late waits for it; the list is looked at again."""
    monkeypatch.setattr(checkpoint.time, "sleep", lambda s: (tmp_path / "checkpoints" / "20").mkdir(parents=True, exist_ok=True))
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    found = checkpoint.Checkpointer(tmp_path)
    assert found.steps() == [10]
    monkeypatch.setattr(distributed, "gather_json", lambda mine: [[10, 20], mine])
    assert found.agreed() == [10, 20] == found.steps()
    monkeypatch.setattr(distributed, "gather_json", lambda mine: [[10, 20, 30], mine])
    with pytest.raises(UserError, match=r"sees the steps \[30\]"):
        found.agreed(wait_s=0)
    found.close()
