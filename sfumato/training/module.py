"""One forward around the whole objective, so that DDP and FSDP see one forward and one backward."""

from typing import Any, final

from torch import nn

from sfumato.diffusion.randomness import Rng
from sfumato.models.model import TextToImageModel
from sfumato.objectives.objective import Loss, Objective


@final
class TrainingModule(nn.Module):
    """Registers what is trained, and runs the objective, however often that calls the network."""

    def __init__(self, model: TextToImageModel, objective: Objective[Any]) -> None:
        super().__init__()
        self.trained = model.trained
        self.model = model
        self.objective = objective

    def forward(self, batch: Any, rng: Rng) -> Loss:
        return self.objective.loss(self.model, batch, rng)
