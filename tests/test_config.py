"""The configuration: what is refused, how it is said, and that its documents are fresh."""

import copy
import json
import re
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest

from model.build import NETWORKS
from model.resnet import BACKBONES
from tests.conftest import tiny_values
from utils.config import (
    DATASETS,
    Config,
    UnlabeledConfig,
    _flat,
    check_config,
    configuration_page,
    different_keys,
    dump_config,
    for_network,
    json_schema,
    load_config,
    override_config,
)
from utils.errors import CheckpointError, UserError
from utils.losses import PIXEL_WEIGHTS
from utils.mixing import MIX_MASKS
from utils.run import refuse_other_config

PROJECT = Path(__file__).parent.parent
CONFIGS = sorted(path for path in (PROJECT / "configs").rglob("*.json") if path.name != "config.schema.json")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid_for_the_type_and_for_the_schema(path: Path):
    load_config(path)
    jsonschema.validate(json.loads(path.read_text()), json.loads(json_schema()))


def test_the_schema_and_the_page_of_all_keys_are_fresh():
    assert (PROJECT / "configs" / "config.schema.json").read_text() == json_schema(), "run: make schema"
    assert (PROJECT / "docs" / "configuration.md").read_text() == configuration_page(), "run: make schema"


def test_the_page_names_every_key_of_a_configuration_that_has_all_blocks():
    block = DATASETS["pascal_voc"].model_dump(mode="json")
    config = check_config(tiny_values(dataset=block), source="test")
    keys = set(_flat(dump_config(config))) | {"$schema", "dataset"}
    assert set(re.findall(r"^\| `([^`]+)`", configuration_page(), flags=re.MULTILINE)) == keys | {
        "dataset.release_protocol"
    }


BAD = {
    "typing slip": ({"training__batch_sise": 4}, "unknown key training.batch_sise; did you mean training.batch_size?"),
    "slip in a nested block": ({"training__unlabeled__mix_masks": "cut"}, "did you mean training.unlabeled.mix_mask?"),
    "slip in the dataset": ({"dataset__lable": "x"}, "unknown key dataset.lable; did you mean dataset.label"),
    "right key, wrong block": ({"batch_size": 4}, "unknown key batch_size; did you mean training.batch_size?"),
    "a key of two other blocks": (
        {"training__flip": True},
        "unknown key training.flip; did you mean training.data.flip or training.unlabeled.flip?",
    ),
    "half of a path": ({"unlabeled__flip": True}, "unknown key unlabeled; did you mean training.unlabeled?"),
    "slip in the wrong block": ({"bach_size": 4}, "unknown key bach_size; did you mean training.batch_size?"),
    "Python's truth": ({"training__unlabeled__flip": "True"}, 'flip = "True": expected true or false'),
    "nothing alike": ({"qqq": 1}, "unknown key qqq; known here: "),
    "text for a number": ({"training__batch_size": "four"}, 'training.batch_size = "four"'),
    "truth for a number": ({"training__batch_size": True}, "training.batch_size = true"),
    "zero images": ({"training__batch_size": 0}, "greater than 0"),
    "negative rate": ({"training__learning_rate": -1.0}, "training.learning_rate"),
    "momentum of one": ({"training__momentum": 1.0}, "less than 1"),
    "unknown mask": ({"training__unlabeled__mix_mask": "square"}, "'class', 'cut', 'cow'"),
    "unknown dataset": ({"dataset": "imagenet"}, "'pascal_voc' or 'cityscapes', or a block"),
    "dataset of no kind": ({"dataset": 3}, "'pascal_voc' or 'cityscapes', or a block"),
    "key named as a kind of dataset": ({"block": 1}, "unknown key block; known here"),
    "such a key further down": ({"training__preset": 1}, "unknown key training.preset; known here"),
    "label id beyond a byte": ({"dataset__label_ids": [0, 1, 300]}, "dataset.label_ids.2 = 300"),
    "label id twice": ({"dataset__label_ids": [0, 1, 1]}, "label_ids names an id twice"),
    "images outside the root": ({"dataset__images": "/a/{id}.jpg"}, "must be a path below root"),
    "padding of resized images": (
        {"dataset__resize": "60,60", "dataset__release_protocol": {"pad": "70,70"}},
        "release_protocol.pad is for images of their own size",
    ),
    "crops below what the networks take": ({"training__data__input_size": "32,64"}, "at least 33"),
    "unknown pixel weight": ({"training__unlabeled__pixel_weight": "foo"}, "'threshold_uniform', 'threshold', "),
    "one number for a size": ({"training__data__input_size": "321"}, "training.data.input_size"),
    "range upside down": ({"training__data__scale_range": [2.0, 1.0]}, "must not be larger"),
    "no classes": ({"dataset": {"root": "x", "train": "t"}}, "give names or num_classes"),
    "names and number disagree": ({"dataset__names": ["a", "b"]}, "names has 2 entries, but there are 3 classes"),
    "no lists": ({"dataset": {"root": "x", "num_classes": 2}}, "give train, or both labeled and unlabeled"),
    "images without id": ({"dataset__images": "a.jpg"}, "one {id} in it"),
    "ignored class": ({"ignore_label": 2}, "ignore_label 2 is one of the 3 classes"),
    "weights of three students": ({"pretrained": ["coco", "imagenet", "none"]}, "found 3 entries"),
    "weights of no kind": ({"pretrained": 3}, "pretrained: expected a name or path, or a list of two"),
    "weights of no name": ({"pretrained": ["coco", None]}, "or a list of two, one for each student"),
    "protocol without size": ({"utils__val_protocol": "release"}, "needs dataset.release_protocol"),
    "contrast before its views": (
        {"training__unlabeled__start_iteration": 5, "training__contrastive__contrast_start": 2},
        "must not be before",
    ),
    "hue beyond half a turn": ({"training__unlabeled__jitter_strength": [0, 0, 0, 0.6]}, "jitter_strength.3 = 0.6"),
    "odd feature channels": ({"feature_channels": 33}, "multiple of 32"),
    "missing dataset": ({"dataset": None}, "dataset"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_named_with_key_and_expectation(case: str):
    changes, message = BAD[case]
    with pytest.raises(UserError) as error:
        check_config(tiny_values(**changes), source="my.json")
    assert message in str(error.value)
    assert str(error.value).startswith("my.json: ")
    assert "pydantic" not in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"training__unlabeled__train_unlabeled": False},
        {"training__contrastive__high_weight": 0, "training__contrastive__low_weight": 0},
    ],
)
def test_the_start_of_terms_that_are_not_trained_does_not_matter(changes: dict[str, Any]):
    late = {"training__unlabeled__start_iteration": 5, "training__contrastive__contrast_start": 2}
    assert check_config(tiny_values(**late, **changes), source="my.json").training.unlabeled.start_iteration == 5


def test_all_errors_are_reported_at_once():
    with pytest.raises(UserError) as error:
        check_config(tiny_values(training__batch_sise=4, seed=-1, utils__val_per_iter="x"), source="my.json")
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"seed": 1, "seed": 2}', "key seed appears twice"),
        ('{"seed": NaN}', "NaN is not a number"),
        ('{"seed": 1', "line 1, column 11: not JSON"),
        ("[1]", "expected one JSON object"),
        ("{}", "dataset is missing"),
    ],
)
def test_a_file_that_is_not_one_clean_object_is_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "other.json")


def test_overrides_take_dotted_keys_and_json_values(tmp_path: Path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(tiny_values()))
    overrides = ["training.batch_size=3", "training.unlabeled.mix_mask=cut", "training.unlabeled.pixel_weight=false"]
    config = load_config(path, overrides=overrides)
    assert config.training.batch_size == 3
    assert config.training.unlabeled.mix_mask == "cut"
    assert config.training.unlabeled.pixel_weight is False
    for override, message in (
        ("training.batch_size", "expected KEY=VALUE"),
        ("training.batch=3", "did you mean training.batch_size"),
        ("seed.x=3", "seed is a value"),
        ("training.learning_rate=NaN", "not a finite number"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(path, overrides=[override])


def test_an_override_is_not_blamed_for_what_the_file_has_wrong(tmp_path: Path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(tiny_values(training=None)))
    with pytest.raises(UserError, match=r"c\.json: training = null: Input should be an object"):
        load_config(path, overrides=["training.batch_size=3"])


def test_names_in_the_configuration_are_those_of_the_registries():
    def values(section: type, key: str) -> set:
        return {one for part in get_args(section.model_fields[key].annotation) for one in (get_args(part) or [part])}

    assert values(UnlabeledConfig, "mix_mask") - {type(None)} == set(MIX_MASKS)
    assert {v for v in values(UnlabeledConfig, "pixel_weight") if isinstance(v, str)} == set(PIXEL_WEIGHTS)
    assert set(get_args(Config.model_fields["model"].annotation)) == set(NETWORKS)
    assert set(get_args(Config.model_fields["backbone"].annotation)) == set(BACKBONES)


def test_a_preset_can_be_overridden_key_by_key(tmp_path: Path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(tiny_values(dataset="pascal_voc")))
    config = load_config(path, overrides=["dataset.val=my_val.txt", "data_root=/elsewhere"])
    assert (config.data.val, config.data.root, config.data.classes) == ("my_val.txt", "/elsewhere", 21)


def test_the_resolved_configuration_reads_back_equal():
    for dataset in ("pascal_voc", "cityscapes", tiny_values()["dataset"]):
        config = check_config(tiny_values(dataset=dataset), source="test")
        assert check_config(dump_config(config), source="again") == config


def test_the_script_decides_the_network_and_says_so():
    config = check_config(tiny_values(model="DeepLab"), source="test")
    assert for_network(config, "DeepLab") == config
    with pytest.warns(UserWarning, match="this script trains"):
        assert for_network(config, "DeepLabv3+").model == "DeepLabv3+"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training__warmup_iters": 1}, "training.warmup_iters has no effect, as in the release"),
        (
            {"training__num_iterations": 3, "training__unlabeled__start_iteration": 3},
            "unlabeled images are never used: start_iteration 3, num_iterations 3",
        ),
        (
            {"training__num_iterations": 3, "training__contrastive__contrast_start": 4},
            "the contrastive terms never start: contrast_start 4, num_iterations 3",
        ),
        (
            {"training__unlabeled__adjust_logits": True, "training__unlabeled__consistency_loss": "MSE"},
            "adjust_logits has no effect",
        ),
        (
            {"training__unlabeled__adjust_logits": True, "training__unlabeled__consistency_weight": 0},
            "adjust_logits has no effect",
        ),
        (
            {"dataset__labeled": "some.txt", "training__data__split_id_list": 1},
            "training.data.split_id_list has no effect: dataset.labeled names the list some.txt",
        ),
    ],
)
def test_a_setting_without_effect_is_accepted_with_one_warning(settings: dict[str, Any], message: str):
    config = check_config(tiny_values(**settings), source="test")
    with pytest.warns(UserWarning, match=re.escape(message)) as seen:
        for_network(config, config.model)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"seed": 1, // mine\n"dataset": "pascal_voc"}', "line 1, column 13: not JSON .*; JSON has no comments"),
        ('{"seed": [1,]}', "comma"),
        (" \n", "c.json: is empty"),
    ],
)
def test_what_people_write_and_json_does_not_know_is_named(tmp_path: Path, text: str, message: str):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "c.json")


def test_a_term_that_is_off_is_not_said_to_start_too_late():
    off = {"training__contrastive__high_weight": 0, "training__contrastive__low_weight": 0}
    late = {"training__num_iterations": 3, "training__contrastive__contrast_start": 4}
    for more in (off, {"training__unlabeled__train_unlabeled": False}):
        config = check_config(tiny_values(**late, **more), source="test")
        assert for_network(config, config.model) == config  # a warning would be an error here


def test_what_changes_no_number_may_differ_and_a_known_dataset_is_the_block_it_stands_for():
    def dumped(**changes: Any) -> dict[str, Any]:
        return dump_config(check_config(tiny_values(dataset="pascal_voc") | changes, source="test"))

    one = dumped()
    for override, different in {
        "dataset.test=test.txt": [],
        "dataset.val=other.txt": ["dataset.val"],
        "utils.val_per_iter=7": [],
        "training.accumulation=2": ["training.accumulation"],
        "training.learning_rate=1": ["training.learning_rate"],
    }.items():
        other = dump_config(override_config(tiny_values(dataset="pascal_voc"), [override], source="test"))
        assert list(different_keys(one, other)) == different, override
        assert different_keys(one, other, free=different) == {}


def test_a_run_of_a_version_that_did_not_know_a_key_goes_on_with_its_default():
    now = dump_config(check_config(tiny_values(), source="test"))
    before = copy.deepcopy(now)
    del before["training"]["optimizer"], before["training"]["unlabeled"]["adjust_logits"]
    assert different_keys(before, now) == {}
    now["training"]["optimizer"] = "AdamW"
    assert different_keys(before, now) == {"training.optimizer": ("SGD", "AdamW")}


def test_cityscapes_maps_the_nineteen_ids_of_its_label_files():
    block = DATASETS["cityscapes"]
    assert block.label_ids is not None
    by_name = dict(zip(block.class_names, block.label_ids, strict=True))
    assert by_name["road"] == 7
    assert by_name["person"] == 24
    assert by_name["bicycle"] == 33


def test_class_names_given_twice_are_refused():
    with pytest.raises(UserError, match="names has 'car' more than once; results are told by name"):
        check_config(tiny_values(dataset__num_classes=3, dataset__names=["car", "road", "car"]), source="test")


def test_a_run_goes_on_without_the_file_of_its_first_weights(tmp_path: Path):
    began, now = (dump_config(check_config(tiny_values(pretrained=name), source="test")) for name in ("one", "other"))
    refuse_other_config(tmp_path, began, now)
    longer = now | {"training": now["training"] | {"num_iterations": 7000}}
    with pytest.raises(
        CheckpointError, match=r"another configuration:\n *training.num_iterations: \d+ there, 7000 here$"
    ):
        refuse_other_config(tmp_path, began, longer)
