"""A launch here: what it refuses beforehand, how it is stopped, goes on, and is told complete."""

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

import psutil
import pytest
from runs import assert_same_state, command, in_child, metrics, start

from sfumato.compose import DEMO_IMAGES, compose_command
from sfumato.config import CONF
from sfumato.data.prepared.format import INDEX
from sfumato.launch.children import here, on_nodes, run_child
from sfumato.launch.jobs import Job, read_jobs
from sfumato.launch.launch import launch
from sfumato.launch.record import (
    LaunchError,
    LaunchFolder,
    begin,
    hold,
    is_complete,
    is_done,
    read_job_record,
    starts_from,
    what_is_missing,
    write_job_record,
)
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


@pytest.fixture
def jobs(tmp_path: Path, sd_folder: Path) -> dict[str, str]:
    """Return a training job and one that evaluates its run."""
    return {
        "train": training(tmp_path, sd_folder, *LONGER),
        "look": stage("evaluate", f"run={tmp_path / 'a'}", "num_images=2", "steps=[12]"),
    }


def start_launch(given: list[str], **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sfumato", "launch", *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **more},
    )


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
    pictures = f"pack.path={DEMO_IMAGES / 'moons_held_out'}"
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
    with pytest.raises(ValueError, match=r"names look, which jobs\.look=null takes out"):
        read(tmp_path, {**jobs, "look": "null"}, "stages=[look]")
    with pytest.raises(ValueError, match="there are no jobs; choose a recipe"):
        read(tmp_path, {})


def test_stages_are_a_choice_of_jobs_in_their_order(tmp_path: Path, jobs: dict[str, str]):
    assert [job.name for job in read(tmp_path, jobs)] == ["train", "look"]
    assert [job.name for job in read(tmp_path, jobs, "stages=[train]")] == ["train"]
    assert [job.name for job in read(tmp_path, {**jobs, "look": "null"})] == ["train"]


def test_files_must_be_there_unless_an_earlier_job_makes_them(tmp_path: Path, jobs: dict[str, str]):
    with pytest.raises(ValueError, match=r"job look: run = .*/a is not there, and no job before"):
        read(tmp_path, jobs, "stages=[look]")
    given = ["recipe=sd15_draft", "model.pretrained=m", "reward.pretrained=r"]
    lost = stage("train", *given, "data.prompts=/nowhere.txt")
    with pytest.raises(ValueError, match=r"job train: data\.prompts = /nowhere\.txt is not there"):
        read(tmp_path, {"train": lost})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (stage("trian"), "jobs.x.command='trian' is unknown; choose one of prepare, train"),
        (
            stage("evaluate", "run=.", processes=2),
            "processes = 2, and evaluate runs in one process",
        ),
        (
            stage("train", "recipe=demo_finetune", processes=0),
            "jobs.x.processes=0 is too small",
        ),
        (stage("train", "recipe=demo_finetune", nodes=2), "nodes = 2, and cluster=local is one"),
        (stage("train", "recipe=demo_finetune", processes=3), "does not divide into 3 process"),
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
    assert text.startswith("# @package _global_\n# Reproduces: ") and "# Hardware: " in text
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
    line = shlex.join(here(job, 3, 77))
    assert line.endswith(
        "-m sfumato.launch.torchrun --standalone --nproc-per-node=2 --max-restarts=3 "
        "--shutdown-timeout=77 -m sfumato train recipe=demo_finetune training.global_batch_size=32"
    )
    line = shlex.join(on_nodes(replace(job, nodes=2), "n1", "20007", "7-0", False, 0, 60))
    assert line.endswith(
        "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=n1:20007 --rdzv-id=7-0 "
        "--rdzv-conf=is_host=false --nproc-per-node=2 --max-restarts=0 --shutdown-timeout=60 "
        "-m sfumato train recipe=demo_finetune training.global_batch_size=32"
    )
    assert on_nodes(job, "n1", "20007", "7-0", True, 0, 60) == here(job, 0, 60)


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
    tmp_path: Path, sd_folder: Path, jobs: dict[str, str]
):
    given = arguments(tmp_path, jobs)
    running = start_launch(given)
    wait_for(tmp_path / "a" / "checkpoints" / "step-000002")
    os.kill(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert "job 1 of 2, train was stopped by SIGINT (" in out
    assert "of 12); left to do: train, look. To go on, run the same command again" in out
    assert not (tmp_path / "a" / "evaluation").exists()
    first = json.loads((tmp_path / "a" / "run.json").read_text())["starts"]

    again = start_launch(given)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "job 1 of 2, train: done" in out and "job 2 of 2, look: done" in out
    assert len(json.loads((tmp_path / "a" / "run.json").read_text())["starts"]) == len(first) + 1

    out, err = start_launch(given).communicate(timeout=120)
    assert out.splitlines() == ["job 1 of 2, train: done", "job 2 of 2, look: done"], err

    whole = command(tmp_path, "whole", *LONGER, model=sd_folder)
    assert in_child(lambda: start(whole)) == 0
    assert_same_state(tmp_path / "a", tmp_path / "whole")


def test_two_processes_of_which_one_dies_begin_again_and_end(
    tmp_path: Path, sd_folder: Path, jobs: dict[str, str]
):
    both = ["cluster.processes=2", "cluster.max_restarts=1", "stages=[train]"]
    running = start_launch(arguments(tmp_path, jobs, *both))
    wait_for(tmp_path / "a" / "checkpoints" / "step-000002")
    workers = [
        process
        for process in psutil.Process(running.pid).children(recursive=True)
        if process.environ().get("RANK") == "1"
    ]
    workers[0].kill()
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    assert "job 1 of 1, train: done" in out
    notes = json.loads((tmp_path / "a" / "run.json").read_text())["starts"]
    assert len(notes) == 2
    assert [row["step"] for row in metrics(tmp_path / "a")] == list(range(13))


@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_saves_unless_it_is_ignored(
    tmp_path: Path, jobs: dict[str, str], nohup: bool
):
    rarely = jobs["train"].replace('"]', '", "training.checkpoint_every_steps=1000"]')
    given = arguments(tmp_path, {"train": rarely})
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        running = start_launch(given)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for(tmp_path / "a" / "metrics.jsonl")
    while len(metrics(tmp_path / "a")) < 3:
        time.sleep(0.05)
    running.send_signal(signal.SIGHUP)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    steps = [int(place.name[5:]) for place in (tmp_path / "a" / "checkpoints").glob("step-*")]
    if nohup:
        assert "job 1 of 1, train: done" in out and steps == [12]
    else:
        assert "train was stopped by SIGHUP" in out
        assert len(steps) == 1 and 3 <= steps[0] < 12


def test_a_job_goes_on_when_its_launch_is_killed_and_holds_the_folder(
    tmp_path: Path, jobs: dict[str, str]
):
    long = jobs["train"].replace('"]', '", "training.max_steps=100000"]')
    given = arguments(tmp_path, {"train": long})
    running = start_launch(given)
    wait_for(tmp_path / "a" / "checkpoints" / "step-000002")
    (child,) = psutil.Process(running.pid).children()
    running.kill()
    running.wait()
    _, err = start_launch(given).communicate(timeout=120)
    assert "another launch, or a job of one, is running" in err
    child.terminate()
    running.communicate(timeout=120)


def test_two_processes_are_interrupted_without_a_traceback(tmp_path: Path, jobs: dict[str, str]):
    long = jobs["train"].replace('"]', '", "training.max_steps=100000"]')
    running = start_launch(arguments(tmp_path, {"train": long}, "cluster.processes=2"))
    wait_for(tmp_path / "a" / "checkpoints" / "step-000002")
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert "train was stopped by SIGINT" in out and "Traceback" not in err
    last = max(row["step"] for row in metrics(tmp_path / "a"))
    assert (tmp_path / "a" / "checkpoints" / f"step-{last:06d}").exists()


def test_a_mistake_in_two_processes_is_a_line_of_each(tmp_path: Path, sd_folder: Path):
    nowhere = training(tmp_path, sd_folder, f"model.pretrained={tmp_path}")
    done = start_launch(
        arguments(tmp_path, {"a": nowhere}, "cluster.processes=2", "cluster.max_restarts=0")
    )
    _, err = done.communicate(timeout=120)
    assert done.returncode == 2
    assert "has no model_index.json" in err and "Traceback" not in err
    assert "job 1 of 1, a failed: it ended with exit code 2;" in err


def test_a_job_that_fails_stops_the_launch(tmp_path: Path, sd_folder: Path):
    jobs = {
        "look": stage("evaluate", f"run={tmp_path}"),
        "train": training(tmp_path, sd_folder),
    }
    done = start_launch(arguments(tmp_path, jobs))
    _, err = done.communicate(timeout=120)
    assert done.returncode == 2
    assert "config.yaml" in err  # evaluate's own words
    assert "job 1 of 2, look failed: it ended with exit code 2; left to do: look, train." in err
    assert not (tmp_path / "a").exists()


def test_a_limit_of_the_run_itself_stops_the_launch(tmp_path: Path, jobs: dict[str, str]):
    limited = jobs["train"].replace('"]', '", "training.max_time=00:00"]')
    done = start_launch(arguments(tmp_path, {**jobs, "train": limited}))
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert (
        f"train was stopped ({tmp_path / 'a'} is at step 0 of 12); left to do: train, look" in out
    )


def test_a_run_is_complete_with_its_last_step_and_its_export(tmp_path: Path, sd_folder: Path):
    def job(*more: str) -> Job:
        return read(tmp_path, {"train": training(tmp_path, sd_folder, *more)})[0]

    two, four = job("training.max_steps=2"), job("training.max_steps=4")
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
    first = read(tmp_path, {"train": training(tmp_path, sd_folder, "training.max_steps=2")})[0]
    assert in_child(lambda: start(first.arguments)) == 0
    look = read(tmp_path, {"look": stage("evaluate", f"run={tmp_path / 'a'}")})[0]
    record = begin(folder, look)
    write_job_record(folder, "look", replace(record, finished="now"))
    assert is_done(folder, look)
    after = {**starts_from(first), "runs/elsewhere": "0"}
    write_job_record(folder, "train", replace(record, after=after))
    with pytest.raises(LaunchError, match="begun from another state of runs/elsewhere"):
        begin(folder, first)
    longer = read(tmp_path, {"train": training(tmp_path, sd_folder, "training.max_steps=4")})[0]
    assert in_child(lambda: start(longer.arguments)) == 0
    assert not is_done(folder, look)  # of a run that has changed since


def test_what_a_job_starts_from_is_noted_however_it_is_named(
    tmp_path: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder, place = LaunchFolder(tmp_path / "launch"), tmp_path / "a"
    first = read(tmp_path, {"train": training(tmp_path, sd_folder, "training.max_steps=1")})[0]
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
    longer = read(tmp_path, {"train": training(tmp_path, sd_folder, "training.max_steps=2")})[0]
    assert in_child(lambda: start(longer.arguments)) == 0
    os.utime(own / "unet" / "config.json", ns=(0, 0))
    after = {name: noted(name) for name in starts}
    changed = {name for name in starts if before[name] != after[name]}
    assert changed == {"lora", "home", "base", "files"}  # a checkpoint by name stays what it is


def test_prepare_looks_again_where_its_pictures_changed(tmp_path: Path):
    pictures, folder = tmp_path / "pictures", LaunchFolder(tmp_path / "launch")
    shutil.copytree(DEMO_IMAGES / "moons_held_out", pictures)
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
        packed = f"pack.path={DEMO_IMAGES / 'moons_held_out'}"
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
    refused = pytest.raises(LaunchError, match="another launch, or a job of one, is running")
    with hold(folder), refused, hold(folder):
        pass
    with hold(folder):
        pass


def test_a_job_holds_the_folder_when_its_launch_was_killed(tmp_path: Path):
    folder = LaunchFolder(tmp_path)
    code = f"import pathlib, time; pathlib.Path({str(tmp_path / 'up')!r}).touch(); time.sleep(60)"

    def act() -> None:
        with hold(folder) as held:
            run_child([sys.executable, "-c", f"import os; print(os.getpid(), flush=True); {code}"],
                      {}, held=[held.fileno()])  # fmt: skip

    child = os.fork()
    if not child:
        os.dup2(os.open(tmp_path / "pid", os.O_CREAT | os.O_WRONLY), 1)
        act()
        os._exit(0)
    wait_for(tmp_path / "up")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with pytest.raises(LaunchError, match="or a job of one, is running"), hold(folder):
        pass
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    time.sleep(0.2)
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
    with pytest.raises(LaunchError, match=r"job-a\.json is damaged; remove it"):
        read_job_record(folder, "a")
