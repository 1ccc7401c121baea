"""Linear layers of 8- and 4-bit weights, by passes over a built shard that knows nothing of them.

Weights alone are quantized; activations keep their type. Norms, embeddings and what chooses experts stay exact.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import nn

from distllm.config import QuantizationConfig
from distllm.model import bnb
from distllm.model.integers import SIDE_BY_SIDE, Int4Linear, Int8Linear, store_int4, store_int8
from distllm.model.linear import plain_layers, shared_weights
from distllm.model.pages import give_back
from distllm.model.unfold import Unfolded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


Stored = Mapping[str, torch.Tensor]
"""What a quantized weight is stored as: tensors by the ends of their names."""

Ready = dict[torch.Tensor, Stored]
"""Weights that lie quantized in files, by the parameters that they stand for, which have no numbers."""

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""The same, by shapes and types."""


class Scheme(Protocol):
    """One way to hold the weight of a linear layer in fewer bits."""

    name: str

    def takes(self, outputs: int, inputs: int) -> bool:
        """Whether a weight of this size can be held so."""

    def nbytes(self, outputs: int, inputs: int, dtype: torch.dtype) -> int:
        """What a weight takes then, its scales included."""

    def make(self, plain: nn.Linear) -> nn.Module:
        """The layer in place of a plain one."""


@runtime_checkable
class Storable(Scheme, Protocol):
    """One whose weights can be kept in files."""

    def layout(self, outputs: int, inputs: int, dtype: torch.dtype) -> Layout:
        """What a weight of this size and type is stored as."""

    def store(self, weight_OI: torch.Tensor) -> Stored:
        """What a weight is stored as."""

    def restore(self, plain: nn.Linear, stored: Stored) -> nn.Module:
        """The layer in place of a plain one whose weight was stored."""

    def nbytes(self, outputs: int, inputs: int, dtype: torch.dtype) -> int:
        return sum(math.prod(shape) * each.itemsize for shape, each in self.layout(outputs, inputs, dtype).values())

    def make(self, plain: nn.Linear) -> nn.Module:
        return self.restore(plain, self.store(plain.weight))


class Int8(Storable):
    """Symmetric, one scale for each output: `weight_OI = scale_O * integer_OI`."""

    name = "int8"

    def takes(self, outputs: int, inputs: int) -> bool:  # noqa: ARG002
        return True

    def layout(self, outputs: int, inputs: int, dtype: torch.dtype) -> Layout:
        return {"integers": ((outputs, inputs), torch.int8), "scale": ((outputs,), dtype)}

    def store(self, weight_OI: torch.Tensor) -> Stored:
        return store_int8(weight_OI)

    def restore(self, plain: nn.Linear, stored: Stored) -> nn.Module:
        return Int8Linear(stored["integers"], stored["scale"].to(plain.weight.dtype), plain.bias)


@dataclass(frozen=True)
class Int4(Storable):
    """A scale and a zero for each group of inputs of an output: `weight = (integer - 8) * scale + zero`."""

    group: int
    name = "int4"

    def takes(self, outputs: int, inputs: int) -> bool:
        return outputs % SIDE_BY_SIDE == 0 and inputs % self.group == 0

    def layout(self, outputs: int, inputs: int, dtype: torch.dtype) -> Layout:
        scale_zero = (inputs // self.group, outputs, 2)
        return {"integers": ((outputs, inputs // 2), torch.uint8), "scale_zero": (scale_zero, dtype)}

    def store(self, weight_OI: torch.Tensor) -> Stored:
        return store_int4(weight_OI, self.group)

    def restore(self, plain: nn.Linear, stored: Stored) -> nn.Module:
        return Int4Linear(stored["integers"], stored["scale_zero"].to(plain.weight.dtype), plain.bias)


@dataclass(frozen=True)
class Recipe:
    """What becomes of the linear layers of a model: those of its layers, and its head."""

    layers: Scheme
    head: Scheme | None

    @classmethod
    def of(cls, config: QuantizationConfig) -> Recipe:
        named: dict[str, Scheme] = {
            "int8": Int8(),
            "int4": Int4(config.group),
            "bnb_int8": bnb.BnbInt8(),
            "bnb_nf4": bnb.BnbNF4(),
        }
        return cls(named[config.method], named.get(config.head_method))

    def of_layer(self, layer: nn.Module) -> Iterator[Choice]:
        """The linear layers of one layer of the model that are quantized, and how."""
        return (Choice(*place, _fitting(self.layers, place[-1])) for place in plain_layers(layer))

    def of_head(self, model: PreTrainedModel) -> Iterator[Choice]:
        """The same of its head: one or none."""
        head, scheme = model.get_output_embeddings(), self.head
        places = (place for place in plain_layers(model) if place[-1] is head)
        return (Choice(*place, _fitting(scheme, place[-1])) for place in places if scheme is not None)


def check_installed(method: str) -> None:
    """
    Raises:
        ValueError: the method needs a library that is not installed.
    """
    if method.startswith("bnb"):
        bnb.library()


@dataclass(frozen=True)
class Choice:
    """A linear layer, where it is, and the scheme for it."""

    parent: nn.Module
    name: str
    plain: nn.Linear
    scheme: Scheme

    def stored_in(self, ready: Ready) -> Stored | None:
        """What its weight is stored as, if it lies quantized in a file."""
        if not isinstance(self.plain, Unfolded):
            return ready.get(self.plain.weight)
        origin = self.plain.origin
        stored = ready.get(origin.parameter)
        if stored is None or origin.index is None:
            return stored
        return {part: tensor[origin.index] for part, tensor in stored.items()}


@dataclass(frozen=True)
class ParameterChoice:
    """The weights that one parameter holds, all of one size: one, or those of its experts."""

    choices: tuple[Choice, ...]

    @property
    def scheme(self) -> Scheme:
        return self.choices[0].scheme

    def nbytes(self, dtype: torch.dtype) -> int:
        """What it takes when it is quantized."""
        return len(self.choices) * self.scheme.nbytes(*self._size, dtype)

    def layout(self, dtype: torch.dtype) -> Layout:
        """What it is stored as; nothing if it cannot be stored."""
        if not isinstance(self.scheme, Storable):
            return {}
        layout = self.scheme.layout(*self._size, dtype)
        return {part: ((*self._experts, *shape), each) for part, (shape, each) in layout.items()}

    def store(self, parameter: torch.Tensor) -> Stored:
        """The same, of one like it that has numbers."""
        assert isinstance(self.scheme, Storable)
        plain = [choice.plain for choice in self.choices]
        weights = [each.origin.view(parameter) if isinstance(each, Unfolded) else parameter for each in plain]
        first, *others = [self.scheme.store(weight_OI) for weight_OI in weights]
        return (
            {part: torch.stack([first[part], *(each[part] for each in others)]) for part in first}
            if self._experts
            else first
        )

    @property
    def _size(self) -> tuple[int, int]:
        plain = self.choices[0].plain
        return plain.out_features, plain.in_features

    @property
    def _experts(self) -> tuple[int, ...]:
        """Their number, or nothing if the parameter is one weight."""
        plain = self.choices[0].plain
        return (len(self.choices),) if isinstance(plain, Unfolded) and plain.origin.index is not None else ()


def _fitting(wanted: Scheme, plain: nn.Linear) -> Scheme:
    """The scheme, or for a size that it does not take 8 bits."""
    if wanted.takes(plain.out_features, plain.in_features):
        return wanted
    _say_once(f"{wanted.name} takes no weight of {plain.out_features} x {plain.in_features}: such are held in int8")
    return Int8()


@functools.cache
def _say_once(sentence: str) -> None:
    logger.info(sentence)


def quantize(
    module: nn.Module,
    choices: Iterable[Choice],
    progress: Callable[[int], None] = lambda _: None,
    ready: Ready | None = None,
) -> None:
    """Replaces linear layers of a module, one by one.

    Args:
        progress: called with the bytes of each plain weight as it is quantized.
        ready: what the weights of some of them were stored as, which have none of their own.
    """
    shared = shared_weights(module)
    for choice in list(choices):
        weight = choice.plain.weight
        if (stored := choice.stored_in(ready or {})) is not None:
            assert isinstance(choice.scheme, Storable)
            made = choice.scheme.restore(choice.plain, stored)
        else:
            made = choice.scheme.make(choice.plain)
            if weight.data_ptr() not in shared:
                give_back(weight)
        setattr(choice.parent, choice.name, made)
        progress(weight.nbytes)
