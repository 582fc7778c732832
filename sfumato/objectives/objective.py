"""What an objective is: a loss of a model, a batch and randomness, and nothing else."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from jaxtyping import Float
from torch import Tensor

from sfumato.diffusion.randomness import Rng
from sfumato.models.model import TextToImageModel

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Loss:
    """The scalar to minimise, and detached scalars to report, each a mean over the batch."""

    value: Float[Tensor, ""]
    metrics: Mapping[str, Float[Tensor, ""]]


class Objective(abc.ABC, Generic[Batch]):
    """Something to minimise. Pure: it holds settings and frozen networks, and no state."""

    @abc.abstractmethod
    def loss(self, model: TextToImageModel, batch: Batch, rng: Rng) -> Loss:
        """Return the loss of a micro-batch; `rng` has one stream per row."""
