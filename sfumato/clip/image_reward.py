"""ImageReward's published file: a BLIP of two towers and a head, in the names of the first BLIP.

blip.visual_encoder.blocks.0.attn.proj.weight         published
vision.encoder.layers.0.self_attn.projection.weight   transformers

Source: blip_pretrain.py, vit.py and med.py of THUDM/ImageReward.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from sfumato.clip.folder import open_tokenizer
from sfumato.clip.tensor_files import read_tensors
from sfumato.clip.tensors import published_file
from sfumato.config import IMAGE_REWARD
from sfumato.hub import fetch
from sfumato.records import Count, read_record
from sfumato.weights import POSITIONS, differences, hide_progress_bars, refuse_non_finite

if TYPE_CHECKING:
    import transformers

HEAD = (1024, 128, 64, 16, 1)  # widths of its layers
SPECIAL = ("[DEC]", "[ENC]")  # BLIP adds them to BERT's tokens
SETTINGS = "med_config.json"
# Published names; what the published network has beside and no score depends on.
UNREAD = rf"blip\.(vision|text)_proj\.(weight|bias)|blip\.text_encoder\.{POSITIONS}"
_NAMES = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers": "blocks",
    "self_attn.projection": "attn.proj",
    "self_attn.qkv": "attn.qkv",
    "layer_norm": "norm",
    "post_layernorm": "norm",
}
_ROOTS = {"vision.": "blip.visual_encoder.", "text.": "blip.text_encoder.", "head.": "mlp.layers."}
_AGAIN = "give ImageReward.pt as THUDM/ImageReward has it"


@dataclass(frozen=True)
class ImageRewardParts:
    """Parts of ImageReward; `text` is a BlipTextModel with cross-attention."""

    vision: "transformers.BlipVisionModel"
    text: Any
    head: nn.Sequential
    tokenizer: "transformers.PreTrainedTokenizerBase"


def load_image_reward(path_or_hub_id: str, processor: str) -> ImageRewardParts:
    """Load the published file; inside `torch.device("meta")` no weight is read.

    Args:
        path_or_hub_id: the file, its folder or its hub id. A med_config.json beside it states the
            text tower; without one it is the published one.
        processor: folder or hub id of BERT's tokenizer, bert-base-uncased.

    Raises:
        ValueError: if a file is missing, damaged, or of another kind of model.
    """
    path, file = Path(path_or_hub_id).expanduser(), None
    if torch.get_default_device().type != "meta":
        file = published_file(path_or_hub_id, IMAGE_REWARD, [SETTINGS])
    home = file.parent if file else path if path.is_dir() else path.parent
    vision, text = _read_settings(home)
    tokenizer = _read_tokenizer(processor, text.vocab_size)
    towers = _blank(vision, text) if file is None else _load(file, vision, text)
    return ImageRewardParts(*towers, tokenizer)


@dataclass(frozen=True)
class _Vision:
    """The image tower, by default the one that blip_pretrain.py builds."""

    hidden_size: Count = 1024
    intermediate_size: Count = 4096
    num_hidden_layers: Count = 24
    num_attention_heads: Count = 16
    image_size: Count = 224
    patch_size: Count = 16


@dataclass(frozen=True)
class _Settings:
    """A med_config.json, by default the published one: the text tower.

    Attributes:
        vision_config: of another image tower; the published file has no such key.
    """

    vocab_size: Count = 30524
    hidden_size: Count = 768
    intermediate_size: Count = 3072
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 12
    max_position_embeddings: Count = 512
    hidden_act: Literal["gelu"] = "gelu"
    layer_norm_eps: float = 1e-12
    pad_token_id: Count = 0
    vision_config: _Vision = field(default_factory=_Vision)


def _read_settings(
    folder: Path,
) -> tuple["transformers.BlipVisionConfig", "transformers.BlipTextConfig"]:
    """Return the settings of both towers."""
    from transformers import BlipTextConfig, BlipVisionConfig

    file = folder / SETTINGS
    stated = read_record(file, _Settings, _AGAIN) if file.is_file() else _Settings()
    sizes, words = asdict(stated.vision_config), asdict(stated)
    del words["vision_config"]
    for each in (sizes, words):
        width, heads = each["hidden_size"], each["num_attention_heads"]
        if not heads or not width or width % heads:
            raise ValueError(
                f"{file} states hidden_size = {width}, which {heads} heads do not share evenly; "
                f"{_AGAIN}"
            )
    vision = BlipVisionConfig(**sizes, hidden_act="gelu", layer_norm_eps=1e-6)
    # The published file states an encoder_width, which ImageReward replaces by the image tower's.
    return vision, BlipTextConfig(**words, encoder_hidden_size=vision.hidden_size, is_decoder=True)


def _read_tokenizer(name: str, vocabulary: int) -> "transformers.PreTrainedTokenizerBase":
    """Open BERT's tokenizer, and add BLIP's two tokens."""
    from transformers import BertTokenizer

    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = fetch(name, "reward.processor", ["tokenizer*.json", "vocab.txt"])
    if not any((folder / each).is_file() for each in ("tokenizer.json", "vocab.txt")):
        raise ValueError(
            f"reward.processor = {name!r} has no tokenizer.json or vocab.txt; name a folder or hub "
            "id that has the tokenizer (for ImageReward google-bert/bert-base-uncased)"
        )
    tokenizer = open_tokenizer(folder, BertTokenizer)
    tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
    if len(tokenizer) != vocabulary:
        raise ValueError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens with {' and '.join(SPECIAL)}, "
            f"but the text tower knows {vocabulary}; name the one that it was trained with as "
            "`processor` (for ImageReward google-bert/bert-base-uncased)"
        )
    return tokenizer


def _blank(vision: Any, text: Any) -> tuple[Any, Any, nn.Sequential]:
    """Return the networks with random weights."""
    from transformers import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    return BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False), _head(text)


def _head(text: "transformers.BlipTextConfig") -> nn.Sequential:
    """Return the head; dropouts between its layers do nothing here, but they count as layers."""
    widths = [text.hidden_size, *HEAD]
    layers: list[nn.Module] = [nn.Linear(a, b) for a, b in zip(widths, HEAD, strict=False)]
    for place in (1, 3, 5):
        layers.insert(place, nn.Identity())
    return nn.Sequential(*layers)


def _load(file: Path, vision: Any, text: Any) -> tuple[Any, Any, nn.Sequential]:
    """Return the networks with the weights of the file, whole and finite."""
    from transformers import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    found = read_tensors(file, "reward.pretrained", allow_pickle=True, strangers=False)
    found = {name: each for name, each in found.items() if not re.fullmatch(UNREAD, name)}
    with torch.device("meta"):
        parts = dict(zip(("vision.", "text.", "head."), _blank(vision, text), strict=True))
    expected = {f"{k}{n}": t for k, part in parts.items() for n, t in part.state_dict().items()}
    names = {name: _published_name(name) for name in expected}
    state = {name: found.pop(old) for name, old in names.items() if old in found}
    source = f"ImageReward: {file}"
    differences(state | found, expected, names).refuse(source, _AGAIN)
    refuse_non_finite(state.items(), source)
    hide_progress_bars()
    head = _head(text)
    head.load_state_dict(_below(state, "head."))
    # By default all weights would be rounded to the dtype of the first.
    given = {"config": vision, "state_dict": _below(state, "vision."), "dtype": torch.float32}
    seen = BlipVisionModel.from_pretrained(None, **given)
    given |= {"config": text, "state_dict": _below(state, "text.")}
    return seen, BlipTextModel.from_pretrained(None, **given, add_pooling_layer=False), head


def _below(state: Mapping[str, Tensor], root: str) -> dict[str, Tensor]:
    return {k.removeprefix(root): each for k, each in state.items() if k.startswith(root)}


def _published_name(name: str) -> str:
    """Return the published name of a weight of this class."""
    root = next(root for root in _ROOTS if name.startswith(root))
    inner = name.removeprefix(root)
    if root == "vision.":
        for new, old in _NAMES.items():
            inner = re.sub(rf"(^|\.){re.escape(new)}(?=\.|\d|$)", rf"\g<1>{old}", inner)
    return _ROOTS[root] + inner
