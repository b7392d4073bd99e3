"""DeepLabv3+ on ResNet-101 written plainly in torch: what the backbone has to beat.

It computes with our own variables, so that its numbers can be compared before its time.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.straightforward import import_torch
from cfbi_jax.models.cfbi import CFBI
from cfbi_jax.models.deeplab import ASPP_DILATIONS
from cfbi_jax.models.layers import NORM_EPSILON
from cfbi_jax.models.resnet import MULTI_GRID


def torch_backbone(
    model: CFBI, variables: Mapping, images: np.ndarray, device: str
) -> Callable[[], tuple[Any, Any]]:
    """A function without arguments that gives decoder output and low-level features, as tensors
    `[b, h, w, c]`."""
    torch = import_torch()
    functional = torch.nn.functional
    torch.backends.cudnn.allow_tf32 = False  # exact products, as ours

    def tensors(tree):
        if isinstance(tree, Mapping):
            return {name: tensors(value) for name, value in tree.items()}
        array = torch.from_numpy(np.array(tree)).to(device)
        if array.ndim == 4:  # a kernel
            array = array.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
        return array

    params = tensors(variables["params"]["deeplab"])
    frozen = tensors(variables["frozen"]["deeplab"])
    images = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
    images = images.contiguous(memory_format=torch.channels_last)

    def at(tree, path):
        for name in path.split("/"):
            tree = tree[name]
        return tree

    def conv_bn(x, conv, bn, stride=1, dilation=1, relu=True):
        kernel, norm = at(params, conv)["kernel"], at(frozen, bn)
        padding = dilation * (kernel.shape[2] - 1) // 2
        x = functional.conv2d(x, kernel, stride=stride, padding=padding, dilation=dilation)
        statistics = norm["mean"], norm["var"], norm["scale"], norm["bias"]
        x = functional.batch_norm(x, *statistics, training=False, eps=NORM_EPSILON)
        return torch.relu_(x) if relu else x

    def bottleneck(x, path, stride, dilation):
        y = conv_bn(x, f"{path}/conv1", f"{path}/bn1")
        y = conv_bn(y, f"{path}/conv2", f"{path}/bn2", stride, dilation)
        y = conv_bn(y, f"{path}/conv3", f"{path}/bn3", relu=False)
        if "downsample_conv" in at(params, path):
            names = f"{path}/downsample_conv", f"{path}/downsample_bn"
            x = conv_bn(x, *names, stride, relu=False)
        return torch.relu_(y + x)

    def resize(x, size):
        return functional.interpolate(x, size=size, mode="bilinear", align_corners=True)

    def forward():
        x = conv_bn(images, "backbone/conv1", "backbone/bn1", stride=2)
        x = functional.max_pool2d(x, 3, 2, 1)
        for stage, (count, stride) in enumerate(
            zip(model.resnet_blocks, (1, 2, 2, 1), strict=True), 1
        ):
            for i in range(count):
                dilation = 2 * MULTI_GRID[i % len(MULTI_GRID)] if stage == 4 else 1
                path = f"backbone/layer{stage}_{i}"
                x = bottleneck(x, path, stride if i == 0 else 1, dilation)
            if stage == 1:
                low_level = x
        branches = [conv_bn(x, "aspp/aspp1/conv", "aspp/aspp1/bn")]
        for i, dilation in enumerate(ASPP_DILATIONS, 2):
            branches.append(conv_bn(x, f"aspp/aspp{i}/conv", f"aspp/aspp{i}/bn", dilation=dilation))
        pooled = conv_bn(x.mean((2, 3), keepdim=True), "aspp/pooling/conv", "aspp/pooling/bn")
        branches.append(pooled.expand_as(branches[0]))
        x = conv_bn(torch.cat(branches, dim=1), "aspp/project/conv", "aspp/project/bn")
        low = conv_bn(low_level, "decoder/low_level/conv", "decoder/low_level/bn")
        x = torch.cat([resize(x, low.shape[2:]), low], dim=1)
        x = conv_bn(x, "decoder/conv1/conv", "decoder/conv1/bn")
        x = conv_bn(x, "decoder/conv2/conv", "decoder/conv2/bn")
        return x.permute(0, 2, 3, 1), low_level.permute(0, 2, 3, 1)

    def run():
        with torch.no_grad():
            result = forward()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return run
