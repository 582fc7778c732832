"""Processes that see other data than the first one: all end before the first step, and say so."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from families import write_pictures
from image_files import png
from prepared import pictures, write_prepared
from runs import codes_of, in_processes, start, start_cli

from sfumato.preparation.index import write_index
from sfumato.training import loop

ADDRESS = "memory://bucket/folder"


def command(folder: Path, sd: Path, *more: str) -> list[str]:
    settings = [
        f"runs_dir={folder}",
        f"model.pretrained={sd}",
        "objective=supervised",
        "sampler.num_inference_steps=2",
        "sampler.height=32",
        "sampler.width=32",
        "training.max_steps=2",
        "training.micro_batch_size=1",
        "training.global_batch_size=2",
        "training.tensorboard=false",
        "validation.num_images=1",
        "validation.loss_images=0",
        "verify=false",
        *more,
    ]
    return list({text.partition("=")[0]: text for text in settings}.values())


def refused(folder: Path, sd: Path, *more: str) -> None:
    with pytest.raises(ValueError, match="the processes read different data"):
        start(command(folder, sd, *more))
    assert not list(folder.glob("*/checkpoints/*"))


def swap_shapes(folder: Path) -> None:
    """Turn a wide and a tall picture: as many of each shape as before."""
    (folder / "0.png").write_bytes(png(24, 40, 0))
    (folder / "1.png").write_bytes(png(40, 24, 1))


@pytest.mark.parametrize("change", [lambda p: (p / "0.png").unlink(), swap_shapes])
def test_folders_of_pictures(
    sd_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], object],
) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    write_pictures(folders[0] / "pictures")
    (folders[0] / "pictures" / "0.png").write_bytes(png(40, 24, 0))
    (folders[0] / "pictures" / "1.png").write_bytes(png(24, 40, 1))
    shutil.copytree(folders[0], folders[1])
    change(folders[1] / "pictures")

    def run(rank: int) -> None:
        monkeypatch.chdir(folders[rank])
        refused(tmp_path, sd_folder, "data.images.path=pictures", "data.images.buckets=true")

    in_processes(2, run)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    """Return the address of a prepared folder."""
    selections = {"even": lambda number: number % 2 == 0, "odd": lambda number: number % 2 == 1}
    folder = write_prepared(tmp_path / "disk", pictures(16), selections=selections)
    write_index(folder)
    system = fsspec.filesystem("memory")
    system.put(f"{folder}/", "/bucket/folder/", recursive=True)
    yield ADDRESS
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("buckets", ["true", "false"])
def test_prepared_folders_in_a_store(
    sd_folder: Path, tmp_path: Path, store: str, buckets: str
) -> None:
    """A selection keeps as many samples for each process, but others, of other shapes."""

    def run(rank: int) -> None:
        if rank:  # this process's own copy of the store
            folder = write_prepared(
                tmp_path / "other", pictures(16), selections={"even": lambda n: n % 2 == 1}
            )
            write_index(folder)
            fsspec.filesystem("memory").put(f"{folder}/", "/bucket/folder/", recursive=True)
        refused(
            *(tmp_path, sd_folder, f"data.shards.path={store}", "data.shards.selection=even"),
            *(f"data.shards.buckets={buckets}", f"data.shards.cache_dir={tmp_path}/cache{rank}"),
        )

    in_processes(2, run)


def test_one_process_without_data_ends_the_others(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "pictures")
    (tmp_path / "empty").mkdir()

    def run(rank: int) -> None:
        monkeypatch.chdir(tmp_path / "empty" if rank else tmp_path)
        reason = "no such file: pictures" if rank else "another process failed"
        with pytest.raises(ValueError, match=reason):
            start(command(tmp_path, sd_folder, "data.images.path=pictures"))

    in_processes(2, run)


def test_one_process_that_fails_in_a_step_ends_the_others_without_a_traceback(
    sd_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_pictures(tmp_path / "pictures")
    take, taken = loop.take_step, list[int]()

    def run(rank: int) -> None:
        def fails(*given: object) -> object:
            taken.append(rank)
            if rank and len(taken) == 2:
                raise ValueError("the disk went away")
            return take(*given)  # pyright: ignore[reportArgumentType]

        monkeypatch.setattr(loop, "take_step", fails)
        start_cli(command(tmp_path, sd_folder, f"data.images.path={tmp_path / 'pictures'}"))

    assert codes_of(2, run) == [1, 2]
    said = capfd.readouterr().err
    assert "the disk went away" in said
    assert "another process ended, and its message says why" in said
    assert "Traceback" not in said
