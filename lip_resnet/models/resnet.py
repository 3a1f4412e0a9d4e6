"""LIP-ResNet: ResNet (He et al. 2016) with LIP as every downsampling layer after the first convolution, registered with
timm.

The paper's "Full" architecture, Bottleneck-128: LIP with simplified logits replaces the stem's max pooling; in the
first block of stages 2 to 4, two LIPs share one logit trunk on the block's input. One is on the main path, where it and
a 1x1 convolution replace the 3x3 convolution of stride 2; one precedes the shortcut's 1x1 convolution. All other
blocks are ordinary bottlenecks. Source: paper section 4; reference ``imagenet/lip_resnet.py``.

LIP-ResNet-18, 34 and 152 are ours, not the paper's. Each of the three sites takes any layer of ``DOWNSAMPLING``.
"""

from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d, create_classifier
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from torch import Tensor, nn

from lip_resnet.compat import feature_indices
from lip_resnet.layers.downsampling import LogitOptions, check_layer, make_layer
from lip_resnet.layers.logits import GATE
from lip_resnet.layers.pooling import LIP2d
from lip_resnet.models.blocks import BasicBlock, Bottleneck, stride2_layers
from lip_resnet.models.published import CFG, check_source, rename_keys


class LIPResNet(nn.Module):
    """Images (B, in_chans, H, W) -> class logits (B, num_classes); a complete timm model.

    Args:
        layers: blocks in each of the four stages.
        num_classes: of the classifier; 0: no classifier.
        in_chans: channels of the images.
        global_pool: how (B, C, h, w) becomes (B, C) before the classifier: timm's names.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first, in [0, 1).
        stem, main, shortcut: the layers of ``DOWNSAMPLING`` that pool in the stem, and on the main path and the
            shortcut of the stride-2 blocks. ``lip`` has simplified logits in the stem, elsewhere a head on the trunk.
        logit_module: what ``lip`` means in the blocks: bottleneck (published), simplified or projection.
        bottleneck_width: channels of the logit trunks (published: 128; ablations: 64 and 256).
        gate_coefficient: upper bound of the logits.
        gate: False omits the gate.
        kernel_size: of every layer's window (stride 2, padding (kernel_size - 1) // 2).
        recompute_logits: recompute the logits in the backward pass instead of saving them.

    Raises:
        ValueError: a keyword is out of range, or a layer or logit module is unknown.
    """

    global_pool: SelectAdaptivePool2d

    def __init__(
        self,
        layers: tuple[int, int, int, int],
        block: type[Bottleneck] | type[BasicBlock] = Bottleneck,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        stem: str = "lip",
        main: str = "lip",
        shortcut: str = "lip",
        logit_module: str = "bottleneck",
        bottleneck_width: int = 128,
        gate_coefficient: float = GATE,
        gate: bool = True,
        kernel_size: int = 3,
        recompute_logits: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0 <= rate < 1:
                raise ValueError(f"{name} {rate!r}; it must be at least 0 and below 1")
        options = LogitOptions(logit_module, bottleneck_width, gate_coefficient if gate else None)
        factory_kwargs = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False, **factory_kwargs)
        self.bn1 = nn.BatchNorm2d(64, **factory_kwargs)
        self.act1 = nn.ReLU(inplace=True)
        check_layer(stem, "stem")
        self.pool = make_layer(
            "lip_simplified" if stem == "lip" else stem, 64, kernel_size, options=options, **factory_kwargs
        )
        self.feature_info: list[dict[str, Any]] = [{"num_chs": 64, "reduction": 2, "module": "act1"}]

        rates = [drop_path_rate * index / (sum(layers) - 1) for index in range(sum(layers))]
        in_channels = 64
        for stage, blocks in enumerate(layers):
            channels, modules = 64 * 2**stage, []
            for index in range(blocks):
                sites = {}
                if stage and not index:
                    # What is pooled: conv1's output on the main path, the block's input on the shortcut.
                    pooled = {"main": (main, channels), "shortcut": (shortcut, in_channels)}
                    sites = stride2_layers(pooled, in_channels, kernel_size, options, factory_kwargs)
                modules.append(block(in_channels, channels, rates.pop(0), **sites, **factory_kwargs))
                in_channels = channels * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*modules))
            self.feature_info.append({"num_chs": in_channels, "reduction": 4 * 2**stage, "module": f"layer{stage + 1}"})

        self.num_features = in_channels
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()
        for module in self.modules():
            if isinstance(module, LIP2d):
                module.recompute = recompute_logits

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise as the reference does: convolutions Kaiming normal (fan out), classifier N(0, 0.01), bias 0.

        The last BN of every block and the last convolution of every logit module have zero weights.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(self.fc, nn.Linear):
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)
        for module in self.modules():
            if isinstance(module, Bottleneck | BasicBlock):
                module.zero_init_last()
            elif isinstance(module, LIP2d):
                module.zero_logits()

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's parameter groups (layer-wise learning rates): the stem, then every stage or block."""
        return {"stem": r"^conv1|bn1|pool", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: none, as in the reference code."""
        return set()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the stem's pooling and of every block in the backward pass: less memory.

        As with timm's networks, every forward of a block updates its batch norms' statistics.
        """
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The classifier: a linear layer, or an identity without classes."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one of ``num_classes`` (0: none), on the model's device and in its dtype."""
        weight = self.conv1.weight
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.fc.to(weight.device, weight.dtype)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def stages(self) -> list[nn.Sequential]:
        """The four stages, in order."""
        return [getattr(self, f"layer{stage}") for stage in (1, 2, 3, 4)]

    def _stage(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(stage, x)
        return stage(x)

    def _stem_pool(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([self.pool], x)
        return self.pool(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Images -> features of the stem (index 0) and the stages (1 to 4): timm's interface.

        Args:
            x: images (B, in_chans, H, W).
            indices: the features to return; an int n: the last n; None: all five.
            norm: unused: the network has no final norm.
            stop_early: stop after the last selected feature.
            output_fmt: only "NCHW".
            intermediates_only: return only the list of features.

        Returns:
            The last feature map, (B, C, h, w), and the selected features; or only these.

        Raises:
            ValueError: another ``output_fmt``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r}; it must be 'NCHW'")
        take, last = feature_indices(5, indices)
        x = self.act1(self.bn1(self.conv1(x)))
        features = [x] if 0 in take else []
        x = self._stem_pool(x)
        for index, stage in enumerate(self.stages()[:last] if stop_early else self.stages(), start=1):
            x = self._stage(stage, x)
            if index in take:
                features.append(x)
        return features if intermediates_only else (x, features)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last selected feature, and the head; returns the selected indices."""
        take, last = feature_indices(5, indices)
        for index in range(last + 1, 5):
            setattr(self, f"layer{index}", nn.Sequential())
        if last == 0:
            self.pool = nn.Identity()
        if last < 4:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or last < 4:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_features, H / 32, W / 32), rounded up."""
        x = self._stem_pool(self.act1(self.bn1(self.conv1(x))))
        for stage in self.stages():
            x = self._stage(stage, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, num_features, h, w) -> (B, num_classes), or the pooled features with ``pre_logits``."""
        x = self.global_pool(x)
        x = nn.functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @staticmethod
    def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Map released keys (the reference's attribute names) to ours; our own keys are unchanged."""
        renames = (
            (r"^maxpool\.logit\.bn\.", "pool.logits.norm."),
            (r"^maxpool\.logit\.", "pool.logits."),
            (r"\.bottleneck_shared\.logit\.bn(\d)\.", r".trunk.norm\1."),
            (r"\.bottleneck_shared\.logit\.", ".trunk."),
            (r"\.conv2\.0\.postprocessing\.bn\.", ".pool.logits.norm."),
            (r"\.conv2\.0\.postprocessing\.", ".pool.logits."),
            (r"\.conv2\.1\.", ".conv2."),
            (r"\.downsample\.lip\.postprocessing\.bn\.", ".downsample.pool.logits.norm."),
            (r"\.downsample\.lip\.postprocessing\.", ".downsample.pool.logits."),
        )
        return rename_keys(state_dict, renames)


default_cfgs = generate_default_cfgs({f"lip_resnet{depth}": CFG for depth in (18, 34, 50, 101, 152)})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> LIPResNet:
    check_source(variant, pretrained, kwargs)
    key_map = LIPResNet.checkpoint_filter_fn
    return build_model_with_cfg(LIPResNet, variant, pretrained, pretrained_filter_fn=key_map, **kwargs)


@register_model
def lip_resnet18(pretrained: bool = False, **kwargs: Any) -> LIPResNet:
    """LIP-ResNet-18, ours and not the paper's; keywords as ``LIPResNet``."""
    return _create("lip_resnet18", pretrained, layers=(2, 2, 2, 2), block=BasicBlock, **kwargs)


@register_model
def lip_resnet34(pretrained: bool = False, **kwargs: Any) -> LIPResNet:
    """LIP-ResNet-34, ours and not the paper's; keywords as ``LIPResNet``."""
    return _create("lip_resnet34", pretrained, layers=(3, 4, 6, 3), block=BasicBlock, **kwargs)


@register_model
def lip_resnet50(pretrained: bool = False, **kwargs: Any) -> LIPResNet:
    """LIP-ResNet-50, 23,864,232 parameters; keywords as ``LIPResNet``."""
    return _create("lip_resnet50", pretrained, layers=(3, 4, 6, 3), **kwargs)


@register_model
def lip_resnet101(pretrained: bool = False, **kwargs: Any) -> LIPResNet:
    """LIP-ResNet-101, 42,856,360 parameters; keywords as ``LIPResNet``."""
    return _create("lip_resnet101", pretrained, layers=(3, 4, 23, 3), **kwargs)


@register_model
def lip_resnet152(pretrained: bool = False, **kwargs: Any) -> LIPResNet:
    """LIP-ResNet-152; keywords as ``LIPResNet``."""
    return _create("lip_resnet152", pretrained, layers=(3, 8, 36, 3), **kwargs)
