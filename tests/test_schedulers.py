"""Pictures by scheduler classes of diffusers, equal to diffusers' pipelines with these classes."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from refusals import assert_explained
from runs import command, start
from tiny_flux import reference_flux, write_tiny_flux
from tiny_qwen_image import reference_qwen_image, write_tiny_qwen_image
from tiny_sd import reference_pipeline, write_tiny_sd
from tiny_sd3 import reference_sd3, write_tiny_sd3
from tiny_sdxl import reference_sdxl, write_tiny_sdxl
from torch import Tensor
from toy import ToyModel
from trajectories import PROMPTS

from sfumato.check import check_sampler
from sfumato.compose import compose_command, compose_train
from sfumato.conditions import check_sample
from sfumato.config import ModelConfig, SampleConfig, SamplerConfig, check_values
from sfumato.config.train import FLOW_SCHEDULERS, SCHEDULERS
from sfumato.evaluation.commands import open_model
from sfumato.evaluation.study import Study
from sfumato.models.generate import generate
from sfumato.models.loading import load_family
from sfumato.models.pipeline_model import PipelineModel
from sfumato.models.registry import find_family

UNIPC = "UniPCMultistepScheduler"
DRAWING = ("EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LCMScheduler",
           "DDPMScheduler")  # fmt: skip
FAMILIES: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "sd1": (write_tiny_sd, reference_pipeline),
    "sd2": (partial(write_tiny_sd, prediction_type="v_prediction"), reference_pipeline),
    "sdxl": (write_tiny_sdxl, reference_sdxl),
    "sd3": (write_tiny_sd3, reference_sd3),
    "flux": (write_tiny_flux, reference_flux),
    "schnell": (partial(write_tiny_flux, distilled=False), reference_flux),
    "qwen_image": (write_tiny_qwen_image, reference_qwen_image),
}
FLOWS = ("sd3", "flux", "schnell", "qwen_image")
SIZES: dict[str, Any] = {"height": 32, "width": 32}
GIVEN = ["model.pretrained=M", "data.prompts=P", "reward=color"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    for name, (write, _) in FAMILIES.items():
        write(root / name)
    return {name: root / name for name in FAMILIES}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, PipelineModel]:
    found = {}
    for name, folder in folders.items():
        config = ModelConfig(str(folder))
        found[name] = load_family(*find_family(config), config)
    return found


def by_diffusers(model: PipelineModel, pipeline: Any, sampler: SamplerConfig) -> Tensor:
    """Return the images of diffusers' pipeline, whose noise is of the seeds 1 and 2."""
    streams = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    shape = model.latent_shape(**SIZES)
    noise = torch.stack([torch.randn(shape, generator=stream) for stream in streams])
    return pipeline(
        PROMPTS,
        **SIZES,
        num_inference_steps=sampler.num_inference_steps,
        output_type="pt",
        generator=streams,
        **model.pipeline_arguments(noise, sampler.guidance_scale),
    ).images


WAYS = [
    *(("sd1", name) for name in SCHEDULERS),
    *(("sd2", name) for name in (*SCHEDULERS[:5], *DRAWING[:1])),
    *(("sdxl", name) for name in (UNIPC, "EulerAncestralDiscreteScheduler")),
]


@pytest.mark.parametrize(("family", "name"), WAYS)
def test_pictures_equal_those_of_diffusers(
    folders: dict[str, Path], models: dict[str, PipelineModel], family: str, name: str
) -> None:
    """Over epsilon and v-prediction; noise that a class draws is of each image's own seed."""
    pipeline = FAMILIES[family][1](folders[family])
    kind = getattr(diffusers, name)
    pipeline.scheduler = kind.from_pretrained(folders[family], subfolder="scheduler")
    sampler = SamplerConfig(5, 4.0, **SIZES, scheduler=name)
    found = generate(models[family], PROMPTS, [1, 2], sampler)
    expected = by_diffusers(models[family], pipeline, sampler)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert expected.std() > 0.05
    plain = generate(models[family], PROMPTS, [1, 2], replace(sampler, scheduler=None))
    assert name == "DDIMScheduler" or (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [4, 7])
@pytest.mark.parametrize("family", FLOWS)
def test_pictures_of_flow_models_equal_those_of_diffusers(
    folders: dict[str, Path], models: dict[str, PipelineModel], family: str, steps: int
) -> None:
    pipeline = FAMILIES[family][1](folders[family])
    settings = pipeline.scheduler.config
    pipeline.scheduler = getattr(diffusers, UNIPC).from_config(
        settings,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=settings["shift"],
    )
    sampler = SamplerConfig(steps, 3.5, **SIZES, scheduler=UNIPC)
    found = generate(models[family], PROMPTS, [1, 2], sampler)
    expected = by_diffusers(models[family], pipeline, sampler)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    plain = generate(models[family], PROMPTS, [1, 2], replace(sampler, scheduler=None))
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", [UNIPC, *DRAWING])
def test_an_image_depends_on_its_own_seed(models: dict[str, PipelineModel], name: str) -> None:
    sampler = SamplerConfig(4, 4.0, **SIZES, scheduler=name)
    both = generate(models["sd1"], PROMPTS, [1, 2], sampler)
    alone = generate(models["sd1"], PROMPTS[1:], [2], sampler)
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)
    assert torch.equal(generate(models["sd1"], PROMPTS[1:], [2], sampler), alone)
    assert (generate(models["sd1"], PROMPTS[1:], [3], sampler) - alone).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", UNIPC])
def test_policy_and_reference_are_mixed_at_its_times(
    models: dict[str, PipelineModel], name: str
) -> None:
    """An adapter that has learnt nothing is the reference, and mixing changes nothing."""
    sampler = SamplerConfig(4, 4.0, **SIZES, scheduler=name, guidance_interval=[0.2, 0.9])
    policy, base, mixed = (
        generate(models["sd1"], PROMPTS, [1, 2], sampler, schedule=schedule)
        for schedule in ("draft", "base", "linear")
    )
    assert torch.equal(policy, base)
    torch.testing.assert_close(mixed, policy, atol=1e-5, rtol=0)


# --- Settings


def test_rollouts_of_training_keep_the_solver(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation's pictures are stepped by the class; the loss is that of a run without it."""
    stepped: list[str] = []
    scheduled = PipelineModel.scheduled

    def note(model: PipelineModel, name: str, *more: Any) -> Any:
        stepped.append(name)
        return scheduled(model, name, *more)

    monkeypatch.setattr(PipelineModel, "scheduled", note)
    small = ["sampler.height=32", "sampler.width=32", "training.max_steps=1", "verify=true"]
    small += ["validation.every_steps=1", "objective.truncation_steps=1"]
    losses = []
    for name, more in (("plain", []), ("unipc", [f"sampler.scheduler={UNIPC}"])):
        start(command(tmp_path, name, *small, *more, model=folders["sd1"]))
        rows = (tmp_path / name / "metrics.jsonl").read_text()
        losses.append(re.findall(r'"loss": [^,}]+', rows))
        assert set(stepped) == ({UNIPC} if more else set())
    assert losses[0] == losses[1] != []

    def opened(*settings: str) -> SamplerConfig:
        config = compose_command("sample", [f"run={tmp_path / 'unipc'}", "prompt=x", *settings])[0]
        assert isinstance(config, SampleConfig)
        check_sample(config)
        return open_model(config).sampler

    assert opened().scheduler == UNIPC
    assert opened("sampler.scheduler=PNDMScheduler").scheduler == "PNDMScheduler"
    other = opened("sampler.solver=dpmpp_2m")  # in place of the run's class
    assert (other.solver, other.scheduler) == ("dpmpp_2m", None)
    with pytest.raises(ValueError, match=r"sampler\.solver=dpmpp_2m has no effect with sampler\.s"):
        opened("sampler.solver=dpmpp_2m", f"sampler.scheduler={UNIPC}")
    with pytest.raises(ValueError, match=r"sampler\.scheduler: None -> UniPC"):
        start(command(tmp_path, "plain", *small, f"sampler.scheduler={UNIPC}",
                      model=folders["sd1"]))  # fmt: skip


@pytest.mark.parametrize("name", ["UniPC", "EDMEulerScheduler", "unipcmultistepscheduler", ""])
def test_an_unknown_class_is_refused_with_the_choices(name: str) -> None:
    for key in ("train", "sample"):
        given = GIVEN if key == "train" else ["pretrained=M", "prompt=x"]
        with pytest.raises(ValueError, match=r"sampler\.scheduler") as caught:
            check_values(compose_command(key, [*given, f"sampler.scheduler={name}"])[0])
        assert_explained(str(caught.value), "sampler.scheduler", name, *SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("family", ["sd3", "qwen_image"])
def test_a_class_of_noise_schedules_is_refused_for_flows(
    folders: dict[str, Path], models: dict[str, PipelineModel], family: str, name: str
) -> None:
    config, sampler = ModelConfig(str(folders[family])), SamplerConfig(4, **SIZES, scheduler=name)
    if name in FLOW_SCHEDULERS:
        find_family(config, sampler)
        return
    with pytest.raises(ValueError, match=r"predicts a flow") as caught:
        find_family(config, sampler)
    assert_explained(str(caught.value), "sampler.scheduler", name, *FLOW_SCHEDULERS)
    with pytest.raises(ValueError, match=r"predicts a flow"):
        generate(models[family], PROMPTS, [1, 2], sampler)
    find_family(ModelConfig(str(folders["sdxl"])), sampler)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_noise_of_our_own_is_refused(eta: float) -> None:
    with pytest.raises(ValueError, match=r"sampler\.eta") as caught:
        check_sampler(SamplerConfig(eta=eta, scheduler=UNIPC))
    assert_explained(str(caught.value), "sampler.eta", eta, UNIPC)
    check_sampler(SamplerConfig(scheduler=UNIPC))


def test_a_model_of_ones_own_has_no_scheduler() -> None:
    model = ToyModel(ModelConfig("toy"))
    with pytest.raises(ValueError, match="ToyModel is none; leave it out") as caught:
        generate(model, PROMPTS, [1, 2], SamplerConfig(4, scheduler=UNIPC))
    assert_explained(str(caught.value), "sampler.scheduler", UNIPC)


def test_an_evaluation_is_told_apart_by_it() -> None:
    config, _ = compose_train(GIVEN)

    def settings(**given: Any) -> dict[str, Any]:
        changed = replace(config, sampler=SamplerConfig(20, 4.0, **given))
        study = Study(ToyModel(config.model), changed, None, PROMPTS, 2, 0, 2, "pixels")
        return study.settings()["sampler"]

    assert "scheduler" not in settings()  # as in evaluations of older versions
    assert settings(scheduler=UNIPC) == {**settings(), "scheduler": UNIPC}
