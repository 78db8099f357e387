"""An exported solver in k-diffusion itself, beside the scheduler and k-diffusion's own sampler on the same nodes.

    pip install --no-deps k-diffusion torchsde trampoline torchdiffeq
    python -m tests.bench.kdiffusion

On the embedded vp model with guidance, 8 samples: the largest difference of final states from the scheduler's, and the
mse of both samplers against 200 classical steps. Only samplers and wrappers of k-diffusion are imported; the rest of it
asks for training libraries.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.pipelines import SiTPipeline
from dssolver_search.artefacts.export import load, source

MODEL, SOLVER, NFES, SAMPLES, GUIDANCE, STEPS = "search/demo/vp", "dit-xl-2-256", (5, 8, 10), 8, 1.5, 200


def part(name: str) -> Any:
    """A module of k-diffusion without what the package itself imports."""
    if "k_diffusion" not in sys.modules:
        spec = importlib.util.find_spec("k_diffusion")
        if spec is None:
            raise SystemExit("k-diffusion is not installed; see the top of this file")
        sys.modules["k_diffusion"] = types.ModuleType("k_diffusion")
        sys.modules["k_diffusion"].__path__ = list(spec.submodule_search_locations or ())
    return importlib.import_module(f"k_diffusion.{name}")


class Guided(nn.Module):
    """The pipeline's guided network as k-diffusion's wrappers call one."""

    def __init__(self, pipe: SiTPipeline) -> None:
        super().__init__()
        self.pipe = pipe

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.pipe._predict(x, t[0], labels, None)


def main() -> None:
    torch.set_num_threads(1)
    pipe = SiTPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    config, exported = pipe.scheduler.config, dict[str, Any]()
    exec(source(load(SOLVER), list(NFES)), exported)
    scheduler = DSSolverScheduler.from_config(config, solvers=SOLVER)
    model = part("external").DiscreteEpsDDPMDenoiser(Guided(pipe), scheduler.alphas_cumprod, quantize=False)
    labels, noise = torch.arange(SAMPLES), torch.randn(SAMPLES, 1, 28, 28, generator=torch.Generator().manual_seed(0))

    def by_scheduler(chosen: DSSolverScheduler, steps: int) -> Tensor:
        pipe.scheduler = chosen
        call = {"guidance_scale": GUIDANCE, "num_inference_steps": steps, "latents": noise, "output_type": "latent"}
        return pipe(labels, **call).images

    wanted = by_scheduler(DSSolverScheduler.from_config(config, solvers="classical"), STEPS)
    for nfe in NFES:
        sigmas, ours = exported["sigmas_for"](nfe), by_scheduler(scheduler, nfe)
        start, more = noise * (1 + sigmas[0] ** 2) ** 0.5, {"labels": labels}  # data + sigma noise
        found = exported["sample_dssolver"](model, start, sigmas, extra_args=more)
        own = part("sampling").sample_dpmpp_2m(model, start, sigmas, extra_args=more, disable=True)
        errors = [(made - wanted).square().mean().item() for made in (found, own)]
        print(
            f"{nfe} calls: {(found - ours).abs().max().item():.2g} from the scheduler; mse {errors[0]:.3g}, "
            f"dpmpp_2m on its nodes {errors[1]:.3g} ({errors[1] / errors[0]:.1f} times)"
        )


if __name__ == "__main__":
    main()
