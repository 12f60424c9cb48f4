"""How a model runs: order, shapes, calls and consumers of its layers, and models that resist a dry run."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adderkit.convert.errors import AdderkitError
from adderkit.convert.graph.fx_uses import symbolic_uses
from adderkit.convert.graph.layers import WEIGHT_LAYERS, input_size, trace_layers
from adderkit.convert.graph.observe import observe


class Network(nn.Module):
    """Two convolutions and a BatchNorm, wired by a function."""

    def __init__(self, wire):
        super().__init__()
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.wire = wire

    def forward(self, x):
        return self.wire(self, x)


def plain(net, x):
    return net.norm(net.second(net.first(x).relu()))


def trace(model, size=(1, 3, 8, 8)):
    return {layer.path: layer for layer in trace_layers(model, torch.zeros(size))}


def test_order_is_that_of_execution():
    model = Network(plain)
    registered = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert registered == ["second", "first"]
    assert list(trace(model)) == ["first", "second"]


def test_shapes_are_those_of_a_real_run(tiny, images):
    model, seen = tiny(), {}
    layers = trace(model, images.shape)
    for path in layers:
        model.get_submodule(path).register_forward_hook(
            lambda _, inputs, output, path=path: seen.update({path: (inputs[0].shape, output.shape)})
        )
    model(images)
    assert {path: (layer.input_shape, layer.output_shape) for path, layer in layers.items()} == seen


def test_consumers_are_the_modules_that_take_the_output(tiny):
    layers = trace(tiny())
    assert layers["stem"].consumers == ("norm0",)
    assert layers["grouped"].consumers == ("norm1",)
    assert layers["head"].consumers == ()


def test_several_consumers():
    layers = trace(Network(lambda net, x: net.norm(net.first(x)) + net.second(net.norm(net.first(x)))))
    assert layers["first"].consumers == ("norm",)
    assert layers["first"].calls == 2

    def both(net, x):
        y = net.first(x)
        return net.norm(y) + net.second(y)

    assert trace(Network(both))["first"].consumers == ("norm", "second")


def test_identity_does_not_consume():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.Sequential(nn.Identity(), nn.BatchNorm2d(4)))
    assert trace(model)["0"].consumers == ("2.1",)


def test_containers_do_not_consume():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)))
    assert trace(model)["0"].consumers == ("1.0",)


@pytest.mark.parametrize(
    "change",
    [lambda y: y.relu(), lambda y: y + 1, lambda y: y.permute(0, 1, 3, 2)],
    ids=["relu", "plus", "permute"],
)
def test_a_changed_output_is_no_longer_the_convolutions(change):
    layers = trace(Network(lambda net, x: net.norm(change(net.second(net.first(x))))))
    assert layers["second"].consumers == ()


@pytest.mark.parametrize(
    "change", [lambda y: y.relu_(), lambda y: F.relu(y, inplace=True)], ids=["method", "functional"]
)
def test_an_output_changed_in_place_is_no_longer_the_convolutions(change):
    layers = trace(Network(lambda net, x: net.norm(change(net.second(net.first(x))))))
    assert layers["second"].consumers == ()


def test_inplace_module_consumes_first():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4))
    assert trace(model)["0"].consumers[0] == "1"


# Uses by functions and operators


USES = {
    "residual": (lambda net, y: net.norm(y) + y, ("norm",), True),
    "relu": (lambda net, y: F.relu(y), (), True),
    "method": (lambda net, y: y.relu(), (), True),
    "cat": (lambda net, y: torch.cat([net.norm(y), y], 1), ("norm",), True),
    "index": (lambda net, y: net.norm(y)[:, :, 0, 0] * y[0, 0, 0, 0], ("norm",), True),
    "in-place": (lambda net, y: net.norm(y).mul_(2).add_(y), ("norm",), True),
    "returned": (lambda net, y: (net.norm(y), y), ("norm",), True),
    "returned-in-a-mapping": (lambda net, y: {"a": net.norm(y), "b": [y]}, ("norm",), True),
    "size": (lambda net, y: net.norm(y).reshape(y.size(0), -1, y.shape[-1]), ("norm",), False),
    "contiguous": (lambda net, y: net.norm(y.contiguous()), ("norm",), False),
    "dropout": (lambda net, y: net.norm(F.dropout(y, 0.5, net.training)), ("norm",), False),
}


@pytest.mark.parametrize("case", USES)
def test_functional_uses_are_seen_by_observation_and_by_tracing(case):
    use, consumers, functional = USES[case]
    model = Network(lambda net, x: use(net, net.second(net.first(x)))).eval()
    seen = observe(model, torch.zeros(1, 3, 8, 8), WEIGHT_LAYERS)["second"]
    assert (tuple(seen.consumers), bool(seen.functions)) == (consumers, functional)
    traced = symbolic_uses(model, WEIGHT_LAYERS)["second"]
    assert (tuple(traced[0]), bool(traced[1])) == (consumers, functional)


def test_names_of_functions():
    model = Network(lambda net, x: (y := net.second(net.first(x))) + F.relu(y) * y.sigmoid())
    assert trace(model)["second"].functions == ("relu", "sigmoid", "add")


def test_what_a_module_does_inside_is_its_own_affair():
    class Gate(nn.Module):
        def forward(self, y):
            return y * y.sigmoid()

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Gate())
    assert trace(model)["0"].consumers == ("1",)
    assert trace(model)["0"].functions == ()


def test_a_written_slice_is_a_use():
    def write(net, x):
        y = net.second(net.first(x))
        room = torch.zeros(2 * len(x), *y.shape[1:], device=x.device)
        room[: len(x)] = y
        return net.norm(y) + room[: len(x)]

    assert trace(Network(write))["second"].functions == ("setitem",)


def test_a_use_that_only_the_graph_shows_is_added():
    def wire(net, x):
        y = net.second(net.first(x))
        traced = isinstance(y, torch.fx.Proxy)
        return net.norm(y) + y if traced else net.norm(y)

    image = torch.zeros(1, 3, 8, 8)
    assert trace_layers(Network(wire), image)[1].functions == ()
    assert trace_layers(Network(wire), image, symbolic=True)[1].functions == ("add",)


def test_model_that_does_not_trace_is_observed():
    model = Network(lambda net, x: net.norm(net.second(net.first(x))) if x.shape[0] > 0 and len(x) else x)
    assert symbolic_uses(model, WEIGHT_LAYERS) is None
    assert trace(model)["second"].consumers == ("norm",)
    assert trace_layers(model, torch.zeros(1, 3, 8, 8), symbolic=True)[1].consumers == ("norm",)


def test_shared_module_is_one_layer_with_two_calls():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    layers = trace_layers(nn.Sequential(conv, nn.ReLU(), conv), torch.zeros(1, 3, 8, 8))
    assert [(layer.path, layer.calls) for layer in layers] == [("0", 2)]


def test_unused_layers_are_not_listed():
    assert list(trace(Network(lambda net, x: net.norm(net.first(x))))) == ["first"]


def test_input_given_by_keyword():
    model = Network(lambda net, x: net.norm(input=net.second(input=net.first(input=x))))
    assert list(trace(model)) == ["first", "second"]


def test_input_size_comes_from_timm(resnet20):
    assert input_size(resnet20()) == (1, 8, 8)
    assert trace_layers(resnet20())[0].input_shape == (1, 1, 8, 8)


def test_without_input_size_the_remedy_is_named(tiny):
    with pytest.raises(AdderkitError, match=r"TinyNet.*example_input of shape \[N, C, H, W\]"):
        trace_layers(tiny())


def test_input_that_does_not_fit(tiny, snapshot):
    model = tiny().train()
    before = snapshot(model)
    with pytest.raises(AdderkitError, match=r"TinyNet cannot run on an input of shape \(1, 2, 8, 8\).*example_input"):
        trace_layers(model, torch.zeros(1, 2, 8, 8))
    assert snapshot(model) == before


def test_user_hooks_are_not_called(tiny, images):
    model, calls = tiny(), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append("after"))
        module.register_forward_pre_hook(lambda *_: calls.append("before"))
        module.register_forward_hook(lambda *_: calls.append("after"), with_kwargs=True)
    assert len(trace_layers(model, images)) == 5
    assert calls == []


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_model_is_left_untouched(tiny, images, snapshot, training):
    model = tiny().train(training)
    model.norm1.eval()
    model.stem.weight.requires_grad_(False)
    model.stem.register_forward_hook(lambda *_: None)
    before = snapshot(model)
    trace_layers(model, images)
    assert snapshot(model) == before


# Models that cannot run on shapes alone


def by_value(net, x):
    return plain(net, x) if x.sum() == 0 else net.first(x)


def with_a_plain_tensor(net, x):
    return plain(net, x + net.offset)


def test_control_flow_by_value_is_run_for_real(snapshot):
    model = Network(by_value).train()
    before = snapshot(model)
    assert list(trace(model)) == ["first", "second"]
    assert snapshot(model) == before


def test_plain_tensor_attribute_is_run_for_real():
    model = Network(with_a_plain_tensor)
    model.offset = torch.ones(3, 8, 8)
    assert trace(model)["second"].consumers == ("norm",)


def test_attribute_that_cannot_be_copied():
    model = Network(plain)
    model.lock = threading.Lock()
    assert list(trace(model)) == ["first", "second"]


def test_hook_whose_owner_cannot_be_copied():
    class Recorder:
        def __init__(self):
            self.lock = threading.Lock()

        def hook(self, *_):
            return None

    model = Network(plain)
    model.first.register_forward_hook(Recorder().hook)
    assert list(trace(model)) == ["first", "second"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_normalized_by_a_hook():
    # The weight is then a tensor with a history, which cannot be copied.
    model = Network(plain)
    torch.nn.utils.weight_norm(model.second)
    model.second(torch.zeros(1, 4, 8, 8))
    assert list(trace(model)) == ["first", "second"]


def test_model_without_parameters():
    assert trace_layers(nn.Sequential(nn.ReLU()), torch.zeros(1, 3, 8, 8)) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_model_of_another_dtype(tiny, dtype):
    assert len(trace(tiny().to(dtype))) == 5


def test_model_on_meta(tiny):
    assert len(trace(tiny().to("meta"))) == 5
