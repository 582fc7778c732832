"""Caches of a run's preference pairs: the same training; no step decodes or encodes."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import WRITERS
from image_files import png
from nightly import nightly_but
from runs import assert_same_state, in_child, in_processes, kill, metrics, on_call, start
from safetensors.torch import load_file
from test_dpo import command
from test_images_cache import cache_bytes, encode
from test_pairs import Row, as_files, config_of, counts, rows_of, write_jsonl, write_parquet
from tiny_sd import load_tiny_sd, write_tiny_sd

from sfumato.compose import compose_command, compose_train
from sfumato.config import ModelConfig, PairDataConfig
from sfumato.data import encoded as reading
from sfumato.data import sample as sampling
from sfumato.data.encoded import Pictures
from sfumato.data.epochs import RowPick
from sfumato.data.pairs import open_pictured_pairs
from sfumato.data.prepared.format import PreparedError
from sfumato.data.row_groups import RowGroup
from sfumato.data.sample import Preference
from sfumato.data.stream import OrderedStream
from sfumato.models.pipeline_model import PipelineModel
from sfumato.planning.blueprint import read_blueprint
from sfumato.planning.plan import cost_of
from sfumato.preparation.encoder_hash import cache_identity
from sfumato.run import run
from sfumato.run.open_data import is_cached, why_uncached
from sfumato.training.distribution import Distribution

pytestmark = pytest.mark.usefixtures("unchecked")
KILLED, SIZE = -9, 32
CACHE = ("data.pairs.cache=auto",)
BROKEN: list[tuple[int, Row, str]] = [
    (1, {"jpg_0": None}, "no picture"),
    (3, {"jpg_0": png(8, 8, 3), "jpg_1": png(8, 8, 3)}, "two equal pictures"),
    (5, {"jpg_1": png(64, 64)[:80]}, "truncated or damaged image"),  # its header is good
    (6, {"jpg_1": b"<html>"}, "not an image (JPEG, PNG, WEBP, BMP)"),
]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reading, "SHARD", 4)  # so that a few pairs make several shards
    monkeypatch.chdir(tmp_path)


def rows(broken: Sequence[tuple[int, Row, str]] = ()) -> list[Row]:
    """Return 13 pairs, of which two are ties; both pictures of each have shapes of their own."""
    found = [
        {**row, "jpg_0": png(32, 40 + i, 2 * i), "jpg_1": png(48, 33, 2 * i + 1)}
        for i, row in enumerate(rows_of(13))
    ]
    for i, fault, _ in broken:
        found[i] |= fault
    return found


def written(folder: Path, kind: str, found: Sequence[Row]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        return write_parquet(folder / "a.parquet", found)
    named = as_files(folder, [{**r, **{n: r[n] or b"" for n in ("jpg_0", "jpg_1")}} for r in found])
    for row, before in zip(named, found, strict=True):
        row |= {name: None for name in ("jpg_0", "jpg_1") if before[name] is None}
    return write_jsonl(folder / "a.jsonl", named)


def opened(
    table: Path, **settings: Any
) -> tuple[OrderedStream[RowPick, Preference], Pictures | None]:
    config = config_of(table, **settings)
    return open_pictured_pairs(config, height=SIZE, width=SIZE, seed=3)


def cached(
    table: Path, model: Path, folder: Path, **settings: Any
) -> tuple[OrderedStream[RowPick, Preference], Pictures]:
    stream, found = opened(table, cache="auto", **settings)
    assert found is not None and encode(found, model, folder) is None
    return stream, found


# --- What is read


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize(("workers", "flip"), [(0, False), (2, False), (0, True)])
@torch.no_grad()
def test_rows_are_the_encodings_of_the_same_pairs(
    tmp_path: Path, sd_folder: Path, kind: str, workers: int, flip: bool
) -> None:
    """Order, labels, captions, framing and what is left out stay; moments are of the pixels."""
    table = written(tmp_path / "pairs", kind, rows(BROKEN))
    plain, nothing = opened(table, ties="keep", flip=flip)
    assert nothing is None
    stream, _ = cached(table, sd_folder, tmp_path / "run", ties="keep", workers=workers, flip=flip)
    model = load_tiny_sd(sd_folder)
    for _ in range(2 * 13):
        (left,), (right,) = stream.next(1, 0, 1), plain.next(1, 0, 1)
        assert left.label == right.label
        states = []
        for found, other in ((left.first, right.first), (left.second, right.second)):
            assert found.encoded is not None and found.image is None
            facts = [(s.caption, s.original, s.crop, s.name, s.size) for s in (found, other)]
            assert facts[0] == facts[1]
            moments = found.encoded.moments.float()
            expected = model.encode_moments(other.pixels[None])[0]
            assert (moments - expected).abs().max() < 4e-3
            states.append(found.encoded.text)
        for name, expected in model.encode_prompts([right.first.caption]).tensors.items():
            assert torch.allclose(states[0][name].float(), expected.float(), atol=4e-3)
            assert torch.equal(states[0][name], states[1][name])
    assert counts(stream) == counts(plain) == {reason: 1 for *_, reason in BROKEN}
    assert stream.state() == plain.state()


def test_the_format_is_that_of_prepare_and_each_caption_is_encoded_once(
    tmp_path: Path, sd_folder: Path
) -> None:
    cached(written(tmp_path, "parquet", rows()), sd_folder, tmp_path)
    config = ModelConfig(pretrained=str(sd_folder))
    identity = cache_identity(config, height=SIZE, width=SIZE, flip=False, dtype="float16")
    folders = {path.name for path in (tmp_path / "cache").iterdir()}
    assert folders == {identity.moments_folder, identity.text_folder}
    shard = tmp_path / "cache" / identity.text_folder / "000000.safetensors"
    assert load_file(shard)["offsets"].tolist() == [0, 1, 1, 2, 2]
    assert len(list((tmp_path / "cache").rglob("00000?.safetensors"))) == 2 * 6  # of 11 pairs


def test_no_step_reads_a_picture_and_none_is_kept(
    tmp_path: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, found = cached(written(tmp_path, "parquet", rows()), sd_folder, tmp_path, buffer=1)

    def fail(*_: Any) -> None:
        raise AssertionError("a picture is read")

    monkeypatch.setattr(RowGroup, "__init__", fail)
    monkeypatch.setattr(RowGroup, "row", fail)
    monkeypatch.setattr(sampling, "read_rgb", fail)
    assert len(stream.next(22, 0, 22)) == 22
    assert {type(entry.blob).__name__ for entry in found.entries} == {"RowBlob"}


def test_pairs_are_read_on_from_the_exact_place(tmp_path: Path, sd_folder: Path) -> None:
    table = written(tmp_path, "jsonl", rows(BROKEN))
    whole, _ = cached(table, sd_folder, tmp_path, workers=2, prefetch=2)
    seen = [str(pair) for _ in range(9) for pair in whole.next(3, 0, 3)]
    part, _ = cached(table, sd_folder, tmp_path)
    before = [str(pair) for _ in range(4) for pair in part.next(3, 0, 3)]
    again, _ = opened(table)  # without a cache, as the place is the same
    again.restore(part.state())
    assert before + [str(pair) for _ in range(5) for pair in again.next(3, 0, 3)] == seen


# --- Whole runs


def dpo(folder: Path, name: str, table: Path, model: Path, *more: str) -> list[str]:
    size = (f"sampler.height={SIZE}", f"sampler.width={SIZE}", "training.keep_checkpoints=null")
    given = command(folder, name, table, str(model), *size, "model.lora.rank=2", *CACHE, *more)
    return list({text.partition("=")[0]: text for text in given}.values())


def series(folder: Path, key: str) -> list[float]:
    return [row[key] for row in metrics(folder) if key in row]


FAMILIES = ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3"]


@pytest.mark.parametrize("family", nightly_but(["stable_diffusion_xl"], FAMILIES))
def test_the_losses_are_those_of_pictures(tmp_path: Path, family: str) -> None:
    """Over two epochs; SDXL reads the size and the crop of each picture."""
    WRITERS[family](tmp_path / "model")
    table = written(tmp_path, "parquet", rows(BROKEN))
    more = ("objective.beta=100", "objective.caption_dropout=0.3", "optimizer.lr=1e-3")
    for name in ("auto", "off"):
        flags = (f"data.pairs.cache={name}", "validation.every_steps=0", *more)
        start(dpo(tmp_path, name, table, tmp_path / "model", *flags))
    for key in ("loss", "mse", "margin"):
        found, expected = series(tmp_path / "auto", key), series(tmp_path / "off", key)
        assert len(expected) == 4
        assert found == pytest.approx(expected, rel=0, abs=1e-4), key
    assert max(map(abs, series(tmp_path / "off", "margin"))) > 1e-3
    assert series(tmp_path / "auto", "mse") != series(tmp_path / "off", "mse")
    left_out = [(tmp_path / name / "left_out.json").read_text() for name in ("auto", "off")]
    assert left_out[0] == left_out[1]


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Path:
    """Return a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("uncut")
    table = written(folder / "pairs", "parquet", rows(BROKEN[:2]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "SHARD", 4)
        start(dpo(folder, "whole", table, sd_folder))
    return folder / "whole"


@pytest.mark.parametrize(
    ("function", "number"), [("begin_cache", 2), ("write_shard", 4), ("take_step", 4)]
)
def test_killed_and_called_again_it_ends_bitwise_the_same(
    tmp_path: Path, sd_folder: Path, uncut: Path, function: str, number: int
) -> None:
    again = dpo(tmp_path, "run", uncut.parent / "pairs" / "a.parquet", sd_folder)

    def die() -> None:
        on_call(number, kill, function)
        start(again)

    assert in_child(die) == KILLED
    kept = cache_bytes(tmp_path / "run")
    assert in_child(lambda: start(again)) == 0
    assert_same_state(tmp_path / "run", uncut)
    assert cache_bytes(tmp_path / "run") == cache_bytes(uncut)
    assert kept.items() <= cache_bytes(uncut).items(), "what was written stays"


def test_two_processes_equal_one(tmp_path: Path, sd_folder: Path, uncut: Path) -> None:
    two = dpo(tmp_path, "two", uncut.parent / "pairs" / "a.parquet", sd_folder)
    in_processes(2, lambda _: start(two))
    assert cache_bytes(tmp_path / "two") == cache_bytes(uncut)
    assert series(tmp_path / "two", "loss") == pytest.approx(series(uncut, "loss"), rel=1e-5)


def test_a_run_that_began_without_goes_on_without(
    tmp_path: Path, sd_folder: Path, uncut: Path
) -> None:
    table = uncut.parent / "pairs" / "a.parquet"
    with pytest.raises(ValueError, match=r"data\.pairs\.cache: .*choose another name"):
        start(dpo(uncut.parent, "whole", table, sd_folder, "data.pairs.cache=off"))


# --- What is refused, and what is made again


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("weights", r"autoencoder \(\w{64} in the cache, \w{64} in the run\)"),
        ("size", r"height \(32 in the cache, 40 in the run\)"),
    ],
)
def test_another_cache_is_refused_by_name(
    tmp_path: Path, sd_folder: Path, change: str, said: str
) -> None:
    table, model = written(tmp_path, "parquet", rows()), sd_folder
    cached(table, sd_folder, tmp_path)
    before = cache_bytes(tmp_path)
    if change == "weights":
        write_tiny_sd(model := tmp_path / "other", seed=1)
    config = replace(PairDataConfig(path=str(table)), cache="auto")
    height = 40 if change == "size" else SIZE
    _, found = open_pictured_pairs(config, height=height, width=SIZE, seed=3)
    assert found is not None
    with pytest.raises(PreparedError, match=f"{said}.* Remove that folder, or choose another name"):
        encode(found, model, tmp_path)
    assert cache_bytes(tmp_path) == before


@pytest.mark.parametrize("change", ["picture", "caption", "order", "table"])
def test_what_changed_is_encoded_again_and_nothing_else(
    tmp_path: Path, sd_folder: Path, change: str
) -> None:
    kind, broken = ("parquet", BROKEN[:2]) if change == "table" else ("jsonl", ())
    table = written(tmp_path / "pairs", kind, rows(broken))
    cached(table, sd_folder, tmp_path)
    before, changed = cache_bytes(tmp_path), rows(broken)
    if change == "picture":
        (tmp_path / "pairs" / "002-jpg_1.png").write_bytes(png(40, 40, 9))
    elif change == "table":
        changed[0] |= {"jpg_0": png(40, 40, 9)}
        written(tmp_path / "pairs", kind, changed)
    else:
        lines = table.read_text().splitlines()
        if change == "caption":
            lines[2] = lines[2].replace("caption 2", "another")
        else:
            lines[2], lines[3] = lines[3], lines[2]
        table.write_text("\n".join(lines) + "\n")
    cached(table, sd_folder, tmp_path)
    after = cache_bytes(tmp_path)
    found = {Path(name).name for name in after if after[name] != before[name]}
    kinds = {name.split("/")[1].split("-")[0] for name in after if after[name] != before[name]}
    if change == "table":  # records of all its row groups; of the moments only one
        assert {Path(n).stem for n in found if n.endswith(".safetensors")} == {"000000"}
        assert kinds == {"moments"} and len(found) == 7
    else:
        assert {Path(name).stem for name in found} == {"000001"}
        expected = {"picture": {"moments"}, "caption": {"text"}}
        assert kinds == expected.get(change, {"moments", "text"})
    cached(table, sd_folder, tmp_path / "fresh")
    assert cache_bytes(tmp_path / "fresh") == after


def test_a_damaged_shard_is_refused(tmp_path: Path, sd_folder: Path) -> None:
    table = written(tmp_path, "parquet", rows())
    cached(table, sd_folder, tmp_path)
    (file,) = (tmp_path / "cache").glob("moments-*/000001.safetensors")
    os.truncate(file, file.stat().st_size - 5)
    stream, _ = cached(table, sd_folder, tmp_path)
    with pytest.raises(PreparedError, match="is damaged or was changed") as error:
        stream.next(11, 0, 11)
    assert str(file) in str(error.value)


def test_values_beyond_float16_say_which_setting_to_change(
    tmp_path: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding = PipelineModel.encode_moments
    monkeypatch.setattr(PipelineModel, "encode_moments", lambda *a: encoding(*a) + 1e6)
    with pytest.raises(ValueError, match=r"jpg_0.* cannot hold; set data\.pairs\.cache=off"):
        cached(written(tmp_path, "parquet", rows()), sd_folder, tmp_path)


# --- What a cache cannot hold


@pytest.mark.parametrize("recipe", ["sd15_dpo", "sdxl_dpo", "sd35_dpo"])
def test_every_recipe_goes_with_a_cache(recipe: str) -> None:
    given = [f"recipe={recipe}", "model.pretrained=M", "data.pairs.path=P"]
    assert compose_train(given)[0].data.pairs.cache == "off"
    assert why_uncached(compose_train([*given, *CACHE])[0]) is None


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("crop", "random", "off, as data.pairs.crop=random cuts each picture anew"),
        ("none", None, "22 pictures, encoded in"),
    ],
)
def test_what_switches_it_off_is_said(
    tmp_path: Path,
    sd_folder: Path,
    capfd: pytest.CaptureFixture[str],
    key: str,
    value: Any,
    said: str,
) -> None:
    """As a recipe may have both; the run then reads pictures."""
    table = written(tmp_path / "pairs", "parquet", rows())
    one = ("training.max_steps=1", "validation.every_steps=0")
    config, plain = compose_train(dpo(tmp_path, "run", table, sd_folder, *one))
    if value is not None:
        config.data.pairs = replace(config.data.pairs, **{key: value})
    assert is_cached(config) == (value is None)
    distribution = Distribution(config.training)
    try:
        run.train(config, plain, distribution)
    finally:
        distribution.close()
    assert f"data.pairs.cache=auto: {said}" in capfd.readouterr().out
    assert (tmp_path / "run" / "cache").exists() == (value is None)


def test_a_plan_knows_that_encoders_do_not_run(sd_folder: Path) -> None:
    given = ["objective=dpo", f"model.pretrained={sd_folder}", "data.pairs.path=P", "gpu=cpu"]
    given += [f"sampler.height={SIZE}", f"sampler.width={SIZE}"]
    for flag in ("off", "auto"):
        config, _ = compose_command("plan", [*given, f"data.pairs.cache={flag}"])
        row = read_blueprint(config).row
        assert [each.encoded is None for each in (row.first, row.second)] == [flag == "off"] * 2
    assert cost_of(config, read_blueprint(config), 2).forward > 0
