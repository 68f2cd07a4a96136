// Dropout's masks and products. The mask is a function of seed and place (Philox4x32-10: Salmon et al., SC 2011), the
// bits of gpucnn/random.py. Limit: ten rounds of two wide products for four words, some 3 operations a word and
// vector lane; a number read, a number and a byte written.
#include "elementwise.h"
#include "rows.h"
#include "threads.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace gpucnn {
namespace {

typedef uint64_t WideVector __attribute__((vector_size(LANES * 4)));
typedef uint32_t NarrowVector __attribute__((vector_size(LANES * 2)));
constexpr int BLOCKS = LANES / 2;  // counters at a time, one in each lane
constexpr int WORDS = 4 * BLOCKS;

// The products of the lanes' low halves: one instruction, where a product of 64-bit numbers takes three or more.
GPUCNN_INLINE WideVector wide_product(WideVector a, WideVector b) {
#if defined(__AVX512F__)
    return (WideVector)_mm512_maskz_mul_epu32((__mmask8)-1, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (WideVector)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && !defined(__AVX__)
    return (WideVector)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// Whether each of the words 4 block .. 4 block + WORDS of the stream is at least the threshold, as bytes 0 and 1: word
// 4 b + k is number k of counter b. The halves above a lane's low 32 bits hold what is left over; none of it is used.
GPUCNN_INLINE NarrowVector kept_words(uint64_t block, uint64_t key, uint32_t threshold) {
    WideVector a = WideVector{} + block;
    for (int lane = 0; lane < BLOCKS; ++lane) a[lane] += static_cast<uint64_t>(lane);
    WideVector b = a >> 32, c = {}, d = {};
    uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        WideVector first = wide_product(a, WideVector{} + 0xD2511F53u);
        WideVector second = wide_product(c, WideVector{} + 0xCD9E8D57u);
        a = (second >> 32) ^ b ^ low;
        c = (first >> 32) ^ d ^ high;
        b = second;
        d = first;
        low += 0x9E3779B9u;
        high += 0xBB67AE85u;
    }
    WideVector kept = {}, words[4] = {a, b, c, d};
    for (int number = 0; number < 4; ++number) {
        WideVector less = (words[number] & 0xFFFFFFFFu) - threshold;  // its highest bit is set where it borrows
        kept |= (~less >> 63) << (8 * number);
    }
    return __builtin_convertvector(kept, NarrowVector);
}

// mask[i] = whether word offset + i of the stream is at least the threshold, for begin <= i < end.
void draw(uint64_t seed, uint64_t offset, uint32_t threshold, int64_t begin, int64_t end, uint8_t *mask) {
    for (int64_t i = begin; i < end;) {
        uint64_t word = offset + static_cast<uint64_t>(i);
        NarrowVector kept = kept_words(word / 4, seed, threshold);
        if (word % 4 == 0 && end - i >= WORDS) {
            std::memcpy(mask + i, &kept, WORDS);
            i += WORDS;
            continue;
        }
        uint8_t bytes[WORDS];
        std::memcpy(bytes, &kept, WORDS);
        int64_t skipped = static_cast<int64_t>(word % 4);
        int64_t count = WORDS - skipped < end - i ? WORDS - skipped : end - i;
        std::memcpy(mask + i, bytes + skipped, static_cast<size_t>(count));
        i += count;
    }
}

// out = x scale where the mask holds, 0 elsewhere, whatever x is there.
void multiply(int64_t begin, int64_t end, float scale, const float *x, const uint8_t *mask, float *out) {
    for (int64_t i = begin; i < end; ++i) {
        float value = x[i] * scale;
        out[i] = mask[i] ? value : 0.0f;
    }
}

}  // namespace

GPUCNN_EXPORT int gpucnn_dropout_mask(int threads, int64_t count, int64_t seed, int64_t offset, int64_t threshold,
                                      uint8_t *mask) {
    over_ranges(threads, count, [&](int64_t begin, int64_t end) {
        draw(static_cast<uint64_t>(seed), static_cast<uint64_t>(offset), static_cast<uint32_t>(threshold), begin, end,
             mask);
    });
    return 0;
}

// The mask, and x with it, while the mask is in the cache.
GPUCNN_EXPORT int gpucnn_dropout_forward(int threads, int64_t count, int64_t seed, int64_t offset, int64_t threshold,
                                         float scale, const float *x, uint8_t *mask, float *out) {
    constexpr int64_t STEP = 4096;
    over_ranges(threads, count, [&](int64_t begin, int64_t end) {
        for (int64_t first = begin; first < end; first += STEP) {
            int64_t last = first + STEP < end ? first + STEP : end;
            draw(static_cast<uint64_t>(seed), static_cast<uint64_t>(offset), static_cast<uint32_t>(threshold), first,
                 last, mask);
            multiply(first, last, scale, x, mask, out);
        }
    });
    return 0;
}

GPUCNN_EXPORT int gpucnn_dropout_multiply(int threads, int64_t count, float scale, const float *x,
                                          const uint8_t *mask, float *out) {
    over_ranges(threads, count, [&](int64_t begin, int64_t end) { multiply(begin, end, scale, x, mask, out); });
    return 0;
}

// The same with one number of the mask for each row of x.
GPUCNN_EXPORT int gpucnn_dropout_rows(int threads, int64_t rows, int64_t columns, float scale, const float *x,
                                      const uint8_t *mask, float *out) {
    parallel_for(threads, rows, [&](int64_t row) {
        const float *from = x + row * columns;
        float *to = out + row * columns;
        if (mask[row])
            over_row(columns, [&](int64_t i, int, auto access) GPUCNN_BODY {
                access.store(to + i, access.load(from + i) * scale);
            });
        else if (columns)
            std::memset(to, 0, static_cast<size_t>(columns) * sizeof(float));
    });
    return 0;
}

}  // namespace gpucnn
