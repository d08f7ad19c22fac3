"""That the benchmarks run, count what they say, and refuse what they cannot do. No timing is tested."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

from vla_jax import cli, config
from vla_jax.bench import batches, data, data_costs, data_rates, data_sets, tokens
from vla_jax.bench import run as bench
from vla_jax.data import images
from vla_jax.tokens import actions
from vla_jax.train import state
from vla_jax.types import IMAGE, UserError

needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="bench data pins processes to cores")


def test_bench_step_gives_one_json_line(capsys, tabletop, tmp_path):
    here = ["--config=configs/demo.py", f"--config.data.root={tabletop}", f"--config.data.index_dir={tmp_path / 'ix'}"]
    small = ["--config.model.preset=tiny", "--config.pack.rows=8", "--config.mesh.data=8", "--config.mesh.fsdp=1"]
    assert cli.main(["bench", "step", "--repeats=1", *here, *small, f"--out={tmp_path / 'b.jsonl'}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "b.jsonl").read_text()) == found
    assert found["bench"] == "step" and found["config"] == "configs/demo.py" and found["repeats"] == 1
    assert found["step_ms"] > 0 and 0 < found["of_ceiling"]["real"] < 1.5 and found["machine"] and found["commit"]
    assert (
        found["of_ceiling"]["real"] < found["of_ceiling"]["slots"] <= found["of_ceiling"]["programmed"]
        and "no recomputation" in found["rule"]
    )
    assert found["needs_gib"] > 0 and found["batch"] == "data"


MADE_UP = ["--config=configs/oxe_3b.py:size=3b,chips=h200-1"] + [
    f"--config.{x}"
    for x in ("model.preset=tiny", "model.vocab=1024", "data.image_size=64", "pack.rows=16", "model.dtype=float32", "mesh.data=8")
]


def test_bench_step_on_made_up_samples(capsys):
    """Variants in turns, parts, and a ratio to the first; the counted work is that of the batch that was made."""
    argv = [
        "bench",
        "step",
        "--repeats=1",
        *MADE_UP,
        "--batch=packed",
        "--beside=padded",
        "--beside=full_loss",
        "--beside=model.remat=none",
        "--parts",
    ]
    assert cli.main(argv) == 0
    first, padded, full, remat = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["beside"], padded["beside"], full["beside"], remat["remat"]) == ("", "padded", "full_loss", "none")
    assert set(first["parts_ms"]) == {"vision", "decoder", "loss", "optimizer", "rest"}
    assert full["targets"] == full["rows"][1] > first["targets"] and padded["images"] == 3
    # 16 rows of 3 * 16 + 250 slots hold 8 rounds of samples of 1, 2 and 3 cameras and 120 tokens; a padded row holds one sample
    assert padded["samples_per_s"] * padded["step_ms"] / 1e3 == pytest.approx(16, rel=0.02)
    assert first["samples_per_s"] * first["step_ms"] / 1e3 == pytest.approx(24, rel=0.02) and first["rows"] == [16, 298]
    assert padded["slots_used"] == pytest.approx((2 * 16 + 120) / 298, abs=0.02)  # two cameras on average: black ones are not real
    ratio = first["samples_per_s"] / padded["samples_per_s"]
    assert padded["samples_per_s_to_first"] == pytest.approx(1 / ratio, rel=0.02)
    assert remat["tflops"]["programmed"] / remat["tflops"]["real"] < first["tflops"]["programmed"] / first["tflops"]["real"]
    for argv, said in (
        (["--batch=half"], "there are: full, padded, packed"),
        (["--batch=full", "--beside=model.colour=red"], "--beside"),
        (["--batch=full", "--peer=/no/such.py"], "no such file"),
        (["--batch=full", "--beside=train.insulate=maybe"], "of type bool"),
        (["--batch=full", "--beside=pack.length=512"], "--beside"),
    ):
        assert cli.main(["bench", "step", "--repeats=1", *MADE_UP, *argv]) == 2
        assert said in capsys.readouterr().err


def test_made_up_batches_hold_what_they_say():
    c = config.load("configs/demo.py", ["pack.rows=6"])[0]
    for kind in batches.KINDS:
        shaped = batches.shaped(c, kind, 9)
        b = batches.make(shaped, kind, patches=9, vocab=500)
        assert b.tokens.shape == (6, shaped.pack.length) and b.images.shape[1] == shaped.pack.images
        for row in range(6):
            for g in range(1, b.segment[row].max() + 1):
                here = b.segment[row] == g
                assert (b.loss_weight[row][here] > 0).sum() == batches.ACTION and b.dataset[row, g - 1] == 0
                np.testing.assert_allclose(b.loss_weight[row][here].sum(), 1, rtol=1e-5)
                np.testing.assert_array_equal(b.position[row][here], np.arange(here.sum()))
            slots = (b.tokens[row] == -1).sum() // 9
            assert slots == 3 if kind != "packed" else slots <= shaped.pack.images
    lit = lambda b: (b.images.reshape(6, -1, c.data.image_size**2 * 3).max(axis=-1) > 0).sum()
    assert lit(batches.make(batches.shaped(c, "full", 9), "full", patches=9, vocab=500)) == 18
    assert lit(batches.make(batches.shaped(c, "padded", 9), "padded", patches=9, vocab=500)) == 12  # 1, 2, 3, 1, 2, 3 cameras


@pytest.mark.parametrize("patches, rows", [(256, 16), (256, 32), (256, 3), (256, 2), (64, 16), (9, 8)])
def test_packed_holds_no_easier_samples_than_padded(patches, rows):
    """As many of one camera as of two and of three, whatever fills rows best; and rows that are full all the same."""
    c = config.load("configs/debug.py:bridge", ["data.image_size=14", f"pack.rows={rows}"])[0]
    made = batches.make(batches.shaped(c, "packed", patches), "packed", patches=patches, vocab=64)
    of = lambda row, sample: int(((made.tokens[row] == IMAGE) & (made.segment[row] == sample)).sum()) // patches
    images = [of(row, sample) for row in range(rows) for sample in range(1, made.segment[row].max() + 1)]
    assert len(images) >= 3 and images.count(1) == images.count(2) == images.count(3) == len(images) // 3
    assert len(images) == rows // 2 * 3


def test_a_peer_is_run_and_held_beside_ours(capsys, tmp_path):
    program = tmp_path / "peer.py"
    program.write_text(
        "import sys, json\nprint('device x'); print('{1}'); print('[2]')\nprint(json.dumps({'ms': 10.0, 'samples_s': float(sys.argv[2])}))\n"
    )
    argv = ["bench", "step", "--repeats=1", *MADE_UP, "--batch=full", f"--peer={program}", "--peer-arguments=--batch 4"]
    assert cli.main(argv) == 0
    ours, theirs = map(json.loads, capsys.readouterr().out.splitlines())
    assert theirs["bench"] == "step_peer" and theirs["samples_s"] == 4.0
    assert theirs["ours_to_peer"] == pytest.approx(ours["samples_per_s"] / 4, rel=0.01)
    program.write_text("raise SystemExit('no torch')")
    assert cli.main(argv) == 2 and "no torch" in capsys.readouterr().err


@needs_affinity
def test_bench_data_gives_a_line_for_everything_that_it_measures(real_data, tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")  # writes the set, and is the peer
    monkeypatch.setenv("VLA_CACHE", str(tmp_path))
    tiny = {"sets": ("jpeg256",), "cores": (1,), "frames": 40, "seconds": 0.01, "latencies_ms": (0, 1), "peers": ("linear",)}
    lines = list(bench.data(str(real_data), repeats=1, **tiny))
    assert all(x["bench"] == "data" and x["set"] == "jpeg256" and x["cores"] == 1 and x["machine"] and x["commit"] for x in lines)
    assert all(json.loads(json.dumps(x)) == x for x in lines)
    by = {what: [x for x in lines if x["what"] == what] for what in dict.fromkeys(x["what"] for x in lines)}
    assert {k: len(v) for k, v in by.items()} == {"first run": 1, "memory": 1, "state": 1, "index": 1, "scan": 1, "rate": 11, "store": 2}
    top, *ours, peer = by["rate"]
    assert top["who"] == "ceiling" and top["pictures_per_cpu_s"] > 0 and 20_000 < top["bytes_per_picture"] < 30_000
    assert {(x["who"], x["resize"], x["augment"]) for x in ours} == {
        *(
            (f"vla_jax {who}", resize, where)
            for who in ("samples", "rows")
            for resize in ("linear", "antialias")
            for where in ("none", "host")
        ),
        ("vla_jax rows", "linear", "device"),
    }
    for x in (*ours, peer):
        # two cameras
        assert x["pictures"] == 2 * round(x["pictures"] / 2) > 0 and 0 < x["ratio_min"] <= x["ratio_per_cpu"] <= x["ratio_max"]
        assert x["samples_per_s"] == pytest.approx(x["pictures_per_s"] / 2, rel=0.01)
    assert all(0.5 < x["slots_used"] <= 1 for x in ours if x["who"] == "vla_jax rows")
    assert peer["who"] == "tfds tf.data" and peer["frames"] == by["index"][0]["frames"] == by["scan"][0]["frames"] == 40
    assert peer["peak_resident_mb"] > peer["resident_after_imports_mb"] > 0 and peer["first_batch_s"] > 0
    (memory,) = by["memory"]
    pixels = 4 * 16 * 8 * 224 * 224 * 3 / 1e6  # 16 rows of 8 pictures, four batches in flight; tokens and numbers add 5 %
    assert pixels < memory["in_flight_mb"] < 1.06 * pixels
    assert memory["resident_mb"] > memory["resident_after_imports_mb"] and memory["first_batch_s"] > memory["open_s"] > 0
    assert by["state"][0]["stream_state_bytes"] == 4 * (1 + 4 * 4 * 4) * 8  # groups, counter and waiting samples, i64
    assert by["state"][0]["draw_step_10_ms"] > 0 and by["state"][0]["draw_step_10_million_ms"] > 0
    assert by["index"][0]["index_array_bytes_per_step"] < by["index"][0]["index_bytes_per_step"]
    assert 0 < by["scan"][0]["ratio_per_cpu"] < 1
    assert [x["latency_ms"] for x in by["store"]] == [0, 1] and by["store"][0]["most_of_it"] == 1
    shown = data.table(lines)
    assert all(word in shown for word in ("tfds tf.data", "simplejpeg", "beyond_mb", "least_ahead_for_0.9"))


@needs_affinity
def test_another_number_of_frames_is_refused(monkeypatch, tmp_path):
    """Rates of different data are no comparison."""
    counts = {"data_costs": 40, "data_peers": 41}
    line = lambda module: [{"what": "rate", "who": module, "frames": counts.get(module, 40)}]
    monkeypatch.setattr(data_sets, "ensure", lambda root, name, *, frames: tmp_path)
    monkeypatch.setattr(data, "_measure", lambda module, job, cores: line(module))
    options = {"sets": ("png256",), "cores": (1,), "repeats": 1, "peers": ("linear",)}
    with pytest.raises(RuntimeError, match="reads 41 frames, our index has 40"):
        list(data.run("", **options))
    counts["data_peers"] = 40
    assert len(list(data.run("", **options))) == 6


@needs_affinity
def test_children_are_pinned_and_we_are_not():
    mine = os.sched_getaffinity(0)
    with data._pinned([min(mine)]):
        assert os.sched_getaffinity(0) == {min(mine)}
    assert os.sched_getaffinity(0) == mine


def test_a_ratio_is_taken_within_its_round():
    rate = lambda pictures, cpu: data_rates.Rate(pictures, 0, 1.0, cpu)
    # a machine that slows to a third in one round changes neither ratio
    found = data_rates.summary([(rate(80, 1.0), rate(100, 1.0)), (rate(80, 3.0), rate(100, 3.0)), (rate(60, 1.0), rate(100, 1.0))])
    assert (found["ratio_per_cpu"], found["ratio_min"], found["ratio_max"]) == (0.8, 0.6, 0.8)
    assert found["pictures_per_cpu_s"] == 60 and found["ceiling_pictures_per_cpu_s"] == 100 and found["pictures"] == 220


@pytest.mark.parametrize("encoding", ["jpeg", "png"])
def test_the_ceiling_decodes_the_same_pixels(encoding):
    picture = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    stored = data_sets._encode(picture, data_sets.Kind(encoding, 24, 32, 1, 0.0))
    np.testing.assert_array_equal(data_rates.fastest(encoding)[1](stored), images.decode(stored))


def test_mapped_pages_are_those_of_the_folder(tmp_path):
    page = os.sysconf("SC_PAGE_SIZE")
    if not Path("/proc/self/smaps").is_file():
        pytest.skip("no /proc")
    np.save(tmp_path / "x.npy", np.zeros(16 * page, np.uint8))
    before = data_costs._mapped_kb(tmp_path)
    held = np.load(tmp_path / "x.npy", mmap_mode="r")
    held.sum()
    assert before == 0 and 16 * page <= data_costs._mapped_kb(tmp_path) * 1000 <= 18 * page


def test_tokens_beside_hfs_tokenizers():
    """Both engines, ids checked against HF's in the run itself; a wrong id ends it."""
    pytest.importorskip("tokenizers")
    lines = [
        line
        for shape in ((5, 7), (9, 3))
        for line in tokens._shape(
            actions.fit(list(tokens._chunks(np.random.default_rng(0), 200, *shape)), vocab_size=300, scale=10.0),
            tokens._chunks(np.random.default_rng(1), 50, *shape),
            2,
        )
    ]
    engine = "numba" if importlib.util.find_spec("numba") else "numpy"
    assert {(line["what"], line["engine"], line["batch"]) for line in lines} >= {
        (w, e, b) for w, e in (("encode", "numpy"), ("decode", engine)) for b in (1, 50)
    }
    for line in lines:
        assert line["times_hf"] == pytest.approx(line["ours_per_s"] / line["hf_per_s"], rel=0.02, abs=0.01)
    assert len(tokens.table(lines).splitlines()) == len(lines) + 1


@pytest.mark.parametrize(
    "method, fake, said",
    [
        ("encode", lambda self, chunk: np.zeros(1, np.int32), "ids differ"),
        ("decode", lambda self, ids, **_: (np.ones((5, 3)), True), "decoded chunks differ"),
    ],
)
def test_tokens_that_differ_end_the_benchmark(monkeypatch, method, fake, said):
    pytest.importorskip("tokenizers")
    fitted = actions.fit(list(tokens._chunks(np.random.default_rng(0), 50, 5, 3)), vocab_size=200, scale=10.0)
    chunks = tokens._chunks(np.random.default_rng(1), 4, 5, 3)
    monkeypatch.setattr(actions.FastTokenizer, method, fake)
    with pytest.raises(UserError, match=said):
        list(tokens._shape(fitted, chunks, 1))


@needs_affinity
def test_refusals(capsys, tmp_path):
    for argv, said in (
        (["bench", "data", "--root", str(tmp_path), "--sets", "gif"], "there are jpeg256"),
        (["bench", "data", "--root", str(tmp_path), "--cores", "100000"], "are available here"),
        (["bench", "data", "--root", str(tmp_path), "--cores", "0"], "whole number above 0"),
        (["bench", "data", "--root", str(tmp_path), "--config.data.threads=1"], "takes no --config"),
        (["bench", "data", "--root", str(tmp_path / "gone"), "--cores", "1"], "does not exist"),
        (["bench", "step"], "--config"),
    ):
        assert cli.main(argv) == 2
        assert said in capsys.readouterr().err, argv
    with pytest.raises(UserError, match="no set gif"):
        next(bench.data(str(tmp_path), repeats=1, sets=("gif",), cores=(1,)))


def test_variants_share_one_state(monkeypatch):
    """Two of the same model are in memory once; another optimizer's is its own."""
    made = []
    real = state.create
    monkeypatch.setattr(state, "create", lambda *a, **k: (made.append(1), real(*a, **k))[1])
    c = config.load("configs/oxe_3b.py:size=3b,chips=h200-1", [x.removeprefix("--config.") for x in MADE_UP[1:]])[0]
    beside = ("full_loss", "model.remat=none", "train.optimizer=adafactor")
    lines = list(bench.step(c, repeats=1, batch="padded", beside=beside))
    assert len(made) == 2 and [x["optimizer"] for x in lines] == ["adamw"] * 3 + ["adafactor"]
