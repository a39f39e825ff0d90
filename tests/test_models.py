import copy
import pickle
import re
import warnings

import pytest
import torch
from torch import distributed, nn
from torch.nn.functional import conv2d
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import models
from conftest import WEIGHTS
from models.layers import Deskew, P4MConv2d, P4MReadout
from support import checkpoint

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
    model(images)  # changes the running statistics of batch normalization, if any
    model.eval()
    together, alone = model(images), torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_one_image_is_a_batch_to_train_on(model, images):
    model.train()
    assert model(images[:1]).isfinite().all()


def test_a_blank_image_gives_finite_logits_and_gradients(model, images):
    images[0] = -0.4242  # background only
    images[1:3] = torch.tensor([0.0, 255.0]).view(2, 1, 1, 1)
    loss = nn.functional.cross_entropy(model(images.requires_grad_()), torch.arange(16) % 10)
    loss.backward()
    assert loss.isfinite() and all(tensor.grad.isfinite().all() for tensor in (images, *model.parameters()))


@pytest.mark.parametrize("scale", [1e-6, 1e-5])
def test_the_noise_of_a_blank_image_is_not_amplified_to_a_digit(images, scale):
    """Deskew divides by the range of an image, but by no less than 0.001."""
    ink = Deskew()(scale * images)
    assert 0 < ink.max() < 10 * Deskew.INK * scale / 1e-3
    whole = Deskew()(images)
    assert whole.max() > 0.5 * Deskew.INK


@pytest.mark.parametrize("name", ["Model_2", "Model_3"])
def test_logits_do_not_depend_on_the_value_range(name, mnist):
    model = checkpoint.load(WEIGHTS / f"{name}.pth")
    normalized = mnist[2].dataset.tensors[0][:1_000]
    bytes_ = (normalized * 0.3081 + 0.1307).mul(255).round().byte()
    unit = bytes_ / 255
    with torch.no_grad():
        expected = model(normalized)
        for images in bytes_, bytes_.float(), unit, 2 * unit - 1, 0.2 * unit + 0.7:
            torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 28, 28), (28, 28), (2, 1, 27, 28), (2, 3, 28, 28), (2, 28, 28, 1)])
def test_an_image_of_another_shape_is_rejected_with_a_message(model, shape):
    name = type(model).__name__
    expected = f"{name} takes images of shape (N, 1, 28, 28), not {torch.Size(shape)}"
    with pytest.raises(AssertionError, match=re.escape(expected)):
        model(torch.zeros(shape))
    with pytest.raises(AssertionError, match=re.escape(f"{name} takes images of shape (N, 1, 28, 28)")):
        torch.fx.symbolic_trace(model)(torch.zeros(shape))


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
    assert [m.num_features for m in kinds(model, nn.BatchNorm2d)] == [16, 16, 32, 32, 32]
    assert [m.p for m in kinds(model, nn.Dropout)] == [0.1]


def test_filters_start_at_the_size_that_keeps_the_variance():
    torch.manual_seed(0)
    assert P4MConv2d(4, 40, 3)(torch.zeros(1, 32, 7, 7)).shape == (1, 320, 5, 5)  # no padding by default
    for layer in P4MConv2d(4, 40, 3), P4MConv2d(1, 200, 5, orientations=1), P4MReadout(4, 50, 7):
        numbers = layer.weight[0].numel()
        assert float(layer.weight.detach().std() * numbers**0.5) == pytest.approx(1, abs=0.05)


def test_p4m_convolutions_with_stride_1_are_equivariant_to_rotation_and_reflection():
    torch.manual_seed(0)
    layers = nn.Sequential(P4MConv2d(1, 2, 5, padding=2, orientations=1), P4MConv2d(2, 3, 3, padding=1))
    images = torch.randn(4, 1, 14, 14)
    output = layers(images).view(4, 3, 2, 4, 14, 14)
    turned = layers(images.rot90(1, (-2, -1))).view_as(output)
    mirrored = layers(images.flip(-1)).view_as(output)
    torch.testing.assert_close(turned, output.rot90(1, (-2, -1)).roll(1, 3), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mirrored, output.flip(-1, 2, 3).roll(1, 3), rtol=1e-4, atol=1e-5)


def test_a_readout_takes_the_orientation_of_its_channel():
    torch.manual_seed(0)
    layer = P4MReadout(3, 2, 7)
    features = torch.randn(4, 3, 2, 4, 7, 7)
    output = layer(features.flatten(1, 3)).view(4, 3, 2, 4, 2)
    turned = layer(features.rot90(1, (-2, -1)).roll(1, 3).flatten(1, 3)).view_as(output)
    mirrored = layer(features.flip(-1, 2, 3).roll(1, 3).flatten(1, 3)).view_as(output)
    torch.testing.assert_close(turned, output.roll(1, 3), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mirrored, output.flip(2, 3).roll(1, 3), rtol=1e-4, atol=1e-5)


def test_the_readout_is_a_convolution_of_as_many_groups_as_channels():
    layer = P4MReadout(3, 2, 7)
    images = torch.randn(4, 24, 7, 7)
    kernels = layer.weight.flatten()[layer.index].view(48, 1, 7, 7)
    torch.testing.assert_close(layer(images), conv2d(images, kernels, groups=24), rtol=1e-4, atol=1e-5)


def bar(top, left, height, width, slant):
    """An image, 0 to 1, with a bar of ink; by each row down it moves `slant` pixels to the left."""
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    inside = (y >= top) & (y < top + height)
    image = (1 - (x + slant * (y - top) - left - width / 2).abs() + width / 2).clamp(0, 1) * inside
    return image[None, None]


def moments(image):
    """Center, slant and standard deviations, across the slant and down, half a side being 1."""
    axis = (torch.arange(28) - 13.5) / 14
    ink = image[0, 0] / image.sum()
    x, y = ink.sum(0) @ axis, ink.sum(1) @ axis
    down, across = axis[:, None] - y, axis - x
    yy, xy, xx = ((ink * factor).sum() for factor in (down**2, down * across, across**2))
    return x, y, xy / yy, (xx - xy**2 / yy).sqrt(), yy.sqrt()


@pytest.mark.parametrize("top, left, height, width, slant", [(2, 14, 12, 5, 0.5), (9, 6, 17, 9, -0.3)])
def test_deskew_centers_a_digit_and_removes_its_slant(top, left, height, width, slant):
    """It also moves the digit's size halfway, on a logarithmic scale, to that of one that fills the image."""
    image = bar(top, left, height, width, slant)
    *_, before_width, before_height = moments(image)
    x, y, after_slant, after_width, after_height = moments(Deskew()(image))
    assert abs(x) < 0.01 and abs(y) < 0.01 and abs(after_slant) < 0.02
    assert after_width == pytest.approx((before_width * 0.36).sqrt().item(), rel=0.06)
    assert after_height == pytest.approx((before_height * 0.54).sqrt().item(), rel=0.06)


RECORDED = {  # of the first two test images
    "Model_1": [
        [6.5464, 4.7887, -10.4222, 4.9047, 4.1445, -7.5028, 4.4744, 0.5762, -5.0007, 6.8989],
        [6.5412, 4.8368, -10.4696, 4.9083, 4.1879, -7.5539, 4.4867, 0.6137, -5.0541, 6.9197],
    ],
    "Model_2": [
        [5.3051, -2.2918, 2.1015, -5.4374, 6.8470, -4.2217, 2.4697, -4.9641, 7.6653, -6.1587],
        [4.8097, -1.7988, 1.6117, -4.9515, 6.3660, -3.7462, 2.0006, -4.5021, 7.2112, -5.7132],
    ],
    "Model_3": [
        [2.2664, -1.1189, -1.3640, 2.2190, -0.4255, -1.8758, 1.9383, 0.3125, -2.1904, 1.4540],
        [1.9826, -0.3852, -1.6719, 1.7336, 0.2738, -1.9544, 1.3024, 0.9041, -2.0315, 0.7343],
    ],
}


def test_logits_are_those_recorded(model, mnist):
    """So that no change of the logits goes unnoticed. The weights come from a formula, not a generator."""
    for index, (name, tensor) in enumerate(model.state_dict().items()):
        if tensor.dim() > 1 or name.endswith("bias"):
            wave = torch.sin(torch.arange(tensor.numel()) * 1.7 + index).view_as(tensor)
            tensor.copy_(wave * (6 / tensor[0].numel()) ** 0.5)
    with torch.no_grad():
        logits = model.eval()(mnist[2].dataset.tensors[0][:2])
    expected = torch.tensor(RECORDED[type(model).__name__])
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=5e-4)


def exported(model, images):
    batch = ({0: torch.export.Dim("batch")},)
    return torch.export.export(model, (images,), dynamic_shapes=batch).module()(images[:5])


def functional(model, images):
    return torch.func.functional_call(model, model.state_dict(), (images,))


def assigned(model, images):
    other = type(model)()
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval()(images)


def pruned(model, images):
    layer = model[-1]
    prune.l1_unstructured(layer, "weight", amount=0)
    return model(images)


def traced(model, images):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but widely used
        return torch.jit.trace(model, images)(images)


USES = {  # each gives the logits of these images, or of the first of them
    "deepcopy": lambda model, images: copy.deepcopy(model)(images),
    "pickle": lambda model, images: pickle.loads(pickle.dumps(model))(images),
    "torch.compile": lambda model, images: torch.compile(model, backend="aot_eager")(images),
    "torch.export": exported,
    "torch.fx": lambda model, images: torch.fx.symbolic_trace(model)(images),
    "torch.jit.trace": traced,
    "double": lambda model, images: copy.deepcopy(model).double()(images.double()).float(),
    "channels_last": lambda model, images: model(images.to(memory_format=torch.channels_last)),
    "functional_call": functional,
    "vmap": lambda model, images: torch.func.vmap(lambda image: model(image[None])[0])(images),
    "AveragedModel": lambda model, images: AveragedModel(model)(images),
    "assign": assigned,
    "prune": pruned,
    "DataParallel": lambda model, images: nn.DataParallel(copy.deepcopy(model))(images).cpu(),
    "slices": lambda model, images: model[5:](model[:5](images)),
    "an empty batch": lambda model, images: model(images[:0]),
}


@pytest.mark.parametrize("use", USES)
def test_a_model_is_an_ordinary_module(model, mnist, use):
    images = mnist[2].dataset.tensors[0][:16]
    model(images)  # changes the running statistics of batch normalization, if any
    with torch.no_grad():
        expected = model.eval()(images)
        logits = USES[use](model, images)
    torch.testing.assert_close(logits, expected[: len(logits)], rtol=1e-4, atol=1e-4)


def gradients(model, images, labels):
    model.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_distributed_data_parallel_gives_the_same_gradients(model, mnist, tmp_path):
    images, labels = (tensor[:16] for tensor in mnist[2].dataset.tensors)
    expected = gradients(model.eval(), images, labels)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = gradients(nn.parallel.DistributedDataParallel(model), images, labels)
    finally:
        distributed.destroy_process_group()
    torch.testing.assert_close(found, expected)


def test_a_model_trains_under_autocast(model, mnist):
    images, labels = (tensor[:512] for tensor in mnist[2].dataset.tensors)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_in_half_precision_a_model_reads_the_same_digits(model, mnist, dtype):
    images = mnist[2].dataset.tensors[0][:256]
    for _ in range(50):  # changes the running statistics of batch normalization, if any
        model(images)
    with torch.no_grad():
        expected = model.eval()(images)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(images).float()
        logits = model.to(dtype)(images.to(dtype)).float()
    for found in logits, autocast:
        assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.9


def test_per_sample_gradients_equal_those_of_single_samples(model, mnist):
    images, labels = (tensor[:4] for tensor in mnist[2].dataset.tensors)
    parameters = dict(model.eval().named_parameters())

    def loss(parameters, image, label):
        logits = torch.func.functional_call(model, parameters, (image[None],))
        return nn.functional.cross_entropy(logits, label[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    for index in range(4):
        alone = torch.func.grad(loss)(parameters, images[index], labels[index])
        together = {name: gradient[index] for name, gradient in gradients.items()}
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)
