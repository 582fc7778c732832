"""Launch on this machine: what it refuses, how it stops and goes on, when a job is complete."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from runs import assert_same_state, command, fork, in_child, start

from sfumato.cli import main
from sfumato.compose import DEMO_IMAGES, compose_command
from sfumato.config import CONF
from sfumato.data.prepared.folder import INDEX
from sfumato.launch import local
from sfumato.launch.children import command_line, rendezvous, run_child
from sfumato.launch.inputs import starts_from
from sfumato.launch.jobs import Job, read_jobs
from sfumato.launch.launch import launch
from sfumato.launch.record import (
    LaunchFolder,
    begin,
    hold,
    is_done,
    read_job_record,
    write_job_record,
)
from sfumato.launch.results import is_complete, what_is_missing
from sfumato.preparation.prepare import prepare

LONGER = ("training.max_steps=12", "validation.every_steps=0")
LADDERS = sorted(path.stem for path in (CONF / "recipe" / "ladder").glob("*.yaml"))


def stage(kind: str, *settings: str, **more: object) -> str:
    return json.dumps({"command": kind, "settings": list(settings), **more})


def arguments(folder: Path, jobs: dict[str, str], *more: str) -> list[str]:
    given = [f"jobs.{name}={text}" for name, text in jobs.items()]
    return [f"runs_dir={folder}", "name=ladder", *given, *more]


def read(folder: Path, jobs: dict[str, str], *more: str) -> list[Job]:
    settings, _ = compose_command("launch", arguments(folder, jobs, *more))
    return read_jobs(settings)


def training(folder: Path, model: Path, *more: str) -> str:
    return stage("train", *command(folder, "a", *more, model=model))


# Where what a run leaves counts, and not how it trains.
LIGHT = ("validation.every_steps=0", "sampler.num_inference_steps=2", "sampler.guidance_scale=1")


def light(folder: Path, model: Path, *more: str) -> Job:
    return read(folder, {"train": training(folder, model, *LIGHT, *more)})[0]


@pytest.fixture
def jobs(tmp_path: Path, sd_folder: Path) -> dict[str, str]:
    """Return a training job and one that evaluates its run."""
    return {
        "train": training(tmp_path, sd_folder, *LONGER),
        "look": stage("evaluate", f"run={tmp_path / 'a'}", "num_images=2", "steps=[12]"),
    }


def start_launch(
    folder: Path, given: list[str], *, code: str | None = None, nohup: bool = False
) -> int:
    """Start `sfumato launch` in a process; return its id. Its output goes to files.

    Args:
        code: of Python; runs in the place of each `sfumato` process, also under torchrun.
        nohup: ignore SIGHUP.
    """
    script = folder / "stand_in.py"
    script.write_text(f"import os, pathlib, signal, sys, time\n{code}")

    def stand_in(*given: Any) -> list[str]:
        line = command_line(*given)
        return [*line[: line.index("sfumato") - 1], str(script)]

    def act() -> None:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (open(i, "w", buffering=1, closefd=False) for i in (1, 2))  # noqa: SIM115
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
        if code is not None:
            local.command_line = stand_in
        sys.argv = ["sfumato", "launch", *given]
        main()

    return fork(act)


def ended(folder: Path, launch: int) -> tuple[int, str, str]:
    """Wait for a launch; return its exit code, output and errors."""
    code = os.waitstatus_to_exitcode(os.waitpid(launch, 0)[1])
    return code, (folder / "out").read_text(), (folder / "err").read_text()


def saving(folder: Path, *numbers: signal.Signals) -> str:
    """Return code of a training that saves at step 5 and ends when one of the signals comes."""
    return f"""
def save(*_):
    pathlib.Path({str(folder)!r}, "checkpoints", "step-000005").mkdir(parents=True)
    sys.exit(0)
for number in {[int(number) for number in numbers]}:
    signal.signal(number, save)
pathlib.Path({str(folder)!r}).mkdir()
while True:
    time.sleep(0.01)
"""


def wait_for(place: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not place.exists():
        assert time.monotonic() < end, f"{place} did not come"
        time.sleep(0.05)


# --- What is refused before anything starts


def test_all_jobs_are_composed_before_the_first_starts(tmp_path: Path, jobs: dict[str, str]):
    worse = {**jobs, "third": stage("train", "recipe=demo_finetune", "training.max_stepz=3")}
    with pytest.raises(
        ValueError, match=r"job third: unknown key training.max_stepz: did you mean"
    ):
        read(tmp_path, worse)
    wrong = {**jobs, "third": stage("train", "recipe=demo_finetune", "optimizer.lr=-1")}
    with pytest.raises(ValueError, match=r"job third: optimizer.lr=-1.0 .* more than 0"):
        read(tmp_path, wrong)


def test_what_is_given_to_no_job_is_refused(tmp_path: Path, jobs: dict[str, str]):
    jobs = {**jobs, "third": stage("train", "recipe=demo_finetune", "name=${given.called}")}
    with pytest.raises(ValueError, match=r"unknown key given\.caled: did you mean given\.called"):
        read(tmp_path, jobs, "given.called=a", "given.caled=b")
    third = stage("train", "recipe=demo_finetune", "training.max_steps=${given.steps.short}")
    with pytest.raises(ValueError, match=r"unknown key given\.steps\.shrt: did you mean"):
        read(tmp_path, {"third": third}, "given.steps={short: 1, shrt: 2}")


def test_a_home_in_out_is_the_folder_that_prepare_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    pictures = f"pack.path={DEMO_IMAGES / 'new_held_out'}"
    (job,) = read(tmp_path, {"p": stage("prepare", "out=~/data", "stages=[pack,index]", pictures)})
    assert job.out == tmp_path / "data"
    assert in_child(lambda: prepare(job.settings)) == 0
    assert job.out is not None and (job.out / INDEX).exists()
    assert what_is_missing(job) is None
    index = json.loads((job.out / INDEX).read_text())
    index["caches"]["moments-0"] = []
    (job.out / INDEX).write_text(json.dumps(index))
    assert what_is_missing(job) == f"{job.out} lost its cache moments-0"


def test_unknown_stages_name_the_known_ones(tmp_path: Path, jobs: dict[str, str]):
    with pytest.raises(
        ValueError, match=r"names lok, .* did you mean look\? There are train, look"
    ):
        read(tmp_path, jobs, "stages=[train,lok]")
    with pytest.raises(ValueError, match="names look twice"):
        read(tmp_path, jobs, "stages=[look,train,look]")
    with pytest.raises(ValueError, match=r"names look, which jobs\.look=null removes"):
        read(tmp_path, {**jobs, "look": "null"}, "stages=[look]")
    with pytest.raises(ValueError, match="there are no jobs; choose a recipe"):
        read(tmp_path, {})


def test_stages_are_a_choice_of_jobs_in_their_order(tmp_path: Path, jobs: dict[str, str]):
    assert [job.name for job in read(tmp_path, jobs)] == ["train", "look"]
    assert [job.name for job in read(tmp_path, jobs, "stages=[train]")] == ["train"]
    assert [job.name for job in read(tmp_path, {**jobs, "look": "null"})] == ["train"]


def test_files_must_be_there_unless_an_earlier_job_makes_them(tmp_path: Path, jobs: dict[str, str]):
    with pytest.raises(ValueError, match=r"job look: run = .*/a does not exist, and no"):
        read(tmp_path, jobs, "stages=[look]")
    given = ["recipe=sd15_draft", "model.pretrained=m", "reward.pretrained=r"]
    lost = stage("train", *given, "data.prompts=/nowhere.txt")
    with pytest.raises(ValueError, match=r"job train: data\.prompts = /nowhere\.txt does not"):
        read(tmp_path, {"train": lost})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (stage("trian"), "jobs.x.command='trian' is unknown; choose one of prepare, train"),
        (
            stage("sample", "pretrained=.", "prompt=p", processes=2),
            "processes = 2 and nodes = 1, but sample runs in one process",
        ),
        (
            stage("train", "recipe=demo_finetune", processes=0),
            "jobs.x.processes=0 is too small",
        ),
        (stage("train", "recipe=demo_finetune", nodes=2), "nodes = 2, but cluster=local is one"),
        (stage("train", "recipe=demo_finetune", processes=3), "does not divide into 3 process"),
        (stage("evaluate", "run=.", "num_images=1"), "num_images=1 is too small; give 2 or more"),
        (stage("evaluate", "run=.", "features=/nowhere"), "features = /nowhere does not exist"),
        (stage("evaluate", "run=.", "column=c"), "column=c has no effect without prompts"),
        (stage("sample", "run=.", "prompt=a", "schedule=lin"), "unknown schedule 'lin'"),
        (stage("sample", "run=.", "prompt=a", "step=last"), "step=last is no checkpoint"),
        (stage("sample", "run=.", "pretrained=.", "prompt=a"), "either run=FOLDER or pretrained"),
        (stage("sample", "run=."), 'give prompt="..." or prompts=FILE'),
        (
            stage("train", "recipe=demo_finetune", "data.images.path=."),
            "beside data.images.sources",
        ),
        (
            stage("train", "recipe=demo_finetune", "data.shards.path=."),
            "data.shards.path='.' and data.images.sources=['new', 'old'] are both given",
        ),
        (
            stage("train", "recipe=demo_finetune", "data.images.sources.new.path=/nowhere"),
            "data.images.sources.new.path = /nowhere does not exist",
        ),
        (
            stage("train", "recipe=demo_draft_plus", "reward.parts.classifier.pretrained=/nowhere"),
            "reward.parts.classifier.pretrained = /nowhere does not exist",
        ),
        (
            stage("train", "recipe=demo_finetune", "sampler.height=33"),
            "sampler.height = 33 must be a multiple",
        ),
        (stage("train", "recipe=demo_finetune", "model.family=flux"), "model.family = 'flux'"),
        (stage("train", "recipe=demo_finetune", "model.parts=[vae]"), "model.parts has 'vae'"),
        ('{"settings": []}', "missing settings: jobs.x.command"),
        ('{"command": "train", "setings": []}', "unknown key jobs.x.setings: did you mean"),
        ('{"command": "train", "settings": "a"}', "jobs.x"),
        ("3", "jobs.x = 3; write {KEY: VALUE, ...}"),
    ],
)
def test_a_wrong_job_is_named(tmp_path: Path, text: str, said: str):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, {"x": text})
    assert said in str(caught.value)


def test_two_jobs_may_not_train_in_one_folder(tmp_path: Path, jobs: dict[str, str]):
    with pytest.raises(ValueError, match="jobs train and again both train in"):
        read(tmp_path, {**jobs, "again": jobs["train"]})


def test_given_values_reach_the_jobs_that_read_them(tmp_path: Path):
    jobs = {
        "a": stage(
            "train", "recipe=demo_finetune", "name=${given.called}", "training.seed=${given.other}"
        ),
        "b": stage("train", "recipe=demo_finetune", "name=${given.called}", also=["name=it"]),
    }
    given = ["given.called=???", "given.other=???"]
    with pytest.raises(
        ValueError, match=r"missing settings: given\.called, given\.other; give each"
    ):
        read(tmp_path, jobs, *given)
    (job,) = read(tmp_path, jobs, "given.other=???", "given.called=a b", "stages=[b]")
    assert job.arguments == ("recipe=demo_finetune", "name=a b", "name=it")
    assert job.settings.name == "it"


@pytest.mark.parametrize("ladder", LADDERS)
def test_a_ladder_composes_once_what_it_asks_for_is_given(tmp_path: Path, ladder: str):
    text = (CONF / "recipe" / "ladder" / f"{ladder}.yaml").read_text()
    assert "# Reproduces: " in text and "# Hardware: " in text
    given = [f"recipe=ladder/{ladder}", f"runs_dir={tmp_path}"]
    (tmp_path / "x").touch()
    try:
        compose_command("launch", given)
    except ValueError as error:
        missing = str(error).removeprefix("missing settings: ").partition(";")[0].split(", ")
        assert all(name in text.partition("# Hardware")[0] for name in missing)
        given += [f"{name}={tmp_path / 'x'}" for name in missing if name != "given.source"]
        given += [f"given.source=pack.path={tmp_path}"] * ("given.source" in missing)
    settings, _ = compose_command("launch", given)
    jobs = read_jobs(settings)
    assert [job.name for job in jobs] == list(settings.jobs)
    trained = [job for job in jobs if job.command == "train"]
    for before, after in pairwise(trained):
        start = after.settings.model.network.from_pretrained
        assert start is None or Path(start) == before.out


def test_the_ladder_of_stable_diffusion_1_is_the_documented_one(tmp_path: Path):
    (tmp_path / "x").touch()
    given = [f"given.{name}={tmp_path / 'x'}" for name in ("data", "autoencoder", "prompts")]
    source = f"given.source=pack.path={tmp_path}"
    ladder = ["recipe=ladder/stable_diffusion_v1", source, *given]
    jobs = read_jobs(compose_command("launch", ladder)[0])
    seen = {
        Path(job.out or "").name: (
            job.settings.training.max_steps * job.settings.training.global_batch_size / 1e6,
            job.settings.data.shards.selection,
        )
        for job in jobs
        if job.command == "train"
    }
    assert {name: (round(count), kept) for name, (count, kept) in seen.items()} == {
        "860m_res_256_pretrain": (676, "all"),
        "860m_res_512_v1_1": (410, "min_1024"),
        "860m_res_512_v1_2": (1229, "min_512"),
        "860m_res_512_v1_5": (1352, "min_512"),
    }


# --- Command lines


def test_several_processes_run_under_torchrun(tmp_path: Path):
    jobs = {
        "x": stage("train", "recipe=demo_finetune", "training.global_batch_size=32", processes=2)
    }
    (job,) = read(tmp_path, jobs)
    assert shlex.join(command_line(job, 3, 77)).endswith(
        "-m sfumato.launch.torchrun --standalone --nproc-per-node=2 --max-restarts=3 "
        "--shutdown-timeout=77 -m sfumato train recipe=demo_finetune training.global_batch_size=32"
    )
    meeting = rendezvous(2, "n1", "20007", "7-0", False)
    assert shlex.join(command_line(replace(job, nodes=2), 0, 60, meeting)).endswith(
        "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=n1:20007 --rdzv-id=7-0 "
        "--rdzv-conf=is_host=false --nproc-per-node=2 --max-restarts=0 --shutdown-timeout=60 "
        "-m sfumato train recipe=demo_finetune training.global_batch_size=32"
    )
    look = stage("evaluate", f"run={tmp_path}", processes=2)
    assert " --nproc-per-node=2 " in shlex.join(command_line(read(tmp_path, {"x": look})[0], 0, 60))
    assert read(tmp_path, {"x": stage("evaluate", f"run={tmp_path}")})[0].processes == 1
    alone = replace(job, processes=1)
    assert command_line(alone, 0, 60, meeting)[1:4] == ["-m", "sfumato", "train"]


def test_a_dry_run_prints_commands_and_makes_nothing(
    tmp_path: Path, jobs: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    settings, _ = compose_command("launch", arguments(tmp_path, jobs, "dry_run=true"))
    assert launch(settings) is False
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# job 1 of 2, train: to do"
    assert shlex.split(lines[1])[1:4] == ["-m", "sfumato", "train"]
    assert shlex.split(lines[3])[1:4] == ["-m", "sfumato", "evaluate"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt"]


# --- Stopping, going on, being complete


def test_a_launch_is_interrupted_goes_on_and_is_then_done(
    tmp_path: Path, sd_folder: Path, jobs: dict[str, str], capfd: pytest.CaptureFixture[str]
):
    given = arguments(tmp_path, jobs)
    running = start_launch(tmp_path, given)
    wait_for(tmp_path / "a" / "checkpoints" / "step-000002")
    os.kill(running, signal.SIGINT)
    code, out, err = ended(tmp_path, running)
    assert code == 0, err
    assert "job 1 of 2, train was stopped by SIGINT (" in out
    assert "of 12); left to do: train, look. To go on, run the same command again" in out
    assert not (tmp_path / "a" / "evaluation").exists()
    first = json.loads((tmp_path / "a" / "run.json").read_text())["starts"]

    code, out, err = ended(tmp_path, start_launch(tmp_path, given))
    assert code == 0, err
    assert "job 1 of 2, train: done" in out and "job 2 of 2, look: done" in out
    assert len(json.loads((tmp_path / "a" / "run.json").read_text())["starts"]) == len(first) + 1

    assert launch(compose_command("launch", given)[0])
    out = capfd.readouterr().out
    assert out.splitlines() == ["job 1 of 2, train: done", "job 2 of 2, look: done"]

    whole = command(tmp_path, "whole", *LONGER, model=sd_folder)
    assert in_child(lambda: start(whole)) == 0
    assert_same_state(tmp_path / "a", tmp_path / "whole")


def test_two_processes_of_which_one_dies_begin_again_and_end(tmp_path: Path):
    """The processes that torchrun starts anew meet each other, and not those that died."""
    out, died = tmp_path / "data", tmp_path / "died"
    code = f"""
import torch, torch.distributed
torch.distributed.init_process_group("gloo")
torch.distributed.barrier()
died = pathlib.Path({str(died)!r})
if torch.distributed.get_rank() == 1 and not died.exists():
    died.touch()
    os.kill(os.getpid(), signal.SIGKILL)
total = torch.ones(1)
torch.distributed.all_reduce(total)
assert total == 2
pathlib.Path({str(out)!r}).mkdir(exist_ok=True)
torch.distributed.destroy_process_group()
"""
    pictures = f"pack.path={DEMO_IMAGES / 'new_held_out'}"
    jobs = {"p": stage("prepare", f"out={out}", "stages=[pack]", pictures)}
    given = arguments(tmp_path, jobs, "cluster.processes=2", "cluster.max_restarts=1")
    code, out, err = ended(tmp_path, start_launch(tmp_path, given, code=code))
    assert code == 0, err
    assert died.exists() and "job 1 of 1, p: done" in out


@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_saves_unless_it_is_ignored(
    tmp_path: Path, jobs: dict[str, str], nohup: bool
):
    code = saving(tmp_path / "a", signal.SIGTERM)
    running = start_launch(tmp_path, arguments(tmp_path, jobs), code=code, nohup=nohup)
    wait_for(tmp_path / "a")
    os.kill(running, signal.SIGHUP)
    if nohup:
        time.sleep(0.5)
        assert os.waitpid(running, os.WNOHANG) == (0, 0)
        os.kill(running, signal.SIGTERM)
    code, out, err = ended(tmp_path, running)
    assert code == 0, err
    name = "SIGTERM" if nohup else "SIGHUP"
    assert f"train was stopped by {name} ({tmp_path / 'a'} is at step 5 of 12); left to do" in out


def test_a_job_goes_on_when_its_launch_is_killed_and_holds_the_folder(
    tmp_path: Path, jobs: dict[str, str]
):
    notes_itself = f"pathlib.Path({str(tmp_path / 'id')!r}).write_text(str(os.getpid()))\n"
    code = notes_itself + saving(tmp_path / "a", signal.SIGTERM)
    given = arguments(tmp_path, jobs)
    running = start_launch(tmp_path, given, code=code)
    wait_for(tmp_path / "a")
    os.kill(running, signal.SIGKILL)
    os.waitpid(running, 0)
    code, _, err = ended(tmp_path, start_launch(tmp_path, given, code=code))
    assert code == 2 and "another launch, or a job of one, is running" in err
    os.kill(int((tmp_path / "id").read_text()), signal.SIGTERM)
    wait_for(tmp_path / "a" / "checkpoints")
    folder, end = LaunchFolder(tmp_path / "ladder" / "launch"), time.monotonic() + 30
    while is_held(folder):  # until the job has ended
        assert time.monotonic() < end, "the job still holds the folder"
        time.sleep(0.05)


def is_held(folder: LaunchFolder) -> bool:
    try:
        hold(folder).close()
    except ValueError:
        return True
    return False


def test_two_processes_are_interrupted_without_a_traceback(tmp_path: Path, jobs: dict[str, str]):
    both = saving(tmp_path / "a", signal.SIGINT, signal.SIGTERM)
    code = both.replace(".mkdir(", ".mkdir(exist_ok=True, ")
    given = arguments(tmp_path, jobs, "cluster.processes=2")
    running = start_launch(tmp_path, given, code=code)
    wait_for(tmp_path / "a")
    time.sleep(0.5)  # for the second process
    os.kill(running, signal.SIGINT)
    code, out, err = ended(tmp_path, running)
    assert code == 0, err
    assert "train was stopped by SIGINT" in out and "Traceback" not in err
    assert "is at step 5 of 12" in out


def test_a_mistake_in_two_processes_is_a_line_of_each(tmp_path: Path, jobs: dict[str, str]):
    code = "sys.exit(print('sfumato: a mistake', file=sys.stderr) or 2)"
    given = arguments(tmp_path, jobs, "cluster.processes=2")
    code, _, err = ended(tmp_path, start_launch(tmp_path, given, code=code))
    assert code == 2
    assert "sfumato: a mistake\n" in err and "Traceback" not in err
    assert "job 1 of 2, train failed: it ended with exit code 2;" in err


def test_a_job_that_fails_stops_the_launch(tmp_path: Path, jobs: dict[str, str]):
    code, out, err = ended(
        tmp_path, start_launch(tmp_path, arguments(tmp_path, jobs), code="sys.exit(2)")
    )
    assert code == 2 and "job 2 of 2" not in out
    assert "job 1 of 2, train failed: it ended with exit code 2; left to do: train, look." in err


def test_a_limit_of_the_run_itself_stops_the_launch(tmp_path: Path, jobs: dict[str, str]):
    code, out, err = ended(tmp_path, start_launch(tmp_path, arguments(tmp_path, jobs), code=""))
    assert code == 0, err
    assert (
        f"train was stopped ({tmp_path / 'a'} is at step 0 of 12); left to do: train, look" in out
    )


def test_a_run_is_complete_with_its_last_step_and_its_export(tmp_path: Path, sd_folder: Path):
    two, four = (light(tmp_path, sd_folder, f"training.max_steps={steps}") for steps in (2, 4))
    assert what_is_missing(two) == f"{tmp_path / 'a'} is at step 0 of 2"
    assert in_child(lambda: start(two.arguments)) == 0
    assert what_is_missing(two) is None
    assert is_complete(two, 0, asked=False) and is_complete(two, 1, asked=True)  # torchrun's 1
    assert not is_complete(two, 1, asked=False) and not is_complete(four, 0, asked=True)
    assert what_is_missing(four) == f"{tmp_path / 'a'} is at step 2 of 4"
    note = (tmp_path / "a" / "export.json").read_text()
    assert in_child(lambda: start(four.arguments)) == 0
    assert what_is_missing(four) is None
    (tmp_path / "a" / "export.json").write_text(note)
    assert "is exported from another checkpoint" in str(what_is_missing(four))
    best = replace(four, settings=replace(four.settings, export="best"))
    assert what_is_missing(best) is None  # any that is kept may have been the best
    (tmp_path / "a" / "export.json").unlink()
    assert what_is_missing(four) == f"{tmp_path / 'a'} is not exported"


def test_a_stage_is_not_continued_from_another_start(tmp_path: Path, sd_folder: Path):
    folder = LaunchFolder(tmp_path / "launch")
    first = light(tmp_path, sd_folder, "training.max_steps=2")
    assert in_child(lambda: start(first.arguments)) == 0
    look = read(tmp_path, {"look": stage("evaluate", f"run={tmp_path / 'a'}")})[0]
    record = begin(folder, look)
    write_job_record(folder, "look", replace(record, finished="now"))
    assert is_done(folder, look)
    after = {**starts_from(first), "runs/elsewhere": "0"}
    write_job_record(folder, "train", replace(record, after=after))
    with pytest.raises(ValueError, match="began from runs/elsewhere, which has changed"):
        begin(folder, first)
    longer = light(tmp_path, sd_folder, "training.max_steps=4")
    assert in_child(lambda: start(longer.arguments)) == 0
    assert not is_done(folder, look)  # of a run that has changed since


def test_what_a_job_starts_from_is_noted_however_it_is_named(
    tmp_path: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder, place = LaunchFolder(tmp_path / "launch"), tmp_path / "a"
    first = light(tmp_path, sd_folder, "training.max_steps=1")
    assert in_child(lambda: start(first.arguments)) == 0
    own = tmp_path / "own"
    shutil.copytree(sd_folder, own)
    (own / "unet").rename(tmp_path / "unet")
    (own / "unet").symlink_to(tmp_path / "unet")
    starts = {
        "lora": f"model.lora.start={place / 'export' / 'lora'}",
        "home": "model.network.from_pretrained=~/a",
        "step": f"model.network.from_pretrained={place / 'checkpoints' / 'step-000001'}",
        "base": f"model.pretrained={place / 'export'}",
        "files": f"model.pretrained={own}",
        "hub": "model.pretrained=some/model",
    }
    jobs = {
        name: training(tmp_path, sd_folder, given, f"name={name}") for name, given in starts.items()
    }

    def noted(name: str) -> dict[str, str]:
        return dict(begin(folder, read(tmp_path / name, {name: jobs[name]})[0]).after)

    before = {name: noted(name) for name in starts}
    assert before["hub"].keys() == set()
    longer = light(tmp_path, sd_folder, "training.max_steps=2")
    assert in_child(lambda: start(longer.arguments)) == 0
    os.utime(own / "unet" / "config.json", ns=(0, 0))
    after = {name: noted(name) for name in starts}
    changed = {name for name in starts if before[name] != after[name]}
    assert changed == {"lora", "home", "base", "files"}  # a checkpoint by name stays what it is


def test_prepare_looks_again_where_its_pictures_changed(tmp_path: Path):
    pictures, folder = tmp_path / "pictures", LaunchFolder(tmp_path / "launch")
    shutil.copytree(DEMO_IMAGES / "new_held_out", pictures)
    for given, more in ((f"{pictures}", "more.txt"), (f"{pictures}/*.tar", "more.tar")):
        settings = [f"out={tmp_path / 'data'}", "stages=[pack,index]", f"pack.path={given}"]
        (job,) = read(tmp_path, {"p": stage("prepare", *settings)})
        record = begin(folder, job)
        if given == str(pictures):
            prepare(job.settings)
        write_job_record(folder, "p", replace(record, finished="now"))
        assert is_done(folder, job)
        (pictures / more).write_text("more")
        assert not is_done(folder, job)


def test_a_run_on_other_data_than_are_there_now_is_not_done(tmp_path: Path, sd_folder: Path):
    def prepared(*filters: str) -> None:
        packed = f"pack.path={DEMO_IMAGES / 'new_held_out'}"
        settings = [f"out={tmp_path / 'data'}", "stages=[pack,filter,index]", packed, *filters]
        prepare(compose_command("prepare", settings)[0])

    prepared()
    folder = LaunchFolder(tmp_path / "launch")
    reads = [
        *("objective=supervised", f"data.shards.path={tmp_path / 'data'}", "name=a"),
        *(f"model.pretrained={sd_folder}", f"runs_dir={tmp_path}", "training.max_steps=1"),
    ]
    (job,) = read(tmp_path, {"train": stage("train", *reads)})
    before = begin(folder, job).after
    assert set(before) == {str(tmp_path / "data"), str(sd_folder)}
    prepared()
    assert begin(folder, job).after == before
    prepared("filter.max_caption=28")
    assert begin(folder, job).after != before


def test_requeues_are_counted_of_one_and_the_same_job(tmp_path: Path, jobs: dict[str, str]):
    folder, (job, _) = LaunchFolder(tmp_path / "launch"), read(tmp_path, jobs)
    write_job_record(folder, "train", replace(begin(folder, job), requeues=3))
    assert begin(folder, job).requeues == 3
    assert begin(folder, replace(job, made_of="other settings")).requeues == 0


def test_two_launches_do_not_share_a_folder(tmp_path: Path):
    folder = LaunchFolder(tmp_path)
    refused = pytest.raises(ValueError, match="another launch, or a job of one, is running")
    with hold(folder), refused, hold(folder):
        pass
    with hold(folder):
        pass


def test_a_signal_is_passed_on_once_and_ignored_ones_do_not_end_the_child(tmp_path: Path):
    code = (
        "import pathlib, signal, sys, time; got = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: got.append(1))\n"
        f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\n"
        "while not got: time.sleep(0.01)\n"
        "time.sleep(0.5); sys.exit(10 + len(got))"
    )

    def act() -> None:
        passed = {signal.SIGUSR2: signal.SIGTERM}
        ended = run_child([sys.executable, "-c", code], passed, ignored=[signal.SIGUSR2])
        assert (ended.code, ended.asked) == (11, (signal.SIGUSR2,))

    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - nothing may return into the parent's tests
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    wait_for(tmp_path / "up")
    os.kill(child, signal.SIGUSR2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_signal_before_there_is_a_child_reaches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    popen = subprocess.Popen

    def late(*given: Any, **more: Any) -> subprocess.Popen[bytes]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return popen(*given, **more)

    monkeypatch.setattr(subprocess, "Popen", late)
    ended = run_child(["sleep", "60"], {signal.SIGUSR1: signal.SIGTERM})
    assert (ended.code, ended.asked) == (-signal.SIGTERM, (signal.SIGUSR1,))


def test_a_damaged_record_is_named(tmp_path: Path):
    folder = LaunchFolder(tmp_path)
    folder.record("a").write_text('{"made_off": 3}')
    with pytest.raises(ValueError, match=r"job-a\.json is damaged: .*made_of.*; remove it"):
        read_job_record(folder, "a")
