"""Exported models: the graph for images of any size, what travels in the files, and predictions made with them."""

import argparse
import importlib.util
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import model.export
from data.demo import draw_example
from model import CrossTeacher, build_network, build_networks, load_for_prediction, load_trained
from model.export import LIMIT, Comparison, comparison_table, make_program, pictures_to_compare, write_and_compare
from model.exported import describe, load_onnx, require_packages
from model.network import SegmentationNetwork
from tests.conftest import tiny_records, tiny_values
from tests.test_scripts import run
from utils.checkpoint import save_checkpoint
from utils.cli import export_formats, export_parser, export_targets, prediction_device, prediction_parser
from utils.config import check_config, dump_config
from utils.errors import StorageError, UserError
from utils.inference import Inference, predict_all, predict_photo

CPU = torch.device("cpu")
PRESETS = {"DeepLab": ("coco", "coco"), "DeepLabv3+": ("imagenet", "coco")}  # of the two students
DATASET = {
    "name": "three",
    "root": "nowhere",
    "train": "*",
    "names": ["road", "car", "sky"],
    "palette": [[128, 64, 128], [0, 0, 142], [70, 130, 180]],
    "label_ids": [7, 26, 23],
}
SIZES = [(1, 33, 33), (1, 64, 71), (2, 97, 34), (3, 35, 66)]


def make_checkpoint(path: Path, network: str, **dataset: Any) -> Path:
    """Of two untrained students with logits that are far from each other, so that ties are rare."""
    config = check_config(tiny_values(model=network, dataset=DATASET | dataset), source="test")
    networks = build_networks(config)
    for one, preset in zip(networks, PRESETS[network], strict=True):
        one.normalization.set_preset(preset)
        one.head.classifier.weight.data.mul_(100 if network == "DeepLab" else 1)
    method = CrossTeacher(networks, config, labeled_samples=1)
    config_text = json.dumps(dump_config(config))
    save_checkpoint(path, tiny_records(facts={"labeled": 6}, method=method.state_dict(), config=config_text))
    return path


@pytest.fixture(scope="module", params=PRESETS)
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(checkpoint, .pt2, .onnx) of an ensemble."""
    folder = tmp_path_factory.mktemp("exported")
    checkpoint = make_checkpoint(folder / "checkpoint.pth", request.param)
    networks, config, training = load_trained(checkpoint)
    for one in networks.values():
        one.eval()
    normalizations = [networks[f"student_{own}"].normalization for own in (0, 1)]
    targets = {kind: folder / f"ensemble.{kind}" for kind in ("pt2", "onnx")}
    about = describe(config, "ensemble", normalizations, training)
    rows = write_and_compare(networks, targets, about=about, images=[torch.rand(1, 3, 40, 51)])
    assert [row.path.suffix for row in rows] == [".pt2", ".onnx"]
    assert all(row.difference <= LIMIT and row.equal > 0.99 for row in rows)
    assert {path.name for path in folder.iterdir()} == {"checkpoint.pth", "ensemble.pt2", "ensemble.onnx"}
    return checkpoint, targets["pt2"], targets["onnx"]


def photo(size: tuple[int, int], index: int = 0) -> np.ndarray:
    return draw_example(seed=0, split="val", index=index, size=size)[0]


# ------------------------------------------------------------------------------------------------ the graph


@pytest.mark.slow
def test_both_files_give_the_checkpoint_s_probabilities_for_any_number_and_size(exported: Any):
    checkpoint, pt2, onnx_file = exported
    networks, _, _ = load_trained(checkpoint)
    for one in networks.values():
        one.eval()
    extra = {"metadata.json": ""}
    runs = (torch.export.load(pt2, extra_files=extra).module(), load_onnx(onnx_file).probabilities)
    assert json.loads(extra["metadata.json"])["model"] == "ensemble"
    for count, *size in SIZES:
        images = torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))
        wanted = {"inference": Inference(), "wanted": frozenset(["ensemble"])}
        expected = predict_all(networks, images, (size[0], size[1]), **wanted)["ensemble"]
        for found in (one(images) for one in runs):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
            torch.testing.assert_close(found.sum(dim=1), torch.ones(count, *size))


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_the_graph_s_pooling_is_torch_s(ceil_mode: bool):
    pool = torch.nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=ceil_mode)
    for height in range(1, 12):
        x = torch.randn(2, 3, height, 13 - height)
        assert torch.equal(model.export._MaxPool(ceil_mode=ceil_mode)(x), pool(x))


@pytest.mark.slow
def test_networks_are_left_as_they_were():
    network = build_network("DeepLab", 3, "resnet18", width=8, feature_channels=32)
    pool = network.backbone.maxpool
    make_program([network])
    assert network.training
    assert network.backbone.maxpool is pool
    assert all(parameter.requires_grad for parameter in network.parameters())


# ------------------------------------------------------------------------------------------------ what travels


@pytest.mark.slow
def test_files_say_what_they_are_and_nothing_of_the_machine_that_wrote_them(exported: Any):
    _, pt2, onnx_file = exported
    with zipfile.ZipFile(pt2) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith("/metadata.json"))
        said = json.loads(archive.read(name))
    loaded = onnx.load(onnx_file)
    assert {one.key: json.loads(one.value) for one in loaded.metadata_props} == said
    assert said["class_names"] == DATASET["names"]
    assert said["palette"] == DATASET["palette"]
    assert said["label_ids"] == DATASET["label_ids"]
    assert said["model"] == "ensemble"
    assert said["training"] == {"labeled": 6, "step": 3, "seed": 1, "commit": "0123456789ab"}
    coco = np.array([122.67891434, 116.66876762, 104.00698793]) / 255
    mixed = (coco + np.array([0.485, 0.456, 0.406])) / 2
    np.testing.assert_allclose(said["mean_color"], coco if said["network"] == "DeepLab" else mixed, rtol=1e-5)
    project = str(Path(__file__).parent.parent).encode()
    assert project not in pt2.read_bytes()
    assert project not in onnx_file.read_bytes()
    (images,), (probabilities,) = loaded.graph.input, loaded.graph.output
    for value, channels in ((images, 3), (probabilities, 3)):
        sizes = [one.dim_param or one.dim_value for one in value.type.tensor_type.shape.dim]
        assert sizes == ["batch", channels, "height", "width"]
    assert all(one.data_location == onnx.TensorProto.DEFAULT for one in loaded.graph.initializer)


def test_a_palette_that_nobody_gave_is_voc_s():
    config = check_config(tiny_values(), source="test")
    network = build_network("DeepLab", 3, "resnet18", width=8, feature_channels=32)
    about = describe(config, "student", [network.normalization], {})
    assert about.palette == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    assert about.class_names == ["class 0", "class 1", "class 2"]
    assert about.label_ids is None


# ------------------------------------------------------------------------------------------------ predictions


@pytest.mark.slow
def test_predictions_with_an_onnx_file_are_the_checkpoint_s(exported: Any):
    loaded = [load_for_prediction(path) for path in (exported[0], exported[2])]
    for networks, data in loaded:
        assert data.class_names == DATASET["names"]
        for one in networks.values():
            one.eval()
    one_color = load_onnx(exported[2]).about.network == "DeepLab"
    for size, inference, is_padded in (
        ((61, 80), Inference(), False),
        ((61, 80), Inference(flip=True), False),
        ((90, 70), Inference(window=(48, 48)), False),
        ((20, 50), Inference(), True),
        ((30, 90), Inference(window=(48, 48)), True),
    ):
        (labels, confidence), (onnx_labels, onnx_confidence) = (
            predict_photo(networks, photo(size), size, model="ensemble", inference=inference, device=CPU)
            for networks, _ in loaded
        )
        # What is padded has the mean color, and here the students may have different ones.
        exact = one_color or not is_padded
        np.testing.assert_allclose(onnx_confidence, confidence, atol=5e-4 if exact else 0.1)
        assert (labels == onnx_labels).mean() > (0.998 if exact else 0.95)


@pytest.mark.slow
def test_export_and_predict_by_command(tmp_path: Path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint.pth", "DeepLabv3+", resize="60,80")
    image = tmp_path / "photo.png"
    Image.fromarray(photo((75, 101))).save(image)
    done = run("export.py", checkpoint, tmp_path / "files", "--image", image, "--model", "teacher_1")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "files").iterdir()} == {"teacher_1.pt2", "teacher_1.onnx"}
    assert f"teacher_1 of {checkpoint}, compared on {image}" in done.stdout
    table = [line.split() for line in done.stdout.splitlines() if "1 x 3 x 75 x 101" in line]
    assert [line[0] for line in table] == ["teacher_1.pt2", "teacher_1.onnx"]
    for name, source in (("a", checkpoint), ("b", tmp_path / "files/teacher_1.onnx")):
        done = run("predict.py", source, image, tmp_path / name, "--label-ids", "--model", "teacher_1")
        assert done.returncode == 0, done.stderr
    labels, others = (np.asarray(Image.open(tmp_path / name / "labels/photo.png")) for name in ("a", "b"))
    assert labels.shape == (75, 101)
    assert set(np.unique(others)) <= set(DATASET["label_ids"])
    assert (labels == others).mean() > 0.98, "resized after it was upsampled, not at once"
    overlay, other = (np.asarray(Image.open(tmp_path / name / "overlays/photo.png")) for name in ("a", "b"))
    assert overlay.shape == other.shape


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = check_config(tiny_values(), source="test")
    networks = {"student": build_network("DeepLab", 3, "resnet18", width=8, feature_channels=32).eval()}
    about = describe(config, "student", [networks["student"].normalization], {})
    monkeypatch.setattr(model.export, "make_program", lambda _: None)
    monkeypatch.setitem(model.export.WRITERS, "pt2", lambda _, path, __: path.write_bytes(b"x"))
    targets, images = {"pt2": tmp_path / "a.pt2"}, [torch.rand(1, 3, 40, 40)]
    (tmp_path / "a.pt2").write_bytes(b"older")
    for wrong in (torch.full((1, 3, 40, 40), 0.5), torch.full((1, 3, 40, 40), float("nan"))):
        monkeypatch.setitem(model.export.RUNNERS, "pt2", lambda _, wrong=wrong: lambda _: wrong)
        with pytest.raises(UserError, match=r"a\.pt2: on 1 x 3 x 40 x 40 its probabilities differ .* expected at most"):
            write_and_compare(networks, targets, about=about, images=images)
        assert (tmp_path / "a.pt2").read_bytes() == b"older"
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt2"]


def test_a_full_disk_is_told(tmp_path: Path):
    with pytest.raises(StorageError, match=r"a\.pt2: cannot be written"), model.export._storage(tmp_path / "a.pt2"):
        raise RuntimeError("inside the writer")


def test_networks_too_large_for_an_onnx_file_are_refused():
    network = build_network("DeepLab", 3, "resnet18", width=8, feature_channels=32)
    model.export._refuse_size([network])
    with pytest.raises(UserError, match="give --format pt2"):
        model.export._refuse_size([network], limit=1000)


def test_missing_packages_are_told_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    find = importlib.util.find_spec
    gone = {"onnxruntime", "onnxscript"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    with pytest.raises(UserError, match=r"pip install onnxscript onnxruntime$"):
        model.export.require_formats(["pt2", "onnx"])
    model.export.require_formats(["pt2"])
    (tmp_path / "a.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a\.onnx: an ONNX file needs onnxruntime, .* pip install onnxruntime$"):
        load_onnx(tmp_path / "a.onnx")
    require_packages(["numpy"], "this")


def test_an_onnxruntime_that_reads_any_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "a.onnx").write_bytes(b"x")
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.20.1")
    with pytest.raises(UserError, match=r"onnxruntime 1\.20\.1 may read files"):
        load_onnx(tmp_path / "a.onnx")


def small_onnx(path: Path, **properties: str) -> Path:
    """images -> probabilities, the identity."""
    sizes = ["batch", 3, "height", "width"]
    images, probabilities = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes) for name in ("images", "probabilities")
    )
    node = onnx.helper.make_node("Identity", ["images"], ["probabilities"])
    graph = onnx.helper.make_graph([node], "g", [images], [probabilities])
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.helper.set_model_props(made, properties)
    onnx.save(made, path)
    return path


def test_files_that_are_no_export_are_refused(tmp_path: Path):
    config = check_config(tiny_values(), source="test")
    network = build_network("DeepLab", 3, "resnet18", width=8, feature_channels=32)
    good = describe(config, "student", [network.normalization], {}).as_texts()
    (tmp_path / "noise.onnx").write_bytes(b"not protobuf")
    (tmp_path / "a.pt2").write_bytes(b"x")
    for path, message in (
        (tmp_path / "gone.onnx", "no such file"),
        (tmp_path / "noise.onnx", "not a usable ONNX file"),
        (tmp_path / "a.pt2", "torch.export.load reads this one"),
        (small_onnx(tmp_path / "other.onnx"), "not an export of this project"),
        (small_onnx(tmp_path / "new.onnx", **good | {"version": "2"}), "metadata are not understood"),
        (small_onnx(tmp_path / "json.onnx", **good | {"palette": "["}), "metadata are not understood"),
        (small_onnx(tmp_path / "few.onnx", **good | {"palette": "[[0,0,0]]"}), "metadata are not understood"),
        (small_onnx(tmp_path / "ids.onnx", **good | {"label_ids": "[1,2,300]"}), "metadata are not understood"),
        (small_onnx(tmp_path / "color.onnx", **good | {"mean_color": "[0,0,7.5]"}), "metadata are not understood"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_for_prediction(path)
        assert str(caught.value).startswith(str(path))
    four = {"class_names": '["a", "b", "c", "d"]', "palette": str([[0, 0, 0]] * 4)}
    with pytest.raises(UserError, match=r"gives \(1, 3, 40, 40\), expected \(1, 4, 40, 40\)"):
        load_onnx(small_onnx(tmp_path / "four.onnx", **good | four)).probabilities(torch.rand(1, 3, 40, 40))


@pytest.mark.parametrize("location", ["../secret.bin", "ABSOLUTE"])
def test_no_file_outside_the_folder_of_an_onnx_file_is_read(tmp_path: Path, location: str):
    secret, path = tmp_path / "secret.bin", tmp_path / "models/a.onnx"
    secret.write_bytes(np.ones(3, np.float32).tobytes())
    path.parent.mkdir()
    made = onnx.load(small_onnx(path))
    weight = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1, 3, 1, 1])
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location.replace("ABSOLUTE", str(secret)))
    made.graph.initializer.append(weight)
    made.graph.node[0].CopyFrom(onnx.helper.make_node("Add", ["images", "w"], ["probabilities"]))
    path.write_bytes(made.SerializeToString())
    with pytest.raises(UserError, match="not a usable ONNX file"):
        load_onnx(path)
    weight.external_data[0].value = "inside.bin"
    made.graph.initializer[0].CopyFrom(weight)
    path.write_bytes(made.SerializeToString())
    secret.rename(path.parent / "inside.bin")
    assert onnxruntime.InferenceSession(str(path)).get_inputs()[0].name == "images", "it was refused for its place"


def asked(*arguments: object) -> argparse.Namespace:
    return export_parser().parse_args(list(map(str, arguments)))


def test_the_output_s_ending_says_the_format(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.onnx").mkdir()
    for output, options, expected in (
        ("a.pt2", [], {"pt2": "a.pt2"}),
        ("deep/b.ONNX", ["--format", "onnx"], {"onnx": "deep/b.ONNX"}),
        ("v1.2", [], {"pt2": "v1.2/student_0.pt2", "onnx": "v1.2/student_0.onnx"}),
        ("", ["--format", "pt2"], {"pt2": "student_0.pt2"}),
        ("folder.onnx", ["--format", "onnx"], {"onnx": "folder.onnx/student_0.onnx"}),
    ):
        args = asked("c.pth", tmp_path / output, *options)
        targets = export_targets(args, export_formats(args), "student_0")
        assert targets == {kind: tmp_path / path for kind, path in expected.items()}
    for output, options, message in (
        ("a.pt2", ["--format", "onnx"], "leave one out, or name the file .onnx"),
        ("a.onnx", ["--format", "both"], "a folder holds both"),
        ("file", [], "is a file; expected a folder"),
        ("a.pth", [], r"a\.pth: expected a file name that ends in \.pt2 or \.onnx"),
    ):
        with pytest.raises(UserError, match=message):
            export_formats(asked("c.pth", tmp_path / output, *options))


def test_an_onnx_file_is_predicted_with_on_the_cpu():
    for arguments, expected in (
        (["c.pth"], "auto"),
        (["c.pth", "--gpu", "1"], "cuda:1"),
        (["c.pth", "--gpu", "-1"], "cpu"),
        (["m.onnx"], "cpu"),
        (["m.onnx", "--gpu", "-1"], "cpu"),
    ):
        args = prediction_parser().parse_args([arguments[0], "in", "out", *arguments[1:]])
        assert prediction_device(args) == expected
    with pytest.raises(UserError, match="--gpu 0: an ONNX file is run on the CPU"):
        prediction_device(prediction_parser().parse_args(["m.onnx", "in", "out", "--gpu", "0"]))


def test_pictures_to_compare_are_two_of_different_sizes_and_numbers():
    for size, shapes in (
        ((100, 133), [(1, 3, 100, 133), (2, 3, 70, 93)]),
        ((33, 40), [(1, 3, 33, 40), (2, 3, 47, 54)]),
        ((2000, 3000), [(1, 3, 1672, 2508), (2, 3, 1170, 1756)]),
    ):
        images = pictures_to_compare(np.full((*size, 3), 255, np.uint8))
        assert [tuple(one.shape) for one in images] == shapes
        assert all(float(one.min()) == pytest.approx(1) for one in images)
    with pytest.raises(UserError, match="at least 33 x 33"):
        pictures_to_compare(np.zeros((32, 90, 3), np.uint8))


def test_the_table_has_a_line_a_comparison():
    row = Comparison(Path("x/a.onnx"), 2**21, (1, 3, 40, 50), 1.5e-7, 0.9995, 0.1234, 2.0)
    header, line = comparison_table([row]).splitlines()
    assert header.split()[:2] == ["file", "MiB"]
    assert line.split() == [
        "a.onnx",
        "2.0",
        "1",
        "x",
        "3",
        "x",
        "40",
        "x",
        "50",
        "1.5e-07",
        "99.950",
        "%",
        "0.123",
        "2.000",
    ]


@pytest.mark.slow
def test_wrong_exports_are_refused_with_status_2_and_nothing_is_written(tmp_path: Path):
    checkpoint = make_checkpoint(tmp_path / "c.pth", "DeepLab")
    small = tmp_path / "small.png"
    Image.fromarray(photo((32, 60))).save(small)
    out = tmp_path / "out"
    for arguments, message in (
        ([tmp_path / "gone.pth", out], "gone.pth: no such checkpoint"),
        ([checkpoint, out, "--model", "student_2"], "no model student_2; it has: student_0"),
        ([checkpoint, out, "--image", tmp_path / "gone.png"], "gone.png: no such file"),
        ([checkpoint, out, "--image", small], "expected a picture of at least 33 x 33"),
        ([checkpoint, out / "a.pt2", "--format", "onnx"], "ends in .pt2"),
        ([checkpoint, out, "--format", "torchscript"], "invalid choice: 'torchscript'"),
    ):
        done = run("export.py", *arguments)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not out.exists()


def test_parts_of_a_model():
    one, other = (build_network("DeepLab", 3, "resnet18", width=8, feature_channels=32) for _ in range(2))
    networks: dict[str, SegmentationNetwork] = {"student_0": one, "teacher_0": other, "student_1": other}
    assert model.export.chosen(networks, "ensemble") == [one, other]
    assert model.export.chosen(networks, "teacher_0") == [other]
