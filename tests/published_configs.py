"""Keys and values of configs that others published: NeMo-Aligner, NeMo, TRL.

Each line is a dotted key and its value, as YAML; without a value it is null.
"""

from pathlib import Path
from typing import Any

import yaml

TRAINER = """
trainer.devices 1
trainer.num_nodes 1
trainer.accelerator gpu
trainer.logger false
trainer.enable_checkpointing false
trainer.log_every_n_steps 10
trainer.accumulate_grad_batches 1
trainer.benchmark false
trainer.enable_model_summary true
exp_manager.exp_dir
exp_manager.name ${name}
exp_manager.create_wandb_logger false
exp_manager.wandb_logger_kwargs.project stable-diffusion
exp_manager.wandb_logger_kwargs.name ${name}
exp_manager.wandb_logger_kwargs.resume true
exp_manager.create_checkpoint_callback true
exp_manager.create_tensorboard_logger true
exp_manager.checkpoint_callback_params.every_n_train_steps 1000
exp_manager.checkpoint_callback_params.every_n_epochs 0
exp_manager.checkpoint_callback_params.monitor reduced_train_loss
exp_manager.checkpoint_callback_params.filename '${name}--{reduced_train_loss:.2f}-{step}'
exp_manager.resume_if_exists true
exp_manager.resume_ignore_no_checkpoint true
exp_manager.ema.enable true
exp_manager.ema.decay 0.9999
exp_manager.ema.validate_original_weights false
exp_manager.ema.every_n_steps 1
exp_manager.ema.cpu_offload false
model.precision ${trainer.precision}
model.micro_batch_size 1
model.global_batch_size 1
model.seed 1234
model.resume_from_checkpoint
model.apex_transformer_log_level 30
model.gradient_as_bucket_view true
model.scale_by_std false
model.inductor false
model.optim.name fused_adam
model.optim.lr 1e-4
model.optim.weight_decay 0.0
model.optim.betas [0.9, 0.999]
model.optim.sched.name WarmupHoldPolicy
model.optim.sched.warmup_steps 10000
model.optim.sched.hold_steps 10000000000000
model.nsys_profile.enabled false
model.nsys_profile.start_step 10
model.nsys_profile.end_step 10
model.nsys_profile.ranks [0]
model.nsys_profile.gen_shape false
model.data.webdataset.infinite_sampler false
model.data.webdataset.local_root_path
"""
UNET = """
model.unet_config._target_ nemo.collections.UNetModel
model.unet_config.from_pretrained
model.unet_config.from_NeMo true
model.unet_config.image_size 32
model.unet_config.in_channels 4
model.unet_config.out_channels 4
model.unet_config.model_channels 320
model.unet_config.num_res_blocks 2
model.unet_config.use_spatial_transformer true
model.unet_config.use_checkpoint false
model.unet_config.legacy false
model.unet_config.use_flash_attention false
model.first_stage_config._target_ nemo.collections.AutoencoderKL
model.first_stage_config.from_pretrained
model.first_stage_config.embed_dim 4
model.first_stage_config.monitor val/rec_loss
model.first_stage_config.ddconfig.double_z true
model.first_stage_config.ddconfig.z_channels 4
model.first_stage_config.ddconfig.resolution 256
model.first_stage_config.ddconfig.in_channels 3
model.first_stage_config.ddconfig.out_ch 3
model.first_stage_config.ddconfig.ch 128
model.first_stage_config.ddconfig.ch_mult [1, 2, 4, 4]
model.first_stage_config.ddconfig.num_res_blocks 2
model.first_stage_config.ddconfig.attn_resolutions []
model.first_stage_config.ddconfig.dropout 0.0
model.first_stage_config.lossconfig.target torch.nn.Identity
"""
SD = """
model.linear_start 0.00085
model.linear_end 0.012
model.num_timesteps_cond 1
model.log_every_t 200
model.timesteps 1000
model.first_stage_key images
model.cond_stage_key captions
model.image_size 64
model.channels 4
model.cond_stage_trainable false
model.conditioning_key crossattn
model.monitor val/loss_simple_ema
model.scale_factor 0.18215
model.use_ema false
model.ckpt_path
model.ignore_keys []
model.parameterization eps
model.clip_denoised true
model.load_only_unet false
model.cosine_s 8e-3
model.given_betas
model.original_elbo_weight 0
model.v_posterior 0
model.l_simple_weight 1
model.use_positional_encodings false
model.learn_logvar false
model.logvar_init 0
model.beta_schedule linear
model.loss_type l2
model.concat_mode true
model.cond_stage_forward
model.text_embedding_dropout_rate 0.1
model.fused_opt true
model.inductor_cudagraphs false
model.unet_config.attention_resolutions [4, 2, 1]
model.unet_config.channel_mult [1, 2, 4, 4]
model.unet_config.num_heads 8
model.unet_config.transformer_depth 1
model.unet_config.context_dim 768
model.cond_stage_config._target_ nemo.collections.FrozenCLIPEmbedder
model.cond_stage_config.device cuda
"""
PEFT = """
model.peft.peft_scheme sdlora
model.peft.restore_from_path
model.peft.lora_tuning.adapter_dim 32
model.peft.lora_tuning.adapter_dropout 0.0
model.peft.lora_tuning.column_init_method xavier
model.peft.lora_tuning.row_init_method zero
model.peft.lora_tuning.layer_selection
model.peft.lora_tuning.weight_tying false
model.peft.lora_tuning.position_embedding_strategy
"""
DRAFTP = """
trainer.precision bf16
trainer.draftp_sd.val_check_interval 1
trainer.draftp_sd.limit_val_batches 1
trainer.draftp_sd.save_interval 500
trainer.draftp_sd.gradient_clip_val 10
trainer.draftp_sd.max_epochs 1
trainer.draftp_sd.max_steps 1000000
trainer.max_epochs 50000000
trainer.max_steps 50
trainer.log_every_n_steps 1
trainer.val_check_interval 20
exp_manager.explicit_log_dir
exp_manager.wandb_logger_kwargs.project NeMo-draft
exp_manager.wandb_logger_kwargs.resume false
exp_manager.checkpoint_callback_params.every_n_train_steps 50
reward_model pickscore
pretrained_checkpoint.restore_from_path
model.restore_from_path
model.kl_coeff 1.0
model.truncation_steps 1
model.data.dataloader_type single
model.data.num_workers 1
model.data.shuffle_data false
model.data.train.dataset_path [null]
model.data.validation.dataset_path [null]
model.peft.lora_tuning.network_alpha
rm.trainer.devices 1
rm.trainer.num_nodes 1
rm.trainer.accelerator gpu
rm.trainer.logger false
rm.trainer.precision 32
rm.model.restore_from_path
rm.model.precision ${trainer.precision}
"""
DRAFTP_SD = """
name sd_draftp_train
model.global_batch_size 4
model.infer.unconditional_guidance_scale 7.5
model.infer.num_images_per_prompt 1
model.infer.height 512
model.infer.width 512
model.infer.down_factor 8
model.infer.inference_steps 50
model.infer.sampler_type DDIM
model.infer.eta 0
model.infer.output_type pil
model.infer.save_to_file false
model.infer.out_path stable-diffusion
model.infer.seed 123
model.infer.prompts [hammerhead]
model.trainer.precision ${trainer.precision}
model.unet_config.enable_amp_o2_fp16 false
model.unet_config.resblock_gn_groups 32
model.unet_config.lora_network_alpha
model.cond_stage_config.version openai/clip-vit-large-patch14
model.cond_stage_config.max_length 77
model.optim.sched.warmup_steps 10
"""
XL = """
model.scale_factor 0.13025
model.disable_first_stage_autocast true
model.is_legacy false
model.capture_cudagraph_iters -1
model.channels_last false
model.fsdp true
model.fsdp_set_buffer_dtype
model.precache_mode
model.loss_fn_config._target_ nemo.collections.StandardDiffusionLoss
model.loss_fn_config.sigma_sampler._target_ nemo.collections.DiscreteSampling
model.loss_fn_config.sigma_sampler.num_idx 1000
model.loss_fn_config.sigma_sampler.discretization._target_ nemo.collections.LegacyDDPMDiscretization
model.denoiser_config._target_ nemo.collections.DiscreteDenoiser
model.denoiser_config.num_idx 1000
model.denoiser_config.weighting_config._target_ nemo.collections.EpsWeighting
model.denoiser_config.scaling_config._target_ nemo.collections.EpsScaling
model.denoiser_config.discretization_config._target_ nemo.collections.LegacyDDPMDiscretization
model.unet_config.adm_in_channels 2816
model.unet_config.num_classes sequential
model.unet_config.attention_resolutions [4, 2]
model.unet_config.channel_mult [1, 2, 4]
model.unet_config.num_head_channels 64
model.unet_config.use_linear_in_transformer true
model.unet_config.transformer_depth [1, 2, 10]
model.unet_config.context_dim 2048
model.unet_config.image_size 64
model.unet_config.use_flash_attention true
model.first_stage_config.ddconfig.attn_type vanilla
model.conditioner_config._target_ nemo.collections.GeneralConditioner
model.conditioner_config.emb_models [
  {is_trainable: false, input_key: captions, ucg_rate: 0.1,
   emb_model: {_target_: nemo.collections.FrozenCLIPEmbedder, layer: hidden, layer_idx: 11}},
  {is_trainable: false, input_key: captions, ucg_rate: 0.1,
   emb_model: {_target_: nemo.collections.FrozenOpenCLIPEmbedder2, arch: ViT-bigG-14,
    version: laion2b_s39b_b160k, freeze: true, layer: penultimate, always_return_pooled: true,
    legacy: false}},
  {is_trainable: false, ucg_rate: 0.1, input_key: original_size_as_tuple,
   emb_model: {_target_: nemo.collections.ConcatTimestepEmbedderND, outdim: 256}},
  {is_trainable: false, ucg_rate: 0.1, input_key: crop_coords_top_left,
   emb_model: {_target_: nemo.collections.ConcatTimestepEmbedderND, outdim: 256}},
  {is_trainable: false, ucg_rate: 0.1, input_key: target_size_as_tuple,
   emb_model: {_target_: nemo.collections.ConcatTimestepEmbedderND, outdim: 256}}]
"""
DRAFTP_SDXL = """
name sdxl_draftp_train
model.sampling.base.sampler EulerEDMSampler
model.sampling.base.width 1024
model.sampling.base.height 1024
model.sampling.base.steps 40
model.sampling.base.discretization LegacyDDPMDiscretization
model.sampling.base.guider VanillaCFG
model.sampling.base.thresholder None
model.sampling.base.scale 5.0
model.sampling.base.img2img_strength 1.0
model.sampling.base.sigma_min 0.0292
model.sampling.base.sigma_max 14.6146
model.sampling.base.rho 3.0
model.sampling.base.s_churn 0.0
model.sampling.base.s_tmin 0.0
model.sampling.base.s_tmax 999.0
model.sampling.base.s_noise 1.0
model.sampling.base.eta 1.0
model.sampling.base.order 4
model.sampling.base.orig_width 1024
model.sampling.base.orig_height 1024
model.sampling.base.crop_coords_top 0
model.sampling.base.crop_coords_left 0
model.sampling.base.aesthetic_score 5.0
model.sampling.base.negative_aesthetic_score 5.0
model.first_stage_config.from_NeMo true
"""
TRAIN = """
trainer.precision 16
trainer.use_distributed_sampler false
trainer.max_epochs 2
trainer.max_steps -1
trainer.gradient_clip_val 1.0
trainer.limit_val_batches 0
exp_manager.wandb_logger_kwargs.group nemo-sd
model.capture_cudagraph_iters -1
model.data.num_workers 16
model.data.train.dataset_path [/datasets/coyo/test.pkl]
model.data.train.augmentations.resize_smallest_side 512
model.data.train.augmentations.horizontal_flip false
model.data.train.filterings
model.data.webdataset.local_root_path /datasets/coyo
"""
SD_TRAIN = """
name stable-diffusion-train
exp_manager.resume_from_checkpoint ${model.resume_from_checkpoint}
model.native_amp_init_scale 65536.0
model.channels_last true
model.ddp_overlap true
model.unet_config.enable_amp_o2_fp16 false
model.unet_config.resblock_gn_groups 32
model.unet_config.use_te_fp8 true
model.first_stage_config.from_pretrained /ckpts/vae.bin
model.cond_stage_config._target_ nemo.collections.FrozenMegatronCLIPEmbedder
model.cond_stage_config.restore_from_path /ckpts/openai.nemo
model.cond_stage_config.freeze true
model.cond_stage_config.layer last
model.optim.lr
model.data.synthetic_data false
model.data.synthetic_data_length 10000
model.data.train.augmentations.center_crop_h_w 512, 512
"""
SD2 = """
name stable-diffusion2-train
trainer.max_epochs -1
trainer.max_steps 140000
model.micro_batch_size 4
model.global_batch_size 16
model.inductor true
model.unet_config.from_NeMo
model.unet_config.num_head_channels 64
model.unet_config.use_linear_in_transformer true
model.unet_config.context_dim 1024
model.first_stage_config.from_pretrained
model.cond_stage_config.layer penultimate
model.optim.lr 1e-4
"""
STAGE = """
run.name stable_diffusion_860m
run.results_dir ${base_results_dir}/${.name}
run.time_limit 3-12:00:00
run.dependency singleton
name nemo_stable_diffusion
trainer.devices 8
trainer.num_nodes 32
trainer.precision bf16-mixed
trainer.max_epochs -1
exp_manager.explicit_log_dir ${training.run.results_dir}/results
model.precision ${training.trainer.precision}
model.micro_batch_size 32
model.global_batch_size 8192
model.inductor true
model.unet_config.from_pretrained /path/to/before.ckpt
model.seed 666
model.optim.lr 0.00008192
model.optim.sched.warmup_steps 0
model.data.train.dataset_path ['${data_dir}/your_dataset/wdinfo.pkl']
model.data.webdataset.infinite_sampler true
model.data.webdataset.local_root_path ${data_dir}/your_dataset/tarfiles_reorganized/
"""
FILTERED = """
model.data.train.filterings.resolution.method larger
model.data.train.filterings.resolution.value 512
model.data.train.filterings.estimated_portion 0.5
"""
PRETRAIN = """
trainer.num_nodes 8
model.micro_batch_size 128
model.text_embedding_dropout_rate 0
model.unet_config.from_pretrained
model.optim.sched.warmup_steps 10000
model.data.train.augmentations.resize_smallest_side 256
model.data.train.augmentations.center_crop_h_w 256, 256
"""
XL_TRAIN = """
name stable-diffusion-xl-train
trainer.precision bf16-mixed
trainer.max_epochs -1
exp_manager.checkpoint_callback_params.every_n_train_steps 10000
exp_manager.ema.enable false
model.data.train.augmentations.resize_smallest_side 256
model.first_stage_config.from_pretrained /sdxl/vae/diffusion_pytorch_model.safetensors
"""
PRECACHE = """
batch_size_per_GPU 64
dataloader_num_workers 16
save_original_in_tar
encodings [
  {modality: image, extension: jpg, key: autoencoderkl_image, precision: 16,
   encoder_config: {cls: nemo.collections.AutoencoderKL, from_pretrained: /path/to/encoder,
    embed_dim: 4, ddconfig: {double_z: true, z_channels: 4, resolution: 256, in_channels: 3,
     out_ch: 3, ch: 128, ch_mult: [1, 2, 4, 4], num_res_blocks: 2, attn_resolutions: [],
     dropout: 0.0}, lossconfig: {target: torch.nn.Identity}}},
  {modality: text, extension: txt, key: clip-vit-large-patch14_text, precision: 32,
   store_pad_tokens: true, encoder_config: {cls: nemo.collections.FrozenCLIPEmbedder,
    version: openai/clip-vit-large-patch14, device: cuda, max_length: 77, use_fp16: true}}]
lightning.devices 8
lightning.num_nodes 1
lightning.max_epochs 1
lightning.precision 16
lightning.accelerator gpu
lightning.enable_checkpointing false
lightning.strategy ddp
"""
FIRST = (TRAINER, UNET, SD)
STAGES = (*FIRST, TRAIN, SD_TRAIN, STAGE)
SD2_UNET = """
model.unet_config.num_head_channels 64
model.unet_config.use_linear_in_transformer true
model.unet_config.context_dim 1024
model.cond_stage_config.layer penultimate
"""
YAML = {
    "draftp_sd": (*FIRST, PEFT, DRAFTP, DRAFTP_SD),
    "draftp_sdxl": (TRAINER, UNET, PEFT, DRAFTP, XL, DRAFTP_SDXL),
    "sd_train": (*FIRST, TRAIN, SD_TRAIN),
    "sd2_train": (*FIRST, TRAIN, SD_TRAIN, SD2),
    "sd_lora_train": (
        *(*FIRST, TRAIN, SD_TRAIN, PEFT),
        "model.optim.lr 1e-4\nmodel.optim.sched.warmup_steps 1",
        "model.unet_config.from_pretrained /ckpts/nemo-v1-2.ckpt",
        "model.unet_config.lora_network_alpha",
    ),
    "sd_xl_base_train": (TRAINER, UNET, TRAIN, XL, XL_TRAIN),
    "860m_res_256_pretrain": (*STAGES, PRETRAIN, "trainer.max_steps 82500"),
    "860m_res_512_v1_1": (
        *(*STAGES, FILTERED, "trainer.max_steps 50000"),
        "model.text_embedding_dropout_rate 0\nmodel.optim.sched.warmup_steps 10000",
        "model.data.train.filterings.resolution.value 1024",
    ),
    "860m_res_512_v1_2": (*(*STAGES, FILTERED, "trainer.max_steps 150000\ntrainer.precision 16"),),
    "860m_res_512_v1_5": (*STAGES, FILTERED, "trainer.max_steps 165000"),
    "860m_res_256_v2_0_pretrain": (*STAGES, PRETRAIN, SD2_UNET, "trainer.max_steps 140000"),
    "860m_res_512_v2_0_base": (*STAGES, FILTERED, SD2_UNET, "trainer.max_steps 220000"),
    "precache_sd": (PRECACHE,),
}
SHARED = {
    "exp_name": "script",
    "run_name": "",
    "seed": 0,
    "log_with": None,
    "tracker_kwargs": {},
    "accelerator_kwargs": {},
    "project_kwargs": {},
    "tracker_project_name": "trl",
    "logdir": "logs",
    "num_epochs": 100,
    "save_freq": 1,
    "num_checkpoint_limit": 5,
    "mixed_precision": "fp16",
    "allow_tf32": True,
    "resume_from": "",
    "sample_num_steps": 50,
    "sample_eta": 1.0,
    "sample_guidance_scale": 5.0,
    "train_batch_size": 1,
    "train_use_8bit_adam": False,
    "train_adam_beta1": 0.9,
    "train_adam_beta2": 0.999,
    "train_adam_weight_decay": 1e-4,
    "train_adam_epsilon": 1e-8,
    "train_gradient_accumulation_steps": 1,
    "train_max_grad_norm": 1.0,
    "push_to_hub": False,  # since 0.13
}
# The keywords of TRL 0.9.6, 0.11.4, 0.13.0 and 0.16.1, with their defaults, which are the same.
PYTHON: dict[str, dict[str, Any]] = {
    "AlignPropConfig": {
        **SHARED,
        "log_image_freq": 1,
        "train_learning_rate": 1e-3,
        "negative_prompts": None,
        "truncated_backprop_rand": True,
        "truncated_backprop_timestep": 49,
        "truncated_rand_backprop_minmax": (0, 50),
    },
    "DDPOConfig": {
        **SHARED,
        "sample_batch_size": 1,
        "sample_num_batches_per_epoch": 2,
        "train_learning_rate": 3e-4,
        "train_num_inner_epochs": 1,
        "train_cfg": True,
        "train_adv_clip_max": 5.0,
        "train_clip_range": 1e-4,
        "train_timestep_fraction": 1.0,
        "per_prompt_stat_tracking": False,
        "per_prompt_stat_tracking_buffer_size": 16,
        "per_prompt_stat_tracking_min_count": 16,
        "async_reward_computation": False,
        "max_workers": 2,
        "negative_prompts": "",
    },
}


def published(name: str) -> dict[str, Any]:
    """Return the flat keys and values of a published YAML config; null without a value."""
    values: dict[str, Any] = {}
    for line in "\n".join(YAML[name]).replace("\n  ", " ").replace("\n   ", " ").splitlines():
        key, _, text = line.partition(" ")
        if key:
            # An emptied mapping, such as filterings, gives way to the keys in it.
            values.pop(key.rpartition(".")[0].removesuffix(".resolution"), None)
            values[key] = yaml.safe_load(text) if text[:1] in "['" or " " not in text else text
    return values


def write_yaml(file: Path, values: dict[str, Any]) -> Path:
    """Write flat values as nested YAML; 1e-4 stays as it is published, without a point."""
    content: dict[str, Any] = {}
    for key, value in values.items():
        *sections, last = key.split(".")
        node = content
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def write_call(file: Path, name: str, values: dict[str, Any], before: str = "") -> Path:
    """Write a call of a config with keywords in a Python file."""
    keywords = "".join(f"    {key}={value!r},\n" for key, value in values.items())
    file.write_text(f"from trl import {name}\n\n{before}config = {name}(\n{keywords})\n")
    return file
