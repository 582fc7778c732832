"""Blueprint of a recipe: its model and objective on the meta device; no weight is read."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.config import DraftConfig, TrainConfig
from sfumato.data.sample import Encoded, Sample
from sfumato.diffusion.randomness import Rng
from sfumato.models.formats import read_model_index
from sfumato.models.loading import load_on_meta
from sfumato.models.pipeline_model import PipelineModel
from sfumato.models.registry import FAMILIES, find_family
from sfumato.objectives.objective import Objective
from sfumato.objectives.supervised import Supervised
from sfumato.planning.described import describe_pipeline, is_described
from sfumato.planning.step import forward_flops
from sfumato.rewards.reward import Reward
from sfumato.run.build import build_objective, build_scorer
from sfumato.run.open_data import frame_size

PROMPT = " ".join("a" * 75)  # as long as CLIP reads


@dataclass(frozen=True)
class Blueprint:
    """The model of a recipe without memory, and what training minimises.

    Attributes:
        model: on the meta device; under LoRA its trained networks have adapters.
        objective: takes micro-batches that repeat `row`.
        reward: scores images in training or validation; None if nothing does.
        size: height and width of the images, in pixels.
        assumed: what the recipe leaves open, in words.
    """

    model: PipelineModel
    objective: Objective[Any]
    reward: Reward | None
    row: Any
    size: tuple[int, int]
    assumed: tuple[str, ...]

    @property
    def frozen(self) -> dict[str, nn.Module]:
        """The networks that are not trained and lie whole on each GPU, by name."""
        sharded = self.model.shards()
        names = {"policy": "network", "vae": "autoencoder"}
        found = {k: each for k, each in self.model.networks().items() if each not in sharded}
        found |= {} if self.reward is None else {"reward": self.reward}
        return {names.get(k, k): each for k, each in found.items()}

    @property
    def latent(self) -> tuple[int, int, int]:
        """Shape (c, h, w) of the latents of one image."""
        return self.model.latent_shape(*self.size)

    def loss(self, rows: int) -> Callable[[], Tensor]:
        """Return a call of the objective with a micro-batch of `rows`."""
        rng = Rng.of_step(0, 0, range(rows))

        def loss() -> Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of a reward that cuts the prompt
                return self.objective.loss(self.model, [self.row] * rows, rng).value

        return loss

    def sampling(self, config: TrainConfig) -> "Blueprint":
        """Return the same networks, for a recipe of another number of sampling steps."""
        return replace(self, objective=build_objective(config, self.reward))

    def encoding_flops(self) -> int:
        """Return the FLOPs of encoding one image and its caption."""
        image = torch.empty(1, 3, *self.size, device="meta")
        flops = forward_flops(lambda: self.model.encode_moments(image))
        return flops + forward_flops(partial(self.model.encode_prompts, [PROMPT]))


def read_blueprint(config: TrainConfig) -> Blueprint:
    """Build the model and the objective of a recipe on the meta device.

    Raises:
        ValueError: if the settings neither name nor describe the network, or a part is unknown.
    """
    if not is_described(config.model):
        family, folder = find_family(config.model, config.sampler)
        return _blueprint(config, family, folder)
    with TemporaryDirectory() as name:
        folder = Path(name)
        assumed = describe_pipeline(config.model, folder)
        pipeline = read_model_index(folder)["_class_name"]
        family = next(each for each in FAMILIES.values() if each.pipeline_name == pipeline)
        return _blueprint(config, family, folder, assumed)


def _blueprint(
    config: TrainConfig, family: type[PipelineModel], folder: Path, *assumed: str
) -> Blueprint:
    with torch.device("meta"):
        reward = build_scorer(config)
    objective = build_objective(config, reward)
    needs_reference = config.model.reference and objective.needs_reference
    model = load_on_meta(family, folder, replace(config.model, reference=needs_reference))
    model.trained.train()
    if isinstance(objective, Supervised):
        objective.check(model)
    if family.prompts_vary:
        tokens = max(model.tokens.values())
        assumed = (*assumed, f"prompts of {tokens} tokens; shorter ones cost less")
    size = frame_size(config, model.limits)
    row = _sample(config, model, size) if isinstance(objective, Supervised) else PROMPT
    return Blueprint(model, objective, reward, row, size, assumed)


def _sample(config: TrainConfig, model: PipelineModel, size: tuple[int, int]) -> Sample:
    """Return a training example without memory, encoded beforehand if the recipe's are."""
    shown: dict[str, Any] = {"caption": PROMPT, "original": size, "crop": (0, 0), "name": "plan"}
    if not config.data.shards.cached:
        return Sample(torch.empty(3, *size, device="meta"), **shown)
    channels, *sides = model.latent_shape(*size)
    moments = torch.empty(2 * channels, *sides, dtype=torch.float16, device="meta")
    text = {name: states.half() for name, states in model.blank_prompts(1).tensors.items()}
    return Sample(None, **shown, encoded=Encoded(moments, text, text, size))


def steps_alike(config: TrainConfig) -> tuple[TrainConfig, int]:
    """Leave out sampling steps that cost what others do; return the recipe, and how many those are.

    Steps before DRaFT's window record no graph: all of them take the FLOPs of one, and none adds to
    the peak of memory. A window of random length is planned at its longest.
    """
    draft, steps = config.objective, config.sampler.num_inference_steps
    if not isinstance(draft, DraftConfig):
        return config, 0
    window = draft.truncation_steps if draft.truncation_range is None else draft.truncation_range[1]
    draft = replace(draft, truncation_steps=window, truncation_range=None)
    shortest = min(steps, window + 1)
    return with_steps(replace(config, objective=draft), shortest), steps - shortest


def with_steps(config: TrainConfig, steps: int) -> TrainConfig:
    """Return a recipe with another number of sampling steps."""
    return replace(config, sampler=replace(config.sampler, num_inference_steps=steps))
