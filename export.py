"""Write a checkpoint's model as .pt2 and ONNX file: python3 export.py CHECKPOINT OUTPUT."""

from utils.cli import export_formats, export_parser, export_targets
from utils.errors import UserError, run_script


def main() -> int:
    args = export_parser().parse_args()
    formats = export_formats(args)
    if args.image and not args.image.is_file():
        raise UserError(f"--image {args.image}: no such file; leave it out to compare on a drawn picture")

    from data.decode import read_image
    from data.demo import draw_example
    from model import load_trained
    from model.export import chosen, comparison_table, pictures_to_compare, require_formats, write_and_compare
    from model.exported import describe
    from utils.checkpoint import resolve_checkpoint
    from utils.evaluate import choose_model

    require_formats(formats)
    picture = read_image(args.image) if args.image else draw_example(seed=0, split="val", index=0, size=(240, 321))[0]
    images = pictures_to_compare(picture)
    path = resolve_checkpoint(args.checkpoint)
    networks, config, trained = load_trained(path)
    model = choose_model(networks, args.model)
    for network in networks.values():
        network.eval()
    normalizations = [network.normalization for network in chosen(networks, model)]
    about = describe(config, model, normalizations, training=trained)
    targets = export_targets(args, formats, model)
    rows = write_and_compare(networks, targets, about=about, images=images)
    print(f"{model} of {path}, compared on {args.image or 'a drawn picture (of the demo dataset)'}, on the CPU:")
    print(comparison_table(rows))
    for target in targets.values():
        print(f"written             {target}")
    return 0


if __name__ == "__main__":
    run_script(main)
