"""AdderNet's published networks, computed from a state dict in their naming by the reference operator.

Written from the description of their topology (arXiv 1912.13200 and the names in the published code): adder, BatchNorm,
ReLU; shortcuts are adder and BatchNorm; the first convolution and the classifier are convolutions, and a BatchNorm
normalizes the logits.
"""

import torch
import torch.nn.functional as F

from adderkit.adder_layers.reference import adder_conv2d_reference


def _norm_names(name, channels):
    return {
        f"{name}.weight": torch.rand(channels) + 0.5,
        f"{name}.bias": torch.randn(channels) * 0.1,
        f"{name}.running_mean": torch.zeros(channels),
        f"{name}.running_var": torch.ones(channels),
        f"{name}.num_batches_tracked": torch.tensor(7),
    }


class Published:
    """One network: fresh weights, and its forward pass.

    Args:
        stages: Blocks of each stage.
        widths: Channels of each stage's 3x3 layers.
        bottleneck: Whether a block is 1x1, 3x3, 1x1 with four times the channels, rather than 3x3, 3x3.
        classes: Number of classes.
        imagenet: A 7x7 stem with stride 2 and max-pooling, and a classifier with a bias.
    """

    def __init__(self, stages, widths, *, bottleneck=False, classes=10, imagenet=False):
        self.stages, self.bottleneck, self.imagenet = stages, bottleneck, imagenet
        growth, stem = (4 if bottleneck else 1), (7 if imagenet else 3)
        state = {"conv1.weight": torch.randn(widths[0], 3, stem, stem) * 0.1, **_norm_names("bn1", widths[0])}
        channels = widths[0]
        for stage, (blocks, width) in enumerate(zip(stages, widths, strict=True), 1):
            for block in range(blocks):
                name, out = f"layer{stage}.{block}", width * growth
                shapes = [(width, channels, 3), (width, width, 3)]
                if bottleneck:
                    shapes = [(width, channels, 1), (width, width, 3), (out, width, 1)]
                for layer, (filters, depth, kernel) in enumerate(shapes, 1):
                    state[f"{name}.conv{layer}.adder"] = torch.randn(filters, depth, kernel, kernel)
                    state |= _norm_names(f"{name}.bn{layer}", filters)
                if block == 0 and (stage > 1 or channels != out):
                    state[f"{name}.downsample.0.adder"] = torch.randn(out, channels, 1, 1)
                    state |= _norm_names(f"{name}.downsample.1", out)
                channels = out
        state["fc.weight"] = torch.randn(classes, channels, 1, 1) * 0.1
        state |= {"fc.bias": torch.randn(classes)} if imagenet else {}
        self.state = state | _norm_names("bn2", classes)

    def __call__(self, images, measure=False):
        """Logits in evaluation mode; ``measure`` sets each BatchNorm's statistics to those of the images first."""

        def norm(x, name):
            mean, variance = (self.state[f"{name}.running_{key}"] for key in ("mean", "var"))
            if measure:
                mean.copy_(x.mean((0, 2, 3)))
                variance.copy_(x.var((0, 2, 3)) + 0.1)
            return F.batch_norm(x, mean, variance, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

        def adder(x, name, stride=1):
            weight = self.state[f"{name}.adder"]
            return adder_conv2d_reference(x, weight, None, stride, weight.shape[-1] // 2)

        def block(x, name, stride):
            layers = 3 if self.bottleneck else 2
            strided = 2 if self.bottleneck else 1  # the 3x3 layer that has the stride
            y = x
            for layer in range(1, layers + 1):
                y = adder(y, f"{name}.conv{layer}", stride if layer == strided else 1)
                y = norm(y, f"{name}.bn{layer}")
                y = y if layer == layers else y.relu()
            if f"{name}.downsample.0.adder" in self.state:
                x = norm(adder(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            return (x + y).relu()

        stem = self.state["conv1.weight"]
        x = F.conv2d(images, stem, None, 2 if self.imagenet else 1, stem.shape[-1] // 2)
        x = norm(x, "bn1").relu()
        x = F.max_pool2d(x, 3, 2, 1) if self.imagenet else x
        for stage, blocks in enumerate(self.stages, 1):
            for number in range(blocks):
                x = block(x, f"layer{stage}.{number}", 2 if stage > 1 and number == 0 else 1)
        x = F.conv2d(x.mean((2, 3), keepdim=True), self.state["fc.weight"], self.state.get("fc.bias"))
        return norm(x, "bn2").flatten(1)
