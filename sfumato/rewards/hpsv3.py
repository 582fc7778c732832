"""HPSv3 (arXiv 2508.03789): a Qwen2-VL that reads an image and a question about it, and a head.

Source: hpsv3 1.0.0: inference.py and model/qwen2vl_trainer.py. hpsv3.txt is the question in its
dataset/data_collator_qwen.py (MIT licence, Copyright (c) 2024 HPSv3 Team).
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sfumato.clip import (
    ImageSettings,
    first_sentence,
    open_tokenizer,
    preprocess,
    published_file,
    read_tensors,
)
from sfumato.config import HPS3_FILE
from sfumato.files import read_object
from sfumato.hub import fetch
from sfumato.precision import without_autocast
from sfumato.rewards.reward import Reward, Score
from sfumato.rewards.towers import at_least_float32, recompute, refuse_unequal
from sfumato.weights import differences, refuse_non_finite

SIDE, MERGED, FRAMES = 14, 2, 2  # of patches; a token is of 2 x 2, and one image of two frames
STEP = SIDE * MERGED
PIXELS = 256 * STEP**2  # of a resized image, about
HEAD = (1024, 16, 2)  # widths of its layers; the outputs are mu and what sigma is made of
REWARD = "<|Reward|>"  # HPSv3 adds it to Qwen2-VL's tokens
PICTURE = "<|image_pad|>"  # the image's own tokens stand in its place
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", PICTURE, "<|vision_end|>")
UNREAD = "lm_head.weight"
BEFORE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
)
# Causal attention does not see what the published question has behind this.
AFTER = "<|vision_end|>" + (Path(__file__).parent / "hpsv3.txt").read_text(encoding="utf-8")
CACHED = 10_000  # prompts whose tokens are kept
ROOTS = {"vision": "visual.", "text": "model.", "head": "rm_head."}  # -> in published names
ADVICE = "name a folder with both files of Qwen/Qwen2-VL-7B-Instruct, or this hub id"


@final
class Hpsv3Reward(Reward):
    """Score image and prompt as HPSv3, differentiably in the images: mu = head(state)[0].

    The state is that of Qwen2-VL's text tower at the token <|Reward|>. As in the published code,
    positions count all tokens one by one, those of the image too, and the frequencies of rotary
    embeddings are rounded to bfloat16. Images are not clamped.
    """

    def __init__(self, config: Any, tokenizer: Any, dtype: torch.dtype) -> None:
        """Make frozen networks of a Qwen2VLConfig, random, the head in float32 or better."""
        from transformers import Qwen2VLTextModel
        from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen

        super().__init__()
        vision, text = config.vision_config, config.text_config
        self.vision: Any = qwen.Qwen2VisionTransformerPretrainedModel._from_config(
            vision, dtype=dtype
        )
        self.text: Any = Qwen2VLTextModel._from_config(text, dtype=dtype)
        with torch.device("cpu"):  # no file has the frequencies
            self.vision.rotary_pos_emb = qwen.Qwen2VLVisionRotaryEmbedding(vision)
            self.text.rotary_emb = qwen.Qwen2VLRotaryEmbedding(text)
        for rotary in (self.vision.rotary_pos_emb, self.text.rotary_emb):
            rotary.inv_freq.copy_(rotary.inv_freq.bfloat16())
        first, second, last = HEAD
        layers = (  # without dropout, which does nothing here, but counts as a layer
            *(nn.Linear(text.hidden_size, first), nn.ReLU(), nn.Identity()),
            *(nn.Linear(first, second), nn.ReLU(), nn.Linear(second, last)),
        )
        self.head = nn.Sequential(*layers).to(torch.promote_types(dtype, torch.float32))
        self.requires_grad_(False)
        self.tokenizer = tokenizer
        self.tokens = lru_cache(CACHED)(self._tokens)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str,
        *,
        processor: str,
        dtype: torch.dtype = torch.bfloat16,
        gradient_checkpointing: bool = False,
    ) -> "Hpsv3Reward":
        """Load the published file; inside `torch.device("meta")` no weight is read.

        Args:
            path_or_hub_id: the file, its folder or its hub id.
            processor: folder or hub id of Qwen2-VL's config.json and tokenizer.
            dtype: of the frozen towers; preprocessing and head stay in float32 or better.
            gradient_checkpointing: recompute each layer in the backward pass instead of keeping
                its activations.

        Raises:
            ValueError: if a file is missing, damaged, or of another kind of model.
        """
        config, tokenizer = _read_base(processor)
        try:
            with torch.device("meta"):
                reward = cls(config, tokenizer, dtype)
                reward.score(torch.empty(1, 3, STEP, STEP), [""])
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError) as error:
            raise ValueError(
                f"config.json of reward.processor = {processor!r} states no network that can be "
                f"computed ({first_sentence(error)}); {ADVICE}"
            ) from error
        if torch.get_default_device().type != "meta":
            file = published_file(path_or_hub_id, HPS3_FILE)
            reward.load_state_dict(_read_weights(file, reward.state_dict()), assign=True)
        if gradient_checkpointing:
            recompute([*reward.vision.blocks, *reward.text.layers])
        return reward

    def train(self, mode: bool = True) -> "Hpsv3Reward":
        """Stay in evaluation mode."""
        return super().train(False)

    def score(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Score:
        """Return mu row by row.

        Raises:
            ValueError: if there are not as many prompts as images, or a prompt has a token that
                marks the image or the reward.
        """
        refuse_unequal(images, prompts)
        embed = self.text.embed_tokens
        before, *rows = (self.tokens(each).to(embed.weight.device) for each in (None, *prompts))
        with without_autocast(embed.weight):
            start = embed(before).expand(len(images), -1, -1)
            seen = self._see(images)
            # Attention is causal: no row sees the padding, which is behind its <|Reward|>.
            states = torch.cat([start, seen, embed(pad_sequence(rows, batch_first=True))], 1)
            states = self.text(inputs_embeds=states, use_cache=False).last_hidden_state
        behind = start.shape[1] + seen.shape[1] - 1
        ends = torch.tensor([behind + len(row) for row in rows], device=states.device)
        states = states[torch.arange(len(rows), device=states.device), ends]
        first = next(self.head.parameters())
        with without_autocast(first):
            return Score(self.head(at_least_float32(states))[:, 0])

    def _see(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """Return the image tower's state of each square of STEP pixels."""
        size = resized(*images.shape[-2:])
        rows, columns = size[0] // SIDE, size[1] // SIDE
        places = torch.arange(rows * columns, device=images.device)
        places = places.view(rows // MERGED, MERGED, columns // MERGED, MERGED)
        places = places.transpose(1, 2).flatten().repeat(len(images))
        seen = self.vision(
            to_patches(preprocess(images, ImageSettings(size, None))),
            grid_thw=torch.tensor([[1, rows, columns]] * len(images), device="cpu"),
            position_ids=torch.stack([places // columns, places % columns], 1),
        )
        return seen.pooler_output.unflatten(0, (len(images), -1))

    def _tokens(self, prompt: str | None) -> Tensor:
        """Return the tokens behind the image, for a prompt; without one, those before it."""
        text = BEFORE if prompt is None else AFTER.format(prompt=prompt)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        for token, count in {REWARD: prompt is not None, PICTURE: False}.items():
            if ids.count(self.tokenizer.convert_tokens_to_ids(token)) != count:
                raise ValueError(
                    f"the prompt {prompt!r} has {token}, by which HPSv3 marks a place of its own; "
                    "take it out of the prompt"
                )
        return torch.tensor(ids, device="cpu")


def resized(height: int, width: int) -> tuple[int, int]:
    """Return the size that images get: multiples of STEP, near PIXELS and the same shape."""
    sides = [max(STEP, round(each / STEP) * STEP) for each in (height, width)]
    if math.prod(sides) > PIXELS:
        by = math.sqrt(height * width / PIXELS)
        sides = [max(STEP, math.floor(each / by / STEP) * STEP) for each in (height, width)]
    elif math.prod(sides) < PIXELS:
        by = math.sqrt(PIXELS / (height * width))
        sides = [math.ceil(each * by / STEP) * STEP for each in (height, width)]
    return sides[0], sides[1]


def to_patches(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "n d"]:
    """Cut images into patches, those of a token one after another, each for equal frames."""
    rows, columns = (side // STEP for side in images.shape[-2:])
    patches = images.reshape(len(images), 3, rows, MERGED, SIDE, columns, MERGED, SIDE)
    patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, 3, 1, SIDE * SIDE)
    return patches.expand(-1, -1, FRAMES, -1).flatten(1)


def _read_base(name: str) -> tuple[Any, Any]:
    """Read the settings of a Qwen2-VL and its tokenizer, to which HPSv3's token is added."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import Qwen2Tokenizer, Qwen2VLConfig

    def is_whole(folder: Path) -> bool:
        kinds = (("tokenizer.json",), ("vocab.json", "merges.txt"))
        return any(all((folder / each).is_file() for each in ("config.json", *k)) for k in kinds)

    source, folder = f"reward.processor = {name!r}", Path(name).expanduser()
    if not folder.is_dir():
        patterns = ["config.json", "tokenizer*.json", "vocab.json", "merges.txt"]
        folder = fetch(name, "reward.processor", patterns, complete=is_whole)
    if not is_whole(folder):
        raise ValueError(
            f"{source} has no config.json with a tokenizer.json (or vocab.json and merges.txt); "
            f"{ADVICE}"
        )
    kind = read_object(folder / "config.json", ADVICE).get("model_type")
    if kind != "qwen2_vl":
        raise ValueError(f"{source} has model_type {kind!r}, and HPSv3 is a Qwen2-VL; {ADVICE}")
    try:
        config: Any = Qwen2VLConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, LookupError, StrictDataclassError) as error:
        reason = first_sentence(error)
        raise ValueError(f"config.json of {source} cannot be read ({reason}); {ADVICE}") from error
    tokenizer = open_tokenizer(folder, Qwen2Tokenizer)
    if lacking := [each for each in SPECIAL if each not in tokenizer.get_vocab()]:
        raise ValueError(f"{source} has no token {lacking[0]}, which HPSv3 reads; {ADVICE}")
    tokenizer.add_tokens([REWARD], special_tokens=True)
    config.text_config.vocab_size = len(tokenizer)
    return config, tokenizer


def _read_weights(file: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the file by the names and in the types of the reward's own."""
    found = read_tensors(file, "reward.pretrained", allow_pickle=True, strangers=False)
    found.pop(UNREAD, None)
    names = {name: ROOTS[root] + rest for name in expected for root, rest in [name.split(".", 1)]}
    state = {name: found.pop(old) for name, old in names.items() if old in found}
    source = f"HPSv3: {file}"
    differences(state | found, expected, names).refuse(
        source, "give HPSv3.safetensors as MizzenAI/HPSv3 has it"
    )
    refuse_non_finite(state.items(), source)
    return {name: state.pop(name).to(expected[name].dtype) for name in expected}
