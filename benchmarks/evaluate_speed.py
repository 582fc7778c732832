"""The cost of an evaluation beside the bare loop that samples and writes the same pictures.

    python benchmarks/evaluate_speed.py

The demo's network, 4 prompts with 16 images each, batches of 16, one thread. The evaluation has no
reward; it also writes rows, measures diversity by pixels, and publishes the folder. CPU seconds by
turns in one process.
"""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import quiet

from sfumato.compose import compose_train
from sfumato.diffusion.randomness import derive
from sfumato.evaluation.evaluate import evaluate
from sfumato.evaluation.study import Study
from sfumato.images import to_pil
from sfumato.models.generate import generate
from sfumato.models.registry import load_model
from sfumato.training.folder import RunFolder

PROMPTS = ["a zebra", "a balloon", "a teapot", "a violin"]
IMAGES, BATCH, TURNS = 16, 16, 5


def bare(study: Study, folder: Path) -> None:
    """Sample and write the pictures as a script does."""
    for start in range(0, len(study.jobs), BATCH):
        jobs = study.jobs[start : start + BATCH]
        texts = [PROMPTS[prompt] for prompt, _ in jobs]
        seeds = [derive(study.seed, *job) for job in jobs]
        images = generate(study.model, texts, seeds, study.config.sampler, schedule="base")
        for (prompt, index), image in zip(jobs, images, strict=True):
            to_pil(image).save(folder / f"{prompt:03d}-{index:03d}.png")


def main() -> None:
    quiet()
    torch.set_num_threads(1)
    config: Any = compose_train(["recipe=demo_reward"])[0]
    model = load_model(replace(config.model, reference=True))
    study = Study(model, config, None, PROMPTS, IMAGES, 0, BATCH, "pixels")
    ratios = []
    for turn in range(TURNS + 1):
        with tempfile.TemporaryDirectory() as name:
            seconds = {}
            for kind in ("ours", "bare") if turn % 2 else ("bare", "ours"):
                folder = Path(name) / kind
                folder.mkdir()
                started = time.process_time()
                if kind == "ours":
                    evaluate(RunFolder(folder), study, [0])
                else:
                    bare(study, folder)
                seconds[kind] = time.process_time() - started
        if turn:  # the first warms up
            ratios.append(seconds["ours"] / seconds["bare"])
            print(f"ours {seconds['ours']:.2f} s, bare {seconds['bare']:.2f} s", flush=True)
    print(f"ours / bare: {statistics.median(ratios):.3f} of {len(ratios)} pairs")


if __name__ == "__main__":
    main()
