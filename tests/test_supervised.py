"""The supervised loss against the formula by hand, its times, its weights, and its bins."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from scipy.stats import kstest
from tiny_sd import LATENT, PIXELS, load_tiny_sd, reference_pipeline
from torch import Tensor
from toy import ToyModel

from sfumato.config import ModelConfig, SupervisedConfig
from sfumato.data.sample import Sample
from sfumato.diffusion.process import RectifiedFlow, VariancePreserving
from sfumato.diffusion.randomness import Rng
from sfumato.objectives.noised import draw_noised
from sfumato.objectives.supervised import Supervised, binned, bump, min_snr

CAPTIONS = ["a red star", "a small blue ring on a yellow background", "a cross"]


def samples(count: int, pixels: int = PIXELS) -> list[Sample]:
    images = Rng(range(100, 100 + count)).normal(3, pixels, pixels).clamp(-1, 1)
    return [
        Sample(images[i], CAPTIONS[i % 3], (2 * pixels, pixels), (0, i), f"image {i}")
        for i in range(count)
    ]


# --- The loss


@pytest.mark.parametrize("fixture", ["sd_folder", "sd2_folder"])
@pytest.mark.parametrize("sample_latents", [False, True])
def test_loss_equals_the_formula_by_hand(
    request: pytest.FixtureRequest, fixture: str, sample_latents: bool
):
    folder: Path = request.getfixturevalue(fixture)
    model, pipeline = load_tiny_sd(folder), reference_pipeline(folder)
    batch, seeds = samples(3), [5, 6, 7]
    config = SupervisedConfig(sample_latents=sample_latents)
    found = Supervised(config).loss(model, batch, Rng(seeds))

    draws = [torch.Generator().manual_seed(seed) for seed in seeds]

    def normal() -> Tensor:
        return torch.stack([torch.randn(4, LATENT, LATENT, generator=g) for g in draws])

    with torch.no_grad():
        images = torch.stack([sample.image for sample in batch])
        posterior = pipeline.vae.encode(images).latent_dist
        x0 = posterior.mean + posterior.std * normal() if sample_latents else posterior.mean
        x0 = x0 * pipeline.vae.config.scaling_factor
        noise = normal()
        u = torch.cat([torch.rand(1, generator=g) for g in draws])
        steps = (u * 1000).long()
        states, _ = pipeline.encode_prompt([s.caption for s in batch], "cpu", 1, False)
        x_t = pipeline.scheduler.add_noise(x0, noise, steps)
        raw = pipeline.unet(x_t, steps, states).sample
        target = noise
        if pipeline.scheduler.config.prediction_type == "v_prediction":
            target = pipeline.scheduler.get_velocity(x0, noise, steps)
        expected = (raw - target).square().mean()
    torch.testing.assert_close(found.value, expected, atol=1e-5, rtol=1e-5)
    assert found.value.requires_grad
    assert found.metrics["loss"] == found.metrics["mse"] == found.value
    assert sum(float(part[1]) for part in found.partial.values()) == 3


def test_flow_loss_equals_the_formula_by_hand():
    model, batch = ToyModel(ModelConfig("toy")), samples(3, 4)
    found = Supervised(SupervisedConfig(sample_latents=False)).loss(model, batch, Rng([5, 6, 7]))
    rng = Rng([5, 6, 7])
    x0, noise, t = torch.stack([s.image for s in batch]) * 2, rng.normal(3, 4, 4), rng.uniform()
    rows = t[:, None, None, None]
    states = model.encode_prompts([s.caption for s in batch]).tensors["states"]
    raw = model.network((1 - rows) * x0 + rows * noise, t[:, None], states).reshape(x0.shape)
    expected = (raw - (noise - x0)).square().mean()
    torch.testing.assert_close(found.value, expected)


def test_rows_have_times_noise_and_losses_of_their_own(sd_folder: Path):
    model, batch = load_tiny_sd(sd_folder), samples(4)
    objective = Supervised(SupervisedConfig(caption_dropout=0.5, noise_offset=0.1))
    whole = objective.loss(model, batch, Rng.of_step(0, 3, range(4))).value
    parts = [
        objective.loss(model, batch[i : i + 1], Rng.of_step(0, 3, range(i, i + 1))).value
        for i in range(4)
    ]
    assert len({round(float(part), 6) for part in parts}) == 4
    torch.testing.assert_close(whole, torch.stack(parts).mean(), atol=1e-6, rtol=1e-5)


def test_dropped_captions_are_the_empty_prompt(sd_folder: Path, monkeypatch: pytest.MonkeyPatch):
    model = load_tiny_sd(sd_folder)
    seen: list[str] = []
    encode = model.encode_prompts

    def watch(prompts: Sequence[str], **given: object) -> object:
        seen.extend(prompts)
        return encode(prompts, **given)  # pyright: ignore

    monkeypatch.setattr(model, "encode_prompts", watch)
    for share, expected in ((0.0, 0), (1.0, 40)):
        seen.clear()
        objective = Supervised(SupervisedConfig(caption_dropout=share))
        objective.loss(model, samples(40), Rng(range(40)))
        assert seen.count("") == expected
    seen.clear()
    Supervised(SupervisedConfig(caption_dropout=0.25)).loss(model, samples(40), Rng(range(40)))
    assert 4 <= seen.count("") <= 16


def test_noise_offset_moves_whole_channels():
    model, batch = ToyModel(ModelConfig("toy")), samples(2, 4)
    seen: list[Tensor] = []
    model.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for offset in (0.0, 0.5):
        config = SupervisedConfig(noise_offset=offset, sample_latents=False)
        Supervised(config).loss(model, batch, Rng([1, 2]))
    rng = Rng([1, 2])
    rng.normal(3, 4, 4)
    constant = 0.5 * rng.normal(3, 1, 1)
    t = rng.uniform()[:, None, None, None]
    rng = Rng([1, 2])  # without an offset nothing is drawn for it
    rng.normal(3, 4, 4)
    t_plain = rng.uniform()[:, None, None, None]
    noise = Rng([1, 2]).normal(3, 4, 4)
    x0 = torch.stack([sample.image for sample in batch]) * 2
    torch.testing.assert_close(seen[0], (1 - t_plain) * x0 + t_plain * noise)
    torch.testing.assert_close(seen[1], (1 - t) * x0 + t * (noise + constant))


# --- Times


def drawn(config: SupervisedConfig, count: int = 4000) -> Tensor:
    model = ToyModel(ModelConfig("toy"))
    return draw_noised(config, model, (4, 4), Rng(range(count))).t


def test_flow_times_are_uniform_or_logit_normal():
    assert kstest(drawn(SupervisedConfig()), "uniform").pvalue > 0.01
    found = drawn(SupervisedConfig(timesteps="logit_normal", logit_mean=0.5, logit_std=0.8))
    assert kstest((torch.logit(found.double()) - 0.5) / 0.8, "norm").pvalue > 0.01


def test_table_times_are_uniform_over_the_shifted_entries(monkeypatch: pytest.MonkeyPatch):
    shifted = [3 * s / (1 + 2 * s) for s in torch.linspace(1, 0, 1001).tolist()]
    monkeypatch.setattr(ToyModel, "times", lambda self, steps, height, width: shifted)
    found = drawn(SupervisedConfig(timesteps="table"))
    table = torch.tensor(shifted[:-1])
    assert set(found.tolist()) <= set(table.tolist())
    unshifted = found / (3 - 2 * found)
    assert kstest(unshifted, "uniform").pvalue > 0.01


def test_table_steps_are_each_of_the_thousand(sd_folder: Path):
    model = load_tiny_sd(sd_folder)
    process = model.process
    assert isinstance(process, VariancePreserving)
    u = (torch.arange(2000) + 0.5) / 2000
    assert process.index(process.on_grid(u)).tolist() == [i // 2 for i in range(2000)]
    assert process.on_grid(torch.tensor([1.0])) == 1.0


# --- Weights


def test_min_snr_follows_the_paper():
    process = VariancePreserving(torch.linspace(0.999, 0.001, 1000))
    t = torch.tensor([0.001, 0.5, 0.9, 1.0])
    a = torch.linspace(0.999, 0.001, 1000)[(t * 1000).round().long() - 1]
    snr = a / (1 - a)
    clipped = snr.clamp(max=5.0)
    for kind, expected in (
        ("epsilon", clipped / snr),
        ("v_prediction", clipped / (snr + 1)),
        ("sample", clipped),
    ):
        found = min_snr(process, kind, t, 5.0)  # pyright: ignore
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert clipped[0] == 5 < snr[0]  # the clip does something
    terminal = VariancePreserving(torch.tensor([0.5, 0.0]))
    assert min_snr(terminal, "epsilon", torch.tensor([1.0]), 5.0) == 1
    with pytest.raises(ValueError, match="min_snr is for epsilon, v and sample"):
        min_snr(RectifiedFlow(), "flow", t, 5.0)


def test_bump_is_diffsynths():
    sigmas = torch.linspace(1, 0.003 / 1.002, 1001)[:-1]
    sigmas = 3 * sigmas / (1 + 2 * sigmas)
    x = sigmas * 1000
    y = torch.exp(-2 * ((x - 500) / 1000) ** 2)
    expected = (y - y.min()) * (1000 / (y - y.min()).sum())
    found = bump(sigmas, sigmas)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert float(found.mean()) == pytest.approx(1, abs=1e-5)
    assert found.argmax() == (sigmas - 0.5).abs().argmin()


def test_weights_weigh_rows(sd2_folder: Path):
    model, batch = load_tiny_sd(sd2_folder), samples(4)
    plain = [
        float(Supervised(SupervisedConfig()).loss(model, batch[i : i + 1], Rng([i])).value)
        for i in range(4)
    ]
    weighted = Supervised(SupervisedConfig(weighting="min_snr")).loss(model, batch, Rng(range(4)))
    t = []
    for i in range(4):
        rng = Rng([i])
        rng.normal(4, LATENT, LATENT), rng.normal(4, LATENT, LATENT)
        t.append(float(model.process.on_grid(rng.uniform())))
    weights = min_snr(model.process, "v_prediction", torch.tensor(t), 5.0)
    expected = (torch.tensor(plain) * weights).mean()
    torch.testing.assert_close(weighted.value, expected, rtol=1e-4, atol=1e-5)
    assert float(weighted.metrics["mse"]) == pytest.approx(sum(plain) / 4, rel=1e-4)


# --- Reports


def test_bins_hold_sum_and_count():
    errors, t = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.0, 0.1, 0.95, 1.0])
    found = {name: part.tolist() for name, part in binned("mse", errors, t).items()}
    assert len(found) == 10
    assert found["mse_by_t/0.0-0.1"] == [3, 2]
    assert found["mse_by_t/0.9-1.0"] == [12, 2]
    assert found["mse_by_t/0.4-0.5"] == [0, 0]


def test_stable_errors_depend_on_weights_alone(sd_folder: Path):
    model, batch = load_tiny_sd(sd_folder), samples(10)
    objective = Supervised(
        SupervisedConfig(caption_dropout=1.0, weighting="min_snr", noise_offset=1.0)
    )
    whole = objective.stable_errors(model, batch, range(10), 7)
    apart = torch.cat([objective.stable_errors(model, batch[i : i + 1], [i], 7) for i in range(10)])
    torch.testing.assert_close(whole, apart, atol=1e-5, rtol=1e-5)
    plain = Supervised(SupervisedConfig()).stable_errors(model, batch, range(10), 7)
    assert torch.equal(whole, plain)
    assert not torch.allclose(plain, objective.stable_errors(model, batch, range(10), 8))
    assert math.isfinite(float(whole.sum()))


def test_stable_times_are_eight_and_equidistant(sd_folder: Path):
    model, seen = load_tiny_sd(sd_folder), []
    model.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].tolist()))
    Supervised(SupervisedConfig()).stable_errors(model, samples(9), range(9), 7)
    assert seen == [[62, 187, 312, 437, 562, 687, 812, 937, 62]]
