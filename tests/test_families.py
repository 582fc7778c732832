"""What every family does alike: supervised and DRaFT+ training, exports, and refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import COLORS, PIXELS, WRITERS, write_pictures
from nightly import nightly_but
from runs import start

from sfumato.compose import compose_train
from sfumato.config import (
    CONF,
    ColorRewardConfig,
    DraftConfig,
    ModelConfig,
    SamplerConfig,
    SupervisedConfig,
)
from sfumato.data.sample import Sample
from sfumato.diffusion.randomness import Rng
from sfumato.models.loading import load_family
from sfumato.models.model import Conditioning, TextToImageModel
from sfumato.models.pipeline_model import PipelineModel
from sfumato.models.registry import FAMILIES, find_family, load_model
from sfumato.objectives.draft import Draft
from sfumato.objectives.supervised import Supervised
from sfumato.rewards.build import build_reward
from sfumato.run.run import Own, train
from sfumato.training.distribution import Distribution
from sfumato.training.folder import RunFolder
from sfumato.training.tracking import read_metrics

NAMES = list(WRITERS)
SAMPLER = SamplerConfig(num_inference_steps=3, guidance_scale=3.0, height=PIXELS, width=PIXELS)
PROMPTS = ["a red star", "a small blue ring on a yellow background"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    for name, write in WRITERS.items():
        write(root / name)
    return {name: root / name for name in WRITERS}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


def load(folder: Path, **settings: object) -> PipelineModel:
    config = replace(ModelConfig(pretrained=str(folder)), **settings)  # pyright: ignore
    family, place = find_family(config)
    return load_family(family, place, config)


def test_every_family_is_tested_here():
    assert FAMILIES.keys() == WRITERS.keys()


# --- Objectives


def batch() -> list[Sample]:
    images = [
        torch.tensor(color)[:, None, None].expand(3, PIXELS, PIXELS) for color in COLORS.values()
    ]
    return [
        Sample(2 * image - 1, f"a {name} picture", (50, 40), (3, 5), name)
        for name, image in zip(COLORS, images, strict=True)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_supervised_loss_equals_the_formula_by_hand(folders: dict[str, Path], name: str):
    model, rows = load(folders[name]), batch()
    config = SupervisedConfig(guidance_scale=2.0, sample_latents=False)
    found = Supervised(config).loss(model, rows, Rng([1, 2, 3]))

    rng = Rng([1, 2, 3])
    with torch.no_grad():
        x0 = model.encode_images(torch.stack([row.image for row in rows]))
        noise, u = rng.normal(*x0.shape[1:]), rng.uniform()
        if name.startswith("stable_diffusion") and name != "stable_diffusion_3":
            steps = (u * 1000).long()
            table = model.scheduler.alphas_cumprod[steps].double()
            alpha, sigma = table.sqrt().float(), (1 - table).sqrt().float()
            t, target = (steps + 1) / 1000, noise
        else:
            alpha, sigma, t, target = 1 - u, u, u, noise - x0
        shape = (-1, 1, 1, 1)
        x_t = alpha.reshape(shape) * x0 + sigma.reshape(shape) * noise
        from sfumato.models.model import Framing

        framing = [Framing(row.original, row.crop) for row in rows]
        cond = model.encode_prompts([row.caption for row in rows], framing=framing)
        raw = model.predict(model.network, x_t, t, cond, 2.0)
        expected = (raw - target).square().mean()
    torch.testing.assert_close(found.value.detach(), expected, atol=1e-5, rtol=1e-5)
    found.value.backward()
    gradients = [p.grad for p in model.trainable().values()]
    assert all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_draft_plus(folders: dict[str, Path], name: str, trainable: str):
    model = load(folders[name], trainable=trainable)
    reward = build_reward(ColorRewardConfig())
    config = DraftConfig(kl_coeff=1.0, truncation_steps=2, clamp_images=False)
    objective = Draft(config, SAMPLER, reward)
    first = objective.loss(model, PROMPTS, Rng([1, 2]))
    first.value.backward()
    parameters = model.trainable()
    gradients = {n: p.grad for n, p in parameters.items()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert first.metrics["kl"] == 0
    torch.optim.Adam(parameters.values(), lr=3e-3).step()
    second = objective.loss(model, PROMPTS, Rng([1, 2]))
    assert second.metrics["kl"] > 1e-8
    assert second.metrics["reward"] > first.metrics["reward"]


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_other_lengths_stack(folders: dict[str, Path], name: str):
    model = load(folders[name])
    noise = Rng([1, 2]).normal(*model.latent_shape(PIXELS, PIXELS))
    apart = [model.encode_prompts([prompt]) for prompt in PROMPTS]
    with torch.no_grad():
        together = model.denoiser(Conditioning.stack(apart))(noise, 0.5).raw
        whole = model.denoiser(model.encode_prompts(PROMPTS))(noise, 0.5).raw
    torch.testing.assert_close(together, whole, atol=1e-4, rtol=1e-4)


# --- Runs


def run(
    tmp_path: Path, folder: Path, pictures: Path, objective: str, *more: str
) -> list[dict[str, int | float]]:
    """Train two steps; the export is loaded by diffusers alone and its image compared."""
    supervised = ["objective.caption_dropout=0.3", "validation.loss_images=4"]
    data = {
        "supervised": [f"data.images.path={pictures}", *supervised],
        "draft": ["reward=color", f"data.prompts={tmp_path / 'prompts.txt'}"],
    }
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    start(
        [
            f"runs_dir={tmp_path}",
            f"model.pretrained={folder}",
            f"objective={objective}",
            *data[objective],
            "sampler.num_inference_steps=2",
            "sampler.guidance_scale=2.0",
            f"sampler.height={PIXELS}",
            f"sampler.width={PIXELS}",
            "optimizer.lr=0.01",
            "optimizer.warmup_steps=0",
            "training.ema_decay=null",
            "training.max_steps=2",
            "training.tensorboard=false",
            "training.micro_batch_size=2",
            "validation.num_images=2",
            *more,
        ]
    )
    return read_metrics(RunFolder(tmp_path / "run"))


# Each family, with either kind of weights in turn; the original layout is of full U-Nets.
@pytest.mark.parametrize(
    ("name", "trainable"),
    nightly_but(
        [(name, ("full", "lora")[i % 2]) for i, name in enumerate(NAMES)],
        [(name, trainable) for name in NAMES for trainable in ("lora", "full")],
    ),
)
def test_a_supervised_run(
    folders: dict[str, Path], pictures: Path, tmp_path: Path, name: str, trainable: str
):
    rows = run(tmp_path, folders[name], pictures, "supervised", f"model.trainable={trainable}")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[2]["validation/loss"] != rows[0]["validation/loss"]
    exported = {place.name for place in (tmp_path / "run" / "export").iterdir()}
    further = {"lora"} if trainable == "lora" else set()
    if (name, trainable) == ("stable_diffusion", "full"):
        further = {"original"}
    assert exported == {".sfumato.json", "pipeline"} | further


@pytest.mark.parametrize(
    ("objective", "kept"),
    [
        (["objective=supervised"], False),
        (["objective=draft", "objective.kl_coeff=0", "reward=color"], False),
        (["objective=draft", "objective.kl_coeff=1", "reward=color"], True),
    ],
)
def test_a_frozen_copy_is_kept_where_the_loss_asks_for_it(
    folders: dict[str, Path], pictures: Path, tmp_path: Path, objective: list[str], kept: bool
):
    """Without one, validation compares with the pictures of step 0, also after a resume."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    given = [f"runs_dir={tmp_path}", f"model.pretrained={folders['flux']}", *objective]
    is_supervised = objective == ["objective=supervised"]
    prompts = f"data.prompts={tmp_path / 'prompts.txt'}"
    given.append(f"data.images.path={pictures}" if is_supervised else prompts)
    given += ["model.trainable=full", f"sampler.height={PIXELS}", f"sampler.width={PIXELS}"]
    given += ["sampler.num_inference_steps=2", "training.tensorboard=false", "verify=false"]
    given += ["validation.num_images=2", "validation.every_steps=1"]
    models: list[PipelineModel] = []

    def load_noted(config: ModelConfig) -> TextToImageModel:
        model = load_model(config)
        assert isinstance(model, PipelineModel)
        models.append(model)
        return model

    for steps in (1, 2):
        config, settings = compose_train([*given, f"training.max_steps={steps}"])
        distribution = Distribution(config.training)
        train(config, settings, distribution, Own(load=load_noted))
        distribution.close()
    copies = [len(model.roles.networks()) for model in models[::2]]  # the others are exports
    assert copies == [2 if kept else 1] * 2
    places = [tmp_path / f"run/samples/step-{i:06d}" for i in range(3)]
    shown = [[file.read_bytes() for file in sorted(p.glob("*-base.png"))] for p in places]
    assert shown[0] == shown[1] == shown[2]
    assert len(shown[0]) == 2


# test_draft_plus has the steps of every family.
@pytest.mark.parametrize("name", nightly_but(["stable_diffusion_xl", "flux"], NAMES))
def test_a_draft_plus_run(folders: dict[str, Path], pictures: Path, tmp_path: Path, name: str):
    rows = run(tmp_path, folders[name], pictures, "draft", "objective.kl_coeff=0.5")
    assert rows[1]["kl"] == 0 < rows[2]["kl"]


TRAINED = [
    ("stable_diffusion", "[network, text_encoder]"),
    ("stable_diffusion_xl", "[network, text_encoder, text_encoder_2]"),
    ("stable_diffusion_3", "[text_encoder]"),
    ("flux", "[network, text_encoder]"),
]


@pytest.mark.parametrize(
    ("name", "parts", "trainable"),
    nightly_but(
        [(*case, ("lora", "full")[i % 2]) for i, case in enumerate(TRAINED)],
        [(*case, trainable) for case in TRAINED for trainable in ("lora", "full")],
    ),
)
def test_a_run_with_text_encoders(
    folders: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    name: str,
    parts: str,
    trainable: str,
):
    more = [f"model.parts={parts}", f"model.trainable={trainable}"]
    rows = run(tmp_path, folders[name], pictures, "supervised", *more)
    assert rows[2]["validation/loss"] != rows[0]["validation/loss"]


# --- Refusals


@pytest.mark.parametrize("name", NAMES)
def test_the_wrong_family_is_named(folders: dict[str, Path], name: str):
    other = NAMES[NAMES.index(name) - 1]
    config = ModelConfig(pretrained=str(folders[name]), family=other)
    expected = rf"is of the family {name} \({FAMILIES[name].pipeline_name}\), and model.family = "
    with pytest.raises(ValueError, match=expected):
        find_family(config)
    find_family(replace(config, family=name))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_component_is_named(folders: dict[str, Path], tmp_path: Path, name: str):
    shutil.copytree(folders[name], tmp_path / "copy")
    for part in (FAMILIES[name].network_name, FAMILIES[name].encoders[0]):
        shutil.rmtree(tmp_path / "copy" / part)
        with pytest.raises(ValueError, match=rf"lacks {part}/config.json"):
            find_family(ModelConfig(pretrained=str(tmp_path / "copy")))
        shutil.copytree(folders[name] / part, tmp_path / "copy" / part)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_that_cannot_be_divided_name_the_nearest(folders: dict[str, Path], name: str):
    config, family = ModelConfig(pretrained=str(folders[name])), FAMILIES[name]
    unit = family.read_limits(folders[name]).multiple
    for bad, near in ((4 * unit + 1, 4 * unit), (5 * unit - 1, 5 * unit)):
        with pytest.raises(ValueError, match=rf"sampler.width = {bad} .* nearest is {near}"):
            find_family(config, SamplerConfig(height=4 * unit, width=bad))


@pytest.mark.parametrize("name", NAMES)
def test_parts_that_cannot_be_trained_are_refused(folders: dict[str, Path], name: str):
    config = ModelConfig(pretrained=str(folders[name]), parts=["network", "vae"])
    with pytest.raises(ValueError, match=r"model.parts has 'vae'; .* can be trained: network"):
        find_family(config)


# --- Recipes

RECIPES = [  # those that start from a release
    path
    for path in sorted((CONF / "recipe").glob("*.yaml"))
    if "family:" in path.read_text() and "pretrained: null" not in path.read_text()
]


def test_every_family_has_its_recipes():
    names = {path.stem for path in RECIPES}
    for family in FAMILIES:
        mine = {p.stem for p in RECIPES if f"family: {family}\n" in p.read_text()}
        assert any(name.endswith("_sft_lora") for name in mine), family
        assert any(name.endswith("_sft_full") for name in mine), family
    assert {"sdxl_draft_plus", "sd35_draft_plus", "flux_draft_plus"} <= names


@pytest.mark.parametrize("recipe", [path.stem for path in RECIPES])
def test_a_recipe_fits_its_family(folders: dict[str, Path], recipe: str):
    content = next(path for path in RECIPES if path.stem == recipe).read_text()
    given = ["model.pretrained=M"]
    if "override /reward" not in content or "override /reward: none" in content:
        pairs = "override /objective: dpo" in content
        given.append("data.pairs.path=I" if pairs else "data.images.path=I")
    else:
        given.append("data.prompts=P")
        given += ["reward.pretrained=R"] if "override /reward: clip" in content else []
    config, _ = compose_train([f"recipe={recipe}", *given])
    name = config.model.family
    assert name is not None
    settings = replace(config.model, pretrained=str(folders[name]), dtype="float32")
    model = load(folders[name], **vars(settings))
    trained = list(model.trainable())
    assert all(("lora" in key) == (settings.trainable == "lora") for key in trained)
    assert len(trained) >= 8


# --- Releases that differ


def edit(file: Path, **changes: object) -> None:
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(settings))


def release_with(folder: Path, changes: dict[str, object]) -> None:
    """Change a release's scheduler: its settings, and its class in model_index.json."""
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    if "_class_name" in changes:
        edit(folder / "model_index.json", scheduler=["diffusers", changes["_class_name"]])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("stable_diffusion_xl", {"_class_name": "EDMEulerScheduler"}),
        ("stable_diffusion", {"_class_name": "FlowMatchEulerDiscreteScheduler"}),
        ("flux", {"_class_name": "FlowMatchHeunDiscreteScheduler"}),
        ("stable_diffusion_3", {"stochastic_sampling": True}),
    ],
)
def test_schedulers_of_another_process_are_refused(
    folders: dict[str, Path], tmp_path: Path, name: str, changes: dict[str, object]
):
    shutil.copytree(folders[name], tmp_path / "copy")
    release_with(tmp_path / "copy", changes)
    with pytest.raises(ValueError, match="whose steps this family cannot take"):
        find_family(ModelConfig(pretrained=str(tmp_path / "copy")))


@pytest.mark.parametrize("name", NAMES)
def test_a_component_left_out_of_the_index_is_named(
    folders: dict[str, Path], tmp_path: Path, name: str
):
    shutil.copytree(folders[name], tmp_path / "copy")
    edit(tmp_path / "copy" / "model_index.json", text_encoder=[None, None])
    with pytest.raises(ValueError, match="leaves out text_encoder, which this family needs"):
        find_family(ModelConfig(pretrained=str(tmp_path / "copy")))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"_class_name": "DPMSolverMultistepScheduler"}, "with DPMSolverMultistepScheduler;"),
        ({"use_karras_sigmas": True}, "with EulerDiscreteScheduler with use_karras_sigmas;"),
    ],
)
def test_steps_that_are_not_the_releases_are_said(
    folders: dict[str, Path], tmp_path: Path, changes: dict[str, object], said: str
):
    shutil.copytree(folders["stable_diffusion_xl"], tmp_path / "copy")
    release_with(tmp_path / "copy", changes)
    with pytest.warns(UserWarning, match=said):
        load(tmp_path / "copy")


def test_the_grid_is_the_released_schedulers_own(folders: dict[str, Path], tmp_path: Path):
    """Where a file does not state the spacing, it is that scheduler's default, and not DDIM's."""
    shutil.copytree(folders["stable_diffusion_xl"], tmp_path / "copy")
    file = tmp_path / "copy" / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text())
    del settings["timestep_spacing"]
    file.write_text(json.dumps(settings))
    model = load(tmp_path / "copy")
    expected = torch.linspace(0, 999, 10).flip(0).round().long() + 1
    assert [round(t * 1000) for t in model.times(10, PIXELS, PIXELS)[:-1]] == expected.tolist()


def test_statistics_of_latents_are_used(folders: dict[str, Path], tmp_path: Path):
    """Playground v2.5's autoencoder states mean and std of its latents, as diffusers reads them."""
    shutil.copytree(folders["stable_diffusion_xl"], tmp_path / "copy")
    mean, std = [0.1, -0.2, 0.3, 0.0], [2.0, 1.5, 1.0, 0.5]
    edit(tmp_path / "copy" / "vae" / "config.json", latents_mean=mean, latents_std=std)
    model, plain = load(tmp_path / "copy"), load(folders["stable_diffusion_xl"])
    images = torch.rand(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scale = plain.pipeline.vae.config.scaling_factor
    raw = plain.encode_images(images) / scale
    shape = (1, 4, 1, 1)
    expected = (raw - torch.tensor(mean).view(shape)) * scale / torch.tensor(std).view(shape)
    torch.testing.assert_close(model.encode_images(images), expected)
    torch.testing.assert_close(model.decode(expected), plain.decode(raw * scale), atol=1e-5, rtol=0)
