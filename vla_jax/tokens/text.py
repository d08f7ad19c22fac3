"""Text tokens: a SentencePiece model, the default one of this project or a user's own (Gemma, PaliGemma)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import sys
from pathlib import Path

from vla_jax import paths
from vla_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """`model` is the serialised SentencePiece model, so that it travels inside checkpoints and exports."""

    model: bytes

    @functools.cached_property
    def _sp(self):
        import sentencepiece

        try:
            sp = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError as e:
            raise UserError(f"text model is no SentencePiece model: {e}") from e
        missing = [name for name, i in (("bos", sp.bos_id()), ("eos", sp.eos_id()), ("unk", sp.unk_id())) if i < 0]
        if missing:
            raise UserError(f"text model lacks the special pieces {', '.join(missing)}; a Gemma or PaliGemma model has them")
        return sp

    @property
    def vocab_size(self) -> int:
        return self._sp.vocab_size()

    @property
    def bos(self) -> int:
        return self._sp.bos_id()

    @property
    def eos(self) -> int:
        return self._sp.eos_id()

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.model).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids without BOS and EOS."""
        return list(self._encode(text))

    @functools.cached_property
    def _encode(self):
        """The same few thousand prompts come again and again."""
        return functools.lru_cache(maxsize=1 << 14)(self._sp.encode)

    def decode(self, ids: list[int]) -> str:
        return self._sp.decode(ids)


def load(path: str = "") -> TextTokenizer:
    """A `.model` file; empty: the default. Raises: UserError when it is absent or no SentencePiece model."""
    file = Path(path).expanduser() if path else paths.find("data", "text/default.model")
    if not file.is_file():
        raise UserError(f"text model {file} does not exist. Set tokens.text_model to a SentencePiece .model file, or leave it empty.")
    tokenizer = TextTokenizer(file.read_bytes())
    tokenizer.vocab_size  # noqa: B018  a broken file is refused here, not in a thread later
    return tokenizer


def train_default(*, vocab_size: int = 1024) -> bytes:
    """The default model: BPE with byte fallback (any text can be written) on instructions composed below.

    Pad 0, eos 1, bos 2, unk 3, as in Gemma. Deterministic.
    """
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_corpus()),
        model_writer=out,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        split_digits=True,
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return out.getvalue()


def _corpus() -> list[str]:
    objects = """red block,green block,blue block,yellow block,bowl,cup,mug,plate,pot,pan,lid,spoon,fork,knife,carrot,banana,apple,
        orange,lemon,corn,eggplant,bread,cheese,can,bottle,sponge,towel,cloth,drawer,cabinet,door,microwave,oven,sink,drying rack,
        counter,table,shelf,basket,box,tray,button,lever,switch,faucet,stove,toy,ball,cube,peg,hole,cable,screwdriver,hammer,
        book,pen,marker,sock,shirt,trash bin,brush,bag,handle,burger,toaster,kettle,cucumber,mushroom,potato,sushi,strawberry""".replace(
        "\n", ""
    ).split(",")
    objects = [o.strip() for o in objects]
    verbs = "pick up,put down,grasp,push,pull,open,close,lift,turn,rotate,flip,wipe,press,touch,slide,fold,unfold,pour,place,stack,hold,release,reach,knock over,sweep".split(
        ","
    )
    places = "left of,right of,in front of,behind,on top of,inside,into,next to,above,below,under,near,to the left of,to the right of,from,on,in".split(
        ","
    )
    lines = [f"{v} the {o}" for v, o in itertools.product(verbs, objects)]
    lines += [
        f"{v} the {a} {p} the {b}"
        for v, p in itertools.product(("move", "put", "place"), places)
        for a, b in zip(objects, objects[7:] + objects[:7])
    ]
    lines += [
        f"Robot: {r}, {hz} Hz. Task: {t};\nAction: "
        for (r, hz), t in zip(
            itertools.cycle(
                (
                    ("tabletop_slider", 5),
                    ("tabletop_arm", 10),
                    ("tabletop_bimanual", 20),
                    ("bridge_dataset", 5),
                    ("droid", 15),
                    ("fractal", 3),
                    ("kuka", 10),
                )
            ),
            lines * 2,
        )
    ]
    lines += [f"Task: {t}, State: {i % 256} {i * 7 % 256} {i * 31 % 256};\nAction: " for i, t in enumerate(lines[:600])]
    return lines


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(train_default())
