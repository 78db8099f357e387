"""Class-conditional sampling of a `DiTTransformer2DModel` with any scheduler, flow or vp.

diffusers' `DiTPipeline` serves vp schedulers, models with a VAE and 1000 classes only. SiT (Ma et al. 2024,
arXiv 2401.08740) is the same network trained as a flow: here everything about noise is left to the scheduler.

    x_N = noise * init_noise_sigma
    m   = m_null + guidance_scale * (m_class - m_null)      what the network predicts, guided
    x_i = scheduler.step(m, t_i, x_{i+1})

The network is fed the scheduler's own timesteps and must predict what the scheduler expects: for diffusers' flow
schedulers t in [0, 1000], 1000 = noise, and the velocity noise - data. (SiT's own code runs t in [0, 1] from noise to
data with the opposite velocity; `python -m dssolver_search convert` puts both into the weights.)
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import AutoencoderKL, ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class SiTPipeline(DiffusionPipeline):
    """Images of given classes from a DiT or SiT transformer, latent (with a VAE) or in pixel space (without).

    Args:
        transformer: class-conditional network: a DiT or SiT, or a `UNet2DModel`. Its config gives the shape of a
            sample (in_channels, sample_size, sample_size) and the number of classes, which is also the id of the null
            class: `num_embeds_ada_norm`, or `num_class_embeds` - 1 of a U-Net. The second half of a learned-sigma head
            (out_channels = 2 * in_channels) is dropped.
        scheduler: any diffusers scheduler that fits what the network predicts.
        vae: decodes latents; None if the network works on images in [-1, 1].
        id2label: class id (int, or str as in JSON) to its name or comma separated synonyms; kept in the config.

    Raises:
        ValueError: `id2label` has a key that is not a class id of the transformer.
    """

    model_cpu_offload_seq: Any = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    # Any here and above: diffusers declares neither a scheduler's methods nor a config's attributes, and None above
    transformer: Any
    scheduler: Any
    vae: Any

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: Mapping[int, str] | Mapping[str, str] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        if id2label is not None:
            id2label = {str(key): name for key, name in id2label.items()}
            classes = self.num_classes
            for key in id2label:
                if not key.isdecimal() or int(key) >= classes:
                    raise ValueError(f"id2label has the key {key!r}; use class ids, 0 to {classes - 1}.")
        self.register_to_config(id2label=id2label)
        self.image_processor = VaeImageProcessor()

    @property
    def num_classes(self) -> int:
        """Number of classes, and the id of the null class."""
        embeddings = self.transformer.config.get("num_class_embeds")  # of a UNet2DModel, the null class included
        return self.transformer.config["num_embeds_ada_norm"] if embeddings is None else embeddings - 1

    @property
    def labels(self) -> dict[str, int]:
        """Every name and synonym of `id2label`, sorted, with its class id (the last one where several share a name)."""
        id2label = self.config["id2label"] or {}
        return dict(sorted((name.strip(), int(key)) for key, label in id2label.items() for name in label.split(",")))

    @property
    def guidance_scale(self) -> float:
        """Scale in use; a step-end callback may change `_guidance_scale` for the steps that follow."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Length of the scheduler's current list of timesteps."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """True once a step-end callback has set `_interrupt`: the remaining steps are skipped."""
        return self._interrupt

    def get_label_ids(self, class_labels: int | str | Sequence[int | str] | torch.Tensor) -> list[int]:
        """Class ids of ids or names, mixed at will.

        Args:
            class_labels: one class or several. A name is one synonym of `id2label` (or all of them, as written
                there), in any case. Where classes share a name in some case, the exact spelling decides.

        Raises:
            ValueError: no class given, an id out of range, a name unknown or shared by several classes.
        """
        if isinstance(class_labels, (torch.Tensor, np.ndarray)):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, str) or not isinstance(class_labels, Iterable):
            class_labels = [class_labels]
        id2label, classes = self.config["id2label"] or {}, self.num_classes
        ids = [_id_of(c, id2label) if isinstance(c, str) else _checked(c, id2label, classes) for c in class_labels]
        if not ids:
            raise ValueError("class_labels is empty; give at least one class id or name.")
        return ids

    def check_inputs(
        self,
        batch_size: int,
        guidance_channels: int | None,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raise ValueError, naming the value and the remedy, for arguments of `__call__` that cannot work."""
        channels = self.transformer.config.in_channels
        if guidance_channels is not None and not 1 <= guidance_channels <= channels:
            raise ValueError(
                f"guidance_channels is {guidance_channels}; use 1 to {channels} (the model's), or None for all."
            )
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; use 1 or more.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"got {len(generator)} generators for {batch_size} class labels; pass one for each, or one for all."
            )
        shape = self._latents_shape(batch_size)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; these labels and this model need {shape}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; use one of {', '.join(OUTPUT_TYPES)}.")
        image_channels = channels if self.vae is None else self.vae.config.out_channels
        if output_type == "pil" and image_channels not in (1, 3):
            raise ValueError(
                f"output_type 'pil' needs 1 or 3 image channels, here are {image_channels};"
                " use 'np', 'pt' or 'latent', or give the pipeline the VAE that decodes them."
            )
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {unknown}; it has to be in {self._callback_tensor_inputs}."
            )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor,
        guidance_scale: float = 1.5,
        guidance_channels: int | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Sample one image for each class label.

        Args:
            class_labels: B class ids or names, see `get_label_ids`.
            guidance_scale: classifier-free guidance if above 1, at the price of twice the rows in each network call.
            guidance_channels: guide only the first so many latent channels and take the class-conditional prediction
                for the rest. 3 is what the code of DiT (Peebles & Xie 2022, arXiv 2212.09748) and of SiT does; None
                guides all.
            num_inference_steps: steps asked of the scheduler.
            generator: source of the noise: one for the batch, or a list of B for one each.
            latents: unit-variance noise to start from, shape (B, in_channels, sample_size, sample_size); None draws it.
            output_type: "pil" (list of B images; mode "L" for one channel), "np" (B, H, W, C) or "pt" (B, C, H, W),
                both in [0, 1], or "latent" (the scheduler's last sample, not decoded).
            return_dict: False returns a tuple of one element instead of an `ImagePipelineOutput`.
            callback_on_step_end: called as f(pipeline, i, t, {"latents": latents}) after each step; what it returns
                under "latents" replaces them.
            callback_on_step_end_tensor_inputs: names that the callback is given; only "latents" exists.

        Raises:
            ValueError: see `get_label_ids` and `check_inputs`.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        ids = self.get_label_ids(class_labels)
        self.check_inputs(
            len(ids),
            guidance_channels,
            num_inference_steps,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale, self._interrupt = guidance_scale, False
        device, dtype = self._execution_device, self.transformer.dtype
        labels = torch.tensor(ids, device=device)
        timesteps = self._set_timesteps(num_inference_steps, device)
        self._num_timesteps = len(timesteps)
        if latents is None:
            latents = randn_tensor(self._latents_shape(len(ids)), generator=generator, device=device, dtype=dtype)
        latents = latents.to(device=device, dtype=dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        # stochastic schedulers draw from the caller's generator; the others may not know the word
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}

        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                model_output = self._predict(latents, t, labels, guidance_channels)
                latents = self.scheduler.step(model_output, t, latents, **step_kwargs, return_dict=False)[0]
                latents = latents.to(dtype)  # some schedulers return float32
                if callback_on_step_end is not None:
                    callback_kwargs = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = callback_outputs.pop("latents", latents)
                progress_bar.update()

        images = self.image_processor.postprocess(
            latents if output_type == "latent" else self._decode(latents), output_type=output_type
        )
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _latents_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        config = self.transformer.config
        return batch_size, config.in_channels, config.sample_size, config.sample_size

    def _set_timesteps(self, num_inference_steps: int, device: torch.device) -> torch.Tensor:
        """The scheduler's timesteps; flow schedulers that take a grid get the uniform one, as FLUX's pipeline does.

        Left alone, FlowMatchEuler spreads N nodes over [0.001, 1]: its last step, 0.001 to 0, is all but wasted.
        """
        if _takes_flow_sigmas(self.scheduler):
            sigmas = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
            self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        return self.scheduler.timesteps

    def _predict(
        self, latents: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, guidance_channels: int | None
    ) -> torch.Tensor:
        """The network's guided output for latents (B, C, S, S) at the 0-d timestep t; one call of B or 2B rows."""
        guided = self.guidance_scale > 1
        if hasattr(self.scheduler, "scale_model_input"):
            latents = self.scheduler.scale_model_input(latents, t)
        if guided:
            latents = torch.cat([latents, latents])
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])
        output = self.transformer(latents, timestep=t.expand(len(latents)), class_labels=labels, return_dict=False)[0]
        output = output[:, : self.transformer.config.in_channels]  # without the learned sigma, if there is one
        if not guided:
            return output
        conditional, null = output.chunk(2)
        output = null + self.guidance_scale * (conditional - null)
        if guidance_channels is not None:
            output = torch.cat([output[:, :guidance_channels], conditional[:, guidance_channels:]], dim=1)
        return output

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1], shape (B, image channels, H, W)."""
        if self.vae is None:
            return latents
        config = self.vae.config
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]


def _checked(label: Any, id2label: Mapping[str, str], classes: int) -> int:
    """A class id, checked."""
    accepted = f"pass ids from 0 to {classes - 1}" + (", or names" if id2label else "")
    try:
        index = operator.index(label)
    except TypeError:
        raise ValueError(f"class label {label!r} is neither an id nor a name; {accepted}.") from None
    if not 0 <= index < classes:
        raise ValueError(f"class id {index} is unknown to this model; {accepted}.")
    return index


def _id_of(name: str, id2label: Mapping[str, str]) -> int:
    """The class of a name."""
    if not id2label:
        raise ValueError(f"class name {name!r} is unknown: this pipeline has no id2label; pass ids.")
    names_by_id = {int(key): {n.strip() for n in (label, *label.split(","))} for key, label in id2label.items()}
    wanted = name.strip()
    ids = [key for key, names in names_by_id.items() if wanted.casefold() in {n.casefold() for n in names}]
    if len(ids) > 1:
        ids = [key for key in ids if wanted in names_by_id[key]] or ids
    if len(ids) > 1:
        raise ValueError(f"class name {name!r} belongs to the classes {ids}; pass one of these ids.")
    if not ids:
        known = sorted({n.strip() for label in id2label.values() for n in label.split(",")})
        shortened = ", ".join(map(repr, known[:8])) + (f", ... ({len(known)} names)" if len(known) > 8 else "")
        raise ValueError(f"class name {name!r} is unknown; use {shortened} (`pipe.labels`), or an id.")
    return ids[0]


def _takes_flow_sigmas(scheduler: Any) -> bool:
    """Whether `set_timesteps(sigmas=...)` is offered and means flow sigmas, from 1 (noise) to 0 (data).

    A scheduler that names its prediction type says so itself; the FlowMatch family has no such key and no betas.
    UniPC offers the argument always but takes it only with `use_flow_sigmas`.
    """
    if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        return False
    config = scheduler.config
    if not config.get("use_flow_sigmas", True):
        return False
    if "prediction_type" in config:
        return config["prediction_type"] == "flow_prediction"
    return "beta_start" not in config
