"""The configuration as one checked type: the release's keys, ours, their defaults and their meaning.

Importing this module does not import torch, so that a wrong key is reported within a moment.
``python3 -m utils.config`` (``make schema``) rewrites configs/config.schema.json and docs/configuration.md.
"""

import difflib
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeGuard, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from utils.errors import UserError

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Hue = Annotated[float, Field(ge=0, le=0.5, allow_inf_nan=False)]  # in turns of the color circle
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Size = Annotated[str, Field(pattern=r"^\s*[1-9]\d*\s*,\s*[1-9]\d*\s*$")]
PixelWeight = Literal["threshold_uniform", "threshold", "power", "sigmoid"] | Literal[False] | None
SIZES = ("input_size", "resize", "pad")
Color = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]


def parse_size(text: str) -> tuple[int, int]:
    """``"321,321"`` -> (height, width) in pixels."""
    height, width = (int(part) for part in text.split(","))
    return height, width


class Section(BaseModel):
    """Frozen, strict, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ReleaseProtocol(Section):
    """What the evaluation protocol "release" does to the images of a dataset: exactly one of the two."""

    pad: Size | None = Field(None, description="pad image and label to this size, cut the prediction back")
    resize: Size | None = Field(None, description="resize image and label to this size")

    @model_validator(mode="after")
    def _one_of_two(self) -> "ReleaseProtocol":
        if (self.pad is None) == (self.resize is None):
            raise ValueError("give exactly one of pad and resize")
        return self


class DatasetConfig(Section):
    """A folder of images and label maps. An id list is a text file below root, one id a line, or a pattern with *."""

    name: str = Field("custom", description="how results call it")
    root: str = Field(description="folder of the dataset; `--data-root` and `data_root` override it")
    images: str = Field("JPEGImages/{id}.jpg", description="image of an id, below root")
    labels: str = Field("SegmentationClassAug/{id}.png", description="label map of an id, below root")
    train: str | None = Field(
        None, description="ids of all training images; needed unless labeled and unlabeled are given"
    )
    labeled: str | None = Field(None, description="ids of the labeled images; else drawn from train, see split_id_list")
    unlabeled: str | None = Field(None, description="ids of the unlabeled images; else train without labeled")
    val: str = Field("ImageSets/Segmentation/val.txt", description="ids of the validation images")
    test: str | None = Field(None, description="ids of the test images, for `evaluateSSL.py --split test`")
    num_classes: Positive | None = Field(None, description="number of classes; or give names")
    names: list[str] | None = Field(None, description="names of the classes, in the order of their ids")
    label_ids: list[Annotated[int, Field(ge=0, le=255)]] | None = Field(
        None, description="ids in the label files that are class 0, 1, ...; all others are ignored. Default: 0, 1, ..."
    )
    palette: list[Color] | None = Field(None, description="RGB color of each class; default: VOC's colors")
    resize: Size | None = Field(None, description='"h,w" that every image is resized to before anything else')
    release_protocol: ReleaseProtocol | None = Field(None, description='pad or resize of the protocol "release"')

    @field_validator("images", "labels")
    @classmethod
    def _has_id(cls, value: str) -> str:
        if value.count("{id}") != 1 or value.startswith("/") or ".." in value.split("/"):
            raise ValueError('must be a path below root with one {id} in it, for example "images/{id}.jpg"')
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "DatasetConfig":
        if self.num_classes is None and not self.names:
            raise ValueError("give names or num_classes")
        classes = self.classes
        for key in ("names", "label_ids", "palette"):
            given = getattr(self, key)
            if given is not None and len(given) != classes:
                raise ValueError(f"{key} has {len(given)} entries, but there are {classes} classes")
        if twice := sorted({name for name in self.names or [] if (self.names or []).count(name) > 1}):
            raise ValueError(f"names has {', '.join(map(repr, twice))} more than once; results are told by name")
        if self.train is None and self.labeled is None:
            raise ValueError("give train, or both labeled and unlabeled")
        if len(set(self.label_ids or [])) != len(self.label_ids or []):
            raise ValueError("label_ids names an id twice; each belongs to one class")
        if self.resize and self.release_protocol and self.release_protocol.pad:
            raise ValueError(
                "release_protocol.pad is for images of their own size; leave out resize, or give resize there"
            )
        return self

    @property
    def classes(self) -> int:
        return self.num_classes if self.num_classes is not None else len(self.names or [])

    @property
    def class_names(self) -> list[str]:
        return self.names or [f"class {index}" for index in range(self.classes)]


VOC_NAMES = [
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
CITYSCAPES_NAMES = [
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
]
CITYSCAPES_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
CITYSCAPES_PALETTE = [
    *([128, 64, 128], [244, 35, 232], [70, 70, 70], [102, 102, 156], [190, 153, 153], [153, 153, 153]),
    *([250, 170, 30], [220, 220, 0], [107, 142, 35], [152, 251, 152], [70, 130, 180], [220, 20, 60], [255, 0, 0]),
    *([0, 0, 142], [0, 0, 70], [0, 60, 100], [0, 80, 100], [0, 0, 230], [119, 11, 32]),
]
DATASETS = {
    "pascal_voc": DatasetConfig(
        name="pascal_voc",
        root="datasets/VOC2012",
        train="ImageSets/Segmentation/train_aug.txt",
        names=VOC_NAMES,
        release_protocol=ReleaseProtocol(pad="505,505"),
    ),
    "cityscapes": DatasetConfig(
        name="cityscapes",
        root="datasets/CityScapes",
        images="leftImg8bit/{id}_leftImg8bit.png",
        labels="gtFine/{id}_gtFine_labelIds.png",
        train="train/*/*",
        val="val/*/*",
        names=CITYSCAPES_NAMES,
        label_ids=CITYSCAPES_IDS,
        palette=CITYSCAPES_PALETTE,
        resize="512,1024",
        release_protocol=ReleaseProtocol(resize="512,1024"),
    ),
}


class DataConfig(Section):
    """How training images are chosen and cropped."""

    split_id_list: NotNegative | None = Field(
        None,
        description="draw the labeled images with split k (`splits/<dataset>/split_k.txt`, else a seeded permutation)",
    )
    labeled_samples: Positive | None = Field(
        None, description="number of labeled images; with a list, its length must agree"
    )
    input_size: Size = Field("321,321", description='"h,w" of the training crops')
    scale: bool = Field(True, description="resize images and labels by a random factor before cropping")
    scale_range: tuple[Rate, Rate] = Field((0.5, 1.5), description="the factor's range")
    crop: bool = Field(True, description="crop at a random place; false: in the middle")
    flip: bool = Field(True, description="mirror left-right with probability 0.5")
    cache: Literal["none", "disk"] = Field(
        "none", description="disk: keep decoded, resized training images in cache_dir; quicker, needs the room"
    )
    cache_dir: str = Field("cache", description="folder of that cache; may be shared by runs and machines")
    hidden_labels: bool = Field(
        True,
        description="where unlabeled images have label maps: log how right their pseudo-labels are; nothing is learned "
        "from them",
    )
    bad_sample: Literal["stop", "skip"] = Field(
        "stop", description="a damaged training file: stop with its name, or take another image in its place and say so"
    )
    bad_sample_limit: NotNegative = Field(10, description="with skip: more different damaged files stop the run")
    timeout: NotNegative = Field(300, description="seconds without a batch from a loading process, 0: wait for ever")

    @field_validator("input_size")
    @classmethod
    def _large_enough(cls, value: str) -> str:
        if min(parse_size(value)) < 33:
            raise ValueError("both sides must be at least 33 pixels, the networks reduce them by up to 16")
        return value

    @field_validator("scale_range")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("the first number must not be larger than the second")
        return value


class UnlabeledConfig(Section):
    """The cross-teacher term (paper: L_ct) and its strong views."""

    train_unlabeled: bool = Field(True, description="false: the supervised baseline, labeled images only")
    start_iteration: NotNegative = Field(0, description="before it only the supervised term is trained")
    consistency_weight: Weight = Field(1.0, description="weight of the term `cross_teacher`; 0: not computed")
    consistency_loss: Literal["CE", "MSE"] = Field("CE", description="how predictions are compared with the teacher's")
    pixel_weight: PixelWeight = Field(
        "threshold_uniform", description='weight of a pixel from the teacher\'s confidence; false: 1. For "CE"'
    )
    confidence_threshold: Probability = Field(
        0.968, description='what "threshold", "threshold_uniform" and "MSE" call confident'
    )
    mix_mask: Literal["class", "cut", "cow", "None"] | None = Field(
        "class", description="how two unlabeled images are mixed"
    )
    flip: bool = Field(False, description="mirror each strong view with probability 0.5")
    color_jitter: bool = Field(True, description="color jitter on the strong view, with probability 0.8 a batch")
    jitter_strength: tuple[Probability, Probability, Probability, Hue] = Field(
        (0.25, 0.25, 0.25, 0.25),
        description="of brightness, contrast and saturation (around 1), and of hue (in turns around 0, up to 0.5)",
    )
    blur: bool = Field(True, description="Gaussian blur on the strong view, with probability 0.5 a batch")
    strong_view: Literal["independent", "shared"] = Field(
        "independent", description="each student's view drawn from its own cross teacher, or one view for both"
    )
    teacher: Literal["cross", "self", "peer"] = Field(
        "cross",
        description="who gives a student its pseudo-labels: the peer's teacher, its own teacher, or the peer student",
    )
    teacher_norm: Literal["batch", "running"] = Field(
        "batch",
        description="BatchNorm statistics of a teacher that predicts in training: of the batch, or the running ones",
    )
    ema_decay: Probability = Field(
        0.99, description="largest decay of the teachers' moving average; that of the shares of adjust_logits"
    )
    mask_padding: bool = Field(True, description="pixels that are only padding carry no pseudo-label")
    adjust_logits: bool = Field(
        False,
        description="the cross-teacher term too sees adjusted logits: + what training.logit_adjustment adds (0 adds "
        "nothing) + log(share of the class among the pseudo-labels / among the labels); rare classes, which have few "
        'pseudo-labels, are then less unlearned. For "CE"; false: the paper',
    )

    @property
    def adjusts(self) -> bool:
        """Whether ``adjust_logits`` has an effect."""
        is_computed = self.train_unlabeled and self.consistency_weight > 0 and self.consistency_loss == "CE"
        return self.adjust_logits and is_computed


class ContrastiveConfig(Section):
    """The two contrastive terms (paper: L_hc, L_lc) and the memory banks."""

    high_weight: Weight = Field(0.1, description="weight of the term `high_level`; 0: not computed")
    low_weight: Weight = Field(0.1, description="weight of the term `low_level`; 0: not computed")
    high_temperature: Rate = Field(0.1, description="temperature of `high_level`")
    low_temperature: Rate = Field(0.5, description="temperature of `low_level`")
    negatives: Literal["sum", "mean"] = Field(
        "sum",
        description="over the bank entries of other classes, in both terms; sum: the paper; mean: pixels that are "
        "placed well are let go",
    )
    confidence: Probability = Field(
        0.75,
        description="of the teacher at or above: a pixel is reliable (`high_level`); below: unreliable (`low_level`), "
        "and there the peer must reach it",
    )
    direction: Literal["confidence", "none"] = Field(
        "confidence",
        description="`low_level` follows the peer only where it is surer and reliable; none: wherever the teacher is "
        "unsure",
    )
    contrast_start: NotNegative | None = Field(
        None,
        description="iteration at which both terms start; null: when, after one pass over the labeled images, every "
        "class seen is full in both banks",
    )
    max_anchors: Positive | None = Field(
        None,
        description="pixels a term, student and part of a batch compares with the banks, drawn evenly over classes; "
        "null: all",
    )
    memory_size: Positive = Field(256, description="entries a class in each memory bank")
    memory_confidence: Probability = Field(
        0.95, description="least teacher probability of a feature that enters a bank"
    )


class TrainingConfig(Section):
    """One run."""

    batch_size: Positive = Field(5, description="labeled images a step over all processes, and as many unlabeled ones")
    accumulation: Positive = Field(1, description="parts of its batch that a process computes one after another")
    process_timeout: Positive = Field(600, description="seconds until a process that does not answer ends the run")
    num_workers: NotNegative | Literal["auto"] = Field(
        "auto",
        description="processes that load images, for each of the two streams; auto: what the cores allow; 0: none",
    )
    optimizer: Literal["SGD", "AdamW"] = Field(
        "SGD",
        description="the paper's; AdamW (Loshchilov and Hutter 2019) learns in fewer steps from random weights, at a "
        "rate of about 0.001 with head_lr_multiplier 1",
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="of SGD; of AdamW its first beta")
    num_iterations: Positive = Field(40000, description="number of steps T")
    learning_rate: Rate = Field(2.5e-4, description="base rate, of the backbone")
    learning_rate_batch_size: Positive | None = Field(
        None, description="batch size that learning_rate is meant for: it grows in proportion with batch_size; null: no"
    )
    backbone_lr_multiplier: Rate = Field(
        1.0, description="3 gives the release's rate, which lists these parameters three times"
    )
    head_lr_multiplier: Rate = Field(10.0, description="rate of everything but the backbone, over the base rate")
    lr_schedule: Literal["Poly"] | None = Field("Poly", description="`base * (1 - t/T)^power`; null: constant")
    lr_schedule_power: Weight = Field(0.9, description="power of the schedule")
    logit_adjustment: Weight = Field(
        0.0,
        description="how much the supervised term favors rare classes: it sees logits + this * log(share of the class "
        "among the labeled pixels) (Menon et al. 2021); 0: the paper, 1: as if all classes were equally frequent",
    )
    weight_decay: Weight = Field(5e-4, description="of SGD; of AdamW decoupled from the gradient, where 0.01 is usual")
    decay_norm_and_bias: bool = Field(
        True, description="weight decay on norm parameters and biases too, as the release"
    )
    use_sync_batchnorm: bool = Field(
        False, description="BatchNorm statistics over all processes, on GPUs; else of each process's part of the batch"
    )
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = Field(
        "fp32",
        description="of the networks in training: bf16 computes most of it in bfloat16, fp16 in float16 with a scaled "
        "loss, for GPUs without bfloat16; tf32 is for GPUs",
    )
    channels_last: bool = Field(False, description="keep the channels of a pixel together in memory; for bf16")
    checkpoint_activations: bool = Field(
        False, description="compute the backbones' activations again in the backward pass: far less memory, slower"
    )
    compile: bool = Field(False, description="compile the networks with torch.compile; starts slowly")
    deterministic: bool = Field(
        False, description="on a GPU: the same bits every time where torch can, slower; a CPU always does"
    )
    warmup_iters: NotNegative | None = Field(None, description="accepted and ignored, as in the release")
    data: DataConfig = DataConfig()
    unlabeled: UnlabeledConfig = UnlabeledConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()

    @property
    def needs_class_shares(self) -> bool:
        """Whether training needs to know the class shares of the labeled pixels."""
        return self.logit_adjustment > 0 or self.unlabeled.adjusts

    @model_validator(mode="after")
    def _contrast_needs_unlabeled(self) -> "TrainingConfig":
        start, weights = self.contrastive.contrast_start, self.contrastive.high_weight + self.contrastive.low_weight
        is_trained = self.unlabeled.train_unlabeled and weights > 0
        if start is not None and is_trained and start < self.unlabeled.start_iteration:
            raise ValueError(
                f"contrastive.contrast_start {start} must not be before unlabeled.start_iteration "
                f"{self.unlabeled.start_iteration}, from which on there is something to contrast; raise it too"
            )
        if self.compile and self.checkpoint_activations:
            raise ValueError("compile and checkpoint_activations do not go together; choose one")
        return self


class UtilsConfig(Section):
    """Checkpoints, validation and logs."""

    checkpoint_dir: str = Field("runs", description="where run folders are made")
    save_checkpoint_every: Positive = Field(10000, description="steps between checkpoints")
    keep_checkpoints: Positive = Field(2, description="the last one, and older ones that `--resume auto` falls back to")
    save_best_model: bool = Field(True, description="keep `best_model.pth`, by the ensemble's validation mIoU")
    val_per_iter: Positive = Field(1000, description="steps between validations")
    val_protocol: Literal["release", "original", "sliding"] = Field(
        "original", description="protocol of the validations"
    )
    tensorboard: bool = Field(True, description="write TensorBoard events")
    log_per_iter: Positive = Field(20, description="steps between lines of log.jsonl and TensorBoard")


def _dataset_kind(value: Any) -> str:
    return "preset" if isinstance(value, str) else "block"


class Config(Section):
    """Everything a run depends on."""

    json_schema: str | None = Field(None, alias="$schema", description="for editors; ignored")
    model: Literal["DeepLab", "DeepLabv3+"] = Field(
        "DeepLab", description="each script trains its own; another value is noted"
    )
    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = Field(
        "resnet101", description="depth of the ResNet"
    )
    backbone_width: Positive = Field(
        64, description="channels of its first stage; smaller: for demos and tests on a CPU"
    )
    feature_channels: Annotated[int, Field(gt=0, multiple_of=32)] = Field(
        256, description="channels D of head and features"
    )
    pretrained: str | list[str] | None = Field(
        "coco",
        description='"coco", "imagenet", a file, or "none": random initialisation; a list of two: one for each student',
    )
    dataset: Annotated[
        Annotated[Literal["pascal_voc", "cityscapes"], Tag("preset")] | Annotated[DatasetConfig, Tag("block")],
        Discriminator(_dataset_kind),
    ] = Field(description="a known dataset, or a block that describes a folder")
    data_root: str | None = Field(None, description="folder of the dataset, instead of its own `root`")
    seed: NotNegative = Field(5555, description="of everything that is drawn")
    ignore_label: Annotated[int, Field(ge=0, le=255)] = Field(255, description="label of pixels that do not count")
    training: TrainingConfig = TrainingConfig()
    utils: UtilsConfig = UtilsConfig()

    @field_validator("pretrained")
    @classmethod
    def _one_or_two(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) != 2:
            raise ValueError(f"a list names the weights of the two students, found {len(value)} entries")
        return value

    @model_validator(mode="after")
    def _ignore_label_is_no_class(self) -> "Config":
        if self.ignore_label < self.data.classes:
            raise ValueError(f"ignore_label {self.ignore_label} is one of the {self.data.classes} classes")
        if self.training.unlabeled.train_unlabeled and self.data.train is None and self.data.unlabeled is None:
            raise ValueError(
                "give dataset.unlabeled or dataset.train, or set training.unlabeled.train_unlabeled to false"
            )
        if self.utils.val_protocol == "release" and self.data.release_protocol is None:
            raise ValueError('utils.val_protocol "release" needs dataset.release_protocol; or use "original"')
        return self

    @property
    def data(self) -> DatasetConfig:
        """The dataset's block, whichever way it was named, with the root that counts."""
        block = DATASETS[self.dataset] if isinstance(self.dataset, str) else self.dataset
        return block if self.data_root is None else block.model_copy(update={"root": self.data_root})

    @property
    def num_classes(self) -> int:
        return self.data.classes

    @property
    def pretrained_by_peer(self) -> list[str]:
        """What each of the two students starts from."""
        return self.pretrained if isinstance(self.pretrained, list) else [self.pretrained or "none"] * 2

    @property
    def input_size(self) -> tuple[int, int]:
        return parse_size(self.training.data.input_size)


# ---------------------------------------------------------------------------------------------------- reading


def for_network(config: Config, model: str) -> Config:
    """The configuration with a script's own network, saying so where the file names another."""
    if config.model != model:
        warnings.warn(f'the configuration says model "{config.model}"; this script trains "{model}"', stacklevel=2)
    if model == "DeepLabv3+" and "coco" in config.pretrained_by_peer and config.backbone == "resnet101":
        warnings.warn('DeepLabv3+ has no COCO weights: "coco" means ImageNet\'s here, as in the release', stacklevel=2)
    elif config.pretrained == "coco":
        warnings.warn(
            'pretrained "coco": both students start from COCO weights; the release gives the second one ImageNet\'s: '
            '"pretrained": ["coco", "imagenet"]',
            stacklevel=2,
        )
    for message in _settings_without_effect(config):
        warnings.warn(message, stacklevel=2)
    return config.model_copy(update={"model": model})


def _settings_without_effect(config: Config) -> Iterator[str]:
    """What was asked for and will not happen."""
    training = config.training
    unlabeled, contrastive, steps = training.unlabeled, training.contrastive, training.num_iterations
    contrasts = contrastive.high_weight + contrastive.low_weight > 0
    if training.warmup_iters is not None:
        yield "training.warmup_iters has no effect, as in the release"
    if unlabeled.train_unlabeled and unlabeled.start_iteration >= steps:
        yield f"unlabeled images are never used: start_iteration {unlabeled.start_iteration}, num_iterations {steps}"
    elif unlabeled.train_unlabeled and contrasts and (contrastive.contrast_start or 0) >= steps:
        yield f"the contrastive terms never start: contrast_start {contrastive.contrast_start}, num_iterations {steps}"
    if unlabeled.train_unlabeled and unlabeled.adjust_logits and not unlabeled.adjusts:
        yield 'adjust_logits has no effect: it takes consistency_loss "CE" and a consistency_weight above 0'
    if training.data.split_id_list is not None and config.data.labeled is not None:
        yield f"training.data.split_id_list has no effect: dataset.labeled names the list {config.data.labeled}"


def load_config(path: str | Path, *, overrides: Sequence[str] = ()) -> Config:
    """Read and check a JSON file, with ``KEY=VALUE`` overrides of dotted keys.

    Raises UserError with all that is wrong at once, each with its key and, for an unknown key, what was meant.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); expected a JSON file such as configs/configVOC.json"
        ) from None
    return override_config(_parse_json(text, str(path)), overrides, source=str(path))


def override_config(values: dict[str, Any], overrides: Sequence[str], *, source: str) -> Config:
    """Parsed values with ``KEY=VALUE`` overrides put in, checked."""
    for override in overrides:
        try:
            _apply_override(values, override)
        except UserError:
            check_config(values, source=source)  # what is wrong in the file itself is said first
            raise
    return check_config(values, source=source)


def check_config(values: dict[str, Any], *, source: str) -> Config:
    """Check already parsed values; ``source`` names them in messages."""
    try:
        return Config.model_validate_json(json.dumps(values), strict=True)
    except RecursionError:
        raise UserError(f"{source}: not a configuration, its brackets are nested too deeply") from None
    except ValidationError as error:
        lines = sorted({_explain(detail, source) for detail in error.errors(include_url=False)})
        raise UserError("\n       ".join(lines)) from None


def dump_config(config: Config) -> dict[str, Any]:
    """The resolved configuration, every default filled in, as plain JSON values."""
    return config.model_dump(mode="json", by_alias=True, exclude={"json_schema"})


# May differ between two runs that compute the same.
FREE_KEYS = (
    *("utils.checkpoint_dir", "utils.save_", "utils.keep_", "utils.val_per_iter", "utils.tensorboard"),
    *("utils.log_per_iter", "training.num_workers", "training.process_timeout"),
    *(
        "training.checkpoint_activations",
        "training.data.hidden_labels",
        "training.data.timeout",
        "training.data.bad_sample",
        "training.data.cache",
    ),
    *("data_root", "dataset.root", "dataset.test", "dataset.palette"),
)


def different_keys(
    one: dict[str, Any], other: dict[str, Any], *, free: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> both values, for the keys of two dumped configurations that change what is computed and differ.

    A key of which an older version knew nothing has its default there. free: further keys, or beginnings of keys, that
    are let differ.
    """
    defaults = _flat({"training": TrainingConfig().model_dump(mode="json")})
    old, new = (defaults | _flat(values | {"dataset": _block(values.get("dataset"))}) for values in (one, other))
    keys = (key for key in sorted(old | new) if not key.startswith((*FREE_KEYS, *free)))
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def _block(dataset: Any) -> Any:
    """A known dataset's name as the block that it stands for."""
    return DATASETS[dataset].model_dump(mode="json") if isinstance(dataset, str) and dataset in DATASETS else dataset


def _flat(block: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested blocks -> dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in block.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _json_hint(rest: str) -> str:
    """What people write that JSON does not know, from what follows the place of an error."""
    if rest.startswith(("//", "/*", "#")):
        return "; JSON has no comments"
    return "; no comma stands before a closing bracket" if rest.startswith(("}", "]")) else ""


def _parse_json(text: str, source: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise UserError(f"{source}: key {', '.join(twice)} appears twice in one block; keep one")
        return dict(pairs)

    def refuse(constant: str) -> NoReturn:
        raise UserError(f"{source}: {constant} is not a number JSON knows")

    try:
        values = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise UserError(f"{source}: not a configuration, its brackets are nested too deeply") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: not JSON ({error.msg})" if text.strip() else "is empty"
        raise UserError(f"{source}: {where}{_json_hint(text[error.pos :])}") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{source}: not a configuration ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected one JSON object {{...}}, found {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    """``training.batch_size=4`` in place; the value is read as JSON, else taken as text."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: expected KEY=VALUE, for example --set training.batch_size=4")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, brackets without end
        value = text
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--set {override}: {text} is not a finite number")
    *parents, last = key.split(".")
    block = values
    for depth, name in enumerate(parents):
        inner = block.setdefault(name, {})
        if name == "dataset":
            inner = block[name] = _block(inner)
        if not isinstance(inner, dict):
            raise UserError(f"--set {override}: {'.'.join(parents[: depth + 1])} is a value, not a block of keys")
        block = inner
    block[last] = value


def _explain(detail: Any, source: str) -> str:
    """One line for one of pydantic's errors."""
    parts = [str(part) for part in detail["loc"]]
    if parts[:2] in (["dataset", "preset"], ["dataset", "block"]):
        del parts[1]
    if any(part.startswith("literal[") for part in parts):  # one alternative of several
        parts = [part for part in parts if not part.startswith("literal[")]
    key = ".".join(parts) or "configuration"
    if detail["type"] == "extra_forbidden":
        known, everywhere = _keys_of(parts[:-1]), list(_all_keys())
        last = [place.split(".")[-1] for place in everywhere]
        close = difflib.get_close_matches(parts[-1], last, n=1)
        meant = [place for place, name in zip(everywhere, last, strict=True) if name == parts[-1]]
        near = difflib.get_close_matches(parts[-1], known, n=1)
        meant = meant or [".".join([*parts[:-1], name]) for name in near]
        meant = meant or [place for place, name in zip(everywhere, last, strict=True) if name in close]
        hint = f"did you mean {' or '.join(meant)}?" if meant else f"known here: {', '.join(known)}"
        return f"{source}: unknown key {key}; {hint}"
    if detail["type"] == "missing":
        return f"{source}: {key} is missing; it has no default"
    if parts[:1] == ["pretrained"] and detail["type"] != "value_error":
        return f"{source}: pretrained: expected a name or path, or a list of two, one for each student"
    message = detail["msg"].removeprefix("Value error, ")
    if parts == ["dataset"] and detail["type"] != "value_error":
        message = f"expected {' or '.join(map(repr, DATASETS))}, or a block {{...}} that describes a folder"
    elif key == "training.unlabeled.pixel_weight":
        message = f"expected one of {', '.join(map(repr, get_args(get_args(PixelWeight)[0])))}, or false"
    elif detail["type"].startswith("bool_"):
        message = "expected true or false"
    elif detail["type"] == "literal_error":
        message = f"expected {detail['ctx']['expected']}"
    elif detail["type"] == "string_pattern_mismatch" or (detail["type"] == "string_type" and parts[-1] in SIZES):
        message = 'expected a size "height,width", for example "321,321"'
    given = json.dumps(detail["input"]) if not isinstance(detail["input"], dict) else None
    given = f"{given[:100]} ..." if given is not None and len(given) > 200 else given
    return f"{source}: {key}{' = ' + given if given is not None else ''}: {message}"


def _keys_of(parts: list[str]) -> list[str]:
    """The keys that the block at a dotted path knows."""
    block: type[BaseModel] = Config
    for part in parts:
        inner = block.model_fields[part].annotation if part in block.model_fields else None
        block = DatasetConfig if part == "dataset" else ReleaseProtocol if part == "release_protocol" else inner  # type: ignore[assignment]
    return [field.alias or name for name, field in block.model_fields.items()]


def _all_keys(block: type[BaseModel] | None = None, before: str = "") -> Iterator[str]:
    """Every dotted key, those of the dataset's block left out."""
    for name, field in (block or Config).model_fields.items():
        key = f"{before}{field.alias or name}"
        yield key
        if _is_section(field.annotation):
            yield from _all_keys(field.annotation, f"{key}.")


# ---------------------------------------------------------------------------------------------------- documents


def json_schema() -> str:
    """The JSON Schema of a configuration file, as kept in configs/config.schema.json."""
    return json.dumps(Config.model_json_schema(by_alias=True), indent=1) + "\n"


PAGE = """# Configuration

Made from `utils/config.py` by `make schema` (`python3 -m utils.config`); change it there. A test compares the two.

A run is described by one JSON file. Only `dataset` is required; a key that is left out has its default. Keys that are
unknown, of the wrong type or out of range are refused, all at once, each with its name and a suggestion, before any
image is read. On a command line `--set KEY=VALUE` overrides a key; the value is read as JSON, else as text:
`--set training.unlabeled.mix_mask=cut`, `--set training.data.labeled_samples=null`,
`--set 'training.data.scale_range=[0.5,2]'`.

[`configs/config.schema.json`](../configs/config.schema.json) says the same to an editor, for completion and checks. The
`config.json` in a run's folder holds every key with the value it had.

What the keys of the method do to the equations is in [method.md](method.md), what those of memory and speed cost in
[scaling.md](scaling.md), how a dataset is described in [datasets.md](datasets.md).
"""


def configuration_page() -> str:
    """docs/configuration.md: every key with its default, its possible values and its meaning."""
    return "\n".join([PAGE, *_tables(Config, ""), *_tables(DatasetConfig, "dataset.")])


def _tables(block: type[BaseModel], prefix: str) -> list[str]:
    """A heading and a table for a block, then those of the blocks within."""
    properties = block.model_json_schema(by_alias=True)["properties"]
    rows, inner = [], []
    for name, field in block.model_fields.items():
        key = field.alias or name
        within = next((part for part in (field.annotation, *get_args(field.annotation)) if _is_section(part)), None)
        if within is not None and within is not DatasetConfig:
            inner += _tables(within, f"{prefix}{key}.")
        if within is None or field.description:
            default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
            rows.append(f"| `{prefix}{key}` | {default} | {_values(properties[key])} | {field.description} |")
    head = ["| key | default | values | meaning |", "| --- | --- | --- | --- |"]
    title = f"`{prefix[:-1]}`" if prefix else "Top level"
    return [f"## {title}\n", f"{block.__doc__}\n", *head, *rows, "", *inner]


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _values(schema: dict[str, Any]) -> str:
    """What a key may be, from its JSON Schema."""
    if alternatives := schema.get("anyOf") or schema.get("oneOf"):
        return ", ".join(_values(one) for one in alternatives)
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    kind = {"null": "`null`", "boolean": "`true`, `false`", "array": "list", "string": "text"}.get(
        schema.get("type", "")
    )
    if "pattern" in schema:
        return '`"h,w"`'
    if kind is not None or "$ref" in schema:
        return kind or "block"
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema]
    limits += [f"multiple of {schema['multipleOf']}"] if "multipleOf" in schema else []
    return " ".join([schema["type"], *([", ".join(limits)] if limits else [])])


if __name__ == "__main__":
    Path("configs/config.schema.json").write_text(json_schema(), encoding="utf-8")
    Path("docs/configuration.md").write_text(configuration_page(), encoding="utf-8")
