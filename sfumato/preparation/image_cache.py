"""Encoder of a run's own pictures, before its first step, into a cache in the run folder."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from sfumato.config import ModelConfig, PrecacheConfig
from sfumato.data.encoded import (
    CacheFolders,
    PictureCache,
    Pictures,
    lacking,
    made_of,
    shard_name,
)
from sfumato.data.prepared.folder import EMPTY, PreparedFolder
from sfumato.models.model import TextToImageModel
from sfumato.models.registry import load_encoders
from sfumato.preparation.encoder_hash import cache_identity
from sfumato.preparation.encoding import Encoder, Picture, Shard
from sfumato.preparation.precache import begin_cache, in_turns, write_shard
from sfumato.training.distribution import Distribution

_DTYPE = "float16"
_MOST_LOST = 0.5  # of the pictures of a size: a replacement is then found among the others
_AT_ONCE, _PIXELS = 16, 16 * 512**2  # pictures that are encoded together, and their pixels at most


def cache_pictures(
    pictures: Pictures, model: ModelConfig, run: Path, workers: int, distribution: Distribution
) -> str | None:
    """Encode the pictures that the run's cache lacks, each process its own shards; then read it.

    The encoders work in float32, as `sfumato prepare` has it.

    Returns:
        Why the cache cannot be read, if it cannot.

    Raises:
        ValueError: on every process, if the cache is of other weights, sizes or dtypes, a file is
            damaged, an encoded value is not finite, or the disk is full. Finished shards stay.
    """
    with distribution.together():
        folders = _folders(pictures, model, run)
        if distribution.is_main:
            folders.refuse_others()
            for bucket in (*pictures.used, None):
                kind = "text" if bucket is None else "moments"
                name = folders.of(bucket)
                begin_cache(folders.folder, name, kind, folders.identities[name])
    with distribution.together():
        mine = pictures.shards[distribution.rank :: distribution.world]
        lacks = [(i, len(pictures.rows(i))) for i in mine if lacking(pictures, folders, i)]
    _make(pictures, folders, model, sorted(distribution.gather(lacks)), workers, distribution)
    with distribution.together():
        cache = PictureCache(pictures, folders)
    for bucket in pictures.used:
        if cache.lost(bucket) > _MOST_LOST:
            height, width = pictures.choices.sizes[bucket]
            return f"most of the pictures of {height} x {width} pixels cannot be read"
    pictures.cache = cache
    return None


def _folders(pictures: Pictures, model: ModelConfig, run: Path) -> CacheFolders:
    """Return the folders of the run's cache; the encoders' files are read."""
    sizes, flip = pictures.choices.sizes, pictures.choices.flip
    height, width = sizes[0]
    identity = cache_identity(model, height=height, width=width, flip=flip, dtype=_DTYPE)
    moments = [{**identity.moments, "height": h, "width": w} for h, w in sizes]
    return CacheFolders(PreparedFolder(run, of_run=True), moments, identity.text)


def _make(
    pictures: Pictures,
    folders: CacheFolders,
    model: ModelConfig,
    todo: Sequence[tuple[int, int]],
    workers: int,
    distribution: Distribution,
) -> None:
    """Encode shards in turns, one on each process, and the empty prompt on the main one."""
    own = todo[distribution.rank :: distribution.world]
    used, folder, text, empty = pictures.used, folders.folder, folders.of(None), Path(EMPTY).stem
    encoders: dict[int, Encoder] = {}
    with distribution.together():
        record = folder.tensors(text, empty).with_suffix(".json")
        lacks_empty = distribution.is_main and not (
            record.exists() and folder.tensors(text, empty).exists()
        )
        if own or lacks_empty:
            loaded = load_encoders(replace(model, dtype="float32", merge={}))
            loaded.to(distribution.device)
            encoders = {bucket: _encoder(pictures, loaded, bucket, workers) for bucket in used}
        if lacks_empty:
            states = encoders[used[0]].empty
            write_shard(folder, text, empty, "", Shard(states, (0,), {}))

    def make(shard: int, progress: Callable[[int], object]) -> None:
        for cache, bucket in lacking(pictures, folders, shard):
            rows = pictures.rows(shard, bucket)
            samples = {row: _picture(pictures, pictures.number(shard, row)) for row in rows}
            if bucket is None:
                made = encoders[used[0]].text(samples)
            else:
                made = encoders[bucket].moments(samples, progress)
            content = made_of(cache, pictures, shard, rows)
            write_shard(folder, cache, shard_name(shard), content, made)

    in_turns(todo, make, distribution)


def _encoder(pictures: Pictures, model: TextToImageModel, bucket: int, workers: int) -> Encoder:
    choices = pictures.choices
    height, width = size = choices.sizes[bucket]
    settings = PrecacheConfig(flip=choices.flip, dtype=_DTYPE, workers=workers)
    settings.batch_size = max(1, min(_AT_ONCE, _PIXELS // (height * width)))
    otherwise = f"set {pictures.key}.cache=off"
    return Encoder(model, settings, size, bounds=choices.bounds, otherwise=otherwise)


def _picture(pictures: Pictures, number: int) -> Picture:
    entry = pictures.entries[number]
    return Picture(entry.name, entry.blob, pictures.captions(number))
