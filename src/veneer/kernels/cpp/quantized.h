// Quantized weights; quantized/four_bit.py and quantized/int8.py have the formats and the references.
//
// A block of four-bit numbers takes 16 values only. They are computed and rounded once, as the reference does for each number, and looked up:
// 32 numbers of bf16, or 16 of fp32, in one instruction of AVX-512.
#pragma once
#include <algorithm>

#include "vec.h"

namespace {

// A weight [rows, columns]: dense, four bits a number in blocks, or eight bits by rows.
struct Weight {
    enum { DENSE, FOUR_BITS, EIGHT_BITS };
    long format, columns, block;
    long rounding;       // of four-bit numbers, as a number of the weight's own type keeps them. 0: fp32, 1: bf16, 2: fp16
    const void* data;
    const void* absmax;  // of each block, or row, in fp32; or bytes: map[byte] * outer[block / 256] + offset
    const float *map, *outer;
    float offset, scale;  // of eight-bit numbers: q * absmax * scale
    const float* code;
};

constexpr long AHEAD = 2048;  // bytes that are asked of memory before they are needed: they arrive while products are computed

inline float absmax_of(const Weight& w, long block) {
    if (!w.outer) return ((const float*)w.absmax)[block];
    volatile float product = w.map[((const uint8_t*)w.absmax)[block]] * w.outer[block / 256];  // no fused sum: the reference rounds twice
    return product + w.offset;
}

inline vf kept(vf x, long rounding) {
    if (rounding == 1) return rounded<bf16>(x);
#if defined(__F16C__) && defined(__AVX512F__)
    if (rounding == 2) return (vf)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#endif
    return x;
}

template <class T> inline void look_up(const uint8_t* packed, const T* values, T* out, long first, long last) {
    for (long i = first; i < last; i++) out[i - first] = values[i & 1 ? packed[i >> 1] & 15 : packed[i >> 1] >> 4];
}

#if defined(__AVX512BW__)
// Numbers from the first of a byte on, STEP at a time; returns how many.
inline long fast(const uint8_t* packed, const bf16* values, bf16* out, long count) {
    const __m512i table = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)values));
    const __m512i low = _mm512_set1_epi32(15);
    long i = 0;
    for (; i + 32 <= count; i += 32) {
        __m512i d = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(packed + i / 2)));
        __m512i q = _mm512_or_si512(_mm512_srli_epi32(d, 4), _mm512_slli_epi32(_mm512_and_si512(d, low), 16));
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(q, table));
    }
    return i;
}
inline long fast(const uint8_t* packed, const float* values, float* out, long count) {
    const __m512 table = _mm512_loadu_ps(values);
    const __m512i low = _mm512_set1_epi64(15);
    long i = 0;
    for (; i + 16 <= count; i += 16) {
        __m512i d = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(packed + i / 2)));
        __m512i q = _mm512_or_si512(_mm512_srli_epi64(d, 4), _mm512_slli_epi64(_mm512_and_si512(d, low), 32));
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(q, table));
    }
    return i;
}
#else
template <class T> inline long fast(const uint8_t*, const T*, T*, long) { return 0; }
#endif

// The numbers first .. last of a weight that lie in block b.
template <class T> void four_bits(const Weight& w, long b, long first, long last, T* out) {
    const uint8_t* packed = (const uint8_t*)w.data;
    __builtin_prefetch(packed + std::max(first, b * w.block) / 2 + AHEAD, 0, 2);
    T values[LANES];
    store(values, kept(load(w.code) * absmax_of(w, b), w.rounding));
    long i = std::max(first, b * w.block);
    const long stop = std::min(last, (b + 1) * w.block);
    if (!(i & 1)) i += fast(packed + i / 2, values, out + (i - first), stop - i);
    look_up(packed, values, out + (i - first), i, stop);
}

inline vf numbers(const int8_t* q) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)q)));
#else
    vf v;
    for (long j = 0; j < LANES; j++) v[j] = (float)q[j];
    return v;
#endif
}
#if defined(VENEER_PAIRS)
inline void store_pair(bf16* p, vf low, vf high) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
#else
inline void store_pair(bf16* p, vf low, vf high) { store(p, low), store(p + LANES, high); }
#endif
inline void store_pair(float* p, vf low, vf high) { store(p, low), store(p + LANES, high); }

template <class T> void eight_bits(const Weight& w, long row, T* out) {
    const int8_t* q = (const int8_t*)w.data + row * w.columns;
    const float absmax = ((const float*)w.absmax)[row];
    long i = 0;
    for (; i + 2 * LANES <= w.columns; i += 2 * LANES) {
        __builtin_prefetch(q + i + AHEAD, 0, 2);
        store_pair(out + i, numbers(q + i) * absmax * w.scale, numbers(q + i + LANES) * absmax * w.scale);
    }
    for (; i < w.columns; i++) set(out + i, (float)q[i] * absmax * w.scale);
}

// Rows first .. last of a weight: where they are, or dequantized in `room`.
template <class T> const T* dense_rows(const Weight& w, long first, long last, T* room) {
    if (w.format == Weight::DENSE) return (const T*)w.data + first * w.columns;
    if (w.format == Weight::EIGHT_BITS) {
        for (long row = first; row < last; row++) eight_bits(w, row, room + (row - first) * w.columns);
        return room;
    }
    const long from = first * w.columns, until = last * w.columns;
    for (long b = from / w.block; b * w.block < until; b++) four_bits(w, b, from, until, room);
    return room;
}

}  // namespace
