"""Commands `sample` and `evaluate`: they read settings and write files."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import sfumato
from sfumato.compose import load_settings
from sfumato.conditions import check_sample
from sfumato.config import (
    EvaluateConfig,
    ModelConfig,
    SampleConfig,
    SamplerConfig,
    TrainConfig,
    check_values,
)
from sfumato.data.prompts import read_prompts
from sfumato.diffusion.randomness import derive
from sfumato.evaluation.evaluate import Study, check_request, evaluate, find_checkpoint
from sfumato.evaluation.results import Evaluation
from sfumato.files import write_text
from sfumato.images import write_png
from sfumato.models.generate import generate
from sfumato.models.model import TextToImageModel
from sfumato.models.origins import without_start
from sfumato.models.registry import find_family, load_model
from sfumato.records import read_rows
from sfumato.run.build import build_scorer
from sfumato.run.identity import contents_of, digests
from sfumato.training.checkpoint import (
    fingerprint,
    list_checkpoints,
    read_shown_weights,
    step_of,
)
from sfumato.training.folder import RunFolder
from sfumato.training.state import load_weights
from sfumato.training.validation import PAIRS

SAMPLED = "sample.json"


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
    """Write PROMPT-IMAGE.png for each prompt and seed, and sample.json, into a new folder.

    The folder is `out` if that is empty, or else out/001, out/002 and so on. Each PNG holds its
    prompt, seed, model and settings as text.

    Raises:
        ValueError: if the settings name no model or no prompt, or a picture cannot be written.
    """
    check_values(config)
    check_sample(config)
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
    notes = [
        {"prompt": prompt, "seed": config.seed, "image": i % config.num_images, **opened.origin}
        for i, prompt in enumerate(prompts)
    ]
    names = [
        f"{i // config.num_images:03d}-{i % config.num_images:02d}.png" for i in range(len(prompts))
    ]
    folder = _new_folder(out, dict(zip(names, notes, strict=True)))
    for start in range(0, len(prompts), config.batch_size):
        rows = slice(start, start + config.batch_size)
        images = generate(
            opened.model, prompts[rows], seeds[rows], opened.sampler, schedule=config.schedule
        )
        for i, image in enumerate(images, start):
            write_png(image, folder / names[i], notes[i])
            print(f"{folder / names[i]}  {prompts[i]}", flush=True)


def _new_folder(out: Path, record: Mapping[str, Any]) -> Path:
    """Return `out` if it is empty, or else a new numbered folder in it; write the record there."""
    folder = out
    try:
        if any(out.iterdir()):
            raise FileExistsError
        (out / SAMPLED).touch(exist_ok=False)  # of two calls at once only one has the folder
    except FileExistsError:
        for number in itertools.count(1):
            folder = out / f"{number:03d}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            break
        print(f"{out} is not empty: the pictures go to {folder}", flush=True)
    write_text(folder / SAMPLED, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return folder


def open_model(config: SampleConfig) -> Opened:
    """Return a run's model with its averaged weights, or a pretrained model, and its sampler.

    Raises:
        ValueError: if the model cannot be found or read.
    """
    if config.run is None:
        settings = ModelConfig(str(config.pretrained), allow_pickle=config.allow_pickle)
        sampler, checkpoint, origin = SamplerConfig(), None, {"model": config.pretrained}
    else:
        run = RunFolder(Path(config.run))
        trained = load_settings(run.config)
        # A run may come from a stranger: whether to trust pickles is for the user to say.
        settings = replace(trained.model, allow_pickle=config.allow_pickle)
        sampler = trained.sampler
        checkpoint = find_checkpoint(run, config.step)
        origin = {"run": config.run, "model": settings.pretrained}
        origin |= {"step": step_of(checkpoint), "checkpoint": fingerprint(checkpoint)}
    changes = {name: value for name, value in vars(config.sampler).items() if value is not None}
    sampler = replace(sampler, **changes)
    check_values(sampler, "sampler.")
    find_family(settings, sampler)
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
    return [row.prompt for row in read_rows(path, _Shown, f"remove {folders[-1]}")]


def distinct(prompts: Sequence[str]) -> list[str]:
    """Return each prompt once, in order; say how many repeat an earlier one."""
    once = list(dict.fromkeys(prompts))
    if len(once) < len(prompts):
        print(f"left out: {len(prompts) - len(once)} of {len(prompts)} prompts, which repeat an "
              "earlier one", flush=True)  # fmt: skip
    return once


def evaluate_run(config: EvaluateConfig) -> Sequence[Evaluation]:
    """Evaluate a run's checkpoints, and the base model as step 0, and write to the run folder.

    Raises:
        ValueError: if the run cannot be read, or a step has no checkpoint.
    """
    run = RunFolder(Path(config.run))
    trained: TrainConfig = load_settings(run.config)
    trained.model.allow_pickle = config.allow_pickle
    steps = config.steps
    if steps is None:
        steps = [0, *map(step_of, list_checkpoints(run.checkpoints))]
    for step in steps:
        if step:
            find_checkpoint(run, str(step))
    if config.prompts:
        prompts = read_prompts(config.prompts, column=config.column)
    else:
        prompts = shown_prompts(run)
    prompts = distinct(prompts)
    check_request(prompts, config.num_images, config.batch_size)
    find_family(trained.model, trained.sampler)
    device = default_device()
    reward = build_scorer(trained)
    if reward is not None:
        reward = reward.to(device)
    settings = trained.model
    model = load_model(replace(settings, reference=True) if 0 in steps else without_start(settings))
    model.to(device)
    # Of a run that may come from a stranger, only what the numbers depend on is looked at.
    contents = contents_of(trained, run.path, started=True, sections=("model", "reward"))
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
        contents=contents,
    )
    results = evaluate(run, study, steps)
    for result in results:
        measured = [f"{result.diversity_label} {result.diversity:.4f}"]
        if result.reward is not None:
            measured.insert(0, f"reward {result.reward:.4f} +- {result.reward_error:.4f}")
        print(f"step {result.step}: {', '.join(measured)}")
    return results
