"""Validation: pairs (tuned, base) of fixed prompts and noise, and the loss of held-out images."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.config import TrainConfig
from sfumato.data.sample import Sample
from sfumato.diffusion.randomness import derive
from sfumato.files import new_folder
from sfumato.images import load_images, save_image
from sfumato.models.generate import generate_in_batches
from sfumato.models.model import TextToImageModel
from sfumato.objectives.supervised import Supervised
from sfumato.rewards.reward import Reward
from sfumato.training.distribution import Distribution
from sfumato.training.folder import RunFolder
from sfumato.training.tracking import Trackers

SIDES = ("tuned", "base")


@dataclass(frozen=True)
class Pictures:
    """Images and their rewards, on the CPU."""

    images: Float[Tensor, "b 3 H W"]
    rewards: Float[Tensor, " b"] | None


@dataclass(frozen=True)
class HeldOut:
    """Images with captions whose loss is measured at noise and times that are always the same."""

    objective: Supervised
    samples: Sequence[Sample]


@final
class Validation:
    """Makes the same images at every validation: prompt i always starts from noise i.

    Args:
        prompts: one per image.
        reward: scores them, each with its own prompt, if there is one.
        held_out: what the validation loss is of, if there is one.
    """

    def __init__(
        self,
        config: TrainConfig,
        prompts: Sequence[str],
        reward: Reward | None,
        held_out: HeldOut | None,
        distribution: Distribution,
    ) -> None:
        self._config = config
        self._prompts = list(prompts)
        self._seeds = [derive(config.validation.seed, i) for i in range(len(prompts))]
        self._reward = reward
        self._held_out = held_out
        self._distribution = distribution
        self._base: Pictures | None = None

    def run(
        self, model: TextToImageModel, step: int, folder: RunFolder, trackers: Trackers
    ) -> dict[str, float]:
        """Make and record the pairs; return the mean rewards of both sides, and the loss."""
        metrics = {}
        if self._held_out is not None:
            metrics["validation/loss"] = self._stable_loss(self._held_out, model)
        tuned = self._pictures(model, "draft")
        if self._base is None:
            if model.has_reference:
                self._base = self._pictures(model, "base")
            else:
                self._base = self._first(folder) if step else tuned
        for name, pictures in (("reward", tuned), ("reward_base", self._base)):
            if pictures.rewards is not None:
                metrics[f"validation/{name}"] = pictures.rewards.mean().item()
        with self._distribution.together():
            self._record(folder, step, trackers, tuned)
        return metrics

    def _record(self, folder: RunFolder, step: int, trackers: Trackers, tuned: Pictures) -> None:
        """Write the pairs and show them, on the main process."""
        assert self._base is not None
        if self._distribution.is_main:
            records = self._records(tuned)
            self._write(folder, step, tuned, records)
            pairs = torch.cat([tuned.images, self._base.images], dim=3)
            captions = [
                " | ".join(
                    [record["prompt"]]
                    + [f"{k} {record[f'reward_{k}']:.3f}" for k in SIDES if self._reward]
                )
                for record in records
            ]
            trackers.images(step, "validation/tuned_base", pairs, captions)

    def _first(self, folder: RunFolder) -> Pictures:
        """Read the pictures of step 0, when the policy was still the base model.

        Raises:
            ValueError: if they are not there.
        """
        place = folder.samples(0)
        files = [place / f"{i:03d}-base.png" for i in range(len(self._prompts))]
        try:
            rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
            rewards = torch.tensor([row["reward_base"] for row in rows]) if self._reward else None
            return Pictures(load_images(files), rewards)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{place} cannot be read ({error}), and it holds the base model's pictures, to "
                "which validation compares; choose another name for the run (name=...)"
            ) from error

    def _mine(self, total: int) -> list[int]:
        """Return this process's share; all have equally many, as FSDP's exchanges need it."""
        rank, world = self._distribution.rank, self._distribution.world
        return [i % total for i in range(rank, -(-total // world) * world, world)]

    def _stable_loss(self, held_out: HeldOut, model: TextToImageModel) -> float:
        size, samples = self._config.training.micro_batch_size, held_out.samples
        mine = self._mine(len(samples))
        errors: list[float] = []
        with self._distribution.autocast():
            for start in range(0, len(mine), size):
                rows = mine[start : start + size]
                batch = [samples[i] for i in rows]
                seed = self._config.validation.seed
                errors += held_out.objective.stable_errors(model, batch, rows, seed).tolist()
        gathered = dict(self._distribution.gather(list(zip(mine, errors, strict=True))))
        return math.fsum(gathered.values()) / len(gathered)

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
            rewards = self._scores(model, images, prompts, size)
        gathered = self._distribution.gather(list(zip(mine, images, rewards, strict=True)))
        rows = {index: (image, reward) for index, image, reward in gathered}
        return Pictures(
            torch.stack([rows[i][0] for i in range(total)]),
            torch.tensor([rows[i][1] for i in range(total)]) if self._reward else None,
        )

    def _scores(
        self, model: TextToImageModel, images: Tensor, prompts: Sequence[str], size: int
    ) -> list[float]:
        scores: list[float] = []
        for i in range(0, len(prompts), size):
            rows = slice(i, i + size)
            if self._reward is None:
                scores += [math.nan] * len(prompts[rows])
            else:
                scores += self._reward(images[rows].to(model.device), prompts[rows]).tolist()
        return scores

    def _records(self, tuned: Pictures) -> list[dict[str, Any]]:
        assert self._base is not None
        records: list[dict[str, Any]] = []
        for i, prompt in enumerate(self._prompts):
            record = {"index": i, "prompt": prompt, "seed": self._seeds[i]}
            for side, pictures in zip(SIDES, (tuned, self._base), strict=True):
                if pictures.rewards is not None:
                    record[f"reward_{side}"] = pictures.rewards[i].item()
            records.append(record)
        return records

    def _write(
        self, folder: RunFolder, step: int, tuned: Pictures, records: Sequence[dict[str, Any]]
    ) -> None:
        assert self._base is not None
        with new_folder(folder.samples(step)) as place:
            for i in range(len(records)):
                for side, pictures in zip(SIDES, (tuned, self._base), strict=True):
                    save_image(pictures.images[i], place / f"{i:03d}-{side}.png")
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (place / "pairs.jsonl").write_text(lines, encoding="utf-8")
