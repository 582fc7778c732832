"""Measure how fast images with captions are opened, read, decoded and cropped.

A folder of JPEGs of about a megapixel, and a WebDataset tar of the same, at several sizes and
numbers of decoding threads; beside them the cores that a training step's need would keep busy. The
files are in the system's cache: the disk is not measured.

    python benchmarks/image_data.py --images 200 --needs 'a U-Net of 76 M, one core' 0.6
"""

import argparse
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import machine

from sfumato.config import ImageDataConfig
from sfumato.data.images import open_images
from sfumato.data.sample import Sample
from sfumato.data.stream import Stream
from sfumato.images import to_pil

SHAPES = ((1024, 1024), (896, 1152), (1152, 896), (832, 1216))  # height and width of originals
WAVES = ((8, 1.0), (64, 0.3), (512, 0.3))  # random grids that are blown up, and how strong
QUALITY = 90  # of the JPEGs
H200_NEED = 140.0  # images/s of a U-Net of Stable Diffusion 1.5 at 512 px, as a goal
BATCH = 8


@dataclass(frozen=True)
class Opening:
    """Seconds to list a source and to read its headers, per 1000 images."""

    source: str
    wall: float
    cpu: float


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
        folder, tar = Path(name) / "folder", Path(name) / "images.tar"
        write_folder(folder, options.images)
        write_tar(folder, tar)
        kilobytes = tar.stat().st_size / 1024 / options.images
        print(f"{options.images} JPEGs of {kilobytes:.0f} KiB; {machine('cpu')}", flush=True)
        sources = {"folder": folder, "tar": tar}
        openings = [open_time(source, path, options) for source, path in sources.items()]
        rates = measure_rates(sources, options)
    print(table(openings, rates, dict(options.needs)))
    if options.out:
        content = {
            "machine": machine("cpu"),
            "kilobytes": kilobytes,
            "openings": [asdict(opening) for opening in openings],
            "rates": [asdict(rate) for rate in rates],
            "needs": dict(options.needs),
        }
        options.out.write_text(json.dumps(content, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=200, help="files to write")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="pixels")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--batches", type=int, default=8, help=f"of {BATCH}, per turn")
    parser.add_argument("--turns", type=int, default=3, help="of each case, one after another")
    parser.add_argument(
        "--needs",
        nargs=2,
        action="append",
        metavar=("NAME", "IMAGES_PER_SECOND"),
        default=[["one H200 (goal)", H200_NEED]],
        help="what a training step takes, as sft_step.py measures it",
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args()


def write_folder(folder: Path, count: int) -> None:
    """Write smooth random JPEGs, each with its caption beside it."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        picture = random_picture(*SHAPES[i % len(SHAPES)], generator)
        to_pil(picture).save(folder / f"{i:05d}.jpg", quality=QUALITY)
        (folder / f"{i:05d}.txt").write_text(f"picture {i} of a random landscape\n")


def random_picture(height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Return a picture in [0, 1] with less the finer: it compresses about as photographs do."""
    picture = torch.zeros(1, 3, height, width)
    for cells, strength in WAVES:
        grid = torch.randn(1, 3, cells, cells, generator=generator)
        picture += strength * F.interpolate(grid, (height, width), mode="bilinear")
    return (0.5 + 0.2 * picture[0]).clamp(0, 1)


def write_tar(folder: Path, tar: Path) -> None:
    with tarfile.open(tar, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.add(file, file.name)


def open_time(source: str, path: Path, options: argparse.Namespace) -> Opening:
    """Return the medians over turns of opening a source."""
    walls, cpus = [], []
    for _ in range(options.turns):
        wall, cpu = timed(lambda: open_stream(path, options.sizes[0], 0))
        walls.append(1000 * wall / options.images)
        cpus.append(1000 * cpu / options.images)
    return Opening(source, statistics.median(walls), statistics.median(cpus))


def open_stream(path: Path, size: int, workers: int) -> Stream[Sample]:
    config = ImageDataConfig(path=str(path), crop="random", flip=True, workers=workers)
    return open_images(config, height=size, width=size, divisor=64, seed=0)


def measure_rates(sources: dict[str, Path], options: argparse.Namespace) -> list[Rate]:
    """Time every case once in each turn, so that a busy minute falls on all of them."""
    cases = [
        (source, size, workers)
        for size in options.sizes
        for workers in options.workers
        for source in sources
    ]
    found: dict[tuple[str, int, int], list[tuple[float, float]]] = {case: [] for case in cases}
    for turn in range(options.turns):
        for source, size, workers in cases if turn % 2 else reversed(cases):
            rates = rates_of(sources[source], size, workers, options.batches)
            found[source, size, workers].append(rates)
            shown = f"{rates[0]:.1f} samples/s, {rates[1]:.1f} per CPU second"
            print(f"turn {turn + 1} {source} {size} px, {workers} workers: {shown}", flush=True)
    return [
        Rate(*case, *(statistics.median(values) for values in zip(*rates, strict=True)))
        for case, rates in found.items()
    ]


def rates_of(path: Path, size: int, workers: int, batches: int) -> tuple[float, float]:
    """Return samples per second of the wall clock, and per second of the process's own time.

    The first calls fill what is decoded ahead and are not counted; as many batches as that stay
    under way at the end as at the beginning.
    """
    stream = open_stream(path, size, workers)
    for _ in range(2):
        stream.next(BATCH, 0, BATCH)

    def take() -> None:
        for _ in range(batches):
            stream.next(BATCH, 0, BATCH)

    wall, cpu = timed(take)
    return batches * BATCH / wall, batches * BATCH / cpu


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of the wall clock, and of this process on all cores."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def table(openings: list[Opening], rates: list[Rate], needs: dict[str, float]) -> str:
    """Return the results as Markdown, with the cores that decoding for each need would take."""
    lines = ["", "| source | open 1000 images, s | CPU s |", "|---|---|---|"]
    lines += [f"| {o.source} | {o.wall:.2f} | {o.cpu:.2f} |" for o in openings]
    heads = "".join(f" cores for {name}, {float(need):g}/s |" for name, need in needs.items())
    lines += [
        "",
        f"| source | px | workers | samples/s | per CPU second |{heads}",
        f"|---|---|---|---|---|{'---|' * len(needs)}",
    ]
    for rate in rates:
        cores = "".join(f" {float(n) / rate.per_cpu_second:.2f} |" for n in needs.values())
        lines.append(
            f"| {rate.source} | {rate.size} | {rate.workers} | {rate.per_second:.1f} "
            f"| {rate.per_cpu_second:.1f} |{cores}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
