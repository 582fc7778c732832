"""A reward function of one's own: what it may return, what it is given, and what is refused."""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from refusals import assert_explained
from runs import PROMPTS, command, metrics, start
from toy import use_toy

from sfumato.compose import compose_train
from sfumato.config import EvaluateConfig, FunctionRewardConfig, RewardFiles
from sfumato.data.prompts import read_prompt_rows
from sfumato.evaluation import commands
from sfumato.rewards.build import build_reward
from sfumato.rewards.code import find_code
from sfumato.rewards.reward import Reward, ScorerError, score_rows
from sfumato.rewards.simple import BrightnessReward
from sfumato.rewards.weighted import WeightedSum

HEAD = "import torch\ndef score(images, prompts, metadata):\n"
MEAN = f"{HEAD}    return images.mean((1, 2, 3))\n"
IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
ROWS: Mapping[str, Mapping[str, Any]] = {}


def write(folder: Path, text: str, name: str = "my_reward.py") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return f"{folder / name}:score"


def built(place: str, rows: Mapping[str, Mapping[str, Any]] = ROWS) -> Reward:
    reward = build_reward(FunctionRewardConfig(path=place))
    reward.prepare(lambda: rows)
    return reward


MEANS = {  # of the brightness: whether it has a gradient, and the code
    "a tensor": (True, MEAN),
    "a pair": (True, f"{HEAD}    return images.mean((1, 2, 3)), {{}}\n"),
    "a pair with None": (True, f"{HEAD}    return images.mean((1, 2, 3)), None\n"),
    "two arguments": (True, "def score(images, prompts):\n    return images.mean((1, 2, 3))\n"),
    "more arguments": (
        True,
        "def score(images, prompts, metadata=None, power=1, **others):\n"
        "    return images.mean((1, 2, 3))\n",
    ),
    "tensors in a list": (True, f"{HEAD}    return [image.mean() for image in images]\n"),
    "a tuple of tensors": (True, f"{HEAD}    return tuple(image.mean() for image in images)\n"),
    "a list": (False, f"{HEAD}    return [image.mean().item() for image in images]\n"),
    "a list in a pair": (False, f"{HEAD}    return [i.mean().item() for i in images], [{{}}]\n"),
    "an array": (False, f"{HEAD}    return images.cpu().numpy().mean((1, 2, 3))\n"),
    "numbers of numpy in a tuple": (
        False,
        "import numpy as np\ndef score(images, prompts):\n"
        "    return tuple(np.float32(image.detach().mean()) for image in images)\n",
    ),
    "tensors of no dimension in a tuple of another": (
        True,
        f"{HEAD}    return tuple(image.mean() for image in images), 'two'\n",
    ),
    "without a graph": (False, MEAN.replace("def ", "@torch.no_grad()\ndef ")),
    "detached": (False, f"{HEAD}    return images.detach().mean((1, 2, 3))\n"),
    "a module": (
        True,
        "import torch\nclass Net(torch.nn.Module):\n"
        "    def forward(self, images, prompts, metadata):\n"
        "        return images.mean((1, 2, 3))\nscore = Net()\n",
    ),
    "a Reward class": (
        True,
        "from sfumato.rewards.reward import Reward, Score\nclass score(Reward):\n"
        "    def score(self, images, prompts):\n"
        "        return Score(images.mean((1, 2, 3)))\n",
    ),
    "a Reward": (
        True,
        "from sfumato.rewards.simple import BrightnessReward\nscore = BrightnessReward(1.0)\n",
    ),
    "a Reward without a gradient": (
        False,
        "from sfumato.rewards.reward import Reward, Score\nclass score(Reward):\n"
        "    differentiable = False\n    def score(self, images, prompts):\n"
        "        return Score(images.mean((1, 2, 3)))\n",
    ),
}


@pytest.mark.parametrize("kind", MEANS)
def test_what_a_function_may_return_and_whether_it_has_a_gradient(
    tmp_path: Path, kind: str
) -> None:
    differentiable, text = MEANS[kind]
    reward = built(write(tmp_path, text))
    assert reward.differentiable == differentiable
    images = IMAGES.clone().requires_grad_()
    value = reward(images, PROMPTS[:4])
    assert torch.allclose(value, IMAGES.mean((1, 2, 3)))
    assert value.requires_grad == differentiable
    if differentiable:
        (gradient,) = torch.autograd.grad(value.sum(), images)
        assert torch.allclose(gradient, torch.tensor(1 / (3 * 8 * 8)))


@pytest.mark.parametrize(
    "body",
    [
        "(images * 255).round().mean((1, 2, 3))",
        "torch.ones(len(images))",
        "0 * images.sum((1, 2, 3)) + 7",
        "(images > 0.5).float().mean((1, 2, 3))",
    ],
)
def test_rounded_and_constant_scores_have_no_gradient(tmp_path: Path, body: str) -> None:
    reward = built(write(tmp_path, f"{HEAD}    return {body}\n"))
    assert not reward.differentiable and reward.why_constant
    assert reward(IMAGES, PROMPTS[:4]).shape == (4,)


def test_none_and_nan_are_no_scores(tmp_path: Path) -> None:
    place = write(tmp_path, f"{HEAD}    return [None, float('nan'), 1, 2.5][:len(images)]\n")
    faults: list[Exception] = []
    found = score_rows(built(place), IMAGES, PROMPTS[:4], faults)
    assert [str(row["reward"]) for row in found] == ["nan", "nan", "1.0", "2.5"]
    assert not faults


MISSING = {  # the second of each two images has no score
    "a tuple": "    return tuple(None if i % 2 else 1.0 for i, _ in enumerate(images))\n",
    "tensors": "    return [None if i % 2 else (x / x).mean() for i, x in enumerate(images)]\n",
    "a pair": "    return [None if i % 2 else 1 for i, _ in enumerate(images)], {}\n",
}


@pytest.mark.parametrize("kind", MISSING)
@pytest.mark.parametrize("count", [2, 4])
def test_none_beside_numbers_is_no_score(tmp_path: Path, kind: str, count: int) -> None:
    reward = built(write(tmp_path, HEAD + MISSING[kind]))
    values = reward(IMAGES[:count], ["a"] * count)
    assert values[::2].tolist() == pytest.approx([1.0] * (count // 2))
    assert bool(values[1::2].isnan().all())


LEAKS = {  # what the user's code sets for the whole process
    "no gradients at the top": "import torch\ntorch.set_grad_enabled(False)\n",
    "another type at the top": "import torch\ntorch.set_default_dtype(torch.float64)\n",
    "another folder at the top": "import os\nos.chdir('/')\n",
    "no gradients later": "",
    "another type later": "",
}


@pytest.mark.parametrize("kind", LEAKS)
def test_what_code_sets_for_the_whole_process_is_undone(tmp_path: Path, kind: str) -> None:
    body = "    values = images.mean((1, 2, 3))\n"
    if kind == "no gradients later":
        body += "    torch.set_grad_enabled(False)\n"
    if kind == "another type later":
        body += "    torch.set_default_dtype(torch.float64)\n"
    place = write(tmp_path, f"{LEAKS[kind]}{HEAD}{body}    return values\n")
    before = torch.is_grad_enabled(), torch.get_default_dtype(), Path.cwd()
    try:
        reward = built(place)
        images = IMAGES.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(reward(images, PROMPTS[:4]).sum(), images)
        assert gradient.unique().tolist() == pytest.approx([1 / 192])
        assert before == (torch.is_grad_enabled(), torch.get_default_dtype(), Path.cwd())
    finally:
        torch.set_grad_enabled(before[0])
        torch.set_default_dtype(before[1])
        os.chdir(before[2])


@pytest.mark.parametrize(
    "otherwise", ["torch.ones(len(images))", "[1.0] * len(images)", "images.detach().amax((1,2,3))"]
)
def test_images_whose_score_has_no_graph_have_gradient_zero(tmp_path: Path, otherwise: str) -> None:
    """A function may be differentiable for some images alone."""
    body = f"    return images.mean((1, 2, 3)) if images.shape[-1] == 64 else {otherwise}\n"
    reward = built(write(tmp_path, HEAD + body))
    assert reward.differentiable
    images = IMAGES.clone().requires_grad_()
    values = reward(images, PROMPTS[:4])
    (gradient,) = torch.autograd.grad(values.sum(), images)
    assert values.isfinite().all() and not gradient.count_nonzero()
    with torch.no_grad():
        assert not reward(images, PROMPTS[:4]).requires_grad


def test_bfloat16_images_are_given_as_float32_without_autocast(tmp_path: Path) -> None:
    place = write(
        tmp_path,
        f"{HEAD}    assert images.dtype == torch.float32\n"
        "    return (images.flatten(1) @ images.flatten(1).T).diagonal()\n",
    )
    reward = built(place)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = reward(IMAGES.bfloat16(), PROMPTS[:4])
    expected = IMAGES.bfloat16().float().square().sum((1, 2, 3))
    assert value.dtype == torch.float32 and torch.allclose(value, expected)


WRONG = {
    "a number": ("return 0.5", "shape []"),
    "the mean of all": ("return images.mean()", "shape []"),
    "one fewer": ("return images.mean((1, 2, 3))[1:]", "shape [1] for 2 images"),
    "one more": ("return [0.0] * (len(images) + 1)", "shape [3] for 2 images"),
    "a column": ("return images.mean((2, 3))", "shape [2, 3]"),
    "nothing": ("pass", "None, which is not a list of numbers"),
    "texts": ("return ['a'] * len(images)", "['a', 'a'], which is not a list"),
    "a dictionary": ("return {'score': 1}", "{'score': 1}, which is not a list"),
    "complex numbers": ("return images.mean((1, 2, 3)) * 1j", "shape [2]"),
    "a set": ("return {1, 2}", "{1, 2}, which is not a list"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_not_a_number_for_each_image_is_refused_at_the_start(
    tmp_path: Path, kind: str
) -> None:
    body, said = WRONG[kind]
    place = write(tmp_path, f"{HEAD}    {body}\n")
    with pytest.raises(ScorerError) as caught:
        built(place)
    message = str(caught.value)
    assert place in message and said in message and "return a number for each image" in message
    assert "\n" not in message


def test_a_wrong_length_later_ends_the_run(tmp_path: Path) -> None:
    """Each image alone would have one number: what is wrong must not look right."""
    reward = built(write(tmp_path, f"{HEAD}    return images.mean((1, 2, 3))[:2]\n"))
    with pytest.raises(ScorerError, match=r"shape \[2\] for 4 images"):
        score_rows(reward, IMAGES, PROMPTS[:4], [])


RAISED = {
    "at once": ("raise KeyError('answer')", "line 3 raised KeyError: 'answer'"),
    "in a function": ("return inner(images)", "line 5 raised ZeroDivisionError: division by zero"),
    "in torch": ("return images.reshape(7)", "line 3 raised RuntimeError: shape '[7]' is invalid"),
    "of several lines": ("raise ValueError('one\\ntwo')", "line 3 raised ValueError: one two"),
    "without words": ("raise OSError", "line 3 raised OSError"),
    "a key that is not there": (
        "return [row['answer'] for row in metadata]",
        "line 3 raised KeyError: 'answer'",
    ),
}


@pytest.mark.parametrize("kind", RAISED)
def test_what_a_function_raises_is_told_with_its_line(tmp_path: Path, kind: str) -> None:
    body, said = RAISED[kind]
    place = write(tmp_path, f"{HEAD}    {body}\ndef inner(images):\n    return 1 / 0\n")
    with pytest.raises(ValueError) as caught:
        built(place)
    assert f"{tmp_path / 'my_reward.py'} {said}" in str(caught.value)
    assert "\n" not in str(caught.value)


CHANGES = [
    "images.zero_()",
    "images[0] = 1",
    "images.detach().numpy()[:] = 2",
    "images.data.mul_(3)",
    "prompts[:] = ['x'] * 9",
    "prompts.clear()",
    "metadata[0]['words'].append(1)",
    "metadata[0].clear(); metadata.clear()",
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_function_changes_is_its_own_copy(tmp_path: Path, change: str) -> None:
    body = f"    result = images.mean((1, 2, 3)) * 1\n    {change}\n    return result\n"
    rows = {PROMPTS[0]: {"words": ["a"]}}
    reward = built(write(tmp_path, HEAD + body), rows)
    prompts = [PROMPTS[0]] * 4
    for images in (IMAGES.clone(), IMAGES.clone().requires_grad_()):
        reward(images, prompts)
        assert torch.equal(images, IMAGES) and images.grad_fn is None
    assert prompts == [PROMPTS[0]] * 4 and rows == {PROMPTS[0]: {"words": ["a"]}}


# --- The file


NOT_THERE = {
    "no name": ("my_reward.py", "does not name a function; write FILE.py:NAME"),
    "an empty name": ("my_reward.py:", "does not name a function"),
    "no identifier": ("my_reward.py:a b", "does not name a function"),
    "no file": ("nowhere.py:score", "there is no file nowhere.py"),
    "a folder": ("/tmp/:score", "there is no file"),
    "no module": ("no_such_package.rewards:score", "no module no_such_package.rewards"),
    "no module in a package": ("sfumato.no_such:score", "no module sfumato.no_such"),
    "no package": ("sfumato.cli.inner:score", "no module sfumato.cli.inner"),
}


@pytest.mark.parametrize("kind", NOT_THERE)
def test_a_place_that_is_not_there_is_refused_with_the_settings(tmp_path: Path, kind: str) -> None:
    place, said = NOT_THERE[kind]
    with pytest.raises(ValueError) as caught:
        compose_train(command(tmp_path, "run", "reward=function", f"reward.path={place}"))
    assert_explained(str(caught.value), place, None, said)


UNREADABLE = {
    "a missing name": ("def other(images): pass", "has no score; it has other"),
    "a missing name in an empty file": ("", "has no score; it has no function"),
    "a syntax error": ("import torch\ndef score(:\n", "line 2 raised SyntaxError: invalid syntax"),
    "an indentation": ("def score():\nreturn 1\n", "line 2 raised IndentationError"),
    "an import": ("import torch\nimport nowhere_at_all", "line 2 raised ModuleNotFoundError"),
    "an exit": ("import sys\n\nsys.exit('no GPU')", "line 3 raised SystemExit: no GPU"),
    "a null byte": ("a = '\0'", "SyntaxError: source code string cannot contain null bytes"),
    "a number": ("score = 3", "is a int, not a function"),
    "a class": ("class score:\n    pass", "is a type, not a function"),
    "one argument": ("def score(images): pass", "takes (images); correct"),
    "four arguments": ("def score(a, b, c, d): pass", "takes (a, b, c, d); correct"),
    "a Reward with arguments": (
        "from sfumato.rewards.simple import ColorReward as score",
        "raised TypeError",
    ),
    "a Reward that raises": (
        "from sfumato.rewards.reward import Reward\nclass score(Reward):\n    def __init__(self):\n"
        "        raise OSError('no weights')\n    def score(self, images, prompts): pass\n",
        "line 4 raised OSError: no weights",
    ),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, kind: str) -> None:
    text, said = UNREADABLE[kind]
    place = write(tmp_path, text)
    with pytest.raises(ValueError) as caught:
        built(place)
    message = str(caught.value)
    assert str(tmp_path / "my_reward.py") in message and said in message and "\n" not in message


REWARD = "from sfumato.rewards.reward import Reward, Score\nclass score(Reward):\n"
SCORE = "    def score(self, images, prompts):\n        return Score(images.mean((1, 2, 3))"
ODD = {  # code, and what is said
    "a Reward without the base's __init__": (
        f"{REWARD}    def __init__(self):\n        self.factor = 1\n{SCORE})\n",
        "cannot be made: .* raised AttributeError",
    ),
    "a Reward whose prepare raises": (
        f"{REWARD}    def prepare(self, rows):\n        raise OSError('no model')\n{SCORE})\n",
        "line 4 raised OSError: no model",
    ),
    "a Reward whose part has another length": (
        f"{REWARD}{SCORE}, {{'a': [1.0]}})\n",
        r"score \(a\) returned a tensor of shape \[1\] for 2 images",
    ),
    "a Reward whose part is a text": (
        f"{REWARD}{SCORE}, {{'a': 'b'}})\n",
        r"score \(a\) returned 'b', which is not a list of numbers",
    ),
    "a function that ends the process": (
        f"{HEAD}    raise SystemExit(3)\n",
        "line 3 raised SystemExit: 3",
    ),
    "a number that is too large": (
        f"{HEAD}    return [10**400] * len(images)\n",
        "which is not a list of numbers",
    ),
}


@pytest.fixture
def without_type_checks() -> Iterator[None]:
    """As users have it: the checks of tests would see a wrong part before Sfumato does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("kind", ODD)
def test_what_cannot_score_is_explained(tmp_path: Path, kind: str) -> None:
    text, said = ODD[kind]
    place = write(tmp_path, text)
    with pytest.raises(ValueError, match=said) as caught:
        built(place)
    assert place in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def paths() -> Iterator[None]:
    before, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = before
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.mark.usefixtures("paths")
def test_a_file_may_import_its_neighbours_and_hides_no_installed_module(tmp_path: Path) -> None:
    (tmp_path / "my_words.py").write_text("FACTOR = 3\n")
    (tmp_path / "json.py").write_text("raise OSError('the wrong json')\n")
    text = "import json\nfrom my_words import FACTOR\n"
    reward = built(write(tmp_path, f"{text}{HEAD}    return FACTOR * images.mean((1, 2, 3))\n"))
    assert torch.allclose(reward(IMAGES, PROMPTS[:4]), 3 * IMAGES.mean((1, 2, 3)))
    assert not list(tmp_path.rglob("my_reward*.pyc"))


@pytest.mark.usefixtures("paths")
def test_a_file_is_run_once_and_again_when_it_changes(tmp_path: Path) -> None:
    count = (
        f"from pathlib import Path\nlog = Path(r'{tmp_path / 'log'}').open('a')\nlog.write('x')\n"
    )
    place = write(tmp_path, f"{count}log.close()\n{MEAN}other = score\n")
    built(place), built(place), built(place.replace(":score", ":other"))
    assert (tmp_path / "log").read_text() == "x"
    write(tmp_path, f"{count}log.close()\n{MEAN}other = score\n# changed\n")
    built(place)
    assert (tmp_path / "log").read_text() == "xx"


@pytest.mark.usefixtures("paths")
def test_a_module_is_found_without_running_the_packages_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "my_package"
    write(package, f"from .factor import FACTOR\n{MEAN}", "rewards.py")
    (package / "factor.py").write_text("FACTOR = 1\n")
    (package / "__init__.py").write_text(f"open(r'{tmp_path / 'ran'}', 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_code("my_package.rewards:score") == (package / "rewards.py", "score")
    assert not (tmp_path / "ran").exists()
    reward = built("my_package.rewards:score")
    assert (tmp_path / "ran").exists() and reward.differentiable


def test_a_plan_runs_nobodys_code(tmp_path: Path) -> None:
    reward = build_reward(FunctionRewardConfig(path=write(tmp_path, "raise OSError('was run')")))
    assert reward(torch.empty(2, 3, 8, 8, device="meta"), PROMPTS[:2]).shape == (2,)


# --- Metadata


JSONL = [
    {"prompt": "a red ring", "count": 1, "words": ["red"]},
    {"prompt": " a star ", "count": 2},
    {"prompt": "a red ring", "count": 9, "words": []},
    {"prompt": "", "count": 3},
    {"prompt": 7, "count": 4},
]


def test_rows_of_tables_are_found_by_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, JSONL)) + "\nnoise\n")
    (tmp_path / "a.csv").write_text('prompt,count\na red ring,1\n"a star",2\n')
    (tmp_path / "a.txt").write_text("a red ring\n")
    rows = read_prompt_rows(str(tmp_path / "a.jsonl"))
    assert rows == {
        "a red ring": {"prompt": "a red ring", "count": 1, "words": ["red"]},
        "a star": {"prompt": " a star ", "count": 2, "words": None},
    }
    assert read_prompt_rows(str(tmp_path / "a.csv"), column="prompt")["a star"]["count"] == "2"
    assert read_prompt_rows(str(tmp_path / "a.txt")) == {}
    both = read_prompt_rows(str(tmp_path / "a.{csv,txt}"))
    assert [*both] == ["a red ring", "a star"]


def test_rows_of_parquet_leave_out_bytes(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(
        {
            "texts": [["a star", "one star"], ["a ring"]],
            "jpg": [b"\xff\xd8", b"\xff\xd8"],
            "image": [{"bytes": b"\xff", "path": "a"}, None],
            "count": [1, 2],
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    rows = read_prompt_rows(str(tmp_path / "a.parquet"), column="texts")
    assert {prompt: row["count"] for prompt, row in rows.items()} == {
        "a star": 1, "one star": 1, "a ring": 2
    }  # fmt: skip
    assert {*rows["a star"]} == {"texts", "count"}


def test_tables_are_read_for_a_function_with_metadata_alone(tmp_path: Path) -> None:
    def never() -> Mapping[str, Mapping[str, Any]]:
        raise AssertionError("the table was read")

    reward = build_reward(FunctionRewardConfig(path=write(tmp_path, MEANS["two arguments"][1])))
    reward.prepare(never)
    with pytest.raises(AssertionError, match="was read"):
        build_reward(FunctionRewardConfig(path=write(tmp_path, MEAN))).prepare(never)


def test_a_sum_prepares_its_parts(tmp_path: Path) -> None:
    lists = write(tmp_path, MEANS["a list"][1])
    for place, differentiable in ((write(tmp_path, MEAN, "other.py"), True), (lists, False)):
        own = build_reward(FunctionRewardConfig(path=place))
        reward = WeightedSum({"own": (2.0, own), "brightness": (1.0, BrightnessReward(1.0))})
        reward.prepare(lambda: {})
        assert reward.differentiable == differentiable
        assert torch.allclose(reward(IMAGES, PROMPTS[:4]), 3 * IMAGES.mean((1, 2, 3)))


# --- Runs


DDPO = ("method=ddpo", "objective.kl_coeff=0", "objective.images_per_prompt=2",
        "objective.batches=2", "sampler.training_steps=null", "sampler.eta=1.0")  # fmt: skip


def own(folder: Path, name: str, place: str, *more: str) -> list[str]:
    return command(folder, name, "reward=function", f"reward.path={place}", *more)


def test_draft_with_a_function_is_draft_with_the_same_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_toy(monkeypatch)
    start(own(tmp_path, "own", write(tmp_path, f"{HEAD}    return 20 * images.mean((1, 2, 3))\n")))
    start(command(tmp_path, "built_in", "reward=brightness"))
    ours, theirs = metrics(tmp_path / "own"), metrics(tmp_path / "built_in")
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)


def table(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [{"prompt": p, "factor": i + 1, "words": p.split()} for i, p in enumerate(PROMPTS)]
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder / "table.jsonl"


CHECKED = (
    f"{HEAD}    assert [row['prompt'] for row in metadata] == prompts\n"
    "    assert [' '.join(row['words']) for row in metadata] == prompts\n"
    "    assert images.min() >= 0 and images.max() <= 1\n"
    "    return [row['factor'] * i.mean().item() for i, row in zip(images, metadata)]\n"
)


def test_ddpo_with_a_function_and_the_rows_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_toy(monkeypatch)
    start(own(tmp_path, "run", write(tmp_path, CHECKED), *DDPO, f"data.prompts={table(tmp_path)}"))
    rows = metrics(tmp_path / "run")
    assert len(rows) == 7 and all(row["left_out"] == 0 for row in rows[1:])
    shown = (tmp_path / "run/samples/step-000006/pairs.jsonl").read_text().splitlines()
    assert len(shown) == 3 and all("reward_tuned" in json.loads(line) for line in shown)


def test_images_that_a_function_cannot_score_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_toy(monkeypatch)
    body = (
        "    if any('red' in prompt for prompt in prompts):\n        raise OSError('no red')\n"
        "    return [float('nan') if 'blue' in p else i.mean().item()"
        " for i, p in zip(images, prompts)]\n"
    )
    start(own(tmp_path, "run", write(tmp_path, HEAD + body), *DDPO, "validation.every_steps=0"))
    rows = metrics(tmp_path / "run")[1:]
    assert len(rows) == 6 and sum(row["left_out"] for row in rows) > 0


REFUSED = {
    "no gradient": (MEANS["a list"][1], (), r":score is not differentiable \(.*\), and the obj"),
    "a constant": (f"{HEAD}    return torch.ones(len(images))\n", (), "is not differentiable"),
    "zeros": (f"{HEAD}    return images.sum((1, 2, 3)) * 0\n", (), "its gradient at random"),
    "raises": (f"{HEAD}    raise OSError('x')\n", DDPO, "line 3 raised OSError: x"),
    "raises for all": (
        f"{HEAD}    if images.shape[-1] == 4:\n        raise OSError('small')\n    return [0, 1]\n",
        (*DDPO, "validation.every_steps=0", "validation.num_images=1"),
        "gave no number for any of 8 images .*line 4 raised OSError: small",
    ),
    "NaN": (
        f"{HEAD}    return [float('nan') for _ in images]\n",
        DDPO,
        "gave no number for any of 8 images .all are NaN or infinite.; correct it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_function_that_nothing_can_be_learned_from_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    use_toy(monkeypatch)
    text, more, said = REFUSED[kind]
    place = write(tmp_path, text)
    with pytest.raises(ValueError, match=said) as caught:
        start(own(tmp_path, "run", place, *more))
    assert place in str(caught.value) and "\n" not in str(caught.value)


def test_a_constant_tells_nothing_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    use_toy(monkeypatch)
    start(own(tmp_path, "run", write(tmp_path, f"{HEAD}    return [3] * len(images)\n"), *DDPO))
    assert {row["no_signal"] for row in metrics(tmp_path / "run")[1:]} == {1.0}
    assert "have the same reward" in "".join(capfd.readouterr())


def test_a_run_goes_on_with_the_same_function_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_toy(monkeypatch)
    two = f"{MEAN}def other(images, prompts):\n    return -images.mean((1, 2, 3))\n"
    place = write(tmp_path, two)
    start(own(tmp_path, "run", place, "training.max_steps=2"))
    noted = json.loads((tmp_path / "run" / "contents.json").read_text())
    assert str(tmp_path / "my_reward.py") in noted["files"]

    moved = write(tmp_path / "moved", two)
    assert start(own(tmp_path, "run", moved, "training.max_steps=3")).step == 3
    for changed in (
        write(tmp_path, two.replace("-images", "images")),
        moved.replace(":score", ":other"),
        write(tmp_path / "new", two + "#\n"),
    ):
        ran = f"{Path(changed.rpartition(':')[0])}"
        before = Path(ran).read_text()
        Path(ran).write_text(f"{before}open(r'{tmp_path / 'ran'}', 'w').close()\n")
        with pytest.raises(ValueError, match=r"other files .* reward\.path.*allow_changed=\[rew"):
            start(own(tmp_path, "run", changed, "training.max_steps=4"))
        Path(ran).write_text(before)
    assert not (tmp_path / "ran").exists()  # what is refused was not run
    allowed = own(tmp_path, "run", place, "training.max_steps=4", "allow_changed=[reward.path]")
    assert start(allowed).step == 4


# --- Evaluation


@pytest.fixture(scope="module")
def finished(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of one step that a function scored."""
    folder = tmp_path_factory.mktemp("finished")
    place = write(folder, CHECKED)
    small = ("model.lora.rank=2", "validation.every_steps=0", "training.max_steps=1")
    given = own(folder, "run", place, *small, *DDPO, f"data.prompts={table(folder)}")
    chosen = [text for text in given if not text.startswith("model.trainable")]
    start(
        [text.replace("model.pretrained=toy", f"model.pretrained={sd_folder}") for text in chosen]
    )
    return folder


def evaluate(folder: Path, **settings: Any) -> list[float | None]:
    config = EvaluateConfig(run=str(folder / "run"), num_images=2, **settings)
    return [one.reward for one in commands.evaluate_run(config)]


def scores(folder: Path) -> list[dict[str, Any]]:
    file = folder / "run" / "evaluation" / "step-000001" / "scores.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_finished_run_is_scored_by_its_function_named_again_or_by_any_other(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        evaluate(finished)
    assert_explained(str(caught.value), "reward.path", finished / "my_reward.py", "reward=NAME")

    place, prompts = f"{finished / 'my_reward.py'}:score", str(finished / "table.jsonl")
    first = evaluate(finished, reward=RewardFiles(path=place), prompts=prompts)
    assert len(first) == 2 and len(scores(finished)) == 2 * len(PROMPTS)
    assert first == evaluate(finished, reward=RewardFiles(path=place), prompts=prompts)
    again = FunctionRewardConfig(path=place)
    assert first == evaluate(finished, reward=again, prompts=prompts)

    other = write(tmp_path, MEAN, "other.py")
    (brightness, base), mean = (
        evaluate(finished, reward=reward, prompts=prompts)
        for reward in (compose_train(command(tmp_path, "x", "reward=brightness"))[0].reward,
                       FunctionRewardConfig(path=other))
    )  # fmt: skip
    assert brightness is not None and base is not None
    assert mean == pytest.approx([brightness / 20, base / 20], rel=1e-5)
    with pytest.raises(ValueError, match=r"reward\.path = .*allow_changed=\[reward\.path\]"):
        evaluate(finished, reward=RewardFiles(path=other), prompts=prompts)
    with pytest.raises(ValueError, match=r"line 3 raised KeyError: 'prompt'"):
        evaluate(finished, reward=RewardFiles(path=place))  # the table is not named


@pytest.mark.parametrize("key", ["path", "parts", "held out"])
def test_code_that_a_run_folder_names_is_never_run(
    finished: Path, tmp_path: Path, key: str
) -> None:
    import shutil

    import yaml

    shutil.copytree(finished / "run", tmp_path / "run")
    evil = write(tmp_path, f"open(r'{tmp_path / 'ran'}', 'w').close()\n{MEAN}", "evil.py")
    file = tmp_path / "run" / "config.yaml"
    content = yaml.safe_load(file.read_text())
    content["reward"] = {"kind": "function", "path": evil}
    if key == "parts":
        part = {"kind": "function", "path": evil, "weight": 1.0}
        content["reward"] = {"kind": "weighted", "parts": {"a": part}}
    other = compose_train(command(tmp_path, "x", "reward=brightness"))[0].reward
    chosen: dict[str, Any] = {}
    if key == "held out":  # another reward in place of the run's does not help
        content["reward"] = {"kind": "brightness"}
        content["validation"]["rewards"] = {"a": {"kind": "function", "path": evil}}
        chosen = {"reward": other}
    file.write_text(yaml.safe_dump(content))
    named = {"path": "reward.path", "parts": "reward.parts.a.path"}
    told = named.get(key, "validation.rewards.a.path")
    with pytest.raises(ValueError, match=re.escape(f"was scored by {told}=")):
        evaluate(tmp_path, **chosen)
    from sfumato.config import SampleConfig
    from sfumato.report.report import write_report
    from sfumato.training.folder import RunFolder

    out = str(tmp_path / "samples")
    commands.sample_images(
        SampleConfig(run=str(tmp_path / "run"), prompt="a", num_images=1, out=out)
    )
    write_report([RunFolder(tmp_path / "run")], tmp_path / "page.html", title="t")
    assert not os.path.lexists(tmp_path / "ran")
