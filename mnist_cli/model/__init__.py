"""The models: float32 inputs (B, *input_shape), already normalised, to logits (B, num_outputs).

Every model has a room of its own. The names of its layers are the names of the tensors in a
checkpoint, so renaming one makes older checkpoints unreadable.
"""

from __future__ import annotations

from torch import nn

from mnist_cli.model.cnn import Cnn, CnnDeep, CnnDropout
from mnist_cli.model.linear import Linear
from mnist_cli.model.mlp import Mlp
from mnist_cli.options import (
    CnnConfig,
    CnnDeepConfig,
    CnnDropoutConfig,
    LinearModelConfig,
    MlpConfig,
    ModelConfig,
    PluginModelConfig,
)
from mnist_cli.plugin_code import code_of_plugin


def build_model(config: ModelConfig, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Make a model on the CPU in float32, its weights drawn from torch's global generator.

    Args:
        config: which model.
        input_shape: shape of one sample: (C, H, W) of an image or (F,) of a row of numbers.
        num_outputs: classes, or 1 for a regression.

    Raises:
        UsageError: a convolutional model is asked to read samples that aren't images, or images
            that are too small for it.
    """
    match config:
        case LinearModelConfig():
            return Linear(input_shape, num_outputs)
        case MlpConfig():
            return Mlp(config.hidden, config.dropout, input_shape, num_outputs)
        case CnnConfig():
            return Cnn(config.channels, config.dense, input_shape, num_outputs)
        case CnnDropoutConfig():
            return CnnDropout(config.conv_dropout, config.dense_dropout, input_shape, num_outputs)
        case CnnDeepConfig():
            return CnnDeep(input_shape, num_outputs)
        case PluginModelConfig():
            with code_of_plugin(config, "build"):
                model = config.build(input_shape, num_outputs)
                if not isinstance(model, nn.Module):
                    raise TypeError(f"build() gave {model!r}, which is no torch.nn.Module")
                return model


def num_params(model: nn.Module) -> int:
    """How many numbers the optimizer may change."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
