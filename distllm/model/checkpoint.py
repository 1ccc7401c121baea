"""A checkpoint folder: its configuration, and which file holds which tensor. Reads headers, never a weight.

Knows nothing of ranks and spans.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from distllm.config import QuantizationConfig
from distllm.model import manifest as manifests
from distllm.model.files import Headers, LocalFiles, TensorInfo
from distllm.model.manifest import MANIFEST, Manifest

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Least values of config.json by key; what transformers makes of smaller ones is no model, or no sentence.
LEAST = dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
LEAST |= dict.fromkeys(("head_dim", "vocab_size", "n_embd", "n_layer", "n_head"), 1)
LEAST |= dict.fromkeys(("intermediate_size", "max_position_embeddings", "n_positions"), 0)

# Text parts of models of texts and images that are, alone, the model of another name: their positions in three
# directions are one and the same in a text.
TEXT_MODELS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}


class Checkpoint:
    """Config.json and safetensors files: a local folder, or files that come into one when they are wanted.

    Args:
        tensors: what the headers of another copy say; None reads them here.
        manifest: of the other copy, if that is in shards; with `tensors` only.
        verify: hold shards that are to be loaded against the manifest's sha256, not just its sizes and first bytes.

    Raises:
        ValueError: something is missing, cut short or not readable; the sentence names the file and the fix.
    """

    def __init__(
        self,
        files: LocalFiles | str | Path,
        tensors: Mapping[str, TensorInfo] | None = None,
        *,
        manifest: Manifest | None = None,
        verify: bool = False,
    ) -> None:
        self.files = files if isinstance(files, LocalFiles) else LocalFiles(Path(files).expanduser())
        self.path = self.files.folder
        self._verify = verify
        try:
            self.manifest = manifest if tensors else read_manifest(self.path)
            self.tensors: Mapping[str, TensorInfo] = tensors or self._found()
        except OSError as error:  # a folder of somebody else's, or a name that is too long
            raise ValueError(f"model.path={self.path}: {error.strerror} ({error.filename})") from error

    def _found(self) -> Headers:
        """The tensors of all files: of shards, those that are here are held against the manifest."""
        if self.manifest is None:
            return _read_headers(self.files)
        self.manifest.check(self.path, self.present)
        return self.manifest.weights

    @property
    def present(self) -> list[str]:
        """Of shards, the files that are in the folder."""
        files = self.manifest.files if self.manifest else ()
        return [file.name for file in files if (self.path / file.name).exists()]

    @cached_property
    def config(self) -> PretrainedConfig:
        """Of the model that is run: of a model of texts and images, its text part alone."""
        text = self._text_config
        self._check_layers(text)
        if self.is_part:
            text.tie_word_embeddings = self.whole_config.tie_word_embeddings  # the head is the larger model's
        return _alone(text)

    @property
    def is_part(self) -> bool:
        """Whether the model is the text part of a larger one, whose other tensors are left alone."""
        return self._text_config is not self.whole_config

    @cached_property
    def _text_config(self) -> PretrainedConfig:
        from transformers import PretrainedConfig

        whole = self.whole_config
        text = whole.get_text_config(decoder=True) if hasattr(whole, "get_text_config") else whole
        if not isinstance(text, PretrainedConfig):
            path = self.path / "config.json"
            raise ValueError(f"{path}: text_config of a {whole.model_type} model cannot be read; fetch it again")
        return text

    @cached_property
    def whole_config(self) -> PretrainedConfig:
        """As config.json says, of all parts of the model."""
        from transformers import AutoConfig

        path = self.path / "config.json"
        values = read_json(path)
        _check_values(path, values)
        try:
            config = AutoConfig.from_pretrained(str(self.path), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever transformers computes with a strange value may raise anything
            if values.get("auto_map"):
                raise ValueError(
                    f"{path}: {values.get('model_type')} is a model that transformers knows only by code of the "
                    "checkpoint's own, which distllm never runs"
                ) from error
            raise ValueError(f"{path}: transformers does not know this model: {first_line(error)}") from error
        if method := getattr(config, "quantization_config", None):
            kind = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", None)
            raise ValueError(
                f"{path}: the weights are quantized ({kind}), which distllm cannot read yet; "
                "give the checkpoint in bfloat16, float16 or float32"
            )
        return config

    def _check_layers(self, config: PretrainedConfig) -> None:
        """A model of very many layers takes minutes to be looked through, so these are held against the headers."""
        layers = getattr(config, "num_hidden_layers", 0)
        if isinstance(layers, int) and layers > len(self.tensors):
            raise ValueError(
                f"{self.path / 'config.json'}: num_hidden_layers is {layers}, "
                f"but the files hold {len(self.tensors)} tensors in all; is the checkpoint whole?"
            )

    def dtype(self, wish: str) -> torch.dtype:
        """The dtype to hold weights in: `auto` is the checkpoint's own.

        Raises:
            ValueError: the checkpoint's own is none that a model can run in.
        """
        import torch

        if wish != "auto":
            chosen: torch.dtype = getattr(torch, wish)
            return chosen
        declared = getattr(self.config, "dtype", None)
        if not isinstance(declared, torch.dtype):
            return torch.float32
        if not declared.is_floating_point or declared.itemsize == 1:
            name = str(declared).removeprefix("torch.")
            raise ValueError(
                f"{self.path / 'config.json'}: dtype is {name}, which no model runs in; say model.dtype=bfloat16"
            )
        return declared

    def fetch(self, names: Iterable[str], alive: Callable[[], None] = lambda: None) -> None:
        """Makes sure that files are here, and as the headers and the manifest that are known say.

        Args:
            alive: called while it goes on.

        Raises:
            ValueError: a file cannot be had, is cut short, or another one; names it and the tensor.
        """
        wanted = sorted(set(names))
        self.files.fetch(wanted, alive)
        for name in wanted:
            if not (self.path / name).exists():
                raise ValueError(
                    f"{self.path / name}: no such file, but weights that are wanted lie in it; copy it here, or let a "
                    "rank 0 that has it send them: weights=push"
                )
        if self.manifest is not None:
            self.manifest.check(self.path, wanted, verify=self._verify, alive=alive)
        held = {name: self.files.header(name) for name in wanted}
        for tensor, info in self.stored.items():
            for name in held.keys() & info.files:
                if not info.is_like(held[name].get(tensor)):
                    path = self.path / name
                    raise ValueError(f"{path}: tensor {tensor} is not as rank 0 has found it; copy the file again")

    @property
    def quantization(self) -> QuantizationConfig | None:
        """How the weights of shards lie in their files; None if they are as they were."""
        stored = self.manifest.quantization if self.manifest else None
        if stored is None:
            return None
        stages = None if stored.stages is None else list(stored.stages)
        return QuantizationConfig(method=stored.method, head=stored.head, group=stored.group, stages=stages)

    @property
    def stored(self) -> Mapping[str, TensorInfo]:
        """The tensors as they lie in files, where some make up a quantized weight."""
        return self.manifest.tensors if self.manifest else self.tensors

    def stored_as(self, name: str, file: str) -> dict[str, str]:
        """The names of the tensors that a weight lies in a file as: by its own, or if it is quantized by its parts."""
        parts = self.manifest.parts.get((file, name), ()) if self.manifest else ()
        return {part: f"{name}.{part}" for part in parts} or {"": name}

    @contextmanager
    def open(self, places: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """Tensors of these names, each in its file: whatever gives them, or a part of them, when it is indexed."""
        with ExitStack() as opened:
            files = {file: opened.enter_context(safe_open(self.path / file, "pt")) for file in set(places.values())}
            yield {name: files[file].get_slice(name) for name, file in places.items()}

    @property
    def fingerprint(self) -> str:
        """The same on two hosts if configuration, tensor names, shapes, types and files are the same.

        Of shards it tells the numbers too, by the manifest.
        """
        digest = hashlib.sha256(json.dumps(self.config.to_diff_dict(), sort_keys=True, default=str).encode())
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name}{info}".encode())
        for file in self.manifest.files if self.manifest else ():
            digest.update(file.sha256.encode())
        return digest.hexdigest()[:16]


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: there is no such file, or it is not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; a checkpoint folder needs config.json, a tokenizer and {SINGLE}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: should hold a JSON object")
    return found


def _check_values(path: Path, values: Mapping[str, Any]) -> None:
    """Refuses what transformers would stumble over without saying which key it is."""
    import torch

    for key, least in LEAST.items():
        value = values.get(key)
        if type(value) is int and value < least:
            raise ValueError(f"{path}: {key} is {value}: it must be at least {least}")
    for key in ("dtype", "torch_dtype"):
        name = values.get(key)
        by_part = name is None or isinstance(name, dict)
        if not by_part and not isinstance(getattr(torch, str(name), None), torch.dtype):
            raise ValueError(f"{path}: {key} is {name!r}: it must be bfloat16, float16 or float32")
    if isinstance(text := values.get("text_config"), dict):
        _check_values(path, text)


def _alone(text: PretrainedConfig) -> PretrainedConfig:
    """The configuration of a text part as that of a model of its own."""
    from transformers import AutoConfig

    if text.model_type not in TEXT_MODELS:
        return text
    values = {key: value for key, value in text.to_dict().items() if key not in ("model_type", "architectures")}
    return AutoConfig.for_model(TEXT_MODELS[text.model_type], **values)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder of shards; None if it is none.

    Raises:
        ValueError: it is broken, or of a newer distllm.
    """
    path = folder / MANIFEST
    return manifests.parse(path, read_json(path)) if path.is_file() else None


def _read_headers(files: LocalFiles) -> dict[str, TensorInfo]:
    folder = files.folder
    if not folder.exists():
        raise ValueError(f"model.path={folder}: no such folder; give one, or the id of a model of the Hub")
    if not folder.is_dir():
        raise ValueError(f"model.path={folder}: is not a folder; give the folder that holds config.json")
    if (folder / INDEX).exists():
        return _read_index(files)
    if not files.has(SINGLE):
        raise ValueError(f"{folder}: has neither {SINGLE} nor {INDEX}{_other_weights(folder)}")
    return files.header(SINGLE)


def _read_index(files: LocalFiles) -> dict[str, TensorInfo]:
    folder = files.folder
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{folder / INDEX}: has no weight_map from tensor names to files")
    found: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or file in ("", ".."):
            raise ValueError(f"{folder / INDEX}: names the file {file!r}, which is outside of the folder")
        if not files.has(file):
            raise ValueError(f"{folder / file}: no such file, but {INDEX} names it; fetch it again")
        held = files.header(file)
        found |= {name: info for name, info in held.items() if weight_map.get(name, file) == file}
    missing = [name for name in weight_map if name not in found]
    if missing:
        raise ValueError(
            f"{folder / weight_map[missing[0]]}: has no tensor {missing[0]}, but {INDEX} says so; fetch it again"
        )
    return found


def _other_weights(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
    if not names:
        return "; is this the folder of the model?"
    if names[0].endswith(".gguf"):
        return f"; say model.path={folder / names[0]}"
    return f" (it has {names[0]}, a pickle, which can hide code: model.allow_pickle=true reads tensors of it only)"


def first_line(error: BaseException) -> str:
    """What another library says of an error, without its remarks on where and how."""
    lines = str(error).strip().split("\n")
    first = " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")])
    if isinstance(error, KeyError) and " " not in first:
        return f"{first} is unknown"
    return first or type(error).__name__
