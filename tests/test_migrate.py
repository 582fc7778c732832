"""Migration: published configs of others become recipes that compose, and no key is unmentioned."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from published_configs import PYTHON, YAML, published, write_call, write_yaml

from sfumato.catalog import known_keys
from sfumato.cli import main
from sfumato.compose import compose_train
from sfumato.config.saved import flatten
from sfumato.migrate.changes import CHANGES, CHOICES
from sfumato.migrate.read import Config, read_config
from sfumato.migrate.recipe import judge
from sfumato.migrate.table import PAGES, UNSAID, kinds, markdown

ROOT = Path(__file__).parents[1]
KINDS = {
    "sd2_train": "sd_train",
    "sd_lora_train": "sd_train",
    "sd_xl_base_train": "sd_xl_train",
    **{name: "sd_train" for name in YAML if name.startswith("860m")},
}
GIVEN = {
    "model.pretrained": "M",
    "model.autoencoder": "A",
    "model.text_encoder": "T",
    "model.image_size": "256",
    "data.prompts": "P",
    "data.images.path": "D",
    "reward.pretrained": "R",
    "reward.path": "score.py:score",
    "optimizer.lr": "1e-4",
    "training.max_steps": "5",
    "out": "O",
    "pack.path": "D",
}
Answer = tuple[int, str, str]
Call = Callable[..., Answer]


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Call:
    """Run `sfumato ARGUMENTS` in an empty folder; return the code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("HYDRA_FULL_ERROR", "DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, os.environ.get(name, "error"))

    def act(*arguments: Any) -> Answer:
        monkeypatch.setattr(sys, "argv", ["sfumato", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            code = stop.code
        found = capsys.readouterr()
        return code, found.out, found.err

    return act


def assert_mistake(answer: Answer, *expected: str) -> None:
    code, out, err = answer
    assert code == 2, answer
    assert err.startswith("sfumato: ") and err.count("\n") == 1
    assert "Traceback" not in out + err
    assert [text for text in expected if text not in err] == [], err


def recipe_of(name: str) -> dict[str, Any]:
    """Return the flat settings of a recipe that was written here."""
    return flatten(yaml.safe_load(Path("recipe", f"{name}.yaml").read_text()))


def dry(call: Call, name: str, command: str = "train", *more: str) -> dict[str, Any]:
    """Return the settings that a recipe comes to, once what it wants is given."""
    wanted = [key for key, value in recipe_of(name).items() if value == "???"]
    given = [f"{key}={GIVEN[key]}" for key in wanted]
    code, out, err = call(
        command, "--config-dir", ".", f"recipe={name}", *given, *more, "--cfg", "job"
    )
    assert (code, err) == (0, "")
    return flatten(yaml.safe_load(out))


# Published configs


@pytest.mark.parametrize("name", YAML)
def test_a_published_config_becomes_a_recipe(call: Call, tmp_path: Path, name: str) -> None:
    values = published(name)
    code, out, err = call("migrate", write_yaml(tmp_path / f"{name}.yaml", values))
    assert (code, err) == (0, "")
    kind = kinds()[KINDS.get(name, name)]
    leaves = read_config(tmp_path / f"{name}.yaml").values
    assert f"taken for {kind.title}, of which it has {len(leaves)} keys" in out
    assert "unknown" not in out and "would say" not in out
    mentioned = {word.strip(",:") for word in out.split()}
    assert sorted(key for key in leaves if key not in mentioned) == []
    dry(call, name, kind.command)


@pytest.mark.parametrize("name", PYTHON)
@pytest.mark.parametrize("form", ["py", "json"])
def test_a_config_of_trl_becomes_a_recipe(call: Call, tmp_path: Path, name: str, form: str):
    file = tmp_path / f"my_script.{form}"
    if form == "py":
        write_call(file, name, PYTHON[name])
    else:
        file.write_text(json.dumps(PYTHON[name], indent="\t"))
    code, out, err = call("migrate", file)
    assert (code, err) == (0, "")
    assert f"TRL's {name} (0.9 to 0.16), of which it has {len(PYTHON[name])} keys" in out
    assert "unknown" not in out and "would say" not in out and "missing here" not in out
    mentioned = {word.strip(",:") for word in out.split()}
    assert sorted(key for key in PYTHON[name] if key not in mentioned) == []
    settings = dry(call, "my_script")
    assert settings["objective.kind"] == ("draft" if "Align" in name else "policy_gradient")


@pytest.mark.parametrize("name", PYTHON)
def test_what_a_config_leaves_out_has_the_default_of_theirs(
    call: Call, tmp_path: Path, name: str
) -> None:
    call("migrate", write_call(tmp_path / "all.py", name, PYTHON[name]))
    code, out, _ = call("migrate", write_call(tmp_path / "none.py", name, {}))
    assert code == 0 and "left out there, with the default of theirs:\n" in out
    whole, empty = recipe_of("all"), recipe_of("none")
    assert whole | {"name": "none"} == empty


EXPECTED: dict[str, dict[str, Any]] = {
    "draftp_sd": {
        "objective.kl_coeff": 1.0,
        "objective.truncation_steps": 1,
        "model.trainable": "lora",
        "model.lora.rank": 32,
        "sampler.height": 512,
        "training.global_batch_size": 4,
        "training.precision": "bf16",
        "training.ema_decay": 0.9999,
        "training.checkpoint_every_steps": 500,
        "training.max_steps": "???",  # one pass over the prompts
        "optimizer.lr": 1e-4,
        "optimizer.max_grad_norm": 10.0,
        "optimizer.warmup_steps": 10,
        "validation.num_images": 4,
        "reward.dtype": "float32",
        "data.shuffle": False,
    },
    "draftp_sdxl": {
        "model.family": "stable_diffusion_xl",
        "sampler.num_inference_steps": 40,
        "sampler.guidance_scale": 5.0,
        "sampler.width": 1024,
        "training.strategy": "fsdp",
    },
    "sd_train": {
        "model.network.config": "sd1",
        "model.autoencoder": "/ckpts/vae.bin",
        "training.precision": "fp16",
        "training.max_steps": "???",
        "optimizer.lr": "???",
        "data.images.path": "/datasets/coyo",
    },
    "sd2_train": {"model.network.config": "sd2", "training.max_steps": 140_000},
    "sd_lora_train": {
        "model.trainable": "lora",
        "model.network.from_pretrained": "/ckpts/nemo-v1-2.ckpt",
        "model.network.from_NeMo": True,
    },
    "sd_xl_base_train": {"training.ema_decay": None, "sampler.height": 256},
    "precache_sd": {"precache.batch_size": 64, "precache.dtype": "float16"},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_means_what_the_config_means(call: Call, tmp_path: Path, name: str) -> None:
    call("migrate", write_yaml(tmp_path / f"{name}.yaml", published(name)))
    settings = recipe_of(name)
    assert {key: settings[key] for key in EXPECTED[name]} == EXPECTED[name]


@pytest.mark.parametrize("name", [name for name in YAML if name.startswith("860m")])
def test_a_stage_is_the_recipe_that_ships(call: Call, tmp_path: Path, name: str) -> None:
    call("migrate", write_yaml(tmp_path / f"{name}.yaml", published(name)))
    migrated = dry(call, name)
    wanted = ["model.autoencoder=A", "model.text_encoder=T", "data.shards.path=D"]
    _, plain = compose_train([f"recipe=stable_diffusion/{name}", *wanted])
    shipped = flatten(plain)
    same = [key for key in shipped if key.startswith(("optimizer.", "objective."))]
    same += ["training.max_steps", "training.micro_batch_size", "training.global_batch_size"]
    same += ["training.ema_decay", "training.compile", "training.checkpoint_every_steps"]
    same += ["model.network.config", "model.image_size", "model.trainable", "sampler.height"]
    assert {key: migrated[key] for key in same} == {key: shipped[key] for key in same}
    size = shipped["data.shards.selection"].removeprefix("min_")
    assert migrated["data.images.min_size"] == (None if size == "all" else int(size))


@pytest.mark.nightly  # tests/test_plan.py plans stages
def test_a_migrated_stage_is_planned(call: Call, tmp_path: Path) -> None:
    name = "860m_res_256_pretrain"
    call("migrate", write_yaml(tmp_path / f"{name}.yaml", published(name)))
    code, out, err = call(
        "plan", "--config-dir", ".", f"recipe={name}", "gpus=64", "model.text_encoder=null"
    )
    assert (code, err) == (0, ""), err
    assert "859" in out


# The table


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_made_from_the_table(page: str) -> None:
    written = (ROOT / "docs" / f"coming_from_{page}.md").read_text(encoding="utf-8")
    command = f"python -m sfumato.migrate {page} > docs/coming_from_{page}.md"
    assert written == markdown(page), f"run {command}"


@pytest.mark.parametrize("kind", kinds().values(), ids=lambda kind: kind.name)
def test_a_kind_is_whole(kind: Any) -> None:
    hows = {"taken", "none", "missing", *CHANGES, *CHOICES}
    assert {row.how for row in kind.rows} <= hows
    names = [key for row in kind.rows for key in row.keys]
    assert sorted({key for key in names if names.count(key) > 1}) == []
    assert {key for key, value in kind.settings.items() if value == "???"} <= set(kind.give)
    assert set(kind.settings) <= set(known_keys(kind.command))
    for row in kind.rows:
        assert row.note and (row.ours or row.how == "none")
        known = all(ours.removeprefix(f"{kind.command} ") for ours in row.ours)
        assert known


def test_a_change_sets_what_its_row_names(tmp_path: Path) -> None:
    files = [write_yaml(tmp_path / f"{name}.yaml", published(name)) for name in YAML]
    files += [write_call(tmp_path / f"{name}.py", name, PYTHON[name]) for name in PYTHON]
    every, changed = kinds(), set()
    for file in files:
        config = read_config(file)
        kind = every[config.kind or KINDS.get(file.stem, file.stem)]
        for verdict in judge(config, kind, 1):
            found = kind.find(verdict.key)
            assert found is not None
            named = {ours.removeprefix(f"{kind.command} ") for ours in found[0].ours}
            assert set(verdict.settings) <= named, verdict.key
            changed |= {found[0].how} if verdict.settings else set()
    # The others act on values that no published config has.
    assert set(CHANGES) - changed == {"parts", "unet_file", "passes", "run_name"}


# Values


def verdicts(name: str, /, **values: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings that keys of a kind come to, and what became of each key."""
    found = list(judge(Config(values, None, {}), kinds()[name], values.pop("processes", 1)))
    settings = {key: value for each in found for key, value in each.settings.items()}
    return settings, {each.key: each.how for each in found}


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        (
            "alignprop",
            {"train_batch_size": 8, "train_gradient_accumulation_steps": 4, "processes": 4},
            {"training.micro_batch_size": 8, "training.global_batch_size": 128},
        ),
        ("alignprop", {"num_epochs": 20, "save_freq": 5}, {"training.max_steps": 20}),
        ("alignprop", {"num_epochs": 20, "save_freq": 5}, {"training.checkpoint_every_steps": 5}),
        # An epoch has 6 x 4 images, a step 3 x 2 of them, and each image is trained on twice.
        (
            "ddpo",
            {
                "num_epochs": 10,
                "sample_batch_size": 6,
                "sample_num_batches_per_epoch": 4,
                "train_batch_size": 3,
                "train_gradient_accumulation_steps": 2,
                "train_num_inner_epochs": 2,
                "save_freq": 2,
            },
            {
                "training.max_steps": 80,
                "training.checkpoint_every_steps": 16,
                "objective.batches": 4,
                "objective.inner_epochs": 2,
                "objective.rollout_batch_size": 6,
                "training.global_batch_size": 6,
            },
        ),
        ("ddpo", {"train_timestep_fraction": 0.5}, {"objective.trained_steps": 25}),
        ("ddpo", {"sample_eta": 0.5}, {"objective.eta": 0.5, "sampler.eta": 0.5}),
        ("ddpo", {"train_adam_beta2": 0.99}, {"optimizer.betas": [0.9, 0.99]}),
        ("alignprop", {}, {"objective.truncation_range": [1, 50]}),
        (
            "alignprop",
            {"truncated_rand_backprop_minmax": [10, 30], "sample_num_steps": 40},
            {"objective.truncation_range": [10, 30]},
        ),
        (
            "alignprop",
            {"truncated_backprop_rand": False, "truncated_backprop_timestep": 47},
            {"objective.truncation_steps": 3},
        ),
        (
            "alignprop",
            {"truncated_backprop_rand": False, "truncated_backprop_timestep": 90},
            {"objective.truncation_steps": 1},
        ),
        ("ddpo", {"mixed_precision": "no"}, {"training.precision": "no", "model.dtype": "float32"}),
        (
            "ddpo",
            {"log_with": "wandb", "tracker_project_name": "mine"},
            {"training.wandb_project": "mine", "training.tensorboard": False},
        ),
        ("ddpo", {"log_with": "tensorboard"}, {"training.tensorboard": True}),
        ("ddpo", {"run_name": "mine"}, {"name": "mine"}),
        ("ddpo", {"use_lora": False}, {"model.trainable": "full"}),
        ("ddpo", {"project_kwargs.total_limit": 3}, {"training.keep_checkpoints": 3}),
        ("draftp_sd", {"trainer.precision": 32}, {"training.precision": "no"}),
        ("draftp_sd", {"trainer.precision": "16-mixed"}, {"training.precision": "fp16"}),
        ("draftp_sd", {"model.peft.peft_scheme": None}, {"model.trainable": "full"}),
        ("draftp_sd", {"trainer.draftp_sd.max_steps": 4000}, {"training.max_steps": 4000}),
        ("draftp_sd", {"trainer.draftp_sd.gradient_clip_val": 0}, {"optimizer.max_grad_norm": 1e9}),
        (
            "draftp_sd",
            {"trainer.draftp_sd.limit_val_batches": 3, "model.global_batch_size": 8},
            {"validation.num_images": 24},
        ),
        (
            "draftp_sd",
            {"model.unet_config.from_pretrained": "U", "model.unet_config.context_dim": 1024},
            {
                "model.pretrained": None,
                "model.network.config": "sd2",
                "model.network.from_pretrained": "U",
            },
        ),
        (
            "draftp_sd",
            {
                "exp_manager.create_wandb_logger": True,
                "exp_manager.wandb_logger_kwargs.project": "W",
            },
            {"training.wandb_project": "W"},
        ),
        (
            "draftp_sd",
            {"exp_manager.ema.enable": False, "exp_manager.ema.decay": 0.99},
            {"training.ema_decay": None},
        ),
        (
            "draftp_sd",
            {"model.optim.sched.name": "CosineAnnealing"},
            {"optimizer.schedule": "cosine"},
        ),
        (
            "sd_train",
            {"model.cond_stage_trainable": True},
            {"model.parts": ["network", "text_encoder"]},
        ),
        (
            "sd_train",
            {
                "model.cond_stage_config.arch": "ViT-H-14",
                "model.cond_stage_config.version": "laion2b_s32b_b79k",
            },
            {"model.text_encoder": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"},
        ),
        ("sd_train", {"model.parameterization": "v"}, {"model.prediction_type": "v_prediction"}),
    ],
)
def test_a_value_is_converted(name: str, values: dict[str, Any], expected: dict[str, Any]) -> None:
    settings, _ = verdicts(name, **values)
    assert {key: settings.get(key, "unset") for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("draftp_sd", "model.infer.sampler_type", "PLMS"),
        ("draftp_sd", "model.optim.sched.name", "PolynomialDecayAnnealing"),
        ("draftp_sd", "model.optim.name", "distributed_fused_adam"),
        ("draftp_sd", "model.beta_schedule", "cosine"),
        ("draftp_sd", "model.peft.lora_tuning.layer_selection", [1, 12]),
        ("draftp_sd", "model.kl_coeff", -1.0),
        ("draftp_sd", "model.kl_coeff", float("nan")),
        ("draftp_sd", "model.kl_coeff", "much"),
        ("draftp_sd", "model.truncation_steps", 1.5),
        ("draftp_sd", "model.data.shuffle_data", 1),
        ("draftp_sd", "model.unet_config.use_checkpoint", "yes"),
        ("draftp_sd", "model.optim.betas", 0.9),
        ("draftp_sd", "trainer.draftp_sd.val_check_interval", 0.5),
        ("draftp_sd", "trainer.draftp_sd.limit_val_batches", "x"),
        ("draftp_sd", "name", "a/b"),
        ("sd_train", "model.unet_config.context_dim", 2048),
        ("sd_train", "model.unet_config.model_channels", 128),
        ("sd_train", "model.data.train.augmentations.center_crop_h_w", "512"),
        ("sd_train", "model.data.train.augmentations.center_crop_h_w", "a, b"),
        ("sd_train", "trainer.max_steps", -1),
        ("ddpo", "train_cfg", False),
        ("ddpo", "train_batch_size", "x"),
        ("ddpo", "train_gradient_accumulation_steps", 0),
        ("ddpo", "train_gradient_accumulation_steps", 4),  # 2 images are no whole number of steps
        ("ddpo", "sample_eta", 1.5),
        ("ddpo", "log_with", "mlflow"),
        ("ddpo", "negative_prompts", ["ugly", "blurred"]),
        ("ddpo", "per_prompt_stat_tracking_buffer_size", 32),
        ("alignprop", "truncated_rand_backprop_minmax", [1]),
        ("alignprop", "train_use_8bit_adam", "yes"),
        ("alignprop", "resume_from", "checkpoints/checkpoint_3"),
    ],
)
def test_a_value_without_a_counterpart_is_missing(name: str, key: str, value: Any) -> None:
    _, hows = verdicts(name, **{key: value})
    assert "missing" in (hows[key], hows.get("sample_num_batches_per_epoch"))


def test_a_setting_in_vain_is_left_out(call: Call, tmp_path: Path) -> None:
    values = published("draftp_sd") | {"model.peft.peft_scheme": None}
    _, out, _ = call("migrate", write_yaml(tmp_path / "c.yaml", values))
    assert "model.lora.rank has no effect with model.trainable=full" in out
    assert "model.lora.rank" not in recipe_of("c")


def test_a_model_in_parts(call: Call, tmp_path: Path) -> None:
    """A U-Net and an autoencoder in files of their own need no diffusers folder."""
    values = published("draftp_sd") | {
        "model.unet_config.from_pretrained": "unet.ckpt",
        "model.first_stage_config.from_pretrained": "vae.bin",
    }
    call("migrate", write_yaml(tmp_path / "c.yaml", values))
    settings = dry(call, "c")
    assert settings["model.pretrained"] is None
    assert settings["model.network.from_pretrained"] == "unet.ckpt"
    assert settings["model.autoencoder"] == "vae.bin"
    assert settings["model.text_encoder"] == "openai/clip-vit-large-patch14"


def test_what_training_would_refuse_is_said(call: Call, tmp_path: Path) -> None:
    values = published("draftp_sd") | {"model.truncation_steps": 60}
    code, out, _ = call("migrate", write_yaml(tmp_path / "c.yaml", values))
    assert code == 0
    assert "sfumato train would say: objective.truncation_steps=60 is more than the number" in out


# Other versions and bad input


def test_a_config_of_an_unknown_version(call: Call, tmp_path: Path) -> None:
    values = published("draftp_sd") | {"model.kl_coef": 2, "trainer.new.thing": "x"}
    del values["model.infer.eta"]
    code, out, _ = call("migrate", write_yaml(tmp_path / "c.yaml", values))
    assert code == 0
    assert "2 others are of a version that is not known, and are not taken" in out
    unknown = out.partition("unknown: ")[2]
    assert "model.kl_coef = 2  (the nearest is model.kl_coeff)" in unknown
    assert "trainer.new.thing = x" in unknown
    dry(call, "c")


def test_a_later_keyword_of_trl(call: Call, tmp_path: Path) -> None:
    code, out, _ = call("migrate", write_call(tmp_path / "c.py", "DDPOConfig", {"beta": 0.1}))
    assert code == 0 and "beta = 0.1" in out.partition("unknown: ")[2]


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("c.yaml", "a: [1, 2", ["c.yaml is damaged: it is not YAML"]),
        ("c.yaml", "a: &x [*x]", ["not YAML"]),
        ("c.yaml", "- 1\n- 2", ["holds list, not settings"]),
        ("c.yaml", "", ["holds NoneType"]),
        ("c.yaml", "!!python/object/apply:os.system ['true']", ["not YAML"]),
        ("c.yml", "name: x\non: push\njobs: {}", ["no config that is known", "of its 3 keys"]),
        ("c.yaml", "hello: 1", ["no config that is known", "it has 0"]),
        ("c.json", "[1]", ["holds no JSON object"]),
        ("c.json", "{", ["holds no JSON object"]),
        ("c.json", '{"a":' * 900 + "1" + "}" * 900, ["more than 32 levels"]),
        ("c.json", '{"num_epochs": 3}', ["may be TRL's AlignPropConfig", "--as alignprop"]),
        ("c.txt", "", ["suffix '.txt'"]),
        ("c", "", ["suffix ''"]),
        ("c.py", "x = (", ["no Python that can be read"]),
        ("c.py", "(" * 5000, ["no Python that can be read"]),
        ("c.py", "x = 1", ["calls AlignPropConfig or DDPOConfig 0 times"]),
        ("c.py", "DDPOConfig()\nDDPOConfig()", ["2 times in lines 1, 2"]),
        ("c.py", "DDPOConfig(seed=args.seed)", ["seed=args.seed, in line 1", "runs no code"]),
        ("c.py", "DDPOConfig(\n  seed=0,\n  run_name=f'{x}')", ["in line 3"]),
        ("c.py", "DDPOConfig(train_learning_rate=3 * 1e-4)", ["train_learning_rate=3 * 0.0003"]),
        ("c.py", "DDPOConfig(**options)", ["**=options"]),
        ("c.py", "DDPOConfig('x')", ["a value without its name, in line 1"]),
        ("c.py", "DDPOConfig(seed=open('ran', 'w'))", ["seed=open('ran', 'w')"]),
    ],
)
def test_a_bad_file_is_refused(call: Call, tmp_path: Path, file: str, text: str, expected: list):
    (tmp_path / file).write_text(text)
    expected = [one.replace("3 * 0.0003", "3 * 0.0001") for one in expected]
    assert_mistake(call("migrate", file), *expected)
    assert [path.name for path in tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("suffix", ["yaml", "json", "py"])
def test_what_is_no_text_is_refused(call: Call, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"c.{suffix}"
    assert_mistake(call("migrate", file), "is missing")
    file.symlink_to("c2")
    assert_mistake(call("migrate", file), "is missing")
    file.unlink()
    file.symlink_to(file.name)
    assert_mistake(call("migrate", file), "cannot be read (Too many levels of symbolic links)")
    file.unlink()
    file.mkdir()
    assert_mistake(call("migrate", file), "cannot be read (Is a directory)")
    file.rmdir()
    os.mkfifo(file)
    assert_mistake(call("migrate", file), "it is not a regular file")
    file.unlink()
    file.write_bytes(bytes(range(256)))
    assert_mistake(call("migrate", file), f"c.{suffix}")
    with file.open("wb") as content:
        content.truncate(2**23)
    assert_mistake(call("migrate", file), "8,388,608 bytes, more than")


def test_a_link_to_a_config_is_read(call: Call, tmp_path: Path) -> None:
    write_call(tmp_path / "real.py", "DDPOConfig", {})
    (tmp_path / "link.py").symlink_to("real.py")
    assert call("migrate", "link.py")[0] == 0
    assert recipe_of("link")["objective.clip_range"] == 1e-4


@pytest.mark.parametrize(
    "text",
    ["${trainer.c}", "${trainer.c}" * 90, "${.precision}", "${nowhere.x}", "${oc.env:HOME}", "???"],
)
def test_what_a_value_refers_to_is_looked_up_in_the_file_alone(
    call: Call, tmp_path: Path, text: str
) -> None:
    """Also in circles, and in texts that would grow without an end."""
    grown = {
        f"trainer.{a}": f"${{trainer.{b}}}" * 9 for a, b in zip("cdefgh", "defghc", strict=True)
    }
    values = published("draftp_sd") | grown | {"trainer.precision": text}
    code, out, _ = call("migrate", write_yaml(tmp_path / "c.yaml", values))
    missing = out.partition("missing here:\n")[2].partition("\n\n")[0]
    assert code == 0 and "trainer.precision = " in missing and "give training.precision" in missing


@pytest.mark.parametrize("text", ["${training.}", "${.}", "${..}", "${}", "${training..}"])
def test_a_value_that_refers_to_nothing_is_missing(call: Call, tmp_path: Path, text: str) -> None:
    values = published("draftp_sd") | {"trainer.precision": text}
    code, out, _ = call("migrate", write_yaml(tmp_path / "c.yaml", values))
    missing = out.partition("missing here:\n")[2].partition("\n\n")[0]
    assert code == 0 and "trainer.precision = " in missing


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "a ${nowhere} b", "???"])
def test_a_value_beside_it_may_refer_to_nothing(call: Call, tmp_path: Path, text: str) -> None:
    given = {"log_with": "wandb", "tracker_project_name": text}
    code, out, _ = call("migrate", write_call(tmp_path / "c.py", "AlignPropConfig", given))
    missing = out.partition("missing here:\n")[2].partition("\n\n")[0]
    assert code == 0 and "log_with = " in missing and "tracker_project_name = " in missing
    assert "training.wandb_project" not in recipe_of("c")


@pytest.mark.parametrize("name", ["sd15_draft_plus", "sd15_dpo", "sdxl_reward"])
def test_a_recipe_has_no_name_of_one_that_ships(call: Call, tmp_path: Path, name: str) -> None:
    """Hydra would take the one that ships."""
    file = write_yaml(tmp_path / f"{name}.yaml", published("draftp_sd"))
    assert_mistake(call("migrate", file), f"a recipe named {name} ships", "--name NAME")
    assert not (tmp_path / "recipe").exists()
    assert call("migrate", file, "--name", "mine")[0] == 0


def test_letters_of_a_terminal_are_not_printed(call: Call, tmp_path: Path) -> None:
    values = published("draftp_sd") | {"model.infer.out\x1b[2J": "\x1b[31m\n\nwritten: x"}
    _, out, _ = call("migrate", write_yaml(tmp_path / "c.yaml", values))
    assert "\x1b" not in out and "\\x1b[2J" in out


def test_nothing_is_replaced(call: Call, tmp_path: Path) -> None:
    file = write_call(tmp_path / "c.py", "DDPOConfig", {})
    assert call("migrate", file)[0] == call("migrate", file)[0] == 0  # the same again
    place = tmp_path / "recipe" / "c.yaml"
    place.write_text("mine")
    assert_mistake(call("migrate", file), "recipe/c.yaml is there already", "--name NAME")
    assert place.read_text() == "mine"
    place.unlink()
    place.symlink_to("elsewhere.yaml")
    assert_mistake(call("migrate", file), "is there already")
    place.unlink()
    assert call("migrate", file, "--name", "../a b", "--config-dir", "my")[0] == 0
    assert [path.name for path in (tmp_path / "my" / "recipe").iterdir()] == ["_a_b.yaml"]


def test_options_are_checked(call: Call, tmp_path: Path) -> None:
    file = write_call(tmp_path / "c.py", "DDPOConfig", {})
    (tmp_path / "c.json").write_text('{"num_epochs": 3}')
    assert_mistake(call("migrate", "c.json", "--as", "grpo"), "grpo is no config that is known")
    assert call("migrate", "c.json", "--as", "ddpo", "--name", "d")[0] == 0
    assert call("migrate", file, "--processes", "0")[0] == 2
    assert call("migrate", file, "--processes", "3")[0] == 0
    assert recipe_of("c")["training.global_batch_size"] == 3


def test_a_row_says_for_which_value_it_holds() -> None:
    row, said = kinds()["draftp_sd"].find("model.linear_start") or (None, UNSAID)
    assert row is not None and said == 0.00085
