"""Plan of a cache: its settings and identity, and the shards that lack samples."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sfumato.config import ModelConfig, PrecacheConfig, PrepareConfig
from sfumato.data.prepared.folder import PreparedFolder
from sfumato.data.prepared.format import CacheIdentity, PreparedError, TarRecord, is_of, made_of
from sfumato.data.sample import Size
from sfumato.models.limits import check_side
from sfumato.models.registry import find_family
from sfumato.preparation.encoder_hash import cache_identity


@dataclass(frozen=True)
class CacheJob:
    """A cache to make.

    Attributes:
        folder: the prepared folder.
        selection: the selection whose samples are encoded.
        names: of all shards, ascending.
        identity: gives the names of the two caches.
        model: whose encoders are used, in float32.
        settings: how samples are encoded and stored.
        size: height and width of the encoded pictures, in pixels.
    """

    folder: PreparedFolder
    selection: str
    names: tuple[str, ...]
    identity: CacheIdentity
    model: ModelConfig
    settings: PrecacheConfig
    size: Size

    @property
    def caches(self) -> tuple[str, str]:
        """Return the folders of moments and of text, below cache/."""
        return self.identity.moments_folder, self.identity.text_folder


def plan_cache(config: PrepareConfig) -> CacheJob:
    """Return the plan, after all checks that need no weights.

    Raises:
        ValueError: naming the setting, or the file.
    """
    settings, model, folder = config.precache, config.model, PreparedFolder(Path(config.out))
    if model.merge or model.lora.start is not None:
        raise ValueError(
            "model.merge and model.lora.start change no cache, which holds the output of the "
            "published encoders; leave them out"
        )
    names = tuple(folder.tar_names())
    selection = settings.selection or config.filter.name
    selections = folder.selection_names()
    if selection not in selections:
        raise ValueError(
            f"precache.selection = {selection!r} is not a selection of {folder}, which has "
            f"{', '.join(selections) or 'none'}; make it first (stages=[filter] filter.name=...)"
        )
    height, width = size = _size(settings, model)
    crop, flip, dtype = settings.crop, settings.flip, settings.dtype
    identity = cache_identity(model, height=height, width=width, crop=crop, flip=flip, dtype=dtype)
    model = replace(model, dtype="float32")
    return CacheJob(folder, selection, names, identity, model, settings, size)


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
    tar = job.folder.tar_record(name)
    selected = _kept(job, tar)
    lacks = {}
    for cache in job.caches:
        file = job.folder.tensors(cache, name)
        exists = file.with_suffix(".json").exists()
        record = job.folder.cached_record(cache, name) if exists else None
        if record is None or not is_of(cache, record, tar):
            lacks[cache] = selected
            continue
        samples = tuple(sorted({*selected, *record.rows}))
        # A dropped sample has no row; only the hash tells that it was tried.
        finished = set(selected) <= set(record.rows) or record.made_of == made_of(
            cache, tar, samples
        )
        if not finished or not file.exists() or file.stat().st_size != record.bytes:
            lacks[cache] = samples
    return lacks


def _kept(job: CacheJob, tar: TarRecord) -> tuple[int, ...]:
    """Return the selected samples of a shard, which have to be of this very tar."""
    record = job.folder.kept_record(job.selection, tar.name)
    if record.tar in {"", tar.made_of} and max(record.kept, default=-1) < len(tar.samples):
        return record.kept
    raise PreparedError(
        f"the selection {job.selection!r} belongs to an older tar {tar.name}, which was packed "
        f"again since; run: sfumato prepare out={job.folder} stages=[filter] with "
        f"filter.name={job.selection} and its bounds"
    )


def count_samples(job: CacheJob, name: str) -> tuple[int, Mapping[str, int]]:
    """Return how many samples of a shard both caches have, and the others by reason."""
    kept = set(job.folder.kept_record(job.selection, name).kept)
    records = [job.folder.cached_record(cache, name) for cache in job.caches]
    encoded = kept.intersection(*(record.rows for record in records))
    if encoded == kept:
        return len(encoded), {}
    dropped: Counter[str] = Counter()
    for record in records:
        dropped.update(record.dropped)
    assert len(encoded) + dropped.total() == len(kept), f"{name}: each sample is in one bin"
    return len(encoded), dropped
