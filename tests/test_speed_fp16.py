"""fp16: a step whose gradient overflows is skipped, the scale halves, and training goes on."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from nightly import nightly_but
from runs import assert_same_state, command, last_state, metrics, start
from toy import use_toy

from sfumato.diffusion.randomness import Rng
from sfumato.models.model import TextToImageModel
from sfumato.objectives.draft import Draft
from sfumato.objectives.objective import Loss
from sfumato.training import loop
from sfumato.training.checkpoint import Snapshot, read_checkpoint
from sfumato.training.loop import TrainingError

FULL_SCALE = 2.0**16
HALF = ("training.precision=fp16", "training.keep_checkpoints=null", "training.ema_decay=0.5")
OFTEN = "training.checkpoint_every_steps=1"


@pytest.fixture
def overflow(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float], None]:
    """Return what multiplies the loss, and so its gradient, in the step that leads to `number`."""
    use_toy(monkeypatch)

    def arm(number: int, factor: float) -> None:
        step, loss, armed = loop.take_step, Draft.loss, [False]

        def stepping(config, module, state, distribution):
            armed[0] = state.step + 1 == number
            return step(config, module, state, distribution)

        def losing(self: Draft, model: TextToImageModel, batch: Sequence[str], rng: Rng) -> Loss:
            found = loss(self, model, batch, rng)
            value = found.value * factor if armed[0] else found.value
            return Loss(value, found.metrics, found.partial)

        monkeypatch.setattr(loop, "take_step", stepping)
        monkeypatch.setattr(Draft, "loss", losing)

    return arm


def state_at(run: Path, step: int) -> Snapshot:
    return read_checkpoint(run / "checkpoints" / f"step-{step:06d}")


def test_an_overflow_is_skipped_and_training_recovers(
    tmp_path: Path, overflow: Callable[[int, float], None]
) -> None:
    overflow(3, 2.0**20)
    start(command(tmp_path, "run", *HALF, OFTEN))
    states = [state_at(tmp_path / "run", step) for step in range(1, 7)]
    before, skipped, after = states[1:4]
    for part in ("weights", "ema", "optimizer"):
        for name, tensor in vars(before)[part].items():
            assert torch.equal(vars(skipped)[part][name], tensor), (part, name)
            assert not torch.equal(vars(after)[part][name], tensor), (part, name)
    assert [s.state["scaler"]["scale"] / FULL_SCALE for s in states] == [1, 1, 0.5, 0.5, 0.5, 0.5]
    assert [s.state["ema_updates"] for s in states] == [1, 2, 2, 3, 4, 5]
    counts = {v.item() for name, v in states[-1].optimizer.items() if name.startswith("step/")}
    assert counts == {5.0}
    rows = metrics(tmp_path / "run")[1:]
    assert [row["loss_scale"] / FULL_SCALE for row in rows] == [1, 1, 0.5, 0.5, 0.5, 0.5]
    assert ["grad_norm" in row for row in rows] == [True, True, False, True, True, True]


def test_the_first_step_may_overflow(
    tmp_path: Path, overflow: Callable[[int, float], None]
) -> None:
    overflow(1, 2.0**20)
    start(command(tmp_path, "run", *HALF, OFTEN))
    first, last = state_at(tmp_path / "run", 1), state_at(tmp_path / "run", 6)
    assert {v.item() for name, v in first.optimizer.items() if name.startswith("step/")} == {0.0}
    assert {v.item() for name, v in last.optimizer.items() if name.startswith("step/")} == {5.0}
    assert not any(v.any() for name, v in first.optimizer.items() if "exp_avg" in name)


def test_the_other_steps_are_those_of_a_run_that_never_saw_the_bad_one(
    tmp_path: Path, overflow: Callable[[int, float], None]
) -> None:
    """A skipped step leaves no trace but the scale, a power of two, which no gradient shows."""
    constant = ("optimizer.warmup_steps=0", "training.max_steps=2")
    start(command(tmp_path, "good", *HALF, *constant))
    overflow(3, 2.0**20)
    start(command(tmp_path, "bad", *HALF, "optimizer.warmup_steps=0", "training.max_steps=3"))
    good, bad = last_state(tmp_path / "good"), last_state(tmp_path / "bad")
    for name, tensor in good.ema.items():
        assert torch.equal(bad.ema[name], tensor)


def test_a_resumed_run_keeps_the_scale(
    tmp_path: Path, overflow: Callable[[int, float], None]
) -> None:
    overflow(2, 2.0**20)
    start(command(tmp_path, "whole", *HALF))
    start(command(tmp_path, "run", *HALF, "training.max_steps=3"))
    start(command(tmp_path, "run", *HALF))
    assert last_state(tmp_path / "run").state["scaler"]["scale"] == FULL_SCALE / 2
    assert_same_state(tmp_path / "run", tmp_path / "whole")


def test_a_loss_that_overflows_is_refused(
    tmp_path: Path, overflow: Callable[[int, float], None]
) -> None:
    """No loss scale can mend a forward."""
    overflow(2, float("inf"))
    with pytest.raises(TrainingError, match="not finite at step 2"):
        start(command(tmp_path, "run", *HALF))


@pytest.mark.parametrize("trainable", nightly_but(["lora"], ["lora", "full"]))
def test_fp16_trains_a_u_net_nearly_as_float32_does(
    tmp_path: Path, sd_folder: Path, trainable: str
) -> None:
    short = [f"model.trainable={trainable}", "training.max_steps=3"]
    short += ["sampler.num_inference_steps=2"]
    short += ["model.lora.rank=2"] if trainable == "lora" else []
    start(command(tmp_path, "half", *short, "training.precision=fp16", model=sd_folder))
    start(command(tmp_path, "exact", *short, model=sd_folder))
    half, exact = (last_state(tmp_path / name) for name in ("half", "exact"))
    assert {tensor.dtype for tensor in half.weights.values()} == {torch.float32}
    rows = metrics(tmp_path / "half"), metrics(tmp_path / "exact")
    assert rows[0][1]["loss"] != rows[1][1]["loss"]
    for left, right in zip(*rows, strict=True):
        if "loss" in right:
            assert left["loss"] == pytest.approx(right["loss"], abs=0.05)
    counts = {v.item() for name, v in half.optimizer.items() if name.startswith("step/")}
    assert counts == {half.state["ema_updates"]}
    assert any(not torch.equal(half.weights[n], w) for n, w in exact.weights.items())
