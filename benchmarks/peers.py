"""What people write today, done well, to be measured beside mnist-cli.

    textbook      torchvision's dataset, a transform per sample, a DataLoader, `.item()` each step
    strong        the whole set as normalised float tensors, plain slices, fused optimizer, no sync
    scikit-learn  LogisticRegression for `linear`, MLPClassifier (no dropout) for `mlp`
    keras         `fit` of Keras 3, on JAX
    jax           an epoch as one compiled scan

    python benchmarks/peers.py strong --work mlp --epochs 1 --data DIR

prints one JSON line with the test accuracy and the seconds of training; with `--weights FILE` the
textbook evaluates weights instead. DIR holds MNIST as torchvision lays it out (DIR/MNIST/raw/...).
All train on all 60,000 images and test once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

MEAN, STD = 0.1307, 0.3081
HIDDEN = (512, 256)
DROPOUT = 0.2


class Outcome(NamedTuple):
    accuracy: float
    train_s: float


# --- torch ---------------------------------------------------------------------------------------


def torch_model(name: str) -> Any:
    from torch import nn

    relu, flat, pool = nn.ReLU, nn.Flatten, nn.MaxPool2d
    layers: dict[str, Callable[[], list[Any]]] = {
        "linear": lambda: [flat(), nn.Linear(784, 10)],
        "mlp": lambda: [
            flat(),
            nn.Linear(784, 512), relu(), nn.Dropout(DROPOUT),
            nn.Linear(512, 256), relu(), nn.Dropout(DROPOUT),
            nn.Linear(256, 10),
        ],
        "mlp_small": lambda: [
            flat(), nn.Linear(784, 64), relu(), nn.Dropout(DROPOUT), nn.Linear(64, 10),
        ],
        "cnn": lambda: [
            nn.Conv2d(1, 32, 3, padding=1), relu(), pool(2),
            nn.Conv2d(32, 64, 3, padding=1), relu(), pool(2),
            flat(), nn.Linear(3136, 128), relu(), nn.Linear(128, 10),
        ],
        "cnn_dropout": lambda: [
            nn.Conv2d(1, 32, 3), relu(), nn.Conv2d(32, 64, 3), relu(), pool(2),
            nn.Dropout(0.25), flat(), nn.Linear(9216, 128), relu(), nn.Dropout(0.5),
            nn.Linear(128, 10),
        ],
    }  # fmt: skip
    return nn.Sequential(*layers[name]())


def torch_optimizer(name: str, model: Any, lr: float, fused: bool) -> Any:
    import torch

    if name == "adadelta":
        return torch.optim.Adadelta(model.parameters(), lr=1.0)
    return torch.optim.Adam(model.parameters(), lr=lr, fused=fused)


def textbook(work: argparse.Namespace) -> Outcome:
    """The usual loop."""
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    torch.manual_seed(work.seed)
    device = torch.device(work.device)
    # On a GPU workers decode; on two cores of a CPU they only take turns with the training.
    workers = {"num_workers": 4, "persistent_workers": True, "pin_memory": True}
    options: dict[str, Any] = workers if device.type == "cuda" else {}
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
    test = DataLoader(datasets.MNIST(work.data, train=False, transform=transform), batch_size=1000)
    model = torch_model(work.work).to(device)
    started = time.perf_counter()
    if work.weights:
        model.load_state_dict(torch.load(work.weights, weights_only=True))
    else:
        data = datasets.MNIST(work.data, train=True, transform=transform)
        train = DataLoader(data, batch_size=work.batch_size, shuffle=True, **options)
        optim = torch_optimizer(work.optim, model, work.lr, fused=False)
        started = time.perf_counter()
        for _ in range(work.epochs):
            model.train()
            total = 0.0
            for batch in train:
                images, labels = (one.to(device, non_blocking=True) for one in batch)
                optim.zero_grad()
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                optim.step()
                total += loss.item()
    seconds = time.perf_counter() - started
    if work.save:
        torch.save(model.state_dict(), work.save)
    model.eval()
    with torch.no_grad():
        hits = sum(
            int((model(images.to(device)).argmax(dim=1).cpu() == labels).sum())
            for images, labels in test
        )
    return Outcome(hits / 10_000, seconds)


def strong(work: argparse.Namespace) -> Outcome:
    """A loop over preloaded tensors."""
    import torch
    import torch.nn.functional as F
    from torchvision import datasets

    torch.manual_seed(work.seed)
    device = torch.device(work.device)

    def tensors(train: bool) -> Any:
        found = datasets.MNIST(work.data, train=train)
        images = (found.data.unsqueeze(1).float() / 255 - MEAN) / STD
        return images.to(device), found.targets.to(device)

    (images, labels), (test_images, test_labels) = tensors(True), tensors(False)
    model = torch_model(work.work).to(device)
    optim = torch_optimizer(work.optim, model, work.lr, fused=True)
    started = time.perf_counter()
    for _ in range(work.epochs):
        model.train()
        for rows in torch.randperm(len(images), device=device).split(work.batch_size):
            optim.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optim.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    model.eval()
    with torch.inference_mode():
        answers = torch.cat([model(batch).argmax(dim=1) for batch in test_images.split(1000)])
    return Outcome(float((answers == test_labels).double().mean()), seconds)


# --- others --------------------------------------------------------------------------------------


def arrays(data: str, train: bool) -> tuple[Any, Any]:
    """Images (N, 784) float32, normalised, and labels (N,) of the one half of MNIST."""
    import numpy as np

    prefix = "train" if train else "t10k"
    raw = Path(data) / "MNIST" / "raw"
    images = np.fromfile(raw / f"{prefix}-images-idx3-ubyte", np.uint8, offset=16)
    labels = np.fromfile(raw / f"{prefix}-labels-idx1-ubyte", np.uint8, offset=8)
    scaled = (images.reshape(-1, 784).astype(np.float32) / 255 - MEAN) / STD
    return scaled.astype(np.float32), labels.astype(np.int64)


def scikit_learn(work: argparse.Namespace) -> Outcome:
    """Its own solver (L-BFGS) for `linear`; the same Adam for `mlp`, but it has no dropout."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    (images, labels), (test_images, test_labels) = arrays(work.data, True), arrays(work.data, False)
    if work.work == "linear":
        model = LogisticRegression(max_iter=30)
    else:
        model = MLPClassifier(
            HIDDEN, batch_size=work.batch_size, max_iter=work.epochs, alpha=0,
            random_state=work.seed,
        )  # fmt: skip
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(images, labels)
    return Outcome(model.score(test_images, test_labels), time.perf_counter() - started)


def keras(work: argparse.Namespace) -> Outcome:
    os.environ["KERAS_BACKEND"] = "jax"
    import keras as k

    k.utils.set_random_seed(work.seed)
    (images, labels), (test_images, test_labels) = arrays(work.data, True), arrays(work.data, False)
    layers = {
        "mlp": [
            k.layers.Dense(512, "relu"), k.layers.Dropout(DROPOUT),
            k.layers.Dense(256, "relu"), k.layers.Dropout(DROPOUT),
            k.layers.Dense(10),
        ],
        "cnn": [
            k.layers.Reshape((28, 28, 1)),
            k.layers.Conv2D(32, 3, padding="same", activation="relu"), k.layers.MaxPooling2D(),
            k.layers.Conv2D(64, 3, padding="same", activation="relu"), k.layers.MaxPooling2D(),
            k.layers.Flatten(), k.layers.Dense(128, "relu"), k.layers.Dense(10),
        ],
    }  # fmt: skip
    model = k.Sequential([k.Input((784,)), *layers[work.work]])
    loss = k.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=k.optimizers.Adam(0.001), loss=loss, metrics=["accuracy"])
    started = time.perf_counter()
    model.fit(images, labels, batch_size=work.batch_size, epochs=work.epochs, verbose=0)
    seconds = time.perf_counter() - started
    return Outcome(model.evaluate(test_images, test_labels, 1000, verbose=0)[1], seconds)


def jax(work: argparse.Namespace) -> Outcome:
    """Adam written out; the last, smaller batch of an epoch is left out, as scans do."""
    import jax as j
    import jax.numpy as jnp

    (images, labels), (test_images, test_labels) = arrays(work.data, True), arrays(work.data, False)
    sizes = (784, *(HIDDEN if work.work == "mlp" else ()), 10)
    key = j.random.key(work.seed)
    parameters = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        key, one, two = j.random.split(key, 3)
        bound = fan_in**-0.5
        parameters.append((
            j.random.uniform(one, (fan_in, fan_out), minval=-bound, maxval=bound),
            j.random.uniform(two, (fan_out,), minval=-bound, maxval=bound),
        ))  # fmt: skip

    def forward(parameters: Any, x: Any, key: Any) -> Any:
        for number, (weight, bias) in enumerate(parameters):
            x = x @ weight + bias
            if number < len(parameters) - 1:
                x = j.nn.relu(x)
                if key is not None:
                    kept = j.random.bernoulli(j.random.fold_in(key, number), 1 - DROPOUT, x.shape)
                    x = jnp.where(kept, x / (1 - DROPOUT), 0)
        return x

    def loss(parameters: Any, x: Any, y: Any, key: Any) -> Any:
        logits = j.nn.log_softmax(forward(parameters, x, key))
        return -jnp.take_along_axis(logits, y[:, None], 1).mean()

    def step(state: Any, given: Any) -> tuple[Any, None]:
        parameters, first, second, count = state
        rows, key = given
        gradient = j.grad(loss)(parameters, all_images[rows], all_labels[rows], key)
        count = count + 1
        first = j.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
        second = j.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradient)
        rate = 0.001 * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        parameters = j.tree.map(
            lambda p, m, v: p - rate * m / (jnp.sqrt(v) + 1e-8), parameters, first, second
        )
        return (parameters, first, second, count), None

    @j.jit
    def epoch(state: Any, key: Any) -> Any:
        steps = len(all_images) // work.batch_size
        order = j.random.permutation(key, len(all_images))[: steps * work.batch_size]
        keys = j.random.split(j.random.fold_in(key, 1), steps)
        return j.lax.scan(step, state, (order.reshape(steps, -1), keys))[0]

    all_images, all_labels = jnp.asarray(images), jnp.asarray(labels)
    zeros = j.tree.map(jnp.zeros_like, parameters)
    state = (parameters, zeros, zeros, 0)
    started = time.perf_counter()
    for number in range(work.epochs):
        state = epoch(state, j.random.fold_in(key, number))
    j.block_until_ready(state)
    seconds = time.perf_counter() - started
    answers = forward(state[0], jnp.asarray(test_images), None).argmax(axis=1)
    return Outcome(float((answers == jnp.asarray(test_labels)).mean()), seconds)


PEERS = {
    "textbook": textbook,
    "strong": strong,
    "scikit-learn": scikit_learn,
    "keras": keras,
    "jax": jax,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument(
        "--work", choices=("linear", "mlp", "mlp_small", "cnn", "cnn_dropout"), required=True
    )
    parser.add_argument("--optim", choices=("adam", "adadelta"), default="adam")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="of textbook and strong")
    parser.add_argument("--data", required=True)
    parser.add_argument("--save", help="of the textbook: a file for the weights")
    parser.add_argument("--weights", help="of the textbook: evaluate these instead of training")
    work = parser.parse_args()
    print(json.dumps(PEERS[work.peer](work)._asdict()))


if __name__ == "__main__":
    main()
