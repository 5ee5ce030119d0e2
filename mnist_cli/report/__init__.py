"""The command `report`: a page about a run, or about two beside each other.

    record     what a run left, read and checked
    run_page   one run
    compare    two runs on the same test samples
    plots      curves and diagrams as SVG
    pictures   images and weights as PNG
    page       templates into one file that loads nothing

A page is drawn from the run folder alone, by training's last act as by the command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mnist_cli import durable
from mnist_cli.config import ReportConfig
from mnist_cli.console import Console
from mnist_cli.report import compare, record, run_page
from mnist_cli.run import RunFolder, unique_folder

COMPARISONS = "outputs/report"


def run(config: ReportConfig, console: Console) -> dict[str, Any]:
    """The command `report`.

    Returns:
        `path` and `bytes` of the page and the `runs` it shows; of two classifiers also `mcnemar`.

    Raises:
        CheckpointError: a run folder, or what lies in it, can't be used.
        UsageError: two runs on different data can't be compared.
        ResourceError: the page can't be written.
    """
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
    data = html.encode()
    with durable.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    durable.write(path, data)
    console.say(f"wrote    {path} ({len(data):,} bytes)")
    return {"path": str(path), "bytes": len(data)} | document


def draw(folder: RunFolder, console: Console) -> None:
    """The page of a run that has just ended, into its folder. Raises what `run` raises."""
    with folder.log(console):
        html = run_page.render(record.load(str(folder.path), None, console))
        durable.write(folder.report, html.encode())
        console.detail(f"report   {folder.report}")
