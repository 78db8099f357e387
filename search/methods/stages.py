"""The methods `closed_form` and `gradient`: stages that each improve one candidate."""

from __future__ import annotations

from ..settings import PERCEPTUAL, STARTS, SearchConfig
from .closed_form import Candidate, fits_of
from .gauss_newton import Polish, around, polish
from .gradient import Descent
from .log import Log
from .objective import OBJECTIVES
from .perceptual import MOST_CALLS, PerceptualDescent
from .problem import Problem


def closed_form(problem: Problem, nfe: int, settings: SearchConfig, log: Log) -> Candidate:
    """Closed-form rows on a searched warp, then Gauss-Newton; forward evaluations only."""
    form, starts = problem.form, STARTS[: settings.starts]
    with log.progress(f"closed form, {nfe} calls", "fit", sum(fits_of(settings.trials, len(starts)))) as advance:
        form.on_trial = lambda candidate: advance(mse=f"{candidate.train_mse:.3g}")
        found = form.search(nfe, settings.trials, settings.ridge, starts)
        form.on_trial = lambda candidate: None
    log.stage("closed_form", found)
    if settings.polish and nfe <= settings.polish_nfe:
        differences = Polish(form, found, settings.search_over).count * len(list(form.batches(form.train)))
        with log.progress(f"polish, {nfe} calls", "difference", settings.polish * differences) as advance:
            found = polish(form, found, settings.polish, advance, settings.search_over)
        log.stage("polish", found)
    return found


def gradient(problem: Problem, nfe: int, settings: SearchConfig, log: Log) -> Candidate:
    """`closed_form`, then a descent through the pipeline's own call."""
    found = closed_form(problem, nfe, settings, log)
    better, images = _descended(problem, found, settings, log)
    log.stage("gradient", better, **images)
    return better


def _descended(
    problem: Problem, found: Candidate, settings: SearchConfig, log: Log
) -> tuple[Candidate, dict[str, float]]:
    """The candidate after the descent, and the held-out perceptual losses if images were judged."""
    form, nfe, objective = problem.form, found.spec.nfe, settings.objective
    parameters = around(form, found, problem.free)
    if not parameters.count:
        return found, {}
    on_images = problem.perceptual if nfe <= MOST_CALLS else None
    if objective == PERCEPTUAL and not on_images:
        log.say(f"objective {PERCEPTUAL} is for up to {MOST_CALLS} calls; terminal takes its place at {nfe}")
        objective = "terminal"
    with log.progress(f"gradient, {nfe} calls", "call", settings.gradient_calls) as advance:

        def on_call(loss: float, best: float) -> None:
            advance(loss=f"{loss:.4g}", best=f"{best:.3g}")
            named = {"best_validation_perceptual": best} if on_images else {}
            log.call(nfe=nfe, loss=loss, **named, best_validation_mse=descent.best.validation_mse)

        descent: Descent
        if on_images:
            descent = PerceptualDescent(form, found, parameters, on_images, on_call)
        else:
            descent = Descent(form, found, parameters, OBJECTIVES[objective], on_call)
        better = descent.run("lbfgs", settings.gradient_calls, settings.learning_rate)
    if not isinstance(descent, PerceptualDescent):
        return better, {}
    log.say(
        f"held out at {nfe} calls: perceptual loss {descent.before:.4g} -> {descent.reached:.4g}, final-state mse "
        f"{found.validation_mse:.4g} -> {better.validation_mse:.4g}"
    )
    return better, {"validation_perceptual": descent.reached, "validation_perceptual_before": descent.before}
