"""The command line: what it accepts, what it refuses and how, and its streams and exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Outcome, Program
from faults import TORTURE, figure, many
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st

from mnist_cli import command, compose, conf, sweep
from mnist_cli.config import Config, PredictConfig, TrainConfig, absolute, to_plain, train_config
from mnist_cli.run import command_of

pytestmark = pytest.mark.usefixtures("empty_cwd")

GENERATED = settings(
    max_examples=many(200, 2000),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to make a failure small takes minutes
)
TINY = ("dataset=digits", "model=linear", "epochs=1", "report=false")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


class Accepted(BaseException):
    """A command line was found right; in place of running it."""

    def __init__(self, config: Config) -> None:
        super().__init__(str(config))
        self.config = config


@pytest.fixture
def no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line that is found right raises Accepted."""

    def accept(config: Config, *rest: object) -> None:
        raise Accepted(config)

    monkeypatch.setattr(command, "run", accept)
    monkeypatch.setattr(sweep, "run", lambda jobs, *rest: accept(jobs[0].config))


def composed(mnist_cli: Program, *words: str) -> Config:
    """The configuration of a command line that is right; needs `no_run`."""
    with pytest.raises(Accepted) as accepted:
        mnist_cli(*words)
    return accepted.value.config


def program(
    *words: str, python: tuple[str, ...] = (), **changes: Any
) -> subprocess.CompletedProcess[str]:
    """`mnist-cli` as a process of its own."""
    environment = ENVIRONMENT | changes.pop("env", {})
    return subprocess.run(
        [sys.executable, *python, "-m", "mnist_cli", *words],
        env=environment,
        text=True,
        check=False,
        **({"capture_output": True} | changes),
    )


# --- malformed lines -----------------------------------------------------------------------------

# The line; what its error names; what its hint names.
MALFORMED = [
    (
        "nonsense",
        "'nonsense'; commands are: train, eval, export, predict, demo, report, list",
        "--help",
    ),
    ("trian", "'trian'", "did you mean train?"),
    ("model=cnn", "'model=cnn' stands where the command should", "mnist-cli train model=cnn"),
    ("-m", "-m needs a command", "mnist-cli train -m"),
    ("train --lr 0.1", "'--lr'", "lr=0.1"),
    ("train --optim.lr=0.1", "'--optim.lr=0.1'", "no dashes: optim.lr=0.1"),
    ("train -x", "'-x'", "--help"),
    ("train --", "'--'", "optim.lr=0.01"),
    ("train -", "'-'", "optim.lr=0.01"),
    ("train --cfg", "--cfg needs a value", "--help"),
    ("train --cfg jobs", "jobs", ""),
    ("train --info nonsense", "nonsense", ""),
    ("train --cfg job -p nope", "nope", ""),
    ("train --resolve", "--resolve", ""),
    ("train -m --cfg job seed=0,1", "gives several values", "type the one to be shown"),
    ("train --config-dir", "--config-dir needs a value", "--help"),
    ("train --config-dir nowhere dataset=digits", "nowhere", ""),
    # groups and options
    ("train optimizer=adam", "'optimizer'", "did you mean optim=...?"),
    ("train optim=adm", "no optim 'adm'", "did you mean optim=adam? there are: adadelta, adagrad"),
    ("train optim=zzz", "no optim 'zzz'", "there are: adadelta, adagrad, adam, adamw, momentum"),
    ("train model=", "no model ''", "linear, mlp"),
    ("train model=Cnn", "no model 'Cnn'", "did you mean model=cnn?"),
    ("train optim=null", "optim", ""),
    ("train model=3", "model", "linear, mlp"),
    ("train =3", "'=3'", ""),
    ("train ~optim", "'optim' is missing", "don't remove 'optim'"),
    ("train +model=mlp", "model is chosen twice", "without the +"),
    ("train +experiment=cnn_sgd +experiment=mlp_adam", "chosen twice", "type one +experiment="),
    ("train hydra.run.dir=x", "hydra.run.dir= doesn't name the folder", "out=DIR"),
    ("train 'hydra.run={dir: x}'", "hydra.run= doesn't name the folder", "out=DIR"),
    ("train -m hydra.sweep.dir=x seed=0,1", "hydra.sweep.dir= doesn't name", "out=DIR"),
    ("train schedule=step schedule.step_size=2", "unknown key", "mean schedule.step_epochs"),
    ("train seed=0,1", "gives several values to seed", "add -m to try each"),
    ("train model@x=mlp", "model@x", ""),
    ("train +model@x=mlp", "'x'", ""),
    ("train experiment=cnn_adam", "experiment", "type +experiment=cnn_adam"),
    ("train +experiment=cnnadam", "'cnnadam'", "did you mean +experiment=cnn_adam?"),
    ("train +expriment=cnn_adam", "'expriment'", ""),
    ("train hydra/launcher=nope", "'nope'", "basic"),
    # keys
    ("train lr=0.1", "'lr'", "did you mean optim.lr=...?"),
    ("train resume_allow=[optim.lrr]", "unknown key 'optim.lrr'", "did you mean optim.lr=...?"),
    ("train -m seed=0,1 resume_allow=[epoch]", "unknown key 'epoch'", "did you mean epochs=...?"),
    ("train resume_allow=[epochs,modell]", "unknown key 'modell'", "did you mean model=...?"),
    ("train optim.lrr=0.1", "'optim.lrr'", "did you mean optim.lr=...?"),
    ("train +optim.lrr=0.1", "'optim.lrr'", "did you mean optim.lr=...?"),
    ("train ++optim.lrr=0.1", "'optim.lrr'", "did you mean optim.lr=...?"),
    ("train patiense=3", "'patiense'", "did you mean early_stop.patience=...?"),
    ("train batchsize=3", "'batchsize'", "did you mean batch_size=...?"),
    ("train seed.x=1", "'seed.x'", "seed"),
    ("train ~seed", "'seed' is missing", "don't remove 'seed'"),
    ("train ~optim.lr", "'optim.lr' is missing", "don't remove 'optim.lr'"),
    ("train ~foo", "'foo'", ""),
    ("train +seed=1", "'seed'", ""),
    ("train optim.rho=0.9", "the chosen optim has no key 'optim.rho'", "optim=adadelta"),
    ("train optim=sgd optim.rho=0.9", "optim=sgd has no key 'optim.rho'", "optim=adadelta"),
    ("train -m model=mlp,linear model.hidden=[8]", "model=linear has no key", "model=mlp"),
    ("train model.hidden=[1]", "no key 'model.hidden'", "model=mlp"),
    ("train hydra.foo=1", "'hydra.foo'", ""),
    ("train optim.name=momentum", "optim", ""),
    ("eval checkpoint=x model=cnn", "'model'", "checkpoint, split"),
    # types and ranges
    ("train epochs=ten", "epochs='ten' has the wrong type", "a whole number"),
    ("train epochs=1.5", "epochs=1.5", "a whole number"),
    ("train epochs=true", "epochs=true", "a whole number"),
    ("train epochs=null", "epochs=null", "a whole number"),
    ("train epochs=", "epochs=''", "a whole number"),
    ("train epochs=0", "epochs=0 is out of range", "at least 1"),
    ("train dataset=digits epochs=0 hydra.verbose=true", "epochs=0 is out of range", "at least 1"),
    ("train epochs=99999999999999999999", "out of range", "at most 1,000,000,000"),
    ("train seed=-1", "seed=-1 is out of range", "at least 0"),
    ("train seed=4294967296", "seed=4294967296", "at most 4,294,967,295"),
    ("train optim.lr=nan", "optim.lr=nan is not finite", "optim.lr"),
    ("train optim.lr=-inf", "optim.lr=-inf is not finite", "optim.lr"),
    ("train optim.lr=1e400", "optim.lr=inf is not finite", "optim.lr"),
    ("train grad_clip=nan", "grad_clip=nan is not finite", "grad_clip"),
    ("train optim.lr=0", "optim.lr=0 is out of range", "above 0"),
    ("train \"optim.lr='0.1'\"", "optim.lr='0.1' has the wrong type", "a number"),
    ("train optim.betas=0.9", "optim.betas=0.9 is not a list", "'optim.betas=[a,b]'"),
    ("train optim.betas=[0.9]", "optim.betas has 1 value", "takes 2 values"),
    ("train optim.betas=[0.9,1.0]", "optim.betas=1.0 is out of range", "below 1"),
    ("train model=mlp model.hidden=[0]", "model.hidden=0", "at least 1"),
    ("train model=mlp model.dropout=1", "model.dropout=1", "below 1"),
    ("train early_stop=3", "early_stop=3 has the wrong type", "patience"),
    ("train compile=maybe", "compile='maybe'", "true or false"),
    ("train monitor=accuracy", "monitor='accuracy'", "val_accuracy"),
    ("train save_every=soon", "save_every='soon'", "30s"),
    ("train dataset=emnist dataset.split=x", "dataset.split='x'", "balanced"),
    ("train dataset.val_fraction=1", "dataset.val_fraction=1", "below 1"),
    ("train dataset=digits dataset.val_fraction=0.9999", "dataset.val_fraction=0.9999", "type"),
    ("train dataset.mirror=http://x", "dataset.mirror='http://x'", "https://"),
    ("train dataset.mirror=ftp://h/", "dataset.mirror='ftp://h/'", "https://"),
    ("train dataset.mirror=file:///etc/", "dataset.mirror='file:///etc/'", "https://"),
    ("train dataset.mirror=h", "dataset.mirror='h'", "https://"),
    ("train 'dataset.mirror=https://h/ x'", "dataset.mirror=", "https://"),
    ("train out= dataset=digits model=linear epochs=1", "out=", "out="),
    ("export checkpoint=x format=tflite", "format='tflite'", "onnx, torch_export, safetensors"),
    ("export checkpoint=x opset=17", "opset=17", "at least 18"),
    ("export checkpoint=x tolerance=0", "tolerance=0", "above 0"),
    # what doesn't fit together
    ("train device=gpu", "device='gpu'", "auto, cpu, cuda, cuda:N"),
    ("train device=cuda:x", "device='cuda:x'", "auto, cpu, cuda, cuda:N"),
    ("train device=cuda:00", "device='cuda:00'", "auto, cpu, cuda, cuda:N"),
    ("train device=cuda:999 dataset=digits", "device=cuda:999 is not there", "device=cpu"),
    ("train precision=float16 device=cpu", "precision=float16", "device=cuda"),
    ("train dataset=linear", "loss=cross_entropy compares classes, but dataset=linear", "loss=mse"),
    ("train dataset=linear loss=mse", "model=cnn needs images, but dataset=linear", "model=linear"),
    ("train monitor=val_mse dataset=digits", "monitor=val_mse", "monitor=val_accuracy"),
    ("train optim=sgd optim.nesterov=true", "optim.momentum=0", "optim.momentum=0.9"),
    ("train model.foo=1", "'model.foo'", "keys are: model.hidden, model.dropout"),
    ("eval checkpoint=null", "checkpoint=null has the wrong type", "checkpoint must be text"),
    (
        "train early_stop.patience=2 dataset.val_fraction=0",
        "dataset.val_fraction=0",
        "early_stop.patience=null",
    ),
    ("train schedule.warmup_epochs=10", "schedule.warmup_epochs=10", "shorter"),
    ("train resume=auto", "resume=auto needs out=DIR", "out=DIR"),
    ("train resume=a out=b", "resume=a and out=b", "out="),
    ("export checkpoint=x quantize=int8 format=safetensors", "quantize=int8", "format=onnx"),
    # the main argument
    ("eval", "checkpoint= is required", "checkpoint=RUN"),
    ("eval checkpoint=", "checkpoint= is empty", "checkpoint=RUN"),
    ("export", "checkpoint= is required", "checkpoint=RUN"),
    ("report", "run= is required", "run=RUN"),
    ("report run=", "run= is empty", "run=RUN"),
    ("report run=a,", "run= is empty", "run=RUN"),
    ("report run=a,b,c", "run= names 3 runs", "run=A,B"),
    ("eval runs/x", "'runs/x'", "checkpoint=runs/x"),
    ("train eval checkpoint=x", "'eval'", "key=value"),
    ("train foo", "'foo'", "key=value"),
    ("train ''", "''", "key=value"),
    ("predict", "checkpoint= is required", "checkpoint=RUN"),
    ("predict checkpoint=x", "images= is required", "images=PATH"),
    ("predict checkpoint=x images=", "images= is empty", "images=a.png"),
    ("predict checkpoint=x images=[]", "images= is empty", "images=a.png"),
    ("predict checkpoint=x images=a.png,,b.png", "without a name", "images=a.png"),
    ("predict checkpoint=x images=a.png preprocess=mnist", "preprocess='mnist'", "auto, none"),
    ("predict checkpoint=x images=a.png device=gpu", "device='gpu'", "cuda:N"),
    ("predict a.png", "'a.png'", "checkpoint=RUN images=a.png"),
    ("predict run images=a.png", "'run'", "type checkpoint=run"),
    ("predict a.png checkpoint=run", "'a.png'", "type images=a.png"),
    ("demo", "checkpoint= is required", "checkpoint=RUN"),
    ("demo checkpoint=", "checkpoint= is empty", "checkpoint=RUN"),
    ("demo checkpoint=x port=65536", "port=65536 is out of range", "at most 65,535"),
    ("demo checkpoint=x port=-1", "port=-1 is out of range", "at least 0"),
    ("demo checkpoint=x port=http", "port='http' has the wrong type", "a whole number"),
    ("demo checkpoint=x open=maybe", "open='maybe'", "true or false"),
    ("demo checkpoint=x host=0.0.0.0", "'host'", "port"),
    ("demo -m checkpoint=x,y", "demo shows one checkpoint", "leave -m out"),
    ("demo -m checkpoint=x hydra/launcher=basic", "demo shows one checkpoint", "leave -m out"),
    ("list optimizer", "'optimizer'", "groups are: model, optim"),
    ("list modle", "'modle'", "did you mean model? groups are: "),
    ("list model optim", "one group", "list model"),
    ("list -m", "-m has nothing to act on", "mnist-cli list"),
    ("list model --cfg job", "--cfg has nothing to act on", "mnist-cli list"),
    ("train resume=", "resume= is empty", "resume=RUN"),
    ("train epochs=???", "epochs= is required", "epochs=VALUE"),
    ("train epochs==3", "epochs==3", "type epochs=3"),
    ("train 'optim.lr =0.1'", "optim.lr =0.1", "type optim.lr=0.1"),
    ("demo outputs/train/RUN", "outputs/train/RUN", "type checkpoint=outputs/train/RUN"),
    ("report outputs/train/RUN", "outputs/train/RUN", "type run=outputs/train/RUN"),
    ("train dataset=digits epochs=2 early_stop.patience=3", "patience=3 can", "patience=null"),
    (f"train dataset=digits out={'x' * 300}", "File name too long", "out=DIR"),
    (f"train -m dataset=digits out={'x' * 300}", "File name too long", "out=DIR"),
    ("train dataset=digits out=/proc/x", "can't make /proc/x: No such file", "out=DIR"),
    # Hydra's grammar
    ("train optim.lr=[0.1", "'optim.lr=[0.1'", "quote it"),
    ("train optim.lr={a", "'optim.lr={a'", "quote it"),
    ("train optim.lr=${", "'optim.lr=${'", "quote it"),
    ("train optim.lr=${foo}", "'foo'", ""),
    ("train a@b:c=d", "'a@b:c=d'", ""),
    ("train \"hydra.sweeper.params={seed: '0,1'}\" seed=x", "", ""),
    # sweeps
    ("train model=mlp,cnn", "several values to model", "add -m"),
    ("train dataset=digits -m seed=range(0,0)", "", ""),
    ("train optim.lr=0.1,0.2", "several values to optim.lr", "add -m"),
    ("train --cfg job seed=range(1,3)", "gives several values", "type the one to be shown"),
    ("train dataset=digits -m optim.lr=0.1,-1", "optim.lr=-1 is out of range", "above 0"),
    ("train dataset=digits -m seed=0,x", "seed='x'", "a whole number"),
    ("train dataset=digits -m optim=adam,adm", "no optim 'adm'", "did you mean optim=adam?"),
    ("train dataset=digits -m out=a,b", "out=", "out=DIR"),
    (
        "train -m hydra/launcher=basic dataset=digits model=linear epochs=1 optim.lr=0.1,-1",
        "optim.lr=-1 is out of range",
        "above 0",
    ),
]


@pytest.fixture
def no_cuda() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")


NO_CUDA = [
    ("train device=cuda dataset=digits", "device=cuda is not there: this machine has no CUDA"),
    ("train precision=float16 dataset=digits", "precision=float16 needs CUDA"),
    ("train precision=tf32 dataset=digits", "precision=tf32 needs CUDA"),
]


def assert_refused(outcome: Outcome) -> None:
    """Exit 2, the two lines, nothing else said, nothing written."""
    assert outcome.code == 2, outcome
    assert re.fullmatch(r"error: .+\nhint: .+\n", outcome.stderr), outcome.stderr
    assert outcome.stdout == ""
    assert os.listdir() == []
    figure("malformed command lines")


def test_enough_lines_are_malformed() -> None:
    assert len({line for line, _, _ in MALFORMED}) == len(MALFORMED) >= 40


@pytest.mark.torture
@pytest.mark.parametrize(("line", "error", "hint"), MALFORMED, ids=[row[0] for row in MALFORMED])
def test_a_malformed_line(mnist_cli: Program, line: str, error: str, hint: str) -> None:
    outcome = mnist_cli(*shlex.split(line))
    assert_refused(outcome)
    assert error in outcome.error
    assert hint in outcome.hint
    if unknown := re.match("unknown key '(.+)'", outcome.error):
        assert f"did you mean {unknown[1]}=" not in outcome.hint


@pytest.mark.torture
@pytest.mark.parametrize("line", [row[0] for row in MALFORMED])
def test_a_malformed_line_as_json(mnist_cli: Program, line: str) -> None:
    outcome = mnist_cli("--json", *shlex.split(line))
    document = json.loads(outcome.stdout)
    assert document == {"error": outcome.error, "hint": outcome.hint, "exit_code": 2}
    assert_refused(outcome._replace(stdout=""))
    assert outcome.code == 2


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize(("line", "error"), NO_CUDA)
def test_cuda_that_is_not_there(mnist_cli: Program, line: str, error: str) -> None:
    outcome = mnist_cli(*line.split())
    assert_refused(outcome)
    assert error in outcome.error


@pytest.mark.usefixtures("no_run")
def test_a_configuration_that_lies_around_is_not_read(mnist_cli: Program) -> None:
    """As that of a run does, where one stands in its folder."""
    Path("config.yaml").write_text("model:\n  name: linear\noptim:\n  name: sgd\n  lr: 3\n")
    for words in ((), ("resume=null",), ("resume=auto", "out=here")):
        config = composed(mnist_cli, "train", "dataset=digits", *words)
        assert (config.model.name, config.optim.name) == ("cnn", "adam")
    assert composed(mnist_cli, "eval", "checkpoint=x").checkpoint == "x"


# --- malformed lines by the thousand -------------------------------------------------------------

KNOWN = {command: conf.known_keys(command) for command in ("train", "eval", "export", "predict")}
FIRST_WORDS = {key.split(".")[0] for keys in KNOWN.values() for key in keys} | {"hydra"}

identifiers = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,12}", fullmatch=True)
unknown_keys = st.lists(identifiers, min_size=1, max_size=3).map(".".join)
plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
quoted = plain_text.map(lambda text: "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'")
scalars = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["null", "true", "False", "nan", "-inf", "1e400", "${seed}", "${oc.env:X}"]),
    identifiers,
    quoted,
)
nested = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]"),
        st.dictionaries(identifiers, inner, max_size=3).map(
            lambda items: "{" + ",".join(f"{k}:{v}" for k, v in items.items()) + "}"
        ),
    ),
    max_leaves=6,
)
casts = st.builds(
    "{}({})".format, st.sampled_from(["int", "float", "str", "bool", "json_str"]), nested
)
sweeps = st.one_of(
    st.lists(scalars, min_size=2, max_size=4).map(",".join),
    st.lists(scalars, min_size=1, max_size=3).map(lambda items: f"choice({','.join(items)})"),
    st.builds("range({},{})".format, st.integers(-3, 3), st.integers(-3, 9)),
    st.builds("interval({},{})".format, st.integers(-3, 3), st.integers(-3, 9)),
    st.builds("shuffle({})".format, st.lists(scalars, min_size=1, max_size=3).map(",".join)),
    st.builds("glob({})".format, st.sampled_from(["*", "a*", "[*]"])),
    st.builds("tag(x,{})".format, scalars),
    st.builds("extend_list({})".format, scalars),
)
values = st.one_of(nested, casts, sweeps, st.just(""))
prefixes = st.sampled_from(["", "", "+", "++"])
NUMERIC = [
    key
    for key in KNOWN["train"]
    if key.split(".")[-1] in ("seed", "epochs", "batch_size", "grad_accum", "grad_clip", "patience")
    or key in ("optim.lr", "optim.eps", "optim.weight_decay", "loss.label_smoothing")
    or key in ("dataset.val_fraction", "schedule.warmup_epochs")
]


def is_unknown(key: str) -> bool:
    return key.split(".")[0] not in FIRST_WORDS


@st.composite
def wrong_words(draw: st.DrawFn) -> str:
    """A word that makes any line of a command that composes wrong."""
    kind = draw(st.sampled_from(["key", "delete", "package", "value", "open", "flag", "group"]))
    key = draw(unknown_keys.filter(is_unknown))
    value = draw(values)
    if kind == "key":
        return f"{draw(prefixes)}{key}={value}"
    if kind == "delete":
        return f"~{key}" + draw(st.sampled_from(["", f"={value}"]))
    if kind == "package":
        return f"{draw(prefixes)}{key}@{draw(identifiers)}={value}"
    if kind == "value":
        number = draw(st.sampled_from(NUMERIC))
        wrong = draw(
            st.sampled_from(["-1e-9", "nan", "inf", "-7", "[1]", "{a:1}", "'1'", "x", "true"])
        )
        return f"{draw(st.sampled_from(['', '++']))}{number}={wrong}"
    if kind == "open":
        return f"{draw(st.sampled_from(['seed', 'epochs', key]))}={value}" + draw(
            st.sampled_from(["[", "{", "(", "[1,", "{a:", "${", "f(", "]", "}", ")"])
        )
    if kind == "flag":
        return "--" + draw(identifiers.filter(lambda name: f"--{name}" not in conf.FLAGS))
    group = draw(st.sampled_from(conf.GROUPS))
    option = draw(identifiers.filter(lambda name: name not in conf.options(group)))
    return f"{group}={option}"


@pytest.mark.torture
@pytest.mark.usefixtures("no_run")
@GENERATED
@given(
    line=st.sampled_from(
        [
            "train dataset=digits",
            "train",
            "eval checkpoint=x",
            "export checkpoint=x",
            "predict checkpoint=x images=a,b",
        ]
    ),
    word=wrong_words(),
    flags=st.lists(st.sampled_from(["-m", "--json", "--quiet"]), max_size=2, unique=True),
    first=st.booleans(),
)
def test_a_wrong_word_is_always_refused(
    mnist_cli: Program, line: str, word: str, flags: list[str], first: bool
) -> None:
    command, *rest = line.split()
    assume(not (word.startswith("--") and ("help" in word or "version" in word)))
    key = word.partition("=")[0]
    assume(not first or not any(other.startswith(f"{key}=") for other in rest))  # the last counts
    words = [command, word, *rest, *flags] if first else [command, *rest, *flags, word]
    outcome = mnist_cli(*words)
    if "--json" in flags:
        assert json.loads(outcome.stdout)["exit_code"] == 2
        outcome = outcome._replace(stdout="")
    assert_refused(outcome)


def is_own_flag(word: str) -> bool:
    from mnist_cli.line import HYDRA_FLAGS, OWN_FLAGS

    flag = word.split("=", 1)[0]
    return flag in HYDRA_FLAGS or flag in OWN_FLAGS or flag in ("-sc", "--shell-completion")


@pytest.mark.torture
@pytest.mark.usefixtures("no_run")
@GENERATED
@given(
    st.lists(
        st.one_of(
            plain_text,
            st.text("abc=+~@:.,[]{}()$'\"\\ /-0", max_size=12),
            st.builds("{}{}={}".format, prefixes, st.sampled_from(KNOWN["train"]), values),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_any_words_are_accepted_or_refused(mnist_cli: Program, words: list[str]) -> None:
    assume(not any(is_own_flag(word) for word in words))
    try:
        assert_refused(mnist_cli("train", *words))
    except Accepted as accepted:
        assert train_config(to_plain(accepted.config)) == accepted.config


# --- flags, order, and what is composed ----------------------------------------------------------

WORDS = ("model=mlp", "optim=sgd", "dataset=digits", "optim.lr=0.5", "seed=3", "--json", "--quiet")


@pytest.mark.torture
@pytest.mark.usefixtures("no_run")
@settings(max_examples=many(10, 200), deadline=None, suppress_health_check=list(HealthCheck))
@given(words=st.permutations([*WORDS, "model.hidden=[4,2]"]), position=st.integers(0, 8))
def test_words_and_flags_may_stand_in_any_order(
    mnist_cli: Program, words: list[str], position: int
) -> None:
    # The command is the first word that is no flag.
    start = min(position, next(i for i, word in enumerate(words) if not word.startswith("-")))
    config = composed(mnist_cli, *words[:start], "train", *words[start:])
    assert isinstance(config, TrainConfig)
    assert (config.model.name, config.optim.name, config.optim.lr) == ("mlp", "sgd", 0.5)
    assert config == composed(mnist_cli, "train", *WORDS, "model.hidden=[4,2]")


finite = st.floats(min_value=1e-300, max_value=1e300)
paths = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0$"), min_size=1, max_size=16
)


@pytest.mark.torture
@pytest.mark.usefixtures("no_run")
@settings(max_examples=many(20, 400), deadline=None, suppress_health_check=list(HealthCheck))
@example(hidden=[1], lr=1e-05, decay=1e22, root='it\'s \\ "a" = b, c/[d] {e} %f #g', every="30s")
@example(hidden=[], lr=5e-324, decay=0.0, root="null", every=None)
@given(
    hidden=st.lists(st.integers(1, 65_536), max_size=4),
    lr=finite,
    decay=st.floats(0, 1e300),
    root=st.one_of(st.none(), paths),
    every=st.one_of(st.none(), st.integers(1, 10**9), st.just("2.5s")),
)
def test_the_command_of_a_run_composes_it_again(
    mnist_cli: Program,
    hidden: list[int],
    lr: float,
    decay: float,
    root: str | None,
    every: int | str | None,
) -> None:
    plain = to_plain(composed(mnist_cli, "train", "model=mlp", "schedule=onecycle"))
    plain["model"]["hidden"] = hidden
    plain["optim"] |= {"lr": lr, "weight_decay": decay}
    plain["dataset"]["root"] = root and absolute(root)
    plain["save_every"] = every
    config = train_config(plain)
    assert composed(mnist_cli, *shlex.split(command_of(config))[1:]) == config


@pytest.mark.usefixtures("no_run")
@pytest.mark.parametrize("recipe", conf.options("experiment"))
def test_a_recipe_chooses_what_it_says(mnist_cli: Program, recipe: str) -> None:
    config = composed(mnist_cli, "train", f"+experiment={recipe}")
    plain = to_plain(config)
    for key in conf.options("experiment")[recipe].keys:
        found: Any = plain
        for name in key.path.split("."):
            found = found[name]
        assert (found["name"] if isinstance(found, dict) else found) == key.value


@pytest.mark.usefixtures("no_run")
def test_the_defaults_are_those_of_the_contract(mnist_cli: Program) -> None:
    config = composed(mnist_cli, "train")
    assert isinstance(config, TrainConfig)
    groups = [getattr(config, group).name for group in conf.GROUPS]
    assert groups == ["cnn", "adam", "cross_entropy", "mnist", "constant"]
    assert (config.epochs, config.batch_size, config.optim.lr) == (10, 64, 0.001)


@pytest.mark.usefixtures("no_run")
def test_resume_allow_takes_every_key_and_block(mnist_cli: Program, tmp_path: Path) -> None:
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "mine.yaml").write_text("# mine\ndefaults:\n  - adam\nspeed: 1\n")
    names = [*conf.known_keys("train"), "early_stop", "schedule.name", "optim.speed"]
    words = ("train", f"resume_allow=[{','.join(names)}]")
    config = composed(mnist_cli, *words, "--config-dir", str(tmp_path))
    assert isinstance(config, TrainConfig) and config.resume_allow == tuple(names)
    assert mnist_cli(*words).error == "unknown key 'optim.speed'"


@pytest.mark.usefixtures("no_run")
@pytest.mark.parametrize("path", ["runs/lr=0.1", "a b", "a,b", "C:\\x", "[x]", "it's", "a{b}"])
def test_a_path_needs_no_quotes_of_hydra(mnist_cli: Program, path: str) -> None:
    assert composed(mnist_cli, "eval", f"checkpoint={path}").checkpoint == path  # type: ignore[union-attr]
    assert composed(mnist_cli, "train", f"out={path}").out == path


@pytest.mark.usefixtures("no_run")
@pytest.mark.parametrize(
    ("typed", "images"),
    [
        ("a.png", ("a.png",)),
        ("a.png,b c.png", ("a.png", "b c.png")),
        ("runs/lr=0.1/x.png,it's", ("runs/lr=0.1/x.png", "it's")),
        ("scan[0-9]*.png,{a}?.png", ("scan[0-9]*.png", "{a}?.png")),
        ("-", ("-",)),
        ("[a.png,b.png]", ("a.png", "b.png")),
        ("['a,b.png',c.png]", ("a,b.png", "c.png")),
        ("'a,b.png'", ("a,b.png",)),
    ],
)
def test_several_paths_need_no_quotes_of_hydra(
    mnist_cli: Program, typed: str, images: tuple[str, ...]
) -> None:
    config = composed(mnist_cli, "predict", "checkpoint=x", f"images={typed}")
    assert isinstance(config, PredictConfig)
    assert config.images == images


@pytest.mark.usefixtures("no_run")
@pytest.mark.parametrize(
    ("value", "runs"),
    [
        ("runs/lr=0.1", ("runs/lr=0.1",)),
        ("a b,it's/[x]", ("a b", "it's/[x]")),
        ("'a,b'", ("a,b",)),
    ],
)
def test_commas_part_the_runs_of_a_report(
    mnist_cli: Program, value: str, runs: tuple[str, ...]
) -> None:
    assert composed(mnist_cli, "report", f"run={value}").run == runs  # type: ignore[union-attr]


@pytest.mark.usefixtures("no_run")
def test_a_users_folder_adds_options(mnist_cli: Program) -> None:
    Path("mine/model").mkdir(parents=True)
    Path("mine/model/tiny.yaml").write_text("# Mine\nname: mlp\nhidden: [4]\ndropout: 0.0\n")
    Path("lr=0.1").symlink_to("mine")
    for words in (
        ("--config-dir", "mine"), ("--config-dir=mine",), ("-cd", "mine"), ("-cd", "lr=0.1"),
        ("--config-dir=lr=0.1",),
    ):  # fmt: skip
        config = composed(mnist_cli, *words, "train", "model=tiny", "model.dropout=0.5")
        assert isinstance(config, TrainConfig)
        assert to_plain(config)["model"] == {"name": "mlp", "hidden": [4], "dropout": 0.5}
    assert "tiny" in mnist_cli("list", "model", "--config-dir", "mine").stdout
    outcome = mnist_cli("train", "model=tny", "--config-dir", "mine")
    assert (outcome.code, "tiny" in outcome.hint) == (2, True)


@pytest.mark.usefixtures("no_run")
@pytest.mark.parametrize(
    ("name", "reason", "instead"),
    [
        ("model/cnn.yaml", "model=cnn is one of mnist-cli's own", "another name"),
        ("experiment/mnist_fast.yaml", "experiment=mnist_fast is one of", "another name"),
        ("optim/slow.yml", "names of options end in .yaml", "call it slow.yaml"),
        ("train.yaml", "train has its defaults from mnist-cli", "+experiment=NAME"),
    ],
)
def test_a_file_that_would_not_be_read_is_named(
    mnist_cli: Program, tmp_path: Path, name: str, reason: str, instead: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("name: adam\n")
    for words in (("train",), ("train", "--help")):
        outcome = mnist_cli(*words, "--config-dir", str(tmp_path))
        assert outcome.code == 2
        assert outcome.error.startswith(f"'{path}' would not be read: {reason}")
        assert instead in outcome.hint
    assert mnist_cli("eval", "--help", "--config-dir", str(path.parent)).code == 0


# --- Hydra's own ---------------------------------------------------------------------------------


def test_hydra_shows_what_is_composed(mnist_cli: Program) -> None:
    assert mnist_cli("train", "--cfg", "job", "-p", "optim", "optim=sgd") == (
        0,
        "# @package optim\nname: sgd\nlr: 0.01\nmomentum: 0.0\nnesterov: false\n"
        "weight_decay: 0.0\n",
        "",
    )
    code, stdout, stderr = mnist_cli("--cfg=job", "train", "seed=${epochs}", "--resolve")
    assert (code, "seed: 10\n" in stdout, stderr) == (0, True, "")
    code, stdout, stderr = mnist_cli("train", "--info", "defaults", "schedule=step")
    assert (code, "schedule/step" in stdout, stderr) == (0, True, "")
    code, stdout, stderr = mnist_cli("train", "--hydra-help")
    assert (code, "Hydra (" in stdout, stderr) == (0, True, "")
    assert os.listdir() == []


def test_hydra_runs_a_job(mnist_cli: Program) -> None:
    words = (*TINY, "hydra.verbose=mnist_cli", "out=a")
    assert mnist_cli("train", *words, "--quiet") == (0, "", "")
    assert json.loads(Path("a/result.json").read_text())["status"] == "completed"
    outcome = mnist_cli("train", *words, "out=b", "--json")
    assert json.loads(outcome.stdout) == json.loads(Path("b/result.json").read_text())
    assert sorted(os.listdir()) == ["a", "b"]


def test_an_error_through_hydra_has_its_own_code_and_two_lines(mnist_cli: Program) -> None:
    outcome = mnist_cli("eval", "checkpoint=nowhere", "hydra.verbose=mnist_cli")
    assert (outcome.code, len(outcome.stderr.splitlines())) == (4, 2)
    assert "nowhere" in outcome.error


# --- --json and --quiet --------------------------------------------------------------------------


def one_document(outcome: Outcome) -> Any:
    assert outcome.code == 0, outcome
    assert outcome.stdout.count("\n") == 1
    return json.loads(outcome.stdout)


def test_json_of_what_only_answers(mnist_cli: Program) -> None:
    assert set(one_document(mnist_cli("list", "--json"))) == {*conf.GROUPS, "experiment"}
    assert set(one_document(mnist_cli("--version", "--json"))) == {"version"}
    for words in (("--help",), ("train", "--help"), ()):
        text = mnist_cli(*words).stdout
        assert one_document(mnist_cli("--json", *words)) == {"help": text.removesuffix("\n")}
    job = one_document(mnist_cli("train", "--cfg", "job", "--json", "seed=7"))
    cnn = {"name": "cnn", "channels": [32, 64], "dense": 128}
    assert (job["seed"], job["model"], job["out"]) == (7, cnn, None)
    for topic in ("defaults", "searchpath", "all"):
        shown = mnist_cli("train", "--info", topic).stdout
        document = one_document(mnist_cli("train", "--info", topic, "--json"))
        assert set(document) == {"output"}
        assert document["output"].splitlines()[:4] == shown.splitlines()[:4]


def test_json_of_a_run_and_what_follows(mnist_cli: Program) -> None:
    trained = mnist_cli("train", *TINY, "out=run", "--json")
    result = one_document(trained)
    assert result == json.loads(Path("run/result.json").read_text())
    assert "epoch 1/1" in trained.stderr and "error" not in trained.stderr
    evaluated = one_document(mnist_cli("--json", "eval", "checkpoint=run"))
    assert set(evaluated) == {"checkpoint", "split", "metrics"}
    assert evaluated["metrics"] == result["test"]
    exported = one_document(mnist_cli("export", "checkpoint=run", "--json", "format=safetensors"))
    assert set(exported) == {"path", "format", "bytes", "parity"}
    missing = mnist_cli("eval", "checkpoint=gone", "--json")
    assert json.loads(missing.stdout)["exit_code"] == missing.code == 4


def test_quiet_says_nothing_but_errors(mnist_cli: Program) -> None:
    assert mnist_cli("train", *TINY, "out=run", "--quiet") == (0, "", "")
    assert mnist_cli("-q", "eval", "checkpoint=run") == (0, "", "")
    assert "epoch 1/1" in Path("run/train.log").read_text()
    assert one_document(mnist_cli("eval", "checkpoint=run", "-q", "--json"))["split"] == "test"
    outcome = mnist_cli("eval", "checkpoint=gone", "-q")
    assert (outcome.code, outcome.stdout, len(outcome.stderr.splitlines())) == (4, "", 2)


def test_what_a_run_says(mnist_cli: Program) -> None:
    code, stdout, stderr = mnist_cli("train", *TINY, "out=run")
    assert (code, stderr) == (0, "")
    assert "\x1b" not in stdout
    for fact in ("linear, 650 parameters", "1,366 to train", "359 to test", "cpu, 1 thread", "run"):
        assert fact in stdout
    for line in ("mnist-cli eval checkpoint=run", "mnist-cli export checkpoint=run format=onnx"):
        assert line in stdout
    assert Path("run/train.log").read_text() == stdout


# --- processes -----------------------------------------------------------------------------------

LOADED = """
import json, os, sys
found = []
for line in sys.argv[1:]:  # each in a process of its own, which has loaded nothing yet
    come_in, go_out = os.pipe()
    if os.fork() == 0:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        from mnist_cli.cli import main
        code = main(line.split())
        loaded = {"hydra", "omegaconf", "torch"} & set(sys.modules)
        os.write(go_out, json.dumps([line, code, sorted(loaded)]).encode())
        os._exit(0)
    os.close(go_out)
    found.append(json.loads(os.read(come_in, 4096)))
print(json.dumps(found))
"""


def test_loads_no_more_than_it_needs() -> None:
    lines: list[list[Any]] = [
        ["--help", 0, []],
        ["train --help", 0, []],
        ["--version", 0, []],
        ["list", 0, []],
        ["list model --json", 0, []],
        ["nonsense", 2, []],
        ["train --nonsense", 2, []],
        ["train --cfg job model=mlp", 0, ["hydra", "omegaconf"]],
        ["train optim.lrr=1", 2, ["hydra", "omegaconf"]],
        ["train dataset=linear", 2, ["hydra", "omegaconf"]],
        ["eval", 2, ["hydra", "omegaconf"]],
        ["eval checkpoint=nowhere", 4, ["hydra", "omegaconf"]],
        ["train dataset=digits resume=nowhere", 4, ["hydra", "omegaconf"]],
        ["train dataset=digits out=taken", 2, ["hydra", "omegaconf"]],
    ]
    Path("taken").mkdir()
    Path("taken/result.json").touch()
    result = subprocess.run(
        [sys.executable, "-c", LOADED, *(line for line, _, _ in lines)],
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT,
    )
    assert json.loads(result.stdout) == lines


@pytest.fixture
def in_bash() -> Iterator[Callable[[str], subprocess.CompletedProcess[str]]]:
    def run(script: str) -> subprocess.CompletedProcess[str]:
        script = f'mnist-cli() {{ "{sys.executable}" -m mnist_cli "$@"; }}\n{script}'
        return subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, env=ENVIRONMENT, check=False
        )

    yield run


def test_a_reader_that_leaves_ends_nothing(
    in_bash: Callable[[str], subprocess.CompletedProcess[str]],
) -> None:
    result = in_bash(
        "mnist-cli train dataset=digits model=mlp epochs=3 out=run | head -1;"
        ' echo "${PIPESTATUS[@]}"; mnist-cli --help | true; echo "${PIPESTATUS[0]}"'
    )
    first, codes, of_help = result.stdout.splitlines()
    assert first.startswith("model ")
    assert (codes, of_help) == ("0 0", "0")
    assert result.stderr == ""
    assert json.loads(Path("run/result.json").read_text())["status"] == "completed"
    assert "epoch 3/3" in Path("run/train.log").read_text()


def test_a_reader_of_what_is_for_people_may_leave_alone(
    in_bash: Callable[[str], subprocess.CompletedProcess[str]],
) -> None:
    result = in_bash(
        f"mnist-cli train {' '.join(TINY)} out=run --json 2>&1 >document | head -1;"
        ' echo "${PIPESTATUS[0]}"; mnist-cli trian 2>&1 | true; echo "${PIPESTATUS[0]}";'
        " mnist-cli trian 2>/dev/full; echo $?"
    )
    first, *codes = result.stdout.splitlines()
    assert first.startswith("model ")
    assert codes == ["0", "2", "2"]
    assert json.loads(Path("document").read_text())["status"] == "completed"


def test_streams_that_are_closed(
    in_bash: Callable[[str], subprocess.CompletedProcess[str]],
) -> None:
    result = in_bash(
        f"mnist-cli train {' '.join(TINY)} out=run >&- ; echo $?; mnist-cli trian >&-; echo $?;"
        " mnist-cli --version >&-; echo $?; mnist-cli trian 2>&-; echo $?"
    )
    assert "Traceback" not in result.stderr
    train, *others = result.stdout.split()
    assert (train, others[0], others[2]) == ("0", "2", "2")
    assert json.loads(Path("run/result.json").read_text())["status"] == "completed"


def test_odd_surroundings() -> None:
    """ASCII only, one column."""
    surroundings = {"PYTHONIOENCODING": "ascii", "COLUMNS": "1", "LC_ALL": "C"}
    result = program("train", *TINY, "out=gru\u00df", env=surroundings)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(Path("gru\u00df/result.json").read_text())["status"] == "completed"
    assert "accuracy" in result.stdout and result.stdout.isascii()
    result = program("tr\u00e4in", env=surroundings)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 2)


@pytest.mark.torture
def test_without_assertions() -> None:
    result = program("train", "optim.lrr=1", python=("-O",))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: unknown key 'optim.lrr'\nhint: did you mean optim.lr=...?\n"
    if TORTURE:  # here torch is compiled anew for -O
        result = program("train", *TINY, "out=run", python=("-O",))
        assert (result.returncode, result.stderr) == (0, "")


def test_json_alone_on_stdout_of_a_real_process() -> None:
    result = program("train", *TINY, "--json", "out=run")
    assert result.returncode == 0
    assert json.loads(result.stdout) == json.loads(Path("run/result.json").read_text())
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(compose.IS_13, reason="Hydra 1.3 has no whitelist; README says what to trust")
def test_a_configuration_can_not_name_foreign_code(mnist_cli: Program, tmp_path: Path) -> None:
    folder, touched = tmp_path / "theirs", tmp_path / "touched"
    (folder / "evil").mkdir(parents=True)
    (folder / "evil" / "on.yaml").write_text(
        f"# @package hydra.callbacks\nx: {{_target_: pathlib.Path.touch, _args_: [{touched}]}}\n"
    )
    words = ("train", "dataset=digits", "+evil=on", "hydra.verbose=false")
    outcome = mnist_cli(*words, "--config-dir", str(folder))
    assert outcome.code == 2 and "whitelist" in outcome.error
    assert not touched.exists()


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("predict images=[a.png] checkpoint=a,b out=c", "type a folder for each"),
        ("predict images=a.png,b.png checkpoint=a out=c", "run them one by one"),
        ("eval checkpoint=a split=val,test out=c", "run them one by one"),
        ("eval checkpoint=a,b out=c hydra.verbose=false", "type a folder for each"),
        ("eval checkpoint=a split=val,test out=c,./c", "run them one by one"),
        ("export checkpoint=a,b format=onnx out=c", "type a folder for each"),
        ("export checkpoint=a format=onnx opset=18,19 overwrite=true", "run them one by one"),
        ("export checkpoint=a,a/last.safetensors format=onnx", "type a folder for each"),
        ("report run=a,b out=c", "run them one by one"),
    ],
)
def test_jobs_that_would_write_the_same_file_are_refused_before_the_first(
    mnist_cli: Program, empty_cwd: Path, line: str, hint: str
) -> None:
    command, *words = line.split()
    ended = mnist_cli(command, "-m", *words)
    assert (ended.code, ended.stdout) == (2, "")
    place = empty_cwd / ("c" if "out=" in line else "a")
    assert f"two jobs would write the same file in '{place}'" in ended.error
    assert ended.hint.startswith(hint)
    assert not list(empty_cwd.iterdir())


def test_jobs_that_write_different_files_are_run(mnist_cli: Program, empty_cwd: Path) -> None:
    for words in (
        ("eval", "checkpoint=a,b", "out=c/${checkpoint}"),
        ("export", "checkpoint=a", "format=onnx,safetensors", "out=c"),
        ("export", "checkpoint=a/lr=0.1,a/lr=0.2", "format=onnx"),
        ("eval", "checkpoint=a,b"),
        ("report", "run=a,b"),
    ):
        ended = mnist_cli(words[0], "-m", *words[1:])
        assert ended.code == 1 and "2 of 2 jobs failed" in ended.error
