"""Evaluator of checkpoints: images from the same prompts and noise, their scores and diversity."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from torch import Tensor
from tqdm import tqdm

from sfumato.config import EvaluateConfig
from sfumato.diffusion.guidance import annealed_weights
from sfumato.evaluation.diversity import build_distance
from sfumato.evaluation.making import Making
from sfumato.evaluation.manifest import difference
from sfumato.evaluation.results import Evaluation, Variant, read_evaluation
from sfumato.evaluation.study import Study
from sfumato.files import lock
from sfumato.parts import EVERYTHING
from sfumato.training.checkpoint import best_step, fingerprint, list_checkpoints, read_shown_weights
from sfumato.training.distribution import ALONE, Group
from sfumato.training.folder import RunFolder, step_name
from sfumato.training.state import load_weights

Task = tuple[Variant, int]  # what is made, of which step


def evaluate(
    run: RunFolder,
    study: Study,
    steps: Sequence[int],
    *,
    variants: Sequence[Variant] = (Variant(),),
    group: Group = ALONE,
    held: bool = False,
    part: slice = EVERYTHING,
) -> list[Evaluation]:
    """Score checkpoints, and the base model as step 0, into run/evaluation/step-NNNNNN/.

    Image i of prompt p starts from the noise of derive(seed, p, i) at every step of every run. A
    step that was evaluated before with the same settings and weights is skipped; what a killed
    process made of a step is kept. The model keeps the weights that were loaded last.

    Args:
        variants: ways to make the images of each step, into run/evaluation/VARIANT/. The base model
            has neither schedule nor adapter: it is evaluated for each guidance scale alone.
        group: processes that share the work; all of them write to one run folder.
        held: the caller holds the evaluations of the run; see `hold`.
        part: of the variants' steps; other processes may evaluate the others.

    Returns:
        One evaluation per variant and step, in the order of variants and steps.

    Raises:
        ValueError: if settings are impossible, a checkpoint is missing or damaged, a reward is
            not finite, or the result cannot be written.
    """
    check_request(study.prompts, study.num_images, study.batch_size)
    asked = tasks_of(variants, steps)[part]
    studies = {variant: _guided(study, variant) for variant, _ in asked}
    todo: list[Task] = []
    with group.together():
        if group.is_main:  # one process says it: another may look when a part of it is there
            todo += [
                (variant, step)
                for variant, step in asked
                if not _is_current(run, step, variant, studies[variant].settings())
            ]
    todo = group.gather(todo)
    holding: AbstractContextManager[Any] = nullcontext()
    with group.together():
        checkpoints = {step: find_checkpoint(run, str(step)) for _, step in todo if step}
        distance = build_distance(study.features, study.model.device) if todo else None
        if todo and group.is_main and not held:
            holding = hold(run)
    total = len(todo) * len(study.jobs)
    hidden = not (group.is_main and todo)
    with holding, tqdm(total=total, unit="image", dynamic_ncols=True, disable=hidden) as bar:
        for variant, step in todo:
            bar.set_description(f"{run.path.name} {variant.name} step {step}".replace("  ", " "))
            facts: dict[str, Any] = {"checkpoint": None}
            with group.together():
                if step:
                    facts["checkpoint"] = fingerprint(checkpoints[step])
                    weights = read_shown_weights(checkpoints[step])
                    weights = scaled(weights, variant.lora_scale)
                    load_weights(study.model, weights, str(checkpoints[step]))
            facts["settings"] = studies[variant].settings()
            if variant != Variant():
                facts["variant"] = asdict(variant)
            folder = run.evaluation(step, variant.name)
            assert distance is not None
            making = Making(studies[variant], step, variant, folder, distance, facts, group)
            for number in making.make():
                bar.update(number)
    return [read_evaluation(run.evaluation(step, variant.name)) for variant, step in asked]


def tasks_of(variants: Sequence[Variant], steps: Sequence[int]) -> list[Task]:
    """Return each variant with each of its steps, once.

    The base model has neither schedule nor adapter, so that it has a variant for guidance alone.
    """
    tasks = (
        (variant if step else Variant(guidance_scale=variant.guidance_scale), step)
        for variant in variants
        for step in sorted(set(steps))
    )
    return list(dict.fromkeys(tasks))


def scaled(weights: Mapping[str, Tensor], scale: float) -> Mapping[str, Tensor]:
    """Return the weights of adapters whose change of the model is multiplied by `scale`.

    Raises:
        ValueError: these are no adapters.
    """
    if scale == 1:
        return weights
    if not all(".lora_A." in name or ".lora_B." in name for name in weights):
        raise ValueError(
            f"lora_scales={scale:g} multiplies what LoRA adapters add, and this run trained other "
            "weights; leave it out"
        )
    return {name: value * scale if ".lora_B." in name else value for name, value in weights.items()}


def _guided(study: Study, variant: Variant) -> Study:
    if variant.guidance_scale is None:
        return study
    sampler = replace(study.config.sampler, guidance_scale=variant.guidance_scale)
    return replace(study, config=replace(study.config, sampler=sampler))


def hold(run: RunFolder, *, shared: bool = False) -> IO[str]:
    """Hold the evaluations of a run until the returned file is closed.

    Args:
        shared: hold them beside other processes that share them.

    Raises:
        ValueError: another process holds them, or their folder cannot be made.
    """
    busy = f"another sfumato evaluate works on {run.path}; wait for it and run the command again"
    unmade = "run it where you may write"
    return lock(run.evaluation(0).parent, busy=busy, unmade=unmade, shared=shared)


def find_checkpoint(run: RunFolder, step: str | None) -> Path:
    """Return the checkpoint of a step, the `best` one, or by default the last one.

    Raises:
        ValueError: if there is none.
    """
    checkpoints = list_checkpoints(run.checkpoints)
    if not checkpoints:
        raise ValueError(f"{run.path} has no checkpoint yet; train it first")
    if step is None:
        return checkpoints[-1]
    best = best_step(run.checkpoints) if step == "best" else None
    if step == "best" and best is None:
        raise ValueError(f"{run.path} has no validation loss to choose by; give step=NUMBER")
    number = best if best is not None else int(step) if step.isdecimal() else -1
    path = run.checkpoints / step_name(number)
    if path not in checkpoints:
        names = ", ".join(path.name for path in checkpoints)
        raise ValueError(f"{run.path} has no checkpoint of step {step}; choose one of {names}")
    return path


def check_request(prompts: Sequence[str], num_images: int, batch_size: int) -> None:
    """Refuse impossible settings before a model is loaded.

    Raises:
        ValueError: naming the setting and its value.
    """
    if not prompts:
        raise ValueError("there are no prompts to evaluate; name a file with at least one")
    if num_images < 2:
        raise ValueError(f"num_images = {num_images} must be 2 or more, to measure diversity")
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size} must be 1 or more")


def _is_current(run: RunFolder, step: int, variant: Variant, settings: Mapping[str, Any]) -> bool:
    """Say whether a step was evaluated with these settings and its checkpoint's weights.

    A checkpoint that no longer exists is not compared.
    """
    try:
        done = read_evaluation(run.evaluation(step, variant.name))
    except ValueError:
        return False
    checkpoint = run.checkpoints / step_name(step)
    if done.variant != variant:
        return False
    same = not checkpoint.is_dir() or done.checkpoint == fingerprint(checkpoint)
    return same and difference(done.settings, settings) is None


def variants_of(config: EvaluateConfig, guidance_scale: float) -> list[Variant]:
    """Return each schedule with each scale of the adapter and of guidance.

    Args:
        guidance_scale: the run's own.

    Raises:
        ValueError: naming a schedule or a scale that makes no images of its own.
    """
    for schedule in config.schedules:
        annealed_weights(schedule, 1)
        if schedule == "base":
            raise ValueError("schedules: base is the base model, which steps=[0] evaluates")
    scales = [
        None if g == guidance_scale else g for g in config.guidance_scales or [guidance_scale]
    ]
    variants = [
        Variant(schedule, lora_scale, scale)
        for schedule in config.schedules
        for lora_scale in config.lora_scales
        for scale in scales
    ]
    named: dict[str, Variant] = {}
    for one in variants:
        if named.setdefault(one.name, one) != one:
            raise ValueError(
                f"lora_scales or guidance_scales has two numbers that would both be {one.name!r}, "
                "a folder's name with six digits; give numbers that differ more"
            )
    return variants
