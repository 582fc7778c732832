"""The benchmark of reading runs on what `sfumato prepare` writes, and says its rates."""

import re
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "data.py"


def test_reading_is_measured_raw_and_cached():
    options = {"--images": "6", "--per-shard": "4", "--sizes": "64", "--workers": "1"}
    command = [sys.executable, str(BENCHMARK), *(word for pair in options.items() for word in pair)]
    done = subprocess.run(
        [*command, "--seconds", "0.01", "--turns", "1"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (\w+) \| 64 \| 1 \| ([\d.]+) \| ([\d.]+) \|", done.stdout, re.MULTILINE)
    assert [source for source, *_ in rows] == ["original", "resized", "cache"]
    assert all(float(rate) > 0 for _, *rates in rows for rate in rates)
