"""Peak speed and memory of accelerators, from their data sheets."""

from dataclasses import dataclass

from sfumato.training.flops import PEAKS

TF32 = 0.5  # of the half-precision peak, for float32 products


@dataclass(frozen=True)
class Gpu:
    """One accelerator.

    Attributes:
        name: for messages.
        tflops: dense half-precision peak, in TFLOP/s; None if unknown.
        memory: bytes that torch reports for the device; None if unknown.
    """

    name: str
    tflops: float | None
    memory: int | None


# GiB as torch.cuda.get_device_properties reports them, rounded down; the sold sizes are larger.
GPUS = {
    "a100": Gpu("A100 80 GB", PEAKS["A100"], 79 * 2**30),
    "h100": Gpu("H100 80 GB", PEAKS["H100"], 79 * 2**30),
    "h200": Gpu("H200 141 GB", PEAKS["H200"], 139 * 2**30),
    "b200": Gpu("B200 180 GB", PEAKS["B200"], 178 * 2**30),
    "cpu": Gpu("CPU", None, None),
}


def peak_flops(gpu: Gpu, precision: str, stated: float | None) -> float | None:
    """Return the peak in FLOP/s at a precision (no | bf16 | fp16); None if unknown.

    Args:
        stated: training.peak_tflops, which holds for any precision.
    """
    if stated is not None:
        return stated * 1e12
    if gpu.tflops is None:
        return None
    return gpu.tflops * 1e12 * (TF32 if precision == "no" else 1.0)
