"""The operator among torch's own tools: autocast, FLOP counting, checkpointing, compilers, data parallelism."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from adderkit.adder_layers.conv import AdderConv2d, adder_conv2d

GEOMETRY = ([2, 1], [1, 1], [1, 1])


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        AdderConv2d(4, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        AdderConv2d(8, 6, 1),
        nn.BatchNorm2d(6),
    )


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
def test_operator_under_autocast_keeps_a_narrow_input_and_answers_in_fp32(narrow):
    input, weight, bias = torch.randn(2, 4, 6, 6).to(narrow), torch.randn(6, 2, 3, 3).to(narrow), torch.randn(6)
    expected = adder_conv2d(input.float(), weight.float(), bias, (2, 1), 1, 1, 2)
    saved = []
    leaf = input.clone().requires_grad_()
    with (
        torch.autocast("cpu", dtype=narrow),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor),
    ):
        output = torch.ops.adderkit.adder_conv2d(leaf, weight, bias, *GEOMETRY, 2)
    assert output.dtype == torch.float32
    assert torch.equal(output, expected)
    assert [tensor.dtype for tensor in saved] == [narrow, torch.float32]
    output.sum().backward()
    assert leaf.grad.dtype == narrow


def test_dtypes_do_not_mix_outside_autocast():
    with pytest.raises(TypeError, match=r"weight has dtype torch.float32, expected torch.bfloat16, like input"):
        adder_conv2d(torch.zeros(1, 1, 2, 2).bfloat16(), torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize("groups", [1, 2])
def test_flops_are_those_of_the_convolution(groups):
    counts = []
    for make in (nn.Conv2d, AdderConv2d):
        layer = make(4, 6, 3, stride=2, padding=1, groups=groups)
        input = torch.randn(2, 4, 9, 7, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            forward = layer(input)
            after_forward = counter.get_total_flops()
            forward.sum().backward()
        counts.append((after_forward, counter.get_total_flops()))
    assert counts[1] == counts[0]
    # Forward, 2 operations a term: 2 images, 6 filters, 5 x 4 positions, 4 / groups channels, 9 taps.
    assert counts[1][0] == 2 * (2 * 6 * 5 * 4) * (4 // groups) * 9


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    model = network().eval()
    input = torch.randn(3, 4, 7, 7, requires_grad=True)
    parameters = [input, *model.parameters()]
    expected = torch.autograd.grad(model(input).square().sum(), parameters)
    output = checkpoint(model, input, use_reentrant=use_reentrant)
    output.square().sum().backward()
    assert all(torch.equal(tensor.grad, wanted) for tensor, wanted in zip(parameters, expected, strict=True))


def test_channels_last_network_gives_the_same():
    model = network().eval()
    input = torch.randn(3, 4, 7, 7)
    expected = model(input)
    output = model.to(memory_format=torch.channels_last)(input.contiguous(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected)


@pytest.mark.slow
def test_compiled_by_inductor():
    torch._dynamo.reset()
    model = network().train()
    compiled = torch.compile(network().train(), fullgraph=True)
    input = torch.randn(3, 4, 7, 7)
    expected, actual = model(input), compiled(input)
    torch.testing.assert_close(actual, expected)
    # After a BatchNorm the gradient of a sum of squares is zero but for rounding.
    probe = torch.randn_like(expected)
    wanted = gradients(model, (probe * expected).sum())
    torch.testing.assert_close(gradients(compiled, (probe * actual).sum()), wanted, rtol=1e-4, atol=1e-4)


def _data_parallel(rank, folder, input, expected):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = network().eval()  # BatchNorm by its running statistics, so that halves add up to the whole
    parallel = DistributedDataParallel(model)
    parallel(input[2 * rank : 2 * rank + 2]).square().mean().backward()
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted)
    dist.destroy_process_group()


def test_two_processes_average_to_the_gradient_of_one(tmp_path):
    model = network().eval()
    input = torch.randn(4, 4, 7, 7)
    expected = gradients(model, model(input).square().mean())
    mp.spawn(_data_parallel, (str(tmp_path), input, expected), nprocs=2)
