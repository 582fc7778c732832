"""Rows of a training step: those of the data, or those that the objective made of the data.

Row r of batch b of a collection stays in its process and in its place of a batch: for each place,
an inner epoch deals the rows of that place anew to the batches. So no row travels, and any number
of processes trains on the same batches.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from sfumato.config import TrainConfig
from sfumato.data.stream import Stream
from sfumato.diffusion.randomness import Rng, derive
from sfumato.objectives.objective import Collecting, ObjectiveOf, Rollout
from sfumato.records import Count, convert
from sfumato.training.checkpoint import CheckpointError
from sfumato.training.distribution import Distribution
from sfumato.training.flops import Meter
from sfumato.training.module import Trainee

T = TypeVar("T")


@dataclass(frozen=True)
class _Saved:
    began: Count
    metrics: dict[str, float]
    prompts: list[str]


@final
@dataclass(frozen=True)
class Places:
    """Which rows of a collection this process has: the same places of each batch.

    Attributes:
        size: of a global batch.
        start: first place of this process; it has as many as all others.
    """

    batches: int
    size: int
    start: int
    share: int
    distribution: Distribution

    def numbers(self) -> list[int]:
        """Return the numbers of this process's rows in the collection."""
        return [
            batch * self.size + self.start + i
            for batch in range(self.batches)
            for i in range(self.share)
        ]

    def own(self, values: Sequence[T]) -> list[T]:
        return [values[number] for number in self.numbers()]

    def all(self, values: Sequence[T], *, main_only: bool = False) -> list[T]:
        gathered = self.distribution.gather(values, main_only=main_only)
        if main_only and not self.distribution.is_main:
            return []
        held = self.batches * self.share  # by one process
        order = [
            rank * held + batch * self.share + i
            for batch in range(self.batches)
            for rank in range(self.distribution.world)
            for i in range(self.share)
        ]
        return [gathered[index] for index in order]


@final
class Source:
    """Giver of this process's rows of each training step.

    Attributes:
        stream: gives the rows of the data.
        metrics: of the collection that the current step trains on.
        waited: seconds that the current step waited for data.
        saved: seconds of collecting that the current step is not charged with; other steps are.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: ObjectiveOf[Any, Any],
        stream: Stream[Any],
        distribution: Distribution,
    ) -> None:
        self.stream = stream
        self.metrics: dict[str, float] = {}
        self.waited = self.saved = 0.0
        self._objective = objective
        self._seed = config.training.seed
        plan = objective.collecting or Collecting()
        size = config.training.global_batch_size
        share = size // distribution.world
        self._places = Places(plan.batches, size, distribution.rank * share, share, distribution)
        self._plan = plan
        self._began = 0  # the step before which the rows were collected
        self._rows: list[Rollout] = []
        self._seconds = 0.0  # of the collection, for each step that trains on it

    def collects(self, step: int) -> bool:
        """Say whether rows are collected before the step that follows `step`."""
        return self._objective.collecting is not None and not self._left(step)

    def _left(self, step: int) -> int:
        """Return how many steps, from the one after `step` on, train on the rows that are held."""
        return self._began + self._plan.batches * self._plan.epochs - step if self._rows else 0

    def next(self, model: Trainee, step: int, meter: Meter) -> Sequence[Any]:
        """Return the rows of the step that follows `step`."""
        self.waited = self.saved = 0.0
        if self._objective.collecting is None:
            return self._read()
        if self.collects(step):
            started = time.monotonic()
            self._collect(model, step, meter)
            seconds = time.monotonic() - started - self.waited
            self._seconds = seconds / (self._plan.batches * self._plan.epochs)
            self.saved = seconds
        self.saved -= self._seconds
        epoch, batch = divmod(step - self._began, self._plan.batches)
        return self._dealt(epoch, batch)

    def _read(self) -> list[Any]:
        """Read this process's rows of a global batch; those of a group have the same item."""
        group, start = self._plan.group, self._places.start
        stop = start + self._places.share
        started = time.monotonic()
        first, last = start // group, -(-stop // group)
        items = self.stream.next(self._places.size // group, first, last)
        self.waited += time.monotonic() - started
        return [items[place // group - first] for place in range(start, stop)]

    @torch.no_grad()
    def _collect(self, model: Trainee, step: int, meter: Meter) -> None:
        places, distribution = self._places, self._places.distribution
        items = [item for _ in range(places.batches) for item in self._read()]
        numbers, seed = places.numbers(), derive(self._seed, "collection")
        rng = Rng.of_step(seed, step, numbers)
        groups = [number // self._plan.group for number in numbers]
        rng.groups = Rng.of_step(derive(seed, "groups"), step, groups)
        with meter.counting_beside(len(items) * self._plan.epochs), distribution.autocast():
            found = self._objective.collect(model, items, rng, places)
        self._began, self._rows = step, list(found.rows)
        self.metrics = dict(found.metrics)

    def _dealt(self, epoch: int, batch: int) -> list[Rollout]:
        """Return the rows of a batch of an inner epoch."""
        share, start = self._places.share, self._places.start
        seed = derive(self._seed, self._began, epoch, "deal")
        return [
            self._rows[_order(self._places.batches, seed, start + i)[batch] * share + i]
            for i in range(share)
        ]

    def snapshot(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the rows that steps after `step` need: tensors by name, and the rest for JSON.

        All processes must call it; the main process alone gets the rows.
        """
        if self._left(step) <= 0:
            return {}, {}
        rows = self._places.all(self._rows, main_only=True)
        state = {"began": self._began, "metrics": self.metrics, "prompts": [r.prompt for r in rows]}
        names = rows[0].tensors if rows else ()
        return {name: torch.stack([row.tensors[name] for row in rows]) for name in names}, state

    def restore(self, model: Trainee, step: int, tensors: Mapping[str, Tensor], state: Any) -> None:
        """Put back what `snapshot` returned at a step, or raise a CheckpointError."""
        self._rows = []
        if not state:
            return
        saved = convert(state, _Saved, "the collection", "remove the checkpoint", CheckpointError)
        count, steps = (self._plan.batches * n for n in (self._places.size, self._plan.epochs))
        shapes = self._objective.row_shapes(model) or {n: t.shape[1:] for n, t in tensors.items()}
        expected = {name: (count, *shape) for name, shape in shapes.items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if (len(saved.prompts), found) != (count, expected) or not 0 <= step - saved.began < steps:
            raise CheckpointError(
                f"the collection of the checkpoint has {len(saved.prompts)} prompts from step "
                f"{saved.began} on and rows of {found}; step {step} of this run needs {count} for "
                f"{steps} steps and rows of {expected}; remove the checkpoint"
            )
        self._began, self.metrics = saved.began, saved.metrics
        whole = [
            Rollout(prompt, {name: tensor[i].clone() for name, tensor in tensors.items()})
            for i, prompt in enumerate(saved.prompts)
        ]
        self._rows = self._places.own(whole)


def _order(count: int, seed: int, place: int) -> list[int]:
    """Return the order in which the rows of a place come to the batches."""
    generator = torch.Generator().manual_seed(derive(seed, place))
    return torch.randperm(count, generator=generator).tolist()
