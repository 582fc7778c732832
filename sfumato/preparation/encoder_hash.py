"""Hashes of autoencoder and text encoders, which name the caches of their outputs.

Only files are read. The hash covers the tensors in float32, the dtype in which encoders run, by
name, shape and value, and the settings that change the output. A folder may be moved, copied or
sharded in another way. Weights in half precision equal their copy in float32; the half-precision
variant of float32 weights has other values and is another encoder. Of an autoencoder only the
encoding half counts: a decoder may be tuned, and a scaling factor changed.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sfumato.config import ModelConfig
from sfumato.data.prepared.format import CacheIdentity
from sfumato.files import compact
from sfumato.models.formats import read_json, read_model_index
from sfumato.models.lora import find_lora
from sfumato.models.registry import find_family

AUTOENCODER = "vae"
# Settings that say nothing of what comes out of an encoder: names, notes, and what decodes.
_NOTES = {"_name_or_path", "name_or_path", "_diffusers_version", "transformers_version"}
_UNREAD = _NOTES | {
    *("dtype", "torch_dtype", "special_tokens_map_file"),
    *("sample_size", "force_upcast", "up_block_types", "use_post_quant_conv"),
    *("scaling_factor", "shift_factor", "latents_mean", "latents_std"),
}
# What older files leave out and newer ones state.
_DEFAULTS = {"use_quant_conv": True, "mid_block_add_attention": True}
_DECODES = ("decoder.", "post_quant_conv.")
_PUBLISHED = "text_model."  # before the names of CLIP's text encoders in some files
_TEXT_LORA = re.compile(
    r"text_encoder|text_model|(^|_)te\d?_|(^|\.)clip_[lg]\b|t5xxl|base_model\.model\.(encoder|model)\."
)


def cache_identity(
    config: ModelConfig, *, height: int, width: int, flip: bool, dtype: str, crop: str = "center"
) -> CacheIdentity:
    """Return what a cache of this model depends on; no network is loaded, the files are read.

    Args:
        config: of the model; its own `dtype` and network do not matter.
        height: of the encoded pictures in pixels, as is `width`.
        flip: whether mirrored pictures are stored too.
        dtype: of what is stored.
        crop: how pictures that are resized to cover the size are cut.

    Raises:
        ValueError: if the model's files are missing or damaged, or a merged LoRA changes a text
            encoder.
    """
    family, folder = find_family(config)
    _refuse_text_merges(config)
    components = set(family.components(folder))
    encoders = [name for name in family.encoders if name in components]
    tokenizers = [name for name in family.tokenizers if name in components]
    index = read_model_index(folder)
    zeros = "force_zeros_for_empty_prompt"
    return CacheIdentity(
        moments={
            "autoencoder": _hash_encoder(folder / AUTOENCODER, config, unread=_DECODES),
            "height": height,
            "width": width,
            "crop": crop,
            "resize": "lanczos",
            "flip": flip,
            "dtype": dtype,
        },
        text={
            "pipeline": family.pipeline_name,
            **{name: _hash_encoder(folder / name, config) for name in encoders},
            **{name: _hash_tokenizer(folder / name) for name in tokenizers},
            **({zeros: index[zeros]} if zeros in index else {}),
            "dtype": dtype,
        },
    )


def _hash_encoder(part: Path, config: ModelConfig, unread: tuple[str, ...] = ()) -> str:
    """Return the SHA-256 of settings and float32 weights; names that begin with `unread` aside."""
    digest = hashlib.sha256(compact(_meaningful(read_json(part / "config.json"))))
    files = _weight_files(part, config.variant, allow_pickle=config.allow_pickle)
    try:
        with ExitStack() as stack:
            read: dict[str, Callable[[], Tensor]] = {}
            for file in files:
                read |= _tensors(file, stack)
            named = {name.removeprefix(_PUBLISHED): get for name, get in read.items()}
            for name in sorted(name for name in named if not name.startswith(unread)):
                tensor = named[name]()
                if not tensor.is_floating_point():
                    continue  # positions, which some versions store and others count
                digest.update(compact([name, *tensor.shape]))
                digest.update(tensor.float().contiguous().numpy().data)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{part} holds weights that cannot be read ({error}); download or export the model "
            "again"
        ) from error
    return digest.hexdigest()


def _tensors(file: Path, stack: ExitStack) -> dict[str, Callable[[], Tensor]]:
    """Return how to read each tensor of a file, so that one at a time lies in memory."""
    if file.suffix == ".safetensors":
        opened = stack.enter_context(safe_open(file, "pt"))
        return {name: lambda name=name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {name: lambda tensor=tensor: tensor for name, tensor in loaded.items()}


def _weight_files(part: Path, variant: str | None, *, allow_pickle: bool) -> list[Path]:
    """Return the files that loading reads: those of the variant, or the plain ones without any."""
    cut = r"(-\d{5}-of-\d{5})?"
    marks = [rf"({cut}\.{re.escape(variant)}|\.{re.escape(variant)}{cut})"] if variant else []
    files = sorted(part.iterdir())
    for ending in (r"\.safetensors", *([r"\.bin"] if allow_pickle else [])):
        for mark in (*marks, cut):
            name = re.compile(rf"(diffusion_pytorch_model|pytorch_model|model){mark}{ending}")
            if matching := [file for file in files if name.fullmatch(file.name)]:
                return matching
    raise ValueError(
        f"{part} holds no weights of a known name ({', '.join(f.name for f in files)}); download "
        "or export the model again"
    )


def _hash_tokenizer(part: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(file for file in part.iterdir() if file.is_file()):
        content = file.read_bytes()
        if file.name == "tokenizer_config.json":
            content = compact(_meaningful(read_json(file)))
        digest.update(compact([file.name, len(content)]))
        digest.update(content)
    return digest.hexdigest()


def _meaningful(settings: Any) -> Any:
    """Leave out of an object what changes nothing that is encoded."""
    if not isinstance(settings, Mapping):
        return settings
    return {
        key: _meaningful(value)
        for key, value in settings.items()
        if key not in _UNREAD and not (key in _DEFAULTS and value == _DEFAULTS[key])
    }


def _refuse_text_merges(config: ModelConfig) -> None:
    """Refuse merged LoRA files that change a text encoder, as no cache is made with these."""
    if (merge := text_merge(config)) is not None:
        raise ValueError(
            f"{merge}, and cached states are made without it; train from tars "
            "(data.shards.cached=false), or export the merged model and give its folder"
        )


def text_merge(config: ModelConfig) -> str | None:
    """Name a merged LoRA file that changes a text encoder, in words, if there is one."""
    for name, merge in config.merge.items():
        file = find_lora(merge.path, f"model.merge.{name}.path")
        with safe_open(file, "pt") as opened:
            text = next(filter(_TEXT_LORA.search, opened.keys()), None)
        if text is not None:
            key = f"model.merge.{name}.path = {merge.path!r}"
            return f"{key} changes a text encoder (it has {text})"
    return None
