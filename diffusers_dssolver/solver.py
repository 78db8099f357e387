"""A solver as data: N+1 nodes and a lower-triangular table of coefficients whose rows sum to 1.

Step i goes from node i to node i+1 and uses every model quantity d_j seen so far (computed in `step.py` only):

    x_{i+1} = A_i x_i + B_i * sum_{j<=i} c_ij d_j          i = 0..N-1

Rows sum to 1, so that a constant d is integrated exactly. Euler (DDIM), Adams-Bashforth and DPM-Solver++ are tables
whose numbers follow from the nodes. Nodes fall from the noisiest (at most 1) to exactly 0, the end of the path; their
meaning is defined in `paths.py`. Standard library only.

Paper: Eq. (16), (19), Alg. 1 of "Differentiable Solver Search for Fast Diffusion Sampling", arXiv 2505.21114.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_NFE = 1000
ROW_SUM_TOLERANCE = 1e-6

Row = tuple[float, ...]


@dataclass(frozen=True)
class SolverSpec:
    """The numbers of one solver with N network calls, checked when made.

    Args:
        nodes: N+1 numbers in [0, 1], strictly falling, the last exactly 0.
        coefficients: N rows; row i has i+1 numbers, oldest model quantity first, and sums to 1 (within 1e-6).
        timesteps: N times that the network is fed, in its own units, not negative, strictly falling (rising where the
            network's time does); None: the times of the nodes.

    Raises:
        ValueError: naming the entry, its value and what is expected.
    """

    nodes: Row
    coefficients: tuple[Row, ...]
    timesteps: Row | None = None

    def __post_init__(self) -> None:
        nodes = _numbers("nodes", self.nodes, range(2, MAX_NFE + 2), "N+1 nodes")
        object.__setattr__(self, "nodes", nodes)
        for i, node in enumerate(self.nodes):
            if not 0 <= node <= 1:
                raise ValueError(f"nodes[{i}] is {node!r}; every node must lie in [0, 1]")
        _require_falling("nodes", self.nodes)
        if self.nodes[-1] != 0:
            raise ValueError(f"nodes[{self.nfe}] is {self.nodes[-1]!r}; the last node must be 0, the end of the path")

        _require_list("coefficients", self.coefficients, range(self.nfe, self.nfe + 1), "one row per step")
        rows = tuple(
            _numbers(f"coefficients[{i}]", row, range(i + 1, i + 2), "row i holds c_i0 .. c_ii")
            for i, row in enumerate(self.coefficients)
        )
        object.__setattr__(self, "coefficients", rows)
        for i, row in enumerate(rows):
            if abs(math.fsum(row) - 1) > ROW_SUM_TOLERANCE:
                raise ValueError(f"coefficients[{i}] sums to {math.fsum(row)!r}; every row must sum to 1")

        if self.timesteps is not None:
            times = _numbers("timesteps", self.timesteps, range(self.nfe, self.nfe + 1), "one per network call")
            object.__setattr__(self, "timesteps", times)
            _require_falling("timesteps", self.timesteps, self.rising)
            for i, time in enumerate(self.timesteps):
                if time < 0:
                    raise ValueError(f"timesteps[{i}] is {time!r}; it must not be negative")

    @property
    def nfe(self) -> int:
        """N, the number of network calls."""
        return len(self.nodes) - 1

    @property
    def rising(self) -> bool:
        """Whether the network's time rises from noise to data."""
        return self.timesteps is not None and self.nfe > 1 and self.timesteps[-1] > self.timesteps[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, as they stand in `scheduler_config.json`."""
        data: dict[str, Any] = {"nodes": list(self.nodes)}
        if self.timesteps is not None:
            data["timesteps"] = list(self.timesteps)
        data["coefficients"] = [list(row) for row in self.coefficients]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SolverSpec:
        """The inverse of `to_dict`; a ValueError names the key that is missing, unknown or wrong."""
        if not isinstance(data, Mapping):
            raise ValueError(f"a solver must be a dict with nodes and coefficients, not {short(data)}")
        known = {"nodes", "coefficients", "timesteps"}
        if unknown := sorted(str(key) for key in data if key not in known):
            raise ValueError(f"unknown key {short(unknown[0])} in a solver; known: {', '.join(sorted(known))}")
        for key in ("nodes", "coefficients"):
            if key not in data:
                raise ValueError(f"a solver lacks the key {key!r}")
        return cls(data["nodes"], data["coefficients"], data.get("timesteps"))

    def to_json(self) -> str:
        """JSON text with every digit that float64 has; NaN and infinity cannot occur."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> SolverSpec:
        """Read `to_json` text. Raises ValueError for text that is no JSON, and as `from_dict`."""
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"not a solver in JSON: {error}") from None
        return cls.from_dict(data)

    @classmethod
    def euler(cls, nodes: Sequence[float]) -> SolverSpec:
        """First order: Euler on a flow path, DDIM on a vp path (c = identity)."""
        return cls.adams_bashforth(nodes, 1)

    @classmethod
    def adams_bashforth(cls, nodes: Sequence[float], order: int) -> SolverSpec:
        """Adams-Bashforth of `order` 1 to 4 for uneven nodes, rising to that order as the history grows."""
        nodes = _numbers("nodes", tuple(nodes))
        _require_falling("nodes", nodes)
        return cls(nodes, adams_bashforth_rows(nodes, order))

    @classmethod
    def dpm_solver_pp(cls, nodes: Sequence[float], lambdas: Sequence[float], order: int) -> SolverSpec:
        """DPM-Solver++(2M) or (3M); `lambdas` are the N+1 values of log(alpha/sigma) at the nodes."""
        nodes = _numbers("nodes", tuple(nodes))
        _require_falling("nodes", nodes)
        return cls(nodes, dpm_solver_pp_rows(lambdas, order))


def fold(row: Sequence[Any], available: int) -> list[Any]:
    """Shorten a row to the newest `available` quantities, for a run that started late.

    The oldest quantity left takes the weights of the missing ones, so the sum stays the same.

    Raises:
        ValueError: unless 1 <= available <= len(row).
    """
    if not 1 <= available <= len(row):
        raise ValueError(f"available is {available}; a row of {len(row)} weights can be folded to 1..{len(row)}")
    cut = len(row) - available
    return [sum(row[1 : cut + 1], row[0]), *row[cut + 1 :]]


def adams_bashforth_rows(nodes: Sequence[float], order: int) -> tuple[Row, ...]:
    """Row i integrates the polynomial through the newest min(order, i+1) quantities over [node i, node i+1].

    Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, sec. III.5 (variable step sizes).
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order is {order!r}; Adams-Bashforth is offered for 1, 2, 3, 4")
    rows = []
    for i in range(len(nodes) - 1):
        used = range(max(0, i + 1 - order), i + 1)
        width = nodes[i + 1] - nodes[i]
        points = [(nodes[j] - nodes[i]) / width for j in used]  # in units of this step: 0 is now, 1 is the next node
        weights = [_integral_of_lagrange(points, k) for k in range(len(points))]
        rows.append(_padded(weights, i + 1))
    return tuple(rows)


def dpm_solver_pp_rows(lambdas: Sequence[float], order: int) -> tuple[Row, ...]:
    """DPM-Solver++ multistep rows (data prediction, midpoint type), order rising from 1.

    The last step is of first order when it ends without noise (lambda infinite) or N < 15, and for order 3 the last
    but one is of second order when N < 15: diffusers' `lower_order_final` and `final_sigmas_type="zero"`.
    Order 3 is diffusers' formula; its second difference is half of what a third-order method needs, so that it
    converges with order 2 and a smaller constant than order 2 does.
    Source: Lu et al., DPM-Solver++, arXiv 2211.01095, Alg. 2 and App. A.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order is {order!r}; DPM-Solver++ multistep is offered for 1, 2, 3")
    n = len(lambdas) - 1
    rows: list[Row] = []
    for i in range(n):
        k = min(order, i + 1)
        if i == n - 1 and (n < 15 or math.isinf(lambdas[n])):
            k = 1
        elif i == n - 2 and n < 15:
            k = min(k, 2)
        h = lambdas[i + 1] - lambdas[i]
        if k > 1 and (h <= 0 or lambdas[i] <= lambdas[i - 1]):  # no slope where a clamped schedule stands still
            k = 1
        elif k == 3 and lambdas[i - 1] <= lambdas[i - 2]:
            k = 2
        if k == 1:
            weights = [1.0]
        elif k == 2:
            r = (lambdas[i] - lambdas[i - 1]) / h
            weights = [-1 / (2 * r), 1 + 1 / (2 * r)]
        else:
            r0, r1 = (lambdas[i] - lambdas[i - 1]) / h, (lambdas[i - 1] - lambdas[i - 2]) / h
            fall = -math.expm1(-h)  # 1 - e^-h, what a constant is multiplied by
            phi1 = (h - fall) / h / fall
            phi2 = (0.5 - (h - fall) / h**2) / fall
            # first and second divided differences as weights of (d_{i-2}, d_{i-1}, d_i)
            newer, older = (0.0, -1 / r0, 1 / r0), (-1 / r1, 1 / r1, 0.0)
            second = [(a - b) / (r0 + r1) for a, b in zip(newer, older, strict=True)]
            first = [a + r0 * s for a, s in zip(newer, second, strict=True)]
            weights = [phi1 * f + phi2 * s for f, s in zip(first, second, strict=True)]
            weights[-1] += 1.0
        rows.append(_padded(weights, i + 1))
    return tuple(rows)


def _integral_of_lagrange(points: Sequence[float], k: int) -> float:
    """Integral over [0, 1] of the polynomial that is 1 at points[k] and 0 at the others."""
    polynomial = [1.0]  # ascending powers
    for j, p in enumerate(points):
        if j != k:
            scale = points[k] - p
            shifted = [0.0, *polynomial]
            polynomial = [(a - p * b) / scale for a, b in zip(shifted, [*polynomial, 0.0], strict=True)]
    return math.fsum(c / (power + 1) for power, c in enumerate(polynomial))


def _padded(weights: Sequence[float], length: int) -> Row:
    return (0.0,) * (length - len(weights)) + tuple(weights)


def _numbers(name: str, values: Any, lengths: range = range(sys.maxsize), meaning: str = "") -> Row:
    """Finite floats; the length is checked first, as a file may hold millions."""
    _require_list(name, values, lengths, meaning)
    numbers = []
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name}[{i}] is {short(value)}; it must be a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ValueError(f"{name}[{i}] is {short(value)}; it must be finite")
        numbers.append(number)
    return tuple(numbers)


def _require_list(name: str, values: Any, allowed: range, meaning: str) -> None:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Sequence):
        raise ValueError(f"{name} is {short(values)}; it must be a list")
    if len(values) not in allowed:
        wanted = f"{allowed[0]}" if len(allowed) == 1 else f"{allowed[0]} to {allowed[-1]}"
        raise ValueError(f"{name} has {len(values)} entries; {wanted} expected ({meaning})")


def _require_falling(name: str, values: Row, rising: bool = False) -> None:
    where, way = ("above", "rise") if rising else ("below", "fall")
    for i in range(1, len(values)):
        if values[i] == values[i - 1] or (values[i] > values[i - 1]) != rising:
            raise ValueError(
                f"{name}[{i}] is {values[i]!r}, not {where} {name}[{i - 1}] = {values[i - 1]!r}; {name} must {way}"
            )


def short(value: Any) -> str:
    """A repr of at most 60 characters, for messages about untrusted values."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or nesting without end
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
