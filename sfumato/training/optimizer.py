"""Optimisers of torch, of packages and of the user, and the schedule of learning rates."""

import importlib.util
import inspect
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Muon, Optimizer

from sfumato.config import OptimizerConfig
from sfumato.rewards.code import find_code, load_code, told

PACKAGES = {"adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt"}
NUMBER = "number:"  # before the name of a state that is no tensor, in a checkpoint
_OWN_SETTINGS = ("params", "lr", "betas", "eps", "weight_decay")


@final
class MuonWithAdamW(Optimizer):
    """Muon for matrices, AdamW for vectors, convolutions and tables of embeddings; one rate."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        tables: Collection[Tensor],
        adamw: Mapping[str, Any],
        **options: Any,
    ) -> None:
        super().__init__(params, {})
        matrices = [p for p in params if is_matrix(p, tables)]
        others = [p for p in params if not is_matrix(p, tables)]
        # Updates of AdamW's size, so that one learning rate serves both (arXiv 2502.16982).
        muon = {"weight_decay": adamw["weight_decay"], "adjust_lr_fn": "match_rms_adamw"}
        self.parts: list[Optimizer] = []
        if matrices:
            self.parts.append(Muon(matrices, **{"lr": adamw["lr"], **muon, **options}))
        if others:
            self.parts.append(AdamW(others, fused=True, **adamw))
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        for part in self.parts:
            part.state = self.state

    def step(self, closure: Any = None) -> Any:
        """Move all parameters."""
        for part in self.parts:
            part.step()


def build_optimizer(
    parameters: Sequence[nn.Parameter],
    config: OptimizerConfig,
    tables: Collection[Tensor] = (),
) -> Optimizer:
    """Return the optimiser over the parameters.

    Args:
        tables: of embeddings, which are matrices in their shape alone.

    Raises:
        ValueError: if a package is missing, or the optimiser does not take the options.
    """
    given: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    adam = {**given, "betas": tuple(config.betas), "eps": config.eps}
    match config.kind:
        case "adamw":
            kind, given = AdamW, {**adam, "fused": True}
        case "adamw_8bit" | "prodigy":
            kind, given = _class_of_package(config.kind), adam
        case "adafactor":
            kind = Adafactor
        case "sgd":
            kind = SGD
        case "muon":
            _refuse_options(Muon, config)
            return MuonWithAdamW(parameters, tables, adam, **config.options)
        case _:
            kind, given = _class_of_user(str(config.path)), {"lr": config.lr}
    _refuse_options(kind, config)
    return kind(parameters, **(given | config.options))


def _class_of_package(kind: str) -> type[Optimizer]:
    package = PACKAGES[kind]
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"optimizer.kind={kind} needs the package {package}: pip install 'sfumato[optimizers]'"
        )
    if kind == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit


def _class_of_user(place: str) -> type[Optimizer]:
    found = load_code(place)
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ValueError(f"optimizer.path={place!r} is no class of torch.optim.Optimizer; name one")
    return found


def _refuse_options(kind: type[Optimizer], config: OptimizerConfig) -> None:
    """Refuse options that the class does not take, and those that are settings of their own."""
    own = _OWN_SETTINGS[:2] if config.kind == "own" else _OWN_SETTINGS
    taken = inspect.signature(kind).parameters
    free = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values())
    for name in config.options:
        if name in own:
            raise ValueError(f"optimizer.options.{name}: give optimizer.{name} in place of it")
        if name not in taken and not free:
            known = ", ".join(each for each in taken if each not in own)
            raise ValueError(
                f"optimizer.options.{name} is unknown to {kind.__name__}; it takes {known}"
            )


def try_optimizer(config: OptimizerConfig, device: torch.device | str = "cpu") -> None:
    """Take a step with a matrix and a vector, so that a mistake is told before a model is loaded.

    Raises:
        ValueError: saying what is wrong, with file and line in the user's own code.
    """
    parameters = {str(n): nn.Parameter(torch.ones([3] * n, device=device)) for n in (1, 2)}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer = build_optimizer(list(parameters.values()), config)
        set_rate(optimizer, config.lr)
        optimizer.step()
        state_of(optimizer, parameters)
    except ValueError as error:
        raise ValueError(f"optimizer.kind={config.kind}: {error}") from error
    except (Exception, SystemExit) as error:
        file = find_code(str(config.path))[0] if config.kind == "own" else None
        fault = f"{type(error).__name__}: {error}" if file is None else told(error, file)
        raise ValueError(f"optimizer.kind={config.kind} cannot take a step: {fault}") from error


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give all groups of parameters this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def state_of(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the state of all parameters by KEY/NAME, not copied; numbers as tensors.

    Raises:
        ValueError: if the state holds something else, which no checkpoint could.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                found[f"{key}/{name}"] = value
            elif isinstance(value, float | int):
                dtype = torch.float64 if isinstance(value, float) else None
                found[f"{NUMBER}{key}/{name}"] = torch.tensor(value, dtype=dtype)
            else:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as state {key!r}; "
                    "a checkpoint holds tensors and numbers"
                )
    return found


def numbers_of(optimizer: Optimizer) -> list[dict[str, float]]:
    """Return the numbers of each group of parameters, such as Prodigy's estimates; no rates."""
    return [
        {k: v for k, v in group.items() if k != "lr" and isinstance(v, float | int)}
        for group in optimizer.param_groups
    ]


def tables_of(module: nn.Module) -> set[Tensor]:
    """Return the tables of embeddings, which Muon does not move."""
    return {each.weight for each in module.modules() if isinstance(each, nn.Embedding)}


def is_matrix(parameter: Tensor, tables: Collection[Tensor]) -> bool:
    """Say whether Muon moves a parameter."""
    return parameter.ndim == 2 and all(parameter is not each for each in tables)


def state_bytes(
    parameters: Iterable[Tensor], config: OptimizerConfig, tables: Collection[Tensor] = ()
) -> int:
    """Return the bytes of the optimiser's state, without what does not grow with a parameter."""
    options, total = config.options, 0
    for parameter in parameters:
        size, shape = parameter.numel(), parameter.shape
        match config.kind:
            case "adafactor" if len(shape) > 1:
                total += 4 * (size // shape[-1] + size // shape[-2])
            case "adafactor":
                total += 4 * size
            case "sgd":
                total += 4 * size if options.get("momentum") else 0
            case "muon":
                total += 4 * size if is_matrix(parameter, tables) else 8 * size
            case "prodigy":
                sliced = -(-size // options.get("slice_p", 1))
                total += 4 * (2 * sliced + size * (2 if config.betas[0] else 1))
            case "adamw_8bit" if size >= options.get("min_8bit_size", 4096):
                total += 2 * size + 8 * -(-size // 256)  # and a scale of each 256
            case _:
                total += 4 * size * (3 if options.get("amsgrad") else 2)
    return total


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Return the rate of optimiser step `step`, counted from 0.

    It rises linearly over `warmup_steps`, then stays (`constant`) or falls to 0 at `max_steps`
    (`linear`, `cosine`). It depends only on the step, so nothing needs to be saved.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    match config.schedule:
        case "linear":
            return config.lr * (1 - progress)
        case "cosine":
            return config.lr * (1 + math.cos(math.pi * progress)) / 2
    return config.lr
