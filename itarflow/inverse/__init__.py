"""From noise to images: solvers that invert a block, which they see as a protocol, and guidance."""

from itarflow.inverse.guidance import Guidance, guide
from itarflow.inverse.solvers import Conditioner, Jacobi, Solver, sequential

__all__ = ["Conditioner", "Guidance", "Jacobi", "Solver", "guide", "sequential"]
