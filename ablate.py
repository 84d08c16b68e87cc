"""A grid of settings over several seeds, one report: python3 ablate.py --config CONFIG --name NAME --grid KEY=A,B."""

import argparse
import sys
from pathlib import Path

from utils.cli import ablation_parser, comparison_parser, keeping_parser, overview_parser
from utils.errors import run_script
from utils.study import PRESETS, SPLITS, check_lists, plan_study, script_command


def main() -> int:
    match sys.argv[1:]:
        case ["report", *rest]:
            return compare(comparison_parser().parse_args(rest))
        case ["keep", *rest]:
            return keep(keeping_parser().parse_args(rest))
        case ["overview", *rest]:
            return show_overview(overview_parser().parse_args(rest))
    return run(ablation_parser(PRESETS, SPLITS).parse_args())


def run(args: argparse.Namespace) -> int:
    """Run or resume the study, and report."""
    study = plan_study(args)

    # Only now what takes seconds to import: a wrong key or --help is answered at once.
    from data import DatasetFiles
    from utils.run import check_request
    from utils.study_run import Runner, begun_message, check_places, describe_plan, stopped_message

    if args.measure:
        check_lists(study, DatasetFiles(study.jobs[0].config))  # all rows have the same lists
    places = check_places(args.devices, args.jobs)
    for device in args.devices or ["cpu"]:
        check_request(name=args.name, resume=None, device=device)
    if args.dry_run:
        for line in describe_plan(study, places):
            print(line, flush=True)
        return 0
    print(begun_message(study))
    runner = Runner(study, places, say=lambda line: print(line, flush=True))
    runner.run()
    if runner.stop_signal is not None:
        print(stopped_message(study), file=sys.stderr)
        return 128 + runner.stop_signal
    report([study.folder], study.folder, study.command)
    print(*(f"failed: {job.folder / 'output.txt'}\n" for job in runner.failed), sep="", end="", file=sys.stderr)
    return 1 if runner.failed else 0


def compare(args: argparse.Namespace) -> int:
    """Report on runs that are there."""
    is_study = len(args.runs) == 1 and (args.runs[0] / "study.json").is_file()
    output = args.output or (args.runs[0] if is_study else Path("report"))
    report(args.runs, output, [*script_command("ablate.py"), *sys.argv[1:]])
    return 0


def keep(args: argparse.Namespace) -> int:
    from utils.study_keep import keep_study

    keep_study(args.study, args.output)
    print(f"kept in {args.output}")
    return 0


def show_overview(args: argparse.Namespace) -> int:
    from utils.study_report import differences, only_rows, overview
    from utils.study_results import results_of_study

    studies = only_rows([results_of_study(study) for study in args.studies], args.rows)
    print((differences if args.differences else overview)(*studies, one_student=args.student), end="")
    return 0


def report(runs: list[Path], output: Path, command: list[str] | tuple[str, ...]) -> None:
    """Write the report and print its table."""
    from utils.study_report import results_text, write_report
    from utils.study_results import results_of_folders

    results = results_of_folders(runs, command)
    write_report(results, output)
    print(f"\n{results_text(results)}\nwritten to {output / 'report.md'} and {output / 'report.html'}")


if __name__ == "__main__":
    run_script(main)
