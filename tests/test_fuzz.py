"""What is loaded from elsewhere, damaged at random: it is read, or refused in the project's own words; never a traceback, never a hang."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vla_jax import config, folders, paths
from vla_jax.data import build, cards, index, mixture
from vla_jax.deploy import export
from vla_jax.tokens import files, text
from vla_jax.train import checkpoint, loop, resume
from vla_jax.types import UserError

ROOM = Path(__file__).resolve().parent.parent / "vla_jax"
QUIET = settings(max_examples=60, deadline=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
ODD = [
    "null",
    "[]",
    "{}",
    "-1",
    "1e999",
    '"../../etc"',
    "[" * 5000,
    "NaN",
    "true",
    '"\\ud800"',
    "0x",
    "!!python/object/apply:os.system [echo]",
]


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """One to three of: a byte changed, a part cut out or doubled, cut short, something odd in place of a word."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at, size = draw(st.integers(0, max(len(data) - 1, 0))), draw(st.integers(1, 200))
        what = draw(st.sampled_from(["flip", "cut", "double", "end", "odd"]))
        if not data:
            break
        if what == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del data[at : at + size]
        elif what == "double":
            data[at:at] = data[at : at + size]
        elif what == "end":
            del data[at:]
        else:
            start = max(data.rfind(b":", 0, at), data.rfind(b",", 0, at)) + 1
            data[start : start + draw(st.integers(0, 12))] = draw(st.sampled_from(ODD)).encode()
    return bytes(data)


def refused_or_read(load) -> None:
    try:
        load()
    except (UserError, checkpoint.Damaged) as e:
        assert str(e) and "Traceback" not in str(e)


def fuzz(whole: bytes, file: Path, load, *, data) -> None:
    file.write_bytes(data.draw(damaged(whole)))
    refused_or_read(load)


@pytest.fixture(scope="module")
def indexed(tabletop, tmp_path_factory):
    """(card, the data's place, a small index of it)."""
    card = cards.load("tabletop_slider")
    found = build.ensure(card, str(tabletop), str(tmp_path_factory.mktemp("fuzz")))
    return card, found.place, found.path


@QUIET
@given(data=st.data())
def test_indexes(data, indexed, tmp_path):
    card, place, path = indexed
    name = data.draw(st.sampled_from(["meta.json", *sorted(p.name for p in path.glob("*.npy"))]))
    shutil.rmtree(tmp_path / "ix", ignore_errors=True)
    shutil.copytree(path, tmp_path / "ix")
    fuzz((path / name).read_bytes(), tmp_path / "ix" / name, lambda: index.open_index(card, place, tmp_path / "ix"), data=data)


def test_an_index_reads_no_file_but_the_datasets_own(indexed, tmp_path):
    card, place, path = indexed
    shutil.copytree(path, tmp_path / "ix")
    told = json.loads((path / "meta.json").read_text())
    (tmp_path / "secret.array_record").write_bytes(b"secret")
    for name in (f"../../../{tmp_path}/secret.array_record", str(tmp_path / "secret.array_record"), "dataset_info.json"):
        (tmp_path / "ix" / "meta.json").write_text(json.dumps(told | {"shards": [[name, "6"], *told["shards"][1:]]}))
        with pytest.raises(UserError, match="its shards are not those of"):
            index.open_index(card, place, tmp_path / "ix")


def test_what_a_few_lines_of_yaml_unfold_to_is_not_waited_for(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "source: *a9"]))
    for load in (cards.load, mixture.load):
        with pytest.raises(UserError, match="aliases"):
            load(str(tmp_path / "c.yaml"))


@QUIET
@given(data=st.data())
def test_cards(data, tmp_path):
    fuzz(
        (paths.assets("data") / "cards/bridge_dataset.yaml").read_bytes(),
        tmp_path / "c.yaml",
        lambda: cards.load(str(tmp_path / "c.yaml")),
        data=data,
    )


@QUIET
@given(data=st.data())
def test_mixtures(data, tmp_path):
    whole = (paths.assets("data") / "mixtures/octo_oxe_magic_soup.yaml").read_bytes()
    fuzz(whole, tmp_path / "m.yaml", lambda: mixture.load(str(tmp_path / "m.yaml")), data=data)


@QUIET
@given(data=st.data())
def test_text_models(data, tmp_path):
    fuzz(text.load("tiny").model, tmp_path / "t.model", lambda: text.load(str(tmp_path / "t.model")), data=data)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, tabletop):
    """(config, workdir) of a run of two steps."""
    workdir = tmp_path_factory.mktemp("run")
    small = [f"data.root={tabletop}", f"data.index_dir={workdir / 'index'}", "model.preset=tiny", "pack.rows=8", "pack.group=2"]
    small += ["train.steps=2", "train.save_every=1", "mesh.data=1", "mesh.fsdp=-1", "data.holdout=0.0"]
    c = config.load("configs/demo.py", small)[0]
    loop.train(loop.prepare(c, workdir), quiet=True)
    return c, workdir


@QUIET
@given(data=st.data())
def test_action_tokenizers(data, tmp_path, run_of):
    whole = (run_of[1] / "action_tokenizer.json").read_bytes()
    fuzz(whole, tmp_path / "a.json", lambda: files.load(tmp_path / "a.json"), data=data)


@QUIET
@given(data=st.data())
def test_the_run_that_a_workdir_belongs_to(data, tmp_path, run_of):
    whole = (run_of[1] / "config.json").read_bytes()
    fuzz(whole, tmp_path / "config.json", lambda: resume.remember(run_of[0], tmp_path), data=data)


@QUIET
@given(data=st.data())
def test_what_lies_beside_a_checkpoint(data, run_of):
    file = run_of[1] / "checkpoints" / "2" / "meta" / "metadata"
    whole = file.read_bytes()
    try:
        with checkpoint.Checkpointer(run_of[1]) as saved:
            fuzz(whole, file, lambda: saved.meta(2), data=data)
    finally:
        file.write_bytes(whole)


def test_every_file_of_a_checkpoint(run_of, tmp_path):
    """A flipped bit anywhere in the newest step, and each of its files gone or empty: that step is passed over, or it restores what was
    saved."""
    import random

    import jax
    import numpy as np

    from vla_jax.train import optim, state

    c, workdir = run_of
    prepared = loop.prepare(c, workdir)
    abstract, where = state.shardings(prepared.cfg, optim.make(c.train), prepared.mesh, with_ema=False)
    copy = tmp_path / "copy"
    shutil.copytree(workdir / "checkpoints", copy / "checkpoints")
    found = lambda: resume.newest(checkpoint.Checkpointer(copy), c, prepared.source, abstract, where, set_aside=False)
    expected = {step: None for step in (1, 2)}
    expected[2] = jax.tree.map(np.asarray, found()[2])
    passed = kept = 0
    for file in sorted(p for p in (copy / "checkpoints" / "2").rglob("*") if p.is_file()):
        whole, pick = file.read_bytes(), random.Random(file.name)
        for damage in ("flip", "flip", "empty", "gone"):
            if damage == "flip" and whole:
                changed = bytearray(whole)
                changed[pick.randrange(len(whole))] ^= 1 << pick.randrange(8)
                file.write_bytes(changed)
            elif damage == "empty":
                file.write_bytes(b"")
            else:
                file.unlink()
            step, _, current = found()
            passed += step == 1
            if step == 2:
                kept += 1
                jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, current), expected[2])
            file.write_bytes(whole)
    assert passed >= 8 and kept >= 1  # arrays and meta; and what Orbax notes and nobody needs


@pytest.fixture(scope="module")
def exported(run_of, tmp_path_factory):
    return export.export(run_of[1], tmp_path_factory.mktemp("export") / "out")


@QUIET
@given(
    data=st.data(),
    name=st.sampled_from(
        ["policy.json", "robots/tabletop_arm.json", "action_tokenizer.json", "text.model", "SHA256SUMS", "params.safetensors"]
    ),
    known=st.booleans(),
)
def test_exports(data, name, known, exported):
    """Also where whoever changed a file has changed its checksum, too."""
    from vla_jax.deploy import policy

    file, sums = exported / name, exported / "SHA256SUMS"
    whole, told = file.read_bytes(), sums.read_bytes()
    try:
        file.write_bytes(data.draw(damaged(whole if len(whole) < 100_000 else whole[:100_000])))
        if known and name != "SHA256SUMS":
            old = next(line for line in told.decode().splitlines() if line.endswith(f"  {name}"))
            sums.write_text(told.decode().replace(old, f"{folders.sha256(file)}  {name}"))
        refused_or_read(lambda: policy.load_all(exported))
    finally:
        file.write_bytes(whole)
        sums.write_bytes(told)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../outside", "link"])
def test_an_export_names_its_own_files_only(name, exported, tmp_path):
    copy = tmp_path / "e"
    shutil.copytree(exported, copy)
    (tmp_path / "outside").write_text("x")
    (copy / "link").symlink_to(tmp_path / "outside")
    with open(copy / "SHA256SUMS", "a") as f:
        f.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(UserError, match="not a file of this folder"):
        export.read(copy)


@pytest.mark.parametrize("key", ["name", "version"])
@pytest.mark.parametrize("value", ["../x", "/x", "a/b", "..", "", "a\x00b"])
def test_a_cards_name_is_one_folder(key, value):
    import yaml

    raw = yaml.safe_load((paths.assets("data") / "cards/bridge_dataset.yaml").read_text())
    with pytest.raises(UserError, match="names a folder"):
        cards.from_dict({**raw, key: value}, where="x")


def test_nothing_that_executes_is_loaded():
    """No module of ours imports pickle or its like, evaluates text, allows pickled arrays, or reads YAML by anything but the safe loader.
    The one that runs what it reads is config.py, through ml_collections, and says so."""
    for file in ROOM.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not {n.split(".")[0] for n in names} & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, file
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                of = node.func.value.id if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) else ""
                assert called not in ("eval", "exec", "unsafe_load", "full_load") or of, file
                assert (of, called) not in (("yaml", "load"), ("torch", "load")), file
                assert not any(k.arg == "allow_pickle" for k in node.keywords), file
    assert "Config files are Python and are executed" in (ROOM / "config.py").read_text()


def test_meta_is_what_was_sealed(run_of):
    """A number changed by hand, in valid JSON, is seen."""
    file = run_of[1] / "checkpoints" / "2" / "meta" / "metadata"
    whole = file.read_text()
    told = json.loads(whole)
    told["stream"][0][0] += 1
    try:
        file.write_text(json.dumps(told))
        with checkpoint.Checkpointer(run_of[1]) as saved, pytest.raises(checkpoint.Damaged, match="checksum"):
            saved.meta(2)
    finally:
        file.write_text(whole)
