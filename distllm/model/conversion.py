"""What transformers' loader makes of a checkpoint's names: which parameter a tensor fills, alone or with others.

Some parameters are converted: all experts of a layer become one, or one tensor becomes several. Reads no weights.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from distllm.model.checkpoint import Checkpoint, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shape = tuple[int, ...]
Sources = dict[str, list[str]]  # names of tensors by the converter's pattern that they match

TEXT_PART = re.compile(r"(model\.)?(language_model|text_model)\.(?P<rest>.+)")
# What older versions of transformers stored, though it follows from the configuration.
TABLES_OF_OLD = r"(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$"
LAYER_NUMBER = re.compile(r"(^|\.)(\d+)(?=\.)")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a tensor of the checkpoint goes: the first parameter that it fills, and how it gets there.

    `pattern` is that of the converter that it goes through, if any. `alias` is the name by which transformers' loader
    knows the tensor: another one than the checkpoint's for the text part of a model of texts and images, and for a tied
    head that is stored instead of the table.
    """

    parameter: str
    pattern: str | None
    alias: str


def conversions(model: PreTrainedModel) -> list[Any]:
    """transformers' renamings and converters for this model."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model) or [])


def targets(model: PreTrainedModel, names: Iterable[str], parameters: Mapping[str, torch.Tensor]) -> dict[str, Target]:
    """For each tensor of a checkpoint that the model uses, the parameter that it fills."""
    from transformers.core_model_loading import WeightConverter, rename_source_key

    entries = conversions(model)
    converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in entries if not isinstance(entry, WeightConverter)]
    found = {}
    for name in names:
        for alias in dict.fromkeys((name, _in_text_model(name))):
            parameter, pattern = rename_source_key(alias, renamings, converters, model.base_model_prefix, parameters)
            if parameter in parameters:
                found[name] = Target(parameter, pattern, alias)
                break
    return found


def surplus(model: PreTrainedModel, names: Iterable[str], *, is_part: bool) -> Iterator[str]:
    """Of tensors that fill no parameter, those that transformers does not leave out knowingly.

    Args:
        is_part: the model is the text part of a larger one, whose other tensors have a place elsewhere.
    """
    left_out = [*(model._keys_to_ignore_on_load_unexpected or ()), TABLES_OF_OLD]
    for name in names:
        if is_part and not TEXT_PART.match(name):
            continue
        if not any(re.search(pattern, name) for pattern in left_out):
            yield name


def _in_text_model(name: str) -> str:
    """What a tensor of the text part of a larger model is called in a model of texts alone."""
    part = TEXT_PART.match(name)
    if part is None:
        return name
    return part["rest"] if part["rest"].startswith(("model.", "lm_head.")) else f"model.{part['rest']}"


def filled(model: PreTrainedModel, targets: Mapping[str, Target]) -> Iterator[str]:
    """Parameters that get a value; a converter that splits one tensor fills several."""
    from transformers.core_model_loading import WeightConverter

    converters = [entry for entry in conversions(model) if isinstance(entry, WeightConverter)]
    for target in targets.values():
        yield target.parameter
        if target.pattern is None:
            continue
        for converter in converters:
            first, *others = converter.target_patterns
            if first in target.parameter:
                yield from (target.parameter.replace(first, other) for other in others)


def sources(model: PreTrainedModel, targets: Mapping[str, Target]) -> dict[str, list[str]]:
    """The tensors that each parameter is made of, but for those that come out of a converter together with others."""
    several = [
        entry.target_patterns[0] for entry in conversions(model) if _converts(entry) and len(entry.target_patterns) > 1
    ]
    found: dict[str, list[str]] = {}
    for name, target in targets.items():
        if target.pattern is None or not any(pattern in target.parameter for pattern in several):
            found.setdefault(target.parameter, []).append(name)
    return found


class Converted:
    """The converted parameters of a model, and the tensors of a checkpoint that each is made of."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, targets: Mapping[str, Target]) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._converters = {
            pattern: entry for entry in conversions(model) for pattern in entry.source_patterns if _converts(entry)
        }
        self._groups: dict[str, Sources] = {}
        for name, target in targets.items():
            if target.pattern is not None:
                self._groups.setdefault(target.parameter, {}).setdefault(target.pattern, []).append(name)

    def check(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Converts the shapes, as the loader will convert the tensors.

        Raises:
            ValueError: a tensor is missing or has the wrong shape; the sentence names file and tensor.
        """
        sound = set()
        for parameter, sources in self._groups.items():
            shapes = tuple((pattern, *map(self._shape, names)) for pattern, names in sorted(sources.items()))
            signature = (_kind(parameter), parameters[parameter].shape, shapes)
            if signature in sound:
                continue
            try:
                made = self._made(parameter, sources)
            except Exception as error:  # whatever a converter computes with strange shapes may raise anything
                raise ValueError(self._complaint(parameter, f"do not go together: {first_line(error)}")) from error
            for name, shape in made.items():
                if name in parameters and shape != (wanted := tuple(parameters[name].shape)):
                    make = f"make {name} of shape {shape}, but config.json asks for {wanted}"
                    raise ValueError(self._complaint(parameter, make))
            sound.add(signature)

    def _made(self, parameter: str, sources: Sources) -> dict[str, Shape]:
        """Shapes of what a converter makes of these tensors, by parameter."""
        converter = copy.deepcopy(self._converters[next(iter(sources))])
        for pattern, names in sources.items():
            for name in names:
                converter.add_tensor(parameter, name, pattern, torch.empty(self._shape(name), device="meta"))
        made = converter.convert(parameter, model=self._model, config=self._model.config)
        return {name: tuple((m[0] if isinstance(m, list) else m).shape) for name, m in made.items()}

    def _complaint(self, parameter: str, otherwise: str) -> str:
        """What is wrong with the tensors of a parameter, by comparison with those of the other layers."""
        path, tensors = self._checkpoint.path, self._checkpoint.tensors
        kin = [sources for other, sources in self._groups.items() if _kind(other) == _kind(parameter)]
        mine = self._groups[parameter]
        for pattern, names in mine.items():
            counts = Counter(self._shape(name) for sources in kin for name in sources.get(pattern, ()))
            (usual, most), *others = counts.most_common()
            if others and others[0][1] == most:
                continue
            for name in names:
                if self._shape(name) != usual:
                    return (
                        f"{path / tensors[name].file}: tensor {name} has shape {self._shape(name)}, "
                        f"but most of its kind have {usual}"
                    )
        held = [name for names in mine.values() for name in names]
        if missing := _missing(parameter, held, kin):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            return f"{path}: no tensor {missing[0]}{more}; is the checkpoint whole?"
        return f"{path / tensors[held[0]].file}: {held[0]} and {len(held) - 1} more tensors {otherwise}"

    def _shape(self, name: str) -> Shape:
        return self._checkpoint.tensors[name].shape


def _missing(parameter: str, held: Iterable[str], kin: Iterable[Sources]) -> list[str]:
    """Names that other layers have for a parameter of this kind, as they would be in this one's layer."""
    number = LAYER_NUMBER.search(parameter)
    if number is None:
        return []
    known = {_kind(name) for name in held}
    others = {_kind(name): name for sources in kin for names in sources.values() for name in names}
    return [LAYER_NUMBER.sub(rf"\g<1>{number[2]}", name, count=1) for kind, name in others.items() if kind not in known]


def _kind(name: str) -> str:
    """A name without the number of its layer."""
    return LAYER_NUMBER.sub(r"\g<1>*", name, count=1)


def _converts(entry: object) -> bool:
    from transformers.core_model_loading import WeightConverter

    return isinstance(entry, WeightConverter)
