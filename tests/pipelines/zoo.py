"""One entry per diffusers pipeline: tiny random networks and the stock scheduler of the family, all built offline.

Prompts enter as embeddings, so that no text encoder is needed. Sample `i` has its own prompt, picture and generator,
whichever batch it is drawn in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers as d
import torch

SIZE = 16  # pixels; the autoencoder halves them
TEXT = 16  # width of the prompt embeddings
TOKENS = 5
WIDE = 32  # pixels where a pipeline wants multiples of 32
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NO_TEXT = dict.fromkeys(["text_encoder", "tokenizer"])
NO_TEXT_SD = {**NO_TEXT, "safety_checker": None, "feature_extractor": None}
NO_TEXT_TWO = {**NO_TEXT, **dict.fromkeys(["text_encoder_2", "tokenizer_2"])}  # SDXL, FLUX
NO_TEXT_SD3 = {**NO_TEXT_TWO, **dict.fromkeys(["text_encoder_3", "tokenizer_3"])}
FIRST_PART = 0.8  # of the times, in "SDXL base"


@dataclass(frozen=True)
class Entry:
    """A pipeline, how to call it, and what to expect of it.

    make: the pipeline with its family's stock scheduler.
    arguments: (pipe, samples) -> keyword arguments other than steps, generator and output type.
    shape: of one decoded sample, channels last.
    calls: of the network in one step.
    result: the attribute of the output.
    raw: the output type that nothing clips, where there is one.
    half: whether the pipeline itself runs in bfloat16.
    strength: whether it takes a picture and a strength.
    table: the published solver that belongs to these betas, or to any flow model.
    part: of the times, that this call takes.
    own_grid: whether the pipeline passes linear-quadratic sigmas, in whose place the scheduler puts its own.
    """

    name: str
    make: Callable[[], Any]
    arguments: Callable[[Any, Sequence[int]], dict[str, Any]]
    shape: tuple[int, ...] = (SIZE, SIZE, 3)
    calls: int = 1
    result: str = "images"
    raw: str = "latent"
    half: bool = True
    strength: bool = False
    table: str | None = None
    part: float = 1.0
    own_grid: bool = False


def scaled(make, gain=1.0, seed=0):
    """The network with weights that keep the size of what passes through, so that state, time and prompt matter.

    The fast waves of the time embedding are damped: a trained network is smooth in time. A rough one would tell
    apart times that are one in bfloat16, and solvers of every order would agree badly.
    """
    torch.manual_seed(seed)
    model = make()
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
        else:
            torch.nn.init.normal_(parameter, std=gain / parameter[0].numel() ** 0.5)
        if re.search(r"(time|guidance)\w*\.linear_1\.weight$", name):
            slowness = torch.linspace(0, 1, parameter.shape[1] // 2) ** 2
            parameter.data *= 2 * slowness.repeat(2)
    return model.eval()


def make_vae(channels=4, levels=2, **config):
    def make():
        return d.AutoencoderKL(
            block_out_channels=(4,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=channels,
            norm_num_groups=2,
            scaling_factor=1.0,
            **config,
        )

    return scaled(make, 0.5, seed=1)


def network_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def absent(pipe) -> dict[str, None]:
    """The keyword arguments that `from_pretrained` wants for components that are not there."""
    return {name: None for name, part in pipe.components.items() if part is None}


# --- arguments -----------------------------------------------------------------------------------------------------


def generators(samples):
    return [torch.Generator().manual_seed(100 + i) for i in samples]


def normal(pipe, samples, *shape, seed):
    rows = [torch.randn(1, *shape, generator=torch.Generator().manual_seed(1000 * seed + i)) for i in samples]
    return torch.cat(rows).to(network_of(pipe).dtype)


def pictures(samples, *shape):
    return torch.cat([torch.rand(1, *shape, generator=torch.Generator().manual_seed(9000 + i)) for i in samples])


def positive(pipe, samples, size=SIZE):
    return {"prompt_embeds": normal(pipe, samples, TOKENS, TEXT, seed=1), "height": size, "width": size}


def prompts(pipe, samples, size=SIZE, scale=2.0):
    negative = normal(pipe, samples, TOKENS, TEXT, seed=2)
    return positive(pipe, samples, size) | {"negative_prompt_embeds": negative, "guidance_scale": scale}


def pooled(pipe, samples, *names):
    return {name: normal(pipe, samples, TEXT, seed=3 + i) for i, name in enumerate(names)}


def ones(samples, *names, dtype=torch.float32):
    return {name: torch.ones(len(samples), TOKENS, dtype=dtype) for name in names}


def picture(samples, size=SIZE):
    return {"image": pictures(samples, 3, size, size)}


def half_masked(samples, size=SIZE):
    mask = torch.zeros(len(samples), 1, size, size)
    mask[..., size // 2 :] = 1
    return picture(samples, size) | {"mask_image": mask, "height": size, "width": size}


MASKS = ("prompt_attention_mask", "negative_prompt_attention_mask")
POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def without_size(arguments):
    return {key: value for key, value in arguments.items() if key not in ("height", "width")}


def flux_arguments(pipe, samples):
    return positive(pipe, samples) | pooled(pipe, samples, POOLED[0])


def sd3_arguments(pipe, samples):
    return prompts(pipe, samples) | pooled(pipe, samples, *POOLED)


def masked_arguments(pipe, samples, size=SIZE, dtype=torch.float32, **others):
    return prompts(pipe, samples, size) | ones(samples, *MASKS, dtype=dtype) | others


# --- betas: DiT, Stable Diffusion and their like -------------------------------------------------------------------


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


def sd_parts(**others):
    return {
        "unet": scaled(lambda: d.UNet2DConditionModel(**UNET, **UNET_UP)),
        "vae": make_vae(),
        "scheduler": d.DDIMScheduler(clip_sample=False, steps_offset=1, **SD_BETAS),
        "requires_safety_checker": False,
        **NO_TEXT_SD,
        **others,
    }


def make_sd():
    return d.StableDiffusionPipeline(**sd_parts())


def make_sd_img2img():
    return d.StableDiffusionImg2ImgPipeline(**sd_parts())


def sd_img2img_arguments(pipe, samples):
    return without_size(prompts(pipe, samples)) | picture(samples)


def make_sd_inpaint():
    return d.StableDiffusionInpaintPipeline(**sd_parts())


def sd_inpaint_arguments(pipe, samples):
    return prompts(pipe, samples) | half_masked(samples)


def make_controlnet():
    def make():
        return d.ControlNetModel(conditioning_embedding_out_channels=(4, 8), **UNET)

    return d.StableDiffusionControlNetPipeline(**sd_parts(controlnet=scaled(make, 0.5)))


def controlnet_arguments(pipe, samples):
    return prompts(pipe, samples) | picture(samples)


def sdxl_parts():
    def make():
        return d.UNet2DConditionModel(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + TEXT,
            use_linear_projection=True,
            **UNET,
            **UNET_UP,
        )

    scheduler = d.EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading", **SD_BETAS)
    return {"unet": scaled(make), "vae": make_vae(), "scheduler": scheduler, **NO_TEXT_TWO}


def make_sdxl():
    return d.StableDiffusionXLPipeline(**sdxl_parts())


def make_sdxl_img2img():
    return d.StableDiffusionXLImg2ImgPipeline(**sdxl_parts())


def make_sdxl_inpaint():
    return d.StableDiffusionXLInpaintPipeline(**sdxl_parts())


def sdxl_arguments(pipe, samples):
    return prompts(pipe, samples) | pooled(pipe, samples, *POOLED)


def sdxl_img2img_arguments(pipe, samples):
    return without_size(sdxl_arguments(pipe, samples)) | picture(samples)


def sdxl_inpaint_arguments(pipe, samples):
    return sdxl_arguments(pipe, samples) | half_masked(samples)


def sdxl_base_arguments(pipe, samples):
    return sdxl_arguments(pipe, samples) | {"denoising_end": FIRST_PART}


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


def make_cogvideox():
    return d.CogVideoXPipeline(**cogvideox_parts())


def make_cogvideox_v2v():
    return d.CogVideoXVideoToVideoPipeline(**cogvideox_parts())


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


def make_kandinsky():
    return d.KandinskyV22Pipeline(**kandinsky_parts())


def make_kandinsky_img2img():
    return d.KandinskyV22Img2ImgPipeline(**kandinsky_parts())


def kandinsky_arguments(pipe, samples):
    embeds = {
        name: normal(pipe, samples, TEXT, seed=3 + i)
        for i, name in enumerate(("image_embeds", "negative_image_embeds"))
    }
    return embeds | {"height": SIZE, "width": SIZE, "guidance_scale": 2.0}


def kandinsky_img2img_arguments(pipe, samples):
    return kandinsky_arguments(pipe, samples) | picture(samples)


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


# --- flow ----------------------------------------------------------------------------------------------------------


def sd3_parts(channels=4):
    def make():
        return d.SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=channels,
            out_channels=channels,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            caption_projection_dim=8,
            pooled_projection_dim=TEXT,
        )

    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae = make_vae(channels, shift_factor=0.0)
    return {"transformer": scaled(make), "scheduler": scheduler, "vae": vae, **NO_TEXT_SD3}


def make_sd3():
    return d.StableDiffusion3Pipeline(**sd3_parts())


def make_sd3_img2img():
    return d.StableDiffusion3Img2ImgPipeline(**sd3_parts())


def make_sd3_inpaint():
    return d.StableDiffusion3InpaintPipeline(**sd3_parts(16))


def sd3_inpaint_arguments(pipe, samples):
    return sd3_arguments(pipe, samples) | half_masked(samples)


def sd3_img2img_arguments(pipe, samples):
    return sd3_arguments(pipe, samples) | picture(samples)


def flux_parts():
    def make():
        return d.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            pooled_projection_dim=TEXT,
            guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        )

    scheduler = d.FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
    )
    vae = make_vae(1, shift_factor=0.0)
    return {"transformer": scaled(make), "vae": vae, "scheduler": scheduler, **NO_TEXT_TWO}


def make_flux():
    return d.FluxPipeline(**flux_parts())


def make_flux_img2img():
    return d.FluxImg2ImgPipeline(**flux_parts())


def flux_img2img_arguments(pipe, samples):
    return flux_arguments(pipe, samples) | picture(samples)


def make_flux_inpaint():
    return d.FluxInpaintPipeline(**flux_parts())


def flux_inpaint_arguments(pipe, samples):
    return flux_arguments(pipe, samples) | half_masked(samples)


def make_chroma():
    def make():
        return d.ChromaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            axes_dims_rope=(2, 2, 4),
            approximator_hidden_dim=16,
            approximator_layers=1,
            approximator_num_channels=16,
        )

    transformer, scheduler = scaled(make), d.FlowMatchEulerDiscreteScheduler()
    transformer.distilled_guidance_layer.in_proj.weight.data[:, (0, 2)] = 0  # the fast waves of time
    vae = make_vae(1, shift_factor=0.0)
    return d.ChromaPipeline(**NO_TEXT, transformer=transformer, vae=vae, scheduler=scheduler)


def make_sana():
    def transformer():
        return d.SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=TEXT,
            sample_size=8,
        )

    def vae():
        blocks = ("ResBlock", "ResBlock", "EfficientViTBlock")
        return d.AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=(4, 4, 4),
            decoder_block_out_channels=(4, 4, 4),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            scaling_factor=0.41407,
        )

    scheduler = d.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", final_sigmas_type="zero"
    )
    return d.SanaPipeline(**NO_TEXT, vae=scaled(vae, 0.5, seed=1), transformer=scaled(transformer), scheduler=scheduler)


def sana_arguments(pipe, samples):
    others = {"negative_prompt": None, "use_resolution_binning": False, "complex_human_instruction": None}
    return masked_arguments(pipe, samples, WIDE, **others)


def make_lumina2():
    def make():
        return d.Lumina2Transformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=4,
            hidden_size=16,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=2,
            multiple_of=16,
            axes_dim_rope=(4, 2, 2),
            cap_feat_dim=TEXT,
        )

    vae, scheduler = make_vae(levels=4, shift_factor=0.0), d.FlowMatchEulerDiscreteScheduler(shift=6.0)
    return d.Lumina2Pipeline(**NO_TEXT, transformer=scaled(make), scheduler=scheduler, vae=vae)


def lumina2_arguments(pipe, samples):
    return masked_arguments(pipe, samples, WIDE, dtype=torch.long)


def make_aura_flow():
    def make():
        return d.AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            caption_projection_dim=8,
            joint_attention_dim=TEXT,
            pos_embed_max_size=16,
        )

    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=1.73)
    return d.AuraFlowPipeline(**NO_TEXT, vae=make_vae(), transformer=scaled(make), scheduler=scheduler)


def make_qwen_image():
    def transformer():
        return d.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            axes_dims_rope=(4, 2, 2),
        )

    def vae():
        return d.AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )

    scheduler = d.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return d.QwenImagePipeline(
        **NO_TEXT, vae=scaled(vae, 0.5, seed=1), transformer=scaled(transformer), scheduler=scheduler
    )


def qwen_image_arguments(pipe, samples):
    masks = ones(samples, "prompt_embeds_mask", "negative_prompt_embeds_mask", dtype=torch.long)
    arguments = prompts(pipe, samples) | masks
    return arguments | {"guidance_scale": None, "true_cfg_scale": 2.0}


def make_cogview4():
    def make():
        return d.CogView4Transformer2DModel(
            patch_size=2,
            in_channels=4,
            num_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            out_channels=4,
            text_embed_dim=TEXT,
            time_embed_dim=8,
            condition_dim=4,
        )

    scheduler = d.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
    return d.CogView4Pipeline(**NO_TEXT, vae=make_vae(), transformer=scaled(make), scheduler=scheduler)


def ltx_parts(scheduler):
    def transformer():
        return d.LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=TEXT,
            num_layers=1,
            caption_channels=TEXT,
        )

    def vae():
        return d.AutoencoderKLLTXVideo(
            latent_channels=4,
            block_out_channels=(4, 4, 4, 4),
            decoder_block_out_channels=(4, 4, 4, 4),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, True, False),
            decoder_spatio_temporal_scaling=(True, True, True, False),
            decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4,
            upsample_factor=(1,) * 4,
            patch_size=1,
        )

    return {**NO_TEXT, "vae": scaled(vae, 0.5, seed=1), "transformer": scaled(transformer), "scheduler": scheduler}


def make_ltx():
    scheduler = d.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    return d.LTXPipeline(**ltx_parts(scheduler))


def make_ltx_condition():
    return d.LTXConditionPipeline(**ltx_parts(d.FlowMatchEulerDiscreteScheduler()))


def ltx_arguments(pipe, samples):
    return masked_arguments(pipe, samples, WIDE, num_frames=9)


def ltx_condition_arguments(pipe, samples):
    return ltx_arguments(pipe, samples) | picture(samples, WIDE)


def wan_parts():
    def transformer():
        return d.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=16,
            out_channels=16,
            text_dim=TEXT,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=32,
        )

    def vae():
        return d.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)

    scheduler = d.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    return {**NO_TEXT, "vae": scaled(vae, 0.5, seed=1), "transformer": scaled(transformer), "scheduler": scheduler}


def make_wan():
    return d.WanPipeline(**wan_parts())


def wan_arguments(pipe, samples):
    return prompts(pipe, samples, WIDE) | {"num_frames": 5}


def make_wan_v2v():
    return d.WanVideoToVideoPipeline(**wan_parts())


def wan_v2v_arguments(pipe, samples):
    return prompts(pipe, samples, WIDE) | {"video": pictures(samples, 5, 3, WIDE, WIDE)}


def make_hunyuan_video():
    def transformer():
        return d.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            guidance_embeds=True,
            text_embed_dim=TEXT,
            pooled_projection_dim=TEXT,
            rope_axes_dim=(2, 4, 4),
        )

    def vae():
        return d.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(4,) * 4,
            layers_per_block=1,
            norm_num_groups=2,
        )

    return d.HunyuanVideoPipeline(
        **NO_TEXT_TWO,
        transformer=scaled(transformer, 0.8),
        vae=scaled(vae, 0.5, seed=1),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def hunyuan_video_arguments(pipe, samples):
    video = {"num_frames": 5, "guidance_scale": 6.0}
    return flux_arguments(pipe, samples) | ones(samples, MASKS[0], dtype=network_of(pipe).dtype) | video


def make_mochi():
    def transformer():
        return d.MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=TEXT,
            in_channels=12,
            text_embed_dim=TEXT,
            time_embed_dim=4,
            max_sequence_length=TOKENS,
        )

    def vae():
        return d.AutoencoderKLMochi(
            encoder_block_out_channels=(32,) * 4,
            decoder_block_out_channels=(32,) * 4,
            layers_per_block=(1,) * 5,
        )

    scheduler = d.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return d.MochiPipeline(
        **NO_TEXT, scheduler=scheduler, vae=scaled(vae, 0.5, seed=1), transformer=scaled(transformer)
    )


def mochi_arguments(pipe, samples):
    return masked_arguments(pipe, samples, dtype=torch.bool, num_frames=7, max_sequence_length=TOKENS)


def dit_arguments(pipe, samples):
    return {"class_labels": [1 + i for i in samples], "guidance_scale": 2.0}


DIT_TABLE, FLOW_TABLE = "dit-xl-2-256", "flowdcn-b-2-256"


def flow(name, make, arguments, shape=(SIZE, SIZE, 3), **others):
    return Entry(name, make, arguments, shape, table=FLOW_TABLE, **others)


def video(frames, size):
    return {"shape": (frames, size, size, 3), "result": "frames"}


ENTRIES = [
    Entry("DiT", make_dit, dit_arguments, raw="np", table=DIT_TABLE),
    Entry("Stable Diffusion", make_sd, prompts),
    Entry("Stable Diffusion img2img", make_sd_img2img, sd_img2img_arguments, strength=True),
    Entry("Stable Diffusion inpaint", make_sd_inpaint, sd_inpaint_arguments, strength=True),
    Entry("Stable Diffusion ControlNet", make_controlnet, controlnet_arguments),
    Entry("SDXL", make_sdxl, sdxl_arguments),
    Entry("SDXL base", make_sdxl, sdxl_base_arguments, part=FIRST_PART),
    Entry("SDXL img2img", make_sdxl_img2img, sdxl_img2img_arguments, strength=True),
    Entry("SDXL inpaint", make_sdxl_inpaint, sdxl_inpaint_arguments, strength=True),
    Entry("PixArt-Sigma", make_pixart, pixart_arguments, table=DIT_TABLE),
    Entry("Latte", make_latte, latte_arguments, table=DIT_TABLE, **video(2, SIZE)),
    Entry("CogVideoX", make_cogvideox, cogvideox_arguments, **video(9, WIDE)),
    Entry("CogVideoX video-to-video", make_cogvideox_v2v, cogvideox_v2v_arguments, strength=True, **video(9, WIDE)),
    Entry("AnimateDiff", make_animatediff, animatediff_arguments, **video(2, SIZE)),
    Entry("Kandinsky 2.2", make_kandinsky, kandinsky_arguments),
    Entry("Kandinsky 2.2 img2img", make_kandinsky_img2img, kandinsky_img2img_arguments, strength=True),
    Entry("DeepFloyd IF", make_deepfloyd, deepfloyd_arguments, (8, 8, 3), raw="pt"),
    Entry("DDPM", make_ddpm, ddpm_arguments, (8, 8, 3), raw="np", half=False, table=DIT_TABLE),
    flow("Stable Diffusion 3", make_sd3, sd3_arguments),
    flow("Stable Diffusion 3 img2img", make_sd3_img2img, sd3_img2img_arguments, strength=True),
    flow("Stable Diffusion 3 inpaint", make_sd3_inpaint, sd3_inpaint_arguments, strength=True),
    flow("FLUX", make_flux, flux_arguments),
    flow("FLUX img2img", make_flux_img2img, flux_img2img_arguments, strength=True),
    flow("FLUX inpaint", make_flux_inpaint, flux_inpaint_arguments, strength=True),
    flow("Chroma", make_chroma, masked_arguments, calls=2),
    flow("Sana", make_sana, sana_arguments, (WIDE, WIDE, 3)),
    flow("Lumina 2", make_lumina2, lumina2_arguments, (WIDE, WIDE, 3), calls=2),
    flow("AuraFlow", make_aura_flow, masked_arguments),
    flow("Qwen-Image", make_qwen_image, qwen_image_arguments, calls=2),
    flow("CogView4", make_cogview4, prompts, calls=2),
    flow("LTX", make_ltx, ltx_arguments, **video(9, WIDE)),
    flow("LTX condition", make_ltx_condition, ltx_condition_arguments, own_grid=True, **video(9, WIDE)),
    flow("Wan", make_wan, wan_arguments, calls=2, **video(5, WIDE)),
    flow("Wan video-to-video", make_wan_v2v, wan_v2v_arguments, calls=2, strength=True, **video(5, WIDE)),
    flow("HunyuanVideo", make_hunyuan_video, hunyuan_video_arguments, **video(5, SIZE)),
    flow("Mochi", make_mochi, mochi_arguments, own_grid=True, **video(7, SIZE)),
]
ZOO = {entry.name: entry for entry in ENTRIES}
