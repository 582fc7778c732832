"""Log-probability of a label by an image classifier of transformers."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.clip import (
    ImageSettings,
    first_sentence,
    model_folder,
    preprocess,
    processor_folder,
    read_processor,
)
from sfumato.precision import without_autocast
from sfumato.rewards.reward import Reward, Score
from sfumato.weights import load_whole

if TYPE_CHECKING:
    import transformers

ONE_OF_MANY = (None, "single_label_classification")  # of a config's problem_type


@final
class ClassifierReward(Reward):
    """Score log p(label | image) by a frozen classifier, as the mean over sizes of the image.

    Attributes:
        index: of the label, whatever the prompt; None takes the label that each prompt names.
        views: settings of preprocessing, one for each size.
        crop: smallest share of each side that a random crop keeps. Images with a gradient are
            cropped; others, as those of evaluations, are seen whole.
    """

    def __init__(
        self,
        model: "transformers.PreTrainedModel",
        views: Sequence[ImageSettings],
        index: int | None,
        names: Mapping[int, str],
        *,
        crop: float = 1.0,
    ) -> None:
        """Take over and freeze a model whose output has logits.

        Args:
            names: of all labels, by their indices; several texts of one stand between commas.
        """
        super().__init__()
        self.model = model.requires_grad_(False)
        self.views, self.crop = tuple(views), crop
        self.index, self.labels = index, len(names)
        self.texts = texts_of(names)
        choices = sorted(map(re.escape, self.texts), key=len, reverse=True)  # the longest wins
        self.pattern = re.compile(rf"(?<!\w)(?:{'|'.join(choices)})(?!\w)")
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str,
        label: str | None,
        *,
        sizes: Sequence[int] = (),
        crop: float = 1.0,
        processor: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "ClassifierReward":
        """Load a classifier from a folder of transformers, or from a hub id.

        Inside `torch.device("meta")` no weight is read, and the model has no memory.

        Args:
            label: its text, or one of its texts between commas, or its index; None takes the label
                that each prompt names.
            sizes: sides in pixels to which a square image is resized; by default the processor's.
            crop: smallest share of each side that a random crop keeps while training, above 0.
            processor: folder or hub id of preprocessor_config.json, by default `path_or_hub_id`.
            dtype: of the frozen weights; preprocessing and softmax stay in float32 or better.

        Raises:
            ValueError: if a file is missing or unreadable, the model is no classifier, or the
                label is unknown.
        """
        from transformers import AutoModelForImageClassification

        source = f"reward.pretrained = {path_or_hub_id!r}"
        folder = model_folder(path_or_hub_id)
        preprocessing = processor_folder(processor or path_or_hub_id)
        model, views = _blank(folder, preprocessing, sizes, source)
        names = model.config.id2label
        index = None if label is None else find_label(label, names, source)
        if torch.get_default_device().type != "meta":
            model = load_whole(
                *(AutoModelForImageClassification, folder, "image classifier"),
                use_safetensors=True,
                trust_remote_code=False,
            )
        elif index is None:
            index = 0  # a plan has no prompts of its own
        return cls(model, views, index, names, crop=crop).to(dtype)

    def train(self, mode: bool = True) -> "ClassifierReward":
        """Stay in evaluation mode: with dropout one image would have many scores."""
        return super().train(False)

    def score(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Score:
        """Return the log-probability of the label row by row.

        A random crop is drawn for each size, from torch's global generator.

        Raises:
            ValueError: a prompt names no label, where it has to.
        """
        weights = next(self.model.parameters())
        goals = self.goals(prompts).to(images.device)
        values = []
        for view in self.views:
            seen = images if self.crop == 1 or not images.requires_grad else self.cropped(images)
            pixels = preprocess(seen, view)
            with without_autocast(weights):
                logits = self.model(pixel_values=pixels.to(weights.dtype)).logits
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            values.append((logits.log_softmax(1) + goals).logsumexp(1))
        return Score(torch.stack(values).mean(0))

    def cropped(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 H W"]:
        """Return a random part of the images, the same of all; it keeps their proportions."""
        share = self.crop + (1 - self.crop) * torch.rand(()).item()
        kept = [math.ceil(share * side) for side in images.shape[-2:]]
        tops = [
            int(torch.randint(side - own + 1, ()))
            for side, own in zip(images.shape[-2:], kept, strict=True)
        ]
        return images[..., tops[0] : tops[0] + kept[0], tops[1] : tops[1] + kept[1]]

    def goals(self, prompts: Sequence[str]) -> Float[Tensor, "b labels"]:
        """Return, for each prompt, 0 at its labels and minus infinity elsewhere."""
        found = torch.full((len(prompts), self.labels), -torch.inf)
        for row, prompt in zip(found, prompts, strict=True):
            row[self.named(prompt) if self.index is None else self.index] = 0
        return found

    def named(self, prompt: str) -> list[int]:
        """Return the labels of the first text of a label in a prompt; two labels may share it.

        Raises:
            ValueError: there is none.
        """
        if (match := self.pattern.search(prompt.casefold())) is None:
            raise ValueError(
                f"the prompt {prompt!r} names no label of the classifier; leave it out, or give "
                "one label for all prompts (reward.label)"
            )
        return self.texts[match[0]]


def texts_of(names: Mapping[int, str]) -> dict[str, list[int]]:
    """Return the labels of each text, in lower case; ImageNet's "crane" is two of them."""
    texts = defaultdict[str, list[int]](list)
    for index, name in names.items():
        for text in sorted({part.strip().casefold() for part in name.split(",")}):
            texts[text].append(index)
    return texts


def find_label(label: str, names: Mapping[int, str], source: str) -> int:
    """Return the index of a label.

    Args:
        names: of all labels, by their indices. A name may have several texts between commas, as
            those of ImageNet: "tabby, tabby cat".
        source: of the names, for messages.

    Raises:
        ValueError: if no label, or more than one, has this text.
    """
    wanted = label.strip().casefold()
    texts = {i: [part.strip() for part in (name, *name.split(","))] for i, name in names.items()}
    whole = [i for i, (name, *_) in texts.items() if name.casefold() == wanted]
    found = whole or [i for i, of in texts.items() if wanted in map(str.casefold, of)]
    if not found and wanted.isdecimal() and int(wanted) in names:
        found = [int(wanted)]
    if len(found) > 1:
        raise ValueError(
            f"reward.label={label!r} is a text of labels {' and '.join(map(str, found))} of "
            f"{source}; give the index of one"
        )
    if not found:
        known = {text.casefold(): text for of in texts.values() for text in of}
        near = get_close_matches(wanted, known, n=1)
        advice = f"did you mean {known[near[0]]!r}?" if near else "give one of id2label there"
        raise ValueError(
            f"reward.label={label!r} is none of the {len(names)} labels of {source}, nor an index "
            f"from 0 to {len(names) - 1}; {advice}"
        )
    return found[0]


def _blank(
    folder: Path, processor: Path, sizes: Sequence[int], source: str
) -> tuple[Any, list[ImageSettings]]:
    """Return a classifier without memory and its preprocessings, each of which gave a picture."""
    from transformers import AutoConfig, AutoModelForImageClassification

    own = {"trust_remote_code": False}
    with _explained(source):
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, **own)
        with torch.device("meta"):
            model: Any = AutoModelForImageClassification.from_config(config, **own).eval()
    stated = read_processor(processor)
    views = [replace(stated, size=(size, size), crop=None, letterbox=False) for size in sizes]
    for view in views or [stated]:
        side = view.crop or view.size
        assert side is not None, "all images get one size, as checked with the image processor"
        height, width = (side, side) if isinstance(side, int) else side
        with _explained(source):
            pixels = torch.empty(1, 3, height, width, device="meta")
            shape = model(pixel_values=pixels).logits.shape
        count = len(config.id2label)
        if list(shape) != [1, count] or count < 2 or config.problem_type not in ONE_OF_MANY:
            raise ValueError(
                f"{source} states {count} labels, logits of shape {list(shape)} and problem_type = "
                f"{config.problem_type!r}, and only a choice among labels has log-probabilities; "
                "choose another classifier"
            )
    return model, views or [stated]


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Give what transformers raises about a folder as a sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise ValueError(
            f"{source} is no image classifier that can be read ({first_sentence(error)}); choose "
            "the folder of one as transformers saves it"
        ) from error
