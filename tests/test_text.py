"""Text models: this project's, and those that a user brings."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_jax import paths
from vla_jax.tokens import sequence, text, text_model
from vla_jax.types import UserError

SPOKEN = "Task: , State: 0123456789-;\nAction: |"


@pytest.mark.parametrize("name", ["default", "tiny"])
@settings(max_examples=100, deadline=None)
@given(words=st.text(st.characters(codec="utf-8", exclude_characters="\x00\u2581"), max_size=40))
def test_any_text_comes_back(name, words):
    """By bytes where a piece is missing; U+2581 is how SentencePiece writes a space."""
    tokenizer = text.load(name)
    ids = tokenizer.encode(words)
    assert tokenizer.decode(ids) == words and tokenizer.unk not in ids


def test_models_are_what_their_script_makes():
    folder = paths.assets("data") / "text"
    for name, model in text_model.models(folder).items():
        assert (folder / name).read_bytes() == model, name
        assert len(model) < 600_000


def test_default_model_has_paligemmas_pieces():
    tokenizer = text.load()
    sp = tokenizer._sp
    assert 8000 <= sp.vocab_size() <= 32000
    assert (tokenizer.pad, tokenizer.eos, tokenizer.bos, tokenizer.unk) == (0, 1, 2, 3)
    tail = [sp.id_to_piece(i) for i in range(sp.vocab_size() - 1152, sp.vocab_size())]
    assert tail == [f"<loc{i:04}>" for i in range(1024)] + [f"<seg{i:03}>" for i in range(128)]
    assert tokenizer.encode("a <loc0007><seg127> b")[2:4] == [sp.vocab_size() - 1152 + 7, sp.vocab_size() - 1]
    tokenizer.check_paligemma(2048, SPOKEN)
    below = [sp.id_to_piece(i) for i in range(sp.vocab_size() - 1152 - 1024, sp.vocab_size() - 1152)]
    assert all(len(p) > 1 and sp.get_score(sp.piece_to_id(p)) <= sp.get_score(sp.piece_to_id(below[0])) for p in below)  # the rarest merges
    with pytest.raises(UserError, match="9000 action ids do not fit"):
        tokenizer.check_paligemma(9000, SPOKEN)
    letters = set(range(sp.vocab_size() - 129 - 2048, sp.vocab_size())) & set(tokenizer.encode(SPOKEN))
    assert not letters


@pytest.mark.parametrize("name", ["default", "tiny"])
def test_instructions_are_short(name):
    """About a token a word, on sentences that the script did not compose."""
    said = (
        "put the carrot on the plate",
        "take the lid off the pot and put it in the sink",
        "open the top drawer",
        "wipe the table with the towel",
    )
    tokens = sum(len(text.load(name).encode(s)) for s in said)
    words = sum(len(s.split()) for s in said)
    assert words <= tokens <= 1.4 * words


def foreign(**options) -> bytes:
    import sentencepiece

    out = io.BytesIO()
    defaults = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "model_type": "unigram", "vocab_size": 90, "hard_vocab_limit": False}
    lines = [f"put the {a} on the {b}" for a in ("cup", "lid", "red block") for b in ("table", "plate", "shelf")]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, minloglevel=2, **(defaults | options))
    return out.getvalue()


def test_a_users_own_model(tmp_path):
    """Gemma-like; then without special pieces, and with others than PaliGemma's."""
    path = tmp_path / "own.model"
    path.write_bytes(foreign())
    own = text.load(str(path))
    assert own.decode(own.encode("put the cup on the shelf")) == "put the cup on the shelf"
    with pytest.raises(UserError, match="1024 of the 1024 pieces"):
        own.check_paligemma(10, "a")
    path.write_bytes(text_model._with_tail(foreign()))
    text.load(str(path)).check_paligemma(10, "put")
    path.write_bytes(text_model._with_tail(foreign(bos_id=1, eos_id=2)))
    with pytest.raises(UserError, match="eos is 2, not 1; bos is 1, not 2"):
        text.load(str(path)).check_paligemma(10, "put")
    with pytest.raises(UserError, match=r"cannot write '0', '1'.*'\\n'.*byte_fallback"):
        own.check_writes("01\n")
    with pytest.raises(UserError, match="cannot write"):
        sequence.Layout(own, None, 4, "none")
    path.write_bytes(foreign(pad_id=-1))
    with pytest.raises(UserError, match="lacks the special pieces pad;.*--pad_id"):
        text.load(str(path))
    path.write_bytes(foreign(pad_id=-1, bos_id=-1))
    with pytest.raises(UserError, match="lacks the special pieces pad, bos"):
        text.load(str(path))


def test_missing_and_broken_text_models(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        text.load(str(tmp_path / "none.model"))
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="no SentencePiece model"):
        text.load(str(tmp_path / "bad.model"))


def test_a_tokenizer_is_not_printed_with_its_file():
    assert repr(text.load("tiny")) == "TextTokenizer()"
