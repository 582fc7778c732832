"""Blueprint of a recipe: its model and objective on the meta device; no weight is read."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.config import (
    AdjointMatchingConfig,
    AwmConfig,
    DirectConfig,
    DraftConfig,
    NftConfig,
    PolicyGradientConfig,
    TrainConfig,
)
from sfumato.data.sample import Encoded, Preference, Sample
from sfumato.data.stream import Pair
from sfumato.diffusion.randomness import Rng
from sfumato.models.formats import read_model_index
from sfumato.models.loading import load_on_meta
from sfumato.models.pipeline_model import PipelineModel
from sfumato.models.registry import FAMILIES, find_family
from sfumato.objectives.objective import Objective, Piece
from sfumato.planning.described import describe_pipeline, is_described
from sfumato.planning.step import forward_flops
from sfumato.rewards.build import build_reward
from sfumato.rewards.reward import Reward
from sfumato.run.build import build_objective, build_scorer
from sfumato.run.open_data import frame_size, is_cached
from sfumato.training.ema import Shadow

PROMPT = " ".join("a" * 75)  # as long as CLIP reads


@dataclass(frozen=True)
class Blueprint:
    """The model of a recipe without memory, and what training minimises.

    Attributes:
        model: on the meta device; under LoRA its trained networks have adapters.
        objective: takes micro-batches that repeat `row`.
        reward: scores images in training or validation; None if nothing does.
        held_out: rewards that score in validation alone, by name.
        size: height and width of the images, in pixels.
        assumed: what the recipe leaves open, in words.
    """

    model: PipelineModel
    objective: Objective[Any]
    reward: Reward | None
    held_out: Mapping[str, Reward]
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
        found = {names.get(k, k): each for k, each in found.items()}
        return found | {f"reward {name}": each for name, each in self.held_out.items()}

    @property
    def rewards(self) -> list[Reward]:
        """All rewards; each lies whole on each GPU."""
        return [*filter(None, [self.reward]), *self.held_out.values()]

    @property
    def latent(self) -> tuple[int, int, int]:
        """Shape (c, h, w) of the latents of one image."""
        return self.model.latent_shape(*self.size)

    def pieces(self, rows: int) -> Callable[[], list[Callable[[], Tensor]]]:
        """Return a call that begins a loss of `rows` rows, and returns its pieces."""
        rng = Rng.of_step(0, 0, range(rows))

        def quiet(piece: Piece) -> Tensor:
            with _no_warnings():
                return piece().value

        def begin() -> list[Callable[[], Tensor]]:
            with _no_warnings():
                batch = self.objective.blank(self.model, [self.row] * rows, rng)
                found = self.objective.pieces(self.model, batch, rng)
            return [partial(quiet, piece) for piece in found]

        return begin

    def sampling(self, config: TrainConfig) -> "Blueprint":
        """Return the same networks, for a recipe of another number of sampling steps."""
        objective = build_objective(config, self.reward)
        objective.old = self.objective.old
        return replace(self, objective=objective)

    def encoding_flops(self) -> int:
        """Return the FLOPs of encoding one image and its caption."""
        image = torch.empty(1, 3, *self.size, device="meta")
        flops = forward_flops(lambda: self.model.encode_moments(image))
        return flops + forward_flops(partial(self.model.encode_prompts, [PROMPT]))


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silence the warning of a reward that cuts the prompt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


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
        held_out = {name: build_reward(each) for name, each in config.validation.rewards.items()}
    objective = build_objective(config, reward)
    needs_reference = config.model.reference and objective.needs_reference
    model = load_on_meta(family, folder, replace(config.model, reference=needs_reference))
    model.trained.train()
    objective.old = Shadow(model.trainable()) if objective.needs_old else None
    objective.check(model)
    if family.prompts_vary:
        tokens = max(model.tokens.values())
        assumed = (*assumed, f"prompts of {tokens} tokens; shorter ones cost less")
    size = frame_size(config, model.limits)
    rows: list[Any] = [PROMPT] if config.objective.reads_prompts else []
    rows += [_sample(config, model, size)] if config.objective.reads_images else []
    if config.objective.reads_pairs:
        sample = _sample(config, model, size)
        rows = [Preference(sample, sample, 1.0)]
    row = rows[0] if len(rows) == 1 else Pair(*rows)
    return Blueprint(model, objective, reward, held_out, row, size, assumed)


def _sample(config: TrainConfig, model: PipelineModel, size: tuple[int, int]) -> Sample:
    """Return a training example without memory, encoded beforehand if the recipe's are."""
    shown: dict[str, Any] = {"caption": PROMPT, "original": size, "crop": (0, 0), "name": "plan"}
    if not is_cached(config):
        return Sample(torch.empty(3, *size, device="meta"), **shown)
    channels, *sides = model.latent_shape(*size)
    moments = torch.empty(2 * channels, *sides, dtype=torch.float16, device="meta")
    text = {name: states.half() for name, states in model.blank_prompts(1).tensors.items()}
    return Sample(None, **shown, encoded=Encoded(moments, text, text, size))


def steps_alike(config: TrainConfig) -> tuple[TrainConfig, int]:
    """Leave out sampling steps that cost what others do; return the recipe, and how many those are.

    Steps without a graph all take the FLOPs of one, and none adds to the peak of memory. A window
    of random length is planned at its longest. Steps inside an interval of guidance cost more than
    others, so that none is left out.
    """
    objective, steps = config.objective, config.sampler.rollout_steps
    match objective:
        case DraftConfig(truncation_range=bounds):
            active = objective.truncation_steps if bounds is None else bounds[1]
            objective = replace(objective, truncation_steps=active, truncation_range=None)
        case DirectConfig():
            active = active_of(objective, steps)
            objective = replace(objective, path="sum", steps="last", active_steps=active)
            objective = replace(objective, weights="sigma", early_stop=None)
        case AdjointMatchingConfig():
            active = objective.trained_steps
        case PolicyGradientConfig():  # a step more costs the same, whether it is trained or not
            active = 1 + (objective.trained_steps or objective.window or 2)
        case NftConfig() | AwmConfig():
            active = objective.trained_times
        case _:
            return config, 0
    shortest = min(steps, active + 1) if config.sampler.guidance_interval is None else steps
    return with_steps(replace(config, objective=objective), shortest), steps - shortest


def active_of(direct: DirectConfig, steps: int) -> int:
    """Return how many steps of a rollout predict again with a gradient, at most."""
    if direct.path in ("leap", "lagrange"):
        return min(steps, 2 if direct.path == "leap" else 4)
    match direct.steps:
        case "all":
            return steps
        case "listed":
            return len(direct.listed or ())
        case _:
            return direct.active_steps


def with_steps(config: TrainConfig, steps: int) -> TrainConfig:
    """Return a recipe with another number of sampling steps in training."""
    return replace(config, sampler=replace(config.sampler, training_steps=steps))
