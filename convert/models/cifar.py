"""Networks of the AdderNet paper for small images, registered with timm.

``cifar_resnet20``, ``cifar_resnet32``, ``cifar_vgg_small``.

Structure after AdderNet (arXiv 1912.13200) and its authors' code: convolution, BatchNorm, ReLU; 1x1 convolution and
BatchNorm on the shortcuts that change shape; the classifier is a 1x1 convolution without bias followed by a BatchNorm
on the logits. They are plain CNNs, which ``adderkit.convert_`` converts to adder networks.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., arXiv 1512.03385, section 4.2): ``[N, C, H, W]`` in and out."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, C, H, W]`` to ``[N, C', H', W']``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        result: Tensor = self.act2(x + shortcut)
        return result


class CifarNet(nn.Module):
    """Base class of the networks: timm's interface around ``features`` and the convolutional classifier.

    Args:
        features: Everything before the classifier.
        maps: Channels, reduction and index in ``features`` of the feature maps that ``features_only`` can return.
        num_features: Features that the classifier reads.
        pooled: Whether the last feature map is averaged over its positions.
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Number of image channels.
    """

    def __init__(
        self,
        features: nn.Module,
        maps: Sequence[tuple[int, int, int]],
        num_features: int,
        pooled: bool,
        num_classes: int,
        in_chans: int,
    ) -> None:
        super().__init__()
        self.features = features
        self.feature_info = [
            {"num_chs": channels, "reduction": reduction, "module": f"features.{index}"}
            for channels, reduction, index in maps
        ]
        self.pooled = pooled
        self.num_features = self.head_hidden_size = num_features
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """Return the 1x1 convolution that computes the logits."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for ``num_classes``, or by none if that is 0.

        Raises:
            ValueError: ``global_pool`` is not the only pooling that these networks have.
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool is {global_pool!r}, expected 'avg', the only pooling of this network")
        self.num_classes = num_classes
        self.fc = nn.Conv2d(self.num_features, num_classes, 1, bias=False) if num_classes else nn.Identity()
        self.fc_norm = nn.BatchNorm2d(num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images ``[N, C, H, W]`` to the last feature map ``[N, C', H', W']``."""
        result: Tensor = self.features(x)
        return result

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map a feature map to logits ``[N, classes]``, or to ``[N, num_features]`` if ``pre_logits``."""
        x = F.adaptive_avg_pool2d(x, 1) if self.pooled else x.flatten(1)[:, :, None, None]
        return x.flatten(1) if pre_logits else self.fc_norm(self.fc(x)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, C, H, W]`` to logits ``[N, classes]``."""
        return self.forward_head(self.forward_features(x))


class CifarResNet(CifarNet):
    """ResNet for 32x32 images: a 3x3 stem, three stages of 16, 32 and 64 channels (arXiv 1512.03385, section 4.2)."""

    def __init__(self, depth: int, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0) -> None:
        blocks = (depth - 2) // 6
        layers: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        ]
        maps = []
        channels = 16
        for stage, width in enumerate((16, 32, 64)):
            for block in range(blocks):
                layers.append(BasicBlock(channels, width, 2 if stage and not block else 1))
                channels = width
            maps.append((width, 2**stage, len(layers) - 1))
        super().__init__(nn.Sequential(*layers, nn.Dropout(drop_rate)), maps, 64, True, num_classes, in_chans)
        _initialize(self)


class CifarVgg(CifarNet):
    """VGG-small: 2x128, 2x256 and 2x512 3x3 convolutions, each pair max-pooled; the classifier reads all positions."""

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 32,
        drop_rate: float = 0.0,
    ) -> None:
        layers: list[nn.Module] = []
        maps = []
        channels = in_chans
        for stage, width in enumerate((128, 256, 512)):
            for _ in range(2):
                layers += [
                    nn.Conv2d(channels, width, 3, 1, 1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                channels = width
            maps.append((width, 2**stage, len(layers) - 1))
            layers.append(nn.MaxPool2d(2))
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        positions = (height // 8) * (width // 8)
        features = nn.Sequential(*layers, nn.Dropout(drop_rate))
        super().__init__(features, maps, 512 * positions, False, num_classes, in_chans)
        _initialize(self)


def _initialize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def drop_other_head(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Drop a checkpoint's classifier if it was made for another number of classes.

    timm drops its weight and bias, but not the statistics of a BatchNorm on the logits.
    """
    own = model.state_dict()
    return {
        key: value
        for key, value in state_dict.items()
        if not (key.startswith(("fc.", "fc_norm.")) and key in own and own[key].shape != value.shape)
    }


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "classifier": "fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:1912.13200",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "cifar_resnet20.untrained": _cfg(first_conv="features.0.0"),
        "cifar_resnet32.untrained": _cfg(first_conv="features.0.0"),
        "cifar_vgg_small.untrained": _cfg(first_conv="features.0", fixed_input_size=True),
    }
)


def _create(variant: str, cls: type[CifarNet], pretrained: bool, **kwargs: Any) -> CifarNet:
    model: CifarNet = build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=drop_other_head,
        kwargs_filter=("global_pool",),
        feature_cfg={"out_indices": (0, 1, 2), "flatten_sequential": True},
        **kwargs,
    )
    return model


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """ResNet-20, 41 M multiply-adds at 32x32."""
    return _create("cifar_resnet20", CifarResNet, pretrained, depth=20, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """ResNet-32, 69 M multiply-adds at 32x32."""
    return _create("cifar_resnet32", CifarResNet, pretrained, depth=32, **kwargs)


@register_model
def cifar_vgg_small(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """VGG-small, 0.6 G multiply-adds at 32x32."""
    return _create("cifar_vgg_small", CifarVgg, pretrained, **kwargs)
