"""Segment photographs: python3 predict.py CHECKPOINT|FILE.onnx INPUT OUTPUT."""

import sys

from utils.cli import prediction_device, prediction_parser
from utils.errors import UserError, run_script


def main() -> int:
    args = prediction_parser().parse_args()
    wanted = prediction_device(args)

    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    from data.decode import read_image
    from data.photos import as_trained, find_photos, place_inside
    from model import load_for_prediction
    from utils.checkpoint import resolve_checkpoint
    from utils.evaluate import choose_model
    from utils.inference import predict_photo, prediction_inference
    from utils.run import check_output, choose_device
    from utils.visualize import draw_overlay, write_label

    device = choose_device(wanted)
    check_output(args.output)
    photos = find_photos(args.input, output=args.output)
    path = resolve_checkpoint(args.checkpoint)
    networks, data = load_for_prediction(path)
    model = choose_model(networks, args.model)
    inference = prediction_inference(args.window, scales=tuple(args.scales), flip=args.flip)
    if args.label_ids and data.label_ids is None:
        raise UserError(f"--label-ids: in dataset {data.name} the ids are the classes; leave it out")
    for network in networks.values():
        network.to(device).eval()
    palette, damaged = data.palette, []
    for photo in tqdm(photos, unit="image"):
        try:
            image = read_image(photo.path, upright=True)
        except UserError as error:
            damaged.append(str(error))
            continue
        seen = as_trained(image, data.resize)
        size = (image.shape[0], image.shape[1])
        label, confidence = predict_photo(networks, seen, size, model=model, inference=inference, device=device)
        written = np.array(data.label_ids, dtype=np.uint8)[label] if args.label_ids else label
        write_label(place_inside(args.output, f"labels/{photo.name}.png"), written, None if args.label_ids else palette)
        if not args.no_overlays:
            overlay = draw_overlay(image, label, class_names=data.class_names, palette=palette)
            overlay.save(place_inside(args.output, f"overlays/{photo.name}.png"))
        if args.confidence:
            gray = Image.fromarray(np.rint(255 * confidence).astype(np.uint8))
            gray.save(place_inside(args.output, f"confidence/{photo.name}.png"))
    print(f"{len(photos) - len(damaged)} of {len(photos)} images segmented by {model} of {path}: {args.output}")
    for message in damaged:
        print(f"error: {message}", file=sys.stderr)
    return UserError.exit_status if damaged else 0


if __name__ == "__main__":
    run_script(main)
