from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mnist_cli.errors import UsageError
from mnist_cli.model import build_model, num_params
from mnist_cli.model.dropout import Dropout
from mnist_cli.options import (
    CnnConfig,
    CnnDeepConfig,
    CnnDropoutConfig,
    LinearModelConfig,
    MlpConfig,
    ModelConfig,
)

LINEAR = LinearModelConfig(name="linear")
MLP = MlpConfig(name="mlp", hidden=(512, 256), dropout=0.2)
CNN = CnnConfig(name="cnn", channels=(32, 64), dense=128)
CNN_DROPOUT = CnnDropoutConfig(name="cnn_dropout", conv_dropout=0.25, dense_dropout=0.5)
CNN_DEEP = CnnDeepConfig(name="cnn_deep")
ALL = [LINEAR, MLP, CNN, CNN_DROPOUT, CNN_DEEP]
CONVOLUTIONAL = [CNN, CNN_DROPOUT, CNN_DEEP]
MNIST, CIFAR, DIGITS = (1, 28, 28), (3, 32, 32), (1, 8, 8)


def by_name(config: ModelConfig) -> str:
    return config.name


def built(config: ModelConfig, shape: tuple[int, ...], num_outputs: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config, shape, num_outputs)


def batch_of(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("config", "shape", "count"),
    [
        (LINEAR, MNIST, 7_850),
        (MLP, MNIST, 535_818),
        (CNN, MNIST, 421_642),
        (CNN, CIFAR, 545_098),
        (CNN_DROPOUT, MNIST, 1_199_882),
        (CNN_DEEP, MNIST, 320 + 18_496 + 73_856 + 11_530),
    ],
    ids=str,
)
def test_number_of_parameters(config: ModelConfig, shape: tuple[int, ...], count: int) -> None:
    assert num_params(built(config, shape)) == count


@pytest.mark.parametrize("config", ALL, ids=by_name)
@pytest.mark.parametrize("shape", [DIGITS, MNIST, CIFAR, (2, 9, 17)], ids=str)
def test_logits_have_the_shape_asked_for(config: ModelConfig, shape: tuple[int, ...]) -> None:
    logits = built(config, shape, 7)(batch_of(3, *shape))
    assert logits.shape == (3, 7)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("config", [LINEAR, MLP], ids=by_name)
def test_rows_of_numbers_are_fine_for_dense_models(config: ModelConfig) -> None:
    assert built(config, (5,), 1)(batch_of(4, 5)).shape == (4, 1)


@pytest.mark.parametrize(("config", "smallest"), [(CNN, 4), (CNN_DROPOUT, 6), (CNN_DEEP, 8)])
def test_too_small_an_input_is_a_usage_error(config: ModelConfig, smallest: int) -> None:
    side = smallest
    assert built(config, (1, side, side))(batch_of(2, 1, side, side)).shape == (2, 10)
    for shape in [(1, side - 1, side), (1, side, side - 1), (side,), (side, side)]:
        with pytest.raises(UsageError, match=f"model={config.name} needs images") as caught:
            built(config, shape)
        assert "model=linear" in caught.value.hint


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (LINEAR, ["output"]),
        (MLP, ["hidden.0", "hidden.1", "output"]),
        (CNN, ["conv1", "conv2", "hidden", "output"]),
        (CNN_DROPOUT, ["conv1", "conv2", "hidden", "output"]),
        (CNN_DEEP, ["conv1", "conv2", "conv3", "output"]),
    ],
)
def test_tensor_names_are_what_checkpoints_hold(config: ModelConfig, names: list[str]) -> None:
    expected = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    assert list(built(config, DIGITS).state_dict()) == expected


@pytest.mark.parametrize("config", ALL, ids=by_name)
def test_weights_and_gradients_are_laid_out_as_fused_optimizers_need(config: ModelConfig) -> None:
    model = built(config, MNIST)
    model(batch_of(4, *MNIST)).square().sum().backward()
    for parameter in model.parameters():
        assert parameter.is_contiguous()
        assert parameter.grad is not None
        assert parameter.grad.is_contiguous()


def plain_forward(config: ModelConfig, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The textbook order, conv, ReLU, pool, in the ordinary memory layout."""

    def conv(name: str, padding: int) -> None:
        nonlocal x
        x = F.relu(F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding))

    def dense(name: str) -> None:
        nonlocal x
        x = F.linear(x.flatten(1), weights[f"{name}.weight"], weights[f"{name}.bias"])

    if config.name == "cnn_dropout":
        conv("conv1", 0)
        conv("conv2", 0)
        x = F.max_pool2d(x, 2)
    else:
        for name in ("conv1", "conv2", "conv3")[: 2 if config.name == "cnn" else 3]:
            conv(name, 1)
            x = F.max_pool2d(x, 2)
    if config.name != "cnn_deep":
        dense("hidden")
        x = F.relu(x)
    dense("output")
    return x


@pytest.mark.parametrize("config", CONVOLUTIONAL, ids=by_name)
@pytest.mark.parametrize("shape", [MNIST, (3, 9, 13)], ids=str)
def test_answers_and_learns_as_the_textbook_network(
    config: ModelConfig, shape: tuple[int, ...]
) -> None:
    model = built(config, shape).double().eval()
    images = batch_of(5, *shape).double()
    weights = dict(model.named_parameters())
    logits, expected = model(images), plain_forward(config, weights, images)
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-12)
    gradients = torch.autograd.grad(logits.square().sum(), list(weights.values()))
    plain = torch.autograd.grad(expected.square().sum(), list(weights.values()))
    torch.testing.assert_close(gradients, plain, rtol=1e-10, atol=1e-12)


def test_pooling_before_relu_gives_the_same_bits() -> None:
    first = batch_of(2, 3, 8, 8).mul(2).round().requires_grad_()  # many ties and zeros
    second = first.detach().clone().requires_grad_()
    before, after = F.relu(F.max_pool2d(first, 2)), F.max_pool2d(F.relu(second), 2)
    assert torch.equal(before, after)
    before.square().sum().backward()
    after.square().sum().backward()
    assert first.grad is not None and second.grad is not None
    assert torch.equal(first.grad, second.grad)


@pytest.mark.parametrize("config", [MLP, CNN_DROPOUT], ids=by_name)
def test_dropout_only_while_training(config: ModelConfig) -> None:
    model, inputs = built(config, DIGITS), batch_of(4, *DIGITS)
    assert not torch.equal(model(inputs), model(inputs))
    torch.manual_seed(5)
    first = model(inputs)
    torch.manual_seed(5)
    assert torch.equal(model(inputs), first)
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


def test_no_hidden_layers_make_an_mlp_linear() -> None:
    model = built(MlpConfig(name="mlp", hidden=(), dropout=0.5), DIGITS)
    assert num_params(model) == num_params(built(LINEAR, DIGITS))


@pytest.mark.parametrize("config", ALL, ids=by_name)
def test_same_seed_same_weights(config: ModelConfig) -> None:
    first, second = built(config, DIGITS), built(config, DIGITS)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("config", ALL, ids=by_name)
def test_vmap_over_models_and_batches(config: ModelConfig) -> None:
    models = [build_model(config, DIGITS, 10).eval() for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(models)
    inputs = batch_of(3, 4, *DIGITS)

    def loss(weights: dict[str, Tensor], images: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(models[0], weights, (images,))
        return logits.square().mean()

    values = torch.vmap(loss)(stacked, inputs)
    gradients = torch.vmap(torch.func.grad(loss))(stacked, inputs)
    for index, model in enumerate(models):
        alone = model(inputs[index]).square().mean()
        torch.testing.assert_close(values[index], alone, rtol=1e-5, atol=1e-6)
        alone.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name][index], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", ALL, ids=by_name)
def test_exports_with_a_free_batch_size(config: ModelConfig) -> None:
    model = built(config, DIGITS).eval()
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(
        model, (batch_of(2, *DIGITS),), dynamic_shapes=({0: batch},)
    ).module()
    for size in (1, 2, 9):
        inputs = batch_of(size, *DIGITS)
        torch.testing.assert_close(exported(inputs), model(inputs), rtol=1e-5, atol=1e-6)


@given(st.floats(0.05, 0.95), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_dropout_keeps_the_mean_and_the_share(p: float, seed: int) -> None:
    torch.manual_seed(seed)
    dropped = Dropout(p)(torch.ones(333, 301))
    share = (dropped == 0).double().mean().item()
    deviation = (p * (1 - p) / dropped.numel()) ** 0.5
    assert abs(share - p) < 6 * deviation + 2**-16
    assert torch.allclose(dropped[dropped != 0], torch.tensor(1 / (1 - p)))


def test_dropout_draws_each_value_on_its_own() -> None:
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(1000, 4096)) != 0).double() - 0.5
    correlation = (kept.T @ kept)[0] / 250
    assert correlation[1:].abs().max() < 6 / 1000**0.5


def test_dropout_is_the_identity_in_evaluation_and_repeats_with_the_seed() -> None:
    dropout, values = Dropout(0.3), torch.randn(7, 5, requires_grad=True)
    torch.manual_seed(3)
    first = dropout(values)
    torch.manual_seed(3)
    assert torch.equal(first, dropout(values))
    first.sum().backward()
    assert torch.equal(values.grad != 0, first != 0)  # type: ignore[operator]
    assert dropout.eval()(values) is values
