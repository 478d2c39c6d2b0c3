// Vectors of 16 floats, written with the compiler's own vector types: one source for AVX-512, AVX2 and NEON.
//
// Numbers are computed with in fp32 and stored as fp32 or bf16. Where the processor multiplies pairs of bf16 (AVX512-BF16), kernels
// have a second form, under VENEER_PAIRS.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define VENEER_PAIRS 1
#endif

struct bf16 {
    uint16_t bits;
};

typedef float vf __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
constexpr long LANES = 16;

// As many as one register holds: sums that live across a loop stay in registers only as these.
#if defined(__AVX512F__)
typedef vf register_f;
#elif defined(__AVX__)
typedef float register_f __attribute__((vector_size(32)));
#else
typedef float register_f __attribute__((vector_size(16)));
#endif

static inline vf zero() { return vf{}; }
static inline vf all(float x) { return x - vf{}; }

static inline vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

static inline vf load(const bf16* p) {
#if defined(__AVX512F__)  // in one instruction, which compilers do not find
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
    vh h;
    std::memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}
static inline void store(bf16* p, vf v) {
#if defined(VENEER_PAIRS)
    __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &h, sizeof h);
#else
    vu u = (vu)v;  // to the nearest, halves to even; NaN stays NaN
    vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    vu nan = (vu)(v != v);
    vh h = __builtin_convertvector((rounded & ~nan) | (((u >> 16) | 0x40u) & nan), vh);
    std::memcpy(p, &h, sizeof h);
#endif
}

// As a number of type T keeps it.
template <class T> static inline vf rounded(vf x) {
    T own[LANES];
    store(own, x);
    return load(own);
}
template <> inline vf rounded<float>(vf x) { return x; }
#if defined(VENEER_PAIRS)
template <> inline vf rounded<bf16>(vf x) {
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
}
#endif

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
    uint32_t u = (uint32_t)x.bits << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
static inline void set(float* p, float x) { *p = x; }
static inline void set(bf16* p, float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    p->bits = x != x ? (uint16_t)((u >> 16) | 0x40u) : (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline vf within(vf x, float low, float high) {  // NaN stays NaN, here and below
#if defined(__AVX512F__)
    return (vf)_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), (__m512)x));
#else
    x = x < low ? all(low) : x;
    return x > high ? all(high) : x;
#endif
}

// 1 / x for x between 2^-126 and 2^126, to a unit in the last place or two.
static inline vf inverse(vf x) {
#if defined(__AVX512F__)
    vf r = (vf)_mm512_rcp14_ps((__m512)x);
    return r + r * (1.0f - x * r);
#else
    return 1.0f / x;
#endif
}

// 2^x = p * power, with p near 1, for x between -126 and 127; p is true to a unit in the last place or two.
static inline vf split_power(vf x, vf& power) {
    const vf whole = x + 12582912.0f;  // 1.5 * 2^23: the number nearest to x stands in the last bits
    const vf f = x - (whole - 12582912.0f);
    power = (vf)(((vu)whole << 23) + 0x3f800000u);
    vf p = f * 0.001327647129073739f + 0.009675541892647743f;
    p = p * f + 0.05550713092088699f;
    p = p * f + 0.24022120237350464f;
    p = p * f + 0.6931469440460205f;
    return p * f + 1.0000001192092896f;
}
static inline vf two_to(vf x) {  // the same, and 0 below -126
    vf power, p = split_power(x, power);
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_mul_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), (__m512)p, (__m512)power);
#else
    return (vf)((vu)(p * power) & ~(vu)(x < -126.0f));
#endif
}

// Blocks of N neighbouring lanes change places: the odd ones of x with the even ones of y.
template <int N> static inline void exchange(vf& x, vf& y) {
    vf a = x, b = y;
    if constexpr (N == 8) {
        x = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        y = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    } else if constexpr (N == 4) {
        x = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
        y = __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    } else if constexpr (N == 2) {
        x = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        y = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    } else {
        x = __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
        y = __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    }
}

// Lane i of the result is v[i]'s lanes, taken together by f two at a time.
template <int N = 8, class F> static inline vf across(const vf* v, F f) {
    vf half[N];
    for (int i = 0; i < N; i++) {
        vf x = v[i], y = v[i + N];
        exchange<N>(x, y);
        half[i] = f(x, y);
    }
    if constexpr (N > 1)
        return across<N / 2>(half, f);
    else
        return half[0];
}
static inline vf sums(const vf* v) {
    return across(v, [](vf x, vf y) { return x + y; });
}
static inline vf highest(const vf* v) {
    return across(v, [](vf x, vf y) { return x > y ? x : y; });
}

// The sum of the lanes of one.
static inline float total(vf x) {
    x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return x[0] + x[1];
}

// Rows become columns: 16 vectors of 16 lanes.
template <int N = 8> static inline void transpose(vf* v) {
    for (int i = 0; i < 16; i++)
        if (!(i & N)) exchange<N>(v[i], v[i + N]);
    if constexpr (N > 1) transpose<N / 2>(v);
}
