"""Makes torchvision, which the timm extra brings and transformers imports, importable with a CPU build of torch."""

import importlib.util

if importlib.util.find_spec("torch") and importlib.util.find_spec("torchvision"):
    import torch

    # torchvision's build on PyPI is for CUDA: with a CPU torch its operators do not load, and the import fails with
    # "operator torchvision::nms does not exist". Declaring these two is enough: no reference here calls them.
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, _name):
            _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
