"""torchrun, without its tracebacks: python -m sfumato.launch.torchrun, with torchrun's arguments.

A process prints its mistake as one line, or saves when a signal stops it. torchrun's own traceback
would hide both.
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main() -> None:
    """Run processes; exit as the first that failed did, or with 128 + the signal that came."""
    try:
        run(parse_args(sys.argv[1:]))
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"exit code {code}" if code > 0 else f"signal {-code}"
        print(f"torchrun: process {rank} ended with {how}", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)


if __name__ == "__main__":
    main()
