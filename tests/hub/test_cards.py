"""Cards: they say what the data say, their code runs, their commands parse, and the shipped ones are not stale."""

from __future__ import annotations

import copy
import json
import re
import shlex
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, DiTPipeline
from huggingface_hub import ModelCard

from diffusers_dssolver import DSSolverScheduler, SolverSpec, published_solvers
from diffusers_dssolver.card import CARD, render, schedule, without_paths
from diffusers_dssolver.pipelines import SiTPipeline
from diffusers_dssolver.published import cards_folder, published_config
from dssolver_search.artefacts import figures
from dssolver_search.artefacts.publish import EVAL, rendered
from dssolver_search.cli import main
from dssolver_search.console import metric_name
from dssolver_search.settings import CompareConfig, MergeConfig, SearchConfig, parse, tomllib
from tests.families import make_pipe
from tests.pipelines.zoo import make_dit

ROOT = Path(__file__).resolve().parents[2]
COMPARISON = json.loads((ROOT / "search" / "results" / "comparison-flow.json").read_text(encoding="utf-8"))
EVALUATION = {
    "settings": {"pretrained_model_name_or_path": "org/model", "nfe": [5], "guidance_scale": None, "call": {"eta": 1}},
    "extractor": "inception", "clip": "org/clip", "data": {"name": "org/images", "n": 5000},
    "versions": {"torch": "2.13.0"},
    "results": [
        {
            "scheduler": "mine", "nfe": 5, "spacing": None, "calls": 5, "n": 2000, "seconds_per_image": 0.1,
            "metrics": {"frechet_distance": {"value": 3.14159, "interval": [3.0, 3.25]}, "clip_score": {"value": 0.5}},
        },
        {
            "scheduler": "unipc", "nfe": 5, "spacing": "karras", "calls": 5, "n": 2000, "seconds_per_image": 0.1,
            "metrics": {"frechet_distance": {"value": 9.5}},
        },
    ],
}  # fmt: skip
FACTS = {
    "kind": "searched", "method": "closed_form", "model": "org/model", "revision": None, "pipeline": "FluxPipeline",
    "call": {"guidance_scale": 3.5, "height": 512}, "dtype": "bfloat16", "seed": 7, "processes": 2,
    "teacher": {"steps": 100, "order": 3, "scheduler": "", "estimated_mse": 1e-6},
    "samples": {"train": 48, "validation": 24},
    "results": {"2": {"kind": "searched", "warp": [0.5, 1.0]}, "3": {"kind": "filled", "source": "derived"}},
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")


def make_config(**facts):
    tables = {str(n): SolverSpec.euler([1 - i / n for i in range(n)] + [0.0]).to_dict() for n in (2, 3)}
    return {"prediction_type": "flow_prediction", "shift": 3.0, "solvers": tables, "provenance": facts}


def card_of(measured=None, source="org/mine", facts=FACTS, **kwargs):
    return ModelCard(figures.card(make_config(**facts), source, measured or {}, **kwargs))


def section(card, title):
    return card.text.split(f"## {title}\n")[1].split("\n## ")[0]


def rows(text):
    """Cells of the tables in a text, without their heads' rules."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def code(card):
    return re.findall(r"```python\n(.*?)\n```", card.text, flags=re.DOTALL)


def commands(card):
    return [line for line in section(card, "Reproduce").splitlines() if line.startswith("python -m")]


def settings_of(command, cls):
    python, m, package, _, *words = shlex.split(command)
    assert (python, m, package) == ("python", "-m", "dssolver_search")
    return parse(cls, words, "prog")


# --- the shipped ones -------------------------------------------------------------------------------------------------


def test_shipped_cards_and_their_index_are_not_stale():
    """Else: python -m dssolver_search cards."""
    texts = rendered(ROOT / "hub_cards")
    assert len(texts) == len(published_solvers()) + 1
    assert [str(file) for file, text in texts.items() if file.read_text(encoding="utf-8") != text] == []


def test_the_command_renders_what_is_stale_and_nothing_else(tmp_path, capsys):
    for file in (ROOT / "hub_cards").glob("*/*.json"):
        copied = tmp_path / file.parent.name / file.name
        copied.parent.mkdir(exist_ok=True)
        copied.write_bytes(file.read_bytes())
    (tmp_path / CARD).write_text("before\n<!-- solvers -->\nold\n<!-- /solvers -->\nafter\n")
    main(["cards", "--folder", str(tmp_path)])
    assert len(capsys.readouterr().out.splitlines()) == 4
    index = (tmp_path / CARD).read_text()
    assert index.startswith("before\n<!-- solvers -->\n| solver") and index.endswith("|\n<!-- /solvers -->\nafter\n")
    assert [row[0] for row in rows(index)[1:]] == [f"[{name}]({name}/{CARD})" for name in published_solvers()]
    (tmp_path / "sit-xl-2-256" / CARD).write_text("mine")
    main(["cards", "--folder", str(tmp_path)])
    assert capsys.readouterr().out == f"rendered {tmp_path / 'sit-xl-2-256' / CARD}\n"


@pytest.mark.parametrize("name", published_solvers())
def test_shipped_card_has_every_fact_and_marks_what_is_reported(name):
    card = ModelCard((cards_folder() / name / CARD).read_text(encoding="utf-8"))
    facts = published_config(name)["provenance"]
    assert rows(section(card, "Provenance"))[1:] == [
        [f"`{key}`", f"`{value if isinstance(value, str) else json.dumps(value)}`"] for key, value in facts.items()
    ]
    data = card.data.to_dict()
    assert data.pop("base_model", None) == facts.get("base_model")
    assert set(data) == {"library_name", "license", "tags"}  # no model-index: nothing was measured here
    assert (data["library_name"], data["license"]) == ("diffusers", "mit")
    reported = json.loads((cards_folder() / name / EVAL).read_text(encoding="utf-8"))["reported"]
    before, after = section(card, "Figures").split("not measured by this project")
    assert rows(before) == [] and "arXiv 2505.21114" in before
    for table in reported["tables"]:
        assert table["title"] in after
        for who, row in table["figures"].items():
            assert [who, *map(str, row.values())] in rows(after)
    assert "Measured on" not in card.text
    assert "The numbers are those of the release" in section(card, "Reproduce")


def test_reported_figures_are_those_of_the_abstract():
    """FID with 10 steps: SiT-XL/2 2.40, FlowDCN-XL/2 2.35 and DiT-XL/2 2.33 on ImageNet 256x256."""
    read = {n: json.loads((cards_folder() / n / EVAL).read_text(encoding="utf-8")) for n in published_solvers()}
    tables = [table for record in read.values() for table in record["reported"]["tables"]]
    found = {t["title"].split(", ")[1]: t["figures"]["this solver"]["10"] for t in tables if "256x256" in t["title"]}
    assert found == {"SiT-XL/2": 2.40, "FlowDCN-XL/2": 2.35, "DiT-XL/2": 2.33}


@pytest.mark.parametrize(
    "name, cls, pipe",
    [
        ("dit-xl-2-256", DiTPipeline, make_dit),
        ("sit-xl-2-256", SiTPipeline, lambda: make_pipe("flow")),
        ("flowdcn-b-2-256", DiffusionPipeline, lambda: Unconditional(make_pipe("flow"))),
    ],
)
def test_code_of_a_shipped_card_runs(name, cls, pipe, monkeypatch):
    loaded = []
    monkeypatch.setattr(cls, "from_pretrained", lambda model: loaded.append(model) or pipe())
    (text,) = code(ModelCard((cards_folder() / name / CARD).read_text(encoding="utf-8")))
    scope: dict = {}
    exec(text, scope)
    assert loaded == ["facebook/DiT-XL-2-256" if name.startswith("dit") else "MODEL"]
    assert scope["pipe"].scheduler.config.provenance["model"] == published_config(name)["provenance"]["model"]
    assert scope["pipe"].scheduler.num_inference_steps == 8 and len(scope["output"].images) == 1


class Unconditional:
    """A pipeline whose call needs no condition."""

    def __init__(self, pipe):
        self.scheduler, self.pipe = pipe.scheduler, pipe

    def __call__(self, **kwargs):
        self.pipe.scheduler = self.scheduler
        return self.pipe([0], **kwargs)


def test_everything_in_the_folder_travels_in_the_wheel():
    package = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = package["package-data"]["diffusers_dssolver.hub_cards"]
    shipped = {file for pattern in patterns for file in cards_folder().glob(pattern)}
    beside = {cards_folder() / "LICENSE.NeuralSolver", cards_folder() / "card.md.jinja"}
    assert shipped == beside | {file for file in cards_folder().glob("*/*") if file.is_file()}


# --- text and figures -------------------------------------------------------------------------------------------------


def test_table_of_a_comparison():
    card = card_of({"comparison": COMPARISON}, name="closed_form")
    head, *body = rows(section(card, "Figures"))
    results = COMPARISON["results"]
    assert [row[0] for row in body] == ["5", "6", "8", "10"] and head[-1] == "ratio"
    for nfe, ours, theirs, which, ratio in body:
        mine = next(r["mse"] for r in results if r["scheduler"] == "closed_form" and r["nfe"] == int(nfe))
        best = sorted((r["mse"], r["scheduler"]) for r in results if not r["searched"] and r["nfe"] == int(nfe))[0]
        assert ours == f"{mine:.3g} (searched)" and float(theirs) == float(f"{best[0]:.3g}")
        assert which.startswith(best[1]) and float(ratio) == round(mine / best[0], 2)
    assert "against 400 steps" in card.text and "64 test samples" in card.text and "seed 0" in card.text
    assert '- Measured on `flow` called with `{"guidance_scale": 1.5}`, at 5, 6, 8 and 10 network calls.' in card.text
    assert "Not measured" not in card.text


def test_table_of_an_evaluation():
    card = card_of({"evaluation": EVALUATION})
    assert rows(section(card, "Figures")) == [
        ["scheduler", "network calls", "n", "FID", "CLIP score (org/clip)"],
        ["**mine**", "5", "2000", "3.142 (3 to 3.25)", "0.5"],
        ["unipc (karras)", "5", "2000", "9.5", "-"],
    ]
    assert "Against 5000 images of `org/images`, in the features of `inception`" in card.text
    assert 'Measured on `org/model` called with `{"eta": 1}`, at 5 network calls.' in card.text


@pytest.mark.parametrize(
    "extractor, names",
    [
        ("inception", ["FID", "KID", "Recall"]),
        ("inception2", ["Frechet distance (inception2)", "Kernel distance (inception2)", "Recall (inception2)"]),
    ],
)
def test_only_inception_gives_an_fid(extractor, names):
    assert [metric_name(m, extractor) for m in ("frechet_distance", "kernel_distance", "recall")] == names


def test_model_index_has_what_was_measured_and_of_this_solver_only():
    measured = {"comparison": {**COMPARISON, "results": copy.deepcopy(COMPARISON["results"])}, "evaluation": EVALUATION}
    measured["comparison"]["results"][0]["scheduler"] = "mine"
    card = card_of({**measured, "reported": {"source": "x", "url": "y", "tables": []}})
    mse, fid, clip = card.data.eval_results
    assert (mse.metric_type, mse.metric_value) == ("mse", COMPARISON["results"][0]["mse"])
    assert mse.metric_args == {"nfe": 5, "guidance": 1.5, "n": 64, "reference_steps": 400}
    measured["comparison"]["reference"] = {**COMPARISON["reference"], "end": 0.1}
    ended = card_of(measured)
    assert ended.data.eval_results[0].metric_args["reference_end"] == 0.1
    assert "Final-state mse against 400 steps, the last from 0.1 to the data (" in ended.text
    assert "Final-state mse against 400 steps (" in card.text
    assert (fid.metric_type, fid.metric_name, fid.metric_value) == ("frechet_distance", "FID", 3.14159)
    common = {"nfe": 5, "n": 2000, "extractor": "inception"}
    assert fid.metric_args == {**common, "interval": [3.0, 3.25]} and clip.metric_args == {
        **common,
        "extractor": "org/clip",
    }
    assert fid.dataset_name == "org/images" and fid.task_type == "text-to-image"


@pytest.mark.parametrize(
    "facts, expected",
    [
        ({"model": "org/model", "pipeline": "FluxPipeline"}, ("text-to-image", "org/model")),
        ({"model": "flow", "pipeline": "WanPipeline"}, ("text-to-video", None)),
        ({"model": "org/model", "pipeline": "StableDiffusionXLImg2ImgPipeline"}, ("image-to-image", "org/model")),
        ({"model": "org/model", "pipeline": "DiTPipeline"}, (None, "org/model")),
        ({"model": "/home/me/model", "pipeline": "FluxPipeline"}, ("text-to-image", None)),
        ({"model": "a model, of 256/2", "pipeline": "NoPipeline"}, (None, None)),
        ({"pipeline": ["FluxPipeline"]}, (None, None)),
        ({}, (None, None)),
    ],
)
def test_metadata_from_the_provenance(facts, expected):
    card = card_of(facts=facts)
    assert "/home" not in card.content
    data = card.data.to_dict()
    assert (data.get("pipeline_tag"), data.get("base_model")) == expected
    assert data["license"] == "apache-2.0" and "base_model_relation" not in data
    assert card_of(facts=facts, license="mit").data.license == "mit"


@pytest.mark.parametrize(
    "config, text",
    [
        ({"prediction_type": "flow_prediction", "shift": 3.0}, "flow, shift 3"),
        ({"prediction_type": "flow_prediction", "use_dynamic_shifting": True}, "flow, dynamic shift"),
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
         "vp, scaled_linear betas 0.00085 to 0.012"),
        ({"trained_betas": [0.1, 0.2]}, "vp, betas of its own"),
    ],
)  # fmt: skip
def test_noise_schedules_in_words(config, text):
    assert schedule({**config, "solvers": {}}) == text


def test_every_field_of_the_provenance_and_none_of_its_markdown():
    hostile = {
        "a": "`x` | y\n\n# z", "b": {"c|d": [1, {"e": "|`"}], "empty": {}}, "f": "ü <script>", "g`\n": None, "h": 1e-30
    }  # fmt: skip
    body = rows(section(card_of(facts=hostile), "Provenance"))[1:]
    read = {json.loads(f'"{key[1:-1]}"'): value[1:-1] for key, value in body}
    assert all(
        len(row) == 2 and all(cell[0] == cell[-1] == "`" and "`" not in cell[1:-1] for cell in row) for row in body
    )
    assert json.loads(f'"{read.pop("a")}"') == hostile["a"] and json.loads(f'"{read.pop("f")}"') == hostile["f"]
    found = {key: json.loads(value) for key, value in read.items()}
    assert found == {"b.c|d": hostile["b"]["c|d"], "b.empty": {}, "g`\n": None, "h": 1e-30}


@pytest.mark.parametrize(
    "text, kept",
    [
        ("/home/me/runs/flow", "flow"),
        ("/home/me/my runs/flow/", "flow"),
        ("~/runs", "runs"),
        ("../runs", "runs"),
        ("file:///home/me/x.txt", "x.txt"),
        (r"C:\Users\me\flow", "flow"),
        ("search/demo/flow", "flow"),
        ("org/model", "org/model"),
        ("https://arxiv.org/abs/2505.21114", "https://arxiv.org/abs/2505.21114"),
        ("a cat / a dog / a bird", "a cat / a dog / a bird"),
        ("package.module:factory", "package.module:factory"),
        ("x" * 5000 + "/y", "x" * 5000 + "/y"),
    ],
)
def test_paths_leave_their_last_part(text, kept):
    assert without_paths({"a": [text, 1], "b": {"c": text}}) == {"a": [kept, 1], "b": {"c": kept}}


def test_a_folder_that_is_there_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "runs" / "flow").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert without_paths(["runs/flow", "runs/other"]) == ["flow", "runs/other"]


def test_pictures_that_are_there_are_shown():
    shown = re.findall(r"!\[.+?\]\((.+?)\)", card_of(pictures=["nodes.png", "error.png", "other.png"]).text)
    assert shown == ["error.png", "nodes.png"]
    assert "![" not in card_of().text


# --- code and commands ------------------------------------------------------------------------------------------------


def test_code_asks_for_what_was_searched():
    (text,) = code(card_of())
    assert text.splitlines()[-3:] == [
        'pipe = FluxPipeline.from_pretrained("org/model")',
        'pipe.scheduler = DSSolverScheduler.from_config(pipe.scheduler.config, solvers="org/mine")',
        'output = pipe(prompt="a lighthouse at dusk", num_inference_steps=3, guidance_scale=3.5, height=512)',
    ]
    hostile = {**FACTS, "model": 'a"\nimport os', "call": {"x); import os; f(y": 1, "text": "ü'\"\n", "on": True}}
    (text,) = code(card_of(facts=hostile))
    assert text.endswith('num_inference_steps=3, text="ü\'\\"\\n", on=True)')
    compile(text, "card", "exec")
    assert len(text.splitlines()) == 6


def test_code_of_a_merged_solver_runs(model, tmp_path, monkeypatch):
    tables = make_config()["solvers"]
    facts = {"kind": "merged", "model": "flow", "pipeline": "SiTPipeline", "call": {"guidance_scale": [1.5, 4.0]}}
    by_scale = {"1.5": tables, "4.0": tables}
    merged = DSSolverScheduler(
        prediction_type="flow_prediction", solvers=tables, guidance_solvers=by_scale, provenance=facts
    )
    merged.save_pretrained(tmp_path / "merged")
    (tmp_path / "flow").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(code(ModelCard(render(merged.config, "merged")))[0], scope)
    assert scope["pipe"].scheduler.config.guidance_scale == 1.5 and scope["pipe"].scheduler.num_inference_steps == 3


def test_commands_give_the_settings_again():
    search, compare = commands(card_of({"comparison": COMPARISON}, name="closed_form"))
    config = settings_of(search, SearchConfig)
    assert config == SearchConfig(
        pretrained_model_name_or_path="org/model", output_dir="searched-1", nfe=[2], guidance_scale=3.5,
        call={"height": 512}, dtype="bfloat16", seed=7, num_train_samples=48, num_validation_samples=24,
        teacher_steps=100, teacher_order=3,
    )  # fmt: skip
    expected = {**COMPARISON["settings"], "pretrained_model_name_or_path": "flow"}
    assert settings_of(compare, CompareConfig) == CompareConfig(**expected)
    assert "does not record are left out" in card_of().text


def test_commands_of_recorded_settings_of_the_paper_and_of_a_merged_solver():
    told = {"pretrained_model_name_or_path": "org/model", "trials": 3, "fill_nfe": [], "call": {"text": "it's a $HOME"}}
    (search,) = commands(card_of(facts={**FACTS, "settings": told}))
    assert settings_of(search, SearchConfig) == SearchConfig(**told, output_dir="searched-1")
    assert "does not record are left out" not in card_of(facts={**FACTS, "settings": told}).text
    (search,) = commands(card_of(facts={**FACTS, "method": "paper"}))
    config = settings_of(search, SearchConfig)
    assert (config.num_generated_samples, config.guidance_scale) == (48, 3.5)
    each = {str(w): {**FACTS, "call": {"guidance_scale": w}} for w in (1.0, 2.0)}
    merged = {"kind": "merged", "model": "org/model", "default_guidance_scale": 2.0, "by_guidance_scale": each}
    *searches, merge = commands(card_of(facts=merged))
    configs = [settings_of(command, SearchConfig) for command in searches]
    assert [(c.guidance_scale, c.output_dir) for c in configs] == [(1.0, "searched-1"), (2.0, "searched-2")]
    assert settings_of(merge, MergeConfig) == MergeConfig(["searched-1", "searched-2"], "merged", 2.0)


def test_what_is_not_known_is_said():
    text = card_of(facts={}).text
    assert "Searched on `not recorded`." in text and "\nNot measured by this project.\n" in text
    assert "The provenance does not say how." in text
    assert "## Figures" not in render(make_config(), "org/mine")  # the runtime knows of no figures
