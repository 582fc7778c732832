"""What lies in one GPU's memory during a step, and how many rows fit."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from sfumato.config import TrainingConfig
from sfumato.models.model import DTYPES
from sfumato.planning.blueprint import Blueprint
from sfumato.planning.step import StepCost
from sfumato.training.sharding import copy_size

USABLE = 0.92  # of the memory: the rest is CUDA's, NCCL's, workspaces and the allocator's gaps
GPUS_OF_A_MACHINE = 8  # that share one copy under hsdp, where shard_size is not stated
MOMENTS = 2  # of AdamW
LARGEST = 4096  # rows that are looked for


@dataclass(frozen=True)
class Held:
    """Bytes in one GPU's memory between steps, and during the backward.

    Attributes:
        weights: of the network, its share under fsdp and hsdp; `frozen` are the encoders'.
        gathered: under fsdp and hsdp, the blocks that are whole while they run.
        gradients: None where they come into being as activations go.
    """

    weights: int
    frozen: int
    gathered: int
    gradients: int | None
    optimizer: int
    ema: int

    @property
    def total(self) -> int:
        parts = (self.weights, self.frozen, self.gathered, self.optimizer, self.ema)
        return sum(parts) + (self.gradients or 0)

    def peak(self, cost: StepCost) -> int:
        """Return the bytes at the peak of a step."""
        return self.total + self.activations(cost)

    def activations(self, cost: StepCost) -> int:
        """Return the bytes of activations, with the gradients where these have no row."""
        return cost.activations if self.gradients is not None else cost.with_gradients


def held(
    blueprint: Blueprint, training: TrainingConfig, gpus: int, accumulation: int, dtype: str
) -> Held:
    """Return what one of several GPUs holds.

    Args:
        accumulation: micro-batches per step on a GPU.
        dtype: of frozen encoders.
    """
    network = blueprint.network
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    copies = shards(training, gpus)
    return Held(
        weights=_share(bytes_of(network), copies),
        frozen=DTYPES[dtype].itemsize * parameters_of_encoders(blueprint),
        gathered=_gathered(blueprint) if copies > 1 else 0,
        gradients=_gradients(4 * trained, gpus, copies, accumulation),
        optimizer=_share(4 * MOMENTS * trained, copies),
        ema=_ema(4 * trained, training, copies),
    )


def shards(training: TrainingConfig, gpus: int) -> int:
    """Return how many GPUs share one copy of the trained weights."""
    return copy_size(training, gpus, per_machine=min(GPUS_OF_A_MACHINE, gpus))


def bytes_of(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def parameters_of_encoders(blueprint: Blueprint) -> int:
    """Return how many parameters the autoencoder and the text encoders have."""
    encoders = blueprint.encoders
    modules = [encoders.autoencoder, *encoders.texts.values()]
    return sum(p.numel() for module in modules for p in module.parameters())


def _share(size: int, copies: int) -> int:
    return -(-size // copies)


def _gathered(blueprint: Blueprint) -> int:
    """Return the bytes of the two largest blocks, the one that runs and the one fetched ahead.

    What lies outside of all blocks is gathered as one more.
    """
    sizes = [bytes_of(block) for block in blueprint.blocks]
    sizes.append(bytes_of(blueprint.network) - sum(sizes))
    return sum(sorted(sizes)[-2:])


def _gradients(size: int, gpus: int, copies: int, accumulation: int) -> int | None:
    if gpus == 1 and accumulation == 1:
        return None
    # Sharded gradients are exchanged with the last micro-batch; until then they are whole.
    return _share(size, copies) if accumulation == 1 else size


def _ema(size: int, training: TrainingConfig, copies: int) -> int:
    if training.ema_decay is None or training.ema_on_cpu:
        return 0
    return _share(size, copies)


def largest_rows(cost: Callable[[int], int], room: int, rows: int) -> int:
    """Return the largest number of rows whose bytes are within `room`; 0 where one is too many.

    Args:
        cost: bytes of a number of rows; convex, and soon a line, so that extending the line gives
            too many rows rather than too few.
        rows: whose cost is asked for anyway.
    """
    near = max(rows, 8)
    slope = (cost(2 * near) - cost(near)) / near
    guess = min(LARGEST, max(1, int(near + (room - cost(near)) / slope)))
    if cost(guess) <= room:
        return guess
    return bisect_right(range(1, guess), room, key=cost)
