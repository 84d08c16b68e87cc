"""Evaluate a checkpoint: python3 evaluateSSL.py --model-path CHECKPOINT."""

import json
import sys

from utils.cli import data_overrides, evaluation_parser
from utils.config import override_config
from utils.errors import CheckpointError, UserError, run_script


def main() -> int:
    args = evaluation_parser().parse_args()

    from torch import Tensor
    from tqdm import tqdm

    from data import DatasetFiles, evaluation_loader
    from model import CrossTeacher, build_networks
    from utils.checkpoint import load_checkpoint, resolve_checkpoint
    from utils.evaluate import evaluate
    from utils.logger import print_result
    from utils.run import choose_device, code_version
    from utils.visualize import write_label

    path = resolve_checkpoint(args.model_path)
    state = load_checkpoint(path)
    config = override_config(json.loads(state["config"]), data_overrides(args), source=str(path))
    if args.protocol == "release" and config.data.release_protocol is None:
        raise UserError(
            f'--protocol release: dataset {config.data.name} defines none (dataset.release_protocol); use "original"'
        )
    device = choose_device("auto" if args.gpu is None else "cpu" if args.gpu == -1 else f"cuda:{args.gpu}")
    files = DatasetFiles(config)
    files.check_files(args.split, labels=True)
    method = CrossTeacher(build_networks(config), config, labeled_samples=1)
    try:
        method.load_state_dict(state["method"])
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path}: does not fit the model of its own configuration: {str(error)[:300]}") from None
    output = args.output or path.parent / f"evaluation-{args.split}-{args.protocol}"
    output.mkdir(parents=True, exist_ok=True)

    def save(identifier: str, prediction: Tensor) -> None:
        write_label(output / "images" / f"{identifier}.png", prediction.numpy(), config.data.palette)

    loader = evaluation_loader(files, args.split, protocol=args.protocol)
    about = {"protocol": args.protocol, "step": state["step"], "seed": config.seed, "commit": code_version()}
    evaluation = evaluate(
        method.to(device).models(),
        tqdm(loader, unit="batch"),
        class_names=config.data.class_names,
        device=device,
        pad=config.release_pad(args.protocol),
        about=files.about(args.split) | state["facts"] | about | {"checkpoint": str(path)},
        on_prediction=save if args.save_output_images else None,
    )
    (output / "result.json").write_text(json.dumps(evaluation.as_dict(), indent=1) + "\n", encoding="utf-8")
    (output / "result.txt").write_text(evaluation.as_text(), encoding="utf-8")
    print_result(evaluation, path, again=["evaluateSSL.py", *sys.argv[1:]])
    print(f"results             {output}")
    return 0


if __name__ == "__main__":
    run_script(main)
