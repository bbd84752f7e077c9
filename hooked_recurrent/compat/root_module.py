"""The few names that moved between transformer_lens 3.9 and 4.x."""

try:  # 4.x
    from transformer_lens.HookedRootModule import HookedRootModule
except ImportError:  # 3.9
    from transformer_lens.hook_points import HookedRootModule  # type: ignore[no-redef]

__all__ = ["HookedRootModule"]
