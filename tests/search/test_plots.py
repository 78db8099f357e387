"""The pictures: what is drawn is what the files say, in every variant that is written, and bad files write nothing."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from diffusers_dssolver import DSSolverScheduler, SolverSpec
from diffusers_dssolver.derive import classical, uniform_nodes
from diffusers_dssolver.published import published_config
from dssolver_search.artefacts import plots
from dssolver_search.artefacts.plots import (
    EQ_20,
    EQ_21,
    MOST_NUMBERED,
    MOST_TABLES,
    coefficients_figure,
    drawings,
    nodes_figure,
    search_figure,
)
from dssolver_search.artefacts.read import read_metrics
from dssolver_search.cli import main
from dssolver_search.measure.pictures import WIDTH, error_figure, rendered
from tests.families import make_path
from tests.searches import refused, search

FLOW = {"prediction_type": "flow_prediction"}
NAMES = ("nodes", "coefficients", "search", "error")
VARIANTS = ("png", "svg", "-dark.png", "-dark.svg")


def spec_of(nfe, order=3):
    return classical(uniform_nodes(nfe, make_path("flow")), make_path("flow"), order)


def result(scheduler, nfe, mse, searched=False, **more):
    facts = {"scheduler": scheduler, "nfe": nfe, "spacing": "uniform", "calls": nfe, "mse": mse, "searched": searched}
    return {**facts, "seconds": 0.1, **more}


RESULTS = [result(*facts) for facts in (("ours", 3, 0.01, True), ("ours", 8, 0.001, True), ("unipc", 3, 0.02),
                                        ("unipc", 8, 0.004), ("broken", 3, float("inf")))]  # fmt: skip
COMPARISON = {
    "settings": {"num_samples": 4, "pretrained_model_name_or_path": "org/model", "nfe": [3, 8]},
    "reference": {"steps": 100, "mse_against_half_the_steps": 1e-6}, "versions": {"torch": "2"}, "results": RESULTS,
}  # fmt: skip
RECORDS = [
    {"teacher": {"steps": 50}, "network_evaluations": 100},
    {"nfe": 3, "train_mse": 0.5, "network_evaluations": 110},
    {"nfe": 3, "train_mse": 0.7, "network_evaluations": 120},
    {"nfe": 3, "train_mse": 0.2, "network_evaluations": 130},
    {"nfe": 3, "stage": "closed_form", "validation_mse": 0.4, "network_evaluations": 140},
    {"nfe": 3, "loss": 0.1, "validation_mse": 0.9, "best_validation_mse": 0.3},
    {"nfe": 3, "stage": "gradient", "validation_mse": 0.25, "network_evaluations": 160},
    {
        "nfe": 3,
        "validation_mse": 0.25,
        "classical_mse": 0.6,
        "network_evaluations": 60,
        "total_network_evaluations": 160,
    },
    {"nfe": 4, "train_mse": 0.3, "network_evaluations": 170},
    {
        "nfe": 4,
        "validation_mse": 0.2,
        "classical_mse": 0.5,
        "network_evaluations": 10,
        "total_network_evaluations": 170,
    },
]


@pytest.fixture
def solver(tmp_path):
    """Folder of a flow solver at 3 and 8 calls."""
    tables = {str(n): spec_of(n).to_dict() for n in (3, 8)}
    DSSolverScheduler.from_config(FLOW, solvers=tables).save_pretrained(tmp_path / "solver")
    return tmp_path / "solver"


@pytest.fixture
def comparison(tmp_path):
    """Writes a comparison and returns its folder."""

    def write(record=COMPARISON):
        (tmp_path / "compared").mkdir(exist_ok=True)
        (tmp_path / "compared" / "comparison.json").write_text(json.dumps(record))
        return tmp_path / "compared"

    return write


@pytest.fixture
def quick(monkeypatch):
    """Files that hold the name of their picture and variant in place of it."""
    named = {f"{name}_figure": name for name in NAMES}
    monkeypatch.setattr(
        plots, "rendered", lambda draw, dark, kind: f"{named[draw.func.__name__]} {dark} {kind}".encode()
    )


def files_of(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("name, fit, other", [("sit-xl-2-256", EQ_20, EQ_21), ("dit-xl-2-256", EQ_21, EQ_20)])
def test_the_papers_fits_are_near_its_own_solvers(name, fit, other):
    assert np.polyval(fit, 0) == 0 and np.polyval(fit, 1) == pytest.approx(1, abs=0.011)
    for nfe, table in published_config(name)["solvers"].items():
        share, nodes = np.linspace(0, 1, int(nfe) + 1), np.array(table["nodes"])
        assert abs(1 - np.polyval(fit, share) - nodes).max() < 0.07
        assert abs(1 - np.polyval(other, share) - nodes).max() > 0.2


@pytest.mark.parametrize("flow", [True, False])
def test_nodes_are_drawn_where_they_are(flow):
    specs = [SolverSpec((1, 0.7, 0), ((1,), (-0.5, 1.5))), spec_of(3)]
    rows, curves = nodes_figure(specs, flow).axes
    assert [list(line.get_xdata()) for line in rows.lines] == [list(spec.nodes) for spec in specs]
    assert [text.get_text() for text in rows.get_yticklabels()] == ["2", "3"]
    assert rows.get_xlim()[0] > rows.get_xlim()[1]  # time runs from noise to data
    first, _, fit, uniform = curves.lines
    np.testing.assert_array_equal(first.get_xydata(), [(0, 1), (0.5, 0.7), (1, 0)])
    half = -1.96 / 16 + 3.51 / 8 - 0.97 / 4 + 0.43 / 2 if flow else -2.73 / 16 + 6.3 / 8 - 4.744 / 4 + 2.17 / 2
    assert np.interp(0.5, *fit.get_data()) == pytest.approx(1 - half)
    assert ("20" if flow else "21") in fit.get_label() and np.interp(0.3, *uniform.get_data()) == pytest.approx(0.7)


def test_every_coefficient_has_its_cell_and_its_sign():
    few, many = spec_of(3), spec_of(MOST_NUMBERED + 2)
    figure = coefficients_figure([few, many])
    small, large = figure.axes[:2]
    for axis, spec in ((small, few), (large, many)):
        table = axis.images[0].get_array()
        for i in range(spec.nfe):
            np.testing.assert_allclose(table[i, : i + 1], np.abs(spec.coefficients[i]))
            assert table.mask[i, i + 1 :].all()
        assert axis.images[0].norm.vmin == 0
        assert axis.images[0].norm.vmax == pytest.approx(
            max(abs(c) for s in (few, many) for r in s.coefficients for c in r)
        )
    numbers = {tuple(map(round, text.get_position())): text.get_text() for text in small.texts}
    expected = {
        (j, i): f"{c:.2f}".replace("-", "\N{MINUS SIGN}")
        for i, r in enumerate(few.coefficients)
        for j, c in enumerate(r)
    }
    assert numbers == expected and not large.texts
    negative = {(j, i) for i, row in enumerate(many.coefficients) for j, c in enumerate(row) if c < 0}
    assert negative and {tuple(p) for p in large.collections[0].get_offsets().astype(int).tolist()} == negative


def test_search_curves_by_hand():
    """Calls of a descent do not say what they cost: they lie between their neighbours. Filled tables have no curve."""
    training, held_out = search_figure(RECORDS).axes
    tried, best = training.lines
    np.testing.assert_allclose(tried.get_xydata(), [(110, 0.5), (120, 0.7), (130, 0.2), (150, 0.1)])
    np.testing.assert_allclose(best.get_xydata(), [(110, 0.5), (120, 0.5), (130, 0.2), (150, 0.1)])
    [errors] = held_out.lines
    np.testing.assert_allclose(errors.get_xydata(), [(140, 0.4), (150, 0.3), (160, 0.25), (160, 0.25)])
    np.testing.assert_allclose(held_out.collections[0].get_segments(), [[(110, 0.6), (160, 0.6)]])
    assert errors.get_label() == "NFE 3"


def test_a_real_search_has_curves(model, tmp_path, quick):
    few = {"nfe": [3], "fill_nfe": [], "teacher_steps": 8, "trials": 4, "starts": 1}
    search(model, tmp_path / "run", **few)
    main(["plot", "--solver", str(tmp_path / "run")])
    assert {f"search{'.' * (v[0] != '-')}{v}" for v in VARIANTS} <= set(files_of(tmp_path / "run"))
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    tried = [r["train_mse"] for r in records if "train_mse" in r]
    training, held_out = search_figure(records).axes
    assert training.lines[0].get_ydata().tolist() == tried and len(tried) > 2
    assert held_out.lines[0].get_ydata()[-1] == records[-1]["validation_mse"]


def test_errors_are_drawn_as_measured():
    axis = error_figure([*RESULTS, result("a$b$", 3, 0.5)]).axes[0]
    ours, unipc, broken, odd = axis.lines
    assert ours.get_xydata().tolist() == [[3, 0.01], [8, 0.001]] and unipc.get_xydata().tolist() == [
        [3, 0.02],
        [8, 0.004],
    ]
    assert not len(broken.get_xydata()) and odd.get_label() == r"a\$b\$"
    assert ours.get_linewidth() > unipc.get_linewidth() and axis.get_yscale() == "log"
    assert len({to_hex(line.get_color()) for line in axis.lines}) == 4


def test_every_picture_has_every_variant(solver, comparison, tmp_path, capsys, quick):
    (solver / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    main(["plot", "--solver", str(solver), "--comparison", str(comparison()), "--output_dir", str(tmp_path / "out")])
    assert f"written to {tmp_path / 'out'}: {', '.join(NAMES)} (" in capsys.readouterr().out
    variants = [(dark, kind) for dark in (False, True) for kind in ("png", "svg")]
    wanted = {f"{n}{'-dark' * dark}.{kind}": f"{n} {dark} {kind}" for n in NAMES for dark, kind in variants}
    assert {file.name: file.read_text() for file in (tmp_path / "out").iterdir()} == wanted


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_files_of_pictures(name, dark, solver, comparison):
    """Half of the variants, so that each picture is seen light and dark, and each format too."""
    (solver / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    draw = drawings(str(solver), str(comparison()))[name]
    kind = "png" if (NAMES.index(name) % 2 == 0) == dark else "svg"
    data = rendered(draw, dark, kind)
    if kind == "svg":
        tree = ElementTree.fromstring(data)
        links = [v for node in tree.iter() for k, v in node.attrib.items() if k.endswith("href")]
        assert tree.tag.endswith("svg") and all(v.startswith(("#", "data:")) for v in links)
        assert (b"#0d1117" in data) == dark
    else:
        with Image.open(io.BytesIO(data)) as image:
            assert image.width == 200 * WIDTH
            corner = image.convert("L").getpixel((2, 2))
        assert corner < 30 if dark else corner == 255
    if name == "error":
        assert rendered(draw, dark, kind) == data  # the same data make the same file


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_at_the_width_of_a_card(solver, comparison, dark):
    """8 inches are shown as 800 pixels, so that 7.7 points are 8 CSS points."""
    (solver / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    for name, draw in drawings(str(solver), str(comparison())).items():
        with matplotlib.rc_context({"font.size": 9}):
            figure = draw(dark)
        assert figure.get_figwidth() == WIDTH, name
        assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 7.7, name


def test_a_published_solver_and_chosen_step_counts(tmp_path, quick):
    main(["plot", "--solver", "sit-xl-2-256", "--nfe", "8", "5", "--output_dir", str(tmp_path)])
    assert files_of(tmp_path) == sorted(
        f"{n}{'.' * (v[0] != '-')}{v}" for n in ("nodes", "coefficients") for v in VARIANTS
    )
    draw = drawings("sit-xl-2-256", nfe=[8, 5])["nodes"]
    assert [len(line.get_xdata()) for line in draw(False).axes[0].lines] == [6, 9]


@pytest.mark.parametrize("words, message", [
    (["--solver", "sit-xl-2-256"], "output_dir is missing, and solver 'sit-xl-2-256' is no folder"),
    (["--solver", ""], "solver is missing"),
    (["--nfe", "4"], "has no table for 4 steps; it has them for 3, 8"),
    (["--comparison", "nowhere"], "no comparison could be read from 'nowhere'"),
])  # fmt: skip
def test_bad_settings_write_nothing(words, message, solver, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [] if "--solver" in words else ["--solver", str(solver)]
    before = files_of(solver)
    assert message in refused(capsys, lambda: main(["plot", *given, *words]))
    assert files_of(solver) == before and files_of(tmp_path) == ["solver"]


@pytest.mark.parametrize("change, key", [
    ({"results": []}, "results"),
    ({"results": [{**RESULTS[0], "nfe": "3"}]}, "nfe"),
    ({"results": [{k: v for k, v in RESULTS[0].items() if k != "mse"}]}, "mse"),
    ({"results": 5}, "int"),
    ({"settings": None}, "settings"),
])  # fmt: skip
def test_damaged_comparisons_write_nothing(change, key, solver, comparison, capsys):
    folder = comparison({**COMPARISON, **change})
    before = files_of(solver)
    line = refused(capsys, lambda: main(["plot", "--solver", str(solver), "--comparison", str(folder)]))
    assert f"no comparison could be read from {str(folder)!r}" in line and key in line
    assert files_of(solver) == before


def test_too_many_tables_for_one_picture(tmp_path, capsys):
    tables = {str(n): spec_of(n).to_dict() for n in range(1, MOST_TABLES + 2)}
    DSSolverScheduler.from_config(FLOW, solvers=tables).save_pretrained(tmp_path)
    line = refused(capsys, lambda: main(["plot", "--solver", str(tmp_path)]))
    assert f"{MOST_TABLES + 1} tables; choose at most {MOST_TABLES} with --nfe" in line
    assert list(drawings(str(tmp_path), nfe=[1, 2])) == ["nodes", "coefficients"]


def test_damaged_lines_of_a_log_are_left_out(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"nfe": 3}\n[1]\n\xff\n{"nfe": 4, "train_')
    assert read_metrics(file) == [{"nfe": 3}]
    said = capsys.readouterr().err
    assert [f"line {n} is damaged and left out" in said for n in (1, 2, 3, 4)] == [False, True, True, True]


def test_a_log_of_nonsense_is_no_error():
    odd = [{"nfe": {}, "train_mse": 1.0}, {"nfe": 3, "train_mse": "x", "loss": True}, {"nfe": 3, "loss": float("nan")}]
    assert not search_figure(odd).axes[0].lines
