"""Images of one evaluated step: made once each, by any number of processes, kept through a kill.

Batch k of the step holds the same images however many processes there are, so the files are the
same too: rounding may differ between batches of other sizes. A process writes the pictures of a
batch and then their rows; who goes on leaves out the batches that have rows.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.diffusion.randomness import derive
from sfumato.evaluation.diversity import Distance
from sfumato.evaluation.results import LAYOUTS, OLDER, SCORES, SUMMARY, Variant
from sfumato.evaluation.study import IMAGES, Study, picture_name
from sfumato.files import (
    new_folder,
    parse_object,
    read_bytes,
    remove_folder,
    write_text,
    writing,
)
from sfumato.images import load_images, save_image
from sfumato.models.generate import generate
from sfumato.rewards.reward import Score
from sfumato.training.distribution import AUTOCAST, Group
from sfumato.training.folder import json_lines, read_rows

ROWS, FACTS = "rows", "facts.json"
Job = tuple[int, int]  # prompt and index of an image


@dataclass(frozen=True)
class Making:
    """One step of a study, as it is made.

    Attributes:
        folder: where the result goes.
        facts: what the result depends on; unfinished pictures of other facts are made again.
    """

    study: Study
    step: int
    variant: Variant
    folder: Path
    distance: Distance
    facts: Mapping[str, Any]
    group: Group

    @property
    def unfinished(self) -> Path:
        """Return the folder of the pictures that are made, beside the result."""
        return self.folder.with_name(f".{self.folder.name}.unfinished")

    def make(self) -> Iterator[int]:
        """Make what is missing and publish it; yield numbers of images as they are there.

        Raises:
            ValueError: on every process, if one cannot make, score or write its images.
        """
        with self.group.together():
            missing = self._begin() if self.group.is_main else []
        (missing,) = self.group.gather([missing] if self.group.is_main else [])
        yield len(self.study.jobs) - sum(map(len, missing))
        for start in range(0, len(missing), self.group.world):
            batches = missing[start : start + self.group.world]
            with self.group.together():
                for jobs in batches[self.group.rank : self.group.rank + 1]:
                    self._make_batch(jobs)
            yield sum(map(len, batches))
        with self.group.together():
            rows = self._read()
        with self.group.together():
            diversity = self._diversity(rows)
        diversity = dict(self.group.gather(diversity))
        with self.group.together():
            if self.group.is_main:
                self._publish(rows, [diversity[i] for i in sorted(diversity)])

    def _begin(self) -> list[list[Job]]:
        """Prepare the unfinished folder; return the batches that it lacks."""
        folder, jobs = self.unfinished, self.study.jobs
        facts = json.loads(json.dumps(self.facts))
        if not self._goes_on(facts):
            if folder.is_symlink():
                folder.unlink()
            shutil.rmtree(folder, ignore_errors=True)
            for name in (IMAGES, ROWS):
                (folder / name).mkdir(parents=True)
            write_text(folder / FACTS, json.dumps(facts) + "\n")
        there = {_job(row) for row in self._rows() if _is_whole(folder / row["image"])}
        size = self.study.batch_size
        batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
        missing = [[job for job in batch if job not in there] for batch in batches]
        return [batch for batch in missing if batch]

    def _goes_on(self, facts: Mapping[str, Any]) -> bool:
        """Say whether the unfinished folder holds a part of this very result.

        A run may come from a stranger: a folder with links is none of ours.
        """
        folder = self.unfinished
        if not (folder / FACTS).is_file() or folder.is_symlink():
            return False
        if any(path.is_symlink() for path in folder.rglob("*")):
            return False
        return parse_object(read_bytes(folder / FACTS, f"remove {folder}")) == facts

    def _rows(self) -> list[dict[str, Any]]:
        """Return the rows of batches that are made; what damage left of a row is none."""
        files = sorted((self.unfinished / ROWS).glob("*.jsonl"))
        found = [row for file in files for row in read_rows(file)]
        expected = {picture_name(*job): job for job in self.study.jobs}
        return [row for row in found if expected.get(str(row.get("image"))) == _job(row)]

    def _make_batch(self, jobs: Sequence[Job]) -> None:
        images, rows = _generate_batch(self.study, self.step, self.variant.schedule, jobs)
        with writing(self.unfinished):
            for image, row in zip(images, rows, strict=True):
                save_image(image, self.unfinished / row["image"])
        name = Path(rows[0]["image"]).stem
        write_text(self.unfinished / ROWS / f"{name}.jsonl", json_lines(rows))

    def _read(self) -> list[dict[str, Any]]:
        """Return the row of each image."""
        rows = {_job(row): row for row in self._rows()}
        if lost := [job for job in self.study.jobs if job not in rows]:
            raise ValueError(
                f"{self.unfinished} lacks {len(lost)} of {len(self.study.jobs)} pictures that "
                "other processes made; the run folder must lie where all processes write"
            )
        return [rows[job] for job in self.study.jobs]

    def _diversity(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
        """Return prompts of this process, and their diversity, of the pictures as written."""
        each, study = self.study.num_images, self.study
        found = []
        for prompt in range(self.group.rank, len(study.prompts), self.group.world):
            mine = rows[prompt * each : (prompt + 1) * each]
            images = load_images([self.unfinished / row["image"] for row in mine])
            found.append((prompt, self.distance.mean(images.to(study.model.device))))
        return found

    def _publish(self, rows: Sequence[Mapping[str, Any]], diversity: Sequence[float]) -> None:
        """Write the result; a kill on the way leaves the unfinished pictures as they are."""
        summary = {
            "step": self.step,
            **_means(rows, self.study.num_images),
            "diversity": {
                "label": self.distance.label,
                "mean": float(np.mean(diversity)),
                "per_prompt": diversity,
            },
            **self.facts,
        }
        for layout in (self.folder / LAYOUTS).glob("[!.]*"):  # of pictures that are replaced
            remove_folder(layout)
        with new_folder(self.folder, older=OLDER) as folder:
            (folder / IMAGES).mkdir()
            for row in rows:
                link(self.unfinished / row["image"], folder / row["image"])
            (folder / SCORES).write_text(json_lines(rows), encoding="utf-8")
            (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(self.unfinished, ignore_errors=True)


def _is_whole(picture: Path) -> bool:
    """Say whether a picture is there; a loss of power leaves an empty file."""
    return picture.is_file() and picture.stat().st_size > 0


def _job(row: Mapping[str, Any]) -> Job:
    return row.get("prompt_index", -1), row.get("index", -1)


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has one name for each."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@torch.no_grad()
def _generate_batch(
    study: Study, step: int, schedule: str, jobs: Sequence[Job]
) -> tuple[Float[Tensor, "b 3 H W"], list[dict[str, Any]]]:
    """Return a batch of images on the CPU, and their rows of scores.jsonl."""
    device, dtype = study.model.device, AUTOCAST.get(study.config.training.precision)
    texts = [study.prompts[prompt] for prompt, _ in jobs]
    seeds = [derive(study.seed, prompt, index) for prompt, index in jobs]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        images = generate(
            study.model,
            texts,
            seeds,
            study.config.sampler,
            schedule=schedule if step else "base",
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
            "image": picture_name(prompt, index),
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
        {"reward": value, "parts": {n: p[row] for n, p in parts.items() if np.isfinite(p[row])}}
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
