"""Evaluation by one or many processes, killed and resumed: the same files, no image made twice."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import WRITERS
from runs import in_child, in_processes

from sfumato.config import (
    ColorRewardConfig,
    DraftConfig,
    EvaluateConfig,
    ModelConfig,
    SamplerConfig,
    TrainConfig,
    TrainingConfig,
)
from sfumato.diffusion.randomness import derive
from sfumato.evaluation import making
from sfumato.evaluation.commands import variants_of
from sfumato.evaluation.evaluate import evaluate, scaled
from sfumato.evaluation.results import Variant, read_evaluations, read_variants
from sfumato.evaluation.study import Study
from sfumato.images import load_images
from sfumato.models.generate import generate
from sfumato.models.registry import load_model
from sfumato.rewards.simple import ColorReward
from sfumato.training.checkpoint import Snapshot, write_checkpoint
from sfumato.training.distribution import ALONE, Distribution, Group
from sfumato.training.folder import RunFolder

PROMPTS = ["a star", "a red ring", "a cube"]
IMAGES, BATCH = 3, 4


def study_of(family: str, folder: Path, steps: int = 2) -> Study:
    WRITERS[family](folder)
    config = TrainConfig(
        model=ModelConfig(pretrained=str(folder)),
        sampler=SamplerConfig(num_inference_steps=steps, guidance_scale=2.0),
        objective=DraftConfig(),
        reward=ColorRewardConfig(),
    )
    torch.manual_seed(0)
    model = load_model(config.model)
    return Study(model, config, ColorReward("red"), PROMPTS, IMAGES, 7, BATCH, "pixels")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return study_of("stable_diffusion", tmp_path_factory.mktemp("model") / "tiny")


def write_run(study: Study, path: Path) -> RunFolder:
    """Write a run whose step 2 has adapters that move the images."""
    run = RunFolder(path)
    weights = {
        name: torch.full_like(p, 0.3) if "lora_B" in name else p.detach().clone()
        for name, p in study.model.trainable().items()
    }
    write_checkpoint(run.checkpoints, Snapshot(2, weights, {}, {}, {}))
    return run


def files_of(run: RunFolder) -> dict[str, bytes]:
    """Return what an evaluation wrote; the record of a folder names times of files."""
    root = run.path / "evaluation"
    return {
        str(file.relative_to(root)): file.read_bytes()
        for file in sorted(root.rglob("*"))
        if file.is_file() and file.name not in (".lock", ".sfumato.json")
    }


@pytest.fixture(scope="module")
def alone(study: Study, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of an evaluation by one process that nothing stopped."""
    run = write_run(study, tmp_path_factory.mktemp("alone") / "run")
    assert in_child(lambda: evaluate(run, study, [0, 2])) == 0
    files = files_of(run)
    assert len(files) == 2 * (len(PROMPTS) * IMAGES + 2)
    return files


def among_others(work: Callable[[Group], object]) -> Callable[[int], object]:
    """Return what a process of several does."""

    def act(rank: int) -> None:
        distribution = Distribution(TrainingConfig(), tf32=False)
        assert distribution.rank == rank
        try:
            work(distribution)
        finally:
            distribution.close()

    return act


# ---- many processes


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(
    study: Study, alone: dict[str, bytes], tmp_path: Path, world: int
) -> None:
    run = write_run(study, tmp_path / "run")
    in_processes(world, among_others(lambda group: evaluate(run, study, [0, 2], group=group)))
    assert files_of(run) == alone
    in_processes(world, among_others(lambda group: evaluate(run, study, [0, 2], group=group)))
    assert files_of(run) == alone


def test_the_failure_of_one_process_ends_all_and_loses_nothing(
    study: Study, alone: dict[str, bytes], tmp_path: Path
) -> None:
    run = write_run(study, tmp_path / "run")

    def held_out(group: Group) -> Callable[..., torch.Tensor]:
        def rate(images: torch.Tensor, prompts: Any) -> torch.Tensor:
            if group.rank == 1:
                raise ValueError("the scorer died")
            return images.mean((1, 2, 3))

        return rate

    def work(group: Group) -> None:
        broken = replace(study, held_out={"light": held_out(group)})
        with pytest.raises(ValueError, match=r"the scorer died|another process failed"):
            evaluate(run, broken, [0], group=group)

    in_processes(2, among_others(work))
    pictures = run.evaluation(0).with_name(".step-000000.unfinished") / "images"
    assert sorted(path.name for path in pictures.iterdir())[:4] == [
        "000-000.png", "000-001.png", "000-002.png", "001-000.png"]  # fmt: skip
    assert not run.evaluation(0).exists()


def test_a_folder_that_the_processes_do_not_share_is_named(study: Study, tmp_path: Path) -> None:
    def work(group: Group) -> None:
        run = write_run(study, tmp_path / f"run-{group.rank}")
        with pytest.raises(ValueError, match=r"must lie where all processes|No such file|another"):
            evaluate(run, study, [0], group=group)

    in_processes(2, among_others(work))


# ---- kills


def killed(run: RunFolder, study: Study, steps: list[int], name: str, number: int) -> None:
    """Evaluate in a process that is killed before the given call of a function of `making`."""

    def work() -> None:
        kill_at(name, number)
        evaluate(run, study, steps)

    assert in_child(work) == -signal.SIGKILL


def kill_at(name: str, number: int) -> None:
    """End this process hard before the given call of a function that makes a step."""
    original, calls = getattr(making, name), [0]

    def counted(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given, **named)

    setattr(making, name, counted)


@pytest.mark.parametrize(
    ("name", "number", "kept"),
    [
        ("write_text", 1, 0),  # before anything is there
        ("save_image", 1, 0),
        ("save_image", 3, 0),  # a batch of which half is written
        ("write_text", 2, 0),  # the rows of a batch are missing
        ("save_image", 5, 4),
        ("write_text", 3, 4),
        ("save_image", 9, 8),
        ("load_images", 2, 9),
        ("new_folder", 1, 9),
        ("link", 4, 9),
    ],
)
def test_a_killed_evaluation_goes_on_without_making_an_image_twice(
    study: Study, alone: dict[str, bytes], tmp_path: Path, name: str, number: int, kept: int
) -> None:
    run = write_run(study, tmp_path / "run")

    killed(run, study, [0, 2], name, number)
    assert not run.evaluation(0).exists()

    def resumed() -> None:
        made = []
        original = making.generate

        def counted(model: Any, prompts: Any, seeds: Any, *given: Any, **named: Any) -> Any:
            made.extend(seeds)
            return original(model, prompts, seeds, *given, **named)

        making.generate = counted  # type: ignore[assignment]
        evaluate(run, study, [0, 2])
        assert len(made) == 2 * len(PROMPTS) * IMAGES - kept

    assert in_child(resumed) == 0
    assert files_of(run) == alone


def test_other_processes_and_batches_go_on_from_what_is_there(
    study: Study, alone: dict[str, bytes], tmp_path: Path
) -> None:
    run = write_run(study, tmp_path / "run")
    killed(run, study, [0, 2], "save_image", 6)
    in_processes(2, among_others(lambda group: evaluate(run, study, [0, 2], group=group)))
    assert files_of(run) == alone
    again = write_run(study, tmp_path / "again")
    killed(again, study, [0], "save_image", 6)
    smaller = replace(study, batch_size=2)
    (found,) = evaluate(again, smaller, [0])
    summary = json.loads(alone["step-000000/summary.json"])
    assert found.reward == pytest.approx(summary["reward"], abs=1e-4)


@pytest.mark.parametrize("change", ["settings", "checkpoint", "empty picture", "rubbish"])
def test_unfinished_pictures_of_another_study_are_made_again(
    study: Study, alone: dict[str, bytes], tmp_path: Path, change: str
) -> None:
    run = write_run(study, tmp_path / "run")
    other = replace(study, seed=8) if change == "settings" else study
    killed(run, other, [2], "save_image", 6)
    unfinished = run.evaluation(2).with_name(".step-000002.unfinished")
    if change == "checkpoint":
        facts = json.loads((unfinished / "facts.json").read_text())
        (unfinished / "facts.json").write_text(json.dumps({**facts, "checkpoint": "of another"}))
    elif change == "empty picture":
        (unfinished / "images" / "000-001.png").write_bytes(b"")
    elif change == "rubbish":
        odd = '{"image": "images/000-000.png", "prompt_index": "x", "index": [0]}'
        (unfinished / "rows" / "000-000.jsonl").write_text(f'{{"image": 3}}\nnothing\n{odd}\n')
    if change != "empty picture":  # rounding: its batch is smaller than it was
        assert in_child(lambda: evaluate(run, study, [0, 2])) == 0
        assert files_of(run) == alone
    else:
        evaluate(run, study, [2])
        assert (run.evaluation(2) / "images" / "000-001.png").stat().st_size > 100


@pytest.mark.parametrize("link", ["folder", "picture"])
def test_links_in_an_unfinished_folder_are_not_followed(
    study: Study, alone: dict[str, bytes], tmp_path: Path, link: str
) -> None:
    run, secret = write_run(study, tmp_path / "run"), tmp_path / "secret"
    killed(run, study, [0], "save_image", 6)
    unfinished = run.evaluation(0).with_name(".step-000000.unfinished")
    if link == "folder":
        unfinished.rename(secret)
        unfinished.symlink_to(secret)
    else:
        secret.write_bytes(b"private")
        (unfinished / "images" / "000-001.png").unlink()
        (unfinished / "images" / "000-001.png").symlink_to(secret)
    assert in_child(lambda: evaluate(run, study, [0, 2])) == 0
    assert files_of(run) == alone
    assert secret.exists()


# ---- variants


@pytest.fixture(scope="module", params=["stable_diffusion", "stable_diffusion_3"])
def any_study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return study_of(request.param, tmp_path_factory.mktemp("model") / "tiny", steps=5)


def pictures_of(run: RunFolder, step: int, variant: str) -> torch.Tensor:
    return load_images(sorted((run.evaluation(step, variant) / "images").iterdir()))


def test_schedules_and_scales_make_curves_between_base_and_tuned(
    any_study: Study, tmp_path: Path
) -> None:
    study = replace(any_study, prompts=PROMPTS[:1], num_images=2)
    run = write_run(study, tmp_path / "run")
    variants = [Variant(s, scale) for s in ("draft", "step_0.6") for scale in (0.5, 1.0)]
    found = evaluate(run, study, [0, 2], variants=variants)
    names = [(one.variant.name, one.step) for one in found]
    half, late = "lora_scale_0.5", "schedule_step_0.6"
    assert names == [
        ("", 0), (half, 2), ("", 2), (f"{late},{half}", 2), (late, 2)]  # fmt: skip
    assert read_evaluations(run) == [found[0], found[2]]
    assert [one.variant.name for (one,) in read_variants(run)] == sorted(
        [half, f"{late},{half}", late]
    )
    base, tuned = pictures_of(run, 0, ""), pictures_of(run, 2, "")
    for name in (half, late):
        between = pictures_of(run, 2, name)
        assert 0.003 < (between - base).abs().mean() < (tuned - base).abs().mean()
    written = (run.evaluation(2, late) / "summary.json").stat()
    assert evaluate(run, study, [0, 2], variants=variants) == found
    assert (run.evaluation(2, late) / "summary.json").stat() == written


def test_a_scaled_adapter_is_that_of_peft(any_study: Study) -> None:
    from peft.tuners.lora import LoraLayer

    model, prompts, seeds = any_study.model, ["a star"], [5]
    weights = {
        name: torch.full_like(p, 0.3) if "lora_B" in name else p.detach().clone()
        for name, p in model.trainable().items()
    }

    def images(values: Any) -> torch.Tensor:
        for name, p in model.trainable().items():
            p.data.copy_(values[name])
        return generate(model, prompts, seeds, any_study.config.sampler)

    whole, half = images(weights), images(scaled(weights, 0.5))
    layers = [m for m in model.networks()["policy"].modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        layer.set_scale("default", 0.5)
    expected = images(weights)
    for layer in layers:
        layer.set_scale("default", 1.0)
    torch.testing.assert_close(half, expected, rtol=0, atol=2e-5)
    assert (whole - half).abs().max() > 0.01


def test_one_network_runs_where_the_weight_is_0_or_1(any_study: Study, tmp_path: Path) -> None:
    study = replace(any_study, prompts=PROMPTS[:1], num_images=2)
    run, calls = write_run(study, tmp_path / "run"), [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    hook = study.model.networks()["policy"].register_forward_hook(count)
    evaluate(run, study, [2])
    each = calls[0] // 5  # the guided prediction may be one call or two
    assert calls[0] == 5 * each > 0
    for schedule, evaluations in (("step_0.6", 5), ("linear", 9), ("power_2", 9), ("step_0", 5)):
        calls[0] = 0
        evaluate(run, study, [2], variants=[Variant(schedule)])
        assert calls[0] == evaluations * each, schedule
    hook.remove()


def test_guidance_scales_are_variants_of_the_base_model_too(
    any_study: Study, tmp_path: Path
) -> None:
    study = replace(any_study, prompts=PROMPTS[:1], num_images=2)
    run = write_run(study, tmp_path / "run")
    own = study.config.sampler.guidance_scale
    request = EvaluateConfig(run=str(run.path), guidance_scales=[1.0, own, 4.0])
    variants = variants_of(request, own)
    assert [one.name for one in variants] == ["guidance_scale_1", "", "guidance_scale_4"]
    found = evaluate(run, study, [0, 2], variants=variants)
    assert [(one.variant.guidance_scale, one.step) for one in found] == [
        (scale, step) for scale in (1.0, None, 4.0) for step in (0, 2)
    ]
    sampler = replace(study.config.sampler, guidance_scale=4.0)
    shown = generate(study.model, PROMPTS[:1], [derive(7, 0, 1)], sampler)
    torch.testing.assert_close(
        pictures_of(run, 2, "guidance_scale_4")[1:], shown, rtol=0, atol=0.5 / 255 + 1e-5
    )
    assert found[-1].settings["sampler"]["guidance_scale"] == 4.0


def test_weights_that_are_no_adapter_have_no_scale() -> None:
    with pytest.raises(ValueError, match=r"lora_scales=0.5 multiplies what LoRA adapters add"):
        scaled({"proj.weight": torch.ones(1), "proj.lora_B.default.weight": torch.ones(1)}, 0.5)
    whole = {"proj.weight": torch.ones(1)}
    assert scaled(whole, 1.0) is whole


@pytest.mark.parametrize(
    ("schedules", "message"),
    [(["base"], "base is the base model"), (["line"], "unknown schedule 'line'"),
     (["draft", "step_2"], "unknown schedule 'step_2'")],
)  # fmt: skip
def test_a_schedule_that_makes_no_curve_is_refused(schedules: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        variants_of(EvaluateConfig(run="run", schedules=schedules), 7.5)


@pytest.mark.parametrize("scales", ["lora_scales", "guidance_scales"])
def test_two_scales_that_would_share_a_folder_are_refused(scales: str) -> None:
    near: Any = {scales: [0.1234567, 0.1234568]}
    with pytest.raises(ValueError, match=r"would both be '[a-z_]*_scale_0.123457'"):
        variants_of(EvaluateConfig(run="run", **near), 7.5)
    twice: Any = {scales: [0.5, 0.5]}
    assert len({one.name for one in variants_of(EvaluateConfig(run="run", **twice), 7.5)}) == 1


def test_one_process_is_a_group() -> None:
    with ALONE.together():
        assert ALONE.gather([1]) == [1]
    assert not ALONE.any(False)
    assert ALONE.mean({"a": 2.0}) == {"a": 2.0}
