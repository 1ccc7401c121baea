"""A transformers model emptied of what its span does not own: what one rank holds and runs.

Shapes: T packed tokens, B rows that sample, D model width, V vocabulary. Knows no network, no requests and no files.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import nn

from distllm.core import Span
from distllm.model import attention, families, linear
from distllm.model.attention import CachedAttention
from distllm.model.cache import KVCache, Layout
from distllm.model.families import Anatomy

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class PassThrough(nn.Module):
    """Stands where another rank's part of the model is: gives back the hidden states that it is given."""

    def __init__(self, *, in_tuple: bool = False) -> None:
        super().__init__()
        self._in_tuple = in_tuple

    def forward(self, *given: object, **named: object) -> object:
        tensors = (each for each in (*given, *named.values()) if isinstance(each, torch.Tensor))
        hidden = next((each for each in tensors if each.is_floating_point()), given[0] if given else None)
        return (hidden,) if self._in_tuple else hidden


class InTurn(nn.Module):
    """Stands for a part that works before and after the layers, and works only the first or the second time."""

    def __init__(self, part: nn.Module, turn: int) -> None:
        super().__init__()
        self._part = part
        self._turn = turn
        self._next = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        mine, self._next = self._next == self._turn, 1 - self._next
        out: torch.Tensor = self._part(hidden) if mine else hidden
        return out


class NoPositions(nn.Module):
    """Stands for learned position embeddings after the first stage: adds nothing."""

    def forward(self, *given: object, **named: object) -> torch.Tensor:
        device = next(each.device for each in (*given, *named.values()) if isinstance(each, torch.Tensor))
        return torch.zeros((), device=device)


class Shard:
    """The part of a model that one rank holds. Weights are on the meta device until `weights.load` fills them.

    Attributes:
        read_bytes: of the checkpoint's files, to fill it.
        kept: parts that another shard has filled: numbers of layers, `embed`, `head`.
    """

    def __init__(self, config: PretrainedConfig, anatomy: Anatomy, span: Span, dtype: torch.dtype) -> None:
        self.span = span
        self.anatomy = anatomy
        self.dtype = dtype
        with families.parameters_on_meta():
            self.model = families.build(config, dtype)
        _empty(self.model, anatomy, span)
        self.read_bytes = 0
        self.kept: frozenset[int | str] = frozenset()
        self.body_done = 0.0
        self.base.register_forward_hook(self._note_time)
        self._attention: CachedAttention | None = None

    @property
    def base(self) -> PreTrainedModel:
        return families.base_of(self.model)

    @property
    def nbytes(self) -> int:
        """Bytes of weights; a tensor that is used twice counts once."""
        tensors = {t.data_ptr(): t.nbytes for t in self.model.state_dict().values()}
        return int(sum(tensors.values())) + linear.packed_bytes(self.model)

    def take(self, other: Shard) -> None:
        """Takes over the parts that it has in common with a filled shard of the same model, which is of no use then.

        What was quantized or packed there stays so.
        """
        attention.attach(other.model, None)
        mine, theirs = self.span, other.span
        kept: set[int | str] = set()
        layers, others = (shard.base.get_submodule(self.anatomy.layers) for shard in (self, other))
        for index in range(max(mine.start, theirs.start), min(mine.stop, theirs.stop)):
            layers[index] = others[index]
            kept.add(index)
        if mine.embed and theirs.embed:
            kept.add("embed")
            self._take_parts(other, {self.anatomy.embed, *self.anatomy.before, *self.anatomy.positions})
        if mine.head and theirs.head:
            kept.add("head")
            self._take_parts(other, set(self.anatomy.after))
            head = families.name_of(other.model, other.model.get_output_embeddings())
            self.model.set_submodule(head, other.model.get_submodule(head))
            self.drop_table()
        self.kept |= kept
        del other.model, other._attention

    def narrow(self, span: Span) -> None:
        """Lets go of what is outside of a span that it has all of, without being built anew."""
        assert self.span.covers(span), "the rest would be missing"
        attention.attach(self.model, None)
        self._attention = None
        _empty(self.model, self.anatomy, span, before=self.span)
        self.span, self.read_bytes = span, 0
        if span.head:
            self.drop_table()

    def _take_parts(self, other: Shard, names: set[str]) -> None:
        """Those that work before and after the layers have no weights."""
        for name in names - (set(self.anatomy.before) & set(self.anatomy.after)):
            self.base.set_submodule(name, other.base.get_submodule(name))

    def drop_table(self) -> None:
        """Leaves the embedding table to a tied head, once that has it, where nothing looks a token up in it."""
        if not self.span.embed:
            self.base.set_submodule(self.anatomy.embed, PassThrough())

    def use(self, cache: KVCache) -> None:
        """Keeps keys and values in this cache from now on."""
        self._attention = CachedAttention(cache, dict(enumerate(self.anatomy.attention)))
        self._attention.attach(self.model)

    @torch.inference_mode()
    def forward(self, inputs: torch.Tensor, layout: Layout, last_B: torch.Tensor | None = None) -> torch.Tensor:
        """Runs the span.

        Args:
            inputs: token ids (T,) where the span has the embeddings, else hidden states (T, D).
            layout: where the rows are.
            last_B: on the rank with the head, the places in T after which a token is wanted.

        Returns:
            logits (B, V) if any token is wanted, else hidden states (T, D).
        """
        assert self._attention is not None, "a cache comes first"
        self._attention.layout = layout
        hidden_TD = self.base.get_submodule(self.anatomy.embed)(inputs) if self.span.embed else inputs
        named = {"inputs_embeds": hidden_TD[None], "position_ids": layout.positions_T[None], "use_cache": False}
        if last_B is None or not len(last_B):
            hidden_1TD: torch.Tensor = self.base(**named).last_hidden_state
            return hidden_1TD[0]
        logits_1BV: torch.Tensor = self.model(**named, logits_to_keep=last_B).logits
        return logits_1BV[0]

    def _note_time(self, *_: object) -> None:
        self.body_done = time.perf_counter()


def _empty(model: PreTrainedModel, anatomy: Anatomy, span: Span, before: Span | None = None) -> None:
    """Replaces what is outside of the span by pass-throughs; `before` is the span that it was emptied to already."""
    base = families.base_of(model)
    layers = base.get_submodule(anatomy.layers)
    for index in range(len(layers)):
        if not span.start <= index < span.stop:
            layers[index] = PassThrough(in_tuple=anatomy.in_tuples)
    both = set(anatomy.before) & set(anatomy.after)
    ends_stay = before is not None and (before.embed, before.head) == (span.embed, span.head)
    for name in () if ends_stay else both:
        if span.embed != span.head:
            base.set_submodule(name, InTurn(base.get_submodule(name), turn=int(span.head)))
        elif not span.embed:
            base.set_submodule(name, PassThrough())
    if not span.head:
        for name in set(anatomy.after) - both:
            base.set_submodule(name, PassThrough())
        _drop_head(model)
    if not span.embed:
        for name in set(anatomy.before) - both:
            base.set_submodule(name, PassThrough())
        for name in anatomy.positions:
            base.set_submodule(name, NoPositions())
        if hasattr(base, families.INPUT_SCALE):
            setattr(base, families.INPUT_SCALE, 1.0)
        # A tied head gets its weight as the embedding table; see `drop_table`.
        if not (span.head and model.config.tie_word_embeddings):
            base.set_submodule(anatomy.embed, PassThrough())


def _drop_head(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is not None:
        model.set_submodule(name, PassThrough())


def check_passes_through(config: PretrainedConfig, anatomy: Anatomy) -> None:
    """A stage without layers must hand on what it gets, or a model cut in two would differ from the whole.

    Raises:
        ValueError: the architecture does something of its own to the input of its layers.
    """
    middle = Shard(config, anatomy, Span(0, 0), torch.float32)
    rest = next((name for name, _ in middle.model.named_parameters()), None)
    if rest is not None:
        raise ValueError(
            f"{config.model_type} has {rest} outside of its embeddings, layers, norm and head; "
            "it cannot be cut into stages"
        )
    hidden_1TD = torch.linspace(-1, 1, 2 * config.hidden_size).reshape(1, 2, -1)
    positions_1T = torch.tensor([[3, 4]])
    with torch.inference_mode():
        out = middle.base(inputs_embeds=hidden_1TD, position_ids=positions_1T, use_cache=False).last_hidden_state
    if not torch.equal(out, hidden_1TD):
        raise ValueError(
            f"{config.model_type} changes the hidden states before its first layer; it cannot be cut into stages"
        )
