"""The commands: sfumato train | sample | evaluate | report | demo."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

USAGE = """\
usage: sfumato COMMAND [...]

  train     align a text-to-image model with a reward:
            sfumato train recipe=sd15_draft_plus model.pretrained=DIR data.prompts=FILE \\
                reward.pretrained=DIR objective.kl_coeff=0.2
  sample    make images with a run or a model:  sfumato sample run=runs/NAME prompt="a star"
  evaluate  score a run's checkpoints:          sfumato evaluate run=runs/NAME
  report    compare runs in one HTML page:      sfumato report runs/A runs/B --out report.html
  demo      the whole road in a tiny world:     sfumato demo

train, sample and evaluate take KEY=VALUE settings; `--cfg job` prints them all, `-m` sweeps over
comma-separated values. Every command answers --help.
"""


def main() -> None:
    """Run the command line and exit: 0 done, 1 stopped or failed, 2 a mistake in what was asked."""
    arguments = sys.argv[1:]
    commands: dict[str, Callable[[Sequence[str]], None]] = {
        "train": lambda rest: hydra_command("train", rest),
        "sample": lambda rest: hydra_command("sample", rest),
        "evaluate": lambda rest: hydra_command("evaluate", rest),
        "report": report,
        "demo": demo,
    }
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(USAGE)
        return
    if arguments[0] == "--version":
        from sfumato import __version__

        print(__version__)
        return
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        import difflib

        near = difflib.get_close_matches(name, commands, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        fail(f"unknown command {name!r}{hint}\n\n{USAGE}")
    try:
        commands[name](rest)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)


def fail(message: str) -> None:
    """Print a mistake and exit with 2; all processes of a run say it, the first one aloud."""
    if os.environ.get("RANK", "0") == "0":
        print(f"sfumato: {message}", file=sys.stderr)
    sys.exit(2)


def hydra_command(command: str, arguments: Sequence[str]) -> None:
    """Compose the settings of a command and run it; `--cfg`, `--help` and `-m` are Hydra's."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from sfumato.compose import COMMANDS, CONF, explain, keys_of, register

    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here, and not as Hydra prints them
    quiet_libraries()
    sys.argv = [f"sfumato {command}", *arguments]
    run = hydra.main(version_base="1.3", config_path=str(CONF), config_name=command)(
        lambda config: run_composed(command, config)
    )
    try:
        run()
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error, keys_of(COMMANDS[command])))


def quiet_libraries() -> None:
    """Show errors of diffusers and transformers only, unless their own variables say otherwise."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")


def explain_or_raise(error: Exception) -> None:
    """Show a user's mistake without a traceback; what is not one is a bug, and is raised.

    SFUMATO_TRACEBACK=1 shows every traceback.
    """
    if os.environ.get("SFUMATO_TRACEBACK"):
        raise error
    fail(str(error))


def run_composed(command: str, config: Any) -> None:
    """Check composed settings and hand them to the room that does the work."""
    try:
        dispatch(command, config)
    except (ValueError, OSError) as error:  # caught here, before Hydra prints its own account
        explain_or_raise(error)


def dispatch(command: str, config: Any) -> None:
    """Run a command with its composed settings."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from sfumato.compose import check_train, swept_name, to_settings

    settings = to_settings(config)
    if command == "train":
        plain: Any = OmegaConf.to_container(config, resolve=True)
        overrides = HydraConfig.get().overrides.task
        plain["name"] = settings.name = swept_name(settings.name, sys.argv[1:], overrides)
        check_train(settings, int(os.environ.get("WORLD_SIZE", "1")))
        from sfumato.training.distribution import Distribution
        from sfumato.training.run import train

        distribution = Distribution(settings.training)
        try:
            train(settings, plain, distribution)
        finally:
            distribution.close()
    elif command == "sample":
        from sfumato.evaluation.commands import sample_images

        sample_images(settings)
    else:
        from sfumato.evaluation.commands import evaluate_run

        evaluate_run(settings)


def report(arguments: Sequence[str]) -> None:
    """Write a report of run folders."""
    import argparse
    from pathlib import Path

    parser = argparse.ArgumentParser(prog="sfumato report", description=report.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    parser.add_argument("--title", default="Sfumato report")
    options = parser.parse_args(arguments)
    from sfumato.evaluation.report import write_report
    from sfumato.training.folder import RunFolder

    try:
        runs = [RunFolder(path) for path in options.runs]
        print(write_report(runs, options.out, title=options.title))
    except (ValueError, OSError) as error:
        explain_or_raise(error)


def demo(arguments: Sequence[str]) -> None:
    """Run DRaFT and DRaFT+ in the tiny world and write a report of reward against diversity."""
    import argparse
    from pathlib import Path

    parser = argparse.ArgumentParser(prog="sfumato demo", description=demo.__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rebuild",
        type=Path,
        metavar="DIR",
        nargs="?",
        const=Path("runs/demo_model"),
        help="train the shipped models again, into this folder, instead of running the demo",
    )
    options = parser.parse_args(arguments)
    try:
        if options.rebuild:
            from sfumato.demo.rebuild import rebuild

            rebuild(options.rebuild)
        else:
            from sfumato.demo.experiment import run_demo

            run_demo(options.out, seed=options.seed)
    except (ValueError, OSError) as error:
        explain_or_raise(error)
