"""`sfumato prepare`: stages one after another, each of which goes on where it was stopped."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from sfumato.config import PrepareConfig, TrainingConfig
from sfumato.data.prepared.format import PreparedError
from sfumato.files import lock
from sfumato.preparation.bins import line
from sfumato.preparation.download import download
from sfumato.preparation.filter import filter_samples
from sfumato.preparation.index import write_index
from sfumato.preparation.listing import cache_names
from sfumato.preparation.pack import pack
from sfumato.preparation.settings import check_prepare

if TYPE_CHECKING:
    from sfumato.training.distribution import Distribution

_BREATH = 0.5  # seconds between two looks at the first process


def prepare(config: PrepareConfig) -> None:
    """Run the chosen stages in their order, and print what became of all that went in.

    Under torchrun all processes precache; the other stages are the first one's.

    Raises:
        ValueError: a setting is impossible, what is read cannot be, or the disk is full.
    """
    check_prepare(config)
    folder = Path(config.out).expanduser()
    config = replace(config, out=str(folder))
    distribution, held = _distribution(config), ExitStack()
    try:
        with_first = _first_alone(distribution)

        def before() -> None:
            held.enter_context(hold(folder))
            _before_precaching(config, folder)

        with_first(before)
        if "precache" in config.stages:
            assert distribution is not None
            from sfumato.preparation.precache import precache

            bins = precache(config, distribution)
            if distribution.is_main:
                print(line("precache", bins), flush=True)
        if "index" in config.stages:
            with_first(lambda: _index(folder))
    finally:
        held.close()
        if distribution is not None:
            distribution.close()


def hold(folder: Path) -> IO[str]:
    """Hold a folder of prepared data, until what is returned is closed.

    Raises:
        PreparedError: if another process holds it, or it cannot be made.
    """
    busy = f"another sfumato prepare works on {folder}; wait for it, or give another out"
    return lock(folder, busy=busy, unmade="give another out", failure=PreparedError)


def _before_precaching(config: PrepareConfig, folder: Path) -> None:
    if "download" in config.stages and config.download.table is not None:
        print(line("download", download(config.download, folder)), flush=True)
    if "pack" in config.stages:
        print(line("pack", pack(config.pack, config.download, folder)), flush=True)
    if "filter" in config.stages:
        bins = filter_samples(config.filter, folder)
        print(line(f"filter {config.filter.name}", bins), flush=True)


def _index(folder: Path) -> None:
    index = write_index(folder)
    for name in cache_names(folder):
        if name not in index.caches:
            print(f"index: {name} is not of these tars, or not finished, and is left out; "
                  "run the stages precache and index to have it", flush=True)  # fmt: skip
    samples = sum(tar.samples for tar in index.tars)
    print(
        f"index: {len(index.tars):,} tars of {samples:,} samples, {len(index.selections)} "
        f"selections, {len(index.caches)} caches",
        flush=True,
    )


def _distribution(config: PrepareConfig) -> "Distribution | None":
    if "precache" not in config.stages and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from sfumato.training.distribution import Distribution

    return Distribution(TrainingConfig())


def _first_alone(distribution: "Distribution | None") -> Callable[[Callable[[], None]], None]:
    """Return what runs work on the first process, while the others wait."""

    def run(work: Callable[[], None]) -> None:
        if distribution is None or distribution.world == 1:
            work()
            return
        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(work) if distribution.is_main else None
            # Processes that wait for one another for many minutes at once take it for dead.
            while not distribution.any(running is not None and running.done()):
                time.sleep(_BREATH)
        with distribution.together():
            if running is not None:
                running.result()

    return run
