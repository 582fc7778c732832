"""Checks of the settings that images and prepared folders share."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from sfumato.config import (
    ImageDataConfig,
    ImageSourceConfig,
    ShardDataConfig,
    ShardSourceConfig,
)
from sfumato.data.decode import LARGEST, Bounds
from sfumato.data.sample import Choices, Size

DataConfig = ImageDataConfig | ShardDataConfig
Source = TypeVar("Source", ImageSourceConfig, ShardSourceConfig)
_CHOICES = {"crop": ("center", "random"), "captions": ("first", "random")}


def check_reading(
    key: str, config: DataConfig, sources: Mapping[str, ImageSourceConfig | ShardSourceConfig]
) -> None:
    """Refuse impossible settings with a ValueError that names the setting.

    Args:
        key: of the settings: data.images or data.shards.
        sources: as `named_sources` returns them.
    """
    for name, known in _CHOICES.items():
        value = vars(config)[name]
        if value not in known:
            raise ValueError(f"{key}.{name}={value!r} is unknown; choose {' or '.join(known)}")
    for name, value, least in (
        ("min_size", config.min_size, 1),
        ("workers", config.workers, 0),
        ("prefetch", config.prefetch, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{key}.{name}={value} is too small; give {least} or more")
    if not 1 <= config.max_pixels <= LARGEST:
        raise ValueError(
            f"{key}.max_pixels={config.max_pixels} is out of range; give 1 to {LARGEST}, above "
            "which Pillow refuses pictures as decompression bombs"
        )
    weights = any(source.weight is not None for source in sources.values())
    for name, source in sources.items():
        _check_source(name, source, weights=weights)


def named_sources(key: str, config: Source, sources: dict[str, Any]) -> dict[str, Source]:
    """Return the sources by the names of their settings.

    Args:
        config: the single source, if it has a path.
        sources: several, by name.

    Raises:
        ValueError: there is a single one and several, or none.
    """
    several: dict[str, Source] = {f"{key}.sources.{name}": s for name, s in sources.items()}
    if config.path is None:
        if not several:
            raise ValueError(f"{key}.path is missing; name what to read")
        return several
    if several:
        out = " ".join(f"{name}=null" for name in several)
        raise ValueError(
            f"{key}.path = {config.path!r} is given beside {key}.sources; take these out ({out}), "
            f"or give it as one more, {key}.sources.NAME.path=..."
        )
    return {key: config}


def bounds_of(config: DataConfig) -> Bounds:
    """Return which pictures are taken."""
    return Bounds(config.min_size or 1, config.max_pixels)


def choices_of(config: DataConfig, sizes: Sequence[Size]) -> Choices:
    """Return how samples are made, in these sizes."""
    return Choices(
        sizes,
        random_crop=config.crop == "random",
        flip=config.flip,
        random_caption=config.captions == "random",
        bounds=bounds_of(config),
    )


def _check_source(
    key: str, source: ImageSourceConfig | ShardSourceConfig, *, weights: bool
) -> None:
    if not source.path:
        raise ValueError(f"{key}.path is missing; name what to read")
    if source.repeats < 1:
        raise ValueError(f"{key}.repeats={source.repeats} is too small; give 1 or more")
    if not weights:
        return
    if source.weight is None:
        raise ValueError(f"{key} has no weight, but others have; give all of them one, or none")
    if not 0 < source.weight < float("inf"):
        raise ValueError(f"{key}.weight={source.weight} is no share; give a positive number")
    if source.repeats != 1:
        raise ValueError(
            f"{key} has repeats={source.repeats} beside a weight, which already says how often it "
            "is drawn; leave one of them out"
        )
