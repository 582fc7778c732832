"""Settings without effect: every one has a condition or is always read; typed in vain, refused."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import write_pictures
from refusals import assert_explained

from sfumato.catalog import known_keys
from sfumato.check import check_train
from sfumato.compose import compose_command, compose_train
from sfumato.conditions import READ, conditions_of, refuse_unread, typed_keys, unread
from sfumato.config import ColorRewardConfig, TrainConfig, WeightedPartConfig, WeightedRewardConfig
from sfumato.config.saved import write_saved
from sfumato.demo.experiment import write_prompts
from sfumato.evaluation.commands import distinct
from sfumato.help import command_page, settings_of
from sfumato.run.identity import contents_of, repeated_pictures
from sfumato.run.run import prepare_folder, way_on
from sfumato.training.folder import RunFolder

# What each command always reads: where a new setting belongs, if it has no condition in READ.
MODEL = "model.{pretrained,variant,allow_pickle,family}"
FILES = """
    model.{autoencoder,text_encoder,tokenizer,scheduler} model.merge{,.NAME.path} model.pretrained
"""
SAMPLER = "sampler.{num_inference_steps,guidance_scale,eta,height,width,scheduler,prompt_cache}"
TRAIN = f"""
    name runs_dir export verify allow_changed guard recipe method {MODEL} {SAMPLER} sampler.solver
    model.{{trainable,parts,dtype,gradient_checkpointing,channels_last}}
    model.merge{{,.NAME.path,.NAME.scale}} model.network.{{config,from_pretrained}}
    objective objective.{{kl_coeff,truncation_range,lv_samples,clamp_images}}
    objective.{{path,reward_at,early_stop,hinge,clip_quantile,visits_on_cpu}}
    objective.{{reward_scale,trained_steps,source,noise_levels,stride,inverse,positive,negative}}
    objective.{{images_per_prompt,batches,inner_epochs,rollout_batch_size,statistics,deviation}}
    objective.{{advantage_clip,eta,window,clip_range,beta,trained_times,old_decay,old_decay_rise}}
    objective.{{step_weights,shared_start,likelihood,timesteps,weighting,caption_dropout}}
    objective.{{noise_offset,sample_latents,guidance_scale,start_scale,start,decoder_only}}
    objective.{{square_coeff,edge_coeff}}
    objective.settings reward reward.{{pretrained,processor,dtype,color,scale,parts}}
    reward.{{predictor,resize,label,sizes,score,good,bad,version,preprocessing}}
    reward.{{path,url,timeout,metadata,cache}}
    optimizer.{{kind,lr,options,warmup_steps,schedule,max_grad_norm}}
    training.{{max_steps,micro_batch_size,global_batch_size,precision,strategy,compile,ema_decay}}
    training.{{async_checkpoints,peak_tflops,checkpoint_every_steps,keep_checkpoints,max_time}}
    training.{{seed,tensorboard,wandb_project}}
    validation.{{prompts,num_images,every_steps,seed,rewards}}
"""
ALWAYS = {
    "train": TRAIN,
    "sample": f"""
        run pretrained allow_pickle prompt prompts num_images seed batch_size out {SAMPLER}
        sampler.{{guidance_interval,negative_prompt}} model.variant
    """,
    "evaluate": f"""
        run steps schedules lora_scales guidance_scales metrics layouts
        prompts num_images seed batch_size part features allow_pickle allow_changed {FILES}
        model.variant reward reward.{{pretrained,processor,dtype,color,scale,parts}}
        reward.{{path,url,timeout,metadata,cache}}
        reward.{{predictor,resize,label,sizes,score,good,bad,version,preprocessing}}
        reward.parts.NAME.{{pretrained,processor,predictor,path,url}}
        reward.{{standardise,gradients}}
        validation.rewards validation.rewards.NAME.{{pretrained,processor,predictor,path,url}}
    """,
    "prepare": f"""
        out stages engine workers part recipe {MODEL} model.network.config model.merge
        download.{{table,columns}}
        pack.{{path,caption_column,captions,columns,caption_lines,samples_per_shard,max_pixels}}
        pack.workers filter.{{name,min_size,max_size,max_aspect,min_caption,max_caption,score}}
        filter.{{min_score,max_score,duplicates}}
        precache.{{selection,height,width,crop,flip,dtype,batch_size,workers}}
    """,
    "launch": """
        name runs_dir stages given dry_run recipe jobs jobs.NAME.{command,recipe,settings,also}
        jobs.NAME.{processes,nodes,array} cluster
        cluster.{processes,max_restarts,nodes,gpus_per_node,cpus_per_task,time,partition,account}
        cluster.{qos,mem,signal_seconds,max_requeues,setup,additional}
    """,
}
DRAFT = ("model.pretrained=M", "data.prompts=P", "reward=color")
IMAGES = ("model.pretrained=M", "objective=supervised", "data.images.path=P")
PAIRS = ("model.pretrained=M", "objective=dpo", "data.pairs.path=P")
SHARDS = ("model.pretrained=M", "objective=supervised", "data.shards.path=P")
RANDOM = ("model.pretrained=null", "model.network.config=sd1", "model.trainable=full",
          "model.autoencoder=A", "model.text_encoder=T")  # fmt: skip


def spelled(text: str) -> set[str]:
    """Return the words of a text, where a{b,c} stands for ab and ac."""
    found = set()
    for word in text.split():
        start, _, rest = word.partition("{")
        names, _, end = rest.partition("}")
        found |= {f"{start}{name}{end}" for name in names.split(",")}
    return found


@pytest.mark.parametrize("command", ALWAYS)
def test_every_setting_is_always_read_or_has_a_condition(command: str) -> None:
    always = {each.key for each in settings_of(command) if not conditions_of(command, each.key)}
    assert always == spelled(ALWAYS[command])


def test_a_plan_reads_the_model_as_training_does() -> None:
    for each in settings_of("train"):
        if not each.key.startswith(("data.", "validation.")):
            assert conditions_of("plan", each.key) == conditions_of("train", each.key)


@pytest.mark.parametrize("command", READ)
def test_conditions_speak_of_settings(command: str) -> None:
    keys = [each.key for each in settings_of(command)]
    # Entries of dictionaries have the settings of their kind.
    keys += [key.replace("reward.", "validation.rewards.NAME.", 1) for key in keys]
    for pattern, condition in READ[command]:
        assert any(re.fullmatch(pattern.partition("=")[0], key) for key in keys), pattern
        if not condition.startswith("never: "):
            read = re.split(r"!?=|>", condition)[0].split("|")
            known = {
                *keys,
                *known_keys(command),
                "objective.reads_prompts",
                "objective.reads_images",
                "objective.reads_pairs",
            }
            assert set(read) <= known, condition


IN_VAIN: list[tuple[Sequence[str], str, str]] = [
    ((*DRAFT, "validation.every_steps=0"), "guard.dark.limit=1", "validation.every_steps=0"),
    ((*DRAFT, "validation.every_steps=0"), "training.target_reward=9", "validation.every_steps=0"),
    (("recipe=demo_reward",), "validation.rewards.classifier_at_160.crop=0.7", "takes no gradient"),
    (IMAGES, "training.target_reward=9", "with reward=none"),
    (IMAGES, "validation.gauges=false", "with reward=none"),
    (DRAFT, "model.prediction_type=v_prediction", "without model.network.config"),
    (DRAFT, "model.image_size=64", "without model.network.config"),
    (DRAFT, "model.tokenizer=/no/such", "without model.network.config"),
    (DRAFT, "model.autoencoder=/no/such", "without model.network.config"),
    (IMAGES, "model.text_encoder=/no/such", "without model.network.config"),
    (IMAGES, "model.scheduler=/no/such", "without model.network.config"),
    (DRAFT, "model.network.ema=false", "without model.network.from_pretrained"),
    ((*IMAGES, *RANDOM), "model.network.from_NeMo=true", "without model.network.from_pretrained"),
    ((*DRAFT, "model.trainable=full"), "model.lora.rank=8", "with model.trainable=full"),
    ((*IMAGES, "model.trainable=full"), "model.lora.dropout=0.1", "with model.trainable=full"),
    ((*IMAGES, "model.trainable=full"), "model.lora.start=F", "set model.trainable=lora"),
    (DRAFT, "model.lora.encoder_targets=[q]", "with model.parts=[network]"),
    ((*IMAGES, "model.parts=[text_encoder]"), "model.lora.targets=[q]", "model.parts=network"),
    (DRAFT, "model.reference=false", "with model.trainable=lora"),
    ((*DRAFT, "training.ema_decay=null"), "training.ema_every_steps=2", "training.ema_decay=null"),
    ((*DRAFT, "training.ema_decay=null"), "training.ema_on_cpu=true", "training.ema_decay=null"),
    (DRAFT, "training.shard_size=2", "with training.strategy=ddp"),
    ((*DRAFT, "training.strategy=fsdp"), "training.shard_size=2", "set training.strategy=hsdp"),
    (DRAFT, "training.sharded_checkpoints=true", "with training.strategy=ddp"),
    (DRAFT, "training.sharded_checkpoints=false", "set training.strategy=fsdp"),
    (IMAGES, "objective.snr_gamma=3", "with objective.weighting=none"),
    ((*IMAGES, "objective.weighting=bump"), "objective.snr_gamma=3", "objective.weighting=bump"),
    (IMAGES, "objective.logit_mean=1", "with objective.timesteps=uniform"),
    (IMAGES, "objective.logit_std=2", "set objective.timesteps=logit_normal"),
    ((*DRAFT, "objective.truncation_range=[1,3]"), "objective.truncation_steps=2", "[1, 3]"),
    ((*DRAFT, "sampler.guidance_scale=1"), "objective.cfg_gradient=rescale", "above 1"),
    ((*DRAFT, "sampler.guidance_scale=1"), "sampler.guidance_interval=[0,0.5]", "above 1"),
    ((*DRAFT, "sampler.guidance_scale=1"), "sampler.negative_prompt=ugly", "above 1"),
    ((*IMAGES, "sampler.guidance_scale=0"), "sampler.negative_prompt=", "above 1"),
    (IMAGES, "sampler.training_steps=10", "with objective=supervised"),
    (SHARDS, "sampler.training_spacing=trailing", "set objective=draft"),
    (DRAFT, "data.images.path=P", "with objective=draft"),
    (DRAFT, "data.images.sources.a.path=P", "with objective=draft"),
    (DRAFT, "data.images.flip=true", "with objective=draft"),
    (DRAFT, "data.shards.path=P", "set objective=supervised"),
    (DRAFT, "validation.images.path=P", "with objective=draft"),
    (DRAFT, "validation.loss_images=3", "with objective=draft"),
    ((*DRAFT, "data.shuffle=false"), "data.buffer=3", "with data.shuffle=false"),
    (IMAGES, "data.prompts=P", "with objective=supervised"),
    (IMAGES, "data.column=c", "with objective=supervised"),
    (IMAGES, "data.shuffle=false", "with objective=supervised"),
    (IMAGES, "reward=clip reward.pretrained=R reward.gradient_checkpointing=true", "supervised"),
    (IMAGES, "validation.column=c", "without validation.prompts"),
    (IMAGES, "data.shards.flip=true", "without data.shards.path or data.shards.sources"),
    ((*IMAGES, "data.images.workers=0"), "data.images.prefetch=3", "with data.images.workers=0"),
    (SHARDS, "data.images.crop=random", "without data.images.path or data.images.sources"),
    ((*SHARDS, "data.shards.shuffle=false"), "data.shards.buffer=3", "data.shards.shuffle=false"),
    (IMAGES[:2], "data.images.sources.a.path=P data.images.repeats=3", "without data.images.path"),
    (IMAGES, "validation.images.path=V validation.images.flip=true", "held-out pictures"),
    (IMAGES, "validation.images.path=V validation.images.buckets=true", "held-out pictures"),
    (IMAGES, "validation.images.sources.a={path: V, repeats: 2}", "held-out pictures"),
    (IMAGES, "validation.images.min_size=9", "without validation.images.path"),
    (IMAGES, "validation.images.path=V validation.images.caption_lines=random", "its first line"),
    (IMAGES, "validation.images.sources.a.path=V validation.images.caption_lines=random", "first"),
    (IMAGES, "data.pairs.path=P", "set objective=dpo"),
    (PAIRS, "data.images.path=P", "with objective=dpo"),
    (PAIRS, "data.prompts=P", "with objective=dpo"),
    (PAIRS, "validation.images.path=V", "with objective=dpo"),
    (IMAGES, "validation.pairs.path=V", "with objective=supervised"),
    ((*PAIRS, "data.pairs.shuffle=false"), "data.pairs.buffer=9", "data.pairs.shuffle=false"),
    ((*PAIRS, "data.pairs.workers=0"), "data.pairs.prefetch=9", "with data.pairs.workers=0"),
    ((*PAIRS, "data.pairs.crop=random"), "data.pairs.cache=auto", "with data.pairs.crop=random"),
    (IMAGES, "data.pairs.cache=auto", "objective=dpo"),
    (PAIRS, "validation.pairs.path=V validation.pairs.cache=auto", "held-out pictures"),
    (PAIRS, "validation.pairs.ties=keep", "without validation.pairs.path"),
    (PAIRS, "validation.pairs.path=V validation.pairs.flip=true", "held-out pictures"),
    (PAIRS, "reward=clip reward.pretrained=R reward.gradient_checkpointing=true", "objective=dpo"),
    (IMAGES, "data.images.weight=2", "see data.images.sources.NAME.weight"),
    (SHARDS, "data.shards.weight=0.5", "see data.shards.sources.NAME.weight"),
    (IMAGES[:2], "data.images.sources.a.path=P data.images.weight=2", "images.sources.NAME.weight"),
    (IMAGES, "data.verify=true", "without data.shards.path or data.shards.sources"),
    ((*SHARDS, "data.shards.cached=true"), "data.verify=true", "set data.shards.cached=false"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "typed", "why"), IN_VAIN)
def test_what_is_typed_in_vain_is_refused(given: Sequence[str], typed: str, why: str) -> None:
    words = re.split(r" (?=\w+[.=])", typed)
    compose_train([*given, *words[:-1]])
    with pytest.raises(ValueError, match=re.escape(words[-1].split("=")[0])) as caught:
        compose_train([*given, *words])
    assert_explained(str(caught.value), "has no effect", None, why, "leave it out")


@pytest.mark.parametrize(
    ("command", "given", "typed"),
    [
        ("sample", "pretrained=M prompt=p", "column=c"),
        ("sample", "pretrained=M prompt=p", "step=3"),
        ("evaluate", "run=R", "column=c"),
        ("prepare", "out=O pack.path=P", "model.dtype=bfloat16"),
        ("prepare", "out=O pack.path=P", "model.trainable=full"),
        ("prepare", "out=O pack.path=P", "model.lora.rank=2"),
        ("prepare", "out=O pack.path=P", "pack.repeats=2"),
        ("prepare", "out=O pack.path=P", "download.image_size=64"),
        ("prepare", "out=O", "pack.base_path=B"),
        ("prepare", "out=O pack.path=P model.pretrained=M", "model.image_size=64"),
        ("plan", "model.pretrained=M objective=supervised", "objective.snr_gamma=3"),
    ],
)
def test_each_command_refuses_what_it_does_not_read(command: str, given: str, typed: str) -> None:
    compose_command(command, given.split())
    with pytest.raises(
        ValueError, match=f"^{re.escape(typed)}(\\.0)? has no effect .*leave it out"
    ):
        compose_command(command, [*given.split(), typed])


@pytest.mark.parametrize(
    "typed",
    [
        (*DRAFT, "model.lora.rank=32", "training.ema_decay=null", "training.ema_every_steps=1"),
        (*DRAFT, "model.parts=[network,text_encoder]", "model.lora.encoder_targets=[q]"),
        (*DRAFT, "training.ema_decay=0", "training.ema_on_cpu=true"),
        (*DRAFT, "data.images.path=null", "data.images.flip=false"),
        (*IMAGES, *RANDOM, "model.prediction_type=v_prediction", "model.image_size=64"),
        (*IMAGES, "objective.weighting=min_snr", "objective.snr_gamma=3", "data.images.flip=true"),
        (*IMAGES, "data.images.path=null", "data.images.sources.a={path: P, repeats: 2}"),
        ("recipe=sdxl_sft_lora", *IMAGES, "model.trainable=full", "model.lora.targets=null"),
        ("recipe=sd15_sft_lora", *SHARDS),
        (*IMAGES, "validation.images.path=V", "validation.images.caption_lines=all"),
        (*IMAGES[:2], "data.images.sources.a={path: P, weight: 2}"),
        (*SHARDS[:2], "data.shards.sources.a={path: P, weight: 2}", "data.verify=true"),
    ],
)
def test_defaults_and_what_a_recipe_sets_are_no_mistake(typed: Sequence[str]) -> None:
    settings, _ = compose_train(typed)
    assert not set(typed_keys(typed)) & set(unread(settings))


def test_what_a_recipe_sets_in_vain_is_known() -> None:
    settings, _ = compose_train(["recipe=sd15_sft_lora", *SHARDS, "model.trainable=full"])
    assert set(unread(settings)) == {"model.lora.rank", "model.lora.targets", "data.images.flip"}
    with pytest.raises(ValueError, match=r"model\.lora\.rank=4 has no effect with model\.train"):
        refuse_unread(settings, ["model.lora.rank=4"])


def test_what_is_not_read_may_be_another_when_a_run_goes_on(tmp_path: Path) -> None:
    given = [*DRAFT, "model.trainable=full", f"runs_dir={tmp_path}", "model.lora.rank=32"]
    config, plain = compose_train(given)
    folder = RunFolder.of(config)
    (folder.checkpoints / "step-000001").mkdir(parents=True)
    saved = {**plain, "model": {**plain["model"], "lora": {**plain["model"]["lora"], "rank": 8}}}
    write_saved(folder.path, saved)
    prepare_folder(folder, config, plain)
    write_saved(folder.path, {**saved, "optimizer": {**plain["optimizer"], "eps": 1.0}})
    with pytest.raises(ValueError, match=r"other settings \(optimizer\.eps: 1\.0 -> 1e-08\);"):
        prepare_folder(folder, config, plain)
    other = {"kind": "supervised", "timesteps": "uniform"}
    write_saved(folder.path, {**plain, "objective": other})
    with pytest.raises(ValueError, match=r"objective\.kind: supervised -> draft"):
        prepare_folder(folder, config, plain)


SUM = (*DRAFT[:2], "reward=weighted", "reward.parts.x.kind=color")


@pytest.mark.parametrize(
    ("given", "key", "default", "other"),
    [
        (SUM, "reward.parts.x.weight", 1.0, 0.5),
        (SUM, "reward.parts.x.scale", 20.0, 3.0),
        ((*DRAFT, "model.merge.m.path=L"), "model.merge.m.scale", 1.0, 2.0),
        ((*IMAGES[:2], "data.images.sources.a.path=P"), "data.images.sources.a.repeats", 1, 2),
        ((*SHARDS[:2], "data.shards.sources.a.path=P"), "data.shards.sources.a.selection",
         "all", "few"),
    ],
)  # fmt: skip
def test_a_default_of_an_entry_is_the_same_typed_or_not(
    tmp_path: Path, given: Sequence[str], key: str, default: Any, other: Any
) -> None:
    def composed(*more: str) -> tuple[TrainConfig, dict[str, Any]]:
        return compose_train([*given, f"runs_dir={tmp_path}", *more])

    bare, typed, changed = composed(), composed(f"{key}={default}"), composed(f"{key}={other}")
    folder = RunFolder.of(bare[0])
    (folder.checkpoints / "step-000001").mkdir(parents=True)
    for saved, new in ((bare, typed), (typed, bare), (changed, changed)):
        write_saved(folder.path, saved[1])
        prepare_folder(folder, *new)
    for saved, new, said in (
        (bare, changed, f"{default} -> {other}"),
        (typed, changed, f"{default} -> {other}"),
        (changed, bare, f"{other} -> {default}"),
    ):
        write_saved(folder.path, saved[1])
        with pytest.raises(ValueError, match=re.escape(f"other settings ({key}: {said});")):
            prepare_folder(folder, *new)


@pytest.mark.parametrize("kind", ["color", "brightness"])
def test_a_part_of_a_reward_more_or_less_is_another_setting(tmp_path: Path, kind: str) -> None:
    given = [*SUM, f"runs_dir={tmp_path}"]
    one, two = compose_train(given), compose_train([*given, f"reward.parts.y.kind={kind}"])
    folder = RunFolder.of(one[0])
    (folder.checkpoints / "step-000001").mkdir(parents=True)
    for saved, new, said in ((one, two, f"None -> {kind}"), (two, one, f"{kind} -> None")):
        write_saved(folder.path, saved[1])
        with pytest.raises(ValueError, match=rf"\(reward\.parts\.y\.kind: {said}"):
            prepare_folder(folder, *new)


@pytest.mark.parametrize("key", ["nonsense", "data.prompt", "model.lora.rank", "model.autoencoder"])
def test_what_may_have_changed_are_files_that_the_run_names(key: str) -> None:
    named = "model.pretrained, data.prompts"
    with pytest.raises(ValueError, match=rf"allow_changed has '{key}', .* choose among {named}$"):
        compose_train([*DRAFT, f"allow_changed=[data.prompts,{key}]"])
    with pytest.raises(ValueError, match=r"choose among model\.pretrained, data\.images\.path$"):
        compose_train([*IMAGES, f"allow_changed=[{key}]"])
    compose_train([*DRAFT, "allow_changed=[data.prompts,model.pretrained]"])


def test_a_script_may_read_any_setting() -> None:
    typed = ["objective=own", "model.pretrained=M", "model.image_size=64", "data.images.path=P"]
    settings, _ = compose_train([*typed, "data.prompts=P", "model.lora.encoder_targets=[q]"])
    assert unread(settings) == {}


def test_an_empty_dictionary_takes_nothing_out() -> None:
    recipe = ["recipe=demo_finetune", "data.images.path=P"]
    out = ["data.images.sources.new=null", "data.images.sources.old=null"]
    with pytest.raises(ValueError, match=re.escape(f"leave out by name: {' '.join(out)}")):
        compose_train([*recipe, "data.images.sources={}"])
    assert not compose_train([*recipe, *out])[0].data.images.sources
    config, _ = compose_train([*IMAGES, "data.images.sources={}", "model.merge={}"])
    assert not config.model.merge
    with pytest.raises(ValueError, match=r"reward\.parts\.classifier=null"):
        compose_train(["recipe=demo_draft_plus", "reward.parts={}"])


def weighted(*weights: float) -> Callable[[TrainConfig], TrainConfig]:
    parts = {f"p{i}": WeightedPartConfig(ColorRewardConfig(), w) for i, w in enumerate(weights)}
    return lambda config: replace(config, reward=WeightedRewardConfig(parts=parts))


def still(scale: float) -> Callable[[TrainConfig], TrainConfig]:
    return lambda config: replace(config, reward=ColorRewardConfig(scale=scale))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (weighted(0.0), "weight is 0"),
        (weighted(0.0, -0.0), "weight is 0"),
        (weighted(0.0, 0.5), None),
        (weighted(-1.0), None),
        (still(0.0), "reward.scale=0"),
        (still(-3.0), None),
    ],
)
def test_a_reward_that_is_always_the_same_is_refused(
    change: Callable[[TrainConfig], TrainConfig], said: str | None
) -> None:
    config = change(compose_train(DRAFT)[0])
    if said is None:
        check_train(config, 1)
        return
    with pytest.raises(ValueError, match=re.escape(said)):
        check_train(config, 1)


def test_a_penalty_needs_the_frozen_copy() -> None:
    given = [*DRAFT, "model.trainable=full", "model.reference=false"]
    with pytest.raises(ValueError, match=r"objective\.kl_coeff=1\.0 compares .*reference=true"):
        compose_train(given)
    assert not compose_train([*given, "objective.kl_coeff=0"])[0].model.reference


def test_pictures_of_training_are_known_in_validation(tmp_path: Path) -> None:
    train = write_pictures(tmp_path / "train")
    inner = write_pictures(train / "inner")
    others = write_pictures(tmp_path / "others")
    for number, picture in enumerate(sorted(others.glob("*.png"))):
        picture.write_bytes(picture.read_bytes() + bytes([number]))  # after the picture's end
    names = sorted(path.name for path in train.glob("*.png"))
    (others / names[0]).write_bytes((train / names[0]).read_bytes())
    copied, total = len(names), len(names)
    for held_out, repeated in ((train, copied), (inner, copied), (others, 1)):
        run = tmp_path / f"run_{held_out.name}"
        run.mkdir()
        given = ["model.pretrained=M", "objective=supervised", f"data.images.path={train}"]
        config, _ = compose_train([*given, f"validation.images.path={held_out}"])
        contents_of(config, run)
        assert repeated_pictures(config, run) == (repeated, total)
        config, _ = compose_train(given)
        assert repeated_pictures(config, run) == (0, 0)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["a", "b"], ""),
        (["a", "b", "a", "a"], "left out: 2 of 4 prompts, which repeat an earlier one\n"),
        (["a ", "a"], ""),
    ],
)
def test_repeated_prompts_of_an_evaluation_are_said(
    prompts: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distinct(prompts) == sorted(set(prompts), key=prompts.index)
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("model", "way"),
    [
        ("pretrained=M", "model.lora.start=F/export/lora"),
        ("trainable=full pretrained=M", "model.pretrained=F/export/pipeline"),
        (
            "pretrained=null network.config=sd1 autoencoder=A text_encoder=T trainable=full",
            "model.network.from_pretrained=F",
        ),
    ],
)
def test_another_setting_has_a_way_on(model: str, way: str) -> None:
    typed = [f"model.{text}" for text in model.split()]
    config, _ = compose_train([*typed, "data.prompts=P", "reward=color"])
    assert way_on(config, RunFolder(Path("F"))).endswith(f": name=... {way}")


def test_the_demos_prompts_are_shipped() -> None:
    settings, _ = compose_train(["recipe=demo_draft_plus"])
    assert Path(str(settings.data.prompts)).read_text(encoding="utf-8") == write_prompts(0)
    light = ["reward.parts.classifier=null", "reward.parts.light={kind: brightness, weight: 1}"]
    reward: Any = compose_train(["recipe=demo_draft_plus", *light])[0].reward
    assert set(reward.parts) == {"light"}  # as the recipe's head says


def test_help_says_when_a_setting_is_read_and_whether_it_may_change() -> None:
    assert "only with model.trainable=lora" in command_page("train", "model.lora.rank")
    assert "may change when a run goes on" in command_page("train", "training.max_steps")
    assert "may change" not in command_page("train", "optimizer.lr")
    page: Any = command_page("sample")
    assert "docs/settings.md" in page
    assert not re.search(r"objective|reward|recipe", page)
