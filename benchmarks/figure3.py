"""Figure 3 of the article on DRaFT+, on the demo: base model, DRaFT, DRaFT+ and DDPO.

It completes the demo, trains DDPO from the same base model, prompts and reward, evaluates it on the
same noise, and reports all runs in one page. A stopped call goes on with the same command.

    python benchmarks/figure3.py --out figure3
"""

import argparse
from pathlib import Path

from sfumato.compose import compose_train
from sfumato.demo.experiment import NOTES, RUNS, evaluate_demo, run_demo
from sfumato.report.report import write_report
from sfumato.run.run import train
from sfumato.training.distribution import Distribution
from sfumato.training.folder import RunFolder

STEPS = 80
DDPO = (
    "recipe=demo_reward",
    "method=ddpo",
    "name=ddpo",
    "objective.images_per_prompt=8",
    "objective.statistics=group",
    "objective.step_weights=std",
    "sampler.training_steps=5",
    "optimizer.lr=1e-3",
    "training.micro_batch_size=16",
    "training.global_batch_size=16",
    f"training.max_steps={STEPS}",
    f"training.checkpoint_every_steps={STEPS // 4}",
    f"validation.every_steps={STEPS // 4}",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("figure3"))
    out: Path = parser.parse_args().out
    if run_demo(out) is None:
        return
    runs = [RunFolder(out / name) for name in RUNS]
    overrides = [*DDPO, f"runs_dir={out}", f"data.prompts={out / 'prompts.txt'}"]
    config, settings = compose_train(overrides)
    if train(config, settings, Distribution(config.training)).stopped_by is not None:
        return
    ddpo = RunFolder(out / "ddpo")
    evaluate_demo(config, ddpo, base=runs[0], seed=0)
    print(write_report([*runs, ddpo], out / "figure3.html", title="Figure 3", notes=NOTES))


if __name__ == "__main__":
    main()
