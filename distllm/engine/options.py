"""What an engine is made by."""

from __future__ import annotations

from dataclasses import dataclass, field

from distllm.config import ClusterConfig, EngineConfig, ModelConfig, PlanConfig, QuantizationConfig, WeightsConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The sections of the configuration that make an engine."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
