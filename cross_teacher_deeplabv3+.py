"""Train DeepLabv3+ with Cross Teacher Training: python3 'cross_teacher_deeplabv3+.py' --config CONFIG --name NAME."""

from pathlib import Path

from utils.cli import training_overrides, training_parser
from utils.config import for_network, load_config
from utils.errors import run_script

NETWORK = "DeepLabv3+"


def main() -> int:
    args = training_parser(NETWORK).parse_args()
    config = for_network(load_config(args.config, overrides=training_overrides(args)), NETWORK)

    # Only now what takes seconds to import: a wrong key or --help is answered at once.
    from data import DatasetFiles, evaluation_loader, preview_batch, training_loader
    from model import CrossTeacher, build_students
    from utils.evaluate import Evaluation, evaluate
    from utils.inference import inference_for
    from utils.logger import print_result
    from utils.run import check_request, code_version, start_run
    from utils.trainer import Trainer, build_optimizer
    from utils.visualize import save_picture

    check_request(name=args.name, resume=args.resume, device=args.device)
    files = DatasetFiles(config)
    files.check_for_training()
    facts = files.about_labeled()
    students = build_students(config)
    run = start_run(config, name=args.name, resume=args.resume, device=args.device)
    method = CrossTeacher(students, config, labeled_samples=len(files.ids("labeled"))).to(run.device)
    protocol, commit = config.utils.val_protocol, code_version()

    def validate(step: int) -> Evaluation:
        return evaluate(
            method.models(),
            evaluation_loader(files, "val", protocol=protocol),
            class_names=files.block.class_names,
            device=run.device,
            inference=inference_for(config, protocol),
            about=files.about("val")
            | facts
            | {"protocol": protocol, "step": step, "seed": config.seed, "commit": commit},
        )

    def picture(path: Path, step: int) -> None:
        batch = preview_batch(files).to(run.device)
        columns = method.preview(batch, step=step)
        save_picture(
            path,
            {"input": columns.pop("input"), "truth": batch.labels, **columns},
            title=f"{args.name}, step {step}: validation images treated as unlabeled ones",
            class_names=files.block.class_names,
            palette=files.block.palette,
            ignore_label=config.ignore_label,
        )

    trainer = Trainer(
        method,
        build_optimizer(students, config),
        lambda stream, start: training_loader(files, stream, start_step=start),
        run,
        config=config,
        evaluate=validate,
        picture=picture,
        facts=facts,
        images_folder=args.save_images,
    )
    evaluation = trainer.fit()
    if evaluation is None:
        return 128 + (run.stop_signal or 0)
    last = run.folder / "checkpoint.pth"
    print_result(evaluation, last, again=["evaluateSSL.py", "--model-path", str(last), "--protocol", protocol])
    return 0


if __name__ == "__main__":
    run_script(main)
