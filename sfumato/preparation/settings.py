"""Settings of `sfumato prepare` that cannot be, refused before anything is done."""

import re

from sfumato.config_stages import PrecacheConfig, PrepareConfig
from sfumato.data.decode import LARGEST
from sfumato.models.model import DTYPES

STAGES = ("download", "pack", "filter", "precache", "index")


def check_prepare(config: PrepareConfig) -> None:
    """Refuse impossible settings with a ValueError that names the setting."""
    if not config.out.strip():
        raise ValueError("out is empty; name the folder to prepare")
    if unknown := [stage for stage in config.stages if stage not in STAGES]:
        raise ValueError(f"stages has {unknown[0]!r}; choose some of {', '.join(STAGES)}")
    if not config.stages:
        raise ValueError(f"stages is empty; choose some of {', '.join(STAGES)}")
    download, pack, chosen = config.download, config.pack, config.filter
    least = {
        "download.image_size": (download.image_size, 1),
        "download.samples_per_shard": (download.samples_per_shard, 1),
        "download.processes": (download.processes, 1),
        "download.threads": (download.threads, 1),
        "download.timeout": (download.timeout, 1),
        "download.retries": (download.retries, 0),
        "pack.samples_per_shard": (pack.samples_per_shard, 1),
        "pack.max_pixels": (pack.max_pixels, 1),
        "pack.workers": (pack.workers, 1),
        "filter.max_aspect": (chosen.max_aspect, 1),
    }
    for name, (value, bound) in least.items():
        if value is not None and value < bound:
            raise ValueError(f"{name}={value} is too small; give {bound} or more")
    if pack.max_pixels > LARGEST:
        raise ValueError(
            f"pack.max_pixels={pack.max_pixels} is too large; give {LARGEST} at most, above which "
            "Pillow refuses pictures as decompression bombs"
        )
    if pack.repeats != 1 or pack.weight is not None:
        raise ValueError(
            "pack.repeats and pack.weight are for training; each picture is packed once"
        )
    _check_source(config)
    _check_filter(config)
    check_precache(config.precache)


def _check_source(config: PrepareConfig) -> None:
    download, pack, model = config.download, config.pack, config.model
    if download.table is not None and pack.path is not None:
        raise ValueError(
            f"download.table={download.table!r} and pack.path={pack.path!r} are both given; "
            "prepare them in two folders"
        )
    if config.stages == ["download"] and download.table is None:
        raise ValueError("download.table is missing; name a table of URLs and captions")
    if "precache" in config.stages and model.pretrained is None and model.autoencoder is None:
        raise ValueError(
            "stages has precache, which needs the model whose encoders are used: give "
            "model.pretrained=DIR, or leave the stage out with stages=[download,pack,filter,index]"
        )


def _check_filter(config: PrepareConfig) -> None:
    chosen = config.filter
    if not re.fullmatch(r"[\w-][\w.-]*", chosen.name):
        raise ValueError(
            f"filter.name={chosen.name!r} names a folder; give letters, digits, '-', '_' and '.'"
        )
    if chosen.duplicates not in ("keep", "drop"):
        raise ValueError(f"filter.duplicates={chosen.duplicates!r}; choose keep or drop")
    for what, low, high in (
        ("size", chosen.min_size, chosen.max_size),
        ("caption", chosen.min_caption, chosen.max_caption),
        ("score", chosen.min_score, chosen.max_score),
    ):
        if low is not None and high is not None and low > high:
            raise ValueError(
                f"filter.min_{what}={low} is above filter.max_{what}={high}; nothing would be kept"
            )
    scored = chosen.min_score is not None or chosen.max_score is not None
    if scored != (chosen.score is not None):
        raise ValueError(
            "filter.score names the column that filter.min_score and filter.max_score bound; give "
            "it with one of them, or none of the three"
        )


def check_precache(settings: PrecacheConfig) -> None:
    """Refuse settings of precaching that cannot be with a ValueError that names them."""
    if settings.crop != "center":
        raise ValueError(
            f"precache.crop = {settings.crop!r} cannot be had, as a cache holds one crop of each "
            "picture; set precache.crop=center, or train from tars (data.shards.cached=false)"
        )
    if settings.dtype not in DTYPES:
        raise ValueError(
            f"precache.dtype = {settings.dtype!r} is unknown; choose {', '.join(DTYPES)}"
        )
    for name, value, least in (
        ("batch_size", settings.batch_size, 1),
        ("workers", settings.workers, 0),
    ):
        if value < least:
            raise ValueError(f"precache.{name} = {value} is too small; give {least} or more")
