"""The datasets that come as files: found, downloaded where needed, decoded once, cached."""

from __future__ import annotations

import ssl

from mnist_cli.dataset import download
from mnist_cli.dataset.cache import cached
from mnist_cli.dataset.decode import Decoded, decode
from mnist_cli.dataset.sources import Source, data_root
from mnist_cli.dataset.transfer import Patience
from mnist_cli.errors import DataError


def load(
    source: Source,
    root: str | None,
    mirror: str | None = None,
    patience: Patience | None = None,
    context: ssl.SSLContext | None = None,
    *,
    may_download: bool = True,
) -> Decoded:
    """The official sets of `source`.

    Args:
        source: the dataset.
        root: see `data_root`; it may be read-only where the files are there.
        mirror: https address to download from instead of the source's own.
        patience: see `download.fetch`.
        context: see `download.fetch`.
        may_download: False raises DataError where files are missing.

    Raises:
        DataError: the files are damaged, or neither there nor to be had.
        UsageError: MNIST_CLI_DOWNLOAD_TIMEOUT is not what it has to be.
    """
    folder = data_root(root)
    paths = source.find(folder)
    if paths is None and not may_download:
        raise DataError(
            f"{source.name} is not in {folder}, and nothing is downloaded for it",
            "name the folder with the data: dataset.root=DIR",
        )
    if paths is None:
        download.fetch(source, folder, mirror, patience, context)
        paths = source.find(folder)
    if paths is None:
        raise DataError(
            f"{source.name}: its files vanished from {folder}", "see who else writes to that folder"
        )
    found = paths
    return cached(source.name, found, lambda: decode(source, found))
