"""Whole diffusers pipelines with tiny random networks, built without a network connection and without tokenizers."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIZE = 16  # pixels; the autoencoder halves them
TEXT = 16  # width of the prompt embeddings
NO_TEXT_SD3 = dict.fromkeys(
    ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]
)
NO_TEXT_FLUX = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
NO_TEXT = dict.fromkeys(["text_encoder", "tokenizer"])
NO_TEXT_SD = {**NO_TEXT, "safety_checker": None, "feature_extractor": None}


def seeded(make, std, seed=0):
    """The network with weights large enough for state, time and prompt to matter."""
    torch.manual_seed(seed)
    model = make()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def make_vae(channels=4, **config):
    def make():
        return AutoencoderKL(
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=channels,
            norm_num_groups=2,
            scaling_factor=1.0,
            **config,
        )

    return seeded(make, 0.15, seed=1)


def make_dit():
    def make():
        return DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=1000,  # the pipeline takes 1000 for "no class"
            norm_num_groups=1,
        )

    return DiTPipeline(seeded(make, 0.2), make_vae(), DDIMScheduler(), id2label={1: "crane", 2: "drake"})


def make_pixart():
    def make():
        return PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=6,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            cross_attention_dim=12,
            caption_channels=TEXT,
            sample_size=8,
            patch_size=2,
        )

    return PixArtSigmaPipeline(None, None, make_vae(), seeded(make, 0.2), DDIMScheduler())


def make_sd3():
    def make():
        return SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            caption_projection_dim=8,
            pooled_projection_dim=TEXT,
        )

    vae = make_vae(shift_factor=0.0)
    scheduler = FlowMatchEulerDiscreteScheduler()
    return StableDiffusion3Pipeline(seeded(make, 0.15), scheduler, vae, **NO_TEXT_SD3)


def flux_parts():
    def make():
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            pooled_projection_dim=TEXT,
            axes_dims_rope=(2, 2, 4),
        )

    scheduler = FlowMatchEulerDiscreteScheduler()
    return {
        "transformer": seeded(make, 0.15),
        "vae": make_vae(1, shift_factor=0.0),
        "scheduler": scheduler,
        **NO_TEXT_FLUX,
    }


def make_flux():
    return FluxPipeline(**flux_parts())


def make_flux_img2img():
    return FluxImg2ImgPipeline(**flux_parts())


def sd_parts():
    def make():
        return UNet2DConditionModel(
            block_out_channels=(4, 8),
            layers_per_block=1,
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=TEXT,
            attention_head_dim=2,
            norm_num_groups=2,
        )

    parts = {
        "unet": seeded(make, 0.2),
        "vae": make_vae(),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1, **SD_BETAS),
    }
    return {**parts, **NO_TEXT_SD, "requires_safety_checker": False}


def make_sd():
    return StableDiffusionPipeline(**sd_parts())


def make_sd_img2img():
    return StableDiffusionImg2ImgPipeline(**sd_parts())


def embedding(*shape, seed):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def prompts_of(pipe):
    """The arguments that stand for a prompt, in the network's dtype."""
    dtype = network_of(pipe).dtype
    tokens, others = embedding(5, TEXT, seed=1).to(dtype), embedding(5, TEXT, seed=2).to(dtype)
    pooled, no_pooled = embedding(TEXT, seed=3).to(dtype), embedding(TEXT, seed=4).to(dtype)
    if isinstance(pipe, DiTPipeline):
        return {"class_labels": [1]}
    prompts = {"prompt_embeds": tokens, "height": SIZE, "width": SIZE}
    if isinstance(pipe, (FluxPipeline, FluxImg2ImgPipeline)):
        return {**prompts, "pooled_prompt_embeds": pooled}
    prompts |= {"negative_prompt_embeds": others, "guidance_scale": 2.0}
    if isinstance(pipe, StableDiffusion3Pipeline):
        return {**prompts, "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": no_pooled}
    if isinstance(pipe, PixArtSigmaPipeline):
        mask = torch.ones(1, 5)
        masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
        return {**prompts, **masks, "negative_prompt": None, "use_resolution_binning": False}
    if isinstance(pipe, StableDiffusionImg2ImgPipeline):
        prompts.pop("height"), prompts.pop("width")
    return prompts


def network_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


PIPELINES = {"dit": make_dit, "pixart": make_pixart, "sd": make_sd, "sd3": make_sd3, "flux": make_flux}
FITTING = {"dit": "dit-xl-2-256", "pixart": "dit-xl-2-256", "sd3": "flowdcn-b-2-256", "flux": "flowdcn-b-2-256"}
ABSENT = {
    "dit": {},
    "pixart": NO_TEXT,
    "sd": NO_TEXT_SD,
    "sd3": NO_TEXT_SD3,
    "flux": NO_TEXT_FLUX,
}  # for from_pretrained
