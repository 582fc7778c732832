"""Benchmarks: they import in the suite, and run in `make nightly`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_all_benchmarks_import():
    names = ", ".join(sorted(path.stem for path in BENCHMARKS.glob("*.py")))
    command = [sys.executable, "-c", f"import {names}"]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pretrain_step", "--model demo --batch 1"),
        ("sft_step", "--models demo --checkpointing off --batch 1"),
        ("draft_step", "--model demo --batch 1 --num-inference-steps 2 --memory-steps 2"),
    ],
)
def test_a_step_is_that_of_the_bare_loop(name: str, arguments: str):
    """Each benchmark compares with a bare loop, and stops if the two do not agree."""
    assert "Parity" in run(name, *arguments.split(), "--pairs", "1", "--steps", "1")


@pytest.mark.nightly
def test_reading_is_measured_raw_and_cached():
    options = "--images 6 --per-shard 4 --sizes 64 --workers 1 --seconds 0.01 --turns 1"
    output = run("data", *options.split())
    rows = re.findall(r"^\| (\w+) \| 64 \| 1 \| ([\d.]+) \| ([\d.]+) \|", output, re.MULTILINE)
    assert [source for source, *_ in rows] == ["original", "resized", "cache"]
    assert all(float(rate) > 0 for _, *rates in rows for rate in rates)
