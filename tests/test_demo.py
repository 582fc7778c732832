"""The demo's files: small, safe and licensed; its prompts and recipes go with its models."""

import random
from pathlib import Path

import pytest
import torch
from demo_packages import check_sums, files_of
from safetensors import safe_open
from transformers import CLIPTokenizer

from sfumato.cli import run_command
from sfumato.compose import DEMO_IMAGES, DEMO_MODELS, compose_train
from sfumato.config import TrainConfig
from sfumato.demo import experiment
from sfumato.demo.classifier import LABELS, WEIGHTS
from sfumato.demo.experiment import ASKED, PROMPTS, RUNS, write_prompts
from sfumato.demo.images import NEW_NAMES
from sfumato.demo.packages import Package
from sfumato.demo.pictures import (
    BACKGROUNDS,
    KEYWORDS,
    KINDS,
    LICENSES,
    STYLES,
    THINGS,
    Emoji,
    caption,
    phrase,
)
from sfumato.demo.rebuild import SHIP, STAGES, SUMS
from sfumato.demo.tokenizer import TEXT_LENGTH
from sfumato.models.formats import read_model_index
from sfumato.models.generate import generate_in_batches
from sfumato.models.registry import load_model
from sfumato.rewards.classifier import ClassifierReward
from sfumato.rewards.clip import ClipReward
from sfumato.training.loop import Outcome

MEGABYTE = 2**20
RIGHT = 0.6  # the least share of right pictures; .75 were right
PACKAGES = (*STYLES.values(), KEYWORDS, WEIGHTS, LABELS)


@pytest.fixture(scope="module")
def classifier() -> ClassifierReward:
    return ClassifierReward.from_pretrained(str(DEMO_MODELS / "classifier"), None)


def complete(name: str, style: str, background: str) -> str:
    """Return the caption that says all of a picture."""
    return caption(Emoji(style, name, (), ""), background, random.Random(0))["text"]


# --- What is shipped


def test_the_shipped_models_are_small_and_safe() -> None:
    files = [DEMO_MODELS / name for name in files_of(DEMO_MODELS)]
    assert {path.parts[0] for path in map(Path, files_of(DEMO_MODELS))} == {
        *("base", "classifier", "text_image", SUMS)
    }
    assert sum(file.stat().st_size for file in files) <= 32 * MEGABYTE
    assert {file.suffix for file in files if file.name != SUMS} <= {".json", ".safetensors", ".txt"}
    assert [file for file in files if file.suffix == ".json" and '": "/' in file.read_text()] == []
    with safe_open(DEMO_MODELS / "base" / "text_encoder" / "model.safetensors", "pt") as weights:
        assert all(name.startswith("text_model.") for name in weights.keys())  # noqa: SIM118


def test_the_sums_are_those_of_the_shipped_models() -> None:
    check_sums(DEMO_MODELS)


def test_the_shipped_models_load(classifier: ClassifierReward) -> None:
    assert read_model_index(DEMO_MODELS / "base")["_class_name"] == "StableDiffusionPipeline"
    load_model(compose_train(["recipe=demo_draft_plus"])[0].model)
    clip = ClipReward.from_pretrained(str(DEMO_MODELS / "text_image"))
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for reward in (classifier, clip):
        assert reward(pictures, ["a zebra", "a teapot"]).isfinite().all()


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_the_licence_of_each_package_is_shipped(package: Package) -> None:
    text = (DEMO_MODELS.parent / "LICENSES.md").read_text(encoding="utf-8")
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in text.splitlines()]
    found = [row for row in rows if package.name in row]
    assert [row[3:5] for row in found] == [[package.version, package.license]]
    assert package.license in LICENSES
    part = text.partition(f"\n## {package.license}\n")[2].partition("\n## ")[0]
    assert f"`{package.name}`" in part
    assert "CC-BY-SA" not in text


# --- Prompts and captions


def test_the_prompts_are_those_of_the_demo() -> None:
    text = (DEMO_IMAGES / "prompts.txt").read_text(encoding="utf-8")
    assert text == write_prompts(0) != write_prompts(1)
    assert sorted(text.splitlines()) == sorted(PROMPTS)


def test_things_are_labels_of_the_classifier(classifier: ClassifierReward) -> None:
    for name in THINGS:
        assert classifier.named(phrase(name)) == classifier.texts[name.replace("-", " ")]


@pytest.mark.parametrize("kind", ASKED)
def test_a_kind_is_all_labels_of_its_things(classifier: ClassifierReward, kind: str) -> None:
    labels = {i for name in KINDS[kind] for i in classifier.texts[name.replace("-", " ")]}
    assert set(classifier.named(phrase(kind))) == labels


def test_captions_fit_the_text_encoder() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(DEMO_MODELS / "base" / "tokenizer")
    captions = [
        complete(name, style, background)
        for name in (*THINGS, *NEW_NAMES)
        for style in STYLES
        for background in BACKGROUNDS
    ]
    assert max(map(len, tokenizer(captions).input_ids)) <= TEXT_LENGTH


@torch.no_grad()
def test_the_shipped_model_draws_what_complete_prompts_ask_for() -> None:
    config, _ = compose_train(["recipe=demo_draft_plus"])
    rng = random.Random("draw")
    names = rng.sample(THINGS, 32)
    shown = [(rng.choice(list(STYLES)), rng.choice(list(BACKGROUNDS))) for _ in names]
    prompts = [complete(name, *one) for name, one in zip(names, shown, strict=True)]
    model = load_model(config.model)
    pictures = generate_in_batches(model, prompts, list(range(32)), config.sampler, 32)
    judge = ClipReward.from_pretrained(str(DEMO_MODELS / "text_image"))
    seen = judge.image_features(pictures)
    right = 0
    for name, one, features in zip(names, shown, seen, strict=True):
        choices = judge.text_features([complete(thing, *one) for thing in THINGS])
        right += THINGS[int((choices @ features).argmax())] == name
    assert right / 32 >= RIGHT


# --- Recipes and commands


def test_the_recipe_of_the_demo_composes() -> None:
    config, plain = compose_train(["recipe=demo_draft_plus", "data.prompts=x.txt"])
    assert config.model.pretrained == str(DEMO_MODELS / "base")
    assert plain["reward"]["parts"]["classifier"]["pretrained"] == str(DEMO_MODELS / "classifier")
    judges = {name: one["pretrained"] for name, one in plain["validation"]["rewards"].items()}
    assert judges == {
        "classifier_at_160": str(DEMO_MODELS / "classifier"),
        "text_image": str(DEMO_MODELS / "text_image"),
    }


def test_the_runs_of_the_demo_differ_in_the_objective_alone() -> None:
    composed = {name: compose_train(settings)[0] for name, settings in RUNS.items()}
    first = composed["draft"]
    for config in composed.values():
        assert (config.model, config.sampler, config.reward, config.optimizer) == (
            *(first.model, first.sampler, first.reward, first.optimizer),
        )
        assert (config.training, config.validation) == (first.training, first.validation)
    assert len({repr(config.objective) for config in composed.values()}) == len(RUNS)


def test_an_unknown_stage_of_the_rebuild_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_command(["demo", f"--rebuild={tmp_path}", "--stage=tex"])
    choices = ", ".join([*STAGES, SHIP])
    assert f"--stage tex is unknown; choose one of {choices}" in capsys.readouterr().err


def test_a_signal_stops_the_demo_and_a_folder_holds_one_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []

    def stopped(config: TrainConfig, plain: object, distribution: object) -> Outcome:
        calls.append((config.name, config.runs_dir))
        return Outcome(step=3, stopped_by="SIGTERM")

    monkeypatch.setattr(experiment, "train", stopped)
    out = tmp_path / "it's, my (1) runs"
    assert experiment.run_demo(out) is None
    assert calls == [("draft", str(out))]
    with pytest.raises(ValueError, match="demo of another seed; give another folder, --out DIR"):
        experiment.run_demo(out, seed=1)
