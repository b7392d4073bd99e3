"""State dicts of backbones as others publish them, on top of the recipe's numbers."""

import re

import numpy as np
import recipe


def deeplab_state(name):
    """As DeepLabv3+ files are: no prefix, a classifier, and counters beside the running means."""
    prefix = "feature_extracter."
    state = {}
    for key, value in recipe.recipe_state_dict(name).items():
        if key.startswith(prefix) and recipe.canonical_key(key) == key:
            state[key.removeprefix(prefix)] = value
            if key.endswith("running_mean"):
                counter = key.removeprefix(prefix).replace("running_mean", "num_batches_tracked")
                state[counter] = np.array(7)
    state["decoder.last_conv.8.weight"] = np.zeros((21, 256, 1, 1), np.float32)
    state["decoder.last_conv.8.bias"] = np.zeros(21, np.float32)
    return state


def torchvision_resnet_state():
    state = {k: v for k, v in deeplab_state("r101_cfbi").items() if k.startswith("backbone.")}
    state = {k.removeprefix("backbone."): v for k, v in state.items()}
    return state | {"fc.weight": np.zeros((1000, 2048), np.float32), "fc.bias": np.zeros(1000)}


def torchvision_mobilenet_state():
    """torchvision's names: ConvBNReLU triples are modules of their own."""
    state = {}
    for key, value in deeplab_state("mbv2_cfbi").items():
        found = re.match(r"backbone\.features\.(\d+)\.(conv\.)?(\d+)\.(\w+)$", key)
        if not found:
            continue
        block, _, index, leaf = found.groups()
        index = int(index)
        if block == "0":
            name = f"features.0.{index}.{leaf}"
        else:
            last = 3 if block == "1" else 6  # position of the projection
            module = {0: "0.0", 1: "0.1", 3: "1.0", 4: "1.1"}
            if index >= last:
                module = {last: str(last // 3), last + 1: str(last // 3 + 1)}
            name = f"features.{block}.conv.{module[index]}.{leaf}"
        state[name] = value
    state["features.18.0.weight"] = np.zeros((1280, 320, 1, 1), np.float32)
    state["classifier.1.weight"] = np.zeros((1000, 1280), np.float32)
    return state
