"""The schema: every rule speaks of the key, the value and the fix."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from distllm.config import Config, PlanConfig, keys, one_of, suggest, validate


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
    ({"task": "genrate"}, r"task=genrate: .*generate, plan, bench; did you mean generate\?"),
    ({"log_level": "loud"}, r"log_level=loud: .*debug, info, warning, error"),
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
    ({"plan__memory_fraction": 0.0}, r"plan\.memory_fraction=0\.0: .*\(0, 1\]"),
    ({"plan__memory_fraction": 1.1}, r"plan\.memory_fraction=1\.1: .*\(0, 1\]"),
    ({"plan__min_gain": -0.1}, r"plan\.min_gain=-0\.1: .*0 or more"),
    ({"cluster__workers": -1}, r"cluster\.workers=-1: .*0 or more"),
    ({"cluster__threads": 0}, r"cluster\.threads=0: .*at least 1"),
    ({"cluster__deadline_s": 0.5}, r"cluster\.deadline_s=0\.5: .*1 to 86400"),
    ({"cluster__deadline_s": float("inf")}, r"cluster\.deadline_s=inf: .*1 to 86400"),
    ({"cluster__join_timeout_s": 0}, r"cluster\.join_timeout_s=0: .*\(0, 86400\]"),
    ({"cluster__load_timeout_s": float("nan")}, r"cluster\.load_timeout_s=nan: .*\(0, 86400\]"),
    ({"engine__max_requests": 0}, r"engine\.max_requests=0: .*1 to 4096"),
    ({"engine__max_requests": 10**12}, r"engine\.max_requests=1000000000000: .*1 to 4096"),
    ({"engine__prompt_chunk": 0}, r"engine\.prompt_chunk=0: .*1 to 65536"),
    ({"engine__block_tokens": 0}, r"engine\.block_tokens=0: .*1 to 1024"),
    ({"engine__kv_tokens": 0}, r"engine\.kv_tokens=0: .*at least 1"),
    ({"engine__steps_in_flight": 0}, r"engine\.steps_in_flight=0: .*at least 1"),
    ({"sampling__max_tokens": 0}, r"sampling\.max_tokens=0: .*at least 1"),
    ({"sampling__top_p": 2.0}, r"sampling\.top_p=2\.0: .*at most 1"),
    ({"sampling__stop": [""]}, r"sampling\.stop=.*non-empty"),
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
        {"task": "plan"},
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
