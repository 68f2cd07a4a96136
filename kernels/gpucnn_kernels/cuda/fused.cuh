// a * b + sum, rounded once. NVRTC makes one instruction of such an expression, too, but of two products in a sum it
// chooses which, and not alike in every place that a function is put into: where two kernels or two ways through one
// promise the same bits, their products are written like this.
__device__ __forceinline__ float fused(float a, float b, float sum) { return fmaf(a, b, sum); }
__device__ __forceinline__ double fused(double a, double b, double sum) { return fma(a, b, sum); }
