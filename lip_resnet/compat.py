"""Private names of other libraries that the package uses, each with the versions that were seen to have it.

No other module of the package uses a private name of another library.
"""

import sys
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only  # torch 2.11 to 2.14

__all__ = [
    "copy_tensors_",
    "disown_workers",
    "feature_indices",
    "functorch_is_active",
    "is_compiled",
    "is_exporting",
    "is_tensorboard_thread",
    "loader_workers",
    "move_towards_",
    "raise_recompile_limit",
    "stack_frames",
    "torchvision_files",
    "tree_leaves",
    "tree_map_only",
]


def functorch_is_active() -> bool:
    """Whether a functorch transform (vmap, jvp, ...) is running; torch 2.11 to 2.14."""
    return torch._C._are_functorch_transforms_active()


def is_compiled(model: nn.Module) -> bool:
    """Whether ``model.compile()`` was called, or it is what ``torch.compile`` returned; torch 2.11 to 2.14."""
    return model._compiled_call_impl is not None or hasattr(model, "_orig_mod")


def is_exporting() -> bool:
    """Whether torch.export is tracing; under torch.compile ``torch.compiler.is_exporting`` is True in torch 2.11;
    torch 2.11 to 2.14."""
    return torch.compiler._is_exporting_flag


def raise_recompile_limit(graphs: int) -> None:
    """Let torch.compile make at least this many graphs of one module before it falls back to eager mode; torch 2.11 to
    2.14."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, graphs)


def copy_tensors_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source into its target, in few kernels; torch 2.11 to 2.14."""
    if targets:
        torch._foreach_copy_(targets, sources)


def move_towards_(targets: list[Tensor], ends: list[Tensor], weight: float | Tensor) -> None:
    """targets += weight * (ends - targets), in few kernels; torch 2.11 to 2.14."""
    change = torch._foreach_sub(ends, targets)
    torch._foreach_mul_(change, weight)
    torch._foreach_add_(targets, change)


def feature_indices(num_features: int, indices: int | list[int] | None) -> tuple[list[int], int]:
    """The indices that ``indices`` selects (an int: the last n), and the largest of them; timm 1.0.31."""
    from timm.models._features import feature_take_indices

    return feature_take_indices(num_features, indices)


def is_tensorboard_thread(thread: Any) -> bool:
    """Whether a thread is TensorBoard's writer; TensorBoard 2.16 to 2.21."""
    from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

    return isinstance(thread, _AsyncWriterThread)


def torchvision_files(dataset: Any) -> list[tuple[Any, int]] | None:
    """(path, label) of every image of GTSRB and OxfordIIITPet; None for other data sets; torchvision 0.26 to 0.29."""
    from torchvision import datasets

    if isinstance(dataset, datasets.GTSRB):
        return dataset._samples
    if isinstance(dataset, datasets.OxfordIIITPet):
        return list(zip(dataset._images, dataset._labels, strict=True))
    return None


def stack_frames() -> dict[int, FrameType]:
    """The current frame of every thread by its identifier; CPython 3.10 to 3.14."""
    return sys._current_frames()


def loader_workers(iterator: Any) -> list[BaseProcess]:
    """The processes of a DataLoader's multiprocessing iterator; torch 2.11 to 2.14."""
    return iterator._workers


def disown_workers(iterator: Any) -> None:
    """Let a DataLoader's iterator neither watch its workers nor wait for them; torch 2.11 to 2.14."""
    from torch.utils.data._utils import signal_handling

    if not iterator._shutdown:
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set, iterator._shutdown = False, True
