"""scripts/benchmark.py: what it compares, what it counts, what it writes. Never how fast."""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfbi_jax.models.matching_kernel import Blocks

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"
SPREAD = {"median", "min", "max", "runs"}


@pytest.fixture(scope="module")
def benchmark():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.fixture
def run(benchmark, tmp_path, monkeypatch):
    """Runs a command line in this process and returns the JSON that it wrote."""
    monkeypatch.setattr(benchmark, "use_compilation_cache", lambda path: None)
    monkeypatch.setitem(benchmark.measure.PRODUCT_SIDE, "cpu", 256)
    monkeypatch.setitem(benchmark.measure.COPY_MIB, "cpu", 4)
    # As on CPUs.
    monkeypatch.setattr(benchmark.match.matching_global, "blocks_here", lambda *_: None)

    def run(*arguments):
        path = tmp_path / "figures.json"
        command = [*arguments, "--json", str(path), "--runs", "2"]
        benchmark.main(benchmark.parse_arguments(command), command)
        return json.loads(path.read_text())

    return run


def names(figures, section):
    return [row["name"] for row in figures["rows"] if row["section"] == section]


# ---- match ----


def test_match_compares_with_plain_versions(benchmark, run):
    figures = run("match", "--size", "49x65", "--model", "quickstart", "--objects", "2")
    assert figures["command"][0] == "match"
    machine = figures["machine"]
    assert {"cpu", "cores", "platform", "device", "jax", "peak_memory"} <= machine.keys()
    assert machine["limits"]["products"]["float32"] > 0 and machine["limits"]["copies"] > 0
    plain = ["straightforward in JAX"]
    if importlib.util.find_spec("torch"):
        plain.append("straightforward in torch")
    assert names(figures, "global matching") == ["ours", "the products alone", *plain]
    assert names(figures, "local matching") == ["ours", *plain]
    for row in figures["rows"]:
        assert row["seconds"].keys() == SPREAD and row["seconds"]["runs"] == 2
        assert row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
        assert (row["name"] == "ours") != ("times_ours" in row)
        assert row["share_of_limit"] > 0


def test_match_sweeps_objects_and_references_in_turns(benchmark, run, monkeypatch):
    monkeypatch.setattr(benchmark.match, "SWEPT_OBJECTS", (1, 3))
    monkeypatch.setattr(benchmark.match, "SWEPT_REFERENCES", (1, 2))
    command = "match", "--size", "49x65", "--model", "quickstart", "--no-torch", "--sweep"
    figures = run(*command, "--no-straightforward", "--objects", "2")
    rows = [row for row in figures["rows"] if row["section"] == "sweep"]
    cases = [(row["name"], row["objects"], row["references"]) for row in rows]
    by_objects = [("global matching", 1, 1), ("global matching", 3, 1)]
    by_objects += [("local matching", 1, 1), ("local matching", 3, 1)]
    assert cases == [*by_objects, ("global matching", 2, 1), ("global matching", 2, 2)]
    for first, other in zip(rows[::2], rows[1::2], strict=True):
        assert first["times_first"] == 1
        ratio = other["seconds"]["median"] / first["seconds"]["median"]
        assert other["times_first"] == pytest.approx(ratio)
    assert rows[5]["gflop"] == pytest.approx(2 * rows[4]["gflop"])  # of twice the pixels


def test_match_compares_the_kernel_with_xla(benchmark, run, monkeypatch):
    """On GPUs; here the kernel is interpreted. It is in the one and not in the other."""
    made = []

    def small(dtype, channels):
        made.append(dtype)
        return Blocks(64, 32, 2)

    monkeypatch.setattr(benchmark.match.matching_global, "blocks_here", small)
    command = "match", "--size", "49x65", "--model", "quickstart", "--no-torch"
    figures = run(*command, "--no-straightforward", "--matching-dtype", "bfloat16")
    assert names(figures, "global matching") == ["ours", "ours without the kernel"]
    ours, without = (row for row in figures["rows"] if row["section"] == "global matching")
    ratio = without["seconds"]["median"] / ours["seconds"]["median"]
    assert without["times_ours"] == pytest.approx(ratio)
    # Asked for by what is traced, ours and ours in float32, and in between by the benchmark.
    assert [str(jnp.dtype(dtype)) for dtype in made] == ["bfloat16", "bfloat16", "float32"]


@pytest.mark.parametrize("name", ["global_matching", "local_matching"])
def test_a_wrong_version_is_found_out(benchmark, run, monkeypatch, name):
    plain = getattr(benchmark.match.straightforward, name)

    def wrong(query, *arguments):
        return plain(query[::-1], *arguments)

    monkeypatch.setattr(benchmark.match.straightforward, name, wrong)
    with pytest.raises(AssertionError, match="straightforward .* different distances"):
        run("match", "--size", "49x65", "--model", "quickstart", "--no-torch")


def test_operations_of_matching(benchmark):
    match = benchmark.match
    assert match.global_flops((2, 3), 4, 5) == 2 * 6 * 24 * 5
    model = benchmark.infer.make_model("quickstart", "float32", "float32")
    assert match.local_flops((12, 16), model) == 2 * 7 * 9 * 13**2 * 32


# ---- Convolutions ----


def test_convolutions_are_recorded(benchmark):
    convolutions = benchmark.infer.convolutions
    layers = convolutions.layers

    def function(x, kernel, depthwise):
        x = layers.Conv(6, 3, stride=2).apply({"params": {"kernel": kernel}}, x)
        x = layers.Conv(6, 3, depthwise=True).apply({"params": {"kernel": depthwise}}, x)
        x = layers.Conv(6, 3, depthwise=True).apply({"params": {"kernel": depthwise}}, x)
        skip = jnp.ones((1, 9, 11, 2))
        both = jnp.ones((3, 3, 8, 5))
        return layers.ResizedConv(5, "bilinear").apply({"params": {"kernel": both}}, x, skip)

    arrays = jnp.ones((1, 9, 11, 4)), jnp.ones((3, 3, 4, 6)), jnp.ones((3, 3, 1, 6))
    found, shape = convolutions.record(function, *arrays)
    assert shape.shape == (1, 9, 11, 5)
    assert sorted(found.values()) == [1, 1, 1, 2]
    expected = 2 * 30 * 9 * 4 * 6 + 2 * (2 * 30 * 9 * 6)
    # Mixed at 5 x 6 into three rows of taps, which are resized along the width, then the height.
    expected += 2 * 30 * 9 * 6 * 5 + 2 * 5 * 3 * (5 * 11 * 3 * 6 + 5 * 11 * 9)
    expected += 2 * 99 * 9 * 2 * 5  # of the features that are not resized
    assert convolutions.total_flops(found) == expected
    (resized,) = (convolution for convolution in found if convolution.resized_to)
    alone = convolutions._alone(resized)(jnp.ones(resized.shape), jnp.ones(resized.kernel))
    assert alone.shape == (1, 9, 11, 5)
    seconds, details = convolutions.seconds_alone(found, runs=1)
    assert seconds > 0 and {line["count"] for line in details} == {1, 2}


# ---- Training ----


def test_collectives_are_counted(benchmark):
    text = """
  %all-reduce.1 = (f32[2,3]{1,0}, f32[]) all-reduce(%a, %b), replica_groups={}
  %start = bf16[1048576]{0} all-gather-start(%c), dimensions={0}
  %done = bf16[1048576]{0} all-gather-done(%start)
  ROOT %add = f32[2,3]{1,0} add(%all-reduce.1, %d)
"""
    rows = {row["name"]: row for row in benchmark.train.collective_rows(text)}
    assert {name: row["operations"] for name, row in rows.items()} == {
        "all-gather": 1,
        "all-reduce": 1,
    }
    assert rows["all-reduce"]["mib"] == 28 / 2**20
    assert rows["all-gather"]["mib"] == 2


def test_batch_of_clips(benchmark):
    arguments = benchmark.parse_arguments(
        ["train", "--crop", "49", "--batch", "4", "--objects", "2", "--accumulate", "2"]
    )
    mesh = benchmark.train.Mesh(np.array(benchmark.jax.devices()[:1]), ("data",))
    batch = benchmark.train.random_batch(arguments, mesh)
    assert batch.frames.shape == (4, 5, 49, 49, 3)
    assert np.unique(batch.labels).tolist() == [0, 1, 2]
    assert batch.packing.sample.shape == (2, 6)


# ---- Inference, scoring, loading ----


def test_infer(run):
    figures = run("infer", "--size", "33x49", "--model", "quickstart", "--no-convolutions")
    assert names(figures, "stages") == [
        "prepare",
        "backbone",
        "embedding",
        "global matching",
        "local matching",
        "instance vector",
        "ensembler",
        "from matching to ensembler",
        "resize, softmax, arg-max",
        "decode a JPEG",
        "write a mask",
    ]
    per_frame, files = (row for row in figures["rows"] if row["section"] == "whole videos")
    assert per_frame["compile_seconds"] > 0 and per_frame["frames_per_second"] > 0
    assert files["frames_per_second"] > 0
    assert figures["machine"]["peak_memory"]["host_mib"] > 0


def test_the_first_frames_of_a_video_are_not_timed(benchmark, monkeypatch):
    now, used = [0.0], []
    monkeypatch.setattr(benchmark.infer.time, "perf_counter", lambda: now[0])

    def labels():  # the first three need a second more each
        for seconds in (3, 3, 3, 2, 2):
            now[0] += seconds
            yield seconds

    at_work = benchmark.infer._after(3, labels(), lambda i, found: used.append((i, found)))
    assert (at_work, now[0] - at_work) == (9, 4)
    assert used == list(enumerate([3, 3, 3, 2, 2]))


def test_infer_of_whole_videos_alone(run):
    figures = run("infer", "--size", "33x49", "--model", "quickstart", "--no-stages")
    assert {row["section"] for row in figures["rows"]} == {"whole videos"}


def test_a_stage_is_not_its_convolutions_alone(benchmark):
    rows = [{"section": s, "name": "backbone"} for s in ("stages", "convolutions alone")]
    assert benchmark.infer.stage_row(rows, "backbone") is rows[0]


def test_score(run):
    figures = run("score", "--size", "48x64", "--frames", "3", "--objects", "2")
    for row in figures["rows"]:
        scored = row["frames_x_objects_per_second"] * row["seconds"]["median"]
        assert scored == pytest.approx(3 * 2)
    assert {row["threads"] for row in figures["rows"]} >= {1}


def test_load(run):
    small = ("--size", "48x64", "--crop", "33", "--batch", "2", "--batches", "1")
    figures = run("load", *small)
    row, rows = figures["rows"]
    assert row["clips_per_second"] > 0 and row["clips_per_cpu_second"] > 0
    assert row["seconds"]["runs"] == 2
    assert rows["rows"] <= 2 * 4 * 2 and rows["percent_more_packed"] == 0


def test_all_clips_count_that_processors_worked_for(run, benchmark, monkeypatch):
    """Those of the batches to warm up, too."""
    of_one = np.array([1])
    monkeypatch.setattr(benchmark.data, "_empty", lambda *_: ([0.5, 0.5], 2.0, [of_one] * 8))
    row, _ = run("load", "--size", "48x64", "--crop", "33", "--batch", "1")["rows"]
    assert row["clips_per_cpu_second"] == 8 / 2.0


def test_rows_that_packing_computes(benchmark):
    """Batches of 3 clips: 9 rows needed, packed 9, padded to the largest 12; 4, 6 and 6."""
    row = benchmark.data.rows_row(np.array([[3, 1, 2], [0, 0, 1]]), max_objects=5)
    assert (row["objects_per_clip"], row["rows"]) == (7 / 6, 13)
    names = ("packed", "by_largest_clip", "by_max_objects")
    found = [row[f"percent_more_{name}"] for name in names]
    assert found == pytest.approx([100 * (n / 13 - 1) for n in (9 + 6, 12 + 6, 36)])


# ---- Bad input ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["match", "--size", "480"], 'size is "480"; expected HEIGHTxWIDTH'),
        (["infer", "--model", "resnet"], 'model is "resnet"; expected one of r101, mbv2'),
        (["infer", "--no-stages", "--straightforward"], "no-stages: whole videos alone"),
        (["infer", "--dtype", "int8"], 'dtype is "int8"; expected one of float32'),
        (["match", "--matching-dtype", "int8"], 'matching-dtype is "int8"'),
        (["train", "--remat", "some"], 'remat is "some"; expected one of none, segment, all'),
        (["score", "--runs", "0"], "runs is 0; expected 1 or more"),
        (["load", "--workers", "-1"], "workers is -1; expected 0 or more"),
    ],
)
def test_bad_flags(benchmark, arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark.parse_arguments(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--crop", "48"], "crop is 48; expected 16 k"),
        (["--batch", "3", "--accumulate", "2"], "batch is 3; expected a multiple of 2"),
    ],
)
def test_bad_batches(benchmark, arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark.train.check_batch(benchmark.parse_arguments(["train", *arguments]), devices=1)


@pytest.mark.parametrize(
    "flags", [("--budget-mib", "9"), ("--flip",), ("--scales", "1", "2"), ("--size", "96x160")]
)
def test_flags_that_a_plan_of_a_step_does_not_know(run, flags):
    with pytest.raises(ValueError, match=f"{flags[0]} has no effect on a training step"):
        run("plan", "--train", *flags)


@pytest.mark.parametrize("flags", [("--remat", "all"), ("--batch", "8"), ("--crop", "81")])
def test_flags_that_a_plan_of_a_video_does_not_know(run, flags):
    with pytest.raises(ValueError, match=f"{flags[0]} has no effect on a video .--train plans"):
        run("plan", *flags)


def test_too_many_objects(run):
    with pytest.raises(ValueError, match="90 objects in 48 x 64 pixels; expected room"):
        run("infer", "--size", "48x64", "--objects", "90")
    with pytest.raises(ValueError, match="300 objects; expected at most 254"):
        run("video", "--size", "48x640", "--objects", "300", "--model", "quickstart")
    with pytest.raises(ValueError, match="max_objects is 300; expected 1 to 254"):
        run("plan", "--train", "--objects", "300", "--model", "quickstart", "--crop", "33")


def test_why_a_new_process_failed(benchmark):
    with pytest.raises(ValueError, match="the new process failed: ModuleNotFoundError: .*nowhere"):
        benchmark.startup._seconds(["import nowhere"])


def test_start_up_compiles_once_or_every_time(benchmark, monkeypatch):
    """The processes are played: each writes a program where it finds none."""
    seen = []

    def seconds(command):
        if len(command) == 1:
            return 0.5, ""
        cache = Path(command[3])
        cache.mkdir(exist_ok=True)
        compiling = not any(cache.iterdir())
        (cache / "program").touch()
        seen.append(cache.name)
        return 0, json.dumps([1.0, (20.0 if compiling else 5.0) + len(seen)])

    monkeypatch.setattr(benchmark.startup, "_seconds", seconds)
    flags = ["startup", "--model", "quickstart", "--size", "33x49", "--runs", "3"]
    rows, _ = benchmark.startup.startup(benchmark.parse_arguments(flags))
    assert [row["seconds"]["median"] for row in rows] == [0.5, 22.0, 10.0]
    assert [row["programs_compiled"] for row in rows[1:]] == [1, 0]
    assert len(set(seen[:3])) == 3 and set(seen[3:]) == {seen[0]}


def test_as_a_user_runs_it():
    command = [sys.executable, str(SCRIPT), "score", "--size", "small"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith('error: --size is "small"; expected HEIGHTxWIDTH')


# ---- all ----


@pytest.mark.parametrize("small", [True, False])
def test_every_setting_is_a_command(benchmark, small):
    settings = benchmark.everything.settings(small)
    commands = [benchmark.parse_arguments(flags).command for flags, _ in settings.values()]
    assert set(commands) == set(benchmark.COMMANDS) - {"all"}
    assert all(0 < share <= 1 for _, share in settings.values())


def test_all_measures_what_is_not_measured_yet(tmp_path):
    def run(runs=1):
        command = ["all", "--small", "--only", "score", "--output", str(tmp_path)]
        result = subprocess.run(
            [sys.executable, str(SCRIPT), *command, "--runs", str(runs)],
            capture_output=True,
            text=True,
            check=True,
        )
        return "score: measured" in result.stdout, "measured before" in result.stdout

    assert run() == (True, False)
    figures = json.loads((tmp_path / "score.json").read_text())
    assert figures["rows"][0]["seconds"]["runs"] == 1
    assert "scoring" in (tmp_path / "score.txt").read_text()
    assert run() == (False, True)
    assert run(runs=2) == (True, False)  # other flags
    figures = json.loads((tmp_path / "score.json").read_text())
    assert figures["rows"][0]["seconds"]["runs"] == 2


def test_all_says_what_failed(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "use_compilation_cache", lambda path: None)
    monkeypatch.setattr(benchmark.everything, "settings", lambda _: {"broken": (["score", "x"], 1)})
    command = ["all", "--output", str(tmp_path)]
    with pytest.raises(ValueError, match="broken: failed; .*NAME.txt says why"):
        benchmark.main(benchmark.parse_arguments(command), command)
    assert "unrecognized arguments: x" in (tmp_path / "broken.txt").read_text()


def test_chosen_settings(benchmark):
    settings = dict.fromkeys(("train-a", "train-b", "plan"))
    assert list(benchmark.everything.chosen(settings, "")) == ["train-a", "train-b", "plan"]
    assert list(benchmark.everything.chosen(settings, "-b, plan,")) == ["train-b", "plan"]
    with pytest.raises(ValueError, match='no setting has "Train" in its name; train-a, train-b'):
        benchmark.everything.chosen(settings, "plan,Train")


# ---- plan, video ----


def test_plan(run):
    figures = run("plan", "--model", "quickstart", "--size", "49x65", "--objects", "2", "--measure")
    *parts, planned, measured = figures["rows"]
    assert planned["name"] == "planned peak" and measured["name"] == "measured peak"
    assert planned["mib"] == pytest.approx(sum(row["mib"] for row in parts))
    # Programs this small drown in the process' own comings and goings: no comparison.
    assert measured["mib"] > parts[0]["mib"] > 1


def test_video(run):
    figures = run(
        *("video", "--model", "quickstart", "--size", "49x65"),
        *("--objects", "2", "--frames", "24"),
    )
    early, end, largest, frame = figures["rows"]  # 6 and 12 come before
    assert early["mib"] > 0 and 0 < end["mib"] <= largest["mib"]
    assert frame["seconds"]["runs"] == 4
    with pytest.raises(ValueError, match="frames is 21; expected 22 or more"):
        run("video", "--frames", "21")


def test_plan_over_budget(benchmark, run):
    with pytest.raises(ValueError, match="memory_mib is 1; less memory"):
        run("plan", "--model", "quickstart", "--size", "97x129", "--budget-mib", "1")


def test_the_backbone_in_torch_gives_the_same(benchmark):
    """The plain version that `infer --torch` times, with the quickstart's depths and widths."""
    pytest.importorskip("torch")
    model = benchmark.infer.make_model("quickstart", "float32", "float32")
    variables = benchmark.infer.random_variables(model)
    images = np.random.default_rng(0).standard_normal((1, 49, 65, 3)).astype(np.float32)
    plain = benchmark.infer.torch_backbone(model, variables, images, "cpu")
    found = plain()
    arrays = jax.device_put(variables), jnp.asarray(images)
    expected = model.apply(*arrays, method=lambda model, x: model.deeplab(x))
    for a, b in zip(found, expected, strict=True):
        assert float(jnp.std(b)) > 0.1
        np.testing.assert_allclose(a.numpy(), b, atol=1e-4 * float(jnp.abs(b).max()))
