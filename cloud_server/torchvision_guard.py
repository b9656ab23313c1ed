"""Let a CPU build of torch live beside PyPI's CUDA build of torchvision.

That torchvision cannot load its compiled operators there, and then even importing diffusers,
transformers or open_clip fails with "operator torchvision::nms does not exist". Declaring the two
operators first makes the Python parts, all that those libraries use, importable. Calling `nms`
still raises torchvision's own error. Where torch has CUDA this does nothing.
"""

import torch

_declared: list[torch.library.Library] = []  # a Library takes its operators along when collected


def guard() -> None:
    """Declare torchvision's operators; call before the first import of diffusers and the like."""
    if torch.version.cuda is not None or _declared:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
