"""The FID-CLIP curve over guidance of the demo model, by one command; KID, as images are few.

The reference is pictures that the demo world draws: a folder, and the same packed by `sfumato
prepare`. The CLIP is the demo's own, made for its world; `--features` names another network for
KID, such as the folder that `convert` of benchmarks/real_classifier.py writes.

python benchmarks/guidance_curve.py --out DIR [--prompts 128] [--images 2] [--features DIR]
"""

import argparse
import random
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sfumato.compose import DEMO_MODELS
from sfumato.demo.world import random_scene, render
from sfumato.images import save_image

SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)


def sfumato(*arguments: str) -> float:
    """Run a command; return the CPU seconds that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "sfumato", *arguments], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_world(folder: Path, count: int) -> None:
    """Write pictures of scenes with their captions, and a list of these captions."""
    rng = random.Random("reference")
    scenes = [random_scene(rng) for _ in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    for i, (scene, image) in enumerate(zip(scenes, render(scenes, rng), strict=True)):
        save_image(image, folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text(scene.caption())


def write_prompts(file: Path, count: int) -> None:
    """Write captions of other scenes, each once."""
    rng = random.Random("prompts")
    captions: dict[str, None] = {}
    while len(captions) < count:
        captions[random_scene(rng).caption()] = None
    file.write_text("\n".join(captions) + "\n")


def curve(out: Path, reference: Path, more: Sequence[str]) -> None:
    """Evaluate the base model at each scale, and say what it took."""
    seconds = sfumato(
        "evaluate",
        *(f"run={out / 'run'}", "steps=[0]", f"prompts={out / 'prompts.txt'}", "batch_size=32"),
        *("metrics=[kid,clip_score]", f"metric_clip={DEMO_MODELS / 'reward'}"),
        *(f"guidance_scales={[*SCALES]}".replace(" ", ""), f"reference={reference}", *more),
    )
    print(f"{reference.name}: {seconds:.0f} CPU seconds")
    print((out / "run" / "guidance.csv").read_text())
    for suffix in ("csv", "svg", "json"):
        source = out / "run" / f"guidance.{suffix}"
        source.replace(out / f"{reference.name}.{suffix}")


def main() -> None:
    """Make the reference and a run, then measure against the folder and the prepared set."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--features", type=Path, default=DEMO_MODELS / "reward")
    options = parser.parse_args()
    out, pictures = options.out, options.out / "pictures"
    write_world(pictures, 512)
    write_prompts(out / "prompts.txt", options.prompts)
    if not (out / "run").exists():
        quick = ("training.max_steps=1", "validation.every_steps=0", "verify=false")
        sfumato("train", "recipe=demo_draft_plus", "name=run", f"runs_dir={out}", *quick)
    if not (out / "prepared").exists():
        packed = (f"pack.path={pictures}", "stages=[pack,filter,index]")
        sfumato("prepare", f"out={out / 'prepared'}", *packed)
    more = (f"metric_features={options.features}", f"num_images={options.images}")
    for reference in (pictures, out / "prepared"):
        curve(out, reference, more)


if __name__ == "__main__":
    main()
