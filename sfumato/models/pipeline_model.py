"""Base of all families: the networks of a diffusers pipeline as a TextToImageModel."""

import abc
import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.config import ModelConfig, SamplerConfig
from sfumato.diffusion.guidance import CfgGradient, classifier_free
from sfumato.diffusion.process import Prediction, Time, VariancePreserving
from sfumato.diffusion.sampling import Denoiser
from sfumato.models.adapters import LoraRoles, Roles
from sfumato.models.agreement import Fit, Settings
from sfumato.models.autoencoder_kl import decode_kl, latents_kl, moments_kl
from sfumato.models.formats import (
    copy_frozen,
    read_json,
    read_model_index,
    read_pipeline,
    save_encoder,
)
from sfumato.models.limits import Limits, check_side, check_steps
from sfumato.models.lora import KohyaLayout, fuse_elsewhere, save_adapters
from sfumato.models.model import (
    Conditioning,
    Framing,
    Images,
    Latents,
    Moments,
    Role,
    TextToImageModel,
)
from sfumato.models.scheduled import Scheduled
from sfumato.models.schedules import respaced, table_times
from sfumato.precision import without_autocast

CONFIGS = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
CLIP_TOKENS = 77  # of a prompt, if a text encoder's config.json states no other number
CLIP_ATTENTION = (r".*self_attn\.(q|k|v|out)_proj",)


class PipelineModel(TextToImageModel):
    """A diffusers pipeline as a TextToImageModel; a family adds its names and its arithmetic.

    Attributes:
        parts: the network and every text encoder by its component's name, in their two roles.
        scheduler: whose settings `times` follows.
        tokens: of a prompt that each text encoder reads, at most.
    """

    pipeline_name: ClassVar[str]  # in model_index.json
    network_name: ClassVar[str]  # the component that predicts
    encoders: ClassVar[tuple[str, ...]]  # the components that read prompts
    tokenizers: ClassVar[tuple[str, ...]]
    classes: ClassVar[Mapping[str, str]]  # of each component but the scheduler
    token_limits: ClassVar[Mapping[str, int]] = {}  # of encoders without a table of positions
    gives_sigmas: ClassVar[bool] = False  # whether the pipeline gives its own to any scheduler
    prompts_vary: ClassVar[bool] = False  # whether a shorter prompt is encoded to fewer states
    optional: ClassVar[frozenset[str]] = frozenset()  # what model_index.json may leave out
    upcast: ClassVar[tuple[str, ...]] = ()  # in float32 if their `force_upcast` says so
    unused: ClassVar[Mapping[str, Any]] = {}  # from_pretrained's arguments that switch parts off
    supported: ClassVar[Mapping[str, Collection[Any]]] = {}  # values of settings that add inputs
    schedulers: ClassVar[str] = r"(?!EDM|FlowMatch).*"  # of the process, as a regular expression
    blocks: ClassVar[tuple[str, ...]]  # the network's attributes that are blocks, or lists of them
    lora_targets: ClassVar[Mapping[str, Sequence[str]]]  # the preset, by component
    kohya: ClassVar[KohyaLayout]
    combine: ClassVar[Callable[[Tensor, Tensor, float, CfgGradient], Tensor]] = staticmethod(
        classifier_free
    )
    scheduler: Any

    def __init__(
        self, pipeline: Any, parts: dict[str, Roles], source: Path, config: ModelConfig
    ) -> None:
        self.pipeline = pipeline
        self.parts = parts
        self.source = source
        self.config = config
        self.scheduler = pipeline.scheduler
        self.limits = self.read_limits(source)
        self.tokens = self.read_tokens(source)
        self.trained_names = [name for name, part in parts.items() if part.is_trained]
        self.trained = nn.ModuleDict({name: parts[name].policy for name in self.trained_names})
        self.has_reference = all(part.has_reference for part in parts.values())
        self.trains_text = any(name != self.network_name for name in self.trained_names)
        self._has_warned = self.device.type == "meta"  # where tokenizers are not read
        # The pipeline warns of every prompt that it cuts; `encode_prompts` warns once.
        logging.getLogger(type(pipeline).__module__).setLevel(logging.ERROR)

    # --- What a family adds

    @staticmethod
    @abc.abstractmethod
    def read_limits(folder: Path) -> Limits:
        """Read from the JSON files of a folder what sizes and steps the model can do."""

    @classmethod
    def fits(cls, settings: Mapping[str, Settings]) -> Iterable[Fit]:
        """Return numbers in the parts' config.json files that must be equal.

        Args:
            settings: by component; empty for a part that is left out.
        """
        return ()

    @abc.abstractmethod
    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts with the encoders of `pipeline`; every tensor has a row per prompt."""

    @abc.abstractmethod
    def prompt_shapes(self, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of `encode` for one prompt of the most tokens.

        Args:
            settings: of the network, its config.json.
        """

    @abc.abstractmethod
    def grid(self, num_inference_steps: int, tokens: int) -> list[float]:
        """Return the released scheduler's T + 1 times, from noise to data.

        Args:
            tokens: of the image, `limits.multiple` pixels a side each.
        """

    @abc.abstractmethod
    def predict(
        self, network: Any, x_t: Latents, t: Time, cond: Conditioning, guidance_scale: float
    ) -> Latents:
        """Return the network's output at x_t, float32; also on the meta device.

        Args:
            guidance_scale: for networks that take it as an input.
        """

    def pipeline_arguments(
        self, noise: Latents, guidance_scale: float, negative_prompt: str | None = None
    ) -> dict[str, Any]:
        """Return the pipeline's arguments for starting noise and guidance."""
        negative = [negative_prompt] * len(noise) if negative_prompt else None  # zeros in SDXL
        return {"latents": noise, "guidance_scale": guidance_scale, "negative_prompt": negative}

    # --- Files

    @classmethod
    def components(cls, folder: Path) -> dict[str, str]:
        """Return the components that a folder must hold, with the files that configure them."""
        index = read_model_index(folder)
        names = ["scheduler", "vae", cls.network_name, *cls.encoders, *cls.tokenizers]
        absent = {name for name in cls.optional if index.get(name) in (None, [None, None])}
        return {
            name: CONFIGS.get(name.split("_")[0], "config.json")
            for name in names
            if name not in absent
        }

    @classmethod
    def left_out(cls, folder: Path) -> dict[str, Any]:
        """Return from_pretrained's arguments that leave out what is unused or not there."""
        absent = cls.optional.difference(cls.components(folder))
        return {**cls.unused, **dict.fromkeys(absent)}

    @classmethod
    def read_tokens(cls, folder: Path) -> dict[str, int]:
        """Read from JSON files how many tokens of a prompt each text encoder reads, at most."""
        tokens = {}
        for name in (name for name in cls.encoders if name in cls.components(folder)):
            settings = read_json(folder / name / "config.json")
            positions = settings.get("max_position_embeddings", CLIP_TOKENS)
            limit = cls.token_limits.get(name, positions)
            tokenizer = folder / name.replace("text_encoder", "tokenizer") / CONFIGS["tokenizer"]
            tokens[name] = min(limit, read_json(tokenizer).get("model_max_length", limit))
        return tokens

    # --- The contract

    @property
    def roles(self) -> Roles:
        """The two roles of the network that predicts."""
        return self.parts[self.network_name]

    @property
    def network(self) -> nn.Module:
        """The network that predicts, as the policy."""
        return self.roles.policy

    @property
    def device(self) -> torch.device:
        return next(self.pipeline.vae.parameters()).device

    def to(self, device: torch.device) -> None:
        self.pipeline.vae.to(device)
        for part in self.parts.values():
            for network in part.networks():
                network.to(device)

    def networks(self) -> dict[str, nn.Module]:
        roles = dict(zip(("policy", "reference"), self.roles.networks(), strict=False))
        encoders = {name: self.parts[name].policy for name in self.encoders if name in self.parts}
        return {**roles, **encoders, "vae": self.pipeline.vae}

    def image_size(self) -> tuple[int, int]:
        if self.limits.size is None:
            raise ValueError(
                f"model.pretrained = {str(self.source)!r} states no size of its images; set "
                "sampler.height and sampler.width"
            )
        return self.limits.size

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        for name, pixels in (("height", height), ("width", width)):
            check_side(f"sampler.{name}", pixels, self.limits)
        factor = self.limits.factor
        return self.limits.channels, height // factor, width // factor

    def times(self, num_inference_steps: int, height: int, width: int) -> Sequence[float]:
        check_steps(num_inference_steps, self.limits)
        return self.grid(num_inference_steps, self.limits.tokens(height, width))

    def spaced_times(
        self, steps: int, height: int, width: int, spacing: str | None
    ) -> Sequence[float]:
        if spacing is None or not isinstance(self.process, VariancePreserving):
            return super().spaced_times(steps, height, width, spacing)
        check_steps(steps, self.limits, "training_steps")
        return table_times(self.process, respaced(self.scheduler, spacing), steps)

    def scheduled(self, name: str, steps: int, height: int, width: int) -> Scheduled:
        tokens = self.limits.tokens(height, width) if self.prediction_type == "flow" else None
        return Scheduled.of(name, self.pipeline.scheduler, steps, tokens, even=self.gives_sigmas)

    def encode_prompts(
        self,
        prompts: Sequence[str],
        *,
        role: Role = "policy",
        framing: Sequence[Framing] | None = None,
    ) -> Conditioning:
        self._warn_of_cut(prompts)
        learns = self.trains_text and role == "policy" and torch.is_grad_enabled()
        with torch.set_grad_enabled(learns), self._encoding(role):
            blank = self.device.type == "meta"
            cond = self.blank_prompts(len(prompts)) if blank else self.encode(list(prompts))
        return cond if framing is None else cond.framed(framing)

    def _warn_of_cut(self, prompts: Sequence[str]) -> None:
        """Warn once of a prompt with more tokens than any text encoder reads."""
        if self._has_warned:
            return
        name = max(self.tokens, key=self.tokens.__getitem__)
        tokenizer = self.pipeline.components[name.replace("text_encoder", "tokenizer")]
        counts = [len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids]
        if max(counts) > self.tokens[name]:
            self._has_warned = True
            warnings.warn(
                f"prompts are cut at {self.tokens[name]} tokens; the first one cut has "
                f"{max(counts)}: {prompts[counts.index(max(counts))][:80]!r} (said once)",
                stacklevel=3,
            )

    def blank_prompts(self, rows: int) -> Conditioning:
        """Return zeros for prompts of the most tokens; each text encoder runs, to plan with.

        The zeros carry the gradient of encoders that are trained.
        """
        network: Any = self.network
        shapes, start = self.prompt_shapes(network.config), torch.zeros((), device=self.device)
        for name, tokens in self.tokens.items():
            ids = torch.zeros(rows, tokens, dtype=torch.long, device=self.device)
            states = self.pipeline.components[name](input_ids=ids)[0]
            start = start + states.mean()
        return Conditioning({n: start.expand(rows, *shape) + 0 for n, shape in shapes.items()})

    @contextmanager
    def _encoding(self, role: Role) -> Iterator[None]:
        """Put the encoders of a role into the pipeline."""
        with ExitStack() as stack:
            for name in self.encoders:
                if name in self.trained_names:
                    encoder = stack.enter_context(self.parts[name].acting(role))
                    if self.pipeline.components[name] is not encoder:
                        self.pipeline.register_modules(**{name: encoder})
            yield

    def encode_moments(self, images: Images) -> Moments:
        with self._autoencoding():
            return moments_kl(self.pipeline.vae, images)

    def draw_latents(self, moments: Moments, noise: Latents | None) -> Latents:
        return latents_kl(self.pipeline.vae, moments, noise)

    def decode(self, latents: Latents) -> Images:
        with self._autoencoding():
            return decode_kl(self.pipeline.vae, latents)

    def _autoencoding(self) -> AbstractContextManager[object]:
        """Keep an autoencoder that overflows in half precision out of a training's autocast."""
        return without_autocast(self.pipeline.vae) if "vae" in self.upcast else nullcontext()

    def denoiser(
        self,
        cond: Conditioning,
        *,
        uncond: Conditioning | None = None,
        guidance_scale: float = 1.0,
        role: Role = "policy",
        cfg_gradient: CfgGradient = "full",
    ) -> Denoiser:
        guided = uncond is not None and guidance_scale > 1.0 and self.has_cfg
        rows = Conditioning.stack([uncond, cond]) if uncond is not None and guided else cond

        def denoise(x_t: Tensor, t: Time) -> Prediction:
            x, times = x_t, t
            if guided:
                x = torch.cat([x_t, x_t])
                times = t.repeat(2) if isinstance(t, Tensor) and t.ndim else t
            with self.roles.acting(role) as network:
                raw = self.predict(network, x, times, rows, guidance_scale)
            if guided:
                without, with_prompt = raw.chunk(2)
                raw = type(self).combine(with_prompt, without, guidance_scale, cfg_gradient)
            return self.process.read(self.prediction_type, raw, x_t, t)

        return denoise

    def rolling_out(self) -> AbstractContextManager[object]:
        if self.config.lora.merge_rollouts and isinstance(self.roles, LoraRoles):
            return self.roles.merged_in_place()
        return nullcontext()

    def playing(self, role: Role) -> AbstractContextManager[object]:
        return self.roles.playing(role)

    def shards(self) -> Sequence[nn.Module]:
        shards: list[nn.Module] = []
        for name, part in self.parts.items():
            for network in part.networks() if part.is_trained else ():
                is_network = name == self.network_name
                shards += [*(self.blocks_of(network) if is_network else ()), network]
        return shards

    def blocks_of(self, network: nn.Module) -> list[nn.Module]:
        """Return the blocks of a network, in their order."""
        owned = [network.get_submodule(name) for name in self.blocks]
        lists = [list(part) if isinstance(part, nn.ModuleList) else [part] for part in owned]
        return [block for blocks in lists for block in blocks]

    # --- Writing

    def save_pipeline(self, folder: Path, dtype: torch.dtype) -> None:
        changed = [name for name, part in self.parts.items() if part.is_changed]
        for name in changed:
            merged: Any = self.parts[name].merged(dtype).cpu()
            if name == self.network_name:
                merged.save_pretrained(folder / name)
            else:
                save_encoder(merged, self.source / name, folder / name)
        frozen = [name for name in self.components(self.source) if name not in changed]
        copy_frozen(self.source, folder, frozen, variant=self.config.variant)

    def save_adapter(self, folder: Path) -> None:
        if self.config.trainable != "lora":
            raise ValueError("model.trainable = full trains no adapter; export the pipeline")
        save_adapters(
            folder, self.pipeline, self.network_name, self.parts, self.kohya, self.config.merge
        )

    @torch.no_grad()
    def image_elsewhere(
        self, exported: Path, name: str, prompt: str, noise: Latents, sampler: SamplerConfig
    ) -> Images:
        folder, config = self.source, self.config
        if name == "pipeline":
            folder, config = exported / "pipeline", replace(config, variant=None)
        dtypes = {"default": self.pipeline.vae.dtype}
        pipeline = read_pipeline(folder, config, dtypes, self.left_out(folder))
        pipeline.scheduler = type(self.scheduler).from_config(self.scheduler.config)
        if name == "lora":
            fuse_elsewhere(pipeline, self.network_name, config.merge)
            pipeline.load_lora_weights(exported / "lora")
        pipeline.to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            [prompt],  # as many as negative ones
            height=noise.shape[2] * self.limits.factor,
            width=noise.shape[3] * self.limits.factor,
            num_inference_steps=sampler.num_inference_steps,
            output_type="pt",
            **self.pipeline_arguments(noise, sampler.guidance_scale, sampler.negative_prompt),
        ).images.float()
