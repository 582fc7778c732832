"""Measure how fast prepared shards are read: pictures out of tars, and moments out of a cache.

Tars of JPEGs of about a megapixel, tars of the same resized to 512 pixels at the shorter side, and
a cache in float16 as Stable Diffusion 1.5 has it: 8 channels of moments at an eighth of the size,
77 x 768 states of a caption. Beside each rate stand the cores that one training process would keep
busy with reading. The files are in the system's cache: the disk is not measured.

    python benchmarks/data.py --images 200
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from image_data import H200_NEED, QUALITY, SHAPES, random_picture, timed
from measure import machine
from safetensors.torch import save_file

from sfumato.config import FilterConfig, PackConfig, PrepareConfig, ShardDataConfig
from sfumato.data.prepared.folder import CACHE, EMPTY, MANIFEST, SHARDS, PreparedFolder
from sfumato.data.prepared.format import FORMAT, CachedRecord, CacheIdentity, made_of, record_text
from sfumato.data.prepared.open import open_shards
from sfumato.data.sample import Sample
from sfumato.data.stream import Stream
from sfumato.files import sha256_of
from sfumato.images import to_pil
from sfumato.preparation.prepare import prepare

STATES = (77, 768)
CHANNELS, FACTOR = 8, 8  # of moments, and pixels per place of them
RESIZED = 512  # pixels of the shorter side
BATCH = 32


@dataclass(frozen=True)
class Rate:
    """Samples of a stream per second, medians over turns."""

    source: str
    size: int
    workers: int
    per_second: float  # of the wall clock
    per_cpu_second: float  # of the time that all threads of the process had a core


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as name:
        folders = {kind: Path(name) / kind for kind in ("original", "resized")}
        for kind, folder in folders.items():
            bytes_each = write_prepared(folder, options, resized=kind == "resized") / options.images
            print(f"{options.images} {kind} JPEGs of {bytes_each / 1024:.0f} KiB", flush=True)
        for size in options.sizes:
            bytes_each = write_cache(folders["resized"], size) / options.images
            print(f"cached at {size} px: {bytes_each / 1024:.0f} KiB a sample", flush=True)
        print(machine("cpu"), flush=True)
        rates = measure_rates(folders, options)
    print(table(rates, options.need))
    if options.out:
        content = {"machine": machine("cpu"), "rates": [asdict(rate) for rate in rates]}
        options.out.write_text(json.dumps(content, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=200, help="samples to write")
    parser.add_argument("--per-shard", type=int, default=50)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="pixels")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2, 4])
    parser.add_argument("--seconds", type=float, default=4, help="of each case and turn, about")
    parser.add_argument("--turns", type=int, default=3, help="of each case, one after another")
    parser.add_argument("--need", type=float, default=H200_NEED, help="images/s of a device")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args()


def write_prepared(folder: Path, options: argparse.Namespace, *, resized: bool) -> int:
    """Pack smooth random JPEGs with captions; return the bytes of the tars."""
    files = folder / "files"
    files.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(options.images):
        height, width = SHAPES[i % len(SHAPES)]
        picture = to_pil(random_picture(height, width, generator))
        if resized:
            scale = RESIZED / min(height, width)
            picture = picture.resize((round(width * scale), round(height * scale)))
        picture.save(files / f"{i:05d}.jpg", quality=QUALITY)
        (files / f"{i:05d}.txt").write_text(f"picture {i} of a random landscape\n")
    prepare(
        PrepareConfig(
            out=str(folder),
            stages=["pack", "filter", "index"],
            pack=PackConfig(path=str(files), samples_per_shard=options.per_shard),
            filter=FilterConfig(),
        )
    )
    return sum(tar.stat().st_size for tar in (folder / SHARDS).glob("*.tar"))


def identity_of(size: int) -> CacheIdentity:
    moments = {"autoencoder": "random numbers", "height": size, "width": size}
    return CacheIdentity(moments, {"text_encoder": "random numbers"})


def write_cache(folder: Path, size: int) -> int:
    """Write random moments and states of all samples, and the index; return their bytes."""
    identity = identity_of(size)
    places = {"moments": identity.moments_folder, "text": identity.text_folder}
    for kind, content in (("moments", identity.moments), ("text", identity.text)):
        root = folder / CACHE / places[kind]
        root.mkdir(parents=True, exist_ok=True)
        (root / MANIFEST).write_text(json.dumps({"format": FORMAT, "kind": kind, **content}))
    empty = {"prompt_embeds": torch.randn(1, *STATES).half()}
    save_file(empty, folder / CACHE / places["text"] / EMPTY)
    written = 0
    for place in sorted((folder / SHARDS).glob("*.json")):
        tar = PreparedFolder(folder).tar_record(place.stem)
        rows = range(len(tar.samples))
        side = size // FACTOR
        moments = {"moments": torch.randn(len(rows), CHANNELS, side, side).half()}
        states = {"prompt_embeds": torch.randn(len(rows), *STATES).half()}
        states["offsets"] = torch.arange(len(rows) + 1)
        for kind, tensors in (("moments", moments), ("text", states)):
            file = folder / CACHE / places[kind] / f"{tar.name}.safetensors"
            save_file(tensors, file)
            length = file.stat().st_size
            made = made_of(places[kind], tar, tuple(rows))
            record = CachedRecord(tar.name, made, length, sha256_of(file), tuple(rows))
            file.with_suffix(".json").write_text(record_text(record))
            written += length
    prepare(PrepareConfig(out=str(folder), stages=["index"]))
    return written


def open_case(folders: dict[str, Path], source: str, size: int, workers: int) -> Stream[Sample]:
    cached = source == "cache"
    folder = folders["resized" if cached else source]
    config = ShardDataConfig(path=str(folder), cached=cached, workers=workers)
    return open_shards(config, height=size, width=size, seed=0, identity=identity_of(size))


def measure_rates(folders: dict[str, Path], options: argparse.Namespace) -> list[Rate]:
    """Time every case once in each turn, so that a busy minute falls on all of them."""
    cases = [
        (source, size, workers)
        for size in options.sizes
        for workers in options.workers
        for source in (*folders, "cache")
    ]
    found: dict[tuple[str, int, int], list[tuple[float, float]]] = {case: [] for case in cases}
    for turn in range(options.turns):
        for case in cases if turn % 2 else reversed(cases):
            rates = rates_of(open_case(folders, *case), options.seconds)
            found[case].append(rates)
            source, size, workers = case
            shown = f"{rates[0]:.1f} samples/s, {rates[1]:.1f} per CPU second"
            print(f"turn {turn + 1} {source} {size} px, {workers} workers: {shown}", flush=True)
    return [
        Rate(*case, *(statistics.median(values) for values in zip(*rates, strict=True)))
        for case, rates in found.items()
    ]


def rates_of(stream: Stream[Sample], seconds: float) -> tuple[float, float]:
    """Return samples per second of the wall clock, and per second of the process's own time.

    The first calls fill what is read ahead and are not counted; as many batches as that stay under
    way at the end as at the beginning.
    """

    def take(batches: int) -> None:
        for _ in range(batches):
            stream.next(BATCH, 0, BATCH)

    take(2)
    wall, _ = timed(lambda: take(1))
    batches = max(4, round(seconds / wall))
    wall, cpu = timed(lambda: take(batches))
    return batches * BATCH / wall, batches * BATCH / cpu


def table(rates: Sequence[Rate], need: float) -> str:
    """Return the results as Markdown, with the cores that reading for the need would take."""
    lines = [
        "",
        f"| source | px | workers | samples/s | per CPU second | cores for {need:g}/s |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {rate.source} | {rate.size} | {rate.workers} | {rate.per_second:.1f} "
        f"| {rate.per_cpu_second:.1f} | {need / rate.per_cpu_second:.2f} |"
        for rate in rates
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
