"""`import sfumato`, the snippet of docs/python.md, and the notebook of examples/."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from PIL import Image
from runs import command, start
from test_architecture import IMPORTED
from toy import use_toy

import sfumato
from sfumato.images import load_images
from sfumato.training.folder import RunFolder

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "first_run.ipynb"


def test_importing_takes_nothing_with_it() -> None:
    code = f"import sys, sfumato; assert 'train' in dir(sfumato); {IMPORTED}"
    run = [sys.executable, "-c", code]
    loaded = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
    assert "sfumato" in loaded
    assert {"torch", "numpy", "hydra", "omegaconf", "diffusers"}.isdisjoint(loaded)


def test_every_name_is_there_and_described() -> None:
    for name in sfumato.__all__:
        assert vars(sys.modules["sfumato"]).get(name) or getattr(sfumato, name).__doc__, name
    with pytest.raises(
        AttributeError, match="no attribute 'nothing'; it has Opened, RunFolder, ev"
    ):
        _ = sfumato.nothing  # pyright: ignore[reportAttributeAccessIssue]


def test_the_snippet_runs_as_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(), re.M | re.S
    )
    names: dict[str, Any] = {}
    exec(code, names)
    run, images, scores = names["run"], names["images"], names["scores"]
    assert run.path == Path("runs/from_python") and (run.export / "lora").is_dir()
    assert images.shape == (4, 3, 64, 64) and 0 <= images.min() < images.max() <= 1
    assert scores.shape == (4,)
    torch.testing.assert_close(scores / scores[0], images.mean((1, 2, 3)) / images[0].mean())


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    text = NOTEBOOK.read_text()
    cells = [each for each in json.loads(text)["cells"] if each["cell_type"] == "code"]
    assert [(each["outputs"], each["execution_count"]) for each in cells] == [([], None)] * len(
        cells
    )
    sources = ["".join(each["source"]) for each in cells]
    small = {
        "STEPS = 40": "STEPS = 1",
        '"validation.num_images=4",': '"validation.num_images=2", "training.micro_batch_size=2", '
        '"training.global_batch_size=2", "validation.loss_images=0", "verify=false",',
        "num_inference_steps=10": "num_inference_steps=2",
    }
    for large, little in small.items():
        assert sum(source.count(large) for source in sources) == 1, large
        sources = [source.replace(large, little) for source in sources]
    names: dict[str, Any] = {}
    for source in sources:
        exec(source, names)
    assert [each.step for each in names["results"]] == [0, 1]
    assert "1 mean pairwise pixel distance" in capsys.readouterr().out
    assert names["pictures"]["after"].shape == (4, 3, 64, 64)
    assert not torch.equal(names["pictures"]["before"], names["pictures"]["after"])


@pytest.fixture
def toy_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sd_folder: Path) -> RunFolder:
    small = ["training.max_steps=1", "validation.every_steps=0", "sampler.num_inference_steps=2"]
    chosen = command(tmp_path, "run", *small, "model.lora.rank=2", model=sd_folder)
    return sfumato.train(*chosen)


def test_images_are_those_of_the_command(toy_run: RunFolder, tmp_path: Path) -> None:
    from sfumato.compose import compose_command
    from sfumato.evaluation.commands import sample_images

    out = tmp_path / "out"
    given = [f"run={toy_run.path}", "prompt=a star", "num_images=3", "seed=5", f"out={out}"]
    sample_images(compose_command("sample", given)[0])
    ours = sfumato.sample(sfumato.load(toy_run), "a star", num_images=3, seed=5)
    theirs = load_images(sorted(out.glob("*.png")))
    assert (ours - theirs).abs().max() <= 0.51 / 255
    assert Image.open(next(out.glob("*.png"))).size == (ours.shape[3], ours.shape[2])
    with pytest.raises(
        ValueError, match="num_steps is no setting of the sampler; there are num_inf"
    ):
        sfumato.sample(sfumato.load(toy_run.path, step=1), "a star", num_steps=3)


def test_training_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_toy(monkeypatch)
    chosen = command(tmp_path, "run")
    run = sfumato.train(*chosen, "training.max_steps=2")
    sfumato.train(*chosen)
    start(command(tmp_path, "whole"))
    ours, theirs = ((tmp_path / n / "metrics.jsonl").read_text() for n in ("run", "whole"))
    assert run == RunFolder(tmp_path / "run")
    assert [json.loads(line)["step"] for line in ours.splitlines()][-1] == 6
    assert (
        json.loads(ours.splitlines()[-1])["reward"] == json.loads(theirs.splitlines()[-1])["reward"]
    )


IMAGES = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: sfumato.train("recipe=nothing_at_all"), "nothing_at_all"),
        (lambda: sfumato.train("recipe=demo_finetune", "training.max_steps=0"), "max_steps=0"),
        (lambda: sfumato.load("no/where/at/all"), "no/where/at/all"),
        (lambda: sfumato.load("no/where", step=3), "is no run folder, so it has no step=3"),
        (lambda: sfumato.score(IMAGES, ["a"], "reward=color"), "2 images have 1 prompts"),
        (lambda: sfumato.score(IMAGES, ["a", "b"]), "no reward is named"),
        (lambda: sfumato.score(IMAGES, ["a", "b"], "reward=beauty"), "beauty"),
        (lambda: sfumato.evaluate("run=no/where"), "no/where"),
    ],
)
def test_a_mistake_is_a_value_error(call: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()
