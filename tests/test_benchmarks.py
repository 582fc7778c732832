"""Benchmarks: they import in the suite, and run in `make nightly`."""

import json
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import demo_claim
import gpu
import pytest
import torch
from demo_scores import Drawings, neighbours, shares

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
        ("reward_step_time", "--only classifier several"),
    ],
)
def test_a_step_is_that_of_the_bare_loop(name: str, arguments: str):
    """Each benchmark compares with a bare loop, and stops if the two do not agree."""
    assert "Parity" in run(name, *arguments.split(), "--pairs", "1", "--steps", "1")


@pytest.mark.nightly
def test_judges_of_the_base_model_are_measured_on_real_pictures():
    output = run("demo_base", "--prompts", "4")
    for name in ("base model, full prompts", "base model, bare prompts", "real pictures"):
        assert f"{name}, 4 pictures: read right: name " in output


A, B = ({"name": name, "style": "flat"} for name in ("zebra", "teapot"))


def test_a_picture_is_memorised_if_no_other_drawing_is_as_near():
    known = torch.tensor([[0.0, 0.0], [0.0, 1.0], [10.0, 0.0]])
    pictures = torch.tensor([[0.0, -2.0], [10.0, 9.0], [10.0, 11.0], [10.0, 12.0]])
    distance, memorised = neighbours(pictures, known, [A, A, B])
    assert distance == 9  # torch's median is the lower one
    assert memorised == 0.5


def test_a_picture_is_read_as_the_nearest_drawing():
    known = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    read = Drawings(lambda pictures: pictures, [(known[:1], [A]), (known[1:], [B, B])])
    seen = read(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    assert seen == [A, B]
    assert shares([A, A], seen) == {"name": 0.5, "style": 1.0, "all": 0.5}


def test_the_interval_over_seeds_is_students():
    assert demo_claim.told([1.0, 2.0, 3.0]).endswith("mean +2.000, 95 % -0.484 to +4.484")
    assert demo_claim.told([1.0]) == "+1.000; mean +1.000"


@pytest.mark.nightly
def test_reading_is_measured_raw_and_cached():
    options = "--images 6 --per-shard 4 --sizes 64 --workers 1 --seconds 0.01 --turns 1"
    output = run("data", *options.split())
    rows = re.findall(r"^\| (\w+) \| 64 \| 1 \| ([\d.]+) \| ([\d.]+) \|", output, re.MULTILINE)
    assert [source for source, *_ in rows] == ["original", "resized", "cache"]
    assert all(float(rate) > 0 for _, *rates in rows for rate in rates)


def gpu_parts(out: Path, *arguments: str) -> dict[str, Any]:
    """Measure parts with tiny networks; return the results, each a line of the table too."""
    table = run("gpu", "--tiny", "--out", str(out), *arguments)
    results = json.loads(out.read_text())
    lines = [line for line in table.splitlines() if line.startswith("| tiny")]
    assert [line.split("|")[1].strip() for line in lines] == [f"tiny {name}" for name in results]
    for line, result in zip(lines, results.values(), strict=True):
        assert all(result[key] in line for key in ("error", "bare_error") if key in result)
    return results


@pytest.mark.nightly
def test_every_part_of_the_gpu_script_runs_on_a_cpu(tmp_path: Path):
    """In float32 our loops and the bare ones have the same gradients."""
    results = gpu_parts(tmp_path / "out.json", "--dtype", "float32")
    assert list(results) == list(gpu.PARTS)
    for result in results.values():
        assert not {"error", "bare_error"} & result.keys()
        assert result["loss"] < 1e-5
        assert result["gradient"] < 1e-4
        for side in ("", "bare_"):
            assert result[f"{side}images_per_second"] > 0
            assert result[f"{side}tflops_per_second"] > 0
            assert result[f"{side}peak_gib"] > 0


@pytest.mark.nightly
def test_a_part_that_fails_leaves_the_others(tmp_path: Path):
    """They fail for memory, before and after it; bfloat16 takes the divergence in float32."""
    names = ["sft_full", "draft", "sft_lora"]
    huge = [f"sft_full={10**15}", f"sft_lora={10**15}"]
    results = gpu_parts(tmp_path / "out.json", "--parts", *names, "--batch", *huge)
    assert list(results) == names
    for name in ("sft_full", "sft_lora"):
        assert "memory" in results[name]["error"]
        assert "images_per_second" not in results[name]
    assert "error" not in results["draft"]
    assert results["draft"]["gradient"] < 1e-2
    assert 0 < results["draft"]["float32_share"] < 1


@pytest.mark.parametrize("text", ["draft", "draft=", "draft=0", "draft=-1", "other=2", "draft=x"])
def test_a_wrong_batch_is_refused(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--batch", "sparse=2", text])
    with pytest.raises(SystemExit):
        gpu.parse()
    assert f"{text!r} is not PART=N, such as draft=4; parts are draft," in capsys.readouterr().err


@pytest.mark.parametrize("name", list(gpu.PARTS))
def test_a_part_that_no_longer_fits_is_left_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gpu, "STARTED", time.monotonic() - 90)
    options = Namespace(seconds=110.0, tiny=True)
    assert gpu.run(name, options, tmp_path) == {"error": "left out: 20 s of --seconds are left"}


def end_so(end: Callable[[], Any], options: Namespace) -> None:
    end()


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (partial(time.sleep, 60), "stopped after 1 s"),
        (partial(os._exit, 3), "its process ended with 3"),
        (os.abort, "its process ended with -6"),
    ],
)
def test_what_a_process_had_found_is_kept(
    end: Callable[[], Any], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    most = 1.0 if "stopped" in error else 60.0
    part = replace(gpu.PARTS["draft"], least=0.0, most=most)
    monkeypatch.setitem(gpu.PARTS, "draft", part)
    (tmp_path / "draft.json").write_text('{"images_per_second": 2.0}')
    monkeypatch.setattr(gpu, "STARTED", time.monotonic())
    monkeypatch.setattr(gpu, "work", partial(end_so, end))
    result = gpu.run("draft", Namespace(seconds=100.0, tiny=True), tmp_path)
    assert result == {"images_per_second": 2.0, "error": error}


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "CUDA out of memory. Tried"),
        (ValueError("a | b"), "ValueError: a / b"),
    ],
)
def test_our_loop_is_measured_without_the_bare_one(
    error: Exception, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    meter = SimpleNamespace(rates=lambda seconds: {"mfu": 0.25})
    ours = SimpleNamespace(step=lambda: 0.0, state=SimpleNamespace(meter=meter))

    def open_bare() -> Any:
        raise error

    monkeypatch.setattr("random_networks.make_random", lambda device: None)
    monkeypatch.setitem(gpu.OPENERS, "draft", lambda *_: (ours, open_bare))
    options = Namespace(part="draft", tiny=True, batch={}, seconds=60.0, out=tmp_path / "out.json")
    result = gpu.measured(options)
    assert result["mfu"] == 0.25
    assert result["images_per_second"] > 0
    assert result["peak_gib"] > 0
    line = gpu.row(gpu.PARTS["draft"], {"title": "draft", **result})
    assert told in line
    assert line.count("|") == len(gpu.HEAD) + 1
