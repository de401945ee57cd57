"""Solvers that invert one block: x_i = z_i scale_i(x_{<i}) + shift_i(x_{<i}), i = 0 .. N - 1.

A solver sees a block only as a `Conditioner`, so it works for any network, guided or not: scale is exp(alpha) and
shift is mu of TARFlow's equation 4, or the guided ones of its equation 9.

Shapes: B batch, N tokens, D values a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from itarflow.runtime.graphed import DeviceConditioner
from itarflow.runtime.ranges import check_integer, check_number, shown

Affine = tuple[Tensor, Tensor]
Guess = Literal["z", "zero"]
"""Where an iteration starts."""


Progress = Callable[[int], None]
"""Called with the number of tokens that have just been solved."""


class Conditioner(Protocol):
    """Gives the affine maps of tokens from the tokens before them."""

    def __call__(self, tokens: Tensor, start: int | Tensor, stop: int | None = None) -> Affine:
        """(shift, scale), each (B, n, D), of the tokens at positions start + 1 .. start + n.

        Args:
            tokens: (B, n, D), at positions start .. start + n - 1. Earlier calls must have given all tokens before
                them; of a token given twice the last value counts.
            start: one position for all samples, or (B,) int64.
            stop: the largest start + n, which a caller who knows it spares the host to wait for.
        """

    def select(self, samples: Tensor) -> Conditioner:
        """A conditioner for the samples of the batch with these indices (b,) only."""


Evaluation = Callable[[Tensor, Tensor], Affine]
"""As a conditioner that is given a start (B,)."""


class Solver(Protocol):
    """Inverts a block."""

    def __call__(
        self,
        conditioner: Conditioner,
        z: Tensor,
        first: Affine,
        progress: Progress | None = None,
        guess: Tensor | None = None,
    ) -> Tensor:
        """x (B, N, D) from z (B, N, D).

        Args:
            conditioner: the block.
            z: in the block's own order.
            first: (shift, scale) of token 0, each broadcastable to (B, 1, D).
            progress: called now and then; the numbers sum up to N.
            guess: (B, N, D), an initial guess of x; None = the solver's own.
        """


def sequential(
    conditioner: Conditioner,
    z: Tensor,
    first: Affine,
    progress: Progress | None = None,
    guess: Tensor | None = None,  # noqa: ARG001, not used by an exact solver
) -> Tensor:
    """Exact inversion, one token after another: N - 1 evaluations on windows of one. See `Solver`.

    x_0 = z_0,  x_i = z_i exp(alpha_i(x_{<i})) + mu_i(x_{<i})       (TARFlow, eq. 4)
    """
    if isinstance(conditioner, DeviceConditioner):
        return conditioner.sequential(z, first, progress)
    tokens: list[Tensor] = []
    shift, scale = first
    for position, token in enumerate(z.split(1, dim=1)):
        if position > 0:
            shift, scale = conditioner(tokens[-1], position - 1)
        tokens.append(token * scale + shift)
        if progress is not None:
            progress(1)
    return torch.cat(tokens, dim=1)


@dataclass(frozen=True, kw_only=True)
class Jacobi:
    """Fixed-point iteration on a window of tokens at a time: exact up to a tolerance, and often in fewer evaluations.

        x'_i = z_i scale_i(x_{<i}) + shift_i(x_{<i}),  all i of the window at once

    from guesses x of the tokens before them, repeated until they converge. Each evaluation makes at least one more
    token exact, since all tokens before it are; and accepts each further one whose predecessors were all guessed
    within the tolerance. So there are never more evaluations than tokens.

    With `window` = None it is the Jacobi iteration on the whole sequence (Song et al. 2021); with a number of tokens,
    Gauss-Seidel between windows and Jacobi within (arXiv 2505.12849), except that the window slides; 1 = `sequential`.

    Args:
        window: tokens that are computed at once, from 1 to N; None = all.
        tolerance: largest change of a value of x, in the units of the block, at which a guess is accepted. 0 =
            until nothing changes, which gives the result of `sequential` up to rounding.
        guess: the initial guess unless a call gives one: "z", or "zero".

    Raises:
        ValueError: window < 1, a tolerance that is negative or not finite, or another guess.
    """

    window: int | None = None
    tolerance: float = 1e-3
    guess: Guess = "z"

    def __post_init__(self) -> None:
        if self.window is not None:
            check_integer("window", self.window, 1, 2**32)
        check_number("tolerance", self.tolerance, 0)
        if not isinstance(self.guess, str) or self.guess not in get_args(Guess):
            raise ValueError(f"guess is {shown(self.guess)}; expected 'z' or 'zero'.")

    def check(self, num_tokens: int) -> None:
        """Refuse a window that is longer than a sequence of that many tokens.

        Raises:
            ValueError: it is.
        """
        if self.window is not None and self.window > num_tokens:
            raise ValueError(
                f"window is {self.window}, but the block has {num_tokens} tokens; expected at most that many, or None "
                "for all."
            )

    def __call__(
        self,
        conditioner: Conditioner,
        z: Tensor,
        first: Affine,
        progress: Progress | None = None,
        guess: Tensor | None = None,
    ) -> Tensor:
        """See `Solver`. Until every token of every sample is known:

        1. Window: for each sample the next `window` tokens from its first unknown one on.
        2. Evaluate: x' of the window from the present x; tokens that are known stay.
        3. Accept: the first unknown token, and those after it up to the first whose guess was wrong.
        4. Reset on overflow: guesses beyond `_LARGEST_GUESS` become 0, and their window is done token by token.
        5. Drop finished samples, as soon as they are half of those that are left.
        """
        self.check(z.shape[1])
        total, samples = z.shape[1], torch.arange(len(z), device=z.device)
        x = _first_guess(z, guess, self.guess)
        x[:, :1] = z[:, :1] * first[1] + first[0]
        result = torch.empty_like(x)
        known = torch.ones_like(samples)  # leading tokens of each sample that are final
        low = high = 1  # the least and the most of them
        alone_until = 0  # where guesses overflowed, windows hold one token
        reported = _report(progress, 0, low)
        while low < total:
            # 1. It ends at the last token at most; known tokens that it then covers again stay as they are.
            count = 1 if low < alone_until else min(self.window or total, total - low)
            last = min(high - 1, total - 1 - count)
            step = partial(_step, self.tolerance, count)
            if isinstance(conditioner, DeviceConditioner):
                key = self.tolerance, count
                x, known, done, overflown = conditioner.iterate(step, key, count, last + count, x, z, known)
            else:
                evaluation = partial(_evaluate, conditioner, low - 1 if last == low - 1 else None, last + count)
                x, known, done, overflown = step(evaluation, x, z, known)
            # The host needs these values to go on, so it waits for the device here.
            low, high, any_overflown, num_done = torch.stack(
                [known.min(), known.max(), overflown.any().long(), done.sum()]
            ).tolist()
            if any_overflown:
                alone_until = min(low + count, total)
            # 5.
            if 2 * num_done >= len(samples) and low < total:
                result[samples] = x
                left = (~done).nonzero().flatten()
                samples, x, z, known = samples[left], x[left], z[left], known[left]
                conditioner = conditioner.select(left)
                high = int(known.max())
            reported = _report(progress, reported, low)
        result[samples] = x
        return result


def _step(
    tolerance: float, count: int, evaluation: Evaluation, x: Tensor, z: Tensor, known: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps 2 to 4 of `Jacobi`: x, how many tokens are known now, which samples are done, which have overflowed.

    Args:
        tolerance: see `Jacobi`.
        count: tokens of a window.
        evaluation: of the block.
        x: (B, N, D).
        z: (B, N, D).
        known: (B,), leading tokens that are final.
    """
    total = z.shape[1]
    start = (known - 1).clamp(max=total - 1 - count)
    given = start[:, None] + torch.arange(count, device=z.device)
    window = given + 1
    # 2.
    shift, scale = evaluation(_take(x, given), start)
    before = _take(x, window)
    final = window < known[:, None]
    after = torch.where(final[..., None], before, _take(z, window) * scale + shift)
    # 3. and 4.
    known = start + 1 + _accepted(before, after, final, tolerance)
    after, overflown = _without_overflow(after, guessed=window >= known[:, None])
    x = x.scatter(1, window[..., None].expand_as(after), after)
    return x, known, known == total, overflown.any(dim=1)


def _evaluate(conditioner: Conditioner, together: int | None, stop: int, tokens: Tensor, start: Tensor) -> Affine:
    """By windows that begin at one position for all samples, if they do."""
    return conditioner(tokens, start if together is None else together, stop)


_LARGEST_GUESS = 1e4
"""Larger guesses are reset to 0, long before they would overflow inside the network."""


def _first_guess(z: Tensor, given: Tensor | None, otherwise: str) -> Tensor:
    """A new tensor."""
    if given is None:
        given = z if otherwise == "z" else torch.zeros_like(z)
    if given.shape != z.shape:
        raise ValueError(f"guess has shape {tuple(given.shape)}; expected {tuple(z.shape)}, that of z.")
    given = given.to(z)
    return torch.where(given.abs() <= _LARGEST_GUESS, given, 0)


def _accepted(before: Tensor, after: Tensor, final: Tensor, tolerance: float) -> Tensor:
    """How many leading tokens of a window are known after an evaluation, (B,), at least one.

    Args:
        before: (B, n, D), the window's tokens as they were guessed.
        after: (B, n, D), as they were computed from those guesses.
        final: (B, n), tokens that were known before.
        tolerance: largest change of a value at which a guess counts as right.
    """
    right = final | ((after - before).abs().amax(dim=-1) <= tolerance)  # False for NaN
    return (right.cumprod(dim=1).sum(dim=1) + 1).clamp(max=right.shape[1])


def _without_overflow(after: Tensor, guessed: Tensor) -> tuple[Tensor, Tensor]:
    """The window's tokens (B, n, D) with too large guesses set to 0, and where guesses overflowed, (B, n).

    They count as overflowed only in samples whose known tokens are finite; in others there is nothing left to guess.

    Args:
        after: (B, n, D).
        guessed: (B, n), tokens that are not known yet.
    """
    large = guessed & ~(after.abs().amax(dim=-1) <= _LARGEST_GUESS)  # True for NaN
    sound = (guessed | after.isfinite().all(dim=-1)).all(dim=1)
    return torch.where(large[..., None], 0, after), large & sound[:, None]


def _take(tokens: Tensor, positions: Tensor) -> Tensor:
    """The tokens (B, n, D) at positions (B, n)."""
    return tokens.gather(1, positions[..., None].expand(-1, -1, tokens.shape[-1]))


def _report(progress: Progress | None, reported: int, solved: int) -> int:
    if progress is not None and solved > reported:
        progress(solved - reported)
    return solved
