"""The catalogue of the image datasets that come as files, and where the files may lie.

A `Source` says everything that is known about one dataset before a byte of it is read.
"""

from __future__ import annotations

import os
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mnist_cli.dataset import cifar, idx
from mnist_cli.dataset.files import FilesError
from mnist_cli.errors import UsageError
from mnist_cli.options import EmnistConfig, ImageFilesConfig

# SHA-256 of MNIST's unpacked files. Fashion-MNIST and KMNIST use the same names, counts and shapes.
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


@dataclass(frozen=True)
class Part:
    """One source file; `file` is its name without `.gz`, `sha256` that of its unpacked content."""

    file: str
    holds: Literal["images", "labels", "records"]
    count: int
    sha256: str | None = None


@dataclass(frozen=True)
class Archive:
    """A tar or zip file that holds the parts as `prefix` + name of the part + `suffix`."""

    path: str  # below the root, where torchvision keeps it too
    prefix: str
    suffix: str
    max_bytes: int

    @property
    def file(self) -> str:
        return Path(self.path).name


@dataclass(frozen=True)
class Source:
    """An image dataset that comes as files.

    Attributes:
        name: how the cache and messages call it.
        train, test: the parts of the official training and test set.
        image_shape: (C, H, W).
        classes: a name for each class.
        folder: where a download goes, below the root, as torchvision lays it out.
        other_folders: where else the parts may lie, in this order.
        mirrors: https addresses that the name of a file is appended to.
        torchvision: the class of torchvision.datasets that knows the md5 of each download.
        md5: the md5 of each download, where it isn't torchvision that knows it.
        archive: the file that all parts are downloaded in; None where each is one download.
        first_label: the number that stands for the first class in the files.
        transposed: whether the files hold columns for rows.
        pickled_folder: a folder with the same data in a format that is never read.
    """

    name: str
    train: tuple[Part, ...]
    test: tuple[Part, ...]
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    folder: str
    other_folders: tuple[str, ...] = (".",)
    mirrors: tuple[str, ...] = ()
    torchvision: str | None = None
    md5: Mapping[str, str] | None = None
    archive: Archive | None = None
    first_label: int = 0
    transposed: bool = False
    pickled_folder: str | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.train + self.test

    def num_bytes(self, part: Part) -> int:
        """The size of the unpacked file."""
        if part.holds == "records":
            return cifar.num_bytes(part.count, self.image_shape)
        shape = self.image_shape[1:] if part.holds == "images" else ()
        return idx.num_bytes((part.count, *shape))

    def find(self, root: Path) -> tuple[Path, ...] | None:
        """The path of each part, from the first folder that has them all."""
        for folder in self._folders:
            paths = [_existing(root / folder, part) for part in self.parts]
            found = tuple(path for path in paths if path is not None)
            if len(found) == len(paths):
                return found
        return None

    def lacking(self, root: Path) -> tuple[Part, ...]:
        """The parts that aren't in the folder that has most of them."""
        lacks = [
            tuple(part for part in self.parts if _existing(root / folder, part) is None)
            for folder in self._folders
        ]
        return min(lacks, key=len)

    @property
    def _folders(self) -> tuple[str, ...]:
        return (*self.other_folders[:-1], self.folder, *self.other_folders[-1:])

    def missing(self, root: Path) -> tuple[Part, ...]:
        """The parts that aren't where a download puts them."""
        return tuple(part for part in self.parts if _existing(root / self.folder, part) is None)


def _existing(folder: Path, part: Part) -> Path | None:
    """The file of `part`, unpacked or gzipped; whatever has its name counts, a pipe too."""
    for name in (part.file, f"{part.file}.gz"):
        if os.path.lexists(folder / name):
            return folder / name
    return None


def idx_parts(
    prefix: str, count: int, sha256: Mapping[str, str] | None = None
) -> tuple[Part, Part]:
    """The two IDX files of a training or test set, `prefix` being `train`, `t10k` and the like."""
    images, labels = f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"
    pinned = sha256 or {}
    return (
        Part(images, "images", count, pinned.get(images)),
        Part(labels, "labels", count, pinned.get(labels)),
    )


def cifar_parts(files: tuple[str, ...], count: int) -> tuple[Part, ...]:
    """CIFAR's batches of `count` records each."""
    return tuple(Part(file, "records", count) for file in files)


def _mnist_like(
    name: str, torchvision: str, classes: tuple[str, ...], mirrors: tuple[str, ...]
) -> Source:
    pinned = MNIST_SHA256 if name == "mnist" else None
    return Source(
        name=name,
        train=idx_parts("train", 60_000, pinned),
        test=idx_parts("t10k", 10_000, pinned),
        image_shape=(1, 28, 28),
        classes=classes,
        folder=f"{torchvision}/raw",
        other_folders=(name, "."),
        mirrors=mirrors,
        torchvision=torchvision,
    )


DIGITS = tuple(string.digits)
MERGED = tuple(
    c for c in sorted(string.digits + string.ascii_letters) if c not in "cijklmopsuvwxyz"
)

# split: training images, test images, classes (https://arxiv.org/abs/1702.05373 and the files)
EMNIST_SPLITS = {
    "byclass": (697_932, 116_323, tuple(sorted(string.digits + string.ascii_letters))),
    "bymerge": (697_932, 116_323, MERGED),
    "balanced": (112_800, 18_800, MERGED),
    "letters": (124_800, 20_800, tuple(string.ascii_lowercase)),
    "digits": (240_000, 40_000, DIGITS),
    "mnist": (60_000, 10_000, DIGITS),
}


def emnist(split: str) -> Source:
    """One of EMNIST's six splits."""
    num_train, num_test, classes = EMNIST_SPLITS[split]
    return Source(
        name=f"emnist-{split}",
        train=idx_parts(f"emnist-{split}-train", num_train),
        test=idx_parts(f"emnist-{split}-test", num_test),
        image_shape=(1, 28, 28),
        classes=classes,
        folder="EMNIST/raw",
        other_folders=("emnist", "."),
        mirrors=("https://biometrics.nist.gov/cs_links/EMNIST/",),
        torchvision="EMNIST",
        archive=Archive("EMNIST/raw/gzip.zip", "gzip/", ".gz", max_bytes=1 << 30),
        first_label=1 if split == "letters" else 0,
        transposed=True,
    )


MNIST = _mnist_like(
    "mnist",
    "MNIST",
    DIGITS,
    (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
)
FASHION_MNIST = _mnist_like(
    "fashion_mnist",
    "FashionMNIST",
    (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    ("https://storage.googleapis.com/tensorflow/tf-keras-datasets/",),
)
KMNIST = _mnist_like(
    "kmnist",
    "KMNIST",
    ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    ("https://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
)
CIFAR10 = Source(
    name="cifar10",
    train=cifar_parts(tuple(f"data_batch_{n}.bin" for n in range(1, 6)), 10_000),
    test=cifar_parts(("test_batch.bin",), 10_000),
    image_shape=(3, 32, 32),
    classes=(
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
    folder="cifar-10-batches-bin",
    other_folders=("cifar10", "."),
    mirrors=("https://www.cs.toronto.edu/~kriz/",),
    md5={"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
    archive=Archive("cifar-10-binary.tar.gz", "cifar-10-batches-bin/", "", max_bytes=256 << 20),
    pickled_folder="cifar-10-batches-py",
)
SOURCES = {source.name: source for source in (MNIST, FASHION_MNIST, KMNIST, CIFAR10)}


def source_of(config: ImageFilesConfig | EmnistConfig) -> Source:
    """The source that a configuration names."""
    return emnist(config.split) if isinstance(config, EmnistConfig) else SOURCES[config.name]


def data_root(root: str | None) -> Path:
    """Where source files lie: `root`, else $MNIST_CLI_DATA, else the user's cache folder.

    Raises:
        UsageError: `root` is empty.
        FilesError: none is given, and the user has no home.
    """
    if root is not None and not root.strip():
        raise UsageError("dataset.root is empty", "name a folder: dataset.root=DIR")
    chosen = root or os.environ.get("MNIST_CLI_DATA")
    if chosen:
        return Path(os.path.abspath(os.path.expanduser(chosen)))
    cache = user_cache()
    if cache is None:
        raise FilesError(
            "there is no folder for data: HOME is not set",
            "set MNIST_CLI_DATA=DIR, or type dataset=digits",
        )
    return cache / "data"


def user_cache() -> Path | None:
    """Our folder in the user's cache, if there is one (https://specifications.freedesktop.org/basedir)."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):
        home = os.environ.get("HOME", os.path.expanduser("~"))
        folder = os.path.join(home, ".cache")
    return Path(folder) / "mnist-cli" if os.path.isabs(folder) else None
