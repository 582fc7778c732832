"""Module around the whole objective: DDP and FSDP see one forward and one backward per piece."""

from typing import Any, final

from torch import nn

from sfumato.models.model import TextToImageModel
from sfumato.objectives.objective import Loss, Objective, Piece


@final
class TrainingModule(nn.Module):
    """Module of the trained weights; its forward is a piece of the objective, network calls too."""

    def __init__(self, model: TextToImageModel, objective: Objective[Any]) -> None:
        super().__init__()
        self.trained = model.trained
        self.model = model
        self.objective = objective

    def forward(self, piece: Piece) -> Loss:
        return piece()
