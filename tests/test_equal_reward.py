"""The interval of the diversity at equal reward: files, coverage of a known truth, refusals."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfumato.evaluation import results
from sfumato.evaluation.bootstrap import interval
from sfumato.evaluation.results import (
    Evaluation,
    at_equal_reward,
    equal_reward_interval,
    read_evaluation,
)
from sfumato.training.folder import step_name

Points = Sequence[tuple[float, float]]  # mean reward and diversity of each step
STEEP: Points = [(1.0, 0.8), (2.0, 0.5), (4.0, 0.2)]
GENTLE: Points = [(1.0, 0.8), (2.5, 0.6), (4.0, 0.5)]


def write(folder: Path, points: Points, draw: np.random.Generator, **settings: Any) -> Any:
    """Write evaluations of 12 prompts with 3 images each, whose effects are drawn."""
    found, effects = [], draw.normal(size=(12, 2)) * [0.3, 0.05]
    for step, (reward, diversity) in enumerate(points):
        rewards = reward + effects[:, :1] + 0.1 * draw.normal(size=(12, 3))
        spread = diversity + effects[:, 1] + 0.01 * draw.normal(size=12)
        place = folder / step_name(step)
        place.mkdir(parents=True)
        summary: dict[str, Any] = {"step": step, "reward": rewards.mean(), "reward_error": 0.1}
        summary["diversity"] = {"label": "d", "mean": spread.mean(), "per_prompt": spread.tolist()}
        summary |= {"held_out": {}, "settings": {"seed": 1, **settings}}
        (place / "summary.json").write_text(json.dumps(summary))
        rows = [{"prompt_index": p, "reward": r} for p, each in enumerate(rewards) for r in each]
        (place / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append(read_evaluation(place))
    return found


def test_the_interval_is_around_the_difference_of_the_means(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    first, second = write(tmp_path / "a", STEEP, draw), write(tmp_path / "b", GENTLE, draw)
    whole = at_equal_reward(first, second)
    found = equal_reward_interval(first, second)
    assert whole is not None and found is not None
    mean, low, high = found
    assert mean == pytest.approx(whole.mean_difference)
    assert low < mean < high
    narrow = equal_reward_interval(first, second, level=0.5)
    assert narrow is not None and high - low > narrow[2] - narrow[1] > 0
    back = equal_reward_interval(second, first)
    assert back == pytest.approx((-mean, -high, -low), abs=(high - low) / 20)


def test_a_run_beside_itself_differs_by_nothing(tmp_path: Path) -> None:
    run = write(tmp_path, STEEP, np.random.default_rng(1))
    assert equal_reward_interval(run, run) == (0, 0, 0)


def test_intervals_cover_the_true_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 pairs of runs; both share the effects of their prompts."""
    draw, covered, count = np.random.default_rng(2), 0, 40
    curves = [np.array(STEEP), np.array(GENTLE)]
    truth = at_equal_reward(*(evaluations(curve) for curve in curves))
    assert truth is not None
    columns: dict[int, tuple[list[float], list[float]]] = {}
    monkeypatch.setattr(results, "_by_prompt", lambda one: columns[id(one)])
    for _ in range(1000):
        shared = draw.normal(size=(count, 2)) * [0.3, 0.05]
        pair = []
        for curve in curves:
            each = curve[:, None] + shared + draw.normal(size=(3, count, 2)) * [0.1, 0.02]
            run = evaluations(each.mean(1))
            columns |= {
                id(one): (v[:, 0].tolist(), v[:, 1].tolist())
                for one, v in zip(run, each, strict=True)
            }
            pair.append(run)
        found = equal_reward_interval(*pair)
        assert found is not None
        covered += found[1] <= truth.mean_difference <= found[2]
        columns.clear()
    assert 930 <= covered <= 970


def evaluations(points: Any) -> list[Evaluation]:
    return [Evaluation(i, float(r), 0.1, float(d), "d") for i, (r, d) in enumerate(points)]


def test_runs_without_a_common_level_have_no_interval(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    first = write(tmp_path / "a", STEEP, draw)
    second = write(tmp_path / "b", [(9.0, 0.8), (12.0, 0.2)], draw)
    assert equal_reward_interval(first, second) is None
    assert equal_reward_interval(first, []) is None


@pytest.mark.parametrize("settings", [{"seed": 2}, {"prompts": ["a"]}, {"num_images": 4}])
def test_unlike_runs_have_no_interval(tmp_path: Path, settings: Mapping[str, Any]) -> None:
    draw = np.random.default_rng(4)
    first = write(tmp_path / "a", STEEP, draw)
    second = write(tmp_path / "b", GENTLE, draw, **settings)
    with pytest.raises(ValueError, match=rf"were evaluated differently \({next(iter(settings))}"):
        equal_reward_interval(first, second)


def test_lost_rows_and_few_prompts_are_named(tmp_path: Path) -> None:
    first = write(tmp_path / "a", STEEP, np.random.default_rng(5))
    file = tmp_path / "a" / step_name(1) / "scores.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(ValueError, match=r"scores.jsonl lacks rows of a prompt; remove .*step-0"):
        equal_reward_interval(first, first)
    file.write_text("{}\n")
    with pytest.raises(ValueError, match=r"scores.jsonl line 1 is damaged: .*prompt_index"):
        equal_reward_interval(first, first)
    with pytest.raises(ValueError, match="4 prompts are too few"):
        interval(lambda m: m[:, 0], results.torch.ones(4, 1))
