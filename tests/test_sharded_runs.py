"""Runs with sharded checkpoints: saved by some processes, taken up by another number of them."""

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from nightly import nightly_but
from runs import (
    assert_same_state,
    codes_of,
    command,
    exported,
    in_child,
    in_processes,
    kill,
    last_state,
    metrics,
    on_call,
    start,
    start_cli,
)
from split import assert_same_tensors, place_of
from toy import use_toy

from sfumato.training import loop, sharding, shards
from sfumato.training.checkpoint import (
    find_fault,
    list_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from sfumato.training.distribution import Distribution
from sfumato.training.folder import RunFolder
from sfumato.training.state import TrainState
from sfumato.weights import Shards, Share, shard_files, shard_names, write_shard

KILLED = -9
COMMON = (
    "training.strategy=fsdp",
    "training.micro_batch_size=1",
    "training.keep_checkpoints=null",
    "training.ema_decay=0.9",
    "validation.every_steps=0",
)
SHARDED = (*COMMON, "training.sharded_checkpoints=true")


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    use_toy(monkeypatch)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Path]:
    """Return, by the number of processes, folders of runs with both layouts; copy them."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        use_toy(patch)
        for world in (2, 4):
            folders[world] = tmp_path_factory.mktemp(str(world))
            for name, settings in (("whole", COMMON), ("run", SHARDED)):
                run = command(folders[world], name, *settings, "training.max_steps=2")
                in_processes(world, lambda _, run=run: start_cli(run))
    return folders


def copied(saved: Path, folder: Path) -> None:
    for name in ("whole", "run"):
        shutil.copytree(saved / name, folder / name)


@pytest.mark.parametrize("world", [2, 4])
def test_both_layouts_hold_the_same(saved: Mapping[int, Path], world: int) -> None:
    run, whole = saved[world] / "run", saved[world] / "whole"
    assert len(shard_files(place_of(run / "checkpoints", 2))) == world
    assert shard_files(place_of(whole / "checkpoints", 2)) == []
    assert isinstance(last_state(run).weights, Shards)
    assert_same_tensors(last_state(run), last_state(whole))
    assert metrics(run) == metrics(whole)
    assert exported(run) == exported(whole)


RESUMED = [(before, after) for before in (2, 4) for after in (1, 2, 4)]


@pytest.mark.parametrize(("before", "after"), RESUMED)
def test_any_number_of_processes_takes_it_up(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saved: Mapping[int, Path],
    before: int,
    after: int,
) -> None:
    """What each of them then holds is bitwise what was saved."""
    copied(saved[before], tmp_path)
    resume = loop.resume

    def resumed(state: TrainState, folder: RunFolder, distribution: Distribution) -> None:
        resume(state, folder, distribution)
        state._training.sharded_checkpoints = False
        found = state.snapshot()
        if distribution.is_main:
            write_checkpoint(tmp_path / "found", found)
        distribution.any(False)  # none leaves before all are here
        os._exit(0)

    monkeypatch.setattr(loop, "resume", resumed)
    again = command(tmp_path, "run", *SHARDED, "training.max_steps=4")
    in_processes(after, lambda _: start(again)) if after > 1 else in_child(lambda: start(again))
    expected = last_state(saved[before] / "whole")
    assert_same_tensors(read_checkpoint(place_of(tmp_path / "found", 2)), expected)


@pytest.mark.parametrize(("before", "after"), nightly_but([(2, 1), (2, 4)], RESUMED))
def test_it_goes_on_as_from_one_file(
    tmp_path: Path, saved: Mapping[int, Path], before: int, after: int
) -> None:
    """Two more steps from either layout end in bitwise equal states."""
    copied(saved[before], tmp_path)
    for name, settings in (("whole", COMMON), ("run", SHARDED)):
        again = command(tmp_path, name, *settings, "training.max_steps=4")
        in_processes(after, lambda _, again=again: start_cli(again))
    assert_same_tensors(last_state(tmp_path / "run"), last_state(tmp_path / "whole"))
    assert len(shard_files(place_of(tmp_path / "run" / "checkpoints", 4))) == (
        after if after > 1 else 0
    )


def test_a_run_without_fsdp_takes_it_up(tmp_path: Path, saved: Mapping[int, Path]) -> None:
    """With DDP, on two processes; and FSDP takes up what DDP saved, and writes shards again."""
    copied(saved[2], tmp_path)
    ddp = ("training.strategy=ddp", "training.max_steps=4")
    for name in ("whole", "run"):
        again = command(tmp_path, name, *COMMON, *ddp)
        in_processes(2, lambda _, again=again: start_cli(again))
    assert_same_tensors(last_state(tmp_path / "run"), last_state(tmp_path / "whole"))
    further = command(tmp_path, "run", *SHARDED)
    in_processes(2, lambda _: start_cli(further))
    root = tmp_path / "run" / "checkpoints"
    assert [len(shard_files(path)) for path in list_checkpoints(root)] == [2, 0, 2]


MOMENTS = [
    ("write_sharded", 2, 0),
    ("_Planner.create_local_plan", 2, 1),
    ("_Writer.prepare_global_plan", 2, 0),
    ("write_shard", 2, 1),
    ("sha256_of", 2, 0),
    ("_Writer.finish", 2, 0),
    ("_sync", 3, 0),
    ("tidy", 2, 0),
    ("CheckpointWriter.wait", 3, 1),
]


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of two processes that nobody stopped, with both layouts' default."""
    folder = tmp_path_factory.mktemp("unstopped")
    with pytest.MonkeyPatch.context() as patch:
        use_toy(patch)
        run = command(folder, "run", *SHARDED)
        in_processes(2, lambda _: start_cli(run))
    return folder / "run"


@pytest.mark.parametrize(("function", "number", "rank"), nightly_but(MOMENTS[3:5], MOMENTS))
def test_killed_while_writing_beside_training(
    tmp_path: Path, unstopped: Path, function: str, number: int, rank: int
) -> None:
    """What is there is whole, and the run ends bitwise as if never killed."""
    again = command(tmp_path, "run", *SHARDED, "training.async_checkpoints=true")

    def die(this: int) -> None:
        if this == rank:
            on_call(number, kill, function)
        start_cli(again)

    assert codes_of(2, die)[rank] == KILLED
    places = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [find_fault(place) for place in places] == [None] * len(places)
    in_processes(2, lambda _: start_cli(again))
    assert_same_state(tmp_path / "run", unstopped)
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert all(name.startswith("step-") for name in names), names


def test_a_damaged_shard_is_named_and_the_one_before_is_used_on_request(
    tmp_path: Path, unstopped: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(unstopped, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "export")
    four, six = (place_of(tmp_path / "run" / "checkpoints", step) for step in (4, 6))
    file = shard_files(six)[1]
    os.truncate(file, file.stat().st_size - 1)
    again = command(tmp_path, "run", *SHARDED)
    in_processes(2, lambda _: start_cli(again), code=2)
    said = capfd.readouterr().err
    assert f"checkpoint {six} is damaged: {file.name} has" in said
    assert f"The last good checkpoint is {four}." in said
    assert f"remove {six} and run the same command again" in said
    assert "Traceback" not in said
    shutil.rmtree(six)
    in_processes(2, lambda _: start_cli(again))
    assert_same_state(tmp_path / "run", unstopped)


def test_a_byte_that_only_one_process_checks(
    tmp_path: Path, unstopped: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(unstopped, tmp_path / "run")
    six = place_of(tmp_path / "run" / "checkpoints", 6)
    file = shard_files(six)[1]
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = command(tmp_path, "run", *SHARDED, "training.max_steps=8")
    in_processes(2, lambda _: start_cli(again), code=2)
    said = capfd.readouterr().err
    assert f"sfumato (process 1): checkpoint {six} is damaged: {file.name} differs" in said
    assert "sfumato: another process failed; it says why" in said


def test_a_full_disk_is_told_by_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """While training goes on; the checkpoint before it stays."""

    def fail(file: Path, shares: Mapping[str, Share]) -> None:
        if file.parent.name.startswith(".step-000004") and file.name == shard_names(2)[1]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_shard(file, shares)

    monkeypatch.setattr(shards, "write_shard", fail)
    again = command(tmp_path, "run", *SHARDED, "training.async_checkpoints=true")
    in_processes(2, lambda _: start_cli(again), code=2)
    said = capfd.readouterr().err
    four = place_of(tmp_path / "run" / "checkpoints", 4)
    for who in ("sfumato", "sfumato (process 1)"):
        assert f"{who}: {four} could not be written: no space is left on the disk" in said
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert names == ["step-000002"]


def test_copies_of_shards_are_written_once(tmp_path: Path) -> None:
    """Under hsdp two processes hold each share; torch divides the writing among them."""
    more = ("training.strategy=hsdp", "training.shard_size=2", "training.max_steps=2")
    for name, settings in (("whole", COMMON), ("run", SHARDED)):
        run = command(tmp_path, name, *settings, *more, "training.ema_on_cpu=true")
        in_processes(4, lambda _, run=run: start_cli(run))
    found, whole = last_state(tmp_path / "run"), last_state(tmp_path / "whole")
    assert_same_tensors(found, whole)
    files = shard_files(place_of(tmp_path / "run" / "checkpoints", 2))
    sizes = [file.stat().st_size for file in files]
    total = sum(t.nbytes for p in ("weights", "ema", "optimizer") for t in vars(whole)[p].values())
    assert sum(sizes) < 1.5 * total  # headers apart
    assert max(sizes) < 0.5 * sum(sizes)


def test_an_old_policy_and_collected_rows_are_taken_up(tmp_path: Path) -> None:
    """Of DiffusionNFT, between two steps of a collection; then one process goes on from each."""
    method = ["method=nft", "objective.images_per_prompt=2", "objective.batches=2"]
    method += ["objective.inner_epochs=2", "sampler.training_steps=null", "optimizer.lr=1e-3"]
    runs = {"whole": [*COMMON, *method], "run": [*SHARDED, *method]}
    for steps, world in ((1, 2), (3, 1)):
        for name, settings in runs.items():
            overrides = command(tmp_path, name, *settings, f"training.max_steps={steps}")
            taken = [text for text in overrides if not text.startswith("objective.kl_coeff")]
            in_processes(world, lambda _, taken=taken: start_cli(taken))
        found, whole = (last_state(tmp_path / name) for name in ("run", "whole"))
        assert found.step == steps
        assert_same_tensors(found, whole)
        kinds = {key.partition("/")[0] for key in found.objective}
        assert kinds == {"old", "collection"}


@pytest.mark.parametrize("more", [0, 1])
def test_by_default_large_states_are_sharded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Mapping[int, Path], more: int
) -> None:
    """Counted are all bytes of the state, not those of one process."""
    whole = last_state(saved[2] / "whole")
    kinds = (whole.weights, whole.ema, whole.optimizer)
    total = sum(each.nbytes for kind in kinds for each in kind.values())
    monkeypatch.setattr(sharding, "SHARDED_BYTES", total - more)
    run = command(tmp_path, "run", *COMMON, "training.max_steps=1")
    in_processes(2, lambda _: start_cli(run))
    place = place_of(tmp_path / "run" / "checkpoints", 1)
    assert len(shard_files(place)) == 2 * more
    assert (place / "weights.safetensors").exists() == (not more)
