"""Options of inference: their defaults, what is refused, and the views that they make."""

import dataclasses

import pytest

from cfbi_jax.inference.options import Options
from cfbi_jax.inference.test_time import View, views_of


def test_defaults_are_exact():
    assert dataclasses.asdict(Options()) == dict(
        scales=(1.0,),
        flip=False,
        max_long_edge=None,
        global_atrous_rate=None,
        local_atrous_rate=None,
        matching_dtype="float32",
        compute_dtype="float32",
        max_references=32,
        max_objects=None,
        memory_mib=None,
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(scales=()), "scales"),
        (dict(scales=0), "scales is 0; expected"),
        (dict(scales=(1.0, -1.0)), "scales"),
        (dict(scales=(float("nan"),)), "scales"),
        (dict(scales=(float("inf"),)), "scales"),
        (dict(max_long_edge=0), "max_long_edge is 0"),
        (dict(global_atrous_rate=0), "global_atrous_rate is 0"),
        (dict(local_atrous_rate=0), "local_atrous_rate is 0"),
        (dict(matching_dtype="float8"), 'matching_dtype is "float8"'),
        (dict(compute_dtype="float8"), 'compute_dtype is "float8"'),
        (dict(max_objects=255), "max_objects is 255; expected at most 254"),
        (dict(max_objects=0), "max_objects is 0"),
        (dict(max_objects=True), "max_objects is True"),
        (dict(max_references=0), "max_references is 0"),
        (dict(memory_mib=0), "memory_mib is 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)


def test_views_have_the_released_limits():
    """1040 pixels for one scale, 800 for several, unless told; each scale, then its mirror."""
    assert views_of((480, 854), (1.0,), False, None) == (View((481, 849), False),)
    assert views_of((1080, 1920), (1.0,), True, None) == (
        View((577, 1041), False),
        View((577, 1041), True),
    )
    assert views_of((720, 1280), (1.0, 0.5), True, None) == (
        View((449, 801), False),
        View((449, 801), True),
        View((225, 401), False),
        View((225, 401), True),
    )
    assert views_of((1080, 1920), (1.0, 1.0), False, 1040) == 2 * (View((577, 1041), False),)
