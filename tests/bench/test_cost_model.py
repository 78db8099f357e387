"""The cost model: its FLOPs and bytes against hand counts, its evaluations against what searches count."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from dssolver_search.methods import check, gauss_newton
from dssolver_search.methods import search as run_module
from dssolver_search.methods.closed_form import fit
from dssolver_search.methods.gauss_newton import Polish, parametrised
from dssolver_search.methods.gradient import Descent
from dssolver_search.methods.objective import terminal_loss
from dssolver_search.methods.setup import check_shares
from dssolver_search.settings import SearchConfig
from tests import documents
from tests.bench import cost_model
from tests.bench.cost_model import MODELS, busiest, measured, numbers, reduced_bytes, report
from tests.families import WARP, searched
from tests.search.test_gradient import told
from tests.searches import CLOSED_FORM, PAPER, lines_of, search

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")
PUBLISHED = {"SDXL": "2.57", "SD3.5-medium": "2.5", "SD3.5-large": "8.1", "FLUX.1-dev": "11.9"}  # 10^9
IMAGE, SD3, FLUX = 64**2, 64**2 + 333, 64**2 + 512  # tokens


@pytest.fixture(scope="module")
def sizes():
    return {model.name: measured(model) for model in MODELS}


def attention(queries, keys, width):
    """Multiply-adds count two, scores and values."""
    return 4 * queries * keys * width


ATTENTION = {
    # two blocks down and three up, two layers each; the same with ten each, and ten in the middle
    "SDXL": 10 * (attention(64**2, 64**2, 640) + attention(64**2, 77, 640))
    + 60 * (attention(32**2, 32**2, 1280) + attention(32**2, 77, 1280)),
    "SD3.5-medium": 24 * attention(SD3, SD3, 24 * 64) + 13 * attention(IMAGE, IMAGE, 24 * 64),
    "SD3.5-large": 38 * attention(SD3, SD3, 38 * 64),
    "FLUX.1-dev": (19 + 38) * attention(FLUX, FLUX, 3072),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones_and_attention_is_counted(name, sizes):
    size, count = sizes[name]
    assert f"{size / 1e9:.{len(PUBLISHED[name].split('.')[1])}f}" == PUBLISHED[name]
    assert count["bmm"] == ATTENTION[name]


@pytest.mark.parametrize(
    "name, matrices",
    [
        ("FLUX.1-dev", 57 * 12 * 3072**2 * FLUX),  # either kind of block: 4 of attention, 8 around it, per token
        ("SD3.5-large", 38 * 12 * 2432**2 * SD3 - 9 * 2432**2 * 333),  # the last block drops the text
    ],
)
def test_matrices_of_the_blocks_are_the_rest(name, matrices, sizes):
    _, count = sizes[name]
    assert 1 < (sum(count.values()) - count["bmm"]) / (2 * matrices) < 1.001  # modulation, embeddings, ends


def test_a_backward_pass_to_the_latent_takes_less_than_it_is_charged():
    model = MODELS[1]
    short = model.config | {"num_layers": 4, "dual_attention_layers": (0, 1)}  # of 24 and 13; all alike
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = model.kind(**short).eval().requires_grad_(False)
        inputs = {k: torch.zeros(shape) for k, shape in model.inputs.items()}
        out = network(**{**inputs, "hidden_states": inputs["hidden_states"].requires_grad_()}).sample
        forward = counter.get_total_flops()
        out.sum().backward()
    assert counter.get_total_flops() / forward - 1 == pytest.approx(1.37, abs=0.005)


# --- evaluations -----------------------------------------------------------------------------------------------------

FEW = {**CLOSED_FORM, "trials": 4, "teacher_steps": 10}
RUNS = {
    "closed_form": {**FEW, "nfe": [2, 3], "fill_nfe": [2, 4]},
    "starts": {**FEW, "nfe": [3], "fill_nfe": [], "polish": 0, "starts": 3},
    "few": {**FEW, "nfe": [4], "fill_nfe": [2, 4]},
    "gradient": {**FEW, "method": "gradient", "nfe": [2], "fill_nfe": [], "gradient_calls": 3},
    "quick": {**FEW, "effort": "quick", "nfe": [4, 5], "fill_nfe": [3, 6], "num_polish_samples": 2, "polish": 1},
    "paper": {**PAPER, "num_generated_samples": 9, "validation_steps": 2, "teacher_steps": 10},
}  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
def test_formulas_are_what_searches_count(run, model, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "preflight", told("full"))  # not counted
    monkeypatch.setattr(check, "CLEAR", 0.0)  # no doubt is left
    monkeypatch.setattr(check, "FEW", 2)
    monkeypatch.setattr(cost_model, "FEW", 2)
    monkeypatch.setattr(gauss_newton, "IN_TURN", (0.1,))
    config = SearchConfig("model", "folder", **RUNS[run])
    search(model, tmp_path, RUNS[run])
    state = json.loads((tmp_path / "search_state.json").read_text())
    if config.method == "gradient":  # it may end early, or in the midst of a line search
        config = dataclasses.replace(config, gradient_calls=sum("loss" in line for line in lines_of(tmp_path)))
    wanted = busiest(cost_model.search(config))
    for n, entry in state["solvers"].items():
        mse = {stage["stage"]: stage["validation_mse"] for stage in entry.get("stages", [])}
        if "polish" in mse and mse["polish"] == mse["closed_form"]:  # not kept: it arrived nowhere
            wanted -= int(n) * min(config.num_polish_samples, config.num_train_samples)
    assert state["network_evaluations"] == 2 * wanted
    samples = config.num_validation_samples + (config.num_train_samples if config.method != "paper" else 0)
    states = [load_file(file)["states"] for file in (tmp_path / "cache").iterdir()]
    assert sum(s.nbytes for s in states) == 4 * (4 * 4) * (config.teacher_steps + 1) * samples


def test_a_table_by_hand():
    """In full, 5 calls: 40 trials from the best start, 20 from each of three others, whose best are fitted again, as
    are five of the best start's and one with two ridges; seven are judged; two polish iterations over 4 step sizes, 10
    corrections, 5 times."""
    config = SearchConfig("model", "folder", nfe=[5], fill_nfe=[], effort="full")
    differences = 4 * 4 + (1 * 3 + 2 * 2 + 3 * 1) + (5 + 4 + 3 + 2 + 1)
    train = 1 + (3 + 7) * 4 + (4 + differences) + (5 + differences) + 5
    held_out = 1 + 7 * 4 + 2 * 3 * 5
    assert busiest(cost_model.solver(config, 5)) == 32 * (1 + (40 + 3 * 20) * 4) + 64 * train + 32 * held_out
    teacher = (64 + 32) * 200 + 4 * (200 + 400)
    assert busiest(cost_model.search(config)) == teacher + busiest(cost_model.solver(config, 5)) + 32 * 3 * 4


# --- several GPUs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gpus, calls", [(1, 64 * 10 + 32 * 3), (8, 8 * 10 + 4 * 3), (48, 2 * 10 + 3), (64, 10 + 3), (512, 10 + 3)]
)
def test_the_busiest_gpu(gpus, calls):
    assert busiest([("a", 64, 10), ("b", 32, 3)], gpus) == calls


def test_more_processes_than_held_out_samples_are_refused():
    config = SearchConfig("model", "folder", effort="full")
    check_shares(config, 32)
    with pytest.raises(ValueError, match="each needs one"):
        check_shares(config, 33)


def test_bytes_that_are_summed():
    sums = []
    problem = dataclasses.replace(searched("flow"), reduce=lambda tensor: sums.append(tensor.nbytes) or tensor)
    found = fit(problem, 4, WARP, 1e-4, problem.train)
    newton = Polish(problem, found, parametrised(problem, found))
    row, descent, polished = reduced_bytes(4)
    assert numbers(4) == newton.count == 3 + 6 + 4
    assert sums == [8 * 1 * 2, 8 * 2 * 3, row, 16] and row == 8 * 3 * 4  # three rows, then the error
    sums.clear()
    newton.steps(torch.zeros(13, dtype=torch.float64))
    assert sum(sums) == polished == 8 * (13 * 13 + 13)
    descending = Descent(problem, found, parametrised(problem, found), terminal_loss)
    sums.clear()
    descending.value()
    assert sums == [descent] == [8 * (13 + 1)]


# --- report ----------------------------------------------------------------------------------------------------------


def test_the_document_holds_the_report(sizes, monkeypatch):
    monkeypatch.setattr(cost_model, "measured", lambda model: sizes[model.name])
    text = report()
    assert documents.block("cost") == text.rstrip()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    sdxl = next(row for row in cells if row[0] == "SDXL")
    seconds = sum(sizes["SDXL"][1].values()) / (989e12 * 0.4)
    # 51 states of 4 x 128 x 128 float32 for 64 samples; 9 + 45 + 10 differences of 7 samples
    cache, jacobian = 51 * 4 * 128**2 * 4 * 64 / 1e9, 7 * 64 * 4 * 128**2 * 4 / 1e9
    assert sdxl[-3:] == [f"{seconds:.3f}", f"{cache:.1f} GB", f"{jacobian:.1f} GB"]
    for name, effort in (("closed_form", "quick"), ("closed_form, effort full", "full")):
        found = next(row for row in cells if row[:2] == ["SDXL", name])
        works = cost_model.search(SearchConfig("model", "folder", nfe=[5, 6, 8, 10], effort=effort))
        minutes = 2 * busiest(works) * seconds / 60
        assert found[2:5] == [f"{2 * busiest(works):,}", f"{minutes * 989 / 165.2:,.0f}", f"{minutes:,.0f}"]
        once = sum(calls for _, _, calls in works)  # 512: each stage's calls once
        assert found[-2:] == [f"{2 * once * seconds / 3600:.3g}", f"{1 - busiest(works) / (512 * once):.0%}"]
    quick = 6 + 8 * (2 + 3 + 4 + 5 + 7 + 9)  # eight trials at 3 to 6, 8 and 10 calls, after the first one
    assert ["trial fits", "10", f"{quick:,}", "0", f"{quick:,}", "0", "0", "22", "502"] in cells
    calls = 2 + 3 + 4 + 5 + 7 + 9
    assert ["final fits", "64", "0", f"{6 + (3 + 7) * calls:,}", "0", "0", "0", "0", "448"] in cells
    assert "More than 10 processes are refused" in text
    assert report(peak=2 * 989)[:50] == text[:50] and report(peak=2 * 989) != text
