"""The road of pretraining: pictures to tars to cache, and two stages from the one to the other."""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from nightly import nightly_but
from runs import (
    assert_same_state,
    in_child,
    in_processes,
    kill,
    last_state,
    metrics,
    on_call,
    start,
    start_cli,
)

from sfumato.cli import main
from sfumato.compose import DEMO_IMAGES, DEMO_MODELS, compose_command
from sfumato.evaluation.results import read_evaluations
from sfumato.objectives.supervised import Supervised
from sfumato.preparation.prepare import prepare
from sfumato.training.folder import RunFolder

pytestmark = pytest.mark.usefixtures("unchecked")  # tests/test_families.py checks such runs
KILLED = -9
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 128,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
BASE = DEMO_MODELS / "base"


def parts(folder: Path) -> list[str]:
    """Return the settings of a small network beside the demo's encoders."""
    file = folder / "unet.json"
    file.write_text(json.dumps(UNET))
    return [
        "model.pretrained=null",
        f"model.network.config={file}",
        f"model.autoencoder={BASE / 'vae'}",
        f"model.text_encoder={BASE / 'text_encoder'}",
        f"model.tokenizer={BASE / 'tokenizer'}",
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data: 32 pictures in tars of 10, and caches at 32 and 64 px."""
    root = tmp_path_factory.mktemp("pretraining")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(root / "cache"))
        for pixels in (32, 64):
            config, _ = compose_command(
                "prepare",
                [
                    f"out={root / 'data'}",
                    f"pack.path={DEMO_IMAGES / 'new_held_out'}",
                    "pack.samples_per_shard=10",
                    f"precache.height={pixels}",
                    f"precache.width={pixels}",
                    *parts(root),
                ],
            )
            prepare(config)
    return root


@pytest.fixture(autouse=True)
def own_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(place / "cache"))


def stage(place: Path, runs: Path, name: str, pixels: int, cached: bool, *more: str) -> list[str]:
    settings = [
        f"runs_dir={runs}",
        f"name={name}",
        "objective=supervised",
        "objective.caption_dropout=0.2",
        *parts(place),
        f"model.image_size={pixels}",
        "model.trainable=full",
        "model.reference=false",
        f"data.shards.path={place / 'data'}",
        f"data.shards.cached={str(cached).lower()}",
        "data.shards.buffer=12",
        "sampler.num_inference_steps=2",
        "training.micro_batch_size=2",
        "training.global_batch_size=8",
        "training.max_steps=6",  # more than an epoch of 32
        "training.checkpoint_every_steps=2",
        "training.keep_checkpoints=null",
        "training.ema_decay=0.9",
        "training.tensorboard=false",
        "validation.num_images=1",
        "validation.loss_images=2",
        "validation.every_steps=3",
        "optimizer.lr=1e-3",
        "optimizer.warmup_steps=0",
        "optimizer.eps=1e-4",  # where a gradient is rounding alone, 1e-8 would make a step of it
        "verify=false",
        *more,
    ]
    return list({text.partition("=")[0]: text for text in settings}.values())


def ladder(place: Path, runs: Path, cached: bool, *more: str) -> list[list[str]]:
    """Return both stages: 32 px, and 64 px from the weights of the first alone."""
    first = stage(place, runs, "first", 32, cached, *more)
    start = f"model.network.from_pretrained={runs / 'first'}"
    return [first, stage(place, runs, "second", 64, cached, start, *more)]


@pytest.mark.parametrize(
    ("cached", "world", "kills"),
    nightly_but([(True, 2, [4])], [(True, 2, [4]), (False, 1, [3]), (True, 2, [4, 2])]),
)
def test_a_ladder_that_is_killed_twice_ends_bitwise_equal(
    place: Path, tmp_path: Path, cached: bool, world: int, kills: list[int]
) -> None:
    """Each stage is killed in its first steps; in the longest case also after it went on."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for settings in ladder(place, whole, cached):
        in_processes(world, lambda _, settings=settings: start_cli(settings))
    for settings in ladder(place, killed, cached):
        for step in kills:

            def run(_: int, settings: list[str] = settings, step: int = step) -> None:
                on_call(step, kill, "take_step")
                start_cli(settings)

            in_processes(world, run, code=KILLED)
        in_processes(world, lambda _, settings=settings: start_cli(settings))
    for name in ("first", "second"):
        assert_same_state(killed / name, whole / name)
        assert last_state(whole / name).step == 6


def test_a_stage_goes_on_in_two_processes_with_the_same_samples(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From tars; the ladder above runs in two processes from the cache."""
    seen = tmp_path / "seen"
    seen.mkdir()
    record_samples(monkeypatch, seen)
    alone = ladder(place, tmp_path / "alone", False)
    both = ladder(place, tmp_path / "both", False)
    for one, other in zip(alone, both, strict=True):
        (tmp_path / "log").write_text("alone")
        start(one)
        (tmp_path / "log").write_text("both")
        start(changed(other, 3))
        in_processes(2, lambda rank, other=other: start_cli(other))
    names = {who: Counter((seen / who).read_text().split()) for who in ("alone", "both")}
    assert names["both"] == names["alone"]
    for stage_name in ("first", "second"):
        ours, theirs = (last_state(tmp_path / w / stage_name) for w in ("both", "alone"))
        assert ours.step == theirs.step == 6
        for name, weight in theirs.weights.items():
            torch.testing.assert_close(ours.weights[name], weight, atol=1e-5, rtol=1e-4)


def changed(settings: Sequence[str], max_steps: int) -> list[str]:
    return [s for s in settings if "max_steps" not in s] + [f"training.max_steps={max_steps}"]


def record_samples(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Write the names of all samples that losses are of, by what tmp_path/log says."""
    loss = Supervised.loss

    def recorded(self, model, batch, rng):
        names = "".join(f"{row.name.rpartition('/')[2].replace(' ', '/')}\n" for row in batch)
        with (folder / (folder.parent / "log").read_text()).open("a") as file:
            file.write(names)
        return loss(self, model, batch, rng)

    monkeypatch.setattr(Supervised, "loss", recorded)


def test_cached_and_uncached_training_have_the_same_loss(place: Path, tmp_path: Path) -> None:
    for cached in (False, True):
        start(
            stage(place, tmp_path, f"cached_{cached}", 64, cached, "objective.caption_dropout=0.5")
        )
    raw, cached_rows = (metrics(tmp_path / f"cached_{cached}") for cached in (False, True))
    for one, other in zip(raw, cached_rows, strict=True):
        assert one.keys() == other.keys()
        for key in ("loss", "validation/loss"):
            if key in one:
                assert abs(one[key] - other[key]) < 1e-4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_from_a_cache(place: Path, tmp_path: Path, precision: str) -> None:
    for name in ("no", precision):
        few = (f"training.precision={name}", "training.max_steps=2")
        start(stage(place, tmp_path, name, 32, True, *few))
    whole, half = (metrics(tmp_path / name)[-1]["mse"] for name in ("no", precision))
    assert half == pytest.approx(whole, rel=1e-2)


def test_a_stage_refuses_a_stage_before_it_that_did_not_finish(place: Path, tmp_path: Path) -> None:
    first, second = ladder(place, tmp_path, True)

    def run() -> None:
        on_call(4, kill, "take_step")
        start_cli(first)

    assert in_child(run) == KILLED
    with pytest.raises(ValueError, match=r"first.* step 2 of 6"):
        start(second)


def test_a_cache_of_another_size_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"height \(32 in the cache, 48 in the run\)"):
        start(stage(place, tmp_path, "x", 48, True))


def test_a_run_needs_its_predecessor_only_to_begin(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no frozen copy, and is resumed, evaluated and sampled from by its own checkpoints."""
    first, second = ladder(place, tmp_path, True, "training.max_steps=2")
    for settings in (first, second):
        assert in_child(lambda settings=settings: start_cli(settings)) == 0
    run = tmp_path / "second"

    def command(*given: str) -> int:
        monkeypatch.setattr(sys, "argv", ["sfumato", *given])
        return in_child(main)

    evaluated = [f"run={run}", "num_images=2"]
    assert command("evaluate", *evaluated, "steps=[0,2]") == 0
    shutil.rmtree(tmp_path / "first")
    assert command("evaluate", *evaluated, "steps=[2]") == 0
    out = tmp_path / "pictures"
    assert command("sample", f"run={run}", "prompt=a moon", "num_images=1", f"out={out}") == 0
    assert len(list(out.glob("*.png"))) == 1
    longer = stage(place, tmp_path, "second", 64, True, "training.max_steps=4")
    start_at = f"model.network.from_pretrained={tmp_path / 'first'}"
    assert in_child(lambda: start_cli([*longer, start_at])) == 0
    assert last_state(run).step == 4
    assert [found.step for found in read_evaluations(RunFolder(run))] == [0, 2]
