"""Intervals of differences: coverage of known truths, pairs, and refusals."""

from typing import Any

import numpy as np
import pytest
import torch

from sfumato.evaluation.bootstrap import interval, paired_interval


def rows_of(values: Any, key: str = "reward") -> list[dict[str, Any]]:
    """Return rows of images: values are of prompts x images."""
    return [
        {"prompt": f"prompt {p}", "seed": 100 * p + i, **nested(key, float(value))}
        for p, row in enumerate(values)
        for i, value in enumerate(row)
    ]


def nested(key: str, value: float) -> dict[str, Any]:
    section, _, name = key.partition(".")
    return {section: {name: value}} if name else {section: value}


def test_intervals_cover_the_true_difference() -> None:
    """1,000 pairs of models whose difference is .3, with effects of prompts and of seeds."""
    draw, prompts, each, covered = np.random.default_rng(0), 12, 3, 0
    for _ in range(1000):
        shared = draw.normal(size=(prompts, 1)) * 5 + draw.normal(size=(prompts, each))
        gain = 0.3 + 0.5 * draw.normal(size=(prompts, 1)) + draw.normal(size=(prompts, each))
        _, low, high = paired_interval(rows_of(shared), rows_of(shared + gain), "reward")
        covered += low <= 0.3 <= high
    assert 930 <= covered <= 970


def test_intervals_of_a_ratio_cover_its_truth() -> None:
    """A function that is not linear: exp(1) of two means, by the delta method."""
    draw, covered = np.random.default_rng(1), 0
    for _ in range(1000):
        values = torch.tensor(draw.normal(size=(20, 2)) * 0.5 + [2.0, 4.0])
        _, low, high = interval(lambda m: m[:, 1] / m[:, 0], values)
        covered += low <= 2.0 <= high
    assert 930 <= covered <= 970


def test_pairs_are_of_prompt_and_seed_in_any_order() -> None:
    values = np.random.default_rng(2).normal(size=(6, 4))
    first, second = rows_of(values), rows_of(values + 1)
    mean, low, high = paired_interval(first, second[::-1], "reward")
    # What both share cancels: without pairs the interval would be wide.
    assert (mean, low, high) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize("key", ["reward", "held_out.sharpness", "parts.brightness"])
def test_numbers_of_rows_are_named_by_a_key(key: str) -> None:
    draw = np.random.default_rng(3)
    first, second = draw.normal(size=(8, 2)), draw.normal(size=(8, 2))
    found = paired_interval(rows_of(first, key), rows_of(second, key), key)
    assert found[0] == pytest.approx((second - first).mean())
    assert found[1] < found[0] < found[2]
    assert found == paired_interval(rows_of(first), rows_of(second), "reward")


@pytest.mark.parametrize(
    "values",
    [
        [0.1] * 7 + [0.3],  # the error of a draw without the last is rounding alone
        [0.7] * 5 + [0.2],
        [1 / 3] * 9 + [0.4],
        [0.1, 0.11, 0.12, 0.1, 0.11, 0.12, 1.0],
        [0.0, 0.001, -0.001, 0.002, 0.0, 0.001, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0],
    ],
)
def test_one_prompt_that_is_unlike_all_others_makes_no_endless_interval(values: list[float]):
    each = torch.tensor(values, dtype=torch.float64)
    mean, low, high = interval(lambda m: m[:, 0], each[:, None])
    error = each.std().item() / len(each) ** 0.5
    assert mean - 11 * error < low < mean < high < mean + 11 * error


def test_a_level_of_half_is_narrower() -> None:
    draw = np.random.default_rng(4)
    first, second = rows_of(draw.normal(size=(9, 2))), rows_of(draw.normal(size=(9, 2)))
    _, low, high = paired_interval(first, second, "reward")
    _, inner_low, inner_high = paired_interval(first, second, "reward", level=0.5)
    assert low < inner_low < inner_high < high


def test_each_prompt_counts_the_same() -> None:
    values = [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [2.0]]
    zeros = [[0.0] * len(row) for row in values]
    mean, *_ = paired_interval(rows_of(zeros), rows_of(values), "reward")
    assert mean == pytest.approx(4 / 5)


@pytest.mark.parametrize("prompts", [1, 4])
def test_few_prompts_have_no_interval(prompts: int) -> None:
    rows = rows_of(np.ones((prompts, 10)))
    with pytest.raises(ValueError, match=f"{prompts} prompts are too few .* 5 prompts or more"):
        paired_interval(rows, rows, "reward")


def test_other_images_and_other_scores_are_refused() -> None:
    rows = rows_of(np.ones((6, 2)))
    other = [{**row, "seed": row["seed"] + 1} for row in rows]
    with pytest.raises(ValueError, match=r"no image of the prompt 'prompt 0' with seed"):
        paired_interval(rows, other, "reward")
    with pytest.raises(ValueError, match=r"no image of the prompt 'prompt 5'"):
        paired_interval(rows[:-2], rows, "reward")
    for key in ("held_out.sharpness", "rewards"):
        with pytest.raises(ValueError, match=rf"{key} is not among the scores of .*reward, seed"):
            paired_interval(rows, rows, key)
