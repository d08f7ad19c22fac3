import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_jax.tokens import actions, text
from vla_jax.tokens.sequence import Layout
from vla_jax.types import IMAGE, STATE, UserError


@pytest.fixture(scope="module")
def layout():
    rng = np.random.default_rng(0)
    return Layout(text.load(), actions.fit([rng.uniform(-1, 1, (5, 3)) for _ in range(50)], vocab_size=128, scale=10.0), 4, True)


def test_native_layout_piece_by_piece(layout):
    chunk = np.random.default_rng(1).uniform(-1, 1, (5, 3))
    seq = layout.build(images=2, prompt=layout.prompt("bridge_dataset", " Put the_cup  DOWN "), action_tokens=layout.action.encode(chunk))
    assert seq.tokens[:9].tolist() == [IMAGE] * 8 + [STATE] and seq.tokens[9] == layout.text.bos
    block, target, weight = seq.arrays()
    ends = int(np.argmax(block > 0))
    assert (ends, seq.targets) == (seq.prefix, seq.length - ends)
    assert layout.text.decode(seq.tokens[10:ends].tolist()) == "bridge_dataset: put the cup down\n"
    assert seq.tokens[-1] == layout.text.eos
    assert np.array_equal(layout.action_ids(seq.tokens[ends:]), layout.action.encode(chunk))
    assert block.tolist() == [0] * ends + list(range(1, seq.length - ends + 1))
    on = np.flatnonzero(weight)
    assert on.tolist() == list(range(ends - 1, seq.length - 1)) and np.array_equal(target[on], seq.tokens[on + 1])
    assert weight.sum() == pytest.approx(1)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40).filter(lambda t: "\x00" not in t))
def test_text_round_trip(words):
    tokenizer = text.load()
    assert tokenizer.decode(tokenizer.encode(words)) == words.replace("\u2581", " ")


def test_missing_and_broken_text_models(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        text.load(str(tmp_path / "none.model"))
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="no SentencePiece model"):
        text.load(str(tmp_path / "bad.model"))


def test_default_text_model_is_what_its_script_makes():
    assert text.train_default() == text.load().model
