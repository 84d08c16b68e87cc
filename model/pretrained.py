"""Weights from outside: files of backbones, checkpoints of the authors' release, and where to find them.

A weights file is pickled by someone else: it is always read with `weights_only=True`, and a public file is
checked against the hash prefix in its name before it is read. Nothing falls back to random weights silently.
"""

import hashlib
import http.client
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.network import SegmentationNetwork, WeightsConvention
from utils.checkpoint import FORMAT, read_file
from utils.errors import CheckpointError, WeightsError

logger = logging.getLogger(__name__)

WEIGHTS_FOLDER_VARIABLE = "CTT_WEIGHTS"
MIN_BACKBONE_SHARE = 0.9
PARTS = ("backbone.", "head.", "normalization.")
# "...-63fe2227.pth": torch hub's convention, the first digits of the file's SHA-256.
HASH_PREFIX = re.compile(r"-([0-9a-f]{8})\.pth$")

IMAGENET = WeightsConvention(normalization="imagenet", stride_place="conv2")
COCO = WeightsConvention(normalization="coco", stride_place="conv1")
# What the release's loader of a dataset feeds its networks.
RELEASE_NORMALIZATIONS = {"pascal_voc": "release_voc", "cityscapes": "release_cityscapes"}


@dataclass(frozen=True)
class WeightsFile:
    """A public file of pretrained weights."""

    name: str
    url: str
    convention: WeightsConvention
    downloadable: bool = True

    @property
    def hash_prefix(self) -> str:
        found = HASH_PREFIX.search(self.name)
        assert found, f"{self.name} carries no hash prefix"
        return found[1]


DEEP_STEM_RESNET101 = WeightsFile(
    "gluon_resnet101_v1s-60fe0cc1.pth",
    "https://github.com/rwightman/pytorch-pretrained-gluonresnet/releases/download/v0.1/gluon_resnet101_v1s-60fe0cc1.pth",
    IMAGENET,
    downloadable=False,
)
COCO_RESNET101 = WeightsFile(
    "resnet101COCO-41f33a49.pth",
    "http://vllab1.ucmerced.edu/~whung/adv-semi-seg/resnet101COCO-41f33a49.pth",
    COCO,
    downloadable=False,  # plain http, and the host is often away
)


@dataclass(frozen=True)
class LoadReport:
    """What `load_pretrained` did; names are the network's, for `unexpected` the file's.

    `missing` counts the backbone, and the head when the file holds one (backbone files have none).
    """

    source: str
    matched: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


def load_release_weights(
    network: SegmentationNetwork, state_dict: Mapping[str, Tensor], *, dataset: str = "pascal_voc"
) -> None:
    """Load a state dict of the authors' release (its parameter names) into the same network of ours.

    Also sets the stride's place, and the input normalisation of the release's loader for ``dataset``, a key of
    `RELEASE_NORMALIZATIONS`.

    Raises:
        ValueError: a parameter or buffer is missing, unexpected or of another shape; nothing is loaded then.
    """
    given = {_strip_wrappers(name): value for name, value in state_dict.items()}
    own = network.state_dict()
    names = _names_by_release_name(network)
    problems = {
        "missing": [name for name in names if name not in given],
        "unexpected": [name for name in given if name not in names],
        "mismatched": [
            _shapes(name, value, own[names[name]])
            for name, value in given.items()
            if name in names and value.shape != own[names[name]].shape
        ],
    }
    if any(problems.values()):
        raise ValueError(
            f"these are not the release's weights of {_describe(network)}: "
            + "; ".join(f"{kind}: {_shorten(listed)}" for kind, listed in problems.items() if listed)
        )
    _apply(network, network.release_convention._replace(normalization=RELEASE_NORMALIZATIONS[dataset]))
    network.load_state_dict({names[name]: value for name, value in given.items()}, strict=False)


def load_pretrained(
    network: SegmentationNetwork, name_or_path: str | Path, *, peer: int, backbone_only: bool = False
) -> LoadReport:
    """Load pretrained weights, and set the stride's place and the input normalisation that belong to them.

    Args:
        network: changed in place, or not at all when an error is raised.
        name_or_path: "none" (random weights stay), "imagenet" or "coco" (the public file for this backbone,
            see `find_weights`), or the path of a .pth file: a torchvision, gluon or timm ResNet (its
            classifier `fc` is ignored), a COCO DeepLabv2, a whole network of the same kind in the
            release's names or ours, a checkpoint of the release, or one of ours.
        peer: which student receives the weights; of a checkpoint of ours it takes the same student's.
        backbone_only: leave the head as it is, also where the file holds one.

    Raises:
        WeightsError: file not found, wrong hash, unsafe or unreadable, or under 90 % of the backbone matched.
    """
    role = f"student {peer}"
    if str(name_or_path) == "none":
        logger.warning("%s starts from random weights: no pretrained weights were asked for", role)
        return LoadReport(source="none")
    path = find_weights(network, str(name_or_path))
    weights, dataset = _read_weights(path, peer)
    parts = tuple(part for part in PARTS if part != "head." or not backbone_only)
    found, report = _match(network, weights, source=str(path), parts=parts)

    counted = [name for name in network.state_dict() if name.startswith("backbone.") and _is_counted(name)]
    matched = sum(name in found for name in counted)
    summary = f"{matched} of {len(counted)} backbone tensors of {_describe(network)} match {path}"
    lacking = [*report.missing, *report.mismatched]
    if matched < MIN_BACKBONE_SHARE * len(counted):
        raise WeightsError(f"{role}: only {summary}. Lacking: {_shorten(lacking)}. Use weights of this backbone.")

    _apply(network, _convention_of(network, path, weights, dataset))
    network.load_state_dict(found, strict=False)  # a state dict of ours carries its own convention
    logger.info("%s: %s", role, summary)
    if lacking:
        logger.warning("%s: %d tensors stay random: %s", role, len(lacking), _shorten(lacking))
    if others := list(report.unexpected):
        logger.info("%s: %d tensors of %s have no place here: %s", role, len(others), path.name, _shorten(others))
    return report


def find_weights(network: SegmentationNetwork, name_or_path: str) -> Path:
    """The local file of "imagenet", "coco" or a path, downloaded where that is possible; its hash is checked.

    Looked up in this order: the path itself; for a name the folder $CTT_WEIGHTS, torch hub's cache, then a
    download into that cache.

    Raises:
        WeightsError: says which file is wanted, from where, where to put it, and its hash prefix.
    """
    if name_or_path not in ("imagenet", "coco"):
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise WeightsError(f"no weights file {path}; give a path, or one of: none, imagenet, coco")
        if path.name in {file.name for file in _public_files(network).values()}:
            _check_hash(path)
        return path

    file = _public_files(network).get(name_or_path)
    if file is None:
        known = ", ".join(map(repr, _public_files(network)))
        raise WeightsError(
            f"no public {name_or_path} weights for {_describe(network)}; known: {known}; or give the path of a file"
        )
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    folder = os.environ.get(WEIGHTS_FOLDER_VARIABLE)
    for candidate in [Path(folder).expanduser(), cache] if folder else [cache]:
        if (candidate / file.name).is_file():
            return _check_hash(candidate / file.name)
    if not file.downloadable:
        raise WeightsError(_how_to_get(file, cache, "it is not downloaded automatically"))
    return _download(file, cache)


def _public_files(network: SegmentationNetwork) -> dict[str, WeightsFile]:
    """The public files that fit the network's backbone, by the names a configuration uses."""
    backbone = network.backbone
    if backbone.deep_stem:  # no COCO weights exist; under either name the release takes these
        return dict.fromkeys(("imagenet", "coco"), DEEP_STEM_RESNET101)
    from torchvision.models import get_model_weights  # takes seconds, and most commands do without

    url = get_model_weights(backbone.name)["IMAGENET1K_V1"].url
    files = {"imagenet": WeightsFile(url.rsplit("/", 1)[1], url, IMAGENET)}
    if backbone.name == "resnet101":
        files["coco"] = COCO_RESNET101
    return files


def _download(file: WeightsFile, cache: Path) -> Path:
    logger.info("downloading %s to %s", file.url, cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(file.url, str(cache / file.name), hash_prefix=file.hash_prefix)
    # RuntimeError: the hash; OSError: network and disk.
    except (RuntimeError, OSError, http.client.HTTPException) as error:
        raise WeightsError(_how_to_get(file, cache, f"the download failed: {error}")) from error
    return cache / file.name


def _how_to_get(file: WeightsFile, cache: Path, reason: str) -> str:
    return (
        f"weights {file.name} not found, and {reason}. Fetch {file.url}, whose SHA-256 begins with "
        f"{file.hash_prefix}, and put it into {cache} or the folder that ${WEIGHTS_FOLDER_VARIABLE} names. "
        'With "none" training starts from random weights.'
    )


def _check_hash(path: Path) -> Path:
    """`path`, if its SHA-256 begins with the digits in its name; WeightsError otherwise."""
    found = HASH_PREFIX.search(path.name)
    assert found, f"{path.name} carries no hash prefix"
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not digest.startswith(found[1]):
        raise WeightsError(
            f"{path} is damaged: its SHA-256 begins with {digest[:8]}, not {found[1]}; delete it and retry"
        )
    return path


def _read_weights(path: Path, peer: int) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a file by name, and the dataset of a release's checkpoint, None for other files.

    A training checkpoint's tensors are under "state_dict" or "model"; of one of ours, the student's are taken.
    """
    try:
        loaded = read_file(path)
    except CheckpointError as error:
        raise WeightsError(str(error)) from None
    dataset, prefix = None, ""
    if isinstance(loaded, Mapping):
        config = loaded.get("config")
        dataset = config.get("dataset") if isinstance(config, Mapping) else None
        if loaded.get("format") == FORMAT:
            loaded, prefix = loaded.get("method"), f"students.{peer}."
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    named = loaded.items() if isinstance(loaded, Mapping) else ()
    tensors = {str(name): value for name, value in named if isinstance(value, Tensor) and str(name).startswith(prefix)}
    if not tensors:
        raise WeightsError(f"{path} holds no state dict (names with tensors)")
    return {_strip_wrappers(name.removeprefix(prefix)): value for name, value in tensors.items()}, dataset


def _match(
    network: SegmentationNetwork, weights: Mapping[str, Tensor], *, source: str, parts: tuple[str, ...]
) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors of ``parts`` that fit, by our names, and the report."""
    own = network.state_dict()
    release_names = _names_by_release_name(network)
    found: dict[str, Tensor] = {}
    mismatched: dict[str, str] = {}
    unexpected: list[str] = []
    for name, value in weights.items():
        # Ours, the release's, or a bare ResNet's.
        candidates = (name, release_names.get(name), f"backbone.{name}")
        target = next((candidate for candidate in candidates if candidate in own), None)
        if target is not None and not target.startswith(parts):
            continue
        if target is None:
            if not name.startswith("fc."):
                unexpected.append(name)
        elif value.shape != own[target].shape:
            mismatched[target] = _shapes(target, value, own[target])
        else:
            found[target] = value
    has_head = any(name.startswith("head.") for name in found)
    wanted = ("backbone.", "head.") if has_head else ("backbone.",)
    missing = [
        name
        for name in own
        if name.startswith(wanted) and _is_counted(name) and name not in found and name not in mismatched
    ]
    return found, LoadReport(source, tuple(found), tuple(missing), tuple(mismatched.values()), tuple(unexpected))


def _convention_of(
    network: SegmentationNetwork, path: Path, weights: Mapping[str, Tensor], dataset: str | None
) -> WeightsConvention:
    """The convention of a file: by its public name, else by the kind of parameters it holds."""
    for file in _public_files(network).values():
        if path.name == file.name:
            return file.convention
    own, release_names = network.state_dict(), _names_by_release_name(network)
    if any((name if name in own else release_names.get(name, "")).startswith("head.") for name in weights):
        normalization = RELEASE_NORMALIZATIONS.get(dataset or "", network.release_convention.normalization)
        return network.release_convention._replace(normalization=normalization)
    # A head called layer5 is DeepLabv2's; the public ones come from Caffe.
    return COCO if any(name.startswith("layer5.") for name in weights) else IMAGENET


def _apply(network: SegmentationNetwork, convention: WeightsConvention) -> None:
    network.normalization.set_preset(convention.normalization)
    network.backbone.set_stride_place(convention.stride_place)


def _names_by_release_name(network: SegmentationNetwork) -> dict[str, str]:
    """The release's name of every parameter and buffer that it has -> our name."""
    names = {}
    for name in network.state_dict():
        if not _is_convention(name):
            theirs, ours = next(pair for pair in network.release_names if name.startswith(pair[1]))
            names[theirs + name.removeprefix(ours)] = name
    return names


def _strip_wrappers(name: str) -> str:
    """Without DataParallel's and the multi-scale COCO model's prefixes."""
    return name.removeprefix("module.").removeprefix("Scale.")


def _is_convention(name: str) -> bool:
    """Buffers that describe weights rather than being weights."""
    return name.startswith("normalization.") or name == "backbone.stride_in_conv1"


def _is_counted(name: str) -> bool:
    """Files from before PyTorch 0.4.1 hold no `num_batches_tracked`."""
    return not _is_convention(name) and not name.endswith("num_batches_tracked")


def _describe(network: SegmentationNetwork) -> str:
    stem = "deep-stem " if network.backbone.deep_stem else ""
    return f"{type(network).__name__} with {stem}{network.backbone.name}"


def _shapes(name: str, given: Tensor, wanted: Tensor) -> str:
    return f"{name} {tuple(given.shape)}, expected {tuple(wanted.shape)}"


def _shorten(names: list[str]) -> str:
    shown = names[:8]
    rest = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + rest
