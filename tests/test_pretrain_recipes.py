"""The recipes of staged pretraining: the numbers of the configuration files that they reproduce."""

import pytest
from hydra import compose, initialize_config_dir

from sfumato.compose import compose_train, register, to_settings
from sfumato.config import CONF, PrepareConfig, TrainConfig
from sfumato.models.origins.network_weights import check_start

TABLE: dict[str, tuple[str, int, int, int, float, int, str]] = {
    # network, pixels, micro batch, steps, caption dropout, warm-up, selection
    "860m_res_256_pretrain": ("sd1", 256, 128, 82_500, 0.0, 10_000, "all"),
    "860m_res_512_v1_1": ("sd1", 512, 32, 50_000, 0.0, 10_000, "min_1024"),
    "860m_res_512_v1_2": ("sd1", 512, 32, 150_000, 0.1, 0, "min_512"),
    "860m_res_512_v1_5": ("sd1", 512, 32, 165_000, 0.1, 0, "min_512"),
    "860m_res_256_v2_0_pretrain": ("sd2", 256, 128, 140_000, 0.0, 10_000, "all"),
    "860m_res_512_v2_0_base": ("sd2", 512, 32, 220_000, 0.1, 0, "min_512"),
}
GIVEN = ["model.autoencoder=A", "model.text_encoder=T", "data.shards.path=D"]
PREPARE = {
    "res_256": ("all", None, 256),
    "res_512_min_1024": ("min_1024", 1024, 512),
    "res_512_min_512": ("min_512", 512, 512),
}


def stage(name: str) -> TrainConfig:
    return compose_train([f"recipe=stable_diffusion/{name}", *GIVEN, "runs_dir=R"])[0]


def test_all_stages_have_a_recipe():
    folder = CONF / "recipe" / "stable_diffusion"
    assert {file.stem for file in folder.glob("*.yaml")} == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_a_stage_has_the_numbers_of_its_configuration_file(name: str):
    settings, (network, pixels, micro, steps, dropout, warmup, selection) = (
        stage(name),
        TABLE[name],
    )
    model, objective, training = settings.model, settings.objective, settings.training
    assert settings.name == name
    assert (model.network.config, model.image_size, model.trainable) == (network, pixels, "full")
    assert (settings.sampler.height, settings.sampler.width) == (pixels, pixels)
    assert (training.micro_batch_size, training.global_batch_size) == (micro, 8192)
    assert training.max_steps == steps
    assert vars(objective)["caption_dropout"] == dropout
    assert (settings.optimizer.warmup_steps, settings.optimizer.schedule) == (warmup, "constant")
    assert (settings.optimizer.lr, settings.optimizer.betas) == (8.192e-5, [0.9, 0.999])
    assert (settings.optimizer.weight_decay, settings.optimizer.max_grad_norm) == (0.0, 1.0)
    assert (training.ema_decay, training.precision, training.compile) == (
        0.9999,
        "bf16",
        "regional",
    )
    assert (model.channels_last, model.prediction_type) == (True, "epsilon")
    assert (settings.data.shards.cached, settings.data.shards.selection) == (True, selection)


@pytest.mark.parametrize("name", TABLE)
def test_a_stage_says_what_must_be_given(name: str):
    recipe = f"recipe=stable_diffusion/{name}"
    needed = "data.shards.path, model.autoencoder, model.text_encoder"
    with pytest.raises(ValueError, match=rf"^missing settings: {needed}; give each"):
        compose_train([recipe])
    text = (CONF / "recipe" / "stable_diffusion" / f"{name}.yaml").read_text()
    head = text.partition("\ndefaults:")[0]
    assert "# Reproduces: " in head and "# Hardware: " in head
    given = ["model.autoencoder", "model.text_encoder", "data.shards.path"]
    assert all(key in head.partition("# Give: ")[2] for key in given)
    assert "not run at this size" in " ".join(head.replace("#", " ").split())


def test_each_stage_starts_from_the_one_before_it():
    before = {name: stage(name).model.network.from_pretrained for name in TABLE}
    assert before == {
        "860m_res_256_pretrain": None,
        "860m_res_512_v1_1": "R/860m_res_256_pretrain",
        "860m_res_512_v1_2": "R/860m_res_512_v1_1",
        "860m_res_512_v1_5": "R/860m_res_512_v1_2",
        "860m_res_256_v2_0_pretrain": None,
        "860m_res_512_v2_0_base": "R/860m_res_256_v2_0_pretrain",
    }
    with pytest.raises(ValueError, match=r"860m_res_512_v1_1' .*give a run folder"):
        check_start(stage("860m_res_512_v1_2").model)


@pytest.mark.parametrize("name", PREPARE)
def test_data_is_prepared_as_the_stages_select_it(name: str):
    register("prepare")
    given = ["out=O", "model.network.config=sd1", "model.autoencoder=A", "model.text_encoder=T"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings: PrepareConfig = to_settings(
            compose("prepare", [f"recipe=prepare/{name}", *given])
        )
    selection, smallest, pixels = PREPARE[name]
    assert (settings.filter.name, settings.filter.min_size) == (selection, smallest)
    assert (settings.precache.height, settings.precache.width) == (pixels, pixels)
    assert settings.precache.dtype == "float16"
    used = {(row[1], row[6]) for row in TABLE.values()}
    assert (pixels, selection) in used
