"""A run that is killed or stopped, and called again, ends bitwise as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from nightly import nightly_but
from runs import (
    assert_same_state,
    command,
    exported,
    in_child,
    kill,
    last_state,
    metrics,
    on_call,
    on_event,
    start,
    start_cli,
)
from toy import use_toy

from sfumato.training import loop, stop
from sfumato.training.checkpoint import list_checkpoints
from sfumato.training.loop import Outcome
from sfumato.training.stop import parse_duration

KILLED = -9
# Everything that draws random numbers; six prompts and batches of four cross an epoch border.
RANDOM = (
    "model.variant=0.2",  # the toy's dropout
    "objective.truncation_range=[1,2]",
    "sampler.eta=0.5",
)
MOMENTS = [
    ("Validation._record", 1),
    ("take_step", 2),
    ("refuse_non_finite", 4),
    ("Validation._record", 2),
    ("TrainState.snapshot", 2),
    ("_sync", 8),
    ("tidy", 3),
    ("StopWatch.took", 5),
    ("export", 1),
    ("load_weights", 1),
]


@pytest.fixture(autouse=True)
def toy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "sd_folder" not in request.fixturenames:
        use_toy(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Give the run that nobody stopped, and how many calls inside Sfumato it took."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        use_toy(patch)
        count = on_call(0, kill)
        start(command(folder, "run", *RANDOM))
        threading.setprofile(None)
        sys.setprofile(None)
    yield SimpleNamespace(folder=folder / "run", calls=count[0])


def assert_tidy(run: Path) -> None:
    names = [path.name for path in (run / "checkpoints").iterdir()]
    assert all(name.startswith("step-") for name in names), names


@pytest.mark.parametrize(("function", "number"), MOMENTS)
def test_killed_at_a_moment(
    tmp_path: Path, whole: SimpleNamespace, function: str, number: int
) -> None:
    again = command(tmp_path, "run", *RANDOM)

    def die() -> None:
        on_call(number, kill, function)
        start(again)

    assert in_child(die) == KILLED
    assert in_child(lambda: start(again)) == 0
    assert_same_state(tmp_path / "run", whole.folder)
    assert_tidy(tmp_path / "run")


@pytest.mark.parametrize("seed", nightly_but([0, 1], range(5)))
def test_killed_twice_anywhere(tmp_path: Path, whole: SimpleNamespace, seed: int) -> None:
    again = command(tmp_path, "run", *RANDOM)
    rng = random.Random(seed)
    for _ in range(2):
        number = rng.randint(1, whole.calls)

        def die(number: int = number) -> None:
            on_call(number, kill)
            start(again)

        assert in_child(die) in (KILLED, 0)  # a resumed run may take fewer calls
    assert in_child(lambda: start(again)) == 0
    assert_same_state(tmp_path / "run", whole.folder)
    assert_tidy(tmp_path / "run")


def test_lora_with_dropout_killed(tmp_path: Path, sd_folder: Path) -> None:
    """Kill Stable Diffusion before its first checkpoint, and while it writes the second."""
    small = ["model.lora.rank=2", "model.lora.dropout=0.3", "training.max_steps=4"]
    small += ["validation.every_steps=2", "sampler.num_inference_steps=2"]
    start(command(tmp_path, "whole", *small, model=sd_folder))
    again = command(tmp_path, "run", *small, model=sd_folder)
    for number, function in ((2, "take_step"), (8, "_sync")):

        def die(number: int = number, function: str = function) -> None:
            on_call(number, kill, function)
            start(again)

        assert in_child(die) == KILLED
    assert in_child(lambda: start(again)) == 0
    assert_same_state(tmp_path / "run", tmp_path / "whole")


def test_each_step_is_logged_once(whole: SimpleNamespace) -> None:
    assert [row["step"] for row in metrics(whole.folder)] == list(range(7))


def test_seed_0_is_a_seed(tmp_path: Path) -> None:
    rewards = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.seed()
        short = ["training.max_steps=2", f"training.seed={seed}"]
        start(command(tmp_path, name, *short))
        rewards.append([row.get("reward") for row in metrics(tmp_path / name)])
    assert rewards[0] == rewards[1]
    assert rewards[0][1] != rewards[2][1]


def test_a_complete_run_is_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    again = command(tmp_path, "run", *RANDOM)
    start(again)
    run = tmp_path / "run"
    before = {path: path.stat().st_mtime_ns for path in run.glob("checkpoints/*/*")}
    state, rows, files = last_state(run), metrics(run), exported(run)
    capfd.readouterr()
    assert in_child(lambda: start_cli(again)) == 0
    assert "complete at step 6" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.glob("checkpoints/*/*")} == before
    assert (last_state(run).state, metrics(run), exported(run)) == (state.state, rows, files)


def test_more_steps_go_on_from_there(tmp_path: Path, whole: SimpleNamespace) -> None:
    start(command(tmp_path, "run", *RANDOM, "training.max_steps=3"))
    assert last_state(tmp_path / "run").step == 3
    start(command(tmp_path, "run", *RANDOM))
    assert_same_state(tmp_path / "run", whole.folder)


def test_a_run_of_an_older_version_goes_on_with_the_defaults_of_new_settings(
    tmp_path: Path, whole: SimpleNamespace
) -> None:
    start(command(tmp_path, "run", *RANDOM, "training.max_steps=3"))
    config = tmp_path / "run" / "config.yaml"
    saved = yaml.safe_load(config.read_text())
    del saved["data"]["shuffle"], saved["data"]["shards"]["sources"]
    config.write_text(yaml.safe_dump(saved))
    with pytest.raises(ValueError, match=r"data\.shuffle: True -> False"):
        start(command(tmp_path, "run", *RANDOM, "data.shuffle=false"))
    start(command(tmp_path, "run", *RANDOM))
    assert_same_state(tmp_path / "run", whole.folder)


@pytest.mark.parametrize(
    ("name", "function", "moment", "step"),
    [
        ("SIGTERM", "take_step", 3, 3),
        ("SIGINT", "Validation._record", 2, 3),
        ("SIGTERM", "sha256_of", 6, 4),  # the first is of the prompts
    ],
)
def test_a_signal_stops_cleanly(
    tmp_path: Path,
    whole: SimpleNamespace,
    capfd: pytest.CaptureFixture[str],
    name: str,
    function: str,
    moment: int,
    step: int,
) -> None:
    again = command(tmp_path, "run", *RANDOM)

    def stopped() -> None:
        on_call(moment, lambda: os.kill(os.getpid(), signal.Signals[name]), function)
        start_cli(again)

    assert in_child(stopped) == 0
    assert last_state(tmp_path / "run").step == step
    assert f"stopped at step {step} of 6 by {name}" in capfd.readouterr().out
    assert in_child(lambda: start_cli(again)) == 0
    assert_same_state(tmp_path / "run", whole.folder)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, whole: SimpleNamespace) -> None:
    again = command(tmp_path, "run", *RANDOM)

    def interrupt() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    def stopped() -> None:
        on_call(6, interrupt, "sha256_of")
        start_cli(again)

    assert in_child(stopped) == 130
    assert last_state(tmp_path / "run").step == 2
    assert in_child(lambda: start_cli(again)) == 0
    assert_same_state(tmp_path / "run", whole.folder)


def test_sigterm_from_outside(tmp_path: Path, sd_folder: Path) -> None:
    """Stop `sfumato train` as a job scheduler does, and complete it with one step more."""
    endless = ["model.lora.rank=2", "sampler.num_inference_steps=2"]
    entry = "from sfumato.cli import main; main()"
    overrides = command(tmp_path, "run", *endless, "training.max_steps=9999", model=sd_folder)
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-c", entry, "train", *overrides], cwd=tmp_path, stdout=log, stderr=log
    )
    rows = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (rows.exists() and len(rows.read_text().split("\n")) > 2):
        time.sleep(0.05)
    process.terminate()
    assert process.wait() == 0, log.seek(0) or log.read()
    log.seek(0)
    step = last_state(tmp_path / "run").step
    assert f"stopped at step {step} of 9999 by SIGTERM" in log.read()
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(step + 1))
    more = f"training.max_steps={step + 1}"
    outcome = start(command(tmp_path, "run", *endless, more, model=sd_folder))
    assert outcome == Outcome(step + 1, None)
    log.close()


def test_max_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: SimpleNamespace) -> None:
    """On a clock where a step takes 10 s and a validation 4 s, 65 s hold 5 steps."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)

    def slow(function: str, seconds: float) -> None:
        original = vars(loop)[function]

        def timed(*arguments: object) -> object:
            clock.now += seconds
            return original(*arguments)

        monkeypatch.setattr(loop, function, timed)

    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(stop, "time", clock)
    slow("take_step", 10)
    slow("validate", 4)
    again = command(tmp_path, "run", *RANDOM, "training.max_time=01:05")
    assert start(again) == Outcome(5, "the time limit of 65 s")
    assert clock.now <= 65
    assert last_state(tmp_path / "run").step == 5
    assert start(again) == Outcome(6, None)
    assert_same_state(tmp_path / "run", whole.folder)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("00:30", 30), ("01:02", 62), ("2:00:00", 7200), ("01:01:01:01", 90_061), ("90:00", 5400)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration("training.max_time", text) == seconds


@pytest.mark.parametrize("text", ["", "30", "1h", "1:2:3:4:5", "-1:00", "1:", "01:3.5", "a:b"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r"training\.max_time=.*MM:SS"):
        parse_duration("training.max_time", text)


def test_a_damaged_checkpoint_stops_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is not passed over in silence; the one before it is named, and good to go on from."""
    again = command(tmp_path, "run", *RANDOM, "training.max_steps=4")
    start(again)
    first, second = list_checkpoints(tmp_path / "run" / "checkpoints")
    file = second / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    assert in_child(lambda: start_cli(again)) == 2
    message = capfd.readouterr().err
    assert f"{second} is damaged: ema.safetensors" in message
    assert f"The last good checkpoint is {first}" in message
    assert "Traceback" not in message
    for path in second.iterdir():
        path.unlink()
    second.rmdir()
    assert in_child(lambda: start_cli(again)) == 0
    assert last_state(tmp_path / "run").step == 4


def test_a_killed_writer_of_small_files(tmp_path: Path) -> None:
    """A kill while config.yaml, run.json or metrics.jsonl is replaced leaves the old or the new."""
    again = command(tmp_path, "run", "training.max_steps=1")
    start(again)
    for number in (1, 2, 3):

        def die(number: int = number) -> None:
            on_event(number, kill, {"os.rename"})
            start(again)

        assert in_child(die) == KILLED
    assert in_child(lambda: start(again)) == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1]
    starts = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert len(starts) == 3  # the third was killed after it was noted
