"""Text to token ids and back: prompts, chat messages, and the answer as it grows.

The only place that loads a tokenizer. Knows nothing of requests, sampling or stop strings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from distllm.model.checkpoint import first_line, read_json

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"  # what bytes decode to that are no character, or not yet
_CONTEXT = 5  # tokens of the prompt that are decoded along with the first ones of the answer
_CHARACTER = 4  # most bytes, and so most tokens, of one character


class Tokenizer:
    """The tokenizer of one checkpoint.

    Attributes:
        folder: where it was loaded from.
        eos_ids: the ids that end a text, as the checkpoint's generation_config.json says, else its config.json, else
            the tokenizer itself; empty if none does.
    """

    def __init__(self, backend: PreTrainedTokenizerBase, folder: Path, eos_ids: frozenset[int]) -> None:
        self.folder = folder
        self.eos_ids = eos_ids
        self._backend = backend
        self._known = max(backend.get_vocab().values(), default=-1) + 1
        special = {token for token, added in backend.added_tokens_decoder.items() if added.special}
        special.update(backend.all_special_ids)
        self._special = frozenset(token for token in special if not self.decode((token,)))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read the tokenizer in a local folder; never looks elsewhere and never runs code from the folder.

        Raises:
            ValueError: the folder has no tokenizer, or its files are broken.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(f"no tokenizer in {folder}: there is no such folder")
        from transformers import AutoTokenizer

        try:
            backend = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a broken file raises anything here, down to the bare Exception of Rust code
            raise ValueError(f"no tokenizer in {folder}: {_reason(folder, error)}") from error
        return cls(backend, folder, _eos_ids(folder, backend.eos_token_id))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a raw text, with the special tokens that the tokenizer adds by default, such as BOS.

        Raises:
            ValueError: the text has half a surrogate pair, or the tokenizer knows no token for a part of it.
        """
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Token ids of a conversation in the checkpoint's chat template, up to where the assistant's answer begins.

        Args:
            messages: each with the strings `role` and `content`; what else is in them is the template's affair.

        Raises:
            ValueError: a message is malformed, or the checkpoint has no chat template, or the template refuses them.
        """
        _check_messages(messages)
        if not self._backend.chat_template:
            raise ValueError(
                f"{self.folder} has no chat template: give a raw prompt instead of messages, "
                "or add the model's chat_template.jinja to the folder"
            )
        from jinja2 import TemplateError

        conversation = [dict(message) for message in messages]
        try:
            text = self._backend.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise ValueError(
                f"the chat template of {self.folder} refuses these messages: {first_line(error)}"
            ) from error
        except Exception as error:  # a template is a program, which may fail like any other
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise ValueError(f"the chat template of {self.folder} fails on these messages: {reason}") from error
        return self._encode(text, add_special_tokens=False)  # the template has written them

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids without special tokens.

        Spaces are left as the model wrote them: the clean-up that some checkpoints ask for would take back a space that
        has been streamed.
        """
        text: str = self._backend.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, also a special one, and a part of a character; nothing if only logits know it."""
        return bytes(self.trie.decode_bytes([token])) if token < self._known else b""

    @property
    def known(self) -> int:
        """The ids that have a meaning are below it; logits may have more."""
        return self._known

    @cached_property
    def trie(self) -> LLTokenizer:
        """The bytes of all tokens, as grammars take them; made at first need, in half a second.

        Raises:
            ValueError: the tokenizer is none of the fast ones.
        """
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(self._backend, n_vocab=self._known, eos_token=sorted(self.eos_ids) or None)
        except Exception as error:  # Rust code raises the bare Exception
            raise ValueError(f"the tokenizer of {self.folder} is of a kind that cannot be looked into") from error

    def is_silent(self, token: int) -> bool:
        """Whether `decode` leaves the token out: special tokens, and ids that only the padded logits know."""
        return token >= self._known or token in self._special

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text has half a surrogate pair at character {error.start}: remove it") from None
        try:
            return tuple(self._backend.encode(text, add_special_tokens=add_special_tokens, verbose=False))
        except Exception as error:  # Rust code raises the bare Exception
            raise ValueError(f"the tokenizer of {self.folder} cannot take this text: {first_line(error)}") from error


class Detokenizer:
    """The text of one answer, a token at a time; all pieces together are the answer's text in its context.

    Decoding a token alone loses the space before it (SentencePiece drops it at the beginning of a text) and breaks
    characters whose bytes are spread over tokens. So the tokens not yet given out are decoded together with the ones
    given out just before, and what is longer than the text of those alone is new. A text that ends in U+FFFD may end
    within a character and waits for the next token, unless it has become shorter: then several wrong bytes have become
    one character, a real U+FFFD. This is the algorithm of the two offsets, prefix and read, of TGI
    (`Model.decode_token`) and vLLM (`detokenize_incrementally`); what differs is that tokens without a text never enter
    the window, and that it stays short when a model writes bytes that never become a character: a token costs O(1).
    """

    def __init__(self, tokenizer: Tokenizer, prompt_tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = _context(tokenizer, prompt_tokens)
        self._read = len(self._window)  # the tokens before it have been given out
        self._given = tokenizer.decode(self._window)  # their text
        self._length = len(self._given)  # of the text decoded last

    def push(self, token: int) -> str:
        """Take the next token; return the text that is now certain, often empty."""
        if self._tokenizer.is_silent(token):
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        if text != self._given and (not text.endswith(_REPLACEMENT) or len(text) < self._length):
            return self._give(len(self._window), text)
        self._length = len(text)
        if len(self._window) - self._read > 2 * _CHARACTER:  # only the last few can still become a character
            stop = len(self._window) - _CHARACTER
            return self._give(stop, self._tokenizer.decode(self._window[:stop]))
        return ""

    def flush(self) -> str:
        """The text held back, when no more tokens come; it may end in U+FFFD."""
        return self._give(len(self._window), self._tokenizer.decode(self._window))

    def _give(self, stop: int, text: str) -> str:
        """What `text`, that of the window up to `stop`, adds to the text given out; the window moves on."""
        piece = self._new_part(stop, text)
        start = _character_start(self._tokenizer, self._window[:stop], self._read)
        self._window, self._read = self._window[start:], stop - start
        self._given = self._tokenizer.decode(self._window[: self._read])
        self._length = len(self._given)
        return piece

    def _new_part(self, stop: int, text: str) -> str:
        for given in (self._given, self._given.rstrip(_REPLACEMENT)):  # a prompt may end within a character
            if text.startswith(given):
                return text[len(given) :]
        # Byte fallback makes every byte of a run U+FFFD if one is wrong, also those that were given out as characters.
        return self._tokenizer.decode(self._window[self._read : stop])


def _context(tokenizer: Tokenizer, prompt_tokens: Sequence[int]) -> list[int]:
    """The last few tokens of the prompt that have a text, from the beginning of a character on."""
    shown = (token for token in reversed(prompt_tokens) if not tokenizer.is_silent(token))
    last = list(islice(shown, _CONTEXT + _CHARACTER - 1))[::-1]
    return last[_character_start(tokenizer, last, max(len(last) - _CONTEXT, 0)) :]


def _character_start(tokenizer: Tokenizer, tokens: Sequence[int], start: int) -> int:
    """Where to decode from, `start` or the few tokens before, so as not to begin within a character.

    That would leave bytes that are no character, and with byte fallback spoil all bytes that follow.
    """
    starts = range(start, max(start - _CHARACTER, -1), -1)
    if _REPLACEMENT not in tokenizer.decode(tokens[start:]):
        return start
    return min(starts, key=lambda earlier: tokenizer.decode(tokens[earlier:]).count(_REPLACEMENT))


def _check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError("messages must be a list of at least one {'role': ..., 'content': ...}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"messages[{index}] is {message!r}: it must be {{'role': ..., 'content': ...}}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = f"is {message[key]!r}" if key in message else "is missing"
                raise ValueError(f"messages[{index}]: {key!r} {found}: it must be a string")


def _reason(folder: Path, error: Exception) -> str:
    """One sentence on why a tokenizer did not load."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        return "it has neither tokenizer.json nor tokenizer.model; copy them from the model's page"
    return f"its files cannot be read ({type(error).__name__}: {first_line(error)})"


def _eos_ids(folder: Path, fallback: int | None) -> frozenset[int]:
    """The ids that end a text, from the first place that names any."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = read_json(path).get("eos_token_id") if path.exists() else None
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(token) is int for token in ids):
            raise ValueError(f"{path}: eos_token_id is {found!r}: it must be a token id or a list of them")
        if ids:
            return frozenset(ids)
    return frozenset() if fallback is None else frozenset({fallback})
