"""Validation: pairs (tuned, base) of fixed prompts and noise, and the loss of held-out rows."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.config import TrainConfig
from sfumato.data.sample import Preference, Sample
from sfumato.diffusion.randomness import derive
from sfumato.files import new_folder
from sfumato.images import load_images, save_image
from sfumato.models.generate import generate_in_batches
from sfumato.models.model import TextToImageModel
from sfumato.objectives.objective import StableLoss
from sfumato.rewards.reward import Reward, score_rows
from sfumato.training.distribution import Distribution
from sfumato.training.folder import RunFolder, json_lines, read_rows
from sfumato.training.gauges import diversity
from sfumato.training.guards import DIVERSITY
from sfumato.training.module import Trainee
from sfumato.training.tracking import Trackers

SIDES, PAIRS = ("tuned", "base"), "pairs.jsonl"
_OLDER = (PAIRS, PAIRS, *(f"[0-9]*-{side}.png" for side in SIDES))


@dataclass(frozen=True)
class Pictures:
    """Images and their rewards, on the CPU."""

    images: Float[Tensor, "b 3 H W"]
    rewards: Mapping[str, Float[Tensor, " b"]]  # by metric; NaN where a reward gives no number


@dataclass(frozen=True)
class HeldOut:
    """Images or pairs, whose loss is always measured at the same noise and times."""

    objective: StableLoss
    samples: Sequence[Sample] | Sequence[Preference]


@final
class Validation:
    """Maker of the same images at every validation: prompt i always starts from noise i.

    Args:
        prompts: one per image; without any, no image is made.
        reward: scores each image with its own prompt; None leaves scores out.
        held_out: samples of the validation loss; None leaves the loss out.
        rewards: score the images too, by name; no training sees them.
        gauges: of reward hacking, by name; with any, the images' diversity is measured too.
    """

    def __init__(
        self,
        config: TrainConfig,
        prompts: Sequence[str],
        reward: Reward | None,
        held_out: HeldOut | None,
        distribution: Distribution,
        rewards: Mapping[str, Reward] = MappingProxyType({}),
        gauges: Mapping[str, Reward] = MappingProxyType({}),
    ) -> None:
        self._config = config
        self._prompts = list(prompts)
        self._seeds = [derive(config.validation.seed, i) for i in range(len(prompts))]
        trained = {} if reward is None else {"reward": reward}
        self._rewards = trained | {f"held_out/{name}": each for name, each in rewards.items()}
        self._rewards |= {f"gauge/{name}": each for name, each in gauges.items()}
        self._gauged = bool(gauges)
        self._held_out = held_out
        self._distribution = distribution
        self._base: Pictures | None = None

    def run(
        self, model: Trainee, step: int, folder: RunFolder, trackers: Trackers
    ) -> dict[str, float]:
        """Make and record the pairs; return the mean rewards of both sides, and the loss."""
        metrics = {}
        if self._held_out is not None:
            metrics |= self._stable_metrics(self._held_out, model)
        if not self._prompts:
            return metrics
        assert isinstance(model, TextToImageModel), "nothing else makes pictures of prompts"
        tuned = self._pictures(model, "draft")
        if self._base is None:
            if model.has_reference:
                self._base = self._pictures(model, "base")
            else:
                self._base = self._first(folder) if step else tuned
        for end, pictures in (("", tuned), ("_base", self._base)):
            for name, values in pictures.rewards.items():
                if not values.isnan().all():
                    metrics[f"validation/{_named(name, end)}"] = values.nanmean().item()
            spread = diversity(pictures.images, self._prompts) if self._gauged else None
            if spread is not None:
                metrics[f"validation/gauge{end}/{DIVERSITY}"] = spread
        with self._distribution.together():
            if self._distribution.is_main:
                self._record(folder.samples(step), step, trackers, (tuned, self._base))
        return metrics

    def _record(
        self, path: Path, step: int, trackers: Trackers, sides: tuple[Pictures, Pictures]
    ) -> None:
        records: list[dict[str, Any]] = []
        for i, prompt in enumerate(self._prompts):
            records.append({"index": i, "prompt": prompt, "seed": self._seeds[i]})
            for end, side in zip(SIDES, sides, strict=True):
                for name, values in side.rewards.items():
                    if values[i].isfinite():
                        records[i][_named(name, f"_{end}")] = values[i].item()
        with new_folder(path, older=_OLDER) as folder:
            for name, side in zip(SIDES, sides, strict=True):
                for i, image in enumerate(side.images):
                    save_image(image, folder / f"{i:03d}-{name}.png")
            (folder / PAIRS).write_text(json_lines(records), encoding="utf-8")
        scores = [
            [f"{k} {row[f'reward_{k}']:.3f}" for k in SIDES if f"reward_{k}" in row]
            for row in records
        ]
        captions = [" | ".join([p, *own]) for p, own in zip(self._prompts, scores, strict=True)]
        images = torch.cat([side.images for side in sides], dim=3)
        trackers.images(step, "validation/tuned_base", images, captions)

    def _first(self, folder: RunFolder) -> Pictures:
        """Read the pictures of step 0, when the policy was still the base model.

        Raises:
            ValueError: if they are missing or damaged.
        """
        path = folder.samples(0)
        files = [path / f"{i:03d}-base.png" for i in range(len(self._prompts))]
        try:
            rows = read_rows(path / PAIRS)
            rewards = {
                name: torch.tensor([row.get(_named(name, "_base"), math.nan) for row in rows])
                for name in self._rewards
            }
            if len(rows) != len(files):
                raise ValueError(f"{PAIRS} has {len(rows)} rows instead of {len(files)}")
            return Pictures(load_images(files), rewards)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}); validation needs the base model's pictures in "
                "it; choose another name for the run (name=...)"
            ) from error

    def _mine(self, total: int) -> list[int]:
        """Return this process's share; all have equally many, as FSDP's exchanges need it."""
        rank, world = self._distribution.rank, self._distribution.world
        return [i % total for i in range(rank, -(-total // world) * world, world)]

    def _stable_metrics(self, held_out: HeldOut, model: Trainee) -> dict[str, float]:
        size, samples = self._config.training.micro_batch_size, held_out.samples
        mine = self._mine(len(samples))
        measured: list[dict[str, list[float]]] = []
        with self._distribution.autocast():
            for start in range(0, len(mine), size):
                rows = mine[start : start + size]
                batch: Any = [samples[i] for i in rows]
                seed = self._config.validation.seed
                found = held_out.objective.stable_metrics(model, batch, rows, seed)
                measured.append({name: values.tolist() for name, values in found.items()})
        metrics = {}
        for name in measured[0]:
            values = [value for each in measured for value in each[name]]
            gathered = dict(self._distribution.gather(list(zip(mine, values, strict=True))))
            known = [v for v in gathered.values() if name == "loss" or not math.isnan(v)]
            if known:
                metrics[f"validation/{name}"] = math.fsum(known) / len(known)
        return metrics

    @torch.no_grad()
    def _pictures(self, model: TextToImageModel, schedule: str) -> Pictures:
        """Make this process's share, and return all."""
        total = len(self._prompts)
        mine = self._mine(total)
        prompts = [self._prompts[i] for i in mine]
        seeds = [self._seeds[i] for i in mine]
        size = self._config.training.micro_batch_size
        with self._distribution.autocast():
            images = generate_in_batches(
                model, prompts, seeds, self._config.sampler, size, schedule=schedule
            )
            rewards = [
                self._scores(name, reward, model, images, prompts, size)
                for name, reward in self._rewards.items()
            ]
        gathered = self._distribution.gather(list(zip(mine, images, *rewards, strict=True)))
        rows = {index: (image, values) for index, image, *values in gathered}
        return Pictures(
            torch.stack([rows[i][0] for i in range(total)]),
            {
                name: torch.tensor([rows[i][1][k] for i in range(total)])
                for k, name in enumerate(self._rewards)
            },
        )

    def _scores(
        self,
        name: str,
        reward: Reward,
        model: TextToImageModel,
        images: Tensor,
        prompts: Sequence[str],
        size: int,
    ) -> list[float]:
        scores: list[dict[str, float]] = []
        faults: list[Exception] = []
        for i in range(0, len(prompts), size):
            rows = slice(i, i + size)
            scores += score_rows(reward, images[rows].to(model.device), prompts[rows], faults)
        values = [score.get("reward", math.nan) for score in scores]
        if lost := sum(not math.isfinite(value) for value in values):
            why = [*faults, "they are NaN or infinite"][0]
            whose = "" if name == "reward" else f" of {name}"
            warnings.warn(
                f"validation leaves out {lost} of {len(values)} rewards{whose}: {why}", stacklevel=2
            )
        return [value if math.isfinite(value) else math.nan for value in values]


def _named(name: str, end: str) -> str:
    """Return reward + end, held_out + end/NAME, or gauge + end/NAME."""
    kind, slash, rest = name.partition("/")
    return f"{kind}{end}{slash}{rest}"
