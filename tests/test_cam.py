"""Class activation maps against their definition, and the networks that have none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from builders.cam import ClassActivation
from builders.models import ConvNet, create_model
from nrrdd_format.errors import TeacherError

CLASSES = 5
LABELS = torch.tensor([3, 0, 4])

QUICK = [("conv2-w8", 16), ("resnet18-small-w4", 32), ("resnet18", 64)]
WIDE = [
    ("conv4-w16", 64),
    ("densenet121", 64),
    ("efficientnet_b0", 64),
    ("googlenet", 64),
    ("inception_v3", 112),
    ("mnasnet0_5", 64),
    ("mobilenet_v2", 64),
    ("regnet_x_400mf", 64),
    ("regnet_y_400mf", 64),
    ("resnet50", 64),
    ("resnext50_32x4d", 64),
    ("shufflenet_v2_x0_5", 64),
    ("wide_resnet50_2", 64),
]
SLOW = pytest.mark.slow


def settled(architecture: str, size: int) -> nn.Module:
    """A network with random weights whose BatchNorm statistics fit them, so that signals neither vanish nor explode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = create_model(architecture, CLASSES, size)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # running statistics become plain means
        with torch.no_grad():
            model(torch.randn(4, 3, size, size))
    return model.eval()


def pictures(size: int) -> Tensor:
    return torch.randn(len(LABELS), 3, size, size, generator=torch.Generator().manual_seed(2))


def logits_from(maps: Tensor, activation: ClassActivation) -> Tensor:
    """The logits of LABELS, from the maps and the head's bias alone."""
    head = [module for module in activation.model.modules() if isinstance(module, nn.Linear)][-1]
    pooled = maps.mean((1, 2)) if activation.pooling == "mean" else maps.sum((1, 2))
    return pooled + head.bias[LABELS]


@pytest.mark.parametrize(("architecture", "size"), [*QUICK, *(pytest.param(*each, marks=SLOW) for each in WIDE)])
def test_maps_make_up_the_logits(architecture: str, size: int) -> None:
    activation = ClassActivation(settled(architecture, size), size)
    maps, logits = activation.raw(pictures(size), LABELS)
    assert maps.shape[1] > 1 and maps.shape[2] > 1
    chosen = logits[torch.arange(len(LABELS)), LABELS]
    torch.testing.assert_close(logits_from(maps, activation), chosen, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, activation.model(pictures(size)))

    cam, _, flat = activation(pictures(size), LABELS)
    assert cam.shape == (len(LABELS), size, size) and cam.dtype == torch.float32
    assert flat == 0 and float(cam.min()) >= 0 and float(cam.max()) <= 1


def test_flatten_head_by_the_definition() -> None:
    """C(u,v) = Σ_k w_{k,u,v} f_k(u,v), term by term."""
    model = settled("conv2-w8", 16)
    assert isinstance(model, ConvNet)
    maps, _ = ClassActivation(model, 16).raw(pictures(16), LABELS)
    with torch.no_grad():
        features = model.features(pictures(16))
    weight = model.classifier.weight.detach().reshape(CLASSES, 8, 4, 4)
    for image, label in enumerate(LABELS.tolist()):
        for u in range(4):
            for v in range(4):
                expected = sum(float(weight[label, k, u, v] * features[image, k, u, v]) for k in range(8))
                assert float(maps[image, u, v]) == pytest.approx(expected, abs=1e-5)


def test_maps_are_stretched_then_resized() -> None:
    activation = ClassActivation(settled("conv1-w4", 4), 4)
    maps, _ = activation.raw(pictures(4), LABELS)
    cam, _, _ = activation(pictures(4), LABELS)
    for raw, resized in zip(maps, cam, strict=True):
        stretched = (raw - raw.min()) / (raw.max() - raw.min())
        torch.testing.assert_close(resized[0, 0], stretched[0, 0])  # corners lie beyond the outermost centres
        torch.testing.assert_close(resized[3, 0], stretched[1, 0])
        torch.testing.assert_close(resized[0, 1], 0.75 * stretched[0, 0] + 0.25 * stretched[0, 1])


def test_flat_maps_are_zero_and_counted() -> None:
    model = settled("conv2-w8", 16)
    assert isinstance(model, ConvNet)
    with torch.no_grad():
        model.classifier.weight[3] = 0
    cam, _, flat = ClassActivation(model, 16)(pictures(16), LABELS)
    assert flat == 1
    assert not cam[0].any()
    assert cam[1].any() and cam[2].any()


@pytest.mark.parametrize(
    ("architecture", "size", "reason"),
    [
        ("mobilenet_v3_small", 64, "MobileNetV3 .*its head has 2 linear layers, expected one"),
        ("squeezenet1_1", 64, "SqueezeNet .*its last layer is AdaptiveAvgPool2d, expected a linear head"),
        ("resnet18", 32, "ResNet .*at 32 px its last feature map has a single place"),
        pytest.param("vgg11_bn", 32, "VGG .*its head has 3 linear layers, expected one", marks=SLOW),
        pytest.param("vit_b_16", 32, "VisionTransformer .*no BatchNorm", marks=SLOW),
        pytest.param("swin_t", 64, "SwinTransformer .*no BatchNorm", marks=SLOW),
        pytest.param("convnext_tiny", 64, "ConvNeXt .*no BatchNorm", marks=SLOW),
        pytest.param("alexnet", 64, "AlexNet .*no BatchNorm", marks=SLOW),
    ],
)
def test_networks_without_maps_are_refused(architecture: str, size: int, reason: str) -> None:
    with pytest.raises(TeacherError, match=reason):
        ClassActivation(create_model(architecture, CLASSES, size), size)


def test_another_pooling_is_refused() -> None:
    """The right layers are not enough: a maximum over space is no sum over a map."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), _GlobalMaximum(), nn.Linear(4, 5))
    with pytest.raises(TeacherError, match="neither mean nor flattening"):
        ClassActivation(model, 16)


@pytest.mark.parametrize(("origin", "named"), [("teacher.pt", "^teacher.pt: ConvNet"), (None, "^ConvNet")])
def test_a_dead_network_is_told_from_one_without_maps(origin: str | None, named: str) -> None:
    model = settled("conv2-w8", 16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, -1e6)
    with pytest.raises(TeacherError, match=f"{named} cannot be a teacher: its features are all zero .*training failed"):
        ClassActivation(model, 16, origin)


class _GlobalMaximum(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.amax((2, 3))


def test_model_keeps_no_hooks() -> None:
    model = settled("conv2-w8", 16)
    activation = ClassActivation(model, 16)
    activation(pictures(16), LABELS)
    with pytest.raises(RuntimeError):
        activation(torch.randn(1, 3, 9, 9), torch.tensor([0]))  # flattens to another length
    assert not any(module._forward_hooks for module in model.modules())


def test_dropout_is_off() -> None:
    model = settled("conv2-w8", 16)
    assert isinstance(model, ConvNet)
    model.classifier = nn.Sequential(nn.Dropout(0.5), model.classifier)  # type: ignore[assignment]
    activation = ClassActivation(model.train(), 16)
    assert not activation.model.training
    assert torch.equal(activation.raw(pictures(16), LABELS)[0], activation.raw(pictures(16), LABELS)[0])
