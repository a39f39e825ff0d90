import pytest
import torch
from torch import nn

import models
from models.model_2 import Upright
from models.model_3 import SymmetricConv2d

PARAMETERS = {"Model_1": 26_698, "Model_2": 15_106, "Model_3": 4_506}


@pytest.fixture(params=PARAMETERS)
def model(request):
    torch.manual_seed(0)
    return getattr(models, request.param)()


@pytest.fixture
def images():
    return torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def kinds(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def test_number_of_trainable_parameters(model):
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == PARAMETERS[type(model).__name__]


def test_logits_have_the_promised_shape_and_are_not_probabilities(model, images):
    logits = model(images)
    assert (logits.shape, logits.dtype) == ((16, 10), torch.float32)
    assert logits.min() < 0 and not torch.allclose(logits.exp().sum(1), torch.ones(16))


def test_gradient_reaches_every_parameter(model, images):
    model.train()
    nn.functional.cross_entropy(model(images), torch.arange(16) % 10).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_in_evaluation_an_image_does_not_depend_on_its_batch(model, images):
    model(images)  # moves the running statistics of batch normalisation, where there are any
    model.eval()
    together, alone = model(images), torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_one_image_is_a_batch_to_train_on(model, images):
    model.train()
    assert model(images[:1]).isfinite().all()


def test_a_blank_image_gives_finite_logits_and_gradients(model, images):
    images[0] = -0.4242  # background alone
    images[1] = 0
    loss = nn.functional.cross_entropy(model(images), torch.arange(16) % 10)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_model_1_is_as_described():
    model = models.Model_1()
    assert [m.out_channels for m in kinds(model, nn.Conv2d)] == [8, 16]
    assert [(m.in_features, m.out_features) for m in kinds(model, nn.Linear)] == [(784, 32), (32, 10)]
    assert kinds(model, nn.MaxPool2d) and kinds(model, nn.ReLU)


def test_model_2_is_as_described():
    model = models.Model_2()
    assert [m.out_channels for m in kinds(model, nn.Conv2d)] == [6, 12]
    assert [(m.in_features, m.out_features) for m in kinds(model, nn.Linear)] == [(588, 24), (24, 10)]
    assert [m.p for m in kinds(model, nn.Dropout)] == [0.2]


def test_model_3_is_as_described():
    model = models.Model_3()
    assert kinds(model, nn.BatchNorm2d)
    dropouts = kinds(model, (nn.Dropout, nn.Dropout2d))
    assert dropouts and all(m.p > 0 for m in dropouts)


def test_symmetric_convolutions_follow_a_turned_and_a_mirrored_input():
    torch.manual_seed(0)
    layers = nn.Sequential(
        SymmetricConv2d(1, 2, 6, stride=2, padding=2, poses=1), SymmetricConv2d(2, 3, 3, padding=1)
    )
    images = torch.randn(4, 1, 28, 28)
    output = layers(images).view(4, 3, 2, 4, 14, 14)
    turned = layers(images.rot90(1, (-2, -1))).view_as(output)
    mirrored = layers(images.flip(-1)).view_as(output)
    torch.testing.assert_close(turned, output.rot90(1, (-2, -1)).roll(1, 3), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mirrored, output.flip(-1, 2, 3).roll(1, 3), rtol=1e-4, atol=1e-5)


def test_symmetric_filters_for_single_channels_take_the_pose_of_their_channel():
    torch.manual_seed(0)
    layer = SymmetricConv2d(1, 6, 7, groups=24, poses=1)  # two filters for each of three
    features = torch.randn(4, 3, 2, 4, 7, 7)
    output = layer(features.flatten(1, 3)).view(4, 3, 2, 4, 2)
    turned = layer(features.rot90(1, (-2, -1)).roll(1, 3).flatten(1, 3)).view_as(output)
    mirrored = layer(features.flip(-1, 2, 3).roll(1, 3).flatten(1, 3)).view_as(output)
    torch.testing.assert_close(turned, output.roll(1, 3), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mirrored, output.flip(2, 3).roll(1, 3), rtol=1e-4, atol=1e-5)


def test_upright_centres_a_digit_and_removes_its_slant():
    """A bar, off-centre and slanted, comes out on the middle of the image and vertical."""
    image = torch.zeros(1, 1, 28, 28)
    for row in range(6, 22):
        image[0, 0, row, row // 2 + 2 : row // 2 + 5] = 1
    output = Upright()(image + Upright.BACKGROUND)[0, 0]
    axis = torch.arange(28) - 13.5
    x, y = (output.sum(0) @ axis) / output.sum(), (output.sum(1) @ axis) / output.sum()
    slant = (output * axis[:, None] * axis).sum() / (output * axis[:, None] ** 2).sum()
    assert abs(x) < 0.1 and abs(y) < 0.1 and abs(slant) < 0.02
