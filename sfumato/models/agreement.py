"""Check of a diffusers folder: the settings of its parts fit together; reads JSON files only."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from sfumato.models.formats import read_json

Settings: TypeAlias = Mapping[str, Any]  # a config.json
# A number in one file and the number in others that it must equal; None is not stated.
Fit: TypeAlias = tuple[str, int | None, str, int | None]


def check_fits(folder: Path, fits: Iterable[Fit]) -> None:
    """Refuse numbers that differ.

    Raises:
        ValueError: naming both numbers and where they stand.
    """
    for name, number, other, expected in fits:
        if None not in (number, expected) and number != expected:
            raise ValueError(
                f"model.pretrained = {str(folder)!r}: {name} is {number}, and {other} is "
                f"{expected}; these parts do not belong together, give a text-to-image release "
                "(no inpainting, depth or editing model)"
            )


def sum_fit(
    settings: Mapping[str, Settings],
    name: str,
    number: int | None,
    key: str,
    components: Sequence[str],
) -> Fit:
    """Return a number of the network that must be the sum of a number of each of some parts.

    Args:
        key: of that number in the config.json of each of the components.
    """
    numbers: list[Any] = [_text(settings[component]).get(key) for component in components]
    total = None if None in numbers else sum(numbers)
    return name, number, f"{key} in {' + '.join(components)}", total


def _text(settings: Settings) -> Settings:
    """Return the settings of a text encoder, which models of several towers keep apart."""
    return {**settings, **settings.get("text_config", {})}


def check_inputs(file: Path, settings: Settings, supported: Mapping[str, Collection[Any]]) -> None:
    """Refuse settings of a network that ask for inputs which the family does not give.

    Args:
        file: that holds the settings, for messages.
        supported: the values of such keys that the family computes with, the default first.

    Raises:
        ValueError: naming the key.
    """
    for key, values in supported.items():
        if key in settings and settings[key] not in values:
            raise ValueError(
                f"{file} states {key} = {settings[key]!r}, and this family computes with "
                f"{' or '.join(map(repr, values))}; the images would differ from the release's, "
                "give another release"
            )


def check_noise(folder: Path) -> None:
    """Refuse a network that predicts noise under a schedule that ends in pure noise.

    There x_t has no image, and no image follows from the noise (arXiv 2305.08891).

    Raises:
        ValueError: naming both settings.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    settings = read_json(file)
    if settings.get("rescale_betas_zero_snr") and (
        settings.get("prediction_type", "epsilon") == "epsilon"
    ):
        raise ValueError(
            f"{file} states rescale_betas_zero_snr = true and prediction_type = epsilon; no image "
            "follows from a prediction of pure noise. Set prediction_type to v_prediction if the "
            "network was trained so, or rescale_betas_zero_snr to false"
        )


def check_tokenizer(folder: Path, tokenizer: str, encoder: str) -> None:
    """Check that a text encoder has an embedding for each token, and a position.

    Args:
        tokenizer, encoder: names of the components.

    Raises:
        ValueError: naming the numbers.
    """
    settings = _text(read_json(folder / encoder / "config.json"))
    rows, tokens = settings.get("vocab_size"), vocabulary_size(folder / tokenizer)
    if rows is not None and tokens > rows:
        raise ValueError(
            f"{folder / tokenizer} has {tokens} tokens, and {encoder}/config.json states "
            f"vocab_size = {rows}; remove the tokens that were added, or give a text encoder that "
            "was trained with them"
        )
    positions = settings.get("max_position_embeddings")
    if settings.get("model_type") not in {"clip", "clip_text_model"} or positions is None:
        return
    file = folder / tokenizer / "tokenizer_config.json"
    length = read_json(file).get("model_max_length")
    if not isinstance(length, int) or not 2 < length <= positions:
        raise ValueError(
            f"{file} states model_max_length = {length!r}, and {encoder} reads {positions} tokens; "
            f'write "model_max_length": {positions} there'
        )


def vocabulary_size(folder: Path) -> int:
    """Return the highest token id of a tokenizer's JSON files plus 1; 0 if they state none."""
    ids = [-1]
    if (folder / "tokenizer.json").is_file():
        content = read_json(folder / "tokenizer.json")
        vocabulary = content.get("model", {}).get("vocab", {})
        is_list = isinstance(vocabulary, list)
        ids += [len(vocabulary) - 1] if is_list else vocabulary.values()
        ids += [token["id"] for token in content.get("added_tokens", [])]
    for name in ("vocab.json", "added_tokens.json"):
        if (folder / name).is_file():
            ids += read_json(folder / name).values()
    if (folder / "tokenizer_config.json").is_file():
        added = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
        ids += map(int, added)
    return max(ids) + 1
