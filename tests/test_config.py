"""Settings: recipes, where defaults live, what cannot work together, and the way to a file."""

import copy
import math
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from refusals import assert_explained

from sfumato.catalog import keys_of, known_keys
from sfumato.check import check_train
from sfumato.compose import compose_command, compose_train, load_settings, swept_name
from sfumato.config import (
    CONF,
    REWARDS,
    ClipRewardConfig,
    ColorRewardConfig,
    DataConfig,
    DraftConfig,
    ImageSourceConfig,
    ModelConfig,
    SupervisedConfig,
    TrainConfig,
    WeightedPartConfig,
)
from sfumato.diffusion.randomness import derive
from sfumato.explain import unknown_key
from sfumato.help import heads_in
from sfumato.overrides import rewritten
from sfumato.rewards.build import build_reward

RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))
GIVEN = ["model.pretrained=M", "data.prompts=P"]


def value_of(settings: TrainConfig, key: str) -> Any:
    node: Any = settings
    for name in key.split("."):
        node = vars(node)[name]
    return node


def changed(settings: TrainConfig, key: str, value: Any) -> TrainConfig:
    result = copy.deepcopy(settings)
    place, _, name = key.rpartition(".")
    node = value_of(result, place) if place else result
    assert name in vars(node)
    vars(node)[name] = value
    return result


def leaves(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        inner = isinstance(value, dict)
        found |= leaves(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


@pytest.fixture(scope="module")
def settings() -> TrainConfig:
    return compose_train([*GIVEN, "reward=color"])[0]


# Recipes


def test_the_first_line_of_a_recipe_is_one_short_sentence():
    heads = heads_in("recipe")
    assert set(RECIPES) < set(heads)
    for path in CONF.glob("*/**/*.yaml"):
        assert path.read_text().startswith("# @package _global_\n# ")
    for name, head in (heads | heads_in("method")).items():
        assert re.fullmatch(r"[A-Z].{10,80}\.", head), name
    assert len(set(heads.values())) == len(heads)


def missing_keys(recipe: str) -> list[str]:
    try:
        compose_train([f"recipe={recipe}"])
    except ValueError as error:
        assert str(error).startswith("missing settings: ")
        return str(error).partition(": ")[2].partition(";")[0].split(", ")
    return []


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_composes_once_its_missing_keys_are_given(recipe: str):
    text = (CONF / "recipe" / f"{recipe}.yaml").read_text()
    assert "# Reproduces: " in text and "# Hardware: " in text
    missing = missing_keys(recipe)
    give = text.partition("\ndefaults:")[0].partition("# Give: ")[2]
    assert all(name in give for name in missing), f"the head of {recipe} says: give {give}"

    _, plain = compose_train([f"recipe={recipe}", *(f"{name}=X" for name in missing)])
    content = yaml.safe_load(text)
    defaults = content.pop("defaults")
    below = [entry for entry in defaults if isinstance(entry, str)]  # a recipe that it goes on from
    assert set(below) <= set(RECIPES)
    chosen = {key for entry in defaults if entry not in below for key in entry}
    assert chosen <= {"override /objective", "override /reward"}
    composed = leaves(plain)
    for key, value in leaves(content).items():
        assert composed[key] == value or "${" in str(value)
    assert plain["name"] == recipe


def test_sd15_draft_plus_is_nemo_aligners_recipe():
    settings, _ = compose_train(["recipe=sd15_draft_plus", *GIVEN, "reward.pretrained=R"])
    expected = {
        "optimizer.lr": 1e-4,
        "optimizer.betas": [0.9, 0.999],
        "optimizer.weight_decay": 0.0,
        "optimizer.warmup_steps": 10,
        "optimizer.schedule": "constant",
        "optimizer.max_grad_norm": 10.0,
        "training.ema_decay": 0.9999,
        "training.precision": "bf16",
        "training.micro_batch_size": 1,
        "training.global_batch_size": 8,  # of the recipe for 2 GPUs
        "objective.kl_coeff": 0.2,  # of the same
        "objective.truncation_steps": 1,
        "objective.truncation_range": None,
        "sampler.num_inference_steps": 50,
        "sampler.eta": 0.0,
        "sampler.guidance_scale": 7.5,
        "sampler.height": 512,
        "sampler.width": 512,
        "model.trainable": "lora",
        "model.lora.rank": 32,
        "model.lora.alpha": None,  # = rank
        "reward.kind": "clip",
    }
    assert {key: value_of(settings, key) for key in expected} == expected
    plain_draft, _ = compose_train(["recipe=sd15_draft", *GIVEN, "reward.pretrained=R"])
    assert value_of(plain_draft, "objective.kl_coeff") == 0


# Each default lives once


def test_defaults_live_in_the_dataclasses_alone():
    for command in ("train", "sample", "evaluate"):
        assert set(yaml.safe_load((CONF / f"{command}.yaml").read_text())) == {"defaults", "hydra"}
    assert {path.name for path in CONF.iterdir() if path.is_dir()} == {"recipe", "method"}
    settings, _ = compose_train([*GIVEN, "reward=clip", "reward.pretrained=R"])
    assert settings == TrainConfig(
        model=ModelConfig(pretrained="M"),
        data=DataConfig(prompts="P"),
        objective=DraftConfig(),
        reward=ClipRewardConfig(pretrained="R"),
    )


# To a file and back


@pytest.mark.parametrize(
    "reward",
    [
        ["reward=clip", "reward.pretrained=R", "reward.dtype=bfloat16"],
        ["reward=color", "reward.color=blue", "reward.scale=3"],
        ["reward=brightness", "reward.scale=-5"],
        [
            "reward=weighted",
            "+reward.parts.a={kind: clip, weight: 0.5, pretrained: R}",
            "+reward.parts.b={kind: color}",
        ],
    ],
)
def test_config_yaml_brings_the_settings_back(tmp_path: Path, reward: list[str]):
    more = ["objective.truncation_range=[1,3]", "training.ema_decay=null", "model.lora.alpha=8"]
    settings, plain = compose_train([*GIVEN, *reward, *more])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(plain))
    assert load_settings(file) == settings
    assert settings.reward.kind == reward[0].partition("=")[2]


def test_parts_of_a_weighted_reward_become_settings():
    parts = [
        "reward=weighted",
        "+reward.parts.a={kind: clip, weight: 0.5, pretrained: R}",
        "+reward.parts.b={kind: color, color: green}",
    ]
    settings, plain = compose_train([*GIVEN, *parts])
    assert value_of(settings, "reward.parts") == {
        "a": WeightedPartConfig(ClipRewardConfig(pretrained="R"), 0.5),
        "b": WeightedPartConfig(ColorRewardConfig(color="green"), 1.0),
    }
    assert plain["reward"]["parts"]["a"] == {"kind": "clip", "weight": 0.5, "pretrained": "R"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xff\xfe\x00\x80garbage", "utf-8"),
        (b"\x00\x01\x02", "damaged: .*special characters"),
        (b"", "damaged: .* NoneType"),
        (b"[1, 2]", "damaged: .* list"),
        (b"just words", "damaged: .* str"),
        (b"a: [1, 2", "damaged: .* not YAML"),
        (b"objective: null\nreward: null", "not a configuration"),
        (
            b"objective: {kind: draft}\nreward: {kind: clipp}",
            "reward.kind = 'clipp'; there are clip",
        ),
        (b"objective: {kind: draft}\nreward: {kind: [x]}", r"reward.kind = \['x'\]"),
        (b"objective: {kind: draft}\nreward: {kind: color}", "missing settings: data.prompts"),
        (b"objective: {kind: draft}\nreward: {kind: color}\nnmae: x", "nmae"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: bytes, expected: str):
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=expected) as caught:
        load_settings(file)
    assert str(caught.value).startswith(f"{file} is ")


def test_a_folder_without_configuration_is_no_run(tmp_path: Path):
    with pytest.raises(ValueError, match=r"is no run folder: it has no config\.yaml"):
        load_settings(tmp_path / "config.yaml")


# What cannot work


BAD: list[tuple[str, object, str]] = [
    ("name", "", "empty"),
    ("name", "..", "without slashes"),
    ("name", "a/b", "without slashes"),
    ("model.trainable", "adapter", "one of lora, full"),
    ("model.dtype", "half", "one of float32, bfloat16, float16"),
    ("model.prediction_type", "x0", "one of epsilon, v_prediction"),
    ("model.image_size", 0, "1 or more"),
    ("model.parts", [], "empty"),
    ("model.lora.rank", 0, "1 or more"),
    ("model.lora.alpha", 0.0, "more than 0"),
    ("model.lora.dropout", 1.0, "less than 1"),
    ("model.lora.dropout", -0.1, "0 or more"),
    ("model.lora.targets", [], "empty"),
    ("sampler.num_inference_steps", 0, "1 or more"),
    ("sampler.height", 0, "1 or more"),
    ("sampler.width", -64, "1 or more"),
    ("sampler.eta", 1.5, "1 or less"),
    ("sampler.eta", -0.5, "0 or more"),
    ("sampler.guidance_scale", math.nan, "finite"),
    ("objective.cfg_gradient", "half", "one of full, detach_uncond, rescale"),
    ("objective.kl_coeff", -0.1, "0 or more"),
    ("objective.kl_coeff", math.inf, "finite"),
    ("objective.truncation_steps", 0, "1 or more"),
    ("objective.truncation_steps", 51, "50 (sampler.num_inference_steps)"),
    ("objective.truncation_range", [1], "[low, high] with 1 <= low <= high <= 50"),
    ("objective.truncation_range", [3, 2], "[low, high] with 1 <= low <= high <= 50"),
    ("objective.truncation_range", [1, 51], "[low, high] with 1 <= low <= high <= 50"),
    ("objective.lv_samples", -1, "0 or more"),
    ("reward.color", "purple", "one of red, green, blue"),
    ("data.buffer", 0, "1 or more"),
    ("data.images.crop", "left", "one of center, random"),
    ("validation.images.min_size", 0, "1 or more"),
    ("optimizer.lr", 0.0, "more than 0"),
    ("optimizer.lr", -math.inf, "more than 0"),
    ("optimizer.betas", [0.9], "two"),
    ("optimizer.eps", -1.0, "0 or more"),
    ("optimizer.weight_decay", -0.1, "0 or more"),
    ("optimizer.warmup_steps", -1, "0 or more"),
    ("optimizer.schedule", "step", "one of constant, linear, cosine"),
    ("optimizer.max_grad_norm", 0.0, "more than 0"),
    ("training.max_steps", 0, "1 or more"),
    ("training.micro_batch_size", -1, "1 or more"),
    ("training.global_batch_size", 0, "1 or more"),
    ("training.checkpoint_every_steps", 0, "1 or more"),
    ("training.keep_checkpoints", 0, "1 or more"),
    ("training.precision", "fp8", "one of no, bf16, fp16"),
    ("training.strategy", "zero3", "one of ddp, fsdp, hsdp"),
    ("training.compile", "half", "one of none, regional, full"),
    ("training.ema_decay", 1.0, "less than 1"),
    ("training.ema_every_steps", 10**6, "training.max_steps=1000"),
    ("training.max_time", "1h", "MM:SS"),
    ("training.max_time", "00:00", "[DD:]HH:]MM:SS"),
    ("training.max_time", "1:99", "[DD:]HH:]MM:SS"),
    ("training.max_time", "1:60:00", "[DD:]HH:]MM:SS"),
    ("training.max_time", "1:24:00:00", "[DD:]HH:]MM:SS"),
    ("training.max_steps", 10**30, "1000000000000 or less"),
    ("name", " ", "empty"),
    ("runs_dir", "", "empty"),
    ("model.pretrained", "", "empty"),
    ("data.prompts", " ", "empty"),
    ("model.lora.start", "", "empty"),
    ("training.peak_tflops", 0.0, "more than 0"),
    ("validation.num_images", 0, "1 or more"),
    ("validation.every_steps", -1, "0 or more"),
    ("validation.loss_images", -1, "0 or more"),
    ("export", "first", "one of last, best"),
    ("export", "best", "objective=supervised"),
]
BAD_SUPERVISED: list[tuple[str, object, str]] = [
    ("objective.caption_dropout", 1.5, "1 or less"),
    ("objective.noise_offset", -1.0, "0 or more"),
    ("objective.snr_gamma", 0.0, "more than 0"),
    ("objective.logit_std", 0.0, "more than 0"),
    ("objective.timesteps", "normal", "one of uniform, logit_normal, table"),
    ("objective.weighting", "snr", "one of none, min_snr, bump"),
]


@pytest.mark.parametrize(("key", "value", "bound"), [*BAD, *BAD_SUPERVISED])
def test_what_cannot_work_is_refused(settings: TrainConfig, key: str, value: object, bound: str):
    if (key, value, bound) in BAD_SUPERVISED:
        settings = changed(settings, "objective", SupervisedConfig())
    check_train(settings, 1)
    with pytest.raises(ValueError, match=re.escape(key)) as caught:
        check_train(changed(settings, key, value), 1)
    assert_explained(str(caught.value), key, value, bound)


def test_one_bad_value_of_a_list_is_named(settings: TrainConfig):
    with pytest.raises(ValueError, match=r"optimizer\.betas=1\.0 .* less than 1"):
        check_train(changed(settings, "optimizer.betas", [0.9, 1.0]), 1)
    for key in ("model.lora.targets", "model.lora.encoder_targets"):
        with pytest.raises(ValueError, match=rf"{key}='a\(' is no regular expression .*correct it"):
            check_train(changed(settings, key, ["b", "a("]), 1)


def test_any_seed_works(settings: TrainConfig):
    for seed in (-1, 2**63, 10**40):
        check_train(changed(settings, "training.seed", seed), 1)
        assert 0 <= derive(seed, "adapter") < 2**63


def test_cached_data_lies_in_a_prepared_folder():
    given = ["objective=supervised", "model.pretrained=M", "data.shards.cached=true"]
    with pytest.raises(ValueError, match=r"data\.shards\.cached=true .*data\.images\.path='P'"):
        compose_train([*given, "data.images.path=P"])
    with pytest.raises(ValueError, match=r"cached=true .*data\.images\.sources=\['a'\]"):
        compose_train([*given, "data.images.sources.a.path=P"])
    with pytest.raises(ValueError, match=r"data\.shards\.path='S' and data\.images\.path='P'"):
        compose_train([*given, "data.images.path=P", "data.shards.path=S"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("filter.min_size", 0), ("filter.max_size", 0), ("filter.min_caption", -1)),
        *(("filter.max_caption", 0), ("filter.name", ""), ("out", " "), ("pack.path", "")),
    ],
)
def test_bounds_of_preparation_stand_at_its_fields(key: str, value: object):
    with pytest.raises(ValueError, match=re.escape(f"{key}={value!r} is ")):
        compose_command("prepare", ["out=O", f"{key}={value}"])


def test_an_empty_prompt_is_one():
    assert compose_command("sample", ["pretrained=M", "prompt="])[0].prompt == ""


@pytest.mark.parametrize(
    ("micro", "total", "processes", "nearest"), [(2, 3, 1, 4), (1, 4, 3, 3), (4, 8, 4, 16)]
)
def test_a_global_batch_must_divide(
    settings: TrainConfig, micro: int, total: int, processes: int, nearest: int
):
    batch = changed(settings, "training.micro_batch_size", micro)
    bad = changed(batch, "training.global_batch_size", total)
    with pytest.raises(ValueError, match=rf"global_batch_size={total} .* is {nearest}$") as caught:
        check_train(bad, processes)
    assert_explained(str(caught.value), "training.global_batch_size", total, str(processes))
    check_train(changed(batch, "training.global_batch_size", nearest), processes)


def test_steps_that_a_range_replaces_are_not_bounded(settings: TrainConfig):
    long = changed(settings, "objective.truncation_steps", 60)
    with pytest.raises(ValueError, match="truncation_steps=60 is more"):
        check_train(long, 1)
    check_train(changed(long, "objective.truncation_range", [1, 2]), 1)


def test_draft_lv_has_one_gradient_step(settings: TrainConfig):
    lv = changed(settings, "objective.lv_samples", 2)
    check_train(lv, 1)
    for key, value in (("truncation_steps", 2), ("truncation_range", [1, 2])):
        with pytest.raises(ValueError, match=r"objective.lv_samples=2 .*truncation_range=null"):
            check_train(changed(lv, f"objective.{key}", value), 1)


SIMPLE = sorted(
    kind
    for kind, settings in REWARDS.items()
    if not {"pretrained", "path", "url", "parts"} & {field.name for field in fields(settings)}
)


@pytest.mark.parametrize("kind", [kind for kind in SIMPLE if kind != "none"])
def test_draft_takes_the_rewards_that_have_a_gradient(settings: TrainConfig, kind: str):
    config = changed(settings, "reward", REWARDS[kind]())
    if build_reward(config.reward).differentiable:
        check_train(config, 1)
    else:
        with pytest.raises(ValueError, match=f"reward={kind} is not differentiable"):
            check_train(config, 1)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("{kind: jpeg}", "reward.parts.a=jpeg is not differentiable"),
        ("{kind: color, color: pink}", "reward.parts.a.color='pink' .* choose one of red"),
        ("{kind: color, colr: red}", "unknown key reward.parts.a.colr: did you mean .*a.color"),
        ("{kind: color, scale: big}", "reward.parts.a.scale: Value 'big' .* Float"),
        ("{kind: color, scale: nan}", "reward.parts.a.scale=nan must be finite"),
        ("{kind: color, weight: much}", "reward.parts.a.weight = 'much' is not a finite number"),
        ("{kind: color, weight: nan}", "reward.parts.a.weight = nan is not a finite number"),
        ("{kind: color, weight: true}", "reward.parts.a.weight = True is not a finite number"),
        ("{kind: color, weight: [1]}", r"reward.parts.a.weight = \[1\] is not a finite number"),
        ("{kind: clip}", "missing settings: reward.parts.a.pretrained"),
        ("{kind: clipp}", "reward.parts.a.kind = 'clipp'; choose one of clip, "),
        ("{kind: [x]}", r"reward.parts.a.kind = '\[x\]'; choose one of clip, "),
        ("{kind: weighted}", "reward.parts.a.kind = 'weighted'; choose one of clip, "),
        ("{weight: 1}", "reward.parts.a.kind = None; choose one of clip, "),
        ("7", "reward.parts.a = 7; write {kind: ..., weight: ...}"),
    ],
)
def test_a_wrong_part_is_named(part: str, expected: str):
    with pytest.raises(ValueError, match=expected):
        compose_train([*GIVEN, "reward=weighted", f"+reward.parts.a={part}"])


# Names


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("objective.kl_coef", "did you mean objective.kl_coeff?"),
        ("objective.kl", "did you mean objective.kl_coeff?"),
        ("kl_coeff", "did you mean objective.kl_coeff?"),
        ("training.lr", "did you mean optimizer.lr?"),
        ("model.lora.ranks", "did you mean model.lora.rank?"),
        ("recip", "did you mean recipe?"),
        ("negative_prompt", "did you mean sampler.negative_prompt?"),
        ("qqq.zzz", "run with --help to see every key, or look into docs/settings.md"),
        *(
            (key, f"run with --help {section} to see every key, or look into docs/settings.md")
            for key, section in (
                ("sampler.kind", "sampler"),
                ("sampler.karras", "sampler"),
                ("optimizer.name", "optimizer"),
                ("model.lora.bias", "model.lora"),
            )
        ),
        *(
            (key, "run with --help to see every key, or look into docs/settings.md")
            for key in ("fid", "clip_score", "push_to_hub", "xformers")
        ),
    ],
)
def test_an_unknown_key_has_its_nearest(key: str, hint: str):
    assert unknown_key(key, known_keys("train")) == f"unknown key {key}: {hint}"


def test_a_key_of_another_choice_is_explained():
    said = unknown_key("reward.scale", known_keys("train"))
    assert "is a setting of reward=color or reward=brightness" in said


def test_every_setting_has_a_name():
    names = keys_of(TrainConfig)
    settings = TrainConfig(objective=DraftConfig(), reward=ClipRewardConfig())
    plain = leaves(asdict(settings))
    assert set(plain) <= set(names)


@pytest.mark.parametrize(
    ("arguments", "chosen", "expected"),
    [
        (["objective.kl_coeff=0.1"], ["objective.kl_coeff=0.1"], "run"),
        (["-m", "objective.kl_coeff=0,0.1"], ["objective.kl_coeff=0.1"], "run-kl_coeff=0.1"),
        (
            ["--multirun", "a.b=1,2", "c.d=range(0,3)", "e=5"],
            ["a.b=2", "c.d=1", "e=5"],
            "run-b=2-d=1",
        ),
        (["-m", "reward=color,clip"], ["reward=color"], "run-reward=color"),
        (["-m", "+a.b=1,2"], ["+a.b=2"], "run-b=2"),
        (
            ["-m", "model.pretrained=choice('m/a','m/b')"],
            ["model.pretrained='m/b'"],
            "run-pretrained=m_b",
        ),
        (["--config-dir", "my", "-m", "a=1,2"], ["a=1"], "run-a=1"),
    ],
)
def test_runs_of_a_sweep_have_names_of_their_own(
    arguments: list[str], chosen: list[str], expected: str
):
    assert swept_name("run", arguments, chosen) == expected


# Every refusal has a key, a value and a remedy


REFUSED = [
    *("objective.kl_coef=1", "+objective.kl_coef=1", "+nmae=x", "reward.pretrained=R"),
    *("training.max_steps=abc", "training.max_steps=1.5", "training.max_steps=null"),
    *("objective.kl_coeff=[1]", "training.tensorboard=perhaps", "optimizer.betas=0.9"),
    *("model.parts=network", "model=big", "~objective.kl_coeff", "objective.kl_coeff=0,1"),
    *("objective.kl_coeff=${nope}", "objective.kl_coeff=nan", "optimizer.lr=inf"),
    *("training.max_time=soon", "name=a/b", "objective=drafft", "recipe=sd15", "max_steps"),
    *("reward=jpeg", "objective.cfg_gradient=full,rescale", "data.images.sources.a=3"),
    *("data.images.sources.a.repeats=0", "model.merge.a={paht: x}", "model.merge.a.scale=x"),
    *("optimizer.lr=true", "model.merge.a.scale=False", "reward.processor=", "name= ", "runs_dir="),
    *("data.images.path=P", "validation.images.path=P", "data.shards.path=P"),
]


@pytest.mark.parametrize("override", REFUSED)
def test_a_refusal_names_key_value_and_remedy(override: str):
    key, _, value = override.lstrip("+~").partition("=")
    with pytest.raises(ValueError, match=re.escape(key)) as caught:
        compose_train([*GIVEN, *([] if key == "reward" else ["reward=color"]), override])
    unknown = "unknown key" in str(caught.value) or "is a setting of" in str(caught.value)
    assert_explained(str(caught.value), key, None if unknown else value.strip("${}"))


# Text stays text


TEXTS = [
    *("1.10", "1_000", "5e-5", "007", "2024.10", "2024-10-01", "true", "no", "~", "-"),
    *(
        "~/models/sd",
        "shards/{000..012}.tar",
        "cats,dogs",
        "a=b",
        "a: b",
        "[a,b]",
        "{a: b}",
        "d[1]",
    ),
    *("a (b)'s file", 'say "hi"', "'single'", '"double"', "'", "\\'", r"C:\models\new", "end\\"),
    *("${x}", r"\${x}", "a\\\\${runs_dir}", "${oc.env:HOME}", "choice(a,b)", "range(3)", "ü ☃"),
    *(" a ", "a\nb", "a star, red", "Null", "None", "???x", "d[1]", "+a", "#1", "a # b"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_taken_as_typed(text: str, tmp_path: Path):
    """On the command line, in lists, in dictionaries, and through config.yaml."""
    listed = f"'{text}'" if "'" not in text and text[-1:] != "\\" else None
    inner = [f"model.parts=[network,{listed}]", f"model.merge.b={{path: {listed}}}"]
    settings, plain = compose_train(
        [
            *("objective=supervised", "model.pretrained=M", f"data.images.sources.a.path={text}"),
            *(f"validation.column={text}", f"model.merge.a.path={text}", f"runs_dir={text}"),
            "validation.prompts=P",
            *(inner if listed else []),
        ]
    )
    assert settings.data.images.sources["a"].path == text
    assert (settings.validation.column, settings.runs_dir) == (text, text)
    assert settings.model.merge["a"].path == text
    if listed:
        assert settings.model.parts == ["network", text]
        assert settings.model.merge["b"].path == text
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(plain), encoding="utf-8")
    assert load_settings(file) == settings


@pytest.mark.parametrize(
    ("command", "key", "more"),
    [
        ("sample", "prompt", ["pretrained=M"]),
        ("evaluate", "prompts", ["run=R"]),
        ("prepare", "pack.path", ["out=O"]),
        ("plan", "data.shards.path", ["model.pretrained=M", "objective=supervised"]),
        ("launch", "given.x", ["jobs.a={command: evaluate, settings: ['run=${given.x}']}"]),
    ],
)
def test_texts_of_every_command_are_taken_as_typed(command: str, key: str, more: list[str]):
    for text in ("1.10", "true", "${y}", "cats,dogs", "[a", "it's"):
        settings: Any = compose_command(command, [*more, f"{key}={text}"])[0]
        name, _, leaf = key.partition(".")
        value = vars(settings)[name]
        if command == "launch":
            assert value == {"x": text}
            assert settings.jobs["a"].settings == [f"run={text}"]
        elif leaf:
            assert value_of(settings, key) == text
        else:
            assert value == text


def test_null_is_none_where_a_setting_may_be_none():
    given = ["reward=color", *GIVEN]
    assert compose_train([*given, "data.column=null"])[0].data.column is None
    for typed in ("'null'", '"null"'):
        assert compose_train([*given, f"data.column={typed}"])[0].data.column == "null"
    assert compose_train([*given, "name=null"])[0].name == "null"
    with pytest.raises(ValueError, match=r"missing settings: data\.prompts"):
        compose_train(["reward=color", "model.pretrained=M", "data.prompts=???"])


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("[]", []),
        ("[network, 1.10, true,null]", ["network", "1.10", "true", "null"]),
        (r"[.*attn\d?\.to_[qkv],a{1,2}(b,c)]", [r".*attn\d?\.to_[qkv]", "a{1,2}(b,c)"]),
        ("""['a,b', "c,d", it's, '${x}']""", ["a,b", "c,d", "it's", "${x}"]),
        (r"""['it\'s', 'end\\']""", ["it's", "end\\"]),
    ],
)
def test_lists_of_texts(typed: str, expected: list[str]):
    settings, _ = compose_command("prepare", ["out=O", f"pack.columns={typed}"])
    assert settings.pack.columns == expected


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("training.max_steps=1,2", ["1", "2"]),
        ("training.seed=range(0,3)", ["0", "1", "2"]),
        ("objective.cfg_gradient=full,rescale", ["'full'", "'rescale'"]),
        ("name=cats,dogs", ["'cats'", "'dogs'"]),
        ("name=cats, true,1.10", ["'cats'", "'true'", "'1.10'"]),
        ("name='cats,dogs'", ["'cats,dogs'"]),
        ("""name="cats, dogs",'a,b',it's""", ["'cats, dogs'", "'a,b'", r"'it\'s'"]),
        ("name='cats'", [r"'\'cats\''"]),
        ("name=[cats,dogs]", ["'[cats,dogs]'"]),
        ("validation.column=null,'null',${x}", ["null", "'null'", r"'\${x}'"]),
        ("name=choice(1.10)", ["'1.10'"]),
        ("name=choice(1.10,'a,b',${x})", ["'1.10'", "'a,b'", r"'\${x}'"]),
        ("model.parts=[network],[network,t]", ["['network']", "['network','t']"]),
        ("model.parts=[network]", ["['network']"]),
        ("reward=color,clip", ["color", "clip"]),
    ],
)
def test_values_of_a_sweep(typed: str, expected: list[str]):
    (override,) = rewritten("train", [typed], sweep=True)
    parsed = OverridesParser.create().parse_override(override)
    values = list(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else None
    assert (values or [override.partition("=")[2]]) == expected


# Names of one's own


@pytest.mark.parametrize("key", ["data.images", "data.shards", "validation.images"])
def test_a_source_without_a_path_is_refused(key: str):
    needed = ["objective=supervised", "model.pretrained=M"]
    needed += ["data.images.path=P"] if key == "validation.images" else []
    with pytest.raises(ValueError, match=rf"{key}\.sources\.a\.path is missing"):
        compose_train([*needed, f"{key}.sources={{a: {{}}}}"])


def test_sources_take_names_of_ones_own():
    given = ["objective=supervised", "model.pretrained=M"]
    ways = [
        ["data.images.sources.mine={path: a, repeats: 2}", "data.images.sources.b.path=c"],
        ["data.images.sources={mine: {path: a, repeats: 2}, b: {path: c}}"],
        ["+data.images.sources.mine={path: a, repeats: 2}", "++data.images.sources.b.path=c"],
    ]
    for overrides in ways:
        settings, plain = compose_train([*given, *overrides])
        sources = settings.data.images.sources
        assert sources == {"mine": ImageSourceConfig("a", repeats=2), "b": ImageSourceConfig("c")}
        assert plain["data"]["images"]["sources"]["b"] == {"path": "c"}
    recipe = ["recipe=demo_finetune", "data.images.sources.new=null"]
    assert set(compose_train(recipe)[0].data.images.sources) == {"old"}
    for wrong, expected in (
        ("data.images.sources.mine={paht: a}", "sources.mine.paht: did you mean .*mine.path"),
        ("data.images.sources.mine=3", r"sources.mine = 3; write \{KEY: VALUE"),
        ("validation.images.sources.m.weight=x", "validation.images.sources.m.weight: Value 'x'"),
    ):
        with pytest.raises(ValueError, match=expected):
            compose_train([*given, "data.images.path=P", wrong])


def test_an_objective_names_what_it_reads():
    with pytest.raises(ValueError, match=r"missing settings: data.images.path, model.pretrained;"):
        compose_train(["objective=supervised"])
    with pytest.raises(ValueError, match=r"missing settings: data.prompts, model.pretrained;"):
        compose_train(["objective=draft"])
    with pytest.raises(ValueError, match="objective=draft maximises a reward: choose one"):
        compose_train(GIVEN)


@pytest.mark.parametrize(
    ("command", "recipe", "said"),
    [
        (
            "launch",
            "sd15_sft_full",
            "the recipe chooses objective, and this command has none",
        ),
        (
            "plan",
            "ladder/demo",
            "the recipe sets given, which sfumato plan does not have",
        ),
        ("launch", "ladder/dmo", "ladder/dmo is unknown; did you mean ladder/demo? There are"),
    ],
)
def test_a_recipe_of_another_command_is_explained(command: str, recipe: str, said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        compose_command(command, [f"recipe={recipe}"])
