"""Runs one Hugging Face causal language model across the machines you have.

The public names are loaded at first use, so that importing distllm costs nothing until a model is wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distllm.core import EngineError, Output, Piece, SamplingParams, Usage

if TYPE_CHECKING:
    from distllm.llm import LLM, serve_here

__all__ = ["LLM", "EngineError", "Output", "Piece", "SamplingParams", "Usage", "serve_here"]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "serve_here"):
        from distllm import llm

        return getattr(llm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
