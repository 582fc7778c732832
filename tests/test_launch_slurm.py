"""A launch on Slurm: through a fake one to its end, requeued once; what is refused, and printed."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_slurm
import pytest
from runs import metrics
from test_launch import arguments, read, stage, training

from sfumato.compose import compose_command
from sfumato.config import SlurmClusterConfig
from sfumato.launch import slurm as slurm_module
from sfumato.launch.launch import launch
from sfumato.launch.record import JobRecord, LaunchError, LaunchFolder, write_job_record
from sfumato.launch.worker import Worker

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


def wait_until_ended(folder: Path, seconds: float = 280) -> None:
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
    submit(tmp_path, jobs, "cluster.nodes=2")
    said = capfd.readouterr().out
    assert "train: submitted as job 1\n" in said
    assert "look: submitted as job 2, after train" in said
    with pytest.raises(LaunchError, match=r"still queued or running \(train: 1, look: 2\); .* 1 2"):
        submit(tmp_path, jobs)
    wait_until_ended(slurm)
    assert states(slurm) == {"1": "COMPLETED", "2": "COMPLETED"}, logs(tmp_path, "train")

    record = json.loads((tmp_path / "ladder" / "launch" / "job-train.json").read_text())
    assert record["requeues"] == 1 and record["finished"]
    assert json.loads((slurm / "job-1.json").read_text())["restarts"] == 1
    assert "of 12; back into the queue, for the 1. time" in logs(tmp_path, "train")
    starts = json.loads((tmp_path / "a" / "run.json").read_text())["starts"]
    assert [start["processes"] for start in starts] == [2, 2]
    steps = [row["step"] for row in metrics(tmp_path / "a")]
    assert sorted({*steps} - {0}) == list(range(1, 13)) and len(steps) == len({*steps})
    assert (tmp_path / "a" / "evaluation" / "step-000012").is_dir()

    submit(tmp_path, jobs)
    assert capfd.readouterr().out.splitlines()[-2:] == ["train: done", "look: done"]
    assert len(states(slurm)) == 2


def test_a_stage_does_not_run_when_the_one_before_it_failed(
    tmp_path: Path, sd_folder: Path, slurm: Path
):
    folder = tmp_path / "empty"
    folder.mkdir()
    jobs = {
        "look": stage("evaluate", f"run={folder}"),
        "train": training(tmp_path, sd_folder),
        "again": stage("evaluate", f"run={tmp_path / 'a'}"),
    }
    submit(tmp_path, jobs)
    wait_until_ended(slurm)
    assert states(slurm) == {"1": "FAILED", "2": "CANCELLED", "3": "CANCELLED"}
    assert "job look failed: it ended with exit code 2" in logs(tmp_path, "look")
    assert not (tmp_path / "a").exists()


def test_a_job_looks_for_its_predecessor_when_it_starts(
    tmp_path: Path,
    jobs: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    for key, value in {"JOB_ID": "7", "NODEID": "0", "JOB_NODELIST": "localhost"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    first, second = read(tmp_path, jobs)
    folder = LaunchFolder(tmp_path / "launch")
    worker = Worker(second, (first.name, first.made_of), folder, SlurmClusterConfig())
    finished = JobRecord(first.made_of, finished="2026-01-01")
    for record in (None, replace(finished, finished=None), replace(finished, made_of="other")):
        if record:
            write_job_record(folder, first.name, record)
        with pytest.raises(SystemExit):
            worker()
        assert "job look comes after train, which did not finish" in capfd.readouterr().err


def test_a_job_that_stops_early_is_requeued_so_often_and_not_more(
    tmp_path: Path,
    slurm: Path,
    jobs: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    for key, value in {"JOB_ID": "1", "NODEID": "0", "JOB_NODELIST": "localhost"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    fake_slurm.write("1", {"state": "RUNNING", "options": {"requeue": ""}})
    stops = [sys.executable, "-c", ""]
    monkeypatch.setattr("sfumato.launch.worker.on_nodes", lambda *_: stops)
    folder, job = LaunchFolder(tmp_path / "launch"), read(tmp_path, jobs)[0]
    worker = Worker(job, None, folder, SlurmClusterConfig(max_requeues=1))
    with pytest.raises(SystemExit):
        worker()
    assert "is at step 0 of 12; back into the queue, for the 1. time" in capfd.readouterr().out
    # A warning that comes while the interpreter ends would fail what is done.
    assert signal.signal(signal.SIGUSR2, signal.SIG_DFL) == signal.SIG_IGN
    fake_slurm.flag("requeue", "1").unlink()
    with pytest.raises(SystemExit):
        worker()
    said = capfd.readouterr().err
    assert "job train was requeued 1 times (cluster.max_requeues = 1) and is not complete" in said
    assert not fake_slurm.flag("requeue", "1").exists()
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    fake_slurm.write("1", {"state": "COMPLETED"})


def test_a_refused_job_leaves_nothing_in_the_queue(
    tmp_path: Path, slurm: Path, jobs: dict[str, str]
):
    with pytest.raises(LaunchError, match=r"Slurm refused job train: .*Invalid partition name"):
        submit(tmp_path, jobs, "cluster.partition=closed")
    assert states(slurm) == {}


@pytest.mark.parametrize("cluster", ["slurm", "local"])
def test_jobs_in_the_queue_refuse_another_launch(
    tmp_path: Path, slurm: Path, jobs: dict[str, str], cluster: str
):
    submit(tmp_path, jobs)
    fake_slurm.write("1", {"state": "PENDING"})
    again = [f"cluster={cluster}", *(SLURM[1:] if cluster == "slurm" else ())]
    settings, _ = compose_command("launch", arguments(tmp_path, jobs, *again))
    with pytest.raises(LaunchError, match=r"still queued or running \(train: 1.*scancel 1"):
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
    with pytest.raises(LaunchError, match=r"killed while it submitted job train; .*squeue --me"):
        launch(settings)


@pytest.mark.parametrize("content", ["{}", '{"jobs": ["1"]}', '{"jobs": {"train": 1}}'])
def test_a_damaged_note_of_what_was_submitted_is_named(
    tmp_path: Path, slurm: Path, jobs: dict[str, str], content: str
):
    folder = tmp_path / "ladder" / "launch"
    folder.mkdir(parents=True)
    (folder / "submitted.json").write_text(content)
    with pytest.raises(LaunchError, match=r"submitted\.json is damaged"):
        submit(tmp_path, jobs)
    assert states(slurm) == {}


def test_a_dry_run_prints_the_script_that_is_submitted(
    tmp_path: Path, slurm: Path, jobs: dict[str, str], capfd: pytest.CaptureFixture[str]
):
    submit(tmp_path, jobs, "dry_run=true", "cluster.setup=[echo hello]", "cluster.time=1-02:00:00")
    printed = capfd.readouterr().out
    assert states(slurm) == {} and not (tmp_path / "ladder").exists()
    assert "#SBATCH --dependency=afterok:JOB_OF_train\n" in printed
    assert "#SBATCH --signal=USR2@300\n" in printed and "#SBATCH --requeue\n" in printed
    assert "\n# setup\necho hello\n" in printed and "#SBATCH --time=1-02:00:00\n" in printed

    submit(tmp_path, jobs, "cluster.setup=[echo hello]", "cluster.time=1-02:00:00")
    assert (slurm / "script-1.sh").read_text() in printed
    second = (slurm / "script-2.sh").read_text()
    assert second.replace("afterok:1", "afterok:JOB_OF_train") in printed


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("cluster.time=4h", "cluster.time = '4h' is no time limit; write [[DD-]HH:]MM:SS"),
        (
            "cluster.time=05:00",
            "cluster.signal_seconds = 300 leaves nothing of cluster.time = 05:00",
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


def test_without_slurm_or_submitit_it_says_so(
    tmp_path: Path, jobs: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="needs Slurm, and sbatch is not on the PATH"):
        submit(tmp_path, jobs)
    for name in ("submitit", "submitit.slurm", "submitit.slurm.slurm"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LaunchError, match="submitit, which is not installed: pip install"):
        submit(tmp_path, jobs, "dry_run=true")
