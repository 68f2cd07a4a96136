// What the convolution kernels share: how an output's rows meet the rows of what it is made of, strides, epilogue.
//
// A forward convolution and its input gradient are the same sum with other steps. Seen from one output row:
//
//   forward         y[p]  = sum over r of  x[p * stride - pad + r * dilation] * w[r]
//   input gradient  dx[h] = sum over the r for which stride divides h + pad - r * dilation
//                           of  dy[(h + pad - r * dilation) / stride] * w[r]
//
// With common = gcd(stride, dilation), an r is such a one if common divides h + pad (otherwise none is) and
//   r = first + j * (stride / common)
// where first depends on h modulo the stride only. From one j to the next the row of dy moves back by dilation /
// common, and from h to h + stride forward by 1. So the rows h = phase, phase + stride, ... are a convolution of
// their own, with stride 1 and every (stride / common)-th row of the filter: none of the zeros that a dilated
// gradient has between its rows is ever multiplied.
#include "activation_packs.cuh"
#include "packs.cuh"

// Elements from one index to the next along each axis of an image.
struct Strides { long long n, c, h, w; };

// The same for a filter, by the channels of what is written and of what is read, and from group to group.
struct FilterStrides { long long output, source, r, s, group; };

// Images of the batch, and channels a group of what is written and of what is read.
struct Channels { int images, groups, output, source; };

// One axis of the problem. inverse * (dilation / common) = 1 modulo (stride / common).
struct Axis { int output, source, kernel, stride, dilation, pad, common, inverse; };

struct Epilogue { int function; accumulate_t negative_slope; };

// What is added to the sums, and what they are multiplied by; each may be null. A residual lies as the output does.
struct Terms { const scalar_t *scale, *bias, *residual; };

// The output rows first_output + i * phases meet source row start + i * advance + j * step with filter row
// first + j * tap_step, for j < taps.
struct Line { int phases, taps, first, tap_step, start, advance, step; };

__device__ __forceinline__ Line line_of(Axis axis, int transposed, int first_output) {
    Line line;
    if (!transposed) {
        line.phases = 1;
        line.taps = axis.kernel;
        line.first = 0;
        line.tap_step = 1;
        line.start = first_output * axis.stride - axis.pad;
        line.advance = axis.stride;
        line.step = axis.dilation;
        return line;
    }
    const int padded = first_output + axis.pad;
    line.phases = axis.stride;
    line.tap_step = axis.stride / axis.common;
    line.first = (int)((long long)(padded / axis.common % line.tap_step) * axis.inverse % line.tap_step);
    const bool reached = padded % axis.common == 0 && line.first < axis.kernel;
    line.taps = reached ? (axis.kernel - 1 - line.first) / line.tap_step + 1 : 0;
    line.start = reached ? (padded - line.first * axis.dilation) / axis.stride : 0;
    line.advance = 1;
    line.step = -(axis.dilation / axis.common);
    return line;
}

// A negative number of rows above the image is as far outside as a large number below it.
__device__ __forceinline__ bool inside(int place, int length) { return (unsigned)place < (unsigned)length; }

// A product that is rounded by itself and not fused with the sum behind it, so that every kernel ends in the same
// bits.
__device__ __forceinline__ float product(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ double product(double x, double y) { return __dmul_rn(x, y); }

// A channel's scale and bias, loaded once for all of its sums. Where there is none it is a number that changes
// nothing: 1, and -0, as x + -0 is x also where x is -0.
struct ChannelTerms { accumulate_t scale, bias; };

__device__ __forceinline__ ChannelTerms terms_of(Terms terms, int channel) {
    return {
        terms.scale != nullptr ? load(terms.scale[channel]) : NUMBER(1),
        terms.bias != nullptr ? load(terms.bias[channel]) : NUMBER(-0.0)
    };
}

// The sum times its channel's scale, plus its bias; all in the accumulating type, like what follows.
__device__ __forceinline__ accumulate_t scaled(accumulate_t sum, ChannelTerms of) {
    return product(sum, of.scale) + of.bias;
}
__device__ __forceinline__ accumulate_t scaled(accumulate_t sum, Terms terms, int channel) {
    return scaled(sum, terms_of(terms, channel));
}

// What is stored for the sum of ``channel`` at element ``place`` of the output: rounded once, here. Kernels that
// end many sums at a time do the same with terms_of(), scaled() and activate_all().
__device__ __forceinline__ scalar_t finished(
    accumulate_t sum, Terms terms, int channel, long long place, Epilogue epilogue
) {
    sum = scaled(sum, terms, channel);
    if (terms.residual != nullptr) sum += load(terms.residual[place]);
    return store(activate(epilogue.function, sum, epilogue.negative_slope));
}
