"""Train DeepLabv2 with Cross Teacher Training: python3 cross_teacher_contr.py --config CONFIG --name NAME."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import training_overrides, training_parser
from utils.config import Config, for_network, load_config
from utils.errors import run_script

if TYPE_CHECKING:
    from utils.distributed import World


def main(network: str = "DeepLab") -> int:
    args = training_parser(network).parse_args()
    config = for_network(load_config(args.config, overrides=training_overrides(args)), network)

    # Only now what takes seconds to import: a wrong key or --help is answered at once.
    from utils.distributed import launch, process_group, world
    from utils.run import check_request

    folders = [config.utils.checkpoint_dir, args.save_images]
    check_request(name=args.name, resume=args.resume, device=args.device, processes=args.gpus, folders=folders)
    if args.gpus > 1 and world().size == 1:
        return launch(args.gpus, config)
    with process_group(args.device, timeout=config.training.process_timeout) as here:
        return train(args, config, here)


def train(args: Namespace, config: Config, here: "World", *, make: Any = None, **more: str) -> int:
    """A process's share of the run. make: something else than CrossTeacher; more: facts that its results tell."""
    from data import DatasetFiles, evaluation_loader, preview_batch, training_loader
    from model import CrossTeacher, build_networks, build_students
    from utils.distributed import one_after_another
    from utils.evaluate import Evaluation, evaluate
    from utils.inference import inference_for
    from utils.logger import print_result
    from utils.rehearsal import rehearse
    from utils.run import path_to_continue, start_run
    from utils.trainer import Trainer, build_optimizer
    from utils.visualize import save_pictures

    with one_after_another(here):  # what is wrong is said once; one downloads the weights, the others find them
        files, protocol = DatasetFiles(config), config.utils.val_protocol
        if here.is_first:
            files.check_for_training()
        students = (build_networks if path_to_continue(config, args.name, args.resume) else build_students)(config)
    facts = files.about_labeled() | files.about_unlabeled() | more
    run = start_run(config, name=args.name, resume=args.resume, device=args.device, here=here, dry=args.dry_run)
    make = make or CrossTeacher
    shares = files.class_shares() if config.training.needs_class_shares else None
    method = make(students, config, labeled_samples=len(files.ids("labeled")), class_shares=shares).to(run.device)
    about = files.about("val") | facts | {"protocol": protocol, "seed": config.seed} | run.origin

    def validate(step: int, through: Any = iter, *, first: int | None = None) -> Evaluation:
        loader = through(evaluation_loader(files, "val", protocol=protocol, here=here, first=first))
        how, names = inference_for(config, protocol), files.block.class_names
        told = about | {"step": step}
        return evaluate(method.models(), loader, class_names=names, device=run.device, inference=how, about=told)

    def picture(path: Path, step: int) -> list[Path]:
        batch = preview_batch(files).to(run.device)
        previews = [method.preview(batch, own=own, step=step) for own in (0, 1)]  # in every process, see SyncBatchNorm
        title = f"{args.name}, step {step}: val, as if unlabeled"
        return save_pictures(path, previews, truth=batch.labels, title=title, config=config) if here.is_first else []

    trainer = Trainer(
        method,
        build_optimizer(students, config),
        lambda stream, start: training_loader(files, stream, start_step=start, here=here, pin=run.on_gpu),
        run,
        config=config,
        evaluate=validate,
        picture=picture,
        facts=facts,
        images_folder=args.save_images,
        here=here,
    )
    if args.dry_run:
        return rehearse(trainer, images=len(files.ids("val")), evaluate_first=lambda count: validate(0, first=count))
    evaluation = trainer.fit()
    if evaluation is not None and here.is_first:
        last = run.folder / "checkpoint.pth"
        print_result(evaluation, last, again=["evaluateSSL.py", "-m", str(last), "--protocol", protocol])
    return 128 + (trainer.stop_signal or 0) if evaluation is None else 0


if __name__ == "__main__":
    run_script(main)
