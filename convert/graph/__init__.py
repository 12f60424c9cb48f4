"""Look at a model without changing it: which layers run, in which order, and where their outputs go.

Six views of a model's graph answer different questions:

| module | technique | question |
|---|---|---|
| ``graph.observe`` | forward hooks and a ``TorchFunctionMode`` | Which modules and functions take a layer's output? |
| ``graph.fx_uses`` | ``torch.fx`` on the same modules | The same, for branches that one run does not reach. |
| ``graph.stepwise`` | ``torch.fx`` down to modules | How far does a pass get without the layers not fitted yet? |
| ``quantization.fusion`` | ``torch.fx`` down to each operation | Which fused ops compute the network? |
| ``cost.operator_trace`` | ``TorchDispatchMode`` | Which aten operators run, and what do they cost? |
| ``pruning.channel_groups`` | torch-pruning's autograd graph | Which channels must be removed together? |

The first works for any model that runs; ``graph.layers`` combines it with the second. The third and the fourth give up
on models that they cannot follow exactly. The fifth sees operations inside modules, but not where channels come from.
"""
