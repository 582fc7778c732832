"""Supervised training in two processes: the same updates as in one, for U-Nets and transformers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from families import WRITERS, write_pictures
from nightly import nightly_but
from runs import in_processes, metrics, start, start_cli
from torch import Tensor

from sfumato.training.checkpoint import Snapshot, read_checkpoint

pytestmark = pytest.mark.usefixtures("unchecked")  # tests/test_families.py checks such runs
SAME = 1e-5
STRATEGIES = [  # DDP and FSDP of U-Nets and transformers, alone and with text encoders
    ("stable_diffusion", "ddp", "[network]"),
    ("stable_diffusion_xl", "ddp", "[network, text_encoder, text_encoder_2]"),
    ("stable_diffusion_3", "fsdp", "[network]"),
    ("flux", "fsdp", "[network, text_encoder]"),
    ("qwen_image", "ddp", "[network]"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with pictures and a pipeline of each family."""
    root = tmp_path_factory.mktemp("distributed")
    write_pictures(root / "pictures", count=10)
    for name in {name for name, *_ in STRATEGIES}:
        WRITERS[name](root / name)
    return root


def command(place: Path, runs: Path, name: str, family: str, *more: str) -> list[str]:
    settings = [
        f"runs_dir={runs}",
        f"name={name}",
        "objective=supervised",
        f"model.pretrained={place / family}",
        "model.trainable=full",
        f"data.images.path={place / 'pictures'}",
        "data.images.crop=random",
        "data.images.flip=true",
        "objective.caption_dropout=0.2",
        "sampler.num_inference_steps=2",
        "sampler.guidance_scale=2.0",
        "sampler.height=32",
        "sampler.width=32",
        "training.micro_batch_size=2",
        "training.global_batch_size=4",
        "training.max_steps=4",
        "training.checkpoint_every_steps=2",
        "training.keep_checkpoints=null",
        "training.ema_decay=0.9",
        "training.tensorboard=false",
        "validation.num_images=1",
        "validation.loss_images=3",  # an odd number, over two processes
        "validation.every_steps=2",
        "optimizer.lr=1e-3",
        "optimizer.warmup_steps=0",
        # Where a gradient is rounding alone, Adam's usual 1e-8 would make a full step of it.
        "optimizer.eps=1e-4",
        "verify=false",
        *more,
    ]
    return list({text.partition("=")[0]: text for text in settings}.values())


def state_at(run: Path, step: int) -> Snapshot:
    return read_checkpoint(run / "checkpoints" / f"step-{step:06d}")


def flat(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in names])


def assert_same(found: Path, expected: Path, step: int) -> None:
    ours, theirs = state_at(found, step), state_at(expected, step)
    assert ours.state["data"] == theirs.state["data"]
    assert ours.weights.keys() == theirs.weights.keys()
    for kind in ("exp_avg", "exp_avg_sq"):
        names = [name for name in theirs.optimizer if name.startswith(f"{kind}/")]
        left, right = flat(ours.optimizer, names), flat(theirs.optimizer, names)
        assert (left - right).norm() <= 10 * SAME * right.norm(), kind
    for part in ("weights", "ema"):
        left, right = (flat(vars(s)[part], list(theirs.weights)) for s in (ours, theirs))
        assert (left - right).norm() <= SAME * right.norm(), part
    rows = metrics(found)[: step + 1], metrics(expected)[: step + 1]
    for left, right in zip(*rows, strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-6)


# DDP of a U-Net and FSDP of transformers, alone and with text encoders.
@pytest.mark.parametrize(("family", "strategy", "parts"), nightly_but(STRATEGIES[1:4], STRATEGIES))
def test_two_processes_equal_one(
    place: Path, tmp_path: Path, family: str, strategy: str, parts: str
) -> None:
    """Two processes take two steps like one; one goes on from their checkpoint like one alone."""
    more = [f"model.parts={parts}", f"training.strategy={strategy}"]
    start(command(place, tmp_path, "whole", family, *more))
    first = command(place, tmp_path, "run", family, *more, "training.max_steps=2")
    in_processes(2, lambda _: start_cli(first))
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert_same(run, whole, 2)
    start(command(place, tmp_path, "run", family, *more))
    assert_same(run, whole, 4)
    tenths = [name for row in metrics(whole) for name in row if name.startswith("mse_by_t/")]
    assert len(tenths) >= 4


def test_a_resumed_run_is_bitwise_the_same(place: Path, tmp_path: Path) -> None:
    start(command(place, tmp_path, "whole", "stable_diffusion"))
    start(command(place, tmp_path, "run", "stable_diffusion", "training.max_steps=2"))
    start(command(place, tmp_path, "run", "stable_diffusion"))
    found, expected = (state_at(tmp_path / name, 4) for name in ("run", "whole"))
    for part in ("weights", "ema", "optimizer"):
        for name, tensor in vars(expected)[part].items():
            assert torch.equal(vars(found)[part][name], tensor)
    assert found.state == expected.state
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
