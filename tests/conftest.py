"""What all tests share: one thread, no network, and a tiny pipeline of each Stable Diffusion."""

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

# One thread a process: tiny models on several threads stall behind a busy neighbour.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["SFUMATO_CACHE"] = tempfile.mkdtemp(prefix="sfumato-cache-")
os.environ["DIFFUSERS_VERBOSITY"] = os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import jaxtyping
import pytest
import torch
from tiny_sd import write_tiny_sd

torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # no test cuts the power, and what was killed has written
atexit.register(shutil.rmtree, os.environ["SFUMATO_CACHE"], ignore_errors=True)


def pytest_collection_finish() -> None:
    """Spare the collector, here and in forked processes, what all tests share."""
    gc.freeze()


@pytest.fixture(scope="module")
def unchecked() -> Iterator[None]:
    """Check no shapes of calls: at every operator, this takes twice as long as what is tested."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder laid out like SD 1.5: epsilon, PNDM settings. Copy it to change it."""
    folder = tmp_path_factory.mktemp("models") / "sd15"
    write_tiny_sd(folder)
    return folder


@pytest.fixture(scope="session")
def sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder laid out like SD 2.1: v-prediction, DDIM settings. Copy it to change it."""
    folder = tmp_path_factory.mktemp("models") / "sd21"
    write_tiny_sd(folder, prediction_type="v_prediction")
    return folder


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the address of moto's server, where botocore looks for it."""
    server = pytest.importorskip("moto.server", reason="moto serves S3")
    s3fs = pytest.importorskip("s3fs", reason="fsspec reads S3 with s3fs")
    s3fs.S3FileSystem.clear_instance_cache()  # one of an earlier server
    running = server.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    # What an earlier server of this process held is still there.
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "name",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield f"http://{host}:{port}"
    running.stop()
