"""Encode the pictures and captions of a selection once for all steps, shard by shard.

A shard of a cache is a function of its tar, of the samples that are encoded and of the cache's
identity: batches never cross shards, so that it is the same to the byte whichever process makes it.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sfumato.config import ModelConfig, PrepareConfig
from sfumato.data.prepared.format import (
    EMPTY,
    FORMAT,
    MANIFEST,
    SHARDS,
    CachedRecord,
    PreparedError,
    read_tar_record,
    record_text,
)
from sfumato.models.registry import load_encoders
from sfumato.preparation.bins import tally
from sfumato.preparation.cache_plan import (
    CacheJob,
    count_samples,
    encoding_alone,
    lacking,
    plan_cache,
)
from sfumato.preparation.encoding import Encoder
from sfumato.preparation.files import placed, sha256_of, write_text
from sfumato.preparation.listing import made_of
from sfumato.training.distribution import Distribution


def precache(config: PrepareConfig, distribution: Distribution) -> dict[str, int]:
    """Encode what a selection keeps, each process its own shards; what is there is not made again.

    The encoders work in float32 (TF32 where the GPU has it), whatever `model.dtype` says of
    training. Samples that were encoded for another selection stay in the cache.

    Returns:
        How many of the selection's samples are kept, and how many dropped by each reason.

    Raises:
        ValueError: if a setting is impossible, tars or selection are missing or changed, what is
            encoded is not finite, or the disk is full. Finished shards stay.
    """
    with distribution.together():
        model = encoding_alone(config.model)
        job = plan_cache(config, model)
        mine = job.names[distribution.rank :: distribution.world]
        moments, _ = job.caches
        own = [
            (name, len(lacks.get(moments, ()))) for name in mine if (lacks := lacking(job, name))
        ]
        if distribution.is_main:
            _begin(job)
    _make(job, model, sorted(distribution.gather(own)), distribution)
    with distribution.together():
        counts = [count_samples(job, name) for name in mine]
    every = distribution.gather(counts)
    return tally(sum(kept for kept, _ in every), [dropped for _, dropped in every])


def _begin(job: CacheJob) -> None:
    """Say in each cache's folder what it is, and remove what a killed process left there."""
    identity = job.identity
    for cache, kind, content in zip(
        job.caches, ("moments", "text"), (identity.moments, identity.text), strict=True
    ):
        for unfinished in job.place(cache, "").glob(".*.tmp"):
            unfinished.unlink()
        manifest = {"format": FORMAT, "kind": kind, **content}
        write_text(job.place(cache, MANIFEST), json.dumps(manifest, indent=2) + "\n")


def _make(
    job: CacheJob, model: ModelConfig, todo: Sequence[tuple[str, int]], distribution: Distribution
) -> None:
    """Make shards, given with their numbers of pictures: one on each process, then the next."""
    own = todo[distribution.rank :: distribution.world]
    empty = job.place(job.caches[1], EMPTY)
    encoder = None
    with distribution.together():
        alone = distribution.is_main and not empty.exists()
        if own or alone:
            loaded = load_encoders(model)
            loaded.to(distribution.device)
            encoder = Encoder(loaded, job.storage)
        if encoder is not None and alone:
            _save(encoder.empty, empty)
    hidden = not (distribution.is_main and own)
    with tqdm(total=sum(n for _, n in own), unit="image", disable=hidden) as bar:
        for turn in range(math.ceil(len(todo) / distribution.world)):
            # Whoever fails ends all after this turn, and not when their last shard is made.
            with distribution.together():
                if encoder is not None and turn < len(own):
                    _make_shard(job, encoder, own[turn][0], bar.update)


def _make_shard(job: CacheJob, encoder: Encoder, name: str, told: Callable[[int], object]) -> None:
    """Make what the caches lack of one shard."""
    tar = read_tar_record(job.folder, name)
    file = job.folder / SHARDS / f"{name}.tar"
    size = file.stat().st_size if file.exists() else None
    if size != tar.bytes:
        raise PreparedError(
            f"{file} {'is missing' if size is None else f'has {size} bytes instead of {tar.bytes}'}"
            "; put it back as it was, or remove its record and prepare again"
        )
    for cache, wanted in lacking(job, name).items():
        samples = {index: tar.samples[index] for index in wanted}
        if cache == job.identity.moments_folder:
            shard = encoder.moments(file, samples, told)
        else:
            shard = encoder.text(file, samples)
        place = job.place(cache, f"{name}.safetensors")
        size, sha256 = _save(shard.tensors, place)
        record = CachedRecord(
            name, made_of(cache, tar, wanted), size, sha256, shard.rows, shard.dropped
        )
        write_text(place.with_suffix(".json"), record_text(record))


def _save(tensors: Mapping[str, Tensor], place: Path) -> tuple[int, str]:
    """Write tensors as a file, whole or not at all; return its bytes and their SHA-256."""
    with placed(place) as beside:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
        except SafetensorError as error:
            # It has no number of its own.
            full = os.strerror(errno.ENOSPC) in str(error)
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(place)) from error
        return beside.stat().st_size, sha256_of(beside)
