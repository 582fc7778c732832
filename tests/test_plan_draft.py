"""`sfumato plan` of DRaFT: the objective's own step, against real runs of it; every recipe."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from allocations import peak_of_allocations
from families import WRITERS
from nightly import nightly_but
from tiny_clip import write_tiny_clip
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sfumato.compose import compose_command
from sfumato.config import CONF, PlanConfig
from sfumato.diffusion.randomness import Rng
from sfumato.models.registry import load_model
from sfumato.planning.blueprint import PROMPT, read_blueprint, steps_alike
from sfumato.planning.memory import Held, held
from sfumato.planning.page import page
from sfumato.planning.plan import Plan, cost_of, make_plan, parameters_of
from sfumato.planning.step import StepCost
from sfumato.run.build import build_objective, build_scorer

pytestmark = pytest.mark.usefixtures("unchecked")  # tests/test_plan_step.py checks them
BASE = CONF.parent / "demo" / "model" / "base"
PIXELS, ROWS = 32, 2
PEAK = 0.10  # how far a plan may be from a measured peak
SMALL = [
    *("objective=draft", "gpu=cpu", f"sampler.height={PIXELS}", f"sampler.width={PIXELS}"),
    *("sampler.num_inference_steps=3", f"training.micro_batch_size={ROWS}"),
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "clip"
    write_tiny_clip(folder)
    return folder


def composed(*settings: str) -> PlanConfig:
    config = compose_command("plan", settings)[0]
    assert isinstance(config, PlanConfig)
    return config


def aligned(folder: Path, clip: Path, *settings: str) -> PlanConfig:
    given = [f"model.pretrained={folder}", "reward=clip", f"reward.pretrained={clip}"]
    return composed(*SMALL, *given, *settings)


def real_loss(config: PlanConfig) -> Callable[[], Tensor]:
    """Return a call of the recipe's loss with a model and a reward that have weights."""
    objective = build_objective(config, build_scorer(config))
    model = load_model(replace(config.model, reference=objective.needs_reference))
    model.trained.train()
    rows = config.training.micro_batch_size
    return lambda: objective.loss(model, [PROMPT] * rows, Rng.of_step(0, 0, range(rows))).value


# --- Against real steps


CASES = [
    ("stable_diffusion", ["objective.kl_coeff=0"]),
    ("stable_diffusion", ["objective.lv_samples=2"]),
    ("stable_diffusion", ["model.trainable=full", "model.gradient_checkpointing=true"]),
    ("stable_diffusion_xl", ["sampler.eta=0.5", "reward.gradient_checkpointing=true"]),
    ("stable_diffusion", ["sampler.guidance_interval=[0.3,0.6]", "objective.truncation_steps=3"]),
    ("stable_diffusion_xl", ["sampler.guidance_interval=[0,0.5]", "objective.kl_coeff=0"]),
    ("stable_diffusion_xl", ["sampler.training_steps=6", "sampler.training_spacing=trailing"]),
    ("stable_diffusion_3", ["sampler.training_steps=3", "sampler.solver=dpmpp_2m"]),
    ("flux", ["objective.truncation_steps=2", "sampler.num_inference_steps=2"]),
]


# With and without a noise schedule; tests/test_plan.py counts the forwards of each family.
@pytest.mark.parametrize(("name", "settings"), nightly_but([CASES[2], CASES[7]], CASES))
def test_flops_are_those_that_torch_counts_in_a_real_step(
    name: str, settings: Sequence[str], clip: Path, tmp_path: Path
):
    WRITERS[name](tmp_path / name)
    config = aligned(tmp_path / name, clip, *settings)
    loss = real_loss(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss().backward()
    assert make_plan(config).executed * ROWS == pytest.approx(counter.get_total_flops(), abs=ROWS)


# Each pair of the three settings.
WINDOWS = [
    (1, False, "[network]"),
    (1, True, "[network,text_encoder]"),
    (3, True, "[network]"),
    (3, False, "[network,text_encoder]"),
]


@pytest.mark.parametrize(("window", "checkpointing", "parts"), nightly_but(WINDOWS[:3], WINDOWS))
def test_the_peak_is_that_of_torchs_allocations_in_a_real_step(
    sd_folder: Path, clip: Path, window: int, checkpointing: bool, parts: str
):
    settings = [f"objective.truncation_steps={window}", "training.micro_batch_size=4"]
    settings += [f"model.gradient_checkpointing={checkpointing}", f"model.parts={parts}"]
    config = aligned(sd_folder, clip, *settings)
    loss = real_loss(config)
    loss().backward()  # gradients, and what is allocated once, are there
    peak = peak_of_allocations(lambda: loss().backward())
    assert peak > 2**20
    cost = cost_of(config, read_blueprint(config), 4)
    assert cost.activations == pytest.approx(peak, rel=PEAK)


@pytest.mark.nightly  # peaks are measured above
def test_sampling_steps_cost_time_and_no_memory(sd_folder: Path, clip: Path):
    config = aligned(sd_folder, clip, "sampler.num_inference_steps=5")
    plan, whole = make_plan(config), cost_of(config, read_blueprint(config), ROWS)
    assert plan.executed == whole.executed // ROWS
    assert plan.memory[0].cost.activations == pytest.approx(whole.activations, rel=0.001)


def test_steps_and_guidance_are_those_of_training(sd_folder: Path):
    def counted(*settings: str) -> StepCost:
        config = composed(*SMALL, f"model.pretrained={sd_folder}", "reward=color", *settings)
        return cost_of(config, read_blueprint(config), ROWS)

    few, fewer = counted("sampler.num_inference_steps=4"), counted("sampler.training_steps=4")
    assert few == fewer
    everywhere = counted("sampler.training_steps=4", "sampler.guidance_interval=[0,1]")
    nowhere = counted("sampler.training_steps=4", "sampler.guidance_interval=[0,0]")
    assert everywhere.executed == few.executed
    assert nowhere.executed < 0.7 * few.executed


# --- What memory is for


def activations(folder: Path, clip: Path, *settings: str) -> int:
    config, _ = steps_alike(aligned(folder, clip, *settings))
    return cost_of(config, read_blueprint(config), config.training.micro_batch_size).activations


@pytest.mark.nightly  # peaks are measured above
def test_activations_grow_with_window_batch_and_size(sd_folder: Path, clip: Path):
    base, *more = (
        activations(sd_folder, clip, *settings)
        for settings in (
            [],
            ["objective.truncation_steps=2"],
            ["objective.truncation_steps=3"],
            ["training.micro_batch_size=4"],
            ["sampler.height=64"],
        )
    )
    longer, longest, batch, size = more
    assert longest - longer == pytest.approx(longer - base, rel=0.01)
    assert batch == pytest.approx(2 * base, rel=0.02)
    assert 1.8 * base < size < 2 * base  # the reward reads pictures of one size


@pytest.mark.nightly  # peaks are measured above
def test_a_window_of_random_length_is_planned_at_its_longest(sd_folder: Path, clip: Path):
    drawn, fixed = (
        make_plan(aligned(sd_folder, clip, setting))
        for setting in ("objective.truncation_range=[1,2]", "objective.truncation_steps=2")
    )
    assert drawn.memory == fixed.memory
    assert drawn.executed == fixed.executed
    assert "longest window of objective.truncation_range" in page(drawn)


def held_by(config: PlanConfig) -> Held:
    return held(read_blueprint(config), config.training, config.gpus, 1, config.optimizer)


def bytes_held(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        (["model.trainable=lora"], 0),  # the policy with its adapter off
        (["model.trainable=full"], 1),
        (["model.trainable=full", "model.parts=[network,text_encoder]"], 2),
        (["model.trainable=full", "objective.kl_coeff=0"], 0),
    ],
)
def test_the_reference_is_what_the_loaded_model_holds(
    sd_folder: Path, clip: Path, settings: list[str], copies: int
):
    config = aligned(sd_folder, clip, *settings)
    found = held_by(config)
    needed = config.model.reference and bool(copies or config.model.trainable == "lora")
    model: Any = load_model(replace(config.model, reference=needed))
    own = [network for part in model.parts.values() for network in part.networks()]
    tensors = [t for network in own for t in (*network.parameters(), *network.buffers())]
    vae = bytes_held([*model.pipeline.vae.parameters()])
    assert found.weights + found.reference + found.frozen == bytes_held(tensors) + vae
    assert (found.reference > 0) == (copies > 0)
    trained = sum(p.numel() for p in model.trainable().values())
    assert found.optimizer == 8 * trained


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_the_reward_is_held_and_its_weights_are_not_read(
    sd_folder: Path, tmp_path: Path, dtype: str, size: int
):
    write_tiny_clip(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    config = aligned(sd_folder, tmp_path, f"reward.dtype={dtype}")
    positions = 8 * (77 + 17)  # buffers
    parameters = parameters_of(read_blueprint(config))["reward"]
    assert held_by(config).reward == size * parameters + positions


@pytest.mark.parametrize("scored", [True, False])
def test_held_out_rewards_are_held_too(sd_folder: Path, tmp_path: Path, clip: Path, scored: bool):
    write_tiny_clip(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    given = [*SMALL, f"model.pretrained={sd_folder}"]
    if scored:
        given += ["reward=clip", f"reward.pretrained={clip}"]
    else:
        given = [*given[1:], "objective=supervised", "reward=none"]
    match = f"{{kind: clip, pretrained: {tmp_path}, dtype: bfloat16}}"
    more = [f"validation.rewards.match={match}", "validation.rewards.light={kind: brightness}"]
    plain, both = composed(*given), composed(*given, *more)
    parameters = parameters_of(read_blueprint(both))
    assert "reward light" not in parameters  # it has none
    extra = 2 * parameters["reward match"] + 8 * (77 + 17)  # buffers
    assert held_by(both).reward - held_by(plain).reward == extra
    assert held_by(both).total - held_by(plain).total == extra


def test_the_page_speaks_of_sampling_and_not_of_stored_pictures(sd_folder: Path, clip: Path):
    given = ["training.peak_tflops=1", "sampler.training_steps=4"]
    text = page(make_plan(aligned(sd_folder, clip, *given)))
    assert (
        "objective=draft: 4 sampling steps at guidance 7.5, a gradient through the last 1" in text
    )
    assert "reward, frozen" in text
    assert "frozen networks, forward" in text
    assert "~ seconds per step" in text
    assert "KB a sample" not in text
    assert "Tars" not in text


# --- Every recipe


RECIPES = sorted(
    path.relative_to(CONF / "recipe").with_suffix("").as_posix()
    for folder in (CONF / "recipe", CONF / "recipe" / "stable_diffusion")
    for path in folder.glob("*.yaml")
    if path.stem not in ("autoencoder", "reward_pairs")  # no model is trained
)
GIVEN = {
    "demo_base": [
        *(f"model.autoencoder={BASE}", f"model.text_encoder={BASE / 'text_encoder'}"),
        *("model.image_size=64", f"model.tokenizer={BASE / 'tokenizer'}"),
    ],
}
FAMILY = {"sd15": "stable_diffusion", "sd21": "stable_diffusion", "sdxl": "stable_diffusion_xl"}
FAMILY |= {"sd35": "stable_diffusion_3", "flux": "flux", "qwen": "qwen_image"}


def stand_ins(recipe: str, folder: Path, clip: Path) -> list[str]:
    """Return the settings that a recipe asks for."""
    family = FAMILY.get(recipe.split("_")[0])
    if family is None:
        return GIVEN.get(recipe, [])
    WRITERS[family](folder / family)
    size = ["sampler.height=64", "sampler.width=64", f"model.pretrained={folder / family}"]
    scored = is_draft(recipe) or ("grpo" in recipe and "demo" not in recipe)
    return [*size, *([f"reward.pretrained={clip}"] if scored else [])]


def is_draft(recipe: str) -> bool:
    return "draft" in recipe or (recipe.endswith("_reward") and "demo" not in recipe)


# One of each objective; the others are planned by make nightly.
QUICK = ["demo_finetune", "sd15_draft_plus"]


@pytest.mark.parametrize("recipe", nightly_but(QUICK, RECIPES))
def test_every_recipe_is_planned(recipe: str, tmp_path: Path, clip: Path):
    plan: Plan = make_plan(
        composed(f"recipe={recipe}", "gpu=cpu", *stand_ins(recipe, tmp_path, clip))
    )
    text = page(plan)
    assert plan.parameters["trained"] > 0
    assert plan.executed >= plan.step_flops > plan.forward_flops > 0
    costs = sorted(plan.memory, key=lambda each: each.checkpointing)
    assert 0 < costs[1].cost.activations <= costs[0].cost.activations
    assert ("objective=draft" in text) == (is_draft(recipe) or recipe == "demo_reward")
