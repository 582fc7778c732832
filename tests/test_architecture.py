"""The rooms of the house: who may import whom, which package belongs where, how large it gets."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import sfumato

PACKAGE = Path(sfumato.__file__).parent
MAX_FILE, MAX_FUNCTION = 400, 80

# What each room may import of Sfumato, beside itself and the leaves.
LEAVES = {"config", "files", "hub", "images", "parts", "precision", "records", "weights"}
ROOMS: dict[str, set[str]] = {
    "config": set(),
    "files": set(),
    "hub": set(),
    "images": set(),
    "parts": set(),
    "precision": set(),
    "records": set(),
    "weights": set(),
    "catalog": set(),
    "explain": {"catalog"},
    "overrides": {"catalog"},
    "help": {"catalog", "conditions", "explain"},
    "diffusion": set(),
    "clip": set(),
    "conditions": {"catalog", "diffusion"},
    "check_objective": set(),
    "card": {"catalog", "conditions"},
    "models": {"diffusion", "clip"},
    "rewards": {"diffusion", "clip"},
    "data": {"diffusion"},
    "objectives": {"diffusion", "models", "rewards", "data"},
}
LOWER = set(ROOMS)
ROOMS["training"] = LOWER
ROOMS["check"] = LOWER | {"training"}
ROOMS["compose"] = ROOMS["check"] | {"check"}
ROOMS["preparation"] = ROOMS["compose"] | {"compose"}
ROOMS["run"] = LOWER | {"training", "preparation"}
ROOMS["evaluation"] = ROOMS["planning"] = ROOMS["compose"] | {"compose", "run"}
ROOMS["report"] = ROOMS["evaluation"] | {"evaluation"}
ROOMS["launch"] = ROOMS["preparation"] | {"preparation"}
ROOMS["migrate"] = ROOMS["compose"] | {"compose"}
ROOMS["demo"] = ROOMS["report"] | {"report", "preparation", "launch"}
ROOMS["publish"] = ROOMS["evaluation"] | {"evaluation"}
ROOMS["api"] = ROOMS["evaluation"] | {"evaluation"}
ROOMS["__init__"] = {"api"}
ROOMS["terminal"] = set()
ROOMS["cli"] = ROOMS["demo"] | {"terminal", "demo", "migrate", "planning", "publish"}
ROOMS["__main__"] = {"cli"}

# Objectives know models and rewards through their contracts, not one family.
CONTRACTS = {"models": {"models.model", "models.generate"}, "rewards": {"rewards.reward"}}

# Packages that the rest of the house imports as a whole, never a module of theirs.
DOORS = ("clip", "migrate", "models.lora", "models.origins")

# The core is what one must know to train or align a model. It does without the wings.
CORE = (
    *("diffusion", "objectives", "rewards", "models", "training", "run"),
    *(
        "config",
        "check",
        "check_objective",
        "files",
        "hub",
        "records",
        "images",
        "weights",
        "precision",
    ),
)
WINGS = (
    *("data", "clip", "models.lora", "models.origins", "preparation"),
    *("evaluation", "report", "planning", "launch", "migrate", "demo"),
)
OUTSIDE = (
    "config.commands",  # settings of the wings, which stand beside those of training
    # Kinds of rewards, of which the core knows the contract alone.
    *(f"rewards.{kind}" for kind in ("aesthetic", "classifier", "clip_iqa", "image_reward")),
    "rewards.hpsv3",
    "models.learning_autoencoder",
    *("rewards.code", "rewards.own", "rewards.remote", "rewards.learning_clip"),
)
MAX_CORE = 14_400  # lines

# Contracts for the whole core: a stream gives samples, whatever they are read from.
SAMPLES = ("data.stream", "data.sample")

# What else of the wings a place of the core may import.
CROSSINGS: dict[str, tuple[str, ...]] = {
    # Assembly: the place where the core meets data, caches and networks from elsewhere.
    "run": ("data", "models.origins", "preparation.encoder_hash", "preparation.image_cache"),
    # A reward's model is read from the files of transformers or OpenCLIP.
    "rewards": ("clip",),
    # A family names its layers as the LoRA files of other trainers do; loading reads such files.
    "models": ("models.lora",),
    # A folder may be put together from parts; its network may start from another file.
    "models.registry": ("models.origins",),
    "models.loading": ("models.origins",),
    # Settings of sources of images, and files and addresses that settings name, are checked first.
    "check": ("data.settings", "data.store", "models.lora"),
}

TENSOR_ROOMS = (
    *("models", "clip", "rewards", "objectives", "training", "run", "evaluation", "demo", "images"),
    *("weights", "precision", "api"),
    *(
        "planning",
        "preparation.encoder_hash",
        "preparation.encoding",
        "preparation.precache",
        "launch.torchrun",
    ),
)
SETTINGS = "settings are composed in compose.py, for the command line alone"
FILES = (
    "reading and writing weights belongs in models/formats.py, rewards/ or training/checkpoint.py"
)

# Third-party package: the rooms or modules that may import it, and what to do elsewhere.
PACKAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "torch": (("diffusion", "data", *TENSOR_ROOMS, "cli"), "tensors belong behind the rims"),
    "jaxtyping": (("diffusion", "data", *TENSOR_ROOMS), "tensors belong behind the rims"),
    "diffusers": (("models", "demo", "weights"), "networks belong in models/"),
    "peft": (("models",), "adapters belong in models/adapters.py"),
    "transformers": (
        (
            *("models", "clip", "rewards", "demo", "weights", "planning.described"),
            "training.distribution",
        ),
        "text encoders and CLIP belong in the rims",
    ),
    "tokenizers": (("demo",), "tokenizers come from transformers"),
    "fsspec": (("data.store",), "objects of stores are read in data/store.py"),
    "aiohttp": (("data.store",), "objects of stores are read in data/store.py"),
    "huggingface_hub": (
        ("hub", "card", "models", "rewards", "run.identity"),
        "downloads belong in the rims",
    ),
    "safetensors": (
        (
            *("files", "models", "clip", "training.checkpoint", "demo", "weights"),
            *("data.prepared.tensors", "preparation.precache"),
            "preparation.encoder_hash",
        ),
        FILES,
    ),
    "accelerate": (("training.distribution",), "processes belong in training/distribution.py"),
    "hydra": (("compose", "overrides", "cli"), SETTINGS),
    "omegaconf": (("compose", "cli"), SETTINGS),
    "yaml": (
        ("compose", "config", "migrate"),
        SETTINGS,
    ),
    "bitsandbytes": (("training.optimizer",), "optimisers belong in training/optimizer.py"),
    "prodigyopt": (("training.optimizer",), "optimisers belong in training/optimizer.py"),
    "wandb": (("training.tracking",), "trackers belong in training/tracking.py"),
    "resvg_py": (("demo",), "drawings are rendered in demo/pictures.py"),
    "lpips": (("evaluation.diversity",), "image features belong in evaluation/diversity.py"),
    "torch_fidelity": (("evaluation.inception",), "Inception belongs in evaluation/inception.py"),
    "matplotlib": (("report",), "plots belong in report/"),
    "jinja2": (("report", "launch"), "pages belong in report/, the sbatch script in launch/"),
    "markupsafe": (("report",), "pages belong in report/"),
    "tqdm": (
        ("training", "evaluation", "demo", "preparation.precache", "preparation.engine"),
        "progress bars belong to the loops",
    ),
    "ray": (("preparation.cluster",), "shards are mapped by preparation/engine.py"),
    "msgspec": (("records",), "records are decoded in records.py"),
    "braceexpand": (("data",), "file patterns belong in data/"),
    "numpy": (
        ("images", "data", "evaluation", "demo", "preparation.filter", "rewards.own"),
        "use torch",
    ),
    "PIL": (("images", "data", "rewards", "report", "demo"), "pictures belong in images.py"),
    "pyarrow": (
        ("data.tables", "data.row_groups", "data.saved_dataset", "preparation.url_table"),
        "tables are read in data/tables.py, tables of URLs written in preparation/url_table.py",
    ),
    "datasets": (("data.saved_dataset",), "saved datasets are read in data/saved_dataset.py"),
}
HEAVY = {
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "huggingface_hub",
    "pyarrow",
    "datasets",
}


@dataclass(frozen=True)
class Import:
    """One import statement."""

    module: str  # who imports, without the package's name: objectives.draft
    target: str  # what: sfumato.models.model, torch.nn
    line: int
    at_start: bool  # runs when the module is imported

    @property
    def where(self) -> str:
        return f"{self.module.replace('.', '/')}.py:{self.line}"


def modules(root: Path) -> dict[str, ast.Module]:
    return {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
            file.read_text(encoding="utf-8")
        )
        for file in sorted(root.rglob("*.py"))
    }


def imports(module: str, tree: ast.Module) -> Iterator[Import]:
    later: set[ast.AST] = set()
    for node in ast.walk(tree):
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if guarded or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            later |= set(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: write imports from the top, sfumato.room.module"
            # `from sfumato.room import module` imports the module.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield Import(module, name, node.lineno, node not in later)


def found_imports(root: Path) -> list[Import]:
    return [found for name, tree in modules(root).items() for found in imports(name, tree)]


def inside(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def complain_of_rooms(found: Import) -> str | None:
    """Say what is wrong with an import of Sfumato's own, or None."""
    room, (_, *parts) = found.module.partition(".")[0], found.target.split(".")
    target = parts[0] if parts else ""
    if target in {"", room, "__version__"} or target in LEAVES:
        return None
    if room not in ROOMS:
        return f"{found.where}: {room} is no room; put the file in one, or add it to ROOMS and say"
    if target not in ROOMS[room]:
        allowed = ", ".join(sorted(ROOMS[room])) or "nothing but the leaves"
        return (
            f"{found.where} imports {target}/, which lies beside or above {room}/ ({room}/ may "
            f"import {allowed}); pass in what it needs, or move the code up"
        )
    if room == "objectives" and target in CONTRACTS:
        name = ".".join(parts)
        if not inside(name, tuple(CONTRACTS[target])):
            known = ", ".join(sorted(CONTRACTS[target]))
            return f"{found.where} imports {name}; objectives know {target} through {known} alone"
    return None


def complain_of_doors(found: Import) -> str | None:
    """Say what is wrong with an import past a wing's door, or None."""
    for wing in DOORS:
        _, wing_is_target, name = found.target.partition(f"sfumato.{wing}.")
        if not wing_is_target or inside(found.module, (wing,)):
            continue
        is_module = (PACKAGE / wing.replace(".", "/") / f"{name}.py").is_file()
        if is_module or "." in name:
            return f"{found.where} imports {wing}.{name}; import from sfumato.{wing}, its door"
    return None


def complain_of_border(found: Import) -> str | None:
    """Say what is wrong with an import of a wing by the core, or None."""
    target = found.target.removeprefix("sfumato.")
    wing = next((wing for wing in WINGS if inside(target, (wing,))), None)
    if wing is None or not inside(found.module, CORE) or inside(found.module, WINGS):
        return None
    allowed = [CROSSINGS[place] for place in CROSSINGS if inside(found.module, (place,))]
    if any(inside(target, doors) for doors in [SAMPLES, *allowed]):
        return None
    return (
        f"{found.where} imports {target}, but {wing} is a wing and the core does without it; let "
        "run/ pass in what is needed, or add the import to CROSSINGS with the reason"
    )


def complain_of_packages(found: Import) -> str | None:
    """Say what is wrong with an import of a third party's, or None."""
    package = found.target.partition(".")[0]
    if package in sys.stdlib_module_names:
        return None
    if package not in PACKAGES:
        return (
            f"{found.where} imports {package}; do without, or add it to pyproject.toml and to "
            "PACKAGES with the room that it is bound to"
        )
    places, advice = PACKAGES[package]
    if not inside(found.module, places):
        return f"{found.where} imports {package}; {advice} (allowed in {', '.join(places)})"
    if package in HEAVY and found.at_start:
        return f"{found.where} imports {package} at its top; import it where a model is loaded"
    return None


def complaints(root: Path) -> list[str]:
    said = []
    for found in found_imports(root):
        if found.target.partition(".")[0] == "sfumato":
            wrong = complain_of_rooms(found) or complain_of_doors(found)
            said.append(wrong or complain_of_border(found))
        else:
            said.append(complain_of_packages(found))
    return [complaint for complaint in said if complaint is not None]


def core_lines(root: Path) -> dict[str, int]:
    """Return the lines of each module of the core."""
    return {
        name: len((root / file).read_text(encoding="utf-8").splitlines())
        for file in sorted(path.relative_to(root) for path in root.rglob("*.py"))
        if inside(name := ".".join(file.with_suffix("").parts), CORE)
        and not inside(name, (*WINGS, *OUTSIDE))
    }


# --- The house as it stands


def test_rooms_import_what_they_may():
    found = complaints(PACKAGE)
    assert not found, "\n" + "\n".join(found)


def test_modules_import_each_other_in_one_order():
    names = set(modules(PACKAGE))
    graph: dict[str, set[str]] = {name: set() for name in names}
    for found in found_imports(PACKAGE):
        target = found.target.removeprefix("sfumato.")
        if found.at_start and found.target.startswith("sfumato."):
            known = target if target in names else target.rpartition(".")[0]
            graph[found.module] |= {known} & names
    below = {"diffusion.process", "diffusion.randomness", "diffusion.solvers"}
    assert graph["diffusion.sampling"] == below
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


def test_files_and_functions_stay_readable():
    found = []
    for file in PACKAGE.rglob("*.py"):
        name, lines = file.relative_to(PACKAGE), file.read_text(encoding="utf-8").splitlines()
        if len(lines) >= MAX_FILE:
            found.append(f"{name} has {len(lines)} lines; split it below {MAX_FILE}")
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                length = node.end_lineno - node.lineno + 1
                if length >= MAX_FUNCTION:
                    found.append(f"{name}: {node.name} has {length} lines; name its parts")
    assert not found, "\n" + "\n".join(found)


def test_the_core_can_be_held_in_the_head():
    lines = core_lines(PACKAGE)
    assert {"training.loop", "run.run", "config.train", "files", "models.flux"} <= lines.keys()
    assert not {"data.stream", "models.origins.original", "cli"} & lines.keys()
    assert sum(lines.values()) <= MAX_CORE


def test_attributes_are_not_looked_up_by_string():
    found = [
        f"{name}.py:{node.lineno}: {ast.unparse(node)[:60]}; state the type instead"
        for name, tree in modules(PACKAGE).items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"getattr", "hasattr", "setattr"}
        and isinstance(node.args[1], ast.Constant)
    ]
    assert not found, "\n" + "\n".join(found)


IMPORTED = "print(*sorted({name.partition('.')[0] for name in sys.modules}))"


@pytest.mark.parametrize(
    "code",
    [
        "import sys, sfumato.config, sfumato.cli",
        "import sys, sfumato.cli; sys.argv = ['sfumato', '--help']; sfumato.cli.main()",
    ],
)
def test_the_command_line_answers_without_loading_networks(code: str):
    run = [sys.executable, "-c", f"{code}; {IMPORTED}"]
    loaded = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert "sfumato" in loaded.split()
    slow = {"torch", "diffusers", "transformers", "hydra", "matplotlib"} & set(loaded.split())
    assert not slow, f"{code} loads {slow}; import them where they are used"


# --- The checks themselves


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (
            "objectives/draft.py",
            "def f():\n    import diffusers",
            "objectives/draft.py:2 imports diffusers; networks belong in models/",
        ),
        ("diffusion/process.py", "import numpy.fft", "diffusion/process.py:1 imports numpy; use"),
        (
            "models/flux.py",
            "from diffusers import FluxPipeline",
            "models/flux.py:1 imports diffusers at its top; import it where a model is loaded",
        ),
        (
            "training/loop.py",
            "import accelerate",
            "processes belong in training/distribution.py",
        ),
        (
            "models/model.py",
            "from sfumato.rewards.reward import Reward",
            "models/model.py:1 imports rewards/, which lies beside or above models/",
        ),
        ("diffusion/a.py", "import sfumato.training.loop", "may import nothing but the leaves"),
        ("training/a.py", "from sfumato.evaluation import x", "training/a.py:1 imports evaluation"),
        (
            "objectives/a.py",
            "from sfumato.models.flux import Flux",
            "objectives know models through models.generate, models.model alone",
        ),
        ("data/a.py", "import pandas", "imports pandas; do without, or add it to pyproject.toml"),
        ("attic/a.py", "from sfumato.models import x", "attic is no room"),
        (
            "models/flux.py",
            "from sfumato.models.lora.kohya import by_block",
            "models/flux.py:1 imports models.lora.kohya.by_block; import from sfumato.models.lora",
        ),
        (
            "training/export.py",
            "from sfumato.models.origins import original",
            "imports models.origins.original; import from sfumato.models.origins, its door",
        ),
        (
            "training/a.py",
            "def f():\n    from sfumato.data.images import open_images",
            "training/a.py:2 imports data.images.open_images, but data is a wing",
        ),
        (
            "models/model.py",
            "from sfumato.models.origins import check_start",
            "models/model.py:1 imports models.origins.check_start, but models.origins is a wing",
        ),
        ("run/a.py", "import sfumato.preparation.pack", "but preparation is a wing"),
    ],
)
def test_a_wrong_import_is_named(tmp_path: Path, file: str, text: str, expected: str):
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text(text)
    (said,) = complaints(tmp_path)
    assert expected in said


def test_right_imports_are_not_complained_of(tmp_path: Path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "flux.py").write_text(
        "import math\nimport torch\nfrom typing import TYPE_CHECKING\n"
        "from sfumato.config import ModelConfig\nfrom sfumato.diffusion.process import Time\n"
        "if TYPE_CHECKING:\n    import transformers\ndef f():\n    import diffusers\n"
    )
    (tmp_path / "models" / "registry.py").write_text("from sfumato.models.origins import x\n")
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "a.py").write_text("from sfumato.data.stream import Stream\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.py").write_text("from sfumato.data.images import open_images\n")
    (tmp_path / "planning").mkdir()
    (tmp_path / "planning" / "a.py").write_text("from sfumato.models.origins import x\n")
    assert complaints(tmp_path) == []
