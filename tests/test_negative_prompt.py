"""The negative prompt: what guidance leads away from, in every family as in diffusers."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import write_pictures
from refusals import assert_explained
from runs import command, start, start_cli
from test_methods import METHODS, run_of
from tiny_flux import reference_flux, write_tiny_flux
from tiny_qwen_image import reference_qwen_image, write_tiny_qwen_image
from tiny_sd import reference_pipeline, write_tiny_sd
from tiny_sd3 import reference_sd3, write_tiny_sd3
from tiny_sdxl import reference_sdxl, write_tiny_sdxl
from torch import Tensor
from toy import ToyModel, use_toy
from trajectories import PROMPTS, our_run, their_run

from sfumato.check import check_sampler
from sfumato.compose import compose_command, compose_train
from sfumato.config import ModelConfig, SampleConfig, SamplerConfig
from sfumato.diffusion.randomness import Rng
from sfumato.evaluation.commands import open_model
from sfumato.evaluation.study import Study
from sfumato.models.flux import pack
from sfumato.models.generate import encode_guided, generate
from sfumato.models.loading import load_family
from sfumato.models.model import Conditioning
from sfumato.models.pipeline_model import PipelineModel
from sfumato.models.registry import find_family

NEGATIVE = "blurry, ugly, a long list of faults that no picture has"
FAMILIES: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "sd1": (write_tiny_sd, reference_pipeline),
    "sd2": (partial(write_tiny_sd, prediction_type="v_prediction"), reference_pipeline),
    "sdxl": (write_tiny_sdxl, reference_sdxl),
    "sd3": (write_tiny_sd3, reference_sd3),
    "flux": (partial(write_tiny_flux, distilled=False), reference_flux),
    "qwen_image": (write_tiny_qwen_image, reference_qwen_image),
}
PACKED = ("flux", "qwen_image")
SIZES: dict[str, Any] = {"height": 32, "width": 32}
GIVEN = ["model.pretrained=M", "data.prompts=P", "reward=color"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    for name, (write, _) in FAMILIES.items():
        write(root / name)
    write_tiny_flux(root / "distilled")
    return {name: root / name for name in (*FAMILIES, "distilled")}


def load(folder: Path, **settings: Any) -> PipelineModel:
    config = ModelConfig(str(folder), **settings)
    family, place = find_family(config)
    return load_family(family, place, config)


def starting_noise(model: PipelineModel) -> Tensor:
    return Rng([1, 2]).normal(*model.latent_shape(**SIZES))


# --- As in diffusers


@pytest.mark.parametrize("negative", ["x", NEGATIVE * 12])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_trajectory_equals_diffusers_pipeline(
    folders: dict[str, Path], name: str, negative: str
) -> None:
    model, pipeline = load(folders[name]), FAMILIES[name][1](folders[name])
    if name == "sdxl":  # whose release steps in another scale
        pipeline.scheduler = type(model.scheduler).from_config(model.scheduler.config)
    noise = starting_noise(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of prompts that are cut
        ours, images = our_run(model, noise, 4, 4.0, negative=negative)
    given = {"negative_prompt": [negative] * 2}
    theirs, their_images = their_run(model, pipeline, noise, 4, 4.0, **given)
    states = torch.stack([pack(x) for x in ours] if name in PACKED else ours)
    torch.testing.assert_close(states, torch.stack(theirs), atol=1e-4, rtol=0)
    torch.testing.assert_close(images, their_images, atol=1e-4, rtol=0)
    assert (images - our_run(model, noise, 4, 4.0)[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_and_an_export_know_it(folders: dict[str, Path], name: str) -> None:
    model = load(folders[name])
    sampler = SamplerConfig(4, 4.0, **SIZES, negative_prompt=NEGATIVE)
    image = generate(model, PROMPTS[:1], [1], sampler)
    noise = Rng([1]).normal(*model.latent_shape(**SIZES))
    model.save_pipeline(folders[name].parent / f"export-{name}" / "pipeline", torch.float32)
    export = folders[name].parent / f"export-{name}"
    other = model.image_elsewhere(export, "pipeline", PROMPTS[0], noise, sampler)
    torch.testing.assert_close(other.clamp(0, 1), image, atol=1e-4, rtol=0)
    assert (generate(model, PROMPTS[:1], [1], replace(sampler, negative_prompt=None)) - image).any()


@pytest.mark.parametrize("empty", [None, ""])
@pytest.mark.parametrize("name", FAMILIES)
def test_none_is_the_empty_prompt(folders: dict[str, Path], name: str, empty: str | None) -> None:
    model = load(folders[name])
    plain = SamplerConfig(2, 4.0, **SIZES)
    found = encode_guided(model, PROMPTS, replace(plain, negative_prompt=empty)).uncond
    expected = model.encode_prompts([""]).repeat(2)
    assert found is not None
    for key, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[key], tensor)


def test_zeros_stand_for_the_empty_prompt_of_sdxl_alone(folders: dict[str, Path]) -> None:
    model = load(folders["sdxl"])
    assert model.pipeline.config.force_zeros_for_empty_prompt
    for negative, zero in ((None, True), ("", True), (NEGATIVE, False), (" ", False)):
        sampler = SamplerConfig(guidance_scale=4.0, negative_prompt=negative)
        found = encode_guided(model, PROMPTS, sampler).uncond
        assert found is not None
        for key in ("states", "pooled"):
            assert (found.tensors[key] == 0).all() == zero, negative


def test_a_long_one_is_cut_and_said_once(folders: dict[str, Path]) -> None:
    model = load(folders["sd1"])
    sampler = SamplerConfig(2, 4.0, **SIZES, negative_prompt="x" * 80)
    with pytest.warns(UserWarning, match=r"cut at 77 tokens; the first one cut has 82: 'xxx"):
        found = generate(model, PROMPTS, [1, 2], sampler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = generate(model, PROMPTS, [1, 2], replace(sampler, negative_prompt="x" * 90))
    assert torch.equal(found, same)


def test_kept_prompts_include_it(folders: dict[str, Path]) -> None:
    model, read = load(folders["sd1"]), []
    encode = model.encode

    def note(prompts: list[str]) -> Conditioning:
        read.extend(prompts)
        return encode(prompts)

    model.encode = note  # pyright: ignore
    sampler = SamplerConfig(2, 4.0, **SIZES, negative_prompt=NEGATIVE)
    plain = [generate(model, [each], [1], sampler) for each in PROMPTS]
    assert read == [PROMPTS[0], NEGATIVE, PROMPTS[1], NEGATIVE]
    read.clear()
    kept = [generate(model, [p], [1], replace(sampler, prompt_cache=4)) for p in PROMPTS]
    assert read == [PROMPTS[0], NEGATIVE, PROMPTS[1]]
    assert torch.equal(torch.cat(kept), torch.cat(plain))


# --- In training and evaluation


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Use the toy, and return the texts that it encodes from now on."""
    texts: set[str] = set()
    encode = ToyModel.encode_prompts

    def note(model: ToyModel, prompts: Any, **more: Any) -> Conditioning:
        texts.update(prompts)
        return encode(model, prompts, **more)

    monkeypatch.setattr(ToyModel, "encode_prompts", note)
    use_toy(monkeypatch)
    return texts


@pytest.mark.parametrize("method", METHODS)
def test_rollouts_of_every_method_read_it(tmp_path: Path, read: set[str], method: str) -> None:
    small = ("training.max_steps=1", "validation.every_steps=0")
    start(run_of(tmp_path, "run", method, *small, "sampler.negative_prompt=ugly"))
    guided = method != "ddrl" or "ugly" in read
    assert guided
    assert "" not in read


@pytest.mark.parametrize(("share", "dropped"), [("0", False), ("1", True)])
def test_caption_dropout_stays_the_empty_prompt(
    tmp_path: Path, read: set[str], share: str, dropped: bool
) -> None:
    pictures = write_pictures(tmp_path / "pictures", pixels=4)
    given = ["objective=supervised", f"data.images.path={pictures}", "data.images.workers=0"]
    given += [f"objective.caption_dropout={share}", "reward=none", "training.max_steps=1"]
    given += ["validation.every_steps=1", "validation.loss_images=0"]
    given += ["sampler.negative_prompt=ugly"]
    given = command(tmp_path, "run", *given)
    start([text for text in given if not text.startswith("objective.kl_coeff")])
    assert ("" in read) == dropped
    assert "ugly" in read  # by the images of validation


def test_a_run_goes_on_with_the_same_one_alone(tmp_path: Path, read: set[str]) -> None:
    start(command(tmp_path, "run", "sampler.negative_prompt=ugly", "training.max_steps=2"))
    for other in ("sampler.negative_prompt=", "sampler.negative_prompt=blurred"):
        with pytest.raises(ValueError, match=r"sampler\.negative_prompt: ugly -> "):
            start(command(tmp_path, "run", other, "training.max_steps=3"))
    start(command(tmp_path, "run", "sampler.negative_prompt=ugly", "training.max_steps=3"))
    start(command(tmp_path, "plain", "training.max_steps=2"))
    with pytest.raises(ValueError, match=r"sampler\.negative_prompt: None -> ugly"):
        start(command(tmp_path, "plain", "training.max_steps=3", "sampler.negative_prompt=ugly"))


def test_an_evaluation_is_told_apart_by_it() -> None:
    config, _ = compose_train(GIVEN)

    def settings(**given: Any) -> dict[str, Any]:
        changed = replace(config, sampler=SamplerConfig(20, 4.0, **given))
        study = Study(ToyModel(config.model), changed, None, PROMPTS, 2, 0, 2, "pixels")
        return study.settings()["sampler"]

    assert "negative_prompt" not in settings()  # as in evaluations of older versions
    assert settings(negative_prompt="") == settings()
    assert settings(negative_prompt="ugly") == {**settings(), "negative_prompt": "ugly"}


def test_pictures_of_a_run_have_its_own_or_another(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    given = ["sampler.height=32", "sampler.width=32", "training.max_steps=1", "verify=true"]
    given += ["sampler.negative_prompt=ugly", "objective.truncation_steps=1"]
    start(command(tmp_path, "run", *given, model=folders["sd1"]))
    note = json.loads((tmp_path / "run" / "export.json").read_text())
    assert all("verified: diffusers gives the same image" in each for each in note["exports"])

    def opened(*settings: str) -> Any:
        given = [f"run={tmp_path / 'run'}", "prompt=x", *settings]
        config = compose_command("sample", given)[0]
        assert isinstance(config, SampleConfig)
        return open_model(config)

    assert opened().sampler.negative_prompt == "ugly"
    assert opened("sampler.negative_prompt=").sampler.negative_prompt == ""
    other = opened("sampler.negative_prompt=1.10")
    assert other.origin["sampler"]["negative_prompt"] == "1.10"  # noted beside the pictures
    with pytest.raises(ValueError, match=r"has no effect with sampler\.guidance_scale=1; leave it"):
        opened("sampler.guidance_scale=1", "sampler.negative_prompt=blurred")
    opened("sampler.guidance_scale=1")
    with pytest.raises(ValueError, match=r"negative_prompt='a.*' is not UTF-8"):
        opened("sampler.negative_prompt=a\udcff")


# --- What cannot be


def test_a_model_without_classifier_free_guidance_refuses_it(folders: dict[str, Path]) -> None:
    sampler = SamplerConfig(2, 3.5, **SIZES, negative_prompt="ugly")
    with pytest.raises(ValueError, match="negative_prompt") as caught:
        find_family(ModelConfig(str(folders["distilled"])), sampler)
    assert_explained(str(caught.value), "sampler.negative_prompt", "ugly", "input of its network")
    with pytest.raises(ValueError, match="this model makes none"):
        generate(load(folders["distilled"]), PROMPTS, [1, 2], sampler)
    for empty in (None, ""):
        plain = replace(sampler, negative_prompt=empty)
        find_family(ModelConfig(str(folders["distilled"])), plain)
        generate(load(folders["distilled"]), PROMPTS, [1, 2], plain)
    find_family(ModelConfig(str(folders["flux"])), sampler)


@pytest.mark.parametrize("text", ["a\udcff", "a\0b", "x" * 10_001])
def test_what_is_no_prompt_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not UTF-8, or has more than 10,000") as caught:
        check_sampler(SamplerConfig(negative_prompt=text))
    assert_explained(str(caught.value), "sampler.negative_prompt", text[:40])
    check_sampler(SamplerConfig(negative_prompt="x" * 10_000))


@pytest.mark.parametrize("written", ["[ugly, blurred]", "{a: 1}"])
def test_a_recipe_with_something_else_is_refused(
    tmp_path: Path, written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe").mkdir()
    text = f"# @package _global_\n# Odd.\nsampler:\n  negative_prompt: {written}\n"
    (tmp_path / "recipe" / "odd.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        start_cli(["--config-dir", str(tmp_path), "recipe=odd", *GIVEN])
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1)
    assert_explained(said.strip(), "sampler.negative_prompt")


@pytest.mark.parametrize(
    ("typed", "taken"),
    [("null", None), ("", ""), ("[a,b]", "[a,b]"), ("1.10", "1.10"), ('${x}, "a"', '${x}, "a"')],
)
def test_a_text_is_taken_as_typed(typed: str, taken: str | None) -> None:
    config, _ = compose_train([*GIVEN, f"sampler.negative_prompt={typed}"])
    assert config.sampler.negative_prompt == taken
