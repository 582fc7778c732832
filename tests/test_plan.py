"""`sfumato plan`: what it counts is what training holds, computes and stores."""

import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from families import WRITERS
from nightly import nightly_but
from runs import in_child
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sfumato.cli import main
from sfumato.compose import compose_command
from sfumato.config import CONF, ModelConfig, OptimizerConfig, TrainingConfig
from sfumato.models.registry import load_model
from sfumato.planning import memory
from sfumato.planning.blueprint import Blueprint, read_blueprint
from sfumato.planning.memory import bytes_of, shards
from sfumato.planning.page import plan
from sfumato.planning.plan import (
    Plan,
    check_plan,
    cost_of,
    make_plan,
    moment_bytes,
    parameters_of,
    text_bytes,
)
from sfumato.training.ema import Ema
from sfumato.training.optimizer import build_optimizer

pytestmark = pytest.mark.usefixtures("unchecked")  # tests/test_plan_step.py checks them
STAGES = sorted(path.stem for path in (CONF / "recipe" / "stable_diffusion").glob("*.yaml"))
PIXELS = 32
SMALL = ["objective=supervised", "sampler.height=32", "sampler.width=32", "gpu=cpu"]
FULL = ["model.trainable=full"]


def planned(*settings: str) -> Plan:
    return make_plan(compose_command("plan", settings)[0])


def drawn(*settings: str) -> tuple[Any, Blueprint]:
    """Return a recipe and its blueprint, of which nothing is measured yet."""
    config = compose_command("plan", settings)[0]
    check_plan(config)
    return config, read_blueprint(config)


@pytest.fixture(scope="module", params=sorted(WRITERS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / request.param
    WRITERS[request.param](folder)
    return folder


# --- What is counted


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_parameters_are_those_that_are_loaded(family: Path, trainable: str):
    _, found = drawn(*SMALL, f"model.pretrained={family}", f"model.trainable={trainable}")
    model: Any = load_model(ModelConfig(pretrained=str(family), trainable=trainable))
    own = list(model.network.parameters())
    trained = sum(p.numel() for p in model.trainable().values())
    parts = parameters_of(found)
    assert parts["trained"] + parts.get("frozen, of the network", 0) == sum(p.numel() for p in own)
    assert parts["trained"] == trained
    components = model.pipeline.components
    for name in [name for name in parts if name.startswith("text_encoder")]:
        assert parts[name] == sum(p.numel() for p in components[name].parameters())
    assert parts["autoencoder"] == sum(p.numel() for p in components["vae"].parameters())


def test_flops_are_those_of_the_model_that_is_loaded(family: Path):
    forward = cost_of(*drawn(*SMALL, *FULL, f"model.pretrained={family}"), 1).forward
    model: Any = load_model(ModelConfig(pretrained=str(family), trainable="full"))
    latents = torch.zeros(1, *model.latent_shape(PIXELS, PIXELS))
    cond = model.encode_prompts(["a red disc"])
    denoise = model.denoiser(cond)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        denoise(latents, torch.full((1,), 0.5))
    if "qwen" in family.name:  # its prompt is shorter than what the plan takes
        assert 0 < counter.get_total_flops() < forward
    else:
        assert forward == counter.get_total_flops()


def test_encoding_is_that_of_the_model_that_is_loaded(sd_folder: Path):
    found = planned(*SMALL, *FULL, f"model.pretrained={sd_folder}")
    model = load_model(ModelConfig(pretrained=str(sd_folder)))
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model.encode_moments(torch.zeros(1, 3, PIXELS, PIXELS))
        model.encode_prompts(["a red disc"])
    assert found.encoding == counter.get_total_flops()
    assert found.executed == found.step_flops + found.encoding
    cached = planned(*SMALL, *FULL, f"model.pretrained={sd_folder}", "data.shards.cached=true")
    assert cached.executed == cached.step_flops


def test_stored_samples_have_the_bytes_of_their_tensors(family: Path):
    _, found = drawn(*SMALL, *FULL, f"model.pretrained={family}")
    model = load_model(ModelConfig(pretrained=str(family)))
    with torch.no_grad():
        moments = model.encode_moments(torch.zeros(1, 3, PIXELS, PIXELS))
        cond = model.encode_prompts(["a red disc"])
    assert moment_bytes(found, mirrored=False) == 2 * moments.numel()
    if "qwen" not in family.name:
        assert text_bytes(found) == 8 + sum(2 * tensor.numel() for tensor in cond.tensors.values())


def test_mirrored_pictures_are_stored_as_well(sd_folder: Path):
    given = [*SMALL, *FULL, f"model.pretrained={sd_folder}", "data.shards.cached=true"]
    assert planned(*given, "data.shards.flip=true").moments == 2 * planned(*given).moments


# --- Memory


def test_memory_is_that_of_weights_optimizer_and_average(sd_folder: Path):
    recipe, blueprint = drawn(*SMALL, *FULL, f"model.pretrained={sd_folder}")
    found = memory.held(blueprint, recipe.training, 1, 4, recipe.optimizer)
    config = ModelConfig(pretrained=str(sd_folder), trainable="full", reference=False)
    model: Any = load_model(config)
    named = model.trainable()
    optimizer = build_optimizer(list(named.values()), OptimizerConfig())
    ema = Ema(named, 0.9999)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]

    def size(tensors: Sequence[torch.Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    assert found.weights == size([*model.network.parameters(), *model.network.buffers()])
    assert found.optimizer == size(moments)
    assert found.ema == size(list(ema.shadow.values()))
    encoders = [model.pipeline.vae, model.pipeline.text_encoder]
    own = [t for module in encoders for t in (*module.parameters(), *module.buffers())]
    assert found.frozen == size(own)


def held(folder: Path, *settings: str) -> dict[str, Any]:
    small = [*SMALL, *FULL, f"model.pretrained={folder}", "training.global_batch_size=16"]
    config, found = drawn(*small, *settings)
    training = config.training
    accumulation = training.global_batch_size // (training.micro_batch_size * config.gpus)
    return vars(memory.held(found, training, config.gpus, accumulation, config.optimizer))


def test_the_state_of_another_optimiser_is_counted(sd_folder: Path):
    whole = held(sd_folder)["optimizer"]
    assert held(sd_folder, "optimizer.kind=prodigy", "optimizer.lr=1")["optimizer"] == 2 * whole
    assert 0 < held(sd_folder, "optimizer.kind=adafactor")["optimizer"] < 0.3 * whole
    assert held(sd_folder, "optimizer.kind=sgd")["optimizer"] == 0
    own = ["optimizer.kind=own", "optimizer.path=a.py:B"]
    with pytest.raises(ValueError, match="code of your own, which sfumato plan does not run"):
        planned(*SMALL, *FULL, f"model.pretrained={sd_folder}", *own)


def test_ranks_share_weights_gradients_moments_and_average(sd_folder: Path):
    ddp = held(sd_folder, "gpus=16")
    fsdp = held(sd_folder, "gpus=16", "training.strategy=fsdp")
    hsdp = held(sd_folder, "gpus=16", "training.strategy=hsdp", "training.shard_size=4")
    for name in ("weights", "gradients", "optimizer", "ema"):
        assert fsdp[name] == -(-ddp[name] // 16)
        assert hsdp[name] == -(-ddp[name] // 4)
    assert fsdp["frozen"] == ddp["frozen"]
    assert ddp["gathered"] == 0 < fsdp["gathered"] == hsdp["gathered"] < ddp["weights"]
    assert hsdp == held(sd_folder, "gpus=16", "training.strategy=hsdp", "training.shard_size=4")


def test_gradients_are_whole_until_accumulated_ones_are_exchanged(sd_folder: Path):
    accumulating = held(sd_folder, "gpus=2", "training.strategy=fsdp")
    assert accumulating["gradients"] == accumulating["weights"] * 2


def test_one_gpu_without_accumulation_holds_gradients_as_activations_go(sd_folder: Path):
    assert held(sd_folder, "training.micro_batch_size=16")["gradients"] is None
    assert held(sd_folder, "training.micro_batch_size=8")["gradients"] > 0


@pytest.mark.parametrize("setting", ["training.ema_decay=null", "training.ema_on_cpu=true"])
def test_an_average_elsewhere_takes_no_memory(sd_folder: Path, setting: str):
    assert held(sd_folder, setting)["ema"] == 0


def test_what_fits_fits_and_one_row_more_does_not(sd_folder: Path):
    found = planned(*SMALL, *FULL, f"model.pretrained={sd_folder}", "gpu=h200")
    for each in found.memory:
        assert each.largest is not None and each.largest > 8
    assert found.memory[1].checkpointing
    cost, other = (each.held.peak(each.cost) for each in found.memory)
    assert other < cost


# --- Recipes, and the page


# Both networks and both sizes; a CPU spares the search for the largest micro-batch. v1.1 and v1.2
# differ from v1.5 only in what they start from.
PLANNED = [(name, "cpu") for name in STAGES if name[-4:] not in ("v1_1", "v1_2")]
QUICK = [("860m_res_256_pretrain", "cpu"), ("860m_res_512_v2_0_base", "cpu")]


@pytest.mark.parametrize(("stage", "gpu"), nightly_but(QUICK, [*PLANNED, (STAGES[0], "h200")]))
def test_a_stage_is_planned_with_nothing_else_given(stage: str, gpu: str):
    given = [f"recipe=stable_diffusion/{stage}", "gpus=64", f"gpu={gpu}"]
    given += ["training.peak_tflops=989"] if gpu == "cpu" else []
    found = planned(*given)
    second = "v2" in stage
    assert found.parameters["trained"] == (865_910_724 if second else 859_520_964)
    assert found.parameters["autoencoder"] == 83_653_863
    assert found.parameters["text_encoder"] == (340_387_840 if second else 123_060_480)
    pixels = 256 if "256" in stage else 512
    assert found.size == (pixels, pixels)
    side = pixels // 8
    assert found.moments == 2 * 8 * side * side
    assert found.text == 2 * 77 * (1024 if second else 768) + 8
    training = found.config.training
    assert training.global_batch_size == 8192
    assert found.accumulation == 8192 // 64 // training.micro_batch_size
    assert found.seen == 8192 * training.max_steps
    assert found.seconds is not None
    work = found.executed * found.seen
    assert work == pytest.approx(found.seconds * 64 * 989e12 * found.config.utilisation)


def shown(*settings: str) -> str:
    with redirect_stdout(StringIO()) as out:
        plan(compose_command("plan", settings)[0])
    return out.getvalue()


def test_the_page_shows_numbers_with_their_units(sd_folder: Path):
    given = [*SMALL, *FULL, f"model.pretrained={sd_folder}", "training.peak_tflops=312"]
    page = shown(*given, "samples=500")
    lines = {line.strip().split("  ")[0]: line for line in page.splitlines()}
    assert lines["epochs"].split()[-1] == "8.00"  # 1000 steps of 4
    for unit in (
        "parameters, M",
        "GFLOP per sample",
        "GiB",
        "KB a sample",
        "MB/s and GPU",
        "~ days",
    ):
        assert unit in page
    assert lines["tars of 1,000 samples"].split()[-1] == "1"
    assert lines["shards of the cache"].split()[-1] == "2"
    assert "Lines with ~ are estimates" in page
    two = shown(*given, "gpus=2", "utilisation=1e-8")
    hours, days = (
        float(next(line for line in two.splitlines() if name in line).split()[-1].replace(",", ""))
        for name in ("GPU hours", "days")
    )
    assert hours == pytest.approx(days * 24 * 2, rel=0.01)
    assert days > 1
    assert max(map(len, page.splitlines())) < 140


def test_requests_and_hours_of_preparation_are_counted(sd_folder: Path):
    given = [*SMALL, *FULL, f"model.pretrained={sd_folder}", "training.peak_tflops=2"]
    given += ["samples=3600000", "image_bytes=20000", "utilisation=0.5"]
    found, page = planned(*given), shown(*given)
    lines = {line.strip().split("  ")[0]: line.split() for line in page.splitlines()}
    assert found.precaching == pytest.approx(found.encoding / 1e12)
    tar = lines["~ pictures and captions, tars"]
    ranges = 3  # of 8 MiB in a tar of 1,000 pictures of 20,480 bytes and 5 blocks each
    assert found.raw == 20_480 + 2560 and 2 * 2**23 < 1000 * found.raw <= ranges * 2**23
    assert found.seconds is not None
    assert float(tar[-1].replace(",", "")) == pytest.approx(
        ranges * found.seen / 1000 / found.seconds, abs=0.06
    )
    assert lines["tars of 1,000 samples"][-1] == "3,600"
    assert lines["~ core hours to pack"][-1] == "5"  # 3.6 million / 199 a second
    hours = float(lines["~ GPU hours to precache"][-1].replace(",", ""))
    assert hours == pytest.approx(3_600_000 * found.encoding / 1e12 / 3600, abs=0.51)


def test_without_a_peak_time_is_unknown_until_one_is_stated(sd_folder: Path):
    given = [*SMALL, *FULL, f"model.pretrained={sd_folder}"]
    assert "give training.peak_tflops" in shown(*given)
    stated = planned(*given, "training.peak_tflops=2", "utilisation=0.5")
    assert stated.seconds == pytest.approx(stated.seen * stated.executed / 1e12)


def test_the_command_prints_a_page(
    sd_folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    given = ["sfumato", "plan", *SMALL, *FULL, f"model.pretrained={sd_folder}"]
    monkeypatch.setattr(sys, "argv", given)
    assert in_child(main) == 0
    assert "on 1 x CPU" in capfd.readouterr().out


# --- Bad input


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["gpu=h300"], "gpu='h300' is unknown; choose one of h200, a100, h100, b200, cpu"),
        (["gpus=0"], "gpus=0 is too small; give 1 or more"),
        (["samples=0"], "samples=0 is too small; give 1 or more"),
        (["image_bytes=-1"], "image_bytes=-1 is too small; give 1 or more"),
        (["utilisation=40"], "utilisation=40.0 is too large; give 1 or less"),
        (["objective=own"], "objective = own: a script brings this objective"),
        (["model.parts=[vae]"], "model.parts has 'vae'"),
        (["gpus=3"], "training.global_batch_size=4 does not divide into 3 process"),
        (
            ["gpus=4", "training.strategy=hsdp", "training.shard_size=3"],
            "training.shard_size=3 does not divide 4 processes",
        ),
        (["model.pretrained=null"], "model.pretrained = None and model.network.config = None"),
    ],
)
def test_what_cannot_be_planned_is_refused(sd_folder: Path, settings: list[str], said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        planned(*SMALL, *FULL, f"model.pretrained={sd_folder}", *settings)


def test_what_has_no_default_must_still_be_given():
    with pytest.raises(ValueError, match=r"missing settings: model\.pretrained"):
        planned(*SMALL)


def test_the_two_largest_blocks_are_whole_and_what_lies_outside_is_one(
    sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["objective=supervised", "model.trainable=full", f"model.pretrained={sd_folder}"]
    config: Any = compose_command("plan", [*given, "training.strategy=fsdp"])[0]
    whole = read_blueprint(config)
    network = whole.model.network
    sizes = sorted(bytes_of(block) for block in whole.model.blocks_of(network))
    outside = bytes_of(network) - sum(sizes)
    assert outside < sizes[-2]
    gathered = memory.held(whole, config.training, 16, 1, config.optimizer).gathered
    assert gathered == sizes[-1] + sizes[-2]
    monkeypatch.setattr(type(whole.model), "blocks", ("mid_block",))
    assert memory.held(whole, config.training, 16, 1, config.optimizer).gathered == bytes_of(
        network
    )


@pytest.mark.parametrize(("gpus", "copies"), [(4, 4), (8, 8), (64, 8)])
def test_hsdp_shares_among_the_gpus_of_a_machine(gpus: int, copies: int) -> None:
    assert shards(TrainingConfig(strategy="hsdp"), gpus) == copies
