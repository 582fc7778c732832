"""Experiment of the demo: DRaFT and DRaFT+ from one base model, reward against diversity."""

import random
import shutil
from pathlib import Path

import torch

from sfumato.compose import DEMO_MODELS, compose_train
from sfumato.config import TrainConfig
from sfumato.demo.pictures import phrase
from sfumato.evaluation.evaluate import evaluate, hold
from sfumato.evaluation.results import OLDER
from sfumato.evaluation.study import Study
from sfumato.files import RECORD, new_folder, write_text
from sfumato.models.registry import load_model
from sfumato.report.report import refuse_other, write_report
from sfumato.rewards.build import build_reward
from sfumato.run.run import train
from sfumato.training.checkpoint import list_checkpoints, step_of
from sfumato.training.distribution import Distribution
from sfumato.training.folder import RunFolder

RUNS: dict[str, tuple[str, ...]] = {
    "draft": ("recipe=demo_draft_plus", "objective.kl_coeff=0"),
    "draft_plus_kl_100": ("recipe=demo_draft_plus", "objective.kl_coeff=100"),
    "draft_plus_kl_300": ("recipe=demo_draft_plus", "objective.kl_coeff=300"),
    "flowbp_sparse": (
        "recipe=demo_reward",
        "method=flowbp_sparse",
        "objective.kl_coeff=50",
        "objective.weights=sigma",
        "sampler.training_steps=4",
    ),
}
# A kind leaves open which thing is drawn, so a model can lose things (LOG.md).
ASKED = ("vehicle", "instrument", "toy", "device", "tool")  # to train on and to evaluate
PROMPTS = tuple(map(phrase, ASKED))
IMAGES_PER_PROMPT = 12  # to evaluate
NOTES = """\
Everything here is small and real: a Stable Diffusion pipeline that draws emoji of 64 pixels in four
styles, and as the reward log p of the kind of thing that the prompt names, by EfficientNet-lite0, a
published network of ImageNet, at two sizes of the picture. No reward sees the two judges:
classifier_at_160 is the same network at another size, and text_image is a small CLIP model that
was trained on emoji."""


def write_prompts(seed: int) -> str:
    """Return PROMPTS in an order of the seed, one per line."""
    prompts = list(PROMPTS)
    random.Random(f"prompts {seed}").shuffle(prompts)
    return "".join(f"{prompt}\n" for prompt in prompts)


def run_demo(out: Path, *, seed: int = 0) -> Path | None:
    """Train, evaluate and report; return the report, or None if a signal stopped the training.

    The same call continues a stopped demo.

    Raises:
        ValueError: if the shipped models are missing, or `out` holds the demo of another seed.
    """
    if not (DEMO_MODELS / "base" / "model_index.json").exists():
        raise ValueError(
            f"the demo's models are not in {DEMO_MODELS}; install the whole package, or rebuild "
            "them with `sfumato demo --rebuild`"
        )
    page = out / "report.html"
    refuse_other(page)
    prompts = out / "prompts.txt"
    text = write_prompts(seed)
    if prompts.exists() and prompts.read_text(encoding="utf-8") != text:
        raise ValueError(f"{out} holds the demo of another seed; give another folder, --out DIR")
    write_text(prompts, text)
    runs = []
    for name, settings in RUNS.items():
        overrides = [
            *settings,
            f"name={name}",
            f"runs_dir={out}",
            f"data.prompts={prompts}",
            f"training.seed={seed}",
        ]
        config, plain = compose_train(overrides)
        outcome = train(config, plain, Distribution(config.training))
        if outcome.stopped_by is not None:
            return None
        runs.append(RunFolder(out / name))
        evaluate_demo(config, runs[-1], base=runs[0], seed=seed)
    report = write_report(runs, page, title="Sfumato demo", notes=NOTES)
    print(f"\nreport: {report}")
    return report


def evaluate_demo(config: TrainConfig, run: RunFolder, *, base: RunFolder, seed: int) -> None:
    """Score the base model and every checkpoint of a run on PROMPTS."""
    if run != base:  # every run has the same base model
        with hold(run), new_folder(run.evaluation(0), older=OLDER) as folder:
            leave = shutil.ignore_patterns(RECORD)
            shutil.copytree(base.evaluation(0), folder, dirs_exist_ok=True, ignore=leave)
    model = load_model(config.model)
    reward = build_reward(config.reward)
    torch.manual_seed(seed)
    study = Study(
        model,
        config,
        reward,
        PROMPTS,
        num_images=IMAGES_PER_PROMPT,
        seed=seed,
        batch_size=32,
        features=str(DEMO_MODELS / "text_image"),
        held_out={name: build_reward(one) for name, one in config.validation.rewards.items()},
    )
    evaluate(run, study, [0, *map(step_of, list_checkpoints(run.checkpoints))])
