"""What transformer_lens's analysis asks of a model about its unembedding and biases."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Tokens = str | int | Int[Tensor, ""] | Int[Tensor, "batch"] | Int[Tensor, "batch pos"]


class TiedUnembed(nn.Module):
    """The embedding's weight as an unembedding. It owns none: the tuple hides the embedding from torch's own counting."""

    def __init__(self, embed: nn.Embedding):
        super().__init__()
        self.source = (embed,)

    @property
    def weight(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding's weight."""
        return self.source[0].weight


class DirectionsMixin:
    """Gives a model `b_U`, `tokens_to_residual_directions` and `accumulated_bias`."""

    @property
    def b_U(self: Any) -> Float[Tensor, "d_vocab"]:
        """The unembedding's bias: none of these models has one, so zeros."""
        return self.W_U.new_zeros(self.cfg.d_vocab)

    def tokens_to_residual_directions(self: Any, tokens: Tokens) -> Float[Tensor, "*shape d_model"]:
        """The columns of W_U that belong to tokens: [d_model] for one, [batch, (pos,) d_model] for several.

        A direction of the stream behind ln_final: nothing is folded here, so ln_final's weight is not part of W_U.
        """
        ids = torch.as_tensor(self.to_single_token(tokens) if isinstance(tokens, str) else tokens, device=self.device)
        if ids.is_floating_point() or ids.ndim > 2:
            raise ValueError(f"tokens must be integers [], [batch] or [batch, pos], got {ids.dtype} {tuple(ids.shape)}")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.cfg.d_vocab:
            raise IndexError(f"tokens must be 0 to {self.cfg.d_vocab - 1}, got {int(ids.min())} to {int(ids.max())}")
        return self.W_U.T[ids.long()]

    def accumulated_bias(
        self: Any, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, "d_model"]:
        """The sum of the output biases of all mixers below `layer`, and of its own too with mlp_input; MLPs have none."""
        total = self.W_U.new_zeros(self.cfg.d_model)
        for block in list(self.blocks)[: layer + int(mlp_input)]:
            bias = (block.mixer if block.recurrent else block.attn).out.bias
            total = total if bias is None else total + bias
        return total
