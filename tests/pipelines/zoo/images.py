"""Flow models of images."""

from __future__ import annotations

import functools
import sys
from unittest import mock

import diffusers as d
import tokenizers
import torch
import transformers
from PIL import Image

from .parts import (
    NO_TEXT,
    NO_TEXT_SD3,
    NO_TEXT_TWO,
    POOLED,
    SIZE,
    TEXT,
    TOKENS,
    WIDE,
    fixed,
    flow,
    flux_arguments,
    make_vae,
    masked_arguments,
    normal,
    of,
    ones,
    pictures,
    pooled,
    positive,
    prompts,
    scaled,
    with_mask,
    with_picture,
    with_pooled,
)


def sd3_parts(channels=4, **others):
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
    return {"transformer": scaled(make), "scheduler": scheduler, "vae": vae, **NO_TEXT_SD3, **others}


def sd3_controlnet_parts():
    def make():
        return d.SD3ControlNetModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            caption_projection_dim=8,
            pooled_projection_dim=TEXT,
        )

    parts = sd3_parts(controlnet=scaled(make, 0.5))
    with torch.no_grad():  # hardly any noise in latents of pictures, for which the pipeline takes no generator
        parts["vae"].quant_conv.weight[4:] = 0
        parts["vae"].quant_conv.bias[4:] = -30
    return parts


FLUX = {
    "patch_size": 1,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "axes_dims_rope": (2, 2, 4),
}


def flux_parts(in_channels=4, **others):
    """in_channels: Fill adds a masked picture (4) and a mask (4 * 2 * 2 pixels)."""

    def make():
        return d.FluxTransformer2DModel(
            in_channels=in_channels, out_channels=4, pooled_projection_dim=TEXT, guidance_embeds=True, **FLUX
        )

    scheduler = d.FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
    )
    vae = make_vae(1, shift_factor=0.0)
    return {"transformer": scaled(make), "vae": vae, "scheduler": scheduler, **NO_TEXT_TWO, **others}


def flux_controlnet_parts():
    def make():
        return d.FluxControlNetModel(in_channels=4, pooled_projection_dim=TEXT, guidance_embeds=True, **FLUX)

    return flux_parts(controlnet=scaled(make, 0.5))


def kontext_arguments(pipe, samples):
    return flux_arguments(pipe, samples) | {"max_area": SIZE * SIZE, "_auto_resize": False}


def flux2_parts(**guidance):
    """guidance_embeds: Klein has none, but draws with and without a prompt."""

    def transformer():
        return d.Flux2Transformer2DModel(
            in_channels=4, timestep_guidance_channels=16, **{**FLUX, "axes_dims_rope": (2, 2, 2, 2)}, **guidance
        )

    def vae():
        return d.AutoencoderKLFlux2(
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=1,
            norm_num_groups=2,
        )

    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {**NO_TEXT, "transformer": scaled(transformer), "vae": scaled(vae, 0.5, seed=1), "scheduler": scheduler}


def z_image_parts():
    def make():
        return d.ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=TEXT,
            axes_dims=[4, 2, 2],
            axes_lens=[64, 16, 16],
        )

    vae, scheduler = make_vae(shift_factor=0.1), d.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return {**NO_TEXT, "transformer": scaled(make), "vae": vae, "scheduler": scheduler}


def z_image_arguments(pipe, samples):
    """Prompts are lists, as they may differ in length."""
    arguments = prompts(pipe, samples)
    return arguments | {name: list(arguments[name]) for name in ("prompt_embeds", "negative_prompt_embeds")}


def bria_parts():
    def make():
        return d.BriaTransformer2DModel(in_channels=4, **{**FLUX, "axes_dims_rope": (0, 4, 4)})

    vae, scheduler = make_vae(1, shift_factor=0.0), d.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return {**NO_TEXT, "transformer": scaled(make), "vae": vae, "scheduler": scheduler}


def hidream_parts():
    def make():
        return d.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=[TEXT, TEXT],
            text_emb_dim=TEXT,
            num_routed_experts=2,
            num_activated_experts=2,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(8, 8),
            llama_layers=(0, 1),
        )

    no_text = {**NO_TEXT_SD3, "text_encoder_4": None, "tokenizer_4": None}
    vae, scheduler = make_vae(shift_factor=0.1), d.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return {**no_text, "transformer": scaled(make), "vae": vae, "scheduler": scheduler}


def hidream_arguments(pipe, samples):
    """Embeddings of T5, and of two layers of Llama (layers, samples, tokens, width)."""

    def embeds(prefix, seed):
        t5, *llama = (normal(pipe, samples, TOKENS, TEXT, seed=seed + i) for i in range(3))
        return {f"{prefix}prompt_embeds_t5": t5, f"{prefix}prompt_embeds_llama3": torch.stack(llama)}

    return {**embeds("", 11), **embeds("negative_", 21), **pooled(pipe, samples, *POOLED), "guidance_scale": 2.0}


def chroma_parts():
    def make():
        return d.ChromaTransformer2DModel(
            in_channels=4, approximator_hidden_dim=16, approximator_layers=1, approximator_num_channels=16, **FLUX
        )

    transformer, scheduler = scaled(make), d.FlowMatchEulerDiscreteScheduler()
    transformer.distilled_guidance_layer.in_proj.weight.data[:, (0, 2)] = 0  # the fast waves of time
    return {**NO_TEXT, "transformer": transformer, "vae": make_vae(1, shift_factor=0.0), "scheduler": scheduler}


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


QWEN_SHIFT = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}


def qwen_image_parts(**others):
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

    scheduler = d.FlowMatchEulerDiscreteScheduler(**QWEN_SHIFT)
    parts = {"vae": scaled(vae, 0.5, seed=1), "transformer": scaled(transformer), "scheduler": scheduler}
    return {**NO_TEXT, **parts, **others}


def qwen_image_arguments(pipe, samples):
    masks = ones(samples, "prompt_embeds_mask", "negative_prompt_embeds_mask", dtype=torch.long)
    arguments = prompts(pipe, samples) | masks
    return arguments | {"guidance_scale": None, "true_cfg_scale": 2.0}


def unresized(pipeline):
    """The pipeline without its resizing of pictures to a million pixels."""
    module = sys.modules[pipeline.__module__]
    others = module.calculate_dimensions(1, 1)[2:]

    @functools.wraps(pipeline.__call__)
    def call(*args, **kwargs):
        with mock.patch.object(module, "calculate_dimensions", return_value=(SIZE, SIZE, *others)):
            return pipeline.__call__(*args, **kwargs)

    return type(pipeline.__name__, (pipeline,), {"__call__": call})


def qwen_edit_parts():
    return qwen_image_parts(processor=None)


def qwen_edit_arguments(pipe, samples):
    rows = (pictures(samples, SIZE, SIZE, 3) * 255).to(torch.uint8)
    return qwen_image_arguments(pipe, samples) | {"image": [Image.fromarray(row.numpy()) for row in rows]}


def qwen_image21_parts():
    """Pictures with an opacity. The text encoder is not there, but the pipeline asks its processor for two tokens."""

    def transformer():
        return d.QwenImage21Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            context_in_dim=TEXT,
            axes_dims_rope=(4, 2, 2),
        )

    def vae():
        return d.AutoencoderKLQwenImage21(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            scale_factor_spatial=2,
        )

    special = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    words = tokenizers.models.WordLevel({token: i for i, token in enumerate(("?", *special))}, "?")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), additional_special_tokens=special
    )
    template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    tokenizer.chat_template = template
    processor = transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(), tokenizer, transformers.Qwen3VLVideoProcessor(), chat_template=template
    )
    return {
        "text_encoder": None,
        "processor": processor,
        "vae": scaled(vae, 0.5, seed=1),
        "transformer": scaled(transformer),
        "scheduler": d.FlowMatchEulerDiscreteScheduler(**QWEN_SHIFT),
    }


def qwen_image21_arguments(pipe, samples):
    return {k: v for k, v in qwen_image_arguments(pipe, samples).items() if k != "guidance_scale"}


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


ENTRIES = [
    flow("Stable Diffusion 3", of(d.StableDiffusion3Pipeline, sd3_parts), with_pooled),
    flow(
        "Stable Diffusion 3 img2img",
        of(d.StableDiffusion3Img2ImgPipeline, sd3_parts),
        with_picture(with_pooled),
        strength=True,
    ),
    flow(
        "Stable Diffusion 3 inpaint",
        of(d.StableDiffusion3InpaintPipeline, sd3_parts, channels=16),
        with_mask(with_pooled),
        strength=True,
    ),
    flow(
        "Stable Diffusion 3 ControlNet",
        of(d.StableDiffusion3ControlNetPipeline, sd3_controlnet_parts),
        with_picture(with_pooled, "control_image"),
    ),
    flow("FLUX", of(d.FluxPipeline, flux_parts), flux_arguments),
    flow("FLUX img2img", of(d.FluxImg2ImgPipeline, flux_parts), with_picture(flux_arguments), strength=True),
    flow("FLUX inpaint", of(d.FluxInpaintPipeline, flux_parts), with_mask(flux_arguments), strength=True),
    flow(
        "FLUX Fill",
        of(d.FluxFillPipeline, flux_parts, in_channels=4 + 4 + 16),
        with_mask(flux_arguments),
        strength=True,
    ),
    flow("FLUX Kontext", of(d.FluxKontextPipeline, flux_parts), with_picture(kontext_arguments)),
    flow(
        "FLUX ControlNet",
        of(d.FluxControlNetPipeline, flux_controlnet_parts),
        with_picture(flux_arguments, "control_image"),
    ),
    flow("FLUX.2", of(d.Flux2Pipeline, flux2_parts), positive),
    flow("FLUX.2 Klein", of(d.Flux2KleinPipeline, flux2_parts, guidance_embeds=False), prompts, calls=2),
    flow("Chroma", of(d.ChromaPipeline, chroma_parts), masked_arguments, calls=2),
    flow(
        "Chroma img2img",
        of(d.ChromaImg2ImgPipeline, chroma_parts),
        with_picture(masked_arguments),
        calls=2,
        strength=True,
    ),
    flow("Z-Image", of(d.ZImagePipeline, z_image_parts), z_image_arguments),
    flow("Z-Image img2img", of(d.ZImageImg2ImgPipeline, z_image_parts), with_picture(z_image_arguments), strength=True),
    flow("HiDream", of(fixed(d.HiDreamImagePipeline, default_sample_size=8), hidream_parts), hidream_arguments),
    flow("Bria", of(d.BriaPipeline, bria_parts), prompts),
    flow("Sana", make_sana, sana_arguments, (WIDE, WIDE, 3)),
    flow("Lumina 2", make_lumina2, lumina2_arguments, (WIDE, WIDE, 3), calls=2),
    flow("AuraFlow", make_aura_flow, masked_arguments),
    flow("Qwen-Image", of(d.QwenImagePipeline, qwen_image_parts), qwen_image_arguments, calls=2),
    flow("Qwen-Image Edit", of(unresized(d.QwenImageEditPipeline), qwen_edit_parts), qwen_edit_arguments, calls=2),
    flow(
        "Qwen-Image Edit Plus",
        of(unresized(d.QwenImageEditPlusPipeline), qwen_edit_parts),
        qwen_edit_arguments,
        calls=2,
        batches=False,
    ),
    flow(
        "Qwen-Image 2.1",
        of(fixed(d.QwenImage21Pipeline, vae_scale_factor=2), qwen_image21_parts),
        qwen_image21_arguments,
        (SIZE, SIZE, 4),
        calls=2,
    ),
    flow("CogView4", make_cogview4, prompts, calls=2),
]
