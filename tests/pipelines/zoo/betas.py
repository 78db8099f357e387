"""Models with betas: DiT, Stable Diffusion and their like."""

from __future__ import annotations

import diffusers as d

from .parts import (
    DIT_TABLE,
    NO_TEXT,
    NO_TEXT_TWO,
    SIZE,
    TEXT,
    TOKENS,
    WIDE,
    Entry,
    make_vae,
    masked_arguments,
    normal,
    of,
    pictures,
    prompts,
    scaled,
    video,
    with_mask,
    with_picture,
    with_pooled,
    without_size,
)

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FIRST_PART = 0.8  # of the times, in "SDXL base"


def make_dit():
    def make():
        return d.DiTTransformer2DModel(
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

    scheduler = d.DDIMScheduler(clip_sample=False)
    return d.DiTPipeline(scaled(make), make_vae(), scheduler, id2label={1: "crane", 2: "drake"})


def make_pixart():
    def make():
        return d.PixArtTransformer2DModel(
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

    return d.PixArtSigmaPipeline(None, None, make_vae(), scaled(make), d.DPMSolverMultistepScheduler())


def pixart_arguments(pipe, samples):
    return masked_arguments(pipe, samples, negative_prompt=None, use_resolution_binning=False)


UNET = {
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": TEXT,
    "attention_head_dim": 2,
    "norm_num_groups": 2,
}
UNET_UP = {"sample_size": 8, "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}


def unet(**others):
    return scaled(lambda: d.UNet2DConditionModel(**UNET, **UNET_UP, **others))


def sd_parts(in_channels=4, **others):
    return {
        "unet": unet(in_channels=in_channels),
        "vae": make_vae(),
        "scheduler": d.DDIMScheduler(clip_sample=False, steps_offset=1, **SD_BETAS),
        "requires_safety_checker": False,
        **NO_TEXT,
        "safety_checker": None,
        "feature_extractor": None,
        **others,
    }


def sd_controlnet_parts():
    def make():
        return d.ControlNetModel(conditioning_embedding_out_channels=(4, 8), **UNET)

    return sd_parts(controlnet=scaled(make, 0.5))


def pag_arguments(arguments):
    """Three predictions in one call: without a prompt, with it, and with it but without self-attention."""
    return lambda pipe, samples: arguments(pipe, samples) | {"pag_scale": 1.5}


def sdxl_parts(**others):
    network = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + TEXT,
        use_linear_projection=True,
    )
    scheduler = d.EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading", **SD_BETAS)
    return {"unet": network, "vae": make_vae(), "scheduler": scheduler, **NO_TEXT_TWO, **others}


def sdxl_base_arguments(pipe, samples):
    return with_pooled(pipe, samples) | {"denoising_end": FIRST_PART}


def cogvideox_parts():
    def transformer():
        return d.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=4,
            text_embed_dim=TEXT,
            num_layers=1,
            sample_width=WIDE // 8,
            sample_height=WIDE // 8,
            sample_frames=9,
            max_text_seq_length=TOKENS,
        )

    def vae():
        return d.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(4,) * 4,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=0.7,
        )

    scheduler = d.CogVideoXDDIMScheduler(
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        **SD_BETAS,
    )
    return {**NO_TEXT, "vae": scaled(vae, 0.5, seed=1), "transformer": scaled(transformer), "scheduler": scheduler}


def cogvideox_v2v_arguments(pipe, samples):
    return prompts(pipe, samples, WIDE) | {"video": pictures(samples, 9, 3, WIDE, WIDE), "max_sequence_length": TOKENS}


def cogvideox_arguments(pipe, samples):
    return prompts(pipe, samples, WIDE) | {"num_frames": 9, "max_sequence_length": TOKENS}


def make_latte():
    def make():
        return d.LatteTransformer3DModel(
            sample_size=8,
            num_layers=1,
            patch_size=2,
            attention_head_dim=4,
            num_attention_heads=2,
            caption_channels=TEXT,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            video_length=2,
        )

    scheduler = d.DDIMScheduler(clip_sample=False)
    return d.LattePipeline(**NO_TEXT, vae=make_vae(), transformer=scaled(make), scheduler=scheduler)


def latte_arguments(pipe, samples):
    others = {"negative_prompt": None, "video_length": 2, "clean_caption": False, "mask_feature": False}
    return prompts(pipe, samples) | others


def make_animatediff():
    def make():
        return d.UNetMotionModel(
            block_out_channels=(4, 8),
            layers_per_block=1,
            sample_size=8,
            down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
            up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"),
            cross_attention_dim=TEXT,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            norm_num_groups=2,
        )

    scheduler = d.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False, steps_offset=1
    )
    return d.AnimateDiffPipeline(**NO_TEXT, vae=make_vae(), unet=scaled(make), motion_adapter=None, scheduler=scheduler)


def animatediff_arguments(pipe, samples):
    return prompts(pipe, samples) | {"num_frames": 2}


def kandinsky_parts():
    def unet():
        return d.UNet2DConditionModel(
            in_channels=4,
            out_channels=8,
            addition_embed_type="image",
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            block_out_channels=(32, 32),
            layers_per_block=1,
            encoder_hid_dim=TEXT,
            encoder_hid_dim_type="image_proj",
            cross_attention_dim=TEXT,
            attention_head_dim=4,
            resnet_time_scale_shift="scale_shift",
        )

    def movq():
        return d.VQModel(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=4,
            norm_num_groups=2,
            norm_type="spatial",
            num_vq_embeddings=12,
            vq_embed_dim=4,
        )

    scheduler = d.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False, variance_type="learned_range"
    )
    return {"unet": scaled(unet), "scheduler": scheduler, "movq": scaled(movq, seed=1)}


def kandinsky_arguments(pipe, samples):
    embeds = {
        name: normal(pipe, samples, TEXT, seed=3 + i)
        for i, name in enumerate(("image_embeds", "negative_image_embeds"))
    }
    return embeds | {"height": SIZE, "width": SIZE, "guidance_scale": 2.0}


def make_deepfloyd():
    def make():
        return d.UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            in_channels=3,
            out_channels=6,
            cross_attention_dim=TEXT,
            encoder_hid_dim=TEXT,
            attention_head_dim=4,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            resnet_time_scale_shift="scale_shift",
            norm_num_groups=2,
        )

    scheduler = d.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.5,
        clip_sample=False,
        variance_type="learned_range",
    )
    absent_parts = dict.fromkeys(["safety_checker", "feature_extractor", "watermarker"])
    return d.IFPipeline(
        **NO_TEXT, unet=scaled(make), scheduler=scheduler, requires_safety_checker=False, **absent_parts
    )


def deepfloyd_arguments(pipe, samples):
    return prompts(pipe, samples, 8) | {"clean_caption": False}


def make_ddpm():
    def make():
        return d.UNet2DModel(
            sample_size=8,
            block_out_channels=(4, 8),
            layers_per_block=1,
            norm_num_groups=2,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )

    return d.DDPMPipeline(scaled(make), d.DDPMScheduler(clip_sample=False, prediction_type="v_prediction"))


def ddpm_arguments(pipe, samples):
    return {"batch_size": len(samples)}


def dit_arguments(pipe, samples):
    return {"class_labels": [1 + i for i in samples], "guidance_scale": 2.0}


ENTRIES = [
    Entry("DiT", make_dit, dit_arguments, raw="np", table=DIT_TABLE),
    Entry("Stable Diffusion", of(d.StableDiffusionPipeline, sd_parts), prompts),
    Entry(
        "Stable Diffusion img2img",
        of(d.StableDiffusionImg2ImgPipeline, sd_parts),
        with_picture(without_size(prompts)),
        strength=True,
    ),
    Entry(
        "Stable Diffusion inpaint", of(d.StableDiffusionInpaintPipeline, sd_parts), with_mask(prompts), strength=True
    ),
    Entry(
        "Stable Diffusion ControlNet",
        of(d.StableDiffusionControlNetPipeline, sd_controlnet_parts),
        with_picture(prompts),
    ),
    Entry("Stable Diffusion PAG", of(d.StableDiffusionPAGPipeline, sd_parts), pag_arguments(prompts)),
    Entry(
        "InstructPix2Pix",
        of(d.StableDiffusionInstructPix2PixPipeline, sd_parts, in_channels=8),
        with_picture(without_size(prompts)),
    ),
    Entry("SDXL", of(d.StableDiffusionXLPipeline, sdxl_parts), with_pooled),
    Entry("SDXL base", of(d.StableDiffusionXLPipeline, sdxl_parts), sdxl_base_arguments, part=FIRST_PART),
    Entry(
        "SDXL img2img",
        of(d.StableDiffusionXLImg2ImgPipeline, sdxl_parts),
        with_picture(without_size(with_pooled)),
        strength=True,
    ),
    Entry("SDXL inpaint", of(d.StableDiffusionXLInpaintPipeline, sdxl_parts), with_mask(with_pooled), strength=True),
    Entry("SDXL PAG", of(d.StableDiffusionXLPAGPipeline, sdxl_parts), pag_arguments(with_pooled)),
    Entry("PixArt-Sigma", make_pixart, pixart_arguments, table=DIT_TABLE),
    Entry("Latte", make_latte, latte_arguments, table=DIT_TABLE, **video(2, SIZE)),
    Entry("CogVideoX", of(d.CogVideoXPipeline, cogvideox_parts), cogvideox_arguments, **video(9, WIDE)),
    Entry(
        "CogVideoX video-to-video",
        of(d.CogVideoXVideoToVideoPipeline, cogvideox_parts),
        cogvideox_v2v_arguments,
        strength=True,
        **video(9, WIDE),
    ),
    Entry("AnimateDiff", make_animatediff, animatediff_arguments, **video(2, SIZE)),
    Entry("Kandinsky 2.2", of(d.KandinskyV22Pipeline, kandinsky_parts), kandinsky_arguments),
    Entry(
        "Kandinsky 2.2 img2img",
        of(d.KandinskyV22Img2ImgPipeline, kandinsky_parts),
        with_picture(kandinsky_arguments),
        strength=True,
    ),
    Entry("DeepFloyd IF", make_deepfloyd, deepfloyd_arguments, (8, 8, 3), raw="pt"),
    Entry("DDPM", make_ddpm, ddpm_arguments, (8, 8, 3), raw="np", half=False, table=DIT_TABLE),
]
