"""What right pseudo-labels would give: python3 -m benchmarks.ceiling --pseudo-labels truth --config FILE --name NAME.

An ordinary run, but that no wrong pseudo-label is taught. That takes the hidden labels of the unlabeled images, so it
is no semi-supervised learning: it tells how much a better teacher could give. Its results say `pseudo_labels`, and no
other command continues its checkpoints.

truth: every pseudo-label is the hidden label, of probability 1.
right: the pseudo-labels are the teachers' own, on the pixels where both are right; the others count as padding.
"""

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from cross_teacher_contr import train
from model import CrossTeacher
from model.cross_teacher import PEERS, Losses
from utils.batch import Batch
from utils.cli import training_overrides, training_parser
from utils.config import load_config
from utils.distributed import process_group
from utils.errors import UserError, run_script
from utils.run import check_request

KINDS = ("truth", "right")


def main() -> int:
    parser = training_parser("pseudo-labels that are right")
    parser.add_argument("--pseudo-labels", choices=KINDS, required=True, help="see the top of benchmarks/ceiling.py")
    args = parser.parse_args()
    config = load_config(args.config, overrides=training_overrides(args))
    if args.gpus > 1:
        raise UserError("--gpus: this benchmark runs in one process")
    if not config.training.unlabeled.mask_padding:
        raise UserError("training.unlabeled.mask_padding is false: pixels could not be left out, which takes true")
    check_request(name=args.name, resume=args.resume, device=args.device, processes=1)
    with process_group(args.device, timeout=config.training.process_timeout) as here:
        make = partial(RightlyTaught, kind=args.pseudo_labels)
        return train(args, config, here, make=make, pseudo_labels=args.pseudo_labels)


class RightlyTaught(CrossTeacher):
    """Cross Teacher Training whose pseudo-labels hold no mistake; all else is the paper's."""

    def __init__(self, *args: Any, kind: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.kind, self.targets = kind, dict[int, Tensor]()

    def training_step(self, labeled: Batch, unlabeled: Batch | None, *, step: int, part: int = 0) -> Losses:
        if unlabeled is not None and self.active_terms(step) != ["supervised"]:
            unlabeled = self.correct(unlabeled)
        return super().training_step(labeled, unlabeled, step=step, part=part)

    def correct(self, unlabeled: Batch) -> Batch:
        """Keeps the targets for ``predict_target``, and leaves as valid what is to be taught."""
        if unlabeled.hidden is None:
            raise UserError("the unlabeled images have no label maps, or training.data.hidden_labels is false")
        taught = unlabeled.valid & (unlabeled.hidden != self.config.ignore_label)
        if self.kind == "truth":
            classes = F.one_hot(unlabeled.hidden.where(taught, 0), self.config.num_classes)
            self.targets = dict.fromkeys((0, 1), classes.movedim(-1, 1).float())
        else:
            predict = super().predict_target
            self.targets = {own: predict(own, peer, unlabeled.images) for own, peer in PEERS}
            for target in self.targets.values():
                taught = taught & (target.argmax(dim=1) == unlabeled.hidden)
        return unlabeled._replace(valid=taught)

    def predict_target(self, own: int, peer: int, images: Tensor) -> Tensor:
        """What ``correct`` has kept for this step; for a preview, which has no hidden labels, the teacher's."""
        target = self.targets.pop(own, None)
        return super().predict_target(own, peer, images) if target is None else target


if __name__ == "__main__":
    run_script(main)
