"""Files of rewards with weights: a run trains on them, knows them again, and no others."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from runs import command, start
from safetensors.torch import load_file, save_file
from tiny_aesthetic import write_head, write_tiny_siglip
from tiny_classifiers import write_classifier
from tiny_clip import write_tiny_clip

from sfumato.compose import compose_command
from sfumato.config import EvaluateConfig, PlanConfig
from sfumato.config.commands import RewardFiles
from sfumato.evaluation.commands import evaluate_run
from sfumato.launch.jobs import read_jobs
from sfumato.planning.blueprint import read_blueprint

SMALL = ("model.lora.rank=2", "training.max_steps=2", "validation.num_images=1")


@dataclass(frozen=True)
class Case:
    """A reward with the files that its settings name."""

    settings: tuple[str, ...]
    files: dict[str, str]

    def overrides(self, folder: Path) -> list[str]:
        named = [f"{key}={folder / name}" for key, name in self.files.items()]
        return [*self.settings, *named]


CLIP = Case(("reward=aesthetic",), {"reward.pretrained": "clip", "reward.predictor": "2.pth"})
SIGLIP = Case(
    ("reward=aesthetic", "reward.resize=squash"),
    {"reward.pretrained": "siglip", "reward.predictor": "2.5.pth"},
)
CLASSIFIER = Case(("reward=classifier", "reward.label=tabby"), {"reward.pretrained": "resnet"})
CASES = [CLIP, SIGLIP, CLASSIFIER]
NAMES = ["aesthetic 2", "aesthetic 2.5", "classifier"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_tiny_clip(tmp_path / "clip")
    write_tiny_siglip(tmp_path / "siglip")
    write_classifier(tmp_path / "resnet", "resnet")
    for version in ("2", "2.5"):
        write_head(tmp_path / f"{version}.pth", version)
    return tmp_path


def draft(place: Path, sd_folder: Path, case: Case, *more: str) -> list[str]:
    given = command(place, "run", *SMALL, *case.overrides(place), *more, model=sd_folder)
    return [text for text in given if not text.startswith("reward.color")]


def change_content(path: Path) -> None:
    """Change one number in a file of weights, or in those of a folder."""
    file = path / "model.safetensors" if path.is_dir() else path
    pickled = file.suffix == ".pth"
    tensors = torch.load(file, weights_only=True) if pickled else load_file(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    next(iter(tensors.values())).view(-1)[0] += 1
    if pickled:
        torch.save(tensors, file)
    else:
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_run_goes_on_with_the_same_files_alone(place: Path, sd_folder: Path, case: Case):
    outcome = start(draft(place, sd_folder, case))
    assert outcome.step == 2
    longer = draft(place, sd_folder, case, "training.max_steps=3")
    for key, name in case.files.items():
        kept = place / f"kept-{name}"
        copy = shutil.copytree if (place / name).is_dir() else shutil.copy
        copy(place / name, kept)
        change_content(place / name)
        with pytest.raises(ValueError, match=f"other files .*{key.replace('.', chr(92) + '.')}"):
            start(longer)
        shutil.rmtree(place / name) if kept.is_dir() else (place / name).unlink()
        kept.rename(place / name)
    if case is CLIP:
        with pytest.raises(ValueError, match=r"reward\.resize"):
            start([*longer, "reward.resize=squash"])
    assert start(longer).step == 3


def test_an_evaluation_finds_a_head_that_has_moved(place: Path, sd_folder: Path):
    start(draft(place, sd_folder, CLIP, "training.max_steps=1", "validation.every_steps=0"))
    run = str(place / "run")
    first = evaluate_run(EvaluateConfig(run=run, num_images=2))
    (place / "2.pth").rename(place / "moved.pth")
    with pytest.raises(ValueError, match=r"reward\.predictor = .* there is no file"):
        evaluate_run(EvaluateConfig(run=run, num_images=2))
    moved = RewardFiles(predictor=str(place / "moved.pth"))
    assert evaluate_run(EvaluateConfig(run=run, num_images=2, reward=moved)) == first
    change_content(place / "moved.pth")
    with pytest.raises(ValueError, match=r"allow_changed=\[reward\.predictor\]"):
        evaluate_run(EvaluateConfig(run=run, num_images=2, reward=moved))


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_plan_counts_the_reward_and_reads_none_of_its_weights(
    place: Path, sd_folder: Path, case: Case
):
    (place / case.files["reward.pretrained"] / "model.safetensors").write_bytes(b"damaged")
    given = ["recipe=sd15_draft", f"model.pretrained={sd_folder}"]
    config = compose_command("plan", [*given, *case.overrides(place)])[0]
    assert isinstance(config, PlanConfig)
    reward = read_blueprint(config).frozen["reward"]
    assert sum(parameter.numel() for parameter in reward.parameters()) > 1000
    assert all(parameter.is_meta for parameter in reward.parameters())


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_launch_refuses_files_that_are_not_there(place: Path, sd_folder: Path, case: Case):
    prompts = place / "prompts.txt"
    prompts.write_text("a star\n")
    for key, name in case.files.items():
        here = [f"{k}={place / n}" for k, n in case.files.items() if k != key]
        settings = [*case.settings, *here, f"{key}={place / 'no' / name}"]
        settings += ["recipe=sd15_draft", f"model.pretrained={sd_folder}"]
        settings += [f"data.prompts={prompts}"]
        listed = ", ".join(f"'{text}'" for text in settings)
        config = compose_command("launch", [f"jobs.a={{command: train, settings: [{listed}]}}"])[0]
        with pytest.raises(ValueError, match=f"job a: {key} = .*does not exist"):
            read_jobs(config)
