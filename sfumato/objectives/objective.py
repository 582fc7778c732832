"""Contract of an objective: a loss of a model, a batch and randomness, whole or in pieces."""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

from jaxtyping import Float
from torch import Tensor

from sfumato.diffusion.randomness import Rng
from sfumato.models.model import TextToImageModel

Batch = TypeVar("Batch")


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


class Objective(abc.ABC, Generic[Batch]):
    """Something to minimise. It holds settings and frozen networks; `observe` alone changes it.

    An objective overrides `loss`, or `pieces`.

    Attributes:
        needs_reference: whether the loss asks for the frozen self of what is trained.
        why_idle: what to look at when the first step has no gradient.
    """

    needs_reference: bool = True
    why_idle: str = "the loss does not depend on what is trained"

    def loss(self, model: TextToImageModel, batch: Batch, rng: Rng) -> Loss:
        """Return the loss of a micro-batch; `rng` has one stream per row."""
        raise NotImplementedError(f"{type(self).__name__} has no loss in one piece: use `pieces`")

    def pieces(self, model: TextToImageModel, batch: Batch, rng: Rng) -> Sequence[Piece]:
        """Return calls whose losses add up to that of a micro-batch; one call by default.

        Each is called once, in order, and differentiated before the next one is called. So only
        the graph of one piece is in memory, and a piece may use the gradient of the one before.
        What this method itself computes takes no gradient of the weights.
        """
        return [partial(self.loss, model, batch, rng)]

    def observe(self, rows: Mapping[str, Sequence[float]]) -> None:
        """Learn from the `rows` of a step's global batch, which are the same on all processes."""

    def state(self) -> dict[str, Any]:
        """Return what `observe` has learned, fit for JSON."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; empty for a run that saved none."""
