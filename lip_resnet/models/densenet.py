"""LIP-DenseNet: timm's DenseNet-BC (Huang et al. 2017) with LIP as every pooling layer, registered with timm.

LIP 3x3/2 with simplified logits replaces the stem's max pooling; LIP 2x2/2 without padding, each with a complete
bottleneck-128 logit module, replaces the average pooling of the transitions. The paper has LIP-DenseNet-121; 161, 169
and 201 are ours, from the same code. Source: paper section 4; reference ``imagenet/lip_densenet.py``.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.densenet import DenseNet, DenseTransition
from torch import Tensor, nn

from lip_resnet.layers.downsampling import LogitOptions, check_layer, make_layer
from lip_resnet.layers.logits import GATE
from lip_resnet.layers.pooling import LIP2d
from lip_resnet.models.published import CFG, check_source, rename_keys


class LIPDenseNet(DenseNet):
    """Images (B, in_chans, H, W) -> class logits (B, num_classes); a complete timm model.

    Args:
        growth_rate: channels that each dense layer adds.
        block_config: dense layers in each of the four blocks.
        num_classes: of the classifier; 0: no classifier.
        in_chans: channels of the images.
        global_pool: how (B, C, h, w) becomes (B, C) before the classifier: timm's names.
        drop_rate: dropout before the classifier, in [0, 1).
        proj_drop_rate: dropout after every dense layer, in [0, 1).
        drop_path_rate: only 0: a DenseNet has no residual branch that could be dropped.
        stem, transition: the layers of ``DOWNSAMPLING`` that pool in the stem and in the transitions. ``lip`` has
            simplified logits in the stem.
        logit_module: what ``lip`` means in the transitions: bottleneck (published), simplified or projection.
        bottleneck_width: channels of the bottleneck logit modules (published: 128).
        gate_coefficient: upper bound of the logits.
        gate: False omits the gate.
        kernel_size: of every window, padding (kernel_size - 1) // 2; 0 is as published: 3 in the stem, 2 elsewhere.
        init: of the logit modules' last convolutions. ``reference``: Kaiming normal, as all others (the reference code
            defines a zero initialisation but never calls it); ``zero``: LIP starts as average pooling.

    Raises:
        ValueError: a keyword is out of range, or a layer or logit module is unknown.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: tuple[int, ...] = (6, 12, 24, 16),
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        stem: str = "lip",
        transition: str = "lip",
        logit_module: str = "bottleneck",
        bottleneck_width: int = 128,
        gate_coefficient: float = GATE,
        gate: bool = True,
        kernel_size: int = 0,
        init: str = "reference",
        device=None,
        dtype=None,
    ) -> None:
        for name, rate in (("drop_rate", drop_rate), ("proj_drop_rate", proj_drop_rate)):
            if not 0 <= rate < 1:
                raise ValueError(f"{name} {rate!r}; it must be at least 0 and below 1")
        if drop_path_rate:
            raise ValueError(f"drop_path_rate {drop_path_rate!r}; a DenseNet has no residual branch to drop")
        if init not in ("reference", "zero"):
            raise ValueError(f"init {init!r}; it must be reference or zero")
        options = LogitOptions(logit_module, bottleneck_width, gate_coefficient if gate else None)
        factory_kwargs = {"device": device, "dtype": dtype}
        # timm initialises as the reference code does: convolutions Kaiming normal (fan in), the classifier PyTorch's
        # default with zero bias.
        super().__init__(
            growth_rate,
            block_config,
            num_classes,
            in_chans,
            global_pool,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            **factory_kwargs,
        )
        check_layer(stem, "stem")
        stem = "lip_simplified" if stem == "lip" else stem
        self.features.pool0 = make_layer(stem, 2 * growth_rate, kernel_size or 3, options=options, **factory_kwargs)
        check_layer(transition, "transition")
        for module in self.features:
            if isinstance(module, DenseTransition):
                conv = module.conv
                assert isinstance(conv, nn.Conv2d)
                module.pool = make_layer(
                    transition, conv.out_channels, kernel_size or 2, options=options, **factory_kwargs
                )
        self._init_logits(init)

    def _init_logits(self, init: str) -> None:
        for lip in self.modules():
            if isinstance(lip, LIP2d):
                for module in lip.modules():
                    if isinstance(module, nn.Conv2d):
                        nn.init.kaiming_normal_(module.weight)
                if init == "zero":
                    lip.zero_logits()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the first half of every dense layer (timm's), and every LIP's logits, in the backward pass."""
        super().set_grad_checkpointing(enable)
        for module in self.modules():
            if isinstance(module, LIP2d):
                module.recompute = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: none, as in the reference code."""
        return set()

    @staticmethod
    def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Map released keys (the reference's attribute names) to ours; our own keys are unchanged."""
        renames = (
            (r"\.pool0\.logit\.conv1\.", ".pool0.logits.conv."),
            (r"\.pool0\.logit\.bn1\.", ".pool0.logits.norm."),
            (r"\.pool\.logit\.conv3\.", ".pool.logits.conv."),
            (r"\.pool\.logit\.bn3\.", ".pool.logits.norm."),
            (r"\.pool\.logit\.bn(\d)\.", r".pool.logits.norm\1."),
            (r"\.pool\.logit\.", ".pool.logits."),
        )
        return rename_keys(state_dict, renames)


default_cfgs = generate_default_cfgs(
    {
        f"lip_densenet{depth}": {**CFG, "first_conv": "features.conv0", "classifier": "classifier"}
        for depth in (121, 161, 169, 201)
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> LIPDenseNet:
    check_source(variant, pretrained, kwargs)
    return build_model_with_cfg(
        LIPDenseNet,
        variant,
        pretrained,
        pretrained_filter_fn=LIPDenseNet.checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True},
        **kwargs,
    )


@register_model
def lip_densenet121(pretrained: bool = False, **kwargs: Any) -> LIPDenseNet:
    """LIP-DenseNet-121, 8,690,920 parameters; keywords as ``LIPDenseNet``."""
    return _create("lip_densenet121", pretrained, **{"growth_rate": 32, "block_config": (6, 12, 24, 16), **kwargs})


@register_model
def lip_densenet161(pretrained: bool = False, **kwargs: Any) -> LIPDenseNet:
    """LIP-DenseNet-161; keywords as ``LIPDenseNet``."""
    return _create("lip_densenet161", pretrained, **{"growth_rate": 48, "block_config": (6, 12, 36, 24), **kwargs})


@register_model
def lip_densenet169(pretrained: bool = False, **kwargs: Any) -> LIPDenseNet:
    """LIP-DenseNet-169; keywords as ``LIPDenseNet``."""
    return _create("lip_densenet169", pretrained, **{"growth_rate": 32, "block_config": (6, 12, 32, 32), **kwargs})


@register_model
def lip_densenet201(pretrained: bool = False, **kwargs: Any) -> LIPDenseNet:
    """LIP-DenseNet-201; keywords as ``LIPDenseNet``."""
    return _create("lip_densenet201", pretrained, **{"growth_rate": 32, "block_config": (6, 12, 48, 32), **kwargs})
