"""Checks of the settings that images and prepared folders share."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from sfumato.config import (
    ImageDataConfig,
    ImageSourceConfig,
    ShardDataConfig,
    ShardSourceConfig,
    check_values,
)
from sfumato.data.decode import Bounds
from sfumato.data.sample import Choices, Size

DataConfig = ImageDataConfig | ShardDataConfig
Source = TypeVar("Source", ImageSourceConfig, ShardSourceConfig)


def check_reading(
    key: str, config: DataConfig, sources: Mapping[str, ImageSourceConfig | ShardSourceConfig]
) -> None:
    """Refuse impossible settings with a ValueError that names the setting.

    Args:
        key: of the settings: data.images or data.shards.
        sources: as `named_sources` returns them.
    """
    check_values(config, f"{key}.")
    weights = any(source.weight is not None for source in sources.values())
    for name, source in sources.items():
        if not source.path:
            raise ValueError(f"{name}.path is missing; name what to read")
        if weights and source.weight is None:
            raise ValueError(f"{name} has no weight, but others have; give all of them one")
        if weights and source.repeats != 1:
            raise ValueError(
                f"{name} has repeats={source.repeats} beside a weight, which already says how "
                "often it is drawn; leave one of them out"
            )


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
