"""The demo's data: rendered scenes as picture files with captions, for `sfumato prepare`."""

import json
import random
from pathlib import Path

from sfumato.demo.steps import draw_scenes, prompt_of
from sfumato.demo.world import render
from sfumato.images import save_image

AT_ONCE = 256


def write_pictures(folder: Path, parts: Path, count: int) -> None:
    """Write pictures and metadata.jsonl: `text` says all of a scene, `short` leaves some open."""
    rng = random.Random("pictures")
    lines = []
    for start in range(0, count, AT_ONCE):
        scenes = draw_scenes(rng, min(AT_ONCE, count - start))
        for i, (scene, image) in enumerate(zip(scenes, render(scenes, rng), strict=True), start):
            file = f"{i:05d}.png"
            save_image(image, folder / file)
            captions = {"text": scene.caption(), "short": prompt_of(scene, rng).caption()}
            lines.append(json.dumps({"file_name": file, **captions}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
