"""What the loaders give and the training step takes."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Crops of one stream.

    images: (B,3,H,W) RGB; uint8 from the loader, float32 in [0,1] after ``to``
    labels: (B,H,W) class ids, ``ignore_label`` where a pixel does not count: everywhere in unlabeled images; uint8 from
            the loader, int64 after ``to``
    valid:  (B,H,W) bool, False where the pixel is only padding
    ids:    the B names of the images
    bad:    a message for each image that could not be read and has another in its place
    hidden: (B,H,W) like labels, of unlabeled images whose label maps are there: only logs compare with them
    """

    images: Tensor
    labels: Tensor
    valid: Tensor
    ids: list[str]
    bad: tuple[str, ...] = ()
    hidden: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """On the device, with float32 images in [0,1]."""
        given = (self.images, self.labels, self.valid, *([] if self.hidden is None else [self.hidden]))
        images, labels, valid, *hidden = _copied(given, device)
        return self._replace(
            images=images.float().div_(255),
            labels=labels.long(),
            valid=valid,
            hidden=hidden[0].long() if hidden else None,
        )


def _copied(tensors: tuple[Tensor, ...], device: torch.device) -> list[Tensor]:
    """On a GPU they are copied while it still computes what it was given before."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    now = torch.cuda.current_stream(device)
    with torch.cuda.stream(_copy_stream(device)):
        copies = [tensor.to(device, non_blocking=True) for tensor in tensors]
    now.wait_stream(_copy_stream(device))
    for copy in copies:
        copy.record_stream(now)  # its memory is not used again before that stream is done with it
    return copies


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
