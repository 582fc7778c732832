"""A whole training run: check, load, train, export."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from sfumato.config import ModelConfig, TrainConfig
from sfumato.data.stream import Stream
from sfumato.diffusion.randomness import derive
from sfumato.files import lock
from sfumato.models.model import TextToImageModel
from sfumato.models.origins import check_start, without_start
from sfumato.models.registry import find_family, load_model
from sfumato.objectives.objective import Objective
from sfumato.objectives.supervised import Supervised
from sfumato.run.build import build_objective, build_scorer, trained_model
from sfumato.run.export import export
from sfumato.run.open_data import open_data
from sfumato.training.checkpoint import (
    best_step,
    find_fault,
    fingerprint,
    list_checkpoints,
    step_of,
)
from sfumato.training.compiling import arrange
from sfumato.training.distribution import Distribution
from sfumato.training.folder import RunFolder, differences, read_note, replace_text, step_name
from sfumato.training.loop import Outcome, fit
from sfumato.training.stop import StopWatch
from sfumato.training.tracking import check_trackers, read_metrics
from sfumato.training.validation import HeldOut, Validation


def report_skips(stream: Stream[Any], folder: RunFolder, distribution: Distribution) -> None:
    """Say and note what was left out; processes meet broken pixels in rows of their own."""
    said = distribution.gather([stream.skipped.summary() if stream.skipped.skips else ""])
    with distribution.together():
        if distribution.is_main and any(said):
            lines = list(dict.fromkeys(line for line in said if line))
            for line in lines:
                print(f"left out: {line}", flush=True)
            replace_text(folder.path / "left_out.json", json.dumps(lines, indent=2) + "\n")


@dataclass(frozen=True)
class Own:
    """What a script brings to `train`, in place of what the settings name.

    Attributes:
        load: gives the model, also for the export, of settings in full.
        objective: what is minimised.
        stream: the rows that it is given.
        prompts: what the validation images show, one image each.
    """

    load: Callable[[ModelConfig], TextToImageModel] | None = None
    objective: Objective[Any] | None = None
    stream: Stream[Any] | None = None
    prompts: Sequence[str] | None = None


def train(
    config: TrainConfig,
    settings: dict[str, Any],
    distribution: Distribution,
    own: Own | None = None,
) -> Outcome:
    """Train as configured, into runs_dir/name, going on where an earlier call stopped.

    Args:
        config: checked by `check_train`.
        settings: the same as plain data, for config.yaml and the trackers.
        own: parts that the settings do not name.

    Raises:
        ValueError: for every mistake of the user's, the cheap checks before any weight is loaded.
    """
    watch = StopWatch(config.training.max_time)
    folder = RunFolder(Path(config.runs_dir) / config.name)
    check_trackers(config.training)
    own = own or Own()
    limits = None
    if own.load is None:
        if not list_checkpoints(folder.checkpoints):
            check_start(config.model)
        family, place = find_family(config.model, config.sampler)
        limits = family.read_limits(place)
    data = open_data(config, limits, own.stream, own.prompts)
    with exclusive(folder, distribution):
        prepare_folder(folder, settings, distribution)
        reward = build_scorer(config)
        if reward is not None:
            reward = reward.to(distribution.device)
        objective = own.objective or build_objective(config, reward)
        torch.manual_seed(derive(config.training.seed, "adapter"))  # peft draws A from it
        load = own.load or load_model
        wanted = trained_model(config, objective)
        if list_checkpoints(folder.checkpoints) and not wanted.reference:
            wanted = without_start(wanted)  # the weights are in the checkpoints
        model = load(wanted)
        if isinstance(objective, Supervised):
            objective.check(model)
        model.to(distribution.device)
        arrange(model, config, distribution.world)
        trained = sum(parameter.numel() for parameter in model.trainable().values())
        if distribution.is_main:
            facts = {
                "seed": config.training.seed,
                "reward_scale": reward.scale if reward is not None else None,
                "trained_parameters": trained,
                "processes": distribution.world,
            }
            folder.describe(" ".join(sys.argv), facts)
            print(f"{folder.path}: training {trained / 1e6:.2f} M parameters", flush=True)
        held_out = None
        if isinstance(objective, Supervised) and data.held_out:
            held_out = HeldOut(objective, data.held_out)
        validation = Validation(config, data.prompts, reward, held_out, distribution)
        outcome = fit(
            config, model, objective, data.stream, validation, folder, distribution, settings, watch
        )
        report_skips(data.stream, folder, distribution)
        with distribution.together():
            if distribution.is_main:
                finish(config, folder, outcome, distribution, data.prompts[0], load)
    return outcome


def prepare_folder(folder: RunFolder, settings: dict[str, Any], distribution: Distribution) -> None:
    """Write config.yaml, or refuse to go on in a folder of other settings.

    Raises:
        ValueError: naming the settings that differ.
    """
    if folder.config.exists() and list_checkpoints(folder.checkpoints):
        saved = saved_settings(folder)
        changed = differences(saved, settings) or stretched_schedule(saved, settings)
        if changed:
            listed = "; ".join(f"{key}: {change}" for key, change in changed.items())
            raise ValueError(
                f"{folder.path} holds a run with other settings ({listed}); choose another name "
                "(name=...), or remove the folder"
            )
    distribution.barrier()
    with distribution.together():
        if distribution.is_main:
            replace_text(folder.config, yaml.safe_dump(settings, sort_keys=False))


def stretched_schedule(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Return the change of max_steps, where the learning rate falls towards it."""
    before, after = (settings["training"].get("max_steps") for settings in (old, new))
    if before == after or new["optimizer"]["schedule"] == "constant":
        return {}
    return {"training.max_steps": f"{before} -> {after}"}


def saved_settings(folder: RunFolder) -> dict[str, Any]:
    """Return the plain data of config.yaml.

    Raises:
        ValueError: if it is not what `sfumato train` wrote.
    """
    try:
        saved = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        saved = None
    if not isinstance(saved, dict):
        raise ValueError(
            f"{folder.config} is damaged, so it cannot be told whether the run may go on; write it "
            "anew, or choose another name (name=...)"
        )
    return saved


def finish(
    config: TrainConfig,
    folder: RunFolder,
    outcome: Outcome,
    distribution: Distribution,
    prompt: str,
    load: Callable[[ModelConfig], TextToImageModel],
) -> None:
    """Say how the run ended, and export it if it is complete and that is not done yet."""
    if outcome.stopped_by is not None:
        print(
            f"{folder.path}: stopped at step {outcome.step} of {config.training.max_steps} by "
            f"{outcome.stopped_by}; the same command goes on from there",
            flush=True,
        )
        return
    note = folder.path / "export.json"
    done = read_note(note) if note.exists() and folder.export.exists() else {}
    place = chosen_checkpoint(config, folder)
    made_of = {"checkpoint": fingerprint(place), "verify": config.verify}
    if any(done.get(name) != value for name, value in made_of.items()):
        lines = export(config, place, folder.export, distribution.device, prompt, load)
        done = {"step": step_of(place), **made_of, "exports": lines}
        replace_text(note, json.dumps(done, indent=2) + "\n")
    print(f"{folder.path}: complete at step {outcome.step}")
    for line in [*best_in_words(folder), f"exported is step {done['step']}"]:
        print(f"  {line}")
    for line in done["exports"]:
        print(f"  {line}")


def chosen_checkpoint(config: TrainConfig, folder: RunFolder) -> Path:
    """Return the checkpoint to export: the last, or the best where that is asked for and whole."""
    last = list_checkpoints(folder.checkpoints)[-1]
    if config.export == "last":
        return last
    best = best_step(folder.checkpoints)
    place = folder.checkpoints / step_name(best) if best is not None else None
    fault = find_fault(place) if place is not None else "it is not there any more"
    if place is None or fault:
        print(f"the best checkpoint cannot be exported ({fault}), so the last is", file=sys.stderr)
        return last
    return place


def best_in_words(folder: RunFolder) -> list[str]:
    """Return a line that compares the lowest validation loss, if any, with the base model's."""
    losses = {
        row["step"]: row["validation/loss"]
        for row in read_metrics(folder)
        if "validation/loss" in row
    }
    base = losses.pop(0, None)
    if base is None or not losses:
        return []
    best = min(losses, key=lambda step: losses[step])
    if losses[best] < base:
        return [f"validation loss {base:.4g} before, lowest at step {best}: {losses[best]:.4g}"]
    return [
        f"no step has a lower validation loss than the base model ({base:.4g}); the lowest is "
        f"{losses[best]:.4g} at step {best}"
    ]


@contextmanager
def exclusive(folder: RunFolder, distribution: Distribution) -> Iterator[None]:
    """Hold the run folder for this run alone, until it ends or is killed.

    Raises:
        ValueError: on every process, if another run holds it, or it cannot be made.
    """
    with ExitStack() as held:
        with distribution.together():
            if distribution.is_main:
                held.enter_context(hold(folder))
        yield


def hold(folder: RunFolder) -> IO[str]:
    """Make the run folder and hold it, until what is returned is closed.

    Raises:
        ValueError: if another process holds it, or it cannot be made.
    """
    busy = f"another process is training in {folder.path}; choose another name (name=...)"
    return lock(folder.path, busy=busy, unmade="set runs_dir=...")
