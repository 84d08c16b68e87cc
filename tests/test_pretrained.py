"""Loading weights: what matches, what is refused, where files are looked for; nothing leaves this machine."""

import functools
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from model import pretrained
from model.build import build_network
from model.network import SegmentationNetwork
from model.pretrained import WeightsError, WeightsFile, find_weights, load_pretrained, load_release_weights
from model.resnet import ResNet
from tests.conftest import Malicious

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty torch hub cache, and no folder of weights."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.delenv("CTT_WEIGHTS", raising=False)


@pytest.fixture(scope="module")
def resnet18() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return torchvision.models.resnet18(weights=None).state_dict()


def network18(name: str = "DeepLab") -> SegmentationNetwork:
    return build_network(name, 2, "resnet18")


def save_named_by_hash(state_dict: dict[str, Tensor], folder: Path, stem: str) -> Path:
    """The file's name carries the hash of its content, as torch hub's files do."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state_dict, folder / "new.pth")
    digest = hashlib.sha256((folder / "new.pth").read_bytes()).hexdigest()
    return (folder / "new.pth").rename(folder / f"{stem}-{digest[:8]}.pth")


def offer(monkeypatch: pytest.MonkeyPatch, name: str, url: str) -> None:
    """Make `name` at `url` the public ImageNet weights."""
    file = WeightsFile(name, url, pretrained.IMAGENET)
    monkeypatch.setattr(pretrained, "_public_files", lambda network: {"imagenet": file})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(address, folder) of a web server on this machine."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", folder
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["DeepLab", "DeepLabv3+"])
def test_torchvision_backbone_loads_whole(name: str, resnet18: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(resnet18, tmp_path / "backbone.pth")
    network = network18(name)
    head = network.head.classifier.weight.clone()
    report = load_pretrained(network, tmp_path / "backbone.pth", peer=0)
    assert (report.missing, report.mismatched, report.unexpected) == ((), (), ())
    assert len(report.matched) == len(resnet18) - 2  # without fc
    assert torch.equal(network.backbone.layer4[1].conv2.weight, resnet18["layer4.1.conv2.weight"])
    assert torch.equal(network.head.classifier.weight, head)


def test_torchvision_backbone_computes_what_torchvision_does() -> None:
    torch.manual_seed(5)
    theirs = torchvision.models.resnet50(weights=None).eval()
    ours = ResNet("resnet50").eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
        torch.testing.assert_close(ours(image)[1], expected)


def test_torchvision_weights_move_the_stride_and_set_the_normalization(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "backbone.pth")
    network = build_network("DeepLab", 2, "resnet50")
    network.normalization.set_preset("coco")
    assert network.backbone.stride_place == "conv1"
    load_pretrained(network, tmp_path / "backbone.pth", peer=0)
    assert network.backbone.stride_place == "conv2"
    assert not network.normalization.bgr


def test_deep_stem_backbone_loads_whole(tmp_path: Path) -> None:
    source, network = (build_network("DeepLabv3+", 2, "resnet101", width=8, feature_channels=32) for _ in range(2))
    source = source.backbone.state_dict()
    del source["stride_in_conv1"]
    torch.save({**source, "fc.weight": torch.zeros(1000, 256)}, tmp_path / "gluon.pth")
    report = load_pretrained(network, tmp_path / "gluon.pth", peer=0)
    assert len(report.matched) == len(source)
    assert torch.equal(network.backbone.conv1[3].weight, source["conv1.3.weight"])


def test_coco_weights_bring_caffe_conventions_and_leave_the_head(
    resnet18: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="model")
    coco = {
        f"Scale.{name}": value
        for name, value in resnet18.items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")  # an old file
    }
    coco["Scale.layer5.conv2d_list.0.weight"] = torch.zeros(21, 2048, 3, 3)
    torch.save(coco, tmp_path / "coco.pth")
    network = network18()
    network.backbone.set_stride_place("conv2")
    report = load_pretrained(network, tmp_path / "coco.pth", peer=0)
    assert report.unexpected == ("layer5.conv2d_list.0.weight",)
    assert "1 tensors of coco.pth have no place here: layer5.conv2d_list.0.weight" in caplog.text
    assert not report.missing
    assert network.normalization.bgr
    assert network.backbone.stride_place == "conv1"


def test_whole_network_loads_head_and_conventions(tmp_path: Path) -> None:
    source = network18()
    source.normalization.set_preset("coco")
    source.backbone.set_stride_place("conv2")
    torch.save({"state_dict": source.state_dict()}, tmp_path / "network.pth")
    network = network18()
    report = load_pretrained(network, tmp_path / "network.pth", peer=0)
    assert (report.missing, report.mismatched, report.unexpected) == ((), (), ())
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in source.state_dict().items())
    assert network.backbone.stride_place == "conv2"


def test_the_backbone_alone_brings_the_normalization_that_its_weights_need(tmp_path: Path) -> None:
    source = network18()
    source.normalization.set_preset("coco")
    torch.save(source.state_dict(), tmp_path / "network.pth")
    network = network18()
    head = {name: value.clone() for name, value in network.state_dict().items() if name.startswith("head.")}
    load_pretrained(network, tmp_path / "network.pth", peer=1, backbone_only=True)
    images = torch.rand(1, 3, 4, 4)
    assert torch.equal(network.normalization(images), source.normalization(images))
    assert torch.equal(network.backbone.conv1.weight, source.backbone.conv1.weight)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in head.items())


@pytest.mark.parametrize(
    ("name", "case", "stride_place"),
    [("DeepLab", "deeplabv2", "conv1"), ("DeepLabv3+", "deeplabv3plus", "conv2")],
)
def test_release_weights_are_strict(name: str, case: str, stride_place: str, tmp_path: Path) -> None:
    shapes = json.loads((GOLDEN / f"{case}_state_dict.json").read_text())
    weights = {f"module.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    network = build_network(name, 21)
    load_release_weights(network, weights)
    assert network.backbone.stride_place == stride_place
    assert all(not parameter.any() for parameter in network.parameters())

    torch.save(weights, tmp_path / "release.pth")
    report = load_pretrained(network, tmp_path / "release.pth", peer=0)
    assert len(report.matched) == len(shapes)
    assert (report.missing, report.mismatched, report.unexpected) == ((), (), ())

    last = list(weights)[-1]
    broken = {**weights, "extra.weight": torch.zeros(1), last: torch.zeros(5)}
    first = next(iter(shapes))
    del broken[f"module.{first}"]
    with pytest.raises(ValueError, match="missing: ") as error:
        load_release_weights(network, broken)
    for part in (f"missing: {first}", "unexpected: extra.weight", f"{last.removeprefix('module.')} (5,)"):
        assert part in str(error.value)


def test_another_number_of_classes_is_reported_not_hidden(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(build_network("DeepLab", 5, "resnet18").state_dict(), tmp_path / "network.pth")
    report = load_pretrained(network18(), tmp_path / "network.pth", peer=1)
    assert report.mismatched == ("head.classifier.weight (5, 256, 1, 1), expected (2, 256, 1, 1)",)
    assert "student 1: 1 tensors stay random: head.classifier.weight" in caplog.text


def test_weights_of_another_backbone_are_refused_and_change_nothing(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "resnet50.pth")
    network = network18()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(WeightsError, match=r"student 1: only .* of 100 backbone tensors"):
        load_pretrained(network, tmp_path / "resnet50.pth", peer=1)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_random_weights_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    assert load_pretrained(network18(), "none", peer=0).source == "none"
    assert "student 0 starts from random weights" in caplog.text


def test_folder_of_weights_comes_before_the_cache(
    resnet18: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_cache = save_named_by_hash(resnet18, tmp_path / "hub" / "checkpoints", "tiny")
    offer(monkeypatch, in_cache.name, "http://127.0.0.1:1/never-asked")
    assert find_weights(network18(), "imagenet") == in_cache
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / in_cache.name).write_bytes(in_cache.read_bytes())
    monkeypatch.setenv("CTT_WEIGHTS", str(folder))
    assert find_weights(network18(), "imagenet") == folder / in_cache.name


def test_damaged_file_in_the_cache_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    for weights in (cache / "resnet18-f37072fd.pth", "imagenet"):  # by path and by name
        (cache / "resnet18-f37072fd.pth").write_bytes(b"cut short")
        with pytest.raises(WeightsError, match=r"resnet18-f37072fd\.pth is damaged"):
            load_pretrained(network18(), weights, peer=0)


def test_download_goes_into_the_cache_and_loads(
    resnet18: dict[str, Tensor],
    server: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, folder = server
    name = save_named_by_hash(resnet18, folder, "tiny").name
    offer(monkeypatch, name, f"{address}/{name}")
    report = load_pretrained(network18(), "imagenet", peer=0)
    assert report.source == str(tmp_path / "hub" / "checkpoints" / name)
    assert len(report.matched) == len(resnet18) - 2


def test_download_with_another_hash_leaves_no_file(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = server
    (folder / "tiny-00000000.pth").write_bytes(b"something else")
    offer(monkeypatch, "tiny-00000000.pth", f"{address}/tiny-00000000.pth")
    with pytest.raises(WeightsError, match="invalid hash value"):
        find_weights(network18(), "imagenet")
    assert not any((tmp_path / "hub" / "checkpoints").iterdir())


def test_offline_message_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "tiny-0123abcd.pth", "http://127.0.0.1:1/tiny-0123abcd.pth")
    with pytest.raises(WeightsError) as error:
        find_weights(network18(), "imagenet")
    cache = str(tmp_path / "hub" / "checkpoints")
    for part in ("tiny-0123abcd.pth", "http://127.0.0.1:1/", "0123abcd", cache, "$CTT_WEIGHTS"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "weights", "file"),
    [
        ("DeepLab", "coco", "resnet101COCO-41f33a49.pth"),
        ("DeepLabv3+", "imagenet", "gluon_resnet101_v1s-60fe0cc1.pth"),
    ],
)
def test_files_that_are_only_taken_from_disk(name: str, weights: str, file: str) -> None:
    with pytest.raises(WeightsError, match=f"{file} not found, and it is not downloaded automatically"):
        find_weights(build_network(name, 2), weights)


def test_names_without_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no public coco weights for DeepLabV2 with resnet18"):
        find_weights(network18(), "coco")
    with pytest.raises(WeightsError, match="no weights file imagnet; give a path, or one of: none, imagenet"):
        find_weights(network18(), "imagnet")


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_imagenet_means_torchvisions_first_weights(backbone: str) -> None:
    file = pretrained._public_files(build_network("DeepLab", 2, backbone))["imagenet"]
    assert file.url.startswith("https://")
    assert file.name == f"{backbone}-{file.hash_prefix}.pth"


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"conv1.weight": Malicious(tmp_path / "was-run")}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="holds more than tensors and plain values, which is never executed"):
        load_pretrained(network18(), tmp_path / "evil.pth", peer=0)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
def test_files_that_are_no_weights_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=r"page\.pth: not a readable PyTorch file"):
        load_pretrained(network18(), tmp_path / "page.pth", peer=0)


def test_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(WeightsError, match="holds no state dict"):
        load_pretrained(network18(), tmp_path / "empty.pth", peer=0)
