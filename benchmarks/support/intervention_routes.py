"""Four ways to ask what one write does to the logits; `benchmarks/interventions.py` times them.

The model is a six-layer hybrid of Qwen3.5-0.8B's layer shape (hidden 1024, 16 heads of 128 x 128, MLP 3584, a softmax layer in
fourth place) with random weights and a vocabulary of 1,000; a text of 512 tokens; the write of layer 2 (the third of six), head
4, at position 256.
"""

import copy

import torch
from torch import Tensor, nn

from hooked_recurrent import HookedRecurrentModel, WriteEdit
from hooked_recurrent.patching import Trunk, run_edits

from .hybrid import FULL, LINEAR, VOCABULARY, bridge_of, random_model, state_hook
from .plain import Qwen3_5ForCausalLM

LENGTH, T, LAYER, HEAD, WIDTH = 512, 256, 2, 4, 128
KINDS = [LINEAR] * 3 + [FULL] + [LINEAR] * 2


def build() -> tuple[Qwen3_5ForCausalLM, HookedRecurrentModel, Tensor]:
    """Both models with the same random weights, and the text."""
    theirs = random_model(KINDS)
    ours = HookedRecurrentModel.from_hf(theirs).requires_grad_(False)
    return theirs, ours, torch.randint(VOCABULARY, (1, LENGTH))


class CachedPrefix:
    """The recipe with transformers: copy the cache of the prefix, read token t, change the state, read on."""

    def __init__(self, model: Qwen3_5ForCausalLM, tokens: Tensor, native: tuple[Tensor, Tensor]):
        self.model, self.tokens, self.native = model, tokens, native
        self.prefix = model(tokens[:, :T], use_cache=True).past_key_values

    def __call__(self, keys: Tensor, values: Tensor, horizon: int | None) -> Tensor:
        """Logits [edit, d_vocab] of the last token of the horizon."""
        cache, rows = copy.deepcopy(self.prefix), len(keys)
        if rows > 1:
            cache.reorder_cache(torch.zeros(rows, dtype=torch.long))  # linear layers have no batch_repeat_interleave
        text = self.tokens.expand(rows, -1)
        self.model(text[:, T : T + 1], past_key_values=cache, use_cache=True)
        change = keys[:, :, None] * values[:, None, :] - self.native[0][:, None] * self.native[1][None, :]
        cache.layers[LAYER].recurrent_states[0][:, HEAD] += change
        stop = LENGTH if horizon is None else T + 1 + horizon
        out = self.model(text[:, T + 1 : stop], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]


class Forks:
    """Our way: one plain pass, then every edit runs from its layer and position on."""

    def __init__(self, model: HookedRecurrentModel, tokens: Tensor):
        self.model, self.tokens, self.trunk = model, tokens, Trunk.grow(model, tokens, [T])

    def __call__(self, keys: Tensor, values: Tensor, horizon: int | None) -> Tensor:
        """Logits [edit, d_vocab] of the last token of the horizon."""
        edits = [WriteEdit(LAYER, HEAD, T, key=key, value=value) for key, value in zip(keys, values, strict=True)]
        forks = run_edits(self.model, self.tokens, edits, horizon=horizon, trunk=self.trunk, last_only=True)
        return torch.stack([fork.logits[-1] for fork in forks])


class EagerScan:
    """transformer_lens's bridge: a whole pass, the edited layer scanned in Python, with a hook that carries the change on.

    Its hook on the states is fired after the scan and changes only what is read, so the difference that the edit makes to
    every later state is worked out in the hook: E_s = alpha_s (I - beta_s k_s k_s^T) E_{s-1}.
    """

    def __init__(self, model: Qwen3_5ForCausalLM, tokens: Tensor, native: tuple[Tensor, Tensor]):
        self.bridge, self.tokens, self.native = bridge_of(model), tokens, native
        self.prefix = state_hook(self.bridge, LAYER).removesuffix("hook_ssm_state")
        self.bridge.get_submodule(self.prefix.rstrip(".")).eager_scan = True

    def __call__(self, keys: Tensor, values: Tensor, horizon: int | None) -> Tensor:
        """Logits [edit, d_vocab] of the last token of the horizon; one edit at a time, the whole text each."""
        stop = LENGTH if horizon is None else T + 1 + horizon
        return torch.stack([self._one(key, value, stop) for key, value in zip(keys, values, strict=True)])

    def _one(self, key: Tensor, value: Tensor, stop: int) -> Tensor:
        seen: dict[str, Tensor] = {}

        def keep(tensor: Tensor, hook) -> None:
            seen[hook.name.removeprefix(self.prefix)] = tensor

        def carry(states: Tensor, hook) -> Tensor:
            change = key[:, None] * value - self.native[0][:, None] * self.native[1]
            for s in range(T, states.shape[1]):
                if s > T:
                    k = nn.functional.normalize(seen["hook_k"][0, s, HEAD], dim=0)
                    change = seen["hook_log_decay"][0, s, HEAD].exp() * change
                    change = change - seen["hook_beta"][0, s, HEAD] * k[:, None] * (k @ change)
                states[0, s, HEAD] += change
            return states

        names = [(f"{self.prefix}{name}", keep) for name in ("hook_k", "hook_log_decay", "hook_beta")]
        hooks = [*names, (f"{self.prefix}hook_ssm_state", carry)]
        return self.bridge.run_with_hooks(self.tokens[:, :stop], fwd_hooks=hooks)[0, -1]


def matrix_products(model: HookedRecurrentModel, rows: int, length: int) -> None:
    """The matrix products that no way around them is known for: those of the layers above the write, per row and position.

    Of the edited layer what follows the read; of the last one what follows the read only where logits are wanted.
    """
    for layer, block in enumerate(list(model.blocks)[LAYER:], start=LAYER):
        mixer = block.mixer if block.recurrent else block.attn
        for name, part in block.named_modules():
            if isinstance(part, nn.Linear):
                after = part is mixer.out or name.startswith("mlp.")
                if after or layer > LAYER:
                    positions = 1 if after and layer == len(model.blocks) - 1 else length
                    part(torch.zeros(rows * positions, part.in_features))
    nn.functional.linear(torch.zeros(rows, model.cfg.d_model), model.W_U.T)
