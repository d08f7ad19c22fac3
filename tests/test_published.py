"""Cards and mixtures are checked against what was published, not recalled."""

import copy
import dataclasses
import json
import os
import re
from pathlib import Path

import published
import pytest

from vla_jax.data import cards, mixture

RECORDED = json.loads(published.GOLDEN.read_text())
OTHERS = [n for n in cards.names() if n not in published.OURS]


@pytest.fixture(scope="module")
def oxe() -> Path:
    folder = Path(os.environ.get("VLA_OXE") or Path(__file__).resolve().parent.parent.parent / "shared" / "oxe")
    if not (folder / "published_features.csv").is_file():
        pytest.skip(f"the published features are not at {folder}; set VLA_OXE to the folder that holds published_features.csv")
    return folder


@pytest.mark.parametrize("name", OTHERS)
def test_card_is_the_one_that_was_checked(name):
    """A card whose facts changed since: run `python tests/published.py FEATURES.csv`, which checks and records."""
    assert RECORDED[name]["facts"] == published.facts(cards.load(name))


def test_how_many_were_checked(oxe):
    assert len(OTHERS) == len(RECORDED) >= 55 and sum(r["features"] is not None for r in RECORDED.values()) >= 55
    assert published.checked(oxe / "published_features.csv") == RECORDED


def test_every_card_agrees_with_the_published_features(oxe):
    table = published.rows(oxe / "published_features.csv")
    found = {n: published.problems(cards.load(n), table[n]) for n in OTHERS if n in table}
    assert len(found) >= 55 and not any(found.values()), {n: p for n, p in found.items() if p}


def test_versions_are_those_of_tensorflow_datasets():
    pytest.importorskip("tensorflow_datasets")
    known = published.versions()
    both = [n for n in OTHERS if n in known]
    assert len(both) >= 50 and {n: known[n] for n in both} == {n: cards.load(n).version for n in both}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "9.9.9"}, "version 9.9.9, published 0.1.0"),
        ({"views": {"base": "observation/rgb"}}, "observation/rgb is not observed"),
        ({"views": {}}, "picture observation/image belongs to no view"),
        ({"language": ("instruction",)}, "instruction is no key of a step"),
        ({"splits": ("val",)}, "split val is not one of"),
    ],
)
def test_the_check_sees_what_is_wrong(oxe, change, said):
    row = published.rows(oxe / "published_features.csv")["berkeley_fanuc_manipulation"]
    card = cards.load("berkeley_fanuc_manipulation")
    assert not published.problems(card, row)
    assert any(said in p for p in published.problems(dataclasses.replace(card, **change), row))
    longer = copy.deepcopy(card.action.ops) + ({"pick": {"key": "action", "dims": [6]}},)  # the action has six numbers
    assert any("action" in p for p in published.problems(dataclasses.replace(card, action=cards.Spec(longer, card.action.dims)), row))


def test_grippers_are_turned_to_one_is_open():
    """Where the card says that an action counts the other way round, its ops turn it; where not, they do not."""
    for name in cards.names():
        card = cards.load(name)
        for part, spec in (("state", card.state), ("action", card.action)):
            grippers = [d.name for d in spec.dims if "gripper" in d.name]
            ops = [next(iter(op)) for op in spec.ops]
            negative = any(op.get("scale", {}).get("by", 1) < 0 for op in spec.ops)
            if card.gripper[part] == "none":
                assert not grippers, (name, part)
            if card.gripper[part] == "closed_high" and grippers:
                assert "invert" in ops or "accumulate" in ops or negative, (name, part)
            if card.gripper[part] == "open_high":
                assert "invert" not in ops and "accumulate" not in ops, (name, part)


def test_exchanged_colours_are_those_that_peers_undo():
    """The script that prepares Open X-Embodiment for Octo and OpenVLA flips the channels of these, and fmb's authors say that of theirs."""
    both = ("base", "wrist")
    want = {"berkeley_autolab_ur5": ("wrist",), "berkeley_fanuc_manipulation": both, "utaustin_mutex": both}
    want |= {"stanford_hydra_dataset_converted_externally_to_rlds": both, "fmb": ("base", "side", "wrist", "wrist_right")}
    assert {n: cards.load(n).bgr for n in cards.names() if cards.load(n).bgr} == want


def test_published_weights(oxe):
    """The list that came with the features against our file of Octo's mixture."""
    text = (oxe / "README.md").read_text()
    listed = re.search(r"\(weight times dataset size\): (.*?)\. OpenVLA's", text, re.S)[1]
    want = {name: float(weight) for name, weight in re.findall(r"(\w+) ([\d.]+)(?:\s*\(\*\))?(?:,|$)", " ".join(listed.split()))}
    octo = mixture.load("octo_oxe_magic_soup")
    short = lambda name: re.sub(r"(_dataset)?_converted_externally_to_rlds|(_dataset)?_surprising_effectiveness", "", name).removesuffix(
        "_dataset"
    )
    ours = {short(c.name): w for c, w in zip(octo.cards, octo.weights)}
    theirs = {short(n): w for n, w in want.items()}
    assert octo.weight == "times_size" and len(ours) == 25 and ours == theirs
    vla = mixture.load("openvla_magic_soup")
    left_out = {n for n in ours if n not in {short(c.name) for c in vla.cards}}
    assert left_out == {"nyu_door_opening", "bc_z"}
    plus = mixture.load("openvla_magic_soup_plus")
    weights = {c.name: w for c, w in zip(plus.cards, plus.weights)}
    assert {n: weights[n] for n in ("bc_z", "fmb", "dobbe", "droid")} == {"bc_z": 0.2, "fmb": 1, "dobbe": 0.2, "droid": 0.06}
    minus, short_of = mixture.load("openvla_magic_soup_plus_minus"), {"language_table", "droid"}
    changed = {c.name: w for c, w in zip(minus.cards, minus.weights)}
    assert changed == {n: w for n, w in weights.items() if n not in short_of} | {"fractal20220817_data": 1.0}
    rtx, franka = ({c.name: w for c, w in zip(m.cards, m.weights)} for m in map(mixture.load, ("rtx", "rtx_franka")))
    assert len(rtx) == 11 and len(franka) == 25 and rtx.items() <= franka.items()
