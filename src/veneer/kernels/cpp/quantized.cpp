// Dequantizing four bits a number; quantized/four_bit.py has the format and the reference.
//
// A block's numbers take 16 values only. They are computed and rounded once, as the reference does for each number, and looked up: 32 numbers
// of bf16, or 16 of fp32, in one instruction of AVX-512.
#include "vec.h"

namespace {

struct Absmax {
    const float* plain;    // of each block, or null:
    const uint8_t* bytes;  // map[byte] * outer[block / 256] + offset
    const float* map;
    const float* outer;
    float offset;
};

float scale_of(const Absmax& a, long block) {
    if (a.plain) return a.plain[block];
    volatile float product = a.map[a.bytes[block]] * a.outer[block / 256];  // no fused sum: the reference rounds twice
    return product + a.offset;
}

// As a number of the weight's own type keeps it. 0: fp32, 1: bf16, 2: fp16.
vf kept(vf x, int rounding) {
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

template <class T>
void dequantize(const uint8_t* packed, Absmax absmax, const float* code, int rounding, long block, long first, long last, T* out, int threads) {
    const vf codes = load(code);
    const long begin = first / block, end = (last + block - 1) / block;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long b = begin; b < end; b++) {
        T values[LANES];
        store(values, kept(codes * scale_of(absmax, b), rounding));
        long i = b * block < first ? first : b * block;
        const long stop = (b + 1) * block < last ? (b + 1) * block : last;
        if (!(i & 1)) i += fast(packed + i / 2, values, out + (i - first), stop - i);
        look_up(packed, values, out + (i - first), i, stop);
    }
}

}  // namespace

// Numbers first .. last of a weight. kind: of out, 0 for fp32, 1 for bf16. Returns 0 where this build cannot round to the weight's type.
extern "C" int veneer_dequantize_4bit(int kind, int rounding, const void* packed, const void* absmax, const void* map, const void* outer, float offset,
                                      const void* code, long block, long first, long last, void* out, int threads) {
#if !(defined(__F16C__) && defined(__AVX512F__))
    if (rounding == 2) return 0;
#endif
    const Absmax a = outer ? Absmax{nullptr, (const uint8_t*)absmax, (const float*)map, (const float*)outer, offset}
                           : Absmax{(const float*)absmax, nullptr, nullptr, nullptr, 0.0f};
    auto run = [=](auto type) {
        typedef decltype(type) T;
        dequantize((const uint8_t*)packed, a, (const float*)code, rounding, block, first, last, (T*)out, threads);
    };
    kind ? run(bf16{}) : run(0.0f);
    return 1;
}
