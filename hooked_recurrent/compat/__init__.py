"""What transformer_lens's own tools ask of a model, in 3.9 and 4.x: its base class, its names of hooks, its directions."""

from hooked_recurrent.compat.root_module import HookedRootModule

__all__ = ["HookedRootModule"]
