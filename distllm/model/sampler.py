"""From logits to tokens: penalties, temperature, truncation and the draw itself.

Shapes: B rows, V vocabulary, N candidates of one row. Knows nothing of models, texts or the other rows of a batch: a
row's token depends on its own logits, parameters and history, and on (seed, position), never on who is computed
with it.

Rules are applied in the order of `GenerationMixin._get_logits_processor` in transformers: repetition penalty,
temperature, top-k, top-p, min-p. (vLLM puts min-p before top-k and top-p; the kept sets can differ when both are used.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distllm.core import SamplingParams

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
_ONE = 2**40  # the weight of the likeliest token; the weights of a row must sum to less than 2**63
_SMALLEST_TEMPERATURE = 2.0**-126  # the smallest normal float32: below it, dividing by the temperature is 0 / 0


class Sampler:
    """The sampling state of the requests in `slots` places, on the rank that holds the head.

    Args:
        slots: how many requests can run at once; a slot is an int in [0, slots).
        vocabulary: V, the width of the logits.
        device: where the logits are.
    """

    def __init__(self, slots: int, vocabulary: int, device: torch.device | str) -> None:
        assert 0 < vocabulary < 2**22, "fixed-point weights need a vocabulary of less than 4 million"
        self._vocabulary = vocabulary
        self._device = torch.device(device)
        self._params: list[SamplingParams | None] = [None] * slots
        self._seen: list[Tensor | None] = [None] * slots  # bool (V,), only where tokens seen before are penalised

    def start(self, slot: int, params: SamplingParams) -> None:
        """Begin a request in `slot` and forget the one before; `params` comes with a concrete seed."""
        assert params.seed is not None, "the master draws a missing seed when it accepts the request"
        penalised = params.repetition_penalty != 1
        self._params[slot] = params
        self._seen[slot] = torch.zeros(self._vocabulary, dtype=torch.bool, device=self._device) if penalised else None

    def see(self, slot: int, tokens: Sequence[int]) -> None:
        """Add tokens of the prompt or of the answer to the history; a token drawn here counts once it comes back so."""
        seen_V = self._seen[slot]
        if seen_V is not None:
            seen_V[torch.tensor(tokens, dtype=torch.int64, device=self._device)] = True

    def sample(self, logits_BV: Tensor, slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Pick one token a row.

        Args:
            logits_BV: of any float type; not changed.
            slots: the slot of each row's request.
            positions: the position in its sequence of the token that is drawn for each row.

        Returns:
            Token ids, int64 (B,), on the device of the logits. A row whose largest logit is not finite gets its first
            largest token, so that a model that overflows does not take the other rows with it.
        """
        assert logits_BV.shape == (len(slots), self._vocabulary)
        tokens_B = first_largest(logits_BV)
        for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            params, seen_V = self._params[slot], self._seen[slot]
            assert params is not None, f"slot {slot} was never started"
            if params.temperature > 0 or seen_V is not None:
                tokens_B[row] = _pick(logits_BV[row].float(), params, seen_V, position)
        return tokens_B


def first_largest(logits_BV: Tensor) -> Tensor:
    """The first of the largest logits of each row, int64 (B,): `argmax`, made of the largest of blocks.

    torch reduces values with vector instructions but indices one by one: on CPU this is 3 to 10 times faster.
    """
    block = math.gcd(logits_BV.shape[1], 512)
    if block < 32 or not len(logits_BV):
        return logits_BV.argmax(dim=1)
    blocks = logits_BV.reshape(len(logits_BV), -1, block)
    block_B = blocks.amax(dim=2).argmax(dim=1)
    rows_B = torch.arange(len(logits_BV), device=logits_BV.device)
    return blocks[rows_B, block_B].argmax(dim=1).add_(block_B, alpha=block)


def _pick(logits_V: Tensor, params: SamplingParams, seen_V: Tensor | None, position: int) -> Tensor:
    """One token of a row of float32 logits, int64 ()."""
    if seen_V is not None:
        logits_V = penalise(logits_V, seen_V, params.repetition_penalty)
    if params.temperature == 0 or not math.isfinite(logits_V.amax().item()):
        return first_largest(logits_V[None])[0]
    assert params.seed is not None
    tokens_N, weights_N = candidates(logits_V, params)
    return tokens_N[draw(weights_N, random_bits(params.seed, position))]


def penalise(logits_V: Tensor, seen_V: Tensor, penalty: float) -> Tensor:
    """A copy with the logits of seen tokens divided by the penalty where positive, multiplied where negative.

    Source: Keskar et al., "CTRL: A conditional transformer language model" (2019), section 4.1, in the form that
    transformers gave it, which treats negative logits rightly.
    """
    tokens_N = seen_V.nonzero()[:, 0]
    logits_N = logits_V[tokens_N]
    changed_N = torch.where(logits_N < 0, logits_N * penalty, logits_N / penalty)
    return logits_V.index_copy(0, tokens_N, changed_N)


def candidates(logits_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and how likely each is.

    Args:
        logits_V: float32, penalties applied, the largest finite.
        params: `temperature` above 0; `top_k`, `top_p` and `min_p` are applied in this order.

    Returns:
        Token ids in rising order, int64 (N,), and weights proportional to their probabilities, int64 (N,), of which the
        largest is 2**40. Tokens less likely than 2**-40 of the likeliest weigh nothing.
    """
    tokens_N, logits_N = _top_k(logits_V, params.top_k)
    weights_N = _weights(logits_N, params.temperature)
    if params.top_p < 1:
        kept = _top_p(weights_N, params.top_p)
        tokens_N, weights_N = tokens_N[kept], weights_N[kept]
    if params.min_p > 0:
        kept = weights_N >= math.ceil(params.min_p * _ONE)
        tokens_N, weights_N = tokens_N[kept], weights_N[kept]
    return tokens_N, weights_N


def _weights(logits_N: Tensor, temperature: float) -> Tensor:
    """exp(logit / temperature) over that of the largest, in 2**-40ths, int64 (N,).

    Fixed point, because sums of integers are exact: whatever order a device adds them in, cumulative sums rise exactly
    where a weight is above 0, and a row has the same sums alone as in any batch.
    """
    scaled_N = (logits_N - logits_N.amax()).div_(max(temperature, _SMALLEST_TEMPERATURE))
    return scaled_N.exp_().mul_(_ONE).to(torch.int64)


def _top_k(logits_V: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids, rising, and logits of the k largest logits and of all that equal the smallest of them; k = 0 keeps all."""
    if k == 0 or k >= len(logits_V):
        return torch.arange(len(logits_V), device=logits_V.device), logits_V
    tokens_M = _likely_blocks(logits_V, k)
    logits_M = logits_V[tokens_M]
    kept_N = (logits_M >= logits_M.topk(k).values[-1]).nonzero()[:, 0]
    return tokens_M[kept_N], logits_M[kept_N]


def _likely_blocks(logits_V: Tensor, k: int) -> Tensor:
    """Ids, rising, of the blocks that hold the k largest logits: those whose largest is among the k largest of such.

    Looking for them there only is 2 to 3 times faster than in the whole row.
    """
    block = math.gcd(len(logits_V), 128)
    peaks = logits_V.view(-1, block).amax(dim=1)
    first = (peaks >= peaks.topk(min(k, len(peaks))).values[-1]).nonzero() * block
    return (first + torch.arange(block, device=logits_V.device)).flatten()


def _top_p(weights_N: Tensor, p: float) -> Tensor:
    """Where the fewest tokens are whose weights reach p of the sum, in rising order; of equal weights the first.

    Source: Holtzman et al., "The curious case of neural text degeneration" (2020). Tokens no heavier than
    (1 - p) * sum / N weigh together no more than what may be left out, so they need not be sorted.

    The order of ids is kept for the draw: the last bits of logits that other hardware computes can swap neighbours in
    an order by weight, and with them the token drawn, but they move the borders in an order by id by next to nothing.
    """
    total = int(weights_N.sum())
    goal = math.ceil(p * total)
    likely_M = (weights_N > max(total - goal, 0) // len(weights_N)).nonzero()[:, 0]
    sorted_M, order_M = weights_N[likely_M].sort(descending=True, stable=True)
    before_M = sorted_M.cumsum(0) - sorted_M
    return likely_M[order_M[before_M < goal].sort().values]


def draw(weights_N: Tensor, bits: int) -> Tensor:
    """The index, int64 (), at which the cumulative weights pass the fraction bits / 2**64 of their sum.

    The inverse of the distribution function, in integers: the target is below the sum, however close to 1 the fraction
    is, and the first cumulative weight above it belongs to a token of weight above 0.
    """
    cumulative_N = weights_N.cumsum(0)
    target = (bits * int(cumulative_N[-1])) >> 64
    return torch.searchsorted(cumulative_N, target, right=True)


def random_bits(seed: int, position: int) -> int:
    """64 random bits that depend on (seed, position) only; over 2**64 they are uniform in [0, 1).

    The output number `position` of a SplitMix64 generator whose state is the first output of SplitMix64 on `seed`. Its
    n-th state is known without the ones before, so it is a counter-based generator. Source: Steele, Lea and Flood,
    "Fast splittable pseudorandom number generators" (OOPSLA 2014), with the constants of Vigna's splitmix64.c.
    """
    state = _mix(seed + _GOLDEN)
    return _mix(state + (position + 1) * _GOLDEN)


def _mix(z: int) -> int:
    """The finaliser of SplitMix64, on the low 64 bits of z."""
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
