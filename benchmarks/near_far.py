"""Do unlabeled images gain that look like a labeled one, or those that do not? For frames of drives, as CamVid's.

python3 -m benchmarks.near_far lists LABELED.txt UNLABELED.txt FOLDER writes near.txt and far.txt: the unlabeled frames
at most 30 frames from a labeled one of the same drive, and those more than 60 from all. Each is evaluated by
evaluateSSL.py --split unlabeled --set dataset.unlabeled=FOLDER/near.txt --output RESULTS/STUDY/ROW-seed=0-near
(absolute path). python3 -m benchmarks.near_far table RESULTS prints what these evaluations found.
"""

import argparse
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

from data.splits import read_ids
from utils.errors import UserError, run_script
from utils.study import PRESETS

NEAR, FAR = 30, 60  # frames; CamVid's training images are 30 apart, a second


def distances(labeled: list[str], unlabeled: list[str]) -> dict[str, float]:
    """id of an unlabeled frame -> frames to the closest labeled one of its drive, inf where there is none.

    ids: DRIVE_NUMBER with any letters around the digits of the number. Raises UserError for others.
    """
    labeled_frames = defaultdict(list)
    for drive, frame in map(_place, labeled):
        labeled_frames[drive].append(frame)
    return {
        one: min((abs(frame - other) for other in labeled_frames[drive]), default=float("inf"))
        for one, (drive, frame) in zip(unlabeled, map(_place, unlabeled), strict=True)
    }


def write_lists(labeled: Path, unlabeled: Path, folder: Path) -> str:
    found = distances(read_ids(labeled), read_ids(unlabeled))
    near = [one for one, distance in found.items() if distance <= NEAR]
    far = [one for one, distance in found.items() if distance > FAR]
    folder.mkdir(parents=True, exist_ok=True)
    for name, ids in (("near", near), ("far", far)):
        (folder / f"{name}.txt").write_text("".join(f"{one}\n" for one in ids), encoding="utf-8")
    return f"{folder}: {len(near)} near, {len(far)} far, of {len(found)}"


def table(folder: Path) -> str:
    """Markdown: mIoU of the ensemble on near and far images, and in brackets each seed's difference to supervised."""
    labels = {re.sub(r"\W+", "_", label).strip("_"): label for label in PRESETS["paper"]}  # by the names of folders
    order = list(labels)
    # (labeled, study, row) -> near or far -> seed -> %
    scores: dict[tuple[int, str, str], dict[str, dict[int, float]]] = {}
    for path in sorted(folder.glob("*/*/result.json")):
        match = re.fullmatch(r"(.+)-seed=(\d+)-(near|far)", path.parent.name)
        if match is None or match[1].split("-")[0] not in labels:
            raise UserError(f"{path.parent}: expected a name such as supervised-seed=0-near")
        result = json.loads(path.read_text(encoding="utf-8"))
        found = scores.setdefault((result["labeled"], path.parent.parent.name, match[1]), {"near": {}, "far": {}})
        found[match[3]][int(match[2])] = 100 * result["models"]["ensemble"]["mean_iou"]
    if not scores:
        raise UserError(f"{folder}: no evaluation here; expected STUDY/ROW-seed=0-near/result.json")
    lines = ["| study | labeled | setting | near, mIoU % | far, mIoU % |", "| --- | --- | --- | --- | --- |"]
    for labeled, study, row in sorted(scores, key=lambda one: (*one[:2], order.index(one[2].split("-")[0]), one[2])):
        base = scores.get((labeled, study, "supervised"), {"near": {}, "far": {}})
        cells = []
        for place, own in scores[labeled, study, row].items():
            gains = ", ".join(
                f"{own[seed] - base[place][seed]:+.1f}" for seed in sorted(own.keys() & base[place].keys())
            )
            text = f"{statistics.mean(own.values()):.1f}" if own else "-"
            cells.append(text if row == "supervised" or not gains else f"{text} ({gains})")
        name, *settings = row.split("-")
        lines.append(f"| {study} | {labeled} | {', '.join([labels[name], *settings])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _place(identifier: str) -> tuple[str, int]:
    drive, _, frame = identifier.rpartition("_")
    digits = re.sub(r"\D", "", frame)
    if not drive or not digits:
        raise UserError(f"id {identifier}: expected DRIVE_NUMBER, as CamVid's 0001TP_006690")
    return drive, int(digits)


def main() -> int:
    parser = argparse.ArgumentParser(description="Unlabeled frames near a labeled one and far from all, each scored.")
    commands = parser.add_subparsers(dest="command", required=True)
    lists = commands.add_parser("lists", help="write near.txt and far.txt")
    for name in ("labeled", "unlabeled", "folder"):
        lists.add_argument(name, type=Path)
    commands.add_parser("table", help="print what evaluations found").add_argument("folder", type=Path)
    args = parser.parse_args()
    print(table(args.folder) if args.command == "table" else write_lists(args.labeled, args.unlabeled, args.folder))
    return 0


if __name__ == "__main__":
    run_script(main)
