"""The README and docs/ hold: links, anchors, commands, keys, tags, functions and messages that they name exist."""

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.decode import read_label
from utils.cli import (
    comparison_parser,
    evaluation_parser,
    export_parser,
    keeping_parser,
    overview_parser,
    prediction_parser,
    prepare_parser,
    training_parser,
)
from utils.config import DATASETS, Config, DatasetConfig, Section, check_config, load_config

PROJECT = Path(__file__).parent.parent
README = PROJECT / "README.md"
PAGES = [README, *sorted((PROJECT / "docs").glob("*.md")), *sorted((PROJECT / "results").glob("*.md"))]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
LINK = re.compile(r"\]\(([^)\s]+)\)")
MADE_BY_A_COMMAND = {"configs/roads.json", "runs/RUN/config.json"}  # which stands before the one that reads it
PARSERS: dict[str, Callable[[], ArgumentParser]] = {
    "cross_teacher_contr.py": lambda: training_parser("DeepLab"),
    "cross_teacher_deeplabv3+.py": lambda: training_parser("DeepLabv3+"),
    "evaluateSSL.py": evaluation_parser,
    "predict.py": prediction_parser,
    "export.py": export_parser,
    "prepare_data.py": prepare_parser,
}
PARTS_OF_ABLATE = {"report": comparison_parser, "keep": keeping_parser, "overview": overview_parser}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    text = TEXT.get(page) or page.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def code_spans(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(page: Path) -> Iterator[list[str]]:
    """The words behind python3 of each command line, in blocks of code and in running text."""
    blocks = re.findall(r"^```\n(.*?)^```$", TEXT[page], flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()] + code_spans(page)
    for line in lines:
        if line.startswith("python3 ") or ("torchrun" in line and "cross_teacher_contr.py" in line):
            words = shlex.split(line, comments=True)
            script = words.index("cross_teacher_contr.py") if "torchrun" in words else 1
            yield words[script:]


ALL_COMMANDS = [(page.name, words) for page in PAGES for words in commands(page)]


def options_of_help(module: str) -> set[str]:
    """The options that a program's --help names."""
    output = io.StringIO()
    arguments, sys.argv = sys.argv, [module, "--help"]
    try:
        with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
            importlib.import_module(module).main()
    finally:
        sys.argv = arguments
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", output.getvalue()))


def keys_of(block: type[Section], prefix: str = "") -> set[str]:
    """Every dotted key of the configuration, its blocks among them."""
    keys = set()
    for name, field in block.model_fields.items():
        keys.add(prefix + (field.alias or name))
        inner = [part for part in (field.annotation, *getattr(field.annotation, "__args__", ())) if is_section(part)]
        inner += [DatasetConfig] if prefix + name == "dataset" else []
        for one in inner:
            keys |= keys_of(one, f"{prefix}{name}.")
    return keys


def is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


KEYS = keys_of(Config)


def texts_of_the_code() -> list[str]:
    """Every string of the code; what is put into it later, and all that divides its parts, is one ellipsis."""
    texts = []
    for path in [
        *PROJECT.glob("*.py"),
        *(p for folder in ("data", "model", "utils") for p in (PROJECT / folder).glob("*.py")),
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%s|\{\}", "…", node.value))
    return texts


def test_the_readme_is_a_door():
    assert len(TEXT[README].splitlines()) < 250
    for page in PAGES[1:]:
        assert f"]({page.relative_to(PROJECT)})" in TEXT[README], "a page that nobody finds"


@each_page
def test_no_line_ends_within_code(page: Path):
    """Such a command or name would not be seen by the tests below."""
    assert [line for line in prose(page).splitlines() if line.count("`") % 2] == []


@each_page
def test_every_link_leads_somewhere(page: Path):
    for target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        assert path.is_relative_to(PROJECT), target
        assert not anchor or anchor in anchors(path), target


def test_the_lines_that_convert_colored_label_maps_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = (PROJECT / "docs/datasets.md").read_text()
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "colored" in block]
    (tmp_path / "colored/a").mkdir(parents=True)
    shown = np.array([[(0, 0, 0), (128, 64, 128)], [(0, 0, 142), (1, 2, 3)]], np.uint8)
    Image.fromarray(shown).save(tmp_path / "colored/a/1.png")
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    assert read_label(tmp_path / "masks/a/1.png").tolist() == [[0, 1], [2, 255]]


@pytest.mark.parametrize(("page", "words"), ALL_COMMANDS, ids=[" ".join(words)[:80] for _, words in ALL_COMMANDS])
def test_every_command_is_understood(page: str, words: list[str]):
    if words[0] == "-m":
        module = words[1]
        assert (PROJECT / f"{module.replace('.', '/')}.py").is_file(), module
        known = options_of_help(module) if module.startswith("benchmarks.") else set()
    elif words[0] == "ablate.py" and words[1] in PARTS_OF_ABLATE:
        PARTS_OF_ABLATE[words[1]]().parse_args(words[2:])
        known = {word.split("=")[0] for word in words}
    elif words[0] == "ablate.py":
        known = options_of_help("ablate")
    else:
        PARSERS[words[0]]().parse_args(words[1:])  # ends the program if it does not understand
        known = {word.split("=")[0] for word in words}
    assert {word.split("=")[0] for word in words if word.startswith("--")} <= known
    given = [words[place + 1] for place, word in enumerate(words) if word in ("--set", "--grid")]
    assert {setting.partition("=")[0] for setting in given} - {"KEY"} <= KEYS
    configs = [word for word in words if word.endswith(".json") and word not in MADE_BY_A_COMMAND]
    for config in configs:
        load_config(PROJECT / config, overrides=[one for one in given if words[0] != "ablate.py"])


@each_page
def test_every_key_exists(page: Path):
    named = {
        key
        for span in code_spans(page)
        for key in re.findall(r"(?<![\w/.])(?:training|dataset|utils)\.[a-z][\w.]*\w", span)
    }
    modules = {f"utils.{path.stem}" for path in (PROJECT / "utils").glob("*.py")}
    assert named - KEYS - modules == set()


def test_the_key_check_sees_keys():
    seen = {span for page in PAGES for span in code_spans(page)}
    assert {"training.contrastive.contrast_start", "dataset.label_ids", "utils.val_protocol"} <= seen & KEYS
    assert {"dataset.release_protocol.pad", "$schema", "training.data"} <= KEYS


@each_page
def test_every_example_of_a_configuration_is_valid(page: Path):
    for block in re.findall(r"^```json\n(.*?)^```$", TEXT[page], flags=re.MULTILINE | re.DOTALL):
        check_config(json.loads(block), source=page.name)


@each_page
def test_every_function_that_a_link_names_is_in_its_file(page: Path):
    for file, name, target in re.findall(r"\[`(\S+\.py): (\w+)`\]\(([^)]+)\)", TEXT[page]):
        assert (page.parent / target).resolve() == PROJECT / file
        assert re.search(rf"^ *(def|class) {name}\b", (PROJECT / file).read_text(), flags=re.MULTILINE), name


def test_every_function_of_the_method_has_a_link():
    named = set(re.findall(r"\[`\S+\.py: (\w+)`\]", TEXT[PROJECT / "docs" / "method.md"]))
    assert {"cross_entropy", "weighted_cross_entropy", "high_level_contrast", "low_level_contrast", "mix"} <= named


def test_every_tag_of_tensorboard_is_written_somewhere():
    page = PROJECT / "docs" / "method.md"
    table = TEXT[page].split("## What TensorBoard shows")[1].split("\n## ")[0]
    tags = [
        tag for row in re.findall(r"^\| (`.+?) \|", table, flags=re.MULTILINE) for tag in re.findall(r"`([^`]+)`", row)
    ]
    assert len(tags) > 30
    patterns = [re.sub("…", ".+", re.escape(text)) for text in texts_of_the_code() if re.match(r"\w+(/|$)", text)]
    terms = [f"{term}/0" for term in ("supervised", "cross_teacher", "high_level", "low_level")]
    assert set(terms) <= set(tags)
    unknown = [tag for tag in tags if tag not in terms and not any(re.fullmatch(one, tag) for one in patterns)]
    assert unknown == []


def test_every_message_of_the_troubleshooting_is_one_of_ours():
    page = PROJECT / "docs" / "troubleshooting.md"
    rows = re.findall(r"^\| `([^`]+)` \|", TEXT[page], flags=re.MULTILINE)
    messages = [row for row in rows if " " in row]
    assert len(messages) > 25
    texts = texts_of_the_code()
    for message in messages:
        pieces = [re.escape(piece) for piece in message.split("…") if piece]
        assert any(re.search(".*".join(pieces), text, flags=re.DOTALL) for text in texts), message


def test_pictures_are_small_shown_and_explained():
    pictures = sorted((PROJECT / "docs" / "pictures").iterdir())
    assert len(pictures) >= 3
    for picture in pictures:
        assert picture.stat().st_size < 200_000
        with Image.open(picture) as image:
            image.verify()
        shown = [page for page in PAGES if re.search(rf"!\[[^\]]{{20,}}\]\([^)]*{picture.name}\)", TEXT[page])]
        assert shown, f"{picture.name}: on no page, or without a text for those who do not see it"
        for page in shown:
            below = TEXT[page].split(f"{picture.name})", 1)[1].strip().split("\n\n")[0]
            assert re.search(r"made by `python3 .+`", below, flags=re.IGNORECASE), (
                f"{page.name}: which command made {picture.name}?"
            )


def test_known_datasets_are_on_their_page():
    assert all(f'`"{name}"`' in TEXT[PROJECT / "docs" / "datasets.md"] for name in DATASETS)
