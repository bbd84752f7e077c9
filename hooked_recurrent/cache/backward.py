"""One backward pass for run_with_cache: what is differentiated, and how the weights stay out of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hooked_recurrent.state import RecurrentState


@contextmanager
def weights_apart(model: nn.Module) -> Iterator[None]:
    """Autograd on, also inside torch.no_grad, but off for the weights: gradients reach activations only, at less cost.

    Raises:
        ValueError: inside torch.inference_mode, whose tensors no gradient can reach.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("incl_bwd needs autograd, which torch.inference_mode rules out; torch.no_grad does not")
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def run_backward(output: Any, metric: Callable[[Any], Tensor] | None) -> None:
    """Run backward from metric(output), or from the output itself (the loss of "both").

    Raises:
        TypeError, ValueError: for what is no scalar, or depends on none of the activations that are kept.
    """
    if metric is not None:
        scalar = metric(output)
    else:
        scalar = output[1] if isinstance(output, tuple) else output
    what = "the output" if metric is None else "the result of metric"
    ask = "give return_type='loss', or a metric that makes one number of the output"
    if not isinstance(scalar, Tensor):
        raise TypeError(f"incl_bwd differentiates a scalar tensor, but {what} is {type(scalar).__name__}: {ask}")
    if scalar.numel() != 1:
        raise ValueError(f"incl_bwd differentiates a scalar, but {what} has shape {tuple(scalar.shape)}: {ask}")
    if not scalar.requires_grad:
        raise ValueError(f"incl_bwd finds no gradient: {what} depends on none of the activations that are kept")
    scalar.backward()


def off_the_graph(output: Any) -> Any:
    """The same output without its autograd graph, which backward has used up."""
    if isinstance(output, tuple):
        return tuple(off_the_graph(part) for part in output)
    return output.detach() if isinstance(output, Tensor | RecurrentState) else output
