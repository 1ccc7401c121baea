"""The schema: every rule speaks of the key, the value and the fix."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from distllm.config import (
    Config,
    EngineConfig,
    ModelConfig,
    PlanConfig,
    keys,
    one_of,
    suggest,
)
from distllm.validation import validate, validate_engine


def changed(**values: Any) -> Config:
    """A configuration with some keys changed; `__` stands for the dot."""
    config = Config()
    for name, value in values.items():
        *sections, key = name.split("__")
        section: Any = config
        for each in sections:
            section = getattr(section, each)
        setattr(section, key, value)
    return config


def test_the_defaults_are_valid() -> None:
    validate(Config())


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"task": "genrate"},
        r"task=genrate: .*generate, chat, serve, plan, shard, reconstruct, bench; did you mean generate\?",
    ),
    ({"log_level": "loud"}, r"log_level=loud: .*debug, info, warning, error"),
    ({"log_format": "xml"}, r"log_format=xml: .*text, json"),
    ({"serve__request_timeout_s": 0}, r"serve\.request_timeout_s=0: .*more than 0 and at most 86400 seconds"),
    ({"model__dtype": "int8"}, r"model\.dtype=int8: .*auto, float32, bfloat16, float16"),
    ({"model__context_length": 1}, r"model\.context_length=1: .*at least 2"),
    ({"plan__strategy": "evn", "plan__layers": None}, r"plan\.strategy=evn: .*did you mean even\?"),
    ({"prompt": "a", "prompts": "b"}, r"prompt= and prompts= .*one of them"),
    ({"output": "a"}, r"output= .*prompts=FILE"),
    ({"prompts": ""}, r"prompts= is empty: name a file"),
    ({"prompts": "a", "output": ""}, r"output= is empty: name a file"),
    ({"model__path": ""}, r"model\.path= is empty: name a folder"),
    ({"prompts": "a.jsonl", "output": "./a.jsonl"}, r"output=\./a\.jsonl: is the file of prompts itself; give another"),
    ({"plan__strategy": "manual"}, r"plan\.strategy=manual and plan\.layers=.*both or neither"),
    ({"plan__layers": [1, 2]}, r"plan\.strategy=manual and plan\.layers=.*both or neither"),
    ({"plan__strategy": "manual", "plan__layers": [3, -1]}, r"plan\.layers=\[3, -1\]: .*0 or more"),
    ({"plan__memory_fraction": 0.0}, r"plan\.memory_fraction=0\.0: .*more than 0 and at most 1$"),
    ({"plan__memory_fraction": 1.1}, r"plan\.memory_fraction=1\.1: .*more than 0 and at most 1$"),
    ({"plan__min_gain": -0.1}, r"plan\.min_gain=-0\.1: .*0 to 1, a share"),
    ({"cluster__workers": -1}, r"cluster\.workers=-1: .*0 to 256"),
    ({"cluster__threads": 0}, r"cluster\.threads=0: .*1 to 1024"),
    ({"cluster__workers": 10**24}, r"cluster\.workers=1000000000000000000000000: .*0 to 256"),
    ({"cluster__threads": 100_000}, r"cluster\.threads=100000: .*1 to 1024"),
    ({"cluster__interface": ""}, r"cluster\.interface= is empty: name an interface, or leave it out"),
    ({"plan__min_gain": 5.0}, r"plan\.min_gain=5\.0: .*0 to 1, a share"),
    ({"plan__min_gain": float("nan")}, r"plan\.min_gain=nan: .*0 to 1, a share"),
    ({"cluster__deadline_s": 0.5}, r"cluster\.deadline_s=0\.5: .*1 to 86400"),
    ({"cluster__deadline_s": float("inf")}, r"cluster\.deadline_s=inf: .*1 to 86400"),
    ({"cluster__recovery_deadline_s": -1.0}, r"cluster\.recovery_deadline_s=-1\.0: .*0 to 86400"),
    ({"cluster__join_timeout_s": 0}, r"cluster\.join_timeout_s=0: .*more than 0 and at most 86400 seconds"),
    (
        {"cluster__load_timeout_s": float("nan")},
        r"cluster\.load_timeout_s=nan: .*more than 0 and at most 86400 seconds",
    ),
    ({"task": "chat", "prompt": "Hi"}, r"task=chat reads messages from standard input: leave prompt= "),
    ({"serve__keep_s": 10.0}, r"serve\.keep_s=10 is less than serve\.resume_s=60: .*raise the one or lower the other"),
    ({"engine__max_requests": 0}, r"engine\.max_requests=0: .*1 to 4096"),
    ({"engine__max_requests": 10**12}, r"engine\.max_requests=1000000000000: .*1 to 4096"),
    ({"engine__prompt_chunk": 0}, r"engine\.prompt_chunk=0: .*1 to 65536"),
    ({"engine__block_tokens": 0}, r"engine\.block_tokens=0: .*1 to 1024"),
    ({"engine__kv_tokens": 0}, r"engine\.kv_tokens=0: .*at least 1"),
    ({"engine__kv_tokens": 15}, r"engine\.kv_tokens=15: .*one block, engine\.block_tokens=16"),
    ({"engine__steps_in_flight": 0}, r"engine\.steps_in_flight=0: .*at least 1"),
    ({"sampling__max_tokens": 0}, r"sampling\.max_tokens=0: .*at least 1"),
    ({"sampling__top_p": 2.0}, r"sampling\.top_p=2\.0: .*at most 1"),
    ({"sampling__temperature": float("inf")}, r"sampling\.temperature=inf: .*a finite number of 0 or more"),
    ({"sampling__repetition_penalty": float("inf")}, r"sampling\.repetition_penalty=inf: .*a finite number above 0"),
    ({"sampling__stop": [""]}, r"sampling\.stop=.*non-empty"),
    ({"quantization__method": "int5"}, r"quantization\.method=int5: it must be one of none, int8, int4, bnb_int8"),
    ({"quantization__head": "bnb_nf4"}, r"quantization\.head=bnb_nf4: it must be one of auto, none, int8, int4"),
    ({"quantization__group": 7}, r"quantization\.group=7: it must be 32, 64, 128 or 256"),
    ({"quantization__head": "int4"}, r"quantization\.head is given without a method: add quantization=int8 or another"),
    ({"quantization__group": 64}, r"quantization\.group is given without a method: add quantization=int8"),
    ({"quantization__stages": [1]}, r"quantization\.stages is given without a method: add quantization=int8"),
    ({"quantization__method": "int8", "quantization__stages": [-1]}, r"quantization\.stages=\[-1\]: .*ranks, from 0"),
    ({"weights__source": "pull"}, r"weights\.source=pull: it must be one of own, push"),
    ({"weights__streams": 0}, r"weights\.streams=0: it must be 1 to 64"),
    ({"weights__stages": [1]}, r"weights\.stages names ranks that rank 0 sends their weights to: add weights=push"),
    (
        {"weights__source": "push", "weights__stages": [0]},
        r"weights\.stages=\[0\]: it must be numbers of ranks, from 1",
    ),
    ({"weights__compression": "gzip"}, r"weights\.compression=gzip: it must be one of none, zstd"),
    ({"weights__compression": "zstd"}, r"weights\.compression=zstd is for what rank 0 sends: add weights=push"),
    ({"bench__measure": "speed"}, r"bench\.measure=speed: it must be one of tokens, loading"),
    ({"bench__rivals": ["transfomers"]}, r"bench\.rivals=transfomers: .*did you mean transformers"),
    ({"bench__rivals": ["transformers"] * 2}, r"bench\.rivals=\['transformers', 'transformers'\]: .*different"),
    ({"bench__requests": []}, r"bench\.requests=\[\]: .*numbers of at least 1"),
    ({"bench__requests": [4, 0]}, r"bench\.requests=\[4, 0\]: it must be numbers of at least 1"),
    ({"bench__ranks": 0}, r"bench\.ranks=0: .*1 to 256"),
    ({"bench__rounds": 0}, r"bench\.rounds=0: it must be at least 1"),
    ({"bench__prompt_tokens": -1}, r"bench\.prompt_tokens=-1: it must be at least 1"),
    ({"bench__new_tokens": 0}, r"bench\.new_tokens=0: it must be at least 1"),
    ({"bench__deadline_s": 0.0}, r"bench\.deadline_s=0\.0: .*more than 0 and at most 86400 seconds"),
    ({"bench__deadline_s": float("inf")}, r"bench\.deadline_s=inf: .*at most 86400 seconds"),
    ({"shard__stages": 0}, r"shard\.stages=0: it must be 1 to 256"),
    ({"shard__by": "size"}, r"shard\.by=size: it must be one of bytes, layers"),
    ({"shard__output": ""}, r"shard\.output= is empty: name a folder"),
    ({"task": "shard", "shard__stages": 2}, r"task=shard writes a folder: name it by shard\.output=FOLDER"),
    ({"task": "shard", "shard__output": "x"}, r"task=shard: say either shard\.stages=N, or plan\.strategy=manual plan"),
    ({"task": "reconstruct", "model__path": "x"}, r"task=reconstruct writes a folder: name it by shard\.output"),
    ({"task": "reconstruct", "shard__output": "x"}, r"task=reconstruct reads a folder of shards: .*model\.path=FOLDER"),
    ({"task": "bench", "bench__requests": [65]}, r"bench\.requests=65: engine\.max_requests=64 .*raise that"),
    ({"task": "bench", "bench__ranks": 1}, r"bench\.ranks=1: transformers-pp needs at least 2"),
    ({"task": "bench", "cluster__workers": 3}, r"cluster\.workers .*bench\.ranks says how many"),
    ({"task": "bench", "cluster__threads": 2}, r"cluster\.threads .*bench\.ranks says how many"),
]


@pytest.mark.parametrize(("values", "sentence"), BAD, ids=[" ".join(values) for values, _ in BAD])
def test_a_rule_names_key_value_and_fix(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}") as caught:
        validate(changed(**values))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"prompts": "a", "output": "b"},
        {"prompt": ""},  # asked for later, where - and @FILE are read
        {"plan__strategy": "manual", "plan__layers": [0, 3]},
        {"plan__memory_fraction": 1.0},
        {"plan__min_gain": 0},
        {"cluster__threads": 1},
        {"cluster__deadline_s": 1},
        {"cluster__deadline_s": 86400},
        {"engine__max_requests": 4096},
        {"engine__steps_in_flight": 1},
        {"model__context_length": 2},
        {"serve__request_timeout_s": None},
        {"task": "plan"},
        {"task": "bench"},
        {"task": "shard", "shard__output": "x", "shard__stages": 3},
        {"task": "shard", "shard__output": "x", "plan__strategy": "manual", "plan__layers": [1, 2]},
        {"task": "reconstruct", "shard__output": "x", "model__path": "y"},
        {"task": "bench", "bench__ranks": 1, "bench__rivals": ["transformers"]},
        {"task": "bench", "bench__requests": [128], "engine__max_requests": 128},
        {"bench__ranks": 1, "engine__max_requests": 1, "cluster__workers": 2},  # no bench asked for
        {"engine__kv_tokens": 16},
    ],
)
def test_what_is_just_right_passes(values: dict[str, Any]) -> None:
    validate(changed(**values))


def test_keys_tells_every_leaf_once() -> None:
    def leaves(section: Any, prefix: str) -> list[tuple[str, object]]:
        found: list[tuple[str, object]] = []
        for item in fields(section):
            value = getattr(section, item.name)
            found += leaves(value, f"{prefix}{item.name}.") if is_dataclass(value) else [(prefix + item.name, value)]
        return found

    assert [(each.name, each.default) for each in keys()] == leaves(Config(), "")
    assert all(each.help and each.type for each in keys())


def test_keys_that_hold_free_text_are_text_keys() -> None:
    free = {"prompt", "prompts", "output", "model.name", "model.path", "model.package", "cluster.interface"}
    free |= {"model.hub", "model.revision", "shard.output", "cluster.join", "serve.host", "serve.journal"}
    free |= {"serve.api_keys_file", "serve.tls_cert", "serve.tls_key", "chat.system"}
    assert {each.name for each in keys() if each.text} == free | {"sampling.stop"}


def test_lists_are_not_shared_between_configurations() -> None:
    one, other = Config(), Config()
    one.sampling.stop.append("x")
    one.bench.requests.clear()
    assert other.sampling.stop == []
    assert other.bench.requests


def test_sampling_section_becomes_params() -> None:
    params = changed(sampling__max_tokens=3, sampling__stop=["a"], sampling__seed=9).sampling.params()
    assert (params.max_tokens, params.stop, params.seed, params.ignore_eos) == (3, ("a",), 9, False)


def test_suggest_tells_the_nearest_or_nothing() -> None:
    assert suggest("promt", ["prompt", "prompts", "output"]) == "; did you mean prompt?"
    assert suggest("max_token", ["sampling.max_tokens", "task"]) == "; did you mean sampling.max_tokens?"
    assert suggest("zzz", ["prompt", "task"]) == ""


def test_one_of_takes_what_is_among_the_choices() -> None:
    one_of("x", "b", ("a", "b"))
    with pytest.raises(ValueError, match=r"^x=c: it must be one of a, b$"):
        one_of("x", "c", ("a", "b"))


def test_the_plan_section_stands_alone() -> None:
    assert PlanConfig(layers=[1]).layers == [1]


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"engine": EngineConfig(max_requests="8")}, "engine.max_requests=8: it must be a whole number"),  # type: ignore[arg-type]
        ({"engine": EngineConfig(kv_tokens=1.5)}, "engine.kv_tokens=1.5: it must be a whole number or null"),  # type: ignore[arg-type]
        ({"engine": EngineConfig(block_tokens=True)}, "engine.block_tokens=True: it must be a whole number"),
        ({"engine": EngineConfig(pack_weights=1)}, "engine.pack_weights=1: it must be true or false"),  # type: ignore[arg-type]
        ({"plan": PlanConfig(min_gain="5%")}, "plan.min_gain=5%: it must be a number"),  # type: ignore[arg-type]
        ({"plan": PlanConfig(layers=3)}, "plan.layers=3: it must be a list of whole numbers such as [1,2] or null"),  # type: ignore[arg-type]
        ({"model": ModelConfig(dtype=None)}, "model.dtype=None: it must be one of auto, float32, bfloat16, float16"),  # type: ignore[arg-type]
    ],
)
def test_the_library_is_told_of_a_wrong_type(sections: dict[str, Any], sentence: str) -> None:
    names = ("model", "cluster", "quantization", "weights", "plan", "engine")
    given = {name: sections.get(name, getattr(Config(), name)) for name in names}
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        validate_engine(**given)


def names_of_one_file(folder: Path) -> list[tuple[str, str]]:
    """Pairs of names, relative to the folder or not, that mean one file."""
    (folder / "x").mkdir()
    (folder / "p.jsonl").write_text("{}")
    (folder / "soft").symlink_to("p.jsonl")
    (folder / "hard").hardlink_to(folder / "p.jsonl")
    (folder / "links").symlink_to(folder)
    others = ["p.jsonl", "./x/../p.jsonl", "soft", "hard", "links/p.jsonl", str(folder / "p.jsonl"), "~/p.jsonl"]
    return [("p.jsonl", other) for other in others] + [
        ("soft", "hard"),
        ("none", "./x/../none"),
        ("none", "links/none"),
    ]


def test_the_file_of_prompts_by_any_name_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for prompts, output in names_of_one_file(tmp_path):
        for one, other in ((prompts, output), (output, prompts)):
            with pytest.raises(ValueError, match=f"^output={re.escape(other)}: is the file of prompts itself"):
                validate(Config(prompts=one, output=other))


def test_another_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names_of_one_file(tmp_path)
    (tmp_path / "other.jsonl").write_text("{}")
    (tmp_path / "elsewhere").symlink_to("other.jsonl")
    for output in ("other.jsonl", "elsewhere", "new.jsonl", "x/p.jsonl"):
        validate(Config(prompts="p.jsonl", output=output))
