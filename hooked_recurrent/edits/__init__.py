"""Changes to a run, as data: to single writes, to states, and to any activation, at absolute positions.

All three kinds are given as `edits=[...]` and obey step equivalence. They are compared by their entries, printed in one
line, and kept in files by `save_edits` and `load_edits`.
"""

from hooked_recurrent.edits.activation import ActivationEdit, ActivationOp, attached
from hooked_recurrent.edits.base import Edit, Edits, Rows, Stage
from hooked_recurrent.edits.memory import MemoryEdit, Moment, Op, Reading
from hooked_recurrent.edits.positions import Position
from hooked_recurrent.edits.saved import load_edits, save_edits
from hooked_recurrent.edits.state import StateEdit
from hooked_recurrent.edits.write import Form, WriteEdit, apply_edits

__all__ = [
    "ActivationEdit",
    "ActivationOp",
    "Edit",
    "Edits",
    "Form",
    "MemoryEdit",
    "Moment",
    "Op",
    "Position",
    "Reading",
    "Rows",
    "Stage",
    "StateEdit",
    "WriteEdit",
    "apply_edits",
    "attached",
    "load_edits",
    "save_edits",
]
