"""Settings of the sampler: the grid of training, an interval of guidance, kept prompts."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from families import PIXELS, WRITERS
from refusals import assert_explained
from runs import assert_same_state, command, in_child, kill, on_call, start
from toy import ToyModel, use_toy

from sfumato.check import check_sampler, check_train
from sfumato.compose import compose_command, compose_train
from sfumato.config import (
    ColorRewardConfig,
    DraftConfig,
    ModelConfig,
    SampleConfig,
    SamplerConfig,
)
from sfumato.diffusion.randomness import Rng
from sfumato.diffusion.sampling import Trajectory, sample
from sfumato.evaluation.commands import open_model
from sfumato.evaluation.study import Study
from sfumato.models import generate as images
from sfumato.models.generate import Guided, encode_guided, generate, guided_denoiser
from sfumato.models.loading import load_family
from sfumato.models.model import Conditioning
from sfumato.models.pipeline_model import PipelineModel
from sfumato.models.registry import find_family
from sfumato.objectives import draft
from sfumato.objectives.draft import Draft
from sfumato.rewards.build import build_reward

PROMPTS = ["a red star", "a small blue ring on a yellow background"]
TABLES = ["stable_diffusion", "stable_diffusion_xl"]
FLOWS = ["stable_diffusion_3", "flux", "qwen_image"]
SIZES = {"height": PIXELS, "width": PIXELS}
GIVEN = ["model.pretrained=M", "data.prompts=P", "reward=color"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    for name, write in WRITERS.items():
        write(root / name)
    return {name: root / name for name in WRITERS}


def load(folder: Path, **settings: object) -> PipelineModel:
    config = replace(ModelConfig(pretrained=str(folder)), **settings)  # pyright: ignore
    family, place = find_family(config)
    return load_family(family, place, config)


def objective(sampler: SamplerConfig, **settings: object) -> Draft:
    config = replace(DraftConfig(), **settings)  # pyright: ignore
    return Draft(config, sampler, build_reward(ColorRewardConfig()))


# --- The grid of training


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name", TABLES)
def test_spaced_times_are_those_of_ddim(folders: dict[str, Path], name: str, spacing: str):
    model = load(folders[name])
    scheduler: Any = DDIMScheduler.from_config(model.scheduler.config, timestep_spacing=spacing)
    for steps in (1, 4, 10, 50):
        scheduler.set_timesteps(steps)
        times = model.spaced_times(steps, PIXELS, PIXELS, spacing)
        found = [model.process.index(t) for t in times[:-1]]  # pyright: ignore
        assert found == scheduler.timesteps.tolist()
        own = model.times(steps, PIXELS, PIXELS)
        assert model.spaced_times(steps, PIXELS, PIXELS, None) == own
        assert times[-1] == own[-1]
        assert (times == own) == (spacing == model.scheduler.config.timestep_spacing)


def test_a_grid_has_as_many_steps_as_were_asked_for(folders: dict[str, Path]):
    # numpy's arange(1000, 0, -1000 / 61) has 62 numbers; the last of diffusers' grid is -1.
    model = load(folders["stable_diffusion"])
    for steps in range(1, 1001):
        times = model.spaced_times(steps, PIXELS, PIXELS, "trailing")
        assert len(times) == steps + 1
        assert times[0] == 1
        assert times[-2] > 0


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_has_no_spacing(folders: dict[str, Path], name: str, spacing: str):
    config = ModelConfig(str(folders[name]))
    find_family(config, SamplerConfig(training_steps=4, **SIZES))
    with pytest.raises(ValueError, match=r"training_spacing") as caught:
        find_family(config, SamplerConfig(training_spacing=spacing, **SIZES))
    assert_explained(str(caught.value), "sampler.training_spacing", spacing, "continuous")
    model = load(folders[name])
    sampler = SamplerConfig(4, training_spacing=spacing, **SIZES)
    with pytest.raises(ValueError, match="time of this model is continuous; leave it out"):
        objective(sampler).loss(model, PROMPTS, Rng([1, 2]))
    generate(model, PROMPTS[:1], [1], replace(sampler, num_inference_steps=2))  # not training


def test_training_steps_are_within_the_table(folders: dict[str, Path]):
    config = ModelConfig(str(folders["stable_diffusion"]))
    find_family(config, SamplerConfig(training_steps=1000, training_spacing="trailing"))
    with pytest.raises(ValueError, match=r"sampler\.training_steps = 1001 .* set 1000 or less"):
        find_family(config, SamplerConfig(training_steps=1001))
    with pytest.raises(ValueError, match=r"sampler\.training_steps = 1 is too few .* take 2"):
        find_family(ModelConfig(str(folders["qwen_image"])), SamplerConfig(training_steps=1))


@pytest.mark.parametrize(
    ("settings", "rollout"),
    [
        ({}, "times"),
        ({"training_steps": 3}, "fewer"),
        ({"training_steps": 3, "training_spacing": "trailing"}, "trailing"),
        ({"training_spacing": "trailing"}, "all trailing"),
    ],
)
def test_the_grid_of_training_is_that_of_rollouts_alone(
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    rollout: str,
):
    model, used = load(folders["stable_diffusion"]), []
    sampler = SamplerConfig(5, 2.0, **SIZES, **settings)
    expected = {
        "times": model.times(5, PIXELS, PIXELS),
        "fewer": model.times(3, PIXELS, PIXELS),
        "trailing": model.spaced_times(3, PIXELS, PIXELS, "trailing"),
        "all trailing": model.spaced_times(5, PIXELS, PIXELS, "trailing"),
    }

    def note(denoiser: Any, process: Any, x: Any, times: Any, **more: Any) -> Trajectory:
        used.append(list(times))
        return sample(denoiser, process, x, times, **more)

    for module in (draft, images):
        monkeypatch.setattr(module, "sample", note)
    objective(sampler).loss(model, PROMPTS, Rng([1, 2])).value.backward()
    generate(model, PROMPTS, [1, 2], sampler)
    assert used == [expected[rollout], expected["times"]]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["sampler.training_steps=4", "objective.truncation_steps=5"], "4 (sampler.training_st"),
        (["sampler.training_steps=4", "objective.truncation_range=[1,5]"], "<= 4 (sampler.train"),
        (["sampler.num_inference_steps=4", "objective.truncation_steps=5"], "4 (sampler.num_inf"),
        (["sampler.num_inference_steps=4", "objective.truncation_range=[1,5]"], "<= 4 (sampler.n"),
    ],
)
def test_the_window_is_within_the_steps_of_training(settings: list[str], said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        compose_train([*GIVEN, *settings])
    fits = ["sampler.num_inference_steps=4", "sampler.training_steps=5"]
    compose_train([*GIVEN, *settings[1:], *fits])


# --- An interval of guidance


def test_outside_the_interval_the_network_runs_once(folders: dict[str, Path]):
    model, rows = load(folders["stable_diffusion"]), []
    model.network.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    sampler = SamplerConfig(10, 5.0, **SIZES, guidance_interval=[0.3, 0.7])
    generate(model, PROMPTS, [1, 2], sampler)
    inside = [0.3 <= t <= 0.7 for t in model.times(10, PIXELS, PIXELS)[:-1]]
    assert rows == [4 if each else 2 for each in inside]
    assert 2 <= sum(inside) <= 8


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "qwen_image"])
@torch.no_grad()
def test_inside_the_interval_nothing_changes(folders: dict[str, Path], name: str):
    model = load(folders[name])
    prompts = encode_guided(model, PROMPTS, SamplerConfig(guidance_scale=5.0))
    sampler = SamplerConfig(10, 5.0, **SIZES, guidance_interval=[0.25, 0.5])
    denoiser = guided_denoiser(model, prompts, sampler)
    whole = guided_denoiser(model, prompts, replace(sampler, guidance_interval=None))
    alone = model.denoiser(prompts.cond)
    x = Rng([1, 2]).normal(*model.latent_shape(PIXELS, PIXELS))
    for t in (0.1, 0.25, 0.3, 0.5, 0.501, 1.0):
        found, expected = denoiser(x, t), (whole if 0.25 <= t <= 0.5 else alone)(x, t)
        assert torch.equal(found.raw, expected.raw)
        assert torch.equal(found.x0, expected.x0)
        assert (whole(x, t).raw - alone(x, t).raw).abs().max() > 1e-3


def test_an_interval_of_all_times_changes_no_image(folders: dict[str, Path]):
    model = load(folders["stable_diffusion"])
    plain, whole, none, unguided = (
        generate(model, PROMPTS, [1, 2], SamplerConfig(4, scale, guidance_interval=bounds))
        for scale, bounds in ((5.0, None), (5.0, [0.0, 1.0]), (5.0, [0.0, 0.0]), (1.0, None))
    )
    assert torch.equal(whole, plain)
    assert torch.equal(none, unguided)
    assert (plain - none).abs().max() > 0.05


def test_policy_and_reference_are_guided_alike(folders: dict[str, Path]):
    model = load(folders["stable_diffusion"])
    for bounds in ([0.0, 0.5], [0.5, 1.0]):
        sampler = SamplerConfig(4, 5.0, **SIZES, guidance_interval=bounds)
        loss = objective(sampler, truncation_steps=2).loss(model, PROMPTS, Rng([1, 2]))
        assert loss.metrics["kl"] == 0
        loss.value.backward()
        gradients = [p.grad for p in model.trainable().values()]
        assert all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(
    "bounds", [[0.2], [0.2, 0.4, 0.6], [], [0.6, 0.2], [-0.1, 0.5], [0.5, 1.5], [float("nan"), 1.0]]
)
def test_what_is_no_interval_is_refused(bounds: list[float]):
    config, _ = compose_train(GIVEN)
    check_train(replace(config, sampler=SamplerConfig(guidance_interval=[0.5, 0.5])), 1)
    with pytest.raises(ValueError, match=r"sampler\.guidance_interval") as caught:
        check_train(replace(config, sampler=SamplerConfig(guidance_interval=bounds)), 1)
    assert_explained(str(caught.value), "sampler.guidance_interval", None, "give")


def test_without_classifier_free_guidance_an_interval_is_refused(folders: dict[str, Path]):
    sampler = SamplerConfig(2, 3.5, **SIZES, guidance_interval=[0.2, 0.8])
    with pytest.raises(ValueError, match=r"guidance_interval") as caught:
        find_family(ModelConfig(str(folders["flux"])), sampler)
    assert_explained(str(caught.value), "sampler.guidance_interval", [0.2, 0.8], "input of its net")
    model = load(folders["flux"])
    with pytest.raises(ValueError, match="this model makes none"):
        generate(model, PROMPTS, [1, 2], sampler)
    find_family(ModelConfig(str(folders["qwen_image"])), sampler)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"eta": 0.5, "solver": "dpmpp_2m"}, "set sampler.eta=0, or sampler.solver=first_order"),
        ({"eta": 1.0, "solver": "dpmpp_2m"}, "sampler.eta=1.0 adds noise"),
    ],
)
def test_a_solver_that_cannot_take_noise_is_refused(settings: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        check_sampler(SamplerConfig(**settings))
    for key, value in (("eta", 0.0), ("solver", "first_order")):
        check_sampler(SamplerConfig(**{**settings, key: value}))


# --- Kept prompts


def counted(model: PipelineModel, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return the batches of prompts that the text encoders read from now on."""
    batches: list[list[str]] = []
    encode = model.encode

    def note(prompts: list[str]) -> Conditioning:
        batches.append(prompts)
        return encode(prompts)

    monkeypatch.setattr(model, "encode", note)
    return batches


def assert_equal(found: Conditioning, expected: Conditioning) -> None:
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name


@pytest.mark.parametrize("name", list(WRITERS))
def test_a_kept_prompt_is_what_it_is_alone(
    folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
):
    model = load(folders[name])
    long = "a very long description of a small blue ring " * 3
    alone = {each: model.encode_prompts([each]) for each in (*PROMPTS, "", long)}
    batches = counted(model, monkeypatch)
    unguided = SamplerConfig(guidance_scale=1.0, prompt_cache=4)
    for prompts in ([PROMPTS[0], long], [long, PROMPTS[1]], [*PROMPTS, PROMPTS[0], ""]):
        expected = Conditioning.stack([alone[each] for each in prompts])
        assert_equal(model.encode_alone(prompts, 4), expected)
        assert_equal(encode_guided(model, prompts, unguided).cond, expected)
    assert batches == [[PROMPTS[0]], [long], [PROMPTS[1]], [""]]
    guided = encode_guided(model, PROMPTS, replace(unguided, guidance_scale=5.0))
    if model.has_cfg:
        assert guided.uncond is not None
        assert_equal(guided.uncond, Conditioning.stack([alone[""]] * 2))
    assert len(batches) == 4
    assert not any(tensor.requires_grad for tensor in guided.cond.tensors.values())


def test_what_was_used_last_is_kept(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    model = load(folders["stable_diffusion"])
    batches = counted(model, monkeypatch)
    for prompt in ("a", "b", "a", "c", "a", "b", "b"):  # c takes b's place, b takes c's
        model.encode_alone([prompt], 2)
    assert batches == [["a"], ["b"], ["c"], ["b"]]
    batches.clear()
    model.encode_alone(["d", "e", "f", "d"], 2)  # more than are kept
    assert batches == [["d"], ["e"], ["f"], ["d"]]


def test_nothing_is_kept_by_default(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    model = load(folders["qwen_image"])
    expected = Guided(model.encode_prompts(PROMPTS), model.encode_prompts([""]).repeat(2))
    batches = counted(model, monkeypatch)
    for _ in range(2):
        found = encode_guided(model, PROMPTS, SamplerConfig(guidance_scale=5.0))
        assert_equal(found.cond, expected.cond)
        assert found.uncond is not None and expected.uncond is not None
        assert_equal(found.uncond, expected.uncond)
    assert batches == [PROMPTS, [""]] * 2


@pytest.mark.parametrize("name", ["stable_diffusion", "qwen_image"])
def test_a_loss_does_not_depend_on_what_was_kept_before(folders: dict[str, Path], name: str):
    sampler = SamplerConfig(2, 2.0, **SIZES, prompt_cache=3)
    fresh, used = load(folders[name]), load(folders[name])
    for prompts in (["", "x" * 60], PROMPTS, ["a star"]):
        generate(used, prompts, range(len(prompts)), sampler)
    aim = objective(sampler, kl_coeff=0.0)
    losses = [aim.loss(each, PROMPTS, Rng([1, 2])).value for each in (fresh, used)]
    assert torch.equal(*losses)


def test_half_precision_is_kept_apart(folders: dict[str, Path]):
    model = load(folders["stable_diffusion"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.encode_alone(PROMPTS, 4).tensors["states"]
        assert torch.equal(model.encode_alone(PROMPTS, 4).tensors["states"], half)
    full = model.encode_alone(PROMPTS, 4).tensors["states"]
    alone = Conditioning.stack([model.encode_prompts([each]) for each in PROMPTS])
    assert torch.equal(full, alone.tensors["states"])
    assert not torch.equal(full, half.float())


@pytest.mark.parametrize("parts", ["[network,text_encoder]", "[text_encoder]"])
def test_states_of_a_trained_encoder_are_not_kept(folders: dict[str, Path], parts: str):
    given = [*GIVEN, f"model.parts={parts}"]
    compose_train(given)
    with pytest.raises(ValueError, match=r"prompt_cache=8") as caught:
        compose_train([*given, "sampler.prompt_cache=8"])
    assert_explained(str(caught.value), "sampler.prompt_cache", 8, "model.parts")
    compose_train([*GIVEN, "model.parts=[unet]", "sampler.prompt_cache=8"])
    model = load(folders["stable_diffusion"], parts=parts.strip("[]").split(","))
    with pytest.raises(ValueError, match=r"sampler\.prompt_cache=8 .* set sampler\.prompt_cache=0"):
        generate(model, PROMPTS, [1, 2], SamplerConfig(2, **SIZES, prompt_cache=8))


# --- Whole runs

ALL = (
    "sampler.solver=dpmpp_2m",
    "sampler.guidance_interval=[0.2,0.9]",
    "sampler.training_steps=4",
    "sampler.prompt_cache=3",
    "objective.truncation_range=[1,4]",
)


@pytest.mark.parametrize("moment", [("take_step", 4), ("Validation._record", 2)])
def test_a_killed_run_goes_on_bitwise(
    tmp_path: Path, moment: tuple[str, int], monkeypatch: pytest.MonkeyPatch
):
    use_toy(monkeypatch)
    name, number = moment
    start(command(tmp_path, "whole", *ALL))

    def killed() -> None:
        on_call(number, kill, name)
        start(command(tmp_path, "killed", *ALL))

    assert in_child(killed) == -9
    assert in_child(lambda: start(command(tmp_path, "killed", *ALL))) == 0
    assert_same_state(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("name", ["stable_diffusion", "qwen_image"])
def test_a_run_is_exported_verified_sampled(folders: dict[str, Path], tmp_path: Path, name: str):
    spacing = ["sampler.training_spacing=trailing"] if name in TABLES else []
    sizes = [f"sampler.height={PIXELS}", f"sampler.width={PIXELS}"]
    more = [*ALL, *spacing, *sizes, "verify=true", "training.max_steps=1"]
    start(command(tmp_path, "run", *more, model=folders[name]))
    note = json.loads((tmp_path / "run" / "export.json").read_text())
    assert all("verified: diffusers gives the same image" in each for each in note["exports"])

    def opened(*settings: str) -> SamplerConfig:
        given = [f"run={tmp_path / 'run'}", "prompt=x", *settings]
        config = compose_command("sample", given)[0]
        assert isinstance(config, SampleConfig)
        return open_model(config).sampler

    of_run = opened()
    assert (of_run.solver, of_run.guidance_interval) == ("dpmpp_2m", [0.2, 0.9])
    other = opened("sampler.solver=first_order", "sampler.guidance_interval=[0,1]")
    assert (other.solver, other.guidance_interval, other.prompt_cache) == ("first_order", [0, 1], 3)
    for wrong, said in (
        ("sampler.eta=0.5", "set sampler.eta=0, or sampler.solver=first_order"),
        ("sampler.guidance_interval=[1,0]", "give [low, high]"),
        ("sampler.guidance_scale=1 sampler.guidance_interval=[0,1]", "has no effect with"),
        ("sampler.solver=euler", "one of first_order, dpmpp_2m"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            opened(*wrong.split())


def test_an_evaluation_is_told_apart_by_what_images_depend_on():
    config, _ = compose_train(GIVEN)

    def sampler(**settings: Any) -> dict[str, Any]:
        changed = replace(config, sampler=SamplerConfig(20, 4.0, **settings))
        study = Study(ToyModel(config.model), changed, None, PROMPTS, 2, 0, 2, "pixels")
        return study.settings()["sampler"]

    older = {"num_inference_steps": 20, "guidance_scale": 4.0, "eta": 0.0}
    older |= {"height": None, "width": None}
    assert sampler() == older
    assert sampler(training_steps=3, training_spacing="leading", prompt_cache=4) == older
    assert sampler(solver="dpmpp_2m") == {**older, "solver": "dpmpp_2m"}
    interval = {"guidance_interval": [0.1, 0.5]}
    assert sampler(**interval) == {**older, **interval}
