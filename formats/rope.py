"""Divisors of the rotary frequencies, which extend the context of a model."""

import math

from runtime.schema import require_number


def linear_rope_factors(head_dim: int, factor: float) -> tuple[float, ...]:
    """Return D/2 equal divisors, which interpolate positions (Chen et al., arXiv 2306.15595).

    Raises ValueError if the factor is not a number in the supported range.
    """
    require_number("the scaling factor of the rotary embedding", factor, 1e-3, 1e6)
    return (float(factor),) * (head_dim // 2)


def llama3_rope_factors(
    head_dim: int, theta: float, factor: float, low: float = 1.0, high: float = 4.0, context: int = 8192
) -> tuple[float, ...]:
    """Return the D/2 divisors of Llama 3.1.

    `context` is the context length of pretraining in tokens. A pair of dimensions that rotates more than `high` times
    within that context keeps its frequency. The frequency of a pair that rotates less than `low` times is divided by
    `factor`, and pairs in between are interpolated. Raises ValueError if a parameter is invalid.
    """
    values = {"rope_theta": theta, "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    for name, value in (values | {"original_max_position_embeddings": context}).items():
        require_number(f"{name} of the rotary embedding", value, 1e-30, 1e12)
    if low >= high:
        raise ValueError(f"low_freq_factor is {low}; it must be smaller than high_freq_factor, {high}")
    factors = []
    for pair in range(0, head_dim, 2):
        rotations = context * theta ** (-pair / head_dim) / (2 * math.pi)
        kept = min(max((rotations - low) / (high - low), 0.0), 1.0)
        factors.append(1 / (kept + (1 - kept) / factor))
    return tuple(factors)
