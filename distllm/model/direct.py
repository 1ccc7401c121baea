"""Models that call torch's own attention instead of transformers' interface: their calls are led to ours.

Falcon keeps a table of attention classes, in which a name of ours stands for its usual class. Within such a module,
`F.scaled_dot_product_attention` is our attention; everything else is left as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from distllm.model.attention import ATTENTION, INSPECTION, attention

if TYPE_CHECKING:
    from transformers import PretrainedConfig


KINDS = frozenset({"falcon"})


def register() -> None:
    """Makes our names known to these models; doing it again changes nothing."""
    from transformers.models.falcon import modeling_falcon

    classes: dict[str, Callable[..., nn.Module]] = modeling_falcon.FALCON_ATTENTION_CLASSES
    for name in (ATTENTION, INSPECTION):
        classes[name] = _led_to_ours


def _led_to_ours(config: PretrainedConfig, layer_idx: int | None = None) -> nn.Module:
    """Falcon's attention, which takes torch's for its own and finds ours there."""
    from transformers.models.falcon.modeling_falcon import FalconAttention

    theirs = copy.copy(config)
    theirs._attn_implementation = "sdpa"
    module: nn.Module = FalconAttention(theirs, layer_idx)
    plain = module.forward

    def forward(hidden: Any, *, alibi: Any, attention_mask: Any, **named: Any) -> Any:
        if alibi is not None:
            raise NotImplementedError("its attention needs alibi, which distllm does not have")
        with _Redirect(module, attention_mask):
            return plain(hidden, alibi=None, attention_mask=None, **named)

    module.forward = forward
    return module


class _Redirect(TorchFunctionMode):
    """While it is entered, torch's attention is ours; `mask` is what the model was given by transformers."""

    def __init__(self, module: nn.Module, mask: Any) -> None:
        super().__init__()
        self._module = module
        self._mask = mask

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs or {})
        query, key, value = args
        out_1THK, _ = attention(self._module, query, key, value, self._mask)
        return out_1THK.transpose(1, 2)
