"""Trains the text models in data/text, deterministically, from a corpus that lies there and from instructions composed here.

python -m vla_jax.tokens.text_model data/text             # default.model and tiny.model
python -m vla_jax.tokens.text_model data/text --wordnet D # corpus.txt first, from the `dict` folder of WordNet 3.1
"""

from __future__ import annotations

import argparse
import io
import itertools
from pathlib import Path

from vla_jax.tokens.text import LOCATIONS, SEGMENTS

_OBJECTS = """red block,green block,blue block,yellow block,bowl,cup,mug,plate,pot,pan,lid,spoon,fork,knife,carrot,banana,apple,orange,lemon,
corn,eggplant,bread,cheese,can,bottle,sponge,towel,cloth,drawer,cabinet,door,microwave,oven,sink,drying rack,counter,table,shelf,basket,
box,tray,button,lever,switch,faucet,stove,toy,ball,cube,peg,hole,cable,screwdriver,hammer,book,pen,marker,sock,shirt,trash bin,brush,bag,
handle,burger,toaster,kettle,cucumber,mushroom,potato,sushi,strawberry,coke can,water bottle,chip bag,rice cooker,spatula,whisk,ladle,
teddy bear,scissors,stapler,remote,keyboard,mouse,lamp,pillow,blanket,chair,wrench,nut,bolt,gear,plug,socket,charger,egg,tomato,onion,
pepper,salt shaker,jar,glass,napkin,tissue box,soap,toothbrush,hairbrush,backpack,bin,bucket,broom,dustpan,hose,rope,tape,ruler,pencil""".replace(
    "\n", ""
).split(",")
_VERBS = """pick up,put down,grasp,push,pull,open,close,lift,turn,rotate,flip,wipe,press,touch,slide,fold,unfold,pour,place,stack,hold,release,
reach,knock over,sweep,turn on,turn off,insert,remove,hang,hand over,drop,move,shake,stir,squeeze,unplug,plug in,screw,unscrew,throw away,
clean,sort,arrange,straighten,take out,bring,find,point at,tap,twist,tilt,unlock,load,unload""".replace("\n", "").split(",")
_PLACES = """left of,right of,in front of,behind,on top of,inside,into,next to,above,below,under,near,to the left of,to the right of,from,on,in,
between,onto,out of,beside,across,against,over,through,toward,away from,at the edge of,in the middle of""".replace("\n", "").split(",")
_ROBOTS = (
    ("tabletop_slider", 5),
    ("tabletop_arm", 10),
    ("tabletop_bimanual", 20),
    ("bridge_dataset", 5),
    ("droid", 15),
    ("fractal", 3),
    ("kuka", 10),
)
_SPACES = (
    "2 m delta base, 1 binary ee",
    "2 rad delta joint, 1 binary ee",
    "3 m delta base, 3 rad delta base, 1 binary ee",
    "3 m/s velocity ee, 3 rad/s velocity ee, 1 absolute ee",
    "7 rad absolute joint, 1 absolute ee",
    "2 m absolute base, 1 binary ee, 2 m absolute base, 1 binary ee",
    "6 rad/s velocity joint, 1 binary ee",
)


def instructions() -> list[str]:
    """Tasks, and the prompts of both layouts around them."""
    lines = [f"{v} the {o}" for v, o in itertools.product(_VERBS, _OBJECTS)]
    shifted = _OBJECTS[7:] + _OBJECTS[:7]
    lines += [
        f"{v} the {a} {p} the {b}" for v, p in itertools.product(("move", "put", "place"), _PLACES) for a, b in zip(_OBJECTS, shifted)
    ]
    robots = itertools.cycle(zip(_ROBOTS * len(_SPACES), sorted(_SPACES * len(_ROBOTS))))
    prompts = []
    for i, (((robot, hz), space), task) in enumerate(zip(robots, lines[::3])):
        prompts.append(f"{robot}, {hz} Hz, {2 + i % 50} steps of {space}: {task}\n")
    prompts += [f"Task: {t}, State: {i % 256} {i * 7 % 256} {i * 31 % 256};\nAction: " for i, t in enumerate(lines[:600])]
    return lines + prompts


def train(corpus: list[str], *, vocab_size: int, paligemma: bool) -> bytes:
    """A BPE model with byte fallback, so that any text can be written; pad 0, eos 1, bos 2, unk 3 as in Gemma. paligemma: with its
    1024 location and 128 segmentation pieces, counted in vocab_size and last, where its convention looks for them."""
    import sentencepiece

    out, extra = io.BytesIO(), LOCATIONS + SEGMENTS if paligemma else 0
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=out,
        model_type="bpe",
        vocab_size=vocab_size - extra,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        split_digits=True,
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n", "|"],
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return _with_tail(out.getvalue()) if paligemma else out.getvalue()


def _with_tail(model: bytes) -> bytes:
    """The trainer would put such pieces first; here they are added behind all others. Before them go the rarest merges, as in PaliGemma:
    pi0-FAST's action ids reach down there, and must not meet the letters and digits of its prompts, which the trainer puts last."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    merged = lambda p: p.type == p.NORMAL and len(p.piece) > 1  # what is merged first is in the scores, not in the order
    pieces = sorted(proto.pieces, key=lambda p: (merged(p), -p.score if merged(p) else 0))
    del proto.pieces[:]
    proto.pieces.extend(pieces)
    proto.trainer_spec.vocab_size = len(proto.pieces) + LOCATIONS + SEGMENTS
    for piece in [f"<loc{i:04}>" for i in range(LOCATIONS)] + [f"<seg{i:03}>" for i in range(SEGMENTS)]:
        proto.pieces.add(piece=piece, score=0.0, type=sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED)
    return proto.SerializeToString(deterministic=True)


def models(folder: Path) -> dict[str, bytes]:
    """{file name: model}, from the corpus in `folder`."""
    said = instructions()
    return {
        "default.model": train((folder / "corpus.txt").read_text().splitlines() + said, vocab_size=8192, paligemma=True),
        "tiny.model": train(said, vocab_size=1024, paligemma=False),
    }


def corpus(wordnet: Path) -> str:
    """What WordNet 3.1 says of things to handle and ways to move: `word: gloss` lines of its files of food, shapes, contact and motion,
    and of those artefacts that have a short name and a short gloss."""
    lines = set()
    for file, groups in (("data.noun", ("06", "13", "25")), ("data.verb", ("35", "38"))):
        for line in (wordnet / file).read_text(encoding="latin-1").splitlines():
            head, _, gloss = line.partition("|")
            fields, gloss = head.split(), gloss.partition('; "')[0].strip().lower()
            if line.startswith("  ") or fields[1] not in groups or not gloss.isascii():
                continue
            word = fields[4].replace("_", " ").lower()
            if fields[1] != "06" or (len(word) <= 10 and len(gloss) <= 70 and " " not in word):
                lines.add(f"{word}: {gloss}")
    return "\n".join(sorted(lines)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wordnet", type=Path)
    args = parser.parse_args()
    if args.wordnet:
        (args.folder / "corpus.txt").write_text(corpus(args.wordnet))
    for name, model in models(args.folder).items():
        (args.folder / name).write_bytes(model)
        print(f"{args.folder / name}: {len(model)} bytes")


if __name__ == "__main__":
    main()
