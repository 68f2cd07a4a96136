"""The complementary error function, which NumPy lacks.

W. J. Cody, "Rational Chebyshev approximations for the error function", Mathematics of Computation 23 (1969): three
quotients of polynomials, for |x| up to 0.46875, up to 4, and beyond; the coefficients are those of his CALERF.
"""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

# Each list runs from the highest power down.
_SMALL_ABOVE = (
    1.85777706184603153e-1,
    3.16112374387056560e00,
    1.13864154151050156e02,
    3.77485237685302021e02,
    3.20937758913846947e03,
)
_SMALL_BELOW = (
    1.0,
    2.36012909523441209e01,
    2.44024637934444173e02,
    1.28261652607737228e03,
    2.84423683343917062e03,
)
_MIDDLE_ABOVE = (
    2.15311535474403846e-8,
    5.64188496988670089e-1,
    8.88314979438837594e00,
    6.61191906371416295e01,
    2.98635138197400131e02,
    8.81952221241769090e02,
    1.71204761263407058e03,
    2.05107837782607147e03,
    1.23033935479799725e03,
)
_MIDDLE_BELOW = (
    1.0,
    1.57449261107098347e01,
    1.17693950891312499e02,
    5.37181101862009858e02,
    1.62138957456669019e03,
    3.29079923573345963e03,
    4.36261909014324716e03,
    3.43936767414372164e03,
    1.23033935480374942e03,
)
_LARGE_ABOVE = (
    1.63153871373020978e-2,
    3.05326634961232344e-1,
    3.60344899949804439e-1,
    1.25781726111229246e-1,
    1.60837851487422766e-2,
    6.58749161529837803e-4,
)
_LARGE_BELOW = (
    1.0,
    2.56852019228982242e00,
    1.87295284992346725e00,
    5.27905102951428412e-1,
    6.05183413124413191e-2,
    2.33520497626869185e-3,
)
_SMALL_UP_TO, _MIDDLE_UP_TO = 0.46875, 4.0
_UNDERFLOW = 28.0  # erfc is 0 in float64 beyond it
_INVERSE_SQRT_PI = 5.6418958354775628695e-1


def _polynomial(coefficients: tuple[float, ...], x: NDArray[Any]) -> NDArray[Any]:
    value = coefficients[0] * x + coefficients[1]
    for coefficient in coefficients[2:]:
        value *= x
        value += coefficient
    return value


def _exp_of_minus_square(x: NDArray[Any]) -> NDArray[Any]:
    # x * x loses digits that exp turns into a relative error of x * x ulps. Cody splits x at 1/16: the square of
    # the coarse part is exact, and (x - coarse)(x + coarse) is small.
    coarse = numpy.floor(x * 16) / 16
    power: NDArray[Any] = numpy.exp(-coarse * coarse)
    power *= numpy.exp((coarse - x) * (coarse + x))
    return power


def erfc(x: NDArray[Any]) -> NDArray[Any]:
    """1 - erf(x) of a float64 array, to a few units in the last place, at any x; NaN stays NaN."""
    size = numpy.abs(x)
    result: NDArray[Any] = numpy.where(numpy.isnan(x), x, 0.0)

    small = size <= _SMALL_UP_TO
    value = x[small]
    square = value * value
    result[small] = 1 - value * (_polynomial(_SMALL_ABOVE, square) / _polynomial(_SMALL_BELOW, square))

    middle = (size > _SMALL_UP_TO) & (size <= _MIDDLE_UP_TO)
    value = size[middle]
    value = _polynomial(_MIDDLE_ABOVE, value) / _polynomial(_MIDDLE_BELOW, value) * _exp_of_minus_square(value)
    result[middle] = value

    large = (size > _MIDDLE_UP_TO) & (size < _UNDERFLOW)
    value = size[large]
    inverse = 1 / (value * value)
    tail = inverse * (_polynomial(_LARGE_ABOVE, inverse) / _polynomial(_LARGE_BELOW, inverse))
    result[large] = (_INVERSE_SQRT_PI - tail) / value * _exp_of_minus_square(value)

    reflected = x < -_SMALL_UP_TO
    result[reflected] = 2 - result[reflected]
    return result
