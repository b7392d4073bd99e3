"""Every experiment: what the paper, its appendix and the authors state of it."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

import configs
from cfbi_jax import config as fields
from cfbi_jax import main
from cfbi_jax.models.cfbi import build_model

ROOT = Path(__file__).parents[1]
NAMES = sorted(
    path.stem for path in Path(configs.__file__).parent.glob("*.py") if path.stem != "__init__"
)
# Paper section 4 and the authors' released settings; what a config does not list is the same.
PAPER = {
    "optimizer": "sgd",
    "momentum": 0.9,
    "weight_decay": 15e-5,
    "max_gradient_norm": 5.0,
    "warmup_steps": 1000,
    "min_learning_rate": 1e-5,
    "sequential_start": 0.5,
    "mining_end": 0.5,
    "mask_errors": 0.0,
    "mask_errors_start": 0.0,
    "freeze_backbone": False,
    "ema_decay": 0.0,
    "accumulate": 1,
    "clips.crop_size": 465,
    "clips.short_edge": 480,
    "clips.num_current": 3,
    "clips.max_objects": 5,
    "clips.balanced_crop": True,
    "clips.min_object_pixels": 100,
    "clips.min_reference_pixels": 200,
    "model.backbone": "resnet101",
    "model.head": "ensembler",
    "model.windows": (12, 2, 4, 6, 8, 10),  # in the order of the official weights
    "model.pixel_background": True,
    "model.instance_background": True,
    "model.instance_attention": True,
    "model.distance_bias": True,
    "model.dropout": 0.1,
}
DAVIS = {
    "batch_size": 6,
    "num_train_steps": 50_000,
    "learning_rate": 0.006,
    "data.dataset": "davis",
    "data.split": "val",
    "sources.davis.dataset": "davis",
    "sources.davis.split": "train",
    "sources.davis.weight": 1,
    "sources.davis.static": False,
    "sources.davis.full_resolution": True,
}
YOUTUBE_VOS = {
    "batch_size": 8,
    "num_train_steps": 100_000,
    "learning_rate": 0.01,
    "data.dataset": "youtube_vos",
    "data.split": "valid",
    "data.all_frames": False,  # 6 per second, as the published scores
    "sources.youtube_vos.dataset": "youtube_vos",
    "sources.youtube_vos.split": "train",
    "sources.youtube_vos.weight": 1,
}
BOTH = {
    **DAVIS,
    "batch_size": 8,
    "num_train_steps": 100_000,
    "learning_rate": 0.01,
    "sources.davis.weight": 30,
    "sources.youtube_vos.dataset": "youtube_vos",
    "sources.youtube_vos.split": "train",
    "sources.youtube_vos.weight": 1,
}
MOBILENET = {"model.backbone": "mobilenet_v2"}
EXPECTED = {
    "davis": DAVIS,
    "davis_mobilenet": DAVIS | MOBILENET,
    "youtube_vos": YOUTUBE_VOS,
    "youtube_vos_mobilenet": YOUTUBE_VOS | MOBILENET,
    "davis_youtube_vos": BOTH,
    "davis_youtube_vos_mobilenet": BOTH | MOBILENET,
    "static_pretraining": DAVIS | {"num_train_steps": 20_000, "sources.davis.static": True},
    "no_background": DAVIS | {"model.pixel_background": False, "model.instance_background": False},
    "feelvos_baseline": DAVIS
    | {
        "model.pixel_background": False,
        "model.instance_background": False,
        "model.distance_bias": False,
        "model.windows": (12,),
        "model.instance_attention": False,
        "model.head": "feelvos",
        "sequential_start": 1.0,
        "clips.balanced_crop": False,
    },
}


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_a_network_with_videos(name):
    config = load(name)
    build_model(config.model.to_dict())
    assert config.sources and all(source.weight > 0 for source in config.sources.values())
    config.data.root = "elsewhere"  # one root on the command line serves training and evaluation
    for source in config.sources.values():
        if source.dataset == config.data.dataset != "synthetic":
            assert source.root == "elsewhere"


@pytest.mark.parametrize("name", EXPECTED)
def test_published_settings(name):
    config = load(name)
    for field, value in (PAPER | EXPECTED[name]).items():
        found = config
        for part in field.split("."):
            found = found[part]
        assert found == value, field


def test_only_the_trainings_for_cpus_have_settings_of_their_own():
    stages = {f"davis240_mobilenet{stage}" for stage in ("", "_larger", "_branches")}
    assert set(NAMES) - set(EXPECTED) == {"quickstart", *stages}


@pytest.mark.parametrize(
    "file, name", [("README.md", "davis"), ("docs/real_video.md", "davis240_mobilenet")]
)
def test_overrides_in_the_documentation_are_taken(monkeypatch, file, name):
    found = re.findall(r"--config\.([a-z][\w.]*)=(\"[^\"]*\"|[^\s`;)]+)", (ROOT / file).read_text())
    overrides = {(field, value.strip('"')) for field, value in found if value != "N"}
    assert len(overrides) > 10
    for field, value in overrides:
        experiment = f"--config={ROOT}/configs/{name}.py"
        monkeypatch.setattr(sys, "argv", ["program", experiment, f"--config.{field}={value}"])
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values)
        values(sys.argv)
        set_to = values.config
        for part in field.split("."):
            set_to = set_to[part]
        if isinstance(set_to, bool | int | float | tuple):
            value = ast.literal_eval(value)
        assert set_to == value, field


def test_home_folders_are_found_after_an_equals_sign():
    """Shells expand `~` in `--field ~/x` but not in `--field=~/x`."""
    config = importlib.import_module("configs.davis").get_config()
    config.data.root, config.init_from = "~/DAVIS", "~/weights.npz"
    main._expand_home(config)
    assert config.data.root == config.sources.davis.root == str(Path.home() / "DAVIS")
    assert config.init_from == str(Path.home() / "weights.npz")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config=configs/quickstart.py", "--config.clips.max_gapp=3"],
            r"""error: 'max_gapp' Did you mean "max_gap" .* no field .*--config.clips.max_gapp=3""",
        ),
        (["--config=configs/nothing.py"], r"error: .*failure to load.*\s+configs/nothing\.py"),
        (
            ["--config=configs/nothing.py", "--config.seed=3"],
            r"error: .*failure to load.*\s+configs/nothing\.py",
        ),
        (["--config=~/no/thing.py"], rf"error: .*failure to load.*\s+{Path.home()}/no/thing\.py"),
        (["--config=configs/__init__.py", "--config.seed=3"], r"error: --config=configs/__init__"),
    ],
)
def test_the_command_refuses_what_there_is_not(tmp_path, arguments, message):
    command = [sys.executable, "-m", "cfbi_jax.main", f"--workdir={tmp_path}/out", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    assert re.match(message, result.stderr, re.DOTALL), result.stderr
    assert not (tmp_path / "out").exists()


def test_a_misspelt_field_is_an_error():
    """In a file of an experiment, too, not on the command line alone."""
    config = fields.default_config()
    with pytest.raises(AttributeError, match="num_trian_steps"):
        config.num_trian_steps = 5
    with pytest.raises(KeyError, match="crop_sise"):
        config.clips.update(crop_sise=33)
    with pytest.raises(KeyError, match="weigth"):
        fields.source(root="DAVIS", weigth=30)
    config.sources.mine = fields.source(weight=30)
    with pytest.raises(AttributeError, match="weigth"):
        config.sources.mine.weigth = 3
