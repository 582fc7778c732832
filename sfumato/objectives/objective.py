"""What an objective is: a loss of a model, a batch and randomness, and nothing else."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

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
    """

    value: Float[Tensor, ""]
    metrics: Mapping[str, Float[Tensor, ""]]
    partial: Mapping[str, Float[Tensor, "2"]] = field(default_factory=dict)


class Objective(abc.ABC, Generic[Batch]):
    """Something to minimise. Pure: it holds settings and frozen networks, and no state.

    Attributes:
        needs_reference: whether the loss asks for the frozen self of what is trained.
    """

    needs_reference: bool = True

    @abc.abstractmethod
    def loss(self, model: TextToImageModel, batch: Batch, rng: Rng) -> Loss:
        """Return the loss of a micro-batch; `rng` has one stream per row."""
