"""A CLIPModel of random weights, small enough for tests, with the files of a published one."""

import json
from pathlib import Path

import torch

IMAGE_SIZE = 32
MAX_TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"


def write_tiny_clip(folder: Path) -> None:
    """Write config, safetensors, vocab.json, merges.txt and preprocessor_config.json.

    The vocabulary has the 256 byte symbols, alone and at the end of a word, so that any text
    tokenises, a character a token. The weights are the same at every call.
    """
    from transformers import CLIPConfig, CLIPModel

    folder.mkdir(parents=True, exist_ok=True)
    vocab = byte_vocabulary()
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {
        "vocab_size": len(vocab),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": vocab[START],
        "eos_token_id": vocab[END],
        "pad_token_id": vocab[END],
    }
    config = CLIPConfig(
        text_config={**tower, **text},
        vision_config={
            **tower,
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
            "initializer_range": 0.2,  # at the usual 0.02 the image hardly moves the score
        },
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    write_tokenizer(folder, vocab)
    _write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "size": {"shortest_edge": IMAGE_SIZE},
        },
    )


def byte_vocabulary() -> dict[str, int]:
    """Return a token for each byte, alone and at the end of a word, and those of start and end."""
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = sorted(ByteLevel.alphabet())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), START, END]
    return {token: index for index, token in enumerate(tokens)}


def write_tokenizer(folder: Path, vocab: dict[str, int]) -> None:
    """Write the files of a CLIPTokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": MAX_TOKENS,
            "bos_token": START,
            "eos_token": END,
            "pad_token": END,
            "unk_token": END,
        },
    )


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
