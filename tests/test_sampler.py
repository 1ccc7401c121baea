"""The sampler: the right distribution, the right candidates, and the same token whoever else is in the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from distllm.core import SamplingParams
from distllm.model.sampler import Sampler, candidates, draw, exponential, first_largest, random_bits

CHI_SQUARE_15 = 44.3  # exceeded with probability 1e-4 by 15 degrees of freedom
VARIETY = (
    SamplingParams(seed=1),
    SamplingParams(seed=2, temperature=1.0),
    SamplingParams(seed=3, temperature=0.7, top_k=20),
    SamplingParams(seed=4, temperature=1.3, top_p=0.9),
    SamplingParams(seed=5, temperature=1.0, min_p=0.02),
    SamplingParams(seed=6, repetition_penalty=1.3),
    SamplingParams(seed=7, temperature=0.9, top_k=40, top_p=0.8, min_p=0.01, repetition_penalty=0.8),
)


def random_logits(rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def draws(params: SamplingParams, logits_V: Tensor, positions: range) -> Tensor:
    """The tokens of one slot at many positions, all with the same logits."""
    sampler = Sampler(1, len(logits_V), "cpu")
    sampler.start(0, params)
    return sampler.sample(logits_V.expand(len(positions), -1), [0] * len(positions), positions)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def splitmix64(state: int) -> Iterator[int]:
    """The generator step by step, as published."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        yield z ^ (z >> 31)


# Greedy


@pytest.mark.parametrize("vocabulary", [1, 7, 50, 512, 1000, 4096, 5056])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_first_largest_is_argmax(vocabulary: int, dtype: torch.dtype) -> None:
    logits_BV = random_logits(9, vocabulary).to(dtype)
    assert torch.equal(first_largest(logits_BV), logits_BV.argmax(dim=1))
    ties_BV = torch.randint(0, 3, (9, vocabulary), generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(first_largest(ties_BV), ties_BV.argmax(dim=1))
    assert torch.equal(first_largest(logits_BV.T.contiguous().T), logits_BV.argmax(dim=1))


def test_no_rows_give_no_tokens() -> None:
    assert Sampler(1, 512, "cpu").sample(torch.empty(0, 512), [], []).shape == (0,)


def test_greedy_is_argmax_and_leaves_the_logits_alone() -> None:
    sampler = Sampler(4, 512, "cpu")
    for slot in range(4):
        sampler.start(slot, SamplingParams(seed=slot))
        sampler.see(slot, [1, 2, 3])
    logits_BV = random_logits(4, 512)
    before = logits_BV.clone()
    tokens_B = sampler.sample(logits_BV, [3, 1, 0, 2], [5, 6, 7, 8])
    assert tokens_B.dtype == torch.int64
    assert torch.equal(tokens_B, before.argmax(dim=1))
    assert torch.equal(logits_BV, before)


def test_a_broken_row_harms_no_other() -> None:
    sampler = Sampler(4, 512, "cpu")
    for slot in range(4):
        sampler.start(slot, SamplingParams(seed=slot, temperature=1.0, top_p=0.9))
    logits_BV = random_logits(4, 512)
    healthy = sampler.sample(logits_BV, range(4), range(4))
    logits_BV[0] = float("nan")
    logits_BV[1, 77] = float("inf")
    logits_BV[2] = float("-inf")
    tokens_B = sampler.sample(logits_BV, range(4), range(4))
    assert tokens_B[1] == 77
    assert tokens_B[3] == healthy[3]
    assert 0 <= int(tokens_B.min()) <= int(tokens_B.max()) < 512


def test_parameters_without_a_seed_are_a_mistake() -> None:
    with pytest.raises(AssertionError):
        Sampler(1, 8, "cpu").start(0, SamplingParams())


# Randomness


@given(st.integers(0, 2**63 - 1))
@settings(max_examples=50)
def test_random_bits_are_splitmix64(seed: int) -> None:
    stream = splitmix64(next(splitmix64(seed)))
    assert [random_bits(seed, position) for position in range(5)] == [next(stream) for _ in range(5)]


def test_splitmix64_of_this_test_is_the_published_one() -> None:
    stream = splitmix64(0)
    assert (next(stream), next(stream)) == (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4)


@pytest.mark.parametrize("along", ["positions", "seeds", "both"])
def test_random_bits_are_uniform(along: str) -> None:
    pairs = {
        "positions": [(5, n) for n in range(16000)],
        "seeds": [(n, 5) for n in range(16000)],
        "both": [(n, n) for n in range(16000)],
    }[along]
    for shift in (60, 0):  # the highest and the lowest four bits
        nibbles = torch.tensor([random_bits(*pair) >> shift & 15 for pair in pairs])
        assert chi_square(nibbles.bincount(minlength=16), torch.full((16,), 1 / 16)) < CHI_SQUARE_15


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits_V = torch.linspace(-1, 1, 16)
    tokens = draws(SamplingParams(seed=11, temperature=temperature), logits_V, range(10000))
    probabilities = (logits_V / temperature).softmax(dim=0)
    assert chi_square(tokens.bincount(minlength=16), probabilities) < CHI_SQUARE_15


def test_neighbouring_positions_are_independent() -> None:
    tokens = draws(SamplingParams(seed=12, temperature=1.0), torch.zeros(4), range(10000))
    pairs = (tokens[:-1] * 4 + tokens[1:])[::2]
    assert chi_square(pairs.bincount(minlength=16), torch.full((16,), 1 / 16)) < CHI_SQUARE_15


def test_other_seeds_and_positions_draw_other_tokens() -> None:
    logits_V = torch.zeros(4096)
    runs = [draws(SamplingParams(seed=seed, temperature=1.0), logits_V, range(20)).tolist() for seed in (0, 1, 2**62)]
    assert len({tuple(run) for run in runs}) == 3
    assert all(len(set(run)) > 15 for run in runs)


def test_the_global_generator_is_neither_used_nor_moved() -> None:
    params, logits_V = SamplingParams(seed=3, temperature=1.0, top_k=9, top_p=0.9), random_logits(1, 512)[0]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draws(params, logits_V, range(50))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(draws(params, logits_V, range(50)), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [512, 1003])
def test_a_row_gets_the_same_token_alone_and_among_others(dtype: torch.dtype, vocabulary: int) -> None:
    logits_BV = random_logits(32, vocabulary).to(dtype)
    together, alone = Sampler(32, vocabulary, "cpu"), Sampler(32, vocabulary, "cpu")
    for sampler in (together, alone):
        for slot in range(32):
            sampler.start(slot, VARIETY[slot % len(VARIETY)])
            sampler.see(slot, range(slot, slot + 9))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(5)).tolist()
    for position in range(5):
        batch = together.sample(logits_BV[order], order, [position] * 32)
        strided = together.sample(logits_BV.T.contiguous().T, range(32), [position] * 32)
        single = [int(alone.sample(logits_BV[slot : slot + 1], [slot], [position])) for slot in range(32)]
        assert batch.tolist() == [single[slot] for slot in order]
        assert strided.tolist() == single


def test_a_token_without_weight_is_never_drawn() -> None:
    tokens_N, weights_N = torch.tensor([1, 5, 700, 701, 5000, 5001]), torch.tensor([0, 5, 0, 0, 3, 0])
    drawn = {int(draw(tokens_N, weights_N, random_bits(1, position))) for position in range(100)}
    assert drawn == {5, 5000}


def test_exponential_times_are_those_of_splitmix64() -> None:
    for bits in (0, 12345, 2**63, 2**64 - 1):
        stream = splitmix64(bits)
        expected = [-math.log(((next(stream) >> 11) + 0.5) / 2**53) for _ in range(6)]
        assert exponential(bits, torch.arange(6)).tolist() == pytest.approx(expected, rel=1e-12)


def test_blocks_and_the_tokens_in_them_are_drawn_by_weight() -> None:
    tokens_N, weights_N = torch.tensor([0, 1, 511, 512, 4000, 49151]), torch.tensor([5, 1, 10, 30, 4, 50])
    drawn = torch.stack([draw(tokens_N, weights_N, random_bits(4, position)) for position in range(10000)])
    counts = (drawn[:, None] == tokens_N).sum(dim=0)
    assert int(counts.sum()) == 10000
    assert chi_square(counts, weights_N / weights_N.sum()) < 25.7  # 5 degrees of freedom, 1e-4


def test_the_last_bits_of_logits_change_next_to_no_draw() -> None:
    logits_V = random_logits(1, 49152)[0]
    noise_V = random_logits(1, 49152, seed=1)[0] * 1e-5
    params = SamplingParams(seed=9, temperature=1.0)
    positions = range(1000)
    changed = draws(params, logits_V, positions) != draws(params, logits_V + noise_V, positions)
    assert int(changed.sum()) <= 1  # of the inverse of the distribution function, 26 did


def test_excluded_tokens_are_never_drawn() -> None:
    logits_V = random_logits(1, 64)[0]
    logits_V[::2] = float("-inf")
    assert (draws(SamplingParams(seed=8, temperature=5.0), logits_V, range(500)) % 2 == 1).all()


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits_V = random_logits(1, 512)[0] * 10
    tokens = draws(SamplingParams(seed=8, temperature=temperature), logits_V, range(20))
    assert set(tokens.tolist()) == {int(logits_V.argmax())}


# Candidates


def reference_scores(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """What transformers makes of the logits."""
    chain: list[LogitsProcessor] = [TemperatureLogitsWarper(float(params.temperature))]
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    scores: Tensor = LogitsProcessorList(chain)(torch.zeros(1, 0, dtype=torch.int64), logits_V[None].clone())[0]
    return scores


def assert_like_transformers(logits_V: Tensor, params: SamplingParams) -> None:
    tokens_N, weights_N = candidates(logits_V, params)
    expected = reference_scores(logits_V.double(), params)
    assert tokens_N.tolist() == expected.isfinite().nonzero()[:, 0].tolist()
    probabilities = expected.softmax(dim=0)[tokens_N]
    torch.testing.assert_close(weights_N / weights_N.sum(), probabilities.float(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "rules",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 300},
        {"top_k": 10**6},
        {"top_p": 0.05},
        {"top_p": 0.5},
        {"top_p": 0.95},
        {"top_p": 0.9999},
        {"min_p": 0.001},
        {"min_p": 0.1},
        {"min_p": 0.999},
        {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocabulary", [1024, 1001])
def test_candidates_are_those_of_transformers(seed: int, rules: dict[str, float], vocabulary: int) -> None:
    logits_V = random_logits(1, vocabulary, seed)[0]
    for temperature in (0.6, 1.0, 1.7):
        assert_like_transformers(logits_V, SamplingParams(seed=0, temperature=temperature, **rules))  # type: ignore[arg-type]


@given(
    seed=st.integers(0, 10**6),
    k=st.integers(0, 70),
    p=st.floats(0.01, 0.99999) | st.just(1.0),
    m=st.floats(1e-5, 0.9) | st.just(0.0),
    temperature=st.floats(0.2, 3),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_mixture_of_rules_is_that_of_transformers(
    seed: int, k: int, p: float, m: float, temperature: float
) -> None:
    params = SamplingParams(seed=0, temperature=temperature, top_k=k, top_p=p, min_p=m)
    assert_like_transformers(random_logits(1, 64, seed)[0], params)


def test_top_k_keeps_all_that_equal_the_last() -> None:
    logits_V = torch.zeros(512)
    logits_V[[3, 200, 400]] = torch.tensor([2.0, 1.0, 1.0])
    tokens_N, _ = candidates(logits_V, SamplingParams(seed=0, temperature=1.0, top_k=2))
    assert tokens_N.tolist() == [3, 200, 400]


def test_top_p_keeps_the_first_of_equals() -> None:
    tokens_N, weights_N = candidates(torch.zeros(8), SamplingParams(seed=0, temperature=1.0, top_p=0.3))
    assert tokens_N.tolist() == [0, 1, 2]
    assert len(set(weights_N.tolist())) == 1


def test_top_p_always_keeps_one() -> None:
    logits_V = random_logits(1, 512)[0]
    tokens_N, _ = candidates(logits_V, SamplingParams(seed=0, temperature=1.0, top_p=1e-300))
    assert tokens_N.tolist() == [int(logits_V.argmax())]


# Repetition penalty


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits_BV = random_logits(40, 64)
    history = [5, 9, 9, 33, 60]
    sampler = Sampler(1, 64, "cpu")
    sampler.start(0, SamplingParams(seed=0, repetition_penalty=penalty))
    sampler.see(0, history[:2])
    sampler.see(0, history[2:])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([history] * 40), logits_BV.clone()).argmax(dim=1)
    assert not torch.equal(expected, logits_BV.argmax(dim=1))
    assert torch.equal(sampler.sample(logits_BV, [0] * 40, range(40)), expected)


def test_penalty_applies_to_draws_too() -> None:
    logits_V = torch.tensor([4.0, 1.0, -1.0, 0.0])
    sampler = Sampler(1, 4, "cpu")
    sampler.start(0, SamplingParams(seed=0, temperature=1.0, repetition_penalty=2.0))
    sampler.see(0, [0, 2])
    tokens = sampler.sample(logits_V.expand(4000, -1), [0] * 4000, range(4000))
    probabilities = torch.tensor([2.0, 1.0, -2.0, 0.0]).softmax(dim=0)
    assert chi_square(tokens.bincount(minlength=4), probabilities) < 21.1  # 3 degrees of freedom, 1e-4


def test_presence_and_frequency_penalties_count_the_answer_only() -> None:
    """As OpenAI's documentation has it: mu[j] - c[j] * frequency - float(c[j] > 0) * presence."""
    logits_V = random_logits(1, 64)[0]
    prompt, answer = [5, 9, 9], [7, 9, 7, 7]
    sampler = Sampler(1, 64, "cpu")
    params = SamplingParams(seed=0, presence_penalty=0.5, frequency_penalty=0.75)
    sampler.start(0, params, len(prompt))
    sampler.see(0, [*prompt, *answer[:1]], 0)  # a replay brings both at once
    sampler.see(0, answer[1:], 4)
    counts_V = torch.tensor(answer).bincount(minlength=64)
    expected_V = logits_V - counts_V * 0.75 - (counts_V > 0).float() * 0.5
    changed_V = sampler._of(0).changed(logits_V)
    assert torch.allclose(changed_V, expected_V)
    assert not torch.allclose(changed_V[[7, 9]], logits_V[[7, 9]])


def test_penalties_turn_a_greedy_answer_away_from_what_it_has() -> None:
    logits_BV = torch.tensor([[2.0, 1.9, 0.0]])
    sampler = Sampler(1, 3, "cpu")
    sampler.start(0, SamplingParams(seed=0, presence_penalty=0.5), 1)
    sampler.see(0, [0], 0)
    assert sampler.sample(logits_BV, [0], [1]).tolist() == [0], "the prompt is not the answer"
    sampler.see(0, [0], 1)
    assert sampler.sample(logits_BV, [0], [2]).tolist() == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_forces_and_forbids(temperature: float) -> None:
    logits_BV = random_logits(50, 64)
    sampler = Sampler(2, 64, "cpu")
    sampler.start(0, SamplingParams(seed=0, temperature=temperature, logit_bias={33: 100}))
    sampler.start(1, SamplingParams(seed=0, temperature=temperature, logit_bias=dict.fromkeys(range(32), -100)))
    assert set(sampler.sample(logits_BV, [0] * 50, range(50)).tolist()) == {33}
    assert min(sampler.sample(logits_BV, [1] * 50, range(50)).tolist()) >= 32


def test_logprobs_are_of_the_model_alone() -> None:
    logits_BV = random_logits(3, 64)
    sampler = Sampler(3, 64, "cpu")
    sampler.start(0, SamplingParams(seed=0, logprobs=3, logit_bias={33: 100}))
    sampler.start(1, SamplingParams(seed=0))
    sampler.start(2, SamplingParams(seed=0, logprobs=0))
    tokens = sampler.sample(logits_BV, [0, 1, 2], [0, 0, 0])
    told = dict(sampler.logprobs(logits_BV, tokens, [0, 1, 2]))
    expected_BV = logits_BV.log_softmax(dim=1)
    assert told.keys() == {0, 2}
    assert (told[0].token, told[2].token, told[2].top) == (33, int(tokens[2]), ())
    assert told[0].logprob == pytest.approx(float(expected_BV[0, 33]))
    values, ids = expected_BV[0].topk(3)
    assert told[0].top == tuple(zip(ids.tolist(), values.tolist(), strict=True))


def test_a_new_request_forgets_the_old_one() -> None:
    logits_BV = torch.tensor([[2.0, 1.9, 0.0]])
    sampler = Sampler(2, 3, "cpu")
    penalised = SamplingParams(seed=0, repetition_penalty=2.0)
    for slot in (0, 1):
        sampler.start(slot, penalised)
        sampler.see(slot, [0])
    assert sampler.sample(logits_BV.expand(2, -1), [0, 1], [1, 1]).tolist() == [1, 1]
    sampler.start(0, penalised)
    assert sampler.sample(logits_BV.expand(2, -1), [0, 1], [1, 1]).tolist() == [0, 1]
