"""The published FAST format against a processor built here as it was published: scipy's transform and HF's `tokenizers`."""

import json
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vla_jax.tokens import actions, files, published
from vla_jax.types import UserError

scipy_fft = pytest.importorskip("scipy.fft")
hf = pytest.importorskip("tokenizers")


class Processor:
    """Fit, encode and decode as the released processor does them, text and all."""

    def __init__(self, chunks, *, scale=10, vocab_size=1024):
        dct = [scipy_fft.dct(c, axis=0, norm="ortho").flatten() for c in chunks]
        whole = np.around(np.concatenate(dct) * scale)
        self.scale, self.min_token, self.vocab_size = scale, int(whole.min()), vocab_size
        alphabet = [chr(i) for i in range(int(whole.max()) - self.min_token + 1)]
        self.bpe = hf.ByteLevelBPETokenizer()
        trainer = hf.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=alphabet,
            max_token_length=10000,
        )
        texts = ("".join(chr(int(i)) for i in np.around(c * scale) - self.min_token) for c in dct)
        self.bpe._tokenizer.train_from_iterator(texts, trainer=trainer)

    def whole(self, chunk):
        return np.around(scipy_fft.dct(chunk, axis=0, norm="ortho") * self.scale).flatten()

    def encode(self, chunk):
        text = "".join(map(chr, np.maximum(self.whole(chunk) - self.min_token, 0).astype(int)))
        return self.bpe.encode(text).ids

    def decode(self, ids, steps, dims):
        text = self.bpe.decode(ids)
        whole = np.array(list(map(ord, text))) + self.min_token
        return scipy_fft.idct(whole.reshape(steps, dims) / self.scale, axis=0, norm="ortho")

    def save(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.bpe.save(str(folder / "tokenizer.json"))
        settings = {
            "scale": self.scale,
            "vocab_size": self.vocab_size,
            "min_token": self.min_token,
            "time_horizon": None,
            "action_dim": None,
        }
        (folder / "processor_config.json").write_text(json.dumps(settings))
        return folder


def bridge(real_data, seconds, *, held_out):
    """Normalised chunks of the real sample."""
    from vla_jax import config
    from vla_jax.data import source

    c = config.load(
        "configs/debug.py:bridge",
        [
            f"data.root={real_data}",
            f"data.chunk_s={seconds}",
            "tokens.action=bins",
            "tokens.action_vocab=256",
            "pack.length=2048",
            "pack.targets=512",
        ],
    )[0]
    opened = source.open_source(c, tokens_per_image=36)
    opened = opened.held_out() if held_out else opened
    return opened.chunks(0, opened.frames[0].spread(10_000))[0]


@pytest.fixture(scope="module")
def processor(real_data, tmp_path_factory):
    made = Processor(bridge(real_data, 1.0, held_out=False))
    return made, made.save(tmp_path_factory.mktemp("fast"))


def sure(processor, chunk):
    """Whether no coefficient lies so near the middle between two numbers that float32 and float64 may round it differently, and
    whether the processor loses none: above the range it was fitted on it drops them."""
    exact = actions.dct_matrix(len(chunk)) @ chunk.astype(np.float64) * processor.scale
    return bool((np.abs(exact % 1 - 0.5) > 1e-4).all())


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ids_equal_the_processors_on_real_actions(processor, real_data, held_out, dtype):
    theirs, folder = processor
    ours = files.load(folder)
    chunks = bridge(real_data, 1.0, held_out=held_out).astype(dtype)
    same = 0
    for chunk, ids in zip(chunks, ours.encode_batch(chunks)):
        whole = theirs.whole(chunk)
        lost = (whole - theirs.min_token > ours.max_coef - ours.min_coef).any()
        assert ours.decode(ids, steps=5, dims=7)[1]
        if not lost and sure(theirs, chunk):
            assert ids.tolist() == theirs.encode(chunk)
            np.testing.assert_allclose(ours.decode(ids, steps=5, dims=7)[0], theirs.decode(ids.tolist(), 5, 7), atol=1e-5)
            same += 1
    assert same > 0.7 * len(chunks)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Fitted on numbers of every size, so that its characters go up to U+07FF."""
    rng = np.random.default_rng(0)
    made = Processor([rng.normal(size=(4, 3)) * 10 ** rng.uniform(-2, 1.3) for _ in range(3000)], scale=10, vocab_size=3000)
    return made, made.save(tmp_path_factory.mktemp("wide"))


@pytest.mark.parametrize("which", ["processor", "wide"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31))
def test_ids_equal_the_processors_on_any_coefficients(request, which, seed):
    """Control characters, spaces, digits and letters of Latin, Greek, Cyrillic and Hebrew, whatever a coefficient's number stands for."""
    theirs, folder = request.getfixturevalue(which)
    ours, rng = published.load(folder), np.random.default_rng(seed)
    able = np.flatnonzero(ours.writable)  # those of the others are dropped by the processor, and here rounded to these
    assert able[-1] > (1000 if which == "wide" else 50)
    near, any_of = rng.integers(len(able)) + rng.integers(-2, 3, (4, 9)), rng.integers(len(able), size=(4, 9))
    chars = able[np.clip(np.where(rng.random((4, 9)) < 0.5, near, any_of), 0, len(able) - 1)]
    chunk = actions.dct_matrix(4).T @ ((chars + ours.min_coef) / ours.scale)
    assert ours.clamps(chunk[None]) == (0, 0)
    assert ours.encode(chunk).tolist() == theirs.bpe.encode("".join(map(chr, chars.reshape(-1)))).ids


def test_words_equal_the_patterns_of_tokenizers():
    """How GPT-2's pattern cuts any text of these characters: each by itself, and many beside each other."""
    cut = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    kinds = [published._kind(chr(c)) for c in range(0x800)]
    rng, tries = np.random.default_rng(0), [[c, d, 0x41] for c in range(0x800) for d in (c, 0x20)]
    tries += [rng.choice([*b"'strevmld \t\n ,.0aZ", 0xA0, 0x85, 0x1C, 0x1F, 0xB2, 0x2B0, 0x300, 0x660], 30).tolist() for _ in range(500)]
    tries += [rng.integers(0, 0x800, 60).tolist() for _ in range(500)]
    for chars in tries:
        want = [span for _, span in cut.pre_tokenize_str("".join(map(chr, chars)))]
        assert [m.span() for m in published._WORDS.finditer("".join(kinds[c] for c in chars))] == want, chars


def test_what_the_processor_loses_is_kept(processor):
    """Above the range of its fit the processor drops coefficients, so that its own decode fails; below it, it raises them, as here."""
    theirs, folder = processor
    ours = published.load(folder)
    chunk = np.zeros((5, 7))
    chunk[:, 2] = (ours.max_coef + 40) / ours.scale / np.sqrt(5)
    with pytest.raises(ValueError):
        theirs.decode(theirs.encode(chunk), 5, 7)
    back, valid = ours.decode(ours.encode(chunk), steps=5, dims=7)
    assert valid and ours.clamps(chunk[None]) == (0, 1)
    np.testing.assert_allclose(back[:, 2], ours.max_coef / ours.scale / np.sqrt(5), atol=1e-5)
    low = -chunk * 10
    assert ours.clamps(low[None]) == (1, 0) and ours.encode(low).tolist() == theirs.encode(low)


def test_malformed_ids(processor):
    _, folder = processor
    ours = published.load(folder)
    ids = ours.encode(np.random.default_rng(0).uniform(-0.5, 0.5, (5, 7)))
    good = ours.decode(ids, steps=5, dims=7)[0]
    for bad in (ids[:-1], np.append(ids, ids[:1]), np.append(ids, ours.vocab_size), np.insert(ids, 2, -1), []):
        back, valid = ours.decode(bad, steps=5, dims=7)
        assert not valid and back.shape == (5, 7)
        with pytest.raises(actions.MalformedTokens):
            ours.decode(bad, steps=5, dims=7, malformed="raise")
    assert np.array_equal(ours.decode(np.insert(ids, 0, -1), steps=5, dims=7)[0], good)
    both = np.arange(14).reshape(2, 7) / 20
    held, _ = ours.decode_batch([ids[:-1], ids[:0]], steps=5, dims=7, malformed="hold", last=both)
    assert np.allclose(held, np.repeat(both[:, None], 5, axis=1))
    two = np.flatnonzero([len(raw) == 1 and raw[0] >= 0xC2 for raw in ours._bytes])  # the first byte of a character, alone
    assert not ours.decode(np.insert(ids, 0, two[0]), steps=5, dims=7)[1]


def test_a_character_beyond_all_coefficients_moves_no_robot():
    """Three bytes are one character above U+07FF: passed over by repair, invalid, and nothing that the grammar allows."""
    letter = {byte: char for char, byte in published._byte_alphabet().items()}
    ours = small([letter[b] for b in range(256)], min_coef=-60)
    ids = ours.encode(np.random.default_rng(0).uniform(-1, 1, (3, 2)))
    good, valid = ours.decode(ids, steps=3, dims=2)
    assert valid and np.abs(good).max() < 1.2
    back, valid = ours.decode(np.insert(ids, 0, [0xEF, 0xBF, 0xBD]), steps=3, dims=2)
    assert not valid and np.array_equal(back, good)
    alone = [0xEF, 0xBF, 0xBD]  # one character, and one number wanted
    assert not ours.decode(alone, steps=1, dims=1)[1] and not ours.grammar.accepts(alone, 1)
    assert ours.encode_batch(np.zeros((0, 3, 2))) == []


def test_golden_vector_as_far_as_it_goes_without_the_released_file(tmp_path):
    """Scale 10, min_token -354, H4 D2: coefficients 6 8 -4 0 0 0 0 0 are characters 360 362 350 354 .., two bytes each, one word of
    letters, published as [294, 1239, 258, 256]: here with the smallest vocabulary that has those ids for these pieces. The
    released file is used where VLA_FAST names its folder."""
    chunk = scipy_fft.idct(np.array([[6, 8], [-4, 0], [0, 0], [0, 0]]) / 10, axis=0, norm="ortho")
    if "VLA_FAST" in os.environ:
        assert published.load(os.environ["VLA_FAST"]).encode(chunk).tolist() == [294, 1239, 258, 256]
    letter = {byte: char for char, byte in published._byte_alphabet().items()}
    spelt = lambda *chars: "".join(letter[b] for c in chars for b in chr(c).encode())
    vocab = {char: i for i, char in enumerate(published._byte_alphabet())}
    zero, six, eight, minus = spelt(354), spelt(360), spelt(362), spelt(350)
    for piece, i in ((zero, 256), (zero * 2, 257), (zero * 4, 258), (six, 294), (eight, 300), (minus, 301), (eight + minus, 1239)):
        vocab[piece] = i
    names = {i: piece for piece, i in vocab.items()}
    vocab = {names.get(i, f"\u3000{i}"): i for i in range(1240)}
    merges = [tuple(zero), (zero, zero), (zero * 2, zero * 2), tuple(six), tuple(eight), tuple(minus), (eight, minus)]
    model = hf.Tokenizer(hf.models.BPE(vocab=vocab, merges=merges))
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "processor_config.json").write_text(json.dumps({"scale": 10, "vocab_size": 2048, "min_token": -354}))
    ours = files.load(tmp_path)
    assert actions.coefficients(chunk[None], 10)[0].tolist() == [6, 8, -4, 0, 0, 0, 0, 0]
    assert (
        ours.encode(chunk).tolist()
        == model.encode("".join(map(chr, (360, 362, 350, 354, 354, 354, 354, 354)))).ids
        == [294, 1239, 258, 256]
    )
    np.testing.assert_allclose(ours.decode([294, 1239, 258, 256], steps=4, dims=2)[0], chunk, atol=1e-6)


def test_without_gpt2s_pattern_and_with_merges_as_text(processor, tmp_path):
    """`use_regex` off, and merges written "a b" as older files do: still HF's ids."""
    theirs, folder = processor
    values = json.loads((folder / "tokenizer.json").read_text())
    values["pre_tokenizer"]["use_regex"] = False
    values["model"]["merges"] = [" ".join(m) if not isinstance(m, str) else m for m in values["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    (tmp_path / "processor_config.json").write_bytes((folder / "processor_config.json").read_bytes())
    ours, other = files.load(tmp_path), hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    able, rng = np.flatnonzero(ours.writable), np.random.default_rng(0)
    for _ in range(50):
        chars = able[rng.integers(len(able), size=(4, 9))]
        chunk = actions.dct_matrix(4).T @ ((chars + ours.min_coef) / ours.scale)
        assert ours.encode(chunk).tolist() == other.encode("".join(map(chr, chars.reshape(-1)))).ids
    made = {words: small(["A", "!", "A!"], [("A", "!")], min_coef=0, words=words) for words in (True, False)}
    chunk = np.array([[ord("A"), ord("!")]]) / 10
    assert made[True].encode(chunk).tolist() == [0, 1] and made[False].encode(chunk).tolist() == [2]


def small(pieces, merges=(), **options):
    body = {"scale": 10.0, "min_coef": -5, "pieces": pieces, "merges": merges, "words": False} | options
    return published.from_json(body, "here")


def test_vocabularies_that_no_sampler_could_finish():
    letter = {byte: char for char, byte in published._byte_alphabet().items()}
    with pytest.raises(UserError, match="cannot finish"):
        small(["AA", "A", letter[0xC2]])  # begins a character that nothing ends
    with pytest.raises(UserError, match="cannot finish"):
        small(["\u3000"])
    with pytest.raises(UserError, match="no single bytes"):
        small([letter[0xC2] + letter[0xA9]])
    with pytest.raises(UserError, match="stand there twice"):
        small(["A", "A"])
    assert small(["A", letter[0xC2], letter[0xA9]]).max_coef == 0xA9 - 5


def test_saved_as_one_file(processor, tmp_path):
    _, folder = processor
    ours = files.load(folder)
    files.save(ours, tmp_path / "one.json")
    assert files.load(tmp_path / "one.json") == ours and (tmp_path / "one.json").stat().st_size < 100_000


def test_files_that_are_something_else(processor, tmp_path):
    _, folder = processor
    tokenizer, settings = (json.loads((folder / f"{n}.json").read_text()) for n in ("tokenizer", "processor_config"))

    def refused(match, *, t=tokenizer, s=settings):
        (tmp_path / "tokenizer.json").write_text(json.dumps(t))
        (tmp_path / "processor_config.json").write_text(json.dumps(s))
        with pytest.raises(UserError, match=match):
            files.load(tmp_path)

    refused("lacks scale, min_token", s={"vocab_size": 3})
    refused("holds no JSON object", s=[1])
    refused("model.type = 'WordPiece'", t={**tokenizer, "model": {"type": "WordPiece"}})
    refused("pre_tokenizer = .*Whitespace", t={**tokenizer, "pre_tokenizer": {"type": "Whitespace"}})
    refused("normalizer is not null", t={**tokenizer, "normalizer": {"type": "NFC"}})
    model = tokenizer["model"]
    refused("ignore_merges", t={**tokenizer, "model": {**model, "ignore_merges": True}})
    refused("merges name", t={**tokenizer, "model": {**model, "merges": [["zz", "y"]]}})
    refused("ids have gaps", t={**tokenizer, "model": {**model, "vocab": {"a": 0, "b": 5}}})
    refused("damaged", t={**tokenizer, "model": {**model, "merges": [3]}})
    refused("merges name", t={**tokenizer, "model": {**model, "merges": ["zz y"]}})  # as older files write them
    for odd in (
        {"post_processor": {"type": "TemplateProcessing"}},
        {"added_tokens": [{"id": 0}]},
        {"model": [1]},
        {"model": "BPE"},
        {"pre_tokenizer": [1]},
    ):
        refused("post_processor|added_tokens|damaged", t={**tokenizer, **odd})
    for key in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "dropout", "byte_fallback", "fuse_unk"):
        refused(f"model.{key}", t={**tokenizer, "model": {**model, key: True}})
    refused("pre_tokenizer", t={**tokenizer, "pre_tokenizer": {**tokenizer["pre_tokenizer"], "add_prefix_space": True}})
    refused("says vocab_size 5", s={**settings, "vocab_size": 5})
    for odd in (-1, 1e-9, float("inf"), 10**400):
        refused("scale|damaged", s={**settings, "scale": odd})
    for odd in (-354.7, float("inf"), 10**12):
        refused("whole number|no tokenizer's", s={**settings, "min_token": odd})
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json cannot be read"):
        files.load(tmp_path)
