"""Experiment of the demo: DRaFT and DRaFT+ from one base model, reward against diversity."""

import random
import shutil
from pathlib import Path

import torch

from sfumato.compose import DEMO_MODELS, compose_train
from sfumato.config import TrainConfig
from sfumato.demo.reader import read_attributes
from sfumato.demo.world import SHAPES, partial, random_scene
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

KL_COEFFS = (0.0, 10.0, 40.0)
NUM_PROMPTS = 240  # to train on
KEEP = 0.25  # the chance that a prompt states an attribute
IMAGES_PER_PROMPT = 12  # to evaluate, of one prompt per shape
NOTES = """\
Everything here is small and real: a Stable Diffusion pipeline for 64-pixel pictures of captioned
shapes, and a reward. The reward is a CLIP model trained on pairs that a rule judged (what the
prompt asks for, then warm colors and large shapes), plus some redness of the picture. The held-out
score is the share of pictures that show everything their prompt asks for, according to an attribute
reader that no training uses."""


def write_prompts(seed: int) -> str:
    """Return prompts, one per line, that leave most attributes open, so that diversity can fall."""
    rng = random.Random(f"prompts {seed}")
    lines = [partial(random_scene(rng), rng, KEEP).caption() for _ in range(NUM_PROMPTS)]
    return "\n".join(lines) + "\n"


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
    for kl_coeff in KL_COEFFS:
        name = "draft" if kl_coeff == 0 else f"draft_plus_kl_{kl_coeff:g}"
        overrides = [
            "recipe=demo_draft_plus",
            f"name={name}",
            f"runs_dir={out}",
            f"data.prompts={prompts}",
            f"objective.kl_coeff={kl_coeff}",
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
    """Score the base model and every checkpoint of a run on one open prompt per shape."""
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
        [f"a {shape}" for shape in SHAPES],
        num_images=IMAGES_PER_PROMPT,
        seed=seed,
        batch_size=36,
        features=str(DEMO_MODELS / "text_image"),
        held_out={"attributes": read_attributes},
    )
    evaluate(run, study, [0, *map(step_of, list_checkpoints(run.checkpoints))])
