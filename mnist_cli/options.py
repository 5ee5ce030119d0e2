"""The options of the groups: one frozen dataclass for each, with the types and ranges of its keys.

What a key means and its default stand in `conf/`. The last member of each group's union,
`Plugin...Config`, is what a plugin's options inherit from; they supply the methods that are
abstract here.
"""

from __future__ import annotations

import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mnist_cli.errors import UsageError, shown
from mnist_cli.typed import Range

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Count = Annotated[int, Range(least=1, most=10**9)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(least=0)]
Fraction = Annotated[float, Range(least=0, most=1)]
Share = Annotated[float, Range(least=0, below=1)]
Width = Annotated[int, Range(least=1, most=65_536)]

# --- model ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearModelConfig:
    name: Literal["linear"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MlpConfig:
    name: Literal["mlp"]
    hidden: tuple[Width, ...]
    dropout: Share


@dataclass(frozen=True, kw_only=True, slots=True)
class CnnConfig:
    name: Literal["cnn"]
    channels: tuple[Width, Width]
    dense: Width


@dataclass(frozen=True, kw_only=True, slots=True)
class CnnDropoutConfig:
    name: Literal["cnn_dropout"]
    conv_dropout: Share
    dense_dropout: Share


@dataclass(frozen=True, kw_only=True, slots=True)
class CnnDeepConfig:
    name: Literal["cnn_deep"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginModelConfig(ABC):
    name: str

    @abstractmethod
    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """The model, as `build_model` describes it; UsageError where it can't read such samples."""


ModelConfig = (
    LinearModelConfig | MlpConfig | CnnConfig | CnnDropoutConfig | CnnDeepConfig | PluginModelConfig
)


# --- optim ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class SgdConfig:
    name: Literal["sgd", "momentum"]
    lr: Positive
    momentum: Share
    nesterov: bool
    weight_decay: NonNegative


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamConfig:
    name: Literal["adam", "adamw"]
    lr: Positive
    betas: tuple[Share, Share]
    eps: Positive
    weight_decay: NonNegative


@dataclass(frozen=True, kw_only=True, slots=True)
class RmspropConfig:
    name: Literal["rmsprop"]
    lr: Positive
    alpha: Share
    eps: Positive
    momentum: Share
    weight_decay: NonNegative


@dataclass(frozen=True, kw_only=True, slots=True)
class AdagradConfig:
    name: Literal["adagrad"]
    lr: Positive
    lr_decay: NonNegative
    eps: Positive
    weight_decay: NonNegative


@dataclass(frozen=True, kw_only=True, slots=True)
class AdadeltaConfig:
    name: Literal["adadelta"]
    lr: Positive
    rho: Share
    eps: Positive
    weight_decay: NonNegative


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginOptimConfig(ABC):
    name: str
    lr: Positive

    @abstractmethod
    def build(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer. What it keeps of a parameter has the parameter's shape, or is `step`."""


OptimConfig = (
    SgdConfig | AdamConfig | RmspropConfig | AdagradConfig | AdadeltaConfig | PluginOptimConfig
)


# --- loss ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class SmoothedLossConfig:
    name: Literal["cross_entropy", "kl_div", "bce"]
    label_smoothing: Share


@dataclass(frozen=True, kw_only=True, slots=True)
class MseConfig:
    name: Literal["mse"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginLossConfig(ABC):
    name: str

    @abstractmethod
    def build(
        self, task: Literal["classification", "regression"]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """A function of (outputs, targets), as `build_loss` describes it.

        Raises:
            UsageError: the loss isn't made for this task.
        """


LossConfig = SmoothedLossConfig | MseConfig | PluginLossConfig


# --- dataset -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFilesConfig:
    name: Literal["mnist", "fashion_mnist", "kmnist", "cifar10"]
    val_fraction: Share
    root: str | None
    mirror: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EmnistConfig:
    name: Literal["emnist"]
    split: Literal["byclass", "bymerge", "balanced", "letters", "digits", "mnist"]
    val_fraction: Share
    root: str | None
    mirror: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DigitsConfig:
    name: Literal["digits"]
    val_fraction: Share


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearDatasetConfig:
    name: Literal["linear"]
    num_samples: Annotated[int, Range(least=2, most=10_000_000)]
    num_features: Annotated[int, Range(least=1, most=10_000)]
    noise: NonNegative
    val_fraction: Share


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginDatasetConfig(ABC):
    name: str
    val_fraction: Share

    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """A name for each class."""

    @abstractmethod
    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Official training images and labels, then those of the test set.

        Images are (N, C, H, W) uint8, labels (N,) uint8 from 0; each class is in both sets.
        """


DatasetConfig = (
    ImageFilesConfig | EmnistConfig | DigitsConfig | LinearDatasetConfig | PluginDatasetConfig
)


# --- schedule ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ConstantConfig:
    name: Literal["constant"]
    warmup_epochs: NonNegative


@dataclass(frozen=True, kw_only=True, slots=True)
class StepConfig:
    name: Literal["step"]
    step_epochs: Count
    gamma: Annotated[float, Range(above=0, most=1)]
    warmup_epochs: NonNegative


@dataclass(frozen=True, kw_only=True, slots=True)
class CosineConfig:
    name: Literal["cosine"]
    final_lr_fraction: Fraction
    warmup_epochs: NonNegative


@dataclass(frozen=True, kw_only=True, slots=True)
class OnecycleConfig:
    name: Literal["onecycle"]
    peak_fraction: Annotated[float, Range(above=0, below=1)]
    initial_lr_fraction: Annotated[float, Range(above=0, most=1)]
    final_lr_fraction: Fraction
    warmup_epochs: NonNegative


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginScheduleConfig(ABC):
    name: str
    warmup_epochs: NonNegative

    @abstractmethod
    def factor(self, step: int, steps_per_epoch: int, total_steps: int) -> float:
        """The factor on the base learning rate, in 0..1, before the warm-up is multiplied in.

        The arguments are those of `lr_factor`. A pure function: a run that is resumed asks again.
        """


ScheduleConfig = ConstantConfig | StepConfig | CosineConfig | OnecycleConfig | PluginScheduleConfig


# --- plugins -------------------------------------------------------------------------------------

PluginConfig = (
    PluginModelConfig
    | PluginOptimConfig
    | PluginLossConfig
    | PluginDatasetConfig
    | PluginScheduleConfig
)
UNIONS: dict[str, Any] = {
    "model": ModelConfig,
    "optim": OptimConfig,
    "loss": LossConfig,
    "dataset": DatasetConfig,
    "schedule": ScheduleConfig,
}

# Group and class of the options of each plugin that was typed. `plugin.use` alone fills it.
PLUGINS: dict[str, list[tuple[str, type[PluginConfig]]]] = {}


class UntypedPluginError(UsageError):
    """A configuration needs a plugin whose name was not typed."""


def plugin_words(names: Sequence[str]) -> list[str]:
    """What to type for these plugins: nothing where there are none."""
    if len(names) == 1:
        return [f"plugin={names[0]}"]
    return [f"plugin=[{','.join(names)}]"] if names else []


def unions_of(data: object) -> dict[str, Any]:
    """The unions of the groups, with the options of the plugins that `data` names."""
    named = data.get("plugin") if isinstance(data, dict) else None
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    unions = dict(UNIONS)
    for name in names:
        if not re.fullmatch(r"[\w.-]{1,80}", name):
            raise UsageError(f"plugin={shown(name)} can't be a plugin", "type plugin=NAME")
        if name not in PLUGINS:
            raise UntypedPluginError(
                f"the configuration needs the plugin '{name}', and nothing is imported unasked",
                f"if you trust that package, type {shlex.join(plugin_words(names))}",
            )
        for group, option in PLUGINS[name]:
            unions[group] |= option
    return unions
