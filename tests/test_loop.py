"""The loop: what it logs, validates, exports, refuses and survives; and that it learns."""

import errno
import fcntl
import math
import shutil
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from runs import (
    command,
    in_child,
    kill,
    last_state,
    metrics,
    on_call,
    start,
    start_cli,
)
from safetensors.torch import load_file
from toy import PromptReward, ToyModel, use_toy

from sfumato.config.saved import MAY_CHANGE, differences, flatten
from sfumato.files import lock
from sfumato.objectives.objective import Loss
from sfumato.run import build
from sfumato.training import loop
from sfumato.training.checkpoint import find_fault, list_checkpoints
from sfumato.training.distribution import Distribution
from sfumato.training.folder import RunFolder
from sfumato.training.loop import TrainingError, headline, refuse_non_finite
from sfumato.training.state import TrainState
from sfumato.training.tracking import read_metrics


@pytest.fixture(autouse=True)
def toy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    if "sd_folder" not in request.fixturenames:
        use_toy(monkeypatch)


def test_gradients_are_clipped_together(tmp_path: Path) -> None:
    """After one step AdamW's first moment is (1 - beta1) times the gradient it was given."""
    norms = []
    for limit in (1e9, 1e-3):
        one = ["training.max_steps=1", f"optimizer.max_grad_norm={limit}"]
        start(command(tmp_path, str(limit), *one))
        state, row = last_state(tmp_path / str(limit)), metrics(tmp_path / str(limit))[1]
        moments = [t for name, t in state.optimizer.items() if name.startswith("exp_avg/")]
        norms.append((torch.cat([t.flatten() for t in moments]).norm().item() / 0.1, row))
    assert norms[0][0] == pytest.approx(norms[0][1]["grad_norm"], rel=1e-5)
    assert norms[1][0] == pytest.approx(1e-3, rel=1e-4)
    assert norms[1][1]["grad_norm"] == norms[0][1]["grad_norm"] > 1e-2


def test_tensorboard_has_every_step_once_after_a_kill(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    again = command(tmp_path, "run", "training.tensorboard=true")

    def die() -> None:
        on_call(6, kill, "take_step")
        start(again)

    assert in_child(die) == -9
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]
    time.sleep(1.1)  # TensorBoard orders its files by the second
    start(again)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    rows = metrics(tmp_path / "run")
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert losses == pytest.approx({row["step"]: row["loss"] for row in rows[1:]}, rel=1e-6)
    images = events.Images("validation/tuned_base")
    assert [event.step for event in images] == [0, 3, 6]
    assert images[0].encoded_image_string.startswith(b"\x89PNG")


def test_metrics_cut_short_by_a_kill_are_mended(tmp_path: Path) -> None:
    first = command(tmp_path, "run", "training.max_steps=3")
    start(first)
    file = tmp_path / "run" / "metrics.jsonl"
    with file.open("a") as stream:
        stream.write('{"step": 4, "rew')
    assert [row["step"] for row in read_metrics(RunFolder(tmp_path / "run"))] == [0, 1, 2, 3]
    start(command(tmp_path, "run"))
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(7))


@pytest.mark.parametrize("fault", ["value", "gradient"])
def test_a_non_finite_step_stops_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    """At step 3: nan in the first row of the second micro-batch, or in the gradient alone."""
    reward, models = PromptReward(), []
    take_step = loop.take_step

    def third_is_bad(config, module, state, distribution):
        reward.armed = state.step == 2
        reward.fault = fault
        return take_step(config, module, state, distribution)

    def load(config):
        models.append(ToyModel(config))
        return models[-1]

    monkeypatch.setattr(build, "build_reward", lambda config: reward)
    monkeypatch.setattr(build, "load_model", load)
    monkeypatch.setattr(loop, "take_step", third_is_bad)
    again = command(tmp_path, "run", "training.checkpoint_every_steps=1")
    with pytest.raises(TrainingError, match="not finite at step 3") as caught:
        start(again)
    bad = reward.calls[1] if fault == "value" else reward.calls[0] + reward.calls[1]
    assert f"for the prompts {bad};" in str(caught.value)
    state = last_state(tmp_path / "run")
    assert state.step == 2
    for name, parameter in models[0].trainable().items():
        assert torch.equal(parameter, state.weights[name])
        assert torch.isfinite(parameter).all()
    places = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [find_fault(place) for place in places] == [None, None]
    reward.calls.clear()
    assert in_child(lambda: start_cli(again)) == 2
    output = capfd.readouterr().err
    assert "not finite at step 3" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("optimizer.lr=0.02", "optimizer.lr: 0.01 -> 0.02"),
        ("training.seed=1", "training.seed: 0 -> 1"),
        ("training.ema_decay=null", "training.ema_decay: 0.9999 -> None"),
        ("reward=brightness", "reward.kind: color -> brightness"),
        ("data.shuffle=false", "data.shuffle: True -> False"),
    ],
)
def test_changed_settings_are_refused_by_name(tmp_path: Path, changed: str, said: str) -> None:
    start(command(tmp_path, "run", "training.max_steps=1"))
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ValueError, match="other settings") as error:
        start(command(tmp_path, "run", "training.max_steps=1", changed))
    assert said in str(error.value)
    start_anew = f"name=... model.pretrained={tmp_path / 'run' / 'export' / 'pipeline'}"
    assert str(error.value).endswith(start_anew)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_settings_that_do_not_touch_the_result_may_change(tmp_path: Path) -> None:
    start(command(tmp_path, "run", "training.max_steps=1"))
    changed = {
        "training.max_steps": "2",
        "training.max_time": "10:00:00",
        "training.checkpoint_every_steps": "7",
        "training.keep_checkpoints": "1",
        "training.micro_batch_size": "1",
        "training.strategy": "fsdp",
        "training.tensorboard": "true",
        "validation.every_steps": "1",
        "model.gradient_checkpointing": "true",
    }
    start(command(tmp_path, "run", *[f"{key}={value}" for key, value in changed.items()]))
    assert last_state(tmp_path / "run").step == 2
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    for key in (*MAY_CHANGE, "reward.parts.a.gradient_checkpointing"):
        assert differences({key: 1}, {key: 2}, {}) == {}
    assert differences({"a.b": 1}, {"a.c": 1}, {}) == {"a.b": "1 -> None", "a.c": "None -> 1"}
    assert flatten({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "d": [2]}


def test_two_processes_cannot_hold_one_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    again = command(tmp_path, "run", "training.max_steps=1")
    with lock(tmp_path / "run", busy="", unmade=""):
        assert in_child(lambda: start_cli(again)) == 2
    assert f"another process is training in {tmp_path / 'run'}" in capfd.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert in_child(lambda: start_cli(again)) == 0


def test_a_file_system_without_locks_is_named_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    start(command(tmp_path, "run", "training.max_steps=1"))
    assert "this file system cannot lock (Function not implemented)" in capsys.readouterr().err
    assert last_state(tmp_path / "run").step == 1


def test_weights_and_biases_is_asked_for_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb_project = 'mine' needs .*sfumato\[wandb\]"):
        start(command(tmp_path, "run", "training.wandb_project=mine"))


def test_one_process_may_train_in_one_precision_after_another(tmp_path: Path) -> None:
    """As a sweep over training.precision does."""
    for precision in ("no", "bf16"):
        two = ["training.max_steps=2", f"training.precision={precision}"]
        start(command(tmp_path, precision, *two))
    exact, rounded = (metrics(tmp_path / name)[1]["loss"] for name in ("no", "bf16"))
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.05)


def test_bf16_trains_float32_adapters(tmp_path: Path, sd_folder: Path) -> None:
    half = ["training.precision=bf16", "model.dtype=bfloat16", "model.lora.rank=2"]
    start(command(tmp_path, "run", *half, "training.max_steps=2", model=sd_folder))
    state = last_state(tmp_path / "run")
    for tensors in (state.weights, state.ema, state.optimizer):
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert any(tensor.any() for name, tensor in state.weights.items() if "lora_B" in name)
    for row in metrics(tmp_path / "run"):
        assert all(math.isfinite(value) for value in row.values())


def test_draft_learns_its_reward_and_kl_holds_it_back(tmp_path: Path, sd_folder: Path) -> None:
    """Twenty steps on redness; the export then gives the same image in diffusers."""
    gained, distance = {}, {}
    for name, coefficient, verify in (("free", 1e-6, "true"), ("held", 2.0, "false")):
        settings = [f"objective.kl_coeff={coefficient}", f"verify={verify}"]
        settings += ["sampler.num_inference_steps=2", "training.max_steps=20"]
        settings += ["training.micro_batch_size=4", "model.lora.rank=4", "model.lora.dropout=0.05"]
        settings += ["validation.every_steps=20", "training.ema_decay=0.5", "optimizer.lr=0.02"]
        start(command(tmp_path, name, *settings, model=sd_folder))
        rows = metrics(tmp_path / name)
        assert rows[1]["kl"] < 1e-9
        gained[name] = rows[-1]["validation/reward"] - rows[-1]["validation/reward_base"]
        distance[name] = rows[-1]["kl"]
    assert gained["free"] > 0.5
    assert distance["free"] > 1e-3
    assert distance["held"] < distance["free"] / 3
    assert gained["held"] < gained["free"] / 2
    assert (
        "(verified: diffusers gives the same image" in (tmp_path / "free/export.json").read_text()
    )
    assert_adapter_is_the_average(tmp_path / "free")


def assert_adapter_is_the_average(run_folder: Path) -> None:
    file = run_folder / "export" / "lora" / "pytorch_lora_weights.safetensors"
    adapter, ema = load_file(file), last_state(run_folder).ema
    assert len(adapter) == len(ema)
    for name, tensor in ema.items():
        theirs = name.replace(".default", "")
        assert torch.equal(adapter[theirs], tensor)


def test_damaged_settings_of_a_run_are_refused_by_name(tmp_path: Path) -> None:
    overrides = command(tmp_path, "run", "training.max_steps=1")
    start(overrides)
    for garbage in (b"", b"\xff\xfe\x00", b"a: [1", b"- 1\n"):
        (tmp_path / "run" / "config.yaml").write_bytes(garbage)
        with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
            start(overrides)


def test_a_falling_learning_rate_is_not_stretched(tmp_path: Path) -> None:
    for schedule, refused in (("constant", False), ("cosine", True)):
        settings = [f"optimizer.schedule={schedule}", "validation.every_steps=0"]
        start(command(tmp_path, schedule, *settings, "training.max_steps=1"))
        longer = command(tmp_path, schedule, *settings, "training.max_steps=2")
        if refused:
            with pytest.raises(ValueError, match=r"other settings \(training.max_steps: 1 -> 2\)"):
                start(longer)
        else:
            assert start(longer).step == 2


def test_an_export_is_made_anew_for_other_weights(tmp_path: Path) -> None:
    exports = []
    for lr in ("0.01", "0.02"):
        start(command(tmp_path, "run", f"optimizer.lr={lr}", "training.max_steps=1"))
        exported = tmp_path / "run" / "export" / "pipeline" / "network.safetensors"
        exports.append(exported.read_bytes())
        shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert exports[0] != exports[1]


@pytest.mark.parametrize(
    ("note", "content"),
    [
        *((note, content) for note in ("run.json", "export.json") for content in ("{", "[]")),
        ("run.json", '{"starts": 5}'),
    ],
)
def test_a_damaged_note_is_named(tmp_path: Path, note: str, content: str) -> None:
    again = command(tmp_path, "run", "training.max_steps=1")
    start(again)
    (tmp_path / "run" / note).write_text(content)
    with pytest.raises(ValueError, match=rf"{note} .*; remove it"):
        start(again)


def test_lines_that_are_no_metrics_are_left_out(tmp_path: Path) -> None:
    """As a full disk or a file system's repair may leave them."""
    lines = [
        b'{"step": 0, "loss": 1.0}',
        b'{"loss": 3}',
        b"[1]",
        b"\xff\xfe",
        b'{"step": 1}',
        b'{"st',
    ]
    RunFolder(tmp_path).metrics.write_bytes(b"\n".join(lines))
    assert [row["step"] for row in read_metrics(RunFolder(tmp_path))] == [0, 1]


def test_an_overflow_is_an_error_once_the_scaler_can_fall_no_further() -> None:
    state, alone = object.__new__(TrainState), object.__new__(Distribution)
    state.step, alone.world = 3, 1
    for scale, refused in ((1.0, False), (0.5, True)):
        state.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        loss = Loss(torch.tensor(1.0), {})
        given = {"grad_norm": float("inf")}, [loss], ["a star"], state, alone
        if refused:
            with pytest.raises(TrainingError, match="not finite at step 4"):
                refuse_non_finite(*given)
        else:
            refuse_non_finite(*given)


def test_weights_and_biases_gets_metrics_and_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[int, dict[str, Any]]] = []
    started: dict[str, Any] = {}
    board = SimpleNamespace(log=lambda row, step: logged.append((step, row)), finish=lambda: None)

    def init(**settings: Any) -> SimpleNamespace:
        started.update(settings)
        return board

    fake: Any = ModuleType("wandb")
    fake.__spec__ = ModuleSpec("wandb", None)
    fake.init, fake.Image = init, lambda pixels, caption: (pixels.shape, caption)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    start(command(tmp_path, "run", "training.wandb_project=mine", "training.max_steps=1"))
    assert (started["project"], started["name"]) == ("mine", "run")
    assert started["id"] == (tmp_path / "run" / "wandb_id").read_text()
    scalars = [(step, row) for step, row in logged if "reward" in row]
    assert [step for step, _ in scalars] == [1]
    (images,) = {name for _, row in logged for name in row if name == "validation/tuned_base"}
    shape, caption = next(row[images][0] for _, row in logged if images in row)
    assert len(shape) == 3 and shape[2] == 3
    assert "| tuned " in caption and "| base " in caption


def test_the_progress_bar_shows_reward_kl_and_speed() -> None:
    shown = headline({"reward": 21.53, "kl": 0.0123456, "loss": 1.0, "images_per_second": 3.14159})
    assert shown == "reward 21.53, kl 0.01235, 3.14 images/s"
