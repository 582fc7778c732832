"""Training state: everything that changes during training, to and from a snapshot."""

import math
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from sfumato.config import TrainConfig
from sfumato.data.stream import Stream
from sfumato.objectives.objective import ObjectiveOf
from sfumato.training.checkpoint import CheckpointError, Snapshot
from sfumato.training.collection import Source
from sfumato.training.distribution import Distribution, local, placed, share, whole
from sfumato.training.ema import Ema, Shadow
from sfumato.training.flops import Meter
from sfumato.training.guards import Guards
from sfumato.training.module import Trainee
from sfumato.training.optimizer import (
    NUMBER,
    build_optimizer,
    numbers_of,
    set_rate,
    state_of,
    tables_of,
)
from sfumato.training.sharding import writes_shards
from sfumato.weights import Share, differences, shape_of, under

ADVICE = "restore the model's settings in config.yaml, or choose another name for a run (name=...)"


@final
class TrainState:
    """Weights, EMA, optimiser, loss scale, step, objective, guards and the position in the data."""

    def __init__(
        self,
        config: TrainConfig,
        model: Trainee,
        objective: ObjectiveOf[Any, Any],
        stream: Stream[Any],
        distribution: Distribution,
    ) -> None:
        training = config.training
        self.model, self.objective = model, objective
        self.parameters = model.trainable()
        self.ema = Ema(
            self.parameters,
            training.ema_decay,
            every=training.ema_every_steps,
            on_cpu=training.ema_on_cpu,
        )
        self.optimizer = build_optimizer(
            list(self.parameters.values()), config.optimizer, tables_of(model.trained)
        )
        self._numbers = numbers_of(self.optimizer)
        self.scaler = distribution.scaler
        self.meter = Meter(model, training, distribution)
        self.source = Source(config, objective, stream, distribution)
        self.old = Shadow(self.parameters) if objective.needs_old else None
        objective.old = self.old
        self.guards = Guards(config, say=distribution.is_main)
        self.step = 0
        self.best_step: int | None = None
        self.best_loss = math.inf
        self._training = training
        self._is_sharded = distribution.is_sharded
        self._keeps = distribution.is_main
        # The counted step runs uncompiled, so a resumed run must not count again.
        # Neither must one that resumes between collections, which it would count without them.
        self._keeps_flops = training.compile != "none" or objective.collecting is not None

    def move(self, rate: float) -> bool:
        """Take one optimiser step at this learning rate, and update the EMA.

        Returns:
            False if a gradient overflowed under fp16: then only the loss scale changes.
        """
        set_rate(self.optimizer, rate)
        self.ema.before_change()
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        moved = self.scaler.get_scale() >= scale
        if moved:
            self.ema.update()
        self.step += 1
        return moved

    def improves(self, loss: float) -> bool:
        """Say whether a validation's loss is the lowest so far, and remember this step if it is."""
        if not loss < self.best_loss:  # NaN included
            return False
        self.best_step, self.best_loss = self.step, loss
        return True

    def snapshot(self) -> Snapshot:
        """Return whole tensors of the state, copies on the CPU of the main process.

        All processes must call it; the other processes get empty tensors. If the checkpoint is to
        be sharded, each process gets its shares.
        """
        kept = self._keeps
        moments = state_of(self.optimizer, self.parameters)
        state: dict[str, Any] = {
            "ema_updates": self.ema.updates,
            "data": self.source.stream.state(),
            "scaler": self.scaler.state_dict(),
            "best": [self.best_step, self.best_loss] if self.best_step else None,
        }
        if learned := self.objective.state():
            state["objective"] = learned
        numbers = zip(numbers_of(self.optimizer), self._numbers, strict=True)
        changed = [dict(sorted(now.items() - before.items())) for now, before in numbers]
        if any(changed):
            state["optimizer"] = changed
        if guarded := self.guards.state():
            state["guards"] = guarded
        rows, collected = self.source.snapshot(self.step)
        if collected:
            state["collection"] = collected
        if self._keeps_flops:
            state["flops"] = self.meter.flops
        if self._is_sharded and writes_shards(self._training, self._nbytes(moments)):
            return Snapshot(self.step, {}, {}, {}, state, shares=self._shares(moments, rows))
        old = {} if self.old is None else self.old.snapshot(kept=kept)
        kinds = {"collection": rows, "old": old}
        return Snapshot(
            step=self.step,
            weights={name: whole(p, kept=kept) for name, p in self.parameters.items()},
            ema=self.ema.snapshot(kept=kept),
            optimizer={name: whole(moment, kept=kept) for name, moment in moments.items()},
            state=state,
            objective={
                f"{kind}/{name}": each for kind in kinds for name, each in kinds[kind].items()
            },
        )

    def _nbytes(self, moments: Mapping[str, Tensor]) -> int:
        """Return the bytes of all tensors of the state but collected rows, over all processes."""
        copies = 1 + bool(self.ema.shadow) + (self.old is not None)
        weights = sum(each.nbytes for each in self.parameters.values())
        return copies * weights + sum(each.nbytes for each in moments.values())

    def _shares(
        self, moments: Mapping[str, Tensor], rows: Mapping[str, Tensor]
    ) -> dict[str, Share]:
        """Return this process's shares of all tensors of the state, copies on the CPU."""
        kinds = {
            "weights": {name: share(local(p), p) for name, p in self.parameters.items()},
            "ema": self.ema.shares(),
            "optimizer": {name: share(local(each), each) for name, each in moments.items()},
            "objective/old": {} if self.old is None else self.old.shares(),
            "objective/collection": {name: share(each, each) for name, each in rows.items()},
        }
        return {f"{kind}/{name}": each for kind in kinds for name, each in kinds[kind].items()}

    def restore(self, snapshot: Snapshot) -> None:
        """Put a snapshot back.

        Raises:
            CheckpointError: if names or shapes of the trainable parameters differ.
        """
        for weights in [snapshot.weights, *([snapshot.ema] if self.ema.shadow else [])]:
            source = f"the checkpoint at step {snapshot.step}"
            differences(weights, self.parameters, {}).refuse(source, ADVICE, CheckpointError)
        self.step = snapshot.step
        if snapshot.state["best"]:
            self.best_step, self.best_loss = snapshot.state["best"]
        self.ema.restore(snapshot.ema, snapshot.state["ema_updates"])
        for name, parameter in self.parameters.items():
            parameter.data.copy_(placed(snapshot.weights, name, parameter))
        for key in snapshot.optimizer:
            kind, _, name = key.partition("/")
            parameter, number = self.parameters[name], kind.removeprefix(NUMBER)
            if number != kind:
                moment = snapshot.optimizer[key].item()
            elif shape_of(snapshot.optimizer, key) == parameter.shape:
                moment = placed(snapshot.optimizer, key, parameter)
            else:  # of a factor or a block
                moment = snapshot.optimizer[key].to(parameter.device)
            self.optimizer.state[parameter][number] = moment
        for group, numbers in zip(
            self.optimizer.param_groups, snapshot.state.get("optimizer", []), strict=False
        ):
            group.update(numbers)
        self.source.stream.restore(snapshot.state["data"])
        self.scaler.load_state_dict(snapshot.state["scaler"])
        self.objective.restore(snapshot.state.get("objective", {}))
        self.guards.restore(snapshot.state.get("guards", {}))
        rows, old = (under(snapshot.objective, kind) for kind in ("collection/", "old/"))
        collected = snapshot.state.get("collection", {})
        self.source.restore(self.model, self.step, dict(rows), collected)
        if self.old is not None:
            differences(old, self.parameters, {}).refuse("the old policy", ADVICE, CheckpointError)
            self.old.put_back(old)
        if self._keeps_flops:
            self.meter.flops = snapshot.state.get("flops")


@torch.no_grad()
def load_weights(
    model: Trainee, weights: Mapping[str, Tensor], source: str = "the weights"
) -> None:
    """Put whole weights, from `source`, into the trainable parameters of a model on one process.

    Raises:
        CheckpointError: if names or shapes differ.
    """
    parameters = model.trainable()
    differences(weights, parameters, {}).refuse(source, ADVICE, CheckpointError)
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
