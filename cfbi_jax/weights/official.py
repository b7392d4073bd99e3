"""Official CFBI state dicts, and backbone files of others, to our variables and back.

All functions work on plain dicts of NumPy arrays; `pth.py` reads and writes the files.
"""

import re
from collections.abc import Mapping
from functools import reduce
from operator import getitem

import numpy as np

from cfbi_jax.models.cfbi import CFBI, model_config
from cfbi_jax.weights.names import Entry, entries, from_official, to_official

StateDict = Mapping[str, np.ndarray]

# Fields that may differ from the released networks without changing any parameter; all but the
# first two change what is computed with them.
_FREE_FIELDS = (
    "backbone",
    "dropout",
    "local_downsample",
    "global_atrous_rate",
    "local_atrous_rate",
    "compute_dtype",
    "matching_dtype",
)
# In backbone files, but in no part of CFBI: classifiers and the counters of trainable batch norm.
_UNUSED_IN_BACKBONE_FILES = re.compile(
    r"(\.num_batches_tracked|^fc\.(weight|bias)|^classifier\.1\.(weight|bias)"
    r"|^features\.18\..*|^decoder\.last_conv\.8\.(weight|bias))$"
)
# torchvision nests the first two convolutions of an inverted residual one level deeper.
_TORCHVISION_MOBILENET = [
    (r"^features\.1\.conv\.0\.([01])\.", r"features.1.conv.\1."),
    (r"^features\.1\.conv\.1\.", "features.1.conv.3."),
    (r"^features\.1\.conv\.2\.", "features.1.conv.4."),
    (r"^features\.(\d+)\.conv\.0\.([01])\.", r"features.\1.conv.\2."),
    (r"^features\.(\d+)\.conv\.1\.0\.", r"features.\1.conv.3."),
    (r"^features\.(\d+)\.conv\.1\.1\.", r"features.\1.conv.4."),
    (r"^features\.(\d+)\.conv\.2\.", r"features.\1.conv.6."),
    (r"^features\.(\d+)\.conv\.3\.", r"features.\1.conv.7."),
]


def strip_module(state: StateDict) -> dict[str, np.ndarray]:
    """Drops the `module.` that `DataParallel` puts before every key.

    Raises ValueError where a key is there with and without it.
    """
    twice = [key for key in state if key.startswith("module.") and key[len("module.") :] in state]
    if twice:
        raise ValueError(f"two values for one tensor: {twice[0]} and {twice[0][len('module.') :]}")
    return {key.removeprefix("module."): value for key, value in state.items()}


def convert_state_dict(state: StateDict) -> tuple[CFBI, dict]:
    """An official CFBI state dict -> (model, variables); the architecture is read from the keys.

    Raises ValueError listing every missing, extra and wrongly shaped key, and every key whose two
    names hold different values. CFBI+ is named as such.
    """
    state = strip_module(state)
    if any(key.startswith("fpn.") for key in state):
        raise ValueError("this is a CFBI+ checkpoint (it has fpn.* keys); expected CFBI")
    if "feature_extracter.backbone.layer1.0.conv1.weight" in state:
        model = CFBI(backbone="resnet101")
    elif "feature_extracter.backbone.features.0.0.weight" in state:
        model = CFBI(backbone="mobilenet_v2")
    else:
        found = ", ".join(list(state)[:5])
        raise ValueError(
            "not a CFBI state dict: expected ResNet-101 (feature_extracter.backbone.layer1.*) or "
            f"MobileNetV2 (feature_extracter.backbone.features.*) keys, found {found} ..."
        )
    return model, _fill(entries(model), state, aliases_required=True)


def computed_otherwise(model: CFBI) -> dict[str, tuple]:
    """Where the official code would compute something else with the same weights: field ->
    (the model's value, the official one)."""
    own, released = model_config(model), model_config(CFBI())
    fields = _FREE_FIELDS[2:]
    return {f: (own[f], released[f]) for f in fields if own[f] != released[f]}


def export_state_dict(model: CFBI, variables: Mapping) -> dict[str, np.ndarray]:
    """The inverse of `convert_state_dict`, with every alias; bit-exact both ways.

    Raises ValueError for a model that the official code has no class for.
    """
    released = model_config(CFBI())
    different = {
        field: value
        for field, value in model_config(model).items()
        if value != released[field] and field not in _FREE_FIELDS
    }
    if different:
        raise ValueError(f"the official code cannot load this model: it differs in {different}")
    state = {}
    for entry in entries(model):
        array = np.asarray(reduce(getitem, entry.path, variables))
        array = np.ascontiguousarray(to_official(entry.path[-1], array))
        for key in (entry.key, *entry.aliases):
            state[key] = array
    return state


def convert_backbone(state: StateDict, model: CFBI) -> dict:
    """Backbone weights to start training `model` from -> the part of its variables they cover.

    Accepts DeepLabv3+ (keys `backbone.*`, `aspp.*`, `decoder.*`, without or with
    `feature_extracter.`), and torchvision's ResNet-101 and MobileNetV2, which cover the backbone
    alone. Classifiers and `num_batches_tracked` are left out; every other key must fit, and every
    array of the covered part must be there.
    """
    state = {
        key.removeprefix("feature_extracter."): value for key, value in strip_module(state).items()
    }
    state = {k: v for k, v in state.items() if not _UNUSED_IN_BACKBONE_FILES.search(k)}
    covered = "feature_extracter."
    if not any(key.startswith("backbone.") for key in state):  # torchvision
        covered = "feature_extracter.backbone."
        state = {_from_torchvision(key): value for key, value in state.items()}
    state = {covered + key: value for key, value in state.items()}
    table = [entry for entry in entries(model) if entry.key.startswith(covered)]
    return _fill(table, state, aliases_required=False)


def _from_torchvision(key: str) -> str:
    """The first rule that matches: what one rule gives, another may match again."""
    for pattern, replacement in _TORCHVISION_MOBILENET:
        if re.search(pattern, key):
            return re.sub(pattern, replacement, key)
    return key


def _fill(table: list[Entry], state: StateDict, aliases_required: bool) -> dict:
    """Variables of `table`'s paths from `state`, after accounting for every key both ways."""
    problems = []
    expected = {}
    for entry in table:
        for key in (entry.key, *entry.aliases):
            expected[key] = entry
    required = set(expected) if aliases_required else {entry.key for entry in table}
    problems += [f"missing: {key} {expected[key].shape}" for key in sorted(required - set(state))]
    problems += [
        f"extra: {key} {tuple(state[key].shape)}" for key in sorted(set(state) - set(expected))
    ]
    for key in sorted(set(state) & set(expected)):
        entry = expected[key]
        if tuple(state[key].shape) != entry.shape:
            problems.append(
                f"wrong shape: {key} is {tuple(state[key].shape)}, expected {entry.shape}"
            )
        elif state[key].dtype != np.float32:
            problems.append(f"wrong type: {key} is {state[key].dtype}, expected float32")
        elif not np.array_equal(state[key], state.get(entry.key, state[key]), equal_nan=True):
            problems.append(f"two values for one tensor: {key} and {entry.key}")
    if problems:
        listing = "\n  ".join(problems)
        raise ValueError(f"the weights do not fit ({len(problems)} problems):\n  {listing}")

    variables = {}
    for entry in table:
        node = variables
        for part in entry.path[:-1]:
            node = node.setdefault(part, {})
        array = from_official(entry.path[-1], np.asarray(state[entry.key]))
        node[entry.path[-1]] = np.array(array, order="C")  # ascontiguousarray would make 0-d 1-d
    return variables
