"""What can be configured: one frozen dataclass for each command.

`train_config` and its siblings turn plain data (a composed configuration, or the JSON of a
checkpoint) into one of them, after every type, range and cross-check. Neither Hydra nor
torch is imported here. What a key means and its default stand in `conf/`; types and ranges here,
those of the groups' options in options.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from mnist_cli.errors import UsageError, shown
from mnist_cli.options import (
    Count,
    DatasetConfig,
    EmnistConfig,
    Fraction,
    ImageFilesConfig,
    LinearDatasetConfig,
    LossConfig,
    MlpConfig,
    ModelConfig,
    OptimConfig,
    PluginLossConfig,
    Positive,
    ScheduleConfig,
    SgdConfig,
    unions_of,
)
from mnist_cli.typed import Range, parse

MAX_NUMBERS = 10**7  # of a synthetic training set


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStopConfig:
    patience: Count | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    model: ModelConfig
    optim: OptimConfig
    loss: LossConfig
    dataset: DatasetConfig
    schedule: ScheduleConfig
    seed: Annotated[int, Range(least=0, most=2**32 - 1)]
    epochs: Count
    batch_size: Count
    device: str
    precision: Literal["float32", "tf32", "bfloat16", "float16"]
    compile: bool
    cuda_graph: bool
    grad_clip: Positive | None
    grad_accum: Count
    monitor: Literal["auto", "val_loss", "val_accuracy", "val_mse"]
    early_stop: EarlyStopConfig
    save_every: Count | str | None
    resume: str | None
    resume_allow: tuple[str, ...]
    profile: bool
    plugin: tuple[str, ...]
    report: bool
    logger: tuple[Literal["tensorboard", "mlflow", "wandb"], ...]
    predictions: bool
    out: str | None

    @property
    def task(self) -> Literal["classification", "regression"]:
        return "regression" if isinstance(self.dataset, LinearDatasetConfig) else "classification"

    @property
    def monitored(self) -> str:
        """The metric that selects the best epoch, `auto` resolved."""
        automatic = {"classification": "val_accuracy", "regression": "val_mse"}
        return automatic[self.task] if self.monitor == "auto" else self.monitor


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """How `train -m` goes through its jobs. No job knows of it: it trains as it would alone."""

    jobs: Annotated[int, Range(least=1, most=1024)]
    fused: Literal["auto", "true", "false"]
    resume: str | None
    fail_fast: bool
    search: Literal["grid", "optuna"]
    trials: Annotated[int, Range(least=1, most=100_000)]
    sampler: Literal["tpe", "gp", "random", "grid"]
    pruner: Literal["none", "median", "halving"]
    objectives: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RootConfig:
    root: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    checkpoint: str
    split: Literal["test", "val", "train"]
    device: str
    dataset: RootConfig
    plugin: tuple[str, ...]
    out: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    checkpoint: str
    format: Literal["onnx", "torch_export", "safetensors"]
    opset: Annotated[int, Range(least=18, most=23)]
    quantize: Literal["none", "int8"]
    tolerance: Positive
    max_accuracy_drop: Fraction
    benchmark: bool
    overwrite: bool
    dataset: RootConfig
    plugin: tuple[str, ...]
    out: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictConfig:
    checkpoint: str
    images: tuple[str, ...]
    preprocess: Literal["auto", "none"]
    device: str
    plugin: tuple[str, ...]
    out: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    checkpoint: str
    port: Annotated[int, Range(least=0, most=65_535)]
    open: bool
    device: str
    plugin: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    run: tuple[str, ...]
    dataset: RootConfig
    plugin: tuple[str, ...]
    out: str | None


# Of the commands that can be a job of -m. DemoConfig is not: a page is served until it is stopped.
Config = TrainConfig | EvalConfig | ExportConfig | PredictConfig | ReportConfig

# What a search may optimize, and which way; `train_s` is the only one that doesn't repeat exactly.
OBJECTIVES: dict[str, Literal["minimize", "maximize"]] = {
    "val_accuracy": "maximize",
    "val_loss": "minimize",
    "val_mse": "minimize",
    "train_s": "minimize",
    "num_params": "minimize",
}


def is_maximized(metric: str) -> bool:
    """Whether the highest value of `metric` is the best."""
    return OBJECTIVES.get(metric) == "maximize"


# Keys of `train` that don't change the numbers of a run; they may differ when one is resumed.
FREE_KEYS = (
    "device",
    "cuda_graph",
    "dataset.root",
    "dataset.mirror",
    "save_every",
    "resume",
    "resume_allow",
    "profile",
    "plugin",
    "report",
    "logger",
    "predictions",
    "out",
)


def train_config(data: object) -> TrainConfig:
    """Parse and cross-check. Raises UsageError, naming both sides of what doesn't fit."""
    config = parse(TrainConfig, data, unions_of(data))
    _check_out(config.out)
    _check_device(config.device)
    if isinstance(config.model, MlpConfig) and len(config.model.hidden) > 64:
        raise UsageError(
            f"model.hidden has {len(config.model.hidden)} layers",
            "type at most 64: model.hidden=[512,256]",
        )
    if isinstance(config.dataset, ImageFilesConfig | EmnistConfig):
        _check_mirror(config.dataset.mirror)
    if isinstance(config.dataset, LinearDatasetConfig):
        _check_size(config.dataset)
    if isinstance(config.save_every, str):
        save_every_s(config.save_every)
    if config.resume is not None and not config.resume.strip():
        raise UsageError("resume= is empty", "name a run folder: resume=RUN")
    if config.resume == "auto" and config.out is None:
        raise UsageError("resume=auto needs out=DIR", "name the folder: resume=auto out=DIR")
    if config.resume not in (None, "auto"):
        if config.out is not None and absolute(config.out) != absolute(str(config.resume)):
            raise UsageError(
                f"resume={config.resume} and out={config.out} name two folders",
                "drop out=: a run is continued in its own folder",
            )
        return config  # checked when resume.merge has laid it over what the run holds
    _check_task(config)
    _check_optim(config)
    _check_length(config)
    if config.precision in ("tf32", "float16") and config.device == "cpu":
        raise UsageError(
            f"precision={config.precision} doesn't go with device=cpu",
            "type device=cuda, or leave precision=float32",
        )
    return config


def sweep_config(data: object) -> SweepConfig:
    """Parse and check the keys `sweep.*` of `train`. Raises UsageError."""
    if isinstance(data, dict) and isinstance(data.get("fused"), bool):
        data = data | {"fused": str(data["fused"]).lower()}
    config = parse(_SweepBlock, {"sweep": data}).sweep
    if config.resume is not None and not config.resume.strip():
        raise UsageError("sweep.resume= is empty", "name the folder of a sweep: sweep.resume=DIR")
    if config.fused == "true" and config.search == "optuna":
        raise UsageError(
            "sweep.fused=true doesn't go with sweep.search=optuna, which chooses job after job",
            "leave either out",
        )
    for name in config.objectives:
        if name not in OBJECTIVES:
            raise UsageError(
                f"sweep.objectives names {shown(name)}, which is no choice",
                f"name some of: {', '.join(OBJECTIVES)}",
            )
    if len(config.objectives) != len(set(config.objectives)):
        raise UsageError("sweep.objectives names one of them twice", "name each once")
    if config.objectives and config.pruner != "none" and len(config.objectives) > 1:
        raise UsageError(
            f"sweep.pruner={config.pruner} compares one value, but sweep.objectives names"
            f" {len(config.objectives)}",
            "type sweep.pruner=none, or one objective",
        )
    return config


@dataclass(frozen=True, kw_only=True, slots=True)
class _SweepBlock:
    sweep: SweepConfig


def eval_config(data: object) -> EvalConfig:
    """Parse and check. Raises UsageError."""
    config = parse(EvalConfig, data)
    _check_out(config.out)
    _check_checkpoint(config.checkpoint, "eval")
    _check_device(config.device)
    return config


def export_config(data: object) -> ExportConfig:
    """Parse and cross-check. Raises UsageError."""
    config = parse(ExportConfig, data)
    _check_out(config.out)
    _check_checkpoint(config.checkpoint, "export")
    if config.quantize != "none" and config.format != "onnx":
        raise UsageError(
            f"quantize={config.quantize} doesn't go with format={config.format}", "type format=onnx"
        )
    return config


def predict_config(data: object) -> PredictConfig:
    """Parse and check. Raises UsageError."""
    config = parse(PredictConfig, data)
    _check_out(config.out)
    _check_checkpoint(config.checkpoint, "predict")
    if not all(config.images) or not config.images:
        raise UsageError(
            "images= is empty" if not any(config.images) else "images= names a file without a name",
            "name files, folders or globs: images=a.png,b.png",
        )
    _check_device(config.device)
    return config


def demo_config(data: object) -> DemoConfig:
    """Parse and check. Raises UsageError."""
    config = parse(DemoConfig, data)
    _check_checkpoint(config.checkpoint, "demo")
    _check_device(config.device)
    return config


def report_config(data: object) -> ReportConfig:
    """Parse and check. Raises UsageError."""
    config = parse(ReportConfig, data)
    _check_out(config.out)
    if not config.run or not all(config.run):
        raise UsageError("run= is empty", "name a run folder: mnist-cli report run=RUN")
    if len(config.run) > 2:
        raise UsageError(
            f"run= names {len(config.run)} runs", "name one, or two to compare: run=A,B"
        )
    return config


def absolute(path: str) -> str:
    """`path` as it is meant here, for those who stand in another folder."""
    return os.path.abspath(os.path.expanduser(path))


def _check_out(out: str | None) -> None:
    if out is not None and not out.strip():
        raise UsageError("out= is empty", "name a folder (out=DIR), or leave it out")


def _check_checkpoint(checkpoint: str, command: str) -> None:
    if not checkpoint:
        raise UsageError("checkpoint= is empty", f"name one: mnist-cli {command} checkpoint=RUN")


def _check_device(device: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?", device):
        raise UsageError(
            f"device='{device}' is not a choice", "device is one of: auto, cpu, cuda, cuda:N"
        )


def _check_mirror(mirror: str | None) -> None:
    if mirror is not None and not re.fullmatch(r"https://[!-~]+", mirror, re.IGNORECASE):
        raise UsageError(
            f"dataset.mirror={shown(mirror)} is not an https address",
            "type dataset.mirror=https://HOST/FOLDER/",
        )


def _check_size(dataset: LinearDatasetConfig) -> None:
    if dataset.num_samples * dataset.num_features > MAX_NUMBERS:
        raise UsageError(
            f"dataset.num_samples={dataset.num_samples} times"
            f" dataset.num_features={dataset.num_features} is more than {MAX_NUMBERS:,} numbers",
            "type fewer samples or features",
        )


def _check_task(config: TrainConfig) -> None:
    dataset, model, loss = config.dataset.name, config.model.name, config.loss.name
    if config.task == "regression":
        if loss != "mse" and not isinstance(config.loss, PluginLossConfig):
            raise UsageError(
                f"loss={loss} compares classes, but dataset={dataset} holds numbers",
                "type loss=mse",
            )
        if model.startswith("cnn"):
            raise UsageError(
                f"model={model} needs images, but dataset={dataset} holds numbers",
                "type model=linear or model=mlp",
            )
        if config.monitor == "val_accuracy":
            raise UsageError(
                f"monitor=val_accuracy counts classes, but dataset={dataset} holds numbers",
                "type monitor=val_mse or monitor=val_loss",
            )
    elif config.monitor == "val_mse":
        raise UsageError(
            f"monitor=val_mse is for numbers, but dataset={dataset} holds classes",
            "type monitor=val_accuracy or monitor=val_loss",
        )


def _check_optim(config: TrainConfig) -> None:
    optim = config.optim
    if isinstance(optim, SgdConfig) and optim.nesterov and optim.momentum == 0:
        raise UsageError(
            f"optim.nesterov=true needs momentum, but optim.momentum={optim.momentum:g}",
            "type optim.momentum=0.9",
        )


def _check_length(config: TrainConfig) -> None:
    patience = config.early_stop.patience
    if patience is not None and config.dataset.val_fraction == 0:
        raise UsageError(
            f"early_stop.patience={patience} watches the validation split,"
            " but dataset.val_fraction=0 leaves none",
            "type dataset.val_fraction=0.1, or early_stop.patience=null",
        )
    if config.monitor != "auto" and config.dataset.val_fraction == 0:
        raise UsageError(
            f"monitor={config.monitor} watches the validation split,"
            " but dataset.val_fraction=0 leaves none",
            "type dataset.val_fraction=0.1, or monitor=auto",
        )
    if config.schedule.warmup_epochs >= config.epochs and config.schedule.warmup_epochs > 0:
        raise UsageError(
            f"schedule.warmup_epochs={config.schedule.warmup_epochs:g} doesn't fit into"
            f" epochs={config.epochs}",
            "type a warm-up that is shorter than the run",
        )


def save_every_s(text: str) -> float:
    """Seconds in `30s`. Raises UsageError for anything else."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)s", text)
    if not match or float(match[1]) == 0:
        raise UsageError(
            f"save_every='{text}' is neither steps nor seconds",
            "type save_every=500 for steps or save_every=30s for seconds",
        )
    return float(match[1])


def to_plain(config: Config) -> dict[str, Any]:
    """The configuration as dicts, lists and plain values; `train_config` reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[no-any-return]


def flatten(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            flatten(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
        )
    return flat


def config_hash(config: TrainConfig) -> str:
    """64 hexadecimal digits, equal for configurations that lead to the same numbers."""
    deciding = {
        key: value for key, value in flatten(to_plain(config)).items() if key not in FREE_KEYS
    }
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
