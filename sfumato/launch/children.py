"""Child process of a job: its command line, and the signals that reach it."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from sfumato.launch.jobs import Job

# With a shared store, restarted processes find the addresses of the dead ones.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: its exit code, or minus the signal that ended it.
        asked: the signals that arrived while it ran, in their order.
    """

    code: int
    asked: tuple[signal.Signals, ...]

    @property
    def in_words(self) -> str:
        """Describe the end, as in: it ended with exit code 1."""
        if self.code < 0:
            return f"it was ended by {signal.Signals(-self.code).name}"
        return f"it ended with exit code {self.code}"


def command_line(
    job: Job, max_restarts: int, save_seconds: int, meeting: Sequence[str] = ("--standalone",)
) -> list[str]:
    """Return the command that each machine of a job runs: torchrun's for several processes.

    Args:
        max_restarts: how often torchrun restarts all processes after one has died.
        save_seconds: how long torchrun lets its processes save before it kills them.
        meeting: torchrun's options on where the processes meet; see `rendezvous`.
    """
    command = ["-m", "sfumato", job.command, *job.arguments]
    if job.nodes == 1 and job.processes == 1:
        return [sys.executable, *command]
    return [
        *(sys.executable, "-m", "sfumato.launch.torchrun", *meeting),
        f"--nproc-per-node={job.processes}",
        f"--max-restarts={max_restarts}",
        f"--shutdown-timeout={save_seconds}",
        *command,
    ]


def part_command(job: Job, part: str) -> list[str]:
    """Return the command of one task of an array."""
    return [sys.executable, "-m", "sfumato", job.command, *job.arguments, f"part={part}"]


def rendezvous(nodes: int, host: str, port: str, attempt: str, first: bool) -> list[str]:
    """Return torchrun's options for processes on several machines.

    Args:
        host: the first machine, which runs the store where the processes meet, at a port.
        attempt: an id of this attempt at the job.
        first: whether this machine is the host.
    """
    return [
        f"--nnodes={nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={host}:{port}",
        f"--rdzv-id={attempt}",
        f"--rdzv-conf=is_host={str(first).lower()}",
    ]


def run_child(
    command: Sequence[str],
    passed_on: Mapping[signal.Signals, signal.Signals | None],
    *,
    ignored: Sequence[signal.Signals] = (),
    held: Sequence[int] = (),
) -> Ended:
    """Run a command to its end in its own session; pass on signals that arrive meanwhile.

    A terminal's Ctrl-C reaches this process only; the child gets the signal once, from here.

    Args:
        passed_on: a signal that may arrive, and the signal to send to the child; None sends none.
        ignored: signals that the child and its children ignore.
        held: file descriptors that the child keeps open.
    """
    asked: list[signal.Signals] = []
    early: list[signal.Signals] = []  # arrived before the child existed
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: FrameType | None) -> None:
        arrived = signal.Signals(number)
        asked.append(arrived)
        sent = passed_on[arrived]
        if child is None:
            early.append(arrived)
        elif sent is not None:
            child.send_signal(sent)

    def ignore() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    handlers = {number: signal.signal(number, pass_on) for number in passed_on}
    try:
        child = subprocess.Popen(
            command,
            env={**os.environ, **OWN_STORE},
            start_new_session=True,
            pass_fds=held,
            preexec_fn=ignore if ignored else None,
        )
        for sent in (passed_on[arrived] for arrived in early):
            if sent is not None:
                child.send_signal(sent)
        code = child.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Ended(code, tuple(asked))
