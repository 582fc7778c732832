"""Prints what recipes cost on one GPU, by `sfumato plan`: the table of docs/plan.md.

Models are settings in their published sizes; no weight is read.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # settings of published models

from real_sizes import (
    write_flux_dev,
    write_pickscore,
    write_sd15,
    write_sd35_medium,
    write_sdxl,
)

from sfumato.compose import compose_command
from sfumato.planning.memory import USABLE
from sfumato.planning.plan import Plan, make_plan

MODELS = {
    "sd15": write_sd15,
    "sdxl": write_sdxl,
    "sd35": write_sd35_medium,
    "flux": write_flux_dev,
}
RECIPES = ("sft_lora", "sft_full", "dpo", "draft_plus", "ddpo", "flow_grpo")
CARDS = (16, 24, 40, 48, 80, 141)  # GiB
GPU = "h100"


def plan_of(recipe: str, model: Path, reward: Path) -> Plan:
    given = [f"recipe={recipe}", f"model.pretrained={model}", f"gpu={GPU}"]
    given += ["training.micro_batch_size=1"]
    if "draft" in recipe or "grpo" in recipe:
        given += [f"reward.pretrained={reward}"]
    config, _ = compose_command("plan", given)
    return make_plan(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    known = {path.stem for path in Path("sfumato/conf/recipe").glob("*.yaml")}
    print(f"| recipe | pixels | trained, M | GiB | checkpointed | card | samples | hours, {GPU} |")
    print("|---|---|---|---|---|---|---|---|")
    with TemporaryDirectory() as folder:
        reward = write_pickscore(Path(folder) / "pickscore")
        for name in options.models:
            model = MODELS[name](Path(folder) / name)
            for recipe in (f"{name}_{kind}" for kind in RECIPES):
                if recipe in known:
                    print(line(recipe, plan_of(recipe, model, reward)), flush=True)


def line(recipe: str, plan: Plan) -> str:
    """Return the row of a recipe: the smallest card is that of the smaller memory."""
    peaks = {each.checkpointing: each.held.peak(each.cost) / 2**30 for each in plan.memory}
    card = next((str(size) for size in CARDS if min(peaks.values()) <= size * USABLE), "several")
    hours = f"{plan.seconds / 3600:.2g}" if plan.seconds else "unknown"
    cells = [f"`{recipe}`", plan.size[0], f"{plan.parameters['trained'] / 1e6:,.0f}"]
    cells += [f"{peaks[False]:.1f}", f"{peaks[True]:.1f}", card, f"{plan.seen:,}", hours]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
