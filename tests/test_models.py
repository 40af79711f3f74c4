"""The autoencoder: sizes, purity, and its convolutions against XLA's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from compaware_jax.models import autoencoder, strided_convolution, transposed_convolution

PRESETS = {"dense": 1_083_696, "conv": 1_663_265}

SIMPLE = {
    *("pad", "slice", "concatenate", "reshape", "transpose", "broadcast_in_dim", "squeeze"),
    *("dot_general", "add", "max", "mul", "sub", "div", "exp", "logistic", "copy"),
    # The calls themselves: relu and sigmoid are jitted, relu has a derivative rule of its own.
    *("jit", "custom_jvp_call"),
}


def primitives(jaxpr) -> set[str]:
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                names |= primitives(inner)
    return names


@pytest.fixture(params=PRESETS)
def preset(request):
    return request.param


@functools.cache
def compiled_init(preset: str):
    return jax.jit(autoencoder(preset).init)


@functools.cache
def compiled_apply(preset: str):
    return jax.jit(autoencoder(preset).apply)


@functools.cache
def drawn(preset: str):
    return compiled_init(preset)(jax.random.key(0))


@functools.cache
def digits() -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (3, 28, 28, 1), jnp.float32)


def test_variables(preset):
    variables = drawn(preset)
    assert set(variables) == {"params"}
    assert set(variables["params"]) == {"encoder", "decoder"}
    leaves = jax.tree.leaves(variables)
    assert sum(leaf.size for leaf in leaves) == PRESETS[preset]
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}


def test_dense_widths():
    params = drawn("dense")["params"]
    shapes = [
        params[component][layer]["kernel"].shape
        for component, layers in (
            ("encoder", ("dense1", "dense2", "latent")),
            ("decoder", ("dense1", "dense2", "image")),
        )
        for layer in layers
    ]
    assert shapes == [(784, 512), (512, 256), (256, 32), (32, 256), (256, 512), (512, 784)]


def test_conv_widths():
    params = drawn("conv")["params"]
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    assert shapes["encoder"]["conv1"] == {"kernel": (3, 3, 1, 32), "bias": (32,)}
    assert shapes["encoder"]["conv2"] == {"kernel": (3, 3, 32, 64), "bias": (64,)}
    assert shapes["encoder"]["dense1"]["kernel"] == (7 * 7, 64, 256)
    assert shapes["encoder"]["latent"]["kernel"] == (256, 32)
    assert shapes["decoder"]["dense1"]["kernel"] == (32, 256)
    assert shapes["decoder"]["dense2"]["kernel"] == (256, 7 * 7, 64)
    assert shapes["decoder"]["conv1"] == {"kernel": (3, 3, 64, 32), "bias": (32,)}
    assert shapes["decoder"]["image"] == {"kernel": (3, 3, 32, 1), "bias": (1,)}


def test_outputs(preset):
    model, variables = autoencoder(preset), drawn(preset)
    output = compiled_apply(preset)(variables, digits())
    assert set(output) == {"image", "latent"}
    assert output["image"].shape == (3, 28, 28, 1)
    assert output["latent"].shape == (3, 32)
    assert output["image"].min() > 0
    assert output["image"].max() < 1
    assert output["latent"].min() < 0, "the latent is linear"
    latent = jax.jit(model.encode)(variables, digits())
    np.testing.assert_allclose(latent, output["latent"], rtol=1e-5, atol=1e-5)
    image = jax.jit(model.decode)(variables, latent)
    np.testing.assert_allclose(image, output["image"], rtol=1e-5, atol=1e-5)


def test_components_are_independent(preset):
    model = autoencoder(preset)
    params = drawn(preset)["params"]
    encoder, decoder = ({"params": {name: params[name]}} for name in ("encoder", "decoder"))
    assert jax.eval_shape(model.encode, encoder, digits()).shape == (3, 32)
    image = jax.eval_shape(model.decode, decoder, jnp.zeros((2, 32)))
    assert image.shape == (2, 28, 28, 1)


def test_pure_and_seeded(preset):
    model = autoencoder(preset)
    inits = [compiled_init(preset)(jax.random.key(seed)) for seed in (0, 1, 0)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *inits)
    for path, leaf in jax.tree.leaves_with_path(stacked):
        np.testing.assert_array_equal(leaf[0], leaf[2])
        same = np.array_equal(leaf[0], leaf[1])
        assert same == (path[-1].key == "bias"), "kernels differ by seed"
    output = jax.jit(jax.vmap(model.apply, in_axes=(0, None)))(stacked, digits())
    assert output["image"].shape == (3, 3, 28, 28, 1)
    one = compiled_apply(preset)(inits[1], digits())
    np.testing.assert_allclose(output["image"][1], one["image"], rtol=1e-5, atol=1e-5)


def test_training_lowers_the_loss(preset):
    model = autoencoder(preset)

    images = digits()

    @jax.jit
    @jax.value_and_grad
    def loss(variables):
        return jnp.mean(jnp.square(model.apply(variables, images)["image"] - images))

    variables = drawn(preset)
    before, gradient = loss(variables)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    moved = jax.tree.map(lambda leaf, slope: leaf - 0.5 * slope, variables, gradient)
    assert loss(moved)[0] < before


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"autoencoder: got preset='vit'; expected one of \['conv"):
        autoencoder("vit")


def test_only_simple_primitives(preset):
    model = autoencoder(preset)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    used = primitives(jax.make_jaxpr(model.apply)(variables, digits()).jaxpr)
    assert "dot_general" in used
    assert used <= SIMPLE, used - SIMPLE


def conv(x, kernel):
    return lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def flax_conv(x, kernel):
    layer = nn.Conv(kernel.shape[-1], (3, 3), strides=2, use_bias=False)
    return layer.apply({"params": {"kernel": kernel}}, x)


def flax_transposed(x, kernel):
    layer = nn.ConvTranspose(kernel.shape[-1], (3, 3), strides=(2, 2), use_bias=False)
    return layer.apply({"params": {"kernel": kernel}}, x)


def dilated(x, kernel):
    return lax.conv_general_dilated(
        *(x, kernel, (1, 1), ((2, 1), (2, 1))),
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(convolution, x, kernel, cotangent):
    value, pull_back = jax.vjp(convolution, x, kernel)
    return value, *pull_back(cotangent)


@pytest.mark.parametrize("size", [(14, 14), (7, 7), (8, 5)])
@pytest.mark.parametrize("channels", [(1, 4), (3, 1)])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (strided_convolution, conv),
        (strided_convolution, flax_conv),
        (transposed_convolution, dilated),
        (transposed_convolution, flax_transposed),
    ],
)
def test_convolutions_equal_those_of_xla(ours, theirs, size, channels):
    # Drawn by numpy: jax.random compiles anew for every shape.
    random = np.random.RandomState(sum(size) + channels[0])
    x = random.randn(2, *size, channels[0]).astype(np.float32)
    kernel = (random.randn(3, 3, *channels) / 3).astype(np.float32)
    shape = jax.eval_shape(theirs, x, kernel).shape
    assert jax.eval_shape(ours, x, kernel).shape == shape
    cotangent = (random.randn(*shape) / 10).astype(np.float32)
    results = (value_and_gradients(function, x, kernel, cotangent) for function in (ours, theirs))
    for result, reference in zip(*results, strict=True):
        assert result.dtype == reference.dtype
        np.testing.assert_allclose(result, reference, rtol=1e-5, atol=1e-5)
