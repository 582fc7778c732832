"""Metrics of evaluated steps: their pictures as written, seen by a frozen network.

Batch k of the pictures is the same, and one process encodes it, however many there are.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sfumato.clip import VisionNetwork, load_vision
from sfumato.config import EvaluateConfig
from sfumato.data.prepared.folder import INDEX
from sfumato.evaluation.inception import NAME as INCEPTION
from sfumato.evaluation.inception import Inception
from sfumato.evaluation.manifest import difference
from sfumato.evaluation.metrics import cmmd, frechet, kid, precision_recall, vendi
from sfumato.evaluation.reference import Reference, find_reference
from sfumato.evaluation.results import Evaluation, Metric, add_metrics, read_evaluation
from sfumato.evaluation.study import Study
from sfumato.images import load_images
from sfumato.rewards.clip import ClipReward
from sfumato.run.identity import digests
from sfumato.training.distribution import Group
from sfumato.training.folder import RunFolder

BATCH = 32  # pictures that a network sees at once
LEAST = {"fid": 2048, "kid": 50, "cmmd": 50, "precision_recall": 50}  # pictures, on both sides
OF_CLIP = ("cmmd", "clip_score")
LABELS = {
    "fid": "FID",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "vendi": "Vendi score",
}
Features = Float[Tensor, "n d"]


def check_metrics(config: EvaluateConfig, images: int) -> None:
    """Refuse metrics that lack a network or pictures, before a model is loaded.

    Args:
        images: how many images of each step there are.

    Raises:
        ValueError: saying what to give.
    """
    for name in config.metrics:
        setting, network = _network(config, name)
        if network is None:
            raise ValueError(
                f"metrics has {name}, which compares features of images; name their network: "
                f"{setting}=DIR"
            )
        if name in LEAST and config.reference is None:
            raise ValueError(
                f"metrics has {name}, which compares images with pictures; give reference=DIR, a "
                "folder of pictures, or one that sfumato prepare made"
            )
        if name in LEAST:
            _refuse_few(name, images, "prompts x num_images", "evaluate more prompts or images")


def metric_label(name: str, metric: Metric) -> str:
    """Return the name of a metric for display, with its network where that is open."""
    if name == "fid" and metric.kind.startswith("dinov2"):
        return "FDD"
    if name in LABELS:
        network = metric.kind.removesuffix("ForImageClassification")
        return LABELS[name] if network == INCEPTION else f"{LABELS[name]} ({network} features)"
    return {"cmmd": "CMMD", "clip_score": "CLIP score"}.get(name, name)


@final
class Measures:
    """Measures what `config.metrics` asks for, and writes it to summary.json of each step."""

    def __init__(
        self,
        config: EvaluateConfig,
        run: RunFolder,
        study: Study,
        size: tuple[int, int],
        group: Group,
    ) -> None:
        """Load the networks and look at the reference.

        Args:
            size: height and width of the images.

        Raises:
            ValueError: a network or a picture cannot be read, is of another kind or size, or there
                are too few pictures.
        """
        self.config, self.study, self.group = config, study, group
        self.device = study.model.device
        self.reference: Reference | None = None
        self.networks: dict[str, VisionNetwork | Inception] = {}
        self.manifests: dict[str, dict[str, Any]] = {}
        self._seen: dict[str, Features] = {}  # features of the reference, by network
        self._texts: dict[str, Features] = {}  # of the prompts, by CLIP
        with group.together():
            if config.reference is not None and not set(LEAST).isdisjoint(config.metrics):
                self.reference = find_reference(config.reference, size)
            for name in config.metrics:
                self._open(name)
            if group.is_main and config.metrics:
                self.manifests = self._describe(run)

    def measure(self, results: Sequence[Evaluation]) -> list[Evaluation]:
        """Measure what is missing; return all evaluations with their metrics.

        Raises:
            ValueError: a picture cannot be read, or a number cannot be written.
        """
        todo = self.group.gather([self._missing(results)] if self.group.is_main else [])[0]
        for result, names in zip(results, todo, strict=True):
            folder = result.folder
            assert folder is not None
            seen = {path: self._of_images(path, folder) for path in self._paths(names)}
            for path in self._paths(name for name in names if name in LEAST):
                if path not in self._seen:
                    self._seen[path] = self._of_reference(path)
            with self.group.together():
                if self.group.is_main and names:
                    found: dict[str, Metric] = {}
                    for name in names:
                        values = self._values(name, seen)
                        found |= {k: Metric(v, self.manifests[name]) for k, v in values.items()}
                    add_metrics(folder, found)
        return [read_evaluation(one.folder) if one.folder else one for one in results]

    def _open(self, name: str) -> None:
        setting, path = _network(self.config, name)
        assert path is not None
        if path not in self.networks:
            network = Inception() if path == INCEPTION else load_vision(path, setting)
            self.networks[path] = network.to(self.device)
        kind = self.networks[path].kind
        if name in OF_CLIP and kind != "clip":
            raise ValueError(
                f"metrics has {name}, which is of a CLIP's features, and {setting} = {path!r} is a "
                f"{kind}; give metric_clip=DIR, or take kid, which any network has"
            )
        if name in LEAST and self.reference is not None:
            where = f"reference = {self.config.reference!r}"
            _refuse_few(name, self.reference.count, where, "give more pictures")

    def _describe(self, run: RunFolder) -> dict[str, dict[str, Any]]:
        """Return the manifest of each metric."""
        paths = {path: network.source for path, network in self.networks.items()}
        if self.reference is not None:
            index = self.reference.path / INDEX  # of a prepared folder, with SHA-256 sums
            paths["data.reference"] = str(self.reference.path if self.reference.files else index)
        sums, found = digests(paths, run.path), {}
        for name in self.config.metrics:
            path = str(_network(self.config, name)[1])
            network = self.networks[path]
            found[name] = {
                "network": {
                    "kind": network.kind,
                    "sha256": sums.get(path),
                    "resize": network.resize,
                }
            }
            if name in LEAST and self.reference is not None:
                found[name]["reference"] = {
                    "sha256": sums.get("data.reference"),
                    "count": self.reference.count,
                    "resize": self.reference.resize,
                }
        return json.loads(json.dumps(found))

    def _missing(self, results: Sequence[Evaluation]) -> list[list[str]]:
        """Return what is not yet measured of each evaluation, with this network and reference."""

        def is_there(metrics: Mapping[str, Metric], name: str) -> bool:
            one = metrics.get("precision" if name == "precision_recall" else name)
            return one is not None and difference(one.manifest, self.manifests[name]) is None

        return [
            [name for name in self.config.metrics if not is_there(result.metrics, name)]
            for result in results
        ]

    def _paths(self, names: Iterator[str] | Sequence[str]) -> list[str]:
        return list(dict.fromkeys(str(_network(self.config, name)[1]) for name in names))

    def _of_images(self, path: str, folder: Path) -> Features:
        files = [file for own in self.study.pictures(folder).values() for file in own]
        numbers = range(self.group.rank, -(-len(files) // BATCH), self.group.world)
        batches = ((k, load_images(files[k * BATCH : (k + 1) * BATCH])) for k in numbers)
        return self._features(path, batches)

    def _of_reference(self, path: str) -> Features:
        assert self.reference is not None
        group = self.group
        return self._features(path, self.reference.batches(BATCH, group.rank, group.world))

    def _features(self, path: str, batches: Iterator[tuple[int, Tensor]]) -> Features:
        """Return the features of the batches of all processes; the main one alone has them."""
        network, own = self.networks[path], []
        with self.group.together():
            own += [(k, network.features(images.to(self.device)).cpu()) for k, images in batches]
        parts = sorted(self.group.gather(own, main_only=True), key=itemgetter(0))
        return torch.cat([part for _, part in parts]).to(self.device) if parts else torch.empty(0)

    def _values(self, name: str, seen: Mapping[str, Features]) -> dict[str, float]:
        path = str(_network(self.config, name)[1])
        images = seen[path]
        pair = images, self._seen.get(path, images)
        match name:
            case "fid":
                return {name: frechet(*pair)}
            case "kid":
                return {name: kid(*pair)}
            case "cmmd":
                return {name: cmmd(*pair)}
            case "precision_recall":
                return dict(zip(("precision", "recall"), precision_recall(*pair), strict=True))
            case "vendi":
                each = images.split(self.study.num_images)
                return {name: sum(map(vendi, each)) / len(each)}
            case _:
                prompts = self._of_prompts(path).repeat_interleave(self.study.num_images, 0)
                cosine = (F.normalize(images, dim=1) * prompts).sum(1)
                return {name: 100 * cosine.mean().item()}

    @torch.no_grad()
    def _of_prompts(self, path: str) -> Features:
        if path not in self._texts:
            clip = ClipReward.from_pretrained(path).to(self.device)
            self._texts[path] = clip.text_features(self.study.prompts)
        return self._texts[path]


def _network(config: EvaluateConfig, name: str) -> tuple[str, str | None]:
    """Return the setting that names the network of a metric, and its value."""
    if name in OF_CLIP and config.metric_clip is not None:
        return "metric_clip", config.metric_clip
    return "metric_features", config.metric_features


def _refuse_few(name: str, count: int, where: str, advice: str) -> None:
    if count < LEAST[name]:
        other = ", or take kid, which has no bias of few images" if name == "fid" else ""
        raise ValueError(
            f"metrics has {name}, which needs {LEAST[name]:,} images or more, and {where} gives "
            f"{count:,}; {advice}{other}"
        )
