"""Attention of packed rows over our KV cache, registered with transformers under a name of its own.

Shapes: T packed tokens, t tokens of one row, L positions that a row sees, H heads, G KV heads, K head size. The
function finds the cache through its module, so that several models can live in one process. A row's keys are viewed
in place; which rows and where comes from the step's Layout, so that around this function a stage's step is a fixed
sequence of operations on tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from distllm.model.cache import KVCache, KVShape, Layout, RowPlace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "distllm"
# While a model is inspected: as above, and its masks are asked for.
INSPECTION = "distllm_inspection"

# Arguments that transformers passes along and that change nothing here.
HARMLESS = frozenset(
    [
        "dropout",
        "is_causal",
        "sliding_window",
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
    """What one layer keeps of the past, and how much of it a token sees.

    `window` counts the positions that a token sees, itself included; `chunk` cuts positions into chunks of so many, of
    which a token sees its own.
    """

    shape: KVShape
    window: int | None = None
    chunk: int | None = None

    def chunked(self) -> AttentionKind:
        """The same, if what was taken for a window is a chunk."""
        return replace(self, window=None, chunk=self.window)

    def since(self, position: int) -> int:
        """The first position that a token at this one sees."""
        if self.window is not None:
            return max(0, position - self.window + 1)
        return position // self.chunk * self.chunk if self.chunk is not None else 0


@dataclass(frozen=True, slots=True)
class AskedMask:
    """Stands for a mask while a model is inspected: no further back than `local_size` positions."""

    local_size: int | None


@dataclass(frozen=True, slots=True)
class Asked:
    """The arguments of one call that matter; `sinks_H` are scores of an empty place that every head may look at."""

    scale: float
    softcap: float | None = None
    sinks_H: torch.Tensor | None = None


class AttentionRecorder:
    """Stands in for the cache while a model is inspected, and notes which module asks for each layer, and what."""

    def __init__(self) -> None:
        self.kinds: dict[int, tuple[nn.Module, AttentionKind]] = {}

    def attach(self, model: PreTrainedModel) -> None:
        attach(model, self)

    def record(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: AskedMask | None
    ) -> torch.Tensor:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if layer in self.kinds:
            raise NotImplementedError(f"its layer {layer} asks for attention more than once")
        shape = KVShape(key.shape[1], key.shape[3], value.shape[3])
        self.kinds[layer] = module, AttentionKind(shape, None if mask is None else mask.local_size)
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


class CachedAttention:
    """Attention of the layers of one shard over its cache; `layout` is that of the step under way."""

    def __init__(self, cache: KVCache, kinds: Mapping[int, AttentionKind]) -> None:
        self._cache = cache
        self._kinds = kinds
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
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        kind = self._kinds[layer]
        keys_GNK, values_GNK = self._cache[layer]
        keys_GNK.index_copy_(1, self.layout.places_T, key[0])
        values_GNK.index_copy_(1, self.layout.places_T, value[0])
        query_THK = query[0].transpose(0, 1)
        by_scores = asked.softcap is not None or asked.sinks_H is not None
        attend_row = _attend_by_scores if by_scores else _attend_row
        parts_tHK = []
        for row in self.layout.rows:
            since = kind.since(row.start)
            keys_GLK, values_GLK = row.view(keys_GNK, since), row.view(values_GNK, since)
            query_tHK = query_THK[row.first : row.first + row.tokens]
            if row.tokens == 1 and not by_scores:
                parts_tHK.append(_attend_token(query_tHK, keys_GLK, values_GLK, asked))
            else:
                mask_tL = _mask(self.layout, row, since, kind)
                parts_tHK.append(attend_row(query_tHK, keys_GLK, values_GLK, asked, mask_tL))
        return torch.cat(parts_tHK).unsqueeze(0)


def attach(model: PreTrainedModel, attention: AttentionRecorder | CachedAttention | None) -> None:
    """Tells every attention module of a model who answers for it; None frees the cache of who did."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.distllm = attention


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | AskedMask | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls in every attention layer.

    A `sliding_window` among the rest counts for nothing: as in transformers' own default attention, masks rule.

    Raises:
        NotImplementedError: a layer asks for something that is not built.
    """
    if not isinstance(attention_mask, AskedMask | None):
        raise NotImplementedError("its attention needs masks of its own, which distllm does not have")
    if not getattr(module, "is_causal", True):
        raise NotImplementedError("its attention looks at later tokens too, which distllm has not computed yet")
    unknown = [name for name, given in rest.items() if given is not None and name not in HARMLESS]
    if unknown:
        raise NotImplementedError(f"its attention needs {', '.join(sorted(unknown))}, which distllm does not have")
    answers: object = getattr(module, "distllm", None)
    if isinstance(answers, AttentionRecorder):
        return answers.record(module, query, key, value, attention_mask), None
    if not isinstance(answers, CachedAttention):
        raise NotImplementedError("its attention does not know the number of its layer")
    asked = Asked(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    return answers.attend(module, query, key, value, asked), None


def asked_mask(*, local_size: int | None = None, use_vmap: bool = False, **_: Any) -> AskedMask:
    """What transformers calls for each kind of mask while a model is inspected.

    Raises:
        NotImplementedError: the model changes the mask by a function of its own.
    """
    if use_vmap:
        raise NotImplementedError("its attention needs masks of its own, which distllm does not have")
    return AskedMask(local_size)


def _mask(layout: Layout, row: RowPlace, since: int, kind: AttentionKind) -> torch.Tensor | None:
    """The (t, L) mask of a row, True where a token sees a position; None if it is plainly causal or sees everything."""
    if row.tokens == 1 or (row.start == 0 and kind.since(row.stop - 1) == 0):
        return None
    if (key := (row.first, kind.window, kind.chunk)) not in layout.masks:
        device = layout.positions_T.device
        query_t1 = torch.arange(row.start, row.stop, device=device).unsqueeze(1)
        seen_L = torch.arange(since, row.stop, device=device)
        mask_tL = seen_L <= query_t1
        if kind.window is not None:
            mask_tL &= seen_L > query_t1 - kind.window
        if kind.chunk is not None:
            mask_tL &= seen_L >= query_t1 // kind.chunk * kind.chunk
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
    tokens, heads, _ = query_tHK.shape
    groups = keys_GLK.shape[0]
    query_GhtK = query_tHK.transpose(0, 1).reshape(groups, heads // groups, tokens, -1)
    keys_GhLK = keys_GLK.unsqueeze(1).expand(-1, heads // groups, -1, -1)
    values_GhLK = values_GLK.unsqueeze(1).expand(-1, heads // groups, -1, -1)
    out_GhtK = F.scaled_dot_product_attention(
        query_GhtK, keys_GhLK, values_GhLK, attn_mask=mask_tL, is_causal=mask_tL is None, scale=asked.scale
    )
    return out_GhtK.flatten(0, 1).transpose(0, 1)


def _attend_by_scores(
    query_tHK: torch.Tensor,
    keys_GLK: torch.Tensor,
    values_GLK: torch.Tensor,
    asked: Asked,
    mask_tL: torch.Tensor | None,
) -> torch.Tensor:
    """As `_attend_row`, with what torch's attention does not know; (t, H, K).

    Scores squeezed into (-softcap, softcap) before the softmax are those of Gemma 2; sinks, which take a part of the
    softmax and give nothing, those of gpt-oss.
    """
    tokens, heads, _ = query_tHK.shape
    groups, seen, _ = keys_GLK.shape
    query_GhtK = query_tHK.transpose(0, 1).reshape(groups, heads // groups, tokens, -1)
    scores_GhtL = query_GhtK @ keys_GLK.unsqueeze(1).transpose(2, 3) * asked.scale
    if asked.softcap is not None:
        scores_GhtL = torch.tanh(scores_GhtL / asked.softcap) * asked.softcap
    if mask_tL is None and tokens > 1:
        mask_tL = torch.ones(tokens, seen, dtype=torch.bool, device=scores_GhtL.device).tril(seen - tokens)
    if mask_tL is not None:
        scores_GhtL = scores_GhtL.masked_fill(~mask_tL, float("-inf"))
    if asked.sinks_H is not None:
        sinks_Ght1 = asked.sinks_H.view(groups, -1, 1, 1).expand(-1, -1, tokens, -1).to(scores_GhtL.dtype)
        scores_GhtL = torch.cat([scores_GhtL, sinks_Ght1], dim=-1)
    weights_GhtL = scores_GhtL.softmax(dim=-1, dtype=torch.float32)[..., :seen].to(query_tHK.dtype)
    return (weights_GhtL @ values_GLK.unsqueeze(1)).flatten(0, 1).transpose(0, 1)


def register() -> None:
    """Makes our attention known to transformers; doing it again changes nothing.

    For `ATTENTION` no mask function is registered, so that transformers makes no masks at all.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attention)
    AttentionInterface.register(INSPECTION, attention)
    AttentionMaskInterface.register(INSPECTION, asked_mask)
