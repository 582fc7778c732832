"""The FID-CLIP curve over guidance of the demo model, by one command; KID, as images are few.

The reference is pictures of emoji: a folder, and the same packed by `sfumato prepare`. Without
`--pictures`, which names a folder that `sfumato demo --pictures` wrote, it is the 160 shipped ones.
KID is of the demo's classifier, and the CLIP score of its text-image model.

python benchmarks/guidance_curve.py --out DIR [--prompts 128] [--images 2] [--pictures DIR]
"""

import argparse
import random
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from demo_scores import rows_of

from sfumato.compose import DEMO_IMAGES, DEMO_MODELS
from sfumato.demo.pictures import THINGS

SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)


def sfumato(*arguments: str) -> float:
    """Run a command; return the CPU seconds that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "sfumato", *arguments], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_prompts(file: Path, count: int) -> None:
    """Write captions of things, each once."""
    rows = random.Random("prompts").sample(rows_of(THINGS), count)
    file.write_text("".join(f"{row['text']}\n" for row in rows))


def curve(out: Path, name: str, reference: Path, more: Sequence[str]) -> None:
    """Evaluate the base model at each scale, and say what it took."""
    seconds = sfumato(
        "evaluate",
        *(f"run={out / 'run'}", "steps=[0]", f"prompts={out / 'prompts.txt'}", "batch_size=32"),
        *("metrics=[kid,clip_score]", f"metric_clip={DEMO_MODELS / 'text_image'}"),
        *(f"guidance_scales={[*SCALES]}".replace(" ", ""), f"reference={reference}", *more),
    )
    print(f"{name}: {seconds:.0f} CPU seconds")
    print((out / "run" / "guidance.csv").read_text())
    for suffix in ("csv", "svg", "json"):
        source = out / "run" / f"guidance.{suffix}"
        source.replace(out / f"{name}.{suffix}")


def main() -> None:
    """Make the reference and a run, then measure against the folder and the prepared set."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    out, pictures = options.out, DEMO_IMAGES / "old"
    if options.pictures:
        pictures = options.pictures / "pictures" / "things"
    out.mkdir(parents=True, exist_ok=True)
    write_prompts(out / "prompts.txt", options.prompts)
    if not (out / "run").exists():
        quick = ("training.max_steps=1", "validation.every_steps=0", "verify=false")
        sfumato("train", "recipe=demo_draft_plus", "name=run", f"runs_dir={out}", *quick)
    if not (out / "prepared").exists():
        packed = (f"pack.path={pictures}", "pack.caption_column=text", "stages=[pack,filter,index]")
        sfumato("prepare", f"out={out / 'prepared'}", *packed)
    more = (f"metric_features={DEMO_MODELS / 'classifier'}", f"num_images={options.images}")
    for name, reference in (("pictures", pictures), ("prepared", out / "prepared")):
        curve(out, name, reference, more)


if __name__ == "__main__":
    main()
