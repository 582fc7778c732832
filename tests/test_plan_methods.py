"""`sfumato plan` of every method: passes of the network counted by hand, and memory."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nightly import nightly_but
from test_plan_draft import composed

from sfumato.config import CONF, PlanConfig
from sfumato.models.model import Role
from sfumato.planning.blueprint import read_blueprint, steps_alike
from sfumato.planning.memory import held
from sfumato.planning.page import page
from sfumato.planning.plan import cost_of, make_plan
from sfumato.planning.step import StepCost, forward_flops

pytestmark = pytest.mark.usefixtures("unchecked")  # tests/test_plan_step.py checks them
METHODS = sorted(  # those that learn from a reward's gradient
    path.stem
    for path in (CONF / "method").glob("*.yaml")
    if re.search(r"objective: (draft|direct|direct_align|adjoint_matching)\n", path.read_text())
)
STEPS, PIXELS = 5, 16

# Passes of the policy with its guidance, and of the reference, of STEPS sampling steps. A pass
# without guidance is half of one.
PASSES: dict[str, tuple[list[str], float, float]] = {
    # All four steps that add noise; the adjoint goes back through the reference to the first.
    "adjoint_matching": (["objective.trained_steps=4"], STEPS + 4 / 2, STEPS / 2),
    "alignprop": (["objective.truncation_range=[1,2]"], STEPS, 0),
    "ddrl": (["data.images.path=I"], STEPS + 1 / 2, 0),
    "direct_align": ([], STEPS + 2, 0),
    "draft_k": (["objective.truncation_steps=2"], STEPS, 0),
    "draft_lv": ([], STEPS + 2, 0),
    "draft_plus": ([], STEPS, 1),
    "drtune": (["objective.active_steps=2"], STEPS + 2, 0),
    "flowbp_bridge": (["objective.active_steps=3"], STEPS + 3, 0),
    "flowbp_lagrange": ([], STEPS + 4, 0),
    "flowbp_sparse": (["objective.active_steps=3"], STEPS + 3, 0),
    "leapalign": ([], STEPS + 2, 0),
    "refl": ([], STEPS + 1, 0),
    "rsm": (["objective.active_steps=2"], STEPS + 2, 2),
}
QUICK = ["direct_align"]


def of_method(folder: Path, method: str, *settings: str) -> PlanConfig:
    small = [f"sampler.height={PIXELS}", f"sampler.width={PIXELS}", "training.micro_batch_size=1"]
    small += ["reward=color", f"model.pretrained={folder}", "gpu=cpu", "sampler.guidance_scale=2"]
    return composed(f"method={method}", f"sampler.training_steps={STEPS}", *small, *settings)


def pass_of(config: PlanConfig, role: Role) -> int:
    """Return the FLOPs of a guided pass of one image."""
    blueprint: Any = read_blueprint(config)
    model, x_t = blueprint.model, torch.empty(1, *blueprint.latent, device="meta")
    cond = model.blank_prompts(1)
    guided = model.denoiser(cond, uncond=cond, guidance_scale=2.0, role=role)
    return forward_flops(lambda: guided(x_t, 0.5))


def test_every_method_has_its_passes_here() -> None:
    assert sorted(PASSES) == METHODS


@pytest.mark.parametrize("method", nightly_but(QUICK, METHODS))
def test_passes_are_those_of_a_count_by_hand(sd_folder: Path, method: str) -> None:
    settings, policy, reference = PASSES[method]
    config = of_method(sd_folder, method, *settings)
    plan = make_plan(config)
    expected = policy * pass_of(config, "policy") + reference * pass_of(config, "reference")
    assert plan.forward_flops == expected
    assert plan.executed >= plan.step_flops > plan.forward_flops
    text = page(plan)
    assert f"objective={config.objective.kind}: {STEPS} sampling steps at guidance 2" in text
    assert ("KB a sample" in text) == (method == "ddrl")


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("method", ["nft", "awm"])
def test_an_old_policy_is_one_more_copy_of_what_is_trained(
    sd_folder: Path, method: str, trainable: str
) -> None:
    settings = [f"model.trainable={trainable}", "model.reference=true"]
    config = of_method(sd_folder, method, *settings, "training.global_batch_size=16")
    blueprint = read_blueprint(config)
    found = held(blueprint, config.training, 1, 1, config.optimizer)
    size = sum(4 * parameter.numel() for parameter in blueprint.model.trainable().values())
    assert found.old == (size if method == "nft" else 0)
    assert found.total == replace(found, old=0).total + found.old


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ddpo", []),
        ("ddpo", ["objective.trained_steps=2"]),
        ("ddpo", ["objective.window=3", "objective.kl_coeff=1"]),
        ("nft", ["objective.trained_times=2"]),
        ("awm", ["objective.trained_times=2"]),
    ],
)
def test_steps_that_are_left_out_are_counted(
    sd_folder: Path, method: str, settings: list[str]
) -> None:
    settings = [
        *settings,
        "training.global_batch_size=8",
        "sampler.num_inference_steps=9",
        "sampler.training_steps=null",
    ]
    config = of_method(sd_folder, method, *settings)
    left_out = steps_alike(config)[1]
    assert left_out >= 4
    plan, whole = make_plan(config), cost_of(config, read_blueprint(config), 1)
    assert plan.forward_flops == whole.forward
    assert plan.step_flops == whole.flops
    assert plan.executed == whole.executed
    assert plan.memory[0].cost.activations == pytest.approx(whole.activations, rel=0.02)


def cost(folder: Path, *settings: str) -> StepCost:
    config = of_method(folder, "flowbp_sparse", *settings)
    return cost_of(config, read_blueprint(config), 1)


@pytest.mark.nightly  # takes 8 s; the passes are counted below
def test_memory_does_not_depend_on_the_number_of_active_steps(sd_folder: Path) -> None:
    """A step more costs a pass and its backward; steps in one call keep their activations."""
    one, two, three, stacked = (
        cost(sd_folder, f"objective.active_steps={n}", f"objective.stacked_steps={size}")
        for n, size in ((1, 1), (2, 1), (3, 1), (3, 3))
    )
    policy = pass_of(of_method(sd_folder, "flowbp_sparse"), "policy")
    assert three.forward - two.forward == two.forward - one.forward == policy
    assert three.flops - two.flops == two.flops - one.flops > 2 * policy
    assert one.activations == two.activations == three.activations
    assert (stacked.forward, stacked.flops) == (three.forward, three.flops)
    assert stacked.activations > 2 * three.activations
