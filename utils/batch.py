"""What the loaders give and the training step takes."""

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Crops of one stream.

    images: (B,3,H,W) RGB; uint8 from the loader, float32 in [0,1] after ``to``
    labels: (B,H,W) int64 class ids, ``ignore_label`` where a pixel does not count: everywhere in unlabeled images
    valid:  (B,H,W) bool, False where the pixel is only padding
    ids:    the B names of the images
    bad:    a message for each image that could not be read and has another in its place
    """

    images: Tensor
    labels: Tensor
    valid: Tensor
    ids: list[str]
    bad: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """On the device, with float32 images in [0,1]."""
        images = self.images.to(device, non_blocking=True).float().div_(255)
        labels, valid = (part.to(device, non_blocking=True) for part in (self.labels, self.valid))
        return self._replace(images=images, labels=labels, valid=valid)
