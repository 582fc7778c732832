"""A launch on Slurm: through a fake one to its end, requeued once; what is refused, and printed."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_slurm
import pytest
from image_files import write_folder
from runs import metrics
from test_launch import arguments, read, stage, training
from test_prepare_engine import tree

from sfumato.compose import compose_command
from sfumato.launch import slurm as slurm_module
from sfumato.launch.launch import launch
from sfumato.launch.record import JobRecord, LaunchFolder, write_job_record
from sfumato.launch.worker import Task, work
from sfumato.preparation.prepare import prepare

SLURM = ("cluster=slurm", "cluster.gpus_per_node=0", "cluster.cpus_per_task=1")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put a fake Slurm on the PATH; return its folder. Whatever still runs is cancelled."""
    folder = tmp_path / "slurm"
    for key, value in fake_slurm.install(folder).items():
        monkeypatch.setenv(key, value)
    yield folder
    for number in states(folder):
        fake_slurm.scancel(number)
    wait_until_ended(folder)


def states(folder: Path) -> dict[str, str]:
    found = sorted(folder.glob("job-*.json"))
    return {path.stem[4:]: json.loads(path.read_text())["state"] for path in found}


def wait_until_ended(folder: Path, seconds: float = 500) -> None:
    end = time.monotonic() + seconds
    while set(states(folder).values()) & set(fake_slurm.WAITING):
        assert time.monotonic() < end, states(folder)
        time.sleep(0.1)


def submit(folder: Path, jobs: dict[str, str], *more: str) -> None:
    settings, _ = compose_command("launch", arguments(folder, jobs, *SLURM, *more))
    assert launch(settings) is False


def logs(folder: Path, job: str) -> str:
    found = sorted((folder / "ladder" / "launch" / "slurm" / job).glob("*.err"))
    found += sorted((folder / "ladder" / "launch" / "slurm" / job).glob("*.out"))
    return "\n".join(path.read_text() for path in found)


@pytest.fixture
def jobs(tmp_path: Path, sd_folder: Path) -> dict[str, str]:
    """Return a training job and one that evaluates its run."""
    return {
        "train": training(tmp_path, sd_folder, "training.max_steps=12", "validation.every_steps=0"),
        "look": stage("evaluate", f"run={tmp_path / 'a'}", "num_images=2", "steps=[12]"),
    }


def test_two_stages_run_on_two_machines_to_their_end_through_a_requeue(
    tmp_path: Path, slurm: Path, jobs: dict[str, str], capfd: pytest.CaptureFixture[str]
):
    (slurm / "warn-train").write_text(str(tmp_path / "a" / "checkpoints" / "step-000002"))
    jobs = {**jobs, "look": stage("demo", "--help")}
    submit(tmp_path, jobs, "cluster.nodes=2")
    said = capfd.readouterr().out
    assert "train: submitted as job 1\n" in said
    assert "look: submitted as job 2, after train" in said
    with pytest.raises(ValueError, match=r"queued or running \(train: 1, look: 2\); .* 1 2"):
        submit(tmp_path, jobs)
    wait_until_ended(slurm)
    assert states(slurm) == {"1": "COMPLETED", "2": "COMPLETED"}, logs(tmp_path, "train")

    record = json.loads((tmp_path / "ladder" / "launch" / "job-train.json").read_text())
    assert record["requeues"] == 1 and record["finished"]
    assert json.loads((slurm / "job-1.json").read_text())["restarts"] == 1
    assert "of 12; back into the queue, requeue 1 of 100" in logs(tmp_path, "train")
    starts = json.loads((tmp_path / "a" / "run.json").read_text())["starts"]
    assert [start["processes"] for start in starts] == [2, 2]
    steps = [row["step"] for row in metrics(tmp_path / "a")]
    assert sorted({*steps} - {0}) == list(range(1, 13)) and len(steps) == len({*steps})
    assert "usage: sfumato demo" in logs(tmp_path, "look")

    submit(tmp_path, jobs)
    assert capfd.readouterr().out.splitlines()[-2:] == ["train: done", "look: done"]
    assert len(states(slurm)) == 2


def test_a_stage_does_not_run_when_the_one_before_it_failed(
    tmp_path: Path, sd_folder: Path, slurm: Path
):
    jobs = {"wrong": stage("demo", "--no-such-option"), "train": training(tmp_path, sd_folder)}
    jobs["look"] = stage("evaluate", f"run={tmp_path / 'a'}")
    submit(tmp_path, jobs)
    wait_until_ended(slurm)
    assert states(slurm) == {"1": "FAILED", "2": "CANCELLED", "3": "CANCELLED"}
    assert "job wrong failed: it ended with exit code 2" in logs(tmp_path, "wrong")
    assert not (tmp_path / "a").exists()


@pytest.fixture
def shared(tmp_path: Path, jobs: dict[str, str]) -> dict[str, str]:
    """Return a packing and an evaluation, each shared by the tasks of an array."""
    write_folder(tmp_path / "pictures", [(16, 20)] * 7)
    pack = stage("prepare", *packing(tmp_path, "out"), array=3)
    run = stage("evaluate", f"run={tmp_path / 'a'}", "num_images=2", "steps=[0,8,12]", array=2)
    return {"pack": pack, "train": jobs["train"], "look": run}


def packing(folder: Path, out: str) -> list[str]:
    settings = [f"out={folder / out}", "stages=[pack,filter,index]", f"pack.path={folder}/pictures"]
    return [*settings, "pack.samples_per_shard=2"]


def test_tasks_of_an_array_share_a_job_that_then_finishes(
    tmp_path: Path, slurm: Path, shared: dict[str, str], capfd: pytest.CaptureFixture[str]
):
    submit(tmp_path, shared)
    said = capfd.readouterr().out
    assert "pack: submitted as job 2, after pack.array\n" in said
    assert "look.array: submitted as job 4, after train\n" in said
    assert "look: submitted as job 5, after train and look.array\n" in said
    wait_until_ended(slurm)
    ended = states(slurm)
    assert set(ended.values()) == {"COMPLETED"}, logs(tmp_path, "look.array")
    assert set(ended) == {"1", "1_0", "1_1", "1_2", "2", "3", "4", "4_0", "4_1", "5"}

    assert "pack.array, part 2/3: done" in logs(tmp_path, "pack.array")
    assert "pack, part 1/3: 2 of 2 kept" in logs(tmp_path, "pack.array")
    prepare_here, _ = compose_command("prepare", packing(tmp_path, "here"))
    prepare(prepare_here)
    assert tree(tmp_path / "out") == tree(tmp_path / "here")
    every = logs(tmp_path, "look.array")
    assert all(f"step {step}:" in every for step in (0, 8, 12)), every
    assert "step 8:" in logs(tmp_path, "look")
    submit(tmp_path, shared)
    assert capfd.readouterr().out.splitlines()[-3:] == ["pack: done", "train: done", "look: done"]


def test_a_task_that_fails_is_made_up_for_by_the_job(
    tmp_path: Path, slurm: Path, shared: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    (slurm / "cancel-1_1").touch()
    submit(tmp_path, {"pack": shared["pack"]})
    wait_until_ended(slurm)
    assert states(slurm)["1_1"] == "CANCELLED" and states(slurm)["1"] == "FAILED"
    assert states(slurm)["2"] == "COMPLETED", logs(tmp_path, "pack")
    assert len(list((tmp_path / "out" / "shards").glob("0*.tar"))) == 4


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (stage("demo", "--help", array=2), "array = 2, but demo is not shared by tasks"),
        (
            stage("prepare", "out=out", "pack.path=.", "model.pretrained=.", array=2),
            r"shares one of the stages pack and precache, .* has 2 of them; write two jobs",
        ),
        (
            stage("prepare", "out=o", "pack.path=.", "stages=[download,pack,filter]", array=2),
            "begins with another, which no task makes; write two jobs",
        ),
        (stage("evaluate", "run=.", "part=0/2", array=2), "part=0/2 leaves the rest of the work"),
        (
            stage("prepare", "out=o", "pack.path=s3://me:hidden@b/a.tar", "stages=[pack]"),
            r"pack.path=s3://\*\*\*@b/a.tar may hold credentials",
        ),
        (
            stage("prepare", "out=o", "pack.path=s3://b/a.tar", "stages=[pack]", array=2),
            "part=0/2 of pack.path=s3://b/a.tar would copy the whole input to each machine",
        ),
        (
            stage("evaluate", "run=.", "metrics=[fid]", "reference=s3://me:hidden@b/x"),
            r"reference=s3://\*\*\*@b/x may hold credentials",
        ),
        (stage("evaluate", "run=.", array=2, nodes=2), "nodes above 1 share the images of one"),
        (stage("evaluate", "run=.", array=0), "array=0 is too small; give 1 or more"),
    ],
)
def test_an_array_that_shares_nothing_is_refused(tmp_path: Path, job: str, said: str):
    with pytest.raises(ValueError, match=said):
        submit(tmp_path, {"job": job}, "dry_run=true")


def test_a_job_with_the_name_of_an_array_is_refused(tmp_path: Path):
    settings, _ = compose_command("launch", arguments(tmp_path, {"a": stage("demo")}, *SLURM))
    settings.jobs = {"a.array": settings.jobs["a"]}
    with pytest.raises(ValueError, match=r"ends in \.array is that of an array; give another"):
        launch(settings)


def test_this_machine_has_no_arrays(tmp_path: Path, shared: dict[str, str]):
    with pytest.raises(ValueError, match="array = 3, but cluster=local has none; use cluster=slur"):
        read(tmp_path, {"pack": shared["pack"]})


def test_a_task_that_is_warned_goes_back_into_the_queue(
    tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    for key, value in {"ARRAY_JOB_ID": "1", "ARRAY_TASK_ID": "3", "RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    fake_slurm.write("1_3", {"state": "RUNNING", "options": {"requeue": ""}})
    warned = "import os, signal; os.kill(os.getppid(), signal.SIGUSR2); signal.pause()"
    asked = stand_in(monkeypatch, warned, "part_command")
    with pytest.raises(SystemExit):
        work(replace(task, parts=4))
    assert asked[0][1] == "3/4" and fake_slurm.flag("requeue", "1_3").exists()
    assert "train, part 3/4: back into the queue" in capfd.readouterr().out
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(ValueError, match="part 3/4 of train failed: it was ended by SIGTERM"):
        work(replace(task, parts=4))
    fake_slurm.write("1_3", {"state": "COMPLETED"})


@pytest.fixture
def task(
    tmp_path: Path, slurm: Path, jobs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Task]:
    """Return the task of the training job, on the first of two machines, running as job 1."""
    for key, value in {"JOB_ID": "1", "NODEID": "0", "JOB_NODELIST": "n1,n2"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    fake_slurm.write("1", {"state": "RUNNING", "options": {"requeue": ""}})
    job, folder = read(tmp_path, jobs)[0], str(tmp_path / "launch")
    job = replace(job, settings=None)
    yield Task(job, None, folder, save_seconds=5, max_restarts=0, max_requeues=1)
    fake_slurm.write("1", {"state": "COMPLETED"})


def stand_in(monkeypatch: pytest.MonkeyPatch, code: str, name: str = "command_line") -> list[Any]:
    """Let workers run Python code instead of the job's command; return what it was made of."""
    asked: list[Any] = []

    def command(*given: Any) -> list[str]:
        asked.append(given)
        return [sys.executable, "-S", "-c", code]

    monkeypatch.setattr(f"sfumato.launch.worker.{name}", command)
    return asked


def test_a_job_looks_for_its_predecessor_when_it_starts(task: Task):
    folder = LaunchFolder(Path(task.folder))
    finished = JobRecord("hash", finished="2026-01-01")
    for record in (None, replace(finished, finished=None), replace(finished, made_of="other")):
        if record:
            write_job_record(folder, "before", record)
        with pytest.raises(ValueError, match="job train comes after before, which did not finish"):
            work(replace(task, previous=("before", "hash")))


def test_a_job_that_stops_early_is_requeued_so_often_and_not_more(
    task: Task, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    stand_in(monkeypatch, "")
    with pytest.raises(SystemExit) as end:
        work(task)
    assert end.value.code == 1
    assert "is at step 0 of 12; back into the queue, requeue 1 of 1" in capfd.readouterr().out
    fake_slurm.flag("requeue", "1").unlink()
    with pytest.raises(ValueError, match=r"job train was requeued 1 times .*max_requeues = 1"):
        work(task)
    assert not fake_slurm.flag("requeue", "1").exists()


def test_a_warning_lets_the_job_save_and_go_back_into_the_queue(
    tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    saves = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(open('saved', 'x').close()))\n"
        "os.kill(os.getpid(), signal.SIGUSR2)\n"  # which the child ignores
        "os.kill(os.getppid(), signal.SIGUSR2)\n"
        "while True: signal.pause()"
    )
    monkeypatch.chdir(tmp_path)
    stand_in(monkeypatch, saves)
    with pytest.raises(SystemExit):
        work(task)
    assert (tmp_path / "saved").exists() and fake_slurm.flag("requeue", "1").exists()
    assert "requeue 1 of 1" in capfd.readouterr().out


def test_a_cancelled_job_is_not_requeued(task: Task, monkeypatch: pytest.MonkeyPatch):
    cancels = "import os, signal; os.kill(os.getppid(), signal.SIGTERM)"
    stand_in(monkeypatch, cancels)
    with pytest.raises(ValueError, match="job train was stopped by SIGTERM"):
        work(task)
    assert not fake_slurm.flag("requeue", "1").exists()


def test_a_warning_after_the_command_has_ended_fails_nothing(tmp_path: Path):
    code = (
        "import os, signal, sys\n"
        "from sfumato.launch import worker\n"
        "worker.work = lambda _: os.kill(os.getpid(), signal.SIGUSR2)\n"
        "worker.read_record = lambda *_: None\n"
        "worker.main()"
    )
    assert subprocess.run([sys.executable, "-c", code, "task.json"], check=False).returncode == 0


def test_machines_meet_at_the_first_of_them(task: Task, monkeypatch: pytest.MonkeyPatch):
    asked = stand_in(monkeypatch, "raise SystemExit(3)")
    with pytest.raises(ValueError, match="it ended with exit code 3"):
        work(replace(task, job=replace(task.job, nodes=2)))
    monkeypatch.setenv("SLURM_NODEID", "1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    with pytest.raises(SystemExit) as end:
        work(replace(task, job=replace(task.job, nodes=2)))
    assert end.value.code == 3
    (first, _), (second, _) = [(given[3], given[0]) for given in asked]
    for meeting, attempt, host in ((first, "1-0", "true"), (second, "1-4", "false")):
        assert "--rdzv-endpoint=n1:20001" in meeting
        assert f"--rdzv-id={attempt}" in meeting and f"--rdzv-conf=is_host={host}" in meeting


def test_a_refused_job_leaves_nothing_in_the_queue(
    tmp_path: Path, slurm: Path, jobs: dict[str, str]
):
    with pytest.raises(ValueError, match=r"Slurm refused job train: .*Invalid partition name"):
        submit(tmp_path, jobs, "cluster.partition=closed")
    assert states(slurm) == {}


@pytest.mark.parametrize("cluster", ["slurm", "local"])
def test_jobs_in_the_queue_refuse_another_launch(
    tmp_path: Path, slurm: Path, jobs: dict[str, str], cluster: str
):
    (slurm / "hold-1").touch()
    submit(tmp_path, jobs)
    again = [f"cluster={cluster}", *(SLURM[1:] if cluster == "slurm" else ())]
    settings, _ = compose_command("launch", arguments(tmp_path, jobs, *again))
    with pytest.raises(ValueError, match=r"still queued or running \(train: 1.*scancel 1"):
        launch(settings)


def test_a_launch_that_was_killed_while_it_submitted_is_not_repeated_blindly(
    tmp_path: Path, slurm: Path, jobs: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    settings, _ = compose_command("launch", arguments(tmp_path, jobs, *SLURM))
    send = slurm_module._send

    def killed(*given: Any) -> str:
        send(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(slurm_module, "_send", killed)
        with pytest.raises(KeyboardInterrupt):
            launch(settings)
    assert list(states(slurm)) == ["1"]
    with pytest.raises(ValueError, match=r"killed while it submitted job train; .*squeue --me"):
        launch(settings)


@pytest.mark.parametrize("content", ["{}", '{"jobs": ["1"]}', '{"jobs": {"train": 1}}'])
def test_a_damaged_note_of_what_was_submitted_is_named(
    tmp_path: Path, slurm: Path, jobs: dict[str, str], content: str
):
    folder = tmp_path / "ladder" / "launch"
    folder.mkdir(parents=True)
    (folder / "submitted.json").write_text(content)
    with pytest.raises(ValueError, match=r"submitted\.json is damaged"):
        submit(tmp_path, jobs)
    assert states(slurm) == {}


def test_a_dry_run_prints_the_script_that_is_submitted(
    tmp_path: Path, slurm: Path, jobs: dict[str, str], capfd: pytest.CaptureFixture[str]
):
    more = ["cluster.setup=[echo hello]", "cluster.time=1-02:00:00"]
    more += ["cluster.additional.exclude='node7 node8'", "cluster.additional.exclusive=true"]
    submit(tmp_path, jobs, "dry_run=true", *more)
    printed = capfd.readouterr().out
    assert states(slurm) == {} and not (tmp_path / "ladder").exists()
    assert "sbatch --parsable --dependency=afterok:JOB_OF_train " in printed
    assert "#SBATCH --signal=USR2@300\n" in printed and "#SBATCH --requeue\n" in printed
    assert "\necho hello\n" in printed and "#SBATCH --time=1-02:00:00\n" in printed
    assert "#SBATCH --exclude='node7 node8'\n" in printed and "#SBATCH --exclusive\n" in printed

    submit(tmp_path, jobs, *more)
    assert all((slurm / f"script-{number}.sh").read_text() in printed for number in (1, 2))
    assert json.loads((slurm / "job-2.json").read_text())["options"]["dependency"] == "afterok:1"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("cluster.time=4h", "cluster.time='4h' is no duration; write [[DD-]HH:]MM:SS"),
        (
            "cluster.time=05:00",
            "cluster.signal_seconds = 300 must be below cluster.time = 05:00",
        ),
        ("cluster.nodes=0", "cluster.nodes=0 is too small; give 1 or more"),
        ("cluster.max_requeues=-1", "cluster.max_requeues=-1 is too small; give 0 or more"),
    ],
)
def test_impossible_clusters_are_refused(
    tmp_path: Path, jobs: dict[str, str], more: str, said: str
):
    with pytest.raises(ValueError) as caught:
        submit(tmp_path, jobs, more, "dry_run=true")
    assert said in str(caught.value)


def test_without_slurm_it_says_so(
    tmp_path: Path, jobs: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="needs Slurm, and sbatch is not on the PATH"):
        submit(tmp_path, jobs)
