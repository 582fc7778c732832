"""Prepared folders as `sfumato prepare` leaves them, of small generated pictures."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from image_files import png
from safetensors.torch import save_file
from torch import Tensor

from sfumato.data.prepared.folder import (
    CACHE,
    EMPTY,
    INDEX,
    MANIFEST,
    SELECTIONS,
    SHARDS,
    PreparedFolder,
)
from sfumato.data.prepared.format import (
    CachedRecord,
    CacheIdentity,
    Index,
    IndexedShard,
    KeptRecord,
    Member,
    TarRecord,
    record_text,
)

SIZES = [(20, 20), (20, 40), (40, 24), (17, 19)]


@dataclass(frozen=True)
class Picture:
    """What becomes one sample."""

    data: bytes
    height: int
    width: int
    captions: tuple[str, ...]


def pictures(count: int, captions: int = 1) -> list[Picture]:
    """Return pictures of several shapes; every third has further captions, if there are any."""
    found = []
    for i in range(count):
        height, width = SIZES[i % len(SIZES)]
        more = captions if i % 3 == 0 else 1
        said = (f"picture {i}", *(f"picture {i} again {n}" for n in range(1, more)))
        found.append(Picture(png(height, width, i), height, width, said))
    return found


def write_prepared(
    folder: Path,
    samples: Sequence[Picture],
    *,
    per_shard: int = 4,
    selections: Mapping[str, Callable[[int], bool]] | None = None,
) -> Path:
    """Write tars, records, selections (`all`, and others by the numbers they keep) and index."""
    numbers = range(len(samples))
    for first in range(0, len(samples), per_shard):
        name = f"{first // per_shard:05d}"
        chosen = numbers[first : first + per_shard]
        write_tar_shard(folder, name, {i: samples[i] for i in chosen})
        for selection, keeps in {"all": lambda _: True, **(selections or {})}.items():
            kept = tuple(i - first for i in chosen if keeps(i))
            dropped = {"unwanted": len(chosen) - len(kept)}
            record = KeptRecord(name, "test", kept, dropped)
            place = folder / SELECTIONS / selection / f"{name}.json"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(record_text(record))
    write_index(folder)
    return folder


def write_tar_shard(folder: Path, name: str, samples: Mapping[int, Picture]) -> None:
    """Write one tar and its record."""
    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    tar = folder / SHARDS / f"{name}.tar"
    with tarfile.open(tar, "w") as archive:
        for number, picture in samples.items():
            said = json.dumps({"captions": picture.captions}).encode()
            for suffix, data in (("png", picture.data), ("json", said)):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    with tarfile.open(tar) as archive:
        offsets = {member.name: member.offset_data for member in archive}
    members = [
        Member(
            key := f"{number:09d}",
            "png",
            offsets[f"{key}.png"],
            len(picture.data),
            picture.captions,
            picture.height,
            picture.width,
            hashlib.sha256(picture.data).hexdigest(),
        )
        for number, picture in samples.items()
    ]
    record = TarRecord(name, tar.stat().st_size, sha256(tar), "test", tuple(members))
    tar.with_suffix(".json").write_text(record_text(record))


def toy_identity(
    height: int = 16,
    width: int = 16,
    *,
    flip: bool = False,
    dtype: str = "float32",
    autoencoder: str = "kl",
    encoder: str = "clip",
) -> CacheIdentity:
    """Return the identity of a cache that no network made."""
    moments = {
        "autoencoder": autoencoder,
        "height": height,
        "width": width,
        "crop": "center",
        "resize": "lanczos",
        "flip": flip,
        "dtype": dtype,
    }
    return CacheIdentity(moments, {"text_encoder": encoder, "dtype": dtype})


def toy_moments(number: int) -> Tensor:
    """Return what the cache holds of sample `number`: (4, 2, 2)."""
    return torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(number))


def toy_states(caption: str) -> dict[str, Tensor]:
    """Return what the cache holds of a caption: one row each, of (5, 6) and (3,)."""
    seed = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4], "little")
    generator = torch.Generator().manual_seed(seed)
    shapes = {"prompt_embeds": (1, 5, 6), "pooled": (1, 3)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_cache(
    folder: Path,
    identity: CacheIdentity,
    *,
    selection: str = "all",
    without_moments: Collection[int] = (),
    without_text: Collection[int] = (),
) -> None:
    """Write both halves of a cache and the index anew; some samples, by number, may lack one."""
    for kind, name, content in (
        ("moments", identity.moments_folder, identity.moments),
        ("text", identity.text_folder, identity.text),
    ):
        root = folder / CACHE / name
        root.mkdir(parents=True, exist_ok=True)
        (root / MANIFEST).write_text(json.dumps({"format": 1, "kind": kind, **content}))
    dtype = {"float32": torch.float32, "float16": torch.float16}[identity.moments["dtype"]]
    empty = {name: t.to(dtype) for name, t in toy_states("").items()}
    save_file(empty, folder / CACHE / identity.text_folder / EMPTY)
    for record in sorted((folder / SHARDS).glob("*.json")):
        samples = PreparedFolder(folder).tar_record(record.stem).samples
        kept = PreparedFolder(folder).kept_record(selection, record.stem).kept
        rows = [i for i in kept if int(samples[i].key) not in without_moments]
        moments = stacked([toy_moments(int(samples[i].key)) for i in rows], (4, 2, 2))
        tensors = {"moments": moments}
        if identity.moments["flip"]:
            tensors["mirrored"] = moments.flip(-1)
        write_half(folder, identity.moments_folder, record.stem, rows, tensors, dtype)
        rows = [i for i in kept if int(samples[i].key) not in without_text]
        states = [[toy_states(c) for c in samples[i].captions] for i in rows]
        flat = [state for several in states for state in several]
        tensors = {
            name: stacked([s[name][0] for s in flat], empty[name].shape[1:]) for name in empty
        }
        offsets = torch.tensor([0, *(len(several) for several in states)]).cumsum(0)
        write_half(
            folder, identity.text_folder, record.stem, rows, tensors, dtype, {"offsets": offsets}
        )
    write_index(folder)


def stacked(tensors: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    return torch.stack(list(tensors)) if tensors else torch.zeros(0, *shape)


def write_half(
    folder: Path,
    cache: str,
    name: str,
    rows: Sequence[int],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Write one shard of moments, or of states, and its record."""
    file = folder / CACHE / cache / f"{name}.safetensors"
    content = {key: t.to(dtype).contiguous() for key, t in tensors.items()} | dict(others or {})
    save_file(content, file)
    record = CachedRecord(name, "test", file.stat().st_size, sha256(file), tuple(rows))
    file.with_suffix(".json").write_text(record_text(record))


def write_index(folder: Path) -> None:
    """Write the index of what the folder holds."""
    names = [file.stem for file in sorted((folder / SHARDS).glob("*.json"))]
    tars = [PreparedFolder(folder).tar_record(name) for name in names]
    selections = {
        each.name: tuple(
            len(PreparedFolder(folder).kept_record(each.name, name).kept) for name in names
        )
        for each in sorted((folder / SELECTIONS).iterdir())
    }
    caches = {}
    for each in sorted((folder / CACHE).glob("*-*")):
        shards = [
            PreparedFolder(folder).cached_record(each.name, n.stem) for n in shard_files(each)
        ]
        caches[each.name] = tuple(
            IndexedShard(s.name, len(s.rows), s.bytes, s.sha256) for s in shards
        )
    indexed = tuple(IndexedShard(t.name, len(t.samples), t.bytes, t.sha256) for t in tars)
    (folder / INDEX).write_text(record_text(Index(indexed, selections, caches, {})))


def shard_files(cache: Path) -> list[Path]:
    return sorted(file for file in cache.glob("*.safetensors") if file.name != EMPTY)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
