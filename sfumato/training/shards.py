"""Writer of sharded checkpoints: each process writes its share, by torch.distributed.checkpoint.

That package plans who writes what several processes hold, and gathers the result or the error of
each. Its own writer of safetensors holds two more copies of a file's bytes, and knows no checksums.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from sfumato.files import sha256_of
from sfumato.weights import Share, shard_names, write_shard


def save_shares(
    shares: Mapping[str, Share],
    begin: Callable[[], Path],
    end: Callable[[Path, Mapping[str, str]], None],
    group: Any,
) -> None:
    """Write the shares of all processes, one file each; all processes must call it.

    Args:
        begin: returns the folder to write to, on the main process.
        end: gets that folder and the SHA-256 of each file in it, on the main process.
        group: of processes; nothing else may use it meanwhile.

    Raises:
        Exception: on every process, the one that a process, `begin` or `end` raised.
    """
    try:
        save(
            dict(shares),
            storage_writer=_Writer(shares, begin, end),
            planner=_Planner(),
            process_group=group,
        )
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


@final
class _Planner(DefaultSavePlanner):
    """Planner for shares, which need no mesh of devices."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_item(name, share) for name, share in self.state_dict.items()])
        return self.plan


def _item(name: str, share: Share) -> WriteItem:
    chunk = ChunkStorageMetadata(offsets=torch.Size(share.offsets), sizes=share.value.shape)
    return WriteItem(
        MetadataIndex(name, share.offsets),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk, TensorProperties.create_from_tensor(share.value), share.shape
        ),
    )


@final
class _Writer(StorageWriter):
    """Storage of one file for each process, each read back for its SHA-256."""

    def __init__(
        self,
        shares: Mapping[str, Share],
        begin: Callable[[], Path],
        end: Callable[[Path, Mapping[str, str]], None],
    ) -> None:
        self._shares, self._begin, self._end = shares, begin, end
        self._folder = Path()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._folder = self._begin()
        files = [self._folder / name for name in shard_names(len(plans))]
        return [replace(plan, storage_data=f) for plan, f in zip(plans, files, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        file: Path = plan.storage_data
        write_shard(file, {item.index.fqn: self._shares[item.index.fqn] for item in plan.items})
        with file.open("rb") as written:  # the main process may be on another machine
            os.fsync(written.fileno())
        result = WriteResult(MetadataIndex(file.name), file.stat().st_size, sha256_of(file))
        done: Future[list[WriteResult]] = Future()
        done.set_result([result])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._end(self._folder, {each.index.fqn: each.storage_data for (each,) in results})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
