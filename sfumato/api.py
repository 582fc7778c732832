"""Sfumato for Python: train by recipe, load what was trained, sample, score and evaluate."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.check import check_sampler
from sfumato.compose import compose_command, compose_train
from sfumato.conditions import typed_keys
from sfumato.config import SampleConfig, check_values
from sfumato.diffusion.randomness import derive
from sfumato.evaluation.commands import Opened, default_device, evaluate_run, open_model
from sfumato.evaluation.results import Evaluation
from sfumato.models.generate import generate
from sfumato.rewards.build import build_reward, ready
from sfumato.run import run
from sfumato.training.distribution import Distribution
from sfumato.training.folder import RunFolder


def train(*settings: str) -> RunFolder:
    """Train as `sfumato train` does, in this process, going on where an earlier call stopped.

    Args:
        settings: as typed for the command: `"recipe=demo_finetune", "training.max_steps=20"`.

    Returns:
        The run folder; its `path` and `export` say where the results lie.

    Raises:
        ValueError: naming the setting that cannot be, and what to do.
    """
    config, plain = compose_train(settings)
    distribution = Distribution(config.training)
    try:
        run.train(config, plain, distribution, typed=typed_keys(settings))
    finally:
        distribution.close()
    return RunFolder.of(config)


def load(source: str | Path | RunFolder, *, step: int | str | None = None) -> Opened:
    """Load a model to sample from, on the GPU if there is one.

    Args:
        source: a run folder, a diffusers folder or a hub id.
        step: of a run: number of a checkpoint, or "best"; None is the last.

    Raises:
        ValueError: if there is no such model, or no such checkpoint.
    """
    place = source.path if isinstance(source, RunFolder) else Path(source).expanduser()
    config = SampleConfig(step=None if step is None else str(step))
    if (place / "config.yaml").is_file():
        config.run = str(place)
    elif step is not None:
        raise ValueError(f"{place} is no run folder, so it has no step={step}; leave step out")
    else:
        config.pretrained = str(place)
    opened = open_model(config)
    opened.model.to(default_device())
    return opened


def sample(
    opened: Opened,
    prompts: str | Sequence[str],
    *,
    num_images: int = 1,
    seed: int = 0,
    batch_size: int = 4,
    **sampler: Any,
) -> Float[Tensor, "n 3 h w"]:
    """Return images in [0, 1], `num_images` of each prompt: those of `sfumato sample`.

    Args:
        opened: what `load` returned.
        sampler: settings in place of the run's, such as `num_inference_steps=10`.

    Raises:
        ValueError: naming the setting that cannot be.
    """
    known = vars(opened.sampler)
    for name in sampler:
        if name not in known:
            raise ValueError(f"{name} is no setting of the sampler; there are {', '.join(known)}")
    chosen = replace(opened.sampler, **sampler)
    check_values(chosen, "sampler.")
    check_sampler(chosen)
    if min(num_images, batch_size) < 1:
        raise ValueError(f"num_images={num_images} and batch_size={batch_size} must be 1 or more")
    texts = [prompts] if isinstance(prompts, str) else prompts
    rows = [(text, derive(seed, i)) for text in texts for i in range(num_images)]
    if not rows:
        raise ValueError("prompts=[] is empty; give one or more")
    images: list[Tensor] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        made = generate(opened.model, [t for t, _ in batch], [s for _, s in batch], chosen)
        images += [image.float().clamp(0, 1).cpu() for image in made]
    return torch.stack(images)


@torch.no_grad()
def score(
    images: Float[Tensor, "n 3 h w"], prompts: Sequence[str], *settings: str
) -> Float[Tensor, " n"]:
    """Return the score of each image by a reward.

    Args:
        images: in [0, 1].
        prompts: one for each image.
        settings: as typed for a command: `"reward=clip", "reward.pretrained=DIR"`.

    Raises:
        ValueError: naming the setting that cannot be.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images have {len(prompts)} prompts; give one for each")
    if not any(text.startswith("reward=") for text in settings):
        raise ValueError('no reward is named; give "reward=clip", "reward.pretrained=DIR"')
    config, _ = compose_command("evaluate", ["run=.", *settings])
    check_values(config.reward, "reward.")
    device = default_device()
    reward = ready(build_reward(config.reward), device, dict)
    return reward(images.to(device), prompts).cpu()


def evaluate(*settings: str) -> Sequence[Evaluation]:
    """Evaluate a run as `sfumato evaluate` does, and write the results to its folder.

    Args:
        settings: as typed for the command: `"run=runs/NAME", "num_images=4"`.

    Returns:
        One for each step, the base model first: `reward`, `diversity`, `held_out` and others.

    Raises:
        ValueError: naming the setting that cannot be.
    """
    config, _ = compose_command("evaluate", settings)
    check_values(config)
    return evaluate_run(config)
