"""Settings: a recipe, the command line over it, and errors that name what is wrong."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from dssolver_search.cli import COMMANDS, named
from dssolver_search.settings import REMOVED, CompareConfig, SearchConfig, parse

RECIPES = sorted((Path(__file__).parents[2] / "search" / "recipes").glob("*.toml"))
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "scipy", "numpy", "matplotlib", "datasets"}
NEEDED = ["--pretrained_model_name_or_path", "org/model", "--output_dir", "out"]


def read(*words, cls=SearchConfig):
    return parse(cls, [*NEEDED, *words], "prog")


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe and returns the arguments that read it."""

    def write(text):
        file = tmp_path / "recipe.toml"
        file.write_text(text, encoding="utf-8")
        return ["--config", str(file)]

    return write


def test_defaults_are_those_of_the_fields():
    expected = SearchConfig(pretrained_model_name_or_path="org/model", output_dir="out")
    assert read() == expected
    assert expected.nfe == [5, 8] and expected.guidance_scale is None and expected.call_arguments == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        expected.seed = 1


def test_command_line_wins_over_the_recipe(recipe):
    words = recipe('seed = 3\nnfe = [4, 6]\nmethod = "paper"\nguidance_scale = 2.0\noutput_dir = "elsewhere"\n')
    config = read(*words, "--nfe", "7", "--guidance_scale", "1.5")
    assert (config.seed, config.nfe, config.method, config.guidance_scale) == (3, [7], "paper", 1.5)
    assert config.output_dir == "out"
    alone = parse(SearchConfig, [*NEEDED[:2], *words], "prog")
    assert alone.output_dir == "elsewhere" and alone.nfe == [4, 6]


@pytest.mark.parametrize(
    "words, key, value",
    [
        (["--seed", "4"], "seed", 4),
        (["--ridge", "1e-3"], "ridge", 1e-3),
        (["--ridge", "2"], "ridge", 2.0),
        (["--guidance_scale", "2"], "guidance_scale", 2.0),
        (["--guidance_scale", "none"], "guidance_scale", None),
        (["--revision", "None"], "revision", None),
        (["--revision", "7"], "revision", "7"),
        (["--nfe", "5", "8", "12"], "nfe", [5, 8, 12]),
        (["--fill_nfe"], "fill_nfe", []),
        (["--fill_nfe", "3", "9"], "fill_nfe", [3, 9]),
        (
            ["--call", '{"height": 256, "eta": 0.5, "text": "none"}'],
            "call",
            {"height": 256, "eta": 0.5, "text": "none"},
        ),
    ],
)
def test_command_line_values_take_the_type_of_their_field(words, key, value):
    found = getattr(read(*words), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("ridge = 1", "ridge", 1.0),
        ("nfe = [3]", "nfe", [3]),
        ("fill_nfe = []", "fill_nfe", []),
        ('revision = "none"', "revision", "none"),
        ("[call]\nheight = 64\n[call.inner]\nx = [1, 2]", "call", {"height": 64, "inner": {"x": [1, 2]}}),
    ],
)
def test_recipe_values(text, key, value, recipe):
    found = getattr(read(*recipe(text)), key)
    assert found == value and type(found) is type(value)


def test_guidance_joins_the_call():
    config = read("--guidance_scale", "2", "--call", '{"height": 8}')
    assert config.call_arguments == {"guidance_scale": 2.0, "height": 8}
    assert read("--call", '{"height": 8}').call_arguments == {"height": 8}


def test_changed_settings():
    config = SearchConfig(pretrained_model_name_or_path="a/model", output_dir="out", nfe=[5, 8], trials=7, fill_nfe=[])
    assert config.changed() == {"pretrained_model_name_or_path": "a/model", "trials": 7, "fill_nfe": []}
    assert config == SearchConfig(output_dir="out", **config.changed())


def test_lists_of_text():
    config = read("--solver", "a", "b/c", "--schedulers", "euler", cls=CompareConfig)
    assert config.solver == ["a", "b/c"] and config.schedulers == ["euler"]
    assert read("--solver", cls=CompareConfig).solver == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("trails = 6", "unknown setting 'trails'; known: .*trials"),
        ('seed = "3"', "seed is '3'; it must be int"),
        ("seed = 3.0", "seed is 3.0; it must be int"),
        ("seed = true", "seed is True; it must be int"),
        ("ridge = true", "ridge is True; it must be float"),
        ("nfe = 5", "nfe is 5; it must be a list"),
        ("nfe = [5, 8.0]", "nfe is 8.0; it must be int"),
        ('call = "x"', "call is 'x'; it must be dict"),
        ("revision = 3", "revision is 3; it must be str or NoneType"),
        ("seed = ", "recipe .*recipe.toml' could not be read"),
    ],
)
def test_wrong_recipes_name_the_key(text, message, recipe):
    with pytest.raises(ValueError, match=message):
        read(*recipe(text))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seed", "x"], "--seed x: "),
        (["--seed", "1.5"], "--seed 1.5: "),
        (["--seed", "none"], "--seed none: "),
        (["--nfe", "3", "x"], "--nfe x: "),
        (["--call", "{x"], "--call {x: "),
        (["--call", "3"], "call is 3; it must be dict"),
        (["--nfe"], r"nfe is \[\]; "),
        (["--nfe", "0"], r"nfe is \[0\]; it must be whole numbers from 1 to 1000"),
        (["--nfe", "5", "1001"], r"nfe is \[5, 1001\]"),
        (["--method", "x"], "method is 'x'; it must be closed_form or gradient or paper"),
        (["--teacher_order", "4"], "teacher_order is 4; it must be 1, 2 or 3"),
        (["--teacher_steps", "8"], "teacher_steps is 8; it must be more than the largest NFE"),
        (["--ridge", "0"], "ridge is 0.0; it must be above 0"),
        (["--ridge", "nan"], "ridge is nan; it must be above 0"),
        (["--learning_rate", "-1"], "learning_rate is -1.0; it must be above 0"),
        (["--fill_nfe", "3"], r"fill_nfe is \[3\]"),
        (["--fill_nfe", "9", "3"], r"fill_nfe is \[9, 3\]"),
        (["--fill_nfe", "0", "3"], r"fill_nfe is \[0, 3\]"),
        (["--trials", "0"], "trials is 0; it must be 1 or more"),
        (["--num_validation_samples", "-2"], "num_validation_samples is -2"),
        (["--batch_size", "0"], "batch_size is 0"),
        (["--polish_nfe", "-1"], "polish_nfe is -1; it must be 0 or more"),
        (["--fill_polish_nfe", "-1"], "fill_polish_nfe is -1; it must be 0 or more"),
        (["--config", "absent.toml"], "recipe 'absent.toml' could not be read"),
    ],
)
def test_wrong_words_name_the_key(words, message):
    with pytest.raises(ValueError, match=message):
        read(*words)


@pytest.mark.parametrize("key", REMOVED)
def test_removed_keys_say_what_to_do_instead(key, recipe):
    for words in ([f"--{key}", "x"], [f"--{key}=x"], recipe(f'{key} = "x"')):
        with pytest.raises(ValueError, match=f"there is no setting {key} any more; leave it out: ") as error:
            read(*words)
        assert str(error.value).endswith(REMOVED[key])


@pytest.mark.parametrize("name", ["pretrained_model_name_or_path", "output_dir"])
def test_what_cannot_be_guessed_is_required(name):
    words = NEEDED[2:] if name == "pretrained_model_name_or_path" else NEEDED[:2]
    with pytest.raises(ValueError, match=f"{name} is missing; give --{name}"):
        parse(SearchConfig, words, "prog")


@pytest.mark.parametrize("name", ["num_samples", "reference_steps", "num_pictures"])
def test_comparison_counts_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be 1 or more"):
        read(f"--{name}", "0", cls=CompareConfig)


@pytest.mark.parametrize("words", [["--trails", "6"], ["--trial", "6"], ["--solver", "x"]])
def test_unknown_words_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        read(*words)
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_key_with_its_default(command, capsys):
    cls = named(COMMANDS[command][0])
    with pytest.raises(SystemExit) as stop:
        parse(cls, ["--help"], "prog")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and text.count("(default: ") == len(dataclasses.fields(cls))
    assert all(f"--{entry.name}" in text for entry in dataclasses.fields(cls))


def test_defaults_are_no_ones_own():
    """A list or mapping that one configuration changes is not another one's default."""
    first, second = (SearchConfig(pretrained_model_name_or_path="m", output_dir="o") for _ in range(2))
    first.nfe.append(7)
    first.call["eta"] = 1
    assert second.nfe == [5, 8] and second.call == {}


def test_help_imports_nothing_heavy():
    """In a process of its own: other tests have imported everything. Not even diffusers' scheduler base class."""
    root = RECIPES[0].parents[2]
    code = f"""
import sys
from importlib.util import module_from_spec, spec_from_file_location
sys.path.insert(0, {str(root)!r})
spec = spec_from_file_location("dssolver_search", {str(root / "search" / "__init__.py")!r})
sys.modules["dssolver_search"] = module_from_spec(spec)
from dssolver_search import console
from dssolver_search.cli import main
try:
    main(["search", "--help"])
except SystemExit:
    print(*{{name.partition(".")[0] for name in sys.modules}}, file=sys.stderr)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--teacher_steps" in run.stdout
    assert not HEAVY & set(run.stderr.split())


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_parse(file):
    cls = CompareConfig if "compare" in file.stem else SearchConfig
    config = read("--config", str(file), cls=cls)
    assert config != cls(pretrained_model_name_or_path="org/model", output_dir="out")


def test_there_are_recipes():
    assert RECIPES
