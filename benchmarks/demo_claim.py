"""DRaFT+'s claim, over seeds: at equal reward, its images of one prompt differ more than DRaFT's.

python benchmarks/demo_claim.py [--seeds 4] [--out runs/claim] [--pictures DIR]

Settings were chosen on seed 0, so the seeds after it are also averaged alone. The claim is of at
least a fifth of the base model's diversity. --pictures is a folder that `sfumato demo --pictures`
wrote; with it the pictures are compared with real ones of the same kinds.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from demo_scores import Reader, load_classifier, read_pictures, top_1
from torch import Tensor

from sfumato.demo.experiment import ASKED, IMAGES_PER_PROMPT, run_demo
from sfumato.demo.pictures import KIND_OF, KINDS, phrase
from sfumato.evaluation.metrics import kid, precision_recall, vendi
from sfumato.evaluation.results import Evaluation
from sfumato.images import load_images
from sfumato.report.comparison import compare, steps_at_equal_reward
from sfumato.report.records import RunRecord, read_runs, read_scores
from sfumato.training.folder import RunFolder

CLAIM = 0.2  # of the base model's diversity
Judge = Callable[[RunRecord, Evaluation], dict[str, float]]


def build_judge(folder: Path | None) -> Judge:
    """Return what measures one evaluated step, by its pictures on disk.

    KID, recall and Vendi score are of the text-image model's features: no reward sees them. Real
    pictures are of the kinds that the prompts ask for; the held-back style has few of these.
    """
    read, classifier = Reader(), load_classifier(160)

    def see(pictures: Tensor) -> Tensor:
        unit = read.features(pictures)
        return unit * unit.shape[1] ** 0.5  # KID's kernel is then (cosine + 1)^3

    real, names = dict[str, Tensor](), [name for kind in ASKED for name in KINDS[kind]]
    for label, name in (("things", "things"), ("held style", "held_things")):
        if folder:
            pictures, _ = read_pictures(folder / "pictures" / name, names=names)
            real[label] = see(pictures)

    def judge(record: RunRecord, one: Evaluation) -> dict[str, float]:
        shown = read_scores(record, one.step)
        pictures = load_images([Path(each.image) for each in shown])
        prompts, features = [each.prompt for each in shown], see(pictures)
        kinds = [phrase(KIND_OF[row["name"]]) for row in read(pictures)]
        found = {"reward": one.reward or 0.0, "diversity": one.diversity, **one.held_out}
        found["top-1 at 160"], _ = top_1(classifier, pictures, prompts)
        found["kind read"] = sum(map(str.__eq__, kinds, prompts)) / len(kinds)
        found["Vendi"] = statistics.mean(map(vendi, features.split(IMAGES_PER_PROMPT)))
        for label, own in real.items():
            found[f"KID x 1000, {label}"] = 1000 * kid(features, own)
            found[f"recall, {label}"] = precision_recall(features, own)[1]
        return found

    return judge


def told(values: Sequence[float]) -> str:
    """Return each value, the mean, and the ends of its 95 % interval by Student's t."""
    from scipy.stats import t

    text = " ".join(f"{value:+.3f}" for value in values) + f"; mean {statistics.mean(values):+.3f}"
    if len(values) < 2:
        return text
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.mean(values)
    return f"{text}, 95 % {mean - half:+.3f} to {mean + half:+.3f}"


def curve(record: RunRecord) -> str:
    """Return reward / held-out rewards / diversity of each step."""
    held = [" ".join(f"{v:.2f}" for v in one.held_out.values()) for one in record.evaluations]
    return ", ".join(
        f"{one.reward:.2f} / {scores} / {one.diversity:.3f}"
        for one, scores in zip(record.evaluations, held, strict=True)
        if one.step
    )


def table(scores: Mapping[tuple[str, str], Sequence[Mapping[str, float]]]) -> str:
    """Return the mean of each score over the seeds, as Markdown."""
    names = list(next(iter(scores.values()))[0])
    lines = [f"| run | step | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for (run, step), found in scores.items():
        means = (f"{statistics.mean(one[name] for one in found):.3f}" for name in names)
        lines.append(f"| {run} | {step} | {' | '.join(means)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the demo once per seed; print each difference, their means and their intervals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/claim"))
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    judge = build_judge(options.pictures)
    differences: dict[str, list[float]] = defaultdict(list)
    in_shares: dict[str, list[float]] = defaultdict(list)
    scores: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    lines = []
    for seed in range(options.seeds):
        started, out = time.monotonic(), options.out / f"seed-{seed}"
        if run_demo(out, seed=seed) is None:
            sys.exit("stopped; the same command goes on from here")
        lines.append(f"seed {seed}: {time.monotonic() - started:.0f} s")
        records = read_runs([RunFolder(run.parent) for run in sorted(out.glob("*/config.yaml"))])
        base = next(record.base for record in records if record.base)
        held = " ".join(f"{value:.2f}" for value in base.held_out.values())
        lines.append(f"  base: {base.reward:.2f} / {held} / {base.diversity:.3f}")
        scores["base", "0"].append(judge(records[0], base))
        equal = {record.name: step for record, step in steps_at_equal_reward(records, base)}
        for record in records:
            lines.append(f"  {record.name}: {curve(record)}")
            for one in record.evaluations:
                if one.step == equal.get(record.name):
                    scores[record.name, "equal reward"].append(judge(record, one))
                if one is record.final:
                    scores[record.name, "last"].append(judge(record, one))
        for found in compare(records, base):
            if found.result is None:
                lines.append(f"  {found.other} and {found.baseline} share no reward")
                continue
            difference = found.result.mean_difference
            differences[found.other].append(difference)
            in_shares[found.other].append(difference / base.diversity)
            low, high = found.result.levels[0], found.result.levels[-1]
            lines.append(
                f"  {found.other} against {found.baseline}, rewards {low:.2f} to {high:.2f}: "
                f"diversity {difference:+.3f}, {difference / base.diversity:+.3f} of the base's"
            )
    print("\n".join(lines), table(scores), sep="\n\n", end="\n\n")
    for name, values in differences.items():
        shares = in_shares[name]
        print(f"{name}, diversity at equal reward minus draft's: {told(values)}")
        print(f"  as a share of the base model's: {told(shares)}")
        if len(shares) > 1:
            print(f"  without the first seed: {told(shares[1:])}")
        enough = sum(one >= CLAIM for one in shares)
        print(f"  at least {CLAIM:g} in {enough} of {len(shares)} seeds")


if __name__ == "__main__":
    main()
