"""Each rank touches only its own files: of the Hub, of a folder, and of one that is another copy than the master's."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import psutil
import pytest
import torch
from conftest import Job, agent_per_rank
from fakes import byte_tokenizer, reference, tiny_checkpoint
from hub import COMMIT, FakeHub, fake_hub
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from distllm import LLM
from distllm.config import ClusterConfig, PlanConfig

RANKS = 3
PROMPT = "Once upon a time"
Start = Callable[[Sequence[Sequence[str]]], Job]


def ranks_with(environ: Callable[[int], dict[str, str]], *words: str) -> list[list[str]]:
    """One torchrun for each rank, as on hosts of their own, each with variables of its own."""
    layers = ["plan.strategy=manual", "plan.layers=[1,3,1]"]
    more = [*layers, "model.dtype=float32", f"prompt={PROMPT}", "sampling.max_tokens=12", *words]
    commands = agent_per_rank(RANKS, *more)
    return [
        ["env", *(f"{key}={value}" for key, value in environ(rank).items()), *command]
        for rank, command in enumerate(commands)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 MB in files of about one layer each: large beside the headers."""
    sizes = {"hidden_size": 512, "intermediate_size": 2304, "head_dim": 64, "num_attention_heads": 8}
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "llama", shard_size="17MB", **sizes)


@pytest.fixture
def hub(model: Path) -> Iterator[FakeHub]:
    with fake_hub(model) as served:
        yield served


def answer(model: Path) -> str:
    tokenizer = byte_tokenizer()
    text: str = tokenizer.decode(reference(model, tokenizer.encode(PROMPT), 12), skip_special_tokens=True)
    return text


def of_hub(hub: FakeHub, homes: Path) -> Callable[[int], dict[str, str]]:
    """Each rank asks under a name of its own and has a cache of its own."""

    def environ(rank: int) -> dict[str, str]:
        home = str(homes / f"rank{rank}")
        where = {"HF_ENDPOINT": hub.endpoint(f"rank{rank}"), "HF_HOME": home, "DISTLLM_CACHE": f"{home}/distllm"}
        return where | {"HF_HUB_OFFLINE": "0"}

    return environ


def downloaded(homes: Path, rank: int) -> set[str]:
    return {file.name for file in (homes / f"rank{rank}").glob(f"hub/*/snapshots/{COMMIT}/*.safetensors")}


def check_downloads(hub: FakeHub, model: Path, homes: Path) -> None:
    """Each rank has downloaded files of its own once, and rank 0 the headers of all besides."""
    files = {file.name: file.stat().st_size for file in model.glob("*.safetensors")}
    assert len(files) >= 6
    for rank in range(RANKS):
        mine = downloaded(homes, rank)
        assert mine
        assert mine != files.keys()
        served = sum(count for (who, _), count in hub.bytes_of.items() if who == f"rank{rank}")
        headers = 101_000 * len(files) if rank == 0 else 0  # rank 0 looks into all files and tells the others
        assert served <= 1.001 * sum(files[name] for name in mine) + headers
    assert set.union(*(downloaded(homes, rank) for rank in range(RANKS))) == files.keys()


def test_of_the_hub_each_rank_downloads_its_own_files(hub: FakeHub, model: Path, tmp_path: Path, start: Start) -> None:
    job = start(ranks_with(of_hub(hub, tmp_path), f"model.path={hub.repository}"))
    assert job.wait(150) == [0] * RANKS, job.err.read_text()
    assert job.out.read_text().strip("\n") == answer(model)
    check_downloads(hub, model, tmp_path)


@pytest.fixture
def two_gigabytes(tmp_path: Path) -> Path:
    """In six files, with a tied table."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=15,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32_000,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="370MB")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_of_two_gigabytes_each_byte_is_read_once(two_gigabytes: Path, tmp_path: Path, start: Start) -> None:
    stored = sum(file.stat().st_size for file in two_gigabytes.glob("*.safetensors"))
    assert stored > 1.9 * 10**9
    assert len(list(two_gigabytes.glob("*.safetensors"))) == 6
    table = 32_000 * 2048 * 2
    with LLM(two_gigabytes, cluster=ClusterConfig(workers=3, threads=1), plan=PlanConfig(calibrate=False)) as llm:
        read = [rank["read_bytes"] for rank in cast(list[dict[str, int]], llm.stats()["ranks"])]
    assert 0.99 * stored < sum(read) - table <= 1.02 * stored
    assert max(read) < 0.45 * stored
    with fake_hub(two_gigabytes) as hub:
        command = ["plan.layers=[4,7,4]", "model.dtype=bfloat16", "engine.kv_tokens=512"]
        job = start(ranks_with(of_hub(hub, tmp_path), f"model.path={hub.repository}", *command))
        assert job.wait(600) == [0] * RANKS, job.err.read_text()
        check_downloads(hub, two_gigabytes, tmp_path)


def file_pages(pid: int, folder: Path) -> Counter[str]:
    """What a process has of the files of a folder in memory, in kB by kind, as the kernel counts it."""
    kinds: Counter[str] = Counter()
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if " " in name:  # the head of a mapping: its addresses, and its file at the end
            inside = line.rpartition(" ")[2].startswith(f"{folder}/")
        elif inside and value.endswith("kB"):
            kinds[name] += int(value.split()[0])
    return kinds


def test_ranks_of_one_host_share_the_pages_of_a_tied_table(tmp_path: Path) -> None:
    """The first looks tokens up in it and the last has it as its head: it is in memory once."""
    folder = tiny_checkpoint(tmp_path / "model", "llama_tied", vocab_size=50_000, hidden_size=256)
    table_kb = 50_000 * 256 * 4 // 1024
    with LLM(folder, dtype="float32", cluster=ClusterConfig(workers=2, threads=1)) as llm:
        assert [(stage.span.embed, stage.span.head) for stage in llm.plan.stages] == [(True, False), (False, True)]
        llm.generate([PROMPT])
        ranks = [os.getpid(), *(child.pid for child in psutil.Process().children())]
        pages = [file_pages(pid, folder) for pid in ranks]
    for each in pages:
        shared = each["Shared_Clean"] + each["Shared_Dirty"]  # a new file may not be on the disk yet
        assert shared > 0.98 * table_kb, "a rank has no table, or one of its own"
        assert each["Anonymous"] == 0, "a page was copied"
        assert each["Pss"] < each["Rss"] - 0.45 * table_kb


def test_a_download_that_breaks_off_goes_on(hub: FakeHub, model: Path, tmp_path: Path, start: Start) -> None:
    hub.cut_after = 12_000_000  # more than the 10 MB that the client writes at a time
    job = start(ranks_with(of_hub(hub, tmp_path), "model=llama", f"model.hub={hub.repository}"))
    assert job.wait(150) == [0] * RANKS, job.err.read_text()
    assert hub.cut_after is None, "nothing was cut"
    resumed = [wanted for wanted in hub.ranges if int(wanted.removeprefix("bytes=").partition("-")[0]) > 1_000_000]
    assert len(resumed) == 1, f"it began anew: {hub.ranges}"
    assert job.out.read_text().strip("\n") == answer(model)


@pytest.mark.slow
def test_a_rank_needs_no_files_but_its_own(hub: FakeHub, model: Path, tmp_path: Path, start: Start) -> None:
    """What each rank downloaded is all that it has; rank 0 has all headers, and so all files."""
    job = start(ranks_with(of_hub(hub, tmp_path), f"model.path={hub.repository}"))
    assert job.wait(150) == [0] * RANKS, job.err.read_text()
    homes = [tmp_path / f"home{rank}" for rank in range(RANKS)]
    for rank, home in enumerate(homes):
        shutil.copytree(model, home / "model", copy_function=os.link)
        for file in (home / "model").glob("*.safetensors*"):
            if rank and file.name not in downloaded(tmp_path, rank):
                file.unlink()
    job = start(ranks_with(lambda rank: {"HOME": str(homes[rank])}, "model.path=~/model"))
    assert job.wait(150) == [0] * RANKS, job.err.read_text()
    assert job.out.read_text().strip("\n") == answer(model)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("change", ["config", *(pytest.param(each, marks=SLOW) for each in ("cut", "shape", "gone"))])
def test_a_rank_with_another_copy_is_named(change: str, model: Path, tmp_path: Path, start: Start) -> None:
    """The files of rank 2 are not those of the master; only one of its own can be wrong for it."""
    homes = [tmp_path / f"home{rank}" for rank in range(RANKS)]
    for home in homes:
        shutil.copytree(model, home / "model", copy_function=os.link)
    last = sorted(model.glob("*.safetensors"))[-1].name
    copy = homes[2] / "model" / last
    config = homes[2] / "model" / "config.json"
    tensors = load_file(model / last)
    for file in (copy, config):
        content = file.read_bytes()
        file.unlink()  # it is a link to the others' copy
        file.write_bytes(content)
    if change == "cut":
        copy.write_bytes(copy.read_bytes()[:-100])
    elif change == "gone":
        copy.unlink()
    elif change == "config":
        config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-03'))
    else:
        name = "lm_head.weight"
        assert name in tensors
        tensors[name] = tensors[name][:-1]
        save_file(tensors, copy)
    job = start(ranks_with(lambda rank: {"HOME": str(homes[rank])}, "model.path=~/model"))
    codes = job.wait(150)
    assert codes[0] != 0
    (error,) = job.errors()
    assert "rank 2 (" in error
    wrong = str(config) if change == "config" else str(copy)
    assert wrong in error
