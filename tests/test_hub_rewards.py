"""Rewards of a hub: known by their files, also where these are downloaded while a run starts."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from runs import command, start
from test_identity import change_weights
from tiny_clip import write_tiny_clip
from tiny_hps import write_tiny_hps
from tiny_image_reward import write_tiny_image_reward

from sfumato.clip import OPEN_CLIP_CONFIG
from sfumato.config import EvaluateConfig
from sfumato.evaluation.commands import evaluate_run
from sfumato.run import run
from sfumato.run.identity import digests, read_notes

SMALL = ("model.lora.rank=2", "validation.num_images=1", "training.max_steps=1")
MATCH = "validation.rewards.match={kind: clip, pretrained: someone/tiny}"
ROOMS = {
    "reward.pretrained": ["reward=clip", "reward.pretrained=someone/tiny"],
    "validation.rewards.match.pretrained": [MATCH],
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of someone/tiny on a hub, which is downloaded as it is asked for."""
    folder, cache = tmp_path / "hub", tmp_path / "cache"
    write_tiny_clip(folder)
    place = cache / "models--someone--tiny"

    def download(name: str, *, local_files_only: bool = False, **_: Any) -> str:
        snapshot = place / "snapshots" / ("0" * 40)
        if not snapshot.is_dir():
            if local_files_only or name != "someone/tiny":
                raise LocalEntryNotFoundError("not here")
            shutil.copytree(folder, snapshot)
            (place / "refs").mkdir()
            (place / "refs" / "main").write_text("0" * 40)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return folder


def forget(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "cache")


@pytest.mark.parametrize("key", ROOMS)
def test_a_run_knows_the_files_that_it_downloads(
    tmp_path: Path, sd_folder: Path, hub: Path, key: str
):
    def overrides(*more: str) -> list[str]:
        given = command(tmp_path, "run", *SMALL, *ROOMS[key], *more, model=sd_folder)
        return [text for text in given if key != "reward.pretrained" or text != "reward=color"]

    start(overrides())
    began = read_notes(tmp_path / "run").began
    assert began[key] == digests({key: str(hub)}, tmp_path)[key]
    forget(tmp_path)
    change_weights(hub / "model.safetensors")  # the hub has others now
    with pytest.raises(ValueError, match=rf"other files .* at {key}; .*allow_changed=\[{key}\]"):
        start(overrides("training.max_steps=2"))
    outcome = start(overrides("training.max_steps=2", f"allow_changed=[{key}]"))
    assert outcome.step == 2
    assert read_notes(tmp_path / "run").began[key] != began[key]


@pytest.mark.parametrize("fault", ["replaced", "damaged"])
def test_a_file_that_is_replaced_while_it_is_loaded_is_refused(
    tmp_path: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str
):
    clip, build_job = tmp_path / "clip", run.build_job
    write_tiny_clip(clip)

    def build(*given: Any) -> Any:
        job = build_job(*given)
        if fault == "replaced":
            change_weights(clip / "model.safetensors")
        else:
            (clip / "vocab.json").write_text("{}")
        return job

    monkeypatch.setattr(run, "build_job", build)
    given = command(tmp_path, "run", *SMALL, "reward=clip", f"reward.pretrained={clip}",
                    model=sd_folder)  # fmt: skip
    with pytest.raises(ValueError, match=r"other files .* at reward\.pretrained; restore"):
        start(given)


def test_an_evaluation_records_the_files_that_it_downloads(
    tmp_path: Path, sd_folder: Path, hub: Path
):
    start(command(tmp_path, "run", *SMALL, MATCH, model=sd_folder))
    forget(tmp_path)
    evaluate_run(EvaluateConfig(run=str(tmp_path / "run"), num_images=2, steps=[1]))
    file = tmp_path / "run" / "evaluation" / "step-000001" / "summary.json"
    key = "validation.rewards.match.pretrained"
    assert (
        json.loads(file.read_text())["settings"]["contents"][key]
        == digests({key: str(hub)}, tmp_path)[key]
    )


@pytest.mark.parametrize("kind", ["clip", "image_reward"])
def test_a_hubs_tokenizer_is_known_and_weights_beside_it_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    made, cache = tmp_path / "made", tmp_path / "cache"
    write_tiny_hps(made) if kind == "clip" else write_tiny_image_reward(made)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    place = cache / "models--someone--tokens"
    snapshot = place / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    for file in made.iterdir():
        if "token" in file.name or file.name in ("vocab.json", "merges.txt", OPEN_CLIP_CONFIG):
            shutil.copy(file, snapshot)
    key = "reward.processor"
    named = {key: "someone/tokens"}
    found = digests(named, tmp_path)
    assert found == digests({key: str(made)}, tmp_path)
    assert found.keys() == {key}
    # The hub id is downloaded whole later.
    for name in ("config.json", "model.safetensors", "model.safetensors.index.json", "notes.txt"):
        (snapshot / name).write_text("{}")
    assert digests(named, tmp_path) == found
    for name in ("tokenizer.json", "vocab.json", "preprocessor_config.json"):
        before = digests(named, tmp_path)
        (snapshot / name).write_text('{"other": 1}')
        assert digests(named, tmp_path) != before
