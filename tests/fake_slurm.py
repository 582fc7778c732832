"""Slurm of one machine for tests: sbatch, srun, squeue, scancel and scontrol on the PATH.

It imitates Slurm 22.05 as far as a launch relies on it: afterok, afterany and kill-on-invalid-dep,
arrays, a warning signal to every process below srun, requeue and restart count, the kill at the
time limit, and "Invalid job id" once every named job has ended.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

PROGRAMS = ("sbatch", "srun", "squeue", "scancel", "scontrol")
WAITING, ENDED = ("PENDING", "RUNNING"), ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def install(folder: Path) -> dict[str, str]:
    """Put the programs into folder/bin; return the environment that finds them."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    for name in PROGRAMS:
        file = programs / name
        file.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        file.chmod(0o755)
    return {"FAKE_SLURM": str(folder), "PATH": f"{programs}:{os.environ['PATH']}"}


def root() -> Path:
    return Path(os.environ["FAKE_SLURM"])


def read(number: str) -> dict:
    return json.loads((root() / f"job-{number}.json").read_text())


def write(number: str, job: dict) -> None:
    beside = root() / f".job-{number}.tmp"
    beside.write_text(json.dumps(job))
    beside.replace(root() / f"job-{number}.json")


def flag(kind: str, number: str) -> Path:
    return root() / f"{kind}-{number}"


def sbatch(*arguments: str) -> None:
    *typed, script = arguments
    text = Path(script).read_text()
    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH" in line]
    options = {}
    for option in (word for line in [*lines, *typed] for word in shlex.split(line)):
        key, _, value = option.removeprefix("--").partition("=")
        options[key] = value
    if options.get("partition") == "closed":
        sys.exit("sbatch: error: Batch job submission failed: Invalid partition name specified")
    number = str(1 + sum("_" not in path.name for path in root().glob("job-*.json")))
    (root() / f"script-{number}.sh").write_text(text)
    write(number, {"state": "PENDING", "options": options, "restarts": 0})
    with (root() / f"controller-{number}.log").open("w") as log:
        subprocess.Popen(
            [sys.executable, __file__, "control", number],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    assert "parsable" in options
    print(f"{number};fake")


def control(number: str) -> None:
    """Wait for the jobs before, and run the script until it ends without being requeued.

    A job with the flag `hold` waits until it is cancelled.
    """
    job = read(number)
    typed = filter(None, job["options"].get("dependency", "").split(","))
    before = {name: kind for kind, name in (each.split(":") for each in typed)}
    held = flag("hold", number).exists()
    while held or any(read(name)["state"] in WAITING for name in before):
        if flag("cancel", number).exists():
            break
        time.sleep(0.1)
    cancelled = flag("cancel", number).exists()
    needed = [name for name, kind in before.items() if kind == "afterok"]
    if cancelled or any(read(name)["state"] != "COMPLETED" for name in needed):
        assert cancelled or job["options"]["kill-on-invalid-dep"] == "yes"
        write(number, {**job, "state": "CANCELLED"})
        return
    if "array" not in job["options"]:
        run(number, job)
        return
    write(number, {**job, "state": "RUNNING"})
    first, last = map(int, job["options"]["array"].split("-"))
    tasks = [f"{number}_{each}" for each in range(first, last + 1)]
    with ThreadPoolExecutor(len(tasks)) as threads:
        list(threads.map(lambda task: run(task, {**job, "restarts": 0}), tasks))
    ends = {read(task)["state"] for task in tasks}
    write(number, {**job, "state": "COMPLETED" if ends == {"COMPLETED"} else "FAILED"})


def run(number: str, job: dict) -> None:
    while attempt(number, job):
        flag("requeue", number).unlink()
        job["restarts"] += 1


def attempt(number: str, job: dict) -> bool:
    """Run the script once; return whether it was requeued."""
    options = job["options"]
    nodes = options.get("nodes", "1")
    environment = {
        "SLURM_JOB_ID": number,
        "SLURM_JOB_NUM_NODES": nodes,
        "SLURM_NTASKS": nodes,
        "SLURM_JOB_NODELIST": ",".join(["localhost"] * int(nodes)),
        "SLURM_RESTART_COUNT": str(job["restarts"]),
    }
    whole, _, task = number.partition("_")
    if task:
        environment |= {"SLURM_ARRAY_JOB_ID": whole, "SLURM_ARRAY_TASK_ID": task}
    log = options["error"].replace("%j", number)
    with Path(log).open("a") as stream:
        script = subprocess.Popen(
            ["bash", root() / f"script-{whole}.sh"],
            env={**os.environ, **environment},
            start_new_session=True,
            stdout=stream,
            stderr=stream,
        )
    write(number, {**job, "state": "RUNNING"})
    name, delay = options["signal"].split("@")
    awaited = root() / f"warn-{options['job-name']}"  # holds a path: warn once it is there
    limit, warned = None, job["restarts"] > 0
    while script.poll() is None:
        time.sleep(0.05)
        if not warned and awaited.exists() and Path(awaited.read_text()).exists():
            warned, limit = True, time.monotonic() + float(delay)
            for process in below(script.pid, tasks=True):
                send(process, signal.Signals[f"SIG{name}"])
        over = limit is not None and time.monotonic() > limit
        ends = {
            "requeue": flag("requeue", number).exists(),
            "cancel": flag("cancel", number).exists(),
        }
        if over or any(ends.values()):
            end(script)
            if not ends["requeue"]:
                write(number, {**job, "state": "TIMEOUT" if over else "CANCELLED"})
            return ends["requeue"]
    if flag("requeue", number).exists():
        return True
    write(number, {**job, "state": "FAILED" if script.returncode else "COMPLETED"})
    return False


def below(pid: int, *, tasks: bool) -> list[psutil.Process]:
    """Return the processes below the batch script; of its tasks alone, or srun too."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(pid).children(recursive=True)
    return [process for process in found if not tasks or not is_srun(process)]


def is_srun(process: psutil.Process) -> bool:
    try:
        return "fake_slurm.py" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def end(script: subprocess.Popen) -> None:
    """End all that runs below the script, and then itself; whoever starts meanwhile, too."""
    for number in (signal.SIGCONT, signal.SIGTERM):
        for process in below(script.pid, tasks=True):
            send(process, number)
    psutil.wait_procs(below(script.pid, tasks=True), timeout=5)
    while found := below(script.pid, tasks=False):
        for process in found:
            send(process, signal.SIGSTOP)  # so that it starts nothing more
        for process in below(script.pid, tasks=False):
            send(process, signal.SIGKILL)
        time.sleep(0.02)
        if script.poll() is not None:
            break
    script.kill()
    script.wait()


def send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def srun(*arguments: str) -> None:
    paths, command = {}, list(arguments)
    while command[0].startswith("-"):
        option, _, value = command.pop(0).partition("=")
        paths[option] = value
    tasks = []
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        place = {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank), "SLURM_LOCALID": "0"}
        streams = [
            os.open(
                paths[name].replace("%j", os.environ["SLURM_JOB_ID"]).replace("%t", str(rank)),
                os.O_CREAT | os.O_WRONLY | os.O_APPEND,
            )
            for name in ("--output", "--error")
        ]
        environment = {**os.environ, **place}
        tasks.append(
            subprocess.Popen(command, env=environment, stdout=streams[0], stderr=streams[1])
        )
    sys.exit(max(abs(task.wait()) for task in tasks))


def squeue(*arguments: str) -> None:
    (asked,) = [text.partition("=")[2] for text in arguments if text.startswith("--jobs=")]
    found = [number for number in asked.split(",") if read(number)["state"] in WAITING]
    if not found:
        sys.exit("slurm_load_jobs error: Invalid job id specified")
    print("\n".join(found))


def scancel(*numbers: str) -> None:
    for number in numbers:
        flag("cancel", number).touch()


def scontrol(*arguments: str) -> None:
    match arguments:
        case ("requeue", number):
            assert "requeue" in read(number)["options"]
            flag("requeue", number).touch()
        case ("show", "hostnames", nodes):
            print("\n".join(nodes.split(",")))
        case _:
            sys.exit(f"scontrol: {arguments}")


if __name__ == "__main__":
    {
        "sbatch": sbatch,
        "control": control,
        "srun": srun,
        "squeue": squeue,
        "scancel": scancel,
        "scontrol": scontrol,
    }[sys.argv[1]](*sys.argv[2:])
