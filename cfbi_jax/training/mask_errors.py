"""Previous masks with an error in them, from which the network has to find back to its objects.

    label = with_error(label, num_objects, key, share)

Not part of the paper. From frame to frame the previous mask is nearly right, and a network that has
learned to follow it loses an object for good where it once is wrong.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8


def with_error(
    label: UInt8[Array, "h w"],
    num_objects: Int[Array, ""],
    key: PRNGKeyArray,
    share: float | Float[Array, ""],
) -> UInt8[Array, "h w"]:
    """With probability `share` a side of one object, or all of it, becomes another row's.

    The object is one of rows 1..num_objects of `label`, the other row any other, the background's
    too. The side lies on one hand of a line of random direction. Ignored pixels (255) stay.
    """
    happens, of_object, of_row, of_angle, of_cut = jax.random.split(key, 5)
    number = jnp.maximum(num_objects, 1)
    row = jax.random.randint(of_object, (), 1, number + 1)
    other = (row + jax.random.randint(of_row, (), 1, number + 1)) % (number + 1)
    angle = jax.random.uniform(of_angle, maxval=2 * jnp.pi)
    y, x = jnp.mgrid[: label.shape[0], : label.shape[1]]
    along = x * jnp.cos(angle) + y * jnp.sin(angle)
    object_pixels = label == row
    first = jnp.min(along, where=object_pixels, initial=jnp.inf)
    last = jnp.max(along, where=object_pixels, initial=-jnp.inf)
    # A third of the errors take everything.
    cut = first + jax.random.uniform(of_cut, maxval=1.5) * (last - first)
    wrong = object_pixels & (along <= cut) & (jax.random.uniform(happens) < share)
    return jnp.where(wrong, other, label).astype(jnp.uint8)
