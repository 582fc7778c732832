"""Evaluator of checkpoints: images from the same prompts and noise, their scores and diversity."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from sfumato.config import SamplerConfig, TrainConfig
from sfumato.diffusion.randomness import derive
from sfumato.evaluation.diversity import Distance, build_distance
from sfumato.evaluation.results import (
    OLDER,
    SCORES,
    SUMMARY,
    Evaluation,
    read_evaluation,
    read_evaluations,
)
from sfumato.files import lock, new_folder
from sfumato.images import save_image
from sfumato.models.generate import generate
from sfumato.models.model import TextToImageModel
from sfumato.rewards.reward import Reward, Score
from sfumato.run.identity import typed
from sfumato.training.checkpoint import best_step, fingerprint, list_checkpoints, read_shown_weights
from sfumato.training.distribution import AUTOCAST
from sfumato.training.folder import RunFolder, json_lines, step_name
from sfumato.training.state import load_weights

HeldOut = Callable[[Tensor, Sequence[str]], Tensor]
NOT_OF_IMAGES = ("training_steps", "training_spacing", "prompt_cache")  # of a sampler's settings
NEWER = ("solver", "guidance_interval")
ADDED = ("score", "model")  # of a reward's settings, which evaluations of older versions lack


@dataclass(frozen=True)
class Study:
    """What is measured, on which images.

    Attributes:
        config: settings of the run; the sampler and the precision apply.
        reward: the reward that `config.reward` names; None measures everything else.
        num_images: images per prompt, 2 or more.
        features: image features for diversity; see `build_distance`.
        held_out: scores that were not trained on: functions of images in [0, 1] and prompts.
        contents: digests of the files of model, reward and features, by their settings.
    """

    model: TextToImageModel
    config: TrainConfig
    reward: Reward | None
    prompts: Sequence[str]
    num_images: int
    seed: int
    batch_size: int
    features: str
    held_out: Mapping[str, HeldOut] = field(default_factory=dict)
    contents: Mapping[str, str] = field(default_factory=dict)

    @property
    def jobs(self) -> list[tuple[int, int]]:
        """Return the prompt and the index of each image, prompt by prompt."""
        return list(itertools.product(range(len(self.prompts)), range(self.num_images)))

    def settings(self) -> dict[str, Any]:
        """Return the settings that the numbers depend on, except the step, as read from JSON."""
        config, model = self.config, self.config.model
        scored = {"kind": type(config.reward).__name__, **asdict(config.reward)}
        for training in ("gradient_checkpointing", "standardise", "gradients"):
            scored.pop(training, None)
        parts = [asdict(model.network), model.autoencoder, model.text_encoder]
        parts.append(model.prediction_type)
        plain = {
            "pretrained": parts if model.pretrained is None else model.pretrained,
            "dtype": model.dtype,
            "precision": config.training.precision,
            "sampler": _of_images(config.sampler),
            "reward": _by_content(scored, "reward.", self.contents) if self.reward else None,
            "prompts": list(self.prompts),
            "num_images": self.num_images,
            "seed": self.seed,
            "features": self.features,
            "held_out": sorted(self.held_out),
            "contents": dict(self.contents),
        }
        rewards = {n: asdict(v) for n, v in config.validation.rewards.items() if n in self.held_out}
        if rewards:  # evaluations of older versions have none
            plain["rewards"] = _by_content(rewards, "validation.rewards.", self.contents)
        if "model.pretrained" in self.contents:
            plain["pretrained"] = "by content"
        return json.loads(json.dumps(plain))


def _of_images(sampler: SamplerConfig) -> dict[str, Any]:
    """Return the settings of a sampler that images depend on.

    Newer ones are left out at their default: evaluations of older versions lack them.
    """
    default = vars(SamplerConfig())
    return {
        key: value
        for key, value in vars(sampler).items()
        if key not in NOT_OF_IMAGES and not (key in NEWER and value == default[key])
    }


def _by_content(
    settings: Mapping[str, Any], prefix: str, contents: Mapping[str, str]
) -> dict[str, Any]:
    """Return settings without the paths whose content is known, and without `ADDED`."""
    return {
        key: _by_content(value, f"{prefix}{key}.", contents)
        if isinstance(value, dict)
        else ("by content" if typed(f"{prefix}{key}") in contents else value)
        for key, value in settings.items()
        if (key, value) != ADDED
    }


def evaluate(
    run: RunFolder, study: Study, steps: Sequence[int], *, held: bool = False
) -> list[Evaluation]:
    """Score checkpoints, and the base model as step 0, into run/evaluation/step-NNNNNN/.

    Image i of prompt p starts from the noise of derive(seed, p, i) at every step of every run. A
    step that was evaluated before with the same settings and weights is skipped. The model keeps
    the weights that were loaded last.

    Args:
        held: the caller holds the evaluations of the run; see `hold`.

    Returns:
        One evaluation per step, in the order of steps.

    Raises:
        ValueError: if settings are impossible, a checkpoint is missing or damaged, a reward is
            not finite, or the result cannot be written.
    """
    check_request(study.prompts, study.num_images, study.batch_size)
    settings, asked = study.settings(), sorted(set(steps))
    todo = [step for step in asked if not _is_current(run, step, settings)]
    checkpoints = {step: find_checkpoint(run, str(step)) for step in todo if step}
    if todo:
        distance = build_distance(study.features, study.model.device)
        total = len(todo) * len(study.jobs)
        holding = nullcontext() if held else hold(run)
        with holding, tqdm(total=total, unit="image", dynamic_ncols=True) as bar:
            for step in todo:
                bar.set_description(f"{run.path.name} step {step}")
                facts = {"checkpoint": None, "settings": settings}
                if step:
                    facts["checkpoint"] = fingerprint(checkpoints[step])
                    weights = read_shown_weights(checkpoints[step])
                    load_weights(study.model, weights, str(checkpoints[step]))
                with new_folder(run.evaluation(step), older=OLDER) as folder:
                    _write_step(study, step, folder, distance, facts, bar)
    return [one for one in read_evaluations(run) if one.step in asked]


def hold(run: RunFolder) -> IO[str]:
    """Hold the evaluations of a run until the returned file is closed.

    Raises:
        ValueError: another process holds them, or their folder cannot be made.
    """
    busy = f"another sfumato evaluate works on {run.path}; wait for it and run the command again"
    return lock(run.evaluation(0).parent, busy=busy, unmade="run it where you may write")


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


def _is_current(run: RunFolder, step: int, settings: Mapping[str, Any]) -> bool:
    """Say whether a step was evaluated with these settings and its checkpoint's weights.

    A checkpoint that no longer exists is not compared.
    """
    try:
        done = read_evaluation(run.evaluation(step))
    except ValueError:
        return False
    checkpoint = run.checkpoints / step_name(step)
    same = not checkpoint.is_dir() or done.checkpoint == fingerprint(checkpoint)
    return same and done.settings == settings


def _write_step(
    study: Study, step: int, folder: Path, distance: Distance, facts: Mapping[str, Any], bar: Any
) -> None:
    (folder / "images").mkdir()
    rows, diversity = _write_images(study, step, folder, distance, bar)
    summary = {
        "step": step,
        **_means(rows, study.num_images),
        "diversity": {
            "label": distance.label,
            "mean": float(np.mean(diversity)),
            "per_prompt": diversity,
        },
        **facts,
    }
    (folder / SCORES).write_text(json_lines(rows), encoding="utf-8")
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _write_images(
    study: Study, step: int, folder: Path, distance: Distance, bar: Any
) -> tuple[list[dict[str, Any]], list[float]]:
    """Return the rows of scores.jsonl and the diversity of each prompt; hold few images at once."""
    rows: list[dict[str, Any]] = []
    diversity: list[float] = []
    pending: list[Tensor] = []
    for start in range(0, len(study.jobs), study.batch_size):
        jobs = study.jobs[start : start + study.batch_size]
        images, records = _generate_batch(study, step, jobs)
        for image, row in zip(images, records, strict=True):
            save_image(image, folder / row["image"])
        rows += records
        pending += [*images]
        bar.update(len(jobs))
        while len(pending) >= study.num_images:
            images = torch.stack(pending[: study.num_images])
            diversity.append(distance.mean(images.to(study.model.device)))
            del pending[: study.num_images]
    return rows, diversity


@torch.no_grad()
def _generate_batch(
    study: Study, step: int, jobs: Sequence[tuple[int, int]]
) -> tuple[Float[Tensor, "b 3 H W"], list[dict[str, Any]]]:
    """Return a batch of images on the CPU, and their rows of scores.jsonl."""
    device, dtype = study.model.device, AUTOCAST.get(study.config.training.precision)
    texts = [study.prompts[prompt] for prompt, _ in jobs]
    seeds = [derive(study.seed, prompt, index) for prompt, index in jobs]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        images = generate(
            study.model, texts, seeds, study.config.sampler, schedule="draft" if step else "base"
        )
        score = study.reward.score(images, texts) if study.reward is not None else None
    rewards = _rewards(score, step, texts) if score is not None else [{} for _ in texts]
    held = {name: rate(images, texts).float().tolist() for name, rate in study.held_out.items()}
    for name, values in held.items():
        _refuse_non_finite(values, f"scores {name}", step, texts)
    records = [
        {
            "prompt": texts[row],
            "prompt_index": prompt,
            "index": index,
            "seed": seeds[row],
            "image": f"images/{prompt:03d}-{index:03d}.png",
            **rewards[row],
            "held_out": {name: part[row] for name, part in held.items()},
        }
        for row, (prompt, index) in enumerate(jobs)
    ]
    return images.cpu(), records


def _rewards(score: Score, step: int, texts: Sequence[str]) -> list[dict[str, Any]]:
    values = score.value.float().tolist()
    _refuse_non_finite(values, "rewards", step, texts)
    parts = {name: part.float().tolist() for name, part in score.parts.items()}
    return [
        {"reward": value, "parts": {name: part[row] for name, part in parts.items()}}
        for row, value in enumerate(values)
    ]


def _refuse_non_finite(values: Sequence[float], what: str, step: int, texts: Sequence[str]) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"at step {step} the {what} of {texts} are {values}; leave the step out")


def _means(rows: Sequence[Mapping[str, Any]], num_images: int) -> dict[str, Any]:
    means: dict[str, Any] = {}
    if "reward" in rows[0]:
        rewards = np.array([row["reward"] for row in rows]).reshape(-1, num_images)
        # Prompts are the same for every model: only noise within each is a source of error.
        errors = rewards.std(axis=1, ddof=1) / num_images**0.5
        means["reward"] = float(rewards.mean())
        means["reward_error"] = float(np.sqrt((errors**2).sum()) / len(errors))
    means["held_out"] = {
        name: float(np.mean([row["held_out"][name] for row in rows]))
        for name in rows[0]["held_out"]
    }
    return means
