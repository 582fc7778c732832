"""Checkpoints written beside training: the same files, never two at once, and never half of one."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from runs import (
    assert_same_state,
    command,
    in_child,
    in_processes,
    kill,
    last_state,
    metrics,
    on_call,
    start,
    start_cli,
)
from toy import use_toy

from sfumato.training import checkpoint, loop
from sfumato.training.checkpoint import (
    CheckpointError,
    Snapshot,
    find_fault,
    list_checkpoints,
    read_checkpoint,
)
from sfumato.training.validation import Validation

KILLED = -9
BESIDE = "training.async_checkpoints=true"
RANDOM = (BESIDE, "model.variant=0.2", "objective.truncation_range=[1,2]", "sampler.eta=0.5")
MOMENTS = [
    ("CheckpointWriter._write_beside", 1),
    ("write_checkpoint", 2),
    ("_sync", 3),
    ("_sync", 8),
    ("sha256_of", 6),
    ("tidy", 2),
    ("tidy", 4),
    ("CheckpointWriter.wait", 3),
    ("CheckpointWriter.closing", 1),
]


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    use_toy(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give the run that nobody stopped, and that wrote each checkpoint before it went on."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        use_toy(patch)
        settings = [*RANDOM, "training.async_checkpoints=false", "training.keep_checkpoints=null"]
        start(command(folder, "run", *settings))
    yield folder / "run"


def instead(monkeypatch: pytest.MonkeyPatch, act: Callable[[Snapshot], object]) -> None:
    """Let `act` happen in the writer before each checkpoint."""
    write = checkpoint.write_checkpoint

    def writes(root: Path, snapshot: Snapshot) -> Path:
        act(snapshot)
        return write(root, snapshot)

    monkeypatch.setattr(checkpoint, "write_checkpoint", writes)


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    """Step 2 is not written before step 4 is taken, and still holds what was so at step 2."""
    further = threading.Event()
    take_step = loop.take_step

    def stepping(config, module, state, distribution):
        found = take_step(config, module, state, distribution)
        if state.step == 4:
            further.set()
        return found

    def patient(snapshot: Snapshot) -> None:
        if snapshot.step == 2:
            assert further.wait(60), "training waited for the writer"

    monkeypatch.setattr(loop, "take_step", stepping)
    instead(monkeypatch, patient)
    start(command(tmp_path, "run", *RANDOM, "training.keep_checkpoints=null"))
    assert_same_state(tmp_path / "run", whole)
    for ours, theirs in zip(
        list_checkpoints(tmp_path / "run" / "checkpoints"),
        list_checkpoints(whole / "checkpoints"),
        strict=True,
    ):
        for file in theirs.iterdir():
            assert (ours / file.name).read_bytes() == file.read_bytes()


def test_one_at_a_time_and_the_last_before_training_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[int] = []
    most: list[int] = []

    def slow(snapshot: Snapshot) -> None:
        running.append(snapshot.step)
        most.append(len(running))
        time.sleep(0.3)
        running.remove(snapshot.step)

    instead(monkeypatch, slow)
    often = ["training.checkpoint_every_steps=1", "training.keep_checkpoints=2"]
    started = time.monotonic()
    start(command(tmp_path, "run", BESIDE, *often))
    assert time.monotonic() - started > 6 * 0.3
    assert most == [1] * 6
    found = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(found) == ["step-000005", "step-000006"]


@pytest.mark.parametrize(("bad", "reached"), [(2, 4), (6, 6)])
def test_an_error_is_told_at_the_next_checkpoint_or_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int, reached: int
) -> None:
    def fail(snapshot: Snapshot) -> None:
        if snapshot.step == bad:
            raise CheckpointError(f"step {bad} could not be written")

    instead(monkeypatch, fail)
    with pytest.raises(CheckpointError, match=f"step {bad} could not be written"):
        start(command(tmp_path, "run", BESIDE))
    assert metrics(tmp_path / "run")[-1]["step"] == reached
    left = [int(path.name[5:]) for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert left == [step for step in (2, 4, 6) if step < bad]


def test_both_processes_hear_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(snapshot: Snapshot) -> None:
        raise CheckpointError("the disk is full")

    instead(monkeypatch, fail)
    overrides = command(tmp_path, "run", BESIDE, "training.strategy=fsdp")
    in_processes(2, lambda _: start_cli(overrides), code=2)
    message = capfd.readouterr().err
    assert "sfumato: the disk is full" in message
    assert "sfumato (process 1): another process failed; it says why" in message


def test_a_mistake_in_training_does_not_cost_the_checkpoint_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead(monkeypatch, lambda _: time.sleep(0.3))
    take_step = loop.take_step

    def third_fails(config, module, state, distribution):
        if state.step == 2:
            raise ValueError("the third")
        return take_step(config, module, state, distribution)

    monkeypatch.setattr(loop, "take_step", third_fails)
    with pytest.raises(ValueError, match="the third"):
        start(command(tmp_path, "run", BESIDE))
    assert last_state(tmp_path / "run").step == 2


@pytest.mark.parametrize(("function", "number"), MOMENTS)
def test_killed_at_a_moment(tmp_path: Path, whole: Path, function: str, number: int) -> None:
    """In the thread or beside it: what is there is whole, and the run ends as if never killed."""
    again = command(tmp_path, "run", *RANDOM)

    def die() -> None:
        on_call(number, kill, function)
        start(again)

    assert in_child(die) == KILLED
    places = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [find_fault(place) for place in places] == [None] * len(places)
    assert in_child(lambda: start(again)) == 0
    assert_same_state(tmp_path / "run", whole)
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert all(name.startswith("step-") for name in names), names


def test_the_best_is_kept_as_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {0: 5.0, 1: 4.0, 2: 1.0, 3: 3.0, 4: 2.5, 5: 2.0, 6: 2.2}
    run = Validation.run

    def measured(validation, model, step, *rest):
        return run(validation, model, step, *rest) | {"validation/loss": losses[step]}

    monkeypatch.setattr(Validation, "run", measured)
    often = ["validation.every_steps=1", "training.keep_checkpoints=2"]
    for name, beside in (("beside", "true"), ("before", "false")):
        start(command(tmp_path, name, *often, f"training.async_checkpoints={beside}"))
        kept = [path.name for path in list_checkpoints(tmp_path / name / "checkpoints")]
        assert kept == ["step-000002", "step-000004", "step-000006"]
    assert_same_state(tmp_path / "beside", tmp_path / "before")


def test_a_snapshot_is_of_its_moment(tmp_path: Path) -> None:
    """Not of the tensors that training goes on to change: also of those that lie on the CPU."""
    from sfumato.training.distribution import whole as whole_tensor

    tensor = torch.zeros(2, 3).T
    taken = whole_tensor(tensor)
    tensor += 1
    assert torch.equal(taken, torch.zeros(3, 2))
    assert taken.is_contiguous()
    assert whole_tensor(tensor, kept=False).numel() == 0


def test_a_time_limit_leaves_time_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that lasts 1.5 s beside training is counted when the end is planned."""
    instead(monkeypatch, lambda _: time.sleep(1.5))
    limits = ["training.max_time=00:05", "training.max_steps=100000"]
    often = ["training.checkpoint_every_steps=1", "validation.every_steps=0"]
    started = time.monotonic()
    outcome = start(command(tmp_path, "run", BESIDE, *limits, *often))
    assert outcome.stopped_by == "the time limit of 5 s"
    assert time.monotonic() - started < 6.5  # the limit and a write that nobody planned for
    place = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert read_checkpoint(place).step == outcome.step
