"""Log-probability of a label by an image classifier of transformers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    """Score log p(label | image) by a frozen classifier, whatever the prompt.

    Attributes:
        index: of the label.
    """

    def __init__(
        self, model: "transformers.PreTrainedModel", image_settings: ImageSettings, index: int
    ) -> None:
        """Take over and freeze a model whose output has logits."""
        super().__init__()
        self.model = model.requires_grad_(False)
        self.image_settings = image_settings
        self.index = index
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str,
        label: str,
        *,
        processor: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "ClassifierReward":
        """Load a classifier from a folder of transformers, or from a hub id.

        Inside `torch.device("meta")` no weight is read, and the model has no memory.

        Args:
            label: its text, or one of its texts between commas, or its index.
            processor: folder or hub id of preprocessor_config.json, by default `path_or_hub_id`.
            dtype: of the frozen weights; preprocessing and softmax stay in float32 or better.

        Raises:
            ValueError: if a file is missing or unreadable, the model is no classifier, or the
                label is unknown.
        """
        from transformers import AutoModelForImageClassification

        source = f"reward.pretrained = {path_or_hub_id!r}"
        folder = model_folder(path_or_hub_id)
        model, settings = _blank(folder, processor_folder(processor or path_or_hub_id), source)
        index = find_label(label, model.config.id2label, source)
        if torch.get_default_device().type != "meta":
            model = load_whole(
                *(AutoModelForImageClassification, folder, "image classifier"),
                use_safetensors=True,
                trust_remote_code=False,
            )
        return cls(model, settings, index).to(dtype)

    def train(self, mode: bool = True) -> "ClassifierReward":
        """Stay in evaluation mode: with dropout one image would have many scores."""
        return super().train(False)

    def score(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Score:
        """Return the log-probability of the label row by row."""
        pixels = preprocess(images, self.image_settings)
        weights = next(self.model.parameters())
        with without_autocast(weights):
            logits = self.model(pixel_values=pixels.to(weights.dtype)).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return Score(logits.log_softmax(1)[:, self.index])


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


def _blank(folder: Path, processor: Path, source: str) -> tuple[Any, ImageSettings]:
    """Return a classifier without memory and its preprocessing, which has given it a picture."""
    from transformers import AutoConfig, AutoModelForImageClassification

    own = {"trust_remote_code": False}
    with _explained(source):
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, **own)
        with torch.device("meta"):
            model: Any = AutoModelForImageClassification.from_config(config, **own)
    settings = read_processor(processor)
    side = settings.crop or settings.size
    assert side is not None, "all images get one size, as checked with the image processor"
    pixels = torch.empty(1, 3, *((side, side) if isinstance(side, int) else side), device="meta")
    with _explained(source):
        shape = model.eval()(pixel_values=pixels).logits.shape
    count = len(config.id2label)
    if list(shape) != [1, count] or count < 2 or config.problem_type not in ONE_OF_MANY:
        raise ValueError(
            f"{source} states {count} labels, logits of shape {list(shape)} and problem_type = "
            f"{config.problem_type!r}, and only a choice among labels has log-probabilities; "
            "choose another classifier"
        )
    return model, settings


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
