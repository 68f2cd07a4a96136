// Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
// A stream is named by a 64-bit seed, the key; word i of it is word i % 4 of the block with counter i / 4. So any
// part of a stream can be had alone, in any order, and a mask does not depend on how threads share the work.

struct PhiloxBlock {
    unsigned word_0, word_1, word_2, word_3;
};

__device__ __forceinline__ PhiloxBlock philox(unsigned long long seed, unsigned long long counter) {
    unsigned c0 = (unsigned)counter, c1 = (unsigned)(counter >> 32), c2 = 0, c3 = 0;
    unsigned k0 = (unsigned)seed, k1 = (unsigned)(seed >> 32);
    #pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned high_0 = __umulhi(0xD2511F53u, c0), low_0 = 0xD2511F53u * c0;
        const unsigned high_1 = __umulhi(0xCD9E8D57u, c2), low_1 = 0xCD9E8D57u * c2;
        c0 = high_1 ^ c1 ^ k0;
        c2 = high_0 ^ c3 ^ k1;
        c1 = low_1;
        c3 = low_0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
}

__device__ __forceinline__ unsigned word_of(const PhiloxBlock &block, int number) {
    return number == 0 ? block.word_0 : number == 1 ? block.word_1 : number == 2 ? block.word_2 : block.word_3;
}
