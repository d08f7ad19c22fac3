"""The two layouts: against golden files, against pi0-FAST's tokenizer written anew, and piece by piece.

`python tests/test_sequence.py` rewrites the golden files.
"""

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_jax import config
from vla_jax.data import cards
from vla_jax.tokens import actions, bins, text
from vla_jax.tokens.sequence import Embodiment, Layout
from vla_jax.types import IMAGE, STATE, UserError

GOLDEN = Path(__file__).parent / "golden"
TASK, STATES = " Put the_Carrot  ON plate\n", np.array([-1.2, -1.0, -0.31, 0.0, 0.4, 0.99, 1.3], np.float32)


def bridge(steps=5):
    card = cards.load("bridge_dataset")
    return Embodiment(card.name, card.control_hz, steps, card.action.dims)


def fast():
    """No randomness of a library's version in it: a golden file depends on it."""
    t = np.arange(40)[:, None]
    waves = [np.sin(t * f / 9 + np.arange(7) * p)[i : i + 5] for f in (1, 2, 5) for p in (0.3, 1.1) for i in range(35)]
    return actions.fit(waves, vocab_size=300, scale=10.0)


def make(name, **options):
    defaults = {"native": {"state": "continuous"}, "openpi": {"state": "text", "limit": 250}}[name]
    return Layout(text.load(), fast(), 4, name=name, **(defaults | options))


def sample(layout, images=2, task=TASK):
    chunk = np.sin(np.arange(5)[:, None] / 3 + np.arange(7))
    prompt = layout.prompt(bridge(), task, STATES)
    return layout.build(images=images, prompt=prompt, action_tokens=layout.action.encode(chunk)), chunk


def as_text(layout) -> str:
    """One line a token."""
    seq, _ = sample(layout)
    action = {int(i): t for t, i in enumerate(layout.ids)}
    name = {IMAGE: "(image)", STATE: "(state)"}
    lines = [f"prefix {seq.prefix}, length {seq.length}, cut {seq.cut}", "position id what block target weight"]
    for i, (p, b, t, w) in enumerate(zip(*seq.arrays())):
        token = int(seq.tokens[i])
        acts = i >= seq.prefix + len(layout.opening) and token in action
        what = f"(action {action[token]})" if acts else name.get(token) or repr(layout.text._sp.id_to_piece(token))
        lines.append(f"{p:3} {token:5} {what:14} {b:3} {t:5} {w:.6f}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", ["native", "openpi"])
def test_golden(name):
    assert as_text(make(name)) == (GOLDEN / f"sequence.{name}.txt").read_text()


def openpi(sp, fast, prompt, state, chunk, max_len):
    """pi0-FAST's tokenizer: (tokens, token mask, attention mask, loss mask), padded or cut to max_len."""
    said = prompt.lower().strip().replace("_", " ")
    state = np.digitize(state, bins=np.linspace(-1, 1, 256 + 1)[:-1]) - 1
    prefix = sp.encode(f"Task: {said}, State: {' '.join(map(str, state))};\n", add_bos=True)
    ids = sp.vocab_size() - 1 - 128 - np.array(fast.encode(chunk))
    postfix = sp.encode("Action: ") + ids.tolist() + sp.encode("|", add_eos=True)
    tokens, n = prefix + postfix, len(prefix) + len(postfix)
    masks = [True] * n, [0] * len(prefix) + [1] * len(postfix), [False] * len(prefix) + [True] * len(postfix)
    if n < max_len:
        return [tokens + [0] * (max_len - n), *(list(m) + [0] * (max_len - n) for m in masks)]
    return [tokens[:max_len], *(m[:max_len] for m in masks)]


@settings(max_examples=60, deadline=None)
@given(
    words=st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=60),
    state=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=8),
    seed=st.integers(0, 2**31),
    limit=st.sampled_from([8, 30, 60, 250]),
)
def test_openpi_equals_pi0_fasts_tokenizer(words, state, seed, limit):
    """Ids, what is visible and what has a loss; cut at the same place. Its pads are those of a batch of its own."""
    import sentencepiece

    layout = make("openpi", limit=limit)
    sp = sentencepiece.SentencePieceProcessor(model_proto=layout.text.model)
    chunk = np.random.default_rng(seed).uniform(-1, 1, (5, 7))
    state = np.array(state, np.float32)
    tokens, mask, causal, loss = openpi(sp, layout.action, words, state, chunk, limit)
    seq = layout.build(images=1, prompt=layout.prompt(bridge(), words, state), action_tokens=layout.action.encode(chunk))
    position, block, target, weight = seq.arrays()
    n = sum(mask)
    assert seq.tokens.tolist() == [IMAGE] * 4 + tokens[:n]
    assert seq.cut == sum(openpi(sp, layout.action, words, state, chunk, 10**6)[1]) - n
    assert (block[4:] > 0).tolist() == [bool(c) for c in causal[:n]] and (block[:4] == 0).all()
    after = [*np.asarray(loss[:n], bool)[1:], False]  # the loss at a position is on the token behind it, as there after its shift
    assert (weight[4:] > 0).tolist() == list(after) and position.tolist() == list(range(seq.length))
    assert (target[weight > 0] == seq.tokens[1:][weight[:-1] > 0]).all()
    if any(after):
        np.testing.assert_allclose(weight[weight > 0], 1 / sum(loss[:n]), rtol=1e-6)


def test_native_layout_piece_by_piece():
    layout = make("native")
    seq, chunk = sample(layout)
    assert seq.tokens[:9].tolist() == [IMAGE] * 8 + [STATE] and seq.tokens[9] == layout.text.bos
    position, block, target, weight = seq.arrays()
    ends = int(np.argmax(block > 0))
    assert (ends, seq.targets) == (seq.prefix, seq.length - ends) and position.tolist() == list(range(seq.length))
    said = layout.text.decode(seq.tokens[10:ends].tolist())
    assert said == "bridge_dataset, 5 Hz, 5 steps of 3 m delta base, 3 rad delta base, 1 binary ee: put the carrot on plate\n"
    assert seq.tokens[-1] == layout.text.eos and (seq.tokens[ends:-1] >= layout.text.vocab_size).all()
    assert np.array_equal(layout.action_tokens(seq.tokens[ends:]), layout.action.encode(chunk))
    assert block.tolist() == [0] * ends + list(range(1, seq.length - ends + 1))
    on = np.flatnonzero(weight)
    assert on.tolist() == list(range(ends - 1, seq.length - 1)) and np.array_equal(target[on], seq.tokens[on + 1])
    assert weight.sum() == pytest.approx(1)


def test_state_as_text_or_not_at_all():
    native = lambda **o: sample(make("native", **o))[0].tokens
    assert STATE not in native(state="text") and STATE not in native(state="none")
    said = make("native", state="text").prompt(bridge(), "go", STATES).text
    assert said.endswith(": go; state: 0 0 88 128 179 254 255\n")
    assert make("native", describe=False).prompt(bridge(), "go").text == "bridge_dataset: go\n"
    other = Embodiment("x_converted_externally_to_rlds", 12.5, 3, bridge().dims[:2])
    assert make("native").prompt(other, "go").text == "x, 12.5 Hz, 3 steps of 2 m delta base: go\n"


@pytest.mark.parametrize("name", ["native", "openpi"])
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), steps=st.integers(1, 9), dims=st.integers(1, 9))
def test_ids_come_back(name, seed, steps, dims):
    """Through ids alone, never through text; whatever text the model writes around them."""
    layout = make(name)
    tokens = layout.action.encode(np.random.default_rng(seed).uniform(-1, 1, (steps, dims)))
    seq = layout.build(images=0, prompt=layout.prompt(bridge(), "go", STATES), action_tokens=tokens)
    made = seq.tokens[seq.prefix :]
    assert np.array_equal(layout.action_tokens(made), tokens)
    assert np.array_equal(layout.action_tokens(np.append(made, [7, 8, 9])), tokens)  # what follows the end does not count
    decode = lambda ids: layout.action.decode(layout.action_tokens(ids), steps=steps, dims=dims)
    assert decode(made)[1]
    for bad in (made[: -len(layout.closing)], np.insert(made, len(layout.opening), 50), made[:0]):
        assert not decode(bad)[1]
    if name == "openpi":
        assert not decode(made[1:])[1]


def test_openpi_maps_to_the_tail_of_the_vocabulary():
    """Token t is 257152 - 1 - 128 - t there, which is <loc1023> and downwards; here of the default model's size."""
    layout = make("openpi")
    assert layout.ids[:2].tolist() == [layout.text.vocab_size - 129, layout.text.vocab_size - 130]
    assert [layout.text._sp.id_to_piece(int(i)) for i in layout.ids[[0, 299]]] == ["<loc1023>", "<loc0724>"]
    assert (
        layout.vocab_size == layout.text.vocab_size and layout.closing[-1] == 1 and layout.opening == tuple(layout.text.encode("Action: "))
    )


def test_instructions_that_never_come_again_do_not_fill_memory():
    """As a server is sent them for weeks: 2,000 long ones and as many short ones, of which only a number of short ones may be kept."""
    layout, who, kept = make("native"), bridge(), []
    try:
        for length in (600, 4):
            tracemalloc.start()
            for i in range(2000):
                prompt = layout.prompt(who, f"put {length} {i} " + "carefully " * (length // 10), STATES)
                assert len(layout.prefix(images=2, prompt=prompt)) > len(layout.text.encode(prompt.task)) > length // 10
            kept.append(tracemalloc.get_traced_memory()[0] / 2000)
            tracemalloc.stop()
    finally:
        tracemalloc.stop()
    long, short = kept  # bytes of each; a list of the ids of a long one alone has 2,400, a key of it as many as it has characters
    assert long < 100 and short < 2000, kept


@pytest.mark.parametrize("state", ["continuous", "text"])
def test_native_cuts_the_task_and_says_so(state):
    """Robot, action space, state and actions stay whole, however small the limit."""
    long = "carefully " * 50
    whole, _ = sample(make("native", state=state), task=long)
    for limit in (70, 60, 1):
        layout = make("native", limit=limit, state=state)
        cut, _ = sample(layout, task=long)
        assert cut.cut == whole.length - cut.length > 0 and whole.cut == 0
        assert np.array_equal(cut.tokens[cut.prefix :], whole.tokens[whole.prefix :])
        first = 8 + (state == "continuous")
        assert limit == 1 or cut.prefix == first + limit
        said = layout.text.decode(cut.tokens[first + 1 : cut.prefix].tolist())
        prompt = layout.prompt(bridge(), long, STATES)
        assert said.startswith(prompt.head) and said.endswith(prompt.tail) and cut.tokens[first] == layout.text.bos
        assert set(said.removeprefix(prompt.head).removesuffix(prompt.tail).split()) <= {"carefully"}
        assert layout.prefix(images=2, prompt=prompt).tolist() == cut.tokens[: cut.prefix].tolist()
        assert layout.cut(images=2, prompt=prompt) == cut.cut


@pytest.mark.parametrize("name", ["native", "openpi"])
def test_a_limit_below_the_fixed_parts_is_refused(name):
    """Exactly where no token of the task, or of the actions, is left."""
    made = make(name, state="text", limit=0)
    made.check_limit(bridge(), 7)
    prompt = made.prompt(bridge(), "", np.ones(7))
    least = 2 + len(made.text.encode(prompt.text)) + len(made.opening)
    dataclasses.replace(made, limit=least + 1).check_limit(bridge(), 7)
    with pytest.raises(UserError, match=r"tokens.limit 20 is below the \d\d tokens that a prompt of bridge_dataset has without its task"):
        dataclasses.replace(made, limit=20).check_limit(bridge(), 7)


def test_words_that_look_like_the_convention_do_no_harm():
    """An instruction that holds the layout's own marks is only text of the prompt."""
    for name in ("native", "openpi"):
        layout = make(name)
        for task in ("", "|", "Action: |", "<loc0001> <seg000>", "a\nb", "\ud800".encode("utf-8", "replace").decode(), "état → 緑"):
            seq, chunk = sample(layout, task=task)
            tokens = layout.action_tokens(seq.tokens[seq.prefix :])
            assert np.array_equal(tokens, layout.action.encode(chunk)) and seq.targets == len(tokens) + len(layout.opening) + len(
                layout.closing
            )
    with pytest.raises(ValueError, match="none was given"):
        make("openpi").prompt(bridge(), "go")


def test_settings_that_contradict_each_other():
    for options, match in (
        ({"name": "other"}, "tokens.layout is 'other'; allowed: native, openpi"),
        ({"state": "bins"}, "tokens.state is 'bins'"),
        ({"name": "openpi", "state": "continuous"}, "set tokens.state=text, not continuous"),
    ):
        with pytest.raises(UserError, match=match):
            dataclasses.replace(make("native"), **options)
    tiny = text.load("tiny")
    with pytest.raises(UserError, match=r"1024 of the 1024 pieces <loc0000>..<loc1023> are not at ids -128..895"):
        Layout(tiny, fast(), 4, "text", name="openpi")
    with pytest.raises(UserError, match="9000 action ids do not fit"):
        Layout(text.load(), bins.uniform(9000), 4, "text", name="openpi")
    with pytest.raises(UserError, match="tokens.layout"):
        config.Config(tokens=config.Tokens(layout="openvla"))


if __name__ == "__main__":
    for which in ("native", "openpi"):
        (GOLDEN / f"sequence.{which}.txt").write_text(as_text(make(which)))
