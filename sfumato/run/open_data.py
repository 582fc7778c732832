"""Data of a run: rows to train on, prompts of validation images, held-out samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.config import (
    ImageDataConfig,
    PairDataConfig,
    TrainConfig,
)
from sfumato.data.encoded import Pictures
from sfumato.data.images import open_pictures, validation_samples
from sfumato.data.pairs import first_pairs, open_pictured_pairs, pair_captions
from sfumato.data.prepared.format import CacheIdentity
from sfumato.data.prepared.open import first_captions, first_samples, open_shards
from sfumato.data.prompts import open_prompts, read_prompt_rows, read_prompts
from sfumato.data.sample import Preference, Sample
from sfumato.data.stream import PairedStream, Stream
from sfumato.models.limits import Limits
from sfumato.preparation.encoder_hash import cache_identity, text_merge


@dataclass(frozen=True)
class Data:
    """Rows of training, and what validation shows and measures."""

    stream: Stream[Any]
    prompts: list[str]  # one per validation image
    held_out: Sequence[Sample] | Sequence[Preference]
    pictures: Pictures | None = None  # of `stream`, where they are no prepared ones


def open_data(
    config: TrainConfig,
    limits: Limits | None,
    stream: Stream[Any] | None = None,
    prompts: Sequence[str] | None = None,
) -> Data:
    """Open all that a run reads.

    Args:
        limits: of the model; None if a script brings the model.
        stream: a script's own rows, in place of those that the settings name.
        prompts: a script's own prompts of validation images.

    Raises:
        ValueError: if something cannot be read.
    """
    opened, pictures = (stream, None) if stream is not None else _open_rows(config, limits)
    held_out = held_out_samples(config, limits)
    return Data(opened, validation_prompts(config, prompts), held_out, pictures)


def open_stream(config: TrainConfig, limits: Limits | None) -> Stream[Any]:
    """Open the rows to train on that the settings name; a cache has to be of the run's model.

    Raises:
        ValueError: if a file cannot be read, a folder is incomplete, or no cache fits.
    """
    return _open_rows(config, limits)[0]


def _open_rows(config: TrainConfig, limits: Limits | None) -> tuple[Stream[Any], Pictures | None]:
    if config.objective.reads_pairs:
        height, width = frame_size(config, limits)
        pairs, seed = config.data.pairs, config.training.seed
        return open_pictured_pairs(pairs, height=height, width=width, seed=seed)
    if not config.objective.reads_images:
        return _open_prompts(config), None
    images, pictures = _open_images(config, limits)
    if not config.objective.reads_prompts:
        return images, pictures
    return PairedStream(_open_prompts(config), images), pictures


def _open_prompts(config: TrainConfig) -> Stream[str]:
    data = config.data
    return open_prompts(
        str(data.prompts),
        key="data.prompts",
        column=data.column,
        seed=config.training.seed,
        shuffle=data.shuffle,
        buffer=data.buffer,
    )


def prompt_rows(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Return the rows of the prompt tables of training and validation, by prompt.

    Raises:
        ValueError: if a file cannot be read.
    """
    rooms = {"validation": config.validation}
    rooms |= {"data": config.data} if config.objective.reads_prompts else {}
    found: dict[str, dict[str, Any]] = {}
    for name, room in rooms.items():  # training's rows count where both have one
        if room.prompts:
            found |= read_prompt_rows(room.prompts, key=f"{name}.prompts", column=room.column)
    return found


def _open_images(
    config: TrainConfig, limits: Limits | None
) -> tuple[Stream[Sample], Pictures | None]:
    data, seed = config.data, config.training.seed
    height, width = frame_size(config, limits)
    step = bucket_step(limits, height, width)
    if not (data.shards.path or data.shards.sources):
        return open_pictures(data.images, height=height, width=width, divisor=step, seed=seed)
    stream = open_shards(
        data.shards,
        height=height,
        width=width,
        divisor=step if data.shards.buckets else 1,
        seed=seed,
        identity=_identity(config, height, width, flip=data.shards.flip),
        verify=data.verify,
    )
    return stream, None


def why_uncached(config: TrainConfig) -> str | None:
    """Return why a run whose own pictures have cache=auto has no cache; None if it has one.

    Raises:
        ValueError: if a merged LoRA file is missing.
    """
    key, data = own_pictures(config)
    if config.objective.trains != "model":
        return f"the {config.objective.trains} learns from the pictures themselves"
    if data.crop == "random":
        return f"{key}.crop=random cuts each picture anew"
    if config.model.parts not in (["network"], ["unet"], ["transformer"]):
        return f"model.parts={config.model.parts} trains a text encoder, whose states change"
    return text_merge(config.model)


def is_cached(config: TrainConfig) -> bool:
    """Say whether training reads what was encoded beforehand."""
    auto = own_pictures(config)[1].cache == "auto"
    return config.data.shards.cached or (auto and why_uncached(config) is None)


def own_pictures(config: TrainConfig) -> tuple[str, ImageDataConfig | PairDataConfig]:
    """Return key and value of the pictures that training reads, unless they were prepared."""
    if config.objective.reads_pairs:
        return "data.pairs", config.data.pairs
    return "data.images", config.data.images


def _identity(config: TrainConfig, height: int, width: int, *, flip: bool) -> CacheIdentity | None:
    """Return the identity of the cache that a run reads, if it reads one."""
    if not config.data.shards.cached:
        return None
    return cache_identity(config.model, height=height, width=width, flip=flip, dtype="float16")


def frame_size(config: TrainConfig, limits: Limits | None) -> tuple[int, int]:
    """Return height and width of training images in pixels.

    Raises:
        ValueError: if neither the settings nor the model say.
    """
    size = limits.size if limits is not None else None
    height, width = size or (None, None)
    height, width = config.sampler.height or height, config.sampler.width or width
    if height is None or width is None:
        raise ValueError("set sampler.height and sampler.width, the size of images in pixels")
    return height, width


def bucket_step(limits: Limits | None, height: int, width: int) -> int:
    """Return the step of bucket sides, in pixels.

    It is the largest multiple of the model's own step that divides both sides and is at most 64
    and an eighth of the shorter side; the model's own step if there is none.
    """
    multiple = limits.multiple if limits is not None else 1
    most = min(64, min(height, width) // 8)
    steps = range(multiple, most + 1, multiple)
    return max((s for s in steps if height % s == width % s == 0), default=multiple)


def held_out_samples(
    config: TrainConfig, limits: Limits | None
) -> Sequence[Sample] | Sequence[Preference]:
    """Return the rows of the validation loss: held-out ones, or the first of training."""
    count = config.validation.loss_images
    if not config.objective.has_validation_loss or not count:
        return []
    height, width = frame_size(config, limits)
    if config.objective.reads_pairs:
        key, pairs = validation_pairs(config)
        own = pairs is not config.data.pairs
        return first_pairs(pairs, count, height=height, width=width, key=key, warns=own)
    key, images = validation_images(config)
    if images.path or images.sources:
        own = images is not config.data.images
        return validation_samples(images, count, height=height, width=width, key=key, warns=own)
    identity, data = _identity(config, height, width, flip=False), config.data
    return first_samples(
        data.shards, count, height=height, width=width, identity=identity, verify=data.verify
    )


def validation_images(config: TrainConfig) -> tuple[str, ImageDataConfig]:
    """Return key and value of the images of validation, or training's if validation has none."""
    own = config.validation.images
    if own.path or own.sources:
        return "validation.images", own
    return "data.images", config.data.images


def validation_pairs(config: TrainConfig) -> tuple[str, PairDataConfig]:
    """Return key and value of the pairs of validation, or training's if validation has none."""
    if config.validation.pairs.path:
        return "validation.pairs", config.validation.pairs
    return "data.pairs", config.data.pairs


def validation_prompts(config: TrainConfig, brought: Sequence[str] | None = None) -> list[str]:
    """Return one prompt per validation image; fewer prompts repeat in a circle.

    Args:
        brought: a script's own prompts, in place of those that the settings name.

    Raises:
        ValueError: if there is no prompt, or a file cannot be read.
    """
    if config.objective.trains != "model":
        return []  # it makes no images from prompts
    count = config.validation.num_images
    own, data, (key, images) = config.validation, config.data, validation_images(config)
    own_captions = config.objective.has_validation_loss
    if brought:
        prompts = list(brought)
    elif own.prompts or (data.prompts and not own_captions):
        chosen, room = (own, "validation") if own.prompts else (data, "data")
        path, column = str(chosen.prompts), chosen.column
        prompts = read_prompts(path, key=f"{room}.prompts", column=column, limit=count)
    elif config.objective.reads_pairs:
        key, pairs = validation_pairs(config)
        prompts = pair_captions(pairs, count, key)
    elif images.path or images.sources:
        samples = validation_samples(images, count, height=8, width=8, key=key, warns=False)
        prompts = [sample.caption for sample in samples]
    elif config.data.shards.path or config.data.shards.sources:
        prompts = first_captions(config.data.shards, count)
    else:
        raise ValueError(
            "no prompts of validation images are named; give validation.prompts=FILE in training "
            "(a script can bring Own(prompts=[...])), or prompts=FILE in evaluation"
        )
    return [prompts[i % len(prompts)] for i in range(count)]
