"""Training loop: steps, validation and checkpoints, in the order in which they happen."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sfumato.config import TrainConfig
from sfumato.data.stream import Stream
from sfumato.diffusion.randomness import Rng, derive
from sfumato.objectives.objective import Loss, ObjectiveOf
from sfumato.training.checkpoint import CheckpointWriter, list_checkpoints, read_checkpoint
from sfumato.training.distribution import Distribution, whole
from sfumato.training.folder import RunFolder
from sfumato.training.guards import Verdict
from sfumato.training.module import Trainee, TrainingModule
from sfumato.training.optimizer import learning_rate
from sfumato.training.state import TrainState
from sfumato.training.stop import StopWatch
from sfumato.training.tracking import Trackers
from sfumato.training.validation import Validation

HEADLINE = ("reward", "kl", "mse", "accuracy")  # what the progress bar shows


class TrainingError(ValueError):
    """Training that cannot go on; the message names the step and the prompts."""


@dataclass(frozen=True)
class Job:
    """Parts of a run that training needs.

    Attributes:
        settings: `config` as plain data, for the trackers.
        stream: gives the global batches.
    """

    config: TrainConfig
    settings: Mapping[str, Any]
    model: Trainee
    objective: ObjectiveOf[Any, Any]
    stream: Stream[Any]
    validation: Validation


@dataclass(frozen=True)
class Outcome:
    """How a call of `fit` ended."""

    step: int
    stopped_by: str | None  # None: the run is complete, or has a verdict
    verdict: Verdict | None = None  # of a guard, or of a reward that was to be reached
    best: int | None = None  # the step that a guard goes back to


def fit(job: Job, folder: RunFolder, distribution: Distribution, watch: StopWatch) -> Outcome:
    """Train from the last checkpoint of the run folder, or from the start, to `max_steps`.

    Args:
        watch: says when to stop before that.

    Raises:
        CheckpointError: if a checkpoint is damaged or cannot be written.
        TrainingError: if the loss is not finite.
    """
    config, training, model = job.config, job.config.training, job.model
    module = TrainingModule(model, job.objective)
    distribution.shard(module)
    state = TrainState(config, model, job.objective, job.stream, distribution)
    resume(state, folder, distribution)
    wrapped = distribution.wrap(module).train()
    first, active = (state.step + 1 if state.step else 0), distribution.is_main
    trackers = Trackers(folder, training, job.settings, first_step=first, active=active)
    bar = tqdm(
        total=training.max_steps,
        initial=state.step,
        desc=config.name,
        unit="step",
        disable=not active,
        dynamic_ncols=True,
    )
    writer = CheckpointWriter(
        folder.checkpoints, training, active=active, group=distribution.beside
    )
    saved = state.step
    stopped_by = None
    with watch.listening(), bar, writer.closing():
        if state.step == 0:
            started = time.monotonic()
            validate(job.validation, model, state, folder, trackers, distribution, {})
            watch.took(time.monotonic() - started)
        while state.step < training.max_steps and state.guards.verdict is None:
            stopped_by = watch.reason()
            if distribution.any(stopped_by is not None):
                stopped_by = stopped_by or "another process"
                break
            started = time.monotonic()
            if state.source.collects(state.step):
                bar.set_postfix_str("sampling")
            metrics = take_step(config, wrapped, state, distribution)
            metrics |= state.meter.rates(time.monotonic() - started - state.source.saved)
            if state.step == 1 and metrics["grad_norm"] == 0 and active:
                bar.write(f"step 1 has no gradient: {job.objective.why_idle}")
            bar.set_postfix_str(headline(metrics))
            bar.update()
            best = False
            if is_due(state.step, config.validation.every_steps, training.max_steps):
                validate(job.validation, model, state, folder, trackers, distribution, metrics)
                best = state.improves(state.guards.loss)
            else:
                trackers.log(state.step, metrics)
            if best or is_due(state.step, training.checkpoint_every_steps, training.max_steps):
                save(state, writer, distribution)
                saved = state.step
            watch.took(time.monotonic() - started + writer.seconds)
        if saved != state.step:
            save(state, writer, distribution)
        with distribution.together():
            writer.wait()
    trackers.close()
    return Outcome(state.step, stopped_by, state.guards.verdict, state.best_step)


def take_step(
    config: TrainConfig, module: nn.Module, state: TrainState, distribution: Distribution
) -> dict[str, float]:
    """Take one optimiser step and return its metrics, means over the global batch."""
    training = config.training
    share = training.global_batch_size // distribution.world
    first = distribution.rank * share
    batch = state.source.next(state.model, state.step, state.meter)
    size = training.micro_batch_size
    losses: list[Loss] = []
    for start in range(0, share, size):
        rows = range(first + start, first + start + size)
        torch.manual_seed(derive(training.seed, state.step, rows.start, "dropout"))
        last = rows.stop == first + share
        with state.meter.counting():
            rng = Rng.of_step(training.seed, state.step, rows)
            micro = batch[start : start + size]
            losses.append(
                differentiate(module, micro, rng, state, distribution, size / share, last=last)
            )

    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(state.parameters.values(), config.optimizer.max_grad_norm)
    metrics = local_means([loss.metrics for loss in losses])
    metrics["grad_norm"] = whole(norm).item()
    refuse_non_finite(metrics, losses, batch, state, distribution)
    metrics["learning_rate"] = learning_rate(config.optimizer, state.step, training.max_steps)
    state.move(metrics["learning_rate"])
    if losses[0].rows:
        state.objective.observe(gathered_rows([loss.rows for loss in losses], distribution))
    metrics |= {**state.source.metrics, "data_wait": state.source.waited}
    if state.scaler.is_enabled():
        metrics["loss_scale"] = state.scaler.get_scale()
    return distribution.mean(metrics) | ratios([loss.partial for loss in losses], distribution)


def differentiate(
    module: nn.Module,
    batch: Sequence[Any],
    rng: Rng,
    state: TrainState,
    distribution: Distribution,
    share: float,
    *,
    last: bool,
) -> Loss:
    """Add the gradient of a micro-batch's loss, piece by piece, and return the loss, detached.

    Args:
        share: of the micro-batch in this process's rows.
        last: whether this is the last micro-batch of the step, whose gradients are exchanged.
    """
    with distribution.autocast():
        pieces = state.objective.pieces(state.model, batch, rng)
    total = None
    for i, piece in enumerate(pieces):
        with distribution.accumulating(module, last=last and i == len(pieces) - 1):
            with distribution.autocast():
                loss = module(piece)
            state.scaler.scale(loss.value * share).backward()
        loss = replace(loss, value=loss.value.detach())
        total = loss if total is None else total + loss
    assert total is not None, "an objective has at least one piece"
    return total


def gathered_rows(
    rows: Sequence[Mapping[str, Tensor]], distribution: Distribution
) -> dict[str, list[float]]:
    """Return the numbers of all rows of the global batch, in its order, by name."""
    return {
        name: distribution.gather(torch.cat([each[name] for each in rows]).double().tolist())
        for name in rows[0]
    }


def local_means(metrics: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Return each metric's mean over the micro-batches, fetched from the device at once."""
    names = list(metrics[0])
    values = torch.stack([torch.stack([row[n] for n in names]).float() for row in metrics])
    return dict(zip(names, values.double().mean(0).tolist(), strict=True))


def ratios(partial: Sequence[Mapping[str, Tensor]], distribution: Distribution) -> dict[str, float]:
    """Average the metrics that only some rows have (sum / count), over the global batch."""
    if not partial[0]:
        return {}
    sums = torch.stack([torch.stack(list(row.values())).double() for row in partial]).sum(0)
    totals, counts = (
        distribution.mean(dict(zip(partial[0], column, strict=True))) for column in sums.T.tolist()
    )
    return {name: totals[name] / counts[name] for name in totals if counts[name]}


def refuse_non_finite(
    metrics: dict[str, float],
    losses: Sequence[Loss],
    batch: Sequence[Any],
    state: TrainState,
    distribution: Distribution,
) -> None:
    """Stop before a loss that is not finite reaches the weights.

    Under fp16 a gradient that overflows is no error: the loss scaler skips the step and halves
    its scale, until that is below 1.
    """
    scaling = state.scaler.is_enabled() and state.scaler.get_scale() >= 1
    good_gradient = scaling or math.isfinite(metrics["grad_norm"])
    good = good_gradient and all(math.isfinite(value.value.item()) for value in losses)
    if not distribution.any(not good):
        return
    size = len(batch) // len(losses)
    bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss.value.item())]
    rows = [row for i in bad for row in batch[i * size : (i + 1) * size]]
    prompts = distribution.gather([str(row) for row in rows or ([] if good else batch)])
    shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    raise TrainingError(
        f"the loss or its gradient is not finite at step {state.step + 1} ({shown}) for the "
        f"prompts {prompts[:8]}; the weights were not touched. Lower optimizer.lr or "
        "optimizer.max_grad_norm, or use training.precision=no"
    )


def validate(
    validation: Validation,
    model: Trainee,
    state: TrainState,
    folder: RunFolder,
    trackers: Trackers,
    distribution: Distribution,
    metrics: dict[str, float],
) -> None:
    """Validate the averaged weights, without dropout; log it with the step's metrics, and judge."""
    model.trained.eval()
    with state.ema.shown():
        metrics = metrics | validation.run(model, state.step, folder, trackers)
    model.trained.train()
    (first, *_) = distribution.gather([metrics])  # all judge by what one process measured
    judged = state.guards.judge(state.step, first)
    trackers.log(state.step, metrics | judged)


def resume(state: TrainState, folder: RunFolder, distribution: Distribution) -> None:
    """Restore the newest checkpoint, if there is one.

    Raises:
        CheckpointError: if it is damaged; the last good one is named.
        ValueError: if the data changed, or differs between processes.
    """
    with distribution.together():
        if checkpoints := list_checkpoints(folder.checkpoints):
            part = slice(distribution.rank, None, distribution.world)
            state.restore(read_checkpoint(checkpoints[-1], part))
    positions = distribution.gather([state.source.stream.state()])
    if any(position != positions[0] for position in positions):
        raise ValueError(
            "the processes read different data; check that every machine sees the same files under "
            "the same paths"
        )


def save(state: TrainState, writer: CheckpointWriter, distribution: Distribution) -> None:
    """Write a checkpoint, or begin to, once the previous one is on disk.

    Raises:
        CheckpointError: if either could not be written; ValueError on the other processes.
    """
    with distribution.together():
        writer.wait()
    snapshot = state.snapshot()
    with distribution.together():
        writer.write(snapshot, spare=state.best_step)


def is_due(step: int, every: int, last: int) -> bool:
    """Say whether an action of every N steps, and of the last step, is due now."""
    return step == last or (every > 0 and step % every == 0)


def headline(metrics: dict[str, float]) -> str:
    """Return what the progress bar shows."""
    parts = [f"{name} {metrics[name]:.4g}" for name in HEADLINE if name in metrics]
    return ", ".join([*parts, f"{metrics['images_per_second']:.3g} images/s"])
