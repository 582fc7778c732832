"""Manifests: numbers of different ones are never side by side, whatever field differs."""

from copy import deepcopy
from typing import Any

import pytest

from sfumato.evaluation.manifest import check_alike, difference, surroundings
from sfumato.evaluation.measures import metric_label
from sfumato.evaluation.results import Evaluation, Metric, at_equal_reward
from sfumato.evaluation.study import _by_content

MANIFEST: dict[str, Any] = {
    "prompts": ["a star", "a ring"],
    "seed": 7,
    "num_images": 4,
    "sampler": {"num_inference_steps": 10, "guidance_scale": 7.5},
    "contents": {"model.pretrained": "12ab"},
    **surroundings(),
    "metric": {
        "network": {"kind": "clip", "sha256": "34cd", "resize": {"size": 32, "mode": "bicubic"}},
        "reference": {"sha256": "56ef", "count": 60},
    },
}
FIELDS = [
    ("prompts", ["a star", "a cube"]),
    ("seed", 8),
    ("num_images", 5),
    ("sampler.num_inference_steps", 11),
    ("sampler.guidance_scale", 1.5),
    ("contents.model.pretrained", "78"),
    ("format", "JPEG, quality 95"),
    ("versions.torch", "1.0"),
    ("versions.sfumato", "0.0.1"),
    ("metric.network.kind", "dinov2"),
    ("metric.network.sha256", "78"),
    ("metric.network.resize.mode", "bilinear"),
    ("metric.reference.count", 61),
    ("metric.reference.sha256", "78"),
]


def changed(key: str, value: Any) -> dict[str, Any]:
    other = deepcopy(MANIFEST)
    node, parts = other, ["contents", "model.pretrained"] if "contents" in key else key.split(".")
    for part in parts[:-1]:
        node = node[part]
    assert node[parts[-1]] != value
    node[parts[-1]] = value
    return other


@pytest.mark.parametrize(("key", "value"), FIELDS)
def test_one_field_that_differs_is_refused_and_named(key: str, value: Any) -> None:
    check_alike("a", "b", MANIFEST, deepcopy(MANIFEST))
    with pytest.raises(
        ValueError, match=rf"a and b were evaluated differently \({key}: "
    ) as caught:
        check_alike("a", "b", MANIFEST, changed(key, value))
    assert str(value) in str(caught.value)
    check_alike("a", "b", MANIFEST, changed(key, value), but=(key,))


@pytest.mark.parametrize("key", ["seed", "metric"])
def test_a_field_that_one_lacks_is_refused(key: str) -> None:
    less = {name: value for name, value in MANIFEST.items() if name != key}
    assert difference(MANIFEST, less) is not None
    assert difference(less, MANIFEST) is not None


def test_what_older_versions_did_not_write_is_not_compared() -> None:
    older = {k: v for k, v in MANIFEST.items() if k not in ("format", "versions")}
    check_alike("a", "b", older, MANIFEST)
    check_alike("a", "b", MANIFEST, older)
    with pytest.raises(ValueError, match="seed: 7 and 8"):
        check_alike("a", "b", older, changed("seed", 8))


@pytest.mark.parametrize("network", [{"kind": None}, {}, 5, [], None])
def test_a_metric_without_the_kind_of_its_network_has_a_label(network: Any) -> None:
    assert metric_label("kid", Metric(0.1, {"network": network})) == "KID (None features)"


def test_long_values_are_cut() -> None:
    text = difference(MANIFEST, changed("prompts", [f"prompt {i}" for i in range(400)]))
    assert text is not None and len(text) < 200


@pytest.mark.parametrize("place", [0, 20, 39])
def test_long_values_are_shown_where_they_differ(place: int) -> None:
    prompts = [f"a photo of {i} red cubes" for i in range(40)]
    other = [*prompts[:place], "a blue ring", *prompts[place + 1 :]]
    text = difference(changed("prompts", prompts), changed("prompts", other))
    assert text is not None and len(text) < 200
    assert text.startswith("prompts: ") and text.count("blue ring") == 1
    assert f"of {place} red" in text.partition(" and ")[0]


def test_equal_reward_is_of_one_manifest() -> None:
    def curve(**settings: Any) -> list[Evaluation]:
        points = enumerate([(0.0, 1.0), (1.0, 0.5)])
        return [Evaluation(i, r, 0.1, d, "d", settings=settings) for i, (r, d) in points]

    assert at_equal_reward(curve(seed=1), curve(seed=1)) is not None
    with pytest.raises(ValueError, match=r"seed: 1 and 2"):
        at_equal_reward(curve(seed=1), curve(seed=2))


def test_the_manifest_of_a_metric_is_of_images_and_network() -> None:
    metric = Metric(0.5, MANIFEST["metric"])
    one = Evaluation(0, None, None, 0.1, "d", settings={"seed": 1}, metrics={"kid": metric})
    assert one.manifest("kid") == {"seed": 1, "metric": MANIFEST["metric"]}


def test_settings_that_older_evaluations_lack_are_left_out_at_their_default() -> None:
    old = {"kind": "classifier", "label": "cat", "parts": {"a": {"kind": "clip"}}}
    new = {**old, "sizes": [], "parts": {"a": {"kind": "clip", "score": "model"}}}
    assert _by_content(new, "reward.", {}) == _by_content(old, "reward.", {}) == old
    other = {**old, "sizes": [96], "parts": {"a": {"kind": "clip", "score": "cosine"}}}
    assert _by_content(other, "reward.", {}) == other
