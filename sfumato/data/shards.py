"""Open what `sfumato prepare` wrote for training: tars, or the cache made of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sfumato.config import ShardDataConfig, check_values
from sfumato.data.buckets import check_size
from sfumato.data.cache_reader import CacheReader
from sfumato.data.cached import EMPTY, CacheIdentity
from sfumato.data.entries import Refusals
from sfumato.data.left_out import SkipLog
from sfumato.data.prepared import CACHE, PreparedError, read_index, read_kept_record
from sfumato.data.shard_caches import find_caches
from sfumato.data.shard_checks import (
    check_cached,
    check_tars,
    count_cached,
    selected_counts,
)
from sfumato.data.shard_order import ShardOrder
from sfumato.data.shard_readers import Choices, Selected, ShardReader, TarReader
from sfumato.data.shard_stream import ShardStream


def open_shards(
    config: ShardDataConfig,
    *,
    height: int,
    width: int,
    seed: int,
    identity: CacheIdentity | None = None,
) -> ShardStream:
    """Open a prepared folder for training: endless, shuffled, resumable at the exact sample.

    Raw and cached rows come in the same order, with the same captions and mirrors, where the cache
    holds all that the selection keeps.

    Args:
        config: the folder, and what is done with its samples.
        height: of the images, in pixels; `width` likewise.
        seed: decides order, crops, mirrors and captions.
        identity: with a cache, of the model that is trained and of the size.

    Raises:
        ValueError: a setting is impossible, the folder is incomplete, a shard vanished or changed
            since it was indexed, or no cache fits.
    """
    check_shard_config(config)
    check_size(height, width, 1)
    folder, log = Path(config.path or "").expanduser(), SkipLog()
    index = read_index(folder)
    counts = selected_counts(folder, index, config.selection)
    selected = Selected(folder, config.selection, index.tars, counts)
    choices = Choices(
        (height, width), config.crop == "random", config.flip, config.captions == "random"
    )
    reader: ShardReader
    if config.cached:
        assert identity is not None, "whoever reads a cache says of what model"
        caches = find_caches(selected, index, identity, flip=config.flip)
        check_cached(selected, index, caches)
        selected = replace(selected, counts=count_cached(selected, index, caches, log))
        empty = _read_empty(folder / CACHE / caches.text / EMPTY)
        reader = CacheReader(selected, caches, empty, choices, keep=_keep(config, counts))
    else:
        check_tars(selected)
        reader = TarReader(selected, choices, keep=_keep(config, counts))
    return ShardStream(
        ShardOrder(selected.counts, seed=seed, shuffle=config.shuffle, buffer=config.buffer),
        reader,
        Refusals(log),
        shards=_fingerprint(selected, index.kept.get(config.selection, "")),
        settings=_order_in_words(config, seed),
        workers=config.workers,
        prefetch=config.prefetch,
    )


def first_captions(config: ShardDataConfig, count: int) -> list[str]:
    """Return the main captions of the first samples in file order; at most all.

    Raises:
        ValueError: as `open_shards`, of the folder and its selection.
    """
    check_shard_config(config)
    folder = Path(config.path or "").expanduser()
    index = read_index(folder)
    selected = Selected(
        folder, config.selection, index.tars, selected_counts(folder, index, config.selection)
    )
    found: list[str] = []
    for shard, tar in enumerate(selected.tars):
        if len(found) < count and selected.counts[shard]:
            kept = read_kept_record(folder, config.selection, tar.name).kept
            found += [member.captions[0] for member in selected.members(shard, kept)]
    return found[:count]


def check_shard_config(config: ShardDataConfig) -> None:
    """Refuse impossible settings with a ValueError that names the setting."""
    if not config.path:
        raise ValueError(
            "data.shards.path is missing; name the folder that sfumato prepare wrote (its out)"
        )
    check_values(config, "data.shards.")
    if config.cached and config.crop == "random":
        raise ValueError(
            "data.shards.crop=random cannot be had from a cache, whose pictures were cropped in "
            "the centre when they were encoded; set crop=center, or cached=false"
        )


def _read_empty(place: Path) -> dict[str, Tensor]:
    try:
        return load_file(place)
    except (OSError, SafetensorError) as error:
        raise PreparedError(
            f"{place}, the states of the empty prompt, cannot be read ({error}); precache again"
        ) from None


def _keep(config: ShardDataConfig, counts: Sequence[int]) -> int:
    """Return how many samples' records are kept: those of two windows, so that none is read twice.

    While one window ends, prefetching is in the next.
    """
    return 2 * (config.buffer + max(counts))


def _fingerprint(selected: Selected, kept: str) -> str:
    """Return a hash of the samples that are read; raw and cached ones are the same samples.

    Args:
        kept: a hash of which samples the selection keeps.
    """
    digest = hashlib.sha256(f"{selected.selection}\0{kept}".encode())
    for tar, count in zip(selected.tars, selected.counts, strict=True):
        if count:
            digest.update(f"\0{tar.name}/{tar.sha256}/{count}".encode())
    return digest.hexdigest()[:16]


def _order_in_words(config: ShardDataConfig, seed: int) -> str:
    if not config.shuffle:
        return "file order"
    return f"shuffled within {config.buffer} samples by seed {seed}"
