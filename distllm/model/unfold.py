"""Linear layers that a model holds in another form, laid open as such: all experts in one tensor, weights transposed.

What packs or quantizes linear layers then knows one kind. Weights are views of the parameters and cost no memory.

Shapes: T packed tokens, K experts of a token, D model width, E experts; I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import Parameter


@dataclass(frozen=True)
class Origin:
    """The parameter that a weight is a view of, its name in what was unfolded, and how the weight lies in it.

    `index` is that of the expert if it holds the weights of several.
    """

    name: str
    parameter: Parameter
    transposed: bool
    index: int | None = None

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        """The weight (O, I) in a parameter of this kind."""
        held = parameter if self.index is None else parameter[self.index]
        return held.T if self.transposed else held


class Unfolded(nn.Linear):
    """A linear layer whose weight (O, I) is a view of a parameter that is no such weight itself."""

    def __init__(self, origin: Origin, bias_O: torch.Tensor | None) -> None:
        nn.Module.__init__(self)  # that of a linear layer would make room for weights
        self.origin = origin
        self.weight: Parameter = Parameter(origin.view(origin.parameter.detach()), requires_grad=False)
        self.out_features, self.in_features = self.weight.shape
        self.register_parameter("bias", None if bias_O is None else Parameter(bias_O, requires_grad=False))


class SplitExperts(nn.Module):
    """Experts as two linear layers each, in place of a module that holds them in two tensors.

    Of those that transformers declares with `use_experts_implementation`; what the experts of a token say is summed up
    as it does that itself.
    """

    def __init__(self, folded: Any, name: str) -> None:
        super().__init__()
        self.first = nn.ModuleList(_experts(folded, name, "gate_up_proj" if folded.has_gate else "up_proj"))
        self.second = nn.ModuleList(_experts(folded, name, "down_proj"))
        self.between: Any = folded  # without its weights: how it gates or activates, and its norm

    def forward(self, hidden_TD: torch.Tensor, chosen_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        rows = chosen_TK.flatten()
        order = rows.argsort(stable=True)
        counts = rows.bincount(minlength=len(self.first)).tolist()
        out = hidden_TD.new_zeros(len(rows), hidden_TD.shape[-1])
        for expert, mine in enumerate(torch.split(order, counts)):
            if len(mine):
                out[mine] = self._one(expert, hidden_TD[mine // chosen_TK.shape[1]])
        out_TKD = out.view(*chosen_TK.shape, -1) * weight_TK[..., None]
        out_TD: torch.Tensor = out_TKD.sum(1).to(hidden_TD.dtype)
        return out_TD

    def _one(self, expert: int, hidden_TD: torch.Tensor) -> torch.Tensor:
        inner = self.first[expert](hidden_TD)
        inner = self.between._apply_gate(inner) if self.between.has_gate else self.between.act_fn(inner)
        out_TD: torch.Tensor = self.second[expert](inner)
        if self.between.has_post_expert_norm:
            out_TD = self.between.post_expert_norm(out_TD)
        return out_TD


def _experts(folded: Any, name: str, weight: str) -> Iterator[Unfolded]:
    """Takes a weight, and its bias, out of a module of experts."""
    parameter, bias_EO = getattr(folded, weight), getattr(folded, f"{weight}_bias", None)
    delattr(folded, weight)
    if bias_EO is not None:
        delattr(folded, f"{weight}_bias")
    for expert in range(len(parameter)):
        origin = Origin(f"{name}.{weight}", parameter, folded.is_transposed, expert)
        yield Unfolded(origin, None if bias_EO is None else bias_EO.detach()[expert])


# Linear layers of models' own that compute just what torch's do.
OTHER_NAMES = ("FalconLinear",)


def unfold(model: nn.Module) -> None:
    """Replaces modules of experts, and linear layers that are not torch's."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, Unfolded(Origin(f"{name}.weight", module.weight, transposed=True), module.bias))
        elif type(module).__name__ in OTHER_NAMES:
            model.set_submodule(name, Unfolded(Origin(f"{name}.weight", module.weight, transposed=False), module.bias))
        elif _are_experts(module):
            model.set_submodule(name, SplitExperts(module, name))


def _are_experts(module: nn.Module) -> bool:
    """Whether they are of the kind that transformers runs in several ways, and not yet taken apart."""
    return hasattr(module, "has_post_expert_norm") and hasattr(module, "down_proj")
