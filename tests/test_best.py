"""The best checkpoint: by the validation loss, never by what is not a number, never silently."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import write_pictures
from runs import in_processes, start

from sfumato.compose import compose_train
from sfumato.evaluation.evaluate import find_checkpoint
from sfumato.objectives.supervised import Supervised
from sfumato.run.run import compare_with_base
from sfumato.training import loop
from sfumato.training.checkpoint import best_step, list_checkpoints, step_of
from sfumato.training.folder import RunFolder
from sfumato.training.state import TrainState


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("best") / "pictures")


def command(folder: Path, sd: Path, pictures: Path, *more: str) -> list[str]:
    settings = [
        f"runs_dir={folder}",
        f"model.pretrained={sd}",
        "objective=supervised",
        f"data.images.path={pictures}",
        "model.lora.rank=1",
        "sampler.num_inference_steps=2",
        "training.max_steps=5",
        "training.micro_batch_size=2",
        "training.global_batch_size=2",
        "training.keep_checkpoints=1",
        "training.tensorboard=false",
        "validation.num_images=1",
        "validation.every_steps=1",
        "validation.loss_images=2",
        "verify=false",
        *more,
    ]
    return list({text.partition("=")[0]: text for text in settings}.values())


def script_losses(monkeypatch: pytest.MonkeyPatch, losses: Sequence[float]) -> None:
    """Let the validations find these losses, one after another."""
    coming = iter(losses)
    monkeypatch.setattr(
        Supervised, "stable_errors", lambda *_: torch.full((2,), next(coming), dtype=torch.float64)
    )


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    state = SimpleNamespace(step=0, best_step=None, best_loss=math.inf)
    improves: Any = TrainState.improves
    found = []
    for step, loss in enumerate([1.0, 0.5, math.nan, 0.8, 0.4], 1):
        state.step = step
        found.append(improves(state, loss))
    assert found == [True, True, False, False, True]
    assert (state.best_step, state.best_loss) == (5, 0.4)
    assert not improves(state, math.inf)


def test_the_best_is_kept_exported_and_found(
    sd_folder: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script_losses(monkeypatch, [1.0, 0.7, 0.5, math.nan, 0.8, 0.9])
    overrides = command(tmp_path, sd_folder, pictures, "export=best")
    start(overrides)
    run = RunFolder(tmp_path / "run")
    assert [step_of(place) for place in list_checkpoints(run.checkpoints)] == [2, 5]
    assert best_step(run.checkpoints) == 2
    assert step_of(find_checkpoint(run, "best")) == 2
    assert step_of(find_checkpoint(run, None)) == 5
    said = capsys.readouterr().out
    assert "validation loss 1 before, lowest at step 2: 0.5" in said
    assert "exported is step 2" in said
    start([*overrides[:-1], "export=last"])  # what is exported may change
    assert "exported is step 5" in capsys.readouterr().out
    shutil.rmtree(run.checkpoints / "step-000002")
    start(overrides)
    said = capsys.readouterr()
    assert "the best checkpoint cannot be exported (it is not there any more)" in said.err
    assert "exported is step 5" in said.out


def test_a_run_that_got_worse_says_so(
    sd_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_losses(monkeypatch, [0.6, 1.2, 1.1])
    start(command(tmp_path, sd_folder, pictures, "training.max_steps=2"))
    (line,) = compare_with_base(RunFolder(tmp_path / "run"))
    assert line.startswith("no step has a lower validation loss than the base model (0.6)")
    assert line.endswith("the lowest is 1.1 at step 2")


@pytest.mark.parametrize(
    "settings",
    [
        ["objective=supervised", "data.images.path=P", "validation.loss_images=0"],
        ["objective=draft", "reward=color", "data.prompts=P"],
    ],
)
def test_export_best_needs_a_validation_loss(settings: list[str]) -> None:
    with pytest.raises(ValueError, match=r"export=best .*validation\.loss_images"):
        compose_train(["model.pretrained=M", "export=best", *settings])


def test_each_process_tells_what_it_left_out(
    sd_folder: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pictures, tmp_path / "pictures")
    for number in range(3):
        file = tmp_path / "pictures" / f"{number}.png"
        file.write_bytes(file.read_bytes()[:-200])  # the header is whole
    more = ["training.micro_batch_size=1", "training.max_steps=3", "validation.loss_images=0"]
    overrides = command(tmp_path, sd_folder, tmp_path / "pictures", *more)
    in_processes(2, lambda _: start(overrides))
    assert "left out: skipped truncated or damaged image" in capfd.readouterr().out
    assert "truncated or damaged image" in (tmp_path / "run" / "left_out.json").read_text()


def test_what_does_not_fit_the_model_is_refused_before_the_first_image(
    sd_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "fit", None)
    with pytest.raises(ValueError, match="is told to networks with embedded guidance"):
        start(command(tmp_path, sd_folder, pictures, "objective.guidance_scale=3"))
    assert not (tmp_path / "run" / "samples").exists()
