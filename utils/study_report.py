"""The report of a study: the same tables as Markdown beside pictures, and as one page that needs nothing else."""

import re
import shlex
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from pathlib import Path

from utils.errors import UserError
from utils.files import write_whole
from utils.study import SPLITS
from utils.study_figures import SIGNALS, Picture, draw_pictures
from utils.study_results import TERMS, Measure, Record, Results, Row

OVERVIEW_FACTS = ("dataset", "labeled", "labeled hash", "protocol", "step", "commit", "machine")


@dataclass(frozen=True)
class Table:
    """Cells are plain text. The first column names the row; ``numbers``: the others are numbers."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = True


def write_report(results: Results, folder: Path, *, page: bool = True) -> str:
    """report.md, the pictures and, with ``page``, report.html; the text of report.md. Same results, same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(results)
    for name, picture in pictures.items():
        write_whole(folder / f"{name}.png", picture.png)
    text = as_markdown(results, pictures)
    write_whole(folder / "report.md", text.encode())
    if page:
        write_whole(folder / "report.html", as_html(results, pictures).encode())
    return text


def tables(results: Results) -> list[Table]:
    """All tables, in the order of the report."""
    found = [_main_table(results)]
    for split in results.splits:
        there = results.on(split)
        found += [_main_table(there, split), _class_table(there, split)]
    found += [_class_table(results), _signals_table(results), _runs_table(results), _cost_table(results)]
    return [table for table in found if table.rows]


def results_text(results: Results) -> str:
    """The main table for a terminal, with what is missing from it."""
    table, warning = _main_table(results), _warning(results)
    lines = [table.head, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.head))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([_facts(results), "", *rows, *(["", warning] if warning else [])])


def _main_table(results: Results, split: str = "val") -> Table:
    seeds = sorted({record.seed for record in results.records})
    named = f"each seed ({', '.join(map(str, seeds))})" if len(seeds) > 1 else f"seed {seeds[0]}"
    head = ["setting", "ensemble, mIoU %", "one student, mIoU %", "difference"]
    rows = []
    for index, row in enumerate(results.rows):
        difference = _difference(row, results.rows[0], lambda record: record.ensemble) if index else "-"
        each = [_each(row, what, seeds) for what in ("ensemble", "student")]
        rows.append([row.label, spread(row.ensemble), spread(row.student), difference, *each])
    note = (
        "Mean ± sample standard deviation over seeds, last checkpoint, never the best one. One student: the mean of "
        "both. Difference: of the ensemble to the first row, the mean of the differences of runs with the same seed."
    )
    title = "Results"
    if split != "val":
        title, note = f"Results on {split}", f"{_what_is_measured(split)} {_facts(results)}."
    return Table(title, note, [*head, f"ensemble, {named}", f"one student, {named}"], rows)


def overview(*studies: Results, one_student: bool = False) -> str:
    """A short Markdown table of each study: the ensemble on each list, and the difference to the study's first row.

    one_student: the mean of the two students' scores, in the place of the ensemble's.
    """
    return "\n".join(_overview(study, one_student) for study in studies)


def _overview(results: Results, one_student: bool) -> str:
    name, of = _judged(one_student)
    there = {split: results if split == "val" else results.on(split) for split in ("val", *results.splits)}
    head = ["setting", "seeds", *(f"{split}, {name} %" for split in there)]
    rows = []
    for index, (row, label) in enumerate(zip(results.rows, _short_labels(results), strict=True)):
        cells = []
        for found in there.values():
            difference = _difference(found.rows[index], found.rows[0], of) if index else "-"
            count = len(found.rows[index].done)
            notes = [difference] if difference != "-" else []
            notes += [f"{count} of the seeds"] if 0 < count < len(row.done) else []
            values = list(found.rows[index].values(of).values())
            cells.append(spread(values) + (f" ({', '.join(notes)})" if notes else ""))
        rows.append([label, str(len(row.done)), *cells])
    facts = [f"{key} {results.facts[key]}" for key in OVERVIEW_FACTS if key in results.facts]
    return f"**{_plain(results.title)}**: {_plain(', '.join(facts))}\n\n{_markdown_table(Table('', '', head, rows))}\n"


def differences(*studies: Results, one_student: bool = False) -> str:
    """One Markdown table of several studies: each one's first row, and what others have more on each list of images.

    one_student: the mean of the two students' scores, in the place of the ensemble's.
    """
    name, of = _judged(one_student)
    splits = [split for split in ("val", *SPLITS) if any(split in ("val", *study.splits) for study in studies)]
    rows = []
    for study in studies:
        facts = [study.title, *(str(study.facts.get(key, "-")) for key in ("labeled", "step"))]
        there = [study if split == "val" else study.on(split) for split in splits]
        for index, label in enumerate(_short_labels(study)):
            if index == 0:
                cells = [spread(list(on.rows[0].values(of).values()), nothing="-") for on in there]
            else:
                cells = [_signed(on.rows[index].differences(on.rows[0], of)) for on in there]
            rows.append([*facts, label, *cells])
    return _markdown_table(Table("", "", ["study", "labeled", "step", f"setting; {name} %", *splits], rows)) + "\n"


def only_rows(studies: Sequence[Results], labels: Sequence[str]) -> list[Results]:
    """The studies with the rows of these labels, as tables show them, in this order; with no label as they are.

    Raises UserError for a label that no study has, and where one has not the first, which others are compared with.
    """
    there = [dict(zip(_short_labels(study), study.rows, strict=True)) for study in studies]
    for label in labels:
        if not any(label in rows for rows in there):
            known = ", ".join(f'"{one}"' for one in dict.fromkeys(one for rows in there for one in rows))
            raise UserError(f'--rows "{label}": no such row; there are {known}')
    for study, rows in zip(studies, there, strict=True):
        if labels and labels[0] not in rows:
            raise UserError(f'--rows "{labels[0]}": not in {study.title}; the first row must be in every study')
    chosen = [[rows[label] for label in labels or rows if label in rows] for rows in there]
    return [replace(study, rows=rows) for study, rows in zip(studies, chosen, strict=True)]


def _short_labels(results: Results) -> list[str]:
    """The rows' labels with the last names of their keys, where those tell them apart."""
    labels, key = [row.label for row in results.rows], re.compile(r"[\w.]+(?==)")
    last = {found: found.rpartition(".")[2] for label in labels for found in key.findall(label)}
    names = Counter(last.values())
    return [
        key.sub(lambda match: last[match[0]] if names[last[match[0]]] == 1 else match[0], label) for label in labels
    ]


def _judged(one_student: bool) -> tuple[str, Measure]:
    """What a table is of, in words, and how it is found."""
    if one_student:
        return "one student, mIoU", lambda record: record.student
    return "mIoU", lambda record: record.ensemble


def _signed(found: Mapping[int, float]) -> str:
    """The mean over the seeds, and each seed's where there are several, as +1.2 (+2.0, +0.4)."""
    if not found:
        return "-"
    numbers = [statistics.mean(found.values()), *(found[seed] for seed in sorted(found))]
    mean, *each = (f"{round(number, 1) + 0.0:+.1f}" for number in numbers)  # no -0.0
    return f"{mean} ({', '.join(each)})" if len(found) > 1 else mean


def _what_is_measured(split: str) -> str:
    return {
        "test": "The same checkpoints, each evaluated once.",
        "unlabeled": "The same checkpoints on the unlabeled training images, against the labels hidden from training.",
        "labeled": "The same checkpoints on the labeled training images.",
    }[split]


def _class_table(results: Results, split: str = "val") -> Table:
    measures: dict[str, Measure] = {label: partial(Record.class_iou, label=label) for label in results.class_names}
    means: dict[str, Measure] = {
        "pixel accuracy": Record.pixel_accuracy,
        "mean recall": Record.mean_recall,
        "mean precision": Record.mean_precision,
    }
    measures |= {name: of for name, of in means.items() if any(row.values(of) for row in results.rows)}
    rows = [[label, *(_mean_and_difference(row, results.rows[0], of) for row in results.rows)]
            for label, of in measures.items()]  # fmt: skip
    note = (
        "Of the ensemble in percent, mean over seeds (in brackets: the mean difference to the first row, same seeds); "
        "- where a class is in no label and no prediction. Recall: the share of a class's pixels that is found; "
        "precision: the share that is right of what is called so."
    )
    title = "IoU of each class" + (f" on {split}" if split != "val" else "")
    return Table(title, note, ["class", *(row.label for row in results.rows)], rows)


def _mean_and_difference(row: Row, reference: Row, of: Measure) -> str:
    found, differences = row.values(of), row.differences(reference, of)
    if not found:
        return "-"
    difference = f" ({statistics.mean(differences.values()):+.1f})" if differences and row is not reference else ""
    return f"{statistics.mean(found.values()):.1f}{difference}"


def _signals_table(results: Results) -> Table:
    """What the runs logged of their unlabeled terms near the end."""
    shares: dict[str, Measure] = {title: partial(Record.late, keys=keys) for title, keys in SIGNALS.items()}
    shares |= {f"gradient of {term}, in % of supervised": partial(Record.gradient, term=term) for term in TERMS[1:]}
    rows = []
    for title, share in shares.items():
        found = [list(row.values(_in_percent(share)).values()) for row in results.rows]
        if any(found):
            rows.append([title, *(f"{statistics.mean(values):.1f}" if values else "-" for values in found)])
    note = (
        "In percent, mean of what the log holds of the last tenth of the steps, both students and all seeds. "
        "Gradients: norms at the networks' outputs, with the terms' weights."
    )
    return Table("Signals", note, ["signal", *(row.label for row in results.rows)], rows)


def _in_percent(share: Measure) -> Measure:
    def measure(record: Record) -> float | None:
        found = share(record)
        return None if found is None else 100 * found

    return measure


def _runs_table(results: Results) -> Table:
    rows = [[record.label, str(record.seed), _state(record), record.name] for record in results.records]
    return Table("Runs", "", ["setting", "seed", "state", "folder"], rows, numbers=False)


def _state(record: Record) -> str:
    return "; ".join([record.state, *(f"on {split}: {failure}" for split, failure in record.failures.items())])


def _cost_table(results: Results) -> Table:
    rows = [
        [
            record.label,
            str(record.seed),
            _number(record.seconds_per_step(), ".3f"),
            _number(record.hours(), ".2f"),
            _number(record.memory(), ".2f"),
        ]
        for record in results.records
        if record.result is not None
    ]
    note = (
        "Hours: the median of the logged seconds a step, times the number of steps. GiB: the largest memory logged. "
        "- where the log does not say."
    )
    return Table("Time and memory", note, ["setting", "seed", "seconds a step", "hours", "GiB"], rows)


def _commands(results: Results) -> list[tuple[str, str]]:
    """What each command made, and the command."""
    runs = [(f"{record.label}, seed {record.seed}", record.command) for record in results.records]
    return [*(("this report", command) for command in results.commands), *runs]


def _warning(results: Results) -> str:
    """What is not in the numbers; empty if nothing is missing."""
    missing = [_named(record, record.state) for record in results.missing]
    told = [f"{len(missing)} of {len(results.records)} runs are not in the numbers: {', '.join(missing)}."]
    failures = [(record, split) for record in results.records for split in record.failures]
    unmeasured = [_named(record, f"on {split} {record.failures[split]}") for record, split in failures]
    return " ".join((told if missing else []) + ([f"Not measured: {', '.join(unmeasured)}."] if unmeasured else []))


def _named(record: Record, state: str) -> str:
    return f"{record.label} with seed {record.seed} ({state.partition(':')[0]})"


def _facts(results: Results) -> str:
    return ", ".join(f"{key} {value}" for key, value in results.facts.items())


# ------------------------------------------------------------------------------------------------ Markdown


def as_markdown(results: Results, pictures: dict[str, Picture]) -> str:
    """The report as GitHub shows it; pictures are files beside it."""
    parts = [
        f"# {_plain(results.title)}",
        *(f"`{command}`" for command in results.commands),
        _plain(_facts(results)),
        _plain(_warning(results)),
    ]
    for table in tables(results):
        parts += [f"## {table.title}", table.note, _markdown_table(table)]
        if table.title == "Results":
            parts += [f"![{picture.title}]({name}.png)" for name, picture in pictures.items()]
    commands = "\n".join(f"# {what}\n{command}\n" for what, command in _commands(results))
    parts += ["## Commands", f"```\n{commands}```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return text.replace("*", "\\*").replace("`", "\\`")


# ------------------------------------------------------------------------------------------------ HTML

CSS = """
:root { color-scheme: light dark; --page: #fff; --ink: #1d2228; --soft: #5b6570; --line: #d5dae0; --band: #f3f5f7;
  --warn: #fff3d6; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --ink: #e4e8ec; --soft: #9aa5b0; --line: #353c44;
  --band: #1e2328; --warn: #41351a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 1100px; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p { margin: .4rem 0 .8rem; max-width: 75ch; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.warning { background: var(--warn); padding: .6rem .8rem; border-radius: 6px; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { vertical-align: bottom; text-wrap: balance; border-bottom: 2px solid var(--line); }
tbody th { font-weight: 500; min-width: 9rem; overflow-wrap: anywhere; }
tbody tr:nth-child(even) { background: var(--band); }
table.numbers th + th, table.numbers td { text-align: right; }
table.numbers td { white-space: nowrap; }
table.numbers td.list { white-space: normal; min-width: 11rem; text-wrap: balance; }
figure { margin: 1rem 0 1.6rem; max-width: 760px; }
svg.picture { display: block; width: 100%; height: auto; color: var(--ink); }
dl { display: flex; flex-wrap: wrap; gap: .5rem 1.8rem; margin: .8rem 0; font-size: .9rem; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; overflow-wrap: anywhere; }
pre { margin: .2rem 0 .9rem; padding: .6rem .8rem; background: var(--band); border-radius: 6px; font-size: .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
pre span { display: inline-block; max-width: 100%; }
@media (max-width: 600px) { table { font-size: .8rem; } th, td { padding: .25rem .4rem; }
  tbody th { min-width: 6rem; } td.list { min-width: 9rem; } }
"""


def as_html(results: Results, pictures: dict[str, Picture]) -> str:
    """One page with everything in it; nothing is fetched from anywhere."""
    title = escape(results.title)
    facts = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in results.facts.items()
    )
    warning = _warning(results)
    body = [f"<h1>{title}</h1>", f"<dl>{facts}</dl>" if facts else ""]
    body += [f'<p class="warning">{escape(warning)}</p>'] if warning else []
    for table in tables(results):
        body.append(_html_table(table))
        body += [_html_figure(picture) for picture in pictures.values()] if table.title == "Results" else []
    body.append("<h2>Commands</h2>")
    body += [
        f'<div class="soft">{escape(what)}</div><pre>{_html_command(command)}</pre>'
        for what, command in _commands(results)
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, body))
        + "\n</body>\n</html>\n"
    )


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = []
    for first, *others in table.rows:
        cells = "".join(f"<td{_css_class(cell)}>{escape(cell)}</td>" for cell in others)
        rows.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    note = f'<p class="soft">{escape(table.note)}</p>\n' if table.note else ""
    kind = ' class="numbers"' if table.numbers else ""
    body = "\n".join(rows)
    return (
        f'<h2>{escape(table.title)}</h2>\n{note}<div class="wide" tabindex="0">'
        f"<table{kind}>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _html_command(command: str) -> str:
    """A command that is broken into lines between its arguments, as long as they are not longer than a line."""
    return " ".join(f"<span>{escape(shlex.quote(part))}</span>" for part in shlex.split(command))


def _css_class(cell: str) -> str:
    """Cells that hold a list may be broken into lines, but not into single words."""
    return ' class="list"' if ", " in cell else ""


def _html_figure(picture: Picture) -> str:
    caption = f"<figcaption>{escape(picture.title)}</figcaption>"
    return f'<figure><div class="wide" tabindex="0">{picture.svg}</div>{caption}</figure>'


# ------------------------------------------------------------------------------------------------ numbers


def spread(values: Sequence[float], nothing: str = "no result") -> str:
    """Mean ± sample standard deviation; of one value itself."""
    if not values:
        return nothing
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def _difference(row: Row, reference: Row, of: Measure) -> str:
    """+7.2; with the number of seeds where not all finished runs have a partner."""
    found = row.differences(reference, of)
    if not found:
        return "-"
    partners = "" if len(found) == len(row.done) else f" ({len(found)} of {len(row.done)} seeds)"
    return f"{statistics.mean(found.values()):+.1f}{partners}"


def _each(row: Row, what: str, seeds: Sequence[int]) -> str:
    """Every seed's number, or why there is none."""
    records = {record.seed: record for record in row.records}
    return ", ".join(_score(records.get(seed), what) for seed in seeds)


def _score(record: Record | None, what: str) -> str:
    if record is None:
        return "-"
    return record.state.partition(",")[0] if record.result is None else f"{getattr(record, what):.1f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
