"""A run's tokenizers as folders of `transformers`: text for AutoTokenizer, actions for AutoProcessor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from vla_jax.deploy import fast_processor
from vla_jax.tokens import published
from vla_jax.tokens.text import TextTokenizer
from vla_jax.types import ActionTokenizer


def text(words: TextTokenizer, folder: Path, behind: dict[int, str]) -> None:
    """The SentencePiece model as AutoTokenizer loads it: BOS in front, and pieces `behind` it that are no text."""
    (folder / "tokenizer.model").write_bytes(words.model)
    special = lambda word: {"content": word, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    told = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False, "padding_side": "right"}
    told |= {f"{name}_token": words.piece(getattr(words, name)) for name in ("bos", "eos", "pad", "unk")}
    told |= {"clean_up_tokenization_spaces": False, "model_max_length": 1 << 20}
    told |= {"added_tokens_decoder": {str(i): special(word) for i, word in behind.items()}} if behind else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(told, indent=1))


def fast(tokenizer: ActionTokenizer, folder: Path) -> None:
    """A folder that AutoProcessor loads with trust_remote_code, as openpi and LeRobot ask for it."""
    folder.mkdir()
    about = {"processor_class": "FastProcessor", "auto_map": {"AutoProcessor": "fast_processor.FastProcessor"}}
    about |= {"scale": tokenizer.scale, "min_token": tokenizer.min_coef, "vocab_size": tokenizer.vocab_size}
    (folder / "processor_config.json").write_text(json.dumps(about, indent=1))
    shutil.copyfile(fast_processor.__file__, folder / "fast_processor.py")
    if isinstance(tokenizer, published.PublishedFast):
        (folder / "tokenizer.json").write_text(json.dumps(published.to_hf(tokenizer), ensure_ascii=False))
    else:
        told = {"alphabet": tokenizer.alphabet, "merges": [list(m) for m in tokenizer.merges]}
        (folder / "fast.json").write_text(json.dumps(told))
