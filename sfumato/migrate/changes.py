"""Values that mean something else here: each function gives settings of ours for a key of theirs.

A function takes the value and all values of the config, by key. It raises a ValueError with the
reason where there is nothing here for the value.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Settings: TypeAlias = dict[str, Any]
Values: TypeAlias = Mapping[str, Any]

PROCESSES = "--processes"  # a value beside theirs: the number of GPUs that their config ran on
CHOICES = {
    "precision": (
        "training.precision",
        {
            "bf16": ("bf16", "bf16-mixed", "bf16-true"),
            "fp16": ("16", "16-mixed", "fp16"),
            "no": ("32", "32-true", "no", "None"),
        },
    ),
    "dtype": (
        "reward.dtype",
        {"float32": ("32",), "bfloat16": ("bf16", "bf16-mixed"), "float16": ("16", "16-mixed")},
    ),
    "cache_dtype": ("precache.dtype", {"float16": ("16",), "float32": ("32",)}),
    "trainable": ("model.trainable", {"lora": ("sdlora",), "full": ("None", "none")}),
    "use_lora": ("model.trainable", {"lora": ("True",), "full": ("False",)}),
    "parameterization": ("model.prediction_type", {"epsilon": ("eps",), "v_prediction": ("v",)}),
    "solver": ("sampler.solver", {"first_order": ("DDIM", "EulerEDMSampler")}),
    "schedule": (
        "optimizer.schedule",
        {
            "constant": ("WarmupHoldPolicy",),
            "cosine": ("CosineAnnealing",),
            "linear": ("LinearAnnealing", "WarmupAnnealing"),
        },
    ),
    "inductor": ("training.compile", {"regional": ("True",), "none": ("False",)}),
    "adam_bits": ("optimizer.kind", {"adamw": ("False",), "adamw_8bit": ("True",)}),
    "fsdp": ("training.strategy", {"fsdp": ("True",), "ddp": ("False",)}),
    "unet": ("model.network.config", {"sd1": ("768",), "sd2": ("1024",)}),
    "validation": ("validation.every_steps", {0: ("0",)}),
}
OPEN_CLIP = {("ViT-H-14", "laion2b_s32b_b79k"): "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}


def choose(name: str, value: Any) -> Settings:
    """Return the setting of a table of choices."""
    key, choices = CHOICES[name]
    for ours, theirs in choices.items():
        if str(value) in theirs:
            return {key: ours}
    known = ", ".join(theirs for each in choices.values() for theirs in each)
    raise ValueError(f"known are {known}")


def ema(value: Any, values: Values) -> Settings:
    on = values.get("exp_manager.ema.enable")
    return {"training.ema_decay": values.get("exp_manager.ema.decay") if on else None}


def wandb(value: Any, values: Values) -> Settings:
    on = values.get("exp_manager.create_wandb_logger")
    return {"training.wandb_project": value if on else None}


def clip(value: Any, values: Values) -> Settings:
    return {"optimizer.max_grad_norm": value or 1e9}


def parts(value: Any, values: Values) -> Settings:
    return {"model.parts": ["network", "text_encoder"]} if value else {}


def unet_file(value: Any, values: Values) -> Settings:
    if value is None:
        return {}
    network = choose("unet", values.get("model.unet_config.context_dim"))
    return {"model.pretrained": None, "model.network.from_pretrained": value, **network}


def text_encoder(value: Any, values: Values) -> Settings:
    arch = values.get("model.cond_stage_config.arch")
    if arch is not None and (arch, value) not in OPEN_CLIP:
        raise ValueError(f"the folder of {arch}, {value} is not known")
    return {"model.text_encoder": value if arch is None else OPEN_CLIP[arch, value]}


def steps(value: Any, values: Values) -> Settings:
    if not isinstance(value, int) or value < 1:
        raise ValueError("it is no number of steps")
    return {"training.max_steps": value}


def passes(value: Any, values: Values) -> Settings:
    if value == 1_000_000:  # as published
        raise ValueError("the run ends after trainer.draftp_sd.max_epochs passes over the prompts")
    return steps(value, values)


def val_images(value: Any, values: Values) -> Settings:
    batch = values.get("model.global_batch_size")
    if not isinstance(value, int) or not isinstance(batch, int) or value * batch < 1:
        raise ValueError("it is no number of batches")
    return {"validation.num_images": value * batch}


def side(value: Any, values: Values) -> Settings:
    return {"sampler.height": value, "sampler.width": value, "model.image_size": value}


def crop(value: Any, values: Values) -> Settings:
    sides = value if isinstance(value, list) else str(value).split(",")
    if len(sides) != 2:
        raise ValueError("it is not two numbers of pixels")
    return {"sampler.height": sides[0], "sampler.width": sides[1]}


# --- TRL


def run_name(value: Any, values: Values) -> Settings:
    return {"name": value} if value else {}


def log_with(value: Any, values: Values) -> Settings:
    if values["log_with"] not in (None, "wandb", "tensorboard"):
        raise ValueError("known are wandb and tensorboard")
    project = values["tracker_project_name"] if values["log_with"] == "wandb" else None
    board = values["log_with"] == "tensorboard"
    return {"training.tensorboard": board, "training.wandb_project": project}


def mixed_precision(value: Any, values: Values) -> Settings:
    precision = choose("precision", value)
    frozen = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}
    return {**precision, "model.dtype": frozen[precision["training.precision"]]}


def batch(value: Any, values: Values) -> Settings:
    return {"training.global_batch_size": _update(values) * values[PROCESSES]}


def betas(value: Any, values: Values) -> Settings:
    return {"optimizer.betas": [values["train_adam_beta1"], values["train_adam_beta2"]]}


def epochs(value: Any, values: Values) -> Settings:
    return {"training.max_steps": _epoch(values, "num_epochs")}


def save_freq(value: Any, values: Values) -> Settings:
    return {"training.checkpoint_every_steps": _epoch(values, "save_freq")}


def batches(value: Any, values: Values) -> Settings:
    return {"objective.batches": _collection(values)}


def eta(value: Any, values: Values) -> Settings:
    return {"objective.eta": value, "sampler.eta": value}


def fraction(value: Any, values: Values) -> Settings:
    trained = int(_product(values, "sample_num_steps") * value)
    return {"objective.trained_steps": None if value == 1 else trained}


def statistics(value: Any, values: Values) -> Settings:
    return {"objective.statistics": "prompt"}


def truncation(value: Any, values: Values) -> Settings:
    total = _product(values, "sample_num_steps")
    if not values["truncated_backprop_rand"]:
        kept = max(1, total - values["truncated_backprop_timestep"])
        return {"objective.truncation_steps": min(kept, total)}
    low, high = values["truncated_rand_backprop_minmax"]
    bounds = [min(total, max(1, total - end)) for end in (high, low)]
    return {"objective.truncation_range": bounds}


def _product(values: Values, *keys: str) -> int:
    numbers = [values[key] for key in keys]
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        raise ValueError(f"{' and '.join(keys)} are not whole numbers above 0")
    return math.prod(numbers)


def _update(values: Values) -> int:
    """Return the images of a process in one step of the optimiser."""
    return _product(values, "train_batch_size", "train_gradient_accumulation_steps")


def _collection(values: Values) -> int:
    """Return the steps that one pass over the images of an epoch takes."""
    images = _product(values, "sample_batch_size", "sample_num_batches_per_epoch")
    if images % _update(values):
        raise ValueError(
            f"{images} images of an epoch are no whole number of steps of {_update(values)}"
        )
    return images // _update(values)


def _epoch(values: Values, key: str) -> int:
    """Return a number of epochs in steps; AlignProp has one an epoch."""
    if "sample_num_batches_per_epoch" not in values:
        return _product(values, key)
    return _collection(values) * _product(values, key, "train_num_inner_epochs")


CHANGES: dict[str, Callable[[Any, Values], Settings]] = {
    each.__name__: each
    for each in (
        *(ema, wandb, clip, parts, unet_file, text_encoder, steps, passes, val_images, side),
        *(crop, run_name, log_with, mixed_precision, batch, betas, epochs),
        *(save_freq, batches, eta, fraction, statistics, truncation),
    )
}


def change(name: str, value: Any, values: Values) -> Settings:
    """Return settings of ours for a value of theirs.

    Raises:
        ValueError: saying why there are none.
    """
    try:
        return CHANGES[name](value, values) if name in CHANGES else choose(name, value)
    except (TypeError, KeyError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"it does not fit the values beside it ({error})") from error
