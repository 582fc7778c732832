"""The demo world: its pictures can be read, its judge follows its rule, its recipes run."""

import random
from pathlib import Path

import pytest
import torch
from runs import start
from safetensors import safe_open

from sfumato.cli import run_command
from sfumato.compose import DEMO_MODELS, compose_command, compose_train
from sfumato.config import ModelConfig, TrainConfig
from sfumato.demo import experiment, rebuild
from sfumato.demo.experiment import write_prompts
from sfumato.demo.preference import judge, judged_value, vary
from sfumato.demo.reader import read_attributes, read_image
from sfumato.demo.world import Scene, parse_caption, partial, random_scene, render
from sfumato.launch.jobs import read_jobs
from sfumato.models.formats import read_model_index
from sfumato.models.generate import generate_in_batches
from sfumato.models.registry import load_model
from sfumato.preparation.prepare import prepare
from sfumato.rewards.clip import ClipReward
from sfumato.training.loop import Outcome

MEGABYTE = 2**20


def test_the_reader_is_right_on_rendered_pictures() -> None:
    rng = random.Random(1)
    scenes = [random_scene(rng) for _ in range(400)]
    seen = [read_image(image) for image in render(scenes, rng)]
    assert sum(want == found for want, found in zip(scenes, seen, strict=True)) >= 396


def test_the_reader_sees_nothing_in_pictures_of_nothing() -> None:
    assert read_image(torch.full((3, 64, 64), 0.5)) is None
    assert read_image(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))) is None


def test_accuracy_counts_only_what_was_asked() -> None:
    rng = random.Random(2)
    scene = Scene("ring", "red", "large", "white", "in the center")
    image = render([scene], rng)
    asked = ["a ring", "a red ring", "a large ring on a white background", "a blue ring", "a star"]
    right = read_attributes(image.expand(5, -1, -1, -1), asked)
    assert right.tolist() == [1, 1, 1, 0, 0]


def test_captions_say_the_scene_and_are_read_back() -> None:
    assert Scene("star").caption() == "a star"
    ring = Scene("ring", "red", "small", "yellow")
    assert ring.caption() == "a small red ring on a yellow background"
    rng = random.Random(3)
    for _ in range(200):
        scene = random_scene(rng)
        for one in (scene, partial(scene, rng)):
            assert parse_caption(one.caption()) == one
    with pytest.raises(ValueError, match="names no shape"):
        parse_caption("a lion")


def test_a_scene_with_an_open_attribute_is_not_painted() -> None:
    with pytest.raises(ValueError, match="leaves an attribute open"):
        render([Scene("star")], random.Random(0))


def test_the_judge_wants_what_was_asked_then_warm_and_large() -> None:
    asked = Scene("star")
    warm = Scene("star", "red", "large", "white", "at the top")
    cold = Scene("star", "blue", "small", "white", "at the top")
    wrong = Scene("ring", "red", "large", "white", "at the top")
    assert judged_value(asked, warm) == (1, 4)
    assert judged_value(asked, cold) == (1, 0)
    assert judged_value(asked, wrong) == (0, 4)
    labels = judge([asked] * 3, [warm, wrong, cold], [cold, cold, cold])
    assert labels.tolist() == [[1, 0], [0, 1], [0.5, 0.5]]


def test_prompts_of_the_demo_belong_to_its_world() -> None:
    text = write_prompts(0)
    assert text == write_prompts(0) != write_prompts(1)
    assert all(parse_caption(line).shape for line in text.splitlines())


def test_the_shipped_models_are_small_safe_and_load() -> None:
    files = [file for file in DEMO_MODELS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 25 * MEGABYTE
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".txt"}
    assert [file for file in files if file.suffix == ".json" and '": "/' in file.read_text()] == []
    assert read_model_index(DEMO_MODELS / "base")["_class_name"] == "StableDiffusionPipeline"
    reward = ClipReward.from_pretrained(str(DEMO_MODELS / "reward"))
    rng = random.Random(0)
    warm, cold = (
        render([Scene("star", *attributes, "white", "in the center")] * 20, rng)
        for attributes in (("red", "large"), ("blue", "small"))
    )
    asked = ["a star"] * 20
    assert reward(warm, asked).mean() > reward(cold, asked).mean()
    with safe_open(DEMO_MODELS / "base" / "text_encoder" / "model.safetensors", "pt") as weights:
        assert all(name.startswith("text_model.") for name in weights.keys())  # noqa: SIM118


def test_the_shipped_reward_judges_as_the_rule_does() -> None:
    reward = ClipReward.from_pretrained(str(DEMO_MODELS / "reward"))
    rng = random.Random(0)
    star, ring = (
        render([Scene(shape, "blue", "large", "white", "in the center")] * 20, rng)
        for shape in ("star", "ring")
    )
    assert reward(star, ["a star"] * 20).mean() > reward(ring, ["a star"] * 20).mean()
    assert reward(ring, ["a ring"] * 20).mean() > reward(star, ["a ring"] * 20).mean()
    firsts = [random_scene(rng) for _ in range(300)]
    seconds = [vary(scene, rng) for scene in firsts]
    asked = [partial(one, rng, 0.3) for one in firsts]
    captions = [scene.caption() for scene in asked]
    a, b = (reward(render(side, rng), captions) for side in (firsts, seconds))
    labels = judge(asked, firsts, seconds)[:, 0]
    agreed = ((a > b) == (labels > 0.5))[labels != 0.5]
    assert agreed.float().mean() > 0.8


def test_the_shipped_model_paints_what_complete_prompts_ask_for() -> None:
    config, _ = compose_train(["recipe=demo_draft_plus", "data.prompts=none"])
    rng = random.Random("paint")
    scenes = [random_scene(rng) for _ in range(32)]
    captions = [scene.caption() for scene in scenes]
    model = load_model(config.model)
    images = generate_in_batches(model, captions, list(range(32)), config.sampler, 32)
    seen = [read_image(image) for image in images]
    assert sum(want == found for want, found in zip(scenes, seen, strict=True)) / 32 >= 0.85


def test_the_recipe_of_the_demo_composes() -> None:
    config, plain = compose_train(["recipe=demo_draft_plus", "data.prompts=x.txt"])
    assert config.model.pretrained == str(DEMO_MODELS / "base")
    assert plain["reward"]["parts"]["preference"]["pretrained"] == str(DEMO_MODELS / "reward")


def test_every_stage_of_the_rebuild_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["autoencoder", "text_image", "reward", "text", "decoder", "base_32", "base_64"]
    settings, _ = compose_command(
        "launch",
        [
            "recipe=ladder/demo",
            f"given.out={tmp_path}",
            "given.pictures=80",
            "given.pairs=60",
            *(f"given.steps.{name}=1" for name in names),
        ],
    )
    for job in read_jobs(settings):
        match job.command:
            case "demo":
                rebuild_by_cli(*job.arguments)
            case "prepare":
                prepare(job.settings)
            case "train":
                is_model = "recipe=demo_reward_pairs" not in job.arguments
                few = ["validation.num_images=1"] if is_model else []
                assert start([*job.arguments, *few]).step == 1
    shapes = {name for name in rebuild.STAGES if not name.startswith("emoji")}
    assert {path.name for path in (tmp_path / "parts").glob("[!.]*")} == shapes
    model = tmp_path / "model"
    assert {path.name for path in model.glob("[!.]*")} == {"base", "reward", "text_image"}
    shipped = {str(p.relative_to(DEMO_MODELS)) for p in DEMO_MODELS.rglob("*") if p.is_file()}
    assert {str(p.relative_to(model)) for p in model.rglob("*") if p.is_file()} >= shipped
    load_model(ModelConfig(pretrained=str(model / "base")))
    capsys.readouterr()
    rebuild_by_cli(f"--rebuild={tmp_path}", "--stage=text", "--count=1")
    assert capsys.readouterr().out == "text: done before\n"
    with pytest.raises(SystemExit):
        rebuild_by_cli(f"--rebuild={tmp_path}", "--stage=text", "--count=2")
    assert "was made with --count=1, not --count=2" in capsys.readouterr().err


def rebuild_by_cli(*arguments: str) -> None:
    run_command(["demo", *arguments])


def test_an_unknown_stage_of_the_rebuild_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        rebuild_by_cli(f"--rebuild={tmp_path}", "--stage=tex")
    assert "--stage tex is unknown; choose one of tokenizer," in capsys.readouterr().err


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
