"""weights=push: ranks that have no files of the model are sent their tensors, over lines that break and damage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import Job, agent_per_rank
from fakes import byte_tokenizer, reference, tiny_checkpoint
from hub import fake_hub
from proxy import Proxy

from distllm import LLM, EngineError, SamplingParams
from distllm.config import ClusterConfig, PlanConfig, WeightsConfig
from distllm.engine import sending
from distllm.net.push import CHUNK_BYTES, Offer, Sender
from distllm.shards import shard_model

RANKS = 3
PROMPT = "Once upon a time"
TOKENS = 12
LAYERS = [1, 3, 1]
Start = Callable[[Sequence[Sequence[str]]], Job]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 MB in files of about one layer each: many chunks."""
    sizes = {"hidden_size": 512, "intermediate_size": 2304, "head_dim": 64, "num_attention_heads": 8}
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "llama", shard_size="17MB", **sizes)


@pytest.fixture(scope="module")
def answer(model: Path) -> list[int]:
    return reference(model, byte_tokenizer().encode(PROMPT), TOKENS)


def commands(homes: Sequence[Path], *words: str) -> list[list[str]]:
    """One torchrun for each rank, as on hosts of their own."""
    asked = ["plan.strategy=manual", f"plan.layers={LAYERS}".replace(" ", ""), "model.dtype=float32"]
    asked += [f"prompt={PROMPT}", f"sampling.max_tokens={TOKENS}", *words]
    pairs = zip(homes, agent_per_rank(len(homes), *asked), strict=True)
    return [["env", f"HOME={home}", f"DISTLLM_CACHE={home}/cache", *command] for home, command in pairs]


def homes_in(folder: Path, model: Path) -> list[Path]:
    """The first rank's has the model, the others' have nothing."""
    homes = [folder / f"home{rank}" for rank in range(RANKS)]
    for home in homes:
        home.mkdir()
    (homes[0] / "model").symlink_to(model)
    return homes


def test_ranks_without_files(model: Path, answer: list[int], tmp_path: Path, start: Start) -> None:
    homes = homes_in(tmp_path, model)
    job = start(commands(homes, "model.path=~/model", "weights=push"))
    assert job.wait(150) == [0] * RANKS, job.err.read_text()
    assert job.out.read_text().strip("\n") == byte_tokenizer().decode(answer, skip_special_tokens=True)
    assert "rank 0 sends their weights to ranks 1, 2" in job.err.read_text()
    assert [list(home.iterdir()) for home in homes[1:]] == [[], []], "something was written"


def test_without_push_they_are_told_of_it(model: Path, tmp_path: Path, start: Start) -> None:
    homes = homes_in(tmp_path, model)
    job = start(commands(homes, "model.path=~/model", "weights=push", "weights.stages=[1]"))
    assert job.wait(150)[0] != 0
    (error,) = job.errors()
    assert "rank 2 (" in error
    assert f"{homes[2]}/model/config.json: no such file; copy the model to this host, or let rank 0 send it: " in error
    assert error.endswith("weights=push")


@pytest.mark.slow
def test_of_the_hub_rank_0_downloads_for_the_others(
    model: Path, answer: list[int], tmp_path: Path, start: Start
) -> None:
    homes = homes_in(tmp_path, model)
    with fake_hub(model) as hub:
        lines = commands(homes, f"model.path={hub.repository}", "weights=push")
        environ = [
            [f"HF_ENDPOINT={hub.endpoint(f'rank{rank}')}", f"HF_HOME={home}/hf", "HF_HUB_OFFLINE=0"]
            for rank, home in enumerate(homes)
        ]
        job = start([["env", *more, *line] for more, line in zip(environ, lines, strict=True)])
        assert job.wait(150) == [0] * RANKS, job.err.read_text()
        assert {who for who, _ in hub.bytes_of} == {"rank0"}
    assert job.out.read_text().strip("\n") == byte_tokenizer().decode(answer, skip_special_tokens=True)


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[list[Proxy]]:
    """What ranks fetch goes through these: made like the parameter says when rank 0 begins to send."""
    made: list[Proxy] = []
    with ExitStack() as stack:

        class Behind(Sender):
            @property
            def offer(self) -> Offer:
                offer = super().offer
                made.append(stack.enter_context(Proxy(offer.port, **request.param)))
                return replace(offer, port=made[-1].port)

        monkeypatch.setattr(sending, "Sender", Behind)
        yield made


def llm(model: Path, **options: Any) -> LLM:
    return LLM(
        model,
        dtype="float32",
        weights=WeightsConfig(source="push", **options),
        cluster=ClusterConfig(workers=RANKS, threads=1),
        plan=PlanConfig(strategy="manual", layers=LAYERS),
    )


@pytest.mark.parametrize("proxies", [{"cut_after": CHUNK_BYTES * 3 // 2}], indirect=True)
def test_a_connection_that_is_cut_goes_on(model: Path, answer: list[int], proxies: list[Proxy]) -> None:
    with llm(model, streams=2) as opened:
        (output,) = opened.generate([PROMPT], SamplingParams(max_tokens=TOKENS))
        read = [rank["read_bytes"] for rank in cast(list[dict[str, int]], opened.stats()["ranks"])]
    (proxy,) = proxies
    assert proxy.cuts == 1
    assert list(output.token_ids) == answer
    stored = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert sum(read) == pytest.approx(stored, rel=0.01)
    assert sum(read[1:]) < proxy.passed < sum(read[1:]) + 2 * CHUNK_BYTES, "more came again than what was under way"


@pytest.mark.parametrize("proxies", [{"flips": 1}], indirect=True)
def test_a_flipped_bit_is_refused(
    model: Path, answer: list[int], proxies: list[Proxy], capfd: pytest.CaptureFixture[str]
) -> None:
    with llm(model) as opened:
        (output,) = opened.generate([PROMPT], SamplingParams(max_tokens=TOKENS))
    assert [proxy.flipped for proxy in proxies] == [1]
    assert list(output.token_ids) == answer
    assert "arrived damaged and was refused; fetching it again" in capfd.readouterr().err


@pytest.mark.parametrize("proxies", [{"flips": 10**9}], indirect=True)
def test_a_line_that_damages_everything_is_named(model: Path, proxies: list[Proxy]) -> None:
    with pytest.raises(EngineError, match=r"^rank [12] \(.*\): tensor \S+ arrives damaged from rank 0 at "):
        llm(model)
    assert proxies[0].flipped >= 3


def test_compressed_weights(model: Path, answer: list[int]) -> None:
    """In fp32, so that each number has four bytes that are sent apart."""
    with llm(model, compression="zstd") as opened:
        (output,) = opened.generate([PROMPT], SamplingParams(max_tokens=TOKENS))
    assert list(output.token_ids) == answer


def test_rank_0_lacks_a_file_that_it_should_send(model: Path, tmp_path: Path) -> None:
    shard_model(model, tmp_path / "shards", layers=LAYERS)
    missing = tmp_path / "shards" / "stage-2.safetensors"
    missing.unlink()
    with pytest.raises(ValueError, match=f"^{missing}: no such file, but weights that are wanted lie in it"):
        llm(tmp_path / "shards")


def test_a_rank_that_is_not_there(model: Path) -> None:
    with pytest.raises(ValueError, match=r"^weights\.stages names rank 3: the job has ranks 0 to 2$"):
        LLM(model, workers=RANKS, weights=WeightsConfig(source="push", stages=[3]))
