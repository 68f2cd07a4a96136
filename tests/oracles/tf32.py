"""TF32 by its definition: ten fraction bits."""

import numpy


def rounded(array, to_even):
    """The nearest float64 numbers with 10 fraction bits; of two, the even one or the one away from zero."""
    fraction, exponent = numpy.frexp(array.astype(numpy.float64))
    scaled = numpy.ldexp(fraction, 11)
    whole = numpy.rint(scaled) if to_even else numpy.sign(scaled) * numpy.floor(numpy.abs(scaled) + 0.5)
    return numpy.ldexp(whole, exponent - 11)
