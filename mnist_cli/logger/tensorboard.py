"""TensorBoard: scalars, hyperparameters, the surest mistakes and the graph, as event files.

`RUN/tensorboard` holds one event file. A run that is resumed writes it anew from metrics.csv, and
its first event tells a TensorBoard that is open to forget what the old one said.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mnist_cli import metrics
from mnist_cli.config import TrainConfig
from mnist_cli.logger import Finished, Row, Status, finals_of, numbers_of, params_of
from mnist_cli.run import RunFolder

NUM_MISTAKES = 12  # as many as can be read in the small picture that TensorBoard shows first


class TensorBoard:
    def __init__(self, config: TrainConfig, folder: RunFolder) -> None:
        self._config = config
        path = folder.path / "tensorboard"
        self.where = str(path)
        before = sorted(path.glob("events.out.tfevents.*"))
        for file in before:
            file.unlink()
        self._hook = threading.excepthook
        threading.excepthook = self._hear
        try:
            self._writer: Any = SummaryWriter(str(path), purge_step=1 if before else None)
        except BaseException:
            threading.excepthook = self._hook
            raise

    def log(self, row: Row) -> None:
        for name, value in numbers_of(row).items():
            self._writer.add_scalar(f"epoch/{name}", value, int(row["epoch"] or 0))
        self._writer.flush()

    def finish(self, finished: Finished) -> None:
        finals, writer = finals_of(finished.result), self._writer
        for name, value in finals.items():
            writer.add_scalar(name, value, finished.epoch)
        for summary in hparams(params_of(self._config), finals):
            writer.file_writer.add_summary(summary)
        if finished.data.spec.task == "classification":
            wrong = metrics.mistakes(finished.outputs, finished.data.test.targets)
            if len(wrong):
                sheet = _sheet(finished, wrong[:NUM_MISTAKES])
                writer.add_figure("surest mistakes", sheet, finished.epoch)
        device = next(finished.model.parameters()).device
        sample = torch.zeros((1, *finished.data.spec.input_shape), device=device)
        writer.add_graph(finished.model, sample)
        writer.flush()

    def close(self, status: Status) -> None:
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._hook

    def _hear(self, failure: threading.ExceptHookArgs) -> None:
        """A writing thread that dies prints no traceback: the next call raises what it died of."""
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self._hook(failure)


def _sheet(finished: Finished, shown: torch.Tensor) -> Any:
    """The test images `shown`, each below its truth and the answer it got, as a figure."""
    from matplotlib.figure import Figure

    test, classes = finished.data.test, finished.data.spec.classes
    answers, probabilities = metrics.surest(finished.outputs[shown])
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2 * columns, 2.6 * rows), layout="constrained")
    for place, index in enumerate(shown.tolist()):
        axes = figure.add_subplot(rows, columns, place + 1)
        image = test.inputs[index].movedim(0, -1).cpu().numpy()
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
        truth, answer = classes[int(test.targets[index])], classes[int(answers[place])]
        title = f"{truth} taken for {answer}\n{float(probabilities[place]):.1%}"
        axes.set_title(title, fontsize=14, parse_math=False)
    return figure
