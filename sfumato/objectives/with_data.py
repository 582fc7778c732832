"""Data as the regulariser: a reward's objective plus the supervised loss on images.

    loss = reward objective + coeff * supervised

DDRL (arXiv 2512.04332) takes images of the base model, ImageReFL (arXiv 2505.22569) real ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, final

from sfumato.data.sample import Sample
from sfumato.data.stream import Pair
from sfumato.diffusion.randomness import Rng
from sfumato.models.model import TextToImageModel
from sfumato.objectives.objective import Loss, Objective, Piece
from sfumato.objectives.supervised import Supervised


@final
class WithData(Objective[Sequence[Pair[Any, Sample]]]):
    """Two objectives on the two halves of each row.

    Args:
        coeff: weight of the supervised loss.
    """

    def __init__(self, objective: Objective[Any], supervised: Supervised, coeff: float) -> None:
        self.objective = objective
        self.supervised = supervised
        self.coeff = coeff
        self.needs_reference = objective.needs_reference
        self.why_idle = objective.why_idle

    def pieces(
        self, model: TextToImageModel, batch: Sequence[Pair[Any, Sample]], rng: Rng
    ) -> Sequence[Piece]:
        rows, samples = [pair.first for pair in batch], [pair.second for pair in batch]
        return [*self.objective.pieces(model, rows, rng), partial(self._data, model, samples, rng)]

    def _data(self, model: TextToImageModel, samples: Sequence[Sample], rng: Rng) -> Loss:
        found = self.supervised.loss(model, samples, rng)
        value = self.coeff * found.value
        metrics = {"mse": found.metrics["mse"], "loss": value.detach()}
        return replace(found, value=value, metrics=metrics)

    def observe(self, rows: Mapping[str, Sequence[float]]) -> None:
        self.objective.observe(rows)

    def state(self) -> dict[str, Any]:
        return self.objective.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.objective.restore(state)
