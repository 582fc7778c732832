"""Metrics of sets of images: closed forms, torch-fidelity's own functions, files and refusals."""

import sys
import types
from collections.abc import Callable
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from sfumato.evaluation.inception import Inception
from sfumato.evaluation.metrics import cmmd, frechet, kid, precision_recall, vendi


def normal(count: int, width: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return mean + scale * torch.randn(count, width, generator=generator, dtype=torch.float64)


# ---- closed forms


def test_frechet_of_normal_distributions_is_the_closed_form() -> None:
    x, y = normal(4000, 3, 0), normal(4000, 3, 1, mean=2.0, scale=3.0)
    # |m|^2 + sum of (s1 - s2)^2
    assert frechet(x, y) == pytest.approx(3 * 2.0**2 + 3 * (3.0 - 1.0) ** 2, rel=0.05)
    first, second = (np.cov(features.numpy(), rowvar=False) for features in (x, y))
    gap = ((x.mean(0) - y.mean(0)) ** 2).sum().item()
    exact = gap + np.trace(first + second - 2 * np.real(sqrtm(first @ second)))
    assert frechet(x, y) == pytest.approx(exact, rel=1e-9)


def test_frechet_of_fewer_images_than_numbers_has_no_negative_root() -> None:
    x, y = normal(20, 50, 0), normal(30, 50, 1)
    assert frechet(x, x) == pytest.approx(0, abs=1e-6)
    assert 0 < frechet(x, y) < 200


@pytest.mark.parametrize("mean", [0.0, 0.5, 1.0])
def test_kid_of_normal_distributions_is_the_closed_form(mean: float) -> None:
    shares = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    x = torch.special.ndtri(shares)[:, None]  # quantiles: draws would need a million
    y = x + mean

    def kernel(a: float, b: float) -> float:
        """E (x y + 1)^3 for independent x ~ N(a, 1), y ~ N(b, 1), by their moments."""
        first = (1, a, a**2 + 1, a**3 + 3 * a)
        second = (1, b, b**2 + 1, b**3 + 3 * b)
        return sum(c * p * q for c, p, q in zip((1, 3, 3, 1), first, second, strict=True))

    exact = kernel(0, 0) + kernel(mean, mean) - 2 * kernel(0, mean)
    assert kid(x, y) == pytest.approx(exact, rel=0.02, abs=0.1)


def test_kid_is_unbiased() -> None:
    values = [kid(normal(60, 4, 2 * i), normal(50, 4, 2 * i + 1)) for i in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 300**0.5
    assert min(values) < 0 < max(values)


def test_cmmd_of_two_points_is_the_closed_form() -> None:
    """Two directions of features: all images of a set are alike."""
    x, y = torch.tensor([[2.0, 0.0]] * 60), torch.tensor([[0.0, 5.0]] * 70)
    exact = 1000 * (1 + 1 - 2 * np.exp(-2 / (2 * 10**2)))
    assert cmmd(x, y) == pytest.approx(exact, rel=1e-9)
    assert cmmd(x, 3 * x) == pytest.approx(0, abs=1e-9)


def test_cmmd_agrees_with_sums_over_all_pairs() -> None:
    x, y = normal(12, 5, 0), normal(9, 5, 1, mean=0.3)
    a, b = (f / f.norm(dim=1, keepdim=True) for f in (x, y))

    def mean(first: Any, second: Any, same: bool) -> float:
        found = [
            np.exp(-float((u - v).square().sum()) / 200)
            for i, u in enumerate(first)
            for j, v in enumerate(second)
            if not (same and i == j)
        ]
        return float(np.mean(found))

    exact = 1000 * (mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False))
    assert cmmd(x, y) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("kinds", [1, 3, 8])
def test_vendi_counts_kinds_that_have_nothing_in_common(kinds: int) -> None:
    features = torch.eye(10)[:kinds].repeat(5, 1)
    assert vendi(features) == pytest.approx(kinds)
    assert vendi(7 * features[:, :kinds]) == pytest.approx(kinds)  # more images than numbers


def test_vendi_of_two_images_follows_their_cosine() -> None:
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    p = np.array([(1 + 0.6) / 2, (1 - 0.6) / 2])  # eigenvalues of K / 2
    assert vendi(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_precision_and_recall_of_a_set_in_another() -> None:
    inner, outer = normal(300, 2, 0, scale=0.2), normal(300, 2, 1)
    precision, recall = precision_recall(inner, outer)
    assert precision > 0.85
    assert recall < 0.3
    assert precision_recall(outer, outer) == (1.0, 1.0)
    assert precision_recall(inner, outer + 100) == (0.0, 0.0)


@pytest.mark.parametrize("metric", [kid, cmmd, frechet, precision_recall])
def test_features_of_two_networks_are_refused(metric: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="features of 3 and 4 numbers cannot be compared"):
        metric(normal(60, 3, 0), normal(60, 4, 0))


# ---- torch-fidelity


def test_values_are_those_that_torch_fidelity_0_4_0_gave() -> None:
    i, j = torch.arange(120)[:, None].double(), torch.arange(6)[None].double()
    x = torch.sin(i * (j + 1.3) * 1.7 + j).float()
    y = (1.5 * torch.cos(i * (j + 0.7) * 2.1 - j) + 0.4).float()
    assert frechet(x, y) == pytest.approx(1.8816571654754135, rel=1e-6)
    assert kid(x, y) == pytest.approx(0.913864434412881, rel=1e-6)
    assert precision_recall(x, y) == pytest.approx((0.8166666626930237, 0.05833333358168602))


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, whose functions of features need no torchvision, though it imports it."""

    def found(name: str) -> Any:
        if name.startswith("__"):  # inspect asks for these
            raise AttributeError(name)
        return object

    for name in ("", ".datasets", ".transforms", ".transforms.functional", ".models"):
        stub = types.ModuleType(f"torchvision{name}")
        stub.__getattr__ = found  # pyright: ignore
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
        parent, _, child = stub.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, stub)
    return pytest.importorskip("torch_fidelity")


def test_values_are_those_of_torch_fidelity(fidelity: Any) -> None:
    from torch_fidelity import metric_fid, metric_kid, metric_prc  # pyright: ignore

    # Its functions take float32, as its networks give.
    x, y = normal(120, 6, 0).float(), normal(120, 6, 1, mean=0.4, scale=1.5).float()
    statistics = [metric_fid.fid_features_to_statistics(f.double()) for f in (x, y)]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    assert frechet(x, y) == pytest.approx(theirs[metric_fid.KEY_METRIC_FID], rel=1e-8)

    whole = {"kid_subsets": 1, "kid_subset_size": 120, "verbose": False}
    theirs = metric_kid.kid_features_to_metric(x.double(), y.double(), **whole)
    assert kid(x, y) == pytest.approx(theirs[metric_kid.KEY_METRIC_KID_MEAN], rel=1e-8)

    theirs = metric_prc.prc_features_to_metric(x, y, verbose=False)
    precision, recall = precision_recall(x, y)
    assert precision == pytest.approx(theirs[metric_prc.KEY_METRIC_PRECISION])
    assert recall == pytest.approx(theirs[metric_prc.KEY_METRIC_RECALL])
    assert 0.2 < precision <= 1
    assert 0.2 < recall < 1


def test_inception_is_that_of_torch_fidelity(
    fidelity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights in the published names: the real ones are downloaded."""
    from torch_fidelity import feature_extractor_inceptionv3 as published  # pyright: ignore

    drawn: dict[str, Any] = {}
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda self, state: drawn.update(state))
    for module in (published, torch.hub):
        monkeypatch.setattr(module, "load_state_dict_from_url", lambda url, **_: {"x": url})
    torch.manual_seed(0)
    network = Inception()
    assert network.source.endswith("checkpoints/weights-inception-2015-12-05-6726825d.pth")
    assert drawn == {"x": published.URL_INCEPTION_V3}
    images = torch.rand(2, 3, 32, 32)
    (expected,) = network.model((images * 255).round().to(torch.uint8))
    assert torch.equal(network.features(images), expected)
    assert expected.shape == (2, 2048)


def test_inception_without_its_package_or_weights_is_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match=r"needs torch-fidelity .*'sfumato\[fidelity\]'"):
        Inception()
    package = types.ModuleType("torch_fidelity")
    part = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    vars(part)["URL_INCEPTION_V3"] = "https://example/weights-1.pth"
    vars(package)["feature_extractor_inceptionv3"] = part
    for module in (package, part):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def without_network(*_: object, **__: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", without_network)
    with pytest.raises(ValueError, match=r"weights-1.pth cannot be read .*no route.*checkpoints"):
        Inception()
