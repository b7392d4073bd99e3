"""Layers against independent implementations: XLA's own convolution, OpenCV, SciPy, formulas."""

import cv2
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate
from small import small_network

from cfbi_jax.models import convolutions, deeplab, images, layers, resizing
from cfbi_jax.models.cfbi import CFBI

# On GPUs, as in the network: no TF32.
pytestmark = pytest.mark.usefixtures("exact_products")


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding", [0, 2])
def test_depthwise_convolution(stride, dilation, padding):
    """And its gradients."""
    x, kernel = random(2, 11, 14, 5), random(3, 3, 1, 5, seed=1)

    def by_xla(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            ((padding, padding),) * 2,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=5,
        )

    def by_package(x, kernel):
        return convolutions.conv2d(
            x, kernel, stride=stride, dilation=dilation, padding=padding, depthwise=True
        )

    expected, expected_transpose = jax.vjp(by_xla, x, kernel)
    found, transpose = jax.vjp(by_package, x, kernel)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    gradient = random(*expected.shape, seed=2)
    for a, b in zip(transpose(gradient), expected_transpose(gradient), strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize("platform", ["cpu", "default"])
@pytest.mark.parametrize(
    "size, stride, depthwise", [(1, 1, False), (1, 2, False), (3, 1, False), (3, 2, True)]
)
def test_scaled_convolution(size, stride, depthwise, platform, monkeypatch):
    """And its gradients: with every image's own factors, that of the scaled images. As on CPUs and
    as elsewhere."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, **forms: forms[platform](*x))
    x, scale = random(3, 9, 10, 4), random(3, 1, 1, 4, seed=1)
    kernel = random(size, size, 1 if depthwise else 4, 4, seed=2)

    def by_xla(x, kernel, scale):
        padding = ((size // 2, size // 2),) * 2
        return jax.lax.conv_general_dilated(
            x * scale,
            kernel,
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4 if depthwise else 1,
        )

    def by_package(x, kernel, scale):
        return convolutions.conv2d(
            x, kernel, stride=stride, padding=size // 2, depthwise=depthwise, scale=scale
        )

    expected, expected_transpose = jax.vjp(by_xla, x, kernel, scale)
    found, transpose = jax.vjp(by_package, x, kernel, scale)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    gradient = random(*expected.shape, seed=3)
    for a, b in zip(transpose(gradient), expected_transpose(gradient), strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.mark.parametrize("size, stride, dilation", [(1, 1, 1), (1, 2, 1), (3, 1, 2), (3, 2, 1)])
def test_convolution_is_correlation_with_zero_padding(size, stride, dilation):
    x, kernel = random(1, 9, 10, 3), random(size, size, 3, 4, seed=1)
    padding = dilation * (size - 1) // 2
    found = convolutions.conv2d(x, kernel, stride=stride, dilation=dilation, padding=padding)
    padded = np.pad(np.asarray(x[0]), ((padding, padding), (padding, padding), (0, 0)))
    spread = np.zeros((dilation * (size - 1) + 1,) * 2 + (3, 4), np.float32)
    spread[::dilation, ::dilation] = kernel
    for o in range(4):
        expected = correlate(padded, spread[..., o], mode="valid")[::stride, ::stride, 0]
        np.testing.assert_allclose(found[0, ..., o], expected, atol=1e-5)


@pytest.mark.parametrize(
    "kernel_size, stride, dilation, padding, size",
    [
        ((1, 1), 1, 1, 0, (5, 6)),
        ((1, 1), 2, 1, 0, (5, 6)),
        ((1, 1), 1, 1, 2, (4, 5)),  # not a plain product: borders of zeros
        ((3, 3), 1, 1, 1, (7, 6)),
        ((3, 3), 2, 1, 1, (7, 6)),
        ((3, 3), 2, 1, 0, (8, 9)),  # the last row and column are never read
        ((3, 3), 1, 2, 2, (9, 5)),
        ((3, 3), 2, 3, 3, (9, 11)),
        ((3, 3), 1, 6, 6, (5, 9)),  # outer taps see zeros alone: vertically, ...
        ((3, 3), 1, 6, 6, (9, 6)),  # ... horizontally, ...
        ((3, 3), 1, 9, 9, (9, 9)),  # ... both: the centre is left
        ((3, 3), 1, 18, 18, (4, 7)),
        ((3, 3), 1, 8, 8, (13, 11)),  # by rows of taps
        ((3, 1), 1, 2, 1, (6, 5)),
        ((7, 7), 2, 1, 3, (11, 14)),
    ],
)
def test_gradients_of_convolution_are_xlas(kernel_size, stride, dilation, padding, size):
    # Three images: CPUs sum kernel gradients over two at a time.
    x, kernel = random(3, *size, 3), random(*kernel_size, 3, 4, seed=1)

    def by_xla(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            ((padding, padding),) * 2,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def by_package(x, kernel):
        return convolutions.conv2d(x, kernel, stride=stride, dilation=dilation, padding=padding)

    expected, expected_transpose = jax.vjp(by_xla, x, kernel)
    found, transpose = jax.vjp(by_package, x, kernel)
    # Sums of at most 150 products of order 1, in another order.
    np.testing.assert_allclose(found, expected, atol=3e-5)
    gradient = random(*expected.shape, seed=2)
    for a, b in zip(transpose(gradient), expected_transpose(gradient), strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("side", [1, 3])
def test_kernel_gradients_of_many_images_in_half_precision(side, depthwise):
    """Against float32 of the same numbers: rounded once, not with every image."""
    x = np.abs(random(80, 64, 64, 3)).astype(jnp.bfloat16)
    gradient = (random(80, 64, 64, 3, seed=1) + 0.3).astype(jnp.bfloat16)
    kernel = random(side, side, 1 if depthwise else 3, 3, seed=2).astype(jnp.bfloat16)

    @jax.jit
    def kernel_gradient(x, kernel, gradient):
        def convolve(kernel):
            return convolutions.conv2d(x, kernel, padding=side // 2, depthwise=depthwise)

        return jax.vjp(convolve, kernel)[1](gradient)[0]

    found = kernel_gradient(x, kernel, gradient)
    exact = kernel_gradient(*(jnp.float32(a) for a in (x, kernel, gradient)))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(found), exact, rtol=2**-8)


@pytest.mark.parametrize("shape", [(8,), (5, 1, 1, 8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sums_over_pixels_are_in_float32(shape, dtype):
    """The gradients of what is added to all pixels, and of what they are multiplied by."""
    x = (random(5, 90, 70, 8) + 0.3).astype(dtype)
    gradient = (random(*x.shape, seed=1) + 0.3).astype(dtype)
    small = random(*shape, seed=2)

    def of(function):
        found, transpose = jax.vjp(lambda s: function(x, convolutions.everywhere(s, x)), small)
        assert found.dtype == dtype and found.shape == x.shape
        expected = jax.vjp(lambda s: function(x.astype(jnp.float32), s), small)[1]
        np.testing.assert_array_equal(found, function(x, small.astype(dtype)))
        return transpose(gradient)[0], expected(gradient.astype(jnp.float32))[0]

    for found, expected in (of(jnp.add), of(jnp.multiply)):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize("groups, mean", [(4, 0.0), (4, 30.0), (8, 0.0), (1, 2.0)])
def test_group_norm_is_flaxs(groups, mean):
    """And its gradients; a mean of many standard deviations costs no precision."""
    x = mean + random(2, 9, 7, 8)
    ours = layers.GroupNorm(groups)
    flaxs = nn.GroupNorm(groups, epsilon=1e-5, use_fast_variance=False)
    variables = {"params": {"scale": random(8, seed=1), "bias": random(8, seed=2)}}
    expected, expected_transpose = jax.vjp(flaxs.apply, variables, x)
    found, transpose = jax.vjp(ours.apply, variables, x)
    tolerance = 2e-5 if mean < 30 else 1e-4
    np.testing.assert_allclose(found, expected, atol=tolerance)
    gradients = (f(random(*x.shape, seed=3)) for f in (transpose, expected_transpose))
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=10 * tolerance)
    half = layers.GroupNorm(groups, jnp.bfloat16).apply(variables, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16 and np.isfinite(half.astype(jnp.float32)).all()


def test_frozen_batch_norm_has_no_trainable_parameter():
    norm = layers.FrozenBatchNorm()
    variables = norm.init(jax.random.key(0), jnp.zeros((1, 2, 2, 3)))
    assert set(variables) == {"frozen"}
    frozen = {"scale": 2.0, "bias": 3.0, "mean": 1.0, "var": 4.0}
    frozen = {k: jnp.full(3, v) for k, v in frozen.items()}
    x = random(1, 2, 2, 3)
    expected = (x - 1) / np.sqrt(4 + 1e-5) * 2 + 3
    np.testing.assert_allclose(norm.apply({"frozen": frozen}, x), expected, atol=1e-6)


@pytest.mark.parametrize(
    "sizes", [((40, 60), (33, 49)), ((24, 31), (49, 65)), ((33, 17), (33, 17))]
)
def test_cubic_resize_of_frames_is_opencvs(sizes):
    size, out = sizes
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.float32)
    expected = cv2.resize(image, out[::-1], interpolation=cv2.INTER_CUBIC)
    found = resizing.resize(jnp.asarray(image)[None], out, "bicubic", align_corners=False)[0]
    assert expected.min() < 0 or size == out  # overshoot is kept, not clipped
    np.testing.assert_allclose(found, expected, atol=2e-3)  # of 255


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_resizing_keeps_constants_and_corners(method):
    x = random(1, 5, 7, 2)
    found = resizing.resize(x, (11, 4), method)
    np.testing.assert_allclose(found[0, [0, -1]][:, [0, -1]], x[0, [0, -1]][:, [0, -1]], atol=1e-5)
    np.testing.assert_allclose(
        resizing.resize(jnp.ones((1, 5, 7, 1)), (1, 20), method), 1, atol=1e-6
    )


def test_resize_is_never_in_reduced_precision():
    """On NVIDIA GPUs DEFAULT is TF32."""
    lowered = jax.jit(lambda x: resizing.resize(x, (9, 9))).lower(jnp.ones((1, 5, 7, 2))).as_text()
    assert lowered.count("dot_general") == 2
    assert lowered.count("precision = [HIGHEST, HIGHEST]") == 2


def test_gct_starts_as_the_identity_and_has_finite_gradients_at_zero():
    gct = layers.GatedChannelTransform()
    x = random(2, 4, 5, 3)
    variables = gct.init(jax.random.key(0), layers.channel_energy(x))
    np.testing.assert_array_equal(gct.apply(variables, layers.channel_energy(x)), 1)
    zeros = jnp.zeros_like(x)
    gradient = jax.grad(lambda v, x: gct.apply(v, layers.channel_energy(x)).sum(), (0, 1))(
        variables, zeros
    )
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    "size, scale, limit, expected",
    [
        ((480, 854), 1.0, 1040, (481, 849)),
        ((97, 129), 1.0, 1040, (97, 129)),
        ((100, 134), 1.15, 800, (113, 161)),
        ((1080, 1920), 1.0, 1040, (577, 1041)),  # 585 x 1040 before the rounding
        ((720, 1280), 1.0, 800, (449, 801)),
        ((480, 1280), 1.15, 800, (353, 913)),  # 480 * 0.625 * 1.15 = 345; 480 * 0.71875 < 345
        ((41, 57), 1.0, 1040, (33, 65)),  # 40 / 16 = 2.5 -> 2 and 56 / 16 = 3.5 -> 4: half to even
    ],
)
def test_network_size(size, scale, limit, expected):
    assert images.network_size(size, scale, limit) == expected


def test_prepare_orders_and_normalises_channels():
    frame = np.zeros((1, 17, 17, 3), np.uint8)
    frame[..., 0], frame[..., 2] = 255, 51  # red and blue
    official = images.prepare(jnp.asarray(frame), (17, 17), images.OFFICIAL_FORMAT)[0, 0, 0]
    blue, green, red = (0.2 - 0.485) / 0.229, -0.456 / 0.224, (1 - 0.406) / 0.225
    np.testing.assert_allclose(official, [blue, green, red], rtol=1e-5)
    rgb = images.prepare(jnp.asarray(frame), (17, 17), images.IMAGENET_FORMAT)[0, 0, 0]
    np.testing.assert_allclose(rgb[0], (1 - 0.485) / 0.229, rtol=1e-5)
    with pytest.raises(ValueError, match="channel_order"):
        images.ImageFormat(channel_order="grb")


@pytest.mark.parametrize(
    "dilation, size", [(8, (9, 11)), (8, (20, 7)), (12, (14, 30)), (18, (5, 6))]
)
def test_widely_dilated_convolution_is_xlas(dilation, size):
    """Computed by rows of taps, which crop what is padding alone, with and without room for it."""
    x, kernel = random(2, *size, 3), random(3, 3, 3, 4, seed=1)
    expected = jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        ((dilation, dilation),) * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    found = convolutions.conv2d(x, kernel, dilation=dilation, padding=dilation)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size, target", [((3, 5), (9, 17)), ((4, 4), (13, 14)), ((1, 2), (1, 7))])
def test_convolution_of_the_resized_input(method, size, target):
    """The same, and the same gradients, as resizing first. Values are of order 10."""
    x, kernel = random(2, *size, 5), random(3, 3, 5, 4, seed=1)

    def directly(x, kernel):
        resized = resizing.resize(x, target, method)
        return jax.lax.conv_general_dilated(
            resized, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    expected, expected_transpose = jax.vjp(directly, x, kernel)
    found, transpose = jax.vjp(
        lambda x, k: resizing.resized_conv2d(x, k, target, method), x, kernel
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)
    gradient = random(*expected.shape, seed=2)
    for a, b in zip(transpose(gradient), expected_transpose(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))


def test_dropout_is_after_the_pyramid_and_while_training_alone():
    """Of the pyramid's output, which the decoder's first convolution reads."""
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 33, 49, 3)), jnp.float32)
    network, variables = small_network()
    variables = jax.tree.map(jnp.asarray, variables)
    keys = jax.random.split(jax.random.key(3), 2)

    def embed(dropout_keys, dropout):
        model = network.clone(dropout=dropout)
        _, seen = model.apply(
            variables,
            images,
            dropout_keys,
            method=CFBI.embed,
            capture_intermediates=lambda module, _: isinstance(module, deeplab.Aspp),
        )
        return seen["intermediates"]["deeplab"]["aspp"]["__call__"][0]

    plain = embed(None, 0.5)
    np.testing.assert_array_equal(embed(keys, 0.0), plain)
    np.testing.assert_array_equal(embed(keys, 0.5), layers.dropout(plain, 0.5, keys))


def test_dropout_of_an_image_is_its_keys():
    x = jnp.ones((3, 40, 50, 8))
    keys = jax.random.split(jax.random.key(0), 3)
    found = np.asarray(layers.dropout(x, 0.1, keys))
    np.testing.assert_array_equal(np.unique(found), np.float32([0, 1 / 0.9]))
    np.testing.assert_allclose((found == 0).mean(axis=(1, 2, 3)), 0.1, atol=0.01)  # 4 sigma
    np.testing.assert_array_equal(layers.dropout(x[1:2], 0.1, keys[1:2])[0], found[1])
    assert (found[0] != found[1]).mean() > 0.1
