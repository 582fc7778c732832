"""OpenCLIP's layout: open_clip_config.json beside weights in its own names.

visual.transformer.resblocks.0.attn.in_proj_weight       OpenCLIP: q, k and v in one matrix
vision_model.encoder.layers.0.self_attn.q_proj.weight    transformers

Source: CLIPTextCfg, CLIPVisionCfg and VisionTransformer in model.py and transformer.py of
mlfoundations/open_clip.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sfumato.clip.preprocessing import ImageSettings, open_clip_settings
from sfumato.clip.tensors import weight_files
from sfumato.files import read_object
from sfumato.hub import fetch
from sfumato.records import Count, convert
from sfumato.weights import differences, hide_progress_bars, refuse_non_finite

if TYPE_CHECKING:
    import transformers

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
_AGAIN = "download the model again"
_OWN = "give a model of two of OpenCLIP's own transformers"
_EOS = 2  # transformers takes it as a sign to pool at the highest token, as OpenCLIP does
# Keys that change no score: they concern training, or parts that other keys switch off.
_IDLE = {
    *("model_cfg.cast_dtype", "model_cfg.output_dict", "model_cfg.init_logit_scale"),
    *("vision_cfg.patch_dropout", "vision_cfg.output_tokens", "vision_cfg.timm_model_pretrained"),
    *("vision_cfg.attn_pooler_queries", "vision_cfg.attn_pooler_heads", "vision_cfg.timm_pool"),
    *("vision_cfg.timm_proj", "vision_cfg.timm_proj_bias", "vision_cfg.timm_drop"),
    *("text_cfg.output_tokens", "text_cfg.hf_model_pretrained", "text_cfg.eos_id"),
}
# The only values of these keys with which the tower is CLIP's; all other keys must be off.
_PLAIN = {
    "vision_cfg.pool_type": "tok",
    "vision_cfg.pos_embed_type": "learnable",
    "text_cfg.pool_type": "argmax",
    "text_cfg.proj_type": "linear",
}
# transformers' name -> OpenCLIP's
_NAMES = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "visual_projection.weight": "visual.proj",
}
_NORMS = {
    "text_model.final_layer_norm": "ln_final",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
}
_LAYERS = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
    **{f"self_attn.{part}_proj.": "attn.in_proj_" for part in "qkv"},
}
_TOWERS = {"text_model": "", "vision_model": "visual."}
_BLOCK = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+\.)(weight|bias)")
_THIRD = re.compile(r".+\.self_attn\.([qkv])_proj\.(weight|bias)")


@dataclass(frozen=True)
class _Vision:
    layers: Count = 12
    width: Count = 768
    head_width: Count = 64
    mlp_ratio: float = 4.0
    patch_size: Count = 16
    image_size: Count = 224


@dataclass(frozen=True)
class _Text:
    context_length: Count = 77
    vocab_size: Count = 49408
    width: Count = 512
    heads: Count = 8
    layers: Count = 12
    mlp_ratio: float = 4.0
    pad_id: Count = 0


@dataclass(frozen=True)
class _Model:
    embed_dim: Count
    vision_cfg: _Vision
    text_cfg: _Text
    quick_gelu: bool = False


@dataclass(frozen=True)
class _File:
    model_cfg: _Model
    preprocess_cfg: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OpenClip:
    """What an open_clip_config.json says, in transformers' terms.

    Attributes:
        config: of both towers.
        pad_id: the token that fills up prompts.
        image_settings: what is done to images.
    """

    config: "transformers.CLIPConfig"
    pad_id: int
    image_settings: ImageSettings


def is_open_clip(folder: Path) -> bool:
    """Say whether a folder states the settings of an OpenCLIP model."""
    return (folder / CONFIG).is_file()


def read_open_clip(folder: Path) -> OpenClip:
    """Read the open_clip_config.json of a folder.

    Raises:
        ValueError: the file is damaged, or states a key that CLIP's architecture does not have.
    """
    path = folder / CONFIG
    return parse_open_clip(path, read_object(path, _AGAIN))


def parse_open_clip(path: Path, raw: Mapping[str, Any]) -> OpenClip:
    """Return what the content of an open_clip_config.json says; raises as `read_open_clip`.

    Args:
        path: of the file, for messages.
    """
    from transformers import CLIPConfig

    _refuse_unknown(path, raw)
    content = convert(raw, _File, str(path), _OWN)
    model, text, vision = (
        content.model_cfg,
        content.model_cfg.text_cfg,
        content.model_cfg.vision_cfg,
    )
    heads = vision.width // max(1, vision.head_width)
    for tower, width, count in (("vision", vision.width, heads), ("text", text.width, text.heads)):
        if not width or width % max(1, count):
            raise ValueError(
                f"{path} states {tower}_cfg.width = {width}, which {count} heads do not share "
                f"evenly; {_AGAIN}"
            )
    activation = {"hidden_act": "quick_gelu" if model.quick_gelu else "gelu"}
    config = CLIPConfig(
        text_config={
            **activation,
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": int(text.width * text.mlp_ratio),
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.context_length,
            "projection_dim": model.embed_dim,
            "eos_token_id": _EOS,
            "pad_token_id": text.pad_id,
        },
        vision_config={
            **activation,
            "hidden_size": vision.width,
            "intermediate_size": int(vision.width * vision.mlp_ratio),
            "num_hidden_layers": vision.layers,
            "num_attention_heads": heads,
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
            "projection_dim": model.embed_dim,
        },
        projection_dim=model.embed_dim,
    )
    settings = open_clip_settings(path, content.preprocess_cfg, vision.image_size)
    return OpenClip(config, text.pad_id, settings)


def fetch_open_clip(name: str, folder: Path, setting: str) -> Path:
    """Return a folder, or the snapshot of a hub id with its files of weights too.

    Raises:
        ValueError: they cannot be downloaded.
    """
    if Path(name).expanduser().is_dir():
        return folder
    patterns = ("*.json", "*.txt", *(f"{file}*" for file in WEIGHTS))
    return fetch(name, setting, patterns, complete=lambda path: bool(weight_files(path, WEIGHTS)))


def _refuse_unknown(path: Path, raw: Mapping[str, Any]) -> None:
    """Refuse keys that are neither read nor off: they would change what the towers compute."""
    model = raw.get("model_cfg")
    sections: dict[str, tuple[Any, type]] = {"model_cfg": (model, _Model)}
    if isinstance(model, dict):
        sections["vision_cfg"] = model.get("vision_cfg"), _Vision
        sections["text_cfg"] = model.get("text_cfg"), _Text
    for section, (content, kind) in sections.items():
        for name, value in content.items() if isinstance(content, dict) else ():
            key = f"{section}.{name}"
            plain = _PLAIN.get(key)
            if name in kind.__dataclass_fields__ or key in _IDLE or not value or value == plain:
                continue
            raise ValueError(
                f"{path} states {key} = {value!r}, which CLIP's two towers do not have; {_OWN}"
            )


def load_open_clip(folder: Path, config: "transformers.CLIPConfig") -> "transformers.CLIPModel":
    """Load both towers of a folder, whole and finite, as transformers' model of this config.

    Raises:
        ValueError: a file is damaged, or does not hold exactly the weights of the model, by the
            names in the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    source = f"OpenCLIP model: {folder}"
    try:
        files = [load_file(file) for file in weight_files(folder, WEIGHTS)]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{source} could not be read ({error}); {_AGAIN}") from error
    return open_clip_model({k: t for each in files for k, t in each.items()}, config, source)


def open_clip_model(
    found: Mapping[str, Tensor], config: "transformers.CLIPConfig", source: str
) -> "transformers.CLIPModel":
    """Return transformers' model of this config with OpenCLIP's weights, whole and finite.

    Args:
        source: what the weights are and where they lie.

    Raises:
        ValueError: these are not exactly the weights of the model, by OpenCLIP's names.
    """
    import torch
    from transformers import CLIPModel

    with torch.device("meta"):
        expected = CLIPModel(config).state_dict()
    state, names = renamed(found, expected)
    differences(state, expected, names).refuse(source, _AGAIN)
    refuse_non_finite(state.items(), source)
    hide_progress_bars()
    # By default all weights would be rounded to the dtype of the first.
    return CLIPModel.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)


def renamed(
    state: Mapping[str, Tensor], expected: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return OpenCLIP's weights by transformers' names, and OpenCLIP's name of each.

    Args:
        expected: names in transformers' CLIPModel; what the file has beside stays as it is.
    """
    names = {name: _open_clip_name(name) for name in expected}
    found = {new: _part(new, state[name]) for new, name in names.items() if name in state}
    used = set(names.values())
    return found | {name: t for name, t in state.items() if name not in used}, names


def _open_clip_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    layer, _, kind = name.rpartition(".")
    if layer in _NORMS:
        return f"{_NORMS[layer]}.{kind}"
    if (match := _BLOCK.fullmatch(name)) and match[3] in _LAYERS:
        return f"{_TOWERS[match[1]]}transformer.resblocks.{match[2]}.{_LAYERS[match[3]]}{match[4]}"
    return name


def _part(name: str, tensor: Tensor) -> Tensor:
    """Return what of a weight of OpenCLIP's has a name of transformers'."""
    if name in ("text_projection.weight", "visual_projection.weight"):
        return tensor.mT.contiguous() if tensor.ndim > 1 else tensor
    if (third := _THIRD.fullmatch(name)) and tensor.ndim and len(tensor) % 3 == 0:
        return tensor.chunk(3)["qkv".index(third[1])].contiguous()
    return tensor
