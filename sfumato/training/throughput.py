"""How fast training is: images and FLOPs per second, and the share of what the device can do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch

from sfumato.config import TrainingConfig
from sfumato.models.model import TextToImageModel
from sfumato.training.distribution import Distribution
from sfumato.training.flops import FlopCounter

# Dense bf16 TFLOP/s as NVIDIA's data sheets state them; the first name that fits holds.
PEAKS = {"H100 PCIe": 756.0, "A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}


@final
class Meter:
    """Counts the FLOPs of the first micro-batch, and from then on only divides by the seconds.

    Attributes:
        flops: of the model for one image, forward and backward; None before they are counted.
    """

    def __init__(
        self, model: TextToImageModel, config: TrainingConfig, distribution: Distribution
    ) -> None:
        self.flops: float | None = None
        self._networks = [model.trained, *model.trained.children()]
        self._rows = config.micro_batch_size
        self._images = config.global_batch_size
        self._world = distribution.world
        self._peak = config.peak_tflops or peak_by_name(distribution.device)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the micro-batch that runs inside, forward and backward, if none was before.

        Compiled networks run as they are written meanwhile, as their kernels cannot be counted.
        """
        if self.flops is not None:
            yield
            return
        counter = FlopCounter(self._networks)
        with torch.compiler.set_stance("force_eager"), counter.counting():
            yield
        self.flops = counter.flops / self._rows

    def rates(self, seconds: float) -> dict[str, float]:
        """Return the metrics of a step that took so long; FLOPs are of one device."""
        rates = {"images_per_second": self._images / seconds, "seconds_per_step": seconds}
        if self.flops:
            tflops = self.flops * self._images / self._world / seconds / 1e12
            rates["tflops_per_second"] = tflops
            if self._peak:
                rates["mfu"] = tflops / self._peak
        return rates


def peak_by_name(device: torch.device) -> float | None:
    """Return what a device can do in bf16, in TFLOP/s; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)
