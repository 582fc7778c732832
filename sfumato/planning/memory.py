"""Memory of one GPU during a step, and the largest micro-batch that fits."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from sfumato.config import OptimizerConfig, TrainingConfig
from sfumato.planning.blueprint import Blueprint
from sfumato.planning.step import StepCost
from sfumato.training.optimizer import state_bytes, tables_of
from sfumato.training.sharding import copy_size

USABLE = 0.92  # of the memory; CUDA, NCCL, workspaces and the allocator's gaps take the rest
GPUS_OF_A_MACHINE = 8  # share one copy under hsdp, if shard_size is not set
LARGEST = 4096  # rows that are tried


@dataclass(frozen=True)
class Held:
    """Bytes in one GPU's memory between steps, and during the backward.

    Attributes:
        weights: of the trained networks; under fsdp and hsdp this GPU's share.
        reference: weights of the frozen copy, if the loss needs one; shared as well.
        frozen: weights of the autoencoder and the text encoders, as far as they are not trained.
        reward: weights of the reward, and of the held-out ones.
        gathered: under fsdp and hsdp, blocks that are whole while they run.
        gradients: None if they are allocated while activations are freed (no accumulation).
        old: values of an old policy, if the loss needs one; shared as well.
    """

    weights: int
    reference: int
    frozen: int
    reward: int
    gathered: int
    gradients: int | None
    optimizer: int
    ema: int
    old: int

    @property
    def total(self) -> int:
        shared = self.weights + self.reference + self.gathered + self.optimizer
        return shared + self.ema + self.old + self.frozen + self.reward + (self.gradients or 0)

    def peak(self, cost: StepCost) -> int:
        """Return the bytes at the peak of a step."""
        return self.total + self.activations(cost)

    def activations(self, cost: StepCost) -> int:
        """Return the bytes of activations, including gradients if these have no row."""
        return cost.activations if self.gradients is not None else cost.with_gradients


def held(
    blueprint: Blueprint,
    training: TrainingConfig,
    gpus: int,
    accumulation: int,
    optimizer: OptimizerConfig,
) -> Held:
    """Return the bytes that one of several GPUs holds.

    Args:
        accumulation: micro-batches per step on a GPU.
    """
    model = blueprint.model
    trained, weights = count_parameters(model.trained, trained=True), bytes_of(model.trained)
    sharded = bytes_of(nn.ModuleList(model.shards()))
    reward = sum(map(bytes_of, blueprint.rewards))
    copies = shards(training, gpus)
    moved = [each for each in model.trained.parameters() if each.requires_grad]
    moments = state_bytes(moved, optimizer, tables_of(model.trained))
    off_device = training.ema_decay is None or training.ema_on_cpu
    return Held(
        weights=_share(weights, copies),
        reference=_share(sharded - weights, copies),
        frozen=sum(map(bytes_of, blueprint.frozen.values())) - reward,
        reward=reward,
        gathered=_gathered(blueprint) if copies > 1 else 0,
        gradients=_gradients(4 * trained, gpus, copies, accumulation),
        optimizer=_share(moments, copies),
        ema=0 if off_device else _share(4 * trained, copies),
        old=_share(4 * trained, copies) if blueprint.objective.needs_old else 0,
    )


def shards(training: TrainingConfig, gpus: int) -> int:
    """Return how many GPUs share one copy of the trained weights."""
    return copy_size(training, gpus, per_machine=min(GPUS_OF_A_MACHINE, gpus))


def bytes_of(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def count_parameters(module: nn.Module, *, trained: bool | None = None) -> int:
    """Return how many parameters a module has: all, or only trained or frozen ones."""
    return sum(p.numel() for p in module.parameters() if trained in (None, p.requires_grad))


def _share(size: int, copies: int) -> int:
    return -(-size // copies)


def _gathered(blueprint: Blueprint) -> int:
    """Return the bytes of the two largest blocks, the one that runs and the one fetched ahead.

    The layers of a network outside of all blocks count as one more block.
    """
    sizes: list[int] = []
    seen: set[Tensor] = set()
    for shard in blueprint.model.shards():
        own = {*shard.parameters(), *shard.buffers()} - seen
        sizes.append(sum(tensor.nbytes for tensor in own))
        seen |= own
    return sum(sorted(sizes)[-2:])


def _gradients(size: int, gpus: int, copies: int, accumulation: int) -> int | None:
    if gpus == 1 and accumulation == 1:
        return None
    # Sharded gradients are exchanged with the last micro-batch; until then they are whole.
    return _share(size, copies) if accumulation == 1 else size


def largest_rows(cost: Callable[[int], int], room: int, rows: int) -> int:
    """Return the largest number of rows whose bytes are within `room`; 0 if one row is too many.

    Args:
        cost: bytes of a number of rows; convex and soon linear, so that a linear guess gives too
            many rows rather than too few.
        rows: of the micro-batch, whose cost is computed anyway.
    """
    near = max(rows, 8)
    slope = (cost(2 * near) - cost(near)) / near
    guess = min(LARGEST, max(1, int(near + (room - cost(near)) / slope)))
    if cost(guess) <= room:
        return guess
    low = near if cost(near) <= room else 0
    if low:  # along a line, the last that fits
        low += int((guess - low) * (room - cost(low)) / (cost(guess) - cost(low)))
    if low and cost(low) <= room < cost(low + 1):
        return low
    return bisect_right(range(1, guess), room, key=cost)
