"""Contract of an objective: a loss of a model, a batch and randomness, whole or in pieces.

An objective may also collect: make rows of its own, such as rollouts, of several global batches.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, cast, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from sfumato.diffusion.randomness import Rng
from sfumato.models.model import TextToImageModel

Model = TypeVar("Model")
Batch = TypeVar("Batch")
T = TypeVar("T")


@dataclass(frozen=True)
class Loss:
    """The scalar to minimise, and detached numbers to report.

    Attributes:
        metrics: means over the batch.
        partial: sum and count over some of the rows, for means that batches do not share evenly.
        rows: numbers of each row, which `observe` gets of the whole global batch.
    """

    value: Float[Tensor, ""]
    metrics: Mapping[str, Float[Tensor, ""]]
    partial: Mapping[str, Float[Tensor, "2"]] = field(default_factory=dict)
    rows: Mapping[str, Float[Tensor, " b"]] = field(default_factory=dict)

    def __add__(self, other: "Loss") -> "Loss":
        """Return the sum, name by name."""
        return Loss(
            self.value + other.value,
            _added(self.metrics, other.metrics),
            _added(self.partial, other.partial),
            _added(self.rows, other.rows),
        )


def _added(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    both = {name: one[name] + other[name] for name in one if name in other}
    return {**one, **other, **both}


Piece: TypeAlias = Callable[[], Loss]


@dataclass(frozen=True)
class Rollout:
    """A row that an objective made: its prompt, and tensors of one row without a graph, on the CPU.

    All rows of a collection have tensors of the same names, shapes and types.
    """

    prompt: str
    tensors: Mapping[str, Tensor]

    def __str__(self) -> str:
        return self.prompt


@dataclass(frozen=True)
class Collected:
    """What an objective made of global batches: a row for each row, and numbers to report."""

    rows: Sequence[Rollout]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Collecting:
    """How rows are collected.

    Attributes:
        batches: global batches that are collected at once.
        epochs: times that each of them is trained on.
        group: rows of a batch, next to each other, that have the same item.
    """

    batches: int = 1
    epochs: int = 1
    group: int = 1


@runtime_checkable
class Peers(Protocol):
    """The other processes, while all of them collect."""

    def all(self, values: Sequence[T]) -> list[T]:
        """Return the values of the rows of all processes, in the order of the collection."""
        ...

    def own(self, values: Sequence[T]) -> list[T]:
        """Return, of values of all rows, those of this process's rows."""
        ...


@runtime_checkable
class Slot(Protocol):
    """Other values of the trained weights, kept beside them: the role of an old policy."""

    def shown(self) -> AbstractContextManager[None]:
        """Put the values in place of the weights, and the weights back at the end."""
        ...

    def follow(self, decay: float) -> None:
        """Move the values: decay x value + (1 - decay) x weight."""
        ...


@runtime_checkable
class StableLoss(Protocol):
    """An objective whose loss of a row can be measured at a noise and a time always the same."""

    def stable_metrics(
        self, model: Any, batch: Any, positions: Sequence[int], seed: int
    ) -> Mapping[str, Float[Tensor, " b"]]:
        """Return numbers of each row by name; row i depends on `seed` and its position alone.

        NaN, of all but the loss, is a row without such a number: means leave it out.
        """
        ...


class ObjectiveOf(abc.ABC, Generic[Model, Batch]):
    """Something to minimise of a model, made of settings and frozen networks.

    Only `observe` and `collect` change it. An objective overrides `loss`, or `pieces`.

    Attributes:
        needs_reference: whether the loss asks for the frozen self of what is trained.
        needs_old: whether it asks for an old policy.
        old: the old policy, if it needs one; the training state brings it.
        collecting: None trains on the rows of the data as they are.
        why_idle: what to look at when the first step has no gradient.
    """

    needs_reference: bool = True
    needs_old: bool = False
    old: Slot | None = None
    collecting: Collecting | None = None
    why_idle: str = "the loss does not depend on what is trained"

    def check(self, model: Model) -> None:
        """Refuse settings that do not fit a model.

        Raises:
            ValueError: naming the setting.
        """

    def loss(self, model: Model, batch: Batch, rng: Rng) -> Loss:
        """Return the loss of a micro-batch; `rng` has one stream per row."""
        raise NotImplementedError(f"{type(self).__name__} has no loss in one piece: use `pieces`")

    def pieces(self, model: Model, batch: Batch, rng: Rng) -> Sequence[Piece]:
        """Return calls whose losses add up to that of a micro-batch; one call by default.

        Each is called once, in order, and differentiated before the next one is called. So only
        the graph of one piece is in memory, and a piece may use the gradient of the one before.
        What this method itself computes takes no gradient of the weights.
        """
        return [partial(self.loss, model, batch, rng)]

    def collect(self, model: Model, items: Sequence[Any], rng: Rng, peers: Peers) -> Collected:
        """Make rows of training: one of each of this process's items, in their order.

        Called without a gradient, before the first of the steps that train on the rows.

        Args:
            items: batch after batch; `rng` has a stream for each.
        """
        raise NotImplementedError(f"{type(self).__name__} trains on the rows of the data")

    def blank(self, model: Model, items: Sequence[Any], rng: Rng) -> Batch:
        """Return a batch of the shapes that training has, for a plan; by default the items."""
        return cast(Batch, items)

    def row_shapes(self, model: Model) -> Mapping[str, Sequence[int]]:
        """Return the shape of each tensor of a collected row, to check saved ones; {} is any."""
        return {}

    def observe(self, rows: Mapping[str, Sequence[float]]) -> None:
        """Learn from the `rows` of a step's global batch, which are the same on all processes."""

    def state(self) -> dict[str, Any]:
        """Return what `observe` and `collect` have learned, fit for JSON."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; empty for a run that saved none."""


class Objective(ObjectiveOf[TextToImageModel, Batch]):
    """Something to minimise of a text-to-image model."""
