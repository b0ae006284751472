"""A stock `CLIPTokenizer` for the words of a data set's captions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer
from transformers.models import clip

from ..storage import scratch_folder

VOCAB_SIZE = 49408  # of CLIP's
START, END = "<|startoftext|>", "<|endoftext|>"


def caption_tokenizer(captions: Iterable[str], max_length: int) -> CLIPTokenizer:
    """Return a tokenizer in CLIP's format whose byte pairs (Sennrich et al. 2016) are learned from the captions. It
    tokenises any text, at most `max_length` tokens with start and end, and its vocabulary is no larger than CLIP's.
    """
    texts = list(captions)
    with scratch_folder() as folder:
        write_tokenizer(folder, [])
        files = [str(folder / name) for name in ("vocab.json", "merges.txt")]
        fast: Any = clip  # transformers 5 has one class under both names
        trained = fast.CLIPTokenizerFast(*files).train_new_from_iterator(
            texts, vocab_size=VOCAB_SIZE, show_progress=False
        )
        merges = json.loads(trained.backend_tokenizer.to_str())["model"]["merges"]
        pairs = [merge.split() if isinstance(merge, str) else merge for merge in merges]
        write_tokenizer(folder, [(first, second) for first, second in pairs])
        return CLIPTokenizer(*files, model_max_length=max_length)


def write_tokenizer(folder: Path, merges: Iterable[tuple[str, str]]) -> None:
    """Write vocab.json and merges.txt: all bytes, all bytes at a word's end, the results of merges, start and end."""
    letters, pairs = sorted(ByteLevel.alphabet()), list(merges)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, pairs), START, END]
    (folder / "vocab.json").write_text(
        json.dumps({token: index for index, token in enumerate(dict.fromkeys(tokens))}), encoding="utf-8"
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs), encoding="utf-8")
