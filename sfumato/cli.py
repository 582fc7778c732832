"""Command line: reads `sfumato COMMAND ...`, explains mistakes, calls the room of the work."""

import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from sfumato.terminal import mend_streams

HYDRA_COMMANDS = ("train", "sample", "evaluate", "plan")
HELP = {"-h", "--help"}
USAGE = """\
usage: sfumato COMMAND [...]

  train     fine-tune a text-to-image model on images, or align it with a reward:
            sfumato train recipe=sdxl_sft_lora model.pretrained=DIR data.images.path=FOLDER
            sfumato train recipe=sd15_draft_plus model.pretrained=DIR data.prompts=FILE \\
                reward.pretrained=DIR objective.kl_coeff=0.2
  sample    make images with a run or a model:  sfumato sample run=runs/NAME prompt="a star"
  evaluate  score a run's checkpoints:          sfumato evaluate run=runs/NAME
  prepare   turn URLs or images into tars and caches that training reads:
            sfumato prepare out=DIR pack.path=FOLDER model.pretrained=DIR
  plan      say what a recipe costs:            sfumato plan recipe=RECIPE gpus=64 gpu=h200
  launch    run stages one after another, here or on Slurm:
            sfumato launch recipe=LADDER cluster=slurm --dry-run
  report    compare runs in one HTML page:      sfumato report runs/A runs/B --out report.html
  recipes   list recipes:                       sfumato recipes
  migrate   turn a config of NeMo-Aligner, NeMo or TRL into a recipe:
            sfumato migrate draftp_sd.yaml
  push      upload a LoRA or a pipeline to the Hugging Face hub:
            sfumato push runs/NAME --repo USER/NAME
  demo      align a small model of emoji:       sfumato demo

The first six take KEY=VALUE settings: `--help` lists them, `--help KEY` explains one, `--cfg job`
prints them as composed, `-m` sweeps over comma-separated values. Every command answers --help.
"""


def main() -> None:
    """Run the command line and exit.

    0 is done, or stopped by a signal or a limit with all saved; 1 failed; 2 a mistake in what was
    asked; 3 stopped by a guard, with all saved; 130 interrupted with nothing to save.
    """
    mend_streams()
    # It tells of a kernel that nothing here asks for.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        run_command(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except Exception:
        _leave_others(1, traceback.format_exc())
        raise


def run_command(arguments: Sequence[str]) -> None:
    """Run the command that the first argument names with the others."""
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(USAGE)
        return
    if arguments[0] == "--version":
        from sfumato import __version__

        print(__version__)
        return
    commands: dict[str, Callable[[Sequence[str]], None]] = {
        **{name: partial(hydra_command, name) for name in HYDRA_COMMANDS},
        "prepare": prepare,
        "launch": launch,
        "report": report,
        "recipes": recipes,
        "migrate": migrate,
        "push": push,
        "demo": demo,
    }
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        from sfumato.explain import nearest

        fail(f"unknown command {name!r}; {nearest(name, commands)}")
    composed = name not in {"report", "recipes", "migrate", "push", "demo"} and rest[:1] != [
        "verify"
    ]
    if composed and not HELP.isdisjoint(rest):
        show_help(name, [text for text in rest if text not in HELP])
    else:
        commands[name](rest)


def show_help(command: str, keys: Sequence[str]) -> None:
    """Print the help of a command, or of some of its settings."""
    from sfumato.help import command_page

    with mistakes_explained():
        for key in [text for text in keys if "=" not in text and text[0] != "-"] or [None]:
            print(command_page(command, key))


def recipes(arguments: Sequence[str]) -> None:
    """List the recipes of every command."""
    parser = options_parser("recipes", recipes)
    parser.parse_args(arguments)
    from sfumato.help import recipes_page

    print(recipes_page())


def options_parser(name: str, command: Callable[[Sequence[str]], None]) -> Any:
    """Return an argparse parser that describes a command by its docstring."""
    import argparse

    return argparse.ArgumentParser(prog=f"sfumato {name}", description=command.__doc__)


def fail(message: str, code: int = 2) -> NoReturn:
    """Print what is wrong and exit; a process other than the first says which one it is."""
    rank = os.environ.get("RANK", "0")
    who = "sfumato" if rank == "0" else f"sfumato (process {rank})"
    _leave_others(code, f"{who}: {message}\n")
    print(f"{who}: {message}", file=sys.stderr)
    sys.exit(code)


def _leave_others(code: int, message: str) -> None:
    """Print why, and exit at once if this process is connected to others.

    Python would close the connections first, and wait for the others, who wait for this process.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stderr.write(message)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def hydra_command(command: str, arguments: Sequence[str]) -> None:
    """Compose the settings of a command and run it; `--cfg` and `-m` are Hydra's."""
    import hydra

    from sfumato.compose import COMPOSITION_ERRORS, check_sweep, is_sweep, register
    from sfumato.config import CONF
    from sfumato.explain import explain
    from sfumato.overrides import rewritten

    register(command)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here, and not as Hydra prints them
    for library in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(library, "error")
    settings = [text for text in arguments if "=" in text and not text.startswith("-")]
    others = [text for text in arguments if text not in settings]

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=command)
    def run(config: Any) -> None:
        with mistakes_explained():  # here, before Hydra prints its own account
            dispatch(command, config)

    with mistakes_explained():
        overrides = rewritten(command, settings, sweep=is_sweep(others))
        if is_sweep(others) and not any(text.startswith("--config") for text in others):
            check_sweep(command, overrides)
        sys.argv = [f"sfumato {command}", *others, *overrides]
        try:
            run()
        except COMPOSITION_ERRORS as error:
            fail(explain(error, command, settings))


@contextmanager
def mistakes_explained() -> Iterator[None]:
    """Show a user's mistake without a traceback; what is not one is a bug, and is raised.

    SFUMATO_TRACEBACK=1 shows every traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("SFUMATO_TRACEBACK"):
            raise
        message = " ".join(line.strip() for line in str(error).splitlines())
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            message += "; free some space and run the same command again"
        fail(message)
    except (MemoryError, RuntimeError) as error:
        wanting = ("out of memory", "can't allocate memory")  # on the GPU, on the CPU
        if "determine home directory" in str(error):
            fail("a path begins with ~NAME, and no user has that name; give the whole path")
        gone = any(text in str(error) for text in ("closed by peer", "reset by peer"))
        if gone and "WORLD_SIZE" in os.environ and not os.environ.get("SFUMATO_TRACEBACK"):
            fail("another process ended, and its message says why", code=1)
        known = isinstance(error, MemoryError) or any(text in str(error) for text in wanting)
        if os.environ.get("SFUMATO_TRACEBACK") or not known:
            raise
        fail(
            f"out of memory ({str(error).partition('. ')[0]}): lower training.micro_batch_size "
            "(the global batch stays), set model.gradient_checkpointing=true and "
            "reward.gradient_checkpointing=true, or model.dtype=bfloat16; in sampling and "
            "evaluation lower batch_size",
            code=1,
        )


def dispatch(command: str, config: Any) -> None:
    """Check composed settings and hand them to the room that does the work."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from sfumato.check import check_train
    from sfumato.compose import read_settings, swept_name
    from sfumato.conditions import shown, typed_keys, unread

    overrides = HydraConfig.get().overrides.task
    typed: Any = OmegaConf.to_container(overrides, resolve=False)  # a text may hold ${
    settings, plain = read_settings(config, typed)
    if command == "train":
        plain["name"] = settings.name = swept_name(settings.name, sys.argv[1:], overrides)
        check_train(settings, int(os.environ.get("WORLD_SIZE", "1")))
        if os.environ.get("RANK", "0") == "0":
            for key, (value, why, _) in unread(settings).items():
                print(f"the recipe's {key}={shown(value)} has no effect {why}", flush=True)
        from sfumato.run.run import is_guarded, train
        from sfumato.training.distribution import Distribution

        distribution = Distribution(settings.training)
        try:
            outcome = train(settings, plain, distribution, typed=typed_keys(typed))
        finally:
            if sys.exception() is None or distribution.world == 1:  # else the others may not come
                distribution.close()
        sweeps = HydraConfig.get().mode is RunMode.MULTIRUN
        if outcome.stopped_by is not None and sweeps:
            sys.exit(0)  # else Hydra would begin the next run of the sweep
        if is_guarded(outcome) and not sweeps:
            sys.exit(3)
    elif command == "sample":
        from sfumato.evaluation.commands import sample_images

        sample_images(settings)
    elif command == "prepare":
        from sfumato.preparation.prepare import prepare as prepare_data

        prepare_data(settings)
    elif command == "launch":
        from sfumato.launch.launch import launch as launch_stages

        launch_stages(settings)
    elif command == "plan":
        from sfumato.planning.page import plan

        plan(settings)
    else:
        from sfumato.config import TrainingConfig
        from sfumato.evaluation.commands import evaluate_run
        from sfumato.report.guidance import write_guidance
        from sfumato.training.distribution import ALONE, Distribution
        from sfumato.training.folder import RunFolder

        several = os.environ.get("WORLD_SIZE", "1") != "1"
        group = Distribution(TrainingConfig(), tf32=False) if several else ALONE
        try:
            results = evaluate_run(settings, group)
        finally:
            if isinstance(group, Distribution):
                group.close()
        if group.is_main:
            for file in write_guidance(RunFolder(Path(settings.run)), results):
                print(file)


def prepare(arguments: Sequence[str]) -> None:
    """Prepare data as settings say, or verify what was prepared: sfumato prepare verify DIR."""
    if arguments[:1] != ["verify"]:
        hydra_command("prepare", arguments)
        return
    parser = options_parser("prepare verify", prepare)
    parser.add_argument("folder", help="the folder that was prepared, or its address in a store")
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--workers", type=int, help="processes (default: 1, or all of Ray's)")
    parser.add_argument("--ray", help="HOST:PORT of a Ray cluster, or auto (default: one here)")
    options = parser.parse_args(arguments[1:])
    if options.workers is not None and not 1 <= options.workers <= 1_000_000:
        parser.error(f"--workers {options.workers} must be 1 or more")
    from sfumato.preparation.verify_store import verify_at

    with mistakes_explained():
        verify_at(options.folder, options.engine, options.workers, options.ray)


def launch(arguments: Sequence[str]) -> None:
    """Run stages one after another; --dry-run prints what would be run."""
    hydra_command("launch", ["dry_run=true" if a == "--dry-run" else a for a in arguments])


def report(arguments: Sequence[str]) -> None:
    """Write a report of run folders."""
    parser = options_parser("report", report)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    parser.add_argument("--title", default="Sfumato report")
    options = parser.parse_args(arguments)
    from sfumato.report.report import write_report
    from sfumato.training.folder import RunFolder

    with mistakes_explained():
        runs = [RunFolder(path) for path in options.runs]
        print(write_report(runs, options.out, title=options.title))


def migrate(arguments: Sequence[str]) -> None:
    """Turn a config of NeMo-Aligner, NeMo or TRL into a recipe, and say what became of each key."""
    parser = options_parser("migrate", migrate)
    parser.add_argument("file", type=Path, help=".yaml, .json, or .py with the call of a config")
    parser.add_argument(
        "--config-dir", type=Path, default=Path(), help="gets recipe/NAME.yaml (default: here)"
    )
    parser.add_argument("--name", help="of the recipe (default: the file's)")
    parser.add_argument("--as", dest="kind", metavar="KIND", help="of the config, if in doubt")
    parser.add_argument(
        "--processes", type=int, default=1, help="GPUs that a config of TRL ran on (default: 1)"
    )
    options = parser.parse_args(arguments)
    if not 1 <= options.processes <= 1_000_000:
        parser.error(f"--processes {options.processes} must be 1 or more")
    from sfumato.migrate import migrate as write_recipe

    with mistakes_explained():
        write_recipe(
            options.file,
            into=options.config_dir,
            name=options.name,
            kind=options.kind,
            processes=options.processes,
        )


def push(arguments: Sequence[str]) -> None:
    """Upload the LoRA or the pipeline of a run, with a model card, to the Hugging Face hub."""
    parser = options_parser("push", push)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--repo", required=True, help="USER/NAME; made, and private, if it is not there"
    )
    parser.add_argument("--export", choices=["lora", "pipeline"], help="default: the LoRA, if any")
    parser.add_argument(
        "--public", action="store_true", help="let all see a repository that is made"
    )
    parser.add_argument("--base-model", help="hub id, if model.pretrained is a folder")
    options = vars(parser.parse_args(arguments))
    from sfumato.publish import push as push_export

    with mistakes_explained():
        print(push_export(options.pop("run"), options.pop("repo"), **options))


def demo(arguments: Sequence[str]) -> None:
    """Run DRaFT and DRaFT+ on emoji and write a report of reward against diversity."""
    from sfumato.demo.commands import add_options, check_options, run

    parser = options_parser("demo", demo)
    add_options(parser)
    options = parser.parse_args(arguments)
    check_options(parser, options)
    with mistakes_explained():
        run(options)
