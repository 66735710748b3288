"""Which neurons a model has and which must be removed together.

Every dimension of every parameter starts as an axis of its own. The model runs once, every operation states equations
between dimensions, and unification solves them: dimensions that share an axis shrink together. Shapes and integers
only: nothing here reads a weight's value or changes the model.
"""

from netopt.axes.axes import Assignment, Axes, Axis, Member, Tap
from netopt.axes.find import Outputs, find_axes
from netopt.axes.kinds import KINDS
from netopt.axes.operation import Dim, Operation, known_operations, rule

__all__ = [
    "KINDS",
    "Assignment",
    "Axes",
    "Axis",
    "Dim",
    "Member",
    "Operation",
    "Outputs",
    "Tap",
    "find_axes",
    "known_operations",
    "rule",
]
