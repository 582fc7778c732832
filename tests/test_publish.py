"""Model cards, and uploads by the hub's real client to a hub on loopback."""

import json
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from hub_server import OWNER, TOKEN, Hub, running
from huggingface_hub import ModelCard
from runs import command, start

from sfumato.card import hub_id, licence_of, model_card
from sfumato.cli import main
from sfumato.compose import compose_train, load_settings
from sfumato.evaluation.results import Evaluation
from sfumato.files import lock
from sfumato.publish import _cleaned, _figures
from sfumato.training.checkpoint import fingerprint, list_checkpoints
from sfumato.training.folder import RunFolder

SECRET = "a secret prompt of mine"
REPO = f"{OWNER}/stars"
SMALL = [
    *("training.max_steps=2", "validation.every_steps=0", "sampler.num_inference_steps=2"),
    *("model.lora.rank=2", "validation.num_images=2", "name=private_name"),
    "model.lora.targets=['.*attn1.to_[qkv]']",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("private_folder")
    (folder / "prompts.txt").write_text(f"{SECRET}\n" * 8)
    start(command(folder, "private_name", *SMALL, model=sd_folder))
    return folder / "private_name"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "private_name"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.close_session()
        yield hub
    huggingface_hub.close_session()


def push(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["sfumato", "push", *map(str, arguments)])
    main()


def refused(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        push(monkeypatch, *arguments)
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err
    assert said.err.count("\n") == 1 and said.err.startswith("sfumato: ")
    return said.err


def test_a_lora_is_uploaded_with_a_card_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, run: Path, hub: Hub
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    push(monkeypatch, run, "--repo", REPO, "--base-model", "them/base")
    assert capsys.readouterr().out.strip() == f"{hub.address}/{REPO}"
    (made,) = hub.made
    assert (made["name"], made["organization"]) == ("stars", OWNER)
    assert made.get("visibility") == "private" or made.get("private") is True
    there = {path.name for path in (run / "export" / "lora").iterdir()}
    assert {name.removeprefix(f"{REPO}/") for name in hub.files} == there
    lora = run / "export" / "lora" / "pytorch_lora_weights.safetensors"
    assert hub.files[f"{REPO}/{lora.name}"] == lora.read_bytes()
    card = hub.files[f"{REPO}/README.md"].decode()
    data = ModelCard(card).data.to_dict()
    assert (data["base_model"], data["library_name"]) == ("them/base", "diffusers")
    assert {"text-to-image", "lora"} <= {*data["tags"]}
    assert f'load_lora_weights("{REPO}")' in card and 'from_pretrained("them/base")' in card
    assert "objective draft, reward color, 2 steps of 4 images" in card
    assert "| `model.lora.rank` | 2 |" in card and "| `objective.kl_coeff` | 0.5 |" in card
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == {
        **before,
        run / ".lock": b"",
    }


@pytest.mark.parametrize("export", ["lora", "pipeline"])
def test_nothing_private_is_uploaded(
    export: str, monkeypatch: pytest.MonkeyPatch, run: Path, hub: Hub
) -> None:
    folder = run / "export" / export
    (folder / "link.txt").symlink_to(run / "config.yaml")
    (folder / "linked").symlink_to(run / "checkpoints")
    (folder / "optimizer.pt").write_bytes(b"state")
    push(monkeypatch, run, "--repo", REPO, "--export", export)
    assert hub.files
    whole = b"\n".join(hub.files.values())
    saved = yaml.safe_load((run / "config.yaml").read_text())
    private = [SECRET, "private_name", "private_folder", saved["model"]["pretrained"], TOKEN]
    assert [text for text in private if text.encode() in whole] == []
    assert "attn1" not in hub.files[f"{REPO}/README.md"].decode()
    names = {name.rpartition("/")[2] for name in hub.files}
    assert names.isdisjoint({"link.txt", "optimizer.pt", "config.yaml", "state.json"})
    assert TOKEN not in "".join(p.read_text("latin1") for p in run.rglob("*") if p.is_file())


def test_a_pipeline_keeps_its_files(monkeypatch: pytest.MonkeyPatch, run: Path, hub: Hub) -> None:
    push(monkeypatch, run, "--repo", REPO, "--export", "pipeline", "--public")
    assert hub.made[0].get("visibility") == "public" or hub.made[0].get("private") is False
    folder = run / "export" / "pipeline"
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {name.removeprefix(f"{REPO}/") for name in hub.files} == there
    for name in there - {"README.md"}:
        ours, theirs = (folder / name).read_bytes(), hub.files[f"{REPO}/{name}"]
        if name.endswith(".json"):
            kept = {k: v for k, v in json.loads(ours).items() if k != "_name_or_path"}
            assert json.loads(theirs) == kept
        else:
            assert ours == theirs


def test_a_second_push_replaces_the_files_of_the_first(
    monkeypatch: pytest.MonkeyPatch, run: Path, hub: Hub
) -> None:
    push(monkeypatch, run, "--repo", REPO)
    push(monkeypatch, run, "--repo", REPO, "--public")
    assert len(hub.made) == 1
    assert sum("/commit/" in route for route in hub.routes) == 2


# --- Faults


def test_without_a_token(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, run: Path, hub: Hub, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "run `hf auth login`, or set HF_TOKEN" in refused(
        monkeypatch, capsys, run, "--repo", REPO
    )
    monkeypatch.setenv("HF_TOKEN", "hf_anoldone")
    assert "run `hf auth login`" in refused(monkeypatch, capsys, run, "--repo", REPO)
    assert not hub.files


@pytest.mark.parametrize("repo", ["somebody/stars", "an-org/of.others"])
def test_a_name_of_somebody_else(
    repo: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, run: Path, hub: Hub
) -> None:
    said = refused(monkeypatch, capsys, run, "--repo", repo)
    assert f"upload to {repo}: your token may not write there" in said
    assert not hub.files


@pytest.mark.parametrize("fault", [404, 418])
def test_a_hub_that_answers_something_else(
    fault: int, monkeypatch: pytest.MonkeyPatch, capsys: Any, run: Path, hub: Hub
) -> None:
    hub.fault = fault
    assert f"it answered {fault}" in refused(monkeypatch, capsys, run, "--repo", REPO)


def test_without_a_network(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, run: Path, hub: Hub
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed)
    assert "the hub cannot be reached" in refused(monkeypatch, capsys, run, "--repo", REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert "HF_HUB_OFFLINE" in refused(monkeypatch, capsys, run, "--repo", REPO)


@pytest.mark.parametrize("repo", ["stars", "me/two/parts", "../stars", "me/", "me/st ars"])
def test_a_name_that_is_none(
    repo: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, run: Path, hub: Hub
) -> None:
    said = refused(monkeypatch, capsys, run, "--repo", repo)
    assert f"--repo={repo!r} is no hub id; give USER/NAME" in said
    assert not hub.routes


def test_a_run_without_an_export(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, run: Path, hub: Hub, tmp_path: Path
) -> None:
    other = refused(monkeypatch, capsys, tmp_path / "nowhere", "--repo", REPO)
    assert "is no run folder" in other and not (tmp_path / "nowhere").exists()
    shutil.rmtree(run / "export" / "pipeline")
    said = refused(monkeypatch, capsys, run, "--repo", REPO, "--export", "pipeline")
    assert "has no pipeline for diffusers; it has lora" in said
    (run / "export" / "lora" / "pytorch_lora_weights.safetensors").unlink()
    assert "for diffusers; it has nothing" in refused(monkeypatch, capsys, run, "--repo", REPO)
    (run / "export.json").unlink()  # killed before it was noted
    said = refused(monkeypatch, capsys, run, "--repo", REPO)
    assert "has no finished export" in said and "`sfumato train` command again" in said
    assert not hub.routes


def test_an_export_that_is_being_written(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, run: Path, hub: Hub
) -> None:
    with lock(run, busy="", unmade=""):
        said = refused(monkeypatch, capsys, run, "--repo", REPO)
    assert "another process is training in" in said
    (run / "export.json").write_text('{"step": "two"}')
    assert "export.json is damaged" in refused(monkeypatch, capsys, run, "--repo", REPO)
    assert not hub.routes


# --- Cards


def test_each_export_has_a_card(trained: Path) -> None:
    for name in ("lora", "pipeline"):
        text = (trained / "export" / name / "README.md").read_text()
        assert ModelCard(text).data.library_name == "diffusers"
        assert SECRET not in text and "private" not in text and str(trained.parent) not in text


def test_numbers_of_the_exported_checkpoint_alone(trained: Path) -> None:
    path = list_checkpoints(RunFolder(trained).checkpoints)[-1]
    mark = fingerprint(path)
    assert mark is not None
    base = Evaluation(0, 1.0, 0.1, 0.5, "distance", {"kept|out": 3.0})
    tuned = Evaluation(2, 2.0, 0.25, 0.25, "distance", {"kept|out": 4.0}, checkpoint=mark)
    assert _figures([base, tuned], 2, mark) == [
        ["", "base model", "step 2"],
        ["reward", "1 ± 0.1", "2 ± 0.25"],
        ["distance", "0.5", "0.25"],
        ["kept out", "3", "4"],
    ]
    assert _figures([base, replace(tuned, checkpoint="another")], 2, mark) == []
    assert _figures([base], 2, mark) == []
    rows = _figures([base, tuned], 2, mark)
    card = model_card(load_settings(trained / "config.yaml"), "lora", 2, figures=rows)
    assert "## Evaluation\n\n|  | base model | step 2 |\n|---|---|---|\n| reward |" in card


def test_names_that_a_user_chose_are_in_no_card(tmp_path: Path) -> None:
    given = ["reward=weighted", "reward.parts.my_idea.kind=color", "reward.parts.my_idea.weight=2"]
    given += ["optimizer.kind=sgd", "optimizer.options={momentum: 0.5}", "training.compile=full"]
    config, _ = compose_train(command(tmp_path, "run", *given, "validation.column=null"))
    card = model_card(config, "pipeline", 3)
    assert "my_idea" not in card and "prompts" not in card and "reward color" in card
    assert "| `optimizer.options.momentum` | 0.5 |" in card
    assert "`optimizer.kind` | sgd |" in card
    assert "training.compile" not in card  # no weight depends on it


def test_paths_leave_the_settings_of_networks(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"_name_or_path": "/home/me/x", "a": [{"_name_or_path": "b/c"}]}))
    cleaned = _cleaned(file, "b/c")
    assert isinstance(cleaned, bytes)
    assert json.loads(cleaned) == {"a": [{"_name_or_path": "b/c"}]}
    file.write_text('{"a": 1}')
    assert _cleaned(file, None) == file


def test_a_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "model").mkdir(parents=True)
    cached = tmp_path / "cached.json"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(cached))
    assert hub_id("them/model") == "them/model"
    assert hub_id("me/model") is None  # lies here
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: None)
    assert hub_id("them/model") is None  # may be a folder that lay somewhere
    assert hub_id(str(tmp_path)) is None and hub_id(None) is None


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: openrail++\n---\n# x\n", "openrail++"),
        ("---\nlicense: apache-2.0\n---\n# x\n", "apache-2.0"),
        ("# no header\n", None),
        ("---\nlicense: [a\n---\n", None),
    ],
)
def test_the_licence_is_the_base_models(text: str, licence: str | None, tmp_path: Path) -> None:
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text(text)
    assert licence_of(str(tmp_path)) == licence
