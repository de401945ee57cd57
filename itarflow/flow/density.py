"""The density that a flow gives an image, and the training loss.

Shapes: B batch, N tokens, D values a token.
"""

from __future__ import annotations

import math

from torch import Tensor

from itarflow.flow.block import FlowOutput

LOG_2PI = math.log(2 * math.pi)


def nll_per_dim(output: FlowOutput) -> Tensor:
    """The training loss of each sample (B,), in nats per dim.

        1/2 ||z||^2 - log |det df(x)/dx|                                (TARFlow, eq. 2)
        1/2 ||z||^2 + sum_t sum_i sum_j alpha^t_i(x^t_{<i})_j           (TARFlow, eq. 6)

    The second is the first with the log-determinants of all blocks t put in. Both are divided by N * D here, and leave
    out log(2 pi) / 2 a dim: the negative log-likelihood under a unit Gaussian prior, up to that constant. With a
    learned prior variance it is the objective, not the likelihood.

    Args:
        output: z = f(x) (B, N, D) and log_det (B,).
    """
    return 0.5 * output.z.square().mean(dim=(1, 2)) - output.log_det / output.z[0].numel()


def log_density(output: FlowOutput, prior_variance: Tensor) -> Tensor:
    """The log-density (B,) in nats, constant included, of what a flow mapped to `output`.

        log p(x) = log p_0(f(x)) + log |det df(x)/dx|,  p_0 = N(0, prior_variance)      (TARFlow, eq. 1)

    Equation 1 is its negative, which training minimises.

    Args:
        output: z (B, N, D) and log_det (B,).
        prior_variance: (N, D), of the Gaussian prior of z.
    """
    variance = prior_variance.to(output.z.dtype)
    log_prior = -0.5 * (output.z.square() / variance + variance.log() + LOG_2PI)
    return log_prior.sum(dim=(1, 2)) + output.log_det


def updated_prior_variance(prior_variance: Tensor, z: Tensor, rate: float = 0.1) -> Tensor:
    """The moving average (N, D) of z^2, moved by `rate` towards the mean over the batch z (B, N, D)."""
    return (1 - rate) * prior_variance + rate * z.detach().square().mean(dim=0)
