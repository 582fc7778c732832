"""CLIP tokenizer for the words of the demo's captions."""

import json
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

from torch import Tensor

TEXT_LENGTH = 20  # tokens


def write_tokenizer(folder: Path, words: Collection[str], size: int) -> None:
    """Write a CLIP tokenizer that knows each of the words as one token.

    Args:
        size: of the vocabulary, at least; it holds 512 bytes, and each word's pieces and whole.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    corpus = [*sorted(words), ",", *sorted(alphabet)]
    bpe.train_from_iterator([word for word in corpus for _ in range(3)], trainer)
    state = json.loads(bpe.to_str())["model"]
    vocab = {token: i for i, token in enumerate(sorted(state["vocab"], key=state["vocab"].get))}
    for char in sorted(alphabet):
        for token in (char, f"{char}</w>"):
            vocab.setdefault(token, len(vocab))
    merges = [tuple(pair) for pair in state["merges"]]
    tokenizer = cast(Any, CLIPTokenizer)(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    # Every CLIP release has these two files; old readers do not know tokenizer.json.
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@cache
def _load(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def tokenize(folder: Path, captions: Sequence[str]) -> Mapping[str, Tensor]:
    """Return input_ids and attention_mask, each of shape (b, TEXT_LENGTH)."""
    return _load(folder)(
        list(captions), padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt"
    )
