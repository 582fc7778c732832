"""Options of `sfumato demo`: the demo itself, the rebuild of its models, and its pictures."""

from argparse import ArgumentParser, Namespace
from pathlib import Path


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="of the demo (default: 0)")
    parser.add_argument(
        "--rebuild",
        type=Path,
        metavar="DIR",
        nargs="?",
        const=Path("runs/demo_model"),
        help="train the shipped models again, into this folder, instead of running the demo",
    )
    parser.add_argument(
        "--pictures",
        type=Path,
        metavar="DIR",
        help="render captioned pictures of emoji into this folder instead of running the demo",
    )
    parser.add_argument("--stage", metavar="NAME", help="of the rebuild: only this stage")
    parser.add_argument("--count", type=int, help="its training steps (default: 1)")


def check_options(parser: ArgumentParser, options: Namespace) -> None:
    """End with the parser's error if options do not go together."""
    if options.stage and not options.rebuild:
        parser.error(f"--stage {options.stage} is of the rebuild; say --rebuild DIR too")
    if options.count is not None and not (options.rebuild and options.stage):
        parser.error(
            f"--count {options.count} is of one stage of the rebuild; say --rebuild DIR --stage "
            "NAME too, or leave it out"
        )
    if options.count is not None and options.count < 1:
        parser.error(f"--count {options.count} must be 1 or more")
    if options.rebuild and options.out:
        parser.error(f"--rebuild does not write to --out; say --rebuild {options.out}")
    if options.rebuild and options.seed:
        parser.error(f"--seed {options.seed} is of the demo, and --rebuild has none; leave it out")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed {options.seed} must be 0 or more, and less than 2^63")
    if options.pictures and (options.rebuild or options.out or options.seed):
        parser.error(f"--pictures {options.pictures} goes alone; leave out the other options")


def run(options: Namespace) -> None:
    """Do what the options ask for.

    Raises:
        ValueError: if a file or package is missing, or a folder holds something else.
    """
    if options.pictures:
        from sfumato.demo.pictures import write_pictures

        for what, count in sorted(write_pictures(options.pictures).items()):
            print(f"{what}: {count}")
    elif options.rebuild and options.stage:
        from sfumato.demo.rebuild import run_stage

        run_stage(options.rebuild, options.stage, options.count or 1)
    elif options.rebuild:
        from sfumato.demo.rebuild import rebuild

        rebuild(options.rebuild)
    else:
        from sfumato.demo.experiment import run_demo

        run_demo(options.out or Path("runs/demo"), seed=options.seed)
