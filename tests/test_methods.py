"""Every published method on every family; killed and resumed; on two processes as on one."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import PIXELS, WRITERS, write_pictures
from nightly import nightly_but
from runs import assert_same_state, command, in_child, in_processes, kill, metrics, on_call, start
from test_collected import Alone, collect
from test_distributed import SAME, flat, state_at
from toy import use_toy
from vectors import Curved, VectorModel, differentiate

from sfumato.compose import compose_train
from sfumato.config import CONF, LoraConfig, ModelConfig, TrainConfig
from sfumato.data.images import open_images
from sfumato.data.stream import Pair
from sfumato.diffusion.process import RectifiedFlow
from sfumato.diffusion.randomness import Rng
from sfumato.models.model import TextToImageModel
from sfumato.models.registry import load_model
from sfumato.objectives.collected import CollectedObjective
from sfumato.rewards.simple import ColorReward
from sfumato.run.build import build_objective
from sfumato.training.checkpoint import read_checkpoint, write_checkpoint
from sfumato.training.ema import Shadow

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*_reward.yaml"))
COLLECTED = ("ddpo", "flow_grpo", "nft", "awm")
STEPS = 6
PROMPTS = ["a red ring", "a star"]


def composed(method: str, *overrides: str, recipe: str = "sd15_reward") -> TrainConfig:
    given = ["model.pretrained=M", "data.prompts=P", "reward.pretrained=R"]
    if recipe == "demo_reward":
        given = []
    given += ["data.images.path=I"] if method == "ddrl" else []
    return compose_train([f"recipe={recipe}", f"method={method}", *given, *overrides])[0]


# The tests below compose each method with sd15_reward too.
@pytest.mark.parametrize("recipe", nightly_but(["flux_reward"], RECIPES))
def test_each_method_goes_with_each_recipe(recipe: str) -> None:
    kinds = {method: composed(method, recipe=recipe).objective.kind for method in METHODS}
    names = {"draft", "direct", "adjoint_matching", "direct_align", "policy_gradient", "nft", "awm"}
    assert set(kinds.values()) == names


def test_the_method_of_the_seeds_is_that_of_their_recipe() -> None:
    recipe = compose_train(
        ["recipe=sd15_draft_plus", "model.pretrained=M", "data.prompts=P", "reward.pretrained=R"]
    )[0]
    again = composed("draft_plus", "name=sd15_draft_plus")
    assert again == recipe


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Mapping[tuple[str, str], TextToImageModel]]:
    found: dict[tuple[str, str], TextToImageModel] = {}
    for name, write in WRITERS.items():
        folder = tmp_path_factory.mktemp("families") / name
        write(folder)
        for trainable in ("lora", "full"):
            torch.manual_seed(0)
            config = ModelConfig(pretrained=str(folder), lora=LoraConfig(rank=2))
            found[name, trainable] = load_model(replace(config, trainable=trainable))
    yield found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "files")


WAYS = [*((method, "lora") for method in METHODS), *((method, "full") for method in COLLECTED)]
CURVED = ("stable_diffusion", "stable_diffusion_xl")  # a noise schedule; the others are flows
FLOWS = tuple(family for family in WRITERS if family not in CURVED)


# Each method on one family of either kind, and each family with several methods.
@pytest.mark.parametrize(
    ("family", "method", "trainable"),
    nightly_but(
        [(kind[i % len(kind)], *way) for i, way in enumerate(WAYS) for kind in (CURVED, FLOWS)],
        [(family, *way) for family in WRITERS for way in WAYS],
    ),
)
def test_each_method_on_each_family(
    models: Mapping[tuple[str, str], TextToImageModel],
    pictures: Path,
    family: str,
    method: str,
    trainable: str,
) -> None:
    """All gradients are finite and some are not zero; a KL is 0 at the start."""
    few = ["objective.images_per_prompt=2", "training.global_batch_size=2"]
    few += ["objective.statistics=group"]
    size = [f"sampler.height={PIXELS}", f"sampler.width={PIXELS}", "sampler.guidance_scale=2"]
    size += ["sampler.training_steps=null"]
    size += few if method in COLLECTED else ["objective.clamp_images=false"]
    config = composed(method, f"sampler.num_inference_steps={STEPS}", *size)
    model = models[family, trainable]
    objective = build_objective(config, ColorReward("red"))
    rows: list[Any] = list(PROMPTS)
    if config.objective.reads_images:
        config.data.images.path = str(pictures)
        samples = open_images(config.data.images, height=PIXELS, width=PIXELS, divisor=8, seed=0)
        rows = [Pair(*pair) for pair in zip(PROMPTS, samples.next(2, 0, 2), strict=True)]
    parameters = model.trainable()
    for parameter in parameters.values():
        parameter.grad = None
    if method in COLLECTED:
        if objective.needs_old:
            objective.old = Shadow(parameters)
            assert objective.old.shadow.keys() == parameters.keys()  # what is trained, no more
        with torch.no_grad():
            rows = list(objective.collect(model, rows, Rng([3, 4]), Alone()).rows)
    total = None
    for piece in objective.pieces(model, rows, Rng([1, 2])):
        loss = piece()
        loss.value.backward()
        total = loss if total is None else total + loss
    assert total is not None
    gradients = [parameter.grad for parameter in parameters.values()]
    assert all(grad is not None and grad.isfinite().all() for grad in gradients)
    assert max(float(grad.abs().max()) for grad in gradients if grad is not None) > 0
    assert all(value.isfinite().all() for value in total.metrics.values())
    has_kl = method in ("draft_plus", "rsm", "flow_grpo", "nft", "awm")
    assert ("kl" in total.metrics) == has_kl
    assert not has_kl or total.metrics["kl"] == 0


@pytest.mark.parametrize(
    ("family", "method"),
    nightly_but(
        [*((family, "rsm") for family in WRITERS), ("stable_diffusion", "flowbp_lagrange")],
        [(family, method) for family in WRITERS for method in ("flowbp_lagrange", "rsm")],
    ),
)
def test_steps_in_one_call_are_steps_one_by_one_on_each_family(
    models: Mapping[tuple[str, str], TextToImageModel], family: str, method: str
) -> None:
    """With guidance and prompts of their own in each row; the KL's reference is stacked too."""
    size = [f"sampler.height={PIXELS}", f"sampler.width={PIXELS}", "sampler.guidance_scale=2"]
    size += [f"sampler.num_inference_steps={STEPS}", "objective.kl_coeff=1"]
    found: list[torch.Tensor] = []
    for stacked in (1, 3):
        config = composed(method, *size, f"objective.stacked_steps={stacked}")
        objective, model = build_objective(config, ColorReward("red")), models[family, "lora"]
        parameters = model.trainable().values()
        for parameter in parameters:
            parameter.grad = None
        pieces = objective.pieces(model, PROMPTS, Rng([1, 2]))
        for piece in pieces:
            piece().value.backward()
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert float(found[0].norm()) > 0
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 1e-4


ROLLOUT = 10
PAGE = (CONF.parents[1] / "docs" / "which_method.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("## What a step costs")[2].partition("\n## ")[0]
COSTS = re.findall(r"^\| `(\w+)`.*? \| (.+?) \| (.+?) \| .+ \|$", TABLE, flags=re.M)


@pytest.mark.parametrize(("method", "without", "with_gradient"), COSTS)
def test_a_step_calls_the_network_as_often_as_the_page_says(
    method: str, without: str, with_gradient: str
) -> None:
    """Of ten sampling steps; where a number is drawn, within the range that the page gives."""
    size = [f"sampler.num_inference_steps={ROLLOUT}", "sampler.guidance_scale=1"]
    if method in COLLECTED:
        size += [f"sampler.training_steps={ROLLOUT}", "objective.images_per_prompt=2"]
        size += ["objective.statistics=group"]
    config = composed(method, *size)
    model = VectorModel(RectifiedFlow(), "flow")
    is_drawn = "K" in without or len(set(bounds(with_gradient.rpartition(", ")[2]))) > 1
    for seed in range(20 if is_drawn else 2):
        model.calls.clear()
        objective = build_objective(config, Curved())
        rows = collect(objective, model).rows if isinstance(objective, CollectedObjective) else None
        differentiate(objective, model, seed, rows)
        found = Counter((role, grad) for role, _, grad in model.calls)
        rollout, learning = found["policy", False], found["policy", True]
        inputs = found["reference", True] if method == "adjoint_matching" else 0
        frozen = found.total() - rollout - learning - inputs
        if "K" in without:
            assert (rollout, without) == (ROLLOUT - learning, f"{ROLLOUT} - K")
        else:
            low, high = bounds(without.partition(",")[0])
            assert low <= rollout + frozen <= high
        first, _, second = with_gradient.rpartition(", ")
        low, high = bounds(second)
        assert low <= learning <= high
        if inputs:
            assert inputs <= bounds(first)[1]


def bounds(text: str) -> tuple[int, int]:
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    return numbers[0], numbers[-1]


def test_the_page_has_what_each_method_costs() -> None:
    kinds = {method: composed(method).objective.kind for method in METHODS}
    assert sorted({*(method for method, _, _ in COSTS), "ddrl"}) == sorted(kinds)


def run_of(folder: Path, name: str, method: str, *overrides: str) -> list[str]:
    extra = [f"method={method}", f"sampler.num_inference_steps={STEPS}", "optimizer.eps=1e-4"]
    if method == "ddrl":
        images = folder / "images"
        if not images.exists():
            write_pictures(images, pixels=4)
        extra += [f"data.images.path={images}", "data.images.workers=0"]
    own = [f"objective.kl_coeff={0.5 if method in ('draft_plus', 'rsm') else 0}"]
    if method in COLLECTED:
        own = ["objective.images_per_prompt=2", "objective.batches=2", "objective.inner_epochs=2"]
        own += ["reward=color", "sampler.training_steps=null", "optimizer.lr=1e-3"]
    if method in ("adjoint_matching", "direct_align"):
        own = []
    found = command(folder, name, *extra, *overrides)
    return [text for text in found if not text.startswith("objective.kl_coeff")] + own


# Each class of objectives, with and without what it draws; those that collect are killed below.
KILLED = ["adjoint_matching", "alignprop", "ddrl", "direct_align", "draft_plus", "drtune"]
KILLED += ["flowbp_bridge", "leapalign"]


@pytest.mark.parametrize("method", nightly_but(KILLED, METHODS))
def test_a_killed_run_goes_on_bitwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    use_toy(monkeypatch)
    small = ("training.max_steps=4", "validation.every_steps=0")
    start(run_of(tmp_path, "whole", method, *small))
    again = run_of(tmp_path, "run", method, *small)

    def die() -> None:
        on_call(4, kill, "take_step")
        start(again)

    assert in_child(die) == -9
    start(again)
    assert_same_state(tmp_path / "run", tmp_path / "whole")


@pytest.fixture(scope="module")
def halted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of NFT that ended inside a collection."""
    folder = tmp_path_factory.mktemp("halted")
    with pytest.MonkeyPatch.context() as patch:
        use_toy(patch)
        start(run_of(folder, "run", "nft", "training.max_steps=3", "validation.every_steps=0"))
    return folder


def drop(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda there: there.pop(name)


def put(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda there: there.update({name: value})


DAMAGES: Mapping[str, tuple[Callable[[dict[str, Any]], object] | None, Any, str]] = {
    "no beginning": (drop("began"), None, "began"),
    "a text as beginning": (put("began", "0"), None, "began = '0'"),
    "a later beginning": (put("began", 9), None, "from step 9 on"),
    "an earlier beginning": (put("began", -1), None, "began = -1"),
    "fewer prompts": (put("prompts", ["a", "b"]), None, "2 prompts"),
    "prompts are a text": (put("prompts", "abcdefgh"), None, "prompts"),
    "metrics are texts": (put("metrics", {"reward": "x"}), None, "metrics"),
    "one row less": (None, lambda t: t.update({"collection/x0": t["collection/x0"][1:]}), "x0"),
    "a flat image": (
        None,
        lambda t: t.update({"collection/x0": t["collection/kept"].clone()}),
        "x0",
    ),
    "no advantages": (None, lambda t: t.pop("collection/advantage"), "rows of"),
    "another tensor": (
        None,
        lambda t: t.update({"collection/a": t["collection/kept"].clone()}),
        "'a'",
    ),
    "no old policy": (None, lambda t: t.pop("old/out.bias"), "old policy"),
    "a wide old policy": (None, lambda t: t.update({"old/out.bias": torch.ones(3)}), "old policy"),
}


@pytest.mark.parametrize(("state", "tensors", "said"), DAMAGES.values(), ids=list(DAMAGES))
def test_a_collection_that_does_not_fit_is_refused(
    halted: Path, monkeypatch: pytest.MonkeyPatch, state: Any, tensors: Any, said: str
) -> None:
    """The manifest fits: somebody wrote this checkpoint so."""
    use_toy(monkeypatch)
    path = halted / "run" / "checkpoints" / "step-000003"
    before = {file: file.read_bytes() for file in path.iterdir()}
    snapshot = read_checkpoint(path)
    collection, objective = dict(snapshot.state["collection"]), dict(snapshot.objective)
    if state is not None:
        state(collection)
    if tensors is not None:
        tensors(objective)
    changed = {**snapshot.state, "collection": collection}
    write_checkpoint(path.parent, replace(snapshot, state=changed, objective=objective))
    try:
        with pytest.raises(ValueError, match=re.escape(said)):
            start(run_of(halted, "run", "nft", "training.max_steps=4", "validation.every_steps=0"))
    finally:
        for file, content in before.items():
            file.write_bytes(content)


def assert_same_run(found: Path, expected: Path, steps: int) -> None:
    ours, theirs = state_at(found, steps), state_at(expected, steps)
    for part in ("weights", "ema"):
        names = list(theirs.weights)
        a, b = (flat(vars(state)[part], names) for state in (ours, theirs))
        first = flat(state_at(expected, 2).weights, names)
        assert (b - first).norm() > 0
        assert (a - b).norm() <= 10 * SAME * (b - first).norm(), part
    for left, right in zip(metrics(found), metrics(expected), strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-4)


# The other methods with a reward's gradient, and each class; a group across processes is below.
TOGETHER = ["adjoint_matching", "ddrl", "direct_align", "draft_k", "draft_lv", "flowbp_lagrange"]
TOGETHER += ["flowbp_sparse", "refl", "rsm"]


@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        *nightly_but(
            [(method, "ddp") for method in TOGETHER], [(method, "ddp") for method in METHODS]
        ),
        ("ddpo", "fsdp"),
    ],
)
def test_two_processes_are_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, strategy: str
) -> None:
    use_toy(monkeypatch)
    small = ("training.max_steps=4", "validation.every_steps=0")
    start(run_of(tmp_path, "one", method, *small))
    two = run_of(tmp_path, "two", method, *small, f"training.strategy={strategy}")
    in_processes(2, lambda _: start(two))
    assert_same_run(tmp_path / "two", tmp_path / "one", 4)


@pytest.mark.parametrize("method", nightly_but(["ddpo", "nft"], COLLECTED))
def test_a_group_may_lie_across_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """One group of four images a step, on two processes; prompts of any script."""
    use_toy(monkeypatch)
    prompts = ["ein gr\u00fcner Stern", "\u8d64\u3044\u661f \U0001f31f", "e\u0301toile", "a star"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    small = ("training.max_steps=4", "validation.every_steps=0")
    for name, processes in (("one", 1), ("two", 2)):
        given = run_of(tmp_path, name, method, *small)
        given = [text.replace("images_per_prompt=2", "images_per_prompt=4") for text in given]
        in_processes(processes, lambda _, given=given: start(given))
    assert_same_run(tmp_path / "two", tmp_path / "one", 4)
    collection = state_at(tmp_path / "two", 2).state["collection"]
    assert [len(set(collection["prompts"][i : i + 4])) for i in (0, 4)] == [1, 1]
    assert len(set(collection["prompts"])) == 2
    assert set(collection["prompts"]) <= {*prompts}


@pytest.mark.parametrize("shared", [False, True])
def test_a_group_may_share_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """The first states of a group are equal, the later ones are not; two processes are one."""
    use_toy(monkeypatch)
    small = ("training.max_steps=1", "validation.every_steps=0", f"objective.shared_start={shared}")
    for name, processes in (("one", 1), ("two", 2)):
        given = run_of(tmp_path, name, "ddpo", *small)
        given = [text.replace("images_per_prompt=2", "images_per_prompt=4") for text in given]
        in_processes(processes, lambda _, given=given: start(given))
    found = (state_at(tmp_path / name, 1).objective for name in ("one", "two"))
    one, two = (next(v for k, v in each.items() if k.endswith("states")) for each in found)
    assert torch.equal(one, two)
    for group in one.split(4):
        starts, ends = ([row[i].tolist() for row in group] for i in (0, -1))
        assert all(a == b for a, b in pairwise(starts)) is shared
        assert not any(a == b for a, b in pairwise(ends))
    assert not torch.equal(one[0, 0], one[4, 0])


MOMENTS = [
    (6, "CollectedObjective.rehearse", 1),  # inside the second collection
    (4, "take_step", 2),  # in the second inner epoch of the first; goes on in two processes
    (6, "write_checkpoint", 1),
]


# Each method, each moment, and the old policy of NFT at two.
@pytest.mark.parametrize(
    ("number", "moment", "processes", "method"),
    nightly_but(
        [
            (*MOMENTS[0], "flow_grpo"),
            (*MOMENTS[1], "ddpo"),
            (*MOMENTS[1], "nft"),
            (*MOMENTS[2], "awm"),
            (*MOMENTS[2], "nft"),
        ],
        [(*moment, method) for moment in MOMENTS for method in COLLECTED],
    ),
)
def test_a_collection_survives(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    number: int,
    moment: str,
    processes: int,
) -> None:
    """Checkpoints of every step; one process goes on bitwise, two up to rounding."""
    use_toy(monkeypatch)
    small = ("training.max_steps=7", "validation.every_steps=0", "objective.rollout_batch_size=2")
    small = (*small, "training.checkpoint_every_steps=1", "training.keep_checkpoints=null")
    start(run_of(tmp_path, "whole", method, *small))
    again = run_of(tmp_path, "run", method, *small)

    def die() -> None:
        on_call(number, kill, moment)
        start(again)

    assert in_child(die) == -9
    if processes == 1:
        start(again)
        assert_same_state(tmp_path / "run", tmp_path / "whole")
    else:
        in_processes(processes, lambda _: start(again))
        assert_same_run(tmp_path / "run", tmp_path / "whole", 7)


SHARDED = ["adjoint_matching", "ddpo", "leapalign", "nft", "rsm"]


@pytest.mark.parametrize("method", nightly_but(["rsm"], SHARDED))
def test_a_sharded_transformer_is_a_whole_one(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, method: str
) -> None:
    """FSDP2, two processes: each piece has a forward and a backward of its own."""
    folder = tmp_path_factory.mktemp("sd3") / "model"
    WRITERS["stable_diffusion_3"](folder)
    small = (
        f"model.pretrained={folder}",
        "model.trainable=lora",
        "model.lora.rank=2",
        "training.max_steps=3",
        "validation.every_steps=0",
        "sampler.num_inference_steps=4",
    )
    start(run_of(tmp_path, "one", method, *small))
    two = run_of(tmp_path, "two", method, *small, "training.strategy=fsdp")
    in_processes(2, lambda _: start(two))
    assert_same_run(tmp_path / "two", tmp_path / "one", 3)
