"""Measure how long a step waits for data in a store of which every answer takes 20 ms.

Tars of random pictures, on the disk and in a store held in memory, whose answers are delayed. A
step sleeps for as long as a GPU would compute, and reading goes on beside it. The share of the time
that steps wait for their batch is printed, from the disk and from the store with an empty cache;
the first batches are left out.

    python benchmarks/store.py --step 0.8 --latency 0.02
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.implementations.memory import MemoryFileSystem
from measure import machine
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # writers of small prepared folders

from image_files import encode
from prepared import Picture, write_prepared

from sfumato.config import ShardDataConfig
from sfumato.data.prepared.open import open_shards

PIXELS = 64
ROOT = "bucket/folder"


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = write_folder(Path(name) / "disk", options.shards, options.per_shard)
        store = MemoryFileSystem()
        store.put(f"{folder}/", f"/{ROOT}/", recursive=True)
        for method in ("cat_file", "ls", "info"):
            setattr(MemoryFileSystem, method, late(vars(MemoryFileSystem)[method], options.latency))
        size = sum(file.stat().st_size for file in folder.rglob("*.tar")) / options.shards
        print(
            f"{options.shards} tars of {options.per_shard} pictures ({size / 2**20:.1f} MiB), "
            f"steps of {options.step * 1000:g} ms and {options.batch} pictures, answers after "
            f"{options.latency * 1000:g} ms; {machine('cpu')}"
        )
        print("| from | waits after the first batches | longest | first batch |\n|---|---|---|---|")
        for kind, path in (("disk", str(folder)), ("store", f"memory://{ROOT}")):
            config = ShardDataConfig(
                path=path,
                buffer=options.buffer,
                workers=options.workers,
                prefetch=options.prefetch,
                cache_dir=str(Path(name) / "cache"),
                cache_gb=options.cache_gb,
            )
            waits = measure(config, options)
            later = waits[options.first :]
            share = sum(later) / (sum(later) + options.step * len(later))
            print(f"| {kind} | {share:.2%} | {max(later):.3f} s | {waits[0]:.3f} s |", flush=True)


def measure(config: ShardDataConfig, options: argparse.Namespace) -> list[float]:
    """Return how long each step waited for its batch, in seconds."""
    stream, waits = open_shards(config, height=PIXELS, width=PIXELS, seed=0), []
    for _ in range(options.steps):
        start = time.perf_counter()
        stream.next(options.batch, 0, options.batch)
        waits.append(time.perf_counter() - start)
        time.sleep(options.step)
    return waits


def late(method: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """Return a method of which each answer comes later."""

    def answer(*arguments: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return method(*arguments, **named)

    return answer


def write_folder(folder: Path, shards: int, per_shard: int) -> Path:
    """Write tars of random pictures."""
    rng, pictures = np.random.default_rng(0), []
    for number in range(shards * per_shard):
        pixels = rng.integers(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8)
        data = encode(Image.fromarray(pixels))
        pictures.append(Picture(data, PIXELS, PIXELS, (f"picture {number}",)))
    return write_prepared(folder, pictures, per_shard=per_shard)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--per-shard", type=int, default=20)
    parser.add_argument("--buffer", type=int, default=40)
    parser.add_argument("--cache-gb", type=float, default=0.004, help="smaller than all tars")
    parser.add_argument("--latency", type=float, default=0.02)
    parser.add_argument("--step", type=float, default=0.8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--first", type=int, default=5, help="batches that are left out")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--prefetch", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
