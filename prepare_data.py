"""Make and prepare datasets: python3 prepare_data.py demo datasets/demo."""

import argparse
from pathlib import Path

from utils.errors import run_script


def main() -> int:
    parser = argparse.ArgumentParser(description="Make and prepare datasets.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="generate the demo dataset")
    demo.add_argument(
        "root",
        type=Path,
        help="folder to make; left as it is if it holds this dataset, made again if it is another or damaged one",
    )
    demo.add_argument(
        "--seed",
        type=int,
        choices=range(1000),
        default=0,
        metavar="0..999",
        help="of everything that is drawn, default 0",
    )
    args = parser.parse_args()

    from data.demo import make_demo_dataset

    print(f"demo dataset: {make_demo_dataset(args.root, seed=args.seed)}")
    return 0


if __name__ == "__main__":
    run_script(main)
