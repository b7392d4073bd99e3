"""scripts/baselines.py: its arithmetic against NumPy, and as a user runs it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from from_scripts import load_script
from PIL import Image
from small import SMALL, mask_of, random_variables, random_video, small_network

import cfbi_jax
from cfbi_jax.data.synthetic import write_davis
from cfbi_jax.models.cfbi import CFBI
from cfbi_jax.models.images import IMAGENET_FORMAT, ImageFormat
from cfbi_jax.models.mobilenet_v2 import MobileNetV2
from cfbi_jax.weights.checkpoint import Checkpoint

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "baselines.py"
CONFIG = f"""
from cfbi_jax.config import default_config, source

def get_config():
    config = default_config()
    config.model = {SMALL}
    config.sources.drawn = source(dataset="synthetic")
    config.clips.update(crop_size=33, short_edge=40, min_object_pixels=5)
    return config
"""


@pytest.fixture(scope="module")
def baselines():
    return load_script("baselines")


@pytest.fixture(scope="module")
def davis(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "DAVIS"
    write_davis(root, (1, 2), resolution="48p", num_frames=4, size=(48, 64))
    return root


def arguments_of(baselines, *arguments):
    return baselines.parse_arguments([str(argument) for argument in arguments])


def read_masks(folder):
    return {path.stem: np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))}


# ---- Nearest neighbours ----


@pytest.mark.parametrize("neighbours", [1, 3, 40])
def test_vote_is_that_of_numpy(baselines, monkeypatch, neighbours):
    monkeypatch.setattr(baselines, "QUERY_CHUNK", 16)  # 50 queries: the last chunk is not full
    rng = np.random.default_rng(0)
    query, reference = rng.standard_normal((50, 5)), rng.standard_normal((30, 5))
    label = rng.dirichlet(np.ones(3), 30)
    expected = []
    for q in query:
        nearest = np.argsort([((q - p) ** 2).sum() for p in reference])[:neighbours]
        expected.append(label[nearest].mean(axis=0))
    arrays = (jnp.asarray(x, jnp.float32) for x in (query, reference, label))
    np.testing.assert_allclose(baselines.vote(*arrays, neighbours), expected, atol=1e-6)


def test_shrink_averages_around_aligned_corners(baselines):
    """9 to 3: the pixels are at 0, 4 and 8, and each weighs those less than 4 away."""
    x = np.random.default_rng(0).random((9, 5, 2)).astype(np.float32)
    inner = np.array([0, 1, 2, 3, 4, 3, 2, 1, 0]) / 16
    outer = np.array([4, 3, 2, 1, 0, 0, 0, 0, 0]) / 10
    rows = np.stack([outer, inner, outer[::-1]])
    expected = np.einsum("hi,ijr->hjr", rows, x)
    np.testing.assert_allclose(baselines.shrink(jnp.asarray(x), (3, 5)), expected, rtol=1e-5)


def test_labels_follow_pixels_that_move(baselines):
    """Every pixel has a colour of its own, by which it is found wherever it goes."""
    size, rng = (17, 33), np.random.default_rng(0)
    mask = mask_of({3: (2, 4, 9, 20), 7: (8, 18, 15, 30)}, size)
    first = np.zeros((*size, 3), np.uint8)
    first[..., 0], first[..., 1] = np.meshgrid(range(17), range(33), indexing="ij")
    shuffled = rng.permutation(mask.size)
    frames = [first, np.roll(first, (2, -5), (0, 1)), first.reshape(-1, 3)[shuffled]]
    frames[2] = frames[2].reshape(first.shape)

    labels = list(
        baselines.nearest_labels(iter(frames), mask, lambda frame: frame.astype(np.float32), 1)
    )
    expected = [mask, np.roll(mask, (2, -5), (0, 1)), mask.ravel()[shuffled].reshape(size)]
    for label, right in zip(labels, expected, strict=True):
        assert label.dtype == np.uint8
        np.testing.assert_array_equal(label, right)


@pytest.mark.parametrize("neighbours, least", [(1, 0.95), (5, 0.8)])
def test_video_that_does_not_move(baselines, neighbours, least):
    """With features at stride 4 what is lost is at the outlines."""
    size = (65, 97)
    y, x = np.mgrid[:65, :97]
    mask = ((y - 30) ** 2 + (x - 50) ** 2 < 20**2).astype(np.uint8)
    frame = np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)
    _, label = baselines.nearest_labels(
        iter([frame, frame]), mask, lambda f: f[::4, ::4].astype(np.float32), neighbours
    )
    assert label.shape == size
    assert np.sum(label & mask) / np.sum(label | mask) > least


# ---- Features ----


def test_embedding_is_the_networks(baselines):
    model, variables = small_network()
    image_format = ImageFormat("rgb", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    features = baselines.embedding_features(Checkpoint(model, variables, image_format))
    frame = random_video(1, (40, 56))[0]
    assert features(frame).shape == (9, 13, 16)  # seen by the network at 33 x 49

    frame = frame[:33, :49]
    image = ((frame / 255 - [0.1, 0.2, 0.3]) / [0.4, 0.5, 0.6]).astype(np.float32)[None]
    expected, _ = jax.jit(lambda v, x: model.apply(v, x, method=CFBI.embed))(variables, image)
    found = features(frame)
    assert found.shape == (9, 13, 16)
    np.testing.assert_allclose(found, expected[0], atol=1e-4 * np.abs(expected).max())


def test_backbone_at_stride_8_holds_that_at_stride_16(baselines):
    """Dilation instead of strides computes the same at every second pixel."""
    model = CFBI(**SMALL, backbone="mobilenet_v2")
    checkpoint = Checkpoint(model, random_variables(model, seed=0), IMAGENET_FORMAT)
    frame = random_video(1, (80, 96))[0][:65, :81]
    fine = np.asarray(baselines.backbone_features(checkpoint, 8)(frame))
    coarse = np.asarray(baselines.backbone_features(checkpoint, 16)(frame))
    assert fine.shape == (9, 11, 96) and coarse.shape == (5, 6, 96)
    np.testing.assert_allclose(np.linalg.norm(fine, axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(fine[::2, ::2], coarse, atol=1e-4)
    assert np.abs(fine[1::2, ::2] - coarse[:-1]).max() > 0.01  # not merely enlarged


@pytest.mark.parametrize("stride, size", [(8, (9, 11)), (16, (5, 6)), (32, (3, 3))])
def test_output_stride_changes_no_parameter(stride, size):
    def shapes(model):
        image = jax.ShapeDtypeStruct((1, 65, 81, 3), np.float32)
        return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), image)

    (features, low_level), variables = shapes(MobileNetV2(output_stride=stride))
    assert features.shape == (1, *size, 320) and low_level.shape == (1, 17, 21, 24)
    assert variables == shapes(MobileNetV2())[1]


# ---- The command ----


def test_first_mask(baselines, davis, tmp_path, capsys):
    data = ("--root", davis, "--resolution", "48p", "--output", tmp_path / "out")
    baselines.main(arguments_of(baselines, "--method", "first-mask", *data))
    truth = davis / "Annotations" / "48p"
    for name in ("synthetic-0001", "synthetic-0002"):
        found = read_masks(tmp_path / "out" / "Annotations" / name)
        first = np.array(Image.open(truth / name / "00000.png"))
        assert list(found) == ["00000", "00001", "00002", "00003"]
        for mask in found.values():
            np.testing.assert_array_equal(mask, first)

    table = (tmp_path / "out" / "global_results-val.csv").read_text().splitlines()[1]
    j_and_f = float(table.split(",")[0])
    printed = capsys.readouterr().out.splitlines()[-1].split()
    assert printed[0] == "J&F" and abs(float(printed[1]) - j_and_f) <= 0.0005
    assert 0 < j_and_f < 1
    assert len(list((tmp_path / "out").glob("*.csv"))) == 3


def test_nearest_with_a_checkpoint_and_one_sequence(baselines, davis, tmp_path):
    model, variables = small_network()
    cfbi_jax.save_checkpoint(tmp_path / "ckpt", model, variables, IMAGENET_FORMAT)
    data = ("--root", davis, "--resolution", "48p", "--output", tmp_path / "out")
    source = ("--checkpoint", tmp_path / "ckpt", "--sequences", "synthetic-0002")
    parsed = arguments_of(baselines, "--method", "nearest", *source, *data, "--neighbours", 2)
    baselines.main(parsed)
    (folder,) = (tmp_path / "out" / "Annotations").iterdir()
    assert folder.name == "synthetic-0002"
    found = read_masks(folder)

    frames = [
        np.array(Image.open(path))
        for path in sorted((davis / "JPEGImages" / "48p" / folder.name).iterdir())
    ]
    features = baselines.embedding_features(Checkpoint(model, variables, IMAGENET_FORMAT))
    given = np.array(Image.open(davis / "Annotations" / "48p" / folder.name / "00000.png"))
    expected = list(baselines.nearest_labels(iter(frames), given, features, 2))
    assert len(found) == len(expected) == 4
    for mask, label in zip(found.values(), expected, strict=True):
        assert np.mean(mask != label) < 0.01  # pictures are decoded by another library
    assert any((mask != given).any() for mask in found.values())


def test_untrained_networks(baselines, tmp_path):
    (tmp_path / "small.py").write_text(CONFIG)
    frame = random_video(1)[0]
    common = ("--method", "nearest", "--root", "x", "--output", "y")
    found = []
    for more in ([0], [1], [1, "--calibrated"]):
        source = ("--config", tmp_path / "small.py", "--seed", *more)
        features = baselines.load_features(arguments_of(baselines, *common, *source))
        found.append(np.asarray(features(frame)))
    assert found[0].shape == (9, 13, 16)
    assert not np.allclose(found[0], found[1]) and not np.allclose(found[1], found[2])

    # Videos on disk are those of --root, and only looked at for the calibration.
    drawn = 'config.sources.drawn = source(dataset="synthetic")'
    kept = "config.sources.kept = source(root=config.data.get_oneway_ref('root'))"
    (tmp_path / "kept.py").write_text(CONFIG.replace(drawn, kept))
    source = ("--config", tmp_path / "kept.py", "--seed", 1, "--root", tmp_path / "nowhere")
    features = baselines.load_features(arguments_of(baselines, *common, *source))
    np.testing.assert_array_equal(features(frame), found[1])
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        baselines.load_features(arguments_of(baselines, *common, *source, "--calibrated"))

    (tmp_path / "none.py").write_text("x = 1\n")
    parsed = arguments_of(baselines, *common, "--config", tmp_path / "none.py")
    with pytest.raises(ValueError, match=r"none\.py: no get_config\(\)"):
        baselines.load_features(parsed)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "nearest"], "takes --checkpoint, --config or --backbone"),
        (["--method", "first-mask", "--backbone", "x.npz"], "--method nearest, and no other"),
        (["--method", "nearest", "--backbone", "x", "--neighbours", "0"], "expected 1 or more"),
        (["--method", "nearest", "--backbone", "x", "--config", "y"], "not allowed with"),
        (["--method", "first-mask", "--calibrated"], "--calibrated is for --config"),
        (["--method", "nearest", "--backbone", "x", "--seed", "4"], "--seed is for --config"),
        (["--method", "nearest", "--config", "x", "--stride", "16"], "--stride is for --backbone"),
        (["--method", "first-mask", "--neighbours", "5"], "is for --method nearest"),
        (["--method", "first-mask", "--sequences", ""], "--sequences names no sequence"),
    ],
)
def test_arguments(baselines, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        arguments_of(baselines, *arguments, "--root", "x", "--output", "y")
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_results_of_a_network_are_not_replaced(baselines, davis, tmp_path):
    (tmp_path / "segmented").mkdir()
    data = ("--root", davis, "--resolution", "48p", "--output", tmp_path)
    with pytest.raises(ValueError, match="holds the results of a network"):
        baselines.main(arguments_of(baselines, "--method", "first-mask", *data))
    assert not (tmp_path / "Annotations").exists()


def test_the_data_sets_masks_are_not_replaced(baselines, davis, tmp_path):
    """In a data set without a folder per resolution they are where an output's masks would be."""
    shutil.copytree(davis, tmp_path / "flat")
    for kind in ("JPEGImages", "Annotations"):
        for folder in (tmp_path / "flat" / kind / "48p").iterdir():
            folder.rename(tmp_path / "flat" / kind / folder.name)
    before = read_masks(tmp_path / "flat/Annotations/synthetic-0001")
    data = ("--root", tmp_path / "flat", "--resolution", ".", "--output", tmp_path / "flat")
    with pytest.raises(ValueError, match="Annotations/.* are where masks would be written"):
        baselines.main(arguments_of(baselines, "--method", "first-mask", *data))
    after = read_masks(tmp_path / "flat/Annotations/synthetic-0001")
    assert all(np.array_equal(after[name], mask) for name, mask in before.items())


def test_no_table_is_left_of_masks_that_go(baselines, davis, tmp_path, monkeypatch):
    data = ("--root", davis, "--resolution", "48p", "--output", tmp_path / "out")
    arguments = arguments_of(baselines, "--method", "first-mask", *data)
    baselines.main(arguments)
    assert list((tmp_path / "out").glob("*.csv"))
    labels = baselines.video_labels

    def interrupted(video, *more):
        if video.name == "synthetic-0002":
            raise KeyboardInterrupt
        return labels(video, *more)

    monkeypatch.setattr(baselines, "video_labels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        baselines.main(arguments)
    assert not list((tmp_path / "out").glob("*.csv"))


def test_of_two_at_once_one_gets_the_folder(baselines, davis, tmp_path, monkeypatch):
    data = ("--root", davis, "--resolution", "48p", "--output", tmp_path / "out")
    arguments = arguments_of(baselines, "--method", "first-mask", *data)
    write = baselines.write_and_score

    def meanwhile(*given):
        with monkeypatch.context() as patch:
            patch.setattr(baselines, "write_and_score", write)
            with pytest.raises(ValueError, match="out: another process writes there"):
                baselines.main(arguments)
        assert not (tmp_path / "out/Annotations").exists()
        return write(*given)

    monkeypatch.setattr(baselines, "write_and_score", meanwhile)
    baselines.main(arguments)
    assert list((tmp_path / "out").glob("*.csv"))


def test_features_are_those_of_the_stride(baselines, monkeypatch):
    monkeypatch.setattr(baselines, "initial_checkpoint", lambda *_, **__: None)
    monkeypatch.setattr(baselines, "backbone_features", lambda checkpoint, stride: stride)
    data = ("--method", "nearest", "--root", "x", "--output", "y", "--backbone", "b.npz")
    for more, stride in (((), 8), (("--stride", 16), 16)):
        assert baselines.load_features(arguments_of(baselines, *data, *more)) == stride


def test_another_list_and_year(baselines, davis, tmp_path):
    davis = shutil.copytree(davis, tmp_path / "DAVIS")
    (davis / "ImageSets/2016").mkdir()
    (davis / "ImageSets/2016/train.txt").write_text("synthetic-0002\n")
    data = ("--root", davis, "--resolution", "48p", "--output", tmp_path / "out")
    chosen = ("--year", 2016, "--split", "train")
    baselines.main(arguments_of(baselines, "--method", "first-mask", *data, *chosen))
    table = (tmp_path / "out/per-sequence_results-train.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table[1:]] == ["synthetic-0002_1"]


def test_a_damaged_frame_is_known_first(baselines, davis, tmp_path):
    davis = shutil.copytree(davis, tmp_path / "DAVIS")
    path = davis / "JPEGImages/48p/synthetic-0002/00002.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    data = ("--root", davis, "--resolution", "48p", "--output", tmp_path / "out")
    with pytest.raises(ValueError, match=r"synthetic-0002/00002\.jpg: .*cut short"):
        baselines.main(arguments_of(baselines, "--method", "first-mask", *data))
    assert not (tmp_path / "out").exists()


def test_bad_input_is_a_message(davis, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, SCRIPT, "--method", "nearest", "--backbone", tmp_path / "none.npz"),
            *("--root", davis, "--resolution", "48p", "--output", tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "none.npz: no such file" in done.stderr
    assert not (tmp_path / "out").exists()
