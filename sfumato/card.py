"""Model cards: what an export is, how it was trained and how it is loaded, without private words.

Texts that a user typed (prompts, names, paths) stay out: a card has numbers, choices and hub ids.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from sfumato.catalog import find_slot
from sfumato.conditions import leaves_of, shown, why_unread
from sfumato.config import TrainConfig, rewards_of
from sfumato.config.fields import Rule
from sfumato.config.saved import MAY_CHANGE

CARD = "README.md"
SECTIONS = ("objective.", "reward.", "model.", "sampler.", "optimizer.", "training.")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WHOLE = {"lora": "LoRA", "pipeline": "pipeline"}
# A file that diffusers looks for in each; what a script's own model writes may be something else.
MARKS = {"lora": "pytorch_lora_weights.safetensors", "pipeline": "model_index.json"}


def model_card(
    config: TrainConfig,
    export: str,
    step: int,
    *,
    repo: str | None = None,
    base: str | None = None,
    licence: str | None = None,
    figures: Sequence[Sequence[str]] = (),
) -> str:
    """Return the README.md of an export.

    Args:
        export: lora or pipeline.
        step: of the checkpoint.
        repo: hub id of the export; None is a folder.
        base: hub id of the base model, if it is known.
        licence: of the base model, if it is known.
        figures: rows of a table of evaluations; the first is its head.
    """
    from huggingface_hub import ModelCardData

    tags = ["text-to-image", "diffusers", *(["lora"] if export == "lora" else []), "sfumato"]
    data = ModelCardData(
        base_model=base,
        library_name="diffusers",
        license=licence,
        pipeline_tag="text-to-image",
        tags=tags,
    )
    trained = WHOLE[export]
    base_name = f"[{base}](https://huggingface.co/{base})" if base else "a model in a local folder"
    kinds = [each.kind for each in rewards_of(config.reward).values()]
    rewards = ", ".join(dict.fromkeys(kind for kind in kinds if kind != "none"))
    how = f"objective {config.objective.kind}{rewards and f', reward {rewards}'}"
    lines = [
        *("---", data.to_yaml(), "---", ""),
        *(f"# {trained} by Sfumato" if repo is None else f"# {repo.rpartition('/')[2]}", ""),
        f"This {trained} was trained with Sfumato from {base_name}: {how}, {step} steps of "
        f"{config.training.global_batch_size} images.",
        *("", "## Use", "", "```python", *_usage(config, export, repo, base), "```", ""),
    ]
    if figures:
        lines += ["## Evaluation", "", *_table(figures), ""]
    lines += ["## Settings", "", "Those that differ from Sfumato's defaults:", ""]
    lines += [*_table([("setting", "value"), *_settings(config)]), ""]
    return "\n".join(lines)


def _usage(config: TrainConfig, export: str, repo: str | None, base: str | None) -> list[str]:
    place, sampler = repo or ".", config.sampler
    steps = f"num_inference_steps={sampler.num_inference_steps}"
    start = ["from diffusers import DiffusionPipeline", ""]
    if export == "lora":
        start.append(f'pipeline = DiffusionPipeline.from_pretrained("{base or "BASE_MODEL"}")')
        start.append(f'pipeline.load_lora_weights("{place}")')
    else:
        start.append(f'pipeline = DiffusionPipeline.from_pretrained("{place}")')
    call = f'"a photo of a fox", {steps}, guidance_scale={sampler.guidance_scale:g}'
    return [*start, f"image = pipeline({call}).images[0]"]


def _settings(config: TrainConfig) -> list[tuple[str, str]]:
    """Return the settings that say how it was trained: numbers and choices, no texts of a user."""
    rows = []
    for key, value, default in leaves_of(config):
        slot = find_slot("train", key)
        named = slot.named and not key.startswith("optimizer.options.")
        if value == default or key in MAY_CHANGE or named or not key.startswith(SECTIONS):
            continue
        if _is_public(value, slot.rule) and why_unread(config, key) is None:
            rows.append((f"`{key}`", shown(value)))
    return rows


def _is_public(value: object, rule: Rule) -> bool:
    if isinstance(value, list):
        return all(_is_public(each, rule) for each in value)
    return isinstance(value, bool | int | float) or value is None or value in rule.choices


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *others = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *others]


def hub_id(name: str | None) -> str | None:
    """Return the name of a model if it is one of the hub, whose files are in the hub's cache.

    A folder looks the same as a hub id, and is nobody else's to know.
    """
    if not name or not HUB_ID.fullmatch(name) or Path(name).exists():
        return None
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(name, f) for f in ("model_index.json", "config.json"))
    return name if any(isinstance(file, str) for file in found) else None


def licence_of(name: str | None) -> str | None:
    """Return the licence in the card of a base model's folder or cached repository, or None."""
    from huggingface_hub import try_to_load_from_cache

    if not name:
        return None
    file: object = Path(name).expanduser() / CARD
    if hub_id(name):
        file = try_to_load_from_cache(name, CARD)
    if not isinstance(file, str | Path) or not Path(file).is_file():
        return None
    text = Path(file).read_text(encoding="utf-8", errors="replace")
    head = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    line = re.search(r"^license: *([\w.+-]+) *$", head[1], flags=re.MULTILINE) if head else None
    return line[1] if line else None
