"""Student's t distribution for any number of degrees of freedom, as scipy would give it."""

import math

# The continued fraction takes a few dozen terms; thousands only where the answer is 0 or 1 to double precision.
MAX_TERMS = 20_000
TINY = 1e-300  # in place of a zero in a denominator
NEWTON_STEPS = 200  # a handful are needed


def two_sided_p(t: float, degrees_of_freedom: float) -> float:
    """Return the probability that a t-distributed value lies at least as far from zero as `t`.

    Args:
        t: of any sign; infinity gives 0.
        degrees_of_freedom: > 0, not necessarily whole; infinity gives the normal distribution.
    Raises:
        ValueError: no degrees of freedom, or a value that is not a number.
    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.1 and 26.5.27.
    """
    if math.isnan(t) or not degrees_of_freedom > 0:
        raise ValueError(f"t is {t} with {degrees_of_freedom} degrees of freedom")
    if math.isinf(t):
        return 0.0
    if math.isinf(degrees_of_freedom):
        return math.erfc(abs(t) / math.sqrt(2.0))
    # t^2 / (df + t^2) and df / (df + t^2), neither of which overflows or loses digits.
    ratio = t / math.sqrt(degrees_of_freedom)
    far = ratio * ratio / (1.0 + ratio * ratio) if abs(ratio) < 1e150 else 1.0
    near = 1.0 / (1.0 + ratio * ratio) if abs(ratio) < 1e150 else 0.0
    return _beta(degrees_of_freedom / 2.0, 0.5, near, far)


def t_quantile(confidence: float, degrees_of_freedom: float) -> float:
    """Return the half-width, in standard errors, of a two-sided interval of a t-distributed value.

    Args:
        confidence: probability mass between the two ends, within (0, 1).
        degrees_of_freedom: as for `two_sided_p`.
    Raises:
        ValueError: as for `two_sided_p`, or a confidence out of range.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"a confidence lies within (0, 1), found {confidence}")
    outside = 1.0 - confidence
    low, high = 0.0, 1.0
    while two_sided_p(high, degrees_of_freedom) > outside:
        low, high = high, 2.0 * high
        if math.isinf(high):
            return high
    # The probability is convex there: Newton's steps from below never reach too far.
    value = low
    for _ in range(NEWTON_STEPS):
        step = (two_sided_p(value, degrees_of_freedom) - outside) / (2.0 * _density(value, degrees_of_freedom))
        if not step > 1e-15 * value:
            break
        value += step
    return value


def _density(t: float, degrees_of_freedom: float) -> float:
    if math.isinf(degrees_of_freedom):
        return math.exp(-0.5 * t * t) / math.sqrt(2.0 * math.pi)
    half = 0.5 * (degrees_of_freedom + 1.0)
    log_shape = -half * math.log1p(t * t / degrees_of_freedom)
    log_scale = math.lgamma(half) - math.lgamma(0.5 * degrees_of_freedom)
    return math.exp(log_scale + log_shape) / math.sqrt(degrees_of_freedom * math.pi)


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b).

    Args:
        a, b: > 0.
        x: within [0, 1].
    Raises:
        ValueError: an argument out of range.
    Source: NIST Digital Library of Mathematical Functions, 8.17.22 (continued fraction), evaluated by the method of
        Lentz in Thompson and Barnett's form (J. Comput. Phys. 64, 1986).
    """
    if not (a > 0 and b > 0 and 0.0 <= x <= 1.0):
        raise ValueError(f"I_x(a, b) of a = {a}, b = {b}, x = {x}")
    return _beta(a, b, x, 1.0 - x)


def _beta(a: float, b: float, x: float, rest: float) -> float:
    """I_x(a, b), where the caller may know `rest` = 1 - x to more digits."""
    if x == 0.0 or rest == 0.0:
        return 0.0 if x == 0.0 else 1.0
    if x > (a + 1.0) / (a + b + 2.0):  # where the fraction converges slowly
        return 1.0 - _beta(b, a, rest, x)
    log_rest = math.log1p(-x) if x < 0.5 else math.log(rest)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * log_rest
    return math.exp(log_front) / (a * _fraction(a, b, x))


def _fraction(a: float, b: float, x: float) -> float:
    """1 + d1 / (1 + d2 / (1 + ...)), of which 8.17.22 is the reciprocal."""
    value, c, d = 1.0, 1.0, 0.0
    for term in range(1, MAX_TERMS + 1):
        m = term // 2
        if term % 2:
            numerator = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            numerator = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1.0 / ((1.0 + numerator * d) or TINY)
        c = (1.0 + numerator / c) or TINY
        change = c * d
        value *= change
        if abs(change - 1.0) < 1e-16:
            break
    return value
