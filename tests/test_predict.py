"""Predictions of photographs: which, how, and where they are written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.decode import read_image
from data.photos import as_trained, find_photos, place_inside
from model import CrossTeacher, build_networks, load_trained
from tests.conftest import tiny_records, tiny_values
from tests.test_scripts import run
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.config import CITYSCAPES_IDS, check_config, dump_config
from utils.errors import CheckpointError, UserError
from utils.inference import AT_ONCE, Inference, predict_photo, prediction_inference
from utils.visualize import draw_overlay

NAMES = ["road", "car", "sky"]


def image(path: Path, *, size: tuple[int, int] = (60, 50), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two untrained students with different weights, three classes, and a palette."""
    dataset = {
        "root": "nowhere",
        "train": "*",
        "names": NAMES,
        "palette": [[128, 64, 128], [0, 0, 142], [70, 130, 180]],
    }
    config = check_config(tiny_values(dataset=dataset), source="test")
    method = CrossTeacher(build_networks(config), config, labeled_samples=1)
    path = tmp_path_factory.mktemp("run") / "checkpoint.pth"
    records = tiny_records(method=method.state_dict(), config=json.dumps(dump_config(config)))
    save_checkpoint(path, records)
    return path


# ------------------------------------------------------------------------------------------------ which, and where to


def test_an_image_a_folder_and_a_list(tmp_path: Path):
    for name in ("a.jpg", "b/c.PNG", "b/d.tif", ".hidden/e.jpg", "out/labels/a.png"):
        image(tmp_path / name.lower()).rename(tmp_path / name)
    (tmp_path / "notes.txt").write_text("# two\nb/c.PNG\na.jpg\n")
    out = tmp_path / "out"
    assert [photo.name for photo in find_photos(tmp_path / "a.jpg", output=out)] == ["a"]
    assert [photo.name for photo in find_photos(tmp_path, output=out)] == ["a", "b/c", "b/d"]
    assert [photo.name for photo in find_photos(tmp_path / "notes.txt", output=out)] == ["b/c", "a"]
    assert [photo.name for photo in find_photos(tmp_path / "b", output=tmp_path)] == ["c", "d"], "output above them"


def test_two_images_of_one_name_keep_their_endings(tmp_path: Path):
    for name in ("a.jpg", "a.png", "b.png"):
        image(tmp_path / name)
    assert [photo.name for photo in find_photos(tmp_path, output=tmp_path / "out")] == ["a.jpg", "a.png", "b"]


def test_of_listed_paths_that_lead_out_only_the_name_is_kept(tmp_path: Path):
    here, there = image(tmp_path / "here/a.jpg"), image(tmp_path / "there/b.jpg")
    listed = tmp_path / "here/list.txt"
    listed.write_text(f"a.jpg\n../there/b.jpg\n{here.resolve()}\n")
    with pytest.raises(UserError, match="1 names stand for several images, for example a"):
        find_photos(listed, output=tmp_path / "out")
    listed.write_text(f"../there/b.jpg\n{here.resolve()}\n")
    photos = find_photos(listed, output=tmp_path / "out")
    assert [photo.name for photo in photos] == ["b", "a"]
    assert photos[0].path.resolve() == there.resolve()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("empty", "no image here"),
        ("out", "is the folder of the photographs"),
        ("gone.jpg", "do not exist"),
        ("gone", "expected an image"),
        ("clip.mp4", "not a kind of file that is read; expected .jpg, .*, a folder, or a .txt list"),
        ("l.txt", "x.jpg"),
    ],
)
def test_inputs_that_are_nothing_are_refused(tmp_path: Path, source: str, message: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "l.txt").write_text("x.jpg\n")
    with pytest.raises(UserError, match=message):
        find_photos(tmp_path / source, output=tmp_path / "out")


def test_a_photograph_with_damaged_exif_data_is_read_as_it_is_stored(tmp_path: Path):
    Image.new("RGB", (40, 30)).save(path := tmp_path / "a.jpg", exif=b"Exif\0\0MM\0\0\0\0\0\x08")
    assert read_image(path, upright=True).shape == (30, 40, 3)


def test_photographs_behind_links_are_found_once(tmp_path: Path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg")
    (elsewhere := tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (40, 30)).save(elsewhere / "b.jpg")
    (source := tmp_path / "photos").mkdir()
    (source / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(source)
    assert [photo.name for photo in find_photos(source, output=tmp_path / "out")] == ["link/b"]


def test_photographs_are_turned_as_viewers_show_them_and_training_images_are_not(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (16, 32, 3)
    upright = read_image(tmp_path / "a.jpg", upright=True)
    assert upright.shape == (32, 16, 3)
    assert upright[:15].min() > 250, "what was on the left is on top"
    assert upright[17:].max() < 5


def test_nothing_is_written_through_a_link_out_of_the_output(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/labels").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="a link leads out of"):
        place_inside(tmp_path / "out", "labels/a.png")
    assert place_inside(tmp_path / "out", "overlays/b/a.png") == tmp_path / "out/overlays/b/a.png"
    assert (tmp_path / "out/overlays/b").is_dir()


# ------------------------------------------------------------------------------------------------ how


@pytest.mark.parametrize(
    ("size", "seen"),
    [((1024, 2048), (512, 1024)), ((256, 512), (512, 1024)), ((1000, 1000), (724, 724)), ((724, 1448), (512, 1024))],
)
def test_photographs_are_shown_as_large_as_in_training_in_their_own_proportions(
    size: tuple[int, int], seen: tuple[int, int]
):
    assert as_trained(np.zeros((*size, 3), np.uint8), "512,1024").shape == (*seen, 3)
    assert as_trained(np.zeros((*size, 3), np.uint8), None).shape == (*size, 3)


def test_a_trained_model_is_known_by_what_trained_it(checkpoint: Path):
    trained = load_trained(checkpoint, overrides=["seed=99"])
    assert trained.about == {"step": 3, "seed": 1, **tiny_records()["origin"]}
    wrong = r"does not fit the model of its configuration with backbone_width=16"
    with pytest.raises(CheckpointError, match=wrong):
        load_trained(checkpoint, overrides=["backbone_width=16"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method", None, "weights of teacher_1 are not finite"),
        ("origin", [], "no checkpoint, or a damaged one"),
        ("config", "[]", "no checkpoint, or a damaged one"),
        ("config", "{", "no checkpoint, or a damaged one"),
    ],
)
def test_a_checkpoint_that_could_give_no_map_is_refused(
    checkpoint: Path, tmp_path: Path, key: str, value: Any, message: str
):
    state = load_checkpoint(checkpoint)
    if value is None:
        value = state[key]
        value["teachers.1.network.backbone.conv1.weight"][0, 0, 0, 0] = float("nan")
    save_checkpoint(tmp_path / "other.pth", state | {key: value})
    with pytest.raises(CheckpointError, match=message):
        load_trained(tmp_path / "other.pth")


def test_the_default_is_the_ensemble_and_confidence_is_its_probability(checkpoint: Path):
    networks, _, _ = load_trained(checkpoint)
    for network in networks.values():
        network.eval()
    photo = np.random.default_rng(1).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    label, confidence = predict_photo(
        networks, photo, (50, 60), model="ensemble", inference=Inference(), device=torch.device("cpu")
    )
    inputs = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
    probabilities = torch.zeros(3, 50, 60)
    for network in (networks["student_0"], networks["student_1"]):
        with torch.no_grad():
            logits = network(network.normalization(inputs)).logits
        large = torch.nn.functional.interpolate(logits, (50, 60), mode="bilinear", align_corners=True)
        probabilities += large[0].softmax(dim=0) / 2
    np.testing.assert_allclose(confidence, probabilities.max(dim=0).values, atol=1e-6)
    assert (label == probabilities.argmax(dim=0).numpy()).mean() > 0.999


def test_large_photographs_are_predicted_window_by_window(checkpoint: Path):
    seen: list[Any] = []

    class Spy(torch.nn.Module):
        normalization = torch.nn.Identity()

        def forward(self, images: torch.Tensor) -> Any:
            seen.append(tuple(images.shape[-2:]))
            return type("Output", (), {"logits": images[..., ::8, ::8]})

    photo = np.zeros((1500, AT_ONCE // 1500 + 10, 3), np.uint8)
    size = (photo.shape[0], photo.shape[1])
    cpu = torch.device("cpu")
    label, _ = predict_photo({"student": Spy()}, photo, size, model="student", inference=Inference(), device=cpu)
    assert label.shape == size
    assert set(seen) == {(1024, 1024)}

    seen.clear()
    strip = np.zeros((40, AT_ONCE // 40 + 10, 3), np.uint8)
    size = (strip.shape[0], strip.shape[1])
    predict_photo({"student": Spy()}, strip, size, model="student", inference=Inference(), device=cpu)
    assert set(seen) == {(40, 1024)}, "no window is larger than the photograph"


@pytest.mark.parametrize("window", ["x", "20,20", "512", "0,512"])
def test_windows_that_mean_nothing_are_refused(window: str):
    with pytest.raises(UserError, match='expected "height,width" of at least 33'):
        prediction_inference(window, scales=(1.0,), flip=False)


def test_an_overlay_has_the_photograph_under_the_colors_and_a_legend_of_what_is_there():
    label = np.zeros((80, 200), np.uint8)
    label[:, 150:] = 2
    overlay = draw_overlay(
        np.full((80, 200, 3), 100, np.uint8), label, class_names=NAMES, palette=[[200, 0, 0], [0, 200, 0], [0, 0, 200]]
    )
    pixels = np.asarray(overlay)
    assert overlay.width == 200
    assert overlay.height > 80
    assert pixels[40, 20].tolist() == [150, 50, 50]
    assert pixels[40, 190].tolist() == [50, 50, 150]
    legend = {tuple(color) for color in pixels[80:].reshape(-1, 3).tolist()}
    assert {(200, 0, 0), (0, 0, 200)} <= legend
    assert (0, 200, 0) not in legend, "no car in this picture"


def test_a_small_photograph_is_enlarged_above_its_legend():
    label = np.zeros((48, 96), np.uint8)
    label[:, 48:] = 1
    overlay = draw_overlay(
        np.zeros((48, 96, 3), np.uint8), label, class_names=NAMES, palette=[[200, 0, 0], [0, 200, 0], [0, 0, 200]]
    )
    pixels = np.asarray(overlay)
    assert overlay.width == 4 * 96
    assert (pixels[: 4 * 48, : 4 * 48] == [100, 0, 0]).all()
    assert (pixels[: 4 * 48, 4 * 48 :] == [0, 100, 0]).all()


# ------------------------------------------------------------------------------------------------ by command


@pytest.mark.slow
def test_predict_by_command(tmp_path: Path, checkpoint: Path):
    photos = tmp_path / "photos"
    image(photos / "tiny.png", size=(7, 5))
    image(photos / "deep/wide.jpg", size=(300, 40), seed=1)
    (photos / "damaged.jpg").write_bytes((photos / "deep/wide.jpg").read_bytes()[:3000])
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    out = tmp_path / "out"
    done = run("predict.py", checkpoint, photos, out, "--confidence", "--flip", "--scales", 1, 1.5)
    assert done.returncode == 2, "a damaged image is told, the others are done"
    assert "damaged.jpg: damaged image data" in done.stderr
    assert "Traceback" not in done.stderr
    assert "2 of 3 images segmented by ensemble" in done.stdout
    made = {path.relative_to(out).as_posix() for path in {p for p in tmp_path.rglob("*") if p.is_file()} - before}
    kinds = ("labels", "overlays", "confidence")
    assert made == {f"{kind}/{name}.png" for kind in kinds for name in ("tiny", "deep/wide")}
    with Image.open(out / "labels/deep/wide.png") as label, Image.open(out / "confidence/deep/wide.png") as confidence:
        assert (label.mode, label.size, confidence.mode, confidence.size) == ("P", (300, 40), "L", (300, 40))
        assert label.getpalette()[:3] == [128, 64, 128]
        assert np.asarray(label).max() < 3
        assert np.asarray(confidence).min() >= 255 // 3 - 1, "the largest of three probabilities"
    one = run("predict.py", checkpoint, photos / "tiny.png", tmp_path / "one", "--model", "teacher_1", "--no-overlays")
    assert one.returncode == 0, one.stderr
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["labels"]


@pytest.mark.slow
def test_wrong_predictions_are_refused_with_status_2_and_nothing_is_written(tmp_path: Path, checkpoint: Path):
    photo = image(tmp_path / "a.jpg")
    (tmp_path / "no.pth").write_bytes(b"PK\x03\x04 not really")
    out = tmp_path / "out"
    for arguments, message in (
        ([tmp_path / "gone.pth", photo, out], "gone.pth: no such checkpoint"),
        ([tmp_path / "no.pth", photo, out], "no.pth: not a readable PyTorch file"),
        ([checkpoint, tmp_path / "gone", out], "gone: expected an image"),
        ([checkpoint, photo, out, "--model", "student_2"], "no model student_2; it has: student_0"),
        ([checkpoint, photo, out, "--scales", "9"], "'9' is no factor"),
        ([checkpoint, photo, out, "--label-ids"], "in dataset custom the ids are the classes"),
        ([checkpoint, photo, out, "--gpu", "7"], "this machine has"),
    ):
        done = run("predict.py", *arguments)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not out.exists()


@pytest.mark.slow
def test_own_ids_are_written_where_asked(tmp_path: Path):
    dataset = {"root": "x", "train": "*", "num_classes": 19, "label_ids": CITYSCAPES_IDS}
    config = check_config(tiny_values(dataset=dataset), source="test")
    method = CrossTeacher(build_networks(config), config, labeled_samples=1)
    records = tiny_records(method=method.state_dict(), config=json.dumps(dump_config(config)))
    save_checkpoint(tmp_path / "c.pth", records)
    photo = image(tmp_path / "a.jpg")
    for folder, arguments in (("classes", []), ("ids", ["--label-ids"])):
        assert run("predict.py", tmp_path / "c.pth", photo, tmp_path / folder, *arguments).returncode == 0
    classes, ids = (
        np.asarray(Image.open(tmp_path / folder / f"labels/{photo.stem}.png")) for folder in ("classes", "ids")
    )
    np.testing.assert_array_equal(ids, np.array(CITYSCAPES_IDS)[classes])
