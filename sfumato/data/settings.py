"""Settings that images and prepared folders share: their checks, and what they mean."""

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

Source = TypeVar("Source", ImageSourceConfig, ShardSourceConfig)


def checked_sources(key: str, config: Source, sources: dict[str, Any]) -> dict[str, Source]:
    """Return the sources by the names of their settings, and check all settings.

    Args:
        key: of the settings: data.images or data.shards.
        config: the single source, if it has a path; and how sources are read.
        sources: several, by name.

    Raises:
        ValueError: a setting is impossible; it names the setting.
    """
    named = _named_sources(key, config, sources)
    check_values(config, f"{key}.")
    weights = any(source.weight is not None for source in named.values())
    for name, source in named.items():
        if not source.path:
            raise ValueError(f"{name}.path is missing; name what to read")
        if weights and source.weight is None:
            raise ValueError(f"{name} has no weight, but others have; give all of them one")
        if weights and source.repeats != 1:
            raise ValueError(
                f"{name} has repeats={source.repeats} beside a weight, which already says how "
                "often it is drawn; leave one of them out"
            )
    return named


def _named_sources(key: str, config: Source, sources: dict[str, Any]) -> dict[str, Source]:
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


def choices_of(config: ImageDataConfig | ShardDataConfig, sizes: tuple[Size, ...]) -> Choices:
    """Return how samples of these sizes are made, and which pictures are taken."""
    return Choices(
        sizes,
        random_crop=config.crop == "random",
        flip=config.flip,
        random_caption=config.captions == "random",
        bounds=Bounds(config.min_size or 1, config.max_pixels),
    )
