"""Evaluation: the same prompts and noise for every checkpoint, scored, compared and kept."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from sfumato.config import TrainConfig
from sfumato.diffusion.randomness import derive
from sfumato.evaluation.diversity import Distance, build_distance
from sfumato.evaluation.results import (
    SCORES,
    SUMMARY,
    Evaluation,
    read_evaluations,
    read_summary,
)
from sfumato.files import new_folder
from sfumato.images import save_image
from sfumato.models.generate import generate
from sfumato.models.model import TextToImageModel
from sfumato.rewards.reward import Reward, Score
from sfumato.training.checkpoint import (
    fingerprint,
    list_checkpoints,
    read_shown_weights,
)
from sfumato.training.folder import RunFolder, step_name
from sfumato.training.state import load_weights

AUTOCAST = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HeldOut = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class _Study:
    model: TextToImageModel
    config: TrainConfig
    reward: Reward | None
    held_out: Mapping[str, HeldOut]
    prompts: Sequence[str]
    num_images: int
    seed: int

    def jobs(self) -> Iterator[tuple[int, int]]:
        for prompt in range(len(self.prompts)):
            for index in range(self.num_images):
                yield prompt, index


@dataclass(frozen=True)
class _Shot:
    image: Float[Tensor, "3 H W"]
    row: dict[str, Any]  # of scores.jsonl


def evaluate(
    run: RunFolder,
    model: TextToImageModel,
    config: TrainConfig,
    reward: Reward | None,
    steps: Sequence[int],
    prompts: Sequence[str],
    *,
    num_images: int,
    seed: int,
    batch_size: int,
    features: str,
    held_out: Mapping[str, HeldOut] = MappingProxyType({}),
) -> list[Evaluation]:
    """Score checkpoints, and the base model as step 0, into run/evaluation/step-NNNNNN/.

    Image i of prompt p starts from the noise of derive(seed, p, i), whatever the step and the
    run. A step that was evaluated before with the same settings is not made again. The model is
    left with the weights that were loaded last.

    Args:
        config: of the run; its sampler and precision are used.
        reward: that `config.reward` names; without one, images and the other measures are made.
        num_images: per prompt, at least 2.
        features: what diversity is measured by; see `build_distance`.
        held_out: scores that were not trained on, each a function of images in [0, 1] and prompts.

    Returns:
        One record per step, in the order of steps.

    Raises:
        ValueError: if settings are impossible, a checkpoint is missing or damaged, a reward is
            not finite, or the result cannot be written.
    """
    check_request(prompts, num_images, batch_size)
    settings = _settings(config, reward, prompts, num_images, seed, features, held_out)
    wanted = sorted(set(steps))
    todo = [step for step in wanted if not _is_current(run, step, settings)]
    checkpoints = {step: _find_checkpoint(run, step) for step in todo if step}
    study = _Study(model, config, reward, held_out, prompts, num_images, seed)
    distance = build_distance(features, model.device) if todo else None
    total = len(todo) * len(prompts) * num_images
    with tqdm(total=total, unit="image", dynamic_ncols=True, disable=not todo) as bar:
        for step in todo:
            assert distance is not None
            bar.set_description(f"{run.path.name} step {step}")
            facts = {"checkpoint": None, "settings": settings}
            if step:
                facts["checkpoint"] = fingerprint(checkpoints[step])
                load_weights(model, read_shown_weights(checkpoints[step]))
            _make(study, step, run.evaluation(step), distance, batch_size, facts, bar)
    return [done for done in read_evaluations(run) if done.step in wanted]


def check_request(prompts: Sequence[str], num_images: int, batch_size: int) -> None:
    """Refuse what cannot be evaluated, before anything is loaded.

    Raises:
        ValueError: naming the setting and its value.
    """
    if not prompts:
        raise ValueError("there are no prompts to evaluate; name a file with at least one")
    if num_images < 2:
        raise ValueError(f"num_images = {num_images}; diversity needs two or more per prompt")
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}; make one image or more at a time")


def _settings(
    config: TrainConfig,
    reward: Reward | None,
    prompts: Sequence[str],
    num_images: int,
    seed: int,
    features: str,
    held_out: Mapping[str, HeldOut],
) -> dict[str, Any]:
    """Return all that the numbers depend on but the step, as JSON gives it back."""
    scored = {"kind": type(config.reward).__name__, **asdict(config.reward)}
    scored.pop("gradient_checkpointing", None)
    model = config.model
    parts = [asdict(model.network), model.autoencoder, model.text_encoder, model.prediction_type]
    plain = {
        "pretrained": parts if model.pretrained is None else model.pretrained,
        "dtype": config.model.dtype,
        "precision": config.training.precision,
        "sampler": asdict(config.sampler),
        "reward": scored if reward is not None else None,
        "prompts": list(prompts),
        "num_images": num_images,
        "seed": seed,
        "features": features,
        "held_out": sorted(held_out),
    }
    return json.loads(json.dumps(plain))


def _is_current(run: RunFolder, step: int, settings: Mapping[str, Any]) -> bool:
    """Say whether a step was evaluated with these settings and, if it is there, this checkpoint."""
    try:
        summary = read_summary(run.evaluation(step))
    except ValueError:
        return False
    checkpoint = run.checkpoints / step_name(step)
    same = not checkpoint.is_dir() or summary.get("checkpoint") == fingerprint(checkpoint)
    return same and summary["settings"] == settings


def _find_checkpoint(run: RunFolder, step: int) -> Path:
    place = run.checkpoints / step_name(step)
    if not place.is_dir():
        names = ", ".join(path.name for path in list_checkpoints(run.checkpoints)) or "none"
        raise ValueError(f"{place} is not there; the checkpoints of this run: {names}")
    return place


def _make(
    study: _Study,
    step: int,
    place: Path,
    distance: Distance,
    batch_size: int,
    facts: Mapping[str, Any],
    bar: Any,
) -> None:
    """Make, score and write the images of one step, or nothing at all."""
    try:
        with new_folder(place) as beside:
            (beside / "images").mkdir()
            rows, diversity = _write_images(study, step, beside, distance, batch_size, bar)
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
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (beside / SCORES).write_text(lines, encoding="utf-8")
            (beside / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{place} could not be written: {error}; free some space and evaluate again"
        ) from error


def _write_images(
    study: _Study, step: int, folder: Path, distance: Distance, batch_size: int, bar: Any
) -> tuple[list[dict[str, Any]], list[float]]:
    """Return the rows of scores.jsonl and the diversity of each prompt, holding few images."""
    rows: list[dict[str, Any]] = []
    diversity: list[float] = []
    pending: list[_Shot] = []
    jobs = list(study.jobs())
    for start in range(0, len(jobs), batch_size):
        made = _shoot(study, step, jobs[start : start + batch_size])
        for shot in made:
            save_image(shot.image, folder / shot.row["image"])
            rows.append(shot.row)
        pending += made
        bar.update(len(made))
        while len(pending) >= study.num_images:
            images = torch.stack([shot.image for shot in pending[: study.num_images]])
            diversity.append(distance.mean(images.to(study.model.device)))
            del pending[: study.num_images]
    return rows, diversity


@torch.no_grad()
def _shoot(study: _Study, step: int, jobs: Sequence[tuple[int, int]]) -> list[_Shot]:
    """Make and score one batch of images."""
    device, precision = study.model.device, study.config.training.precision
    texts = [study.prompts[prompt] for prompt, _ in jobs]
    seeds = [derive(study.seed, prompt, index) for prompt, index in jobs]
    with torch.autocast(device.type, dtype=AUTOCAST[precision], enabled=precision != "no"):
        images = generate(
            study.model, texts, seeds, study.config.sampler, schedule="draft" if step else "base"
        )
        score = study.reward.score(images, texts) if study.reward is not None else None
    rewards = _rewards(score, step, texts) if score is not None else [{} for _ in texts]
    held = {name: rate(images, texts).float().tolist() for name, rate in study.held_out.items()}
    shots = []
    for row, (prompt, index) in enumerate(jobs):
        record = {
            "prompt": texts[row],
            "prompt_index": prompt,
            "index": index,
            "seed": seeds[row],
            "image": f"images/{prompt:03d}-{index:03d}.png",
            **rewards[row],
            "held_out": {name: part[row] for name, part in held.items()},
        }
        shots.append(_Shot(images[row].cpu(), record))
    return shots


def _rewards(score: Score, step: int, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return what each image's row says of its reward."""
    values = score.value.float().tolist()
    if not np.isfinite(values).all():
        raise ValueError(f"at step {step} the rewards of {texts} are {values}; leave the step out")
    parts = {name: part.float().tolist() for name, part in score.parts.items()}
    return [
        {"reward": value, "parts": {name: part[row] for name, part in parts.items()}}
        for row, value in enumerate(values)
    ]


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
