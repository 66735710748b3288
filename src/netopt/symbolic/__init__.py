"""Numbers that record how they were computed: one algebra for tracing, for counts and for configurations."""

from netopt.symbolic.constraints import Constraints, Equation, Guard, calling_line
from netopt.symbolic.expression import (
    AttributeRef,
    DimSize,
    Expression,
    Solution,
    Term,
    combine,
    divide_exactly,
    evaluate,
    expression_of,
    leaf,
    leaves,
    substitute,
    value_of,
    walk,
)
from netopt.symbolic.number import SYMBOLIC, Shape, SymbolicFloat, SymbolicInt, plain, record

__all__ = [
    "SYMBOLIC",
    "AttributeRef",
    "Constraints",
    "DimSize",
    "Equation",
    "Expression",
    "Guard",
    "Shape",
    "Solution",
    "SymbolicFloat",
    "SymbolicInt",
    "Term",
    "calling_line",
    "combine",
    "divide_exactly",
    "evaluate",
    "expression_of",
    "leaf",
    "leaves",
    "plain",
    "record",
    "substitute",
    "value_of",
    "walk",
]
