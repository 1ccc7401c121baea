"""Runs one Hugging Face causal language model across the machines you have.

The public names are loaded at first use, so that importing distllm costs nothing until a model is wanted.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from distllm.core import EngineError, Output, Piece, SamplingParams, Usage

if TYPE_CHECKING:
    from distllm.grammars import json_grammar
    from distllm.llm import LLM, serve_here

__all__ = ["LLM", "EngineError", "Output", "Piece", "SamplingParams", "Usage", "json_grammar", "serve_here"]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "serve_here"):
        # torch warns of every connection that closes, which is how ranks end; it asks when it is first imported.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from distllm import llm

        return getattr(llm, name)
    if name == "json_grammar":
        from distllm.grammars import json_grammar

        return json_grammar
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
