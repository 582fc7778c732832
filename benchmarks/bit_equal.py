"""Hashes of ten short runs, to prove that a change of the code changes no bit.

    python benchmarks/bit_equal.py start DIR     # prepare data; begin ten runs, kill each
    python benchmarks/bit_equal.py finish DIR    # run the same commands to the end: DIR/bits.json
    python benchmarks/bit_equal.py compare A B   # list the differences of two bits.json

Run `start` and `finish` with the old code in one folder, and with the new code in another; then
compare. `start` with the old code and `finish` with the new one shows that old checkpoints resume.
Everything goes through the command line, so that only it must stay the same between the two.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

STEPS, KILLED_AFTER = 8, 4
TIMES = ("second", "mfu", "tflops", "wait", "memory", "time")  # in names of metrics that may differ
COLORS, SHAPES = ("red", "green", "blue", "yellow", "purple"), ("ring", "star", "square", "cross")

MODEL = ("model.pretrained=data/model", "sampler.num_inference_steps=4")
LORA = ("model.lora.rank=4",)  # of all runs but those of whole weights
COMMON = (
    *MODEL,
    "sampler.guidance_scale=2.5",
    f"training.max_steps={STEPS}",
    "training.micro_batch_size=2",
    "training.global_batch_size=4",
    "training.checkpoint_every_steps=2",
    "training.keep_checkpoints=null",
    "training.tensorboard=false",
    "validation.num_images=2",
    "validation.every_steps=4",
    "optimizer.lr=1e-3",
)
DRAFT = ("objective=draft", "objective.kl_coeff=1.0", "reward=color")
TUNE = ("objective=supervised", "reward=none", "objective.caption_dropout=0.2")
CACHED = ("data.shards.path=data/prepared", "data.shards.cached=true", "data.shards.flip=true")
BUCKETS = (
    "data.images.buckets=true",
    "data.images.flip=true",
    "data.images.crop=random",
    "data.images.sources.wide.path=data/folder",
    "data.images.sources.wide.weight=0.7",
    "data.images.sources.table.path=data/table.csv",
    "data.images.sources.table.weight=0.3",
)

# Name to the number of processes and the settings.
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "prompts": (1, (*DRAFT, "data.prompts=data/prompts.txt", "data.buffer=3")),
    "prompts_csv": (1, (*DRAFT, "data.prompts=data/table.csv", "objective.truncation_steps=2")),
    "images": (1, (*TUNE, *BUCKETS)),
    "images_jsonl": (1, (*TUNE, "data.images.path=data/table.jsonl", "data.images.repeats=2")),
    "tars": (1, (*TUNE, "data.images.path=data/tars/{000..001}.tar", "data.images.flip=true")),
    "prepared": (
        1,
        (
            *TUNE,
            "data.shards.path=data/prepared",
            "data.shards.captions=random",
            "data.shards.buffer=5",
            "data.shards.crop=random",
            "model.trainable=full",
        ),
    ),
    "cache": (1, (*TUNE, *CACHED, "model.parts=[network]")),
    "text_encoder": (
        1,
        (*TUNE, "data.images.path=data/folder", "model.parts=[network,text_encoder]"),
    ),
    "pair_prompts": (2, (*DRAFT, "data.prompts=data/tars/000.tar")),
    "pair_cache": (2, (*TUNE, *CACHED, "training.precision=bf16")),
}


def main() -> None:
    """Start, finish or compare."""
    parser = argparse.ArgumentParser(description="Prove that a change of the code changes no bit.")
    parser.add_argument("action", choices=("start", "finish", "compare"))
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    options = parser.parse_args()
    if options.action == "compare":
        sys.exit(compare(*options.folders))
    (folder,) = options.folders
    if options.action == "start":
        write_data(folder / "data")
        sfumato(folder, 1, prepare_command())
    for name in options.only:
        processes, settings = RUNS[name]
        lora = () if "model.trainable=full" in settings else LORA
        command = ["train", f"name={name}", *COMMON, *lora, *settings]
        if options.action == "start":
            start_and_kill(folder, name, processes, command)
        else:
            sfumato(folder, processes, command)
        print(f"{name}: {options.action}ed", flush=True)
    if options.action == "finish":
        bits = {"prepared folder": hashes(folder / "data" / "prepared")}
        bits |= {name: bits_of(folder / "runs" / name) for name in options.only}
        (folder / "bits.json").write_text(json.dumps(bits, indent=1, sort_keys=True))


def prepare_command() -> list[str]:
    """Return the settings of the prepared folder: tars, a cache of both kinds, an index."""
    return [
        *("prepare", "out=data/prepared", "pack.path=data/folder", "pack.samples_per_shard=7"),
        *("model.pretrained=data/model", "precache.flip=true"),
    ]


def write_data(folder: Path) -> None:
    """Copy the shipped model; draw 24 pictures, listed as folder, csv, jsonl and two tars."""
    rng = random.Random(0)
    shutil.copytree(Path(__file__).parents[1] / "sfumato/demo/model/base", folder / "model")
    (folder / "folder").mkdir(parents=True)
    (folder / "tars").mkdir()
    rows: list[tuple[str, str]] = []
    for number in range(24):
        color, shape = rng.choice(COLORS), rng.choice(SHAPES)
        size = rng.choice([(96, 64), (64, 96), (80, 80)])
        picture = Image.new("RGB", size, rng.choice(COLORS))
        ImageDraw.Draw(picture).ellipse([16, 16, 44, 44], fill=color)
        file = folder / "folder" / f"{number:03}.png"
        picture.save(file)
        caption = f"a {color} {shape}"
        file.with_suffix(".txt").write_text(caption)
        rows.append((f"folder/{file.name}", caption))
    lines = ["image,caption", *(",".join(row) for row in rows[:10])]
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    objects = [{"image": name, "caption": caption} for name, caption in rows]
    (folder / "table.jsonl").write_text("".join(json.dumps(each) + "\n" for each in objects))
    (folder / "prompts.txt").write_text("\n".join(caption for _, caption in rows[:9]) + "\n")
    for tar in range(2):
        with tarfile.open(
            folder / "tars" / f"{tar:03}.tar", "w", format=tarfile.USTAR_FORMAT
        ) as file:
            for name, _ in rows[12 * tar : 12 * tar + 12]:
                for member in (folder / name, (folder / name).with_suffix(".txt")):
                    file.add(member, member.name)


def command_line(processes: int, arguments: list[str]) -> list[str]:
    """Return the command of a run, under torchrun where it has several processes."""
    if processes == 1:
        return [sys.executable, "-m", "sfumato", *arguments]
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, "-m", *torchrun, "-m", "sfumato", *arguments]


def sfumato(folder: Path, processes: int, arguments: list[str]) -> None:
    """Run a command to its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = command_line(processes, arguments)
    with (folder / "log.txt").open("a") as log:
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log, check=True)


def start_and_kill(folder: Path, name: str, processes: int, arguments: list[str]) -> None:
    """Begin a run and kill all of its processes after the first checkpoints."""
    checkpoint = folder / "runs" / name / "checkpoints" / f"step-{KILLED_AFTER:06}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("a") as log:
        child = subprocess.Popen(
            command_line(processes, arguments),
            **{"cwd": folder, "env": environment, "stdout": log, "stderr": log},
            start_new_session=True,
        )
    while not checkpoint.exists():
        if child.poll() is not None:
            raise SystemExit(f"{name} ended with {child.returncode}; see {folder / 'log.txt'}")
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def bits_of(run: Path) -> dict[str, Any]:
    """Return what a finished run computed: metrics without times, states, hashes of tensors."""
    last = run / "checkpoints" / f"step-{STEPS:06}"
    state = json.loads((last / "state.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "state": json.dumps(without_times(state), sort_keys=True),
        "metrics": [without_times(row) for row in rows],
        "tensors": {
            str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(run.rglob("*.safetensors"))
            if file.parent == last or "export" in file.parts
        },
        "samples": hashes(run / "samples"),
    }


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """Leave out what depends on the machine's speed."""
    return {key: value for key, value in row.items() if not any(word in key for word in TIMES)}


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def compare(one: Path, other: Path) -> int:
    """Print each value that differs; return how many do."""
    first, second = (json.loads((folder / "bits.json").read_text()) for folder in (one, other))
    count = 0
    for path, (before, after) in sorted(differing(first, second, "")):
        count += 1
        print(f"{path}:\n  {str(before)[:300]}\n  {str(after)[:300]}")
    print(f"{count} values differ, of {sum(1 for _ in leaves(first))}")
    return min(count, 100)


def differing(one: Any, other: Any, path: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the path of each leaf that differs, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from differing(one.get(key), other.get(key), f"{path}/{key}")
    elif one != other:
        yield path, (one, other)


def leaves(content: Any) -> Iterator[Any]:
    """Yield the values below a JSON value."""
    if isinstance(content, dict):
        for value in content.values():
            yield from leaves(value)
    else:
        yield content


if __name__ == "__main__":
    main()
