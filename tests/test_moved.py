"""Runs that have moved: paths from where a run was started, files named anew, their content."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import command, fork, start
from safetensors.torch import load_file, save_file
from tiny_clip import write_tiny_clip

from sfumato.compose import compose_command
from sfumato.config import EvaluateConfig, ModelConfig, ModelFiles, RewardFiles, SampleConfig
from sfumato.evaluation import commands
from sfumato.evaluation.commands import evaluate_run, sample_images
from sfumato.evaluation.results import Evaluation
from sfumato.models.model import TextToImageModel
from sfumato.run.identity import read_notes

UNET = "unet/diffusion_pytorch_model.safetensors"
WEIGHTS = ("reward=weighted", "reward.parts.a.kind=clip", "reward.parts.a.weight=1.0")


def change_weights(file: Path) -> None:
    tensors = load_file(file)
    name = min(tensors)
    save_file({**tensors, name: tensors[name] + 1}, file, metadata={"format": "pt"})


def train(folder: Path, *more: str) -> None:
    """Train runs/run in a folder, from there, with relative paths."""
    overrides = command(folder, "run", "runs_dir=runs", "data.prompts=prompts.txt", *more)
    chosen = [text for text in overrides if not text.startswith("model.trainable")]
    if any(text.startswith("reward=w") for text in more):
        chosen = [text for text in chosen if text != "reward.color=red"]
    here = Path.cwd()
    os.chdir(folder)
    try:
        start(chosen)
    finally:
        os.chdir(here)


SMALL = ("model.lora.rank=2", "validation.every_steps=0", "training.max_steps=1")
SMALL += ("validation.num_images=1", "model.pretrained=sd")


@pytest.fixture(scope="module")
def whole(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, a reward and a run of both, trained from there."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(sd_folder, folder / "sd")
    write_tiny_clip(folder / "clip")
    train(folder, *SMALL, "reward=clip", "reward.pretrained=clip")
    return folder


@pytest.fixture
def place(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder, as if the run had been trained there."""
    folder = tmp_path / "place"
    shutil.copytree(whole, folder)
    notes = folder / "runs" / "run" / "contents.json"
    notes.write_text(notes.read_text().replace(str(whole), str(folder)))
    return folder


def evaluate(folder: Path, **settings: Any) -> list[Evaluation]:
    run = str(folder / "runs" / "run")
    return list(evaluate_run(EvaluateConfig(run=run, num_images=2, **settings)))


def sample(folder: Path, **settings: Any) -> dict[str, Any]:
    out = folder / "samples"
    sampled = {"prompt": "a", "num_images": 1, "out": str(out), **settings}
    sample_images(SampleConfig(run=str(folder / "runs" / "run"), **sampled))
    newest = max(out.rglob("sample.json"), key=lambda file: file.stat().st_mtime_ns)
    return json.loads(newest.read_text())["000-00.png"]


def test_relative_paths_lead_from_where_the_run_was_started(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere" / "sd").mkdir(parents=True)  # another folder of the same name
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_notes(place / "runs" / "run").started == str(place)
    note = sample(place)
    assert note["model"] == str(place / "sd")
    first = evaluate(place)
    monkeypatch.chdir(place)
    assert evaluate(place) == first


def test_a_run_of_an_earlier_version_leads_from_here(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "runs" / "run" / "contents.json").unlink()
    monkeypatch.chdir(tmp_path)
    for act in (sample, evaluate):
        with pytest.raises(ValueError, match=r"model\.pretrained = 'sd': no such folder"):
            act(place)
    monkeypatch.chdir(place)
    assert sample(place)["model"] == "sd"


def test_a_whole_project_that_moved_is_found_from_its_top(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = place.rename(tmp_path / "moved")
    monkeypatch.chdir(moved)
    assert sample(moved)["model"] == "sd"


def test_files_that_moved_are_named_anew(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = evaluate(place)
    summary = place / "runs" / "run" / "evaluation" / "step-000001" / "summary.json"
    written = summary.stat().st_mtime_ns
    model, reward = place / "models" / "sd", place / "models" / "clip"
    model.parent.mkdir()
    (place / "sd").rename(model)
    (place / "clip").rename(reward)
    named = {"model": ModelFiles(str(model)), "reward": RewardFiles(str(reward))}
    with pytest.raises(ValueError, match=r"model\.pretrained = 'sd'"):
        evaluate(place)
    with pytest.raises(ValueError, match=r"reward\.pretrained = 'clip'"):
        evaluate(place, model=named["model"])
    assert evaluate(place, **named) == first
    assert summary.stat().st_mtime_ns == written  # the same content: nothing is measured anew
    assert sample(place, model=named["model"])["model"] == str(model)
    assert "other files" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "file", "acts"),
    [
        ("model.pretrained", UNET, (sample, evaluate)),
        ("model.pretrained", "scheduler/scheduler_config.json", (sample, evaluate)),
        ("reward.pretrained", "model.safetensors", (evaluate,)),
        ("reward.pretrained", "preprocessor_config.json", (evaluate,)),
    ],
)
def test_other_content_is_refused_unless_it_is_allowed(
    place: Path, key: str, file: str, acts: tuple[Callable[..., Any], ...]
) -> None:
    room = key.partition(".")[0]
    other = place / "other"
    (place / {"model": "sd", "reward": "clip"}[room]).rename(other)
    if file.endswith(".json"):
        (other / file).write_text((other / file).read_text() + " ")
    else:
        change_weights(other / file)
    files = ModelFiles(str(other)) if room == "model" else RewardFiles(str(other))
    for act in acts:
        with pytest.raises(ValueError, match=rf"{key} = '.*other': .*allow_changed=\[{key}\]"):
            act(place, **{room: files})
        assert act(place, **{room: files}, allow_changed=[key])


@pytest.mark.parametrize("key", ["nonsense", "model.lora.rank", "reward.parts.a.pretrained"])
@pytest.mark.parametrize("act", [sample, evaluate])
def test_only_files_that_the_run_names_may_have_changed(
    place: Path, act: Callable[..., Any], key: str
) -> None:
    known = "model.pretrained, reward.pretrained, data.prompts"
    with pytest.raises(ValueError, match=rf"allow_changed has '{key}', .* choose among {known}$"):
        act(place, allow_changed=["model.pretrained", key])


def test_what_changed_in_place_is_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sample(place)["contents"]["model.pretrained"]
    assert capsys.readouterr().err.count("other files") == 0
    change_weights(place / "sd" / UNET)
    assert sample(place)["contents"]["model.pretrained"] != before
    assert "began with other files than those that lie now at model.pretrained" in (
        capsys.readouterr().err
    )
    sample(place, allow_changed=["model.pretrained"])
    assert "other files" not in capsys.readouterr().err


def test_parts_of_a_reward_and_merged_files_are_named_anew(place: Path) -> None:
    lora = place / "runs" / "run" / "export" / "lora"
    shutil.copytree(lora, place / "lora")
    shutil.rmtree(place / "runs")
    train(place, *SMALL, *WEIGHTS, "reward.parts.a.pretrained=clip", "model.merge.x.path=lora")
    for name in ("sd", "clip", "lora"):
        (place / name).rename(place / f"new_{name}")
    overrides = [f"run={place / 'runs' / 'run'}", f"model.pretrained={place / 'new_sd'}"]
    overrides += [f"reward.parts.a.pretrained={place / 'new_clip'}", "num_images=2"]
    with pytest.raises(ValueError, match=r"model\.merge\.x\.path"):
        evaluate_run(compose_command("evaluate", overrides)[0])
    overrides.append(f"model.merge.x.path={place / 'new_lora'}")
    found = evaluate_run(compose_command("evaluate", overrides)[0])
    assert [one.step for one in found] == [0, 1]


@pytest.mark.parametrize(
    "key", ["model.autoencoder", "model.merge.x.path", "reward.parts.a.pretrained"]
)
def test_what_a_run_has_not_cannot_be_named(place: Path, key: str) -> None:
    asked, _ = compose_command("evaluate", [f"run={place / 'runs' / 'run'}", f"{key}=A"])
    with pytest.raises(ValueError, match=rf"{key}='A' .* name no files by {key}"):
        evaluate_run(asked)


def test_half_precision_copies_are_found(place: Path) -> None:
    for file in (place / "sd").rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    with pytest.raises(ValueError, match=r"set model\.variant=fp16"):
        sample(place)
    changed = {"allow_changed": ["model.pretrained"]}  # other names are other content
    assert sample(place, model=ModelFiles(variant="fp16"), **changed)
    out = str(place / "pretrained")
    asked = SampleConfig(pretrained=str(place / "sd"), prompt="a", num_images=1, out=out)
    with pytest.raises(ValueError, match=r"set model\.variant=fp16"):
        sample_images(asked)
    asked.model.variant = "fp16"
    sample_images(asked)
    assert (place / "pretrained" / "000-00.png").is_file()


@pytest.mark.parametrize("override", ["model.pretrained=A", "allow_changed=[model.pretrained]"])
def test_settings_of_a_run_need_a_run(override: str) -> None:
    with pytest.raises(ValueError, match=rf"{override.partition('=')[0]}=.* has no effect"):
        compose_command("sample", ["pretrained=A", "prompt=a", override])


def test_a_script_is_told_of_settings_of_a_run() -> None:
    asked = SampleConfig(pretrained="A", prompt="a", allow_changed=["model.pretrained"])
    with pytest.raises(ValueError, match=r"allow_changed=.* has no effect"):
        sample_images(asked)


def test_a_run_that_may_only_be_read_is_sampled_and_shown(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(place)
    run = place / "runs" / "run"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    (place / "sd").rename(place / "moved")
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(run)))
    model = ModelFiles(str(place / "moved"))
    assert sample(place, model=model)
    assert evaluate(place, model=model) == first
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_run_goes_on_from_another_folder(place: Path) -> None:
    (place / "sub").mkdir()
    moved = {"model.pretrained": "../sd", "reward.pretrained": "../clip"}
    moved |= {"data.prompts": "../prompts.txt", "runs_dir": "../runs"}
    settings = [text for text in SMALL if not text.startswith(tuple(moved))]
    settings = [text for text in settings if not text.startswith("training.max_steps")]
    train(
        place / "sub",
        *settings,
        "training.max_steps=2",
        "reward=clip",
        *(f"{key}={value}" for key, value in moved.items()),
    )
    assert read_notes(place / "runs" / "run").started == str(place / "sub")
    assert sample(place)["step"] == 2


# Two at once


def test_a_second_evaluation_is_refused_before_it_loads_weights(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    (loading, loads), (released, release) = os.pipe(), os.pipe()
    load_model = commands.load_model

    def load_later(settings: ModelConfig) -> TextToImageModel:
        os.write(loads, b"x")
        os.read(released, 1)
        return load_model(settings)

    def load_never(*_: object) -> TextToImageModel:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(commands, "load_model", load_later)
    first = fork(lambda: evaluate(place))
    os.read(loading, 1)
    for name in ("load_model", "build_scorer"):
        monkeypatch.setattr(commands, name, load_never)
    with pytest.raises(ValueError, match=r"another sfumato evaluate works on .*run; wait for it"):
        evaluate(place)
    os.write(release, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == 0
    monkeypatch.undo()
    monkeypatch.chdir(place)
    steps = place / "runs" / "run" / "evaluation"
    written = [file.stat().st_mtime_ns for file in steps.rglob("summary.json")]
    assert [one.step for one in evaluate(place)] == [0, 1]
    assert [file.stat().st_mtime_ns for file in steps.rglob("summary.json")] == written


# Folders of the user


@pytest.mark.parametrize("theirs", ["config.yaml", "metrics.jsonl"])
@pytest.mark.parametrize("beside", ["notes.txt", "checkpoints/last.ckpt"])
def test_a_folder_of_the_user_is_not_trained_into(place: Path, theirs: str, beside: str) -> None:
    folder = place / "runs" / "run"
    shutil.rmtree(folder)
    for name in (theirs, beside):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine: 1\n")
    with pytest.raises(ValueError, match=rf"run/{theirs} is in the way, and Sfumato did not"):
        train(place, *SMALL, "reward=color")
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == {theirs, beside, ".lock"}
    assert (folder / theirs).read_text() == "mine: 1\n"


@pytest.mark.parametrize("kept", ["run.json", "checkpoints"])
def test_a_run_of_an_earlier_version_goes_on(place: Path, kept: str) -> None:
    folder = place / "runs" / "run"
    (folder / "contents.json").unlink()
    if kept != "run.json":
        (folder / "run.json").unlink()
    more = [text for text in SMALL if not text.startswith("training.max_steps")]
    train(place, *more, "training.max_steps=2", "reward=clip", "reward.pretrained=clip")
    assert sample(place)["step"] == 2
