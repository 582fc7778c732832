"""FLOPs and activations without memory, against sums by hand, torch's counter and real runs."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import peak_of_allocations
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sfumato.planning.memory import largest_rows
from sfumato.planning.precision import LOWERED, RAISED
from sfumato.planning.step import StepCost, measure_step

ROWS, WIDTH, SIDE, HEADS = 2, 8, 4, 2
N = SIDE * SIDE  # tokens


class Small(nn.Module):
    """A convolution, then attention of its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).mT
        query, key, value = self.qkv(tokens).chunk(3, -1)
        heads = [each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (query, key, value)]
        return F.scaled_dot_product_attention(*heads)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def cost_of(
    make: Callable[[], nn.Module], *shape: int, dtype: torch.dtype | None = None
) -> StepCost:
    network = on_meta(make)
    x = torch.empty(shape, device="meta")
    return measure_step(network, lambda: network(x).float().square().mean(), dtype)


def test_flops_are_those_of_a_count_by_hand():
    cost = cost_of(Small, ROWS, 3, SIDE, SIDE)
    conv = 2 * ROWS * WIDTH * 3 * 9 * N
    linear = 2 * ROWS * N * WIDTH * 3 * WIDTH
    attention = 2 * 2 * ROWS * N * N * WIDTH  # scores, and their product with the values
    assert cost.forward == conv + linear + attention
    # Backward: a product for each input and each weight, but the picture needs no gradient.
    assert cost.flops == cost.forward + conv + 2 * linear + 2 * attention
    assert cost.executed == cost.flops


def test_activations_are_those_of_a_count_by_hand():
    layers = lambda: nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))  # noqa: E731
    cost = cost_of(layers, 32, 8)
    hidden, output = 4 * 32 * 16, 4 * 32 * 4
    # The input was there before; the loss takes the output's square, and its mean.
    assert cost.activations >= hidden + 2 * output
    assert cost.activations <= 2 * hidden + 3 * output + 4 * 16 * 4 + 64


def unet(checkpointing: bool = False) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    network: Any = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=16,
    ).train()
    if checkpointing:
        network.enable_gradient_checkpointing()
    return network


def predicting(network: Any, rows: int, device: str) -> Callable[[], Tensor]:
    x = torch.ones(rows, 4, 16, 16, device=device)
    t, states = torch.ones(rows, device=device), torch.ones(rows, 8, 16, device=device)
    return lambda: network(x, t, states).sample


def unet_cost(rows: int, dtype: torch.dtype | None = None, *, checkpointing: bool) -> StepCost:
    network: Any = on_meta(lambda: unet(checkpointing))
    run = predicting(network, rows, "meta")
    return measure_step(network, lambda: run().float().square().mean(), dtype)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_those_that_torch_counts_in_a_real_run(checkpointing: bool):
    network, cost = unet(checkpointing), unet_cost(3, checkpointing=checkpointing)
    run = predicting(network, 3, "cpu")
    with sdpa_kernel(SDPBackend.MATH):  # torch's counter knows no CPU kernel of attention
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            run()
        with FlopCounterMode(display=False) as both:
            run().square().mean().backward()
    assert cost.forward == forward.get_total_flops()
    assert cost.executed == both.get_total_flops()
    assert (cost.executed > cost.flops) == checkpointing
    assert cost.flops == unet_cost(3, checkpointing=False).flops


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_that_of_torchs_allocations_in_a_real_run(checkpointing: bool):
    network, rows = unet(checkpointing), 8
    run = predicting(network, rows, "cpu")
    run().square().mean().backward()  # what is allocated once is there
    network.zero_grad()
    peak = peak_of_allocations(lambda: run().square().mean().backward())
    assert peak > 2**20
    assert unet_cost(rows, checkpointing=checkpointing).with_gradients == pytest.approx(peak, 0.05)


def test_activations_hold_what_autograd_saves_in_a_real_run():
    network, seen = unet(), {}
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = predicting(network, 8, "cpu")().square().mean()
    saved = sum(seen.values())
    assert loss.requires_grad
    # Beside what is saved, the peak has the gradients of activations that are under way.
    assert saved <= unet_cost(8, checkpointing=False).activations <= 1.15 * saved


def test_activations_grow_along_a_line_and_checkpointing_keeps_fewer():
    costs = [unet_cost(rows, checkpointing=False).activations for rows in (8, 16, 24)]
    assert costs[2] - costs[1] == costs[1] - costs[0] > 0
    assert unet_cost(8, checkpointing=True).activations < 0.6 * costs[0]


def test_under_autocast_weights_are_held_once_more_in_half_precision():
    weights = sum(p.numel() for p in unet().parameters() if p.ndim > 1)
    few, many = (unet_cost(rows, torch.bfloat16, checkpointing=False) for rows in (8, 16))
    fixed = 2 * few.activations - many.activations
    assert fixed == pytest.approx(2 * weights, rel=0.05)
    exact = unet_cost(16, checkpointing=False).activations
    # Half of what products and convolutions read; norms and their output stay in float32.
    assert 0.5 * exact < many.activations - fixed < 0.9 * exact


def autocast_names() -> dict[str, set[str]]:
    """Return the operators that torch tests CUDA's autocast with, by the lists that it keeps."""
    file = Path(torch.__file__).parent / "testing" / "_internal" / "autocast_test_lists.py"
    classes = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
    (cuda,) = (node for node in classes if node.name == "AutocastTestLists")
    return {
        ast.unparse(node.targets[0]): {
            str(ast.literal_eval(case.elts[0]))
            for case in node.value.elts
            if isinstance(case, ast.Tuple)
        }
        for node in ast.walk(cuda)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
    }


def test_casts_are_those_of_cudas_autocast():
    names = autocast_names()
    lowered = names["self.torch_fp16"] | names["self.nn_fp16"] | names["self.methods_fp16"]
    raised = names["self.torch_fp32"] | names["self.nn_fp32"] | names["self.methods_fp32"]
    assert LOWERED - lowered <= {"__rmatmul__", "scaled_dot_product_attention"}
    assert RAISED - raised == set()


@pytest.mark.parametrize(("room", "rows"), [(99, 0), (100, 1), (1000, 91), (10**9, 4096)])
def test_the_largest_micro_batch_is_the_last_that_fits(room: int, rows: int):
    assert largest_rows(lambda n: 90 + 10 * n, room, 4) == rows


def test_the_largest_micro_batch_is_found_below_a_bend():
    costs = [max(100, 50 * n) + 3 * n for n in range(4200)]
    for room in (102, 103, 260, 3000):
        fits = [n for n in range(1, 4096) if costs[n] <= room]
        assert largest_rows(lambda n: costs[n] if n < 4200 else 53 * n, room, 1) == max(
            fits, default=0
        )
