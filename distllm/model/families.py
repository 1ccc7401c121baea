"""Where the parts of a transformers model are, and whether it can be cut into stages.

Nothing is known of any architecture beforehand. The model is built without weights, one token is run through its
shapes, and what is seen on the way tells the parts apart: the layers are the list whose members ask for attention, what
works before the first of them belongs to the embeddings, and what works after the last of them to the head. What each
layer may look at is read off the mask that transformers would make for it. Knows no weights.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distllm.model import direct
from distllm.model.attention import ATTENTION, INSPECTION, AskedMask, AttentionKind, AttentionRecorder
from distllm.model.checkpoint import first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Layers that keep keys and values; `layer_types` of a configuration also names those that keep other states.
LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})

# The factor by which a base model multiplies its input embeddings, wherever they come from.
INPUT_SCALE = "embedding_multiplier"

LAYER = re.compile(r"(?P<layers>.+?)\.(?P<number>\d+)\.")


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Names of the parts of a model, relative to its base model, and what its layers keep of the past.

    `before` are the parts that turn embeddings into what the first layer takes, `positions` those whose output is
    added to them, `after` those behind the last layer; a part without weights may be before and after. `attention` has
    one entry a layer; `in_tuples` says that layers wrap what they give.
    """

    embed: str
    before: tuple[str, ...]
    positions: tuple[str, ...]
    layers: str
    after: tuple[str, ...]
    in_tuples: bool
    attention: tuple[AttentionKind, ...]
    context_length: int


# Held while a model is built, which changes torch's defaults for all threads, and while one computes.
defaults = threading.RLock()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Models that this thread makes inside have parameters without storage; buffers are real."""
    mine = threading.get_ident()

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != mine:
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook: Callable[..., Any] = to_meta  # the registered parameter is what it returns, though it is typed otherwise
    handle = nn.modules.module.register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def build(config: PretrainedConfig, dtype: torch.dtype, attention: str = ATTENTION) -> PreTrainedModel:
    """The whole model without weights, with our attention; transformers would write into the configuration itself."""
    from transformers import AutoModelForCausalLM

    if config.model_type in direct.KINDS:
        direct.register()
    with defaults:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)
    return model.eval().requires_grad_(False)


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head. One that names it wrongly is looked through: it is the model that it holds."""
    from transformers import PreTrainedModel

    inner = (child for child in model.children() if isinstance(child, PreTrainedModel))
    base: PreTrainedModel = model.base_model if model.base_model is not model else next(inner, model)
    return base


def inspect(config: PretrainedConfig) -> Anatomy:
    """Finds the parts of an architecture by building it without weights and running one token through the shapes.

    Raises:
        ValueError: the architecture cannot be cut into stages; the sentence says why.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} has an encoder; distllm runs decoder-only language models")
    strange = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if strange:
        raise ValueError(f"{kind} has layers of type {', '.join(sorted(strange))}, whose state distllm cannot keep")
    if not _is_known(config):
        raise ValueError(f"{kind} is not a causal language model that transformers can build")
    with torch.device("meta"):
        try:
            model = build(config, torch.bfloat16, INSPECTION)  # some kernels know no other type on the meta device
        except Exception as error:  # whatever transformers computes with a strange size may raise anything
            trouble = f"{kind} is not a causal language model that transformers can build from its config.json"
            raise _refusal(kind, trouble, error) from error
    return _observe(model)


def _is_known(config: PretrainedConfig) -> bool:
    from transformers import AutoModelForCausalLM

    return type(config) in AutoModelForCausalLM._model_mapping


def _refusal(kind: str, trouble: str, error: Exception) -> ValueError:
    """What is wrong with a model, by what it raises; one that asks otherwise for attention stumbles over ours."""
    text = first_line(error)
    if any(word in text for word in (AskedMask.__name__, INSPECTION)):
        return ValueError(f"{kind} has an attention of its own (ALiBi, for example), whose state distllm cannot keep")
    return ValueError(f"{trouble}: {text}")


def _observe(model: PreTrainedModel) -> Anatomy:
    """Runs one token through a model on the meta device and notes who does what."""
    kind, base = model.config.model_type, base_of(model)
    place_11 = torch.zeros(1, 1, dtype=torch.long, device="meta")
    recorder, watch = AttentionRecorder(), Watch(base, place_11)
    recorder.attach(model)
    mask_11 = torch.ones(1, 1, dtype=torch.bool, device="meta")  # without one, some look into the positions
    hidden_11D = torch.zeros(1, 1, model.get_input_embeddings().embedding_dim, dtype=model.dtype, device="meta")
    try:
        model(inputs_embeds=hidden_11D, attention_mask=mask_11, position_ids=place_11, use_cache=False)
    except (TypeError, RuntimeError, AttributeError, ArithmeticError, LookupError, ValueError) as error:
        raise _refusal(kind, f"{kind} does not run one token at a time through its layers", error) from error
    layers = _layers(kind, base, recorder.kinds)
    found = _attention_of_layers(model, len(base.get_submodule(layers)), recorder.kinds)
    try:
        before, positions, after = watch.around(layers)
    except ValueError as error:
        raise ValueError(f"{kind} cannot be cut into stages: {error}") from error
    for name in {*before, *positions} & set(after):
        if any(True for _ in base.get_submodule(name).parameters()):
            raise ValueError(f"{kind} uses its {name} before and after its layers; it cannot be cut into stages")
    return Anatomy(
        embed=name_of(base, model.get_input_embeddings()),
        before=before,
        positions=positions,
        layers=layers,
        after=after,
        in_tuples=f"{layers}.0" in watch.gave_tuples,
        attention=found,
        context_length=_context_length(model.config),
    )


class Watch:
    """Notes in which order the modules of a base model work, and on what; `place_11` is where the token is."""

    def __init__(self, base: nn.Module, place_11: torch.Tensor) -> None:
        self._place_11 = place_11
        self._order: list[str] = []
        self._took: dict[str, str] = {}
        self.gave_tuples: set[str] = set()
        for name, module in base.named_modules():
            if name:
                module.register_forward_hook(self._noting(name), with_kwargs=True)

    def _noting(self, name: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[object, ...], named: dict[str, object], out: object) -> None:
            given = [each for each in (*args, *named.values()) if isinstance(each, torch.Tensor)]
            self._order.append(name)
            if isinstance(out, tuple):
                self.gave_tuples.add(name)
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                hidden = any(each.is_floating_point() and each.dim() == 3 for each in given)
                place = any(each is self._place_11 for each in given)
                self._took[name] = "hidden" if hidden else "place" if place else "something else"

        return note

    def around(self, layers: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Names of what works before the layers on hidden states, of what makes positions of its own, and of what
        works after the layers; what gives no hidden states, such as rotary embeddings, is needed everywhere."""
        inside = [index for index, name in enumerate(self._order) if name.startswith(f"{layers}.")]
        first, last = inside[0], inside[-1]
        steps = layers.split(".")
        path = {".".join(steps[:depth]) for depth in range(len(steps) + 1)}
        parts = [
            (index, name)
            for index, name in enumerate(self._order)
            if name.rpartition(".")[0] in path and name not in path and name in self._took
        ]
        before = [name for index, name in parts if index < first]
        if strange := [name for name in before if self._took[name] == "something else"]:
            raise ValueError(f"its {strange[0]} counts positions by itself, as if a step were one sequence")
        return (
            tuple(dict.fromkeys(name for name in before if self._took[name] == "hidden")),
            tuple(dict.fromkeys(name for name in before if self._took[name] == "place")),
            tuple(dict.fromkeys(name for index, name in parts if index > last)),
        )


def _layers(kind: str, base: nn.Module, asked: Mapping[int, tuple[nn.Module, AttentionKind]]) -> str:
    """The name of the list whose members asked for attention."""
    names = {module: name for name, module in base.named_modules()}
    found = set()
    for index, (module, _) in asked.items():
        place = LAYER.match(names.get(module, ""))
        if place is None or int(place["number"]) != index:
            raise ValueError(f"{kind}: layer {index} is not in one list with the others; it cannot be cut into stages")
        found.add(place["layers"])
    if len(found) != 1:
        raise ValueError(
            f"{kind} has no list of layers that use transformers' attention interface "
            "(ALiBi, recurrent or linear attention, or an attention of its own); it cannot be cut into stages"
        )
    return str(found.pop())


def _attention_of_layers(
    model: PreTrainedModel, count: int, asked: Mapping[int, tuple[nn.Module, AttentionKind]]
) -> tuple[AttentionKind, ...]:
    kind = model.config.model_type
    missing = [index for index in range(count) if index not in asked]
    if missing:
        raise ValueError(
            f"{kind}: layer {missing[0]} does not use transformers' attention interface "
            "(ALiBi, recurrent or linear attention); its state cannot be kept by distllm"
        )
    types = getattr(model.config, "layer_types", None) or ()
    found = []
    for index in range(count):
        layer = asked[index][1]
        if layer.window is not None and layer.window < 1:
            raise ValueError(f"{kind}: layer {index} has a sliding window of {layer.window}: it must be at least 1")
        found.append(layer.chunked() if types[index : index + 1] == ["chunked_attention"] else layer)
    return tuple(found)


def _context_length(config: PretrainedConfig) -> int:
    """The longest sequence whose positions do not depend on the other rows of a step.

    With longrope, transformers turns all positions of a step by other factors as soon as one of them is beyond the
    original context; up to there no row can see the others.
    """
    longest = int(getattr(config, "max_position_embeddings", 0) or 2**31 - 1)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return longest
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", 0)
    return min(longest, int(original or longest))


def name_of(base: nn.Module, part: nn.Module | None) -> str:
    """What a module calls one that it holds; empty for itself, and for one that it does not hold."""
    return next((name for name, module in base.named_modules() if module is part), "")
