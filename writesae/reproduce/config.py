"""How large a reproduction is, and which cell of which model it looks at."""

from dataclasses import dataclass, replace
from typing import Any

from hooked_recurrent.config import StrictConfig, require_positive

CELLS = {("qwen3.5", "0.8b"): (9, 4), ("mamba2", "370m"): (24, 0), ("rwkv7", "1.5b"): (12, 0)}
"""The paper's cell (layer, head) of each of its models, by what the model's name holds, whoever converted it."""


@dataclass(frozen=True)
class ReproduceConfig(StrictConfig):
    """One run of all experiments on one model. The defaults fit the bundled models and take tens of minutes on one core."""

    model: str = "tiny-gated-deltanet"
    """A bundled model, a local folder, or a hub name."""
    layer: int | None = None
    """Layer of the cell; None (with head) takes the paper's cell of the paper's models, and of another model that cell with a
    half-life of two tokens or more whose deleted writes move the output most."""
    head: int | None = None
    """Head of the cell."""
    text: str | None = None
    """A folder of text files; None is the Python standard library."""
    length: int = 256
    """Tokens per passage (1,024 in the paper)."""
    train_passages: int = 1600
    """Passages that dictionaries are trained on (5,000 in the paper)."""
    heldout_passages: int = 200
    """Passages of other files that everything is tested on."""
    n_atoms: int = 512
    """Atoms of a dictionary (2,048 in the paper)."""
    best_atoms: int = 2048
    """Atoms of the dictionary for replacement, of which one at a time stands for a write."""
    k: int = 8
    """Atoms that may be active at once (32 in the paper)."""
    train_steps: int = 2000
    """Training steps of a dictionary."""
    firings: int = 2400
    """Firings in the main replacement test (1,851 in the paper); smaller tests take a share of it."""
    per_atom: int = 30
    """Most firings of one atom."""
    seeds: int = 5
    """Seeds of what is trained several times."""
    trials: int = 60
    """Install trials of the main stratum and magnitude, per direction."""
    contexts: int = 40
    """Contexts of the closed form."""
    seed: int = 0
    """Seed of everything."""
    quick: bool = False
    """Whether this is the small run that only shows which way every effect points."""

    def __post_init__(self) -> None:
        owner = "ReproduceConfig"
        if (self.layer is None) != (self.head is None):
            raise ValueError(f"give layer and head together, got layer={self.layer} and head={self.head}")
        require_positive(owner, length=self.length, train_passages=self.train_passages, n_atoms=self.n_atoms, k=self.k)
        require_positive(owner, heldout_passages=self.heldout_passages, train_steps=self.train_steps)
        require_positive(owner, firings=self.firings, per_atom=self.per_atom, seeds=self.seeds)
        require_positive(owner, trials=self.trials, contexts=self.contexts)

    @classmethod
    def of(cls, model: str, *, quick: bool = False, **given: Any) -> "ReproduceConfig":
        """The sizes that fit a model: small for the bundled ones, the paper's for its own, and less of all with `quick`.

        Args:
            model: its name.
            quick: minutes instead of an hour.
            **given: fields that stand above these; None counts as not given.
        """
        config = cls(model=model, quick=quick)
        plain = model.lower().replace("mamba-2", "mamba2").replace("rwkv-7", "rwkv7")
        cell = next((cell for words, cell in CELLS.items() if all(word in plain for word in words)), None)
        if not model.startswith("tiny-"):
            config = replace(
                config,
                length=1024,
                train_passages=5000,
                heldout_passages=500,
                n_atoms=2048,
                best_atoms=8192,
                k=32,
                train_steps=20000,
            )
        if cell is not None:
            config = replace(config, layer=cell[0], head=cell[1])
        if quick:
            config = replace(
                config, train_passages=200, heldout_passages=40, n_atoms=256, best_atoms=512, train_steps=300, firings=180,
                per_atom=5, seeds=2, trials=12, contexts=10,
            )  # fmt: skip
        return replace(config, **{name: value for name, value in given.items() if value is not None})
