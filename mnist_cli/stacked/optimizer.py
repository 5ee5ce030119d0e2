"""The optimizers of `mnist_cli.optim` for many learners at once, each with constants of its own.

The formulas are torch.optim's, on stacked tensors (K, ...). The state is kept under torch's names
in each learner's own optimizer, as views of the stacked one: there it can be saved from and gone on
with. On small models this takes a third of the time of one torch.optim optimizer with K parameter
groups, which itself takes half of that of K optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mnist_cli import optim
from mnist_cli.options import OptimConfig

Tensors = dict[str, Tensor]


class Optimizer:
    """K optimizers of one kind.

    Args:
        configs: of the K optimizers; their names must be the same.
        optimizers: as build_optimizer made them, with or without state, all after as many steps.
        parameters: each stacked parameter (K, ...), and the K optimizers' own views of it.
    """

    def __init__(
        self,
        configs: Sequence[OptimConfig],
        optimizers: Sequence[torch.optim.Optimizer],
        parameters: Sequence[tuple[Tensor, Sequence[nn.Parameter]]],
    ) -> None:
        self._rates, self._update = _RATES[configs[0].name], _UPDATES[configs[0].name]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._constants = _constants(groups)
        names = [optim.state_names(config) for config in configs]
        self._weights = [whole for whole, _ in parameters]
        states = [_stacked_state(names, optimizers, *each) for each in parameters]
        self._counts = [state.pop("step") for state in states if "step" in state]
        self._num_steps = float(self._counts[0][0]) if self._counts else 0.0
        self._flat = [
            (whole.detach().flatten(1), {name: own.flatten(1) for name, own in state.items()})
            for whole, state in zip(self._weights, states, strict=True)
        ]
        self._ahead: Iterator[Tensors] = iter(())

    def plan(self, lrs: Tensor) -> None:
        """Give the learning rates of the next steps, (steps, K) float64.

        The numbers of many steps at once take hardly longer than those of one.
        """
        counts = self._num_steps + torch.arange(1, len(lrs) + 1, dtype=torch.float64)
        rates = self._rates(self._constants | {"lr": lrs}, counts[:, None])
        like = self._weights[0]
        columns = [rate.expand_as(lrs).to(like)[:, :, None].unbind() for rate in rates.values()]
        self._ahead = (dict(zip(rates, row, strict=True)) for row in zip(*columns, strict=True))

    @torch.no_grad()
    def step(self) -> None:
        """Take the next of the planned steps, with the gradients of the stacked parameters."""
        self._num_steps += 1
        rates = next(self._ahead)
        for count in self._counts:
            count += 1
        for weights, (flat, state) in zip(self._weights, self._flat, strict=True):
            assert weights.grad is not None
            self._update(flat, weights.grad.flatten(1), state, rates)


def _constants(groups: Sequence[dict[str, Any]]) -> Tensors:
    """Every number that the groups hold, as (K,) float64; beta1 and beta2 for `betas`."""
    numbers: dict[str, list[float]] = {}
    for group in groups:
        found = dict(zip(("beta1", "beta2"), group.get("betas", ()), strict=False)) | group
        for name, value in found.items():
            if isinstance(value, float | int):
                numbers.setdefault(name, []).append(float(value))
    return {name: torch.tensor(own, dtype=torch.float64) for name, own in numbers.items()}


def _stacked_state(
    names: Sequence[Sequence[str]],
    optimizers: Sequence[torch.optim.Optimizer],
    whole: Tensor,
    parts: Sequence[nn.Parameter],
) -> Tensors:
    """The state of one parameter of K optimizers; each has its part of it from here on."""
    stacked: Tensors = {}
    for name in sorted({name for own in names for name in own}):
        like = whole.detach() if name != "step" else whole.detach().flatten(1)[:, 0]
        stacked[name] = torch.zeros_like(like, memory_format=torch.contiguous_format)
        for own, optimizer, part, place in zip(
            names, optimizers, parts, stacked[name], strict=True
        ):
            state = optimizer.state[part]
            if state.get(name) is not None:
                place.copy_(torch.as_tensor(state[name]))
            if name in own:
                state[name] = place
    return stacked


# --- the formulas --------------------------------------------------------------------------------

# Of each kind two functions: the numbers of some steps, (K,) or (steps, K) float64, out of the
# constants (K,), `lr` (steps, K) and the counts of the steps from 1, (steps, 1); and one step on
# tensors (K, n), with its numbers as (K, 1) of their type. It overwrites the gradient, since fresh
# memory for a large tensor costs more than a pass over it.


def _sgd_rates(c: Tensors, count: Tensor) -> Tensors:
    rates = {"momentum": c["momentum"], "rate": -c["lr"]} | _decay(c)
    if c["nesterov"].any():  # then momentum * buffer + gradient instead of the buffer
        rates["share"] = torch.where(c["nesterov"] > 0, c["momentum"], 1.0)
        rates["ahead"] = c["nesterov"]
    return rates


def _sgd(weights: Tensor, grad: Tensor, state: Tensors, c: Tensors) -> None:
    grad = _decayed(grad, weights, c)
    change = grad
    if "momentum_buffer" in state:
        change = state["momentum_buffer"].mul_(c["momentum"]).add_(grad)
    if "ahead" in c:
        change = (change * c["share"]).addcmul_(grad, c["ahead"])
    weights.addcmul_(change, c["rate"])


def _adam_rates(c: Tensors, count: Tensor) -> Tensors:
    # torch divides the root by `correction`; here lr and eps are multiplied by it, which saves a
    # pass over all weights.
    correction = (1 - c["beta2"] ** count).sqrt()
    return _decay(c) | {
        "first": 1 - c["beta1"],
        "second": 1 - c["beta2"],
        "eps": c["eps"] * correction,
        "rate": -c["lr"] * correction / (1 - c["beta1"] ** count),
    }


def _adam(weights: Tensor, grad: Tensor, state: Tensors, c: Tensors) -> None:
    grad = _decayed(grad, weights, c)
    mean = state["exp_avg"].lerp_(grad, c["first"])
    square = state["exp_avg_sq"].lerp_(grad.square_(), c["second"])
    root = torch.sqrt(square, out=grad).add_(c["eps"])
    weights.addcmul_(torch.div(mean, root, out=root), c["rate"])


def _adamw_rates(c: Tensors, count: Tensor) -> Tensors:
    without_decay = c | {"weight_decay": torch.zeros_like(c["lr"])}
    return _adam_rates(without_decay, count) | {"keep": 1 - c["lr"] * c["weight_decay"]}


def _adamw(weights: Tensor, grad: Tensor, state: Tensors, c: Tensors) -> None:
    weights.mul_(c["keep"])
    _adam(weights, grad, state, c)


def _rmsprop_rates(c: Tensors, count: Tensor) -> Tensors:
    numbers = {"momentum": c["momentum"], "eps": c["eps"], "rate": -c["lr"]}
    return _decay(c) | numbers | {"new": 1 - c["alpha"]}


def _rmsprop(weights: Tensor, grad: Tensor, state: Tensors, c: Tensors) -> None:
    grad = _decayed(grad, weights, c)
    spare = grad.square()
    square = state["square_avg"].lerp_(spare, c["new"])
    change = grad.div_(torch.sqrt(square, out=spare).add_(c["eps"]))
    if "momentum_buffer" in state:
        change = state["momentum_buffer"].mul_(c["momentum"]).add_(change)
    weights.addcmul_(change, c["rate"])


def _adagrad_rates(c: Tensors, count: Tensor) -> Tensors:
    rate = -c["lr"] / (1 + (count - 1) * c["lr_decay"])
    return _decay(c) | {"eps": c["eps"], "rate": rate}


def _adagrad(weights: Tensor, grad: Tensor, state: Tensors, c: Tensors) -> None:
    grad = _decayed(grad, weights, c)
    root = state["sum"].addcmul_(grad, grad).sqrt().add_(c["eps"])
    weights.addcmul_(grad.div_(root), c["rate"])


def _adadelta_rates(c: Tensors, count: Tensor) -> Tensors:
    return _decay(c) | {"eps": c["eps"], "rate": -c["lr"], "new": 1 - c["rho"]}


def _adadelta(weights: Tensor, grad: Tensor, state: Tensors, c: Tensors) -> None:
    grad = _decayed(grad, weights, c)
    spare = grad.square()
    square = state["square_avg"].lerp_(spare, c["new"])
    change = grad.div_(torch.add(square, c["eps"], out=spare).sqrt_())
    change.mul_(torch.add(state["acc_delta"], c["eps"], out=spare).sqrt_())
    state["acc_delta"].lerp_(torch.square(change, out=spare), c["new"])
    weights.addcmul_(change, c["rate"])


def _decay(c: Tensors) -> Tensors:
    """The L2 penalty, where there is one: without, a pass over all weights is saved."""
    return {"decay": c["weight_decay"]} if c["weight_decay"].any() else {}


def _decayed(grad: Tensor, weights: Tensor, c: Tensors) -> Tensor:
    return grad.addcmul_(weights, c["decay"]) if "decay" in c else grad


_RATES = {
    "sgd": _sgd_rates,
    "momentum": _sgd_rates,
    "adam": _adam_rates,
    "adamw": _adamw_rates,
    "rmsprop": _rmsprop_rates,
    "adagrad": _adagrad_rates,
    "adadelta": _adadelta_rates,
}
_UPDATES = {
    "sgd": _sgd,
    "momentum": _sgd,
    "adam": _adam,
    "adamw": _adamw,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
    "adadelta": _adadelta,
}
