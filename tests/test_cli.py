"""The command line: what it answers, what it runs, and what it says to a mistake."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from test_prompts import txt_members, write_tar
from tiny_clip import write_tiny_clip

from sfumato.cli import main
from sfumato.compose import compose_train
from sfumato.config import CONF, TrainConfig
from sfumato.data.entries import Columns
from sfumato.data.left_out import SkipLog
from sfumato.data.sources import list_source
from sfumato.evaluation import commands
from sfumato.run import run as training_run
from sfumato.training.distribution import Distribution
from sfumato.training.loop import Outcome

PROMPTS = ["a red star", "a blue ring", "a green square"]
QUICK = (
    "reward=color",
    "sampler.num_inference_steps=2",
    "training.max_steps=1",
    "training.micro_batch_size=2",
    "training.global_batch_size=2",
    "training.tensorboard=false",
    "validation.num_images=1",
    "verify=false",
)


@dataclass(frozen=True)
class Answer:
    """What a command line came to."""

    code: int
    out: str
    err: str


Call = Callable[..., Answer]


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Call:
    """Run `sfumato ARGUMENTS` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("HYDRA_FULL_ERROR", "DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, os.environ.get(name, "error"))  # the command sets them

    def act(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["sfumato", *arguments])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            code = stop.code
        found = capsys.readouterr()
        return Answer(code, found.out, found.err)

    return act


def shell(*arguments: str, cwd: Path | None = None) -> Answer:
    """Run `python -m sfumato ARGUMENTS` as a process of its own."""
    command = [sys.executable, "-m", "sfumato", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    return Answer(done.returncode, done.stdout, done.stderr)


def assert_mistake(answer: Answer, *expected: str) -> None:
    """Assert exit code 2 and one line on stderr that has all that is expected."""
    assert answer.code == 2, answer
    assert answer.err.startswith("sfumato: ")
    assert answer.err.count("\n") == 1 and answer.err.endswith("\n"), answer.err
    assert "Traceback" not in answer.err + answer.out
    missing = [text for text in expected if text not in answer.err]
    assert not missing, f"{answer.err} lacks {missing}"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with prompt files, good and bad."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "good.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text("\n \n")
    (folder / "columns.csv").write_text("id,legend\n1,a red star\n")
    (folder / "rows.jsonl").write_text('{"id": 1, "legend": "a red star"}\n')
    (folder / "noise.txt").write_bytes(bytes(range(128, 256)) * 20)
    (folder / "noise.tar").write_bytes(bytes(range(256)) * 20)
    (folder / "noise.png").write_bytes(b"\x89PNG")
    write_tar(folder / "cut.tar", txt_members(PROMPTS))
    cut = (folder / "cut.tar").read_bytes()[: 2 * 1024 + 300]  # inside the third header
    (folder / "cut.tar").write_bytes(cut)
    return folder


def spoil(folder: Path) -> None:
    """Put garbage in place of every weight."""
    weights = list(folder.rglob("*.safetensors"))
    assert weights
    for file in weights:
        file.write_bytes(b"garbage")


@pytest.fixture(scope="module")
def broken_model(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder that is complete, but whose weights cannot be read.

    A message that speaks of anything else was therefore given before any weight was loaded.
    """
    folder = tmp_path_factory.mktemp("broken") / "sd"
    shutil.copytree(sd_folder, folder)
    spoil(folder)
    return folder


@pytest.fixture(scope="module")
def broken_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a CLIP folder whose weights cannot be read."""
    folder = tmp_path_factory.mktemp("broken") / "clip"
    write_tiny_clip(folder)
    spoil(folder)
    return folder


@pytest.fixture
def refuse(call: Call, broken_model: Path, files: Path) -> Call:
    """Run `sfumato train` on unreadable weights; later settings win."""

    def act(*overrides: str) -> Answer:
        given = [f"model.pretrained={broken_model}", f"data.prompts={files}/good.txt", *QUICK]
        chosen = {text.split("=")[0]: text for text in [*given, *overrides]}
        return call("train", *chosen.values())

    return act


@pytest.fixture(scope="module")
def run_folder(sd_folder: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    places = [f"model.pretrained={sd_folder}", f"data.prompts={files}/good.txt"]
    config, plain = compose_train([*places, *QUICK, f"runs_dir={folder}"])
    distribution = Distribution(config.training)
    training_run.train(config, plain, distribution)
    distribution.close()
    return folder / "run"


# Answers


COMMANDS = (
    *("prepare", "plan", "train", "launch", "sample", "evaluate", "report", "demo", "recipes"),
    "migrate",
)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_quick_and_loads_nothing(command: str):
    typed = ["sfumato", *command.split(), "--help"]
    run = "try: c.main()\nexcept SystemExit: pass\n"
    code = f"import sys, sfumato.cli as c; sys.argv = {typed}\n{run}"
    shown = "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", f"{code}{shown}"], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert f"usage: sfumato {command or 'COMMAND'}" in done.stdout
    assert not {"torch", "hydra", "omegaconf", "numpy", "diffusers"} & set(done.stderr.split())
    # Processor time: a busy machine makes the answer late, not the program slow.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 0.5


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_the_commands(call: Call, arguments: list[str]):
    answer = call(*arguments)
    assert answer.code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in answer.out


def test_help_explains_a_setting(call: Call):
    answer = call("train", "--help", "objective.kl_coeff")
    assert answer.code == 0
    assert "0 or more" in answer.out
    assert_mistake(call("train", "--help", "objective.kl_coef"), "did you mean objective.kl_coeff")


def test_recipes_are_listed_with_what_they_are(call: Call):
    answer = call("recipes")
    assert answer.code == 0
    for path in (CONF / "recipe").rglob("*.yaml"):
        name = path.relative_to(CONF / "recipe").with_suffix("").as_posix()
        assert f"  recipe={name} " in answer.out
        assert path.read_text().splitlines()[1].strip("# ") in answer.out


def test_version(call: Call):
    answer = call("--version")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.strip().count(".") == 2


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -u -m sfumato --help | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: sfumato")
    assert done.stderr == ""


def test_cfg_job_prints_the_resolved_run(call: Call, tmp_path: Path):
    overrides = ["model.pretrained=M", "data.prompts=P", "reward.pretrained=R"]
    answer = call("train", "recipe=sd15_draft_plus", *overrides, "--cfg", "job")
    assert (answer.code, answer.err) == (0, "")
    content = yaml.safe_load(answer.out)
    assert content["model"]["pretrained"] == "M"
    assert content["objective"]["kl_coeff"] == 0.2
    assert content["validation"]["every_steps"] == 100  # a default
    assert "hydra" not in content
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_of_the_users_own(call: Call, tmp_path: Path):
    (tmp_path / "my" / "recipe").mkdir(parents=True)
    text = (CONF / "recipe" / "sd15_draft.yaml").read_text().replace("sd15_draft", "mine")
    (tmp_path / "my" / "recipe" / "mine.yaml").write_text(text)
    answer = call("train", "--config-dir", "my", "recipe=mine", "--cfg", "job")
    assert yaml.safe_load(answer.out)["name"] == "mine"
    (tmp_path / "my" / "recipe" / "mine.yaml").write_text("a: [")
    assert_mistake(call("train", "--config-dir", "my", "recipe=mine"), "mine.yaml")


# Runs


def test_a_sweep_runs_each_value_under_a_name_of_its_own(
    call: Call, sd_folder: Path, files: Path, tmp_path: Path
):
    given = [f"model.pretrained={sd_folder}", f"data.prompts={files}/good.txt", *QUICK]
    answer = call("train", "objective.kl_coeff=0,0.1", "-m", *given)
    assert answer.code == 0
    runs = tmp_path / "runs"
    names = {"run-kl_coeff=0": 0.0, "run-kl_coeff=0.1": 0.1}
    assert {path.name for path in runs.iterdir() if path.is_dir()} == set(names)
    for name, kl_coeff in names.items():
        config = yaml.safe_load((runs / name / "config.yaml").read_text())
        assert (config["name"], config["objective"]["kl_coeff"]) == (name, kl_coeff)
        rows = [json.loads(line) for line in (runs / name / "metrics.jsonl").open()]
        assert [row["step"] for row in rows] == [0, 1]
        assert ("kl" in rows[-1]) == (kl_coeff > 0)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_sweep_ends_where_one_of_its_runs_is_stopped(
    call: Call, sd_folder: Path, files: Path, monkeypatch: pytest.MonkeyPatch
):
    started: list[str] = []

    def stopped(config: TrainConfig, *_: object, **__: object) -> Outcome:
        started.append(config.name)
        return Outcome(step=0, stopped_by="SIGTERM")

    monkeypatch.setattr(training_run, "train", stopped)
    given = [f"model.pretrained={sd_folder}", f"data.prompts={files}/good.txt", *QUICK]
    assert call("train", "objective.kl_coeff=0,0.1", "-m", *given).code == 0
    assert started == ["run-kl_coeff=0"]


def test_prompts_of_a_cut_tar_are_used_and_the_rest_counted(
    call: Call, sd_folder: Path, files: Path
):
    answer = call("train", f"model.pretrained={sd_folder}", f"data.prompts={files}/cut.tar", *QUICK)
    assert answer.code == 0
    assert "left out: skipped truncated or damaged tar: 1" in answer.out
    assert f"{files}/cut.tar (at byte 2048)" in answer.out


NOTES = ["metadata.jsonl", "sample.json"]


def captions(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "metadata.jsonl").open(encoding="utf-8")
    return [(row["file_name"], row["text"]) for row in map(json.loads, lines)]


def test_sample_writes_pictures_of_a_run(call: Call, run_folder: Path, tmp_path: Path):
    sampling = ["num_images=2", "sampler.num_inference_steps=2", "schedule=linear"]
    answer = call("sample", f"run={run_folder}", "prompt=a star, red", *sampling)
    assert answer.code == 0
    assert answer.out.count("a star, red") == 2
    written = {p.name: p.read_bytes() for p in (tmp_path / "samples").iterdir()}
    assert sorted(written) == ["000-00.png", "000-01.png", *NOTES]
    notes = json.loads(written["sample.json"])
    with Image.open(tmp_path / "samples" / "000-01.png") as picture:
        note = json.loads(picture.text["sfumato"])  # pyright: ignore[reportAttributeAccessIssue]
    assert note == notes["000-01.png"]
    assert (note["prompt"], note["seed"], note["image"]) == ("a star, red", 0, 1)
    assert (note["run"], note["step"], note["schedule"]) == (str(run_folder), 1, "linear")
    assert note["sampler"]["num_inference_steps"] == 2
    assert len(note["checkpoint"]) == 64

    again = call("sample", f"run={run_folder}", "prompt=a moon", "seed=5", *sampling)
    assert again.code == 0
    assert "samples/001/000-00.png  a moon" in again.out
    assert {p.name: p.read_bytes() for p in (tmp_path / "samples").glob("*.*")} == written


@pytest.mark.parametrize("schedules", ["schedule=choice(draft,base)", "schedule=draft,base"])
def test_a_sweep_of_samples_keeps_the_pictures_of_all_its_jobs(
    call: Call, run_folder: Path, tmp_path: Path, schedules: str
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "000-00.png").write_text("mine")
    given = ["num_images=1", "sampler.num_inference_steps=1", "out=out", "prompt=ein rotes Ä"]
    answer = call("sample", f"run={run_folder}", schedules, "-m", *given)
    assert answer.code == 0
    notes = [
        json.loads((tmp_path / "out" / n / "sample.json").read_text())["000-00.png"]
        for n in ("001", "002")
    ]
    assert [note["schedule"] for note in notes] == ["draft", "base"]
    assert notes[0]["prompt"] == "ein rotes Ä"
    assert (tmp_path / "out" / "000-00.png").read_text() == "mine"


def test_a_sample_that_cannot_be_written_is_named_and_leaves_nothing_half(
    call: Call, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(image: Image.Image, file: Path, *_: Any, **__: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    given = ["num_images=1", "sampler.num_inference_steps=1", "prompt=a"]
    answer = call("sample", f"run={run_folder}", *given)
    assert answer.code == 2
    assert "samples/000-00.png could not be written: no space is left" in answer.err
    assert list((tmp_path / "samples").iterdir()) == []


def test_a_disk_that_fills_up_leaves_a_record_of_the_pictures_there_are(
    call: Call, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "mine.txt").write_text("mine")
    save, left = Image.Image.save, [2]

    def filling(image: Image.Image, file: Path, *more: Any, **options: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(image, file, *more, **options)

    monkeypatch.setattr(Image.Image, "save", filling)
    given = ["num_images=3", "sampler.num_inference_steps=1", "prompt=a", f"run={run_folder}"]
    answer = call("sample", *given)
    assert answer.code == 2
    assert "samples/001/000-02.png could not be written: no space is left" in answer.err
    folder = tmp_path / "samples" / "001"
    names = ["000-00.png", "000-01.png"]
    assert sorted(path.name for path in folder.iterdir()) == [*names, *NOTES]
    assert sorted(json.loads((folder / "sample.json").read_text())) == names
    assert [name for name, _ in captions(folder)] == names
    assert call("sample", *given).code == 2  # no picture can be written: no folder is left
    found = {path.name for path in (tmp_path / "samples").iterdir()}
    assert found == {"mine.txt", "001"}


def test_a_picture_that_cannot_be_made_leaves_no_folder(
    call: Call, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("at step 1 the images hold NaN")

    monkeypatch.setattr(commands, "generate", fails)
    assert_mistake(call("sample", f"run={run_folder}", "prompt=a"), "NaN")
    assert list((tmp_path / "samples").iterdir()) == []


ODD = ['a "red" star', "ein rotes Ä, {x}", "a\\ring\u2028on a line", "  star  ", "星"]


def test_samples_are_read_as_images_with_captions(call: Call, sd_folder: Path, tmp_path: Path):
    """By data.images.path, and by Hugging Face's reader of the form."""
    import datasets

    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps({'text': t})}\n" for t in ODD))
    given = [f"pretrained={sd_folder}", "sampler.num_inference_steps=1", "num_images=2"]
    call("sample", *given, "prompts=prompts.jsonl", "out=own")
    assert call("sample", *given, "prompt=mine", "out=own").code == 0  # to own/001
    expected = [text.strip() for text in ODD for _ in range(2)]
    for folder, texts in (("own", expected), ("own/001", ["mine", "mine"])):
        log = SkipLog()
        entries = list_source(folder, None, Columns(), log)
        assert [entry.captions for entry in entries] == [(text,) for text in texts]
        names = [entry.name.rpartition(" ")[2] for entry in entries]
        assert names == [name for name, _ in captions(Path(folder))]
        assert not log.report().skips
    shutil.rmtree("own/001")
    theirs: Any = datasets.load_dataset(
        "imagefolder", data_dir="own", cache_dir="hub", split="train"
    )
    assert [row["text"].strip() for row in theirs] == expected


@pytest.mark.parametrize("cache", ["off", "auto"])
def test_the_base_models_samples_are_the_data_of_ddrl(
    call: Call, sd_folder: Path, files: Path, tmp_path: Path, cache: str
):
    """By the two commands at the head of the method, made small."""
    head = (CONF / "method" / "ddrl.yaml").read_text().replace("\n#         ", " ")
    sample, train = re.findall(r"sfumato (.+)", head)
    (tmp_path / "REWARD").mkdir()
    write_tiny_clip(tmp_path / "REWARD")
    small = ["sampler.height=32", "sampler.width=32", "sampler.num_inference_steps=2"]
    whole = ["model.dtype=float32", "training.precision=no", "model.gradient_checkpointing=false"]
    one = [*QUICK[2:], f"data.images.cache={cache}", "reward.gradient_checkpointing=false"]

    def run(command: str, *overrides: str) -> Answer:
        given = command.replace("DIR", str(sd_folder)).replace("FILE", f"{files}/good.txt").split()
        answer = call(*{text.partition("=")[0]: text for text in [*given, *overrides]}.values())
        assert answer.code == 0, answer.err
        return answer

    run(sample, *small)
    answer = run(train, *small, *whole, *one)
    (metrics,) = (tmp_path / "runs").rglob("metrics.jsonl")
    assert any("mse" in json.loads(line) for line in metrics.open())
    said = "data.images.cache=auto: 3 pictures, encoded in"
    assert (said in answer.out) == (cache == "auto")
    assert "left out" not in answer.out


@pytest.mark.parametrize("folder", ["runs", "out", "."])
def test_a_sweep_writes_nothing_of_its_own(
    call: Call, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
):
    monkeypatch.setattr(commands, "sample_images", lambda _: None)
    file = tmp_path / folder / "multirun.yaml"  # a name that Hydra writes
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    given = [f"run={run_folder}", "prompt=a", "out=out"]
    assert call("sample", "-m", "schedule=draft,base", *given).code == 0
    assert file.read_text() == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


@pytest.mark.parametrize("reader", ["| head -1", "| true", "2>&1 | true", ">&-"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_does_not_end_the_work(tmp_path: Path, reader: str, unbuffered: str):
    program = (
        "import pathlib, sys, time; from sfumato import cli\n"
        "def work(_):\n"
        "    for name in 'abc':\n"
        "        print('\u00e4', name, flush=True); time.sleep(.2)\n"
        "        print('progress', file=sys.stderr)\n"
        "        pathlib.Path(name).touch()\n"
        "cli.run_command = work; sys.argv = ['sfumato']; cli.main()"
    )
    (tmp_path / "program.py").write_text(program)
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} program.py {reader}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": unbuffered},
    )
    assert result.returncode == 0
    assert result.stderr == ("" if "2>&1" in reader else "progress\n" * 3)
    assert result.stdout == ("\\xe4 a\n" if "head" in reader else "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "program.py"]


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", "| cat"])
def test_closed_streams_and_ascii_terminals_end_without_a_traceback(tmp_path: Path, streams: str):
    program = (
        "import sys; from sfumato import cli; cli.USAGE = 'usage: \u00e4 \u2603'; "
        "sys.argv = ['sfumato']; cli.main()"
    )
    command = f'{sys.executable} -c "{program}" {streams}'
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert ("\\xe4 \\u2603" in result.stdout) == (not streams.startswith(">&-"))


# Mistakes in what is typed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], ["unknown command 'trian'", "did you mean train?"]),
        (
            ["qqq"],
            [
                "unknown command 'qqq'",
                "train, sample, evaluate, plan, prepare, launch, report, recipes, migrate, "
                "push, demo",
            ],
        ),
        (["train"], ["missing settings: data.prompts, model.pretrained"]),
        (
            ["train", "recipe=sd15_draft_plos"],
            ["recipe = sd15_draft_plos", "did you mean sd15_draft_plus?", "sd21_draft_plus"],
        ),
        (["train", "reward=colour"], ["reward = colour", "did you mean color?", "weighted"]),
        (["train", "objective=drafft"], ["objective = drafft", "did you mean draft?"]),
        (["train", "objectiv=draft"], ["unknown key objectiv", "did you mean objective?"]),
        (["train", "recip=sd15_draft"], ["unknown key recip", "did you mean recipe?"]),
        (["train", "--config-dir", "nowhere"], ["nowhere", "not found"]),
        (["sample"], ["run=FOLDER or pretrained=MODEL"]),
        (["sample", "run=a", "pretrained=b"], ["run=FOLDER or pretrained=MODEL"]),
        (["sample", "run=a"], ['prompt="..." or prompts=FILE']),
        (["sample", "rum=a"], ["unknown key rum", "did you mean run?"]),
        (["sample", "run=a", "negative_prompt=b"], ["did you mean sampler.negative_prompt?"]),
        (["sample", "run=a", "sampler.kind=b"], ["sampler.kind", "run with --help sampler to see"]),
        (
            ["sample", "run=a", "reward=jpeg"],
            ["reward", "of sfumato train", "not of this command"],
        ),
        (["evaluate", "run=a", "reward.scale=2"], ["reward.scale", "reward=color or reward="]),
        (["sample", "recipe=sd15_draft"], ["recipe", "of sfumato train", "not of this command"]),
        (["evaluate", "run=a", "num_images=1"], ["num_images=1", "give 2 or more"]),
        (
            ["train", "recipe=demo_draft_plus", "reward=jpeg"],
            [
                "reward=jpeg",
                "not differentiable",
                "reward.parts of reward=weighted",
                "leave reward",
            ],
        ),
        (
            ["train", "recipe=demo_draft_plus", "reward=color"],
            ["reward=color", "reward.parts of reward=weighted"],
        ),
        (["train", "recipe=ladder/demo"], ["the recipe sets", "those in ladder/ are for launch"]),
        (
            ["prepare", "out=a", "recipe=sd15_draft"],
            ["the recipe", "those in prepare/ for prepare"],
        ),
        (["sample", "run=a", "prompt=b", "num_images=many"], ["num_images = many", "whole num"]),
        (["evaluate"], ["missing settings: run"]),
        (["evaluate", "run=a", "steps=3"], ["steps = 3", "is not a list"]),
        (["evaluate", "run=nowhere"], ["nowhere is no run folder", "config.yaml"]),
        (["sample", "run=nowhere", "prompt=a"], ["nowhere is no run folder", "config.yaml"]),
        (["report", "nowhere"], ["nowhere", "no run folder"]),
        (["report", "."], [". is no run folder", "config.yaml"]),
    ],
)
def test_a_mistyped_command_is_explained(call: Call, arguments: list[str], expected: list[str]):
    assert_mistake(call(*arguments), *expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("objective.kl_coef=1", ["objective.kl_coef", "did you mean objective.kl_coeff?"]),
        ("+objective.kl_coef=1", ["objective.kl_coef", "did you mean objective.kl_coeff?"]),
        ("+nmae=x", ["unknown key nmae", "did you mean name?"]),
        ("reward.pretrained=R", ["reward.pretrained is a setting of reward=clip"]),
        ("reward.parts.a=1", ["reward.parts is a setting of reward=weighted"]),
        ("training.max_steps=abc", ["training.max_steps = abc is not a whole number"]),
        ("training.max_steps=1.5", ["training.max_steps = 1.5 is not a whole number"]),
        ("training.max_steps=null", ["training.max_steps = null must have a value"]),
        ("objective.kl_coeff=[1]", ["objective.kl_coeff = [1] is not a number"]),
        ("training.tensorboard=perhaps", ["training.tensorboard = perhaps is not true or false"]),
        ("optimizer.betas=0.9", ["optimizer.betas = 0.9 is not a list"]),
        ("objective.truncation_range=[a,3]", ["truncation_range = [a,3]: a is not a whole number"]),
        ("model=big", ["model = big: model is a group of settings", "such as model.allow_pickle="]),
        ("~objective.kl_coeff", ["~objective.kl_coeff: settings cannot be removed"]),
        ("objective.kl_coeff=0,1", ["objective.kl_coeff=0,1 has several values; add -m"]),
        ("objective.kl_coeff=${nope}", ["objective.kl_coeff", "'nope' not found"]),
        ("objective.kl_coeff=nan", ["objective.kl_coeff=nan must be finite"]),
        ("objective.kl_coeff=-1", ["objective.kl_coeff=-1.0", "give 0 or more"]),
        ("optimizer.lr=inf", ["optimizer.lr=inf must be finite"]),
        ("objective.truncation_steps=3", ["objective.truncation_steps=3", "give 2"]),
        ("training.global_batch_size=3", ["training.global_batch_size=3", "nearest", "is 4"]),
        ("training.max_time=soon", ["training.max_time='soon'", "MM:SS"]),
        ("name=a/b", ["name='a/b'", "without slashes"]),
        ("reward=jpeg", ["reward=jpeg is not differentiable", "reward=color"]),
        ("max_steps", ["'max_steps' is no setting; write KEY=VALUE"]),
        ("data.prompts=nofile.txt", ["no such file: nofile.txt", "data.prompts"]),
        ("data.prompts=shards/{0..2}.tar", ["no such file: shards/0.tar, shards/1.tar"]),
        ("data.prompts=*.tar", ["no file matches data.prompts = '*.tar'"]),
        (
            "data.prompts=.",
            ["no file matches data.prompts = '.'", "a folder with .tar files in it"],
        ),
        ("data.prompts=", ["data.prompts='' is empty"]),
        ("data.column=legend", ["column='legend' was given", "data.prompts", "has no columns"]),
        ("validation.prompts=nofile.txt", ["no such file: nofile.txt", "validation.prompts"]),
        ("model.pretrained=nofolder", ["model.pretrained = 'nofolder': no such folder"]),
        ("model.pretrained=.", ["has no model_index.json", "top folder of a diffusers pipeline"]),
        ("runs_dir=/proc/nowhere", ["/proc/nowhere/run cannot be made", "set runs_dir=..."]),
    ],
)
def test_a_wrong_setting_is_explained_before_weights_are_read(
    refuse: Call, override: str, expected: list[str]
):
    assert_mistake(refuse(override), *expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.prompts={}/empty.txt", ["no prompt can be read", "empty.txt", "without a prompt"]),
        ("data.prompts={}/blank.txt", ["no prompt can be read", "blank.txt", "blank prompt: 2"]),
        ("data.prompts={}/noise.txt", ["no prompt can be read", "noise.txt", "not UTF-8"]),
        ("data.prompts={}/noise.tar", ["no prompt can be read", "noise.tar", "not a tar"]),
        ("data.prompts={}/noise.png", ["data.prompts", "suffix '.png'", ".txt, .csv"]),
        ("data.prompts={}/columns.csv", ["no column 'prompt'", "columns are 'id', 'legend'"]),
        ("data.prompts={}/rows.jsonl", ["no column 'prompt'", "columns are 'id', 'legend'"]),
        ("model.pretrained={}/good.txt", ["good.txt' is a file; give a diffusers folder"]),
        ("runs_dir={}/good.txt", ["good.txt/run cannot be made", "runs_dir=..."]),
    ],
)
def test_a_wrong_file_is_explained_before_weights_are_read(
    refuse: Call, files: Path, override: str, expected: list[str]
):
    assert_mistake(refuse(override.format(files)), *expected)


def test_a_global_batch_must_divide_over_the_processes(
    refuse: Call, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "3")
    answer = refuse("training.global_batch_size=8")
    assert_mistake(answer, "training.global_batch_size=8", "3 process(es)", "micro batches of 2")
    monkeypatch.setenv("RANK", "1")
    answer = refuse("training.global_batch_size=8")
    assert answer.code == 2
    assert answer.err.startswith("sfumato (process 1): training.global_batch_size=8")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sampler.height=33", ["sampler.height = 33", "multiple of 4 pixels", "nearest is 32"]),
        ("sampler.num_inference_steps=1001", ["num_inference_steps = 1001", "1000"]),
    ],
)
def test_what_the_model_cannot_do_is_explained_before_weights_are_read(
    call: Call, refuse: Call, broken_model: Path, override: str, expected: list[str]
):
    assert_mistake(refuse(override), *expected)
    sampled = call("sample", f"pretrained={broken_model}", "prompt=a star", override)
    assert_mistake(sampled, *expected)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_unreadable_weights_are_explained(
    call: Call, sd_folder: Path, files: Path, tmp_path: Path, part: str
):
    folder = tmp_path / "model"
    shutil.copytree(sd_folder, folder)
    spoil(folder / part)
    answer = call("train", f"model.pretrained={folder}", f"data.prompts={files}/good.txt", *QUICK)
    assert_mistake(answer, f"{part} of model.pretrained: {folder / part} could not be read")


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("vae/config.json", ["lacks vae/config.json", "download or export it again"]),
        ("unet/diffusion_pytorch_model.safetensors", ["unet holds no weights"]),
        ("model_index.json", ["has no model_index.json"]),
    ],
)
def test_an_incomplete_model_is_explained_before_weights_are_read(
    refuse: Call, broken_model: Path, tmp_path: Path, missing: str, expected: list[str]
):
    folder = tmp_path / "model"
    shutil.copytree(broken_model, folder)
    (folder / missing).unlink()
    assert_mistake(refuse(f"model.pretrained={folder}"), str(folder), *expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            b"\x00\x80garbage",
            ["model_index.json is damaged", "not JSON", "download the model again"],
        ),
        (b'{"_class_name": "LTXPipeline"}', ["is a LTXPipeline", "StableDiffusionPipeline"]),
        (b"[]", ["names no pipeline class"]),
    ],
)
def test_a_model_of_another_kind_is_explained_before_weights_are_read(
    refuse: Call, broken_model: Path, tmp_path: Path, content: bytes, expected: list[str]
):
    folder = tmp_path / "model"
    shutil.copytree(broken_model, folder)
    (folder / "model_index.json").write_bytes(content)
    assert_mistake(refuse(f"model.pretrained={folder}"), str(folder), *expected)


def test_a_wrong_reward_model_is_explained_before_the_model_is_read(
    refuse: Call, broken_model: Path, broken_clip: Path
):
    nowhere = refuse("reward=clip", "reward.pretrained=nofolder")
    assert_mistake(nowhere, "reward.pretrained = 'nofolder' is no folder here")
    other = refuse("reward=clip", f"reward.pretrained={broken_model}")
    assert_mistake(other, f"{broken_model} has no config.json", "CLIPModel")
    damaged = refuse("reward=clip", f"reward.pretrained={broken_clip}")
    assert_mistake(damaged, f"{broken_clip} could not be read", "again")


def test_a_reward_without_gradient_in_a_sum_is_explained_before_weights_are_read(
    refuse: Call, broken_clip: Path
):
    parts = [
        f"+reward.parts.a={{kind: clip, pretrained: {broken_clip}}}",
        "+reward.parts.b={kind: jpeg}",
    ]
    answer = refuse("reward=weighted", *parts)
    assert_mistake(answer, "reward.parts.b=jpeg is not differentiable")


def test_other_settings_in_a_run_folder_are_named(call: Call, run_folder: Path):
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    given = [f"model.pretrained={config['model']['pretrained']}", *QUICK]
    given += [f"data.prompts={config['data']['prompts']}", f"runs_dir={run_folder.parent}"]
    answer = call("train", *given, "objective.kl_coeff=7")
    assert_mistake(answer, "objective.kl_coeff: 1.0 -> 7.0", "name=...")


@pytest.mark.parametrize(
    ("swept", "expected"),
    [
        ("reward.color=red,purple", ["reward.color='purple'", "none has begun"]),
        ("objective.truncation_steps=1,99", ["truncation_steps=99 is more", "none has begun"]),
        ("objective.lv_samples=0,1 objective.truncation_steps=1,2", ["DRaFT-LV"]),
    ],
)
def test_a_sweep_is_checked_whole_before_its_first_job(
    call: Call, sd_folder: Path, files: Path, tmp_path: Path, swept: str, expected: list[str]
):
    given = [f"model.pretrained={sd_folder}", f"data.prompts={files}/good.txt", *QUICK]
    answer = call("train", "-m", *given, f"runs_dir={tmp_path}", *swept.split())
    assert_mistake(answer, *expected)
    assert list(tmp_path.iterdir()) == []


# Mistakes about runs


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sample", "prompt=a", "step=7"], ["no checkpoint of step 7", "step-000001"]),
        (["evaluate", "steps=[1,7]"], ["no checkpoint of step 7", "step-000001"]),
        (["sample", "prompt=a", "schedule=cubic"], ["'cubic'", "power_P", "step_F"]),
        (["sample", "prompt=a", "schedule=power_-1"], ["'power_-1'", "P > 0"]),
        (["sample", "prompt=a", "sampler.guidance_scale=1e300"], ["not finite", "guidance_scale"]),
        (["evaluate", "prompts=~nosuchuser/p.txt"], ["~NAME", "the whole path"]),
        (["sample", "prompt=caf\udce9"], ["prompt = 'caf", "not UTF-8"]),
        (["sample", f"prompt={'a' * 10_001}"], ["more than 10,000 characters"]),
        (["sample", "prompt=a", f"step={'9' * 5_000}"], ["is no checkpoint", "step=best"]),
        (["sample", "prompt=a", "sampler.eta=2"], ["sampler.eta=2.0", "give 1 or less"]),
        (
            ["sample", "prompt=a", "sampler.guidance_scale=nan"],
            ["sampler.guidance_scale=nan"],
        ),
        (["sample", "prompt=a", "num_images=0"], ["num_images=0", "give 1 or more"]),
        (["sample", "prompts=nofile.txt"], ["no such file: nofile.txt"]),
        (["evaluate", "prompts=nofile.txt"], ["no such file: nofile.txt"]),
        (["evaluate", "num_images=1"], ["num_images=1", "give 2 or more"]),
    ],
)
def test_what_a_run_does_not_have_is_explained(
    call: Call, run_folder: Path, arguments: Sequence[str], expected: list[str]
):
    assert_mistake(call(arguments[0], f"run={run_folder}", *arguments[1:]), *expected)


@pytest.mark.parametrize("command", ["sample", "evaluate", "report"])
def test_a_damaged_run_folder_is_explained(call: Call, tmp_path: Path, command: str):
    (tmp_path / "config.yaml").write_bytes(b"\x00\xff\x80")
    given = {"sample": ["run=.", "prompt=a"], "evaluate": ["run=."], "report": ["."]}[command]
    assert_mistake(call(command, *given), "config.yaml is damaged: it is not YAML")


# Failures that are nobody's mistake, and mistakes of ours


def test_the_same_holds_in_a_process_of_its_own(tmp_path: Path):
    assert_mistake(shell("train", "recipe=sd15", cwd=tmp_path), "recipe = sd15 is unknown")
    assert_mistake(shell("report", "nowhere", cwd=tmp_path), "nowhere")
    assert list(tmp_path.iterdir()) == []


def raising(error: BaseException) -> Callable[..., None]:
    def act(*_: object, **__: object) -> None:
        raise error

    return act


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_is_explained(
    refuse: Call, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    monkeypatch.setattr(training_run, "train", raising(error))
    answer = refuse()
    assert answer.code == 1
    assert "out of memory" in answer.err and "Traceback" not in answer.err
    for advice in ("training.micro_batch_size", "model.gradient_checkpointing=true"):
        assert advice in answer.err


def test_a_mistake_of_ours_keeps_its_traceback(refuse: Call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training_run, "train", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        refuse()
    monkeypatch.setattr(training_run, "train", raising(ValueError("first\n  second")))
    assert_mistake(refuse(), "first second")
    monkeypatch.setenv("SFUMATO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="first"):
        refuse()


def test_ctrl_c_stops_without_a_traceback(refuse: Call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training_run, "train", raising(KeyboardInterrupt()))
    answer = refuse()
    assert answer.code == 130
    assert answer.err.strip().endswith("stopped") and "Traceback" not in answer.err


# Settings and options without effect


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--count", "3"], "--count 3 is of one stage of the rebuild"),
        (["--count", "3", "--rebuild", "x"], "--count 3 is of one stage of the rebuild"),
        (["--count", "0", "--rebuild", "x", "--stage", "text"], "--count 0 must be 1 or more"),
        (["--stage", "text"], "--stage text is of the rebuild"),
        (["--seed", "3", "--rebuild", "x"], "--seed 3 is of the demo"),
        (["--out", "y", "--rebuild", "x"], "--rebuild does not write to --out"),
    ],
)
def test_an_option_of_the_demo_that_does_nothing_is_refused(
    call: Call, options: list[str], said: str
):
    answer = call("demo", *options)
    assert answer.code == 2 and said in answer.err


def test_what_a_recipe_sets_in_vain_is_said(call: Call):
    given = ["model.pretrained=/nowhere", "data.shards.path=/nowhere", "model.trainable=full"]
    answer = call("train", "recipe=sd15_sft_lora", *given)
    said = [line for line in answer.out.splitlines() if line.startswith("the recipe's ")]
    assert said == [
        "the recipe's model.lora.rank=4 has no effect with model.trainable=full",
        r"the recipe's model.lora.targets=[.*attn\d?\.to_[qkv], .*attn\d?\.to_out\.0] has no "
        "effect with model.trainable=full",
        "the recipe's data.images.flip=true has no effect without data.images.path or "
        "data.images.sources",
    ]
