"""Datasets as a command sees them: loading, splitting, normalising, caching."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import part_contents, small_source, write, write_mnist_like
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_cli.dataset import (
    DatasetSpec,
    Normalise,
    Split,
    cache,
    image_files,
    load,
    sources,
    split,
)
from mnist_cli.dataset.decode import content_digest, statistics
from mnist_cli.errors import DataError, UsageError
from mnist_cli.options import DigitsConfig, EmnistConfig, ImageFilesConfig, LinearDatasetConfig

ROOT = Path(__file__).parents[1]
DIGITS_DIGEST = "3967b44e443fe5839044407fa045a18942da9c2b2558ad4b7089e076e96f5c48"


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MNIST_CLI_DATA", raising=False)
    return tmp_path / "cache"


REAL_MNIST = os.environ.get("MNIST_CLI_DATA") or str(ROOT.parent / "shared" / "mnist")


@pytest.fixture
def real_mnist() -> str:
    if not Path(REAL_MNIST).is_dir():
        pytest.skip("the real MNIST is not here: set MNIST_CLI_DATA")
    return REAL_MNIST


def mnist_config(root: str, val_fraction: float = 0.1) -> ImageFilesConfig:
    return ImageFilesConfig(name="mnist", val_fraction=val_fraction, root=root, mirror=None)


def linear_config(**changes: object) -> LinearDatasetConfig:
    plain = LinearDatasetConfig(
        name="linear", num_samples=5, num_features=1, noise=0.0, val_fraction=0.0
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


# --- splits --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    fraction=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**32 - 1),
)
def test_stratified_split_is_a_partition_near_to_the_fraction(
    counts: list[int], fraction: float, seed: int
) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    try:
        train, val = split.stratified(labels.astype(np.uint8), fraction, seed)
    except UsageError as error:
        assert "dataset.val_fraction=" in error.message
        # A class has no more than a row on one side where whole rows are exact to less than one.
        assert any(count * min(fraction, 1 - fraction) < 1 for count in counts)
        return
    assert sorted([*train, *val]) == list(range(len(labels)))
    assert list(train) == sorted(train) and list(val) == sorted(val)
    assert len(val) == round(len(labels) * fraction)
    held = np.bincount(labels[val], minlength=len(counts))
    assert (abs(held - np.array(counts) * fraction) < 1 + 1e-9).all()
    if fraction > 0:
        assert (held > 0).all() and (held < counts).all()


def test_split_is_a_function_of_its_arguments() -> None:
    labels = np.arange(1000, dtype=np.uint8) % 10
    first, again, other = (split.stratified(labels, 0.1, seed)[1] for seed in (7, 7, 8))
    assert (first == again).all()
    assert not np.array_equal(first, other)
    assert hashlib.sha256(first.astype("<i8").tobytes()).hexdigest()[:16] == "0b1c17d900b1ba32"


@pytest.mark.parametrize(("fraction", "rows"), [(0.01, 20), (0.99, 20), (0.5, 10)])
def test_too_small_or_large_a_fraction_names_the_key(fraction: float, rows: int) -> None:
    labels = np.arange(rows, dtype=np.uint8) % 10
    with pytest.raises(UsageError, match=r"dataset\.val_fraction=") as caught:
        split.stratified(labels, fraction, 0)
    assert "type dataset.val_fraction=0" in caught.value.hint
    with pytest.raises(UsageError, match="5 rows"):
        split.random(5, 0.05, 0)


# --- normalising ---------------------------------------------------------------------------------


def test_statistics_are_exact() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, 3, 5, 4), np.uint8))
    mean, std = statistics(images)
    scaled = images.numpy().astype(np.longdouble) / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).astype(float), rel=1e-15)
    assert std == pytest.approx(scaled.std((0, 2, 3)).astype(float), rel=1e-15)
    assert statistics(torch.full((2, 1, 2, 2), 255, dtype=torch.uint8)) == ((1.0,), (1.0,))


def spec_of(mean: tuple[float, ...], std: tuple[float, ...]) -> DatasetSpec:
    return DatasetSpec("any", "classification", (3, 8, 8), ("a", "b"), mean, std, "")


def test_normalise_makes_zero_mean_and_unit_deviation() -> None:
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (50, 3, 8, 8), np.uint8))
    mean, std = statistics(images)
    normalise = Normalise(spec_of(mean, std))
    normal = normalise(images)
    assert normal.dtype == torch.float32 and normal.shape == images.shape
    assert normal.mean((0, 2, 3)).abs().max() < 1e-5
    assert (normal.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    assert (normal - expected).abs().max() < 1e-5
    assert torch.equal(normalise(images[7:9]), normal[7:9])


def test_floats_pass_unchanged() -> None:
    inputs = torch.randn(3, 2)
    assert Normalise(spec_of((), ()))(inputs) is inputs


# --- the datasets --------------------------------------------------------------------------------


def test_digits_are_the_known_ones_and_cached_without_sklearn(private_cache: Path) -> None:
    config = DigitsConfig(name="digits", val_fraction=0.1)
    data = load(config, seed=0)
    assert data.spec.digest == DIGITS_DIGEST
    assert (len(data.train), len(data.val), len(data.test)) == (1294, 144, 359)
    assert data.train.inputs.dtype == torch.uint8 and data.train.inputs.shape[1:] == (1, 8, 8)
    assert data.train.inputs.max() == 255 and data.train.targets.dtype == torch.int64
    official = torch.cat([data.train.inputs, data.val.inputs])  # without the test set
    assert (data.spec.mean, data.spec.std) == statistics(official)
    other = load(config, seed=1)
    assert torch.equal(other.test.inputs, data.test.inputs) and other.spec == data.spec
    assert not torch.equal(other.val.inputs, data.val.inputs)
    program = (
        "import sys; from mnist_cli.options import DigitsConfig;"
        "from mnist_cli.dataset import load;"
        "print(load(DigitsConfig(name='digits', val_fraction=0.1), 0).spec.digest,"
        " sorted({'sklearn', 'torchvision', 'PIL', 'hydra'} & set(sys.modules)))"
    )
    command = [sys.executable, "-W", "error", "-O", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{DIGITS_DIGEST} []\n"


def test_default_line_is_five_points_on_y_equals_2x() -> None:
    data = load(linear_config(), seed=0)
    assert data.train.inputs.flatten().tolist() == [-2, -1, 0, 1, 2]
    assert torch.equal(data.train.targets, 2 * data.train.inputs)
    assert torch.allclose(data.test.targets, 2 * data.test.inputs)
    assert len(data.val) == 0 and data.val.inputs.shape == (0, 1)
    assert data.spec.num_outputs == 1 and data.spec.classes == data.spec.mean == ()


def test_a_plane_with_noise() -> None:
    config = linear_config(num_samples=4000, num_features=3, noise=0.5, val_fraction=0.25)
    data = load(config, seed=0)
    assert data.train.inputs.shape == (3000, 3) and data.val.targets.shape == (1000, 1)
    assert data.test.inputs.dtype == data.test.targets.dtype == torch.float32
    assert data.test.inputs.abs().max() <= 2
    for part in (data.train, data.val, data.test):
        residual = part.targets - 2 * part.inputs.sum(1, keepdim=True)
        assert residual.std().item() == pytest.approx(0.5, rel=0.1)
    assert load(config, seed=5).spec == data.spec


def test_real_mnist(real_mnist: str) -> None:
    data = load(mnist_config(real_mnist), seed=0)
    assert (len(data.train), len(data.val), len(data.test)) == (54_000, 6_000, 10_000)
    assert data.spec.mean == pytest.approx((0.1306604762738429,), abs=0)
    assert data.spec.std == pytest.approx((0.3081078038564627,), abs=0)
    assert data.spec.num_outputs == 10 and data.spec.input_shape == (1, 28, 28)
    assert data.test.targets[:5].tolist() == [7, 2, 1, 0, 4]
    whole = load(mnist_config(real_mnist, val_fraction=0), seed=3)
    assert len(whole.train) == 60_000 and len(whole.val) == 0 and whole.spec == data.spec
    assert whole.train.targets[:5].tolist() == [5, 0, 4, 1, 9]
    assert (
        DatasetSpec(
            **{
                k: tuple(v) if isinstance(v, list) else v
                for k, v in json.loads(json.dumps(dataclasses.asdict(data.spec))).items()
            }
        )
        == data.spec
    )


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist"])
def test_mnist_is_not_taken_for_another_dataset(real_mnist: str, name: str) -> None:
    config = ImageFilesConfig(name=name, val_fraction=0.1, root=real_mnist, mirror=None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=f"expected a file of {name}, found one of mnist") as caught:
        load(config, seed=0)
    assert "dataset=mnist" in caught.value.hint


def test_another_dataset_is_not_taken_for_mnist(real_mnist: str, tmp_path: Path) -> None:
    for file in Path(real_mnist).glob("*.gz"):
        shutil.copyfile(file, tmp_path / file.name)
    labels = bytes([0, 0, 8, 1, 0, 0, 0x27, 0x10]) + bytes(n % 10 for n in range(10_000))
    write(tmp_path / "t10k-labels-idx1-ubyte.gz", labels)
    with pytest.raises(DataError, match=r"t10k-labels.*SHA-256 ff7bcfd4.*found [0-9a-f]{64}"):
        load(mnist_config(str(tmp_path)), seed=0)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("folder", [None, ".", "fashion_mnist"])
def test_layouts(tmp_path: Path, folder: str | None, suffix: str) -> None:
    source = write_mnist_like(tmp_path, "fashion_mnist", 40, 20, folder, suffix)
    decoded = image_files.load(source, str(tmp_path))
    contents = part_contents(source)
    assert decoded.train_images.numpy().tobytes() == contents["train-images-idx3-ubyte"][16:]
    assert decoded.test_labels.numpy().tobytes() == contents["t10k-labels-idx1-ubyte"][8:]


def test_root_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNIST_CLI_DATA", str(tmp_path))
    assert sources.data_root(None) == tmp_path
    assert sources.data_root("/elsewhere") == Path("/elsewhere")
    monkeypatch.setenv("MNIST_CLI_DATA", "")
    assert sources.data_root(None) == tmp_path / "cache" / "mnist-cli" / "data"
    with pytest.raises(UsageError, match=r"dataset\.root"):
        sources.data_root(" ")


def test_emnist_letters_are_upright_and_start_at_zero(tmp_path: Path) -> None:
    source = write_mnist_like(tmp_path, "emnist-letters", 52, 26)
    decoded = image_files.load(source, str(tmp_path))
    images = np.frombuffer(
        part_contents(source)["emnist-letters-train-images-idx3-ubyte"][16:], np.uint8
    )
    assert np.array_equal(
        decoded.train_images[:, 0].numpy(), images.reshape(52, 28, 28).swapaxes(1, 2)
    )
    assert decoded.train_labels[:3].tolist() == [0, 1, 2] and decoded.train_labels.max() == 25


@pytest.mark.parametrize("name", sources.EMNIST_SPLITS)
def test_emnist_splits_have_a_source(name: str) -> None:
    config = EmnistConfig(name="emnist", split=name, val_fraction=0.1, root=None, mirror=None)  # type: ignore[arg-type]
    source = sources.source_of(config)
    assert len(source.classes) == {"byclass": 62, "bymerge": 47, "balanced": 47, "letters": 26}.get(
        name, 10
    )


def test_cifar_records(tmp_path: Path) -> None:
    source = write_mnist_like(tmp_path, "cifar10", 100, 20, suffix="")
    decoded = image_files.load(source, str(tmp_path))
    assert decoded.train_images.shape == (100, 3, 32, 32) and len(decoded.mean) == 3
    record = part_contents(source)["data_batch_2.bin"][3073 : 2 * 3073]
    assert decoded.train_labels[21] == record[0]
    assert decoded.train_images[21].numpy().tobytes() == record[1:]


def test_split_moves_to_a_device() -> None:
    rows = Split(torch.zeros(2, 1), torch.zeros(2, 1)).to("meta")
    assert rows.inputs.device.type == rows.targets.device.type == "meta" and len(rows) == 2


# --- the cache -----------------------------------------------------------------------------------


def cache_file(folder: Path) -> Path:
    (path,) = (folder / "mnist-cli" / "decoded").glob("*.safetensors")
    return path


def test_cache_is_used_and_follows_its_sources(tmp_path: Path, private_cache: Path) -> None:
    source = write_mnist_like(tmp_path, "fashion_mnist", 40, 20)
    first = image_files.load(source, str(tmp_path))
    written = cache_file(private_cache).stat().st_mtime_ns
    again = image_files.load(source, str(tmp_path))
    assert cache_file(private_cache).stat().st_mtime_ns == written
    assert again.digest == first.digest and (again.mean, again.std) == (first.mean, first.std)
    assert torch.equal(again.train_images, first.train_images)
    labels = np.roll(np.arange(40, dtype=np.uint8) % 10, 1)
    write(
        tmp_path / source.folder / "train-labels-idx1-ubyte.gz",
        bytes([0, 0, 8, 1, 0, 0, 0, 40]) + labels.tobytes(),
    )
    changed = image_files.load(source, str(tmp_path))
    assert changed.digest != first.digest and torch.equal(
        changed.train_labels, torch.from_numpy(labels)
    )
    assert len(list(private_cache.rglob("*"))) == 3


def test_every_damaged_cache_is_rebuilt(tmp_path: Path, private_cache: Path) -> None:
    source = write_mnist_like(tmp_path, "fashion_mnist", 10, 10)
    first = image_files.load(source, str(tmp_path))
    digest, path = first.digest, cache_file(private_cache)
    good, key = path.read_bytes(), json.loads(_head(path))["key"]
    generator = np.random.default_rng(0)
    header_bits = range(8 * 1500)
    flips = [*generator.choice(header_bits, 150), *generator.integers(0, 8 * len(good), 150)]
    for bit in map(int, flips):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        loaded = cache.load(path, key)
        if loaded is not None:
            assert loaded.digest == content_digest(_tensors(loaded)) == digest
            assert (loaded.mean, loaded.std) == (first.mean, first.std)
    mean = repr(first.mean[0]).encode()
    assert good.count(mean) == 1
    for content in (
        good.replace(mean, b"0" * len(mean)),
        b"",
        good[:4],
        good[:-1],
        good + b"x",
        b"\xff" * 100,
        b"[" * 9000,
        good[:8] + b"[" * 9000,
    ):
        path.write_bytes(content)
        if content != good + b"x":
            assert cache.load(path, key) is None
        assert image_files.load(source, str(tmp_path)).digest == digest


def _head(path: Path) -> str:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    head: str = header["__metadata__"]["head"]
    return head


def _tensors(decoded: object) -> list[torch.Tensor]:
    return [getattr(decoded, name) for name in cache.TENSORS]


@pytest.mark.parametrize("kind", ["file", "folder", "pipe", "unwritable"])
def test_an_unusable_cache_is_no_error(tmp_path: Path, private_cache: Path, kind: str) -> None:
    source = write_mnist_like(tmp_path, "fashion_mnist", 10, 10)
    image_files.load(source, str(tmp_path))
    path = cache_file(private_cache)
    path.unlink()
    if kind == "folder":
        (path / "inside").mkdir(parents=True)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        shutil.rmtree(private_cache)
        if kind == "file":
            private_cache.write_text("")
        else:
            os.environ["XDG_CACHE_HOME"] = "/proc/nowhere"
    started = time.monotonic()
    assert len(image_files.load(source, str(tmp_path)).train_labels) == 10
    assert time.monotonic() - started < 5


def test_no_home_is_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "")
    source = write_mnist_like(tmp_path, "fashion_mnist", 10, 10)
    assert len(image_files.load(source, str(tmp_path)).train_labels) == 10
    with pytest.raises(DataError, match="HOME"):
        sources.data_root(None)


def test_what_a_killed_process_left_is_removed(tmp_path: Path, private_cache: Path) -> None:
    source = write_mnist_like(tmp_path, "fashion_mnist", 10, 10)
    image_files.load(source, str(tmp_path))
    path = cache_file(private_cache)
    names = (f".{path.name}.stale.tmp", f".fashion_mnist-0.{path.name}.stale.tmp")
    stale, elsewhere = (path.parent / name for name in names)
    fresh, foreign = (path.parent / name for name in (f".{path.name}.fresh.tmp", ".mnist-0.tmp"))
    for temporary in (stale, elsewhere, fresh, foreign):
        temporary.touch()
        if temporary != fresh:
            os.utime(temporary, (0, 0))
    image_files.load(source, str(tmp_path))
    assert {*path.parent.iterdir()} == {path, fresh, foreign}


def test_what_was_not_used_for_a_month_is_removed(tmp_path: Path, private_cache: Path) -> None:
    roots = [tmp_path / name for name in "abc"]
    paths: list[Path] = []
    for root in roots:
        source = write_mnist_like(root, "fashion_mnist", 10, 10)
        image_files.load(source, str(root))
        paths += {*(private_cache / "mnist-cli" / "decoded").iterdir()} - {*paths}
    month_ago = time.time() - cache.UNUSED_S - 60
    for path in paths:
        os.utime(path, (month_ago, month_ago))
    os.utime(paths[1], (month_ago + 120, month_ago))
    image_files.load(source, str(roots[0]))
    assert {*paths[0].parent.iterdir()} == {*paths[:2]}
    assert paths[0].stat().st_mtime == pytest.approx(month_ago)  # it was used, not written again


def test_a_full_disk_is_cleaned_before_it_is_written_to(
    tmp_path: Path, private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_mnist_like(tmp_path, "fashion_mnist", 10, 10)
    image_files.load(source, str(tmp_path))
    path = cache_file(private_cache)
    left = path.parent / f".{path.name}.left.tmp"
    left.touch()
    os.utime(left, (0, 0))
    path.unlink()
    monkeypatch.setattr(cache, "save", lambda *arguments: None)  # nothing can be written
    image_files.load(source, str(tmp_path))
    assert {*path.parent.iterdir()} == set()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_digest_sees_types_shapes_and_bytes(seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 255, 12, np.uint8)
    flat = torch.from_numpy(values)
    digests = {
        content_digest([t])
        for t in (flat, flat.view(3, 4), flat.view(4, 3), flat + 1, flat.float())
    }
    assert len(digests) == 5


def test_small_source_shrinks_every_dataset() -> None:
    for name in ("mnist", "cifar10", "emnist-digits"):
        assert sum(part.count for part in small_source(name, 50, 10).train) in (50, 100)
