"""The command `report`: a page about a run or a sweep, or about two runs beside each other.

    record        what a run left, read and checked
    run_page      one run
    compare       two runs on the same test samples
    plots         their curves and diagrams
    pictures      images and weights as PNG
    sweep_record  what a sweep left, read and checked
    sweep_page    a sweep
    sweep_plots   its diagrams
    sweep_axes    where values stand in them
    canvas        drawings as SVG
    page          templates into one file that loads nothing

A page is drawn from the folder alone, by the last act of training as by the command. A sweep's
needs no torch, which the process of a sweep may not have loaded.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_cli import durable
from mnist_cli.config import ReportConfig
from mnist_cli.console import Console
from mnist_cli.imports import importing
from mnist_cli.run import RunFolder, unique_folder

if TYPE_CHECKING:
    from mnist_cli.report.sweep_record import SweepRecord

COMPARISONS = "outputs/report"

# While it is imported, it tells of its folders and fonts.
logging.getLogger("matplotlib").setLevel(logging.ERROR)


def run(config: ReportConfig, console: Console) -> dict[str, Any]:
    """The command `report`.

    Returns:
        `path` and `bytes` of the page and the `runs` it shows; of a sweep also `sweep_dir`, of two
        classifiers `mcnemar`.

    Raises:
        CheckpointError: a folder, or what lies in it, can't be used.
        UsageError: two runs on different data can't be compared.
        ResourceError: the page can't be written.
    """
    with importing():
        from mnist_cli.report import sweep_record

    first = Path(os.path.expanduser(config.run[0]))
    if len(config.run) == 1 and sweep_record.is_sweep(first):
        return _of_sweep(first, config, console)
    with importing():  # torch, which the page of a sweep doesn't need
        from mnist_cli.report import compare, record, run_page

    loaded = [record.load(name, config.dataset.root, console) for name in config.run]
    for each in loaded:
        if each.missing:
            console.warn(f"{each.path} is shown without its test samples: {each.missing}")
    document: dict[str, Any] = {"runs": [str(each.path) for each in loaded]}
    if len(loaded) == 1:
        folder = loaded[0].path if config.out is None else Path(config.out)
        path, html = folder / "report.html", run_page.render(loaded[0])
    else:
        comparison = compare.compare(*loaded)
        folder = unique_folder(Path(COMPARISONS)) if config.out is None else Path(config.out)
        path, html = folder / "compare.html", compare.render(comparison)
        document |= {"mcnemar": comparison.mcnemar}
        if comparison.verdict:
            console.say(comparison.verdict)
    return _write(path, html, console) | document


def draw(folder: RunFolder, console: Console) -> None:
    """The page of a run that has just ended, into its folder. Raises what `run` raises."""
    with importing():
        from mnist_cli.report import record, run_page

    with folder.log(console):
        html = run_page.render(record.load(str(folder.path), None, console))
        durable.write(folder.report, _encoded(html))
        console.detail(f"report   {folder.report}")


def draw_sweep(folder: Path, console: Console) -> None:
    """The page of a sweep that has just ended, into its folder. Raises what `run` raises."""
    path, (_, html) = folder / "report.html", _sweep_page(folder)
    durable.write(path, _encoded(html))
    console.detail(f"report   {path}")


def _of_sweep(folder: Path, config: ReportConfig, console: Console) -> dict[str, Any]:
    record, html = _sweep_page(folder)
    path = (folder if config.out is None else Path(config.out)) / "report.html"
    runs = [str(folder / job) for row in record.rows for job in row.jobs]
    return _write(path, html, console) | {"sweep_dir": str(folder), "runs": runs}


def _sweep_page(folder: Path) -> tuple[SweepRecord, str]:
    with importing():
        from mnist_cli.report import sweep_page, sweep_record

    record = sweep_record.load(folder)
    return record, sweep_page.render(record)


def _write(path: Path, html: str, console: Console) -> dict[str, Any]:
    data = _encoded(html)
    durable.make_folder(path.parent)
    durable.write(path, data)
    console.say(f"wrote    {path} ({len(data):,} bytes)")
    return {"path": str(path), "bytes": len(data)}


def _encoded(html: str) -> bytes:
    return html.encode("utf-8", "backslashreplace")  # the name of a folder can be any bytes
