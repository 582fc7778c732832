"""The order of prompts: shuffled by seed and epoch, resumable anywhere, in bounded memory."""

import itertools
import json
import os
import random
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfumato.data.left_out import SkipLog
from sfumato.data.order import PromptOrder, shuffle_buffered
from sfumato.data.prompts import open_prompts
from sfumato.data.stream import OrderedStream, Stream


def numbered(count: int, prefix: str = "prompt") -> list[str]:
    return [f"{prefix} {i}" for i in range(count)]


@pytest.fixture
def three_shards(tmp_path: Path) -> str:
    """17 prompts in text files of 9, 1 and 7."""
    for shard, (first, last) in enumerate([(0, 9), (9, 10), (10, 17)]):
        lines = numbered(17)[first:last]
        (tmp_path / f"{shard:03d}.txt").write_text("\n".join(lines))
    return str(tmp_path / "*.txt")


# Order


@pytest.mark.parametrize("buffer", [1, 4, 16, 17, 10_000])
def test_every_epoch_is_a_permutation(three_shards: str, buffer: int) -> None:
    stream = open_prompts(three_shards, buffer=buffer)
    epochs = [tuple(stream.next(17, 0, 17)) for _ in range(4)]
    assert all(sorted(epoch) == sorted(numbered(17)) for epoch in epochs)
    assert len(set(epochs)) > 1
    ordered = open_prompts(three_shards, buffer=buffer, shuffle=False)
    assert ordered.next(34, 0, 34) == numbered(17) * 2


def test_full_buffer_shuffles_uniformly() -> None:
    orders = Counter(
        tuple(shuffle_buffered(iter("abcd"), random.Random(seed), 10)) for seed in range(4800)
    )
    # 24 orders, each expected 200 times; the 99.9 % quantile of chi squared with 23 degrees.
    assert len(orders) == 24
    assert sum((count - 200) ** 2 / 200 for count in orders.values()) < 49.7


def test_order_depends_on_seed_and_epoch(three_shards: str) -> None:
    orders = set()
    for seed in range(5):
        stream = open_prompts(three_shards, seed=seed)
        orders |= {tuple(stream.next(17, 0, 17)) for _ in range(5)}
    assert len(orders) == 25


def test_order_is_the_same_in_another_process(three_shards: str) -> None:
    program = (
        "import json, sys; from sfumato.data.prompts import open_prompts; "
        "print(json.dumps(open_prompts(sys.argv[1], seed=7, buffer=5).next(40, 0, 40)))"
    )
    here = open_prompts(three_shards, seed=7, buffer=5).next(40, 0, 40)
    for hash_seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", program, three_shards],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(run.stdout) == here


@pytest.mark.parametrize("processes", [2, 3])
def test_slices_of_processes_make_the_global_batch(three_shards: str, processes: int) -> None:
    one = open_prompts(three_shards, seed=3)
    each = [open_prompts(three_shards, seed=3) for _ in range(processes)]
    for _ in range(8):
        parts = [s.next(2 * processes, 2 * r, 2 * r + 2) for r, s in enumerate(each)]
        assert list(itertools.chain(*parts)) == one.next(2 * processes, 0, 2 * processes)
        assert all(stream.state() == one.state() for stream in each)


# Resuming


@pytest.mark.parametrize(("shuffle", "buffer"), [(True, 5), (True, 10_000), (False, 10_000)])
def test_resume_is_exact_from_every_position(three_shards: str, shuffle: bool, buffer: int) -> None:
    def stream() -> Stream[str]:
        return open_prompts(three_shards, seed=1, shuffle=shuffle, buffer=buffer)

    expected = stream().next(60, 0, 60)
    running = stream()
    for consumed in range(40):
        resumed = stream()
        resumed.restore(running.state())
        assert resumed.state() == running.state()
        assert resumed.next(20, 0, 20) == expected[consumed : consumed + 20]
        running.next(1, 0, 1)
    assert running.state() == {"epoch": 2, "position": 6}


def test_resume_in_a_shortened_epoch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(numbered(10)))
    stream = open_prompts(str(path))
    stream.next(18, 0, 18)
    path.write_text("\n".join(numbered(7)))
    with pytest.raises(ValueError, match=r"prompt 8 of epoch 1.*only 7 prompts"):
        open_prompts(str(path)).restore(stream.state())


# Memory


class CountedPrompt(str):
    """A prompt that knows how many of its kind are alive."""

    alive = 0
    most = 0

    def __new__(cls, text: str) -> "CountedPrompt":
        CountedPrompt.alive += 1
        CountedPrompt.most = max(CountedPrompt.most, CountedPrompt.alive)
        return super().__new__(cls, text)

    def __del__(self) -> None:
        CountedPrompt.alive -= 1


def test_no_more_prompts_are_held_than_the_buffer() -> None:
    def read(_: Path) -> Iterator[str]:
        return (CountedPrompt(i) for i in range(20_000))

    log = SkipLog()
    order = PromptOrder([Path("a"), Path("b")], read, log, seed=0, shuffle=True, buffer=500)
    stream = OrderedStream(order, lambda prompt: prompt, log)
    for _ in range(4_000):
        stream.next(10, 0, 1)
    assert stream.state() == {"epoch": 0, "position": 40_000}
    # The buffer, a global batch, the batch before it that a caller holds, one being read.
    assert 500 <= CountedPrompt.most <= 500 + 10 + 10 + 1


PEAK = """
import sys, tracemalloc
from sfumato.data.prompts import open_prompts
stream = open_prompts(sys.argv[1], buffer=100)
tracemalloc.start()
for _ in range(int(sys.argv[2])):
    stream.next(1, 0, 1)
print(tracemalloc.get_traced_memory()[1])
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = []
    for count in (500, 4_000):
        with tarfile.open(tmp_path / "shard.tar", "w") as tar:
            text = tmp_path / "caption.txt"
            text.write_text("x" * 200)
            for i in range(count):
                tar.add(text, f"{i:06d}.txt")
        # A process of its own: checks of shapes and other tests' objects would count too.
        command = [sys.executable, "-c", PEAK, str(tmp_path / "shard.tar"), str(count)]
        peaks.append(int(subprocess.run(command, capture_output=True, check=True).stdout))
    assert peaks[1] < peaks[0] + 50_000
