"""A checkpoint's model as one graph from photographs to probabilities, written for programs without this code."""

import copy
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from model.exported import INPUT, ONNX_PACKAGES, OUTPUT, Exported, load_onnx, require_packages
from model.network import SegmentationNetwork
from utils.errors import StorageError, UserError
from utils.inference import AT_ONCE, ENSEMBLE, SMALLEST, Inference, predict_all

LIMIT = 1e-3  # largest difference in probability from the checkpoint that a written file may have
LARGEST_ONNX = 2**31 - 2**24  # bytes; a protobuf message ends at 2 GiB, some are left for the graph
METADATA = "metadata.json"  # name of the extra file in a .pt2

Run = Callable[[Tensor], Tensor]


class PhotoToProbabilities(nn.Module):
    """RGB images (B,3,H,W) float32 in [0,1], H and W at least 33 -> (B,C,H,W) float32 probabilities.

    Normalization, network, bilinear upsampling to the image's size, softmax; of several networks the mean. It holds
    copies, without gradients and in evaluation mode, in which no size of an image is a special case.
    """

    def __init__(self, networks: Sequence[SegmentationNetwork]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(_exportable(network) for network in networks)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        found = []
        for network in self.networks:
            assert isinstance(network, SegmentationNetwork)
            logits = network(network.normalization(images)).logits
            large = F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=True)
            found.append(large.softmax(dim=1))  # (B,C,H,W)
        return torch.stack(found).mean(dim=0) if len(found) > 1 else found[0]


class _MaxPool(nn.Module):
    """``nn.MaxPool2d(3, stride=2, padding=1)``, its output as large as one formula says.

    While a graph is made, torch's own one looks (in some versions) whether the size of the example image is even, and
    (with ``ceil_mode``) whether the last window begins outside it: the graph would be for such sizes only. Here as
    much is padded as the wanted number of windows needs.
    """

    def __init__(self, *, ceil_mode: bool) -> None:
        super().__init__()
        self.rounding = 2 if ceil_mode else 1

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        rows, columns = (height + self.rounding) // 2, (width + self.rounding) // 2
        padded = F.pad(x, (1, 2 * columns - width, 1, 2 * rows - height), value=float("-inf"))
        return F.max_pool2d(padded, kernel_size=3, stride=2)  # (B, channels, rows, columns)


def _exportable(network: SegmentationNetwork) -> SegmentationNetwork:
    network = copy.deepcopy(network).cpu()
    pool = network.backbone.maxpool
    assert (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)
    network.backbone.maxpool = _MaxPool(ceil_mode=pool.ceil_mode)  # type: ignore[assignment]
    return network


def chosen(networks: Mapping[str, SegmentationNetwork], model: str) -> list[SegmentationNetwork]:
    """The networks that a model is made of: itself, or the students."""
    if model == ENSEMBLE:
        return [network for name, network in networks.items() if name.startswith("student")]
    return [networks[model]]


# ------------------------------------------------------------------------------------------------ writing


def make_program(networks: Sequence[SegmentationNetwork]) -> ExportedProgram:
    """The graph of the mean of ``networks`` for any number of images of any size from 33 x 33 on."""
    example = torch.zeros(2, 3, SMALLEST + 8, SMALLEST + 17)
    sizes = {0: Dim("batch", min=1), 2: Dim("height", min=SMALLEST), 3: Dim("width", min=SMALLEST)}
    with _torch_warns_itself():
        program = torch.export.export(PhotoToProbabilities(networks), (example,), dynamic_shapes=(sizes,), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names files of this machine
    return program


def write_pt2(program: ExportedProgram, path: Path, about: Exported) -> None:
    """For ``torch.export.load``; what the file says of itself is in its extra file ``metadata.json``."""
    with _storage(path):
        torch.export.save(program, path, extra_files={METADATA: about.model_dump_json(indent=1)})


def write_onnx(program: ExportedProgram, path: Path, about: Exported) -> None:
    """One file without external data; what it says of itself is in its ``metadata_props``, each value as JSON."""
    import onnx

    names = ({0: "batch", 2: "height", 3: "width"},)
    with _torch_warns_itself():
        made = torch.onnx.export(
            program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], dynamic_shapes=names, verbose=False
        )
    assert made is not None
    model = made.model_proto
    graph = model.graph
    for one in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        one.ClearField("metadata_props")  # how the exporter came to it; names files of this machine
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, about.as_texts())
    model.doc_string = f"{about.network}, {about.model}. {INPUT}: {about.input}. {OUTPUT}: {about.output}."
    with _storage(path):
        onnx.save(model, path)


@contextmanager
def _torch_warns_itself() -> Iterator[None]:
    """Without what torch's exporters say of old names that they use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # a full disk inside torch is a RuntimeError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        free = shutil.disk_usage(path.parent).free / 2**20
        raise StorageError(f"{path.name}: cannot be written ({reason}); {free:,.1f} MiB are free there") from error


WRITERS = {"pt2": write_pt2, "onnx": write_onnx}


def require_formats(formats: Sequence[str]) -> None:
    """UserError if a package that a format needs is not installed."""
    if "onnx" in formats:
        require_packages(ONNX_PACKAGES, "an ONNX file (--format pt2 needs none)")


def _refuse_size(networks: Sequence[SegmentationNetwork], limit: int = LARGEST_ONNX) -> None:
    """UserError if the weights do not go into one ONNX file."""
    tensors = [tensor for network in networks for tensor in network.state_dict().values()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size > limit:
        raise UserError(
            f"{size / 2**20:,.0f} MiB of weights, but an ONNX file of ours holds {limit / 2**20:,.0f} at most: "
            "give --format pt2, or one network with --model"
        )


def _run_pt2(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda images: module(images)


def _run_onnx(path: Path) -> Run:
    return load_onnx(path).probabilities


RUNNERS = {"pt2": _run_pt2, "onnx": _run_onnx}


# ------------------------------------------------------------------------------------------------ comparing


class Comparison(NamedTuple):
    """A written file beside the checkpoint's own networks, on the CPU.

    shape: (B,3,H,W) of the images. difference: largest in probability. equal: share of equal labels. seconds,
    eager_seconds: of the faster of two runs, of the file and of the checkpoint.
    """

    path: Path
    size: int
    shape: tuple[int, ...]
    difference: float
    equal: float
    seconds: float
    eager_seconds: float


def pictures_to_compare(picture: np.ndarray) -> list[Tensor]:
    """(H,W,3) uint8 RGB -> the picture as it is, and it with its mirror image at another size; (B,3,h,w) in [0,1].

    A picture of more than ``AT_ONCE`` pixels is shrunk to so many, as none is predicted in one pass. Raises UserError
    for one that is too small.
    """
    height, width = picture.shape[:2]
    if min(height, width) < SMALLEST:
        raise UserError(f"{height} x {width} pixels: expected a picture of at least {SMALLEST} x {SMALLEST} to compare")
    own = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    factor = min(1.0, (AT_ONCE / (height * width)) ** 0.5)
    if factor < 1:
        height, width = max(SMALLEST, int(height * factor)), max(SMALLEST, int(width * factor))
        own = F.interpolate(own, size=(height, width), mode="area")
    other = [side + 14 if side < 2 * SMALLEST else round(0.7 * side) for side in (height, width)]
    small = F.interpolate(own, size=other, mode="area")
    return [own, torch.cat([small, small.flip(-1)])]


def write_and_compare(
    networks: Mapping[str, SegmentationNetwork],
    targets: Mapping[str, Path],
    *,
    about: Exported,
    images: Sequence[Tensor],
) -> list[Comparison]:
    """Write the model that ``about`` names, read each file again, and compare it with the networks on ``images``.

    networks: all of a checkpoint, on the CPU in evaluation mode. targets: files by format, "pt2" or "onnx". A file
    gets its name when it has been compared; the one that was there is replaced then.

    Raises:
        UserError: the networks are too large for a format, or a file computes something else.
        StorageError: a file cannot be written.
    """
    parts = chosen(networks, about.model)
    if "onnx" in targets:
        _refuse_size(parts)
    eager = [_timed(lambda batch: _eager(networks, batch, about.model), batch) for batch in images]
    program = make_program(parts)
    found = []
    for kind, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as folder:
            fresh = Path(folder) / target.name
            WRITERS[kind](program, fresh, about)
            run = RUNNERS[kind](fresh)
            for batch, (expected, eager_seconds) in zip(images, eager, strict=True):
                result, seconds = _timed(run, batch)
                row = _compare(result, expected)
                found.append(Comparison(target, fresh.stat().st_size, tuple(batch.shape), *row, seconds, eager_seconds))
                _refuse_difference(found[-1])
            os.replace(fresh, target)
    return found


def _eager(networks: Mapping[str, SegmentationNetwork], images: Tensor, model: str) -> Tensor:
    size = (images.shape[-2], images.shape[-1])
    return predict_all(networks, images, size, inference=Inference(), wanted=frozenset([model]))[model]


def _timed(run: Run, images: Tensor) -> tuple[Tensor, float]:
    """The result, and the seconds of the faster of two runs."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        result = run(images)
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def _compare(result: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest difference in probability (NaN if one is), and the share of equal labels."""
    equal = (result.argmax(dim=1) == expected.argmax(dim=1)).double().mean()
    return float((result - expected).abs().max()), float(equal)


def _refuse_difference(row: Comparison) -> None:
    if not row.difference <= LIMIT:  # NaN too
        shape = " x ".join(map(str, row.shape))
        raise UserError(
            f"{row.path}: on {shape} its probabilities differ from the checkpoint's by up to {row.difference:.2g}, "
            f"{100 * row.equal:.2f} % of the labels are equal; expected at most {LIMIT:g}. It was not kept. Try "
            "another version of torch, or of onnxruntime, or the other --format"
        )


def comparison_table(rows: Sequence[Comparison]) -> str:
    """A line a file and shape."""
    cells = [("file", "MiB", "images", "max |difference|", "equal labels", "seconds", "checkpoint, seconds")]
    for row in rows:
        shape, share = " x ".join(map(str, row.shape)), f"{100 * row.equal:.3f} %"
        seconds = (f"{row.seconds:.3f}", f"{row.eager_seconds:.3f}")
        cells.append((row.path.name, f"{row.size / 2**20:.1f}", shape, f"{row.difference:.1e}", share, *seconds))
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(lines)
