"""Names the first tensor of a forward pass that is not finite."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lip_resnet.compat import is_compiled, tree_leaves


class FirstNonFinite(contextlib.ExitStack):
    """Within this context, checks the images and every module's output; ``name`` is the first that was not finite.

    Modules are checked in the order in which they end, each waiting for the device. A compiled network runs eagerly.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.name: str | None = None
        if is_compiled(model):
            self.enter_context(torch.compiler.set_stance("force_eager"))
        hooks = [module.register_forward_hook(self._hook(name)) for name, module in model.named_modules()]
        hooks.append(model.register_forward_pre_hook(lambda module, inputs: self.check(inputs, "the images")))
        for handle in hooks:
            self.callback(handle.remove)

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if self.name is None:
                self.check(output, f"the output of {name or 'the network'}")
                self.name = self.name and self.name + _fault_of(module)

        return hook

    def check(self, tensors: Any, name: str) -> None:
        """Check a tensor, or all tensors in nested lists, tuples and dicts, unless one was not finite before."""
        if self.name is None and not all(
            tensor.isfinite().all() for tensor in tree_leaves(tensors) if isinstance(tensor, Tensor)
        ):
            self.name = name


def _fault_of(module: nn.Module) -> str:
    """What is wrong with a module's own parameters and buffers, if anything."""
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if not tensor.isfinite().all():
            return f", whose {name} is not finite"
        if name == "running_var" and (tensor < 0).any():
            return ", whose running_var has negative values"
    return ""
