"""Rewards that the user wrote: a function, called as TRL's users wrote it, or a `Reward`."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.precision import without_autocast
from sfumato.rewards.code import find_code, load_code, told
from sfumato.rewards.reward import PromptRows, Reward, Score, ScorerError

PROBE = 64  # pixels of a side of the images on which a function is tried
PROMPT = "a photo of a star"


@final
class OwnReward(Reward):
    """Score by a function of the user's, or by a `Reward`: `score(images, prompts, metadata)`.

    The function gets copies: float32 images, a list of prompts, and for each prompt a dictionary,
    its row of the prompt table. It returns a tensor or a list with a number for each image, or a
    pair of this and anything, as for TRL.

    Attributes:
        differentiable: found out by `prepare`, on random images.
    """

    place: Tensor  # on the device of the weights

    def __init__(self, path: str) -> None:
        """Remember the place; the code is run by `prepare` alone.

        Args:
            path: FILE.py:NAME or package.module:NAME.

        Raises:
            ValueError: if it is not there.
        """
        super().__init__()
        self.file, _ = find_code(path)
        self.title = path
        self.found: Any = None
        self.rows: Any = {}
        self.with_rows = False
        self.register_buffer("place", torch.zeros(()), persistent=False)

    def train(self, mode: bool = True) -> "OwnReward":
        """Stay in evaluation mode: with dropout one image would have many scores."""
        return super().train(False)

    def prepare(self, rows: PromptRows) -> None:
        """Run the user's file, try what it has on random images, and see if there is a gradient.

        Raises:
            ValueError: saying what is wrong, with file and line where the user's code raised.
        """
        with contextlib.chdir("."), _modes_kept():
            found = load_code(self.title)
            try:
                found = found() if inspect.isclass(found) and issubclass(found, Reward) else found
                if isinstance(found, nn.Module):
                    found.requires_grad_(False).eval().to(self.place.device)
                if isinstance(found, Reward):
                    found.prepare(rows)
            except (Exception, SystemExit) as error:
                fault = told(error, self.file)
                raise ValueError(f"{self.title!r} cannot be made: {fault}") from error
        if isinstance(found, Reward):
            self.scale, self.weights = found.scale, found.weights
        elif inspect.isclass(found) or not callable(found):
            raise ValueError(
                f"{self.title!r} is a {type(found).__name__}, not a function; name a function "
                "score(images, prompts, metadata), or a Reward"
            )
        else:
            self.with_rows = _takes(found, self.title)
            self.rows = rows() if self.with_rows else {}
        self.found = found
        self._try()

    def score(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Score:
        """Score copies of the images and prompts; without a graph where there is no gradient.

        Raises:
            ScorerError: if what was returned is not a number for each image.
            ValueError: if the user's code raised, with file and line.
        """
        if images.is_meta:  # of a plan, which runs nobody's code
            return Score(images.flatten(1).mean(1))
        if self.differentiable:
            return self._ask(images, prompts)
        with torch.no_grad():
            return self._ask(images.detach(), prompts)

    def _ask(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Score:
        given = images.to(torch.promote_types(images.dtype, torch.float32), copy=True)
        call: Callable[..., Any] = self.found.score if self._is_reward else self.found
        metadata = [[deepcopy(self.rows.get(prompt, {})) for prompt in prompts]]
        try:
            with without_autocast(self.place), _modes_kept():
                result = call(given, list(prompts), *(metadata if self.with_rows else ()))
        except ScorerError:
            raise
        except (Exception, SystemExit) as error:
            raise ValueError(f"{self.title}: {told(error, self.file)}") from error
        parts: Mapping[str, Any] = {}
        if self._is_reward and isinstance(result, Score):
            result, parts = result.value, result.parts
        values = numbers(result, images, self.title)
        if images.requires_grad and torch.is_grad_enabled() and not values.requires_grad:
            values = _ZeroGradient.apply(values, images)
        return Score(
            values,
            {k: numbers(v, images, f"{self.title} ({k})").detach() for k, v in parts.items()},
        )

    @property
    def _is_reward(self) -> bool:
        return isinstance(self.found, Reward)

    def _try(self) -> None:
        """Score two random images, and differentiate the score."""
        prompts = [next(iter(self.rows), PROMPT)] * 2
        drawn = torch.rand(2, 3, PROBE, PROBE, generator=torch.Generator().manual_seed(0))
        images = drawn.to(self.place.device)
        device = self.place.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            with torch.no_grad():
                self._ask(images, prompts)
            if self._is_reward and not self.found.differentiable:
                self.differentiable, self.why_constant = False, "it says so"
                return
            images.requires_grad_()
            try:
                with torch.enable_grad():
                    score = self._ask(images, prompts).value
                    (gradient,) = torch.autograd.grad(score.sum(), images)
            except (ValueError, RuntimeError) as error:
                self.differentiable, self.why_constant = False, str(error)
                return
        self.differentiable = bool(gradient.count_nonzero())
        self.why_constant = "its gradient at random images is 0"


def numbers(result: Any, images: Float[Tensor, "b 3 h w"], who: str) -> Float[Tensor, " b"]:
    """Return what a scorer returned as a tensor with a number for each image; None is NaN.

    Args:
        result: a tensor, a list, or an array; or a pair of such and anything.

    Raises:
        ScorerError: if it is anything else.
    """
    if isinstance(result, tuple) and len(result) == 2 and not _is_number(result[0]):
        result = result[0]
    count = len(images)
    try:
        if isinstance(result, list | tuple) and any(isinstance(each, Tensor) for each in result):
            column = [math.nan if each is None else each for each in result]
            result = torch.stack([torch.as_tensor(each, device=images.device) for each in column])
        elif isinstance(result, list | tuple):
            result = [math.nan if each is None else float(each) for each in result]
        values = torch.as_tensor(result, device=images.device)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        shown = repr(result)
        raise ScorerError(
            f"{who} returned {shown[:80]}, which is not a list of numbers; return a number for "
            "each image"
        ) from None
    if list(values.shape) != [count] or values.is_complex():
        raise ScorerError(
            f"{who} returned a tensor of shape {list(values.shape)} for {count} images; return a "
            f"number for each image, of shape [{count}]"
        )
    return values if values.dtype == torch.float64 else values.float()


def _is_number(value: Any) -> bool:
    """Say whether this is the score of one image, and not the first of a pair."""
    if isinstance(value, Tensor | np.ndarray):
        return not value.ndim
    return value is None or isinstance(value, int | float | np.generic)


@final
class _ZeroGradient(torch.autograd.Function):
    """Values that do not depend on images, of a function whose other values do."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, images: Tensor) -> Tensor:
        ctx.save_for_backward(images)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return None, torch.zeros_like(ctx.saved_tensors[0])


@contextlib.contextmanager
def _modes_kept() -> Iterator[None]:
    """Undo what somebody's code sets for all of torch: no gradients, another number type."""
    dtype = torch.get_default_dtype()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _takes(function: Callable[..., Any], title: str) -> bool:
    """Say whether a function takes metadata beside images and prompts.

    Raises:
        ValueError: if it takes neither two arguments nor three.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a function that is not Python's
        return True
    for count in (3, 2):
        try:
            signature.bind(*[None] * count)
        except TypeError:
            continue
        return count == 3
    raise ValueError(
        f"{title!r} is called with images, prompts and metadata, or with images and prompts, and "
        f"takes {signature}; correct its arguments"
    )
