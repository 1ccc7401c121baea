"""From logits to tokens: penalties, temperature, truncation and the draw itself.

Shapes: B rows, V vocabulary, N candidates of one row. Knows nothing of models, texts or the other rows of a batch: a
row's token depends on its own logits, parameters and history, and on (seed, position), never on who is computed
with it.

Rules are applied in the order of `GenerationMixin._get_logits_processor` in transformers: repetition penalty,
temperature, top-k, top-p, min-p. (vLLM puts min-p before top-k and top-p; the kept sets can differ when both are used.)
What transformers has not comes first, as in vLLM: bias before the repetition penalty, the other penalties behind it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distllm.core import Logprob, SamplingParams

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1
_ONE = 2**40  # the weight of the likeliest token; the weights of a row must sum to less than 2**63
_BLOCK = 512  # ids that race as one
_TOKENS = 2**22  # more than any vocabulary has; numbers of random times below it are those of blocks
_SMALLEST_TEMPERATURE = 2.0**-126  # the smallest normal float32: below it, dividing by the temperature is 0 / 0


@dataclass(frozen=True, slots=True)
class History:
    """What one request's rules need to know of the tokens before; None where they need nothing.

    `seen_V`, bool (V,), is whether the prompt or the answer has a token; `counts_V`, float32 (V,), how often the answer
    has it. `biased_N` and `biases_N`, int64 and float32 (N,), are the tokens with a bias.
    """

    params: SamplingParams
    prompt: int
    seen_V: Tensor | None
    counts_V: Tensor | None
    biased_N: Tensor | None
    biases_N: Tensor | None

    @classmethod
    def begin(cls, params: SamplingParams, prompt: int, vocabulary: int, device: torch.device) -> History:
        """That of a request of which no token is known."""
        counts = params.presence_penalty or params.frequency_penalty
        bias = params.logit_bias
        return cls(
            params,
            prompt,
            torch.zeros(vocabulary, dtype=torch.bool, device=device) if params.repetition_penalty != 1 else None,
            torch.zeros(vocabulary, device=device) if counts else None,
            torch.tensor([token for token, _ in bias], device=device) if bias else None,
            torch.tensor([value for _, value in bias], device=device) if bias else None,
        )

    def see(self, tokens: Sequence[int], start: int) -> None:
        """Adds tokens, the first of which is at position `start`."""
        if self.seen_V is not None:
            self.seen_V[torch.tensor(tokens, device=self.seen_V.device)] = True
        if self.counts_V is not None and (answered := tokens[max(self.prompt - start, 0) :]):
            answered_N = torch.tensor(answered, device=self.counts_V.device)
            self.counts_V.index_add_(0, answered_N, torch.ones(len(answered), device=self.counts_V.device))

    @property
    def leaves_logits(self) -> bool:
        """Whether no rule changes the logits before the temperature does."""
        return self.seen_V is None and self.counts_V is None and self.biased_N is None

    def changed(self, logits_V: Tensor) -> Tensor:
        """Float32 logits with bias and penalties; a copy if there are any."""
        if self.biased_N is not None and self.biases_N is not None:
            logits_V = logits_V.index_add(0, self.biased_N, self.biases_N)
        if self.seen_V is not None:
            logits_V = penalise(logits_V, self.seen_V, self.params.repetition_penalty)
        if self.counts_V is not None:
            presence, frequency = self.params.presence_penalty, self.params.frequency_penalty
            logits_V = logits_V - frequency * self.counts_V - presence * (self.counts_V > 0)
        return logits_V


class Sampler:
    """The sampling state of the requests in `slots` places, on the rank that holds the head.

    Args:
        slots: how many requests can run at once; a slot is an int in [0, slots).
        vocabulary: V, the width of the logits.
        device: where the logits are.
    """

    def __init__(self, slots: int, vocabulary: int, device: torch.device | str) -> None:
        assert 0 < vocabulary < _TOKENS, "fixed-point weights need a vocabulary of less than 4 million"
        self._vocabulary = vocabulary
        self._device = torch.device(device)
        self._histories: list[History | None] = [None] * slots

    def start(self, slot: int, params: SamplingParams, prompt: int = 0) -> None:
        """Begin a request in `slot` and forget the one before.

        Args:
            params: with a concrete seed.
            prompt: its length in tokens; what comes behind is the answer.
        """
        assert params.seed is not None, "the master draws a missing seed when it accepts the request"
        self._histories[slot] = History.begin(params, prompt, self._vocabulary, self._device)

    def see(self, slot: int, tokens: Sequence[int], start: int = 0) -> None:
        """Add tokens of the prompt or of the answer to the history, the first at position `start`; a token drawn here
        counts once it comes back so."""
        self._of(slot).see(tokens, start)

    def sample(
        self, logits_BV: Tensor, slots: Sequence[int], positions: Sequence[int], allowed: Sequence[bytes] = ()
    ) -> Tensor:
        """Pick one token a row.

        Args:
            logits_BV: of any float type; not changed.
            slots: the slot of each row's request.
            positions: the position in its sequence of the token that is drawn for each row.
            allowed: bits of the tokens that may be drawn, as in `Row`, for each row; by default all.

        Returns:
            Token ids, int64 (B,), on the device of the logits. A row whose largest logit is not finite gets its first
            largest token, so that a model that overflows does not take the other rows with it.
        """
        assert logits_BV.shape == (len(slots), self._vocabulary)
        tokens_B = first_largest(logits_BV)
        for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            history, mask = self._of(slot), allowed[row] if allowed else b""
            if history.params.temperature > 0 or mask or not history.leaves_logits:
                logits_V = history.changed(logits_BV[row].float())
                logits_V = only(logits_V, mask) if mask else logits_V
                tokens_B[row] = _pick(logits_V, history.params, position)
        return tokens_B

    def logprobs(self, logits_BV: Tensor, tokens_B: Tensor, slots: Sequence[int]) -> list[tuple[int, Logprob]]:
        """How likely the tokens were, and which were the likeliest, in rows whose requests ask for it.

        By the model alone, before any rule, as in vLLM: so numbers can be compared between requests.

        Returns:
            Pairs of row and that.
        """
        return [
            (row, _logprob(logits_BV[row], int(tokens_B[row]), count))
            for row, slot in enumerate(slots)
            if (count := self._of(slot).params.logprobs) is not None
        ]

    def _of(self, slot: int) -> History:
        history = self._histories[slot]
        assert history is not None, f"slot {slot} was never started"
        return history


def _logprob(logits_V: Tensor, token: int, count: int) -> Logprob:
    logprobs_V = logits_V.float().log_softmax(dim=0)
    values_N, tokens_N = logprobs_V.topk(min(count, len(logprobs_V)))
    return Logprob(token, float(logprobs_V[token]), tuple(zip(tokens_N.tolist(), values_N.tolist(), strict=True)))


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


def _pick(logits_V: Tensor, params: SamplingParams, position: int) -> Tensor:
    """One token of a row of float32 logits, bias and penalties applied, int64 ()."""
    if params.temperature == 0 or not math.isfinite(logits_V.amax().item()):
        return first_largest(logits_V[None])[0]
    assert params.seed is not None
    tokens_N, weights_N = candidates(logits_V, params)
    return draw(tokens_N, weights_N, random_bits(params.seed, position))


def only(logits_V: Tensor, allowed: bytes) -> Tensor:
    """A copy in which the tokens that are not allowed cannot be drawn.

    Args:
        allowed: bits, as in `Row`; tokens behind them are not allowed.
    """
    bytes_N = torch.frombuffer(bytearray(allowed), dtype=torch.uint8).to(logits_V.device)
    bits = torch.arange(8, dtype=torch.uint8, device=logits_V.device)
    mask_V = torch.zeros(len(logits_V), dtype=torch.bool, device=logits_V.device)
    known = min(len(logits_V), 8 * len(bytes_N))
    mask_V[:known] = (bytes_N[:, None] >> bits & 1).bool().flatten()[:known]
    return logits_V.masked_fill(~mask_V, float("-inf"))


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
    """
    total = int(weights_N.sum())
    goal = math.ceil(p * total)
    likely_M = (weights_N > max(total - goal, 0) // len(weights_N)).nonzero()[:, 0]
    sorted_M, order_M = weights_N[likely_M].sort(descending=True, stable=True)
    before_M = sorted_M.cumsum(0) - sorted_M
    return likely_M[order_M[before_M < goal].sort().values]


def draw(tokens_N: Tensor, weights_N: Tensor, bits: int) -> Tensor:
    """One of the tokens, int64 (), each as likely as its weight, by the random bits of its position.

    A race: each token comes after an exponential time divided by its weight, and the first one is drawn. To need few
    random times, blocks of 512 ids race first, each with the sum of its weights, then the tokens of the block that won.

    The last bits of logits depend on how many rows are computed at once. Here they matter only if two are nearly first.
    In the inverse of the distribution function they move the borders of all tokens that follow: with logits that are
    1e-5 apart, 26 of 1,000 draws from 49,152 tokens changed; in the race, none. Source: the race of exponentials, or
    Gumbel-max trick, as in Maddison, Tarlow and Minka, "A* sampling" (2014).

    Args:
        tokens_N: in rising order.
        weights_N: int64, not all 0; a token of weight 0 is never drawn.
    """
    before_N = torch.nn.functional.pad(weights_N.cumsum(0), (1, 0))
    borders = torch.arange(0, int(tokens_N[-1]) + _BLOCK + 1, _BLOCK, device=tokens_N.device)
    places = torch.searchsorted(tokens_N, borders)
    sums = before_N[places].diff()
    block = _first(sums, exponential(bits, torch.arange(len(sums), device=sums.device)))
    inside = slice(*places[block : block + 2].tolist())
    tokens_M = tokens_N[inside]
    return tokens_M[_first(weights_N[inside], exponential(bits, tokens_M + _TOKENS))]


def _first(weights_N: Tensor, times_N: Tensor) -> int:
    """Who comes first, its time being divided by its weight."""
    return int((weights_N / times_N).argmax())


def exponential(bits: int, numbers_N: Tensor) -> Tensor:
    """Random times, float64 (N,), exponentially distributed with mean 1, each a function of the bits and its number.

    The outputs of SplitMix64 that `random_bits` describes, from the state `bits` on; of each the upper 53 bits.
    """
    z_N = (numbers_N + 1) * _signed(_GOLDEN) + _signed(bits)
    z_N = (z_N ^ _shifted(z_N, 30)) * _signed(_FIRST)
    z_N = (z_N ^ _shifted(z_N, 27)) * _signed(_SECOND)
    z_N = z_N ^ _shifted(z_N, 31)
    return (_shifted(z_N, 11).double() + 0.5).mul_(2.0**-53).log_().neg_()


def _shifted(z_N: Tensor, count: int) -> Tensor:
    """Unsigned integers, which torch takes for signed ones, shifted to the right."""
    return (z_N >> count) & (_MASK >> count)


def _signed(z: int) -> int:
    """The number that has the same 64 bits in two's complement."""
    return z - 2**64 if z >= 2**63 else z


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
    z = ((z ^ (z >> 30)) * _FIRST) & _MASK
    z = ((z ^ (z >> 27)) * _SECOND) & _MASK
    return z ^ (z >> 31)
