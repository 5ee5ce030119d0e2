"""Backpropagation as it is written out, beside autograd's: every bit is the same."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Program
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mnist_cli import train, train_step
from mnist_cli.checkpoint import load
from mnist_cli.config import train_config
from mnist_cli.loss import Loss, build_loss, build_loss_gradient
from mnist_cli.model.backprop import Backprop
from mnist_cli.model.linear import Linear
from mnist_cli.model.mlp import Mlp
from mnist_cli.options import (
    LossConfig,
    MseConfig,
    PluginLossConfig,
    PluginModelConfig,
    SmoothedLossConfig,
)

LOSSES: list[LossConfig] = [
    SmoothedLossConfig(name="cross_entropy", label_smoothing=0.0),
    SmoothedLossConfig(name="cross_entropy", label_smoothing=0.1),
    SmoothedLossConfig(name="kl_div", label_smoothing=0.1),
    SmoothedLossConfig(name="bce", label_smoothing=0.0),
    MseConfig(name="mse"),
]
# A width of 1 and a batch of 1 make torch transpose a product, which costs a last bit.
MODELS = st.one_of(
    st.none(), st.tuples(st.lists(st.integers(2, 40), max_size=3), st.sampled_from([0.0, 0.2, 0.9]))
)


def model_of(hidden_and_dropout: tuple[list[int], float] | None, num_outputs: int) -> Linear | Mlp:
    if hidden_and_dropout is None:
        return Linear((1, 5, 7), num_outputs)
    hidden, dropout = hidden_and_dropout
    return Mlp(tuple(hidden), dropout, (1, 5, 7), num_outputs)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@given(
    kind=MODELS,
    config=st.sampled_from(LOSSES),
    is_regression=st.booleans(),
    num_rows=st.integers(1, 70),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_a_batch_has_the_loss_and_the_gradients_of_autograd(
    kind: tuple[list[int], float] | None,
    config: LossConfig,
    is_regression: bool,
    num_rows: int,
    seed: int,
) -> None:
    if is_regression:
        config = MseConfig(name="mse")
    torch.manual_seed(seed)
    model = model_of(kind, num_outputs=1 if is_regression else 6)
    inputs = torch.randn(num_rows, 1, 5, 7)
    targets = torch.randn(num_rows, 1) if is_regression else torch.randint(6, (num_rows,))
    loss = build_loss(config, "regression" if is_regression else "classification")

    torch.manual_seed(seed)
    expected = loss(model(inputs), targets)
    expected.backward()
    wanted = [gradient.clone() for gradient in gradients(model)]
    torch.manual_seed(seed)
    found = Backprop(model, build_loss_gradient(config, loss))(inputs, targets)

    assert not found.requires_grad
    assert torch.equal(found, expected)
    assert all(map(torch.equal, gradients(model), wanted))
    assert len(gradients(model)) == len(wanted) == len(list(model.parameters()))


def test_a_loss_that_is_not_finite_is_given_as_it_is() -> None:
    model = Linear((3,), 2)
    backprop = Backprop(
        model, build_loss_gradient(LOSSES[0], build_loss(LOSSES[0], "classification"))
    )
    loss = backprop(torch.full((4, 3), math.inf), torch.tensor([0, 1, 1, 0]))
    assert math.isnan(loss.item())


WORDS = ("dataset=digits", "epochs=3", "--quiet", "device=cpu")


@pytest.mark.parametrize(
    "words",
    [
        ("model=linear", "optim=momentum", "schedule=cosine"),
        ("model=mlp", "model.hidden=[32,16]", "batch_size=50", "early_stop.patience=1"),
        ("model=mlp", "model.hidden=[24]", "loss=bce", "optim=rmsprop", "grad_clip=0.1"),
    ],
    ids=" ".join,
)
def test_a_run_has_the_bits_of_one_with_autograd(
    mnist_cli: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: tuple[str, ...]
) -> None:
    asked = []
    backprop = Backprop.__call__

    def noted(self: Backprop, inputs: Tensor, targets: Tensor) -> Tensor:
        asked.append(len(targets))
        return backprop(self, inputs, targets)

    monkeypatch.setattr(Backprop, "__call__", noted)
    assert mnist_cli("train", *WORDS, *words, f"out={tmp_path}/by_hand").code == 0
    assert asked
    asked.clear()
    monkeypatch.setattr(train, "_backprop", lambda *_: None)
    assert mnist_cli("train", *WORDS, *words, f"out={tmp_path}/autograd").code == 0
    assert not asked
    ours, theirs = (load(tmp_path / run / "last.safetensors") for run in ("by_hand", "autograd"))
    for mine, other in ((ours.model, theirs.model), (ours.optim, theirs.optim)):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert ours.progress.best == theirs.progress.best


@pytest.mark.parametrize("word", ["model=cnn", "grad_accum=2", "compile=true"])
def test_what_is_not_written_out_is_left_to_autograd(
    mnist_cli: Program, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    found = []
    monkeypatch.setattr(torch, "compile", lambda model: model)
    take_step = train_step.take_step
    monkeypatch.setattr(
        train_step,
        "take_step",
        lambda job, *rest: found.append(job.backprop) or take_step(job, *rest),
    )
    words = ("model=mlp", "dataset=digits", "epochs=1", "device=cpu", "--quiet", word)
    assert mnist_cli("train", *words).code == 0
    assert set(found) == {None}


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignModelConfig(PluginModelConfig):
    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        return Mlp((4,), 0.0, input_shape, num_outputs).requires_grad_(False)


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignLossConfig(PluginLossConfig):
    def build(self, task: str) -> Loss:
        return lambda outputs, targets: outputs.clamp_(0, 1).mean()


def test_what_plugins_bring_is_left_to_autograd(mnist_cli: Program, tmp_path: Path) -> None:
    """They may freeze layers of our models, hook into them, and change outputs in place."""
    assert mnist_cli("train", *WORDS, "model=mlp", "epochs=1", f"out={tmp_path}/run").code == 0
    config = train_config(yaml.safe_load((tmp_path / "run/config.yaml").read_text()))
    cpu, loss = torch.device("cpu"), build_loss(config.loss, "classification")
    model = Mlp((4,), 0.0, (1, 8, 8), 10)
    assert train._backprop(config, cpu, model, loss) is not None
    for foreign in (
        dataclasses.replace(config, model=ForeignModelConfig(name="foreign")),
        dataclasses.replace(config, loss=ForeignLossConfig(name="foreign")),
    ):
        assert train._backprop(foreign, cpu, model, loss) is None
