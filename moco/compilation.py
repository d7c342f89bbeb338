"""torch.compile for backbones, with few graphs and none after the first step."""

import functools
import warnings

from torch._dynamo import lookup_backend


def compile_backbone(backbone):
    """Compiles a backbone in place, at its first call: block by block, or as a whole.

    Blocks that are alike, a ViT's, share their graphs: 12 are compiled as fast as one. The
    gradients of a block are ready when its own backward pass ends, so that DistributedDataParallel
    averages them during the rest. Other backbones become one graph. Each size of a batch has its
    own graphs. The state_dict keeps its keys; a copy of the backbone is not compiled. Where the
    compiler fails, a warning says so and the graph runs eagerly.
    """
    blocks = list(getattr(backbone, "blocks", []))
    descriptions = {repr(block) for block in blocks}  # they differ in the rate of drop path, say
    for module in blocks if len(descriptions) == 1 else [backbone]:
        module.compile(backend=inductor_or_eager, dynamic=False)


def is_compiled(module):
    return any(m._compiled_call_impl is not None for m in module.modules())


def inductor_or_eager(graph, inputs):
    """A backend of torch.compile: Inductor, or the graph itself where Inductor fails."""
    try:
        return lookup_backend("inductor")(graph, inputs)
    except Exception as error:  # no C++ compiler, a GPU too old for Triton, an error of Inductor
        warn_of_failure(str(error).strip().split("\n")[0] or type(error).__name__)
        return graph


@functools.cache  # once, not for each graph
def warn_of_failure(reason):
    warnings.warn(f"torch.compile failed, training goes on without it: {reason}", stacklevel=1)
