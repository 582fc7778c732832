"""A job's process: its command line, and signals that are passed on to it."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from sfumato.launch.jobs import Job

TORCHRUN = ("-m", "sfumato.launch.torchrun")
# Else processes that torchrun starts anew find the addresses of those before them in its store.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: its exit code, or minus the signal that ended it.
        asked: the signals that came meanwhile, in their order.
    """

    code: int
    asked: tuple[signal.Signals, ...]

    @property
    def in_words(self) -> str:
        """Say how it ended, as in: it ended with exit code 1."""
        if self.code < 0:
            return f"it was ended by {signal.Signals(-self.code).name}"
        return f"it ended with exit code {self.code}"


def one_line(job: Job) -> str:
    """Return the job's command as typed in a shell, in one process."""
    return shlex.join(["sfumato", job.command, *job.arguments])


def here(job: Job, max_restarts: int, save_seconds: int) -> list[str]:
    """Return the command line of a job on one machine: torchrun's for several processes.

    Args:
        max_restarts: times that torchrun starts all processes anew, when one has died.
        save_seconds: that torchrun leaves its processes to save in, once told to stop.
    """
    command = [sys.executable]
    if job.processes > 1:
        command += [*TORCHRUN, "--standalone", *_shared(job, max_restarts, save_seconds)]
    return [*command, "-m", "sfumato", job.command, *job.arguments]


def on_nodes(
    job: Job, host: str, port: str, identity: str, first: bool, max_restarts: int, save_seconds: int
) -> list[str]:
    """Return the command line that each machine of a job runs: processes that meet at host:port.

    Args:
        host: the first machine, where the store of the c10d rendezvous is.
        identity: of this attempt at the job.
        first: whether this is that machine.
        max_restarts: as in `here`; `save_seconds` likewise.
    """
    if job.nodes == 1:
        return here(job, max_restarts, save_seconds)
    return [
        sys.executable,
        *TORCHRUN,
        f"--nnodes={job.nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={host}:{port}",
        f"--rdzv-id={identity}",
        f"--rdzv-conf=is_host={'true' if first else 'false'}",
        *_shared(job, max_restarts, save_seconds),
        "-m",
        "sfumato",
        job.command,
        *job.arguments,
    ]


def _shared(job: Job, max_restarts: int, save_seconds: int) -> list[str]:
    return [
        f"--nproc-per-node={job.processes}",
        f"--max-restarts={max_restarts}",
        f"--shutdown-timeout={save_seconds}",
    ]


def run_child(
    command: Sequence[str],
    passed_on: Mapping[signal.Signals, signal.Signals | None],
    *,
    ignored: Sequence[signal.Signals] = (),
    held: Sequence[int] = (),
) -> Ended:
    """Run a command to its end, in a session of its own, whatever signals come meanwhile.

    A terminal's Ctrl-C reaches this process alone; the child gets what is passed on, once.

    Args:
        passed_on: a signal that may come, and what the child is then sent; None sends nothing.
        ignored: signals that the child, and its children, are deaf to.
        held: open files that the child keeps open.
    """
    asked: list[signal.Signals] = []
    early: list[signal.Signals] = []  # came before there was a child
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: FrameType | None) -> None:
        asked.append(signal.Signals(number))
        sent = passed_on[signal.Signals(number)]
        if child is None:
            early.append(signal.Signals(number))
        elif sent is not None:
            child.send_signal(sent)

    def deafen() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    before = {number: signal.signal(number, pass_on) for number in passed_on}
    try:
        child = subprocess.Popen(
            command,
            env={**os.environ, **OWN_STORE},
            start_new_session=True,
            pass_fds=held,
            preexec_fn=deafen if ignored else None,
        )
        for number in early:
            sent = passed_on[number]
            if sent is not None:
                child.send_signal(sent)
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return Ended(code, tuple(asked))
