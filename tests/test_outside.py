"""Run folders from strangers: every kind of damage is one line, and nothing outside is read."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from refusals import assert_explained
from test_report import write_evaluation, write_lines, write_pairs
from tiny_sd import write_tiny_sd

from sfumato.compose import compose_train, load_settings
from sfumato.config import EvaluateConfig, SampleConfig
from sfumato.evaluation.commands import evaluate_run, open_model, sample_images, shown_prompts
from sfumato.models.registry import load_model
from sfumato.report.report import write_report
from sfumato.training.checkpoint import Snapshot, write_checkpoint
from sfumato.training.folder import RunFolder

DEEP = "[" * 100_000
DIGITS = "1" * 400
SECRET = "my private diary"
Damage = Callable[[RunFolder], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with a checkpoint, metrics, validation images and two evaluations."""
    root = tmp_path_factory.mktemp("outside")
    write_tiny_sd(root / "sd")
    (root / "prompts.txt").write_text("a ring\na star\n")
    run = RunFolder(root / "run")
    run.path.mkdir()
    config, plain = compose_train(
        [
            *("objective=draft", "objective.kl_coeff=0.1", "reward=color", "name=run"),
            *("sampler.num_inference_steps=2", "sampler.guidance_scale=2.0"),
            *(f"model.pretrained={root / 'sd'}", f"data.prompts={root / 'prompts.txt'}"),
        ]
    )
    run.config.write_text(yaml.safe_dump(plain))
    run.describe("sfumato train", {"reward_scale": 20.0})
    write_lines(run.metrics, [{"step": 0, "validation/reward": 1.0}, {"step": 1, "reward": 2.0}])
    weights = {name: p.detach() for name, p in load_model(config.model).trainable().items()}
    state = {"best": [1, 0.5]}
    write_checkpoint(run.checkpoints, Snapshot(1, weights, {}, {}, state))
    write_pairs(run, 1, {"reward_tuned": 2.0, "reward_base": 1.0})
    write_evaluation(run, 0, 1.0, 0.3)
    write_evaluation(run, 1, 2.0, 0.2)
    return run


@pytest.fixture
def run(whole: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(whole.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def report(run: RunFolder) -> str:
    out = run.path.parent / "page.html"
    return write_report([run], out, title="t").read_text()


def evaluate(run: RunFolder) -> None:
    evaluate_run(EvaluateConfig(run=str(run.path), num_images=2))


def sample(run: RunFolder, step: str | None = None, **settings: Any) -> None:
    out = str(run.path.parent / "samples")
    sample_images(SampleConfig(run=str(run.path), step=step, prompt="a", out=out, **settings))


def sample_best(run: RunFolder) -> None:
    sample(run, step="best")


ALL: tuple[Callable[[RunFolder], object], ...] = (report, evaluate, sample)
SAMPLING: tuple[Callable[[RunFolder], object], ...] = (evaluate, sample)
REPORT: tuple[Callable[[RunFolder], object], ...] = (report,)
BEST: tuple[Callable[[RunFolder], object], ...] = (sample_best,)
EVALUATE: tuple[Callable[[RunFolder], object], ...] = (evaluate,)


def put(path: str, content: str | bytes) -> Damage:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda run: (run.path / path).write_bytes(data)


def edit(path: str, key: str, value: Any) -> Damage:
    """Set a dotted key of a YAML or JSON file; `...` removes it."""

    def act(run: RunFolder) -> None:
        file = run.path / path
        content = yaml.safe_load(file.read_text())
        *parents, name = key.split(".")
        node = content
        for parent in parents:
            node = node[parent]
        if value is ...:
            del node[name]
        else:
            node[name] = value
        text = yaml.safe_dump(content) if path.endswith(".yaml") else json.dumps(content)
        file.write_text(text)

    return act


def row(path: str, **values: Any) -> Damage:
    """Change keys of the first row of a .jsonl file; `...` removes one."""

    def act(run: RunFolder) -> None:
        first, *others = (run.path / path).read_text().splitlines()
        content = {k: v for k, v in {**json.loads(first), **values}.items() if v is not ...}
        (run.path / path).write_text("\n".join([json.dumps(content), *others]) + "\n")

    return act


def replace(path: str, act: Callable[[Path], object]) -> Damage:
    """Remove a file, and put something else in its place."""

    def whole(run: RunFolder) -> None:
        (run.path / path).unlink()
        act(run.path / path)

    return whole


def link(path: Path) -> None:
    (path.parent.parent / "elsewhere").write_text(SECRET)
    path.symlink_to(path.parent.parent / "elsewhere")


CONFIG, METRICS, RUN = "config.yaml", "metrics.jsonl", "run.json"
SUMMARY, SCORES = "evaluation/step-000001/summary.json", "evaluation/step-000001/scores.jsonl"
PAIRS = "samples/step-000001/pairs.jsonl"
STATE, MANIFEST = "checkpoints/step-000001/state.json", "checkpoints/step-000001/manifest.json"
LAUGHS = "a: &a [1]\n" + "\n".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 12)}]"
    for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)

# The damage, the commands that meet it, and what their message names.
DAMAGES: list[tuple[str, Damage, tuple[Callable[[RunFolder], object], ...], str]] = [
    ("no config", replace(CONFIG, lambda path: None), ALL, CONFIG),
    ("empty config", put(CONFIG, ""), ALL, CONFIG),
    ("config of zeros", put(CONFIG, bytes(4096)), ALL, CONFIG),
    ("config of noise", put(CONFIG, b"\xff\xfe\x80" * 99), ALL, CONFIG),
    ("config is a list", put(CONFIG, "[1, 2]"), ALL, CONFIG),
    ("config is cut", put(CONFIG, "objective: {kind: dr"), ALL, CONFIG),
    ("config is deep", put(CONFIG, f"a: {DEEP}"), ALL, "levels"),
    ("config is deep in blocks", put(CONFIG, "".join(" " * i + "a:\n" for i in range(900))), ALL,
     "levels"),
    ("config repeats itself", put(CONFIG, LAUGHS), ALL, "aliases"),
    ("config holds itself", put(CONFIG, "a: &a [*a]"), ALL, "aliases"),
    ("config of many values", put(CONFIG, f"a: [{'1,' * 300_000}]"), ALL, "values"),
    ("config with a tag", put(CONFIG, "a: !!python/object/apply:os.getcwd []"), ALL, CONFIG),
    ("config with a huge number", put(CONFIG, f"a: {DIGITS}"), ALL, "bits"),
    ("config with a longer number", put(CONFIG, f"a: {DIGITS * 20}"), ALL, CONFIG),
    ("config with a huge hex", put(CONFIG, f"a: 0x{'f' * 9000}"), ALL, "bits"),
    ("config with no such day", put(CONFIG, "a: 2001-99-99"), ALL, CONFIG),
    ("config is a folder", replace(CONFIG, lambda path: path.mkdir()), ALL, CONFIG),
    ("config is a pipe", replace(CONFIG, os.mkfifo), ALL, CONFIG),
    ("config is a device", replace(CONFIG, lambda path: path.symlink_to("/dev/zero")), ALL, CONFIG),
    ("config is a link", replace(CONFIG, link), REPORT, "leaves the run folder"),
    ("objective is a text", edit(CONFIG, "objective", "draft"), ALL, "objective"),
    ("kl_coeff is a word", edit(CONFIG, "objective.kl_coeff", "high"), ALL, "kl_coeff"),
    ("kl_coeff is NaN", edit(CONFIG, "objective.kl_coeff", float("nan")), ALL, "kl_coeff"),
    ("batch is a list", edit(CONFIG, "training.global_batch_size", [1]), ALL, "global_batch_size"),
    ("rank is a text", edit(CONFIG, "model.lora.rank", "many"), ALL, "rank"),
    ("kind is a list", edit(CONFIG, "reward.kind", []), ALL, "kind"),
    ("sources are a number", edit(CONFIG, "data.images.sources", 7), ALL, "sources"),
    ("height is huge", edit(CONFIG, "sampler.height", 100_000_000), SAMPLING, "sampler.height"),
    ("steps are huge", edit(CONFIG, "sampler.num_inference_steps", 10**15), SAMPLING, "num_infer"),
    ("rank is huge", edit(CONFIG, "model.lora.rank", 10**12), SAMPLING, "model.lora.rank"),
    ("a rank is large", edit(CONFIG, "model.lora.rank", 1_000_000), SAMPLING, "model.lora.rank"),
    ("targets take for ever", edit(CONFIG, "model.lora.targets", ["((.*)*)*x"]), SAMPLING,
     "repeats a repetition"),
    ("an unknown key", edit(CONFIG, "model.color", 1), SAMPLING, "color"),
    ("a resolver", edit(CONFIG, "sampler.height", "${oc.env:HOME}"), SAMPLING, "oc.env"),
    ("starts are a text", put(RUN, '{"starts": "many"}'), REPORT, "run.json"),
    ("run.json is deep", put(RUN, DEEP), REPORT, "run.json"),
    ("run.json is noise", put(RUN, b"\xff\0\xfe"), REPORT, "run.json"),
    ("run.json has huge digits", put(RUN, '{"starts": [{"a": %s}]}' % ("1" * 9000)), REPORT,
     "run.json"),
    ("a metric's name is no text", row(METRICS, **{"loss/\ud800": 1}), REPORT,
     "metrics.jsonl line 1"),
    ("a metric is null", row(METRICS, reward=None), REPORT, "metrics.jsonl line 1"),
    ("a metric is a text", row(METRICS, reward="high"), REPORT, "reward = 'high'"),
    ("a metric is true", row(METRICS, reward=True), REPORT, "reward"),
    ("a metric is huge", row(METRICS, reward=10**300), REPORT, "reward"),
    ("a step is a text", row(METRICS, step="one"), REPORT, "step = 'one'"),
    ("a step is huge", row(METRICS, step=10**30), REPORT, "step"),
    ("a step is negative", row(METRICS, step=-1), REPORT, "step"),
    ("metrics are a pipe", replace(METRICS, os.mkfifo), REPORT, METRICS),
    ("metrics are a link", replace(METRICS, link), REPORT, "leaves the run folder"),
    ("no summary", replace(SUMMARY, lambda path: None), REPORT, "summary.json"),
    ("empty summary", put(SUMMARY, ""), REPORT, "summary.json"),
    ("summary is deep", put(SUMMARY, '{"settings": ' + '{"a": ' * 900 + "1" + "}" * 901), REPORT,
     "summary.json"),
    ("diversity is NaN", edit(SUMMARY, "diversity.mean", float("nan")), REPORT, "diversity.mean"),
    ("reward is infinite", edit(SUMMARY, "reward", float("inf")), REPORT, "reward"),
    ("no error", edit(SUMMARY, "reward_error", ...), REPORT, "reward_error"),
    ("another step", edit(SUMMARY, "step", 7), REPORT, "step = 7"),
    ("a held-out score is a text", edit(SUMMARY, "held_out.attributes", "x"), REPORT, "held_out"),
    ("no features", edit(SUMMARY, "settings.features", ...), REPORT, "features"),
    ("sampler is null", edit(SUMMARY, "settings.sampler", None), REPORT, "sampler"),
    ("scores lack an image", row(SCORES, image=...), REPORT, "line 1"),
    ("a score is a text", row(SCORES, reward="x"), REPORT, "line 1"),
    ("a score is NaN", row(SCORES, reward=float("nan")), REPORT, "line 1"),
    ("an index is huge", row(SCORES, prompt_index=10**40), REPORT, "prompt_index"),
    ("a row of scores is deep", put(SCORES, DEEP), REPORT, "line 1"),
    ("scores are fewer", row(SCORES, prompt_index=3), REPORT, "different numbers"),
    ("a prompt is a number", row(PAIRS, prompt=3), EVALUATE, "pairs.jsonl line 1"),
    ("pairs are a pipe", replace(PAIRS, os.mkfifo), EVALUATE, "pairs.jsonl"),
    ("state is deep", put(STATE, DEEP), (*SAMPLING, *BEST), "state.json"),
    ("best is a text", put(STATE, '{"step": 1, "best": "x"}'), BEST, "best"),
    ("manifest is a list", put(MANIFEST, "[]"), SAMPLING, "manifest.json"),
    ("manifest is deep", put(MANIFEST, DEEP), SAMPLING, "manifest.json"),
    ("manifest lists nothing", put(MANIFEST, '{"files": {}}'), SAMPLING, "does not list"),
    ("a size is a text", edit(MANIFEST, "files", {"state.json": {"bytes": "x", "sha256": ""}}),
     SAMPLING, "manifest.json"),
    ("no checkpoint", lambda run: shutil.rmtree(run.checkpoints), (sample,), "no checkpoint"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "commands", "named"), [case[1:] for case in DAMAGES], ids=[c[0] for c in DAMAGES]
)
def test_damage_is_one_line(
    run: RunFolder, damage: Damage, commands: tuple[Callable[[RunFolder], object], ...], named: str
) -> None:
    damage(run)
    for command in commands:
        started = time.monotonic()
        with pytest.raises(ValueError) as caught:
            command(run)
        assert_explained(str(caught.value), named)
        assert str(run.path) in str(caught.value)
        assert SECRET not in str(caught.value)
        assert time.monotonic() - started < 20


def test_the_list_is_long() -> None:
    assert len(DAMAGES) >= 60


def test_the_whole_run_is_read(run: RunFolder) -> None:
    html = report(run)
    assert html.count("data:image/png") == 12  # two models, two prompts, three noises
    assert "are not shown" not in html and "no row with a step" not in html
    sample(run, num_images=1)
    evaluate(run)


# Pictures


def save_outside(run: RunFolder) -> Path:
    path = run.path.parent / "private.png"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(path)
    return path


@pytest.mark.parametrize("how", ["absolute", "parent", "link", "link of a folder"])
def test_pictures_outside_the_run_are_not_shown(run: RunFolder, how: str) -> None:
    private, folder = save_outside(run), run.evaluation(1)
    before = report(run).count("data:image")
    match how:
        case "absolute":
            row(SCORES, image=str(private))(run)
        case "parent":
            row(SCORES, image="../../../private.png")(run)
        case "link":
            (folder / "images" / "000-000.png").unlink()
            (folder / "images" / "000-000.png").symlink_to(private)
        case _:
            (folder / "linked").symlink_to(run.path.parent)
            row(SCORES, image="linked/private.png")(run)
    html = report(run)
    assert html.count("data:image") == before - 1
    assert "Pictures outside the run folders are not shown" in html
    assert ": 1, the first is" in html


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/tmp/x) (w) file\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("content", [EPS, b"GIF89a" + bytes(64), b"", b"\x89PNG\r\n\x1a\n" * 9])
def test_only_the_formats_of_decode_are_opened(
    run: RunFolder, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was started")

    before = report(run).count("data:image")
    monkeypatch.setattr("subprocess.Popen.__init__", never)
    (run.evaluation(1) / "images" / "000-000.png").write_bytes(content)
    assert report(run).count("data:image") == before - 1


def test_a_picture_that_is_a_pipe_is_not_opened(run: RunFolder) -> None:
    file = run.evaluation(1) / "images" / "000-000.png"
    file.unlink()
    os.mkfifo(file)
    assert "missing" in report(run)


def test_lost_lines_of_metrics_are_counted(run: RunFolder) -> None:
    run.metrics.write_text('{"step": 1, "reward": 2.0}\nnoise\n{"reward": 1}\n{"step": 2, "rew')
    assert "no row with a step: 3, the first is line 2" in report(run)


def test_what_is_not_finite_is_left_out_of_curves(run: RunFolder) -> None:
    rows = [{"step": i, "reward": [1.0, float("nan"), float("inf")][i % 3]} for i in range(9)]
    write_lines(run.metrics, rows)
    html = report(run)
    assert "reward in training" in html and "no row with a step" not in html


def test_lone_surrogates_do_not_stop_a_page(run: RunFolder) -> None:
    row(SCORES, prompt="a \ud800 ring")(run)
    assert "a ? ring" in report(run)


# Settings of a stranger


def test_a_run_cannot_ask_for_pickles(run: RunFolder) -> None:
    edit(CONFIG, "model.allow_pickle", True)(run)
    assert load_settings(run.config).model.allow_pickle
    model = Path(load_settings(run.config).model.pretrained or "")
    copy = run.path.parent / "pickled"
    shutil.copytree(model, copy)
    for file in (copy / "unet").glob("*.safetensors"):
        torch.save({}, file.with_suffix(".bin"))
        file.unlink()
    edit(CONFIG, "model.pretrained", str(copy))(run)
    for command in SAMPLING:
        with pytest.raises(ValueError, match=r"pickled weights.*allow_pickle=true in sample"):
            command(run)
    with pytest.raises(Exception, match=r"(?i)missing|tensor|unet"):  # the user's word is believed
        open_model(SampleConfig(run=str(run.path), allow_pickle=True))


@pytest.mark.parametrize("key", ["validation.prompts", "data.prompts", "data.images.path"])
def test_files_that_a_run_names_are_not_read(run: RunFolder, key: str) -> None:
    private = run.path.parent / "private.txt"
    private.write_text(SECRET)
    edit(CONFIG, key, str(private))(run)
    evaluate(run)
    assert SECRET not in report(run)
    assert SECRET not in (run.evaluation(0) / "scores.jsonl").read_text()
    shutil.rmtree(run.path / "samples")
    with pytest.raises(ValueError, match=r"stored no prompts.*give prompts=FILE"):
        evaluate(run)


def test_the_prompts_are_those_that_the_run_showed(run: RunFolder) -> None:
    assert shown_prompts(run) == ["a <moon>", "月" * 200]
    write_pairs(run, 3, {})
    row("samples/step-000003/pairs.jsonl", prompt="a later one")(run)
    assert shown_prompts(run)[0] == "a later one"


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "${oc.env:PATH,x}", "${demo:base}", "???"])
def test_texts_of_a_run_are_not_resolved(run: RunFolder, text: str) -> None:
    edit(CONFIG, "data.column", text)(run)
    edit(CONFIG, "validation.images.sources", {"a": {"path": text}})(run)
    try:
        settings = load_settings(run.config)
    except ValueError as error:
        assert os.environ["HOME"] not in str(error).replace(str(run.path), "")
    else:
        assert settings.data.column == text
        assert settings.validation.images.sources["a"].path == text


def test_aliases_of_a_small_file_are_read(run: RunFolder) -> None:
    content = run.config.read_text()
    run.config.write_text(f"{content}\n".replace("column: null", "column: &c text", 1))
    assert "&c" in run.config.read_text()
    settings = load_settings(run.config)
    assert settings.data.column == "text"
