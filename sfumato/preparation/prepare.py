"""Stages of `sfumato prepare`, one after another; each goes on where it was stopped."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from sfumato.config import PrepareConfig, TrainingConfig
from sfumato.data.left_out import line
from sfumato.data.prepared.folder import INDEX, PreparedFolder
from sfumato.data.prepared.format import PreparedError
from sfumato.files import lock
from sfumato.preparation.download import download
from sfumato.preparation.engine import ALONE, Engine, open_engine
from sfumato.preparation.filter import filter_samples
from sfumato.preparation.index import write_index
from sfumato.preparation.pack import pack
from sfumato.preparation.settings import check_prepare

if TYPE_CHECKING:
    from sfumato.training.distribution import Distribution

_PAUSE = 0.5  # seconds between two looks at the first process


def prepare(config: PrepareConfig) -> None:
    """Run the chosen stages in their order, and print how many samples each kept and dropped.

    Workers of the engine make the shards of a stage. Under torchrun all processes precache, and the
    first one and its workers run the other stages.

    Raises:
        ValueError: a setting is impossible, the input cannot be read, or the disk is full.
    """
    check_prepare(config)
    folder = Path(config.out).expanduser()
    config = replace(config, out=str(folder))
    if config.part is not None:
        _prepare_part(config, folder)
        return
    with ExitStack() as held:
        distribution = _distribution(config)
        if distribution is not None:
            held.callback(distribution.close)
        on_first = _on_first(distribution)
        engine = ALONE

        def before() -> None:
            nonlocal engine
            held.enter_context(hold(folder))
            _refuse_index_of_others(folder)
            engine = open_engine(config.engine, config.workers, config.ray, folder)
            held.callback(engine.close)
            _before_precaching(config, folder, engine)

        on_first(before)
        if "precache" in config.stages:
            assert distribution is not None
            from sfumato.preparation.precache import precache

            bins = precache(config, distribution, engine)
            if distribution.is_main:
                print(line("precache", bins), flush=True)
        if "index" in config.stages:
            on_first(lambda: _index(folder, engine))


def _prepare_part(config: PrepareConfig, folder: Path) -> None:
    """Make a part of a stage's shards, beside processes that make others."""
    with hold(folder, shared=True):
        _refuse_index_of_others(folder)
        engine = open_engine(config.engine, config.workers, config.ray, folder)
        with closing(engine):
            if config.stages == ["pack"]:
                bins = pack(config.pack, config.download, folder, engine, part=config.part)
            else:
                from sfumato.preparation.precache import precache_part

                bins = precache_part(config, engine)
    print(line(f"{config.stages[0]}, part {config.part}", bins), flush=True)


def hold(folder: Path, *, shared: bool = False) -> IO[str]:
    """Hold a prepared folder until the returned file is closed.

    Args:
        shared: hold it beside other processes that share it.

    Raises:
        PreparedError: if another process holds the folder, or it cannot be made.
    """
    busy = f"another sfumato prepare works on {folder}; wait for it, or give another out"
    unmade = "give another out"
    return lock(folder, busy=busy, unmade=unmade, shared=shared, failure=PreparedError)


def _refuse_index_of_others(folder: Path) -> None:
    """Refuse an index.json in a folder where nothing was packed yet."""
    prepared = PreparedFolder(folder)
    if (folder / INDEX).exists() and not prepared.shards.exists():
        raise PreparedError(
            f"{folder / INDEX} is where sfumato prepare writes its index, and nothing was prepared "
            "here yet; move it away, or give another out"
        )


def _before_precaching(config: PrepareConfig, folder: Path, engine: Engine) -> None:
    if "download" in config.stages and config.download.table is not None:
        print(line("download", download(config.download, folder)), flush=True)
    if "pack" in config.stages:
        bins = pack(config.pack, config.download, folder, engine)
        print(line("pack", bins), flush=True)
    if "filter" in config.stages:
        bins = filter_samples(config.filter, folder, engine)
        print(line(f"filter {config.filter.name}", bins), flush=True)


def _index(folder: Path, engine: Engine) -> None:
    index = write_index(folder, engine)
    for name in PreparedFolder(folder).cache_names():
        if name not in index.caches:
            print(f"index: {name} is left out, as it is not finished or not of these tars; "
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


def _on_first(distribution: "Distribution | None") -> Callable[[Callable[[], None]], None]:
    """Return a function that runs work on the first process while the others wait."""

    def run(work: Callable[[], None]) -> None:
        if distribution is None or distribution.world == 1:
            work()
            return
        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(work) if distribution.is_main else None
            # A process that waits many minutes in one call takes the others for dead.
            while not distribution.any(running is not None and running.done()):
                time.sleep(_PAUSE)
        with distribution.together():
            if running is not None:
                running.result()

    return run
