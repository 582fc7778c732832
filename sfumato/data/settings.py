"""Settings that images and prepared folders share: their checks, and what they mean."""

from typing import Any

from sfumato.config import ImageDataConfig, PairDataConfig, ShardDataConfig, check_values
from sfumato.data.decode import Bounds
from sfumato.data.pools import bucket_sizes, check_size
from sfumato.data.sample import Choices
from sfumato.data.store import check_address, is_address


def checked_sources(key: str, config: ImageDataConfig | ShardDataConfig) -> dict[str, Any]:
    """Return the settings of each source by key, such as data.images.sources.NAME; check all.

    Args:
        key: of the settings, such as data.images.

    Raises:
        ValueError: a setting is impossible; the message names it.
    """
    check_values(config, f"{key}.")
    if isinstance(config, ShardDataConfig) and config.cached and config.crop == "random":
        raise ValueError(
            f"{key}.crop=random does not work with a cache, whose pictures were cropped in the "
            "centre when they were encoded; set crop=center, or cached=false"
        )
    several = {f"{key}.sources.{name}": source for name, source in config.sources.items()}
    if several and config.path is not None:
        out = " ".join(f"{name}=null" for name in several)
        raise ValueError(
            f"{key}.path = {config.path!r} is given beside {key}.sources; take these out ({out}), "
            f"or give it as one more, {key}.sources.NAME.path=..."
        )
    named = several or {key: config}
    weights = any(source.weight is not None for source in named.values())
    for name, source in named.items():
        if not source.path:
            raise ValueError(f"{name}.path is missing; name what to read")
        if is_address(source.path) and isinstance(config, ShardDataConfig):
            check_address(f"{name}.path", source.path)
        if weights and source.weight is None:
            raise ValueError(f"{name} has no weight, but others have; give all of them one")
        if weights and source.repeats != 1:
            raise ValueError(
                f"{name} has repeats={source.repeats} beside a weight, which already says how "
                "often it is drawn; leave one of them out"
            )
    return named


def check_pairs(key: str, config: PairDataConfig) -> None:
    """Refuse impossible settings of pairs.

    Args:
        key: of the settings, such as data.pairs.

    Raises:
        ValueError: naming the setting.
    """
    check_values(config, f"{key}.")
    if not config.path:
        raise ValueError(f"{key}.path is missing; name a table of pairs")
    for name in ("image_columns", "label_columns"):
        columns = vars(config)[name]
        if len(columns) != 2 or columns[0] == columns[1]:
            raise ValueError(
                f"{key}.{name}={columns} are not two columns; name that of the first image and "
                "that of the second"
            )


def choices_of(
    config: ImageDataConfig | ShardDataConfig, height: int, width: int, divisor: int = 1
) -> Choices:
    """Return how samples are made, and which pictures are taken.

    Args:
        height: of the images, in pixels; with buckets, height x width is their area.
        width: of the images.
        divisor: sides are multiples of it.

    Raises:
        ValueError: a side is not a positive multiple of the divisor.
    """
    check_size(height, width, divisor)
    return Choices(
        bucket_sizes(height, width, divisor) if config.buckets else ((height, width),),
        random_crop=config.crop == "random",
        flip=config.flip,
        random_caption="random" in {config.captions, _lines(config)},
        bounds=Bounds(config.min_size or 1, config.max_pixels),
    )


def _lines(config: ImageDataConfig | ShardDataConfig) -> str:
    """Return which lines of a caption are read; those of prepared folders were chosen before."""
    return config.caption_lines if isinstance(config, ImageDataConfig) else "all"
