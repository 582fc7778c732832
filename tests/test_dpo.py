"""Diffusion-DPO: closed forms in float64, every family, two processes, and resuming."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import PIXELS, WRITERS
from image_files import encode
from nightly import nightly_but
from PIL import Image
from refusals import assert_explained
from runs import assert_same_state, in_child, in_processes, kill, metrics, on_call, start
from scipy.optimize import approx_fprime
from test_methods import assert_same_run
from test_pairs import as_files, rows_of, write_jsonl, write_parquet
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from toy import use_toy
from vectors import CASES, WIDTH, DoubleRng, VectorModel

from sfumato.compose import compose_command, compose_train
from sfumato.config import DpoConfig, LoraConfig, ModelConfig, SupervisedConfig
from sfumato.data.sample import Preference, Sample
from sfumato.diffusion.randomness import Rng
from sfumato.models.model import TextToImageModel
from sfumato.models.registry import load_model
from sfumato.objectives.dpo import Compared, Dpo
from sfumato.objectives.supervised import Supervised
from sfumato.planning.blueprint import read_blueprint
from sfumato.planning.page import page
from sfumato.planning.plan import cost_of, make_plan
from sfumato.run.build import build_objective
from sfumato.run.open_data import held_out_samples, validation_prompts

BETA, LABELS = 8.0, [1.0, 0.0, 0.5, 0.75]
SEEDS = [11 + i for i in range(len(LABELS))]


def sample_of(image: Tensor, name: str = "picture") -> Sample:
    return Sample(image, "a star", (8, 8), (0, 0), name)


def vectors_of(labels: Sequence[float], *, equal: bool = False) -> list[Preference]:
    """Return pairs whose pictures are three numbers."""
    generator = torch.Generator().manual_seed(5)
    numbers = torch.randn(len(labels), 2, WIDTH, 1, 1, generator=generator, dtype=torch.float64)
    return [
        Preference(sample_of(one), sample_of(one if equal else other), label)
        for (one, other), label in zip(numbers, labels, strict=True)
    ]


def vector_model(kind: str, spread: float = 0.05) -> VectorModel:
    make, prediction_type = CASES[kind]
    return VectorModel(make(), prediction_type, spread=spread)


def dpo(**settings: Any) -> Dpo:
    return Dpo(replace(DpoConfig(beta=BETA), **settings))


def gradient_of(model: Any, value: Tensor) -> Tensor:
    parameters = list(model.trained.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])


# --- The formula


def by_hand(
    model: VectorModel, pairs: Sequence[Preference]
) -> tuple[list[float], list[list[float]]]:
    """Return z and the policy's errors of each pair, one image at a time."""
    odds: list[float] = []
    found: list[list[float]] = []
    for seed, pair in zip(SEEDS, pairs, strict=True):
        rng = DoubleRng([seed])
        for _ in range(2):
            rng.normal(WIDTH, 1, 1)  # the posterior of each image
        noise, t = rng.normal(WIDTH, 1, 1), model.process.on_grid(rng.uniform())
        errors = []
        for network in (model.trained, model.reference):
            for picture in (pair.first, pair.second):
                x0 = picture.pixels[None]
                x_t = model.process.alpha(t) * x0 + model.process.sigma(t) * noise
                raw = network(torch.cat([x_t.flatten(1), t[None].double()], 1))
                target = model.process.target(model.prediction_type, x0, noise, t)
                errors.append((raw - target.flatten(1)).square().sum().item() / WIDTH)
        first, second, first_before, second_before = errors
        odds.append(-BETA / 2 * ((first - first_before) - (second - second_before)))
        found.append([first, second])
    return odds, found


@pytest.mark.parametrize("kind", CASES)
def test_the_loss_and_what_is_reported_are_the_formulas(kind: str) -> None:
    model, pairs = vector_model(kind), vectors_of(LABELS)
    found = dpo().loss(model, pairs, DoubleRng(SEEDS))
    odds, errors = by_hand(model, pairs)
    sigmoid = [1 / (1 + math.exp(-z)) for z in odds]
    losses = [
        -y * math.log(p) - (1 - y) * math.log(1 - p) for y, p in zip(LABELS, sigmoid, strict=True)
    ]
    assert found.value.item() == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert len({round(z, 6) for z in odds}) == 4
    shares = [y if z > 0 else 1 - y for z, y in zip(odds, LABELS, strict=True)]
    margins = [(2 * y - 1) * z for z, y in zip(odds, LABELS, strict=True)]
    first, second = zip(*errors, strict=True)
    preferred = [y * a + (1 - y) * b for y, a, b in zip(LABELS, first, second, strict=True)]
    other = [(1 - y) * a + y * b for y, a, b in zip(LABELS, first, second, strict=True)]
    expected = {
        "loss": losses,
        "accuracy": shares,
        "margin": margins,
        "mse": [(a + b) / 2 for a, b in errors],
        "mse_preferred": preferred,
        "mse_other": other,
    }
    assert found.metrics.keys() == expected.keys()
    assert not any(value.requires_grad for value in found.metrics.values())
    for name, rows in expected.items():
        assert float(found.metrics[name]) == pytest.approx(sum(rows) / 4, rel=1e-6), name


def test_known_errors_give_known_odds() -> None:
    """e = (3, 1) of the policy and (1, 2) of the reference: z = -beta / 2 (2 - -1)."""
    errors = torch.tensor([[3.0], [1.0]])
    gained = errors - torch.tensor([[1.0], [2.0]])
    odds = -0.5 / 2 * (gained[0] - gained[1])
    found = Compared(errors, torch.tensor([1.0]), odds)
    assert float(odds) == -0.75
    assert float(found.loss) == pytest.approx(math.log(1 + math.exp(0.75)))
    assert float(found.accuracy) == 0
    assert float(found.margin) == -0.75
    turned = replace(found, labels=torch.tensor([0.0]))
    assert float(turned.loss) == pytest.approx(math.log(1 + math.exp(-0.75)))
    assert (float(turned.accuracy), float(turned.margin)) == (1.0, 0.75)
    even = replace(found, odds=torch.zeros(1))
    assert (float(even.accuracy), float(even.loss)) == (0.5, pytest.approx(math.log(2)))


@pytest.mark.parametrize("kind", CASES)
def test_equal_pictures_teach_nothing(kind: str) -> None:
    model, pairs = vector_model(kind), vectors_of([1.0, 0.0, 0.5], equal=True)
    found = dpo(sample_latents=False).loss(model, pairs, DoubleRng([1, 2, 3]))
    assert found.value.item() == pytest.approx(math.log(2), abs=1e-12)
    assert abs(float(found.metrics["margin"])) < 1e-12
    assert gradient_of(model, found.value).abs().max() < 1e-12


def test_at_the_start_ties_teach_nothing_and_preferences_do() -> None:
    model = vector_model("flow", spread=0.0)
    tie = dpo().loss(model, vectors_of([0.5, 0.5]), DoubleRng([1, 2]))
    assert tie.value.item() == pytest.approx(math.log(2), abs=1e-12)
    assert gradient_of(model, tie.value).abs().max() < 1e-12
    first = gradient_of(model, dpo().loss(model, vectors_of([1.0, 1.0]), DoubleRng([1, 2])).value)
    second = gradient_of(model, dpo().loss(model, vectors_of([0.0, 0.0]), DoubleRng([1, 2])).value)
    assert first.norm() > 1e-3
    torch.testing.assert_close(first, -second, atol=1e-12, rtol=0)


def test_the_first_gradient_is_that_of_the_errors() -> None:
    """At z = 0: d loss = beta / 4 d(e_preferred - e_other)."""
    model = vector_model("epsilon", spread=0.0)
    config = SupervisedConfig(sample_latents=False)
    pairs, objective = vectors_of([1.0, 1.0]), dpo(sample_latents=False)
    gradient = gradient_of(model, objective.loss(model, pairs, DoubleRng([1, 2])).value)
    sides = [[p.first for p in pairs], [p.second for p in pairs]]
    ours = [
        gradient_of(model, Supervised(config).loss(model, side, DoubleRng([1, 2])).value)
        for side in sides
    ]
    torch.testing.assert_close(gradient, BETA / 4 * (ours[0] - ours[1]), atol=1e-10, rtol=1e-9)
    assert gradient.norm() > 1e-3


@pytest.mark.parametrize("kind", CASES)
def test_the_gradient_is_that_of_finite_differences(kind: str) -> None:
    model, pairs = vector_model(kind), vectors_of(LABELS)
    parameters = list(model.trained.parameters())

    def loss(weights: Any) -> float:
        vector_to_parameters(torch.as_tensor(weights), parameters)
        return dpo().loss(model, pairs, DoubleRng(SEEDS)).value.item()

    start = parameters_to_vector(parameters).detach()
    gradient = gradient_of(model, dpo().loss(model, pairs, DoubleRng(SEEDS)).value)
    numeric = torch.as_tensor(approx_fprime(start.numpy(), loss, 1e-7))
    assert gradient.norm() > 1e-2
    assert (gradient - numeric).norm() < 1e-5 * gradient.norm()


def test_a_gradient_step_raises_the_odds_of_the_preferred() -> None:
    model, pairs = vector_model("flow", spread=0.0), vectors_of([1.0, 0.0, 1.0])
    found = [dpo().loss(model, pairs, DoubleRng([1, 2, 3]))]
    gradients = torch.autograd.grad(found[0].value, list(model.trained.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(model.trained.parameters(), gradients, strict=True):
            parameter -= 1e-3 * gradient
    found.append(dpo().loss(model, pairs, DoubleRng([1, 2, 3])))
    assert found[0].metrics["margin"] == 0 < found[1].metrics["margin"]
    assert found[1].value < found[0].value


def test_a_pair_is_measured_alone_and_always_alike() -> None:
    model, pairs = vector_model("flow"), vectors_of(LABELS)
    whole = dpo().stable_metrics(model, pairs, range(4), 7)
    assert whole.keys() == {"loss", "accuracy", "margin"}
    for i in range(4):
        alone = dpo(caption_dropout=1.0).stable_metrics(model, pairs[i : i + 1], [i], 7)
        for name in whole:
            torch.testing.assert_close(alone[name], whole[name][i : i + 1], atol=1e-9, rtol=1e-9)
    assert not torch.equal(
        dpo().stable_metrics(model, pairs, range(4), 8)["margin"], whole["margin"]
    )


# --- Every family


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return pairs of pictures of one size, in row groups."""
    return write_parquet(tmp_path_factory.mktemp("pairs") / "a.parquet", rows_of(10))


def pictured(count: int = 2) -> list[Preference]:
    images = Rng(range(2 * count)).normal(3, PIXELS, PIXELS).clamp(-1, 1)
    captions = ["a red ring", "a star"]
    pairs = []
    for i in range(count):
        sides = [
            Sample(images[2 * i + j], captions[i % 2], (PIXELS + 8 * j, PIXELS), (j, 0), str(j))
            for j in range(2)
        ]
        pairs.append(Preference(sides[0], sides[1], float(i % 2)))
    return pairs


def load(folder: Path, **settings: Any) -> TextToImageModel:
    torch.manual_seed(0)
    return load_model(ModelConfig(pretrained=str(folder), lora=LoraConfig(rank=2), **settings))


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("family", WRITERS)
def test_each_family_begins_at_log_2_and_learns(
    tmp_path: Path, family: str, trainable: str
) -> None:
    WRITERS[family](tmp_path / "model")
    model = load(tmp_path / "model", trainable=trainable)
    objective, pairs = dpo(beta=100.0), pictured()
    found = objective.loss(model, pairs, Rng([1, 2]))
    assert found.value.item() == pytest.approx(math.log(2), abs=1e-6)
    assert float(found.metrics["margin"]) == 0
    found.value.backward()
    parameters = model.trainable().values()
    gradients = [p.grad for p in parameters if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 0
    with torch.no_grad():
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for parameter in parameters:
            if parameter.grad is not None:
                parameter -= 1e-2 / norm * parameter.grad
    again = objective.loss(model, pairs, Rng([1, 2]))
    assert again.value < found.value
    assert float(again.metrics["margin"]) > 0


def test_a_trained_text_encoder_has_its_own_reference(tmp_path: Path) -> None:
    WRITERS["stable_diffusion"](tmp_path / "model")
    model = load(tmp_path / "model", parts=["unet", "text_encoder"])
    found = dpo().loss(model, pictured(), Rng([1, 2]))
    assert found.value.item() == pytest.approx(math.log(2), abs=1e-6)
    found.value.backward()
    names = {n.split(".")[0] for n, p in model.trainable().items() if p.grad is not None}
    assert names == {"unet", "text_encoder"}


def test_each_image_has_a_framing_of_its_own(tmp_path: Path) -> None:
    """SDXL reads the original size and the crop of each picture: exchanged, the loss is turned."""
    WRITERS["stable_diffusion_xl"](tmp_path / "model")
    model = load(tmp_path / "model")
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            )
    objective, pairs = dpo(sample_latents=False), pictured()
    turned = [Preference(p.second, p.first, 1 - p.label) for p in pairs]
    found, other = (objective.loss(model, each, Rng([1, 2])) for each in (pairs, turned))
    assert float(found.metrics["margin"]) != 0
    torch.testing.assert_close(found.value, other.value, atol=1e-5, rtol=1e-4)
    alike = [
        replace(p, second=replace(p.second, original=p.first.original, crop=(9, 9))) for p in pairs
    ]
    assert abs(float(objective.loss(model, alike, Rng([1, 2])).value - found.value)) > 1e-6


# --- Whole runs


def command(folder: Path, name: str, table: Path, model: str, *more: str) -> list[str]:
    settings = [
        f"runs_dir={folder}",
        f"name={name}",
        "objective=dpo",
        "objective.beta=100",
        f"model.pretrained={model}",
        f"data.pairs.path={table}",
        "data.pairs.flip=true",
        "data.pairs.workers=1",
        "sampler.num_inference_steps=2",
        "training.micro_batch_size=2",
        "training.global_batch_size=4",
        "training.max_steps=4",
        "training.checkpoint_every_steps=2",
        "training.tensorboard=false",
        "training.async_checkpoints=false",
        "validation.num_images=1",
        "validation.every_steps=2",
        "validation.loss_images=3",
        "optimizer.lr=1e-2",
        "optimizer.eps=1e-4",
        "optimizer.warmup_steps=0",
        "verify=false",
        *more,
    ]
    return list({text.partition("=")[0]: text for text in settings}.values())


TOY = ("model.trainable=full", "training.keep_checkpoints=null")
SD = (
    "sampler.height=16",
    "sampler.width=16",
    "model.lora.rank=2",
    "training.keep_checkpoints=null",
)


@pytest.mark.parametrize("kind", nightly_but(["toy"], ["toy", "sd"]))
def test_a_killed_run_goes_on_bitwise_and_two_processes_are_one(
    tmp_path: Path, table: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model, more = (str(sd_folder), SD) if kind == "sd" else ("toy", TOY)
    if kind == "toy":
        use_toy(monkeypatch)
    start(command(tmp_path, "whole", table, model, *more))
    again = command(tmp_path, "run", table, model, *more)

    def die() -> None:
        on_call(4, kill, "take_step")
        start(again)

    assert in_child(die) == -9
    start(again)
    assert_same_state(tmp_path / "run", tmp_path / "whole")
    rows = [row for row in metrics(tmp_path / "whole") if "validation/loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert rows[0]["validation/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["validation/accuracy"] == 0.5
    right = 3 * rows[-1]["validation/accuracy"]
    assert right == pytest.approx(round(right))
    assert rows[-1]["validation/margin"] != 0
    left_out = json.loads((tmp_path / "whole" / "left_out.json").read_text())
    assert "tie (ties=keep keeps it): 2" in left_out[0]
    two = command(tmp_path, "two", table, model, *more)
    in_processes(2, lambda _: start(two))
    assert_same_run(tmp_path / "two", tmp_path / "whole", 4)


@pytest.mark.nightly  # tests/test_methods.py shards one that learns from a reward
def test_a_sharded_transformer_is_a_whole_one(tmp_path: Path, table: Path) -> None:
    """FSDP2, two processes: the reference predicts on the same shards."""
    WRITERS["stable_diffusion_3"](tmp_path / "model")
    size = (f"sampler.height={PIXELS}", f"sampler.width={PIXELS}", "model.lora.rank=2")
    more = (*size, "training.keep_checkpoints=null", "validation.every_steps=0")
    start(command(tmp_path, "one", table, str(tmp_path / "model"), *more))
    sharded = (*more, "training.strategy=fsdp")
    two = command(tmp_path, "two", table, str(tmp_path / "model"), *sharded)
    in_processes(2, lambda _: start(two))
    assert_same_run(tmp_path / "two", tmp_path / "one", 4)


def test_validation_pairs_are_held_out(tmp_path: Path, table: Path) -> None:
    named = as_files(tmp_path / "held", [{**row, "caption": "held out"} for row in rows_of(4)])
    held = write_jsonl(tmp_path / "held" / "metadata.jsonl", named).parent
    given = command(tmp_path, "run", table, "M", *SD)
    config, _ = compose_train([*given, f"validation.pairs.path={held}"])
    rows = held_out_samples(config, None)
    assert [str(row).rpartition("(")[2] for row in rows] == ["held out)"] * 3
    assert validation_prompts(config) == ["held out"]
    config, _ = compose_train(given)
    assert validation_prompts(config) == ["caption 0"]
    assert len(held_out_samples(config, None)) == 3
    config.validation.loss_images = 0
    assert held_out_samples(config, None) == []


def coloured(count: int, first: int) -> list[dict[str, Any]]:
    """Return pairs of a red and a blue picture, of which the red one is preferred."""
    rows = rows_of(count)
    for i, row in enumerate(rows):
        is_first = i % 2 == 0
        for name, red in (("jpg_0", is_first), ("jpg_1", not is_first)):
            other = first + i
            row[name] = encode(
                Image.new("RGB", (8, 8), (200, 40, other) if red else (other, 40, 200))
            )
        row |= {"label_0": float(is_first), "label_1": float(not is_first)}
    return rows


def test_a_preference_is_learned_and_holds_for_other_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_toy(monkeypatch)
    pairs = write_parquet(tmp_path / "a.parquet", coloured(16, 0))
    held_out = write_parquet(tmp_path / "b.parquet", coloured(8, 100))
    more = (f"validation.pairs.path={held_out}", "training.max_steps=40", "optimizer.lr=1e-3")
    some = ("objective.beta=1", "validation.every_steps=20", "validation.loss_images=8")
    start(command(tmp_path, "run", pairs, "toy", *TOY, *more, *some, "training.ema_decay=null"))
    found = [row for row in metrics(tmp_path / "run") if "validation/loss" in row]
    first, last = found[0], found[-1]
    assert first["validation/accuracy"] == 0.5
    assert last["validation/accuracy"] == 1.0
    assert last["validation/loss"] < 0.9 * first["validation/loss"]
    assert last["validation/margin"] > 0.1


def test_the_best_checkpoint_is_of_the_pairs_loss(
    tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_toy(monkeypatch)
    start(command(tmp_path, "run", table, "toy", *TOY, "export=best"))
    losses = [
        row["validation/loss"] for row in metrics(tmp_path / "run") if "validation/loss" in row
    ]
    assert len(losses) == 3
    assert (tmp_path / "run" / "export").is_dir()


# --- Plans and settings


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_a_plan_counts_two_images_and_the_reference(sd_folder: Path, trainable: str) -> None:
    size = ["sampler.height=16", "sampler.width=16", f"model.trainable={trainable}"]
    size += ["model.lora.rank=1"] if trainable == "lora" else []
    pairs = [f"model.pretrained={sd_folder}", "data.pairs.path=P", *size]
    images = [f"model.pretrained={sd_folder}", "data.images.path=P", *size]
    costs = []
    for objective, given in (("dpo", pairs), ("supervised", images)):
        config = compose_command("plan", [f"objective={objective}", "gpu=cpu", *given])[0]
        blueprint = read_blueprint(config)
        costs.append(cost_of(config, blueprint, 2))
        assert blueprint.model.has_reference is (objective == "dpo" or trainable == "lora")
    ours, plain = costs
    # Both images; with adapters the reference is the same network without them.
    factor = 4 if trainable == "lora" else 2
    assert ours.forward == pytest.approx(factor * plain.forward, rel=0.05)
    assert ours.activations > 1.5 * plain.activations


def test_a_plan_is_printed(sd_folder: Path) -> None:
    given = ["objective=dpo", f"model.pretrained={sd_folder}", "data.pairs.path=P", "gpu=cpu"]
    small = ["sampler.height=16", "sampler.width=16", "training.micro_batch_size=2"]
    text = page(make_plan(compose_command("plan", [*given, *small])[0]))
    assert "optimiser steps" in text
    assert "tars" not in text


def test_the_recipes_are_the_papers() -> None:
    given = ["model.pretrained=M", "data.pairs.path=P"]
    for name in ("sd15_dpo", "sdxl_dpo"):
        config, _ = compose_train([f"recipe={name}", *given])
        assert config.objective == DpoConfig(beta=5000.0, caption_dropout=0.2)
        assert isinstance(build_objective(config, None), Dpo)
        assert config.data.pairs.ties == "drop"
    assert compose_train(["recipe=sd35_dpo", *given])[0].objective.kind == "dpo"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("objective.beta=0", "objective.beta", 0),
        ("objective.beta=-3", "objective.beta", -3),
        ("objective.beta=nan", "objective.beta", "nan"),
        ("objective.caption_dropout=2", "objective.caption_dropout", 2),
    ],
)
def test_impossible_settings_are_refused(override: str, key: str, value: object) -> None:
    with pytest.raises(ValueError) as caught:
        compose_train(["objective=dpo", "model.pretrained=M", "data.pairs.path=P", override])
    assert_explained(str(caught.value), key, value)


def test_dpo_needs_its_reference() -> None:
    given = ["objective=dpo", "model.pretrained=M", "data.pairs.path=P", "model.trainable=full"]
    with pytest.raises(ValueError, match=r"objective=dpo .*model\.reference=false .*set model"):
        compose_train([*given, "model.reference=false"])


def test_guidance_as_an_input_needs_a_network_that_has_it(sd_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"guidance_scale = 3\.5 .*leave it at 1"):
        dpo(guidance_scale=3.5).check(load(sd_folder))
