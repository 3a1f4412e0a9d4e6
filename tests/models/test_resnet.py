"""LIP-ResNet against the recorded outputs of the reference."""

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import golden
from torch import nn

from lip_resnet.layers import DOWNSAMPLING, pooling
from lip_resnet.layers.logits import BottleneckHead, BottleneckLogits, Gate, ProjectionLogits, SimplifiedLogits

PUBLISHED = ["lip_resnet50", "lip_resnet101"]


@pytest.fixture(scope="module")
def filled50() -> nn.Module:
    return golden.filled_model("lip_resnet50")


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == golden.GOLDEN[name]["params"]


def test_released_keys_map_one_to_one():
    released = golden.GOLDEN["lip_resnet101"]["state_dict"]
    with torch.device("meta"):
        model = timm.create_model("lip_resnet101")
    ours = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert model.checkpoint_filter_fn(released, model) == ours
    assert model.checkpoint_filter_fn(ours, model) == ours


def test_golden_lip_resnet50(filled50):
    golden.check_logits(filled50, "lip_resnet50")
    golden.check_gradients(filled50, "lip_resnet50")


@pytest.mark.parametrize("steps", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_golden_sgd_steps_lip_resnet50(steps):
    golden.check_sgd_steps(golden.filled_model("lip_resnet50"), "lip_resnet50", steps)


def test_golden_lip_resnet101():
    model = golden.filled_model("lip_resnet101")
    golden.check_logits(model, "lip_resnet101")
    golden.check_gradients(model, "lip_resnet101")


@pytest.mark.parametrize("width", [64, 256])
def test_golden_bottleneck_widths(width):
    name = f"lip_resnet50_b{width}"
    model = golden.filled_model(name, bottleneck_width=width)
    assert sum(p.numel() for p in model.parameters()) == golden.GOLDEN[name]["params"]
    golden.check_logits(model, name)
    golden.check_gradients(model, name)


def test_a_wrong_network_fails_the_golden_checks():
    """The golden checks can fail: they detect a gate of 12.000001 instead of 12."""
    model = golden.filled_model("lip_resnet50", gate_coefficient=12.000001)
    with pytest.raises(AssertionError, match="224x224"):
        golden.check_logits(model, "lip_resnet50")


def test_initialisation_of_the_reference():
    torch.manual_seed(0)
    golden.check_initial_std(timm.create_model("lip_resnet50"), "lip_resnet50")


def test_at_initialisation_lip_is_average_pooling(monkeypatch):
    """With zero logits every LIP averages its window without the padding, as PyTorch's average pooling does."""
    torch.manual_seed(0)
    model = timm.create_model("lip_resnet50").double().eval()
    x = golden.images(1, 65, 64).double()
    with torch.no_grad():
        want = model(x)
        monkeypatch.setattr(
            pooling,
            "lip2d",
            lambda x, logits, kernel, stride, padding: F.avg_pool2d(
                x, kernel, stride, padding, count_include_pad=False
            ),
        )
        assert want.std() > 0
        torch.testing.assert_close(model(x), want, rtol=0, atol=1e-12 * want.std().item())


def test_every_parameter_has_a_gradient():
    torch.manual_seed(0)
    model = timm.create_model("lip_resnet50").train()
    for module in model.modules():  # zero weights in a block's last BN would stop the block's gradients
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    for parameter in pooling.logit_parameters(model):
        nn.init.normal_(parameter, std=0.01)
    F.cross_entropy(model(golden.images(2, 64, 64)), torch.tensor([0, 1])).backward()
    without_gradient = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without_gradient == []


# -------------------------------------------------------------------------------------------------- a timm model


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("lip_resnet18").eval()
    for module in model.modules():  # so that every block contributes to the output
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return model


@pytest.mark.parametrize(
    ("name", "baseline", "channels"),
    [
        ("lip_resnet18", "resnet18", [64, 64, 128, 256, 512]),
        ("lip_resnet34", "resnet34", [64, 64, 128, 256, 512]),
        ("lip_resnet152", "resnet152", [64, 256, 512, 1024, 2048]),
    ],
)
def test_other_depths(name, baseline, channels):
    """timm's network plus, by hand, the stem's logits, trunks, heads, and 1x1 instead of 3x3 convolutions."""
    with torch.device("meta"):
        model, without_lip = timm.create_model(name), timm.create_model(baseline)
        features = timm.create_model(name, features_only=True)
    extra = 9 * 64**2 + 2 * 64
    for stage in (1, 2, 3):
        entering, inner = channels[stage], 64 * 2**stage
        extra += 128 * entering + 9 * 128**2 + 4 * 128  # the trunk
        extra += 128 * (inner + entering) + 2 * (inner + entering)  # the heads
        if baseline == "resnet152":
            extra -= 8 * inner**2
    count = {m: sum(p.numel() for p in m.parameters()) for m in (model, without_lip)}
    assert count[model] == count[without_lip] + extra
    assert features.feature_info.channels() == channels
    assert features.feature_info.reduction() == [2, 4, 8, 16, 32]


def test_basic_block_pools_after_its_first_convolution(small):
    block, x = small.layer2[0], torch.randn(2, 64, 15, 16)
    average = nn.AvgPool2d(3, 2, 1, count_include_pad=False)  # LIP at initialisation
    main = block.bn2(block.conv2(F.relu(block.bn1(average(F.conv2d(x, block.conv1.weight, padding=1))))))
    shortcut = block.downsample.bn(block.downsample.conv(average(x)))
    torch.testing.assert_close(block(x), F.relu(main + shortcut), rtol=1e-4, atol=1e-5)


def test_features_are_the_stages(small):
    x = golden.images(1, 65, 96)
    with torch.no_grad():
        final, features = small.forward_intermediates(x)
        torch.testing.assert_close(final, small.forward_features(x))
        assert [tuple(f.shape[1:]) for f in features] == [
            (64, 33, 48), (64, 17, 24), (128, 9, 12), (256, 5, 6), (512, 3, 3),
        ]  # fmt: skip
        early = small.forward_intermediates(x, indices=[1, 2], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(early, features[1:3])
        wrapped = timm.create_model("lip_resnet18", features_only=True, out_indices=(1, 4)).eval()
        wrapped.load_state_dict(small.state_dict(), strict=False)
        torch.testing.assert_close(wrapped(x), [features[1], features[4]])


def test_heads(small):
    x = golden.images(2, 64, 64)
    with torch.no_grad():
        pooled = small.forward_head(small.forward_features(x), pre_logits=True)
        torch.testing.assert_close(small.fc(pooled), small(x))
        bare = timm.create_model("lip_resnet18", num_classes=0).eval()
        bare.load_state_dict({k: v for k, v in small.state_dict().items() if not k.startswith("fc.")})
        torch.testing.assert_close(bare(x), pooled)
        bare.reset_classifier(7, "catavgmax")
        assert bare(x).shape == (2, 7)
        assert bare.get_classifier().in_features == bare.head_hidden_size == 1024
        grey = timm.create_model("lip_resnet18", in_chans=1, num_classes=3, global_pool="max").eval()
        assert grey(x[:, :1]).shape == (2, 3)


def test_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    model, x = timm.create_model("lip_resnet18").double().train(), golden.images(2, 64, 64).double()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=0)


def test_parameter_groups_by_depth():
    from timm.optim import param_groups_layer_decay

    with torch.device("meta"):
        model = timm.create_model("lip_resnet50")
    groups = param_groups_layer_decay(model, 1e-4, model.no_weight_decay(), layer_decay=0.5)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    stem = [g for g in groups if any(p is model.pool.logits.conv.weight for p in g["params"])]
    assert any(p is model.conv1.weight for p in stem[0]["params"])
    assert not any(p is model.layer1[0].bn1.weight for g in stem for p in g["params"])
    assert model.no_weight_decay() == set()


# ------------------------------------------------------------------------------------------------------- keywords


def layer_kinds(model: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in (model.pool, model.layer3[0].pool, model.layer3[0].downsample.pool)]


def test_a_layer_for_every_site():
    with torch.device("meta"):
        model = timm.create_model("lip_resnet50", stem="max", main="softpool", shortcut="average")
        assert layer_kinds(model) == ["MaxPool2d", "SoftPool", "AvgPool2d"]
        assert model.layer3[0].trunk is None
        model = timm.create_model("lip_resnet50", main="lip_simplified", shortcut="lip")
        assert isinstance(model.layer3[0].pool.logits, SimplifiedLogits)
        assert isinstance(model.layer3[0].downsample.pool.logits, BottleneckHead)
        assert model.layer3[0].trunk is not None
        model = timm.create_model("lip_resnet50", stem="lip_bottleneck", logit_module="projection")
        assert isinstance(model.pool.logits, BottleneckLogits)
        assert isinstance(model.layer3[0].pool.logits, ProjectionLogits)
        assert model.layer3[0].trunk is None


@pytest.mark.parametrize("layer", DOWNSAMPLING)
def test_every_layer_trains_at_every_site(layer):
    torch.manual_seed(0)
    model = timm.create_model("lip_resnet18", num_classes=4, stem=layer, main=layer, shortcut=layer).train()
    loss = F.cross_entropy(model(golden.images(2, 64, 64)), torch.tensor([0, 1]))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.layer2[0].conv1.weight.grad is not None


def test_gate_and_kernel():
    with torch.device("meta"):
        gated = timm.create_model("lip_resnet50", gate_coefficient=5.0, kernel_size=5)
        assert {m.coefficient for m in gated.modules() if isinstance(m, Gate)} == {5.0}
        assert (gated.pool.kernel_size, gated.layer2[0].pool.padding) == (5, 2)
        assert gated(torch.empty(2, 3, 65, 64, device="meta")).shape == (2, 1000)
        free = timm.create_model("lip_resnet50", gate=False)
        assert not any(isinstance(m, Gate) for m in free.modules())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"stem": "maxx"}, "stem: unknown downsampling layer 'maxx', did you mean max"),
        ({"shortcut": 3}, "shortcut: unknown downsampling layer 3"),
        ({"logit_module": "deep"}, "logit module 'deep'; it must be projection, simplified or bottleneck"),
        ({"bottleneck_width": -64}, "bottleneck width -64"),
        ({"gate_coefficient": 0}, "gate coefficient 0"),
        ({"kernel_size": 0}, "kernel_size 0"),
        ({"kernel_size": 2.5}, "integers, not 2.5"),
        ({"drop_path_rate": 1.0}, "drop_path_rate 1.0"),
        ({"drop_rate": -1}, "drop_rate -1"),
    ],
)
def test_keywords_out_of_range(keywords, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        timm.create_model("lip_resnet50", **keywords)


def test_image_too_small(small):
    with pytest.raises(ValueError, match="the image is too small for the network"):
        small(torch.zeros(1, 3, 16, 16))


def test_recomputed_logits_save_memory_and_change_nothing():
    torch.manual_seed(0)
    images, saved_bytes, gradients = torch.randn(2, 3, 64, 64), [], []
    for recompute in (False, True):
        torch.manual_seed(1)
        model = timm.create_model("lip_resnet18", num_classes=5, recompute_logits=recompute)
        sizes = {}

        def record(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            loss = model(images).square().sum()
        loss.backward()
        saved_bytes.append(sum(sizes.values()))
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert saved_bytes[1] < 0.95 * saved_bytes[0]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)
