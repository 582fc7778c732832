"""Pictures of an evaluation in the folders that scorers of benchmarks read.

geneval       NNNNN/metadata.jsonl, NNNNN/samples/NNNNN.png (djghosh13/geneval, evaluate_images.py)
geneval2      image_filepaths-NNN.json: each prompt's path, a file for each image of a prompt
              (facebookresearch/GenEval2, evaluation.py --image_filepath_data)
t2i_compbench samples/PROMPT_NNNNNN.png (Karine-Huang/T2I-CompBench, BLIPvqa_eval/BLIP_vqa.py)
dpg           images/ID.png, a square of up to four images (TencentQQGYLab/ELLA, dpg_bench)
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sfumato.evaluation.making import link
from sfumato.files import new_folder, refuse_link
from sfumato.images import load_images, save_image

Rows = Mapping[str, Mapping[str, Any]]  # what the user's table has beside each prompt
Pictures = Mapping[str, Sequence[Path]]  # of each prompt
COLUMNS = {"geneval": ("tag", "include"), "dpg": ("item_id",)}
LONGEST_NAME = 255  # bytes of a file's name
OF_A_SQUARE = 4


def check_layouts(
    layouts: Sequence[str], prompts: Sequence[str], rows: Rows, size: tuple[int, int]
) -> None:
    """Refuse layouts that these prompts cannot have, before images are made.

    Args:
        size: height and width of the images.

    Raises:
        ValueError: naming the layout, and the prompt or the column.
    """
    for layout in layouts:
        for column in COLUMNS.get(layout, ()):
            lacking = [prompt for prompt in prompts if rows.get(prompt, {}).get(column) is None]
            if lacking:
                raise ValueError(
                    f"layouts has {layout}, whose scorer reads the column {column} of each prompt, "
                    f"and prompts has none for {lacking[0]!r}; give the table that the benchmark "
                    "publishes as prompts=FILE, or leave the layout out"
                )
    if "geneval" in layouts and not all(isinstance(rows[p]["include"], list) for p in prompts):
        raise ValueError(
            "layouts has geneval, whose column include has a list of objects; give the .jsonl "
            "table that the benchmark publishes as prompts=FILE"
        )
    if "t2i_compbench" in layouts:
        for prompt in prompts:
            name = f"{prompt}_{0:06}.png"
            if set("/_\0") & set(prompt) or len(name.encode()) > LONGEST_NAME:
                raise ValueError(
                    f"layouts has t2i_compbench, whose scorer reads prompts from names of files, "
                    f"and {prompt[:80]!r} has / or _, or is too long for one; leave the prompt or "
                    "the layout out"
                )
    if "dpg" in layouts:
        names = [str(rows[prompt]["item_id"]) for prompt in prompts]
        if odd := next((n for n in names if set("/.\0") & set(n) or names.count(n) > 1), None):
            raise ValueError(
                f"layouts has dpg, and item_id = {odd!r} has / or a dot, or two prompts have it; "
                "correct the table"
            )
        if size[0] != size[1]:
            raise ValueError(
                f"layouts has dpg, whose scorer cuts squares, and images have {size[1]} x "
                f"{size[0]} pixels; choose one side, or leave the layout out"
            )


def write_layouts(layouts: Sequence[str], folder: Path, pictures: Pictures, rows: Rows) -> None:
    """Write folder/LAYOUT for each layout; pictures are second names of the same files.

    Raises:
        ValueError: a folder cannot be written.
    """
    refuse_link(folder)  # a run may come from a stranger
    for layout in layouts:
        with new_folder(folder / layout) as beside:
            _WRITERS[layout](beside, folder / layout, pictures, rows)


def _geneval(folder: Path, _place: Path, pictures: Pictures, rows: Rows) -> None:
    for number, (prompt, files) in enumerate(pictures.items()):
        samples = folder / f"{number:05}" / "samples"
        samples.mkdir(parents=True)
        row = {**rows[prompt], "prompt": prompt}
        text = json.dumps(row, ensure_ascii=False, default=str) + "\n"
        (samples.parent / "metadata.jsonl").write_text(text, encoding="utf-8")
        for index, file in enumerate(files):
            link(file, samples / f"{index:05}.png")


def _geneval2(folder: Path, place: Path, pictures: Pictures, _rows: Rows) -> None:
    (folder / "images").mkdir()
    maps: list[dict[str, str]] = [{} for _ in range(max(map(len, pictures.values())))]
    for prompt, files in pictures.items():
        for index, file in enumerate(files):
            link(file, folder / "images" / file.name)
            maps[index][prompt] = str(place.absolute() / "images" / file.name)
    for index, paths in enumerate(maps):
        text = json.dumps(paths, ensure_ascii=False, indent=2) + "\n"
        (folder / f"image_filepaths-{index:03}.json").write_text(text, encoding="utf-8")


def _t2i_compbench(folder: Path, _place: Path, pictures: Pictures, _rows: Rows) -> None:
    (folder / "samples").mkdir()
    named = ((prompt, file) for prompt, files in pictures.items() for file in files)
    for number, (prompt, file) in enumerate(named):
        link(file, folder / "samples" / f"{prompt}_{number:06}.png")


def _dpg(folder: Path, _place: Path, pictures: Pictures, rows: Rows) -> None:
    (folder / "images").mkdir()
    for prompt, files in pictures.items():
        images = load_images(files[:OF_A_SQUARE])
        square = torch.zeros(OF_A_SQUARE, *images.shape[1:])  # black where there is no image
        square[: len(images)] = images
        top, bottom = torch.cat([*square[:2]], 2), torch.cat([*square[2:]], 2)
        save_image(
            torch.cat([top, bottom], 1), folder / "images" / f"{rows[prompt]['item_id']}.png"
        )


_WRITERS: Mapping[str, Callable[[Path, Path, Pictures, Rows], None]] = {
    "geneval": _geneval,
    "geneval2": _geneval2,
    "t2i_compbench": _t2i_compbench,
    "dpg": _dpg,
}
