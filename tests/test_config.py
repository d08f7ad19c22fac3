import dataclasses
from pathlib import Path

import pytest

from vla_jax import config, paths
from vla_jax.types import UserError

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = sorted(p.name for p in paths.assets("configs").glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_golden_text_of_resolved_config(name):
    """A changed default shows up in review: rewrite with `vla-jax config --config=configs/NAME > tests/golden/NAME.txt`."""
    text = config.render(*config.load(f"configs/{name}")) + "\n"
    assert text == (GOLDEN / f"{name}.txt").read_text()


def test_origin_of_each_value():
    _, origin = config.load("configs/debug.py:bridge", ["train.steps=3"])
    assert origin["train.steps"] == "command line"
    assert origin["data.image_size"] == "configs/debug.py:bridge"
    assert origin["train.seed"] == "default"


def test_unknown_key_says_which_was_meant():
    with pytest.raises(UserError, match=r"'train.stepss' in the command line. Did you mean 'train.steps'\?"):
        config.load("configs/debug.py", ["train.stepss=3"])


def test_misspelt_key_in_a_file(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("from vla_jax.config import default\ndef get_config(arg=''):\n  c = default()\n  c.train.stepz = 3\n  return c\n")
    with pytest.raises(UserError, match='stepz.*Did you mean "steps"'):
        config.load(str(bad))


def test_what_a_config_file_raises_is_said_without_its_traceback(tmp_path):
    with pytest.raises(UserError) as caught:
        config.load("configs/finetune.py:how=foo")
    assert str(caught.value) == (
        "config configs/finetune.py:how=foo: ValueError: 'how=foo': write how=full|lora|expert|frozen and, if you like, ,mix=true"
    )
    bad = tmp_path / "bad.py"
    bad.write_text(
        "def get_config(arg=''):\n  try:\n    int('x')\n  except ValueError as e:\n    raise TypeError('two\\n  lines') from e\n"
    )
    with pytest.raises(UserError) as caught:
        config.load(str(bad))
    assert str(caught.value) == f"config {bad}: TypeError: two lines"


@pytest.mark.parametrize("item", ["train.steps=many", "train.steps=1.5", "data.views=3", "train.steps"])
def test_wrong_values_are_refused(item):
    with pytest.raises(UserError):
        config.load("configs/debug.py", [item])


def test_frozen_and_typed():
    c, _ = config.load("configs/debug.py", ["data.views=('base','wrist')"])
    assert c.data.views == ("base", "wrist") and isinstance(c.train.lr, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.train.steps = 1


def test_digest_ignores_where_data_lies_but_not_what_is_learned():
    base = config.load("configs/debug.py")[0].digest()
    assert (
        config.load(
            "configs/debug.py", ["data.root=/elsewhere", "train.steps=7", "mesh.data=2", "model.attention=xla", "model.remat=full"]
        )[0].digest()
        == base
    )
    assert config.load("configs/debug.py", ["train.lr=1.0"])[0].digest() != base
    assert config.load("configs/debug.py", ["model.preset=tiny"])[0].digest() != base


def test_round_trip_through_a_dict():
    c, _ = config.load("configs/demo.py")
    assert config.from_dict(dataclasses.asdict(c), where="x") == c
    with pytest.raises(UserError, match="nope"):
        config.from_dict({"train": {"nope": 1}}, where="x")
