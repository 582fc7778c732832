"""Combinations of settings of `sfumato prepare` that cannot work, refused before any work."""

import os
import re

from sfumato.conditions import leaves_of
from sfumato.config import PrepareConfig, check_values
from sfumato.data.store import check_addresses, is_address
from sfumato.parts import slice_of


def check_prepare(config: PrepareConfig) -> None:
    """Refuse single values and combinations that cannot work, with a ValueError naming the key."""
    check_values(config)
    pack = config.pack
    if is_address(config.out):
        raise ValueError(
            "out names an address, and prepared data is written to a disk; give a folder on this "
            "machine, and upload it afterwards (docs/prepare.md)"
        )
    if pack.repeats != 1 or pack.weight is not None:
        raise ValueError(
            "pack.repeats and pack.weight are for training; each picture is packed once"
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.engine == "ray" and world > 1:
        raise ValueError(
            f"engine=ray works from one process, and torchrun started {world}; start sfumato "
            "prepare without torchrun, or leave engine=ray out"
        )
    check_addresses(leaves_of(config))
    slice_of(config.part)
    if config.part is not None and config.stages not in (["pack"], ["precache"]):
        raise ValueError(
            f"part={config.part} shares one stage with others, and stages={config.stages}; give "
            "stages=[pack] or stages=[precache], and run the rest without part"
        )
    if config.stages == ["pack"] and config.part is not None and is_address(pack.path or ""):
        raise ValueError(
            f"part={config.part} of pack.path={pack.path} would copy the whole input to each "
            "machine; copy it to a disk that all machines see, and give its path"
        )
    if config.ray is not None and is_address(pack.path or ""):
        raise ValueError(
            f"pack.path={pack.path} is copied to this machine, and ray={config.ray} has others "
            "that do not see the copy; copy it to a disk that all machines see, and give its path"
        )
    if config.part is not None and world > 1:
        raise ValueError(
            f"part={config.part} is for one process, and torchrun started {world}; start sfumato "
            "prepare without torchrun, with workers=N"
        )
    _check_source(config)
    _check_filter(config)
    if config.precache.crop != "center":
        raise ValueError(
            f"precache.crop={config.precache.crop!r} does not work, as a cache holds one crop of "
            "each picture; set precache.crop=center, or train from tars (data.shards.cached=false)"
        )


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
