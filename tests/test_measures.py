"""Metrics of an evaluated run: of the written pictures, by any number of processes; refusals."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import gradient, write_tar
from PIL import Image
from runs import command, in_child, in_processes, start
from test_evaluation_processes import among_others
from tiny_classifiers import write_classifier
from tiny_clip import write_tiny_clip

from sfumato.clip import load_vision
from sfumato.config import DownloadConfig, EvaluateConfig, FilterConfig, PackConfig
from sfumato.evaluation import measures
from sfumato.evaluation.commands import evaluate_run
from sfumato.evaluation.evaluate import hold
from sfumato.evaluation.metrics import cmmd, frechet, kid, precision_recall, vendi
from sfumato.evaluation.results import Evaluation, read_evaluation
from sfumato.images import load_images
from sfumato.preparation.filter import filter_samples
from sfumato.preparation.index import write_index
from sfumato.preparation.pack import pack
from sfumato.rewards.clip import ClipReward
from sfumato.training.distribution import ALONE, Group
from sfumato.training.folder import RunFolder

PROMPTS = [f"a {color} {shape}" for color in ("red", "blue", "pale") for shape in "abcdefghi"]
SIDE = 32
ALL = ["kid", "cmmd", "precision_recall", "vendi", "clip_score"]


@pytest.fixture(scope="module")
def whole(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run of one step, a CLIP, and 60 pictures of the images' size."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "table.jsonl").write_text(
        "".join(
            json.dumps({"prompt": prompt, "tag": "colors", "include": [{"class": "vase"}]}) + "\n"
            for prompt in PROMPTS
        )
    )
    write_tiny_clip(folder / "clip")
    pictures(folder / "pictures", 60)
    start(
        command(
            folder,
            "run",
            *("training.max_steps=1", "validation.every_steps=0", "validation.num_images=1"),
            *("sampler.num_inference_steps=2", "model.trainable=lora", "model.lora.rank=2"),
            model=sd_folder,
        )
    )
    return folder


def pictures(folder: Path, count: int, side: int = SIDE) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(gradient(side, side, 7 * i)).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def place(whole: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "place"
    shutil.copytree(whole, folder)
    return folder


def request(folder: Path, **settings: Any) -> EvaluateConfig:
    asked = {"run": str(folder / "run"), "prompts": str(folder / "table.jsonl"), "num_images": 2}
    asked |= {"steps": [1], "batch_size": 16}
    return EvaluateConfig(**{**asked, **settings})


def measured(folder: Path, *names: str, group: Group = ALONE, **settings: Any) -> list[Evaluation]:
    networks = {"metric_features": str(folder / "clip"), "reference": str(folder / "pictures")}
    asked = request(folder, metrics=list(names or ALL), **{**networks, **settings})
    return list(evaluate_run(asked, group))


def images_of(result: Evaluation) -> torch.Tensor:
    assert result.folder is not None
    return load_images(sorted((result.folder / "images").glob("*.png")))


# ---- numbers


def test_numbers_are_of_the_written_pictures(place: Path) -> None:
    (result,) = measured(place)
    images, clip = images_of(result), str(place / "clip")
    network, text = load_vision(clip, "x"), ClipReward.from_pretrained(clip, score="cosine_100")
    x = torch.cat([network.features(part) for part in images.split(32)])
    y = network.features(load_images(sorted((place / "pictures").iterdir())))
    repeated = [prompt for prompt in PROMPTS for _ in range(2)]
    precision, recall = precision_recall(x, y)
    expected = {
        "kid": kid(x, y),
        "cmmd": cmmd(x, y),
        "precision": precision,
        "recall": recall,
        "vendi": sum(vendi(pair) for pair in x.split(2)) / len(PROMPTS),
        "clip_score": text(images, repeated).mean().item(),
    }
    found = {name: metric.value for name, metric in result.metrics.items()}
    assert found == pytest.approx(expected, rel=1e-3)
    assert 1 < found["vendi"] < 2
    assert found["kid"] > 0


def test_fid_is_of_enough_images(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measures.LEAST, "fid", 50)
    (result,) = measured(place, "fid")
    network = load_vision(str(place / "clip"), "x")
    x = network.features(images_of(result))
    y = network.features(load_images(sorted((place / "pictures").iterdir())))
    assert result.metrics["fid"].value == pytest.approx(frechet(x, y), rel=1e-3)


def test_what_is_measured_stays_and_what_differs_is_measured_again(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (first,) = measured(place, "kid", "vendi")
    assert first.folder is not None
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r"KID \(clip features\) [\d.]+, Vendi score \(clip features\) 1\.\d+", line)
    summary, picture = first.folder / "summary.json", first.folder / "images" / "000-000.png"
    times = [file.stat().st_mtime_ns for file in (summary, picture)]
    assert measured(place, "kid", "vendi") == [first]
    assert [file.stat().st_mtime_ns for file in (summary, picture)] == times
    pictures(place / "others", 55)
    (second,) = measured(place, "kid", reference=str(place / "others"))
    assert second.metrics["vendi"] == first.metrics["vendi"]
    assert second.metrics["kid"].value != first.metrics["kid"].value
    assert second.metrics["kid"].manifest["reference"]["count"] == 55
    assert picture.stat().st_mtime_ns == times[1]


def test_other_images_lose_the_metrics_of_the_old(place: Path) -> None:
    measured(place, "vendi", reference=None)
    (result,) = evaluate_run(request(place, seed=5))
    assert not result.metrics


def test_the_manifest_says_what_a_number_depends_on(place: Path) -> None:
    (result,) = measured(place, "kid")
    found = result.manifest("kid")
    network, reference = found["metric"]["network"], found["metric"]["reference"]
    assert network["kind"] == "clip"
    assert network["resize"]["size"] == 32 and network["resize"]["mode"] == "bicubic"
    assert len(network["sha256"]) == len(reference["sha256"]) == 64
    assert (reference["count"], reference["resize"]) == (60, "none")
    assert found["prompts"] == PROMPTS and found["seed"] == 4321
    assert found["sampler"]["num_inference_steps"] == 2
    assert found["format"] == "PNG, 8 bits"
    assert {"sfumato", "torch", "diffusers", "transformers", "pillow"} <= found["versions"].keys()


def test_variants_have_metrics_of_their_own(place: Path) -> None:
    found = measured(place, "clip_score", reference=None, guidance_scales=[1.0, 4.0], steps=[0])
    scores = [one.metrics["clip_score"].value for one in found]
    assert [one.variant.guidance_scale for one in found] == [1.0, 4.0]
    assert scores[0] != scores[1]
    assert read_evaluation(place / "run/evaluation/guidance_scale_4/step-000000") == found[1]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_work_and_write_the_same_bytes(place: Path, world: int) -> None:
    alone = place.with_name("alone")
    shutil.copytree(place, alone)

    def work(folder: Path) -> Callable[[Group], object]:
        return lambda group: measured(folder, group=group)

    assert in_child(lambda: work(alone)(ALONE)) == 0
    in_processes(world, among_others(work(place)))
    one, many = (path / "run" / "evaluation" / "step-000001" for path in (alone, place))
    for name in ("summary.json", "scores.jsonl", "images/000-000.png", "images/026-001.png"):
        assert (one / name).read_bytes() == (many / name).read_bytes()
    assert json.loads((many / "summary.json").read_text())["metrics"].keys() >= {"kid", "vendi"}


def test_a_prepared_data_set_is_a_reference(place: Path) -> None:
    sizes = place / "sizes"
    sizes.mkdir()
    for i in range(51):  # pictures that are twice as wide: the centre is taken
        wide = Image.fromarray(gradient(SIDE, 2 * SIDE, 7 * i))
        wide.save(sizes / f"{i:03d}.png")
        (sizes / f"{i:03d}.txt").write_text("a picture")
    pack(PackConfig(str(sizes), samples_per_shard=20), DownloadConfig(), place / "set")
    filter_samples(FilterConfig(), place / "set")
    write_index(place / "set")
    (result,) = measured(place, "kid", reference=str(place / "set"))
    described = result.metrics["kid"].manifest["reference"]
    assert (described["count"], described["resize"]) == (51, "shorter side, centre crop")
    centres = pictures(place / "centres", 0)
    for file in sizes.glob("*.png"):
        box = (SIDE // 2, 0, SIDE // 2 + SIDE, SIDE)
        Image.open(file).crop(box).save(centres / file.name)
    (again,) = measured(place, "kid", reference=str(centres))
    assert result.metrics["kid"].value == pytest.approx(again.metrics["kid"].value, rel=0.02)


# ---- layouts


def test_layouts_lie_beside_the_pictures_and_follow_them(place: Path) -> None:
    (result,) = evaluate_run(request(place, layouts=["geneval", "t2i_compbench"]))
    assert result.folder is not None
    place_of = result.folder / "layouts"
    first = place_of / "geneval" / "00000" / "samples" / "00000.png"
    assert first.read_bytes() == (result.folder / "images" / "000-000.png").read_bytes()
    assert len(list((place_of / "t2i_compbench" / "samples").iterdir())) == 2 * len(PROMPTS)
    evaluate_run(request(place, seed=5, layouts=["geneval2"]))
    assert [path.name for path in place_of.iterdir()] == ["geneval2"]


def test_a_layout_is_refused_before_an_image_is_made(place: Path) -> None:
    with pytest.raises(ValueError, match=r"layouts has dpg.* the column item_id"):
        evaluate_run(request(place, layouts=["dpg"]))
    assert not list((place / "run" / "evaluation").glob("step-*"))


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ["fid"]}, r"fid, which needs 2,048 images .* gives 54; .*or take kid"),
        ({"metrics": ["kid"], "num_images": 2, "few": 20}, r"kid, which needs 50 .* gives 40;"),
        ({"metrics": ["cmmd"], "few": 24}, r"cmmd, which needs 50 .* gives 48;"),
        ({"metrics": ["kid"], "reference": None}, r"kid, which compares .* give reference=DIR"),
        ({"metrics": ["vendi"], "metric_features": None}, r"vendi.*: metric_features=DIR"),
        ({"metrics": ["clip_score"], "metric_features": None}, r"clip_score.*: metric_features"),
        ({"metrics": ["kid"], "reference": "nowhere"}, r"reference = '.*nowhere' is no folder"),
        ({"metrics": ["kid"], "reference": "clip"}, r"reference = '.*clip' holds no picture"),
        ({"metrics": ["kid"], "reference": "large"}, r"000.png has 80 x 80 .* have 32 x 32; .*p"),
        ({"metrics": ["kid"], "reference": "scarce"}, r"kid, which needs 50 .*scarce' gives 49"),
        ({"metrics": ["kid"], "reference": "tars"}, r"holds tars such as a.tar; .*sfumato prepare"),
        ({"metrics": ["kid"], "reference": "broken"}, r"000.png cannot be read .*; remove it"),
        ({"metrics": ["vendi"], "metric_features": "nowhere"}, r"metric_features = '.*nowhere'"),
        ({"metrics": ["vendi"], "metric_features": "bert"}, r"model_type 'bert' .*choose a CLIP"),
        ({"metrics": ["cmmd"], "metric_features": "vit"}, r"cmmd.* a CLIP's .* is a ViTFor.*kid"),
        ({"metrics": ["clip_score"], "metric_clip": "vit"}, r"metric_clip = '.*vit' is a ViTFor"),
    ],
)
def test_bad_input_is_named_before_an_image_is_made(
    place: Path, settings: dict[str, Any], message: str
) -> None:
    if few := settings.pop("few", None):
        lines = (place / "table.jsonl").read_text().splitlines(keepends=True)
        (place / "table.jsonl").write_text("".join(lines[:few]))
    pictures(place / "large", 60, side=80)
    pictures(place / "scarce", 49)
    (pictures(place / "broken", 60) / "000.png").write_bytes(b"no picture")
    (place / "tars").mkdir()
    write_tar(place / "tars" / "a.tar", [])
    write_classifier(place / "vit", "vit")
    (place / "bert").mkdir()
    (place / "bert" / "config.json").write_text('{"model_type": "bert"}')
    paths = {key: str(place / value) for key, value in settings.items() if isinstance(value, str)}
    names = settings.pop("metrics")
    with pytest.raises(ValueError, match=message):
        measured(place, *names, **{**settings, **paths})
    assert not list((place / "run" / "evaluation").glob("step-*"))


def test_a_lost_picture_is_named(place: Path) -> None:
    (result,) = evaluate_run(request(place))
    assert result.folder is not None
    (result.folder / "images" / "003-001.png").unlink()
    for settings in ({"metrics": ["vendi"]}, {"layouts": ["geneval2"]}):
        asked = request(place, metric_features=str(place / "clip"), **settings)
        with pytest.raises(ValueError, match=r"lacks images/003-001.png; remove .*step-000001"):
            evaluate_run(asked)
    assert evaluate_run(request(place)) == [result]  # which needs no picture


@pytest.mark.parametrize("step", [1, 7])
def test_a_checkpoint_that_is_gone_is_named(place: Path, step: int) -> None:
    shutil.rmtree(place / "run" / "checkpoints" / f"step-{step:06d}", ignore_errors=True)
    message = "no checkpoint yet; train" if step == 1 else "no checkpoint of step 7; choose one of"
    with pytest.raises(ValueError, match=message):
        measured(place, "vendi", steps=[step])


def test_metrics_wait_for_no_other_evaluation(place: Path) -> None:
    with hold(RunFolder(place / "run")), pytest.raises(ValueError, match="another sfumato evalua"):
        measured(place, "vendi")
    measured(place, "vendi")


def test_a_damaged_metric_is_named(place: Path) -> None:
    (result,) = measured(place, "vendi")
    assert result.folder is not None
    file = result.folder / "summary.json"
    content = json.loads(file.read_text())
    content["metrics"]["vendi"]["value"] = "much"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"metrics.*is damaged.*|is damaged: metrics.*vendi"):
        read_evaluation(result.folder)


def test_settings_without_metrics_are_refused() -> None:
    from sfumato.compose import compose_command

    for setting in ("metric_features=a", "metric_clip=a", "reference=a"):
        with pytest.raises(ValueError, match=f"{setting} has no effect"):
            compose_command("evaluate", ["run=r", setting])
    with pytest.raises(ValueError, match=r"reference=a has no effect"):
        compose_command(
            "evaluate", ["run=r", "metrics=[vendi]", "metric_features=b", "reference=a"]
        )
    with pytest.raises(ValueError, match=r"'fidd' is unknown; choose one of fid, kid"):
        compose_command("evaluate", ["run=r", "metrics=[fidd]", "metric_features=b"])
