"""Data as the regulariser: a reward's objective and the supervised loss, on paired rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import PromptReward, ToyModel

from sfumato.config import DraftConfig, ModelConfig, SamplerConfig, SupervisedConfig
from sfumato.data.left_out import Skip, SkipReport
from sfumato.data.sample import Sample
from sfumato.data.stream import Pair, PairedStream, Stream
from sfumato.diffusion.randomness import Rng
from sfumato.objectives.draft import Draft
from sfumato.objectives.supervised import Supervised
from sfumato.objectives.with_data import WithData

SAMPLER = SamplerConfig(num_inference_steps=3, guidance_scale=1.0)


class Counting(Stream[int]):
    """Gives the numbers from 0 on."""

    def __init__(self) -> None:
        self.position = 0

    def next(self, global_batch_size: int, start: int, stop: int) -> list[int]:
        first = self.position
        self.position += global_batch_size
        return list(range(first + start, first + stop))

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]

    @property
    def skipped(self) -> SkipReport:
        return SkipReport((Skip("blank", 1, 1, ("a",)),))


def test_two_streams_advance_and_resume_together() -> None:
    stream = PairedStream(Counting(), Counting())
    stream.next(4, 0, 4)
    assert stream.next(4, 1, 3) == [Pair(5, 5), Pair(6, 6)]
    state = stream.state()
    again = PairedStream(Counting(), Counting())
    again.restore(state)
    assert again.next(2, 0, 2) == [Pair(8, 8), Pair(9, 9)]
    assert len(stream.skipped.skips) == 2
    with pytest.raises(ValueError, match="no place in a pair of streams"):
        again.restore({"position": 3})


def gradients(objective: Any, model: ToyModel, batch: Sequence[Any]) -> Tensor:
    model.network.zero_grad()
    for piece in objective.pieces(model, batch, Rng([1, 2])):
        piece().value.backward()
    return torch.cat([p.grad.flatten() for p in model.network.parameters() if p.grad is not None])


def test_the_gradient_is_the_sum_of_both() -> None:
    torch.manual_seed(0)
    model = ToyModel(ModelConfig(pretrained="toy"))
    prompts = ["a star", "a ring"]
    pixels = torch.rand(2, 3, 4, 4)
    samples = [
        Sample(pixels[i], prompt, (4, 4), (0, 0), str(i)) for i, prompt in enumerate(prompts)
    ]
    pairs = [Pair(*pair) for pair in zip(prompts, samples, strict=True)]
    draft = Draft(DraftConfig(kl_coeff=0.0), SAMPLER, PromptReward())
    supervised = Supervised(SupervisedConfig(caption_dropout=0.0))
    both = gradients(WithData(draft, supervised, 2.5), model, pairs)

    class After:
        """The supervised loss with what is left of the randomness after the rollout."""

        def pieces(self, model: ToyModel, batch: Sequence[Any], rng: Rng) -> list[Any]:
            draft.loss(model, prompts, rng)
            return [lambda: supervised.loss(model, batch, rng)]

    alone, data = gradients(draft, model, prompts), gradients(After(), model, samples)
    torch.testing.assert_close(both, alone + 2.5 * data, atol=1e-5, rtol=1e-4)
    assert float(data.norm()) > 0
