"""Small training runs for tests: of a toy model, here, in a process to be killed, or in two."""

import copy
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, final

import pytest
import torch
from jaxtyping import Float
from safetensors.torch import save_model
from torch import Tensor, nn

from sfumato.cli import main
from sfumato.compose import compose_train
from sfumato.config import ModelConfig
from sfumato.diffusion.guidance import CfgGradient, classifier_free
from sfumato.diffusion.process import Prediction, RectifiedFlow, Time
from sfumato.diffusion.randomness import Rng, derive
from sfumato.diffusion.sampling import Denoiser
from sfumato.models.model import Conditioning, Role, TextToImageModel
from sfumato.training import export, run
from sfumato.training.checkpoint import Snapshot, list_checkpoints, read_checkpoint
from sfumato.training.distribution import Distribution
from sfumato.training.loop import Outcome

COLORS, SHAPES = ("red", "green", "blue"), ("ring", "star")
PROMPTS = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
TIMINGS = {"images_per_second", "seconds_per_step"}
CHILD_SECONDS = 300  # a child that hangs is ended

BASE = (
    "reward=color",
    "sampler.num_inference_steps=3",
    "sampler.guidance_scale=2.0",
    "objective.kl_coeff=0.5",
    "optimizer.lr=0.01",
    "optimizer.warmup_steps=2",
    "training.micro_batch_size=2",
    "training.global_batch_size=4",
    "training.max_steps=6",
    "training.checkpoint_every_steps=2",
    "training.tensorboard=false",
    "validation.num_images=3",
    "validation.every_steps=3",
    "verify=false",
)


class ToyNetwork(nn.Module):
    """Two layers over the flattened latents, the prompt and the time."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(3 * 4 * 4 + 8 + 1, 16)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(16, 3 * 4 * 4)

    def forward(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        rows = torch.cat([x.flatten(1), states, t.expand(len(x), 1)], dim=1)
        return self.out(self.dropout(torch.tanh(self.hidden(rows))))


@final
class ToyModel(TextToImageModel):
    """The contract in its smallest form; weights come from torch's global stream, as LoRA's do."""

    def __init__(self, config: ModelConfig) -> None:
        self.process = RectifiedFlow()
        self.network = ToyNetwork(config.lora.dropout)
        self.reference = copy.deepcopy(self.network).eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def to(self, device: torch.device) -> None:
        self.network.to(device)

    def image_size(self) -> tuple[int, int]:
        return 4, 4

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height, width

    def times(self, num_inference_steps: int, height: int, width: int) -> Sequence[float]:
        return torch.linspace(1, 0, num_inference_steps + 1).tolist()

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning({"states": Rng([derive(prompt) for prompt in prompts]).normal(8)})

    def encode_images(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        return images * 2

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        return latents / 8 + 0.5

    def denoiser(
        self,
        cond: Conditioning,
        *,
        uncond: Conditioning | None = None,
        guidance_scale: float = 1.0,
        role: Role = "policy",
        cfg_gradient: CfgGradient = "full",
    ) -> Denoiser:
        assert uncond is not None
        network = self.network if role == "policy" else self.reference
        states = torch.cat([uncond.tensors["states"], cond.tensors["states"]])

        def denoise(x_t: Tensor, t: Time) -> Prediction:
            with torch.set_grad_enabled(torch.is_grad_enabled() and role == "policy"):
                raw = network(torch.cat([x_t, x_t]), torch.tensor(t), states).float()
            raw = raw.unflatten(1, x_t.shape[1:])
            without, given = raw.chunk(2)
            raw = classifier_free(given, without, guidance_scale, cfg_gradient)
            return self.process.read("flow", raw, x_t, t)

        return denoise

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.network.named_parameters())

    def shards(self) -> Sequence[nn.Module]:
        return [self.network.hidden, self.network]

    def save_pipeline(self, folder: Path) -> None:
        save_model(self.network, str(folder / "network.safetensors"))

    def open_elsewhere(self, exported: Path, name: str) -> Any:
        raise ValueError("no other program knows the toy")

    def save_adapter(self, folder: Path) -> None:
        raise ValueError("the toy has no adapter")


def use_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training load the toy, whatever `model.pretrained` says."""
    monkeypatch.setattr(run, "find_family", lambda config: None)
    for module in (run, export):
        monkeypatch.setattr(module, "load_model", ToyModel)


def command(folder: Path, name: str, *overrides: str, model: Path | None = None) -> list[str]:
    """Return what stands after `sfumato train`, for a run folder/name; later overrides win."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("\n".join(PROMPTS) + "\n")
    model_overrides = [f"model.pretrained={model or 'toy'}"]
    if model is None:
        model_overrides.append("model.trainable=full")
    places = [f"runs_dir={folder}", f"name={name}", f"data.prompts={prompts}"]
    chosen = {text.split("=")[0]: text for text in [*BASE, *model_overrides, *places, *overrides]}
    return list(chosen.values())


def start(overrides: Sequence[str]) -> Outcome:
    """Run `sfumato train` with these overrides in this process."""
    config, settings = compose_train(overrides)
    distribution = Distribution(config.training)
    try:
        return run.train(config, settings, distribution)
    finally:
        distribution.close()


def start_cli(overrides: Sequence[str]) -> None:
    """Run `sfumato train` with these overrides through the command line, exit codes and all."""
    sys.argv = ["sfumato", "train", *overrides]
    main()


def in_child(action: Callable[[], object]) -> int:
    """Run in a forked process; return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(action), 0)[1])


def in_processes(world: int, action: Callable[[int], object]) -> None:
    """Run on `world` processes that see each other as torchrun's do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def on_rank(rank: int) -> Callable[[], object]:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

        def act() -> object:
            os.environ.update({key: str(value) for key, value in {**place, **address}.items()})
            return action(rank)

        return act

    children = [fork(on_rank(rank)) for rank in range(world)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * world


def fork(action: Callable[[], object]) -> int:
    """Start a process that runs `action` and ends; return its id."""
    child = os.fork()
    if child:
        return child
    signal.alarm(CHILD_SECONDS)
    code = 1
    try:
        torch.seed()  # a new process shares no random stream with the old one
        action()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:  # noqa: BLE001 - nothing may return into the parent's tests
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def on_call(number: int, act: Callable[[], object], name: str | None = None) -> list[int]:
    """Act once when a function of Sfumato is entered for the given time, from now on.

    Args:
        number: counts from 1.
        name: qualified name of the function; None counts the calls of all.

    Returns:
        The count so far, which goes on changing.
    """
    count = [0]

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event != "call" or not str(frame.f_globals.get("__name__")).startswith("sfumato."):
            return
        if name is None or frame.f_code.co_qualname == name:
            count[0] += 1
            if count[0] == number:
                act()

    sys.setprofile(watch)
    return count


def kill() -> None:
    """End this process at once, as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def last_state(folder: Path) -> Snapshot:
    """Return the newest checkpoint of a run folder."""
    return read_checkpoint(list_checkpoints(folder / "checkpoints")[-1])


def assert_same_state(found: Path, expected: Path) -> None:
    """Assert that two run folders end in bitwise equal states and exports, and equal metrics."""
    ours, theirs = last_state(found), last_state(expected)
    assert (ours.step, ours.state) == (theirs.step, theirs.state)
    for part in ("weights", "ema", "optimizer"):
        left, right = vars(ours)[part], vars(theirs)[part]
        assert left.keys() == right.keys()
        differing = [name for name in left if not torch.equal(left[name], right[name])]
        assert differing == [], f"{part} differ"
    assert metrics(found) == metrics(expected)
    assert exported(found) == exported(expected)


def metrics(folder: Path) -> list[dict[str, float]]:
    """Return the rows of metrics.jsonl without the columns of time; every line must be whole."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def exported(folder: Path) -> dict[str, bytes]:
    """Return the files of a run's export by name."""
    files = sorted(path for path in (folder / "export").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
