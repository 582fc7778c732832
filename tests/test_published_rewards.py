"""Rewards with published weights in whole runs: trained on, planned, and never exchanged."""

from pathlib import Path

import pytest
import torch
from runs import command, start
from safetensors.torch import load_file, save_file
from tiny_clip import write_tiny_clip
from tiny_hps import FILE, write_tiny_hps
from tiny_hpsv3 import write_tiny_hpsv3
from tiny_image_reward import write_tiny_image_reward

from sfumato.compose import compose_train
from sfumato.planning.blueprint import read_blueprint
from sfumato.planning.plan import cost_of
from sfumato.run.build import build_scorer

STEPS = ("model.lora.rank=2", "validation.every_steps=0", "training.max_steps=2")


@pytest.fixture
def weighted(tmp_path: Path) -> list[str]:
    """Return settings of a reward of five, each of small random networks."""
    write_tiny_hps(tmp_path / "hps")
    write_tiny_hpsv3(tmp_path / "qwen")
    write_tiny_image_reward(tmp_path / "blip")
    write_tiny_clip(tmp_path / "clip")
    parts = {
        "hps": ("hpsv2", "hps", "preprocessing=crop", f"processor={tmp_path / 'clip'}"),
        "qwen": ("hpsv3", "qwen", f"processor={tmp_path / 'qwen'}"),
        "blip": ("image_reward", "blip", f"processor={tmp_path / 'blip'}"),
        "iqa": ("clip_iqa", "clip", "bad=[Worst photo.]"),
        "clip": ("clip", "clip", "score=clipscore", "gradient_checkpointing=true"),
    }
    return [
        "reward=weighted",
        *(f"reward.parts.{name}.kind={kind}" for name, (kind, *_) in parts.items()),
        *(f"reward.parts.{name}.weight=1" for name in parts),
        *(f"reward.parts.{n}.pretrained={tmp_path / home}" for n, (_, home, *_) in parts.items()),
        *(f"reward.parts.{n}.{each}" for n, (_, _, *more) in parts.items() for each in more),
    ]


def test_a_run_learns_from_each_and_goes_on_with_the_same_files_alone(
    tmp_path: Path, sd_folder: Path, weighted: list[str]
):
    draft = command(tmp_path, "run", *STEPS, *weighted, model=sd_folder)
    assert start(draft).step == 2
    content = torch.load(tmp_path / "hps" / FILE, weights_only=True)
    torch.save(content | {"epoch": 7}, tmp_path / "hps" / FILE)
    named = r"other files .* at reward\.parts\.hps\.pretrained; restore"
    with pytest.raises(ValueError, match=named):
        start([*draft, "training.max_steps=3"])
    with pytest.raises(ValueError, match=r"reward\.parts\.hps\.preprocessing: crop -> letterbox"):
        start([*draft, "training.max_steps=3", "reward.parts.hps.preprocessing=letterbox"])
    qwen = tmp_path / "qwen" / "HPSv3.safetensors"
    kept = qwen.read_bytes()
    save_file(load_file(qwen) | {"rm_head.5.bias": torch.ones(2)}, qwen)
    with pytest.raises(ValueError, match=r"other files .* at reward\.parts\.qwen\.pretrained"):
        start([*draft, "training.max_steps=3", "allow_changed=[reward.parts.hps.pretrained]"])
    qwen.write_bytes(kept)
    (tmp_path / "blip" / "med_config.json").write_text("{}")
    allowed = "allow_changed=[reward.parts.hps.pretrained]"
    with pytest.raises(ValueError, match=r"at reward\.parts\.blip\.p"):
        start([*draft, "training.max_steps=3", allowed])


def test_a_plan_counts_each(tmp_path: Path, sd_folder: Path, weighted: list[str]):
    config, _ = compose_train(command(tmp_path, "plan", *STEPS, *weighted, model=sd_folder))
    planned, real = read_blueprint(config), build_scorer(config)
    assert planned.reward is not None
    assert real is not None
    counts = [sum(p.numel() for p in each.parameters()) for each in (planned.reward, real)]
    assert counts[0] == counts[1] > 10_000
    assert cost_of(config, planned, 1).flops > 0
