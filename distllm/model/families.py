"""Where the parts of a transformers model are, and whether it can be cut into stages.

Everything is asked of transformers itself; the tables below hold only what it does not declare. Knows no weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distllm.model.attention import ATTENTION, AttentionKind, AttentionRecorder
from distllm.model.checkpoint import first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Embeddings, layers and final norm of base models that declare no `base_model_pp_plan`.
UNDECLARED = {"gpt2": ("wte", "h", "ln_f")}

# Layers that keep keys and values; `layer_types` of a configuration also names those that keep other states.
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})

# Modules whose output is added to the embeddings, wherever the input comes from.
POSITIONS = {"gpt2": "wpe"}

# Factors by which a base model multiplies its input embeddings, wherever they come from.
INPUT_SCALES = {"granite": "embedding_multiplier", "granitemoe": "embedding_multiplier"}


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Names of the parts of a model, relative to its base model, and what its layers keep of the past.

    `attention` has one entry a layer.
    """

    embed: str
    layers: str
    norm: str
    positions: str | None
    input_scale: str | None
    attention: tuple[AttentionKind, ...]
    context_length: int


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Models made inside have parameters without storage; buffers are real."""

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook: Callable[..., Any] = to_meta  # the registered parameter is what it returns, though it is typed otherwise
    handle = nn.modules.module.register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def build(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model without weights, with our attention; transformers would write into the configuration itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=ATTENTION)
    return model.eval().requires_grad_(False)


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
    with torch.device("meta"):
        try:
            model = build(config, torch.bfloat16)  # some kernels know no other type on the meta device
        except Exception as error:  # whatever transformers computes with a strange size may raise anything
            raise ValueError(
                f"{kind} is not a causal language model that transformers can build from its config.json: "
                f"{first_line(error)}"
            ) from error
    embed, layers, norm = _parts(model.base_model, kind)
    return Anatomy(
        embed=embed,
        layers=layers,
        norm=norm,
        positions=POSITIONS.get(kind),
        input_scale=INPUT_SCALES.get(kind),
        attention=_attention_of_layers(model, layers),
        context_length=_context_length(config),
    )


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


def _parts(base: PreTrainedModel, kind: str) -> tuple[str, str, str]:
    declared = getattr(base.config, "base_model_pp_plan", None)
    names = UNDECLARED.get(kind) or (tuple(declared) if declared else ())
    lists = [name for name in names if isinstance(getattr(base, name, None), nn.ModuleList)]
    if len(names) < 3 or len(lists) != 1:
        raise ValueError(
            f"{kind} does not say where its embeddings, layers and final norm are; it cannot be cut into stages"
        )
    return names[0], lists[0], names[-1]


def _attention_of_layers(model: PreTrainedModel, layers: str) -> tuple[AttentionKind, ...]:
    """Runs one token through the model on the meta device and notes what each layer asks of attention."""
    kind = model.config.model_type
    recorder = AttentionRecorder()
    recorder.attach(model)
    place_11 = torch.zeros(1, 1, dtype=torch.long, device="meta")
    hidden_11D = torch.zeros(1, 1, model.config.hidden_size, dtype=model.dtype, device="meta")
    try:
        model(inputs_embeds=hidden_11D, position_ids=place_11, use_cache=False)
    except (TypeError, RuntimeError, AttributeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"{kind} does not run one token at a time through its layers: {first_line(error)}") from error
    count = len(model.base_model.get_submodule(layers))
    missing = [index for index in range(count) if index not in recorder.kinds]
    if missing:
        raise ValueError(
            f"{kind}: layer {missing[0]} does not use transformers' attention interface "
            "(ALiBi, recurrent or linear attention); its state cannot be kept by distllm"
        )
    found = tuple(recorder.kinds[index] for index in range(count))
    _check_windows(kind, found, getattr(model.config, "layer_types", None) or ())
    return found


def _check_windows(kind: str, layers: tuple[AttentionKind, ...], types: Sequence[str]) -> None:
    for index, layer in enumerate(layers):
        if layer.window is not None and layer.window < 1:
            raise ValueError(f"{kind}: layer {index} has a sliding window of {layer.window}: it must be at least 1")
        if types[index : index + 1] == ["sliding_attention"] and layer.window is None:
            raise ValueError(
                f"{kind}: layer {index} has a sliding window only in its mask, which distllm does not make"
            )
