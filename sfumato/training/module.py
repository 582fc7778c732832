"""Module around the whole objective: DDP and FSDP see one forward and one backward per piece."""

from collections.abc import Sequence
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import nn

from sfumato.objectives.objective import Loss, ObjectiveOf, Piece


@runtime_checkable
class Trainee(Protocol):
    """What the loop knows of what it trains: a text-to-image model, or a reward.

    Attributes:
        trained: holds every parameter that is trained.
    """

    trained: nn.Module

    def to(self, device: torch.device) -> None:
        """Move every network, in place."""
        ...

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by their names in `trained`."""
        ...

    def shards(self) -> Sequence[nn.Module]:
        """Return the modules that FSDP shards one by one: blocks first, then what calls them."""
        ...


@final
class TrainingModule(nn.Module):
    """Module of the trained weights; its forward is a piece of the objective, network calls too."""

    def __init__(self, model: Trainee, objective: ObjectiveOf[Any, Any]) -> None:
        super().__init__()
        self.trained = model.trained
        self.model = model
        self.objective = objective

    def forward(self, piece: Piece) -> Loss:
        return piece()
