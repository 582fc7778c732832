"""Measure memory and time of the processes that save and take up a checkpoint under FSDP2.

A stack of linear layers has weights, an average and AdamW's two moments. Each process saves
them in both layouts, with the writer of training, and takes them up again, also on another
number of processes. Printed is by how much the memory of each process grows at most, beside the
share that it holds of the state.

    python benchmarks/sharded_checkpoints.py --megabytes 200 --processes 2 4
"""

import argparse
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measure import machine
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # processes that see each other

import runs
from runs import in_processes

from sfumato.config import NoRewardConfig, SupervisedConfig, TrainConfig
from sfumato.training.checkpoint import CheckpointWriter, Snapshot, read_checkpoint
from sfumato.training.distribution import Distribution, share
from sfumato.training.folder import step_name
from sfumato.training.state import TrainState

WIDTH = 1024


def main() -> None:
    options = parse()
    runs.CHILD_SECONDS = 3600
    layers = max(1, options.megabytes * 2**20 // (4 * WIDTH**2))
    print(f"{machine('cpu')}; weights of {layers * 4 * WIDTH**2 / 2**20:.0f} MiB")
    with tempfile.TemporaryDirectory() as name:
        for world in options.processes:
            for sharded in (False, True):
                root = Path(name) / f"{world}-{sharded}"
                act = saving(layers, root, sharded=sharded)
                in_processes(world, act)
                for after in options.processes:
                    in_processes(after, resuming(layers, root, before=world))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=200, help="of weights")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    return parser.parse_args()


def state_of(layers: int, distribution: Distribution, config: TrainConfig) -> TrainState:
    """Return a state whose optimiser has taken a step."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    for part in (*network, network):
        fully_shard(part, mesh=distribution._mesh())
    model: Any = SimpleNamespace(
        trained=network, trainable=lambda: dict(network.named_parameters()), shards=lambda: []
    )
    objective: Any = SimpleNamespace(
        needs_old=False, collecting=None, state=dict, restore=lambda state: None
    )
    stream: Any = SimpleNamespace(state=dict, restore=lambda state: None)
    return TrainState(config, model, objective, stream, distribution)


def settings(*, sharded: bool) -> TrainConfig:
    config = TrainConfig(objective=SupervisedConfig(), reward=NoRewardConfig())
    config.training.strategy = "fsdp"
    config.training.sharded_checkpoints = sharded
    return config


def saving(layers: int, root: Path, *, sharded: bool) -> Callable[[int], None]:
    def act(rank: int) -> None:
        config = settings(sharded=sharded)
        distribution = Distribution(config.training)
        state = state_of(layers, distribution, config)
        for parameter in state.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        state.move(1e-4)
        writer = CheckpointWriter(
            root, config.training, active=distribution.is_main, group=distribution.beside
        )

        def save() -> None:
            writer.write(state.snapshot(), spare=None)
            writer.wait()

        with writer.closing():
            writer.write(small(sharded=sharded), spare=None)  # whose code is loaded but once
            writer.wait()
            state.step = 1
            report(f"saved, sharded={sharded}", layers, distribution, save)

    return act


def small(*, sharded: bool) -> Snapshot:
    tensor = torch.zeros(1)
    if sharded:
        return Snapshot(0, {}, {}, {}, {}, shares={"weights/0": share(tensor, tensor)})
    return Snapshot(0, {"0": tensor}, {}, {}, {})


def resuming(layers: int, root: Path, *, before: int) -> Callable[[int], None]:
    def act(rank: int) -> None:
        config = settings(sharded=True)
        distribution = Distribution(config.training)
        state = state_of(layers, distribution, config)
        part = slice(rank, None, distribution.world)
        path = root / step_name(1)
        report(
            f"taken up from {before}, {root.name.partition('-')[2]}",
            layers,
            distribution,
            lambda: state.restore(read_checkpoint(path, part)),
        )

    return act


def report(name: str, layers: int, distribution: Distribution, act: Callable[[], object]) -> None:
    """Print how far the memory of each process rises while it acts, and for how long it does."""
    peak, done = [held()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], held())

    before, started, watcher = held(), time.monotonic(), threading.Thread(target=watch)
    watcher.start()
    act()
    seconds = time.monotonic() - started
    done.set()
    watcher.join()
    grown: Sequence[int] = distribution.gather([peak[0] - before])
    part = 4 * 4 * layers * WIDTH**2 / distribution.world
    if distribution.is_main:
        shown = " ".join(f"{each / 2**20:.0f}" for each in grown)
        print(
            f"{name}, {distribution.world} processes: share {part / 2**20:.0f} MiB, grew by "
            f"{shown} MiB ({max(grown) / part:.3f} shares), {seconds:.1f} s",
            flush=True,
        )
    distribution.any(False)


def held() -> int:
    """Return the bytes of memory that this process has now, without pages of files."""
    (kilobytes,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


if __name__ == "__main__":
    main()
