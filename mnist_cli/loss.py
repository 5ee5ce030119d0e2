"""The losses: each is the mean over the batch, a scalar of the logits' dtype.

On classification, targets are class indices (B,) int64 and e is `label_smoothing`: the target
distribution is q = (1 - e) * onehot + e / K over K classes (Szegedy et al., "Rethinking the
Inception Architecture", 2016, section 7), as in torch's cross_entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_cli.options import LossConfig, MseConfig, PluginLossConfig, SmoothedLossConfig
from mnist_cli.plugin_code import code_of_plugin

aten = torch.ops.aten

Loss = Callable[[Tensor, Tensor], Tensor]
LossGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def build_loss(config: LossConfig, task: Literal["classification", "regression"]) -> Loss:
    """A function of (outputs, targets).

    Outputs are (B, K) floats. Targets are (B,) int64 on classification, and like the outputs on
    regression, where the configuration admits `mse` and losses of plugins only.
    """
    if isinstance(config, PluginLossConfig):
        with code_of_plugin(config, "build"):
            return config.build(task)
    if isinstance(config, MseConfig):
        return squared_error if task == "regression" else squared_error_of_classes
    smoothed = {"cross_entropy": cross_entropy, "kl_div": kl_div, "bce": bce}
    return partial(smoothed[config.name], label_smoothing=config.label_smoothing)


def build_loss_gradient(config: LossConfig, loss: Loss) -> LossGradient:
    """A function as `loss`, that gives the gradient with respect to the outputs, (B, K), as well.

    Args:
        loss: what `build_loss` made of `config`.
    """
    is_exact = isinstance(config, SmoothedLossConfig) and config.label_smoothing == 0
    if config.name == "cross_entropy" and is_exact:
        return cross_entropy_gradient

    def by_autograd(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            value = loss(outputs.requires_grad_(), targets)
            (gradient,) = torch.autograd.grad(value, outputs)
        return value.detach(), gradient

    return by_autograd


def cross_entropy_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cross entropy and its gradient, by the functions that autograd would call."""
    mean, no_label = 1, -100  # as torch's cross_entropy has them
    log_probs = torch.log_softmax(logits, dim=1)
    loss, weight = aten.nll_loss_forward(log_probs, labels, None, mean, no_label)
    gradient = aten.nll_loss_backward(
        torch.ones_like(loss), log_probs, labels, None, mean, no_label, weight
    )
    return loss, aten._log_softmax_backward_data(gradient, log_probs, 1, logits.dtype)


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """mean_i -sum_k q_ik * log softmax(logits_i)_k.

    Source: torch.nn.functional.cross_entropy.
    """
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def kl_div(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """mean_i sum_k q_ik * (log q_ik - log softmax(logits_i)_k), where 0 * log 0 = 0.

    This is cross_entropy less the entropy of q, so equal to it without smoothing.
    Source: Kullback and Leibler, "On Information and Sufficiency", 1951.
    """
    targets = smooth(labels, logits, label_smoothing)
    # Not F.kl_div: vmap has no rule for it.
    divergence = torch.xlogy(targets, targets) - targets * F.log_softmax(logits, dim=1)
    return divergence.sum(dim=1).mean()


def bce(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """mean_ik -(q_ik * log s(logits_ik) + (1 - q_ik) * log(1 - s(logits_ik))), s the sigmoid.

    K independent yes-or-no questions; the mean is over the batch and the classes.
    Source: torch.nn.functional.binary_cross_entropy_with_logits.
    """
    return F.binary_cross_entropy_with_logits(logits, smooth(labels, logits, label_smoothing))


def squared_error_of_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """mean_ik (logits_ik - onehot_ik)^2, over the batch and the classes.

    The Brier score's form (Brier, 1950) on the logits themselves, without a softmax.
    """
    return F.mse_loss(logits, smooth(labels, logits, 0.0))


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """mean_ik (outputs_ik - targets_ik)^2; both (B, K), of the same shape."""
    return F.mse_loss(outputs, targets)


def smooth(labels: Tensor, logits: Tensor, label_smoothing: float) -> Tensor:
    """The target distribution q of the module's docstring, (B, K), of the logits' dtype."""
    num_classes = logits.shape[1]
    # Not F.one_hot: on the CPU it reads the labels back to check them, on every batch.
    classes = torch.arange(num_classes, device=labels.device)
    onehot = (labels[:, None] == classes).to(logits.dtype)
    if label_smoothing == 0:
        return onehot
    return onehot * (1 - label_smoothing) + label_smoothing / num_classes
