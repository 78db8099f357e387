"""Searched solvers as a sampler in the manner of k-diffusion: one file that needs torch and nothing else.

    x = torch.randn(shape) * sigmas_for(8)[0]
    x = sample_dssolver(model, x, sigmas_for(8), extra_args=...)

`model(x, sigma, **extra_args)` gives the denoised data, as k-diffusion's and ComfyUI's wrappers do. Of flow models x is
(1 - sigma) data + sigma noise; of all others data + sigma noise. A step of a solver that was searched on a flow weighs
velocities, one of others denoised data:

    velocity   x' = x + (sigma' - sigma) sum_j c_ij (x_j - denoised_j) / sigma_j
    denoised   x' = sigma'/sigma x + (1 - sigma'/sigma) sum_j c_ij denoised_j

Of a solver that was carried over from another noise schedule, x here is `scales` times the state, sigma its `own`, and
the data are over `factor`.

Where a table feeds the network another time than its noise level's, the model is asked there, and what the network
said is taken out of its answer again. Paper: Eq. (16), (19), arXiv 2505.21114.
"""

import torch

# by step count: N+1 sigmas, N sigmas that the network is fed, N rows of weights c_ij, oldest first; see FILLED
SOLVER = {"prediction": "flow", "quantity": "velocity", "tables": {}}  # FILLED by `python -m dssolver_search export`
TOLERANCE = 1e-3  # of sigmas given and a table's own, relative


def sigmas_for(steps, device=None):
    """The noise levels of a run with so many network calls, (steps + 1,) float32."""
    if steps not in SOLVER["tables"]:
        raise ValueError(f"no table for {steps} steps; there are tables for {', '.join(map(str, SOLVER['tables']))}")
    return torch.tensor(SOLVER["tables"][steps]["sigmas"], dtype=torch.float32, device=device)


@torch.no_grad()
def sample_dssolver(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Deterministic, one call of the model a step.

    Args:
        model: (x, sigma (B,), **extra_args) -> denoised, shape of x.
        x: the noisy start (B, ...), of noise level sigmas[0].
        sigmas: `sigmas_for(steps)` or any contiguous part of it: its end (image-to-image), its beginning, or its
            middle (several samplers in turn). A last 0 in place of the table's own ends there, in one step to the data.
        callback: told {"x", "i", "sigma", "sigma_hat", "denoised"} at every step.
        disable: accepted; there is no progress bar.

    Raises:
        ValueError: these sigmas are no part of a table's.
    """
    table, first, levels = _table(sigmas)
    own, factor = table.get("own", table["sigmas"]), table.get("factor", 1.0)
    scales = table.get("scales", [1.0] * len(own))
    wide = torch.promote_types(x.dtype, torch.float32)
    history = []
    for i, (sigma, end) in enumerate(zip(levels[:-1], levels[1:])):  # noqa: B905 (Python 3.9)
        denoised = _denoised(model, x, sigma, table["fed"][first + i], extra_args or {})
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        begin, finish, scale = own[first + i], own[first + i + 1], scales[first + i + 1]
        state, data = x.to(wide) * scales[first + i], denoised.to(wide) / factor
        history.append((state - data) / begin if SOLVER["quantity"] == "velocity" else data)
        row = table["coefficients"][first + i]
        missing = len(row) - len(history)  # of a late start: their weights fall to the oldest that is there
        row = [sum(row[: missing + 1]), *row[missing + 1 :]]
        if end != table["sigmas"][first + i + 1]:
            row, finish, scale = [0.0] * i + [1.0], 0.0, 1 / factor
        mix = sum(weight * quantity for weight, quantity in zip(row, history))  # noqa: B905
        if SOLVER["quantity"] == "velocity":
            state = state + (finish - begin) * mix
        else:
            state = finish / begin * state + (1 - finish / begin) * mix
        x = (state / scale).to(x.dtype)
    return x


def _table(sigmas):
    """The table of which these sigmas are a part, where the part begins, and its levels without rounding."""
    levels, best = [float(s) for s in sigmas], None
    rounded = torch.is_tensor(sigmas) and sigmas.is_floating_point()
    tolerance = max(TOLERANCE, torch.finfo(sigmas.dtype).eps if rounded else 0.0)
    for table in SOLVER["tables"].values() if len(levels) > 1 else ():
        for first in range(len(table["sigmas"]) - len(levels) + 1):
            own = table["sigmas"][first : first + len(levels)]
            if cut := levels[-1] == 0 != own[-1]:
                own = [*own[:-1], 0.0]
            far = max(abs(a - b) / (tolerance * abs(b) + 1e-6) for a, b in zip(levels, own))  # noqa: B905
            if far <= 1 and (best is None or (cut, far) < best[0]):
                best = (cut, far), table, first, own
    if best is None:
        raise ValueError(
            f"these {len(levels)} sigmas are no table's; use sigmas_for({' or '.join(map(str, SOLVER['tables']))}) or "
            "a contiguous part of it"
        )
    return best[1:]


def _denoised(model, x, sigma, fed, extra_args):
    """The data that the network's output predicts at x, when it is told the noise level `fed`."""
    ones = x.new_ones([x.shape[0]])
    if fed == sigma:
        return model(x, sigma * ones, **extra_args)
    if SOLVER["prediction"] == "flow":
        velocity = (x - model(x, fed * ones, **extra_args)) / fed
        return x - sigma * velocity
    # wrappers scale the input by alpha(sigma): scaled beforehand, the network sees the very state
    alpha, alpha_fed = (1 + sigma**2) ** -0.5, (1 + fed**2) ** -0.5
    state = x * alpha
    answer = model(state / alpha_fed, fed * ones, **extra_args)
    if SOLVER["prediction"] == "epsilon":
        return (state - sigma * alpha * ((state - alpha_fed * answer) / (fed * alpha_fed))) / alpha
    if SOLVER["prediction"] == "v_prediction":
        return alpha * state - sigma * alpha * ((alpha_fed * state - answer) / (fed * alpha_fed))
    return answer
