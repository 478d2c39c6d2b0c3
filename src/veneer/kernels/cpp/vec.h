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

static inline vf zero() { return vf{}; }
static inline vf all(float x) { return x - vf{}; }

static inline vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

static inline vf load(const bf16* p) {
    vh h;
    std::memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
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

static inline vf at_least(vf x, float low) { return x < low ? all(low) : x; }  // NaN stays NaN, here and below
static inline vf at_most(vf x, float high) { return x > high ? all(high) : x; }

// 2^x for x below 128, to a unit in the last place or two; 0 below -126, and NaN of NaN.
static inline vf two_to(vf x) {
    const vf whole = x + 12582912.0f;  // 1.5 * 2^23: the number nearest to x stands in the last bits
    const vf f = x - (whole - 12582912.0f);
    vf p = f * 0.001327647129073739f + 0.009675541892647743f;
    p = p * f + 0.05550713092088699f;
    p = p * f + 0.24022120237350464f;
    p = p * f + 0.6931469440460205f;
    p = p * f + 1.0000001192092896f;
    const vf power = (vf)(((vu)whole << 23) + 0x3f800000u);
    return (vf)((vu)(p * power) & ~(vu)(x < -126.0f));
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

// Rows become columns: 16 vectors of 16 lanes.
template <int N = 8> static inline void transpose(vf* v) {
    for (int i = 0; i < 16; i++)
        if (!(i & N)) exchange<N>(v[i], v[i + N]);
    if constexpr (N > 1) transpose<N / 2>(v);
}
