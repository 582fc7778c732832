"""Module around the whole objective: DDP and FSDP see one forward and one backward per batch."""

from typing import Any, final

from torch import nn

from sfumato.diffusion.randomness import Rng
from sfumato.models.model import TextToImageModel
from sfumato.objectives.objective import Loss, Objective


@final
class TrainingModule(nn.Module):
    """Module of the trained weights; its forward is the objective, with all its network calls."""

    def __init__(self, model: TextToImageModel, objective: Objective[Any]) -> None:
        super().__init__()
        self.trained = model.trained
        self.model = model
        self.objective = objective

    def forward(self, batch: Any, rng: Rng) -> Loss:
        return self.objective.loss(self.model, batch, rng)
