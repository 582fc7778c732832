"""Layouts of benchmarks, read as the published scorers read them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.evaluation.layouts import check_layouts, write_layouts
from sfumato.images import save_image

PROMPTS = ["a photo of a bench", "two clocks, für alle"]
ROWS: dict[str, dict[str, Any]] = {
    prompt: {
        "tag": "single_object",
        "include": [{"class": "bench", "count": 1}],
        "item_id": f"partiprompts{i}",
        "caption": prompt,
    }
    for i, prompt in enumerate(PROMPTS)
}
SQUARE = (16, 16)


def pictures_of(folder: Path, each: int) -> dict[str, list[Path]]:
    folder.mkdir()
    found: dict[str, list[Path]] = {}
    for p, prompt in enumerate(PROMPTS):
        for i in range(each):
            file = folder / f"{p:03d}-{i:03d}.png"
            save_image(torch.full((3, 16, 16), (1 + 10 * p + i) / 20), file)
            found.setdefault(prompt, []).append(file)
    return found


def write(folder: Path, layout: str, each: int = 4) -> tuple[Path, dict[str, list[Path]]]:
    pictures = pictures_of(folder / "images", each)
    check_layouts([layout], PROMPTS, ROWS, SQUARE)
    write_layouts([layout], folder / "layouts", pictures, ROWS)
    return folder / "layouts" / layout, pictures


def test_geneval_finds_a_folder_of_digits_for_each_prompt(tmp_path: Path) -> None:
    folder, pictures = write(tmp_path, "geneval")
    subfolders = [path for path in sorted(folder.iterdir()) if path.name.isdigit()]
    assert len(subfolders) == len(PROMPTS)
    for subfolder, prompt in zip(subfolders, PROMPTS, strict=True):
        metadata = json.loads((subfolder / "metadata.jsonl").read_text(encoding="utf-8"))
        assert metadata["prompt"] == prompt
        assert metadata["tag"] == "single_object"
        assert metadata["include"] == [{"class": "bench", "count": 1}]
        files = sorted((subfolder / "samples").iterdir())
        assert all(re.match(r"\d+\.png", file.name) for file in files)
        whole = [file.read_bytes() for file in pictures[prompt]]
        assert [file.read_bytes() for file in files] == whole


def test_geneval2_finds_a_path_for_each_prompt(tmp_path: Path) -> None:
    folder, pictures = write(tmp_path, "geneval2", each=2)
    maps = sorted(folder.glob("image_filepaths-*.json"))
    assert len(maps) == 2
    for index, file in enumerate(maps):
        paths = json.loads(file.read_text(encoding="utf-8"))
        assert list(paths) == PROMPTS
        for prompt, path in paths.items():
            assert Path(path).read_bytes() == pictures[prompt][index].read_bytes()


def test_t2i_compbench_reads_prompts_from_names(tmp_path: Path) -> None:
    folder, pictures = write(tmp_path, "t2i_compbench", each=3)
    names = [path.name for path in (folder / "samples").iterdir()]
    names.sort(key=lambda x: int(x.split("_")[-1].split(".")[0]))
    assert [name.split("_")[0] for name in names] == [p for p in PROMPTS for _ in range(3)]
    files = [file for own in pictures.values() for file in own]
    for name, file in zip(names, files, strict=True):
        assert (folder / "samples" / name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("each", [2, 4, 5])
def test_dpg_cuts_a_square_of_four(tmp_path: Path, each: int) -> None:
    folder, pictures = write(tmp_path, "dpg", each)
    resolution, shown = 16, min(each, 4)
    assert sorted(path.name for path in (folder / "images").iterdir()) == [
        "partiprompts0.png",
        "partiprompts1.png",
    ]
    corners = [(0, 0), (resolution, 0), (0, resolution), (resolution, resolution)]
    for number, own in enumerate(pictures.values()):
        with Image.open(folder / "images" / f"partiprompts{number}.png") as square:
            for (left, top), file in zip(corners[:shown], own, strict=False):
                cut = square.crop((left, top, left + resolution, top + resolution))
                np.testing.assert_array_equal(cut, Image.open(file))


def test_pictures_take_no_second_place_on_the_disk(tmp_path: Path) -> None:
    folder, pictures = write(tmp_path, "geneval")
    first = pictures[PROMPTS[0]][0]
    assert (folder / "00000" / "samples" / "00000.png").samefile(first)


def test_a_layout_is_written_again_without_what_was_there(tmp_path: Path) -> None:
    folder, pictures = write(tmp_path, "geneval")
    few = {PROMPTS[0]: pictures[PROMPTS[0]][:1]}
    write_layouts(["geneval"], folder.parent, few, ROWS)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    assert names == ["00000/samples/00000.png"]


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    pictures = pictures_of(tmp_path / "images", 1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "layouts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="layouts is a symbolic link"):
        write_layouts(["geneval"], tmp_path / "layouts", pictures, ROWS)
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("layout", "column"), [("geneval", "tag"), ("geneval", "include"), ("dpg", "item_id")]
)
def test_a_missing_column_is_named(layout: str, column: str) -> None:
    rows = {**ROWS, PROMPTS[1]: {k: v for k, v in ROWS[PROMPTS[1]].items() if k != column}}
    with pytest.raises(ValueError, match=f"{layout}.*the column {column} .*two clocks"):
        check_layouts([layout], PROMPTS, rows, SQUARE)
    with pytest.raises(ValueError, match=f"{layout}.*the column "):
        check_layouts([layout], PROMPTS, {}, SQUARE)  # prompts of a .txt have no columns


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("geneval", {"include": "[{'class': 'bench'}]"}, "a list of objects"),
        ("dpg", {"item_id": "a/b"}, "item_id = 'a/b' has /"),
        ("dpg", {"item_id": "1.5"}, "item_id = '1.5' has / or a dot"),
        ("dpg", {"item_id": "partiprompts1"}, "two prompts have it"),
    ],
)
def test_a_column_of_another_kind_is_refused(
    layout: str, change: dict[str, Any], message: str
) -> None:
    rows = {**ROWS, PROMPTS[0]: {**ROWS[PROMPTS[0]], **change}}
    with pytest.raises(ValueError, match=re.escape(message)):
        check_layouts([layout], PROMPTS, rows, SQUARE)


@pytest.mark.parametrize("prompt", ["either/or", "snake_case", "long " * 60])
def test_a_prompt_that_is_no_name_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"t2i_compbench.*names of files"):
        check_layouts(["t2i_compbench"], [prompt], {}, SQUARE)
    check_layouts(["geneval2"], [prompt], {}, SQUARE)


def test_dpg_wants_squares() -> None:
    with pytest.raises(ValueError, match="32 x 16 pixels"):
        check_layouts(["dpg"], PROMPTS, ROWS, (16, 32))
