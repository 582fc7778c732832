"""The pages of docs/ and CONTRIBUTING.md say what is so, and the example of one's own trains."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from torch import Tensor

from sfumato.catalog import CHOICES, choices_of, find_slot, known_keys, walk
from sfumato.compose import compose_train, register, to_settings
from sfumato.config import (
    COMMANDS,
    CONF,
    ColorRewardConfig,
    DraftConfig,
    LoraConfig,
    ModelConfig,
    OwnConfig,
    SamplerConfig,
    check_values,
)
from sfumato.diffusion.randomness import Rng
from sfumato.help import command_page, markdown, settings_of
from sfumato.models import registry
from sfumato.models.registry import find_family
from sfumato.models.stable_diffusion import StableDiffusion
from sfumato.objectives.draft import Draft
from sfumato.overrides import rewritten
from sfumato.rewards.build import build_reward
from sfumato.training.folder import RunFolder
from sfumato.training.tracking import read_metrics

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "write_your_own.py"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
}
TABLES = [name for name in PAGES if "coming_from" in name]
QUICK = ["training.tensorboard=false", "validation.num_images=2", "validation.every_steps=0"]

# --- What the pages say


def fences(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.M | re.S)


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if link.startswith("http"):
            continue
        target, _, place = link.partition("#")
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), link
        if place:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.M)
            assert place in map(anchor, headings), link


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    named = re.findall(r"`((?:sfumato|tests|docs|examples|benchmarks)/[\w/.]+)`", prose(page))
    assert [name for name in named if not (ROOT / name).exists()] == []


def excerpts() -> Iterator[Any]:
    for page in PAGES:
        for number, block in enumerate(fences(page, "python")):
            if (found := re.match(r"# (\S+/\S+\.py)\n", block)) is not None:
                yield pytest.param(found[1], block[found.end() :], id=f"{page}-{number}")


@pytest.mark.parametrize(("file", "block"), excerpts())
def test_an_excerpt_is_what_the_file_says(file: str, block: str) -> None:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    for part in re.split(r"^ *\.\.\.\n", block, flags=re.M):
        wanted = part.splitlines()
        assert any(lines[i : i + len(wanted)] == wanted for i in range(len(lines))), part


def commands() -> list[Any]:
    """Return the commands of the pages, in bare code blocks and in the text, split into words."""
    found = []
    for page in PAGES:
        blocks = "".join(fences(page, "")).replace("\\\n", " ").splitlines()
        inline = [text.replace("\n", " ") for text in re.findall(r"`(sfumato [^`]+)`", prose(page))]
        for line in [*blocks, *inline]:
            starts = ("sfumato ", "torchrun ", "accelerate ", "python examples")
            if line.startswith(starts) and "=" in line and "..." not in line:
                found.append(pytest.param(shlex.split(line), id=f"{page}: {line[:60]}"))
    return found


@pytest.mark.parametrize("words", commands())
def test_commands_compose(words: list[str], monkeypatch: pytest.MonkeyPatch, own: ModuleType):
    counts = [re.match(r"--n(?:proc_per_|proc-per-|)node[s]?=?(\d+)", word) for word in words]
    world = 1
    for count in counts:
        world *= int(count[1]) if count else 1
    monkeypatch.setenv("WORLD_SIZE", str(world))
    start = max(
        i for i, word in enumerate(words) if word in {"sfumato", "examples/write_your_own.py"}
    )
    overrides = [word for word in words[start + 1 :] if "=" in word]
    if words[start] != "sfumato":
        objective = compose_train([*own.DEFAULTS, *overrides])[0].objective
        assert isinstance(objective, OwnConfig)
        own.MyObjective(**objective.settings)
    elif words[start + 1] == "train":
        assert compose_train(overrides)
    else:
        register(words[start + 1])
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose(words[start + 1], rewritten(words[start + 1], overrides))
        if words[start + 1] == "evaluate":
            check_values(to_settings(config))


# --- What the tables say


def rows(page: str) -> list[list[str]]:
    """Return the cells of all rows that translate something."""
    lines = [line for line in PAGES[page].splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[1] != "Sfumato"]


def is_setting(text: str) -> bool:
    """Say whether a command takes this as [COMMAND] KEY[=VALUE]; the default command is train."""
    command, _, setting = text.rpartition(" ")
    key, _, value = setting.partition("=")
    if key == "recipe":
        return (CONF / "recipe" / f"{value}.yaml").exists()
    if key in CHOICES:
        return not value or value in CHOICES[key]
    command = command or "train"
    if value and (choices := find_slot(command, key).rule.choices):
        return value in choices
    sources = ("data.images.sources.", "data.shards.sources.")
    free = ("model.merge.", *sources, "reward.parts.", "validation.rewards.")
    free += ("objective.settings.", "guard.")
    return key in known_keys(command) or key.startswith(free)


DEFINED = {
    name
    for file in (ROOT / "sfumato").rglob("*.py")
    for name in re.findall(r"^ *(?:class|def) (\w+)", file.read_text(encoding="utf-8"), flags=re.M)
}


@pytest.mark.parametrize("page", TABLES)
def test_what_the_tables_translate_to_is_there(page: str) -> None:
    found = rows(page)
    assert len(found) > 50
    for theirs, ours, *note in found:
        assert len(note) == 1, theirs
        names = re.findall(r"`([^`]+)`", ours)
        assert names or ours == "none", theirs
        assert not names or note[0] or "Batch Size" in theirs, theirs
        for name in names:
            assert is_setting(name) or name in DEFINED, f"{theirs}: {ours}"


@pytest.mark.parametrize("page", PAGES)
def test_settings_that_the_text_names_are_known(page: str) -> None:
    text = prose(page)
    if page in TABLES:  # their column has keys of the same look
        lines = text.splitlines()
        text = "\n".join(
            " ".join(line.split("|")[2:]) if line[:1] == "|" else line for line in lines
        )
    groups = {key.partition(".")[0] for key in known_keys("train") if "." in key}
    tokens = re.findall(r"`([\w.]+(?:=[^`\s]*)?)`", text)
    keys = [token for token in tokens if token.partition(".")[0] in groups and "." in token]
    files = (".yaml", ".py", ".md")
    keys = [key for key in keys if not key.endswith(files)]
    assert [key for key in keys if not is_setting(key)] == []


# --- The page of settings


def test_the_page_of_settings_is_current() -> None:
    assert PAGES["docs/settings.md"] == markdown(), "run python -m sfumato.help > docs/settings.md"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_of_settings_is_complete(command: str) -> None:
    """Every key that composes has a setting with its type, default, choices, bounds, comment."""
    settings = {each.key: each for each in settings_of(command)}
    owners = {key.rpartition(".")[0] for key in known_keys(command)}
    groups = {e.key for e in walk(COMMANDS[command]) if choices_of(e.owner, e.item)}
    keys = {key for key in known_keys(command) if key not in owners or key in groups}
    assert {key for key in keys if not key.endswith("kind")} <= set(settings)
    assert all(each.kind and each.default for each in settings.values())


def test_a_setting_is_explained() -> None:
    page = command_page("train", "training.ema_decay")
    assert "number or null" in page and "0.9999" in page and "0 or more, less than 1" in page
    assert "(1 + n) / (10 + n)" in page
    assert "one of fp16" not in command_page("train", "training.precision")
    assert "one of no, bf16, fp16" in command_page("train", "training.precision")
    below = command_page("train", "model.lora").splitlines()
    assert len(below) == len(fields(LoraConfig))


# --- The example


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    import write_your_own  # pyright: ignore[reportMissingImports]

    return write_your_own


def train(own: ModuleType, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *QUICK, *overrides])
    own.main()


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    place = RunFolder(run).checkpoints / f"step-{step:06d}"
    files = ("weights", "ema", "optimizer")
    return {
        f"{file}/{n}": t
        for file in files
        for n, t in load_file(place / f"{file}.safetensors").items()
    }


def test_the_example_learns(own: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    train(own, monkeypatch, "training.max_steps=60", "validation.num_images=6")
    run = RunFolder(Path("runs/my_run"))
    found = read_metrics(run)
    assert found[60]["mse"] < 0.15 * found[1]["mse"]
    assert (run.export / "pipeline" / "network.safetensors").exists()

    (afterwards,) = [b for b in fences("docs/write_your_own.md", "python") if "generate" in b]
    scope: dict[str, Any] = {}
    exec(afterwards, scope)
    for image, prompt in zip(scope["images"], own.PROMPTS, strict=True):
        _, color, *_, place = prompt.split()
        channel, halves = list(own.COLORS).index(color), image.split(own.SIDE // 2, dim=2)
        light = torch.stack([half.mean((1, 2)) for half in halves])
        assert light.argmax() == 3 * list(own.PLACES).index(place) + channel, prompt
    assert len(list(tmp_path.glob("*.png"))) == len(own.PROMPTS)


def test_the_example_resumes_exactly(
    own: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    for name, stops in (("whole", (6,)), ("parts", (2, 5, 6))):
        for stop in stops:
            where = [f"runs_dir={tmp_path}", f"name={name}", f"training.max_steps={stop}"]
            train(own, monkeypatch, *where)
    whole, parts = (tensors(tmp_path / name, 6) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    losses = [
        [row.get("loss") for row in read_metrics(RunFolder(tmp_path / name))]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 7


def test_the_example_on_two_processes(
    own: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Two processes of one micro-batch take the steps of one process with two."""
    settings = [*QUICK, f"runs_dir={tmp_path}", "training.max_steps=6"]
    train(own, monkeypatch, *settings, "name=one")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*launch, str(EXAMPLE), *settings, "name=two"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '"processes": 2' in (tmp_path / "two" / "run.json").read_text()
    one, two = (tensors(tmp_path / name, 6) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=1e-4)


def test_a_known_model_learns_by_the_examples_objective(
    own: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sd_folder: Path
):
    side = ["sampler.height=32", "sampler.width=32", "sampler.num_inference_steps=2"]
    batch = ["training.micro_batch_size=2", "training.global_batch_size=2", "training.max_steps=2"]
    model = [f"model.pretrained={sd_folder}", "model.trainable=lora", "verify=true"]
    train(own, monkeypatch, f"runs_dir={tmp_path}", *model, *side, *batch)
    names = {place.name for place in (tmp_path / "my_run" / "export").iterdir()}
    assert names == {".sfumato.json", "lora", "pipeline"}


def test_the_examples_rows_are_functions_of_their_place(own: ModuleType) -> None:
    whole = own.MyData(16, 16, seed=3).next(8, 0, 8)
    parts, other = own.MyData(16, 16, seed=3), own.MyData(16, 16, seed=4)
    found = parts.next(4, 0, 4)
    state = parts.state()
    parts.next(4, 1, 2)
    parts.restore(state)
    found += [*parts.next(2, 0, 2), *parts.next(2, 0, 1)]
    for row, expected in zip(found, whole, strict=False):
        assert row.caption == expected.caption
        assert torch.equal(row.image, expected.image)
    assert [row.caption for row in other.next(8, 0, 8)] != [row.caption for row in whole]


def test_the_examples_objective_weighs_by_the_mask(own: ModuleType) -> None:
    torch.manual_seed(0)
    model = own.MyModel(ModelConfig(pretrained="scratch", trainable="full"))
    batch = own.MyData(16, 16, seed=0).next(4, 0, 4)
    rng = Rng([1, 2, 3, 4])
    noise, t = rng.normal(3, 16, 16), rng.uniform()
    with torch.no_grad():
        x0 = torch.stack([row.image for row in batch])
        scale = t.view(-1, 1, 1, 1)
        cond = model.encode_prompts([row.caption for row in batch])
        answer = model.trained((1 - scale) * x0 + scale * noise, t, cond.tensors["words"])
        error, inside = (answer - x0).square(), torch.stack([row.mask for row in batch]).bool()
    for background, expected in (
        (1.0, error.mean()),
        (
            0.0,
            torch.stack(
                [e[m.expand_as(e)].mean() for e, m in zip(error, inside, strict=True)]
            ).mean(),
        ),
    ):
        loss = own.MyObjective(background).loss(model, batch, Rng([1, 2, 3, 4]))
        torch.testing.assert_close(loss.value.detach(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(loss.metrics["mse"], error.mean(), atol=1e-5, rtol=1e-5)


def test_the_examples_model_learns_from_rewards_too(own: ModuleType) -> None:
    torch.manual_seed(0)
    model = own.MyModel(ModelConfig(pretrained="scratch", trainable="full"))
    sampler = SamplerConfig(num_inference_steps=3, height=own.SIDE, width=own.SIDE)
    config = DraftConfig(kl_coeff=1.0, truncation_steps=2, clamp_images=False)
    objective = Draft(config, sampler, build_reward(ColorRewardConfig()))
    first = objective.loss(model, own.PROMPTS, Rng(range(6)))
    first.value.backward()
    torch.optim.Adam(model.trainable().values(), lr=1e-3).step()
    second = objective.loss(model, own.PROMPTS, Rng(range(6)))
    assert first.metrics["kl"] == 0 < second.metrics["kl"]
    assert second.metrics["reward"] > first.metrics["reward"]


def test_a_family_of_ones_own_is_found_as_the_page_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sd_folder: Path
):
    family = type("MyFamily", (StableDiffusion,), {"pipeline_name": "MyPipeline"})
    folder = tmp_path / "mine"
    shutil.copytree(sd_folder, folder)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "MyPipeline"))
    config = ModelConfig(pretrained=str(folder))
    with pytest.raises(ValueError, match="is a MyPipeline; Sfumato knows"):
        find_family(config)
    (shown,) = [b for b in fences("docs/write_your_own.md", "python") if "FAMILIES" in b]
    scope: dict[str, Any] = {}
    exec(shown, scope)
    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
    scope["FAMILIES"] = registry.FAMILIES
    scope["add_family"]("mine", family)
    assert find_family(config) == (family, folder)


def test_messages_of_the_page_on_trouble_are_sfumatos() -> None:
    texts = []
    for file in (ROOT / "sfumato").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                pieces = [v.value if isinstance(v, ast.Constant) else "..." for v in node.values]
                texts.append("".join(map(str, pieces)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    rows = re.findall(r"^\| `(.+?)` \|", PAGES["docs/troubleshooting.md"], flags=re.M)
    said = [row for row in rows if " " in row]
    assert len(said) > 25
    unknown = []
    for message in said:
        parts = [part.strip(" ().") for part in message.split("...")]
        pattern = re.compile(".*?".join(map(re.escape, filter(None, parts))), flags=re.S)
        if not any(pattern.search(text) for text in texts):
            unknown.append(message)
    assert unknown == []
