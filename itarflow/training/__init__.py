"""Training: what a recipe is, and the loop that follows it. Here are the settings that recipes are made of."""

from itarflow.codec import CodecConfig
from itarflow.data import DataConfig
from itarflow.flow import NoiseConfig
from itarflow.inverse import Guidance
from itarflow.presets import ModelConfig
from itarflow.training.recipe import Recipe, SamplingConfig, TrainConfig

__all__ = [
    "CodecConfig",
    "DataConfig",
    "Guidance",
    "ModelConfig",
    "NoiseConfig",
    "Recipe",
    "SamplingConfig",
    "TrainConfig",
]
