"""What an evaluation measures, and the settings that its numbers depend on."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.config import SamplerConfig, TrainConfig
from sfumato.evaluation.manifest import surroundings
from sfumato.models.model import TextToImageModel
from sfumato.rewards.reward import Reward
from sfumato.run.identity import typed

IMAGES = "images"
HeldOut = Callable[[Tensor, Sequence[str]], Tensor]
NOT_OF_IMAGES = ("training_steps", "training_spacing", "prompt_cache")  # of a sampler's settings
NEWER = ("solver", "guidance_interval", "negative_prompt", "scheduler")
# Of a reward's settings, with their defaults; evaluations of older versions lack them.
ADDED: Sequence[tuple[str, Any]] = (("score", "model"), ("sizes", []))
OF_TRAINING = ("crop",)  # of a reward's settings: no evaluation depends on them


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

    def pictures(self, folder: Path) -> dict[str, list[Path]]:
        """Return the pictures of each prompt in the folder of a step.

        Raises:
            ValueError: one is gone.
        """
        found: dict[str, list[Path]] = {prompt: [] for prompt in self.prompts}
        for prompt, index in self.jobs:
            name = picture_name(prompt, index)
            if not (folder / name).is_file():
                raise ValueError(f"{folder} lacks {name}; remove {folder} and evaluate again")
            found[self.prompts[prompt]].append(folder / name)
        return found

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
            **surroundings(),
        }
        rewards = {n: asdict(v) for n, v in config.validation.rewards.items() if n in self.held_out}
        if rewards:  # evaluations of older versions have none
            plain["rewards"] = _by_content(rewards, "validation.rewards.", self.contents)
        if "model.pretrained" in self.contents:
            plain["pretrained"] = "by content"
        return json.loads(json.dumps(plain))


def picture_name(prompt: int, index: int) -> str:
    """Return the path of an image below the folder of its step."""
    return f"{IMAGES}/{prompt:03d}-{index:03d}.png"


def _of_images(sampler: SamplerConfig) -> dict[str, Any]:
    """Return the settings of a sampler that images depend on.

    Newer ones are left out at their default: evaluations of older versions lack them.
    """
    default = vars(SamplerConfig())
    return {
        key: value
        for key, value in vars(sampler).items()
        if key not in NOT_OF_IMAGES and not (key in NEWER and value in (default[key], ""))
    }


def _by_content(
    settings: Mapping[str, Any], prefix: str, contents: Mapping[str, str]
) -> dict[str, Any]:
    """Return settings without paths whose content is known, `ADDED` and `OF_TRAINING`."""
    return {
        key: _by_content(value, f"{prefix}{key}.", contents)
        if isinstance(value, dict)
        else ("by content" if typed(f"{prefix}{key}") in contents else value)
        for key, value in settings.items()
        if (key, value) not in ADDED and (key not in OF_TRAINING or isinstance(value, dict))
    }
