"""The same global batch gives the same update, however it is cut over micro-batches and processes.

Two updates are the same if they differ by less than 1e-5 of their norm: sums in float32 taken in
another order.
"""

import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from nightly import nightly_but
from runs import (
    PROMPTS,
    command,
    in_processes,
    metrics,
    on_call,
    start,
    start_cli,
)
from torch import Tensor
from toy import use_toy

from sfumato.diffusion.randomness import Rng
from sfumato.files import lock
from sfumato.models.model import TextToImageModel
from sfumato.objectives.draft import Draft
from sfumato.objectives.objective import Loss
from sfumato.run import export
from sfumato.run.export import ExportError
from sfumato.training.checkpoint import Snapshot, read_checkpoint

SAME = 1e-5
SCALE = 20  # of the reward
COMMON = (
    "sampler.num_inference_steps=2",
    "training.global_batch_size=8",
    "training.max_steps=4",
    "training.keep_checkpoints=null",
    "validation.every_steps=2",
    "training.ema_decay=0.9",
    # Where a gradient is rounding alone (a bias before a normalisation), Adam's usual 1e-8 would
    # turn the rounding into a step of full size.
    "optimizer.eps=1e-4",
)
LORA = (*COMMON, "model.trainable=lora", "model.lora.rank=2", "objective.truncation_steps=2")
FULL = (*COMMON, "model.trainable=full", "sampler.guidance_scale=1.0")


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, sd_folder: Path
) -> Iterator[Mapping[str, Path]]:
    """Give the runs of one process, LoRA and full, with checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("alone")
    start(command(folder, "lora", *LORA, model=sd_folder))
    start(command(folder, "full", *FULL, model=sd_folder))
    yield {"lora": folder / "lora", "full": folder / "full"}


def state_at(run: Path, step: int) -> Snapshot:
    return read_checkpoint(run / "checkpoints" / f"step-{step:06d}")


def assert_same_update(found: Snapshot, expected: Snapshot, start: Snapshot | None = None) -> None:
    """Compare gradients' moments by their norms, and weights and EMA by how far they moved."""
    assert found.step == expected.step
    assert found.state == expected.state
    for kind in ("exp_avg", "exp_avg_sq"):
        names = [name for name in expected.optimizer if name.startswith(f"{kind}/")]
        ours, theirs = (flat(s.optimizer, names) for s in (found, expected))
        assert (ours - theirs).norm() <= SAME * theirs.norm(), kind
    for part in ("weights", "ema"):
        names = list(expected.weights)
        ours, theirs = (flat(vars(s)[part], names) for s in (found, expected))
        moved = theirs - flat(start.weights, names) if start else theirs
        assert moved.norm() > 0
        assert (ours - theirs).norm() <= SAME * moved.norm(), part


def flat(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in names])


def assert_same_metrics(found: Path, expected: Path, steps: int) -> None:
    ours, theirs = metrics(found)[: steps + 1], metrics(expected)[: steps + 1]
    assert len(ours) == steps + 1
    for left, right in zip(ours, theirs, strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=SAME * SCALE)


@pytest.mark.parametrize("micro", [8, 1])
def test_micro_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro: int) -> None:
    use_toy(monkeypatch)
    batch = ["training.global_batch_size=8", "objective.truncation_range=[1,3]"]
    batch += ["sampler.eta=0.5", "optimizer.eps=1e-4"]
    for size in (2, micro):
        start(command(tmp_path, str(size), *batch, f"training.micro_batch_size={size}"))
    runs = tmp_path / str(micro), tmp_path / "2"
    assert_same_update(state_at(runs[0], 6), state_at(runs[1], 6), state_at(runs[1], 2))
    assert_same_metrics(*runs, steps=6)


def test_micro_batches_and_gradient_checkpointing(
    tmp_path: Path, sd_folder: Path, alone: Mapping[str, Path]
) -> None:
    """A whole batch in one forward with recomputed activations, against four forwards without."""
    changed = ["training.micro_batch_size=8", "model.gradient_checkpointing=true"]
    start(command(tmp_path, "run", *LORA, *changed, "training.max_steps=2", model=sd_folder))
    assert_same_update(state_at(tmp_path / "run", 2), state_at(alone["lora"], 2))
    assert_same_metrics(tmp_path / "run", alone["lora"], steps=2)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_as_the_recipes_for_real_models_have_it(
    tmp_path: Path, sd_folder: Path, strategy: str
) -> None:
    """Frozen weights in bfloat16 under float32 adapters, autocast, recomputed activations."""
    real = ["model.dtype=bfloat16", "training.precision=bf16", "model.gradient_checkpointing=true"]
    settings = [*LORA, *real, "training.max_steps=2", "training.micro_batch_size=4"]
    settings += ["validation.every_steps=0"]  # test_two_processes validates
    start(command(tmp_path, "whole", *settings, model=sd_folder))
    cut = command(tmp_path, "cut", *settings, f"training.strategy={strategy}", model=sd_folder)
    in_processes(2, lambda _: start_cli(cut))
    found, expected = (state_at(tmp_path / name, 2) for name in ("cut", "whole"))
    for name, weight in expected.weights.items():
        assert found.weights[name].dtype == weight.dtype == torch.float32
    rows = [{row["step"]: row for row in metrics(tmp_path / name)} for name in ("cut", "whole")]
    for step in (1, 2):
        assert rows[0][step]["reward"] == pytest.approx(rows[1][step]["reward"], rel=2e-2)


# tests/test_distributed_supervised.py has full weights under FSDP.
CUTS = [("lora", "fsdp"), ("full", "ddp"), ("full", "fsdp")]


@pytest.mark.parametrize(("kind", "strategy"), nightly_but(CUTS[:2], CUTS))
def test_two_processes(
    tmp_path: Path, sd_folder: Path, alone: Mapping[str, Path], kind: str, strategy: str
) -> None:
    """Two processes take two steps like one; one goes on from their checkpoint like one alone."""
    settings = [*{"lora": LORA, "full": FULL}[kind], f"training.strategy={strategy}"]
    first = command(tmp_path, "run", *settings, "training.max_steps=2", model=sd_folder)
    in_processes(2, lambda rank: start_listening(rank, first, tmp_path))
    run = tmp_path / "run"
    assert_same_update(state_at(run, 2), state_at(alone[kind], 2))
    assert_same_metrics(run, alone[kind], steps=2)
    assert_same_pictures(run, alone[kind])
    assert_slices(tmp_path)
    assert json.loads((run / "run.json").read_text())["starts"][0]["processes"] == 2
    if strategy == "fsdp":
        start(command(tmp_path, "run", *settings, "training.max_steps=4", model=sd_folder))
        assert_same_update(state_at(run, 4), state_at(alone[kind], 4), state_at(alone[kind], 2))


def start_listening(rank: int, overrides: Sequence[str], folder: Path) -> None:
    """Train, and note the prompts that this process was given."""
    objective_loss = Draft.loss

    def loss(self: Draft, model: TextToImageModel, batch: Sequence[str], rng: Rng) -> Loss:
        with (folder / f"rank-{rank}").open("a") as file:
            file.write("\n".join(batch) + "\n")
        return objective_loss(self, model, batch, rng)

    Draft.loss = loss
    start(overrides)


def assert_slices(folder: Path) -> None:
    """Assert that the two together saw each prompt as often as in two batches of eight in order."""
    seen = [(folder / f"rank-{rank}").read_text().splitlines() for rank in range(2)]
    assert [len(rows) for rows in seen] == [8, 8]
    order = seen[0][:4] + seen[1][:4] + seen[0][4:] + seen[1][4:]
    assert sorted(order[:6]) == sorted(order[6:12]) == sorted(PROMPTS)


def assert_same_pictures(found: Path, expected: Path) -> None:
    ours, theirs = (pairs(run / "samples" / "step-000002") for run in (found, expected))
    assert len(ours) == 3  # an odd number, over two processes
    for left, right in zip(ours, theirs, strict=True):
        assert (left["prompt"], left["seed"]) == (right["prompt"], right["seed"])
        for side in ("reward_tuned", "reward_base"):
            assert left[side] == pytest.approx(right[side], rel=1e-4, abs=SAME * SCALE)


def pairs(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def test_one_process_then_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of one process is taken up by two under FSDP, and validated on the way."""
    use_toy(monkeypatch)
    smooth = ["optimizer.eps=1e-4", "training.keep_checkpoints=null", "training.ema_decay=0.9"]
    smooth.append("validation.every_steps=1")
    start(command(tmp_path, "whole", *smooth))
    start(command(tmp_path, "run", *smooth, "training.max_steps=3"))
    rest = command(tmp_path, "run", *smooth, "training.strategy=fsdp")
    in_processes(2, lambda _: start_cli(rest))
    cut, whole = tmp_path / "run", tmp_path / "whole"
    assert_same_update(state_at(cut, 6), state_at(whole, 6), state_at(whole, 2))
    assert_same_metrics(cut, whole, steps=6)


def test_both_processes_stop_on_the_signal_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_toy(monkeypatch)
    overrides = command(tmp_path, "run", "training.max_steps=6")

    def stopped(rank: int) -> None:
        if rank == 1:
            on_call(3, lambda: os.kill(os.getpid(), signal.SIGTERM), "take_step")
        assert start(overrides).stopped_by == ("SIGTERM" if rank else "another process")

    in_processes(2, stopped)
    start(command(tmp_path, "whole", "training.max_steps=6"))
    in_processes(2, lambda _: start(overrides))
    assert_same_metrics(tmp_path / "run", tmp_path / "whole", steps=6)


def test_both_processes_hear_that_the_folder_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    use_toy(monkeypatch)
    overrides = command(tmp_path, "run")
    with lock(tmp_path / "run", busy="", unmade=""):
        in_processes(2, lambda _: start_cli(overrides), code=2)
    message = capfd.readouterr().err
    assert f"sfumato: another process is training in {tmp_path / 'run'}" in message
    assert "sfumato (process 1): another process failed; it says why" in message
    assert "Traceback" not in message


def test_both_processes_hear_that_the_export_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    use_toy(monkeypatch)

    def fail(*_: object) -> None:
        raise ExportError("the disk is full")

    monkeypatch.setattr(export, "export", fail)
    overrides = command(tmp_path, "run", "training.max_steps=1")
    in_processes(2, lambda _: start_cli(overrides), code=2)
    message = capfd.readouterr().err
    assert "sfumato: the disk is full" in message
    assert "sfumato (process 1): another process failed; it says why" in message
