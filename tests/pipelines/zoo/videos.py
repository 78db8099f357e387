"""Flow models of videos."""

from __future__ import annotations

import diffusers as d
import torch
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

from .parts import (
    MASKS,
    NO_TEXT,
    NO_TEXT_TWO,
    SIZE,
    TEXT,
    TOKENS,
    WIDE,
    fixed,
    flow,
    flux_arguments,
    masked_arguments,
    network_of,
    normal,
    of,
    ones,
    pictures,
    prompts,
    scaled,
    video,
    with_picture,
)

LTX_SHIFT = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}


def ltx_parts(**shift):
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

    scheduler = d.FlowMatchEulerDiscreteScheduler(**shift)
    return {**NO_TEXT, "vae": scaled(vae, 0.5, seed=1), "transformer": scaled(transformer), "scheduler": scheduler}


def ltx_arguments(pipe, samples):
    return masked_arguments(pipe, samples, WIDE, num_frames=9)


def ltx2_parts():
    """Pictures and sound in one network; the stride in time of the autoencoder of sound is 4."""

    def transformer():
        return d.LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=1,
            caption_channels=TEXT,
            rope_double_precision=False,
            rope_type="split",
        )

    def connectors():
        return LTX2TextConnectors(
            caption_channels=TEXT,
            text_proj_in_factor=1,
            video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=8,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=None,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=8,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=None,
            connector_rope_base_seq_len=32,
            rope_double_precision=False,
            rope_type="split",
        )

    def vae():
        return d.AutoencoderKLLTX2Video(
            latent_channels=4,
            block_out_channels=(8, 8),
            down_block_types=("LTX2VideoDownBlock3D",) * 2,
            decoder_block_out_channels=(8, 8),
            layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            spatio_temporal_scaling=(True, True),
            decoder_spatio_temporal_scaling=(True, True),
            decoder_inject_noise=(False,) * 3,
            downsample_type=("spatiotemporal",) * 2,
            upsample_type=("spatiotemporal",) * 2,
            upsample_residual=(False,) * 2,
            upsample_factor=(1,) * 2,
            patch_size=2,
        )

    def audio_vae():
        return d.AutoencoderKLLTX2Audio(
            base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
        )

    def vocoder():
        return LTX2Vocoder(
            in_channels=2 * 8,
            hidden_channels=8,
            upsample_kernel_sizes=[4],
            upsample_factors=[2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1]],
        )

    return {
        **NO_TEXT,
        "vae": scaled(vae, 0.5, seed=1),
        "audio_vae": scaled(audio_vae, 0.5, seed=1),
        "connectors": scaled(connectors),
        "transformer": scaled(transformer),
        "vocoder": scaled(vocoder, 0.5, seed=1),
        "scheduler": d.FlowMatchEulerDiscreteScheduler(**LTX_SHIFT),
    }


def ltx2_arguments(pipe, samples):
    """With all its guidance: by prompts, by a block left out, by pictures and sound that do not see each other."""
    return masked_arguments(
        pipe, samples, WIDE, num_frames=9, frame_rate=25.0, spatio_temporal_guidance_blocks=[0], stg_scale=0.5
    )


WAN = {
    "num_attention_heads": 2,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}


def wan_parts(network=d.WanTransformer3DModel, head=8, shift=3.0, **others):
    def vae():
        return d.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)

    return {
        **NO_TEXT,
        "vae": scaled(vae, 0.5, seed=1),
        "transformer": scaled(lambda: network(attention_head_dim=head, **WAN)),
        "scheduler": d.UniPCMultistepScheduler(
            use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction"
        ),
        **others,
    }


def wan22_parts():
    """A second network takes over below a boundary in time."""
    second = scaled(lambda: d.WanTransformer3DModel(attention_head_dim=8, **WAN), seed=2)
    return wan_parts(transformer_2=second, boundary_ratio=0.875)


def wan_arguments(pipe, samples):
    return prompts(pipe, samples, WIDE) | {"num_frames": 5}


def wan22_arguments(pipe, samples):
    return wan_arguments(pipe, samples) | {"guidance_scale_2": 1.5}


def wan_v2v_arguments(pipe, samples):
    return prompts(pipe, samples, WIDE) | {"video": pictures(samples, 5, 3, WIDE, WIDE)}


SKYREELS = {"network": d.SkyReelsV2Transformer3DModel, "head": 12, "shift": 8.0}


def forcing_arguments(pipe, samples):
    """Each frame of latents has a copy of the scheduler. The pipeline cuts times to whole numbers."""
    return wan_arguments(pipe, samples) | {
        "num_frames": 9,
        "base_num_frames": 9,
        "addnoise_condition": 0,
        "prompt": None,
    }


def kandinsky5_parts():
    def transformer():
        return d.Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            in_text_dim=TEXT,
            in_text_dim2=TEXT,
            time_dim=16,
            out_visual_dim=4,
            model_dim=16,
            ff_dim=16,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(2, 2, 4),
        )

    return {
        **NO_TEXT_TWO,
        "transformer": scaled(transformer),
        "vae": make_hunyuan_vae(),
        "scheduler": d.FlowMatchEulerDiscreteScheduler(shift=5.0),
    }


def kandinsky5_arguments(pipe, samples):
    def embeds(prefix, seed):
        return {
            f"{prefix}prompt_embeds_qwen": normal(pipe, samples, TOKENS, TEXT, seed=seed),
            f"{prefix}prompt_embeds_clip": normal(pipe, samples, TEXT, seed=seed + 1),
            f"{prefix}prompt_cu_seqlens": torch.arange(len(samples) + 1, dtype=torch.int32) * TOKENS,
        }

    return {
        **embeds("", 1),
        **embeds("negative_", 3),
        "height": SIZE,
        "width": SIZE,
        "num_frames": 5,
        "guidance_scale": 2.0,
    }


def make_hunyuan_vae():
    def make():
        return d.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(4,) * 4,
            layers_per_block=1,
            norm_num_groups=2,
        )

    return scaled(make, 0.5, seed=1)


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

    return d.HunyuanVideoPipeline(
        **NO_TEXT_TWO,
        transformer=scaled(transformer, 0.8),
        vae=make_hunyuan_vae(),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def hunyuan_video_arguments(pipe, samples):
    video = {"num_frames": 5, "guidance_scale": 6.0}
    return flux_arguments(pipe, samples) | ones(samples, MASKS[0], dtype=network_of(pipe).dtype) | video


def hunyuan_video15_parts():
    def transformer():
        return d.HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=TEXT,
            text_embed_2_dim=TEXT,
            image_embed_dim=TEXT,
            rope_axes_dim=(2, 2, 4),
            target_size=SIZE,
            task_type="t2v",
        )

    def vae():
        return d.AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(32, 32),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        )

    return {
        **NO_TEXT_TWO,
        "transformer": scaled(transformer, 0.8),
        "vae": scaled(vae, 0.5, seed=1),
        "scheduler": d.FlowMatchEulerDiscreteScheduler(shift=7.0),
        "guider": d.ClassifierFreeGuidance(guidance_scale=2.0),
    }


def hunyuan_video15_arguments(pipe, samples):
    def embeds(prefix, seed):
        names = (f"{prefix}prompt_embeds", f"{prefix}prompt_embeds_2")
        masks = ones(samples, f"{prefix}prompt_embeds_mask", f"{prefix}prompt_embeds_mask_2", dtype=torch.long)
        return masks | {name: normal(pipe, samples, TOKENS, TEXT, seed=seed + i) for i, name in enumerate(names)}

    return {**embeds("", 1), **embeds("negative_", 3), "height": SIZE, "width": SIZE, "num_frames": 5}


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


ENTRIES = [
    flow("LTX", of(d.LTXPipeline, ltx_parts, **LTX_SHIFT), ltx_arguments, **video(9, WIDE)),
    flow(
        "LTX condition",
        of(d.LTXConditionPipeline, ltx_parts),
        with_picture(ltx_arguments, size=WIDE),
        own_grid=True,
        **video(9, WIDE),
    ),
    flow("LTX-2", of(d.LTX2Pipeline, ltx2_parts), ltx2_arguments, calls=3, **video(9, WIDE)),
    flow("LTX-2 sound", of(d.LTX2Pipeline, ltx2_parts), ltx2_arguments, (2, 66), calls=3, result="audio"),
    flow("Wan", of(d.WanPipeline, wan_parts), wan_arguments, calls=2, **video(5, WIDE)),
    flow(
        "Wan video-to-video",
        of(d.WanVideoToVideoPipeline, wan_parts),
        wan_v2v_arguments,
        calls=2,
        strength=True,
        **video(5, WIDE),
    ),
    flow("Wan 2.2", of(d.WanPipeline, wan22_parts), wan22_arguments, calls=2, **video(5, WIDE)),
    flow("SkyReels-V2", of(d.SkyReelsV2Pipeline, wan_parts, **SKYREELS), wan_arguments, calls=2, **video(5, WIDE)),
    flow(
        "SkyReels-V2 diffusion forcing",
        of(d.SkyReelsV2DiffusionForcingPipeline, wan_parts, **{**SKYREELS, "shift": 1.0}),
        forcing_arguments,
        calls=2,
        copies=True,
        **video(9, WIDE),
    ),
    flow(
        "Kandinsky 5",
        of(d.Kandinsky5T2VPipeline, kandinsky5_parts),
        kandinsky5_arguments,
        calls=2,
        single=("time_embeddings", "modulation", "visual_modulation", "text_modulation"),
        **video(5, SIZE),
    ),
    flow("HunyuanVideo", make_hunyuan_video, hunyuan_video_arguments, **video(5, SIZE)),
    flow(
        "HunyuanVideo 1.5",
        of(fixed(d.HunyuanVideo15Pipeline, vision_num_semantic_tokens=3), hunyuan_video15_parts),
        hunyuan_video15_arguments,
        calls=2,
        **video(5, SIZE),
    ),
    flow("Mochi", make_mochi, mochi_arguments, own_grid=True, **video(7, SIZE)),
]
