"""Optimisers of torch, of packages and of the user: steps, state, resume, shards, refusals."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import (
    assert_same_state,
    command,
    in_child,
    in_processes,
    kill,
    last_state,
    on_call,
    start,
)
from torch import nn
from torch.optim import SGD, Adafactor, AdamW, Muon
from toy import use_toy

from sfumato.compose import compose_train
from sfumato.config import OptimizerConfig
from sfumato.training import optimizer as optimizers
from sfumato.training.optimizer import build_optimizer, state_bytes, state_of, try_optimizer

KINDS: Mapping[str, list[str]] = {
    "adamw": ["optimizer.options={amsgrad: true}"],
    "adamw_8bit": ["optimizer.options={min_8bit_size: 64}"],
    "adafactor": ["optimizer.lr=0.03"],
    "muon": ["optimizer.options={momentum: 0.8}"],
    "prodigy": ["optimizer.lr=1", "optimizer.options={d0: 1e-3}"],
    "sgd": ["optimizer.options={momentum: 0.9, nesterov: true}"],
}
OWN = """
import torch

class Signs(torch.optim.Optimizer):
    def __init__(self, params, lr, keep=0.5):
        super().__init__(params, {"lr": lr, "keep": keep, "sum": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["mean"] = state.get("mean", torch.zeros_like(p))
                state["mean"].lerp_(p.grad, 1 - group["keep"])
                group["sum"] += 0.25
                p.add_(state["mean"].sign(), alpha=-group["lr"] / (state["count"] + group["sum"]))

class Listed(Signs):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["past"] = [1.0]

class Failing(Signs):
    def step(self, closure=None):
        raise RuntimeError("no step today")

def function(params): ...
"""


def settings_of(kind: str, folder: Path) -> list[str]:
    if kind == "own":
        (folder / "own.py").write_text(OWN)
        return [f"optimizer.path={folder}/own.py:Signs", "optimizer.options={keep: 0.25}"]
    if package := optimizers.PACKAGES.get(kind):
        pytest.importorskip(package)
    return KINDS[kind]


def weights() -> dict[str, nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    shapes = {"a": (6, 4), "b": (7,), "c": (3, 2, 3, 3), "table": (5, 4), "large": (80, 64)}
    return {k: nn.Parameter(torch.randn(shape, generator=rng)) for k, shape in shapes.items()}


def take_steps(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    rng = torch.Generator().manual_seed(1)
    for _ in range(4):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=rng)
        optimizer.step()


def reference(kind: str, given: Mapping[str, nn.Parameter], config: OptimizerConfig) -> Any:
    """Return the published optimiser, as its users call it."""
    both: Any = {"lr": config.lr, "weight_decay": config.weight_decay}
    adam: Any = {**both, "betas": (0.8, 0.99), "eps": 1e-6}
    match kind:
        case "adamw":
            return [AdamW(given.values(), amsgrad=True, fused=True, **adam)]
        case "adafactor":
            return [Adafactor(given.values(), **both)]
        case "sgd":
            return [SGD(given.values(), momentum=0.9, nesterov=True, **both)]
        case "muon":
            matrices = [given["a"], given["large"]]
            others = [given["b"], given["c"], given["table"]]
            muon = Muon(matrices, momentum=0.8, adjust_lr_fn="match_rms_adamw", **both)
            return [muon, AdamW(others, fused=True, **adam)]
        case "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit

            return [AdamW8bit(given.values(), min_8bit_size=64, **adam)]
    from prodigyopt import Prodigy

    return [Prodigy(given.values(), d0=1e-3, **adam)]


def config_of(kind: str) -> OptimizerConfig:
    options = {text.split("=")[0]: yaml.safe_load(text.split("=", 1)[1]) for text in KINDS[kind]}
    given = {key.removeprefix("optimizer."): value for key, value in options.items()}
    given["options"] = {
        k: float(v) if v == "1e-3" else v for k, v in given.get("options", {}).items()
    }
    config = OptimizerConfig(kind=kind, betas=[0.8, 0.99], eps=1e-6, weight_decay=0.1, lr=0.02)
    return OptimizerConfig(**{**vars(config), **given})


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_published_class(kind: str, tmp_path: Path) -> None:
    settings_of(kind, tmp_path)
    ours, theirs, config = weights(), weights(), config_of(kind)
    take_steps(build_optimizer(list(ours.values()), config, {ours["table"]}), ours)
    rng = torch.Generator().manual_seed(1)
    published = reference(kind, theirs, config)
    for _ in range(4):
        for parameter in theirs.values():
            parameter.grad = torch.randn(parameter.shape, generator=rng)
        for each in published:
            each.step()
    begun = weights()
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name
        assert not torch.equal(parameter, begun[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_plan_are_those_of_the_state(kind: str, tmp_path: Path) -> None:
    settings_of(kind, tmp_path)
    given, config = weights(), config_of(kind)
    tables = {given["table"]}
    optimizer = build_optimizer(list(given.values()), config, tables)
    take_steps(optimizer, given)
    state = state_of(optimizer, given)
    shared = ("step/", "number:", "qmap")  # a number each, and a table that all share
    held = {k: v for k, v in state.items() if not k.startswith(shared)}
    assert state_bytes(given.values(), config, tables) == sum(v.nbytes for v in held.values())


def test_8_bits_and_defaults_are_counted() -> None:
    large = [torch.empty(4096, device="meta")]
    assert state_bytes(large, OptimizerConfig()) == 8 * 4096
    assert state_bytes(large, OptimizerConfig(kind="adamw_8bit")) == 2 * 4096 + 8 * 16
    assert state_bytes(large, OptimizerConfig(kind="sgd")) == 0


@pytest.mark.parametrize("kind", [*KINDS, "own"])
@pytest.mark.parametrize("number", [2, 5])
def test_a_killed_run_ends_bitwise_as_one_that_was_not(
    kind: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_toy(monkeypatch)
    chosen = [f"optimizer.kind={kind}", *settings_of(kind, tmp_path)]
    start(command(tmp_path, "whole", *chosen))
    begun = last_state(tmp_path / "whole").optimizer
    assert begun
    again = command(tmp_path, "run", *chosen)

    def die() -> None:
        on_call(number, kill, "take_step")
        start(again)

    assert in_child(die) == -9
    assert in_child(lambda: start(again)) == 0
    assert_same_state(tmp_path / "run", tmp_path / "whole")


def test_a_run_from_before_there_was_a_choice_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_toy(monkeypatch)
    often = "validation.every_steps=2"
    start(command(tmp_path, "whole", often))
    start(command(tmp_path, "run", often, "training.max_steps=4"))
    file = tmp_path / "run" / "config.yaml"
    saved = yaml.safe_load(file.read_text())
    for key in ("kind", "path", "options"):
        del saved["optimizer"][key]
    file.write_text(yaml.safe_dump(saved))
    start(command(tmp_path, "run", often))
    assert_same_state(tmp_path / "run", tmp_path / "whole")
    assert "optimizer" not in last_state(tmp_path / "run").state


def test_another_optimiser_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_toy(monkeypatch)
    start(command(tmp_path, "run", "training.max_steps=2"))
    for setting, told in (
        ("optimizer.kind=sgd", "optimizer.kind: adamw -> sgd"),
        ("optimizer.options={amsgrad: true}", "optimizer.options.amsgrad: None -> True"),
    ):
        with pytest.raises(ValueError, match=told):
            start(command(tmp_path, "run", setting))


def test_changed_code_of_the_user_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_toy(monkeypatch)
    chosen = ["optimizer.kind=own", *settings_of("own", tmp_path)]
    start(command(tmp_path, "run", *chosen, "training.max_steps=2"))
    (tmp_path / "own.py").write_text(f"{OWN}\n# changed\n")
    with pytest.raises(ValueError, match=r"other files .* at optimizer\.path"):
        start(command(tmp_path, "run", *chosen))
    start(command(tmp_path, "run", *chosen, "allow_changed=[optimizer.path]"))
    assert last_state(tmp_path / "run").step == 6


# --- Shards


def test_sgd_on_shards_is_sgd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_toy(monkeypatch)
    chosen = ["optimizer.kind=sgd", "optimizer.options={momentum: 0.9}", "optimizer.lr=0.001"]
    start(command(tmp_path, "alone", *chosen))
    sharded = command(tmp_path, "run", *chosen, "training.strategy=fsdp")
    in_processes(2, lambda rank: start(sharded))
    ours, theirs = last_state(tmp_path / "run"), last_state(tmp_path / "alone")
    for part in ("weights", "optimizer"):
        for name, value in vars(theirs)[part].items():
            torch.testing.assert_close(vars(ours)[part][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp"])
@pytest.mark.parametrize("kind", ["adamw_8bit", "adafactor", "muon", "prodigy", "own"])
def test_what_needs_whole_weights_is_refused_on_shards(
    kind: str, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    chosen = [f"optimizer.kind={kind}", *settings_of(kind, tmp_path)]
    with pytest.raises(ValueError, match=f"optimizer.kind={kind} does not work with training.str"):
        compose_train(command(tmp_path, "run", *chosen, f"training.strategy={strategy}"))
    assert compose_train(command(tmp_path, "run", *chosen, "training.strategy=ddp"))


# --- Refusals


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            ["kind=adafactor", "betas=[0.5,0.9]"],
            "optimizer.betas=.* has no effect with optimizer.k",
        ),
        (["kind=sgd", "eps=1e-3"], "optimizer.eps=0.001 has no effect with optimizer.kind=sgd"),
        (["kind=own", "path=a.py:B", "weight_decay=1"], "optimizer.weight_decay=1.0 has no effect"),
        (["path=a.py:B"], "optimizer.path=a.py:B has no effect with optimizer.kind=adamw"),
        (["kind=adam"], "optimizer.kind='adam' is unknown; choose one of adamw, adamw_8bit"),
        (["kind=own"], "optimizer.kind=own needs optimizer.path=FILE.py:CLASS"),
        (["kind=own", "path=none.py:B"], "there is no file none.py"),
        (["kind=own", "path=nowhere.at.all:B"], "no module nowhere.at.all can be imported"),
        (["kind=prodigy"], "optimizer.lr=0.01 multiplies|set optimizer.lr=1"),
        (["kind=sgd", "options={betas: 1}"], "give optimizer.betas in place of it"),
        (["kind=muon", "options={lr: 1}"], "give optimizer.lr in place of it"),
        (["kind=sgd", "options={mass: 1}"], "options.mass is unknown to SGD; it takes momentum"),
        (["kind=muon", "options={ns: 1}"], "options.ns is unknown to Muon; it takes momentum"),
        (["kind=sgd", "options={momentum: -1}"], "kind=sgd: Invalid momentum value"),
        (["kind=adafactor", "options={d: -1}"], "kind=adafactor: Clipping threshold d"),
        (["kind=muon", "options={ns_steps: many}"], "kind=muon cannot take a step: TypeError"),
    ],
)
def test_a_mistake_is_told_before_anything_is_loaded(
    settings: list[str], told: str, tmp_path: Path
) -> None:
    lr = ["optimizer.lr=0.001"] if settings == ["kind=prodigy"] else []
    with pytest.raises(ValueError, match=told.replace("0.01", "0.001")):
        compose_train(command(tmp_path, "run", *lr, *(f"optimizer.{each}" for each in settings)))


def test_what_a_recipe_sets_in_vain_is_no_mistake(tmp_path: Path) -> None:
    config = compose_train(command(tmp_path, "run", "optimizer.kind=sgd"))[0].optimizer
    assert (config.kind, config.betas) == ("sgd", [0.9, 0.999])


def test_8_bits_want_plain_layouts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adamw_8bit reads weights in their plain layout"):
        compose_train(
            command(tmp_path, "run", "optimizer.kind=adamw_8bit", "model.channels_last=true")
        )


@pytest.mark.parametrize(("kind", "package"), optimizers.PACKAGES.items())
def test_a_missing_package_is_named(
    kind: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_toy(monkeypatch)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else found(name, *a)
    )
    chosen = command(tmp_path, "run", f"optimizer.kind={kind}", "optimizer.lr=1")
    with pytest.raises(
        ValueError, match=rf"package {package}: pip install 'sfumato\[optimizers\]'"
    ):
        start(chosen)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("function", {}, "is no class of torch.optim.Optimizer"),
        ("Nothing", {}, "has no Nothing"),
        ("Signs", {"other": 1}, "options.other is unknown to Signs; it takes keep"),
        ("Signs", {"keep": "half"}, r"own.py line 1\d raised TypeError"),
        ("Failing", {}, r"own.py line \d+ raised RuntimeError: no step today"),
        ("Listed", {}, "Listed keeps a list as state 'past'"),
    ],
)
def test_a_mistake_in_the_users_code_is_told_with_its_line(
    name: str, options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    config = OptimizerConfig(kind="own", path=f"{tmp_path}/own.py:{name}", options=options)
    with pytest.raises(ValueError, match=told):
        try_optimizer(config)
