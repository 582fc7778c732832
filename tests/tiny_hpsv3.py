"""HPSv3's networks in plain tensors, small and random, by the names of the published file."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2Tokenizer

from sfumato.rewards.hpsv3 import AFTER, SPECIAL

FILE = "HPSv3.safetensors"
VISION = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 48}
SECTIONS = [2, 3, 3]  # of a head's 16 channels
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
}
PUBLISHED = {  # beside the sizes, in the config.json of Qwen2-VL-7B-Instruct
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 4096,  # more than the tokenizer has: HPSv3 cuts the rest off
    "rope_scaling": {"type": "mrope", "mrope_section": SECTIONS},
}
TOKENS = ("<|endoftext|>", *SPECIAL, "<|video_pad|>")
HEAD = (1024, 16, 2)


def write_tiny_hpsv3(folder: Path) -> dict[str, Tensor]:
    """Write HPSv3.safetensors, and Qwen2-VL's config.json and tokenizer; return the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    vision = {**VISION, "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2}
    vision |= {"spatial_patch_size": 14, "temporal_patch_size": 2}
    (folder / "config.json").write_text(json.dumps({**PUBLISHED, **TEXT, "vision_config": vision}))
    state = random_state(len(Qwen2Tokenizer.from_pretrained(folder)) + 1)
    save_file(state, folder / FILE)
    return state


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of Qwen2's kind that knows the question's words."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.NFC()
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=letters, show_progress=False, special_tokens=[]
    )
    learner.train_from_iterator([AFTER], trainer)
    model = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        additional_special_tokens=list(TOKENS[1:]),
    )
    tokenizer.save_pretrained(folder)


def random_state(vocabulary: int) -> dict[str, Tensor]:
    """Return weights of all networks in the published file."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int, *, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def norm(name: str, size: int) -> None:
        shapes.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    width, deep = VISION["embed_dim"], VISION["embed_dim"] * VISION["mlp_ratio"]
    shapes["visual.patch_embed.proj.weight"] = (width, 3, 2, 14, 14)
    for i in range(VISION["depth"]):
        block = f"visual.blocks.{i}"
        norm(f"{block}.norm1", width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        linear(f"{block}.mlp.fc1", deep, width)
        linear(f"{block}.mlp.fc2", width, deep)
    norm("visual.merger.ln_q", width)
    linear("visual.merger.mlp.0", 4 * width, 4 * width)
    linear("visual.merger.mlp.2", VISION["hidden_size"], 4 * width)
    size, inner = TEXT["hidden_size"], TEXT["intermediate_size"]
    seen = size // TEXT["num_attention_heads"] * TEXT["num_key_value_heads"]
    shapes["model.embed_tokens.weight"] = (vocabulary, size)
    for i in range(TEXT["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        linear(f"{layer}.self_attn.q_proj", size, size)
        linear(f"{layer}.self_attn.k_proj", seen, size)
        linear(f"{layer}.self_attn.v_proj", seen, size)
        linear(f"{layer}.self_attn.o_proj", size, size, bias=False)
        linear(f"{layer}.mlp.gate_proj", inner, size, bias=False)
        linear(f"{layer}.mlp.up_proj", inner, size, bias=False)
        linear(f"{layer}.mlp.down_proj", size, inner, bias=False)
        shapes[f"{layer}.input_layernorm.weight"] = (size,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (size,)
    shapes["model.norm.weight"] = (size,)
    shapes["lm_head.weight"] = (vocabulary, size)
    for place, rows, columns in zip((0, 3, 5), HEAD, (size, *HEAD), strict=False):
        linear(f"rm_head.{place}", rows, columns)
    rng = torch.Generator().manual_seed(0)
    spread = {".norm": 1.0, "layernorm": 1.0, "ln_q": 1.0, "rm_head": 0.15, "patch_embed": 0.03}
    return {
        name: torch.randn(shape, generator=rng)
        * next((each for part, each in spread.items() if part in name), 0.25)
        for name, shape in shapes.items()
    }
