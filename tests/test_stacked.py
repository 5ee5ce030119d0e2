"""Training together gives each run what it has alone."""

from __future__ import annotations

import csv
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import hydra
import pytest
import torch
from conftest import Program
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor

from mnist_cli import checkpoint, compose, loop, runtime, train
from mnist_cli.config import TrainConfig, train_config
from mnist_cli.errors import DivergedError
from mnist_cli.learner import Learner
from mnist_cli.line import parse_line
from mnist_cli.loss import build_loss
from mnist_cli.model.linear import Linear
from mnist_cli.model.mlp import Mlp
from mnist_cli.optim import build_optimizer, state_tensors
from mnist_cli.options import (
    AdadeltaConfig,
    AdagradConfig,
    AdamConfig,
    LossConfig,
    MseConfig,
    OptimConfig,
    RmspropConfig,
    SgdConfig,
    SmoothedLossConfig,
)
from mnist_cli.signals import SignalWatch
from mnist_cli.stacked import Member, rounds, stack
from mnist_cli.stacked.loss import build_losses
from mnist_cli.stacked.network import Network
from mnist_cli.stacked.optimizer import _RATES, _UPDATES, Optimizer
from mnist_cli.sweep.group import OPTIMS, Group, groups

pytestmark = pytest.mark.usefixtures("empty_cwd")

Run = Callable[..., Path]
MLP = ("dataset=digits", "model=mlp", "model.hidden=[16]", "epochs=5")
LINEAR = ("dataset=digits", "model=linear", "epochs=5")
LINE = (
    "dataset=linear", "dataset.num_samples=200", "dataset.num_features=3", "dataset.noise=0.1",
    "dataset.val_fraction=0.2", "model=linear", "loss=mse", "optim=sgd", "batch_size=16",
    "epochs=12",
)  # fmt: skip


# --- the optimizers ------------------------------------------------------------------------------

LR = st.floats(1e-4, 0.1)
SHARE = st.sampled_from([0.0, 0.5, 0.9, 0.99])
DECAY = st.sampled_from([0.0, 0.01, 0.1])
EPS = st.sampled_from([1e-8, 1e-4])
CONFIGS: dict[str, st.SearchStrategy[OptimConfig]] = {
    name: st.builds(
        SgdConfig, name=st.just(name), lr=LR, momentum=momentum, nesterov=nesterov,
        weight_decay=DECAY,
    )
    for name, momentum, nesterov in [
        ("sgd", SHARE, st.just(False)),
        ("momentum", st.sampled_from([0.5, 0.9]), st.booleans()),
    ]
}  # fmt: skip
CONFIGS |= {
    name: st.builds(
        AdamConfig, name=st.just(name), lr=LR, betas=st.tuples(SHARE, SHARE), eps=EPS,
        weight_decay=DECAY,
    )
    for name in ("adam", "adamw")
}  # fmt: skip
CONFIGS["rmsprop"] = st.builds(
    RmspropConfig, name=st.just("rmsprop"), lr=LR, alpha=SHARE, eps=EPS, momentum=SHARE,
    weight_decay=DECAY,
)  # fmt: skip
CONFIGS["adagrad"] = st.builds(
    AdagradConfig, name=st.just("adagrad"), lr=LR, lr_decay=DECAY, eps=EPS, weight_decay=DECAY
)
CONFIGS["adadelta"] = st.builds(
    AdadeltaConfig, name=st.just("adadelta"), lr=LR, rho=SHARE, eps=EPS, weight_decay=DECAY
)


def shrunk(step: int) -> float:
    """The share of the learning rate that is left at `step`."""
    return math.prod(1 - past / 100 for past in range(step + 1))


def models_like(reference: Sequence[Mlp]) -> list[Mlp]:
    dtype = next(reference[0].parameters()).dtype
    models = [Mlp((4,), 0.0, (3,), 2).to(dtype) for _ in reference]
    for model, other in zip(models, reference, strict=True):
        model.load_state_dict(other.state_dict())
    return models


@pytest.mark.parametrize("name", CONFIGS)
@given(data=st.data())
@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_every_optimizer_steps_as_torch_does(name: str, data: st.DataObject) -> None:
    configs = data.draw(st.lists(CONFIGS[name], min_size=3, max_size=3))
    torch.manual_seed(0)
    # In double precision: what rounding does to a gradient near zero, Adam makes a whole step of.
    alone = [Mlp((4,), 0.0, (3,), 2).double() for _ in configs]
    together = models_like(alone)
    each = [build_optimizer(c, m) for c, m in zip(configs, alone, strict=True)]
    own = [build_optimizer(c, m) for c, m in zip(configs, together, strict=True)]
    generator = torch.Generator().manual_seed(0)
    for start in (0, 25):  # the second half goes on with the state that the first one left
        whole = [tensor for layer in Network(together, 1).layers for tensor in layer]
        parts = list(zip(*(model.parameters() for model in together), strict=True))
        optimizer = Optimizer(configs, own, list(zip(whole, parts, strict=True)))
        optimizer.plan(
            torch.tensor(
                [[c.lr * shrunk(step) for c in configs] for step in range(start, start + 25)],
                dtype=torch.float64,
            )
        )
        for step in range(start, start + 25):
            for index, parameters in enumerate(zip(*(m.parameters() for m in alone), strict=True)):
                whole[index].grad = torch.randn(
                    whole[index].shape, generator=generator, dtype=torch.float64
                )
                for parameter, grad in zip(parameters, whole[index].grad.clone(), strict=True):
                    parameter.grad = grad
            for one in each:
                one.param_groups[0]["lr"] *= 1 - step / 100
                one.step()
            optimizer.step()
    for before, after, model, other in zip(each, own, alone, together, strict=True):
        torch.testing.assert_close(
            dict(other.state_dict()), dict(model.state_dict()), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            state_tensors(after, other), state_tensors(before, model), rtol=1e-4, atol=1e-5
        )


# --- the losses ----------------------------------------------------------------------------------


def smoothed(name: Literal["cross_entropy", "kl_div", "bce"], e: float) -> LossConfig:
    return SmoothedLossConfig(name=name, label_smoothing=e)


@pytest.mark.parametrize("smoothings", [(0.0, 0.0, 0.0), (0.2, 0.2, 0.2), (0.0, 0.1, 0.5)])
@pytest.mark.parametrize("name", ["cross_entropy", "kl_div", "bce", "mse"])
def test_every_loss_is_that_of_each_alone(name: Any, smoothings: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, 6, 4, generator=generator, requires_grad=True)
    labels = torch.randint(4, (3, 6), generator=generator)
    configs = [MseConfig(name="mse") if name == "mse" else smoothed(name, e) for e in smoothings]
    losses = build_losses(configs, "classification", outputs.device)(outputs.mT, labels)
    [grads] = torch.autograd.grad(losses.sum(), outputs)
    for k, config in enumerate(configs):
        own = outputs[k].detach().requires_grad_()
        loss = build_loss(config, "classification")(own, labels[k])
        torch.testing.assert_close(losses[k], loss)
        torch.testing.assert_close(grads[k], torch.autograd.grad(loss, own)[0])


def test_the_loss_of_numbers_is_that_of_each_alone() -> None:
    outputs, targets = torch.randn(3, 6, 1), torch.randn(3, 6, 1)
    config = MseConfig(name="mse")
    losses = build_losses([config] * 3, "regression", outputs.device)(outputs.mT, targets)
    for k, loss in enumerate(losses):
        torch.testing.assert_close(loss, build_loss(config, "regression")(outputs[k], targets[k]))


# --- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_lanes", [1, 2, 4])
@pytest.mark.parametrize("kind", ["linear", "mlp", "deep"])
def test_gradients_are_those_of_vmap(kind: str, num_lanes: int) -> None:
    hidden = {"linear": None, "mlp": (5,), "deep": (5, 6)}[kind]
    models = [Linear((3,), 2) if hidden is None else Mlp(hidden, 0.0, (3,), 2) for _ in range(4)]
    weights, _ = torch.func.stack_module_state(models)
    inputs = torch.randn(num_lanes, 7, 3)

    def loss(own: dict[str, Tensor], rows: Tensor) -> Tensor:
        outputs: Tensor = torch.func.functional_call(models[0], own, (rows,))
        return outputs.square().mean()

    each = inputs.repeat_interleave(4 // num_lanes, dim=0)
    expected = torch.vmap(torch.func.grad(loss))(weights, each)
    network = Network(models, num_lanes)
    network.forward(inputs, []).square().mean((1, 2)).sum().backward()
    found = [tensor.grad for layer in network.layers for tensor in layer]
    for grad, other in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(grad, other)
        assert grad is not None and grad.is_contiguous()


@pytest.mark.parametrize("seeds", [(3, 3, 3, 3), (3, 3, 8, 8), (3, 4, 5, 6)], ids=str)
def test_dropout_is_the_mask_that_each_draws_alone(seeds: tuple[int, ...]) -> None:
    rates = (0.0, 0.3, 0.5, 1 - 1e-9)
    models = [Mlp((5, 7), p, (3,), 2).train() for p in rates]
    lanes = sorted(set(seeds))
    inputs = torch.randn(len(lanes), 9, 3)
    alone = []
    for model, seed in zip(models, seeds, strict=True):
        runtime.reseed(torch.device("cpu"), seed)
        alone.append(model(inputs[lanes.index(seed)]))
    generators = [torch.Generator().manual_seed(seed) for seed in lanes]
    together = Network(models, len(lanes)).forward(inputs, generators).mT
    torch.testing.assert_close(together, torch.stack(alone))


def test_the_optimizers_that_are_stacked_are_those_that_can_be() -> None:
    assert OPTIMS == set(_RATES) == set(_UPDATES)


# --- groups --------------------------------------------------------------------------------------


def config_of(*words: str) -> TrainConfig:
    with compose.initialized(parse_line(["train"])):
        composed = hydra.compose("train", list(words))
    data = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(data, dict)
    return train_config({key: value for key, value in data.items() if key != "sweep"})


VARIED = (
    ("optim.lr=0.1", "optim.weight_decay=0.1", "optim.betas=[0.8,0.9]", "optim.eps=1e-6"),
    ("schedule=cosine", "schedule.final_lr_fraction=0.1"),
    ("schedule=step", "schedule.warmup_epochs=1"),
    ("seed=7", "epochs=9", "early_stop.patience=2", "monitor=val_loss", "grad_clip=1"),
    ("model.dropout=0.5", "loss.label_smoothing=0.1", "out=elsewhere"),
)


def test_runs_that_differ_in_what_can_vary_are_one_group() -> None:
    configs = [config_of("model=mlp", *words) for words in VARIED]
    assert groups(configs) == [Group((0, 1, 2, 3, 4))]


@pytest.mark.parametrize(
    "word",
    [
        "optim=sgd", "loss=bce", "dataset=digits", "dataset.val_fraction=0.2", "batch_size=32",
        "model.hidden=[64]", "device=cpu",
    ],
)  # fmt: skip
def test_what_shapes_a_step_makes_another_group(word: str) -> None:
    configs = [config_of("model=mlp", *words) for words in ((), (word,), ("seed=1",))]
    assert groups(configs) == [Group((0, 2)), Group((1,))]


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("model=cnn", "model=cnn"),
        ("precision=bfloat16", "precision=bfloat16"),
        ("compile=true", "compile=true"),
        ("cuda_graph=true", "cuda_graph=true"),
        ("grad_accum=2", "grad_accum=2"),
        ("save_every=30s", "save_every=30s"),
        ("profile=true", "profile=true"),
    ],
)
def test_what_keeps_a_run_alone_is_named(word: str, reason: str) -> None:
    configs = [config_of("model=mlp", word, f"seed={seed}") for seed in range(2)]
    assert groups(configs) == [Group((0,), reason), Group((1,), reason)]


# --- training ------------------------------------------------------------------------------------


def learner_of(*words: str) -> Learner:
    return train.prepare(config_of(*words), None, time.monotonic())


def finish(learners: Sequence[Learner], signals: SignalWatch | None = None) -> list[Member]:
    """Train to the end; every member of every round, in order."""
    seen = []
    for members in rounds(learners, signals or SignalWatch()):
        for member in members:
            if member.row:
                loop.select(member.learner, member.row["epoch"], member.row)
            seen.append(dataclasses.replace(member))
    return seen


def rows_of(seen: Sequence[Member], learner: Learner) -> list[dict[str, Any]]:
    return [member.row for member in seen if member.learner is learner and member.row]


def assert_same_run(learner: Learner, rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """`learner` did what the run in `folder` did."""
    now, alone = learner.checkpoint(), checkpoint.load(folder / "last.safetensors")
    torch.testing.assert_close(now.model, alone.model, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(now.optim, alone.optim, rtol=1e-3, atol=1e-4)
    with open(folder / "metrics.csv") as file:
        expected = list(csv.DictReader(file))
    assert [list(row) for row in rows] == [list(row) for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for name in set(row) - {"seconds", "samples_per_s"}:
            exact = name in ("epoch", "step", "lr", "val_accuracy")
            assert row[name] == pytest.approx(float(other[name]), rel=0 if exact else 1e-3), name
    assert now.progress.best is not None and alone.progress.best is not None
    assert now.progress.best.epoch == alone.progress.best.epoch
    assert now.progress.stale_epochs == alone.progress.stale_epochs
    assert (now.progress.step, now.progress.loss_sum) == (alone.progress.step, 0.0)


def check(trained: Run, shared: Sequence[str], own: Sequence[Sequence[str]]) -> None:
    """Train `own` together and each alone."""
    learners = [learner_of(*shared, *words) for words in own]
    assert len(groups([learner.config for learner in learners])) == 1
    seen = finish(learners)
    for learner, words in zip(learners, own, strict=True):
        assert_same_run(learner, rows_of(seen, learner), trained(*shared, *words))


def test_a_step_loads_nothing_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch imports these where a step asks for it, a third of a second each and more."""
    learners = [
        learner_of("model=mlp", "dataset=digits", "epochs=1", f"seed={seed}") for seed in range(2)
    ]
    for name in ("torch._dynamo", "torch.fx.experimental.symbolic_shapes"):
        monkeypatch.setitem(sys.modules, name, None)
    assert len(finish(learners)) == 2


@pytest.mark.parametrize(
    ("optimizer", "own"),
    [
        ("sgd", ["optim.lr=0.05", "optim.weight_decay=0.01"]),
        ("momentum", ["optim.momentum=0.8", "optim.nesterov=true"]),
        ("adam", ["optim.betas=[0.8,0.99]", "optim.weight_decay=0.01"]),
        ("adamw", ["optim.lr=0.003", "optim.weight_decay=0.1"]),
        ("rmsprop", ["optim.alpha=0.9", "optim.momentum=0.5"]),
        ("adagrad", ["optim.lr_decay=0.01", "optim.eps=1e-6"]),
        ("adadelta", ["optim.rho=0.8", "optim.eps=1e-5"]),
    ],
)
def test_every_optimizer_trains_as_alone(trained: Run, optimizer: str, own: list[str]) -> None:
    together = [[*own, "schedule=cosine"], ["seed=1", "model.dropout=0.4"], ["model.dropout=0"]]
    check(trained, (*MLP, f"optim={optimizer}"), together)


@pytest.mark.parametrize(
    "words", [("optim=adam",), ("optim=adagrad", "optim.lr_decay=0.1")], ids=["adam", "adagrad"]
)
def test_an_epoch_that_is_planned_in_parts_trains_as_alone(
    trained: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(stack, "AHEAD", 5)
    check(trained, (*LINEAR, *words, "epochs=2"), [["optim.lr=0.01"], ["optim.lr=0.02"]])


def test_seeds_of_different_numbers_of_runs_train_as_alone(trained: Run) -> None:
    own = [["optim.lr=0.01"], ["optim.lr=0.02"], ["optim.lr=0.03"], ["seed=1"]]
    check(trained, (*MLP, "epochs=2"), own)


@pytest.mark.parametrize("loss", ["cross_entropy", "kl_div", "bce"])
def test_every_smoothed_loss_trains_as_alone(trained: Run, loss: str) -> None:
    own = [["loss.label_smoothing=0.2", "schedule=onecycle"], ["schedule=step", "grad_clip=0.5"]]
    check(trained, (*LINEAR, f"loss={loss}"), own)


def test_squared_error_of_classes_trains_as_alone(trained: Run) -> None:
    check(trained, (*LINEAR, "loss=mse"), [["seed=4"], ["seed=5", "schedule.warmup_epochs=0.5"]])


def test_a_regression_trains_as_alone(trained: Run) -> None:
    check(
        trained, LINE, [["optim.lr=0.01"], ["optim.lr=0.1", "seed=1"], ["dataset.val_fraction=0.2"]]
    )


def test_without_a_validation_split(trained: Run) -> None:
    learners = [
        learner_of(*LINEAR, "dataset.val_fraction=0", f"optim.lr={lr}") for lr in (0.001, 0.01)
    ]
    seen = finish(learners)
    for learner in learners:
        assert [row["val_loss"] for row in rows_of(seen, learner)] == [None] * 5
        assert learner.progress.best is not None and learner.progress.best.epoch == 5


def test_a_run_that_diverges_leaves_the_others_alone(trained: Run, mnist_cli: Program) -> None:
    shared = (*LINEAR, "optim=sgd", "loss=mse")
    lost, well = learner_of(*shared, "optim.lr=1e5"), learner_of(*shared, "optim.lr=0.01")
    seen = finish([lost, well])
    assert_same_run(well, rows_of(seen, well), trained(*shared, "optim.lr=0.01"))
    errors = [member.error for member in seen if member.learner is lost]
    outcome = mnist_cli("train", *shared, "optim.lr=1e5")
    assert outcome.code == DivergedError.exit_code
    assert [str(error) for error in errors] == [outcome.error]
    assert lost.progress.step == 0


def test_all_may_diverge() -> None:
    learners = [learner_of(*LINEAR, "optim=sgd", "loss=mse", f"optim.lr=1e{e}") for e in (5, 6)]
    seen = finish(learners)
    assert len(seen) == 2 and all(member.error and not member.row for member in seen)


def test_each_stops_on_its_own(trained: Run) -> None:
    shared = ("dataset=digits", "model=linear", "optim.lr=0.05")
    own = [["epochs=3"], ["epochs=30", "early_stop.patience=3"], ["epochs=9", "seed=2"]]
    check(trained, shared, own)
    with open(trained(*shared, *own[1]) / "metrics.csv") as file:
        assert 3 < len(list(csv.DictReader(file))) < 30


def test_the_caller_takes_a_member_out() -> None:
    learners = [learner_of(*LINEAR, f"seed={seed}") for seed in range(2)]
    steps = []
    for members in rounds(learners, SignalWatch()):
        steps.append([member.learner.progress.step for member in members])
        members[0].is_over = members[0].learner is learners[0]
    per_epoch = learners[0].steps_per_epoch
    assert steps == [[per_epoch] * 2, *([per_epoch * epoch] for epoch in range(2, 6))]


class AfterSteps(SignalWatch):
    """A signal that comes while step `count` is taken, counted from 1."""

    def __init__(self, count: int) -> None:
        self._left = count

    @property
    def received(self) -> int | None:
        self._left -= 1
        return None if self._left > 0 else 15


def test_after_a_signal_each_goes_on_alone_or_together(tmp_path: Path, mnist_cli: Program) -> None:
    own = [("optim.lr=0.01",), ("optim.lr=0.003", "seed=1")]
    whole = [learner_of(*MLP, *words) for words in own]
    finish(whole)
    halves = [learner_of(*MLP, *words) for words in own]
    last = finish(halves, AfterSteps(40))[-2:]
    assert [member.row for member in last] == [{}, {}]
    assert {learner.progress.step for learner in halves} == {39}
    resumed = []
    for number, learner in enumerate(halves):
        path = tmp_path / f"{number}.safetensors"
        loop.save(learner, path)
        before = checkpoint.load(path)
        resumed.append(train.prepare(before.config, before, time.monotonic()))
        folder = tmp_path / str(number)
        folder.mkdir()
        loop.save(learner, folder / "last.safetensors")
        assert before.progress.best is not None
        selected = dataclasses.replace(before.progress, step=before.progress.best.step)
        best = dataclasses.replace(before, progress=selected)
        checkpoint.save(folder / "best.safetensors", best)
    finish(resumed)
    for number, (learner, other) in enumerate(zip(whole, resumed, strict=True)):
        torch.testing.assert_close(dict(other.model.state_dict()), dict(learner.model.state_dict()))
        outcome = mnist_cli("train", f"resume={tmp_path / str(number)}", "--quiet")
        assert outcome == (0, "", "")
        alone = checkpoint.load(tmp_path / str(number) / "last.safetensors")
        torch.testing.assert_close(
            alone.model, dict(learner.model.state_dict()), rtol=1e-4, atol=1e-4
        )
