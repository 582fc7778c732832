"""Everything that changes during training, and its way into a snapshot and back."""

import math
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from sfumato.config import TrainConfig
from sfumato.data.stream import Stream
from sfumato.models.model import TextToImageModel
from sfumato.training.checkpoint import CheckpointError, Snapshot
from sfumato.training.distribution import Distribution, like, whole
from sfumato.training.ema import Ema
from sfumato.training.optimizer import build_optimizer


@final
class TrainState:
    """Weights, EMA, optimiser, loss scale, step, and the position in the data."""

    def __init__(
        self,
        config: TrainConfig,
        model: TextToImageModel,
        stream: Stream[Any],
        distribution: Distribution,
    ) -> None:
        self.parameters = model.trainable()
        self.ema = Ema(self.parameters, config.training.ema_decay)
        self.optimizer = build_optimizer(list(self.parameters.values()), config.optimizer)
        self.scaler = distribution.scaler
        self.stream = stream
        self.step = 0
        self.best_step: int | None = None
        self.best_loss = math.inf

    def improves(self, metrics: Mapping[str, float]) -> bool:
        """Remember this step as the best if its validation loss is the lowest so far; say so."""
        loss = metrics.get("validation/loss", math.inf)
        if not loss < self.best_loss:  # also where it is not a number
            return False
        self.best_step, self.best_loss = self.step, loss
        return True

    def snapshot(self) -> Snapshot:
        """Return whole tensors of the state; all processes must call it."""
        moments: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                moments[f"{key}/{name}"] = whole(value)
        return Snapshot(
            step=self.step,
            weights={name: whole(p) for name, p in self.parameters.items()},
            ema={name: whole(shadow) for name, shadow in self.ema.shadow.items()},
            optimizer=moments,
            state={
                "ema_updates": self.ema.updates,
                "data": self.stream.state(),
                "scaler": self.scaler.state_dict(),
                "best": [self.best_step, self.best_loss] if self.best_step else None,
            },
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Put a snapshot back.

        Raises:
            CheckpointError: if it was made with other trainable parameters.
        """
        if snapshot.weights.keys() != self.parameters.keys():
            odd = sorted(snapshot.weights.keys() ^ self.parameters.keys())
            raise CheckpointError(
                f"the checkpoint at step {snapshot.step} has other trainable parameters than this "
                f"model ({len(odd)} differ, among them {odd[0]}); choose another name for the run"
            )
        self.step = snapshot.step
        if snapshot.state["best"]:
            self.best_step, self.best_loss = snapshot.state["best"]
        self.ema.updates = snapshot.state["ema_updates"]
        for name, parameter in self.parameters.items():
            parameter.data.copy_(like(snapshot.weights[name], parameter))
            if name in self.ema.shadow:
                self.ema.shadow[name].copy_(like(snapshot.ema[name], parameter))
        for key, value in snapshot.optimizer.items():
            kind, _, name = key.partition("/")
            parameter = self.parameters[name]
            placed = value.to(parameter.device) if value.ndim == 0 else like(value, parameter)
            self.optimizer.state[parameter][kind] = placed
        self.stream.restore(snapshot.state["data"])
        self.scaler.load_state_dict(snapshot.state["scaler"])


@torch.no_grad()
def load_weights(model: TextToImageModel, weights: Mapping[str, Tensor]) -> None:
    """Put whole weights into the trainable parameters of a model on one process.

    Raises:
        CheckpointError: if names differ.
    """
    parameters = model.trainable()
    if weights.keys() != parameters.keys():
        odd = sorted(weights.keys() ^ parameters.keys())
        raise CheckpointError(
            f"these weights do not fit the model: {len(odd)} names differ, among them {odd[0]}"
        )
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
