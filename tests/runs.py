"""Small training runs for tests: of a toy model, here, in a process to be killed, or in two."""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import jaxtyping
import torch
from accelerate.state import PartialState

from sfumato.cli import main
from sfumato.compose import compose_train
from sfumato.run import run
from sfumato.training.checkpoint import Snapshot, list_checkpoints, read_checkpoint
from sfumato.training.distribution import Distribution
from sfumato.training.loop import Outcome

COLORS, SHAPES = ("red", "green", "blue"), ("ring", "star")
PROMPTS = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
TIMINGS = {"images_per_second", "seconds_per_step", "tflops_per_second", "mfu", "data_wait"}
CHILD_SECONDS = 300  # a child that hangs is ended

BASE = (
    "reward=color",
    "sampler.num_inference_steps=3",
    "sampler.guidance_scale=2.0",
    "objective.kl_coeff=0.5",
    "optimizer.lr=0.01",
    "optimizer.warmup_steps=2",
    "training.micro_batch_size=2",
    "training.global_batch_size=4",
    "training.max_steps=6",
    "training.checkpoint_every_steps=2",
    "training.tensorboard=false",
    "training.async_checkpoints=false",  # so that what a test counts comes in one order
    "validation.num_images=3",
    "validation.every_steps=3",
    "verify=false",
)


def command(folder: Path, name: str, *overrides: str, model: Path | None = None) -> list[str]:
    """Return what stands after `sfumato train`, for a run folder/name; later overrides win."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("\n".join(PROMPTS) + "\n")
    model_overrides = [f"model.pretrained={model or 'toy'}"]
    if model is None:
        model_overrides.append("model.trainable=full")
    places = [f"runs_dir={folder}", f"name={name}"]
    if "objective=supervised" not in overrides:  # it reads no prompts
        places.append(f"data.prompts={prompts}")
    chosen = {text.split("=")[0]: text for text in [*BASE, *model_overrides, *places, *overrides]}
    return list(chosen.values())


def start(overrides: Sequence[str]) -> Outcome:
    """Run `sfumato train` with these overrides in this process."""
    config, settings = compose_train(overrides)
    distribution = Distribution(config.training)
    try:
        return run.train(config, settings, distribution)
    finally:
        distribution.close()


def start_cli(overrides: Sequence[str]) -> None:
    """Run `sfumato train` with these overrides through the command line, exit codes and all."""
    sys.argv = ["sfumato", "train", *overrides]
    main()


def in_child(action: Callable[[], object]) -> int:
    """Run in a forked process; return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(action), 0)[1])


def in_processes(world: int, action: Callable[[int], object], *, code: int = 0) -> None:
    """Run on `world` processes that see each other as torchrun's do; all must exit with `code`."""
    assert codes_of(world, action) == [code] * world


def codes_of(world: int, action: Callable[[int], object]) -> list[int]:
    """Run on `world` processes as `in_processes` does; return the exit code of each."""
    assert not PartialState._shared_state, "a Distribution left open would make each child alone"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def on_rank(rank: int) -> Callable[[], object]:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

        def act() -> object:
            os.environ.update({key: str(value) for key, value in {**place, **address}.items()})
            return action(rank)

        return act

    children = [fork(on_rank(rank)) for rank in range(world)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def fork(action: Callable[[], object]) -> int:
    """Start a process that runs `action` and ends; return its id."""
    child = os.fork()
    if child:
        return child
    signal.alarm(CHILD_SECONDS)
    faulthandler.enable(sys.__stderr__)  # the parent's writes where no report shows it
    code = 1
    try:
        # The first thread to ask mends torch's pool after a fork; loaders of weights would race.
        torch.set_num_threads(1)
        torch.seed()  # a new process shares no random stream with the old one
        # Tests in one process check the shapes that all calls take; here they would take a fifth.
        jaxtyping.config.update("jaxtyping_disable", True)
        action()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:  # noqa: BLE001 - nothing may return into the parent's tests
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def on_call(number: int, act: Callable[[], object], name: str | None = None) -> list[int]:
    """Act once when a function of Sfumato is entered for the given time, from now on.

    Threads that begin later are watched too.

    Args:
        number: counts from 1.
        name: qualified name of the function; None counts the calls of all.

    Returns:
        The count so far, which goes on changing.
    """
    count = [0]

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event != "call" or not str(frame.f_globals.get("__name__")).startswith("sfumato."):
            return
        if name is None or frame.f_code.co_qualname == name:
            count[0] += 1
            if count[0] == number:
                act()

    threading.setprofile(watch)
    sys.setprofile(watch)
    return count


def on_event(number: int, act: Callable[[], object], events: set[str]) -> None:
    """Act once before the given of these audited operations (PEP 578), until the process ends."""
    left = [number]

    def audit(event: str, _: object) -> None:
        if event in events:
            left[0] -= 1
            if left[0] == 0:
                act()

    sys.addaudithook(audit)


def kill() -> None:
    """End this process at once, as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def last_state(folder: Path) -> Snapshot:
    """Return the newest checkpoint of a run folder."""
    return read_checkpoint(list_checkpoints(folder / "checkpoints")[-1])


def assert_same_state(found: Path, expected: Path) -> None:
    """Assert that two run folders end in bitwise equal states and exports, and equal metrics."""
    ours, theirs = last_state(found), last_state(expected)
    assert (ours.step, ours.state) == (theirs.step, theirs.state)
    for part in ("weights", "ema", "optimizer"):
        left, right = vars(ours)[part], vars(theirs)[part]
        assert left.keys() == right.keys()
        differing = [name for name in left if not torch.equal(left[name], right[name])]
        assert differing == [], f"{part} differ"
    assert metrics(found) == metrics(expected)
    assert exported(found) == exported(expected)


def metrics(folder: Path) -> list[dict[str, float]]:
    """Return the rows of metrics.jsonl without the columns of time; every line must be whole."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def exported(folder: Path) -> dict[str, bytes]:
    """Return the files of a run's export by name."""
    files = sorted(path for path in (folder / "export").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
