"""Attention of packed rows over our KV cache, registered with transformers under a name of its own.

Shapes: T packed tokens, t tokens of one row, L positions that a row sees, H heads, G KV heads, K head size. The
function finds the cache through its module, so that several models can live in one process. A row's keys are viewed
in place; which rows and where comes from the step's Layout, so that around this function a stage's step is a fixed
sequence of operations on tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from distllm.model.cache import KVCache, KVShape, Layout, RowPlace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "distllm"

# Arguments that transformers passes along and that change nothing here.
HARMLESS = frozenset(
    [
        "dropout",
        "is_causal",
        "position_ids",
        "use_cache",
        "cache_position",
        "position_embeddings",
        "output_router_logits",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    ]
)


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """What one layer asks of attention."""

    shape: KVShape
    window: int | None
    softcap: float | None


class AttentionRecorder:
    """Stands in for the cache while a model is inspected, and notes what each layer asks."""

    def __init__(self) -> None:
        self.kinds: dict[int, AttentionKind] = {}

    def attach(self, model: PreTrainedModel) -> None:
        attach(model, self)

    def attend(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, asked: Asked
    ) -> torch.Tensor:
        shape = KVShape(key.shape[1], key.shape[3], value.shape[3])
        self.kinds[int(module.layer_idx)] = AttentionKind(shape, asked.window, asked.softcap)  # type: ignore[arg-type]
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


class CachedAttention:
    """Attention of the layers of one shard over its cache; `layout` is that of the step under way."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self.layout: Layout | None = None

    def attach(self, model: PreTrainedModel) -> None:
        attach(model, self)

    def attend(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, asked: Asked
    ) -> torch.Tensor:
        """
        Args:
            query: (1, H, T, K); key, value: (1, G, T, K).

        Returns:
            (1, T, H, K)
        """
        assert self.layout is not None, "a step sets its layout first"
        keys_GNK, values_GNK = self._cache[int(module.layer_idx)]  # type: ignore[arg-type]
        keys_GNK.index_copy_(1, self.layout.places_T, key[0])
        values_GNK.index_copy_(1, self.layout.places_T, value[0])
        query_THK = query[0].transpose(0, 1)
        parts_tHK = []
        for row in self.layout.rows:
            since = 0 if asked.window is None else max(0, row.start - asked.window + 1)
            keys_GLK, values_GLK = row.view(keys_GNK, since), row.view(values_GNK, since)
            query_tHK = query_THK[row.first : row.first + row.tokens]
            if row.tokens == 1 and asked.softcap is None:
                parts_tHK.append(_attend_token(query_tHK, keys_GLK, values_GLK, asked))
            else:
                mask_tL = _mask(self.layout, row, since, asked.window)
                parts_tHK.append(_attend_row(query_tHK, keys_GLK, values_GLK, asked, mask_tL))
        return torch.cat(parts_tHK).unsqueeze(0)


@dataclass(frozen=True, slots=True)
class Asked:
    """The arguments of one call that matter; `window` counts the positions a token sees, itself included."""

    scale: float
    window: int | None
    softcap: float | None


def attach(model: PreTrainedModel, attention: AttentionRecorder | CachedAttention) -> None:
    """Tells every attention module of a model who answers for it."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.distllm = attention


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls in every attention layer.

    Raises:
        NotImplementedError: a layer asks for something that is not built, such as attention sinks.
    """
    if attention_mask is not None:
        raise NotImplementedError("its attention needs masks of its own, which distllm does not have")
    if not getattr(module, "is_causal", True):
        raise NotImplementedError("its attention looks at later tokens too, which distllm has not computed yet")
    unknown = [name for name, given in rest.items() if given is not None and name not in HARMLESS]
    if unknown:
        raise NotImplementedError(f"its attention needs {', '.join(sorted(unknown))}, which distllm does not have")
    asked = Asked(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    return module.distllm.attend(module, query, key, value, asked), None  # type: ignore[operator, union-attr]


def _mask(layout: Layout, row: RowPlace, since: int, window: int | None) -> torch.Tensor | None:
    """The (t, L) mask of a row, True where a token sees a position; None if it is plainly causal or sees everything."""
    if row.tokens == 1 or (row.start == 0 and (window is None or window >= row.stop)):
        return None
    if (key := (row.first, window)) not in layout.masks:
        device = layout.positions_T.device
        query_t1 = torch.arange(row.start, row.stop, device=device).unsqueeze(1)
        seen_L = torch.arange(since, row.stop, device=device)
        mask_tL = seen_L <= query_t1
        if window is not None:
            mask_tL &= seen_L > query_t1 - window
        layout.masks[key] = mask_tL
    return layout.masks[key]


def _attend_token(
    query_1HK: torch.Tensor, keys_GLK: torch.Tensor, values_GLK: torch.Tensor, asked: Asked
) -> torch.Tensor:
    """A row of one token, which sees all of the keys; (1, H, K).

    The heads of a group stand as query rows of one head: in bf16 this is several times faster than `enable_gqa`.
    """
    groups = keys_GLK.shape[0]
    query_1GhK = query_1HK.reshape(1, groups, query_1HK.shape[1] // groups, -1)
    out_1GhK = F.scaled_dot_product_attention(query_1GhK, keys_GLK[None], values_GLK[None], scale=asked.scale)
    return out_1GhK.flatten(1, 2)


def _attend_row(
    query_tHK: torch.Tensor,
    keys_GLK: torch.Tensor,
    values_GLK: torch.Tensor,
    asked: Asked,
    mask_tL: torch.Tensor | None,
) -> torch.Tensor:
    """A row of several tokens; (t, H, K). The heads of a group stand beside each other: no key is copied per head."""
    if asked.softcap is not None:
        return _attend_with_softcap(query_tHK, keys_GLK, values_GLK, asked, mask_tL)
    tokens, heads, _ = query_tHK.shape
    groups = keys_GLK.shape[0]
    query_GhtK = query_tHK.transpose(0, 1).reshape(groups, heads // groups, tokens, -1)
    keys_GhLK = keys_GLK.unsqueeze(1).expand(-1, heads // groups, -1, -1)
    values_GhLK = values_GLK.unsqueeze(1).expand(-1, heads // groups, -1, -1)
    out_GhtK = F.scaled_dot_product_attention(
        query_GhtK, keys_GhLK, values_GhLK, attn_mask=mask_tL, is_causal=mask_tL is None, scale=asked.scale
    )
    return out_GhtK.flatten(0, 1).transpose(0, 1)


def _attend_with_softcap(
    query_tHK: torch.Tensor,
    keys_GLK: torch.Tensor,
    values_GLK: torch.Tensor,
    asked: Asked,
    mask_tL: torch.Tensor | None,
) -> torch.Tensor:
    """Scores squeezed into (-softcap, softcap) before the softmax, as in Gemma 2; (t, H, K)."""
    assert asked.softcap is not None
    tokens, heads, _ = query_tHK.shape
    groups, seen, _ = keys_GLK.shape
    query_GhtK = query_tHK.transpose(0, 1).reshape(groups, heads // groups, tokens, -1)
    scores_GhtL = query_GhtK @ keys_GLK.unsqueeze(1).transpose(2, 3) * asked.scale
    scores_GhtL = torch.tanh(scores_GhtL / asked.softcap) * asked.softcap
    if mask_tL is None and tokens > 1:
        mask_tL = torch.ones(tokens, seen, dtype=torch.bool, device=scores_GhtL.device).tril(seen - tokens)
    if mask_tL is not None:
        scores_GhtL = scores_GhtL.masked_fill(~mask_tL, float("-inf"))
    weights_GhtL = scores_GhtL.softmax(dim=-1, dtype=torch.float32).to(query_tHK.dtype)
    return (weights_GhtL @ values_GLK.unsqueeze(1)).flatten(0, 1).transpose(0, 1)


def register() -> None:
    """Makes our attention known to transformers; doing it again changes nothing.

    No mask function is registered with it, so that transformers makes no masks at all.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attention)
