"""The benchmarks run: each compares with its bare loop, and stops where they do not agree."""

import subprocess
import sys
from pathlib import Path

import pytest

TWO_STEPS = ("--num-inference-steps", "2", "--memory-steps", "2")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pretrain_step", ["--model", "demo", "--batch", "1"]),
        ("sft_step", ["--models", "demo", "--checkpointing", "off", "--batch", "1"]),
        (
            "draft_step",
            [
                "--model",
                "demo",
                "--batch",
                "1",
                "--num-inference-steps",
                "2",
                "--memory-steps",
                "2",
            ],
        ),
    ],
)
def test_a_step_is_that_of_the_bare_loop(name: str, arguments: list[str]):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments]
    done = subprocess.run(
        [*command, "--pairs", "1", "--steps", "1"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Parity" in done.stdout
