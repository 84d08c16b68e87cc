"""VOC and SBD from folders, archives and a server: what is fetched, converted, refused, and never left half-done."""

import fcntl
import hashlib
import http.server
import io
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse
from PIL import Image

from data import DatasetFiles, voc
from data.decode import read_label
from data.voc import Archive, prepare_voc
from tests.conftest import tiny_values
from utils.config import check_config
from utils.errors import DataError, StorageError
from utils.visualize import voc_palette, write_label

SIZE = (12, 16)
TRAIN, VAL = ["2007_000001", "2007_000002"], ["2007_000003"]
SBD_TRAIN, SBD_VAL = ["2007_000001", "2008_000004", "2007_000003"], ["2008_000005", "2007_000002"]
TRAIN_AUG = ["2007_000001", "2007_000002", "2008_000004", "2008_000005"]
ALL = sorted({*TRAIN, *VAL, *SBD_TRAIN, *SBD_VAL})
COUNTS = {"VOC train": 2, "VOC val": 1, "SBD train": 3, "SBD val": 2, "train_aug": 4}
VOC_TAR, SBD_TAR = "VOCtrainval_11-May-2012.tar", "benchmark.tgz"
PREPARED = [
    *("ImageSets", "JPEGImages", "SegmentationClass", "SegmentationClassAug"),
    *("ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/train_aug.txt", "ImageSets/Segmentation/val.txt"),
]


def voc_label(identifier: str) -> np.ndarray:
    """(H,W) uint8 with a border of 255, as VOC's."""
    label = np.zeros(SIZE, np.uint8)
    label[2:8, 2:10] = 255
    label[3:7, 3:9] = 1 + int(identifier[-1])
    return label


def sbd_label(identifier: str) -> np.ndarray:
    """(H,W) uint8 without a border, and other than VOC's for the same image."""
    label = np.zeros(SIZE, np.uint8)
    label[1:9, 4:12] = 10 + int(identifier[-1])
    return label


def write_mat(path: Path, label: np.ndarray, *, name: str = "GTcls", edges: float = 0.0) -> None:
    """A struct of Boundaries (a cell of sparse matrices), Segmentation and CategoriesPresent, compressed."""
    rng, boundaries = np.random.default_rng(0), np.empty((20, 1), object)
    for index in range(20):
        boundaries[index, 0] = scipy.sparse.csc_matrix(rng.random(label.shape) < edges)
    struct = {"Boundaries": boundaries, "Segmentation": label, "CategoriesPresent": np.array([[label.max()]])}
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {name: struct}, do_compression=True)


def write_list(path: Path, ids: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in ids))


def make_voc(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    (folder / "JPEGImages").mkdir(parents=True)
    for name in ALL:
        pixels = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"JPEGImages/{name}.jpg")
    for name in TRAIN + VAL:
        write_label(folder / f"SegmentationClass/{name}.png", voc_label(name), None)
    write_list(folder / "ImageSets/Segmentation/train.txt", TRAIN)
    write_list(folder / "ImageSets/Segmentation/val.txt", VAL)
    (folder / "Annotations").mkdir()
    (folder / "Annotations/2007_000001.xml").touch()
    return folder


def make_sbd(folder: Path) -> Path:
    for name in {*SBD_TRAIN, *SBD_VAL}:
        write_mat(folder / f"cls/{name}.mat", sbd_label(name))
    (folder / "img").mkdir()
    (folder / "img/2008_000004.jpg").write_bytes(b"not needed")
    write_list(folder / "train.txt", SBD_TRAIN)
    write_list(folder / "val.txt", SBD_VAL)
    return folder


def pack(path: Path, **folders: Path) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for name, folder in folders.items():
            tar.add(folder, arcname=name)


def tree(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both archives, as the servers have them."""
    folder = tmp_path_factory.mktemp("originals")
    make_voc(folder / "VOCdevkit/VOC2012")
    make_sbd(folder / "benchmark_RELEASE/dataset")
    pack(folder / VOC_TAR, VOCdevkit=folder / "VOCdevkit")
    pack(folder / SBD_TAR, benchmark_RELEASE=folder / "benchmark_RELEASE")
    return folder


class Server:
    """Serves the files of a folder on 127.0.0.1 and notes the path of every request."""

    def __init__(self, folder: Path) -> None:
        noted: list[str] = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args, **kwargs) -> None:
                super().__init__(*args, directory=str(folder), **kwargs)

            def do_GET(self) -> None:
                noted.append(self.path)
                super().do_GET()

            def log_message(self, *args) -> None:
                pass

        self.requests = noted
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # a client that has seen enough
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(tmp_path: Path, originals: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    for name in (VOC_TAR, SBD_TAR):
        (folder / name).write_bytes((originals / name).read_bytes())
    one = Server(folder)
    yield one
    one.http.shutdown()
    one.http.server_close()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, originals: Path) -> None:
    """The counts and checksums of the made-up archives, and addresses where nobody answers."""
    monkeypatch.setattr(voc, "EXPECTED", COUNTS)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    use_archives(monkeypatch, originals, "http://127.0.0.1:9")


def use_archives(monkeypatch: pytest.MonkeyPatch, folder: Path, url: str) -> None:
    """The addresses below ``url``, with the checksums of the archives in ``folder``."""
    names = {"voc": VOC_TAR, "sbd": SBD_TAR}
    md5s = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in names.values()}
    table = {kind: Archive(name, f"{url}/{name}", md5s[name]) for kind, name in names.items()}
    monkeypatch.setattr(voc, "archives", lambda: table)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """VOC in its place, SBD as its archive has it."""
    folder = make_voc(tmp_path / "root")
    make_sbd(folder / "benchmark_RELEASE/dataset")
    return folder


def check_prepared(root: Path) -> None:
    assert (root / "ImageSets/Segmentation/train_aug.txt").read_text().split() == TRAIN_AUG
    assert (root / "ImageSets/Segmentation/val.txt").read_text().split() == VAL
    assert sorted(path.name for path in (root / "SegmentationClassAug").iterdir()) == [f"{name}.png" for name in ALL]
    for name in ALL:
        path = root / f"SegmentationClassAug/{name}.png"
        wanted = voc_label(name) if name in TRAIN + VAL else sbd_label(name)
        assert np.array_equal(read_label(path), wanted), name
        with Image.open(path) as image:
            assert image.mode == "P"
            assert image.getpalette()[:63] == [value for color in voc_palette(21) for value in color]
    assert not [path for path in tree(root) if ".prepare" in path]
    values = tiny_values(dataset="pascal_voc", data_root=str(root), training__data__labeled_samples=2)
    files = DatasetFiles(check_config(values, source="test"))
    with pytest.warns(UserWarning, match="seeded permutation"):
        files.check_for_training()


# ------------------------------------------------------------------------------------------------ where it comes from


def test_both_archives_are_downloaded_once_and_a_second_run_does_nothing(tmp_path: Path, server: Server, monkeypatch):
    use_archives(monkeypatch, tmp_path / "served", server.url)
    root = tmp_path / "new/root"
    summary = prepare_voc(root)
    assert "train_aug 4 images, val 1" in summary
    assert "2 converted from SBD, 3 copied from VOC" in summary
    check_prepared(root)
    assert {VOC_TAR, SBD_TAR} <= {path.name for path in root.iterdir()}
    asked = list(server.requests)
    assert set(asked) == {f"/{VOC_TAR}", f"/{SBD_TAR}"}
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert "already prepared, nothing to do" in prepare_voc(root)
    assert server.requests == asked
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_archives_in_the_folder_are_unpacked_without_what_is_not_needed(tmp_path: Path, originals: Path):
    for name in (VOC_TAR, SBD_TAR):
        (tmp_path / name).write_bytes((originals / name).read_bytes())
    prepare_voc(tmp_path)
    check_prepared(tmp_path)
    assert not [path for path in tree(tmp_path) if "Annotations" in path or "img" in path]


@pytest.mark.parametrize("sbd", ["sbd", "benchmark_RELEASE/dataset"])
@pytest.mark.parametrize("place", ["", "VOCdevkit/VOC2012"])
def test_folders_that_are_there_need_no_archive(tmp_path: Path, monkeypatch, place: str, sbd: str):
    monkeypatch.delattr(voc, "archives")
    make_voc(tmp_path / "root" / place)
    make_sbd(tmp_path / "root" / sbd)
    prepare_voc(tmp_path / "root")
    check_prepared(tmp_path / "root")
    assert "nothing to do" in prepare_voc(tmp_path / "root")


def test_a_folder_shared_with_others_is_linked_and_left_as_it_is(tmp_path: Path):
    shared = make_voc(tmp_path / "shared/VOC2012")
    before = tree(shared)
    make_sbd(tmp_path / "root/sbd")
    (tmp_path / "root/VOCdevkit").symlink_to(tmp_path / "shared")
    prepare_voc(tmp_path / "root")
    check_prepared(tmp_path / "root")
    assert tree(shared) == before


def test_the_real_table_has_the_names_and_checksums_of_torchvision(monkeypatch):
    monkeypatch.undo()
    table = voc.archives()
    assert [table[kind].name for kind in ("voc", "sbd")] == [VOC_TAR, SBD_TAR]
    assert all(len(archive.md5) == 32 and archive.url.endswith(archive.name) for archive in table.values())
    counts = voc.EXPECTED
    assert (counts["train_aug"], counts["VOC val"]) == (10582, 1449)


# ------------------------------------------------------------------------------------------------ faults of the network


@pytest.mark.parametrize("kind", [VOC_TAR, SBD_TAR])
def test_a_damaged_archive_in_the_folder_is_told_with_both_checksums(root: Path, originals: Path, kind: str):
    for folder in ("JPEGImages", "benchmark_RELEASE"):
        (root / folder).rename(root.parent / folder)  # so that both archives are needed
    for name in (VOC_TAR, SBD_TAR):
        data = (originals / name).read_bytes()
        (root / name).write_bytes(data[: len(data) // 2] if name == kind else data)
    found = hashlib.md5((root / kind).read_bytes()).hexdigest()
    expected = hashlib.md5((originals / kind).read_bytes()).hexdigest()
    with pytest.raises(DataError, match=rf"{kind}: damaged .* MD5 is {found}, expected {expected}; delete it and run"):
        prepare_voc(root)
    assert (root / kind).is_file()  # the user's to delete
    assert not (root / "ImageSets/Segmentation/train_aug.txt").exists()


def test_a_download_with_a_wrong_checksum_is_not_kept(tmp_path: Path, server: Server, monkeypatch):
    use_archives(monkeypatch, tmp_path / "served", server.url)
    (tmp_path / "served" / VOC_TAR).write_bytes(b"another file")
    with pytest.raises(DataError, match=rf"{VOC_TAR}: damaged or incomplete, its MD5 is \w+, expected \w+; nothing"):
        prepare_voc(tmp_path / "root")
    assert tree(tmp_path / "root") == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "missing"])
def test_a_file_that_cannot_be_fetched_is_named_with_where_to_put_it(tmp_path: Path, server: Server, monkeypatch, url):
    use_archives(monkeypatch, tmp_path / "served", server.url if url == "missing" else url)
    (tmp_path / "served" / VOC_TAR).unlink()
    with pytest.raises(DataError) as caught:
        prepare_voc(tmp_path / "root")
    assert caught.value.exit_status == 5
    for part in (f"/{VOC_TAR}: cannot download", f"put {VOC_TAR} into {tmp_path / 'root'} by hand"):
        assert part in str(caught.value)
    assert ("404" in str(caught.value)) == (url == "missing")
    assert tree(tmp_path / "root") == []


def test_a_silent_server_is_given_up(tmp_path: Path, monkeypatch):
    silent = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # accepts, never answers
    table = {"voc": Archive("a.tar", f"http://127.0.0.1:{silent.server_address[1]}/a.tar", "0")}
    monkeypatch.setattr(voc, "archives", lambda: table)
    monkeypatch.setattr(voc, "TIMEOUT", 0.2)
    with pytest.raises(DataError, match=r"cannot download a.tar \(.*timed out"):
        prepare_voc(tmp_path / "root")
    silent.server_close()


# ------------------------------------------------------------------------------------------------ faults of archives


def test_an_archive_that_ends_early_but_has_the_right_checksum_is_refused(tmp_path: Path, originals: Path, monkeypatch):
    for name in (VOC_TAR, SBD_TAR):
        data = (originals / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) * 2 // 3] if name == SBD_TAR else data)
    use_archives(monkeypatch, tmp_path, "http://127.0.0.1:9")
    with pytest.raises(DataError, match=rf"{tmp_path / SBD_TAR}: .*delete it and run again"):
        prepare_voc(tmp_path)
    assert not (tmp_path / "sbd").exists()
    assert not (tmp_path / ".prepare").exists()


@pytest.mark.parametrize("wanted", ["../evil", "benchmark_RELEASE/dataset/cls/../../../../../evil"])
def test_an_archive_that_would_write_outside_is_refused(root: Path, monkeypatch, wanted: str):
    (root / "benchmark_RELEASE").rename(root.parent / "benchmark_RELEASE")
    with tarfile.open(root / SBD_TAR, "w:gz") as tar:
        member = tarfile.TarInfo(wanted)
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
        tar.add(root.parent / "benchmark_RELEASE", arcname="benchmark_RELEASE")
    (root / VOC_TAR).touch()
    use_archives(monkeypatch, root, "http://127.0.0.1:9")
    before = tree(root.parent)
    with pytest.raises(DataError, match=rf"{SBD_TAR}: cannot unpack it .*outside"):
        prepare_voc(root)
    assert tree(root.parent) == before


def test_links_in_an_archive_are_not_made(root: Path, monkeypatch, originals: Path):
    (root / "benchmark_RELEASE").rename(root.parent / "benchmark_RELEASE")
    (root.parent / "benchmark_RELEASE/dataset/cls/link.mat").symlink_to("2008_000004.mat")
    pack(root / SBD_TAR, benchmark_RELEASE=root.parent / "benchmark_RELEASE")
    (root / VOC_TAR).touch()
    use_archives(monkeypatch, root, "http://127.0.0.1:9")
    prepare_voc(root)
    check_prepared(root)
    assert not (root / "sbd/cls/link.mat").exists()


def test_another_archive_under_the_name_is_refused(root: Path, monkeypatch):
    (root / "benchmark_RELEASE").rename(root.parent / "benchmark_RELEASE")
    pack(root / SBD_TAR, else_where=root.parent / "benchmark_RELEASE")
    (root / VOC_TAR).touch()
    use_archives(monkeypatch, root, "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"no cls, train\.txt, val\.txt in its folder benchmark_RELEASE/dataset"):
        prepare_voc(root)


def test_a_full_disk_while_unpacking_is_told_with_the_place(tmp_path: Path, originals: Path, monkeypatch):
    (tmp_path / VOC_TAR).write_bytes((originals / VOC_TAR).read_bytes())

    def full(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(StorageError, match=rf"cannot unpack {VOC_TAR} there \(No space left on device\)"):
        prepare_voc(tmp_path)


# ------------------------------------------------------------------------------------------------ killed in the middle


def test_what_a_killed_run_left_is_neither_believed_nor_kept(root: Path):
    for folder in ("voc/VOCdevkit/VOC2012/JPEGImages", "sbd", "SegmentationClassAug"):
        (root / ".prepare" / folder).mkdir(parents=True)
    (root / ".prepare/SegmentationClassAug/2007_000001.png").write_bytes(b"half")
    (root / ".prepare" / VOC_TAR).write_bytes(b"half")
    (root / ".prepare.lock").touch()
    prepare_voc(root)
    check_prepared(root)


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_a_run_killed_while_moving_voc_goes_on_with_the_rest(tmp_path: Path, originals: Path, done: int):
    for name in (VOC_TAR, SBD_TAR):
        (tmp_path / name).write_bytes((originals / name).read_bytes())
    whole = make_voc(tmp_path / "elsewhere")
    parts = ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation/train.txt")
    for part in parts[:done]:
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        (whole / part).rename(tmp_path / part)
    prepare_voc(tmp_path)
    check_prepared(tmp_path)


def test_a_run_killed_before_the_last_list_does_not_convert_again(root: Path, monkeypatch):
    prepare_voc(root)
    (root / "ImageSets/Segmentation/train_aug.txt").unlink()
    monkeypatch.delattr(voc, "_write_labels")
    assert "were there already" in prepare_voc(root)
    check_prepared(root)


def test_an_error_in_one_label_map_leaves_none(root: Path):
    write_mat(root / "benchmark_RELEASE/dataset/cls/2008_000005.mat", np.full(SIZE, 99, np.uint8))
    before = tree(root)
    with pytest.raises(DataError):
        prepare_voc(root)
    assert tree(root) == before
    write_mat(root / "benchmark_RELEASE/dataset/cls/2008_000005.mat", sbd_label("2008_000005"))
    prepare_voc(root)
    check_prepared(root)


def test_two_processes_on_one_folder_are_refused(root: Path):
    with (root / ".prepare.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is preparing this folder"):
            prepare_voc(root)


# ------------------------------------------------------------------------------------------------ faults of the data


def broken_mat(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:100],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-3],
        lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
        lambda data: data[:150] + bytes(len(data) - 150),
        lambda data: data[:300] + b"\x55" + data[301:],
        lambda data: b"<html>no such file</html>" * 20,
    ],
)
def test_a_damaged_mat_file_is_named(root: Path, change: Callable[[bytes], bytes]):
    broken_mat(root / "benchmark_RELEASE/dataset/cls/2008_000004.mat", change)
    with pytest.raises(DataError, match=r"cls/2008_000004\.mat: cannot read GTcls.Segmentation"):
        prepare_voc(root)


def test_a_mat_file_with_zeros_at_the_end_is_refused_before_scipy_s_reader_crashes_on_it(tmp_path: Path):
    write_mat(tmp_path / "a.mat", np.zeros((360, 500), np.uint8), edges=0.005)
    data = (tmp_path / "a.mat").read_bytes()
    for share in range(5, 100, 5):
        start = len(data) * share // 100
        (tmp_path / "b.mat").write_bytes(data[:start] + bytes(len(data) - start))
        with pytest.raises(DataError, match=r"b\.mat: cannot read GTcls"):
            voc._read_mat(tmp_path / "b.mat")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.full(SIZE, 21, np.uint8), r"label ids out of range: 21; expected 0\.\.20 or 255"),
        (np.zeros((SIZE[1], SIZE[0]), np.uint8), "label map of 12 x 16 for an image of 16 x 12 pixels"),
        (np.zeros(SIZE, np.float64), r"GTcls.Segmentation is float64 \(12, 16\), expected a uint8 matrix"),
    ],
)
def test_a_label_map_of_sbd_that_cannot_be_one_is_named(root: Path, label: np.ndarray, message: str):
    write_mat(root / "benchmark_RELEASE/dataset/cls/2008_000005.mat", label)
    with pytest.raises(DataError, match=rf"2008_000005\.mat: {message}"):
        prepare_voc(root)


def test_a_mat_file_of_something_else_is_named(root: Path):
    write_mat(root / "benchmark_RELEASE/dataset/cls/2008_000005.mat", sbd_label("2008_000005"), name="GTinst")
    with pytest.raises(DataError, match=r"2008_000005\.mat: cannot read GTcls"):
        prepare_voc(root)


def test_a_label_map_of_voc_in_colors_is_refused_with_the_status_of_data(root: Path):
    Image.new("RGB", SIZE[::-1]).save(root / "SegmentationClass/2007_000003.png")
    with pytest.raises(DataError, match=r"2007_000003\.png: a label map must be .* found mode RGB"):
        prepare_voc(root)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "JPEGImages/2008_000004.jpg",
            r"JPEGImages: 1 of 5 files are missing: 2008_000004\.jpg\. .*delete .*JPEGImages",
        ),
        ("SegmentationClass/2007_000003.png", r"SegmentationClass: 1 of 3 files are missing: 2007_000003\.png"),
        (
            "benchmark_RELEASE/dataset/cls/2008_000005.mat",
            r"cls: 1 of 2 files are missing: 2008_000005\.mat\. .*delete \S*benchmark_RELEASE/dataset and run",
        ),
        ("benchmark_RELEASE/dataset/val.txt", r"benchmark_RELEASE/dataset: val.txt not there, .*delete this folder"),
    ],
)
def test_a_missing_file_is_named_before_anything_is_converted(root: Path, name: str, message: str):
    (root / name).unlink()
    with pytest.raises(DataError, match=message):
        prepare_voc(root)
    assert not (root / "SegmentationClassAug").exists()


def test_lists_of_another_length_are_refused_with_all_counts(root: Path):
    write_list(root / "benchmark_RELEASE/dataset/val.txt", ["2008_000005"])
    write_list(root / "ImageSets/Segmentation/val.txt", ["2007_000003", "2008_000005"])
    before = tree(root)
    with pytest.raises(DataError) as caught:
        prepare_voc(root)
    for part in ("VOC val 2, expected 1; SBD val 1, expected 2; train_aug 3, expected 4", "no list was written"):
        assert part in str(caught.value)
    assert tree(root) == before


@pytest.mark.parametrize(
    "line", ["../../etc/passwd", "/JPEGImages/2007_000001.jpg /SegmentationClassAug/2007_000001.png"]
)
def test_a_list_of_something_else_is_refused(root: Path, line: str):
    write_list(root / "ImageSets/Segmentation/train.txt", [*TRAIN, line])
    with pytest.raises(DataError, match=r"train\.txt: .* is no id of VOC; expected one a line, such as 2007_000032"):
        prepare_voc(root)


def test_label_maps_and_lists_of_somebody_else_are_not_replaced(root: Path):
    write_label(root / "SegmentationClassAug/2007_000001.png", voc_label("2007_000001"), None)
    with pytest.raises(DataError, match="SegmentationClassAug: made by something else, 4 of 5 label maps are missing"):
        prepare_voc(root)
    (root / "SegmentationClassAug").rename(root / "away")
    write_list(root / "ImageSets/Segmentation/train_aug.txt", TRAIN)
    with pytest.raises(DataError, match=r"train_aug\.txt: holds other ids than the 4 of"):
        prepare_voc(root)
    assert not (root / "SegmentationClassAug").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file is a file; name a folder"):
        prepare_voc(tmp_path / "file")
