"""Training of a reward on pairs: transformers' own scores, whole runs, exports, refusals."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import assert_explained
from runs import (
    assert_same_state,
    in_child,
    in_processes,
    kill,
    last_state,
    metrics,
    on_call,
    start,
)
from test_dpo import coloured
from test_methods import assert_same_run
from test_pairs import as_files, rows_of, write_jsonl, write_parquet
from tiny_clip import IMAGE_SIZE, write_tiny_clip
from torch import Tensor

from sfumato.cli import run_command
from sfumato.compose import compose_command, compose_train
from sfumato.config import ClipRewardConfig, RewardPairsConfig
from sfumato.data.sample import Preference, Sample
from sfumato.diffusion.randomness import Rng
from sfumato.objectives.reward_pairs import RewardPairs
from sfumato.planning.plan import make_plan
from sfumato.rewards.build import build_learner
from sfumato.rewards.clip import ClipReward
from sfumato.rewards.learning_clip import LearningClip
from sfumato.rewards.reward import LearningReward

LABELS = [1.0, 0.0, 0.5, 0.75]
SIZE = IMAGE_SIZE


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "start"
    write_tiny_clip(folder)
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("pairs") / "pairs.parquet", rows_of(9))


def pair(first: Tensor, second: Tensor, label: float, caption: str = "a star") -> Preference:
    one, other = (Sample(image, caption, (SIZE, SIZE), (0, 0), "p") for image in (first, second))
    return Preference(one, other, label)


def pictured(labels: Sequence[float], dtype: torch.dtype = torch.float32) -> list[Preference]:
    images = Rng(range(2 * len(labels))).normal(3, SIZE, SIZE).mul(0.3).clamp(-1, 1).to(dtype)
    captions = ["a red ring", "a star", "a red ring", "a blue cross"]
    return [
        pair(images[2 * i], images[2 * i + 1], label, captions[i % 4])
        for i, label in enumerate(labels)
    ]


def learner(folder: Path, **settings: Any) -> LearningClip:
    config = ClipRewardConfig(pretrained=str(folder), **settings)
    return build_learner(config, start_scale=None)


class Stated(LearningReward):
    """A reward of stated scores, (2, b)."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    @property
    def device(self) -> torch.device:
        return self.scores.device

    def compare(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert len(images) == 2 * len(prompts)
        return self.scores


# --- The formula


def test_the_loss_is_that_of_the_formula() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, -1.0], [0.5, 4.0, 2.0, 1.0]], dtype=torch.float64)
    pairs = pictured(LABELS)
    found = RewardPairs().stable_metrics(Stated(scores), pairs, range(4), 0)
    for i, y in enumerate(LABELS):
        lead = float(scores[0, i] - scores[1, i])
        p = 1 / (1 + math.exp(-lead))
        entropy = -sum(q * math.log(q) for q in (y, 1 - y) if q)
        cross = -y * math.log(p) - (1 - y) * math.log(1 - p)
        assert float(found["loss"][i]) == pytest.approx(cross - entropy, abs=1e-12)
        assert float(found["margin"][i]) == pytest.approx((2 * y - 1) * lead, abs=1e-12)
    # Right, right, no answer to a tie, wrong.
    assert found["accuracy"][[0, 1, 3]].tolist() == [1.0, 1.0, 0.0]
    assert found["accuracy"][2].isnan()
    whole = RewardPairs().loss(Stated(scores), pairs, Rng([0] * 4))
    assert float(whole.value) == pytest.approx(float(found["loss"].mean()))
    assert whole.partial["accuracy"].tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("scores", "label", "loss"),
    [
        ([0.0, 0.0], 1.0, math.log(2)),
        ([0.0, 0.0], 0.5, 0.0),
        ([800.0, 0.0], 1.0, 0.0),
        ([800.0, 0.0], 0.0, 800.0),
    ],
)
def test_known_scores_have_known_losses(scores: list[float], label: float, loss: float) -> None:
    stated = Stated(torch.tensor(scores, dtype=torch.float64)[:, None])
    found = RewardPairs().loss(stated, pictured([label]), Rng([0]))
    assert float(found.value) == pytest.approx(loss, abs=1e-12)


def test_equal_scores_are_half_right_and_only_ties_have_no_accuracy() -> None:
    even = Stated(torch.zeros(2, 1))
    assert RewardPairs().loss(even, pictured([1.0]), Rng([0])).partial["accuracy"].tolist() == [
        0.5,
        1.0,
    ]
    assert RewardPairs().loss(even, pictured([0.5]), Rng([0])).partial["accuracy"].tolist() == [
        0.0,
        0.0,
    ]


def test_loss_and_gradient_are_those_of_transformers_own_logits(clip: Path) -> None:
    """float64: CLIPModel's logits_per_text, its processor and tokenizer, cross-entropy by torch."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model = learner(clip)
    model.trained.double()
    pairs = pictured(LABELS, torch.float64)
    found = RewardPairs().loss(model, pairs, Rng([0] * 4)).value
    found.backward()
    theirs: Any = CLIPModel.from_pretrained(clip).double()
    settings: Any = CLIPImageProcessorPil.from_pretrained(clip)
    mean, std = (
        torch.tensor(v, dtype=torch.float64)[:, None, None]
        for v in (settings.image_mean, settings.image_std)
    )
    captions = [p.first.caption for p in pairs]
    tokens = CLIPTokenizer.from_pretrained(clip)(captions, padding=True, return_tensors="pt")
    images: Any = torch.stack([p.first.image for p in pairs] + [p.second.image for p in pairs])  # type: ignore[arg-type]
    logits = theirs(**tokens, pixel_values=((images + 1) / 2 - mean) / std).logits_per_text
    rewards = torch.stack([logits[:, :4].diagonal(), logits[:, 4:].diagonal()], 1)
    labels = torch.tensor([[y, 1 - y] for y in LABELS]).double()
    entropy = torch.special.entr(labels).sum(1)
    expected = (
        torch.nn.functional.cross_entropy(rewards, labels, reduction="none") - entropy
    ).mean()
    expected.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    gradients = dict(theirs.named_parameters())
    assert model.trainable().keys() == {f"reward.model.{name}" for name in gradients}
    for name, parameter in model.trainable().items():
        assert parameter.grad is not None
        other: Any = gradients[name.removeprefix("reward.model.")].grad
        torch.testing.assert_close(parameter.grad, other.view_as(parameter), atol=1e-9, rtol=1e-7)
    scale = model.trainable()["reward.model.logit_scale"].grad
    assert scale is not None
    assert float(scale.abs()) > 1e-6


def test_the_gradient_is_that_of_finite_differences(clip: Path) -> None:
    model = learner(clip)
    model.trained.double()
    pairs, objective = pictured(LABELS, torch.float64), RewardPairs()
    objective.loss(model, pairs, Rng([0] * 4)).value.backward()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.trainable().items():
        assert parameter.grad is not None
        step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-5 * step
                losses.append(float(objective.loss(model, pairs, Rng([0] * 4)).value))
                parameter -= sign * 1e-5 * step
        numeric = (losses[0] - losses[1]) / 2e-5
        assert float((parameter.grad * step).sum()) == pytest.approx(numeric, rel=1e-5, abs=1e-7), (
            name
        )


def test_a_trained_reward_scores_as_the_reward_does(clip: Path) -> None:
    """Two batches at once, each against the same prompts."""
    images, prompts = torch.rand(6, 3, 48, 40), ["a star", "a red ring", "a star"]
    reward = ClipReward.from_pretrained(str(clip))
    expected = torch.stack([reward(images[:3], prompts), reward(images[3:], prompts)])
    torch.testing.assert_close(learner(clip).compare(images, prompts), expected)


def test_checkpointing_changes_neither_gradients_nor_names(clip: Path) -> None:
    found = []
    for checkpointing in (False, True):
        model = learner(clip, gradient_checkpointing=checkpointing)
        RewardPairs().loss(model, pictured(LABELS), Rng([0] * 4)).value.backward()
        found.append({name: p.grad for name, p in model.trainable().items()})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name])


def test_autocast_reaches_a_reward_that_is_trained(clip: Path) -> None:
    """A frozen reward is computed in float32 under any autocast."""
    images, prompts = torch.rand(2, 3, SIZE, SIZE), ["a star", "a ring"]
    model, frozen = learner(clip), ClipReward.from_pretrained(str(clip))
    plain = model.compare(images, prompts)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model.compare(images, prompts)[0]
        torch.testing.assert_close(frozen(images, prompts), plain, atol=1e-5, rtol=0)
    assert rounded.dtype == torch.float32
    difference = (rounded - plain).detach().abs().max()
    assert 0 < float(difference) < 0.05 * float(plain.detach().abs().max())


# --- Whole runs


def command(folder: Path, name: str, table: Path, clip: Path, *more: str) -> list[str]:
    settings = [
        f"runs_dir={folder}",
        f"name={name}",
        "objective=reward_pairs",
        "reward=clip",
        f"reward.pretrained={clip}",
        f"data.pairs.path={table}",
        "data.pairs.ties=keep",
        "data.pairs.flip=true",
        "data.pairs.workers=1",
        f"sampler.height={SIZE}",
        f"sampler.width={SIZE}",
        "training.micro_batch_size=2",
        "training.global_batch_size=4",
        "training.max_steps=4",
        "training.checkpoint_every_steps=2",
        "training.keep_checkpoints=null",
        "training.tensorboard=false",
        "training.async_checkpoints=false",
        "validation.every_steps=2",
        "validation.loss_images=5",
        "optimizer.lr=1e-3",
        "optimizer.eps=1e-4",
        "optimizer.warmup_steps=0",
        *more,
    ]
    return list({text.partition("=")[0]: text for text in settings}.values())


@pytest.mark.parametrize("victim", ["take_step", "CheckpointWriter.write"])
def test_a_killed_run_goes_on_bitwise(tmp_path: Path, table: Path, clip: Path, victim: str) -> None:
    start(command(tmp_path, "whole", table, clip))
    again = command(tmp_path, "run", table, clip)

    def die() -> None:
        on_call(2 if victim == "CheckpointWriter.write" else 4, kill, victim)
        start(again)

    assert in_child(die) == -9
    start(again)
    assert_same_state(tmp_path / "run", tmp_path / "whole")
    rows = [row for row in metrics(tmp_path / "whole") if "validation/loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert len({row["validation/loss"] for row in rows}) == 3
    # Pair 4 of the five is a tie.
    right = 4 * rows[-1]["validation/accuracy"]
    assert right == pytest.approx(round(right))
    assert not (tmp_path / "whole" / "samples").exists()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_are_one(tmp_path: Path, table: Path, clip: Path, strategy: str) -> None:
    start(command(tmp_path, "one", table, clip))
    two = command(tmp_path, "two", table, clip, f"training.strategy={strategy}")
    in_processes(2, lambda _: start(two))
    assert_same_run(tmp_path / "two", tmp_path / "one", 4)


def test_the_export_is_a_reward_and_a_model_of_transformers(
    tmp_path: Path, table: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import CLIPModel, CLIPProcessor

    start(command(tmp_path, "run", table, clip, "objective.start_scale=30"))
    folder = tmp_path / "run" / "export" / "reward"
    assert f"{folder} (verified: reward=clip gives the same scores" in capsys.readouterr().out
    trained, state = learner(clip), last_state(tmp_path / "run")
    for name, parameter in trained.trainable().items():
        parameter.data.copy_(state.ema[name])
    before, reward = (ClipReward.from_pretrained(str(each)) for each in (clip, folder))
    images, prompts = torch.rand(3, 3, 70, 52), ["a star", "a red ring", "a star"]
    with torch.no_grad():
        ours, theirs_before, expected = (
            reward(images, prompts),
            before(images, prompts),
            trained.compare(images, prompts)[0],
        )
    torch.testing.assert_close(ours, expected, atol=0, rtol=1e-6)
    assert float((ours - theirs_before).abs().max()) > 1e-3
    assert reward.image_settings == before.image_settings
    assert reward.scale == pytest.approx(30, rel=0.02)
    assert reward.scale != 30
    # As transformers' user loads it.
    theirs: Any = CLIPModel.from_pretrained(folder)
    processor: Any = CLIPProcessor.from_pretrained(folder)
    square = torch.rand(2, 3, SIZE, SIZE).mul(255).round().to(torch.uint8)
    inputs = processor(text=prompts[:2], images=list(square), return_tensors="pt", padding=True)
    scores = theirs(**inputs).logits_per_image.diagonal()
    torch.testing.assert_close(reward(square / 255, prompts[:2]), scores, atol=1e-4, rtol=1e-4)
    # As a next training takes it.
    config, _ = compose_train(command(tmp_path, "next", table, folder))
    assert isinstance(config.reward, ClipRewardConfig)
    assert build_learner(config.reward, start_scale=None).trainable().keys() == state.ema.keys()


def test_a_preference_is_learned_and_holds_for_other_pairs(tmp_path: Path, clip: Path) -> None:
    pairs = write_parquet(tmp_path / "a.parquet", coloured(16, 0))
    held_out = write_parquet(tmp_path / "b.parquet", coloured(8, 100))
    more = [f"validation.pairs.path={held_out}", "training.max_steps=30", "data.pairs.flip=false"]
    more += ["validation.every_steps=15", "training.ema_decay=null", "export=best"]
    start(command(tmp_path, "run", pairs, clip, *more))
    found = [row for row in metrics(tmp_path / "run") if "validation/loss" in row]
    assert found[-1]["validation/accuracy"] == 1.0
    assert found[-1]["validation/loss"] < 0.5 * found[0]["validation/loss"]
    assert found[-1]["validation/margin"] > found[0]["validation/margin"]
    assert metrics(tmp_path / "run")[-1]["accuracy"] == 1.0
    note = json.loads((tmp_path / "run" / "export.json").read_text())
    best = min(found, key=lambda row: row["validation/loss"])
    assert note["step"] == best["step"]


def test_a_run_with_ties_alone_has_no_accuracy(tmp_path: Path, clip: Path) -> None:
    rows = [{**row, "label_0": 0.5, "label_1": 0.5} for row in rows_of(6)]
    table = write_jsonl(tmp_path / "metadata.jsonl", as_files(tmp_path, rows))
    start(command(tmp_path, "run", table, clip, "training.max_steps=2"))
    for row in metrics(tmp_path / "run"):
        assert not [name for name in row if name.endswith("accuracy")]
        assert row.get("loss", 0) >= 0


def test_other_settings_have_a_way_on(tmp_path: Path, table: Path, clip: Path) -> None:
    given = command(tmp_path, "run", table, clip, "verify=false", "training.max_steps=1")
    start(given)
    other = [text for text in given if not text.startswith("optimizer.lr")]
    way = rf"optimizer\.lr.* name=\.\.\. reward\.pretrained={tmp_path}/run/export/reward"
    with pytest.raises(ValueError, match=way):
        start([*other, "optimizer.lr=1e-2"])


def test_a_run_continues_with_its_own_reward_alone(tmp_path: Path, table: Path, clip: Path) -> None:
    other = tmp_path / "other"
    write_tiny_clip(other)
    given = command(tmp_path, "run", table, other, "verify=false")
    start(given)
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    weights["logit_scale"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"began with other files .* at reward\.pretrained"):
        start([text for text in given if "max_steps" not in text] + ["training.max_steps=6"])


# --- Recipes, settings and commands


def test_the_recipe_is_pickscores() -> None:
    config, _ = compose_train(["recipe=reward_pairs", "data.pairs.path=P"])
    assert config.objective == RewardPairsConfig()
    assert (config.optimizer.lr, config.optimizer.warmup_steps) == (3e-6, 500)
    assert (config.training.global_batch_size, config.training.max_steps) == (128, 4000)
    assert (config.data.pairs.ties, config.validation.pairs.ties) == ("keep", "drop")


@pytest.mark.parametrize("command", ["train", "plan"])
def test_the_recipe_sets_nothing_in_vain(command: str) -> None:
    from sfumato.conditions import unread

    settings, _ = compose_command(command, ["recipe=reward_pairs", "data.pairs.path=P"])
    assert unread(settings) == {}


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("reward=color", "reward", "color"),
        ("reward=none", "reward", "none"),
        ("reward=jpeg", "reward", "jpeg"),
        ("reward.dtype=bfloat16", "reward.dtype", "bfloat16"),
        ("reward.dtype=float16", "reward.dtype", "float16"),
        ("objective.start_scale=0", "objective.start_scale", 0),
        ("objective.start_scale=-3", "objective.start_scale", -3),
        ("model.trainable=full", "model.trainable", "full"),
        ("model.pretrained=M", "model.pretrained", "M"),
        ("sampler.eta=1", "sampler.eta", 1),
        ("validation.num_images=3", "validation.num_images", 3),
        ("validation.prompts=x.txt", "validation.prompts", "x.txt"),
        ("data.pairs.cache=auto", "data.pairs.cache", "auto"),
        ("training.compile=full", "training.compile", "full"),
    ],
)
def test_what_a_reward_cannot_use_is_refused(override: str, key: str, value: object) -> None:
    given = {"objective": "reward_pairs", "data.pairs.path": "P"}
    if not override.startswith("reward="):
        given |= {"reward": "clip", "reward.pretrained": "R"}
    given |= dict([override.split("=")])
    with pytest.raises(ValueError) as caught:
        compose_train([f"{name}={text}" for name, text in given.items()])
    assert_explained(str(caught.value), key, value)


def test_a_reward_is_not_planned() -> None:
    config, _ = compose_command("plan", ["recipe=reward_pairs", "data.pairs.path=P"])
    with pytest.raises(ValueError, match="objective=reward_pairs trains rewards, and sfumato plan"):
        make_plan(config)


@pytest.mark.parametrize("asked", ["sample", "evaluate"])
def test_a_run_of_a_reward_makes_no_images(
    tmp_path: Path, table: Path, clip: Path, asked: str, capsys: pytest.CaptureFixture[str]
) -> None:
    start(command(tmp_path, "run", table, clip, "training.max_steps=1", "verify=false"))
    given = ["prompt=a star", f"out={tmp_path / 'out'}"] if asked == "sample" else []
    with pytest.raises(SystemExit):
        run_command([asked, f"run={tmp_path / 'run'}", *given])
    said = capsys.readouterr().err
    assert "trained a reward, which makes no images" in said
    assert f"reward.pretrained={tmp_path / 'run' / 'export' / 'reward'}" in said
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_run_of_a_reward_is_reported(tmp_path: Path, table: Path, clip: Path) -> None:
    start(command(tmp_path, "run", table, clip, "verify=false"))
    page = tmp_path / "page.html"
    run_command(["report", str(tmp_path / "run"), "--out", str(page)])
    assert "reward_pairs" in page.read_text()
