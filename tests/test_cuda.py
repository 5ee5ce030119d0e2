"""CUDA: on a GPU where there is one; what can be known without is tested on the CPU.

Without one a stand-in takes the place of the stream on which steps are recorded: it replays a step
by calling it. Tables, counter, order of steps and learning rates are then those of a graph.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from faults import TRAIN, Ended, here, outcome_of, state_of, two_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_cli import checkpoint, compose, cuda_graph, line, loop, runtime, train, train_step
from mnist_cli.cuda_graph import CAPTURABLE, WARM_UP_STEPS, StepGraph
from mnist_cli.dataset import Dataset, Split
from mnist_cli.learner import Learner

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")

pytestmark = pytest.mark.usefixtures("one_thread")

# A power of two, as the factors of schedule=step below: float32 and float64 hold the same number.
LR = "optim.lr=0.0009765625"
TINY = ("model=mlp", "model.hidden=[8]", "dataset=digits", "device=cpu", LR)


class StandIn:
    """Records a step by keeping it, and counts what it is asked for."""

    def __init__(self, device: object = None) -> None:
        self.num_run = self.num_recorded = self.num_replayed = 0

    def run(self, step: Callable[[], None]) -> None:
        self.num_run += 1
        step()

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        self.num_recorded += 1

        def replay() -> None:
            self.num_replayed += 1
            step()

        return replay


def learner_of(*words: str) -> Learner:
    typed = line.parse_line(["train", *words])
    with compose.initialized(typed):
        config = compose.checked(typed, compose.compose(typed, typed.overrides))
    return train.prepare(config, None, time.monotonic())


def batches_of(learner: Learner, epoch: int = 0) -> list[torch.Tensor]:
    order = runtime.permutation(learner.config.seed, epoch, len(learner.data.train))
    return list(order.split(learner.config.batch_size * learner.config.grad_accum))


def tensors_of(learner: Learner) -> dict[str, torch.Tensor]:
    found = learner.checkpoint()
    return found.model | {f"optim.{name}": tensor for name, tensor in found.optim.items()}


def assert_equal(a: Learner, b: Learner) -> None:
    ours, theirs = tensors_of(a), tensors_of(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


# --- the step of a graph, without a graph --------------------------------------------------------


@given(
    optim=st.sampled_from(CAPTURABLE),
    words=st.lists(
        st.sampled_from(
            [
                "grad_clip=0.5",
                "grad_accum=2",
                "model.dropout=0.3",
                "loss=bce",
                "optim.weight_decay=0.1",
            ]
        ),
        unique=True,
    ),
    batch_size=st.sampled_from([23, 64, 250]),
    cuts=st.lists(st.integers(1, 12), min_size=3, max_size=6),
)
@settings(max_examples=20, deadline=None)
def test_law_replayed_steps_are_steps(
    optim: str, words: list[str], batch_size: int, cuts: list[int]
) -> None:
    """However many are replayed at once, weights, state and losses are those of steps alone."""
    typed = (*TINY, f"optim={optim}", f"batch_size={batch_size}", *words)
    alone, replayed = learner_of(*typed), learner_of(*typed)
    stream = StandIn()
    replayed.replay = StepGraph(replayed, stream)
    step, batches = 0, batches_of(alone)
    while step < len(batches) and cuts:
        some = batches[step : step + cuts.pop()]
        expected = [
            train_step.take_step(alone, indices, step + n) for n, indices in enumerate(some)
        ]
        assert train_step.take_steps(replayed, some, step) == pytest.approx(expected, rel=1e-6)
        step += len(some)
    assert_equal(alone, replayed)
    num_full = sum(len(indices) == len(batches[0]) for indices in batches[:step])
    assert stream.num_run == min(num_full, WARM_UP_STEPS)
    assert stream.num_replayed == num_full - stream.num_run
    assert stream.num_recorded == (num_full > WARM_UP_STEPS)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let cuda_graph=true replay on the CPU."""
    monkeypatch.setattr(cuda_graph, "obstacle", lambda learner: None)
    monkeypatch.setattr(cuda_graph, "CaptureStream", StandIn)


def trained(*words: str) -> Ended:
    return here(*TRAIN, "device=cpu", "model.dropout=0.2", LR, *words, "--quiet")


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("at_once", [1, 7, 50])
def test_a_run_that_replays_is_the_run_that_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at_once: int
) -> None:
    monkeypatch.setattr(cuda_graph, "REPLAYED_STEPS", at_once)
    monkeypatch.setattr(loop, "REPLAYED_STEPS", at_once)
    words = ("schedule=step", "schedule.step_epochs=1", "schedule.gamma=0.5")
    for out, graph in (("a", "false"), ("b", "true")):
        ended = trained(*words, f"cuda_graph={graph}", f"out={tmp_path / out}")
        assert (ended.code, ended.stderr) == (0, "")
    assert outcome_of(tmp_path / "a") == outcome_of(tmp_path / "b")


@pytest.mark.usefixtures("stand_in")
def test_a_replaying_run_saves_where_it_was_asked_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved: list[int] = []
    real = loop.save

    def save(learner: Learner, path: Path) -> None:
        saved.append(learner.progress.step)
        real(learner, path)

    monkeypatch.setattr(loop, "save", save)
    words = ("cuda_graph=true", "save_every=7", "epochs=2", f"out={tmp_path / 'run'}")
    assert trained(*words).code == 0
    in_epochs = {step for step in range(40) if step % 7 == 0 and step % 20 and step}
    assert in_epochs <= set(saved) <= in_epochs | {20, 40}


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("step", [1, 7, 20, 33])
def test_a_replaying_run_resumes_exactly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: int
) -> None:
    """It is cut off after `step`; the steps at once are others when it goes on."""
    assert trained("cuda_graph=true", f"out={tmp_path / 'whole'}").code == 0
    real = loop.take_steps

    def take_steps(learner: Learner, batches: Sequence[torch.Tensor], first: int) -> list[float]:
        if first >= step:
            raise RuntimeError("cut off")
        return real(learner, batches, first)

    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_steps", take_steps)
        patch.setattr(loop, "REPLAYED_STEPS", 5)
        assert trained("cuda_graph=true", "save_every=1", f"out={out}").code != 0
    assert state_of(out / "last.safetensors")["step"] == step
    ended = here("train", f"resume={out}", "save_every=null", "report=false", "--quiet")
    assert (ended.code, ended.stderr) == (0, "")
    assert outcome_of(out) == outcome_of(tmp_path / "whole")


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("step", [2, 33])
def test_a_replaying_run_names_the_step_that_diverged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: int
) -> None:
    """It was seen steps later, and no checkpoint holds what came of it."""
    real = cuda_graph.lr_of
    monkeypatch.setattr(
        cuda_graph,
        "lr_of",
        lambda learner, number: 1e30 if number == step - 1 else real(learner, number),
    )
    ended = trained("cuda_graph=true", "optim=sgd", f"out={tmp_path / 'run'}")
    assert ended.code == 5
    assert f"at step {step + 1}," in two_lines(ended.stderr)[0]
    assert state_of(tmp_path / "run" / "last.safetensors")["step"] == step // 20 * 20


@pytest.mark.parametrize(
    ("device", "words", "reason"),
    [
        ("cpu", (), "the device is cpu"),
        ("cuda", (), None),
        ("cuda", ("optim=adagrad",), "optim=adagrad needs the CPU in each step"),
        ("cuda", ("compile=true",), "compile=true makes steps of its own"),
    ],
)
def test_why_steps_are_not_replayed(
    device: str, words: tuple[str, ...], reason: str | None
) -> None:
    learner = learner_of(*TINY, *words)
    learner.device = torch.device(device)
    assert cuda_graph.obstacle(learner) == reason


def test_a_run_says_that_it_does_not_replay(tmp_path: Path) -> None:
    for out, graph in (("a", "false"), ("b", "true")):
        ended = trained("epochs=1", f"cuda_graph={graph}", f"out={tmp_path / out}")
        assert (ended.code, ended.stderr) == (0, "")
    log = (tmp_path / "b" / "train.log").read_text()
    assert "cuda_graph=true does nothing here: the device is cpu" in log
    assert outcome_of(tmp_path / "a") == outcome_of(tmp_path / "b")


@pytest.mark.parametrize("model", ["linear", "mlp", "cnn", "cnn_deep", "cnn_dropout"])
@pytest.mark.parametrize("loss", ["cross_entropy", "kl_div", "bce", "mse"])
def test_gradients_stay_on_the_device(model: str, loss: str) -> None:
    """On `meta` no number can be read back, and no batch on the CPU takes part, as in a graph."""
    smoothing = () if loss == "mse" else ("loss.label_smoothing=0.1",)
    words = ("dataset=digits", f"model={model}", f"loss={loss}", *smoothing, "grad_accum=2")
    learner = learner_of(*words)
    learner.device = torch.device("meta")
    learner.data = Dataset(
        learner.data.spec,
        *(to_meta(s) for s in (learner.data.train, learner.data.val, learner.data.test)),
    )
    learner.normalise.to("meta")
    learner.model.to("meta")
    indices = torch.empty(100, dtype=torch.int64, device="meta")
    parts = train_step.compute_gradients(learner, indices)
    assert [(part.shape, part.device.type) for part in parts] == [(torch.Size(), "meta")] * 2
    assert all(parameter.grad is not None for parameter in learner.parameters)
    torch.nn.utils.clip_grad_norm_(learner.parameters, 1.0)


def to_meta(split: Split) -> Split:
    return Split(split.inputs.to("meta"), split.targets.to("meta"))


# --- on a GPU ------------------------------------------------------------------------------------

ON_CUDA = (*TRAIN, "device=cuda", "--quiet")


@needs_cuda
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
def test_cuda_learns_what_the_cpu_learns(tmp_path: Path, precision: str) -> None:
    words = ("train", "dataset=digits", "epochs=3", "report=false", "--quiet")
    assert here(*words, "device=cpu", f"out={tmp_path / 'cpu'}").code == 0
    for out in ("a", "b"):
        on_cuda = ("device=cuda", f"precision={precision}", f"out={tmp_path / out}")
        assert here(*words, *on_cuda).code == 0
    assert outcome_of(tmp_path / "a") == outcome_of(tmp_path / "b")
    cpu, cuda = (outcome_of(tmp_path / out) for out in ("cpu", "a"))
    accuracies = [found["result"]["test"]["accuracy"] for found in (cpu, cuda)]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.03)
    if precision != "float16":  # its first steps find the scale of the loss, and change nothing
        losses = [float(found["metrics"][0]["train_loss"]) for found in (cpu, cuda)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3 if precision == "float32" else 3e-2)


@needs_cuda
@pytest.mark.parametrize(
    "words",
    [
        *((f"optim={optim}",) for optim in CAPTURABLE),
        ("model.dropout=0.3", "schedule=cosine", "schedule.warmup_epochs=1"),
        ("grad_clip=0.5", "grad_accum=2"),
        ("precision=bfloat16",),
        ("precision=tf32",),
    ],
)
def test_a_graph_gives_what_steps_give(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """But for the rounding of the learning rate, which a graph reads as float32."""
    recorded: list[object] = []
    real = cuda_graph.CaptureStream.record

    def record(stream: cuda_graph.CaptureStream, step: Callable[[], None]) -> Callable[[], None]:
        recorded.append(step)
        return real(stream, step)

    monkeypatch.setattr(cuda_graph.CaptureStream, "record", record)
    for out, graph in (("steps", "false"), ("graph", "true"), ("again", "true")):
        ended = here(*ON_CUDA, *words, f"cuda_graph={graph}", f"out={tmp_path / out}")
        assert (ended.code, ended.stderr) == (0, "")
    assert len(recorded) == 2
    assert outcome_of(tmp_path / "graph") == outcome_of(tmp_path / "again")
    steps, graph = (
        checkpoint.load(tmp_path / out / "last.safetensors").model for out in ("steps", "graph")
    )
    loose = any(word.startswith("precision") for word in words)
    tolerance = 1e-2 if loose else 1e-4
    torch.testing.assert_close(steps, graph, rtol=tolerance, atol=tolerance)


@needs_cuda
def test_a_graph_resumes_exactly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = (*ON_CUDA, "cuda_graph=true", "model.dropout=0.2")
    assert here(*words, f"out={tmp_path / 'whole'}").code == 0
    real, out = loop.take_steps, tmp_path / "cut"

    def take_steps(learner: Learner, batches: Sequence[torch.Tensor], first: int) -> list[float]:
        if first >= 28:
            raise RuntimeError("cut off")
        return real(learner, batches, first)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_steps", take_steps)
        assert here(*words, "save_every=7", f"out={out}").code != 0
    assert state_of(out / "last.safetensors")["step"] == 28
    ended = here("train", f"resume={out}", "save_every=null", "report=false", "--quiet")
    assert (ended.code, ended.stderr) == (0, "")
    assert outcome_of(out) == outcome_of(tmp_path / "whole")


WAITING = """
import sys

from mnist_cli import cli, cuda_graph

update_weights = cuda_graph.update_weights


def waiting(learner):
    next(iter(learner.parameters)).sum().item()
    update_weights(learner)


cuda_graph.update_weights = waiting
sys.exit(cli.main(sys.argv[1:]))
"""


@needs_cuda
def test_a_step_that_can_not_be_recorded_is_said(tmp_path: Path) -> None:
    """It waits for the GPU. In a process of its own: no other recording may succeed after it."""
    words = (*ON_CUDA, "cuda_graph=true", f"out={tmp_path / 'run'}")
    command = [sys.executable, "-c", WAITING, *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    error, hint = two_lines(ended.stderr)
    assert error.startswith("cuda_graph=true fails here: ")
    assert hint == "type cuda_graph=false"
