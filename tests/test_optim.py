from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from mnist_cli.optim import build_optimizer
from mnist_cli.options import (
    AdadeltaConfig,
    AdagradConfig,
    AdamConfig,
    OptimConfig,
    RmspropConfig,
    SgdConfig,
)
from mnist_cli.typed import option_names, parse

OPTIONS = Path(__file__).parents[1] / "conf" / "optim"
SGD = SgdConfig(name="sgd", lr=0.05, momentum=0.0, nesterov=False, weight_decay=0.0)
MOMENTUM = SgdConfig(name="momentum", lr=0.02, momentum=0.9, nesterov=False, weight_decay=0.0)
ADAM = AdamConfig(name="adam", lr=0.05, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
ADAMW = AdamConfig(name="adamw", lr=0.05, betas=(0.8, 0.999), eps=1e-6, weight_decay=0.1)
RMSPROP = RmspropConfig(
    name="rmsprop", lr=0.01, alpha=0.95, eps=1e-8, momentum=0.0, weight_decay=0.0
)
ADAGRAD = AdagradConfig(name="adagrad", lr=0.3, lr_decay=0.0, eps=1e-10, weight_decay=0.0)
ADADELTA = AdadeltaConfig(name="adadelta", lr=1.0, rho=0.9, eps=1e-6, weight_decay=0.0)
PLAIN: list[OptimConfig] = [SGD, MOMENTUM, ADAM, ADAMW, RMSPROP, ADAGRAD, ADADELTA]
CASES: list[OptimConfig] = [
    *PLAIN,
    dataclasses.replace(SGD, weight_decay=0.1),
    dataclasses.replace(MOMENTUM, nesterov=True, weight_decay=0.01),
    dataclasses.replace(ADAM, weight_decay=0.1),
    dataclasses.replace(RMSPROP, momentum=0.5, weight_decay=0.1),
    dataclasses.replace(ADAGRAD, lr_decay=0.05, weight_decay=0.1),
    dataclasses.replace(ADADELTA, lr=0.5, weight_decay=0.1),
]
FUSED = [config for config in CASES if config.name not in ("rmsprop", "adadelta")]


class Bowl(nn.Module):
    """A quadratic with its least value, 0, at `target`."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(4, 3, generator=generator, dtype=dtype))
        self.vector = nn.Parameter(torch.randn(5, generator=generator, dtype=dtype))

    def forward(self) -> Tensor:
        return ((self.matrix - 0.5).square().sum() * 2 + (self.vector + 0.5).square().sum()) / 2


def descend(config: OptimConfig, bowl: Bowl, steps: int) -> None:
    optimizer = build_optimizer(config, bowl)
    for _ in range(steps):
        optimizer.zero_grad()
        bowl().backward()
        optimizer.step()


def formula(config: OptimConfig, w: Any, gradient: Callable[[Any], Any]) -> Iterator[Any]:
    """The weights after each step, as the algorithms stand in torch's documentation."""
    first, second = np.zeros_like(w), np.zeros_like(w)
    t = 0
    while True:
        t += 1
        g = gradient(w)
        if config.name == "adamw":
            w = w - config.lr * config.weight_decay * w
        else:
            g = g + config.weight_decay * w
        match config:
            case SgdConfig(momentum=momentum):
                first = momentum * first + g
                w = w - config.lr * (g + momentum * first if config.nesterov else first)
            case AdamConfig(betas=(beta1, beta2)):
                first = beta1 * first + (1 - beta1) * g
                second = beta2 * second + (1 - beta2) * g**2
                root = np.sqrt(second / (1 - beta2**t)) + config.eps
                w = w - config.lr * first / (1 - beta1**t) / root
            case RmspropConfig(alpha=alpha):
                second = alpha * second + (1 - alpha) * g**2
                first = config.momentum * first + g / (np.sqrt(second) + config.eps)
                w = w - config.lr * first
            case AdagradConfig():
                second = second + g**2
                rate = config.lr / (1 + (t - 1) * config.lr_decay)
                w = w - rate * g / (np.sqrt(second) + config.eps)
            case AdadeltaConfig(rho=rho):
                second = rho * second + (1 - rho) * g**2
                change = np.sqrt(first + config.eps) / np.sqrt(second + config.eps) * g
                first = rho * first + (1 - rho) * change**2
                w = w - config.lr * change
        yield w


@pytest.mark.parametrize("config", CASES, ids=lambda config: config.name)
def test_20_steps_equal_the_formula(config: OptimConfig) -> None:
    bowl = Bowl()
    optimizer = build_optimizer(config, bowl)
    matrices = formula(config, bowl.matrix.detach().numpy().copy(), lambda w: 2 * (w - 0.5))
    vectors = formula(config, bowl.vector.detach().numpy().copy(), lambda w: w + 0.5)
    for _ in range(20):
        optimizer.zero_grad()
        bowl().backward()
        optimizer.step()
        np.testing.assert_allclose(bowl.matrix.detach().numpy(), next(matrices), rtol=1e-10)
        np.testing.assert_allclose(bowl.vector.detach().numpy(), next(vectors), rtol=1e-10)


@pytest.mark.parametrize("config", FUSED, ids=lambda config: config.name)
def test_the_fused_form_equals_the_plain_loop_in_float32(config: OptimConfig) -> None:
    fast, plain = Bowl(torch.float32), Bowl(torch.float32)
    optimizer = build_optimizer(config, plain)
    for group in optimizer.param_groups:
        assert group["fused"]
        group["foreach"] = group["fused"] = False
    for _ in range(20):
        optimizer.zero_grad()
        plain().backward()
        optimizer.step()
    descend(config, fast, 20)
    torch.testing.assert_close(fast.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", PLAIN, ids=lambda config: config.name)
def test_same_steps_same_bits(config: OptimConfig) -> None:
    first, second = Bowl(torch.float32), Bowl(torch.float32)
    descend(config, first, 30)
    descend(config, second, 30)
    assert torch.equal(first.matrix, second.matrix)
    assert torch.equal(first.vector, second.vector)


@pytest.mark.parametrize("config", PLAIN, ids=lambda config: config.name)
def test_finds_the_bottom_of_a_bowl(config: OptimConfig) -> None:
    if isinstance(config, AdamConfig):  # decay would pull the bottom towards 0
        config = dataclasses.replace(config, weight_decay=0.0)
    if isinstance(config, AdadeltaConfig):  # the first steps are of the size of sqrt(eps)
        config = dataclasses.replace(config, eps=1e-2)
    bowl = Bowl()
    before = bowl().item()
    descend(config, bowl, 500)
    assert bowl().item() < 1e-2 * before


@pytest.mark.parametrize("config", [SGD, MOMENTUM, ADAM, ADAMW, ADAGRAD], ids=lambda c: c.name)
def test_fused_where_torch_has_it(config: OptimConfig) -> None:
    assert all(group["fused"] for group in build_optimizer(config, Bowl()).param_groups)


def option_files() -> dict[str, Path]:
    return {path.stem: path for path in sorted(OPTIONS.glob("*.yaml"))}


def test_every_name_has_an_option_file() -> None:
    names = {name for kind in get_args(OptimConfig) for name in option_names(kind)}
    assert set(option_files()) == names


@pytest.mark.parametrize("name", option_files())
def test_every_option_builds_and_learns(name: str) -> None:
    @dataclasses.dataclass(frozen=True)
    class Holder:
        optim: OptimConfig

    data = yaml.load(option_files()[name].read_text(), Loader=yaml.SafeLoader)
    config = parse(Holder, {"optim": data}).optim
    assert config.name == name
    bowl = Bowl(torch.float32)
    before = bowl().item()
    descend(config, bowl, 50)
    assert bowl().item() < before


@pytest.mark.parametrize("config", [SGD, MOMENTUM, ADAM, ADAMW, ADAGRAD], ids=lambda c: c.name)
def test_once_there_is_state_the_kernel_is_all_of_a_step(
    config: OptimConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    bowl = Bowl()
    optimizer = build_optimizer(config, bowl)
    bowl().backward()
    optimizer.step()
    monkeypatch.setattr(type(optimizer), "_init_group", None)
    before = bowl().item()
    optimizer.step()
    assert bowl().item() < before


@pytest.mark.parametrize("config", CASES, ids=str)
def test_a_parameter_without_gradient_stays(config: OptimConfig) -> None:
    bowl = Bowl()
    optimizer = build_optimizer(config, bowl)
    vector = bowl.vector.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        bowl.matrix.square().sum().backward()
        matrix = bowl.matrix.detach().clone()
        optimizer.step()
        assert not torch.equal(bowl.matrix, matrix)
    assert torch.equal(bowl.vector, vector)


@pytest.mark.parametrize("config", [SGD, MOMENTUM, ADAM, ADAGRAD], ids=lambda c: c.name)
def test_a_gradient_scaler_is_minded(config: OptimConfig) -> None:
    """It skips a step whose gradients have overflowed, and takes its factor out of the others."""
    plain, scaled = Bowl(torch.float32), Bowl(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    of_plain, of_scaled = build_optimizer(config, plain), build_optimizer(config, scaled)
    for overflows in (False, False, True, False):
        of_scaled.zero_grad()
        scaler.scale(scaled()).backward()
        if overflows:
            assert scaled.vector.grad is not None
            scaled.vector.grad[0] = torch.inf
        scaler.step(of_scaled)
        scaler.update()
        if not overflows:
            of_plain.zero_grad()
            plain().backward()
            of_plain.step()
    torch.testing.assert_close(scaled.state_dict(), plain.state_dict())


@pytest.mark.parametrize("config", CASES, ids=str)
def test_without_guards_it_is_the_same_optimizer(config: OptimConfig) -> None:
    ours, theirs = Bowl(torch.float32), Bowl(torch.float32)
    optimizer = build_optimizer(config, ours)
    kind = type(optimizer).__mro__[1]
    assert kind.__module__.startswith("torch.optim")
    known = inspect.signature(kind).parameters
    arguments = {name: value for name, value in optimizer.defaults.items() if name in known}
    reference = kind(theirs.parameters(), **arguments)
    for _ in range(5):
        for bowl, one in ((ours, optimizer), (theirs, reference)):
            one.zero_grad()
            bowl().backward()
            one.step()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
