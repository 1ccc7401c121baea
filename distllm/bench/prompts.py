"""Prompts of a given length: pieces of a public-domain text, so that the continuations are sensible.

The text is the beginning of Lewis Carroll's "Alice's Adventures in Wonderland" (1865).
"""

from __future__ import annotations

from distllm.model.tokenizer import Tokenizer

TEXT = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or twice \
she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "and what is the \
use of a book," thought Alice "without pictures or conversations?"

So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and stupid), \
whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the daisies, when \
suddenly a White Rabbit with pink eyes ran close by her.

There was nothing so very remarkable in that; nor did Alice think it so very much out of the way to hear the Rabbit \
say to itself, "Oh dear! Oh dear! I shall be late!" (when she thought it over afterwards, it occurred to her that she \
ought to have wondered at this, but at the time it all seemed quite natural); but when the Rabbit actually took a \
watch out of its waistcoat-pocket, and looked at it, and then hurried on, Alice started to her feet, for it flashed \
across her mind that she had never before seen a rabbit with either a waistcoat-pocket, or a watch to take out of it, \
and burning with curiosity, she ran across the field after it, and fortunately was just in time to see it pop down a \
large rabbit-hole under the hedge.

In another moment down went Alice after it, never once considering how in the world she was to get out again.

The rabbit-hole went straight on like a tunnel for some way, and then dipped suddenly down, so suddenly that Alice had \
not a moment to think about stopping herself before she found herself falling down a very deep well.
"""


def make_prompts(tokenizer: Tokenizer, *, count: int, tokens: int) -> list[tuple[int, ...]]:
    """Prompts of `tokens` token ids each, which begin at places spread evenly over the text.

    A prompt longer than the text begins it anew. What the tokenizer puts before a text, such as BOS, is before each.

    Raises:
        ValueError: the text has not so many places to begin at.
    """
    encoded = tokenizer.encode(TEXT)
    lead = encoded[:1] if tokens > 1 and tokenizer.is_silent(encoded[0]) else ()
    body = tuple(token for token in encoded if not tokenizer.is_silent(token))
    if count > len(body):
        raise ValueError(f"bench.requests={count}: there are prompts for at most {len(body)}")
    length = tokens - len(lead)
    endless = body * (length // len(body) + 2)
    starts = [index * len(body) // count for index in range(count)]
    return [(*lead, *endless[start : start + length]) for start in starts]
