"""DRaFT+'s claim, over seeds: at equal reward, its images of one prompt differ more than DRaFT's.

python benchmarks/demo_claim.py [--seeds 3] [--out runs/claim]
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

from sfumato.demo.experiment import run_demo
from sfumato.report.comparison import compare
from sfumato.report.records import read_runs
from sfumato.training.folder import RunFolder


def main() -> None:
    """Run the demo once per seed, and print each difference, then mean and standard deviation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/claim"))
    options = parser.parse_args()
    differences: dict[str, list[float]] = defaultdict(list)
    lines = []
    for seed in range(options.seeds):
        started, out = time.monotonic(), options.out / f"seed-{seed}"
        if run_demo(out, seed=seed) is None:
            sys.exit("stopped; the same command goes on from here")
        lines.append(f"seed {seed}: {time.monotonic() - started:.0f} s")
        records = read_runs([RunFolder(run.parent) for run in sorted(out.glob("*/config.yaml"))])
        base = next(record.base for record in records if record.base)
        lines.append(f"  base: {base.reward:.2f} / {base.held_out} / {base.diversity:.3f}")
        for record in records:
            curve = ", ".join(
                f"{one.reward:.2f} / {one.held_out['attributes']:.2f} / {one.diversity:.3f}"
                for one in record.evaluations
                if one.step
            )
            lines.append(f"  {record.name}: {curve}")
        for found in compare(records, base):
            assert found.result, f"{found.other} and {found.baseline} share no reward"
            differences[found.other].append(found.result.mean_difference)
            low, high = found.result.levels[0], found.result.levels[-1]
            lines.append(
                f"  {found.other} against {found.baseline}, rewards {low:.2f} to {high:.2f}: "
                f"diversity {found.result.mean_difference:+.3f}"
            )
    print("\n".join(lines))
    for name, values in differences.items():
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        print(f"{name}: {statistics.mean(values):+.3f}, standard deviation {spread:.3f}")


if __name__ == "__main__":
    main()
