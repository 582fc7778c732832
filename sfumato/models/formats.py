"""Files of a diffusers folder: found or fetched, checked, read and written."""

import json
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from sfumato import files
from sfumato.config import ModelConfig
from sfumato.hub import fetch
from sfumato.weights import hide_progress_bars

LIBRARIES = ("diffusers", "transformers")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# A file of weights has its variant after the first dot, an index before the last.
VARIANT = re.compile(r"\w+\.(?:safetensors\.index\.)?(?!safetensors|index)(\w+)[.-].+")
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
PICKLES = ("*.bin", "*.bin.index.json", "*.ckpt", "*.pt")


def find_model(
    pretrained: str,
    *,
    allow_pickle: bool = False,
    variant: str | None = None,
    setting: str = "model.pretrained",
) -> Path:
    """Return the folder of a path or hub id: an existing folder, the hub's cache, or a download.

    Args:
        variant: of the weights; without one, half-precision copies are not downloaded.
        setting: whose value `pretrained` is, for messages.

    Raises:
        ValueError: if there is no such folder or hub id, or it cannot be downloaded.
    """
    path = Path(pretrained).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(
            f"{setting} = {pretrained!r} is a file; give a diffusers folder, the one that "
            "holds model_index.json"
        )
    if pretrained.count("/") != 1 or pretrained.startswith((".", "/", "~")):
        raise ValueError(
            f"{setting} = {pretrained!r}: no such folder; give a diffusers folder, or a hub "
            "id such as stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    patterns = ["*.json", "*.txt", "*.model", "*/*.safetensors"]
    patterns += ["*/*.bin"] if allow_pickle else []
    for name in ("model", "diffusion_pytorch_model"):  # of a text encoder's or autoencoder's own id
        patterns += [f"{name}.safetensors", *([f"*{name}.bin"] if allow_pickle else [])]
    unwanted = ["safety_checker/*", "*non_ema*", "text_encoders/*", "vae_*"]
    unwanted += ["*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*"] if variant is None else []
    return fetch(pretrained, setting, patterns, unwanted=unwanted)


def read_model_index(folder: Path) -> dict[str, object]:
    """Return model_index.json, which names the pipeline class and the components.

    Raises:
        ValueError: if it is missing or damaged.
    """
    index = folder / "model_index.json"
    if not index.exists():
        ckpts = sorted(p.name for p in folder.iterdir() if p.suffix in {".ckpt", ".safetensors"})
        hint = f" (single files such as {ckpts[0]} are not read)" if ckpts else ""
        raise ValueError(
            f"model.pretrained = {str(folder)!r} has no model_index.json{hint}; give the top "
            "folder of a diffusers pipeline"
        )
    content = read_json(index)
    if not isinstance(content, dict) or "_class_name" not in content:
        raise ValueError(f"{index} names no pipeline class; give a folder that diffusers saved")
    return content


def read_json(file: Path) -> Any:
    """Return the content of one of the model's JSON files.

    Raises:
        ValueError: if it is missing or damaged.
    """
    return files.read_json(file, "download the model again")


def check_components(
    folder: Path,
    components: dict[str, str],
    classes: Mapping[str, str],
    config: ModelConfig,
    *,
    blank: str | None = None,
) -> None:
    """Check that model_index.json and the folder have each component.

    A component needs its class, its settings, and weights that may be loaded.

    Args:
        components: component name -> the file that configures it.
        classes: component name -> the class that the family knows.
        blank: a component that needs no weights.

    Raises:
        ValueError: if a component is missing, damaged or of another class, or has only pickled
            weights without `allow_pickle`.
    """
    index = read_model_index(folder)
    for name, file_name in components.items():
        part = folder / name
        if name in classes:
            check_class(folder, index.get(name), name, classes[name])
        if index.get(name) == [None, None]:
            raise ValueError(
                f"model.pretrained = {str(folder)!r}: its model_index.json leaves out {name}, "
                "which this family needs"
            )
        if not (part / file_name).exists():
            raise ValueError(
                f"model.pretrained = {str(folder)!r} lacks {name}/{file_name}; the folder is "
                "incomplete, download or export it again"
            )
        for file in sorted(part.glob("*.json")):
            content = read_json(file)
            if file.name == file_name and not isinstance(content, dict):
                raise ValueError(f"{file} holds no settings; download the model again")
        # transformers 5 would go on with a vocabulary of three tokens.
        vocabularies = (all((part / file).exists() for file in names) for names in VOCABULARIES)
        if file_name == "tokenizer_config.json" and not any(vocabularies):
            raise ValueError(
                f"{part} has no tokenizer.json or vocab.json with merges.txt; download or export "
                "the model again"
            )
        if file_name == "config.json" and name != blank:
            _check_weights(part, allow_pickle=config.allow_pickle, variant=config.variant)


def check_libraries(folder: Path, unused: Collection[str]) -> None:
    """Refuse a folder whose model_index.json names a library of somebody else.

    Args:
        unused: components that the family never reads.

    Raises:
        ValueError: naming the component and the library.
    """
    for name, entry in read_model_index(folder).items():
        if not isinstance(entry, list) or name in unused:
            continue
        if entry[:1] not in ([None], *([library] for library in LIBRARIES)):
            raise ValueError(
                f"{folder / 'model_index.json'}: {name} is {entry}, and only classes of "
                f"{' and '.join(LIBRARIES)} are imported; remove the entry, or give another release"
            )


def check_class(folder: Path, entry: object, name: str, known: str) -> None:
    """Check that model_index.json names the class of a component that the family knows.

    Only this class is imported, so that a folder of somebody else names no code that runs.

    Args:
        entry: of model_index.json: a library and a class.
        known: the class; a tokenizer may also be its fast twin.
    """
    if entry in (None, [None, None]):
        return  # whether the component may be missing is checked elsewhere
    library, kind = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    if library in LIBRARIES and str(kind).removesuffix("Fast") == known:
        return
    raise ValueError(
        f"{folder / 'model_index.json'}: {name} is {entry}, and this family needs {known}; give a "
        f"release whose {name} is of this class"
    )


def _check_weights(part: Path, *, allow_pickle: bool, variant: str | None) -> None:
    files = [path.name for pattern in WEIGHTS for path in part.glob(pattern)]
    variants = sorted({match[1] for name in files if (match := VARIANT.fullmatch(name))})
    if files and variant not in variants and all(map(VARIANT.fullmatch, files)):
        raise ValueError(
            f"{part} has only weights of the variants {', '.join(variants)}, and model.variant = "
            f"{variant}; set model.variant={variants[0]}"
        )
    if files:
        return
    pickles = [path.name for pattern in PICKLES for path in part.glob(pattern)]
    if pickles and not allow_pickle:
        raise ValueError(
            f"{part} has only pickled weights ({pickles[0]}), and loading these can run code; "
            "get the safetensors file, or set model.allow_pickle=true if you trust it "
            "(allow_pickle=true in sample and evaluate)"
        )
    if not pickles:
        raise ValueError(
            f"{part} holds no weights; download or export the model again (pickled ones are "
            "only fetched with model.allow_pickle=true)"
        )


def check_scheduler(folder: Path, allowed: str) -> None:
    """Check that a release's scheduler steps through the family's process.

    Args:
        allowed: a regular expression of class names.

    Raises:
        ValueError: naming the class.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    settings, entry = read_json(file), read_model_index(folder).get("scheduler")
    name = str(entry[-1]) if isinstance(entry, list) else str(settings.get("_class_name", ""))
    if not re.fullmatch(allowed, name) or settings.get("stochastic_sampling"):
        raise ValueError(
            f"{file} is of {name or 'no class'}, whose steps this family cannot take; give a "
            "release with another scheduler, or edit the file"
        )


def read_pipeline(
    folder: Path,
    config: ModelConfig,
    dtypes: Mapping[str, torch.dtype],
    components: Mapping[str, Any],
) -> Any:
    """Read a folder with diffusers' own loader.

    Args:
        dtypes: by component; `default` for the others.
        components: that are not read from the folder, and what takes their place; None leaves
            one out.

    Raises:
        ValueError: if a component cannot be read.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    hide_progress_bars()
    try:
        return DiffusionPipeline.from_pretrained(
            folder,
            dtype=dict(dtypes),
            variant=config.variant,
            use_safetensors=None if config.allow_pickle else True,
            local_files_only=True,
            **components,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"model.pretrained = {str(folder)!r} could not be read as "
            f"{read_model_index(folder)['_class_name']}: {str(error).splitlines()[0]}"
        ) from error


def save_encoder(encoder: Any, source: Path, folder: Path) -> None:
    """Write a trained text encoder under the weight names of the files that it was read from.

    transformers 5 drops the prefix `text_model.`, without which transformers 4 does not find them.
    """
    encoder.save_pretrained(folder)
    shutil.copy(source / "config.json", folder / "config.json")
    published = {}
    for file in source.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            published |= {key.removeprefix("text_model."): key for key in tensors.keys()}  # noqa: SIM118
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        named = {
            published.get(key.removeprefix("text_model."), key): t for key, t in tensors.items()
        }
        save_file(named, file, metadata={"format": "pt"})


def copy_frozen(
    source: Path, folder: Path, components: Sequence[str], *, variant: str | None = None
) -> None:
    """Copy the components that were not trained, file by file, and write model_index.json.

    Saving them anew would change names: transformers 5 saves text encoders under keys that
    transformers 4 does not find, and 4 goes on with random weights. The copied weights of a
    variant lose its name, so that the folder loads without one; a part that has them is copied
    without its other weights.
    """
    for name in components:
        paths = [path for path in (source / name).iterdir() if path.is_file()]
        mark = f".{variant}"
        if any(mark in path.name for path in paths):
            plain = (".safetensors", ".bin", ".index.json")
            paths = [p for p in paths if mark in p.name or not p.name.endswith(plain)]
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file in paths:
            shutil.copy(file, folder / name / file.name.replace(f"{mark}.", "."))
    index = read_model_index(source)
    for name in ("safety_checker", "feature_extractor", "image_encoder"):
        if name in index:
            index[name] = [None, None]
    if "safety_checker" in index:
        index["requires_safety_checker"] = False
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model_index.json").write_text(text, encoding="utf-8")
