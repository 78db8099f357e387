"""The page: complete, harmless whatever the files say, and opened in headless Chromium at two widths."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from PIL import Image

from diffusers_dssolver import DSSolverScheduler
from dssolver_search.artefacts.report import WIDEST
from dssolver_search.cli import main
from tests.search.test_plots import COMPARISON, FLOW, RECORDS, result, spec_of
from tests.searches import refused

COLOURS = {"ours": (200, 10, 10), "unipc": (10, 200, 10), "reference": (10, 10, 200)}
PROVENANCE = {
    "kind": "searched", "method": "closed_form", "model": "/home/somebody/models/flow", "pipeline": "SiTPipeline",
    "call": {"guidance_scale": 1.5}, "seed": 7, "revision": None, "teacher": {"steps": 50, "order": 3},
    "samples": {"train": 64, "validation": 32},
    "results": {"10": {"kind": "filled", "warp": [0.5, -0.25]}, "3": {"kind": "searched", "mse": 0.0123456789}},
}  # fmt: skip
EVIL = '"><script>window.hit = 1</script><img src=x onerror="window.hit = 1">' + "w" * 90


class Page(HTMLParser):
    """Elements with their attributes, texts by element, the cells of every table row, and the commands."""

    VOID = ("meta", "link", "img", "input", "source")

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.rows, self.commands, self.open = [], {}, [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        elif tag == "pre":
            self.commands.append("")
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        tag = self.open[-1] if self.open else ""
        self.text[tag] = self.text.get(tag, "") + data
        if "pre" in self.open:
            self.commands[-1] += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data.strip()}".strip()

    def attributes(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, name, number=0):
        return [row for row in self.rows if row and row[0] == name][number]


def strip(folder, name, colour, size=(24, 4)):
    file = folder / "pictures" / f"{name}.png"
    file.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, colour).save(file)
    return f"pictures/{name}.png"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """See `make`; for reports that are quick, because their plots are left empty."""
    monkeypatch.setattr("dssolver_search.artefacts.report.rendered", lambda draw, dark, kind: b"<svg/>")
    return make(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A page with everything in it."""
    folder = make(tmp_path_factory.mktemp("whole"))
    return report(folder, "--evaluation", folder / "evaluated")


def make(tmp_path):
    """Folder of a solver with a log, a comparison with pictures and an evaluation."""
    for name in ("solver", "compared", "evaluated"):
        (tmp_path / name).mkdir()
    tables = {str(n): spec_of(n).to_dict() for n in (3, 8)}
    DSSolverScheduler.from_config(FLOW, solvers=tables, provenance=PROVENANCE).save_pretrained(tmp_path / "solver")
    (tmp_path / "solver" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    strip(tmp_path / "compared", "reference", COLOURS["reference"])
    results = [
        result("ours", 3, 0.01, True, mse_interval=[0.005, 0.02]),
        result("unipc", 3, 0.02),
        result("ours", 8, 0.004, True),
        result("unipc", 8, 0.001, calls=7),
    ]
    for r in results:
        r["picture"] = strip(tmp_path / "compared", f"{r['scheduler']}-{r['nfe']}", COLOURS[r["scheduler"]])
    settings = {**COMPARISON["settings"], "pretrained_model_name_or_path": "/home/somebody/models/flow"}
    write(tmp_path / "compared", "comparison", {**COMPARISON, "settings": settings, "results": results})
    measured = {
        "frechet_distance": {"value": 3.25, "interval": [3.0, 3.5]},
        "recall": {"value": 0.625},
        "clip_score": {"value": 31.5},
    }
    evaluation = {
        "settings": {"pretrained_model_name_or_path": "org/model", "nfe": [3]},
        "extractor": "fashion-classifier", "clip": "org/clip",
        "data": {"name": "org/images", "n": 500}, "versions": {"torch": "2"},
        "results": [{"scheduler": "ours", "nfe": 3, "spacing": None, "calls": 3, "n": 200, "seconds_per_image": 0.5,
                     "metrics": measured}],
    }  # fmt: skip
    write(tmp_path / "evaluated", "evaluation", evaluation)
    return tmp_path


def write(folder, name, record):
    (folder / f"{name}.json").write_text(json.dumps(record))


def change(folder, name, **changes):
    record = json.loads((folder / f"{name}.json").read_text())
    write(folder, name, {**record, **changes})


def report(folders, *words):
    given = ["--solver", folders / "solver", "--comparison", folders / "compared", "--output_dir", folders / "out"]
    main(["report", *map(str, given), *map(str, words)])
    return folders / "out" / "report.html"


def read(file):
    return Page(file.read_text(encoding="utf-8"))


def picture_of(uri):
    assert uri.startswith("data:image/webp;base64,")
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def test_the_file_is_self_contained_and_its_policy_lets_nothing_else_run(whole):
    html = whole.read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    for tag, attributes in page.elements:
        links = [v for k, v in attributes.items() if k in ("src", "srcset", "href", "action", "data", "poster")]
        assert all(link.startswith("data:") for link in links), tag
        assert not any(k.startswith("on") or k == "style" for k in attributes), tag
    [policy] = [m["content"] for m in page.attributes("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:" and "connect-src" not in rules
    for tag in ("style", "script"):
        [inside] = re.findall(f"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'" and "url(" not in inside
    assert html.startswith("<!DOCTYPE html>") and str(whole.parent.parent) not in html and "/home/" not in html


def test_errors_with_the_best_of_each_column(folders):
    page = read(report(folders))
    assert page.row("ours") == ["ours", "0.01 uniform 0.005 to 0.02", "0.004 uniform"]
    assert page.row("unipc") == ["unipc", "0.02 uniform", "0.001 uniform, 7 calls"]
    assert page.row("ours", 1) == ["ours", "0.50", "4.00"]  # over the best that was not searched
    html = (folders / "out" / "report.html").read_text()
    assert re.findall(r'<td class="best">([\d.]+)', html) == ["0.01", "0.001"]


@pytest.mark.parametrize("searched", [True, False])
def test_without_both_kinds_of_solvers_no_ratio_is_told(searched, folders):
    results = json.loads((folders / "compared" / "comparison.json").read_text())["results"]
    change(folders / "compared", "comparison", results=[r for r in results if r["searched"] is searched])
    page = read(report(folders))
    assert page.row("ours" if searched else "unipc") and "over the best" not in page.text["caption"]


def test_optional_errors_have_tables_of_their_own(folders):
    results = json.loads((folders / "compared" / "comparison.json").read_text())["results"]
    more = [{**r, "image_mse": r["mse"] / 2, "feature_distance": None} for r in results]
    change(folders / "compared", "comparison", results=more)
    page = read(report(folders))
    assert page.row("ours", 1) == ["ours", "0.005", "0.002"]
    assert "Mse of the images" in page.text["caption"] and "features" not in page.text["caption"]
    change(folders / "compared", "comparison", results=[{**r, "feature_distance": 0.25} for r in more],
           settings={**COMPARISON["settings"], "feature_network": "org/network"})  # fmt: skip
    assert "Distance in features of org/network" in read(report(folders)).text["caption"]


def test_pictures_by_step_count(folders):
    page = read(report(folders))
    strips = [picture_of(a["src"]) for a in page.attributes("img") if a["src"].startswith("data:image/webp")]
    wanted = [COLOURS[name] for _ in (3, 8) for name in ("reference", "ours", "unipc")]
    assert [s.convert("RGB").getpixel((1, 1)) for s in strips] == wanted  # small ones lose nothing
    assert [a.get("data-nfe") for a in page.attributes("div") if "data-nfe" in a] == ["3", "8"]
    assert not any("hidden" in a for a in page.attributes("div"))  # all are shown where no script runs
    assert "hidden" in page.attributes("form")[0] and page.attributes("input")[0]["max"] == "1"


def test_large_pictures_are_made_to_fit(folders):
    strip(folders / "compared", "ours-3", COLOURS["ours"], (4 * WIDEST, 1000))
    page = read(report(folders))
    found = picture_of(next(a["src"] for a in page.attributes("img") if a["alt"] == "samples of ours"))
    assert found.size == (WIDEST, 250)


@pytest.mark.parametrize("kept", [True, False])
def test_without_strips_the_comparisons_own_picture_is_shown(kept, folders):
    results = json.loads((folders / "compared" / "comparison.json").read_text())["results"]
    change(
        folders / "compared", "comparison", results=[{k: v for k, v in r.items() if k != "picture"} for r in results]
    )
    if kept:
        Image.new("RGB", (300, 200), (1, 200, 3)).save(folders / "compared" / "comparison.png")
    page = read(report(folders))
    shown = [picture_of(a["src"]).size for a in page.attributes("img") if a["src"].startswith("data:image/webp")]
    assert shown == [(300, 200)] * kept and not page.attributes("form")
    assert ("kept no pictures" in page.text["p"]) != kept


@pytest.mark.parametrize("extractor, name", [("inception", "FID"), ("org/net", "Frechet distance (org/net)")])
def test_metrics_name_their_network(extractor, name, folders):
    change(folders / "evaluated", "evaluation", extractor=extractor)
    page = read(report(folders, "--evaluation", folders / "evaluated"))
    head = page.row("scheduler", -1)
    assert head[:4] == ["scheduler", "calls", "n", name] and head[5] == "CLIP score (org/clip)"
    assert page.row("ours", -1) == ["ours", "3", "200", "3.25 3 to 3.5", "0.625", "31.5", "0.5"]
    assert "500 images of org/images" in page.text["p"] and f"Features of {extractor}" in page.text["p"]


def test_the_reference_is_told_with_its_end(folders):
    def told(**reference):
        change(folders / "compared", "comparison", reference={"mse_against_half_the_steps": 1e-6, **reference})
        return " ".join(read(report(folders)).text["p"].split())

    assert "against a reference of 9 steps; the mse between" in told(steps=9)
    assert "against a reference of 9 steps, the last from 0.1 to the data; the mse between" in told(steps=9, end=0.1)
    assert EVIL not in told(steps=9, end=EVIL)


def test_provenance_is_complete_and_commands_are_there(folders):
    page = read(report(folders, "--evaluation", folders / "evaluated"))
    expected = {
        "kind": "searched", "method": "closed_form", "model": "flow", "pipeline": "SiTPipeline", "seed": "7",
        "call.guidance_scale": "1.5", "revision": "-", "teacher.steps": "50", "teacher.order": "3",
        "samples.train": "64", "samples.validation": "32",
    }  # fmt: skip
    assert {key: page.row(key)[1] for key in expected} == expected
    assert page.row("3") == ["3", "searched", "", "0.0123457"] and page.row("10") == ["10", "filled", "0.5, -0.25", ""]
    names = [row[0] for row in page.rows if row]
    assert names.index("3") < names.index("10")
    assert [command.split()[3] for command in page.commands] == ["search", "compare", "evaluate"]
    assert "--guidance_scale 1.5" in page.commands[0] and "--num_samples 4" in page.commands[1]


def hostile(folders):
    """All that can be text is an attack."""
    config = json.loads((folders / "solver" / "scheduler_config.json").read_text())
    config["provenance"] = {EVIL: EVIL, "model": EVIL, "results": {EVIL: {EVIL: [EVIL]}}, "call": {"x": {EVIL: EVIL}}}
    (folders / "solver" / "scheduler_config.json").write_text(json.dumps(config))
    results = json.loads((folders / "compared" / "comparison.json").read_text())["results"]
    evil = [{**r, "scheduler": EVIL + r["scheduler"], "spacing": EVIL} for r in results]
    settings = {"pretrained_model_name_or_path": EVIL, EVIL: EVIL}
    change(folders / "compared", "comparison", results=evil, settings=settings, versions={EVIL: EVIL},
           reference={"steps": EVIL, "mse_against_half_the_steps": {EVIL: EVIL}})  # fmt: skip
    change(folders / "evaluated", "evaluation", extractor=EVIL, settings=settings, data={"name": EVIL, "n": EVIL})


def test_hostile_text_stays_text(folders):
    hostile(folders)
    page = read(report(folders, "--evaluation", folders / "evaluated"))
    assert len(page.attributes("script")) == 1 and "window.hit" not in page.text["script"]
    assert all("onerror" not in attributes for _, attributes in page.elements)
    assert page.row(EVIL)[1] == EVIL


@pytest.mark.parametrize("provenance", [
    {"kind": "searched", "samples": 5}, {"kind": "searched", "settings": 5}, [1],
])  # fmt: skip
def test_provenance_of_another_kind_is_refused(provenance, folders, capsys):
    config = json.loads((folders / "solver" / "scheduler_config.json").read_text())
    (folders / "solver" / "scheduler_config.json").write_text(json.dumps({**config, "provenance": provenance}))
    assert "is not what search writes" in refused(capsys, lambda: report(folders))
    assert not (folders / "out").exists()


@pytest.mark.parametrize(
    "name", ["../secret.png", "{root}/secret.png", "pictures/text.png", "pictures/none.png", 5, "link.png"]
)
def test_only_pictures_of_the_comparison_are_embedded(name, folders, capsys):
    Image.new("RGB", (8, 8)).save(folders / "secret.png")
    (folders / "compared" / "link.png").symlink_to(folders / "secret.png")
    (folders / "compared" / "pictures" / "text.png").write_text("no picture")
    results = json.loads((folders / "compared" / "comparison.json").read_text())["results"]
    results[0]["picture"] = name.format(root=folders) if isinstance(name, str) else name
    change(folders / "compared", "comparison", results=results)
    assert "cannot be used" in refused(capsys, lambda: report(folders))
    assert not (folders / "out").exists()


@pytest.mark.parametrize("words, message", [
    (["--evaluation", "nowhere"], "no evaluation could be read from 'nowhere'"),
    (["--comparison", "nowhere"], "no comparison could be read from 'nowhere'"),
    (["--solver", ""], "solver is missing"),
])  # fmt: skip
def test_bad_settings_write_nothing(words, message, folders, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    assert message in refused(capsys, lambda: report(folders, *words))
    assert not (folders / "out").exists()


def test_a_published_solver_says_where_it_comes_from(folders):
    page = read(report(folders, "--solver", "sit-xl-2-256", "--nfe", "5"))
    assert page.text["h1"] == "sit-xl-2-256" and page.row("source")[1] == "MCG-NJU/NeuralSolver"


# --- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium that logs what its console says."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-dev-shm-usage",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):  # fmt: skip
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def opened(browser, file, width, scheme="light"):
    """The page at this width, `browser` itself."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(file.as_uri())
    return browser


def shown(browser):
    """Step counts whose pictures can be seen."""
    return browser.execute_script(
        "return [...document.querySelectorAll('[data-nfe]')].filter(p => p.offsetHeight).map(p => p.dataset.nfe)"
    )


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_in_chromium(width, whole, browser):
    page = opened(browser, whole, width)
    run = page.execute_script
    assert run("return innerWidth") == width
    assert run("return document.documentElement.scrollWidth") <= width
    wide = "return [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth"
    assert not run(f"{wide} && !e.closest('.scroll')).map(e => e.outerHTML.slice(0, 80))")
    assert run("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert all(u.startswith("data:") for u in run("return performance.getEntriesByType('resource').map(e => e.name)"))
    assert (
        min(run("return [...document.querySelectorAll('main *')].map(e => parseFloat(getComputedStyle(e).fontSize))"))
        >= 13
    )
    assert page.get_log("browser") == []


def test_the_slider_chooses_what_is_shown(whole, browser):
    page = opened(browser, whole, 1400)
    assert shown(page) == ["3"]
    page.find_element("id", "nfe").send_keys("\ue014")  # arrow to the right
    assert shown(page) == ["8"] and page.find_element("css selector", "output").text == "8"
    page.find_element("id", "nfe").send_keys("\ue012")
    assert shown(page) == ["3"]


def test_dark_pages_have_dark_plots(whole, browser):
    looks = []
    for scheme in ("light", "dark"):
        page = opened(browser, whole, 1400, scheme)
        ground = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        plot = page.execute_script("return document.querySelector('picture img').currentSrc")
        looks.append((ground, base64.b64decode(plot.split(",")[1])))
    assert [ground for ground, _ in looks] == ["rgb(255, 255, 255)", "rgb(13, 17, 23)"]
    assert b"#0d1117" not in looks[0][1] and b"#0d1117" in looks[1][1]


def test_hostile_files_do_nothing_in_chromium(folders, browser):
    hostile(folders)
    page = opened(browser, report(folders, "--evaluation", folders / "evaluated"), 400)
    assert page.execute_script("return window.hit === undefined") and page.get_log("browser") == []
    assert page.execute_script("return document.documentElement.scrollWidth") <= 400


def test_the_policy_stops_what_was_not_written_here(folders, browser):
    """Were something not escaped, it would still not run, nor load."""
    file = report(folders)
    html = file.read_text(encoding="utf-8")
    file.write_text(html.replace("</main>", "<script>window.hit = 1</script><img src='http://localhost/x.png'></main>"))
    page = opened(browser, file, 1400)
    assert page.execute_script("return window.hit === undefined")
    said = " ".join(entry["message"] for entry in page.get_log("browser"))
    assert "script-src" in said and "img-src" in said
