"""The native folder: whole or not at all, in one file of weights or several, read with numpy alone, and the beginning of another run."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from vla_jax import cli, folders, paths, tree
from vla_jax.data import cards
from vla_jax.deploy import card, export, policy, trained
from vla_jax.models import vla, weights_out
from vla_jax.tabletop.env import EVAL_SEED, TabletopEnv
from vla_jax.train import checkpoint, loop
from vla_jax.types import UserError


@pytest.fixture(scope="module")
def out(openpi_run, tmp_path_factory):
    return export.export(openpi_run, tmp_path_factory.mktemp("native") / "out")


def test_every_file_is_there_and_the_sha256sum_program_agrees(out):
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    robots = {f"robots/tabletop_{x}.json" for x in ("slider", "arm", "bimanual")}
    assert names == {"params.safetensors", "policy.json", "action_tokenizer.json", "text.model", "README.md", "SHA256SUMS", *robots}
    assert subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=out, capture_output=True).returncode == 0
    assert len((out / "SHA256SUMS").read_text().splitlines()) == len(names) - 1
    assert (out.stat().st_mode & 0o777) == (0o777 & ~folders._umask())


def test_which_weights(openpi_run, out, tiny, tmp_path):
    """The running mean where one was kept, unless it is not wanted; asked for where there is none, that is said."""
    kept = checkpoint.Checkpointer(openpi_run)
    ema, plain = (tree.flatten(kept.params(2, ema=x)) for x in (True, False))
    kept.close()
    path = "llm/layers/mlp/linear"
    assert not np.array_equal(ema[path], plain[path])
    file = load_file(out / "params.safetensors")
    assert file.keys() == ema.keys() and all(np.array_equal(file[p], w) for p, w in ema.items())
    other = load_file(export.export(openpi_run, tmp_path / "plain", ema=False) / "params.safetensors")
    assert all(np.array_equal(other[p], w) for p, w in plain.items())
    loop.train(loop.prepare(tiny("train.steps=1"), tmp_path / "run"), quiet=True)
    with pytest.raises(UserError, match=r"no running mean of its weights \(train.ema was 0\)"):
        export.export(tmp_path / "run", tmp_path / "none", ema=True)
    assert not (tmp_path / "none").exists()


def test_of_one_robot(openpi_run, out, tmp_path):
    """--robot: that one alone acts, as it does in the whole export; what it was trained on stays in the card."""
    assert cli.main(["export", str(openpi_run), str(tmp_path / "arm"), "--robot=tabletop_arm"]) == 0
    assert [p.name for p in (tmp_path / "arm" / "robots").iterdir()] == ["tabletop_arm.json"]
    asked, alone = [TabletopEnv("tabletop_arm").reset(EVAL_SEED)], policy.load_all(tmp_path / "arm")
    assert list(alone) == ["tabletop_arm"]
    assert np.array_equal(alone["tabletop_arm"].act(asked)[0][0], policy.Policy.load(out, robot="tabletop_arm").act(asked)[0][0])
    assert "tabletop_slider" in (tmp_path / "arm" / "README.md").read_text()
    with pytest.raises(UserError, match="robot 'r2d2' is not in this run; there are: tabletop_slider"):
        export.export(openpi_run, tmp_path / "none", robot="r2d2")
    assert not (tmp_path / "none").exists()


def test_shards(openpi_run, out, tmp_path):
    """Each below the limit but for tensors larger than it; the index as HF has it; the same parameters, and the same policy."""
    many = export.export(openpi_run, tmp_path / "many", shard_bytes=100_000)
    files = sorted(p.name for p in many.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"params-00001-of-{len(files):05}.safetensors"
    index = json.loads((many / "params.safetensors.index.json").read_text())
    held = {name: set(load_file(many / name)) for name in files}
    assert index["weight_map"] == {key: name for name, keys in held.items() for key in keys}
    whole = tree.flatten(export.read(out)[1])
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    assert all(sum(whole[k].nbytes for k in keys) <= 100_000 or len(keys) == 1 for keys in held.values())
    again = tree.flatten(export.read(many)[1])
    assert again.keys() == whole.keys() and all(np.array_equal(again[k], x) for k, x in whole.items())
    asked = [TabletopEnv("tabletop_arm").reset(EVAL_SEED)]
    answers = [policy.Policy.load(place, robot="tabletop_arm").act(asked)[0][0] for place in (out, many)]
    assert np.array_equal(*answers)


def test_bfloat16_is_what_a_forward_pass_makes_of_it(openpi_run, tmp_path):
    t = trained.read(openpi_run)
    half = tree.flatten(export.read(export.export(openpi_run, tmp_path / "half", dtype="bf16"))[1])
    want = tree.flatten(vla.cast(dataclasses.replace(t.cfg, dtype="bfloat16"), tree.unflatten(t.params)))
    assert {p: x.dtype for p, x in half.items()} == {p: np.dtype(x.dtype) for p, x in want.items()}
    assert all(np.array_equal(half[p], np.asarray(x)) for p, x in want.items())
    assert {x.dtype.name for x in half.values()} == {"float32", "bfloat16"}


def test_statistics_and_tokenizers_need_numpy_alone(openpi_run, out):
    """In a process in which jax, flax, Orbax, TensorFlow and torch cannot be imported: what a robot's program needs around a server."""
    code = f"""
import sys
for name in ("jax", "jaxlib", "flax", "optax", "orbax", "tensorflow", "tensorflow_datasets", "torch", "transformers"):
    sys.modules[name] = None
import json
import numpy as np
from vla_jax.data import stats
from vla_jax.deploy import export
from vla_jax.tokens import files, text
body, robots = export.about({str(out)!r})
made = stats.from_json(robots["tabletop_arm"]["stats"])
action, words = files.load({str(out / "action_tokenizer.json")!r}), text.load({str(out / "text.model")!r})
chunk = np.linspace(-0.9, 0.9, 6).reshape(2, 3)
ids = action.encode(chunk)
back, valid = action.decode(ids, steps=2, dims=3)
assert valid and np.abs(back - chunk).max() < 0.1
assert not any(m.split(".")[0] in ("jax", "flax", "orbax") and sys.modules[m] for m in sys.modules)
print(json.dumps([body["step"], made["action"].q99.tolist(), ids.tolist(), words.encode("push the red block"), robots["tabletop_arm"]["spec"]]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    step, q99, ids, words, spec = json.loads(done.stdout)
    t = trained.read(openpi_run)
    assert step == 2 and q99 == t.named("tabletop_arm").stats["action"].q99.tolist() and words == t.layout.text.encode("push the red block")
    assert ids == t.layout.action.encode(np.linspace(-0.9, 0.9, 6).reshape(2, 3)).tolist()
    assert spec == json.loads(json.dumps(policy.Policy.load(out, robot="tabletop_arm").spec()))


def test_a_run_begins_with_an_export_and_gives_it_back_bit_for_bit(tiny, tmp_path):
    """Through a step with a learning rate of 0, rows of action tokens and the projected state included; from f32, and from bf16 in shards."""
    first = ["train.steps=1", "tokens.action_vocab=100"]
    loop.train(loop.prepare(tiny(*first), tmp_path / "run"), quiet=True)
    for dtype, size in (("f32", 1 << 40), ("bf16", 50_000)):
        begun = export.export(tmp_path / "run", tmp_path / f"a {dtype}", dtype=dtype, shard_bytes=size)
        still = [f"model.init={begun}", f"tokens.action_path={begun}/action_tokenizer.json", "train.lr=0", "train.warmup=0", "train.seed=7"]
        loop.train(loop.prepare(tiny(*first, *still), tmp_path / f"again {dtype}"), quiet=True)
        given = export.export(tmp_path / f"again {dtype}", tmp_path / f"b {dtype}", dtype=dtype, shard_bytes=size)
        names = sorted(p.name for p in begun.glob("params*"))
        assert names == sorted(p.name for p in given.glob("params*")) and len(names) > (2 if dtype == "bf16" else 0)
        before, after = (tree.flatten(export.read(x)[1]) for x in (begun, given))
        assert before.keys() == after.keys() and [p for p, w in before.items() if not np.array_equal(w, after[p])] == []
        assert [n for n in names if (begun / n).read_bytes() != (given / n).read_bytes()] == []
    assert f"| began with | {begun} |" in (given / "README.md").read_text()


def test_an_export_of_other_tokens_as_a_beginning(tiny, tmp_path):
    """Rows of other action tokens are drawn anew, those of the text kept; another text model is refused; so is damage."""
    loop.train(loop.prepare(tiny("train.steps=1", "tokens.action_vocab=100"), tmp_path / "run"), quiet=True)
    begun = export.export(tmp_path / "run", tmp_path / "out")
    still = ["train.steps=1", "train.warmup=0", "train.lr=0", f"model.init={begun}"]
    run = loop.prepare(tiny(*still, "tokens.refit=true", "tokens.action_vocab=90"), tmp_path / "other")
    table = np.asarray(loop.train(run, quiet=True).params["llm"]["embedder"]["input_embedding"])
    known = load_file(begun / "params.safetensors")["llm/embedder/input_embedding"]
    rows = run.source.layout.text.vocab_size
    assert np.array_equal(table[:rows], known[:rows]) and not np.array_equal(table[rows:], known[rows : len(table)])
    with pytest.raises(UserError, match="is not the text model of model.init"):
        loop.prepare(tiny(*still, "tokens.text_model=default", "tokens.action_vocab=100"), tmp_path / "text")
    raw = bytearray((begun / "params.safetensors").read_bytes())
    raw[-1] ^= 1
    (begun / "params.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match="params.safetensors is damaged"):
        loop.train(loop.prepare(tiny(*still, "tokens.action_vocab=100"), tmp_path / "damaged"), quiet=True)


def test_a_larger_vocabulary_than_tokens_acts(tiny, tmp_path):
    """model.vocab gives the embedding more rows than there are tokens: the policy has them, too."""
    loop.train(loop.prepare(tiny("train.steps=1", "model.vocab=1500"), tmp_path / "run"), quiet=True)
    robot = policy.Policy.load(export.export(tmp_path / "run", tmp_path / "out"), robot="tabletop_arm")
    assert robot.actor.cfg.vocab == 1536 and robot.act([TabletopEnv("tabletop_arm").reset(0)])[0][1]


@pytest.mark.parametrize("kind", ["native", "hf", "openpi"])
def test_nothing_is_left_of_an_export_that_fails(openpi_run, tmp_path, monkeypatch, kind):
    place = tmp_path / "new" / "out"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(card, "text", full)
    with pytest.raises(UserError, match="out could not be written .*No space left.* Nothing is left of it"):
        export.export(openpi_run, place, kind=kind)
    assert not list(place.parent.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr(folders, "seal", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.export(openpi_run, place, kind=kind)
    assert not list(place.parent.iterdir())
    monkeypatch.undo()
    place.mkdir()  # an empty folder will do
    assert export.export(openpi_run, place, kind=kind) == place and [p.name for p in place.parent.iterdir()] == ["out"]
    with pytest.raises(UserError, match="is not empty"):
        export.export(openpi_run, place, kind=kind)
    with pytest.raises(UserError, match="is a file"):
        export.export(openpi_run, place / "README.md", kind=kind)
    with pytest.raises(UserError, match="cannot be written"):
        export.export(openpi_run, place / "README.md" / "under", kind=kind)


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_others_may_read_it_as_the_umask_says(tmp_path, mask):
    """safetensors writes files that only their owner may read."""
    before = os.umask(mask)
    try:
        with folders.written(tmp_path / "out") as partial:
            weights_out.save_shards([("a/b", np.ones(3, np.float32))], partial, "params", shard_bytes=10**6, about={"format": "x"})
            (partial / "robots").mkdir()
            (partial / "robots" / "arm.json").write_text("{}")
            folders.seal(partial)
    finally:
        os.umask(before)
    modes = {p.relative_to(tmp_path).as_posix(): p.stat().st_mode & 0o777 for p in (tmp_path / "out", *(tmp_path / "out").rglob("*"))}
    files = {f"out/{name}": 0o666 & ~mask for name in ("params.safetensors", "SHA256SUMS", "robots/arm.json")}
    assert modes == files | {"out": 0o777 & ~mask, "out/robots": 0o777 & ~mask}


def test_nothing_outside_the_folder_is_read(out, tmp_path):
    copy = tmp_path / "copy"
    archive = shutil.make_archive(str(tmp_path / "out"), "zip", out)
    with pytest.raises(UserError, match="is a file, not the folder .* Archives are not read: unpack it first"):
        policy.Policy.load(archive)
    for change, said in (
        (lambda body: body | {"robots": ["../../outside"]}, "lacks robots/../../outside.json"),
        (lambda body: body | {"robots": ["tabletop_none"]}, "lacks robots/tabletop_none.json"),
        (lambda body: body | {"robots": 3}, "no exported policy"),
        (lambda body: body | {"format": "vla_jax.policy.1"}, "this version reads 'vla_jax.policy.2'"),
        (lambda body: [], "this version reads"),
    ):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(out, copy)
        (copy / "policy.json").write_text(json.dumps(change(json.loads((copy / "policy.json").read_text()))))
        folders.seal(copy)
        with pytest.raises(UserError, match=re.escape(said)):
            policy.load_all(copy)
    shutil.rmtree(copy)
    shutil.copytree(out, copy)
    sums = (copy / folders.SUMS).read_text().splitlines()
    for name in ("policy.json", "text.model", "action_tokenizer.json", "robots/tabletop_arm.json"):  # none is read unchecked
        (copy / folders.SUMS).write_text("\n".join(x for x in sums if not x.endswith(f"  {name}")) + "\n")
        with pytest.raises(UserError, match=rf"lacks {name}, or its checksum"):
            export.about(copy)
    shutil.rmtree(copy)
    shutil.copytree(out, copy)
    (copy / "params.safetensors").rename(tmp_path / "weights.safetensors")
    (copy / "params.safetensors").symlink_to(tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="'params.safetensors' is not a file of this folder"):
        export.read(copy)


def test_model_card(openpi_run, out):
    told = (out / "README.md").read_text()
    for name in ("tabletop_slider", "tabletop_arm", "tabletop_bimanual"):
        row = next(line for line in told.splitlines() if line.startswith(f"| {name} "))
        assert cards.from_dict(json.loads((out / f"robots/{name}.json").read_text())["card"], where="x").licence in row
    lines = [json.loads(x) for x in (openpi_run / "metrics.jsonl").read_text().splitlines()]
    loss = next(x["train/loss"] for x in lines if "train/loss" in x)
    assert f"| train/loss | {loss:.4g} |" in told and "| eval/tabletop_arm/nll |" in told
    assert (
        "2 of 2 steps" in told and "running mean (EMA), f32" in told and len(re.findall(rf"commit {re.escape(paths.commit())} ", told)) == 2
    )
    assert "## What this format changes" not in told and str(openpi_run.parent) not in told


def test_the_command(openpi_run, tmp_path, capsys):
    assert cli.main(["export", f"{openpi_run}@2", str(tmp_path / "out"), "--no-ema", "--dtype=bf16"]) == 0
    body, _ = export.about(tmp_path / "out", weights=True)
    assert (body["step"], body["weights"], body["dtype"]) == (2, "params", "bf16")
    assert cli.main(["export", str(openpi_run), str(tmp_path / "x"), "--format=onnx"]) == 2
    assert cli.main(["export", f"{openpi_run}@1", str(tmp_path / "x")]) == 2 and "no checkpoint of step 1" in capsys.readouterr().err
    assert cli.main(["export", str(openpi_run), "gs://b/x"]) == 2 and "gs://b/x is a URL" in capsys.readouterr().err
    assert cli.main(["spec", "gs://b/x"]) == 2 and "gs://b/x is a URL" in capsys.readouterr().err
    assert (
        cli.main(["export", f"{openpi_run}@last", str(tmp_path / "x")]) == 2 and "is a step number, got 'last'" in capsys.readouterr().err
    )
    assert os.listdir(tmp_path) == ["out"] and not os.path.exists("gs:")
    (tmp_path / "me@lab").mkdir()
    (tmp_path / "me@lab" / "run").symlink_to(openpi_run)
    assert cli.main(["export", str(tmp_path / "me@lab" / "run"), str(tmp_path / "second")]) == 0
    assert cli.main(["export", str(tmp_path / "me@lab" / "run@2"), str(tmp_path / "third")]) == 0


def test_shards_of_a_tensor_larger_than_one(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": rng.normal(size=n).astype(np.float32) for i, n in enumerate((10, 1000, 20, 30, 40, 0))}
    files = weights_out.save_shards(tensors.items(), tmp_path, "w", shard_bytes=400, about={"a": "b"})
    assert [sorted(load_file(tmp_path / f)) for f in files] == [["t0"], ["t1"], ["t2", "t3", "t4", "t5"]][: len(files)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*files, "w.safetensors.index.json"]
