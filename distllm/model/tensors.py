"""Which tensor of a checkpoint fills which parameter of a model, and what the parts of the model take.

Reads headers, never a weight. Names and renamings are transformers' own business: this asks its checkpoint loader.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from distllm.core import ModelSizes
from distllm.model import conversion, families
from distllm.model.checkpoint import Checkpoint
from distllm.model.conversion import Converted, Target
from distllm.model.families import Anatomy
from distllm.model.files import TensorInfo
from distllm.model.quantize import Choice, ParameterChoice, Recipe
from distllm.model.shard import Shard
from distllm.model.unfold import Unfolded, unfold

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A step of few rows takes as long as reading the weights, and a layer besides as long as its many small operations:
# about 0.3 ms on a CPU that reads 30 GB/s. Only a first guess: the times of the stages replace it.
LAYER_OVERHEAD_BYTES = 8 * 10**6

# Types of numbers by what files call them, and the other way round.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorMap:
    """Which tensor of a checkpoint fills which parameter of the whole model.

    Raises:
        ValueError: a tensor is missing or has the wrong shape; the sentence names file and tensor.
    """

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy) -> None:
        self.checkpoint = checkpoint
        self.anatomy = anatomy
        with torch.device("meta"):
            model = families.build(checkpoint.config, torch.float32)
        self._model = model
        self._parameters: dict[str, torch.Tensor] = model.state_dict()
        self._tied: dict[str, str] = dict(model.all_tied_weights_keys)
        self._head = families.name_of(model, model.get_output_embeddings())
        base = families.name_of(model, families.base_of(model))
        self._base = f"{base}." if base else ""
        targets = conversion.targets(model, checkpoint.tensors, self._parameters)
        sources = {target.parameter for target in targets.values()}
        self.targets: dict[str, Target] = {}
        for name, target in targets.items():
            table = self._tied.get(target.parameter)
            if table is None or self.is_ready(name):
                self.targets[name] = target
            elif table not in sources:
                self.targets[name] = Target(table, pattern=None, alias=table)
            # Else a tied head is stored all the same: a second copy of the table, and not read.
        self._sources = conversion.sources(model, self.targets)
        self._check(model, known=targets)

    def is_ready(self, name: str) -> bool:
        """Whether a tensor is a weight that lies quantized in the files."""
        return "" not in self.checkpoint.stored_as(name, self.checkpoint.tensors[name].file)

    @property
    def head_is_ready(self) -> bool:
        """Whether the head lies quantized in the files, so that it needs no table."""
        head = f"{self._head}.weight"
        return any(target.parameter == head and self.is_ready(name) for name, target in self.targets.items())

    def _check(self, model: PreTrainedModel, known: Container[str]) -> None:
        filled = set(conversion.filled(model, self.targets))
        filled |= {target for target, source in self._tied.items() if source in filled}
        missing = [name for name in self._parameters if name not in filled]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"{self.checkpoint.path}: no tensor for {missing[0]}{more}; is the checkpoint whole?")
        others = (name for name in self.checkpoint.tensors if name not in known)
        if name := next(conversion.surplus(model, others, is_part=self.checkpoint.is_part), None):
            file = self.checkpoint.path / self.checkpoint.tensors[name].file
            kind = self.checkpoint.config.model_type
            raise ValueError(f"{file}: tensor {name} has no place in this {kind} model; is config.json another's?")
        for name, target in self.targets.items():
            self._check_tensor(name, target)
        Converted(model, self.checkpoint, self.targets).check(self._parameters)

    def _check_tensor(self, name: str, target: Target) -> None:
        info, parameter = self.checkpoint.tensors[name], self._parameters[target.parameter]
        where, wanted = f"{self.checkpoint.path / info.file}: tensor {name}", tuple(parameter.shape)
        if target.pattern is None and info.shape != wanted:
            raise ValueError(f"{where} has shape {info.shape}, but config.json asks for {wanted}")
        if parameter.is_floating_point() and not is_float(info):
            raise ValueError(
                f"{where} holds numbers of type {info.dtype}: quantized weights cannot be read yet; "
                "give the checkpoint in bfloat16, float16 or float32"
            )

    def sizes(self, dtype: torch.dtype, context_length: int, recipe: Recipe | None = None) -> ModelSizes:
        """Bytes of the parts of the model when weights and KV are held in this dtype, and some as in the recipe."""
        quantized = self._quantized_bytes(dtype, recipe) if recipe else {}
        held = {name: _held_bytes(each, dtype) for name, each in self._parameters.items() if name not in self._tied}
        layer_bytes, ends = [0] * len(self.anatomy.attention), {"embed": 0, "head": 0}
        for name, nbytes in (held | quantized).items():
            part = self._part(name)
            if isinstance(part, int):
                layer_bytes[part] += nbytes
            else:
                ends[part] += nbytes
        tied = 0 if f"{self._head}.weight" in quantized else self._tied_bytes(dtype)
        head_bytes = ends["head"] + tied
        numbers = [kind.shape.numbers for kind in self.anatomy.attention]
        return ModelSizes(
            layer_bytes=tuple(layer_bytes),
            embed_bytes=ends["embed"],
            head_bytes=head_bytes,
            tied_bytes=tied,
            kv_bytes=tuple(n * dtype.itemsize for n in numbers),
            layer_work=tuple(float(n + LAYER_OVERHEAD_BYTES) for n in layer_bytes),
            head_work=float(head_bytes),
            context_length=context_length,
        )

    def _quantized_bytes(self, dtype: torch.dtype, recipe: Recipe) -> dict[str, int]:
        """What the weights that the recipe chooses take, by the names of their parameters."""
        return {name: each.nbytes(dtype) for name, each in self.chosen(self._model, recipe).items()}

    def chosen(self, model: PreTrainedModel, recipe: Recipe) -> dict[str, ParameterChoice]:
        """What the recipe chooses of this model, or of a part of it, by the names of the parameters; it is unfolded."""
        unfold(model)
        names = {module: name for name, module in model.named_modules()}
        layers = families.base_of(model).get_submodule(self.anatomy.layers)
        found: dict[str, list[Choice]] = {}
        for layer in layers.children():
            for choice in recipe.of_layer(layer):
                found.setdefault(_origin(choice.plain, names), []).append(choice)
        for choice in recipe.of_head(model):
            found[_origin(choice.plain, names)] = [choice]
        return {name: ParameterChoice(tuple(choices)) for name, choices in found.items()}

    def check_ready(self, recipe: Recipe) -> None:
        """Holds weights that lie quantized in the files against the model's sizes.

        Raises:
            ValueError: a part is missing, of another shape or type, or none that the recipe makes; names file and
                tensor.
        """
        chosen = self.chosen(self._model, recipe)
        for name in filter(self.is_ready, self.targets):
            file, parameter = self.checkpoint.tensors[name].file, self.targets[name].parameter
            parts = {part: self.checkpoint.stored[each] for part, each in self.checkpoint.stored_as(name, file).items()}
            found = {part: (info.shape, _kind(DTYPES[info.dtype])) for part, info in parts.items()}
            layout = chosen[parameter].layout(torch.float32) if parameter in chosen else {}
            wanted = {part: (shape, _kind(dtype)) for part, (shape, dtype) in layout.items()}
            if found != wanted:
                raise ValueError(
                    f"{self.checkpoint.path / file}: tensor {name} lies there as {found}, but config.json and "
                    f"manifest.json ask for {wanted}; copy both again"
                )

    def sources(self, parameter: str) -> list[str]:
        """The tensors that this parameter is made of; none if they make others besides."""
        return self._sources.get(self._tied.get(parameter, parameter), [])

    def shape(self, parameter: str) -> tuple[int, ...]:
        """The shape that config.json asks for."""
        return tuple(self._parameters[parameter].shape)

    def _tied_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the embedding table that a head without embeddings needs a copy of."""
        tied_head = any(name.startswith(f"{self._head}.") for name in self._tied)
        return _held_bytes(self._parameters[f"{self._base}{self.anatomy.embed}.weight"], dtype) if tied_head else 0

    def _part(self, parameter: str) -> int | str:
        """The layer that a parameter belongs to, or `embed` or `head`."""
        found = re.match(rf"{re.escape(self._base + self.anatomy.layers)}\.(\d+)\.", parameter)
        if found:
            return int(found[1])
        after = tuple(f"{self._base}{name}." for name in self.anatomy.after)
        is_table = parameter.startswith(f"{self._base}{self.anatomy.embed}.")
        return "head" if parameter.startswith((f"{self._head}.", *after)) and not is_table else "embed"

    def files(self, shard: Shard) -> set[str]:
        """Names of the files that hold tensors of this shard."""
        return set(self.places(shard).values())

    def places(self, shard: Shard) -> dict[str, str]:
        """The file that each tensor of this shard is read from: of several that hold it, one that is needed anyway."""
        files = {name: self.checkpoint.tensors[name].files for name in self.owned(shard)}
        needed = {each[0] for each in files.values() if len(each) == 1}
        own = 0 if shard.span.embed else -1
        return {name: next((file for file in each if file in needed), each[own]) for name, each in files.items()}

    def owned(self, shard: Shard) -> list[str]:
        """Names, in the checkpoint, of the tensors that this shard needs."""
        parameters = shard.model.state_dict()
        owned = [name for name, target in self.targets.items() if target.parameter in parameters]
        return [name for name in owned if self._part(self.targets[name].parameter) not in shard.kept]

    def used_in_place(self, names: Collection[str], dtype: torch.dtype) -> bool:
        """Whether tensors stay where they lie in mapped files: none is cast, joined with others or cut."""
        infos = [self.checkpoint.tensors[name] for name in names]
        same = all(info.dtype == NAMES[dtype] or not is_float(info) for info in infos)
        return same and all(self.targets[name].pattern is None for name in names)

    def parts(self, shard: Shard) -> list[tuple[int | str, list[str]]]:
        """The same, of each part of the shard: its layers in order, and its ends."""
        parts: dict[int | str, list[str]] = {}
        for name in self.owned(shard):
            parts.setdefault(self._part(self.targets[name].parameter), []).append(name)
        return sorted(parts.items(), key=lambda item: (isinstance(item[0], str), item[0]))


def _origin(plain: nn.Linear, names: Mapping[nn.Module, str]) -> str:
    """The name of the parameter that holds a layer's weight."""
    return plain.origin.name if isinstance(plain, Unfolded) else f"{names[plain]}.weight"


def _kind(dtype: torch.dtype) -> str:
    """A type of integers by its name; of scales any will do that a model runs in."""
    return "a float" if dtype in (torch.float32, torch.bfloat16, torch.float16) else NAMES[dtype]


def _held_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    """What a tensor takes when numbers are held in this dtype; integers and truth values stay as they are."""
    return tensor.numel() * dtype.itemsize if tensor.is_floating_point() else tensor.nbytes


def is_float(info: TensorInfo) -> bool:
    return info.dtype.startswith(("BF", "F"))
