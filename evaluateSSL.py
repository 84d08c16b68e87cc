"""Evaluate a checkpoint, ours or the authors' release's: python3 evaluateSSL.py --model-path CHECKPOINT."""

import sys
from contextlib import suppress

from utils.cli import data_overrides, device_of, evaluation_folder, evaluation_parser
from utils.errors import UserError, run_script


def main() -> int:
    args = evaluation_parser().parse_args()

    from torch import Tensor
    from tqdm import tqdm

    from data import DatasetFiles, evaluation_loader
    from model import load_trained
    from utils.checkpoint import resolve_checkpoint
    from utils.evaluate import choose_models, evaluate, refuse_other_images
    from utils.inference import inference_for
    from utils.logger import print_result
    from utils.run import check_output, choose_device, origin_of
    from utils.visualize import save_confusion, write_label

    device = choose_device(device_of(args.gpu))
    path = resolve_checkpoint(args.model_path)
    networks, config, trained = load_trained(path, overrides=data_overrides(args))
    models = choose_models(networks, args.models)
    inference = inference_for(config, args.protocol, scales=tuple(args.scales), flip=args.flip)
    files = DatasetFiles(config)
    files.check_files(args.split, labels=True)
    if args.split in ("val", "test"):
        with suppress(UserError):  # the training lists need not be here
            files.warn_of_trained_images(args.split)
    output = args.output or path.parent / evaluation_folder(args, path)
    if args.output is None:
        refuse_other_images(output, files.split_hash(args.split), files.root)
    elif (output / "log.jsonl").exists():
        raise UserError(f"--output {output}: is a run's folder, whose own result would be replaced; choose another")
    check_output(output)
    output.mkdir(parents=True, exist_ok=True)

    def save(identifier: str, prediction: Tensor) -> None:
        write_label(output / "images" / f"{identifier}.png", prediction.numpy(), config.data.palette)

    about = {"protocol": args.protocol, **inference.about(), **origin_of(device, trained), "checkpoint": str(path)}
    evaluation = evaluate(
        {name: network.to(device) for name, network in networks.items()},
        tqdm(evaluation_loader(files, args.split, protocol=args.protocol), unit="batch"),
        class_names=config.data.class_names,
        device=device,
        inference=inference,
        about=files.about(args.split) | trained | about,
        models=models,
        on_prediction=save if args.save_output_images else None,
    )
    evaluation.write(output, root=str(files.root))
    save_confusion(
        output / "confusion.png",
        evaluation.confusion[evaluation.main].matrix.numpy(),
        class_names=evaluation.class_names,
        title=f"{config.data.name} {args.split}, {args.protocol}, {evaluation.main}: % of each true class's pixels",
    )
    print_result(evaluation, path, again=["evaluateSSL.py", *sys.argv[1:]])
    print(f"results             {output}")
    return 0


if __name__ == "__main__":
    run_script(main)
