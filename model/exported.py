"""Files that export.py wrote: what they say of themselves, and an ONNX one as a network to predict with.

onnxruntime is needed here and nowhere else, so it is imported where it is used.
"""

import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from model.network import InputNormalization
from utils.config import Color, Config, Section, Size
from utils.errors import UserError
from utils.visualize import voc_palette

FORMAT: Literal["cross-teacher-training export"] = "cross-teacher-training export"
INPUT, OUTPUT = "images", "probabilities"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # to write and compare; the last one is enough to predict
# Older ones read the external data of a file from wherever it says.
LEAST_RUNTIME = (1, 24)


class Exported(Section):
    """What travels in an exported file beside the network; everything that predict.py must know.

    dataset, class_names, label_ids, resize: see ``DatasetConfig``. palette: RGB of each class. model: which of the
    checkpoint's. mean_color: RGB in [0,1], what the normalization maps to 0 (of an ensemble the mean): images that
    are too small are padded with it. training: step, seed, labeled images, commit.
    """

    format: Literal["cross-teacher-training export"] = FORMAT
    version: Literal[1] = 1
    model: str
    network: str
    dataset: str
    class_names: list[str] = Field(min_length=1, max_length=255)
    palette: list[Color]
    label_ids: list[int] | None
    resize: Size | None
    mean_color: list[float] = Field(min_length=3, max_length=3)
    training: dict[str, int | str | None]
    input: str = "float32 (B, 3, H, W): RGB in [0, 1], H and W at least 33"
    output: str = "float32 (B, C, H, W): probabilities of the classes"

    @model_validator(mode="after")
    def _consistent(self) -> "Exported":
        for key in ("palette", "label_ids"):
            given = getattr(self, key)
            if given is not None and len(given) != len(self.class_names):
                raise ValueError(f"{key} has {len(given)} entries, but there are {len(self.class_names)} classes")
        if any(not 0 <= value <= 255 for value in self.label_ids or []):
            raise ValueError("label_ids are from 0 to 255")
        if not all(0 <= value <= 1 for value in self.mean_color):
            raise ValueError("mean_color is from 0 to 1")
        return self

    @property
    def name(self) -> str:
        """Of the dataset, as ``DatasetConfig.name``."""
        return self.dataset

    def as_texts(self) -> dict[str, str]:
        """Each value as JSON, by its name: how it is written into a file."""
        return {key: json.dumps(value) for key, value in self.model_dump(mode="json").items()}


def describe(
    config: Config, model: str, normalizations: Sequence[InputNormalization], training: dict[str, Any]
) -> Exported:
    """What an exported file says of itself. normalizations: of the networks that ``model`` is made of.

    training: see ``Trained.about``; the machine and its torch are left out.
    """
    data = config.data
    colors = torch.stack([_mean_color(one) for one in normalizations]).mean(dim=0)
    return Exported(
        model=model,
        network=config.model,
        dataset=data.name,
        class_names=data.class_names,
        palette=data.palette or voc_palette(len(data.class_names)),
        label_ids=data.label_ids,
        resize=data.resize,
        mean_color=colors.clamp(0, 1).tolist(),
        training={key: value for key, value in training.items() if key not in ("machine", "torch")},
    )


def _mean_color(normalization: InputNormalization) -> Tensor:
    """(3,) RGB in [0,1] that is normalized to 0."""
    color = (normalization.mean / normalization.scale).cpu()
    return color.flip(0) if normalization.bgr else color


class _Centered(nn.Module):
    """RGB images (B,3,H,W) minus a color, which becomes 0: padding with 0 is then padding with that color."""

    color: Tensor

    def __init__(self, color: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("color", torch.tensor(color).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return images - self.color


class OnnxOutput:
    """logits: (B,C,H,W) float32, equal to the network's but for a constant of each pixel, which softmax ignores."""

    def __init__(self, probabilities: Tensor) -> None:
        self.logits = probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()


class OnnxNetwork(nn.Module):
    """An exported network in the place of a ``SegmentationNetwork``; run by onnxruntime on the CPU.

    Its output is as large as its input. What is resized afterwards (images that the dataset's ``resize`` shrinks,
    other scales) was upsampled once more than a checkpoint's, and differs from it by that.
    """

    def __init__(self, session: Any, about: Exported, path: Path) -> None:
        super().__init__()
        self.normalization = _Centered(about.mean_color)
        self.about, self._session, self._path = about, session, path

    def forward(self, images: Tensor) -> OnnxOutput:
        """images: (B,3,H,W) float, as ``normalization`` gives them."""
        return OnnxOutput(self.probabilities(images + self.normalization.color))

    def probabilities(self, images: Tensor) -> Tensor:
        """RGB images (B,3,H,W) float32 in [0,1] -> (B,C,H,W) float32. UserError: the file computes something else."""
        try:
            (found,) = self._session.run([OUTPUT], {INPUT: images.float().cpu().contiguous().numpy()})
        except Exception as error:  # onnxruntime's own classes, which have no common one
            raise UserError(f"{self._path}: cannot be run ({_reason(error)}); export the checkpoint again") from error
        wanted = (images.shape[0], len(self.about.class_names), *images.shape[-2:])
        if found.shape != wanted:
            raise UserError(f"{self._path}: gives {found.shape}, expected {wanted}; export the checkpoint again")
        return torch.from_numpy(found).to(images.device)


def load_onnx(path: Path) -> OnnxNetwork:
    """The network of a file that export.py wrote. Nothing outside the file's folder is read.

    Raises:
        UserError: the file is missing, damaged, or no export of ours; onnxruntime is not installed, or too old.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; python3 export.py CHECKPOINT {path} writes it")
    session = _open_session(path)
    return OnnxNetwork(session, _read_about(session, path), path)


def _open_session(path: Path) -> Any:
    require_packages(["onnxruntime"], f"{path}: an ONNX file")
    version = importlib.metadata.version("onnxruntime")
    if tuple(int(part) for part in version.split(".")[:2]) < LEAST_RUNTIME:
        least = ".".join(map(str, LEAST_RUNTIME))
        raise UserError(
            f"onnxruntime {version} may read files that an ONNX file names, wherever they lie; expected {least} or "
            f'newer: pip install "onnxruntime>={least}"'
        )
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes, which have no common one
        raise UserError(f"{path}: not a usable ONNX file ({_reason(error)}); export the checkpoint again") from error


def _read_about(session: Any, path: Path) -> Exported:
    texts = session.get_modelmeta().custom_metadata_map
    if texts.get("format") != json.dumps(FORMAT):
        raise UserError(f"{path}: not an export of this project; export.py writes one of a checkpoint")
    try:
        values = {key: json.loads(value) for key, value in texts.items()}
        about = Exported.model_validate_json(json.dumps(values), strict=True)
    except (ValidationError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: its metadata are not understood ({error}); export the checkpoint again") from None
    names = ([one.name for one in session.get_inputs()], [one.name for one in session.get_outputs()])
    if names != ([INPUT], [OUTPUT]):
        raise UserError(f"{path}: has inputs and outputs {names}, expected {INPUT} and {OUTPUT}")
    return about


def require_packages(names: Sequence[str], what: str) -> None:
    """UserError with the command that installs what is missing. what: for which they are needed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)}, not installed here: pip install {' '.join(missing)}")


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
