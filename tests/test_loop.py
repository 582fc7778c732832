"""The loop: what it logs, validates, exports, refuses and survives; and that it learns."""

import json
import math
import shutil
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import final

import numpy as np
import pytest
import torch
from jaxtyping import Float
from PIL import Image
from runs import (
    BASE,
    PROMPTS,
    ToyModel,
    command,
    exported,
    in_child,
    kill,
    last_state,
    metrics,
    on_call,
    start,
    start_cli,
    use_toy,
)
from safetensors.torch import load_file
from torch import Tensor

from sfumato.compose import compose_train, load_settings
from sfumato.config import TrainingConfig
from sfumato.diffusion.randomness import derive
from sfumato.models.generate import generate
from sfumato.rewards.reward import Reward, Score
from sfumato.training import loop, run
from sfumato.training.checkpoint import find_fault, list_checkpoints, read_checkpoint
from sfumato.training.distribution import Distribution
from sfumato.training.folder import MAY_CHANGE, RunFolder, differences
from sfumato.training.loop import TrainingError
from sfumato.training.run import exclusive
from sfumato.training.state import load_weights
from sfumato.training.tracking import read_metrics


@final
class PromptReward(Reward):
    """Brightness times a number of the prompt; the chosen fault in the chosen call."""

    scale = 3.0

    def __init__(self) -> None:
        super().__init__()
        self.armed = False
        self.fault = ""
        self.calls: list[list[str]] = []

    def score(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Score:
        factors = torch.tensor([float(factor(prompt)) for prompt in prompts])
        value = images.mean((1, 2, 3)) * factors
        if self.armed:
            self.calls.append(list(prompts))
        if self.fault == "value" and len(self.calls) == 2:
            value = value * torch.tensor([math.nan] + [1.0] * (len(prompts) - 1))
        if self.fault == "gradient" and self.armed:
            value = value + (images * 0).sum().sqrt()  # 0, with the derivative inf x 0
        return Score(value)


def factor(prompt: str) -> int:
    return derive(prompt) % 97


@pytest.fixture(autouse=True)
def toy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    if "sd_folder" not in request.fixturenames:
        use_toy(monkeypatch)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a complete run of the toy: six steps, validated at 0, 3 and 6, averaged over two."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        use_toy(patch)
        patch.setattr(run, "build_reward", lambda config: PromptReward())
        more = ["training.ema_decay=0.5", "training.tensorboard=true", "model.lora.dropout=0.5"]
        start(command(folder, "run", *more))
    yield folder / "run"


def pairs(run_folder: Path, step: int) -> list[dict]:
    file = run_folder / "samples" / f"step-{step:06d}" / "pairs.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def picture(run_folder: Path, step: int, index: int, side: str) -> bytes:
    return (run_folder / "samples" / f"step-{step:06d}" / f"{index:03d}-{side}.png").read_bytes()


def test_validation_shows_the_same_prompts_and_noise(done: Path) -> None:
    shown = [path.name for path in sorted((done / "samples").iterdir())]
    assert shown == ["step-000000", "step-000003", "step-000006"]
    first = pairs(done, 0)
    assert [record["prompt"] for record in first] == PROMPTS[:3]
    assert len({record["seed"] for record in first}) == 3
    for step in (3, 6):
        for index, record in enumerate(pairs(done, step)):
            for key in ("index", "prompt", "seed", "reward_base"):
                assert record[key] == first[index][key]
            assert picture(done, step, index, "base") == picture(done, 0, index, "base")
            assert picture(done, step, index, "tuned") != picture(done, 0, index, "tuned")


def test_validation_is_without_dropout(done: Path) -> None:
    """Before the first step both sides are one model, which dropout would make two."""
    for record in pairs(done, 0):
        assert record["reward_tuned"] == record["reward_base"]


def test_training_is_with_dropout(done: Path, tmp_path: Path) -> None:
    torch.seed()
    rewards = []
    for dropout in (0.0, 0.5):
        one = ["training.max_steps=1", f"model.lora.dropout={dropout}"]
        start(command(tmp_path, str(dropout), *one))
        rewards.append(metrics(tmp_path / str(dropout))[1]["reward"])
    assert rewards[0] != rewards[1]


def test_each_image_is_scored_with_its_own_prompt(done: Path) -> None:
    """Recompute the rewards from the files; half an 8-bit level is their precision."""
    assert len({factor(prompt) for prompt in PROMPTS[:3]}) == 3
    for step in (0, 3, 6):
        for record in pairs(done, step):
            for side in ("tuned", "base"):
                file = done / "samples" / f"step-{step:06d}" / f"{record['index']:03d}-{side}.png"
                pixels = np.asarray(Image.open(file), dtype=np.float64) / 255
                number = factor(record["prompt"])
                expected = pixels.mean() * number
                assert record[f"reward_{side}"] == pytest.approx(expected, abs=number / 500)


def test_metrics_hold_the_means_of_the_pairs(done: Path) -> None:
    rows = {row["step"]: row for row in metrics(done)}
    assert list(rows) == list(range(7))
    for step, row in rows.items():
        if step % 3:
            assert "validation/reward" not in row
            continue
        for name, side in (("validation/reward", "tuned"), ("validation/reward_base", "base")):
            mean = np.mean([record[f"reward_{side}"] for record in pairs(done, step)])
            assert row[name] == pytest.approx(mean, rel=1e-6)
    expected = ["reward", "kl", "loss", "grad_norm", "learning_rate"]
    assert all(name in rows[step] for step in range(1, 7) for name in expected)
    assert [rows[step]["learning_rate"] for step in range(1, 7)] == [0.005] + [0.01] * 5
    assert rows[1]["kl"] == pytest.approx(0, abs=1e-12) or rows[1]["kl"] > 0


def test_the_average_is_what_is_validated(done: Path) -> None:
    config = load_settings(done / "config.yaml")
    rewards = {}
    for name in ("ema", "weights"):
        model = ToyModel(config.model)
        load_weights(model, vars(last_state(done))[name])
        model.network.eval()
        for record in pairs(done, 6):
            image = generate(model, [record["prompt"]], [record["seed"]], config.sampler)
            rewards[name, record["index"]] = image.mean().item() * factor(record["prompt"])
    for record in pairs(done, 6):
        assert record["reward_tuned"] == pytest.approx(rewards["ema", record["index"]], rel=1e-5)
        assert abs(rewards["ema", record["index"]] - rewards["weights", record["index"]]) > 1e-3


def test_the_average_is_what_is_exported(done: Path) -> None:
    state = last_state(done)
    network = load_file(done / "export" / "pipeline" / "network.safetensors")
    assert network.keys() == state.ema.keys()
    for name, tensor in network.items():
        assert torch.equal(tensor, state.ema[name])
        assert not torch.equal(tensor, state.weights[name])


def test_the_average_follows_the_weights_of_the_checkpoints(tmp_path: Path) -> None:
    every = ["training.checkpoint_every_steps=1", "training.keep_checkpoints=null"]
    start(command(tmp_path, "run", *every, "training.ema_decay=0.3", "training.max_steps=5"))
    states = [read_checkpoint(path) for path in list_checkpoints(tmp_path / "run/checkpoints")]
    assert [state.step for state in states] == [1, 2, 3, 4, 5]
    for before, state in zip(states, states[1:], strict=False):
        decay = min(0.3, (1 + before.step) / (10 + before.step))
        for name, shadow in state.ema.items():
            expected = decay * before.ema[name] + (1 - decay) * state.weights[name]
            torch.testing.assert_close(shadow, expected, rtol=1e-6, atol=1e-8)


def test_without_an_average_the_weights_are_exported(tmp_path: Path) -> None:
    start(command(tmp_path, "run", "training.ema_decay=null", "training.max_steps=2"))
    state = last_state(tmp_path / "run")
    network = load_file(tmp_path / "run" / "export" / "pipeline" / "network.safetensors")
    assert state.ema == {}
    assert all(torch.equal(network[name], tensor) for name, tensor in state.weights.items())


def test_gradients_are_clipped_together(tmp_path: Path) -> None:
    """After one step AdamW's first moment is (1 - beta1) times the gradient it was given."""
    norms = []
    for limit in (1e9, 1e-3):
        one = ["training.max_steps=1", f"optimizer.max_grad_norm={limit}"]
        start(command(tmp_path, str(limit), *one))
        state, row = last_state(tmp_path / str(limit)), metrics(tmp_path / str(limit))[1]
        moments = [t for name, t in state.optimizer.items() if name.startswith("exp_avg/")]
        norms.append((torch.cat([t.flatten() for t in moments]).norm().item() / 0.1, row))
    assert norms[0][0] == pytest.approx(norms[0][1]["grad_norm"], rel=1e-5)
    assert norms[1][0] == pytest.approx(1e-3, rel=1e-4)
    assert norms[1][1]["grad_norm"] == norms[0][1]["grad_norm"] > 1e-2


def test_tensorboard_has_every_step_once_after_a_kill(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    again = command(tmp_path, "run", "training.tensorboard=true")

    def die() -> None:
        on_call(6, kill, "take_step")
        start(again)

    assert in_child(die) == -9
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]
    start(again)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    rows = metrics(tmp_path / "run")
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert losses == pytest.approx({row["step"]: row["loss"] for row in rows[1:]}, rel=1e-6)
    images = events.Images("validation/tuned_base")
    assert [event.step for event in images] == [0, 3, 6]
    assert images[0].encoded_image_string.startswith(b"\x89PNG")


def test_metrics_cut_short_by_a_kill_are_mended(tmp_path: Path) -> None:
    first = command(tmp_path, "run", "training.max_steps=3")
    start(first)
    file = tmp_path / "run" / "metrics.jsonl"
    with file.open("a") as stream:
        stream.write('{"step": 4, "rew')
    assert [row["step"] for row in read_metrics(RunFolder(tmp_path / "run"))] == [0, 1, 2, 3]
    start(command(tmp_path, "run"))
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(7))


@pytest.mark.parametrize("fault", ["value", "gradient"])
def test_a_non_finite_step_stops_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    """At step 3: nan in the first row of the second micro-batch, or in the gradient alone."""
    reward, models = PromptReward(), []
    take_step = loop.take_step

    def third_is_bad(config, module, state, distribution):  # noqa: ANN001, ANN202
        reward.armed = state.step == 2
        reward.fault = fault
        return take_step(config, module, state, distribution)

    def load(config):  # noqa: ANN001, ANN202
        models.append(ToyModel(config))
        return models[-1]

    monkeypatch.setattr(run, "build_reward", lambda config: reward)
    monkeypatch.setattr(run, "load_model", load)
    monkeypatch.setattr(loop, "take_step", third_is_bad)
    again = command(tmp_path, "run", "training.checkpoint_every_steps=1")
    with pytest.raises(TrainingError, match="not finite at step 3") as caught:
        start(again)
    bad = reward.calls[1] if fault == "value" else reward.calls[0] + reward.calls[1]
    assert f"for the prompts {bad};" in str(caught.value)
    state = last_state(tmp_path / "run")
    assert state.step == 2
    for name, parameter in models[0].trainable().items():
        assert torch.equal(parameter, state.weights[name])
        assert torch.isfinite(parameter).all()
    places = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [find_fault(place) for place in places] == [None, None]
    reward.calls.clear()
    assert in_child(lambda: start_cli(again)) == 2
    output = capfd.readouterr().err
    assert "not finite at step 3" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("optimizer.lr=0.02", "optimizer.lr: 0.01 -> 0.02"),
        ("training.seed=1", "training.seed: 0 -> 1"),
        ("training.ema_decay=null", "training.ema_decay: 0.9999 -> None"),
        ("reward=brightness", "reward.kind: color -> brightness"),
        ("data.shuffle=false", "data.shuffle: True -> False"),
    ],
)
def test_changed_settings_are_refused_by_name(tmp_path: Path, changed: str, said: str) -> None:
    start(command(tmp_path, "run", "training.max_steps=1"))
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ValueError, match="other settings") as error:
        start(command(tmp_path, "run", "training.max_steps=1", changed))
    assert said in str(error.value)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_settings_that_do_not_touch_the_result_may_change(tmp_path: Path) -> None:
    start(command(tmp_path, "run", "training.max_steps=1"))
    changed = {
        "training.max_steps": "2",
        "training.max_time": "10:00:00",
        "training.checkpoint_every_steps": "7",
        "training.keep_checkpoints": "1",
        "training.micro_batch_size": "1",
        "training.strategy": "fsdp",
        "training.tensorboard": "true",
        "model.gradient_checkpointing": "true",
    }
    start(command(tmp_path, "run", *[f"{key}={value}" for key, value in changed.items()]))
    assert last_state(tmp_path / "run").step == 2
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    for key in MAY_CHANGE:
        group, _, name = key.rpartition(".")
        old, new = ({group: {name: value}} if group else {name: value} for value in (1, 2))
        assert differences(old, new) == {}
    assert differences({"a": {"b": 1}}, {"a": {"c": 1}}) == {"a.b": "1 -> None", "a.c": "None -> 1"}


def test_two_processes_cannot_hold_one_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    again = command(tmp_path, "run", "training.max_steps=1")
    with exclusive(RunFolder(tmp_path / "run"), Distribution(TrainingConfig())):
        assert in_child(lambda: start_cli(again)) == 2
    assert f"another process is training in {tmp_path / 'run'}" in capfd.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert in_child(lambda: start_cli(again)) == 0


def test_weights_and_biases_is_asked_for_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb_project = 'mine' needs .*sfumato\[wandb\]"):
        start(command(tmp_path, "run", "training.wandb_project=mine"))


def test_run_json_says_what_ran(done: Path) -> None:
    (start_record,) = json.loads((done / "run.json").read_text())["starts"]
    assert start_record["torch"] == torch.__version__
    assert start_record["diffusers"].count(".") == 2
    assert start_record["seed"] == 0
    assert start_record["processes"] == 1
    assert start_record["reward_scale"] == 3.0
    weights = last_state(done).weights
    assert start_record["trained_parameters"] == sum(t.numel() for t in weights.values())
    settings = load_settings(done / "config.yaml")
    composed, _ = compose_train(command(done.parent, "run"))
    assert settings.sampler == composed.sampler
    assert settings.training == replace(composed.training, ema_decay=0.5, tensorboard=True)


def test_one_process_may_train_in_one_precision_after_another(tmp_path: Path) -> None:
    """As a sweep over training.precision does."""
    for precision in ("no", "bf16"):
        two = ["training.max_steps=2", f"training.precision={precision}"]
        start(command(tmp_path, precision, *two))
    exact, rounded = (metrics(tmp_path / name)[1]["loss"] for name in ("no", "bf16"))
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.05)


def test_bf16_trains_float32_adapters(tmp_path: Path, sd_folder: Path) -> None:
    half = ["training.precision=bf16", "model.dtype=bfloat16", "model.lora.rank=2"]
    start(command(tmp_path, "run", *half, "training.max_steps=2", model=sd_folder))
    state = last_state(tmp_path / "run")
    for tensors in (state.weights, state.ema, state.optimizer):
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert any(tensor.any() for name, tensor in state.weights.items() if "lora_B" in name)
    for row in metrics(tmp_path / "run"):
        assert all(math.isfinite(value) for value in row.values())


def test_draft_learns_its_reward_and_kl_holds_it_back(tmp_path: Path, sd_folder: Path) -> None:
    """Twenty steps on redness; the export then gives the same image in diffusers."""
    gained, distance = {}, {}
    for name, coefficient, verify in (("free", 1e-6, "true"), ("held", 30.0, "false")):
        settings = [f"objective.kl_coeff={coefficient}", f"verify={verify}"]
        settings += ["sampler.num_inference_steps=2", "training.max_steps=20"]
        settings += ["training.micro_batch_size=4", "model.lora.rank=4", "model.lora.dropout=0.05"]
        settings += ["validation.every_steps=20", "training.ema_decay=0.5"]
        start(command(tmp_path, name, *settings, model=sd_folder))
        rows = metrics(tmp_path / name)
        assert rows[1]["kl"] < 1e-9
        gained[name] = rows[-1]["validation/reward"] - rows[-1]["validation/reward_base"]
        distance[name] = rows[-1]["kl"]
    print(gained, distance)
    assert gained["free"] > 1
    assert distance["free"] > 1e-3
    assert distance["held"] < distance["free"] / 3
    assert gained["held"] < gained["free"] / 2
    assert (
        "(verified: diffusers gives the same image" in (tmp_path / "free/export.json").read_text()
    )
    assert_adapter_is_the_average(tmp_path / "free")


def assert_adapter_is_the_average(run_folder: Path) -> None:
    (file,) = (run_folder / "export" / "lora").iterdir()
    adapter, ema = load_file(file), last_state(run_folder).ema
    assert len(adapter) == len(ema)
    for name, tensor in ema.items():
        theirs = f"unet.{name.replace('.default', '')}"
        assert torch.equal(adapter[theirs], tensor)
