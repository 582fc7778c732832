"""Settings of objectives that cannot work are refused before weights are read, or said."""

from pathlib import Path

import pytest
import torch
from runs import command, metrics, start
from torch import Tensor
from toy import use_toy

from sfumato.compose import compose_train
from sfumato.rewards.reward import Score
from sfumato.rewards.simple import BrightnessReward

GIVEN = ["model.pretrained=M", "data.prompts=P", "reward=color", "sampler.num_inference_steps=8"]
DIRECT = ["objective=direct"]
POLICY = ["objective=policy_gradient", "training.global_batch_size=16"]
WRONG = [
    ([*DIRECT, "objective.steps=listed"], r"listed=None are no steps.+0 .+ to 7"),
    ([*DIRECT, "objective.steps=listed", "objective.listed=[]"], "are no steps of a run"),
    ([*DIRECT, "objective.steps=listed", "objective.listed=[3,8]"], r"\[3, 8\] are no steps"),
    ([*DIRECT, "objective.steps=listed", "objective.listed=[3,3]"], "give different numbers"),
    ([*DIRECT, "objective.steps=listed", "objective.listed=[-1]"], "listed"),
    (
        [*DIRECT, "objective.steps=listed", "objective.listed=[7]", "objective.early_stop=[1,2]"],
        "to 5 .+less objective.early_stop",
    ),
    ([*DIRECT, "objective.distance_floor=1"], "distance_floor=1.0 has no effect"),
    (
        [
            *("objective=direct_align", "objective.source=images", "data.images.path=I"),
            *("data.prompts=null", "objective.data_coeff=1"),
        ],
        "data_coeff=1.0 has no effect",
    ),
    ([*DIRECT, "objective.active_steps=9"], r"active_steps=9 is more.+give 8"),
    (
        [*DIRECT, "objective.active_steps=4", "sampler.training_steps=3"],
        r"training_steps\) or less",
    ),
    ([*DIRECT, "sampler.eta=0.5"], r"sampler.eta=0.5 adds noise.+sampler.eta=0"),
    ([*DIRECT, "sampler.solver=dpmpp_2m"], "second order.+sampler.solver=first_order"),
    ([*DIRECT, "objective.path=leap", "sampler.eta=1"], "objective.path=leap"),
    ([*DIRECT, "objective.weight_scale=0"], "weight_scale"),
    ([*DIRECT, "objective.weight_scale=-1"], "weight_scale"),
    ([*DIRECT, "objective.early_stop=[3]"], r"early_stop=\[3\] is no range"),
    ([*DIRECT, "objective.early_stop=[2,8]"], "high <= 7"),
    ([*DIRECT, "objective.path=bridge", "objective.steps=all"], "no steps around a bridge"),
    ([*DIRECT, "objective.path=bridge", "objective.active_steps=1"], "give 2 or more"),
    ([*DIRECT, "objective.path=leap", "objective.steps=all"], "no leap"),
    ([*DIRECT, "objective.stacked_steps=0"], "stacked_steps"),
    ([*DIRECT, "objective.path=leap", "objective.stacked_steps=2"], "stacked_steps=2 has no eff"),
    (
        [*DIRECT, "objective.stacked_steps=2", "sampler.guidance_interval=[0.2,0.8]"],
        r"stacked_steps=2 predicts steps at once that sampler.guidance_interval=\[0.2, 0.8\]",
    ),
    (
        [*DIRECT, "objective.path=leap", "objective.steps=listed", "objective.listed=[1]"],
        "not two steps",
    ),
    ([*DIRECT, "training.precision=fp16"], "use bf16 or no"),
    ([*DIRECT, "objective.nested=0.5"], "nested=0.5 has no effect"),
    ([*DIRECT, "objective.late_bias=2", "objective.steps=uniform"], "late_bias=2.0 has no effect"),
    ([*DIRECT, "objective.path=leap", "objective.weights=sigma"], "weights=sigma has no effect"),
    ([*DIRECT, "objective.kl_form=output"], "kl_form=output has no effect"),
    (
        [*DIRECT, "objective.kl_coeff=1", "model.trainable=full", "model.reference=false"],
        "kl_coeff=1.0 compares with a frozen copy",
    ),
    (["objective=adjoint_matching", "objective.reward_scale=0"], "reward_scale"),
    (["objective=adjoint_matching", "objective.trained_steps=9"], "trained_steps=9 is more"),
    (
        ["objective=adjoint_matching", "objective.trained_steps=4", "sampler.solver=dpmpp_2m"],
        "draws noise at each step",
    ),
    (
        [
            *("objective=adjoint_matching", "objective.trained_steps=4"),
            *("model.trainable=full", "model.reference=false"),
        ],
        "objective=adjoint_matching compares with a frozen copy",
    ),
    (["objective=direct_align", "objective.noise_levels=[0.9,0.2]"], "is no range of times"),
    (["objective=direct_align", "objective.source=images"], "data.images.path"),
    (["objective=draft", "objective.data_coeff=1"], "missing settings: data.images.path"),
    (["objective=draft", "data.images.path=I"], "data.images.path=I has no effect"),
    *(
        (
            [f"objective={kind}", "reward=jpeg"],
            f"objective={kind} learns.+objective=policy_gradient, nft",
        )
        for kind in ("draft", "direct", "adjoint_matching", "direct_align")
    ),
    (
        [*POLICY, "objective.images_per_prompt=1"],
        "compares an image with itself.+statistics=prompt",
    ),
    (["objective=nft", "objective.images_per_prompt=1"], "compares an image with itself"),
    ([*POLICY, "objective.images_per_prompt=3"], r"=16 does not divide into groups of .+=3.+15"),
    ([*POLICY, "objective.images_per_prompt=32"], "the nearest that does is 32"),
    ([*POLICY, "objective.eta=0"], "eta=0 makes the steps deterministic"),
    ([*POLICY, "objective.eta=1.5"], "eta=1.5 is too large"),
    ([*POLICY, "objective.clip_range=0"], "clip_range=0.0 is too small"),
    (["objective=awm", "objective.clip_range=-1"], "clip_range=-1.0 is too small"),
    (["objective=nft", "objective.beta=0"], "beta=0.0 is too small"),
    (["objective=nft", "objective.beta=-1"], "beta=-1.0 is too small"),
    (["objective=nft", "objective.old_decay=1"], "old_decay=1.0 is too large"),
    ([*POLICY, "objective.window=9"], r"window=9 is more.+give 8"),
    ([*POLICY, "objective.trained_steps=9"], r"trained_steps=9 is more.+give 8"),
    ([*POLICY, "sampler.solver=dpmpp_2m"], "draws noise at each step; use first_order"),
    ([*POLICY, "model.lora.dropout=0.1"], "dropout=0.1 changes the policy"),
    *(
        (
            [*POLICY[1:], f"objective={kind}", "model.lora.dropout=0.2"],
            f"dropout=0.2 changes the policy .+objective={kind} compares",
        )
        for kind in ("nft", "awm")
    ),
    ([*POLICY, "sampler.num_inference_steps=1"], "num_inference_steps=1 is too few.+2 or more"),
    ([*POLICY, "sampler.training_steps=1"], "sampler.training_steps=1 is too few"),
    ([*POLICY[1:], "objective=nft", "sampler.training_steps=1"], "training_steps=1 is too few"),
    ([*POLICY, "reward=none"], "maximises a reward"),
    ([*POLICY, "data.images.path=I"], "data.images.path=I has no effect"),
    ([*POLICY, "objective.kl_form=output"], "kl_form=output has no effect"),
    (
        [*POLICY, "objective.kl_coeff=1", "model.trainable=full", "model.reference=false"],
        "kl_coeff=1.0 compares with a frozen copy",
    ),
    ([*DIRECT, "model.lora.merge_rollouts=true", "model.dtype=bfloat16"], "rounds them away"),
    ([*DIRECT, "model.lora.merge_rollouts=true", "training.precision=bf16"], "rounds them away"),
    ([*DIRECT, "model.lora.merge_rollouts=true", "model.lora.dropout=0.1"], "drops parts"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG)
def test_what_cannot_work_is_refused(overrides: list[str], message: str) -> None:
    typed = [text.split("=")[0] for text in overrides]
    given = [text for text in GIVEN if text.split("=")[0] not in typed]
    with pytest.raises(ValueError, match=message):
        compose_train([*given, *overrides])


@pytest.mark.parametrize("kind", ["policy_gradient", "nft", "awm"])
def test_rewards_without_a_gradient_are_learned_from(kind: str) -> None:
    given = [text for text in GIVEN if not text.startswith("reward=")]
    batch = "training.global_batch_size=16"
    assert compose_train([*given, f"objective={kind}", "reward=jpeg", batch])[0]


@pytest.mark.parametrize("kind", ["policy_gradient", "nft", "awm"])
def test_images_that_are_alike_are_said_at_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    use_toy(monkeypatch)
    small = [f"objective={kind}", "objective.images_per_prompt=2", "training.max_steps=2"]
    small += ["reward=brightness"]
    given = [text for text in command(tmp_path, "run", *small) if "kl_coeff" not in text]

    def alike(self: BrightnessReward, images: Tensor, prompts: list[str]) -> Score:
        return Score(torch.full((len(prompts),), 3.0))

    monkeypatch.setattr(BrightnessReward, "score", alike)
    start([*given, "objective.rollout_batch_size=2", "validation.every_steps=0"])
    said = "".join(capfd.readouterr())
    assert said.count("step 1 has no gradient: the images of each group have the same reward") == 1
    assert metrics(tmp_path / "run")[-1]["no_signal"] == 1


def test_a_hinge_below_all_rewards_is_said_at_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    use_toy(monkeypatch)
    small = ["objective=direct", "objective.active_steps=2", "training.max_steps=2"]
    given = [text for text in command(tmp_path, "run", *small) if "kl_coeff" not in text]
    start([*given, "objective.hinge=-1000"])
    said = "".join(capfd.readouterr())
    assert said.count("step 1 has no gradient: every reward is above objective.hinge=-1000") == 1
