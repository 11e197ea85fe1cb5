"""Code of PyTorch and Lightning that is told from the user's by its module, its file's name or its own name on the call stack."""

from __future__ import annotations

LOOK_FURTHER = (
    "torch.overrides",
    "torch.nn.functional",
    "torch.functional",
    "torch._tensor",
    "torch._jit_internal",
    "torch._ops",
    "torch._library.custom_ops",
    "torch._functorch.functional_call",  # `stack_module_state` and `functional_call`, whose operations are the caller's
    "torch.fx.interpreter",  # it runs graphs of compilers and of users alike
    "torch.fx.traceback",
)
"""Modules that stand between a call and who makes it. Without one of them: its caller is taken for the user's code, as it mostly is."""

MACHINERY = (
    "torch._dynamo",
    "torch._inductor",
    "torch._functorch",
    "torch._subclasses",
    "torch.fx",
    "torch._higher_order_ops",
    "torch._decomp",
    "torch.distributed",  # fully sharded parameters are put together by hooks, inside of the frame of their module
)
"""Modules whose calls are no part of a model. Without one of them: calls from its successor are counted as the model's, and reported as drift."""

FX_FILE = "<eval_with_key>"
"""How the file of a graph of `torch.fx` is called. Without it: as above."""

INDUCTOR_FILE = "torchinductor"
"""Part of the path of code that inductor writes. Without it: as above."""

REDIRECTED_FORWARD = "wrapped_forward"
"""What Lightning's strategies call the function that they put in the place of ``forward`` to run a step. Without it: what the step does around the model under
DDP is seen as calls of the root, and reported as drift."""
