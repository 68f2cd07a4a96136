// How a block's sums leave: from the warps' fragments back through shared memory, some positions at a time, so
// that neighbours in the output, channels or positions, are neighbours there, with the epilogue on the way.
#include "activation_packs.cuh"
#include "conv2d.cuh"
#include "packs.cuh"

constexpr int PART = 64;  // positions at a time

template <int POSITIONS, int OUTPUTS, int THREADS>
struct Written {
    // Numbers from one position's sums to the next in shared memory, so that pairs of four positions meet
    // different banks, or from one channel's.
    static constexpr int POSITION_PITCH = OUTPUTS + 8, CHANNEL_PITCH = PART + 4;
    static constexpr int NUMBERS =
        PART * POSITION_PITCH > OUTPUTS * CHANNEL_PITCH ? PART * POSITION_PITCH : OUTPUTS * CHANNEL_PITCH;

    scalar_t *output;
    Strides strides;
    Terms terms;
    Epilogue epilogue;
    const long long *places;  // of the block's positions in the output, -1 of those that there are not
    int first_channel;        // the block's in the output
    int channels;             // that there are from it on

    // With ``vectors`` neighbours are whole packs that begin at multiples of 16 bytes.
    template <int DOWN, int ACROSS>
    __device__ __forceinline__ void write(
        const float (&sums)[DOWN][ACROSS][4], int warp_position, int warp_output, float *shared, int vectors
    ) const {
        const bool by_channel = strides.c < strides.w;
        const int down = by_channel ? POSITION_PITCH : 1, across = by_channel ? 1 : CHANNEL_PITCH;
#pragma unroll 1
        for (int part = 0; part < POSITIONS / PART; ++part) {
            __syncthreads();  // the stages, or the part before, have been read
            if (warp_position / PART == part) {
                float *corner = shared + warp_position % PART * down + warp_output * across;
                if (by_channel) {
                    put<POSITION_PITCH, 1>(sums, corner);
                } else {
                    put<1, CHANNEL_PITCH>(sums, corner);
                }
            }
            __syncthreads();
            if (vectors) {
                write_packs(shared, places + part * PART, by_channel, down, across);
            } else {
                write_numbers(shared, places + part * PART, by_channel, down, across);
            }
        }
    }

    template <int DOWN_PITCH, int ACROSS_PITCH, int DOWN, int ACROSS>
    __device__ __forceinline__ void put(const float (&sums)[DOWN][ACROSS][4], float *corner) const {
        const int lane = threadIdx.x % 32;
        corner += lane / 4 * DOWN_PITCH + lane % 4 * 2 * ACROSS_PITCH;
#pragma unroll
        for (int i = 0; i < DOWN; ++i) {
#pragma unroll
            for (int j = 0; j < ACROSS; ++j) {
#pragma unroll
                for (int lower = 0; lower < 2; ++lower) {
                    const float *pair = sums[i][j] + 2 * lower;
                    float *to = corner + (i * 16 + lower * 8) * DOWN_PITCH + j * 8 * ACROSS_PITCH;
                    if (ACROSS_PITCH == 1) {
                        *reinterpret_cast<float2 *>(to) = make_float2(pair[0], pair[1]);
                    } else {
                        to[0] = pair[0];
                        to[ACROSS_PITCH] = pair[1];
                    }
                }
            }
        }
    }

    __device__ __forceinline__ void write_packs(
        const float *shared, const long long *pixels, bool by_channel, int down, int across
    ) const {
        const int packs_a_line = (by_channel ? OUTPUTS : PART) / PACK;
        int seen_channel = -1;
        ChannelTerms of[PACK];
#pragma unroll 1
        for (int pack = threadIdx.x; pack < PART * OUTPUTS / PACK; pack += THREADS) {
            const int here = pack / packs_a_line, along = pack % packs_a_line * PACK;
            const int row = by_channel ? here : along, channel = by_channel ? along : here;
            const long long pixel = pixels[row];
            if (channel >= channels || pixel < 0) continue;
            const int first = first_channel + channel;
            if (channel != seen_channel) {  // channels-last it is the same in every turn
                seen_channel = channel;
#pragma unroll
                for (int k = 0; k < PACK; ++k) of[k] = terms_of(terms, first + (by_channel ? k : 0));
            }
            const long long place = pixel + first * strides.c;
            float numbers[PACK];
#pragma unroll
            for (int k = 0; k < PACK; k += 4) {
                const Pack<float, 4> four = load_pack<4>(shared + row * down + channel * across + k);
#pragma unroll
                for (int l = 0; l < 4; ++l) numbers[k + l] = scaled(four.number[l], of[k + l]);
            }
            if (terms.residual != nullptr) {
                const Pack<scalar_t, PACK> more = load_pack<PACK>(terms.residual + place);
#pragma unroll
                for (int k = 0; k < PACK; ++k) numbers[k] += load(more.number[k]);
            }
            activate_all(epilogue.function, numbers, epilogue.negative_slope);
            Pack<scalar_t, PACK> result;
#pragma unroll
            for (int k = 0; k < PACK; ++k) result.number[k] = store(numbers[k]);
            store_pack<PACK>(output + place, result);
        }
    }

    __device__ __forceinline__ void write_numbers(
        const float *shared, const long long *pixels, bool by_channel, int down, int across
    ) const {
#pragma unroll 1
        for (int element = threadIdx.x; element < PART * OUTPUTS; element += THREADS) {
            const int row = by_channel ? element / OUTPUTS : element % PART;
            const int channel = by_channel ? element % OUTPUTS : element / PART;
            const long long pixel = pixels[row];
            if (channel < channels && pixel >= 0) {
                const long long place = pixel + (first_channel + channel) * strides.c;
                const float sum = shared[row * down + channel * across];
                output[place] = finished(sum, terms, first_channel + channel, place, epilogue);
            }
        }
    }
};
