"""Ray cluster as an engine: its workers make shards, on one machine or on many that share a disk.

Ray is an extra, `pip install 'sfumato[ray]'`, of one version on all machines.
"""

import os
import socket
from importlib import import_module
from pathlib import Path
from typing import Any, final

from sfumato.preparation.engine import (
    Crew,
    Died,
    Engine,
    Event,
    Failed,
    Function,
    Made,
    Ticked,
    attempt,
)

_NEEDED = __name__  # a module that each machine must be able to load
_HELD = 8  # functions that a worker keeps
_SECONDS = 10  # until an address counts as silent
_START = (
    "start one with: ray start --head --port=6379, on further machines: ray start "
    "--address=HOST:6379, and give ray=HOST:6379; or leave ray out, which starts one here"
)
_TOKEN = "; if it asks for a token, set the variable RAY_AUTH_MODE=token"
_functions: dict[str, Function[Any, Any]] = {}  # of this worker, by token


@final
class Cluster(Engine):
    """Workers of a Ray cluster: one that runs, or one of this machine that ends with the engine."""

    def __init__(self, address: str | None, workers: int | None, folder: Path) -> None:
        """Connect to the cluster.

        Args:
            address: HOST:PORT, or auto for that of this machine; None starts one here.
            workers: shards that are made at once; None is one for each CPU or GPU of the cluster.
            folder: that all machines must see.

        Raises:
            ValueError: Ray is not installed, or there is no such cluster, or one of another
                version.
        """
        self._workers, self._folder = workers, folder.absolute()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray tells nobody how it is used
        try:
            import ray  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError(
                "engine=ray needs Ray, which is not installed; pip install 'sfumato[ray]' on every "
                "machine, or leave engine out"
            ) from None
        self._ray: Any = ray
        if address is not None:
            _refuse_silent(address)
        here = {"num_cpus": workers, "include_dashboard": False} if address is None else {}
        try:
            ray.init(address=address or "local", logging_level="ERROR", **here)
        # Ray has no class for what can go wrong; it exits where another server answers.
        except (Exception, SystemExit) as error:
            raise ValueError(_refused(address, error, ray.__version__)) from error
        if address is not None:
            try:
                self._check_machines(address)
            except ValueError:
                self.close()
                raise

    def _check_machines(self, address: str) -> None:
        """Refuse a cluster with a machine whose Python cannot import this module."""
        from ray.util.scheduling_strategies import (  # pyright: ignore[reportMissingImports]
            NodeAffinitySchedulingStrategy as On,
        )

        load = self._ray.remote(num_cpus=0, max_retries=0)(import_module)
        for node in self._ray.nodes():
            if not node["Alive"]:
                continue
            there = load.options(scheduling_strategy=On(node["NodeID"], soft=False))
            try:
                self._ray.get(there.remote(_NEEDED))
            except self._ray.exceptions.RayError as error:
                said = str(error).strip().splitlines()[-1]
                raise ValueError(
                    f"the machine {node['NodeManagerHostname']} of the Ray cluster at {address} "
                    f"cannot load Sfumato ({said}); pip install 'sfumato[ray]' on every machine, "
                    "and start Ray from that environment"
                ) from error

    def crew(self, function: Function[Any, Any], *, gpu: bool) -> tuple[Crew, int]:
        resources = self._ray.cluster_resources()
        kind = "GPU" if gpu and resources.get("GPU") else "CPU"
        workers = self._workers or max(1, int(resources.get(kind, 1)))
        return _Tasks(self._ray, function, self._folder, gpus=int(kind == "GPU")), workers

    def close(self) -> None:
        self._ray.shutdown()


@final
class _Tasks(Crew):
    """Shards as tasks of Ray; which worker makes one is Ray's choice."""

    def __init__(self, ray: Any, function: Function[Any, Any], folder: Path, *, gpus: int) -> None:
        self._ray = ray
        # Ray would make a shard of a dead worker again by itself, without a limit that we know.
        options = {"num_cpus": 1, "num_gpus": gpus, "max_retries": 0, "max_calls": 0}
        self._make = ray.remote(**options)(_make)
        self._given = (os.urandom(8).hex(), ray.put(function), str(Path.cwd()), str(folder))
        self._shards: dict[Any, int] = {}

    def start(self, number: int, item: Any) -> None:
        self._shards[self._make.remote(*self._given, item)] = number

    def wait(self) -> list[Event]:
        (task,), _ = self._ray.wait(list(self._shards), num_returns=1)
        number = self._shards.pop(task)
        return [(number, event) for event in self._events(task)]

    def close(self) -> None:
        for task in self._shards:
            self._ray.cancel(task, force=True)

    def _events(self, task: Any) -> list[Ticked | Made | Failed | Died]:
        errors = self._ray.exceptions
        try:
            return self._ray.get(task)
        except errors.RayTaskError:
            raise
        except errors.RayError as error:
            return [Died(str(error).strip().partition("\n")[0])]


def _make(
    token: str, function: Function[Any, Any], cwd: str, folder: str, item: Any
) -> list[Ticked | Made | Failed]:
    """Make a shard, in a worker of Ray; a function stays there with all that it has loaded."""
    if not Path(folder).is_dir():
        error = ValueError(
            f"the machine {socket.gethostname()} does not see {folder}; put out on a disk that all "
            "machines of the Ray cluster share, under one path"
        )
        return [Failed(error)]
    if Path(cwd).is_dir():  # paths may be relative
        os.chdir(cwd)
    if token not in _functions:
        while len(_functions) >= _HELD:
            del _functions[next(iter(_functions))]
        _functions[token] = function
    rows = list[int]()
    made = attempt(_functions[token], item, rows.append)
    return [Ticked(sum(rows)), made]


def _refuse_silent(address: str) -> None:
    """Refuse an address that does not answer: Ray itself would wait for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), _SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"no Ray cluster answers at ray={address} ({error}); {_START}") from None


def _refused(address: str | None, error: BaseException, version: str) -> str:
    said = " ".join(str(error).split())
    if address is None:
        return f"Ray does not start on this machine ({said}); leave engine=ray out, or mend it"
    if "ersion" in said:
        return (
            f"the Ray cluster at ray={address} is of another version than Ray {version} here: "
            f"{said}; install one version of Ray and of Python on all machines, and start the "
            "cluster again: ray stop, then ray start --head --port=6379"
        )
    return f"no Ray cluster can be reached at ray={address} ({said}); {_START}{_TOKEN}"
