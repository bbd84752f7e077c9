"""What a recurrent model remembers: per layer the matrix memory and the tails around it, and the position.

A state is never changed in place: a forward call returns a new one, and `fork`, `index`, `to`, `with_matrix` give new
ones too, so that a state can be kept, branched and reused freely.
"""

import json
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooked_recurrent.display import OneLine
from hooked_recurrent.display.figures import matrix_map
from hooked_recurrent.display.model import state_html
from hooked_recurrent.files import save_tensors

if TYPE_CHECKING:  # importing hooked_recurrent does not load matplotlib
    from matplotlib.figure import Figure

FORMAT = "hooked_recurrent.state.v1"


Shapes = dict[str, tuple[int | None, ...]]
"""Per field of a LayerState its shape behind the batch axis; None where a length grows with the text."""


@dataclass(frozen=True, repr=False)
class LayerState(OneLine):
    """The memory of one layer; what a kind of layer does not have is None."""

    matrix: Float[Tensor, "batch head d_k d_v"] | None = None
    """The matrix memory S, float32 or wider."""
    conv_tail: Float[Tensor, "batch past channel"] | None = None
    """The last inputs of the short convolution."""
    shift_tail: Float[Tensor, "batch one d_model"] | None = None
    """What a mixer with token shift saw last."""
    mlp_tail: Float[Tensor, "batch one d_model"] | None = None
    """What an MLP with token shift saw last."""
    keys: Float[Tensor, "batch pos kv_head d_head"] | None = None
    """Cached keys of a softmax layer, after the rotary embedding."""
    values: Float[Tensor, "batch pos kv_head d_head"] | None = None
    """Cached values of a softmax layer."""

    def shapes(self) -> Shapes:
        """The shape of every tensor that is present, behind its batch axis."""
        return {name: tuple(tensor.shape[1:]) for name, tensor in self.tensors().items()}

    def map(self, change) -> "LayerState":
        """A copy with `change` applied to every tensor that is present."""
        return LayerState(**{name: change(value) for name, value in self.tensors().items()})

    def figure(self, head: int, *, row: int = 0, title: str = "") -> "Figure":
        """The matrix memory of one head as a heat map; `ValueError` for a layer without one."""
        if self.matrix is None:
            raise ValueError("this layer has no matrix memory to draw")
        if not 0 <= head < self.matrix.shape[1]:
            raise IndexError(f"head {head} is out of range: the layer has heads 0 to {self.matrix.shape[1] - 1}")
        return matrix_map(self.matrix[:, head], row=row, title=title or f"head {head}: the state")

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}


@dataclass(frozen=True, repr=False)
class RecurrentState:
    """The memory of a whole model after `position` tokens."""

    layers: tuple[LayerState, ...]
    """One entry per block."""
    position: int = 0
    """How many tokens have been read; the absolute position of the next one."""

    @property
    def batch_size(self) -> int | None:
        """Number of sequences, or None for a state that has seen nothing."""
        for layer in self.layers:
            for tensor in layer.tensors().values():
                return tensor.shape[0]
        return None

    def map(self, change) -> "RecurrentState":
        """A copy with `change` applied to every tensor."""
        return replace(self, layers=tuple(layer.map(change) for layer in self.layers))

    def clone(self) -> "RecurrentState":
        """A deep copy."""
        return self.map(torch.clone)

    def detach(self) -> "RecurrentState":
        """The same state, cut from the autograd graph."""
        return self.map(torch.detach)

    def to(self, *args, **kwargs) -> "RecurrentState":
        """Every tensor moved as `torch.Tensor.to` does."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def fork(self, ways: int) -> "RecurrentState":
        """Each sequence repeated `ways` times in a row: row b becomes rows b * ways ... b * ways + ways - 1."""
        if not isinstance(ways, int):
            raise TypeError(f"a state is forked a whole number of ways, got {ways!r}")
        if ways < 1:
            raise ValueError(f"a state is forked at least 1 way, got {ways}")
        return self.map(lambda tensor: tensor.repeat_interleave(ways, dim=0))

    def index(self, rows: int | slice | list[int] | Tensor) -> "RecurrentState":
        """The chosen batch rows, in the order given; a single int keeps the batch axis."""
        size = self.batch_size
        chosen = [rows] if isinstance(rows, int) else rows
        mask = isinstance(chosen, Tensor) and chosen.dtype == torch.bool
        if not isinstance(chosen, slice) and not mask and size is not None:
            for row in map(int, chosen):
                if not -size <= row < size:
                    raise IndexError(f"batch row {row} is out of range: the state holds {size} sequences")
        return self.map(lambda tensor: tensor[chosen])

    def with_matrix(self, layer: int, matrix: Float[Tensor, "batch head d_k d_v"]) -> "RecurrentState":
        """The same state with another matrix memory in one layer."""
        if not 0 <= layer < len(self.layers):
            raise IndexError(f"layer {layer} is out of range: the state has {len(self.layers)} layers")
        old = self.layers[layer].matrix
        if old is None or old.shape != matrix.shape:
            expected = "no matrix memory" if old is None else f"a matrix memory of shape {tuple(old.shape)}"
            raise ValueError(f"layer {layer} has {expected}, got a matrix of shape {tuple(matrix.shape)}")
        layers = list(self.layers)
        layers[layer] = replace(layers[layer], matrix=matrix.to(old.dtype))
        return replace(self, layers=tuple(layers))

    def __repr__(self) -> str:
        """One line: the position, the batch size, and the kinds of layers by the shapes of their tensors."""
        kinds = Counter(map(repr, self.layers))
        layers = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        return f"RecurrentState(position={self.position}, batch_size={self.batch_size}, layers: {layers})"

    def figure(self, layer: int, head: int, *, row: int = 0) -> "Figure":
        """The matrix memory of one head as a heat map: key channels down, value channels across."""
        if not 0 <= layer < len(self.layers):
            raise IndexError(f"layer {layer} is out of range: the state has {len(self.layers)} layers")
        return self.layers[layer].figure(head, row=row, title=f"layer {layer}, head {head}: the state")

    def _repr_html_(self) -> str:
        """A row per layer: what it holds, and how large its matrices are."""
        return state_html(self)

    @staticmethod
    def stack(states: list["RecurrentState"]) -> "RecurrentState":
        """One batch out of several states at the same position."""
        if not states:
            raise ValueError("stack needs at least one state")
        if len({state.position for state in states}) != 1:
            raise ValueError(f"stacked states must share one position, got {[state.position for state in states]}")
        kinds = {tuple(tuple(layer.tensors()) for layer in state.layers) for state in states}
        if len(kinds) != 1:
            raise ValueError("stack needs states of the same model: theirs hold different tensors")
        layers = []
        for entries in zip(*(state.layers for state in states), strict=True):
            names = entries[0].tensors()
            layers.append(LayerState(**{name: torch.cat([getattr(e, name) for e in entries]) for name in names}))
        return RecurrentState(tuple(layers), states[0].position)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically."""
        tensors = {
            f"layers.{index}.{name}": tensor
            for index, layer in enumerate(self.layers)
            for name, tensor in layer.tensors().items()
        }
        about = {"format": FORMAT, "position": str(self.position), "n_layers": str(len(self.layers))}
        return save_tensors(Path(path), tensors, {"state": json.dumps(about)})

    @staticmethod
    def load(path: str | Path, device: str | torch.device = "cpu") -> "RecurrentState":
        """Read a file that `save` wrote; a missing, truncated or foreign file is one clear error."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no state file at {path}")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                about = _about(file.metadata())
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error})") from None
        if about.get("format") != FORMAT:
            came = about.get("format")
            raise ValueError(f"{path} is no saved RecurrentState: its format is {came!r}, not {FORMAT!r}")
        layers: list[dict[str, Tensor]] = [{} for _ in range(int(about["n_layers"]))]
        places = {
            f"layers.{index}.{f.name}": (index, f.name) for index in range(len(layers)) for f in fields(LayerState)
        }
        for name, tensor in tensors.items():
            if name not in places:
                raise ValueError(f"{path} is no saved RecurrentState: it holds a tensor {name!r}")
            index, field = places[name]
            layers[index][field] = tensor
        return RecurrentState(tuple(LayerState(**entry) for entry in layers), int(about["position"]))


def _about(metadata: dict[str, str] | None) -> dict[str, str]:
    """What a file says about itself; nothing for a file of someone else."""
    try:
        about = json.loads((metadata or {}).get("state", "{}"))
    except json.JSONDecodeError:
        return {}
    return about if isinstance(about, dict) else {}
