"""Training of an autoencoder: the formula, whole runs, exports, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import write_pictures
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
from test_methods import assert_same_run
from torch import Tensor

from sfumato.compose import compose_command, compose_train
from sfumato.conditions import unread
from sfumato.config import AutoencoderConfig
from sfumato.data.sample import Sample
from sfumato.diffusion.randomness import Rng
from sfumato.models.learning_autoencoder import LearningAutoencoder, load_autoencoder
from sfumato.objectives.autoencoder import Autoencoder

SIZE = 16
CONFIG = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 3,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("vae") / "config.json"
    file.write_text(json.dumps(CONFIG))
    return file


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "set", count=9, pixels=SIZE)


def learner(file: Path, **settings: Any) -> LearningAutoencoder:
    torch.manual_seed(0)
    return LearningAutoencoder(load_autoencoder(str(file)), **settings)


def samples(count: int, dtype: torch.dtype = torch.float32) -> list[Sample]:
    images = Rng(range(count)).normal(3, SIZE, SIZE).mul(0.4).clamp(-1, 1).to(dtype)
    return [Sample(image, "a star", (SIZE, SIZE), (0, 0), "p") for image in images]


def stacked(batch: list[Sample]) -> Tensor:
    return torch.stack([sample.image for sample in batch if sample.image is not None])


# --- The formula


@pytest.mark.parametrize("weights", [{}, {"square_coeff": 0.0, "edge_coeff": 3.0, "kl_coeff": 0.5}])
def test_the_loss_is_that_of_torch_and_diffusers(config: Path, weights: dict[str, Any]) -> None:
    """float64: l1 and squared error by torch, posterior and KL by diffusers."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    settings, model, batch = AutoencoderConfig(**weights), learner(config), samples(3)
    found = Autoencoder(settings).loss(model, batch, Rng([5, 6, 7]))
    found.value.backward()
    ours = {name: p.grad for name, p in model.trainable().items()}
    model.trained.zero_grad()

    images, vae = stacked(batch), model.vae
    posterior: Any = DiagonalGaussianDistribution(vae.encode(images).latent_dist.parameters)
    noise = Rng([5, 6, 7]).normal(3, SIZE // 2, SIZE // 2)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    error = decoded - images
    edges = F.l1_loss(error[..., 1:], error[..., :-1]) + F.l1_loss(
        error[..., 1:, :], error[..., :-1, :]
    )
    expected = (
        F.l1_loss(decoded, images)
        + settings.square_coeff * F.mse_loss(decoded, images)
        + settings.edge_coeff * edges
        + settings.kl_coeff * posterior.kl().mean() / noise[0].numel()
    )
    expected.backward()
    assert float(found.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, parameter in model.trainable().items():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_noise_on_latents_has_a_level_for_each_picture(config: Path) -> None:
    """The draws of a picture: noise of the posterior, a level, then noise of that level."""
    settings = AutoencoderConfig(decoder_only=True, latent_noise=0.7)
    model, batch = learner(config, decoder_only=True), samples(3)
    model.vae.register_to_config(scaling_factor=0.25)
    found = Autoencoder(settings).loss(model, batch, Rng([5, 6, 7])).value

    rng, shape = Rng([5, 6, 7]), (3, SIZE // 2, SIZE // 2)
    with torch.no_grad():
        posterior = model.vae.encode(stacked(batch)).latent_dist
        latents = posterior.mean + posterior.std * rng.normal(*shape)
        levels = 0.7 * rng.uniform()
        noise = rng.normal(*shape) / 0.25
        decoded = model.vae.decode(latents + levels.view(3, 1, 1, 1) * noise).sample
    error = decoded - stacked(batch)
    edges = error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
    expected = error.abs().mean() + 2 * error.square().mean() + 0.5 * edges
    kl = posterior.kl().mean() / noise[0].numel()
    torch.testing.assert_close(found.detach(), expected + settings.kl_coeff * kl)
    assert levels.unique().numel() == 3
    found.backward()
    assert all(p.grad is not None for p in model.trainable().values())


def test_psnr_is_that_of_its_definition(config: Path) -> None:
    class Shifted:
        device = torch.device("cpu")

        def latent_shape(self, images: Tensor) -> tuple[int, int, int]:
            return 1, 2, 2

        def reconstruct(self, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
            assert noise is None
            return images + 0.2, torch.zeros(len(images), 2, 2, 2)

    batch = [Sample(torch.zeros(3, 4, 4), "a", (4, 4), (0, 0), "p")]
    found = Autoencoder(AutoencoderConfig()).stable_metrics(Shifted(), batch, [0], 0)
    assert float(found["psnr"]) == pytest.approx(20.0, abs=1e-4)  # a tenth of the range
    assert float(found["latent_kl"]) == 0.0
    assert float(found["loss"]) == pytest.approx(0.2 + 2 * 0.04, abs=1e-6)  # no edges


def test_validation_depends_on_the_picture_alone(config: Path) -> None:
    model, batch, objective = learner(config), samples(4), Autoencoder(AutoencoderConfig())
    whole = objective.stable_metrics(model, batch, range(4), 0)
    again = objective.stable_metrics(model, batch[2:], range(2), 9)
    for name, values in whole.items():
        torch.testing.assert_close(again[name], values[2:], atol=1e-5, rtol=1e-5)


# --- Whole runs


def command(folder: Path, name: str, pictures: Path, config: Path, *more: str) -> list[str]:
    settings = [
        f"runs_dir={folder}",
        f"name={name}",
        "objective=autoencoder",
        "reward=none",
        f"objective.start={config}",
        f"data.images.path={pictures}",
        "data.images.flip=true",
        "data.images.workers=1",
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
        "optimizer.lr=3e-3",
        "optimizer.eps=1e-4",
        "optimizer.warmup_steps=0",
        *more,
    ]
    return list({text.partition("=")[0]: text for text in settings}.values())


@pytest.mark.parametrize("victim", ["take_step", "CheckpointWriter.write"])
def test_a_killed_run_goes_on_bitwise(
    tmp_path: Path, pictures: Path, config: Path, victim: str
) -> None:
    start(command(tmp_path, "whole", pictures, config))
    again = command(tmp_path, "run", pictures, config)

    def die() -> None:
        on_call(2 if victim == "CheckpointWriter.write" else 4, kill, victim)
        start(again)

    assert in_child(die) == -9
    start(again)
    assert_same_state(tmp_path / "run", tmp_path / "whole")
    rows = [row for row in metrics(tmp_path / "whole") if "validation/loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert rows[-1]["validation/psnr"] > rows[0]["validation/psnr"]
    assert not (tmp_path / "whole" / "samples").exists()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_are_one(tmp_path: Path, pictures: Path, config: Path, strategy: str) -> None:
    start(command(tmp_path, "one", pictures, config))
    two = command(tmp_path, "two", pictures, config, f"training.strategy={strategy}")
    in_processes(2, lambda _: start(two))
    assert_same_run(tmp_path / "two", tmp_path / "one", 4)


def test_the_export_is_diffusers_and_its_latents_have_a_deviation_of_one(
    tmp_path: Path, pictures: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    start(command(tmp_path, "run", pictures, config))
    folder = tmp_path / "run" / "export" / "autoencoder"
    assert f"{folder} (verified: diffusers gives the same pictures" in capsys.readouterr().out
    theirs: Any = AutoencoderKL.from_pretrained(folder)
    state = last_state(tmp_path / "run")
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(tensor, state.ema[f"vae.{name}"], atol=0, rtol=0)
    images = stacked_files(pictures)
    with torch.no_grad():
        latents = theirs.encode(images).latent_dist.sample(torch.Generator().manual_seed(3))
    scaled = latents * theirs.config.scaling_factor
    assert float(scaled.std()) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("noise", [[], ["objective.latent_noise=0.5"]])
def test_a_decoder_alone_leaves_the_latents_as_they_are(
    tmp_path: Path, pictures: Path, config: Path, noise: list[str]
) -> None:
    start(command(tmp_path, "first", pictures, config))
    first = tmp_path / "first" / "export" / "autoencoder"
    more = ["objective.decoder_only=true", "training.max_steps=2", *noise]
    start(command(tmp_path, "second", pictures, first, *more))
    folders = [tmp_path / name / "export" / "autoencoder" for name in ("first", "second")]
    before, after = (load_autoencoder(str(folder)) for folder in folders)
    assert after.config.scaling_factor == before.config.scaling_factor
    images = stacked_files(pictures)
    with torch.no_grad():
        latents = before.encode(images).latent_dist.mean
        assert torch.equal(after.encode(images).latent_dist.mean, latents)
        assert not torch.equal(after.decode(latents).sample, before.decode(latents).sample)


def test_other_settings_have_a_way_on(tmp_path: Path, pictures: Path, config: Path) -> None:
    given = command(tmp_path, "run", pictures, config, "verify=false", "training.max_steps=1")
    start(given)
    other = [text for text in given if not text.startswith("optimizer.lr")]
    way = rf"optimizer\.lr.* name=\.\.\. objective\.start={tmp_path}/run/export/autoencoder"
    with pytest.raises(ValueError, match=way):
        start([*other, "optimizer.lr=1e-2"])


@pytest.mark.parametrize("verb", ["sample", "evaluate"])
def test_it_makes_no_images(tmp_path: Path, pictures: Path, config: Path, verb: str) -> None:
    from sfumato.evaluation.opened import open_run

    start(command(tmp_path, "run", pictures, config, "verify=false", "training.max_steps=1"))
    given = [f"run={tmp_path}/run", *(["prompt=a star"] if verb == "sample" else [])]
    request: Any = compose_command(verb, given)[0]
    with pytest.raises(ValueError, match=r"trained an autoencoder.*model\.autoencoder="):
        open_run(request)


# --- Settings


def test_the_recipe_sets_nothing_in_vain() -> None:
    given = ["recipe=autoencoder", "objective.start=C.json", "data.images.path=P"]
    assert unread(compose_train(given)[0]) == {}


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("reward=jpeg", "reward", "jpeg"),
        ("reward=color", "reward", "color"),
        ("model.pretrained=M", "model.pretrained", "M"),
        ("model.trainable=full", "model.trainable", "full"),
        ("validation.num_images=3", "validation.num_images", 3),
        ("objective.edge_coeff=-1", "objective.edge_coeff", -1),
        ("objective.kl_coeff=-1", "objective.kl_coeff", -1),
        ("training.compile=full", "training.compile", "full"),
    ],
)
def test_what_it_cannot_use_is_refused(override: str, key: str, value: object) -> None:
    from sfumato.check import check_train
    from sfumato.conditions import refuse_unread

    given = {
        "objective": "autoencoder",
        "objective.start": "C",
        "data.images.path": "P",
        "reward": "none",
    }
    given |= dict([override.split("=")])
    with pytest.raises(ValueError, match=r".") as caught:
        settings, _ = compose_train([f"{k}={v}" for k, v in given.items()])
        refuse_unread(settings, [override])
        check_train(settings, 1)
    assert_explained(str(caught.value), key, value)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, r"there\.json.*objective\.start"),
        ("{", r"there\.json.*objective\.start"),
        (
            '{"_class_name": "UNet2DConditionModel"}',
            "is of UNet2DConditionModel; give an AutoencoderKL",
        ),
        ("{}", "is of no class; give an AutoencoderKL"),
    ],
)
def test_a_start_that_is_none_is_refused(tmp_path: Path, content: str | None, match: str) -> None:
    file = tmp_path / "there.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=match):
        load_autoencoder(str(file))


def test_sides_that_the_autoencoder_does_not_divide_are_refused(
    tmp_path: Path, pictures: Path, config: Path
) -> None:
    with pytest.raises(ValueError, match=r"sampler\.height=15 .* multiples of 2"):
        start(command(tmp_path, "run", pictures, config, "sampler.height=15", "sampler.width=15"))


def stacked_files(folder: Path) -> Tensor:
    import numpy as np
    from PIL import Image

    files = sorted(folder.glob("*.png"))
    arrays = [np.array(Image.open(file).convert("RGB").resize((SIZE, SIZE))) for file in files]
    return torch.stack([torch.from_numpy(a).permute(2, 0, 1) for a in arrays]).float() / 127.5 - 1
