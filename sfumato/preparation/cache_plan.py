"""Plan of a cache: its settings and identity, and the shards that lack samples."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sfumato.config import ModelConfig, PrecacheConfig, PrepareConfig
from sfumato.data.prepared.format import (
    CACHE,
    CachedRecord,
    CacheIdentity,
    PreparedError,
    TarRecord,
    read_cached_record,
    read_kept_record,
    read_tar_record,
)
from sfumato.data.sample import Size
from sfumato.models.limits import check_side
from sfumato.models.registry import find_family
from sfumato.preparation.encoder_hash import cache_identity
from sfumato.preparation.encoding import Storage
from sfumato.preparation.listing import is_of, made_of, selection_names, tar_names
from sfumato.preparation.settings import check_precache


@dataclass(frozen=True)
class CacheJob:
    """A cache to make.

    Attributes:
        folder: the prepared folder.
        selection: the selection whose samples are encoded.
        names: of all shards, ascending.
        identity: gives the names of the two caches.
        storage: how samples are encoded and stored.
    """

    folder: Path
    selection: str
    names: tuple[str, ...]
    identity: CacheIdentity
    storage: Storage

    @property
    def caches(self) -> tuple[str, str]:
        """Return the folders of moments and of text, below cache/."""
        return self.identity.moments_folder, self.identity.text_folder

    def path(self, cache: str, file: str) -> Path:
        """Return the path of a file of a cache."""
        return self.folder / CACHE / cache / file


def encoding_only(config: ModelConfig) -> ModelConfig:
    """Return the settings of a model that only encodes."""
    if config.merge or config.lora.start is not None:
        raise ValueError(
            "model.merge and model.lora.start change no cache, which holds the output of the "
            "published encoders; leave them out"
        )
    return replace(config, dtype="float32")


def plan_cache(config: PrepareConfig, model: ModelConfig) -> CacheJob:
    """Return the plan, after all checks that need no weights.

    Raises:
        ValueError: naming the setting, or the file.
    """
    settings, folder = config.precache, Path(config.out)
    check_precache(settings)
    names = tuple(tar_names(folder))
    selection = settings.selection or config.filter.name
    selections = selection_names(folder)
    if selection not in selections:
        raise ValueError(
            f"precache.selection = {selection!r} is not a selection of {folder}, which has "
            f"{', '.join(selections) or 'none'}; make it first (stages=[filter] filter.name=...)"
        )
    size = _size(settings, model)
    identity = cache_identity(
        model,
        height=size[0],
        width=size[1],
        crop=settings.crop,
        flip=settings.flip,
        dtype=settings.dtype,
    )
    storage = Storage(size, settings.flip, settings.dtype, settings.batch_size, settings.workers)
    return CacheJob(folder, selection, names, identity, storage)


def _size(settings: PrecacheConfig, model: ModelConfig) -> Size:
    """Return height and width of the pictures: those of the settings, or the model's own."""
    family, folder = find_family(model)
    limits = family.read_limits(folder)
    for name, pixels in (("height", settings.height), ("width", settings.width)):
        if pixels is None and limits.size is None:
            raise ValueError(
                f"model.pretrained = {model.pretrained!r} does not state its image size; set "
                f"precache.{name} in pixels, a multiple of {limits.multiple}"
            )
        check_side(f"precache.{name}", limits.multiple if pixels is None else pixels, limits)
    own = limits.size or (0, 0)
    return settings.height or own[0], settings.width or own[1]


def lacking(job: CacheJob, name: str) -> dict[str, tuple[int, ...]]:
    """Return the caches that lack samples of a shard, each with all samples it then holds."""
    tar = read_tar_record(job.folder, name)
    kept = _kept(job, name, tar)
    lacks = {}
    for cache in job.caches:
        record = _cached(job, cache, tar)
        if record is None:
            lacks[cache] = kept
            continue
        samples = tuple(sorted({*kept, *record.rows}))
        # A dropped sample has no row; only the hash tells that it was tried.
        finished = set(kept) <= set(record.rows) or record.made_of == made_of(cache, tar, samples)
        file = job.path(cache, f"{name}.safetensors")
        if not finished or not file.exists() or file.stat().st_size != record.bytes:
            lacks[cache] = samples
    return lacks


def _cached(job: CacheJob, cache: str, tar: TarRecord) -> CachedRecord | None:
    """Return a cache's record of a tar, if it was made from these bytes of the tar."""
    if not job.path(cache, f"{tar.name}.json").exists():
        return None
    record = read_cached_record(job.folder, cache, tar.name)
    return record if is_of(cache, record, tar) else None


def _kept(job: CacheJob, name: str, tar: TarRecord | None = None) -> tuple[int, ...]:
    """Return the selected samples of a shard; with a tar, check that they belong to it."""
    record = read_kept_record(job.folder, job.selection, name)
    if tar is not None and (
        record.tar not in {"", tar.made_of} or max(record.kept, default=-1) >= len(tar.samples)
    ):
        raise PreparedError(
            f"the selection {job.selection!r} belongs to an older tar {name}, which was packed "
            f"again since; run: sfumato prepare out={job.folder} stages=[filter] with "
            f"filter.name={job.selection} and its bounds"
        )
    return record.kept


def count_samples(job: CacheJob, name: str) -> tuple[int, Mapping[str, int]]:
    """Return how many samples of a shard both caches have, and the others by reason."""
    kept = set(_kept(job, name))
    records = [read_cached_record(job.folder, cache, name) for cache in job.caches]
    encoded = kept.intersection(*(record.rows for record in records))
    if encoded == kept:
        return len(encoded), {}
    dropped: Counter[str] = Counter()
    for record in records:
        dropped.update(record.dropped)
    assert len(encoded) + dropped.total() == len(kept), f"{name}: each sample is in one bin"
    return len(encoded), dropped
