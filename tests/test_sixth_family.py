"""A sixth family, AuraFlow, added in the places that CONTRIBUTING.md names, and in no other.

Its file and recipe are in this test: the class and the settings below. Its line in the registry is
there while a test runs.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, final

import pytest
import torch
from families import PIXELS, write_pictures
from jaxtyping import Float
from runs import start
from tiny_flux import enlarge, tiny_t5_tokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sfumato
from sfumato.compose import compose_command
from sfumato.config import ModelConfig, TrainConfig
from sfumato.diffusion.process import PredictionType, RectifiedFlow, Time
from sfumato.models import registry
from sfumato.models.autoencoder_kl import downsampling
from sfumato.models.flux import rows_of
from sfumato.models.formats import read_json
from sfumato.models.limits import Limits
from sfumato.models.loading import load_on_meta
from sfumato.models.lora import KohyaLayout
from sfumato.models.model import Conditioning, TextToImageModel
from sfumato.models.pipeline_model import PipelineModel
from sfumato.models.registry import FAMILIES, find_family, load_model
from sfumato.models.schedules import flow_times
from sfumato.planning.plan import make_plan
from sfumato.training.compiling import arrange
from sfumato.training.folder import RunFolder
from sfumato.training.tracking import read_metrics

PACKAGE = Path(sfumato.__file__).parent
TOKENS = 256  # the pipeline's max_sequence_length

# --- The family: its file


@final
class AuraFlow(PipelineModel):
    """The networks of an AuraFlowPipeline."""

    pipeline_name = "AuraFlowPipeline"
    network_name = "transformer"
    encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    classes: ClassVar = {
        "transformer": "AuraFlowTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "UMT5EncoderModel",
        "tokenizer": "T5Tokenizer",
    }
    token_limits: ClassVar = {"text_encoder": TOKENS}
    schedulers = "FlowMatchEulerDiscreteScheduler"
    lora_targets: ClassVar = {"transformer": (r".*\.attn\.to_[qkv]",)}
    kohya = KohyaLayout({"transformer": "lora_unet"})
    blocks = ("joint_transformer_blocks", "single_transformer_blocks")
    repeated = frozenset({"AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"})
    process = RectifiedFlow()
    prediction_type: PredictionType = "flow"
    has_cfg = True

    @staticmethod
    def read_limits(folder: Path) -> Limits:
        transformer = read_json(folder / "transformer" / "config.json")
        factor = downsampling(read_json(folder / "vae" / "config.json"))
        return Limits(
            channels=transformer["in_channels"],
            factor=factor,
            multiple=factor * transformer["patch_size"],
            size=(factor * transformer["sample_size"],) * 2,
        )

    def grid(self, num_inference_steps: int, tokens: int) -> list[float]:
        return flow_times(self.scheduler, num_inference_steps, tokens)

    def prompt_shapes(self, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {"states": (self.tokens["text_encoder"], settings["joint_attention_dim"])}

    def encode(self, prompts: list[str]) -> Conditioning:
        states, *_ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device
        )
        return Conditioning({"states": states})

    def predict(
        self,
        network: Any,
        x_t: Float[Tensor, "b c h w"],
        t: Time,
        cond: Conditioning,
        guidance_scale: float,
    ) -> Float[Tensor, "b c h w"]:
        dtype = network.dtype
        states = cond.tensors["states"].to(dtype)
        return network(x_t.to(dtype), states, rows_of(t, x_t)).sample.float()


# --- Its test pipeline


def write_tiny_aura_flow(folder: Path) -> None:
    """Write a pipeline of the real classes with small random weights."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.auraflow_transformer_2d import AuraFlowTransformer2DModel
    from diffusers.pipelines.aura_flow.pipeline_aura_flow import AuraFlowPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = tiny_t5_tokenizer(TOKENS)
    kind: Any = AutoencoderKL
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = UMT5Config(
            vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2
        )
        encoder = UMT5EncoderModel(text)
        transformer: Any = AuraFlowTransformer2DModel(
            sample_size=PIXELS // 4,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pos_embed_max_size=64,
        )
        enlarge(transformer)
        vae = kind(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
            sample_size=PIXELS,
        )
    AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sixth") / "aura_flow"
    write_tiny_aura_flow(folder)
    return folder


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the family's line in the registry."""
    monkeypatch.setitem(FAMILIES, "aura_flow", AuraFlow)


def load(folder: Path, **settings: Any) -> Any:
    return load_model(ModelConfig(str(folder), **settings))


# --- What a new family does without a fifth place


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note what is compiled, but run it as it is written."""
    names: list[str] = []
    original = nn.Module.compile

    def compile_eagerly(self: nn.Module, **settings: Any) -> None:
        names.append(type(self).__name__)
        original(self, backend="eager", **settings)

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    return names


def test_it_trains_and_samples_and_diffusers_makes_the_same_images(
    folder: Path, tmp_path: Path, compiled: list[str]
):
    """Two supervised steps, channels last, blocks compiled; both exports are verified."""
    start(
        [
            f"runs_dir={tmp_path}",
            f"model.pretrained={folder}",
            "model.family=aura_flow",
            "model.channels_last=true",
            "objective=supervised",
            f"data.images.path={write_pictures(tmp_path / 'pictures')}",
            "sampler.num_inference_steps=2",
            "sampler.guidance_scale=2.0",
            f"sampler.height={PIXELS}",
            f"sampler.width={PIXELS}",
            "optimizer.lr=0.01",
            "optimizer.warmup_steps=0",
            "training.ema_decay=null",
            "training.max_steps=2",
            "training.micro_batch_size=2",
            "training.tensorboard=false",
            "training.compile=regional",
            "validation.num_images=2",
            "validation.loss_images=4",
        ]
    )
    rows = read_metrics(RunFolder(tmp_path / "run"))
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[2]["validation/loss"] != rows[0]["validation/loss"]
    assert {path.name for path in (tmp_path / "run" / "export").iterdir()} == {
        ".sfumato.json",
        "pipeline",
        "lora",
    }
    assert (tmp_path / "run" / "export.json").read_text().count("the same image") == 2
    assert len(list((tmp_path / "run" / "samples" / "step-000002").glob("*.png"))) >= 2
    assert sorted(compiled) == [
        *["AuraFlowJointTransformerBlock"] * 2,
        *["AuraFlowSingleTransformerBlock"] * 2,
    ]


def test_its_blocks_are_sharded_before_the_network(folder: Path):
    model = load(folder)
    network = model.network
    blocks = [*network.joint_transformer_blocks, *network.single_transformer_blocks]
    assert len(blocks) == 4
    assert model.shards() == [*blocks, network]
    full = load(folder, trainable="full")
    policy, reference = full.networks()["policy"], full.networks()["reference"]
    assert full.shards() == [*full.blocks_of(policy), policy, *full.blocks_of(reference), reference]


def test_its_convolutions_are_laid_out(folder: Path):
    model = load(folder)
    arrange(model, TrainConfig(model=ModelConfig(channels_last=True)))
    kernels = [p for p in model.pipeline.vae.parameters() if p.ndim == 4 and p.shape[-1] > 1]
    assert len(kernels) > 10
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_it_runs_without_weights_as_with_them(folder: Path, trainable: str):
    """Parameters, shapes and the network's output: what `sfumato plan` asks a family for."""
    config = ModelConfig(str(folder), trainable=trainable)
    model, loaded = load_on_meta(*find_family(config), config), load(folder, trainable=trainable)
    assert all(p.is_meta for network in model.networks().values() for p in network.parameters())
    assert shapes(model.trained) == shapes(loaded.trained)
    assert shapes(model.network) == shapes(loaded.network)
    cond, real = model.blank_prompts(2), loaded.encode_prompts(["a red star", "x"])
    assert {n: t.shape for n, t in cond.tensors.items()} == {
        n: t.shape for n, t in real.tensors.items()
    }
    x_t = torch.empty(2, *model.latent_shape(PIXELS, PIXELS), device="meta")
    raw = model.predict(model.network, x_t, torch.ones(2, device="meta"), cond, 1.0)
    assert raw.shape == x_t.shape
    assert raw.is_meta
    images = torch.zeros(1, 3, PIXELS, PIXELS)
    moments = model.encode_moments(images.to("meta"))
    assert moments.shape == loaded.encode_moments(images).shape


def test_it_is_planned(folder: Path):
    settings = ["objective=supervised", "gpu=cpu", f"model.pretrained={folder}"]
    settings += [f"sampler.height={PIXELS}", f"sampler.width={PIXELS}", "model.trainable=full"]
    plan = make_plan(compose_command("plan", settings)[0])
    model = load(folder, trainable="full")
    assert plan.parameters["trained"] == sum(p.numel() for p in model.trainable().values())
    latents = torch.zeros(1, *model.latent_shape(PIXELS, PIXELS))
    denoise = model.denoiser(model.encode_prompts(["a red disc"]))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        denoise(latents, torch.full((1,), 0.5))
    assert plan.forward_flops == counter.get_total_flops() > 1e6


def shapes(module: nn.Module) -> dict[str, tuple[torch.Size, bool]]:
    return {name: (p.shape, p.requires_grad) for name, p in module.named_parameters()}


# --- No fifth place


EXEMPT = "models/origins"  # its networks are those of Stable Diffusion's original code


def family_files() -> dict[str, str]:
    """Return the families' files by module, and the classes in them."""
    families = [family for family in FAMILIES.values() if family is not AuraFlow]
    return {family.__module__: family.__name__ for family in families}


def mentions(tree: ast.Module, names: set[str], modules: set[str]) -> Iterator[str]:
    """Yield a family's names and modules that a file mentions, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in names:
            yield f"{node.lineno}: {node.value!r}"
        elif isinstance(node, ast.Name) and node.id in names:
            yield f"{node.lineno}: {node.id}"
        elif isinstance(node, ast.Attribute) and node.attr in names:
            yield f"{node.lineno}: {node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            yield f"{node.lineno}: imports {node.module}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if alias.name.rpartition(".")[2] in names or alias.name in modules:
                    yield f"{node.lineno}: imports {alias.name}"


def test_no_other_file_asks_for_a_family():
    files = family_files()
    names = {*FAMILIES, *files.values(), *(family.pipeline_name for family in FAMILIES.values())}
    names |= {kind for family in FAMILIES.values() for kind in family.repeated}
    names |= network_classes()
    own = {PACKAGE.parent / Path(*module.split(".")).with_suffix(".py") for module in files}
    own.add(Path(registry.__file__))
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(PACKAGE).as_posix()
        if path not in own and not where.startswith(EXEMPT):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [f"{where}:{each}" for each in mentions(tree, names, set(files))]
    assert not found, "ask the model's contract instead:\n" + "\n".join(found)


def network_classes() -> set[str]:
    """Return the classes of diffusers that predict in the families' pipelines."""
    return {
        "UNet2DConditionModel",
        "SD3Transformer2DModel",
        "FluxTransformer2DModel",
        "QwenImageTransformer2DModel",
    }


@pytest.mark.parametrize(
    "text",
    [
        "from sfumato.models.flux import pack",
        "import sfumato.models.qwen_image",
        "from sfumato.models import flux",
        "if name == 'flux': pass",
        "if type(network).__name__ == 'FluxTransformerBlock': pass",
        "if isinstance(model, models.StableDiffusion3): pass",
        "if family is Flux: pass",
    ],
)
def test_a_mention_is_seen(text: str):
    names = {"flux", "Flux", "StableDiffusion3", "FluxTransformerBlock"}
    modules = {"sfumato.models.flux", "sfumato.models.qwen_image"}
    assert len(list(mentions(ast.parse(text), names, modules))) == 1


def test_outside_models_no_file_asks_for_a_class_of_model():
    """All that training needs is in the contract."""
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(PACKAGE).as_posix()
        if not where.startswith(("models/", "planning/")):  # planning asks one for its contract
            assert "PipelineModel" not in path.read_text(encoding="utf-8"), where
    assert {"networks", "shards"} <= TextToImageModel.__abstractmethods__
