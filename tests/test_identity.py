"""Identity by content: a run goes on with the same files, wherever they lie, and with no others."""

import json
import os
import shutil
from pathlib import Path

import pytest
from families import write_pictures
from runs import PROMPTS, command, start
from safetensors.torch import load_file, save_file
from tiny_clip import write_tiny_clip

from sfumato.compose import compose_train
from sfumato.config import EvaluateConfig, ModelConfig, NetworkConfig, TrainConfig
from sfumato.evaluation.commands import evaluate_run
from sfumato.run import identity
from sfumato.run.identity import contents_of, digests

SMALL = ("model.lora.rank=2", "validation.every_steps=0", "training.max_steps=2")
SUPERVISED = ("objective=supervised", "sampler.height=32", "sampler.width=32", "reward=none")
LOSSLESS = ("objective.kl_coeff",)  # settings of DRaFT in BASE that supervised training lacks


def change_weights(file: Path) -> None:
    tensors = load_file(file)
    name = min(tensors)
    save_file({**tensors, name: tensors[name] + 1}, file, metadata={"format": "pt"})


def draft(folder: Path, model: Path, *more: str) -> list[str]:
    return command(folder, "run", *SMALL, *more, model=model)


def test_equal_files_have_equal_digests(tmp_path: Path, sd_folder: Path) -> None:
    moved = shutil.copytree(sd_folder, tmp_path / "moved")
    (tmp_path / "a.txt").write_text("a cat\n")
    (tmp_path / "b.txt").write_text("a cat\n")
    (tmp_path / "c.txt").write_text("a dog\n")
    (moved / "README.md").write_text("not read")
    named = {"m": str(sd_folder), "n": str(moved), "no": str(tmp_path / "no"), "hub": "no/such"}
    named |= {name: str(tmp_path / f"{name}.txt") for name in "abc"}
    named["both"] = str(tmp_path / "{a,c}.txt")
    found = digests(named, tmp_path)
    assert found["m"] == found["n"]
    assert found["a"] == found["b"] != found["c"]
    assert set(found) == {"m", "n", "a", "b", "c", "both"}
    change_weights(moved / "vae" / "diffusion_pytorch_model.safetensors")
    assert digests(named, tmp_path)["n"] != found["n"]


def test_what_nothing_reads_changes_no_digest(tmp_path: Path, sd_folder: Path) -> None:
    pictures, model = write_pictures(tmp_path / "p"), shutil.copytree(sd_folder, tmp_path / "m")
    named = {"data.images.path": str(pictures), "model.pretrained": str(model)}
    before = digests(named, tmp_path)
    for folder in (pictures, model, model / "unet"):
        (folder / ".DS_Store").write_bytes(b"left by macOS")
        (folder / "._0.png").write_bytes(b"left by macOS")
        (folder / ".cache").mkdir()
        (folder / ".cache" / "state.json").write_text("{}")
    assert digests(named, tmp_path) == before
    (pictures / "0.txt").write_text("another caption")
    assert digests(named, tmp_path)["data.images.path"] != before["data.images.path"]


def test_what_is_read_through_links_counts(tmp_path: Path, sd_folder: Path) -> None:
    whole = shutil.copytree(sd_folder, tmp_path / "model")
    inner = shutil.move(whole / "unet", tmp_path / "elsewhere")
    (whole / "unet").symlink_to(inner, target_is_directory=True)
    (whole / "unet" / "back").symlink_to(whole, target_is_directory=True)
    before = digests({"model.pretrained": str(whole)}, tmp_path)
    change_weights(Path(inner) / "diffusion_pytorch_model.safetensors")
    assert digests({"model.pretrained": str(whole)}, tmp_path) != before


def test_the_settings_of_a_random_network_count(tmp_path: Path) -> None:
    file = tmp_path / "net.json"
    file.write_text('{"norm_eps": 1e-5}')
    config = TrainConfig(model=ModelConfig(network=NetworkConfig(config=str(file))))
    before = contents_of(config, tmp_path)
    file.write_text('{"norm_eps": 0.1}')
    assert before.keys() == {"model.network.config"}
    assert contents_of(config, tmp_path) != before


def test_settings_beside_a_file_of_weights_count(tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").write_text("weights")
    named = {"model.merge.a.path": str(tmp_path / "lora.safetensors")}
    plain = digests(named, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 4}')
    stated = digests(named, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 16}')
    (tmp_path / "other.json").write_text("{}")
    assert plain != stated != digests(named, tmp_path) != plain


def test_unchanged_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    true_sum = identity.sha256_of

    def sum_of(path: Path) -> str:
        read.append(path.name)
        return true_sum(path)

    monkeypatch.setattr(identity, "sha256_of", sum_of)
    files = [tmp_path / f"{i}.txt" for i in range(3)]
    for file in files:
        file.write_text(file.name)
    named = {file.name: str(file) for file in files}
    first = digests(named, tmp_path)
    assert digests(named, tmp_path) == first
    assert sorted(read) == ["0.txt", "1.txt", "2.txt"]
    about = files[1].stat()
    files[1].write_text("9.txt")  # the same size, and then the same time; the write is another
    os.utime(files[1], ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    assert digests(named, tmp_path)["1.txt"] != first["1.txt"]
    assert sorted(read)[-3:] == ["1.txt", "1.txt", "2.txt"]


def test_what_settings_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["objective=draft", "reward=weighted", "reward.parts.a.kind=clip", "name=x"]
    overrides += ["reward.parts.a.weight=1.0", "reward.parts.a.pretrained=CLIP", "data.prompts=P"]
    overrides += ["model.pretrained=M", "model.merge.one.path=L", "validation.prompts=V"]
    config, _ = compose_train(overrides)
    seen: dict[str, str] = {}
    monkeypatch.setattr(identity, "digests", lambda named, _: seen.update(named) or {})
    contents_of(config, Path(), sections=["reward"])
    assert seen == {"reward.parts.a.pretrained": "CLIP"}  # no file of another section is read
    contents_of(config, Path())
    assert seen == {
        "model.pretrained": "M",
        "model.merge.one.path": "L",
        "reward.parts.a.pretrained": "CLIP",
        "data.prompts": "P",
        "validation.prompts": "V",
    }


def test_other_prompts_are_refused_unless_they_are_allowed(tmp_path: Path, sd_folder: Path) -> None:
    start(draft(tmp_path, sd_folder))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([*PROMPTS[1:], "a new star"]) + "\n")
    more = "training.max_steps=4"
    with pytest.raises(ValueError, match=r"other files .* at data\.prompts; .*allow_changed=\["):
        start(draft(tmp_path, sd_folder, more))
    outcome = start(draft(tmp_path, sd_folder, more, "allow_changed=[data.prompts]"))
    assert outcome.step == 4
    assert "allow_changed:\n- data.prompts" in (tmp_path / "run" / "config.yaml").read_text()
    start(draft(tmp_path, sd_folder, "training.max_steps=5"))  # these prompts are the run's now


def test_other_weights_are_refused(tmp_path: Path, sd_folder: Path) -> None:
    model = Path(shutil.copytree(sd_folder, tmp_path / "sd"))
    start(draft(tmp_path, model))
    change_weights(model / "text_encoder" / "model.safetensors")
    with pytest.raises(ValueError, match=r"other files .* at model\.pretrained; restore them"):
        start(draft(tmp_path, model, "training.max_steps=4"))


def test_moved_files_go_on(tmp_path: Path, sd_folder: Path) -> None:
    model = Path(shutil.copytree(sd_folder, tmp_path / "sd"))
    start(draft(tmp_path, model))
    moved = model.rename(tmp_path / "elsewhere")
    prompts = (tmp_path / "prompts.txt").rename(tmp_path / "other.txt")
    again = draft(tmp_path, moved, "training.max_steps=3", f"data.prompts={prompts}")
    assert start(again).step == 3
    change_weights(moved / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"model\.pretrained"):
        start(again)


def test_other_pictures_and_captions_are_refused(tmp_path: Path, sd_folder: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures")
    named = [*SUPERVISED, f"data.images.path={pictures}", "training.max_steps=1"]
    run = [text for text in draft(tmp_path, sd_folder, *named) if not text.startswith(LOSSLESS)]
    start(run)
    again = [text for text in run if not text.startswith("training.max_steps")]
    again.append("training.max_steps=2")
    for name, content in (
        ("0.txt", b"something else"),
        ("1.png", (pictures / "5.png").read_bytes()),
    ):
        before = (pictures / name).read_bytes()
        (pictures / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"other files .* at data\.images\.path"):
            start(again)
        (pictures / name).write_bytes(before)
    assert start(again).step == 2


def test_an_evaluation_is_of_the_files_that_lie_there(tmp_path: Path, sd_folder: Path) -> None:
    write_tiny_clip(tmp_path / "clip")
    reward = ("reward=clip", f"reward.pretrained={tmp_path / 'clip'}")
    color = ("reward.color", "reward=color")
    run = [t for t in draft(tmp_path, sd_folder, *reward) if not t.startswith(color)]
    start(run)
    asked = EvaluateConfig(run=str(tmp_path / "run"), num_images=2, features=str(tmp_path / "clip"))
    summary = tmp_path / "run" / "evaluation" / "step-000002" / "summary.json"
    first = evaluate_run(asked)
    written = summary.stat().st_mtime_ns
    assert evaluate_run(asked) == first
    assert summary.stat().st_mtime_ns == written
    change_weights(tmp_path / "clip" / "model.safetensors")
    second = evaluate_run(asked)
    assert summary.stat().st_mtime_ns > written
    assert [each.reward for each in first] != [each.reward for each in second]


def test_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    for damage in ("{", "[]", json.dumps({"files": {"x": [1]}})):
        (tmp_path / "contents.json").write_text(damage)
        with pytest.raises(ValueError, match=r"contents\.json.*remove it"):
            digests({"a": str(tmp_path / "a.txt")}, tmp_path)
