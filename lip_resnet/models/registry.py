"""Networks by name: LIP networks and timm's baselines, built and initialised by the same rules."""

import copy
import difflib
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from lip_resnet.config import InputError, ModelConfig
from lip_resnet.layers.placement import use_circular_padding
from lip_resnet.layers.replace import replace_downsampling
from lip_resnet.models.published import explain_no_weights


def create_model(name: str, **keywords: Any) -> nn.Module:
    """``timm.create_model`` with one-line errors.

    Raises:
        InputError: unknown name (with near names); a keyword or value that the model does not accept; a package that
            the model needs is not installed; pretrained weights that cannot be downloaded.
        Exception: the model's own error, if it also fails without keywords: a defect, not the user's mistake.
    """
    _check_name(name)
    try:
        return timm.create_model(name, **keywords)
    except ImportError as error:
        raise InputError(f"model {name} needs a package that is not installed here: {error}") from error
    except OSError as error:  # of a download; one of huggingface_hub's is a ValueError too
        line = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise InputError(
            f"model {name}: its pretrained weights are neither in the local cache nor to be downloaded: {line}"
        ) from error
    except (TypeError, ValueError, AssertionError, RuntimeError, AttributeError) as error:
        with torch.device("meta"):
            timm.create_model(name)
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"model {name} does not take {keywords}: {line}") from error


def create_pretrained(name: str) -> nn.Module:
    """A network with timm's own weights, downloaded or from the local cache.

    Raises:
        InputError: unknown name, or there are no weights, or they are not in the cache and cannot be downloaded.
    """
    source = pretrained_cfg(name)
    if not any(source.get(key) for key in ("hf_hub_id", "url", "file")):
        where = explain_no_weights(name) if name.startswith("lip_") else f"timm has no weights of {name}"
        raise InputError(f"{where}; give a file: --checkpoint FILE, or model.weights=FILE")
    if source.get("hf_hub_id"):
        _use_cache_if_offline(source["hf_hub_id"].partition("@")[0])
    return create_model(name, pretrained=True)


def check_pretrained_name(name: str) -> None:
    """Check that timm has weights of this name: a model's, such as resnet50, or with a tag, such as resnet50.a1_in1k.

    Raises:
        InputError: it has not; names the nearest that it has.
    """
    known = timm.list_pretrained()
    if name in known or name in {each.partition(".")[0] for each in known}:
        return
    model = name.partition(".")[0]
    near = [each for each in known if each.startswith(f"{model}.")]
    near = difflib.get_close_matches(name, near, n=5, cutoff=0) or difflib.get_close_matches(name, known, n=5)
    hint = "LIP's are files" if model.startswith("lip_") else f"near names: {', '.join(near) or 'none'}"
    raise InputError(f"model.weights: timm has no weights {name!r}; {hint}")


def _use_cache_if_offline(repository: str) -> None:
    """Set huggingface_hub's offline mode if one request to the hub gets no answer: its own retries take a minute."""
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, "config.json"), timeout=10)
    except HfHubHTTPError:
        return  # it answers
    except Exception as error:  # of the HTTP library, which differs between versions: the network's own is its cause
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def pretrained_cfg(name: str) -> dict[str, Any]:
    """timm's description of a model (classes, classifier, evaluation), without building it.

    Raises:
        InputError: unknown name, or unknown tag of pretrained weights.
    """
    _check_name(name)
    try:
        return (timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()).to_dict()
    except RuntimeError as error:
        raise InputError(f"model.name: {name}: {error}") from error


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise InputError(f"model.name: unknown model {name!r}; near names: {', '.join(near) or 'none'}")


def build_model(config: ModelConfig, **keywords: Any) -> nn.Module:
    """Build and initialise the network of a recipe; the caller loads ``config.weights``.

    Args:
        config: the recipe's ``model`` section.
        keywords: further keyword arguments of the model.

    Raises:
        InputError: unknown model, keyword or layer, or a site at which the network has nothing to replace.
    """
    keywords["num_classes"] = config.num_classes
    if reserved := sorted(config.args.keys() & {*keywords, "pretrained", "features_only", "checkpoint_path"}):
        raise InputError(
            f"model.args: {', '.join(reserved)} cannot be set there; the recipe has keys of its own for it"
        )
    model = create_model(config.name, **keywords, **config.args)
    initialize(model)
    if config.downsampling:
        try:
            layers: Any = config.downsampling
            default: Any = model.default_cfg
            report = replace_downsampling(model, layers, input_size=default["input_size"])
        except ValueError as error:
            raise InputError(f"model.downsampling: {error}") from error
        if report.unused or not report.swapped:
            where = f" at {', '.join(report.unused)}" if report.unused else ""
            why = "".join(f"; {name}: {reason}" for name, reason in list(report.refused.items())[:1])
            raise InputError(f"model.downsampling: {config.name} has nothing to replace{where}{why}")
    if config.circular_padding:
        use_circular_padding(model)
    return model


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Initialise every residual network, LIP or not, as the reference does: classifier N(0, 0.01) with zero bias, and
    zero weights in the last BN of every block.

    timm's ResNets initialise their classifier in another way; a comparison must not depend on it.
    """
    blocks: list[Any] = [module for module in model.modules() if hasattr(module, "zero_init_last")]
    for block in blocks:
        block.zero_init_last()
    get_classifier: Any = model.get_classifier
    head = get_classifier()
    if blocks and isinstance(head, nn.Linear):
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)


def check_batch_norm(model: nn.Module, size: int, images: int) -> None:
    """Check that a network trains on ``images`` of ``size`` x ``size`` at a time; one is tried on the meta device.

    Raises:
        InputError: batch norm would see one value a channel, which has no variance.
    """
    if images > 1:
        return
    try:
        copy.deepcopy(model).to("meta").train()(torch.empty(1, 3, size, size, device="meta"))
    except ValueError as error:
        raise InputError(
            f"one image of {size}x{size} in each part of a batch (data.batch_size / processes / optim.accumulate), of "
            "which batch norm sees one value a channel; 2 images are needed: raise data.batch_size"
        ) from error


def check_size(model: nn.Module, size: int) -> None:
    """Check that a network accepts images of ``size`` x ``size`` pixels, by a forward pass on the meta device.

    Raises:
        InputError: they are too small, or the network accepts only another size.
        Exception: the network's own error, if images of its default size fail too: a defect, not the user's mistake.
    """
    trial = copy.deepcopy(model).to("meta").train()
    try:
        trial(torch.empty(2, 3, size, size, device="meta"))
    except (ValueError, RuntimeError, AssertionError) as error:
        cfg: Any = model.default_cfg
        trial(torch.empty(2, *cfg["input_size"], device="meta"))
        raise InputError(f"images of {size}x{size} do not fit this {type(model).__name__}: {error}") from error
