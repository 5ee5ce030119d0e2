"""The optimizers: torch.optim's own, in the fastest form for the device.

The fused form is one kernel for all of a step. On the CPU it reads weights, gradients and state
in the order of their memory: all three must be laid out alike, or it mixes them up without a word.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mnist_cli.errors import UsageError
from mnist_cli.options import (
    AdadeltaConfig,
    AdagradConfig,
    AdamConfig,
    OptimConfig,
    PluginOptimConfig,
    RmspropConfig,
    SgdConfig,
)
from mnist_cli.plugin_code import code_of_plugin


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of all parameters of `model`, which must be on their device already.

    Sources: the papers named in conf/optim; the formulas as in torch's documentation.

    Raises:
        UsageError: a plugin's optimizer keeps what a checkpoint can't hold.
    """
    params = list(model.parameters())
    match config:
        case SgdConfig():
            return _unguarded(torch.optim.SGD)(
                params,
                lr=config.lr,
                momentum=config.momentum,
                nesterov=config.nesterov,
                weight_decay=config.weight_decay,
                fused=True,
            )
        case AdamConfig():
            kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
            return _unguarded(kind)(
                params,
                lr=config.lr,
                betas=config.betas,
                eps=config.eps,
                weight_decay=config.weight_decay,
                fused=True,
            )
        case AdagradConfig():
            return _unguarded(torch.optim.Adagrad)(
                params,
                lr=config.lr,
                lr_decay=config.lr_decay,
                eps=config.eps,
                weight_decay=config.weight_decay,
                # Its CUDA kernel is younger than the oldest torch that we run on.
                fused=params[0].device.type == "cpu" or None,
            )
        # torch has no fused form of the other two. Left to itself it takes foreach on CUDA and a
        # plain loop on the CPU, where foreach was measured to gain nothing.
        case RmspropConfig():
            return _unguarded(torch.optim.RMSprop)(
                params,
                lr=config.lr,
                alpha=config.alpha,
                eps=config.eps,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
            )
        case AdadeltaConfig():
            return _unguarded(torch.optim.Adadelta)(
                params,
                lr=config.lr,
                rho=config.rho,
                eps=config.eps,
                weight_decay=config.weight_decay,
            )
        case PluginOptimConfig():
            for name, shape in _state_after_a_step(config).items():
                if shape != (() if name == "step" else _TRIAL_SHAPE):
                    raise UsageError(
                        f"optim={config.name} keeps '{name}' in another shape than its parameter's",
                        "take another optimizer: a checkpoint can't hold this one's state",
                    )
            with code_of_plugin(config, "build"):
                return config.build(params)


@functools.cache
def _unguarded(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """`kind` without its guards against torch.compile, which never sees our optimizers.

    The guards import all of the compiler, more than a second at the start of a run, and take up
    to half of a small step. `inspect.unwrap` gives the methods as torch's source has them.
    """
    names = ("add_param_group", "load_state_dict", "state_dict")
    methods: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    step = _straight(torch.no_grad()(inspect.unwrap(kind.step)), _KERNELS.get(kind))
    step.hooked = True  # or torch wraps it once more, for its profiler
    return type(kind.__name__, (kind,), {"step": step, **methods})


# --- a step --------------------------------------------------------------------------------------

Kernel = Callable[[dict[str, Any], list[Tensor], list[dict[str, Tensor]]], None]


def _straight(torch_step: Any, kernel: Kernel | None) -> Any:
    """The step of an optimizer: on the CPU straight to its fused kernel, where it has one.

    torch's own way there is an eighth of a perceptron's step. It is still taken where there is more
    to do: to make the state, to mind a gradient scaler, a parameter without gradient or a sparse
    one. The bits are the same.
    """
    if kernel is None:
        return torch_step

    def step(self: torch.optim.Optimizer) -> None:
        (group,) = self.param_groups
        parameters = group["params"]
        grads = [parameter.grad for parameter in parameters]
        states = [self.state.get(parameter, {}) for parameter in parameters]
        has_state = all(states) or group.get("momentum") == 0  # then SGD keeps none
        if (
            group["fused"]
            and has_state
            and parameters[0].device.type == "cpu"
            and all(grad is not None and not grad.is_sparse for grad in grads)
            and getattr(self, "found_inf", None) is None
        ):
            with torch.no_grad():
                kernel(group, grads, states)
        else:
            torch_step(self)

    return step


def _sgd(group: dict[str, Any], grads: list[Tensor], states: list[dict[str, Tensor]]) -> None:
    torch._fused_sgd_(
        group["params"],
        grads,
        [state["momentum_buffer"] for state in states] if group["momentum"] else [],
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        is_first_step=False,
    )


def _adam(group: dict[str, Any], grads: list[Tensor], states: list[dict[str, Tensor]]) -> None:
    steps = [state["step"] for state in states]
    torch._foreach_add_(steps, 1)
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    beta1, beta2 = group["betas"]
    kernel(
        group["params"],
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        steps,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=group["maximize"],
    )


def _adagrad(group: dict[str, Any], grads: list[Tensor], states: list[dict[str, Tensor]]) -> None:
    steps = [state["step"] for state in states]
    torch._foreach_add_(steps, 1)
    torch._fused_adagrad_(
        group["params"],
        grads,
        [state["sum"] for state in states],
        steps,
        lr=group["lr"],
        lr_decay=group["lr_decay"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )


_KERNELS: dict[type[torch.optim.Optimizer], Kernel] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.Adagrad: _adagrad,
}


# --- state ---------------------------------------------------------------------------------------

_STATE = {
    "sgd": (),
    "momentum": (),
    "adam": ("step", "exp_avg", "exp_avg_sq"),
    "adamw": ("step", "exp_avg", "exp_avg_sq"),
    "rmsprop": ("step", "square_avg"),
    "adagrad": ("step", "sum"),
    "adadelta": ("step", "square_avg", "acc_delta"),
}


def state_names(config: OptimConfig) -> tuple[str, ...]:
    """What the optimizer keeps of each parameter once a step is taken, as torch calls it.

    Fused optimizers walk through memory: state of another name or shape must never reach them.
    """
    if isinstance(config, PluginOptimConfig):
        return tuple(_state_after_a_step(config))
    momentum = getattr(config, "momentum", 0)
    return _STATE[config.name] + (("momentum_buffer",) if momentum else ())


_TRIAL_SHAPE = (2, 3)


def _state_after_a_step(config: PluginOptimConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of what a plugin's optimizer keeps of a parameter of `_TRIAL_SHAPE`."""
    weight = nn.Parameter(torch.zeros(_TRIAL_SHAPE))
    weight.grad = torch.zeros_like(weight)
    with code_of_plugin(config, "build"):
        optimizer = config.build([weight])
        optimizer.step()
        state = optimizer.state[weight].items()
    return {name: tuple(torch.as_tensor(kept).shape) for name, kept in state if kept is not None}


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter>.<state>`: of the parameter's shape, or scalars."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"{name}.{key}"] = torch.as_tensor(value, dtype=torch.float32)
    return tensors


def restore_state(
    optimizer: torch.optim.Optimizer,
    config: OptimConfig,
    model: nn.Module,
    tensors: dict[str, Tensor],
) -> None:
    """Put what `state_tensors` gave back into a newly built optimizer of `config`.

    It may have momentum where the one before had none, which starts at 0 then, or the reverse.
    """
    names = state_names(config)
    state: dict[int, dict[str, Tensor]] = {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        own = {key: tensors[f"{name}.{key}"] for key in names if f"{name}.{key}" in tensors}
        if own or (names and isinstance(config, SgdConfig)):  # whose momentum may just have come
            missing = {key: torch.zeros_like(parameter) for key in names if key not in own}
            state[index] = own | missing
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
