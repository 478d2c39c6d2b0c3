// The elements that dropout sets to zero: the random numbers of kernels/lora/dropout.py, which is the reference.
#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace {

constexpr long WORDS = 256, LANES = 4;

void fill(uint64_t* words, long first, uint64_t start) {
    for (long i = 0; i < WORDS; i++) {
        uint64_t x = (uint64_t)(first + i) * 0x9E3779B97F4A7C15ull + start;
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
        words[i] = x ^ (x >> 31);
    }
}

// Writes offset + the position of every number below limit, ascending; there is room for all. Returns how many.
long below(const uint64_t* words, int limit, int offset, int* found) {
    long n = 0;
#if defined(__AVX512BW__)
    const __m512i bound = _mm512_set1_epi16((short)limit), half = _mm512_set1_epi32(16);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i position = _mm512_add_epi32(_mm512_set1_epi32(offset), lanes);
    for (long i = 0; i < WORDS; i += 8) {
        uint32_t hits = _mm512_cmplt_epi16_mask(_mm512_loadu_si512(words + i), bound);
        for (int part = 0; part < 2; part++, hits >>= 16) {
            _mm512_storeu_si512(found + n, _mm512_maskz_compress_epi32((__mmask16)hits, position));
            n += __builtin_popcount(hits & 0xffff);
            position = _mm512_add_epi32(position, half);
        }
    }
#else
    for (long i = 0; i < WORDS; i++)
        for (int lane = 0; lane < LANES; lane++) {
            found[n] = offset + (int)(i * LANES) + lane;
            n += (int16_t)(words[i] >> (16 * lane)) < limit;
        }
#endif
    return n;
}

}  // namespace

// Writes the indices, among elements [begin, begin + count), of those that are dropped, as many as there is room for. Returns their number.
extern "C" long veneer_dropped(long begin, long count, uint64_t start, int limit, int* places, long room) {
    constexpr long BLOCK = WORDS * LANES, SPARE = 16;  // a vector is stored past the last one found
    uint64_t words[WORDS];
    int found[BLOCK + SPARE];
    long number = 0;
    for (long at = begin / LANES * LANES; at < begin + count; at += BLOCK) {
        const long first = at - begin;
        fill(words, at / LANES, start);
        if (first >= 0 && first + BLOCK <= count && number + BLOCK + SPARE <= room) {
            number += below(words, limit, (int)first, places + number);
            continue;
        }
        const long n = below(words, limit, (int)first, found);
        for (long i = 0; i < n; i++) {
            if (found[i] < 0 || found[i] >= count) continue;
            if (number < room) places[number] = found[i];
            number++;
        }
    }
    return number;
}
