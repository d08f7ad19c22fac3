import copy
import json
import re
import shutil

import numpy as np
import odd_rlds
import pytest
import yaml

from vla_jax import paths
from vla_jax.data import cards, draft, mixture, rlds, stats
from vla_jax.types import Dim, UserError

RAW = yaml.safe_load((paths.assets("data") / "cards" / "bridge_dataset.yaml").read_text())


@pytest.mark.parametrize("name", cards.names())
def test_every_card_loads(name):
    card = cards.load(name)
    assert card.name == name and card.keys()


@pytest.mark.parametrize("path", sorted((paths.assets("data") / "mixtures").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_mixture_loads(path):
    assert mixture.load(path.stem).cards


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("robot"), "missing fields ['robot']"),
        (lambda r: r.update(colour="red"), "unknown fields ['colour']"),
        (lambda r: r.update(control_hz=0), "control_hz is 0"),
        (lambda r: r["action"]["dims"][0].update(unit="inch"), "action.dims[0].unit is 'inch'; allowed: m, rad"),
        (lambda r: r["action"]["ops"].append({"multiply": 2}), "an op is one of: pick"),
        (lambda r: r["action"]["ops"].append({"scale": {"dims": [0]}}), "scale needs exactly ['by', 'dims']"),
        (lambda r: r["action"]["ops"].append({"scale": {"dims": [0], "by": float("nan")}}), "scale needs a number for by"),
        (lambda r: r["action"]["ops"].append({"clip": {"dims": [0], "low": 1, "high": 0}}), "clip needs low below high"),
        (lambda r: r["action"]["ops"].append({"slice": [3, 1]}), "start below stop"),
        (lambda r: r["action"]["ops"].append({"rotate": {"at": 0, "from": ["x"], "to": "rot6d"}}), "rotate needs from out of"),
        (lambda r: r["action"]["ops"].append({"pose_delta": {"at": 0, "format": {}}}), "pose_delta needs format out of"),
        (lambda r: r["action"]["ops"].append({"absolute": {"dims": [0], "from": ["x"], "at": [0]}}), "absolute needs a key `from`"),
        (lambda r: r["action"]["dims"][0].update(name=None), "action.dims[0].name is None"),
        (lambda r: r.update(robot=None), "robot is None; it must be text"),
        (lambda r: r.update(splits=["train", "train"]), "name each split to train on once"),
        (lambda r: r.update(language=[""]), "language holds ''"),
        (lambda r: r.update(filters=[{"moves": float("inf")}]), "moves needs a positive number"),
        (lambda r: r.update(first_step="skip"), "first_step is 'skip'; allowed: keep, drop_if_idle"),
    ],
)
def test_faults_are_named(change, message):
    raw = copy.deepcopy(RAW)
    change(raw)
    with pytest.raises(UserError) as e:
        cards.from_dict(raw, where="card.yaml")
    assert message in str(e.value) and "card.yaml" in str(e.value)


def test_digest_changes_with_meaning_only():
    base = cards.from_dict(RAW, where="x").digest
    assert cards.from_dict({**RAW, "citation": "other"}, where="x").digest == base
    assert cards.from_dict({**RAW, "control_hz": 6}, where="x").digest != base


def test_card_against_features(real_data):
    directory = real_data / "bridge_dataset" / "1.0.0"
    cards.check(cards.load("bridge_dataset"), directory)
    raw = copy.deepcopy(RAW)
    raw["views"]["base"] = "observation/image_9"
    with pytest.raises(UserError, match="key 'observation/image_9' is not in features.json"):
        cards.check(cards.from_dict(raw, where="x"), directory)
    raw = copy.deepcopy(RAW)
    raw["action"]["dims"].pop()
    with pytest.raises(UserError, match="action has 7 numbers after its ops but the card names 6 dims"):
        cards.check(cards.from_dict(raw, where="x"), directory)


def test_normalizer_round_trip_constant_and_binary():
    rng = np.random.default_rng(0)
    x = np.stack([rng.normal(3, 2, 500), np.full(500, 0.7), rng.integers(0, 2, 500)], axis=1).astype(np.float32)
    dims = tuple(Dim(n, "1", "base", k) for n, k in (("a", "absolute"), ("c", "absolute"), ("g", "binary")))
    n = stats.Normalizer.make(stats.of(x), dims)
    y = n.normalize(x)
    assert np.isfinite(y).all() and (y[:, 1] == 0).all() and set(y[:, 2]) == {-1.0, 1.0}
    inside = np.abs(y[:, 0]) < n.limit
    np.testing.assert_allclose(n.denormalize(y)[inside], x[inside], atol=1e-5)
    q01, q99 = np.quantile(x[:, 0].astype(np.float64), [0.01, 0.99])
    np.testing.assert_allclose(n.denormalize(np.array([[-1, 0, -1], [1, 0, 1]]))[:, 0], [q01, q99], rtol=1e-6)


@pytest.mark.parametrize("which", ["bridge", "odd"])
def test_a_draft_lacks_only_what_a_person_must_say(which, real_data, tmp_path):
    if which == "odd":
        odd_rlds.record(tmp_path)
    name, version, root = {"bridge": ("bridge_dataset", "1.0.0", real_data), "odd": (odd_rlds.NAME, odd_rlds.VERSION, tmp_path)}[which]
    place = rlds.dataset_dir(root, name, version)
    text = draft.draft(place, name, version)
    raw = yaml.safe_load(text)
    with pytest.raises(UserError, match=r"control_hz is '\?'"):
        cards.from_dict(raw, where="draft.yaml")
    raw["control_hz"] = 5
    with pytest.raises(UserError, match=r"gripper is \{'state': '\?', 'action': '\?'\}"):
        cards.from_dict(raw, where="draft.yaml")
    raw["gripper"] = {"state": "open_high", "action": "open_high"}
    with pytest.raises(UserError, match=r"state.dims\[0\].unit is '\?'"):
        cards.from_dict(raw, where="draft.yaml")
    for dim in raw["state"]["dims"] + raw["action"]["dims"]:
        dim.update(unit="1", frame="base", kind="absolute")
    card = cards.from_dict(raw, where="draft.yaml")
    cards.check(card, place)
    if which == "bridge":
        ours = cards.load(name)
        assert card.views["base"] == ours.views["base"] and card.language == ours.language
        assert (len(card.state.dims), len(card.action.dims)) == (7, 7)
    else:
        assert set(card.views.values()) | {"observation/raw_zlib"} == set(odd_rlds.card().views.values())
        assert card.language == ("language",) and "observation/raw_zlib" in text.splitlines()[1]


def test_a_draft_of_odd_descriptions(odd_place, tmp_path):
    """Another split than train, none at all, and an empty list of addresses."""
    place = tmp_path / odd_rlds.NAME / odd_rlds.VERSION
    place.mkdir(parents=True)
    shutil.copy(odd_place.path / "features.json", place)
    for splits, said in (
        ([{"name": "val"}, {"name": "test"}], ["test", "val"]),
        (None, []),
        ([{"name": "train"}, {"name": "val"}], ["train"]),
    ):
        (place / "dataset_info.json").write_text(json.dumps({"splits": splits, "location": {"urls": []}}))
        raw = yaml.safe_load(draft.draft(rlds.dataset_dir(tmp_path, odd_rlds.NAME, odd_rlds.VERSION), odd_rlds.NAME, odd_rlds.VERSION))
        assert raw["splits"] == said and raw["source"] == ""


def test_no_draft_without_actions(tmp_path):
    place = tmp_path / "d" / "1.0.0"
    place.mkdir(parents=True)
    steps = {"sequence": {"feature": {"featuresDict": {"features": {"reward": {"tensor": {"dtype": "float32"}}}}}}}
    (place / "features.json").write_text(json.dumps({"featuresDict": {"features": {"steps": steps}}}))
    (place / "dataset_info.json").write_text(json.dumps({"name": "d", "splits": []}))
    with pytest.raises(UserError, match="has no field called action \\(it has: reward\\)"):
        draft.draft(rlds.dataset_dir(tmp_path, "d", "1.0.0"), "d", "1.0.0")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"language": ["episode:meta/path"]}, "'episode:meta/path' is the episode's; only filters read those"),
        ({"filters": [{"is_true": "language"}]}, "filter is_true: key 'language' is text"),
        (
            {"filters": [{"matches": {"key": "episode:success", "pattern": "x"}}]},
            "filter matches: key 'episode:success' is tensor bool, not text",
        ),
        ({"splits": ["val"]}, "has no split 'val'; it has train"),
    ],
)
def test_what_does_not_fit_is_seen_before_the_scan(change, said, odd_place):
    with pytest.raises(UserError) as e:
        cards.check(odd_rlds.card(**change), odd_place)
    assert said in str(e.value)


@pytest.fixture(scope="module")
def odd_place(tmp_path_factory):
    root = tmp_path_factory.mktemp("odd")
    odd_rlds.record(root)
    return rlds.dataset_dir(root, odd_rlds.NAME, odd_rlds.VERSION)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("features.json", lambda t: t.replace('"float32"', '"float99"'), "is stored in a way that is not read"),
        ("features.json", lambda t: '{"a":' * 100_000 + "1" + "}" * 100_000, "cannot be read as JSON"),
        ("features.json", lambda t: t.replace('"12"', '"1000000000000"'), "numbers"),
        (
            "dataset_info.json",
            lambda t: re.sub(r'"shardLengths": \[[^]]*\]', '"shardLengths": ["-5"]', t),
            "not a list of numbers of episodes",
        ),
        ("dataset_info.json", lambda t: re.sub(r'"shardLengths": \[[^]]*\]', '"shardLengths": 3', t), "not a list of numbers of episodes"),
        ("dataset_info.json", lambda t: re.sub(r'"splits": \[.*\]', '"splits": null', t, flags=re.S), "has no split 'train'"),
        (
            "dataset_info.json",
            lambda t: re.sub(r'"filepathTemplate": "[^"]*"', '"filepathTemplate": 3', t),
            "filepathTemplate of split 'train' is 3",
        ),
    ],
)
def test_odd_descriptions_are_refused(file, change, said, odd_place, tmp_path):
    place = tmp_path / odd_rlds.NAME / odd_rlds.VERSION
    place.mkdir(parents=True)
    for name in ("features.json", "dataset_info.json"):
        text = (odd_place.path / name).read_text()
        changed = change(text) if name == file else text
        assert (changed == text) == (name != file)
        (place / name).write_text(changed)
    with pytest.raises(UserError) as e:
        cards.check(odd_rlds.card(), rlds.dataset_dir(tmp_path, odd_rlds.NAME, odd_rlds.VERSION))
    assert said in str(e.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("datasets: {bridge_dataset: 1, bridge_dataset: 2}", "'bridge_dataset' stands there twice"),
        ("datasets: {1: 1.0}", "dataset 1 is no name"),
        ("datasets: {bridge_dataset: " + "9" * 400 + "}", "it must be a positive number below 1e+12"),
        ("datasets: {bridge_dataset: 1, data/cards/bridge_dataset.yaml: 1}", "bridge_dataset stands there more than once"),
    ],
)
def test_slips_in_a_mixture(text, said, tmp_path):
    (tmp_path / "m.yaml").write_text("name: m\nsource: none\nweight: per_dataset\n" + text)
    with pytest.raises(UserError) as e:
        mixture.load(str(tmp_path / "m.yaml"))
    assert said in str(e.value)


def test_a_card_by_path_is_a_mixture_of_one():
    path = paths.assets("data") / "cards" / "bridge_dataset.yaml"
    assert mixture.load(str(path)) == mixture.load("bridge_dataset")


def test_a_mixture_that_is_no_text(tmp_path):
    (tmp_path / "m.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match="is not valid YAML"):
        mixture.load(str(tmp_path / "m.yaml"))
