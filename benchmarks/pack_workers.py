"""Measure preparation by several workers: speed, memory by the number of tars, and a large plan.

speed   packs JPEG pictures of about one megapixel by one worker and by more, each with one thread
        that decodes, and by one that has a single core, as its other threads use a second one;
        prints pictures per second, the median of pairs in turns, and their ratio; beside it as many
        bare processes that only decode, which says how much the machine gives
memory  packs, filters and verifies 10, 100 and 1,000 tars of 5 small pictures; prints the largest
        resident memory of the first process and of any worker
stages  packs small pictures in tars of 1,000 and some of one megapixel in tars of 100; prints rows
        per second of filter and index, and megabytes per second of verify, by one process
plan    plans a million tars of 1,000 rows, out of 100,000 containers, and goes through all of them

    python benchmarks/pack_workers.py speed --pictures 400 --workers 2
    python benchmarks/pack_workers.py memory
    python benchmarks/pack_workers.py stages --rows 20000
    python benchmarks/pack_workers.py plan
"""

import argparse
import io
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
from measure import machine
from PIL import Image

from sfumato.config import DownloadConfig, FilterConfig, PackConfig
from sfumato.preparation.engine import Local
from sfumato.preparation.filter import filter_samples
from sfumato.preparation.index import write_index
from sfumato.preparation.pack import pack
from sfumato.preparation.pack_plan import Count, Plan
from sfumato.preparation.sources import Tar
from sfumato.preparation.verify import verify

MEBI = 1024  # of the kibibytes that getrusage tells


def main() -> None:
    options = parse()
    if options.what == "child":
        measure_memory(Path(options.folder), options.workers)
        return
    print(machine("cpu"))
    {"speed": speed, "memory": memory, "stages": stages, "plan": plan}[options.what](options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["speed", "memory", "stages", "plan", "child"])
    parser.add_argument("folder", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--side", type=int, default=1024, help="pixels of a picture")
    parser.add_argument("--per-tar", type=int, default=25)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tars", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rows", type=int, default=20_000, help="of stages: small pictures")
    return parser.parse_args()


def write_source(tar: Path, pictures: int, side: int, kind: str) -> None:
    """Write pictures whose bytes differ: smooth shapes with noise, as in photographs."""
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 256, (32, 32, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
    with tarfile.open(tar, "w") as archive:
        for number in range(pictures):
            noise = draw.integers(-12, 13, smooth.shape, np.int16)
            pixels = np.clip(np.roll(smooth, 7 * number, 1) + noise, 0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, kind, quality=90)
            for suffix, data in ((kind.lower(), file.getvalue()), ("txt", b"a picture")):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def speed(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        tar = Path(name) / "a.tar"
        write_source(tar, options.pictures, options.side, "JPEG")
        config = PackConfig(str(tar), samples_per_shard=options.per_tar, workers=1)
        with tarfile.open(tar) as archive:
            files = [archive.extractfile(m) for m in archive if m.name.endswith(".jpeg")]
            pictures = [file.read() for file in files if file is not None]
        several, out = f"{options.workers}", Path(name) / "out"
        rates: dict[str, list[float]] = {"1, on one core": [], "1": [], several: []}
        bare: dict[int, list[float]] = {1: [], options.workers: []}
        for _ in range(options.pairs):
            for label, each in rates.items():
                all_cores = os.sched_getaffinity(0)
                if label == "1, on one core":
                    os.sched_setaffinity(0, {min(all_cores)})  # and threads that it starts
                begin = time.perf_counter()
                pack(config, DownloadConfig(), out, Local(int(label.split(",")[0])))
                each.append(options.pictures / (time.perf_counter() - begin))
                os.sched_setaffinity(0, all_cores)
                shutil.rmtree(out)  # the next one writes to the same memory
            for workers, each in bare.items():
                each.append(decoded_per_second(pictures, workers))
    pixels = options.side**2 / 1e6
    print(f"{options.pictures} pictures of {pixels:.2f} MP, tars of {options.per_tar} rows")
    print("| workers | pictures per second | lowest | highest |\n|---|---|---|---|")
    for workers, each in rates.items():
        middle = statistics.median(each)
        print(f"| {workers} | {middle:.1f} | {min(each):.1f} | {max(each):.1f} |")
    for label in ("1, on one core", "1"):
        print(f"{several} workers are {gain(rates[label], rates[several]):.2f} times {label}")
    of_bare = gain(bare[1], bare[options.workers])
    print(f"{options.workers} bare processes that decode are {of_bare:.2f} times one")


def gain(one: Sequence[float], more: Sequence[float]) -> float:
    """Return the median ratio of rates that were measured in turns."""
    return statistics.median(m / o for o, m in zip(one, more, strict=True))


def decode(pictures: Sequence[bytes], ready: Barrier) -> None:
    ready.wait()
    for picture in pictures:
        Image.open(io.BytesIO(picture)).convert("RGB").tobytes()
    ready.wait()


def decoded_per_second(pictures: Sequence[bytes], processes: int) -> float:
    """Return the pictures per second of processes that only decode, each a share of them."""
    ready = multiprocessing.Barrier(processes + 1)
    shares = [pictures[i::processes] for i in range(processes)]
    each = [multiprocessing.Process(target=decode, args=(share, ready)) for share in shares]
    for process in each:
        process.start()
    ready.wait()
    begin = time.perf_counter()
    ready.wait()
    seconds = time.perf_counter() - begin
    for process in each:
        process.join()
    return len(pictures) / seconds


def memory(options: argparse.Namespace) -> None:
    print("| tars | workers | first process, MiB | largest worker, MiB |\n|---|---|---|---|")
    for tars in options.tars:
        with tempfile.TemporaryDirectory() as name:
            write_source(Path(name) / "a.tar", 5 * tars, 16, "PNG")
            command = [sys.executable, __file__, "child", name, "--workers", str(options.workers)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(f"| {tars:,} | {options.workers} | {done.stdout.splitlines()[-1]} |")


def measure_memory(folder: Path, workers: int) -> None:
    """Prepare, and print the largest resident memory of this process and of its workers."""
    engine, out = Local(workers), folder / "out"
    pack(PackConfig(f"{folder}/a.tar", samples_per_shard=5), DownloadConfig(), out, engine)
    filter_samples(FilterConfig(), out, engine)
    write_index(out, engine)
    verify(out, engine)
    most = [
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    print(" | ".join(f"{kibibytes / MEBI:.0f}" for kibibytes in most))


def stages(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, small = Path(name), Path(name) / "small"
        write_source(folder / "a.tar", options.rows, 16, "PNG")
        pack(PackConfig(f"{folder}/a.tar", samples_per_shard=1000), DownloadConfig(), small)
        write_source(folder / "b.tar", options.pictures, options.side, "JPEG")
        large = folder / "large"
        pack(PackConfig(f"{folder}/b.tar", samples_per_shard=100), DownloadConfig(), large)
        megabytes = sum(tar.stat().st_size for tar in large.rglob("*.tar")) / 1e6
        rates: dict[str, list[float]] = {}
        for number in range(options.pairs):
            name = str(number)
            every = FilterConfig(name=name, min_size=8)
            unlike = FilterConfig(name=name, min_size=8, duplicates="drop")
            for what, count, work in (
                ("filter, rows", options.rows, partial(filter_samples, every, small)),
                (
                    "filter of duplicates, rows",
                    options.rows,
                    partial(filter_samples, unlike, small),
                ),
                ("index with one selection, rows", options.rows, partial(write_index, small)),
                ("verify, megabytes", megabytes, partial(verify, large)),
            ):
                begin = time.perf_counter()
                work()
                rates.setdefault(what, []).append(count / (time.perf_counter() - begin))
            shutil.rmtree(small / "selections")
    for what, each in rates.items():
        print(f"{what} per second: {statistics.median(each):,.0f} ({min(each):,.0f} at least)")


def plan(options: argparse.Namespace) -> None:
    begin, computed = time.perf_counter(), time.process_time()
    config, path = PackConfig("simulated"), Path("simulated")
    containers = [Tar(f"{i:06d}.tar", "1", 0, path, config) for i in range(100_000)]
    # Containers of 9,000 to 11,000 rows, so that tars cross their ends.
    counts = [
        Count(each.name, "1", 9_000 + i * 7919 % 2001, {}) for i, each in enumerate(containers)
    ]
    planned = Plan(containers, counts, 1000)
    shards = sum(1 for _ in planned.shards())
    names = len(planned.names)
    seconds, computed = time.perf_counter() - begin, time.process_time() - computed
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEBI
    assert shards == names, "each tar has a name"
    print(
        f"{planned.rows:,} rows, {shards:,} tars: {seconds:.1f} s, of which the CPU worked "
        f"{computed:.1f} s; {most:.0f} MiB"
    )


if __name__ == "__main__":
    main()
