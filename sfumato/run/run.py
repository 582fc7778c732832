"""A whole training run: check, open the data, build, train, export."""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from sfumato.conditions import leaves_of, why_unread
from sfumato.config import TrainConfig
from sfumato.config.saved import differences, flatten, read_saved, write_saved
from sfumato.data.stream import Stream
from sfumato.files import lock, refuse_link, write_text
from sfumato.models.limits import Limits
from sfumato.models.origins import check_start
from sfumato.models.registry import find_family
from sfumato.preparation.image_cache import cache_pictures
from sfumato.run.build import Own, build_job, check_own
from sfumato.run.export import export_run
from sfumato.run.identity import (
    MEMORY,
    changed,
    contents_of,
    read_notes,
    repeated_pictures,
    trained_rewards,
    write_began,
)
from sfumato.run.open_data import Data, open_data, own_pictures, why_uncached
from sfumato.training.checkpoint import list_checkpoints, tidy
from sfumato.training.distribution import Distribution
from sfumato.training.folder import RunFolder
from sfumato.training.guards import Verdict
from sfumato.training.loop import Outcome, fit
from sfumato.training.optimizer import try_optimizer
from sfumato.training.stop import StopWatch
from sfumato.training.tracking import check_trackers, read_metrics

MODELS = ("model", "reward", "validation.rewards")  # sections of the settings


def train(
    config: TrainConfig,
    settings: dict[str, Any],
    distribution: Distribution,
    own: Own | None = None,
    typed: Collection[str] = (),
) -> Outcome:
    """Train as configured, into runs_dir/name, going on where an earlier call stopped.

    Args:
        config: checked by `check_train`.
        settings: the same as plain data, for config.yaml and the trackers.
        own: parts that the settings do not name.
        typed: keys that were typed: refused if they have no effect on the model. Others are said.

    Raises:
        ValueError: for every mistake of the user's, the cheap checks before any weight is loaded.
    """
    watch, own = StopWatch(config.training.max_time), own or Own()
    folder = RunFolder.of(config)
    with distribution.together():
        check_trackers(config.training)
        check_own(config, own)
        try_optimizer(config.optimizer, distribution.device)
        say = distribution.is_main
        own_model = own.load is not None or config.objective.trains != "model"
        limits = None if own_model else check_model(config, folder, typed, say=say)
        data = open_data(config, limits, own.stream, own.prompts)
    with exclusive(folder, distribution):
        with distribution.together():
            if distribution.is_main:
                prepare_folder(folder, config, settings)
        cache_images(config, own, data, folder, distribution)
        with distribution.together():
            job = build_job(config, settings, own, data, distribution)
            if distribution.is_main:  # once more, as a hub's models may be here only now
                note_models(config, folder)
        outcome = fit(job, folder, distribution, watch)
        report_left_out(data.stream, folder, distribution)
        with distribution.together():
            if distribution.is_main and is_complete(outcome, config, folder):
                back = outcome.verdict is not None and outcome.verdict.action == "rollback"
                chosen = replace(config, export="best") if back else config
                export_run(chosen, own.load, data.prompts, distribution.device)
    return outcome


def check_model(
    config: TrainConfig, folder: RunFolder, typed: Collection[str] = (), *, say: bool = False
) -> Limits:
    """Return the limits of the model's family, read from JSON files; say what is set in vain.

    Raises:
        ValueError: if the model, the weights to start from, or a typed setting cannot be used.
    """
    begins, key = not list_checkpoints(folder.checkpoints), "objective.cfg_gradient"
    if begins:
        check_start(config.model)
    family, path = find_family(config.model, config.sampler)
    limits = family.read_limits(path)
    mode = vars(config.objective).get("cfg_gradient", "full")
    if begins and mode != "full" and not limits.has_cfg:
        vain = f"{key}={mode} has no effect on this model, whose network takes guidance as an input"
        if key in typed:
            raise ValueError(f"{vain}; leave it out")
        if say:
            print(f"the recipe's {vain}", flush=True)
    return limits


@contextmanager
def exclusive(folder: RunFolder, distribution: Distribution) -> Iterator[None]:
    """Hold the run folder for this run, until it ends or is killed.

    Raises:
        ValueError: on every process, if another run holds it, or it cannot be made.
    """
    busy = f"another process is training in {folder.path}; choose another name (name=...)"
    with ExitStack() as held:
        with distribution.together():
            if distribution.is_main:
                held.enter_context(lock(folder.path, busy=busy, unmade="set runs_dir=..."))
        yield


def prepare_folder(folder: RunFolder, config: TrainConfig, settings: dict[str, Any]) -> None:
    """Clean up after a killed run and write config.yaml and what lies at its paths.

    Raises:
        ValueError: if the folder holds a run of other settings, or of other files at its paths,
            naming those that differ; or files that Sfumato did not write under names of its own.
    """
    refuse_link(folder.export)
    tidy(folder.checkpoints)
    started = bool(list_checkpoints(folder.checkpoints))
    records = [folder.path / name for name in (MEMORY, "run.json")]
    theirs = [file for file in (folder.config, folder.metrics) if file.exists()]
    if theirs and not (started or any(record.exists() for record in records)):
        raise ValueError(
            f"{theirs[0]} is in the way, and Sfumato did not write it; move it away, or choose "
            "another name (name=...)"
        )
    contents = contents_of(config, folder.path, started=started)
    if folder.config.exists() and started:
        before = read_notes(folder.path).began
        saved = read_saved(folder.path, "restore the file, or choose another name (name=...)")
        defaults = {key: default for key, _, default in leaves_of(config)}
        differing = differences(flatten(saved), flatten(settings), defaults)
        same = contents.keys() & before.keys()  # compared by content, below
        same |= {key for key in differing if why_unread(config, key) is not None}
        if differing := {key: text for key, text in differing.items() if key not in same}:
            listed = "; ".join(f"{key}: {text}" for key, text in differing.items())
            raise ValueError(
                f"{folder.path} holds a run with other settings ({listed}); choose another name "
                f"(name=...), or remove the folder. {way_on(config, folder)}"
            )
        refuse_changed(config, folder, contents)
    write_began(folder.path, contents)
    write_saved(folder.path, settings)
    repeated, total = repeated_pictures(config, folder.path)
    if repeated:
        print(f"validation: training reads {repeated} of its {total} pictures too", flush=True)
    for name in trained_rewards(config, contents):
        print(
            f"warning: validation.rewards.{name} is a reward that training learns from, so it "
            "does not show whether training exploits that reward; choose another",
            flush=True,
        )


def refuse_changed(config: TrainConfig, folder: RunFolder, contents: Mapping[str, str]) -> None:
    """Refuse files that the run did not begin with, unless the user allows them."""
    others = [key for key in changed(folder.path, contents) if key not in config.allow_changed]
    if others:
        raise ValueError(
            f"{folder.path} began with other files than those that lie now at "
            f"{', '.join(others)}; restore them, choose another name (name=...), or go on with "
            f"the changed files: allow_changed=[{','.join(others)}]"
        )


def note_models(config: TrainConfig, folder: RunFolder) -> None:
    """Note which files of models and rewards have been loaded.

    Raises:
        ValueError: if they are not those that the run began with.
    """
    started = bool(list_checkpoints(folder.checkpoints))
    contents = contents_of(config, folder.path, started=started, sections=MODELS)
    refuse_changed(config, folder, contents)
    write_began(folder.path, contents)


def cache_images(
    config: TrainConfig, own: Own, data: Data, folder: RunFolder, distribution: Distribution
) -> None:
    """Let training read moments and states in place of pictures, if these have cache=auto.

    Raises:
        ValueError: as `cache_pictures`.
    """
    (key, images), pictures = own_pictures(config), data.pictures
    if images.cache == "off" or pictures is None:
        return
    why = "a script brings the model" if own.load is not None else why_uncached(config)
    if why is None:
        why = cache_pictures(pictures, config.model, folder.path, images.workers, distribution)
    if distribution.is_main:
        where = f"{len(pictures.cache or [])} pictures, encoded in {folder.path / 'cache'}"
        print(f"{key}.cache=auto: {where if why is None else f'off, as {why}'}", flush=True)


def way_on(config: TrainConfig, folder: RunFolder) -> str:
    """Say how a run of other settings starts from the weights of the run in a folder."""
    start, model = f"model.pretrained={folder.export}/pipeline", config.model
    if config.objective.trains == "reward":
        start = f"reward.pretrained={folder.export}/reward"
    elif config.objective.trains == "autoencoder":
        start = f"objective.start={folder.export}/autoencoder"
    elif model.trainable == "lora":
        start = f"model.lora.start={folder.export}/lora"
    elif model.network.config is not None:
        start = f"model.network.from_pretrained={folder.path}"
    return f"A new run can start from its weights once it is complete: name=... {start}"


def report_left_out(stream: Stream[Any], folder: RunFolder, distribution: Distribution) -> None:
    """Print and write what was left out; each process meets damaged rows of its own."""
    summaries = distribution.gather([stream.skipped.summary() if stream.skipped else ""])
    lines = list(dict.fromkeys(summary for summary in summaries if summary))
    with distribution.together():
        if distribution.is_main and lines:
            print("\n".join(f"left out: {line}" for line in lines), flush=True)
            write_text(folder.path / "left_out.json", json.dumps(lines, indent=2) + "\n")


def is_complete(outcome: Outcome, config: TrainConfig, folder: RunFolder) -> bool:
    """Print how the run ended; say whether it has a result to export."""
    verdict = outcome.verdict
    if verdict is not None:
        print(f"{folder.path}: ended at step {verdict.step} by {verdict.key}: {verdict.said}")
        print(f"  {_result(verdict, outcome, folder)}", flush=True)
        return not is_guarded(outcome)
    if outcome.stopped_by is None:
        print(f"{folder.path}: complete at step {outcome.step}")
        for line in compare_with_base(folder):
            print(f"  {line}")
        return True
    print(
        f"{folder.path}: stopped at step {outcome.step} of {config.training.max_steps} by "
        f"{outcome.stopped_by}; the same command goes on from there",
        flush=True,
    )
    return False


def is_guarded(outcome: Outcome) -> bool:
    """Say whether a guard has ended the run without a result."""
    verdict = outcome.verdict
    if verdict is None or verdict.action == "reach":
        return False
    return verdict.action == "stop" or outcome.best is None


def _result(verdict: Verdict, outcome: Outcome, folder: RunFolder) -> str:
    """Say what the result of a run is that ended before its last step, and how it goes on."""
    if verdict.action == "reach":
        return f"the target is reached; a higher {verdict.key} goes on from there"
    on = (
        f"to go on from there, change the guard ({verdict.key}.limit=...) or take it out "
        f"({verdict.key}=null)"
    )
    if verdict.action == "rollback" and outcome.best is not None:
        return (
            f"the result is step {outcome.best}, the best within the guards' limits "
            f"(step=best of sample and evaluate); later checkpoints stay; {on}"
        )
    why = "nothing is exported"
    if verdict.action == "rollback":
        why = f"no step was better than the base model within the limits, so {why}"
    return (
        f"{why}; its checkpoints stay: `sfumato sample run={folder.path} step=N` shows them; {on}"
    )


def compare_with_base(folder: RunFolder) -> list[str]:
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
