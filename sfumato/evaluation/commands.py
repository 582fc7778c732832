"""Commands `sample` and `evaluate`: they read settings and write files."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sfumato
from sfumato.check import LONGEST, check_sampler
from sfumato.conditions import check_sample, shown
from sfumato.config import (
    EvaluateConfig,
    ModelConfig,
    RewardFiles,
    SampleConfig,
    SamplerConfig,
    check_values,
)
from sfumato.data.entries import is_utf8
from sfumato.data.prompts import read_prompt_rows, read_prompts
from sfumato.diffusion.randomness import derive
from sfumato.evaluation.evaluate import (
    check_request,
    evaluate,
    find_checkpoint,
    hold,
    variants_of,
)
from sfumato.evaluation.layouts import check_layouts, write_layouts
from sfumato.evaluation.measures import Measures, check_metrics, metric_label
from sfumato.evaluation.opened import OpenedRun, open_run
from sfumato.evaluation.results import LAYOUTS, Evaluation
from sfumato.evaluation.study import Study
from sfumato.files import write_text
from sfumato.images import write_png
from sfumato.models.generate import generate, image_size
from sfumato.models.model import TextToImageModel
from sfumato.models.origins import without_start
from sfumato.models.registry import find_family, load_model
from sfumato.parts import slice_of
from sfumato.records import read_rows
from sfumato.rewards.build import build_reward, ready
from sfumato.run.build import build_scorer
from sfumato.run.identity import contents_of, digests
from sfumato.training.checkpoint import (
    fingerprint,
    list_checkpoints,
    read_shown_weights,
    step_of,
)
from sfumato.training.distribution import ALONE, Group
from sfumato.training.folder import RunFolder
from sfumato.training.state import load_weights
from sfumato.training.validation import PAIRS

SAMPLED = "sample.json"
CAPTIONS = "metadata.jsonl"  # of Hugging Face's imagefolder, which data.images.path reads
MEASURED = ("model", "reward", "validation.rewards")  # sections of the settings


@dataclass(frozen=True)
class _Shown:
    """What is read of a row of pairs.jsonl."""

    prompt: str


@dataclass(frozen=True)
class Opened:
    """A model to sample from.

    Attributes:
        origin: model, step and checkpoint, for the record of the pictures.
    """

    model: TextToImageModel
    sampler: SamplerConfig
    origin: Mapping[str, Any]


def default_device() -> torch.device:
    """Return the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sample_images(config: SampleConfig) -> None:
    """Write PROMPT-IMAGE.png for each prompt and seed into a new folder, and say what they are.

    The folder is `out` if that is empty, or else out/001, out/002 and so on. sample.json and each
    PNG's text hold prompt, seed, model and settings. metadata.jsonl has the prompts as captions, so
    that training reads the folder as data.images.path.

    Raises:
        ValueError: if the settings name no model or no prompt, or a picture cannot be written.
    """
    check_values(config)
    check_sample(config)
    _check_text(config.prompt or "", "prompt")
    texts = (
        [config.prompt]
        if config.prompt is not None
        else read_prompts(str(config.prompts), column=config.column)
    )
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={config.out!r} is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)
    opened = open_model(config)
    opened.model.to(default_device())
    prompts = [text for text in texts for _ in range(config.num_images)]
    seeds = [derive(config.seed, i) for _ in texts for i in range(config.num_images)]
    notes = {
        f"{i // config.num_images:03d}-{i % config.num_images:02d}.png": {
            "prompt": prompt,
            "seed": config.seed,
            "image": i % config.num_images,
            **opened.origin,
        }
        for i, prompt in enumerate(prompts)
    }
    rows = [slice(i, i + config.batch_size) for i in range(0, len(prompts), config.batch_size)]
    images = (
        image
        for row in rows
        for image in generate(
            opened.model, prompts[row], seeds[row], opened.sampler, schedule=config.schedule
        )
    )
    _write_pictures(images, notes, out)


def _write_pictures(images: Iterator[Tensor], notes: Mapping[str, Any], out: Path) -> None:
    """Write images under the names of their notes, and the notes of those that were written."""
    first = next(images)  # what fails before it leaves nothing
    folder = _new_folder(out)
    written: dict[str, Any] = {}
    try:
        _write_notes(folder, notes)
        for (name, note), image in zip(notes.items(), chain([first], images), strict=True):
            write_png(image, folder / name, note)
            written[name] = note
            print(f"{folder / name}  {note['prompt']}", flush=True)
    except BaseException:
        if written:
            with suppress(ValueError):  # the disk may be full
                _write_notes(folder, written)
        else:
            for name in (CAPTIONS, SAMPLED):
                (folder / name).unlink(missing_ok=True)
            if folder != out:
                folder.rmdir()
        raise


def _write_notes(folder: Path, notes: Mapping[str, Any]) -> None:
    captions = ({"file_name": name, "text": note["prompt"]} for name, note in notes.items())
    lines = (f"{json.dumps(caption, ensure_ascii=False)}\n" for caption in captions)
    write_text(folder / CAPTIONS, "".join(lines))
    write_text(folder / SAMPLED, json.dumps(notes, indent=2, ensure_ascii=False) + "\n")


def _new_folder(out: Path) -> Path:
    """Return `out` if it is empty, or else a new numbered folder in it."""
    try:
        if any(out.iterdir()):
            raise FileExistsError
        (out / SAMPLED).touch(exist_ok=False)  # of two calls at once only one has the folder
        return out
    except FileExistsError:
        pass
    number = 1
    while (folder := out / f"{number:03d}").exists() or not _made(folder):
        number += 1
    print(f"{out} is not empty: the pictures go to {folder}", flush=True)
    return folder


def _made(folder: Path) -> bool:
    """Make a folder, unless another process has just made it."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def open_model(config: SampleConfig) -> Opened:
    """Return a run's model with its averaged weights, or a pretrained model, and its sampler.

    Raises:
        ValueError: if the model cannot be found or read, or is not the one that the run began with.
    """
    run: OpenedRun | None = None
    if config.run is None:
        settings = ModelConfig(str(config.pretrained), allow_pickle=config.allow_pickle)
        settings.variant = config.model.variant
        sampler, checkpoint = SamplerConfig(), None
        origin: dict[str, Any] = {"model": config.pretrained}
    else:
        run = open_run(config)
        settings, sampler = run.settings.model, run.settings.sampler
        checkpoint = find_checkpoint(run.folder, config.step)
        origin = {"run": config.run, "model": settings.pretrained}
        origin |= {"step": step_of(checkpoint), "checkpoint": fingerprint(checkpoint)}
    changes = {name: value for name, value in vars(config.sampler).items() if value is not None}
    if "solver" in changes:  # and no scheduler: it is chosen in place of the run's
        changes["scheduler"] = None
    sampler = replace(sampler, **changes)
    check_values(sampler, "sampler.")
    check_sampler(sampler)
    for name in ("guidance_interval", "negative_prompt"):
        if vars(config.sampler)[name] and sampler.guidance_scale <= 1:
            raise ValueError(
                f"sampler.{name}={shown(vars(sampler)[name])} has no effect with "
                f"sampler.guidance_scale={sampler.guidance_scale:g}; leave it out"
            )
    find_family(settings, sampler)
    if run is not None:
        origin["contents"] = run.contents("model")
    weights = read_shown_weights(checkpoint) if checkpoint is not None else None
    if config.schedule != "draft":
        settings = replace(settings, reference=True)
    elif weights is not None:
        settings = without_start(settings)
    model = load_model(settings)
    if weights is not None:
        load_weights(model, weights, str(checkpoint))
    origin |= {"schedule": config.schedule, "sampler": asdict(sampler)}
    return Opened(model, sampler, {**origin, "sfumato": sfumato.__version__})


def shown_prompts(run: RunFolder) -> list[str]:
    """Return the prompts of a run's last validation images.

    The files that its settings name are not read: a run may come from a stranger.

    Raises:
        ValueError: the run shows no validation images.
    """
    folders = list_checkpoints(run.path / "samples")
    if not folders:
        raise ValueError(
            f"{run.path} stored no prompts of validation images; give prompts=FILE (files that its "
            "config.yaml names are read only where you name them)"
        )
    path = folders[-1] / PAIRS
    prompts = [row.prompt for row in read_rows(path, _Shown, f"remove {folders[-1]}")]
    for number, prompt in enumerate(prompts, 1):
        _check_text(prompt, f"{path} line {number}: prompt")
    return prompts


def _check_text(prompt: str, name: str) -> None:
    if len(prompt) > LONGEST or not is_utf8(prompt):
        raise ValueError(
            f"{name} = {prompt[:40]!r} is not UTF-8, or has more than {LONGEST:,} characters; "
            "give another"
        )


def _rows(config: EvaluateConfig) -> Mapping[str, Mapping[str, Any]]:
    """Return what a table that the user named has beside each prompt."""
    return read_prompt_rows(config.prompts, column=config.column) if config.prompts else {}


def distinct(prompts: Sequence[str]) -> list[str]:
    """Return each prompt once, in order; say how many repeat an earlier one."""
    once = list(dict.fromkeys(prompts))
    if len(once) < len(prompts):
        print(f"left out: {len(prompts) - len(once)} of {len(prompts)} prompts, which repeat an "
              "earlier one", flush=True)  # fmt: skip
    return once


def evaluate_run(config: EvaluateConfig, group: Group = ALONE) -> Sequence[Evaluation]:
    """Evaluate a run's checkpoints, and the base model as step 0, and write to the run folder.

    Args:
        group: processes that share the work; all of them write to one run folder.

    Raises:
        ValueError: if the run cannot be read, or a step has no checkpoint.
    """
    part = slice_of(config.part)
    opened = open_run(config)
    run, trained = opened.folder, opened.settings
    if other := not isinstance(config.reward, RewardFiles):
        trained.reward = config.reward
    _refuse_unnamed(opened, other)
    steps = config.steps
    if steps is None:
        steps = [0, *map(step_of, list_checkpoints(run.checkpoints))]
    variants = variants_of(config, trained.sampler.guidance_scale)
    if any(scale != 1 for scale in config.lora_scales) and trained.model.trainable != "lora":
        raise ValueError(
            f"lora_scales={config.lora_scales} multiply what LoRA adapters add, and {run.path} "
            "trained all weights; leave them out"
        )
    for step in steps:
        if step:
            find_checkpoint(run, str(step))
    named = config.prompts
    prompts = read_prompts(named, column=config.column) if named else shown_prompts(run)
    prompts = distinct(prompts)
    check_request(prompts, config.num_images, config.batch_size)
    check_metrics(config, len(prompts) * config.num_images)
    check_sampler(trained.sampler)
    find_family(trained.model, trained.sampler)
    held = os.access(run.path, os.W_OK)  # else it can show what was evaluated before
    holding: AbstractContextManager[Any] = nullcontext()
    with group.together():
        if held and group.is_main:  # before weights are loaded
            holding = hold(run, shared=config.part is not None)
    with holding:
        opened.contents(*(room for room in MEASURED if room != "reward" or not other))
        device = group.device if group.world > 1 else default_device()
        reward = build_scorer(trained)
        if reward is not None:
            reward = ready(reward, device, partial(_rows, config))
        settings = trained.model
        whole = 0 in steps or any(each.schedule != "draft" for each in variants)
        model = load_model(replace(settings, reference=True) if whole else without_start(settings))
        model.to(device)
        size = image_size(model, trained.sampler)
        if config.layouts:
            check_layouts(config.layouts, prompts, _rows(config), size)
        held_out = {
            name: ready(build_reward(each), device, partial(_rows, config))
            for name, each in trained.validation.rewards.items()
        }
        # Once more, as a hub's models may be here only now. Of a run that may come from a stranger,
        # only what the numbers depend on is looked at.
        contents = contents_of(trained, run.path, started=True, sections=MEASURED)
        contents |= digests({"features": config.features}, run.path)
        study = Study(
            model,
            trained,
            reward,
            prompts,
            num_images=config.num_images,
            seed=config.seed,
            batch_size=config.batch_size,
            features=config.features,
            held_out=held_out,
            contents=contents,
        )
        measures = Measures(config, run, study, size, group)
        results = evaluate(run, study, steps, variants=variants, group=group, held=held, part=part)
        results = measures.measure(results)
        with group.together():
            if group.is_main:
                _publish(config, study, results)
    return results


def _publish(config: EvaluateConfig, study: Study, results: Sequence[Evaluation]) -> None:
    for result in results:
        if config.layouts and result.folder is not None:
            pictures = study.pictures(result.folder)
            write_layouts(config.layouts, result.folder / LAYOUTS, pictures, _rows(config))
        print(_line(result))


def _refuse_unnamed(opened: OpenedRun, other: bool) -> None:
    """Refuse code and scorers of a run folder; `other` says that the user named another reward."""
    for key, value in opened.unnamed.items():
        trains = key.startswith("reward.")
        if trains and other:
            continue
        raise ValueError(
            f"{opened.folder.path} was scored by {key}={value!r}; code and scorers are not taken "
            f"from a run folder: name it again ({key}=...)"
            f"{', or another reward (reward=NAME)' * trains}"
        )


def _line(result: Evaluation) -> str:
    measured = [f"{result.diversity_label} {result.diversity:.4f}"]
    measured += [f"{name} {value:.4f}" for name, value in result.held_out.items()]
    if result.reward is not None:
        measured.insert(0, f"reward {result.reward:.4f} +- {result.reward_error:.4f}")
    measured += [f"{metric_label(n, one)} {one.value:.4g}" for n, one in result.metrics.items()]
    return f"{f'step {result.step} {result.variant.name}'.strip()}: {', '.join(measured)}"
