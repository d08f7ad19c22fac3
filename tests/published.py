"""Holds the cards against what was published of 69 datasets and against the versions in tensorflow-datasets' rtx module.

`python tests/published.py FEATURES.csv` writes tests/golden/published.json: for every card what it was checked against, and a
digest of the facts that were checked, so that a card that changes afterwards must be checked again.
"""

import csv
import hashlib
import json
import re
import sys
from pathlib import Path

from vla_jax.data import cards
from vla_jax.data.rlds import EPISODE, Feature

GOLDEN = Path(__file__).parent / "golden" / "published.json"
OURS = {f"tabletop_{robot}" for robot in ("arm", "bimanual", "omni", "slider")} | {
    "metaworld_mt50",
    "pusht",
    "robosuite_lift",
}  # recorded here


def rows(path: Path) -> dict[str, dict]:
    with open(path, newline="") as f:
        return {row["name"]: row for row in csv.DictReader(f)}


def split_list(text: str) -> list[str]:
    return [x.strip() for x in text.split(",") if x.strip()]


def features(row: dict) -> dict[str, Feature]:
    """What a row says, as features. Numbers below `observation` have no published width and are left out."""
    out = {}
    for name, h, w, c, dtype in re.findall(r"(\S+): (\d+)x(\d+)x(\d+) (\w+)", row["images"]):
        out[f"observation/{name}"] = Feature("image", dtype, (int(h), int(w), int(c)))
    for where, said in re.findall(r"(step|observation): ([^;]*)", row["language"]):
        for name, dtype, width in re.findall(r"(\w+) \((\w*) (\w+)\)", said):
            key = name if where == "step" else f"observation/{name}"
            shape = (int(width),) if width.isdigit() else ()
            out[key] = Feature("tensor" if dtype in ("float32", "int32") else "text", dtype or "string", shape)
    plain = re.fullmatch(r"(float32|float64|int\d+) (\d+)", row["action"])
    if plain:
        out["action"] = Feature("tensor", plain[1], (int(plain[2]),))
    for name, dtype, width in re.findall(r"([\w/]+) \((\w+) (\w+)\)", row["action"].partition("dict with keys ")[2]):
        out[f"action/{name}"] = Feature("tensor", dtype, (int(width),) if width.isdigit() else ())
    return out


def problems(card: cards.DatasetCard, row: dict) -> list[str]:
    """What a card says otherwise than its dataset's row."""
    out, have = [], features(row)
    if card.version != row["version"]:
        out.append(f"version {card.version}, published {row['version']}")
    splits = re.findall(r"(\w+): \d+ episodes", row["splits"])
    out += [f"split {s} is not one of {splits}" for s in card.splits if s not in splits]
    steps, seen = split_list(row["step_keys"]), split_list(row["observation_keys"])
    for key in card.keys():
        if key.startswith(EPISODE):
            continue
        first, _, rest = key.partition("/")
        if first == "observation":
            if rest not in seen and not any(rest.startswith(f"{s}/") for s in seen):
                out.append(f"{key} is not observed: {seen}")
        elif first not in steps:
            out.append(f"{key} is no key of a step: {steps}")
        elif first == "action" and rest and "dict with keys" in row["action"] and key not in have:
            out.append(f"{key} is not in the action: {row['action']}")
    for view, key in card.views.items():
        if row["images"] and (key not in have or not have[key].is_picture):
            out.append(f"view {view}: {key} is no published RGB picture: {row['images']}")
    unused = [k for k, f in have.items() if f.kind == "image" and f.is_picture and k not in card.views.values()]
    out += [f"picture {k} belongs to no view" for k in unused if k not in LEFT_OUT.get(card.name, ())]
    out += [f"language {k} is not published as text" for k in card.language if k in have and have[k].dtype not in ("string", "int32")]
    whole = {arg for op in card.action.ops for name, arg in op.items() if name == "pick" and isinstance(arg, str)}
    whole |= {key for op in card.action.ops for key in op.get("concat", [])}
    if whole <= set(have):  # a field of unknown width is only known to be long enough
        wide = Feature("tensor", "float32", (64,))
        out += [m for m in cards.misfits(card, {k: have.get(k, wide) for k in card.keys()}) if m.startswith("action")]
    return out


# pictures that are no camera of their own, by what their publishers say
LEFT_OUT = {
    "cmu_franka_exploration_dataset_converted_externally_to_rlds": ("observation/image",),  # highres_image, made small
    "eth_agent_affordances": ("observation/image",),  # all zeros
    "imperialcollege_sawyer_wrist_cam": ("observation/image",),  # a copy of the wrist's
    "io_ai_tech": (),
}


def versions() -> dict[str, str]:
    """{dataset: version} of tensorflow-datasets' rtx module."""
    from tensorflow_datasets.robotics.rtx import rtx

    builders = [b for b in vars(rtx).values() if isinstance(b, type) and b.__module__ == rtx.__name__]
    places = [b.get_relative_dataset_location(None).split("/") for b in builders]
    return {name: version for name, version in places}


def facts(card: cards.DatasetCard) -> str:
    """A digest of what the check looks at."""
    said = [card.version, card.splits, card.views, card.language, card.keys(), card.action.ops, [d.name for d in card.action.dims]]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def checked(path: Path) -> dict[str, dict]:
    table, known, out = rows(path), versions(), {}
    for name in cards.names():
        if name not in OURS:
            row = json.dumps(table[name], sort_keys=True) if name in table else ""
            out[name] = {
                "facts": facts(cards.load(name)),
                "features": hashlib.sha256(row.encode()).hexdigest()[:12] if row else None,
                "rtx": known.get(name),
            }
    return out


if __name__ == "__main__":
    bad = [f"{n}: {p}" for n, row in rows(Path(sys.argv[1])).items() if n in cards.names() for p in problems(cards.load(n), row)]
    bad += [
        f"{n}: {cards.load(n).version}, rtx has {v}" for n, v in versions().items() if n in cards.names() and v != cards.load(n).version
    ]
    print("\n".join(bad) or "all cards agree")
    if not bad:
        GOLDEN.write_text(json.dumps(checked(Path(sys.argv[1])), indent=1) + "\n")
