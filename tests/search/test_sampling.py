"""Any pipeline as a sampler: conditions, prompt embeddings made once, prompts from data sets, counted calls."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from dssolver_search.pipeline.loading import freeze
from dssolver_search.pipeline.plan import Plan
from dssolver_search.pipeline.prompts import PromptMemo, prompts_from_dataset
from dssolver_search.pipeline.sampler import Sampler, _timed_networks, spread_classes
from dssolver_search.pipeline.student import Student
from tests.families import make_pipe
from tests.pipelines.zoo import TEXT, ZOO, flux_parts, sd_parts

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torchvision.*", "ignore:.*FluxPosEmbed.*:FutureWarning", "ignore:.*safety checker.*"
)
PROMPTS = ["a cat", "two dogs in the rain", "a red house"]
WORDS = 8  # tokens of every prompt


class Tokenizer:
    """Bytes of a text, padded to `WORDS`; enough of transformers' interface."""

    model_max_length = WORDS
    added_tokens_encoder: dict = {}

    def __call__(self, texts, **kwargs):
        texts = [texts] if isinstance(texts, str) else texts
        ids = torch.tensor([[*text.encode()[:WORDS], *[0] * (WORDS - len(text))] for text in texts]) % 30
        return Tokens(ids)

    def batch_decode(self, ids):
        return [""] * len(ids)

    def tokenize(self, text):
        return list(text)


class Tokens(dict):
    def __init__(self, ids):
        super().__init__(input_ids=ids, attention_mask=torch.ones_like(ids))
        self.__dict__ = self


def text_encoder(cls, **config):
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "max_position_embeddings": WORDS, "num_attention_heads": 2, "num_hidden_layers": 1}
    if cls is T5EncoderModel:
        return cls(T5Config(vocab_size=30, d_model=TEXT, d_kv=4, d_ff=8, num_heads=2, num_layers=1))
    return cls(CLIPTextConfig(hidden_size=TEXT, intermediate_size=8, bos_token_id=0, eos_token_id=2, **sizes))


def make_sd():
    text = {"text_encoder": text_encoder(CLIPTextModel), "tokenizer": Tokenizer()}
    return freeze(with_text(StableDiffusionPipeline, sd_parts(), text))


def make_flux():
    text = {
        "text_encoder": text_encoder(CLIPTextModel), "tokenizer": Tokenizer(),
        "text_encoder_2": text_encoder(T5EncoderModel), "tokenizer_2": Tokenizer(),
    }  # fmt: skip
    return freeze(with_text(FluxPipeline, flux_parts(), text))


def with_text(cls, parts, text):
    """The pipeline, its text parts put in place afterwards: diffusers accepts tokenizers of transformers only."""
    pipe = cls(**{**parts, **dict.fromkeys(text)})
    for name, part in text.items():
        pipe.register_modules(**{name: part}) if isinstance(part, torch.nn.Module) else setattr(pipe, name, part)
    return pipe


CALL = {"height": 16, "width": 16, "guidance_scale": 2.0}
SD = {**CALL, "negative_prompt": "blurry"}
FLUX = {**CALL, "max_sequence_length": WORDS}
with_prompts = pytest.mark.parametrize("make, call", [(make_sd, SD), (make_flux, FLUX)], ids=["sd", "flux"])


def draw(sampler, indices=range(3)):
    return sampler(indices, "train", 2, output_type="latent").images


class Encoded:
    """Prompts that pass through the text encoders: each call's batch."""

    def __init__(self, pipe):
        self.batches = []
        for name, module in pipe.components.items():
            if name.startswith("text_encoder"):
                module.register_forward_pre_hook(self.note)

    def note(self, module, args):
        assert not torch.is_grad_enabled()
        self.batches.append(args[0].shape[0])


# --- prompt embeddings ------------------------------------------------------------------------------------------------


@with_prompts
def test_prompts_are_encoded_once_and_nothing_else_changes(make, call):
    pipe = make()
    arguments = {k: [v] * 3 if k == "negative_prompt" else v for k, v in call.items()}
    seen = Encoded(pipe)
    sampler = Sampler(pipe, call, PROMPTS)
    plain = pipe(
        PROMPTS,
        **arguments,
        num_inference_steps=2,
        output_type="latent",
        generator=sampler.generators(range(3), "train"),
    ).images
    once = list(seen.batches)
    assert once and set(once) == {3}
    assert torch.equal(draw(sampler), plain)
    assert seen.batches == 2 * once
    for _ in range(3):
        assert torch.equal(draw(sampler), plain)
    assert torch.equal(draw(sampler, [3, 4, 5])[0], draw(sampler, [0, 1, 2])[0]) is False  # other noise, same prompts
    assert seen.batches == 2 * once
    draw(sampler, [1])
    assert seen.batches[2 * len(once) :] == [1] * len(once)
    assert "encode_prompt" not in vars(pipe)


@with_prompts
def test_remembered_embeddings_bear_writing(make, call):
    """A pipeline may do what it likes with what it gets; and the arguments of its call are part of the key."""
    pipe = make()
    needed = {"do_classifier_free_guidance": True} if make is make_sd else {"prompt_2": None}
    sampler = Sampler(pipe, call, PROMPTS)
    first, seen = draw(sampler), []
    with sampler._encoded.used({"output_type": "latent"}):
        for _ in range(2):
            given = pipe.encode_prompt(prompt=PROMPTS, device="cpu", num_images_per_prompt=1, **needed)
            assert not any(t.requires_grad for t in given)
            seen.append([t.clone() for t in given])
            for tensor in given:
                tensor.zero_()
    assert all(torch.equal(one, two) for one, two in zip(*seen, strict=True)) and seen[0][0].any()
    assert torch.equal(draw(sampler), first)
    held = {len(sampler._encoded._kept)}
    draw(Sampler(pipe, call, PROMPTS), [0])
    assert held == {2}


def test_a_run_with_gradients_encodes_without(monkeypatch):
    """Even where the mode is on already: the memo itself switches it off."""
    pipe = make_sd()
    seen = Encoded(pipe)
    student = Student(Sampler(pipe, SD, PROMPTS))
    weight = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        plan = Plan(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), [[weight], [1 - weight, weight]])
        final = student.run(plan, range(2), "train").final
    assert torch.autograd.grad(final.sum(), weight)[0] != 0
    assert len(seen.batches) == 2  # prompt and negative prompt


class Speaker:
    """A pipeline that only encodes."""

    def __init__(self):
        self.calls = []

    def encode_prompt(self, prompt, extra=None):
        self.calls.append(prompt)
        return {"embeds": torch.full((100,), float(len(prompt))), "none": None}


def test_memory_of_embeddings_is_bounded():
    pipe = Speaker()
    memo = PromptMemo(pipe, limit=1000)
    with memo.used({}):
        for prompt in ("a", "bb", "a", "ccc", "a", "bb"):
            assert pipe.encode_prompt(prompt)["embeds"][0] == len(prompt)
    assert pipe.calls == ["a", "bb", "ccc", "bb"] and memo.held == 800


def test_what_cannot_be_a_key_goes_through():
    pipe = Speaker()
    with PromptMemo(pipe).used({}):
        for _ in range(2):
            pipe.encode_prompt("a", torch.ones(1))
            pipe.encode_prompt("a", {"scale": [1.0, None]})
            pipe.encode_prompt("a", 1)
            pipe.encode_prompt("a", True)
    assert len(pipe.calls) == 2 + 3


def test_pipeline_keeps_an_encoder_of_its_own():
    pipe = Speaker()
    own = pipe.encode_prompt = lambda prompt: torch.zeros(1)
    with PromptMemo(pipe).used({}):
        assert pipe.encode_prompt is not own and not pipe.encode_prompt("a")
    assert pipe.encode_prompt is own
    del pipe.encode_prompt
    with pytest.raises(TypeError), PromptMemo(pipe).used({}):
        pipe.encode_prompt()
    assert "encode_prompt" not in vars(pipe)


# --- conditions -------------------------------------------------------------------------------------------------------


def test_prompts_and_what_all_samples_share():
    sampler = Sampler(make_sd(), SD, PROMPTS)
    assert sampler.conditions([4, 0]) == {"prompt": [PROMPTS[1], PROMPTS[0]], "negative_prompt": ["blurry"] * 2}
    assert sampler.conditions([]) == {"prompt": [], "negative_prompt": []}


def test_number_of_samples_where_nothing_else_is_taken():
    sampler = Sampler(freeze(ZOO["DDPM"].make()))
    assert sampler.conditions([4, 0]) == {"batch_size": 2}


def test_classes_come_from_the_network():
    sampler = Sampler(freeze(ZOO["DiT"].make()))
    assert sampler.conditions([0, 999, 1000, 1001]) == {"class_labels": [0, 969, 0, 31]}
    sampler.denoisers[0].register_to_config(num_embeds_ada_norm=None)
    with pytest.raises(ValueError, match=r"num_embeds_ada_norm.*give it conditions"):
        sampler.conditions([0])


def test_given_conditions_take_the_place_of_all_others():
    pipe = freeze(make_pipe("flow"))
    sampler = Sampler(pipe, {"guidance_scale": 1.5}, conditions=lambda indices: {"class_labels": [2 for _ in indices]})
    assert sampler.conditions([0, 1]) == {"class_labels": [2, 2]}
    alike = Sampler(pipe, {"guidance_scale": 1.5})
    assert torch.equal(draw_sit(sampler, [2]), draw_sit(alike, [2]))
    assert not torch.equal(draw_sit(sampler, [1]), draw_sit(alike, [1]))


def draw_sit(sampler, indices):
    return sampler(indices, "train", 2, output_type="latent")[0]


@pytest.mark.parametrize(
    "make, kwargs, message",
    [
        (make_sd, {}, "StableDiffusionPipeline takes prompts; give"),
        (make_sd, {"call": {"prompt": "a cat"}, "prompts": PROMPTS}, "'prompt' is chosen sample by sample"),
        (make_sd, {"call": {"num_inference_steps": 3}, "prompts": PROMPTS}, "'num_inference_steps' is chosen"),
        (make_sd, {"call": {"colour": 1}, "prompts": PROMPTS}, "takes no argument 'colour'; it takes: prompt"),
        (ZOO["DDPM"].make, {"call": {"batch_size": 3}}, "'batch_size' is chosen sample by sample"),
        (ZOO["Kandinsky 2.2"].make, {}, "takes neither class_labels nor prompt nor batch_size; give it conditions"),
    ],
)
def test_what_a_sampler_refuses(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        Sampler(make(), **kwargs)


def test_conditions_may_give_what_is_chosen_otherwise():
    entry = ZOO["Kandinsky 2.2"]
    pipe = freeze(entry.make())
    sampler = Sampler(pipe, conditions=lambda indices: entry.arguments(pipe, indices))
    assert draw(sampler, range(2)).shape[0] == 2
    assert Sampler(make_sd(), {"prompt": "a cat"}, conditions=lambda indices: {}).call == {"prompt": "a cat"}


def test_fingerprint_depends_on_conditions_and_samples():
    pipe = freeze(make_pipe("flow"))

    def keyed(conditions, *indices):
        return Sampler(pipe, conditions=conditions).fingerprint(*indices)["key"]

    def embeddings(scale, last=1.0):
        return lambda indices: {"class_labels": torch.tensor([scale * (last if i == 50 else 1.0) for i in indices])}

    assert keyed(embeddings(1)) == keyed(embeddings(1)) != keyed(embeddings(2))
    assert keyed(embeddings(1)) != keyed(None) == Sampler(pipe).fingerprint()["key"]
    assert keyed(embeddings(1)) == keyed(embeddings(1, 3.0))  # the first sixteen are the same
    assert keyed(embeddings(1), range(60)) != keyed(embeddings(1, 3.0), range(60))
    values = [1, 2.0, "1", None, [1, 2], (1, 2, 3), {"a": 1}, torch.ones(2), torch.ones(2, 1), torch.ones(2).double()]
    assert len({keyed(lambda indices, v=v: {"class_labels": v}) for v in values}) == len(values)


# --- counting ---------------------------------------------------------------------------------------------------------


class Listed(ModelMixin, ConfigMixin):
    """A denoiser with any arguments."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, *args, **kwargs):
        return None


@pytest.mark.parametrize(
    "args, kwargs, samples",
    [
        ((torch.ones(3, 4, 2, 2), torch.tensor(1.0)), {}, 3),
        ((torch.tensor(1.0), torch.ones(3, 4, 2, 2)), {}, 3),
        ((), {"timestep": torch.ones(6), "hidden_states": torch.ones(6, 5, 4)}, 6),
        ((), {"encoder_hidden_states": torch.ones(1, 5, 4), "sample": torch.ones(2, 5, 4)}, 2),
        (([torch.ones(4, 2, 2)] * 5, torch.ones(5)), {}, 5),
        ((), {"x": [torch.ones(4, 2, 2)] * 4, "t": torch.ones(4)}, 4),
    ],
)
def test_samples_of_a_call(args, kwargs, samples):
    pipe = make_pipe("flow")
    pipe.register_modules(transformer=Listed())
    sampler = Sampler(pipe)
    pipe.transformer(*args, **kwargs)
    assert (sampler.network_calls, sampler.network_evaluations) == (1, samples)


def test_two_denoisers_count_together_and_helpers_do_not():
    pipe = ZOO["Wan"].make()
    pipe.register_modules(transformer=Listed(), transformer_2=Listed(), text_encoder=Listed())
    sampler = Sampler(pipe, prompts=PROMPTS)
    for module in (pipe.transformer, pipe.transformer_2, pipe.text_encoder):
        module(torch.ones(2, 3))
    assert sampler.network_calls == 2
    combined = SimpleNamespace(components={"prior_prior": Listed(), "prior_text_encoder": Listed(), "scheduler": None})
    assert list(_timed_networks(combined)) == ["prior_prior"]
    sampler = Sampler(ZOO["Stable Diffusion ControlNet"].make(), conditions=dict)
    assert list(sampler.timed) == ["unet", "controlnet"] and sampler.denoisers == [sampler.pipe.unet]


# --- prompts from data sets -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache", raising=False)


TEXTS = ["a cat", " ", "two dogs", None, "a red house", "the sea"]
WANTED = ["a cat", "two dogs", "a red house", "the sea"]


def write(file, texts=TEXTS):
    if file.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"caption": texts, "number": range(len(texts))}), file)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps({"caption": t, "number": i}) + "\n" for i, t in enumerate(texts)))
    elif file.suffix == ".json":
        file.write_text(json.dumps([{"caption": t, "number": i} for i, t in enumerate(texts)]))
    else:
        separator = "\t" if file.suffix == ".tsv" else ","
        file.write_text(
            f"number{separator}caption\n" + "".join(f"{i}{separator}{t or ''}\n" for i, t in enumerate(texts))
        )
    return str(file)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_prompts_from_a_file(suffix, tmp_path):
    file = write(tmp_path / f"captions.{suffix}")
    assert prompts_from_dataset(file, "caption") == WANTED
    assert prompts_from_dataset(file, "caption", limit=2) == WANTED[:2]


def test_prompts_from_lines_and_from_a_folder(tmp_path):
    (tmp_path / "lines.txt").write_text("a cat\n\n  two dogs \n")
    assert prompts_from_dataset(str(tmp_path / "lines.txt")) == ["a cat", "two dogs"]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl")
    write(tmp_path / "data" / "test.jsonl", ["other"])
    assert prompts_from_dataset(str(tmp_path / "data"), "caption", limit=3) == WANTED[:3]
    assert prompts_from_dataset(str(tmp_path / "data"), "caption", "test") == ["other"]


@pytest.mark.parametrize(
    "name, column, split, message",
    [
        ("captions.jsonl", "text", "train", "no column 'text'; its columns: caption, number"),
        ("captions.jsonl", "number", "train", "column 'number' holds int, not text"),
        ("captions.jsonl", "caption", "test", "could not be read: .*test"),
        ("blank.jsonl", "caption", "train", "holds no text in column 'caption'"),
        ("absent.jsonl", "caption", "train", "absent.jsonl' could not be read"),
        ("broken.json", "caption", "train", "broken.json' could not be read"),
        ("absent/of-mine", "caption", "train", "absent/of-mine' could not be read"),
    ],
)
def test_data_sets_that_hold_no_prompts_end_in_one_line(name, column, split, message, tmp_path):
    write(tmp_path / "captions.jsonl")
    write(tmp_path / "blank.jsonl", [" ", ""])
    (tmp_path / "broken.json").write_text('{"caption": ')
    with pytest.raises(ValueError, match=message) as refused:
        prompts_from_dataset(name if "/" in name else str(tmp_path / name), column, split)
    assert "\n" not in str(refused.value) and "prompts_dataset" in str(refused.value)


def test_no_more_is_read_than_is_used(tmp_path, monkeypatch):
    file = tmp_path / "long.jsonl"
    line = json.dumps({"caption": "word " * 20}) + "\n"
    file.write_text(line * 200_000 + "{broken")
    assert len(prompts_from_dataset(str(file), "caption", limit=10)) == 10


def test_few_samples_are_of_classes_from_all_over():
    assert spread_classes(10, range(12)) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert spread_classes(1, range(3)) == [0, 0, 0]
    for count in (2, 36, 64, 96, 1000):
        assert sorted(spread_classes(count, range(count))) == list(range(count))  # equally often
    for first in (0, 500):
        found = sorted(spread_classes(1000, range(first, first + 32)))
        assert max(b - a for a, b in zip(found, [*found[1:], found[0] + 1000], strict=True)) < 64
