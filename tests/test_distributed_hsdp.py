"""HSDP: copies of the weights, each cut over some processes; fp16, EMA and layouts over many."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from runs import command, in_processes, metrics, start, start_cli
from torch import Tensor

from sfumato.diffusion.randomness import Rng
from sfumato.models.model import TextToImageModel
from sfumato.objectives.draft import Draft
from sfumato.objectives.objective import Loss
from sfumato.training.checkpoint import Snapshot, read_checkpoint

pytestmark = pytest.mark.usefixtures("unchecked")  # tests/test_distributed.py checks such runs
SAME = 1e-5
SETTINGS = (
    "model.trainable=full",
    "sampler.guidance_scale=1.0",
    "sampler.num_inference_steps=2",
    "training.global_batch_size=8",
    "training.max_steps=4",
    "training.keep_checkpoints=null",
    "validation.every_steps=0",
    "training.ema_decay=0.9",
    "training.async_checkpoints=true",
    "optimizer.eps=1e-4",  # where a gradient is rounding alone, 1e-8 would make a step of it
    "optimizer.max_grad_norm=0.05",  # so that every step is clipped by the norm over all
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Path:
    """Return the run of one process, with checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("alone")
    start(command(folder, "run", *SETTINGS, "validation.every_steps=2", model=sd_folder))
    assert all(row["grad_norm"] > 0.05 for row in metrics(folder / "run")[1:])
    return folder / "run"


def state_at(run: Path, step: int) -> Snapshot:
    return read_checkpoint(run / "checkpoints" / f"step-{step:06d}")


def flat(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in names])


def assert_same(found: Path, expected: Path, step: int, before: int = 0) -> None:
    """Compare moments by their norms, weights and EMA by how far they moved since `before`."""
    ours, theirs = state_at(found, step), state_at(expected, step)
    assert ours.state == theirs.state
    assert ours.weights.keys() == theirs.weights.keys()
    for kind in ("exp_avg", "exp_avg_sq"):
        names = [name for name in theirs.optimizer if name.startswith(f"{kind}/")]
        left, right = flat(ours.optimizer, names), flat(theirs.optimizer, names)
        assert (left - right).norm() <= SAME * right.norm(), kind
    names = list(theirs.weights)
    for part in ("weights", "ema"):
        left, right = (flat(vars(s)[part], names) for s in (ours, theirs))
        moved = right - flat(vars(state_at(expected, before))[part], names) if before else right
        assert (left - right).norm() <= SAME * moved.norm(), part
    rows = metrics(found)[: step + 1], metrics(expected)[: step + 1]
    for left, right in zip(*rows, strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=2e-4)


def test_copies_of_shards_train_as_one_process(
    tmp_path: Path, sd_folder: Path, alone: Path
) -> None:
    """Two copies of two shards take two steps like one process, which then goes on alone."""
    world = 4
    cut = [*SETTINGS, "training.strategy=hsdp", "training.shard_size=2"]
    cut += ["validation.every_steps=2"]
    first = command(tmp_path, "run", *cut, "training.max_steps=2", model=sd_folder)
    in_processes(world, lambda _: start_cli(first))
    run = tmp_path / "run"
    assert_same(run, alone, 2)
    start(command(tmp_path, "run", *cut, model=sd_folder))
    assert_same(run, alone, 4, before=2)


@pytest.mark.nightly  # tests/test_distributed.py has LoRA under FSDP
def test_lora_over_copies_of_shards(tmp_path: Path, sd_folder: Path) -> None:
    lora = [*SETTINGS, "model.trainable=lora", "model.lora.rank=2", "training.max_steps=2"]
    start(command(tmp_path, "whole", *lora, model=sd_folder))
    cut = ["training.strategy=hsdp", "training.shard_size=1"]
    again = command(tmp_path, "run", *lora, *cut, model=sd_folder)
    in_processes(2, lambda _: start_cli(again))
    assert_same(tmp_path / "run", tmp_path / "whole", 2)


@pytest.mark.nightly  # tests/test_distributed.py has the average
def test_the_average_may_lie_on_the_cpu_in_shards(tmp_path: Path, sd_folder: Path) -> None:
    seldom = [*SETTINGS, "training.ema_every_steps=2", "training.max_steps=3"]
    start(command(tmp_path, "whole", *seldom, model=sd_folder))
    cut = ["training.ema_on_cpu=true", "training.strategy=hsdp"]
    again = command(tmp_path, "run", *seldom, *cut, model=sd_folder)
    in_processes(2, lambda _: start_cli(again))
    assert_same(tmp_path / "run", tmp_path / "whole", 2)
    whole, found = state_at(tmp_path / "whole", 3), state_at(tmp_path / "run", 3)
    assert found.state["ema_updates"] == whole.state["ema_updates"] == 3
    two = state_at(tmp_path / "run", 2)
    for name, average in found.ema.items():  # between two moves
        assert torch.equal(average, two.ema[name])


def test_an_overflow_on_one_process_is_skipped_on_both(tmp_path: Path, sd_folder: Path) -> None:
    """In the second step only the second process has a gradient that overflows.

    Under FSDP it reaches only the shards of one process, and the scaler has to tell the other.
    """
    half = [*SETTINGS, "training.precision=fp16", "training.max_steps=3"]
    half += ["training.checkpoint_every_steps=1", "training.strategy=fsdp"]
    again = command(tmp_path, "run", *half, model=sd_folder)
    in_processes(2, lambda rank: start_overflowing(rank, again))
    one, two, three = (state_at(tmp_path / "run", step) for step in (1, 2, 3))
    assert [s.state["scaler"]["scale"] for s in (one, two, three)] == [2**16, 2**15, 2**15]
    for part in ("weights", "ema", "optimizer"):
        for name, tensor in vars(one)[part].items():
            assert torch.equal(vars(two)[part][name], tensor), (part, name)
    assert any(not torch.equal(three.weights[name], w) for name, w in two.weights.items())
    counts = {v.item() for name, v in three.optimizer.items() if name.startswith("step/")}
    assert counts == {2.0}


def start_overflowing(rank: int, overrides: Sequence[str]) -> None:
    loss, calls = Draft.loss, [0]
    micro_batches = 2  # of 2 rows, of 4 for each process

    def losing(self: Draft, model: TextToImageModel, batch: Sequence[str], rng: Rng) -> Loss:
        found = loss(self, model, batch, rng)
        step, calls[0] = calls[0] // micro_batches, calls[0] + 1
        value = found.value * 2.0**30 if rank == 1 and step == 1 else found.value
        return Loss(value, found.metrics, found.partial)

    Draft.loss = losing
    start(overrides)


@pytest.mark.nightly  # copies of shards are tested above
def test_in_half_precision_no_gradient_comes_late(tmp_path: Path, sd_folder: Path) -> None:
    """AdamW's first moment after one step of several micro-batches is a tenth of the gradient.

    The weights are cast first for sampling, without a gradient, and then used again with one.
    """
    half = [*SETTINGS, "training.precision=bf16", "training.max_steps=1"]
    start(command(tmp_path, "whole", *half, model=sd_folder))
    again = command(tmp_path, "run", *half, "training.strategy=fsdp", model=sd_folder)
    in_processes(2, lambda _: start_cli(again))
    ours, theirs = (state_at(tmp_path / name, 1).optimizer for name in ("run", "whole"))
    names = [name for name in theirs if name.startswith("exp_avg/")]
    left, right = flat(ours, names), flat(theirs, names)
    assert (left - right).norm() <= 0.02 * right.norm()


@pytest.mark.nightly  # tests/test_speed_networks.py has channels_last
def test_channels_last_over_two_processes(tmp_path: Path, sd_folder: Path) -> None:
    """Whose gradients DDP keeps as views of its buckets."""
    settings = [*SETTINGS, "model.channels_last=true", "training.max_steps=2"]
    start(command(tmp_path, "whole", *settings, model=sd_folder))
    again = command(tmp_path, "run", *settings, model=sd_folder)
    in_processes(2, lambda _: start_cli(again))
    assert_same(tmp_path / "run", tmp_path / "whole", 2)


def test_a_copy_that_does_not_divide_the_processes_is_refused(
    tmp_path: Path, sd_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    odd = ["training.strategy=hsdp", "training.shard_size=3", "training.global_batch_size=4"]
    overrides = command(tmp_path, "run", *odd, model=sd_folder)
    in_processes(2, lambda _: start_cli(overrides), code=2)
    message = capfd.readouterr().err
    assert "training.shard_size=3 does not divide 2 processes" in message
    assert "Traceback" not in message
