"""Stage precache: encodes the pictures and captions of a selection, shard by shard.

A shard of a cache depends only on its tar, the encoded samples and the cache's identity. Batches
never cross shards, so every worker makes the same bytes.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sfumato.config import PrepareConfig
from sfumato.data.entries import SpanBlob
from sfumato.data.left_out import tally
from sfumato.data.prepared.folder import EMPTY, MANIFEST, PreparedFolder
from sfumato.data.prepared.format import (
    FORMAT,
    CachedRecord,
    Member,
    PreparedError,
    made_of,
    write_record,
)
from sfumato.files import new_file, sha256_of, write_text
from sfumato.models.registry import load_encoders
from sfumato.parts import slice_of
from sfumato.preparation.cache_plan import CacheJob, count_samples, lacking, plan_cache
from sfumato.preparation.encoding import Encoder, Picture, Shard
from sfumato.preparation.engine import ALONE, Engine, Progress, Tick, map_shards
from sfumato.preparation.faults import wrong_size
from sfumato.preparation.pool import worker_index
from sfumato.preparation.tars import clear_unfinished, tidied, turn
from sfumato.training.distribution import Distribution

T = TypeVar("T")


def precache(
    config: PrepareConfig, distribution: Distribution, engine: Engine = ALONE
) -> dict[str, int]:
    """Encode the samples of a selection that the cache lacks.

    The encoders work in float32 (TF32 where the GPU has it); `model.dtype` is for training.
    Samples that were encoded for another selection stay in the cache.

    Args:
        distribution: under torchrun each process makes its own shards, without an engine.

    Returns:
        How many of the selection's samples are kept, and how many dropped by each reason.

    Raises:
        ValueError: if a setting is impossible, tars or selection are missing or changed, an encoded
            value is not finite, or the disk is full. Finished shards stay.
    """
    with distribution.together():
        job = plan_cache(config)
        mine = job.names[distribution.rank :: distribution.world] if distribution.world > 1 else ()
        moments, text = job.caches
        own = [
            (name, len(lacks.get(moments, ()))) for name in mine if (lacks := lacking(job, name))
        ]
        if distribution.is_main:
            begin_cache(job.folder, moments, "moments", job.identity.moments)
            begin_cache(job.folder, text, "text", job.identity.text)
    if distribution.world == 1:
        return _mapped(job, engine)
    _make(job, sorted(distribution.gather(own)), distribution)
    with distribution.together():
        counts = [count_samples(job, name) for name in mine]
    every = distribution.gather(counts)
    return tally(sum(kept for kept, _ in every), [dropped for _, dropped in every])


def precache_part(config: PrepareConfig, engine: Engine) -> dict[str, int]:
    """Encode what `config.part` of the shards lacks, beside processes that encode the others.

    Raises:
        ValueError: as `precache`.
    """
    job = plan_cache(config)
    names = job.names[slice_of(config.part)]
    moments, text = job.caches
    with turn(job.folder.shards):
        begin_cache(job.folder, moments, "moments", job.identity.moments, alone=False)
        begin_cache(job.folder, text, "text", job.identity.text, alone=False)
    make = ShardEncoder(job)
    with Progress(f"precache {config.part}", None, "image", shards=len(names)) as progress:
        for kept, dropped in map_shards(make, names, engine, tick=progress.tick, gpu=True):
            progress.add(kept, dropped)
    return progress.bins


def begin_cache(
    prepared: PreparedFolder,
    cache: str,
    kind: str,
    content: Mapping[str, Any],
    *,
    alone: bool = True,
) -> None:
    """Write a cache's manifest, and remove the unfinished files of a killed process.

    Args:
        alone: no other process writes to the cache; unfinished files are left there otherwise.

    Raises:
        PreparedError: files that Sfumato did not write are in the way, or the disk is full.
    """
    folder = prepared.cache(cache)
    files = sorted(folder.glob("[!.]*"))
    if files and not (folder / MANIFEST).exists():
        others = "another name (name=...)" if prepared.of_run else "another out"
        raise PreparedError(
            f"{folder} holds {files[0].name}, which Sfumato did not write; give {others}, or move "
            "it away"
        )
    if alone:
        clear_unfinished(folder)
    manifest = {"format": FORMAT, "kind": kind, **content}
    text = json.dumps(manifest, indent=2) + "\n"
    write_text(folder / MANIFEST, text, failure=PreparedError)


def _mapped(job: CacheJob, engine: Engine) -> dict[str, int]:
    """Encode the shards that lack samples, by an engine."""
    make, folders = ShardEncoder(job), map(job.folder.cache, job.caches)
    with (
        tidied(*folders),
        Progress("precache", None, "image", shards=len(job.names)) as progress,
    ):
        for kept, dropped in map_shards(make, job.names, engine, tick=progress.tick, gpu=True):
            progress.add(kept, dropped)
    if not (job.folder.cache(job.caches[1]) / EMPTY).exists():
        make.load()
    return progress.bins


@final
class ShardEncoder:
    """Function that encodes shards; it loads the encoders when the first one lacks samples."""

    def __init__(self, job: CacheJob) -> None:
        self._job = job
        self._encoder: Encoder | None = None

    def __call__(self, name: str, tick: Tick) -> tuple[int, Mapping[str, int]]:
        """Encode what a shard lacks; return how many samples it has, and the others by reason."""
        if lacking(self._job, name):
            _make_shard(self._job, self.load(), name, tick)
        return count_samples(self._job, name)

    def load(self) -> Encoder:
        """Return the encoders of this worker; the first one's write the empty prompt."""
        if self._encoder is None:
            device = torch.device("cpu")
            if torch.cuda.is_available():
                device = torch.device("cuda", worker_index() % torch.cuda.device_count())
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            self._encoder = _load(self._job, device)
            empty = self._job.folder.cache(self._job.caches[1]) / EMPTY
            if not empty.exists():
                save_tensors(self._encoder.empty, empty)
        return self._encoder


def _load(job: CacheJob, device: torch.device) -> Encoder:
    loaded = load_encoders(job.model)
    loaded.to(device)
    return Encoder(loaded, job.settings, job.size)


def _make(job: CacheJob, todo: Sequence[tuple[str, int]], distribution: Distribution) -> None:
    """Make shards in turns, one on each process.

    Args:
        todo: names of shards, with their numbers of pictures.
    """
    own = todo[distribution.rank :: distribution.world]
    empty = job.folder.cache(job.caches[1]) / EMPTY
    encoder = None
    with distribution.together():
        lacks_empty = distribution.is_main and not empty.exists()
        if own or lacks_empty:
            encoder = _load(job, distribution.device)
        if encoder is not None and lacks_empty:
            save_tensors(encoder.empty, empty)

    def make(name: str, progress: Callable[[int], object]) -> None:
        assert encoder is not None, "whoever has a shard to make has loaded one"
        _make_shard(job, encoder, name, progress)

    in_turns(todo, make, distribution)


def in_turns(
    todo: Sequence[tuple[T, int]],
    make: Callable[[T, Callable[[int], object]], object],
    distribution: Distribution,
) -> None:
    """Make shards in turns, one on each process; the main one shows its progress.

    After a failure all processes end with this turn, not with their last shard.

    Args:
        todo: shards, with their numbers of pictures.
        make: makes a shard, and tells of pictures as they are done.
    """
    own = todo[distribution.rank :: distribution.world]
    hidden = not (distribution.is_main and own)
    with tqdm(total=sum(n for _, n in own), unit="image", disable=hidden) as bar:
        for turn in range(math.ceil(len(todo) / distribution.world)):
            with distribution.together():
                if turn < len(own):
                    make(own[turn][0], bar.update)


def _make_shard(
    job: CacheJob, encoder: Encoder, name: str, progress: Callable[[int], object]
) -> None:
    tar, file = job.folder.tar_record(name), job.folder.tar(name)
    if fault := wrong_size(file, tar.bytes):
        raise PreparedError(fault)
    for cache, indices in lacking(job, name).items():
        samples = {index: _packed(file, tar.samples[index]) for index in indices}
        if cache == job.identity.moments_folder:
            shard = encoder.moments(samples, progress)
        else:
            shard = encoder.text(samples)
        write_shard(job.folder, cache, name, made_of(cache, tar, indices), shard)


def _packed(tar: Path, member: Member) -> Picture:
    blob = SpanBlob(tar, member.offset, member.size)
    name = f"{tar}: {member.key}.{member.suffix}"
    return Picture(name, blob, member.captions, member.sha256)


def write_shard(folder: PreparedFolder, cache: str, name: str, made_of: str, shard: Shard) -> None:
    """Write a shard of a cache, then its record; each whole or not at all."""
    path = folder.tensors(cache, name)
    size, sha256 = save_tensors(shard.tensors, path)
    record = CachedRecord(name, made_of, size, sha256, shard.rows, shard.dropped)
    write_record(path.with_suffix(".json"), record)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> tuple[int, str]:
    """Write tensors as a file, whole or not at all; return its bytes and their SHA-256."""
    with new_file(path, shared=True, failure=PreparedError) as beside:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
        return beside.stat().st_size, sha256_of(beside)
