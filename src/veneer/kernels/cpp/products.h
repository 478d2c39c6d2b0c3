// Matrix products in pairs of bf16, with an adapter's part inside: y = S (x W^T) + b + u B^T in one pass over y.
//
// The columns of W^T that make a panel of 64 outputs are packed as pairs along K, [K / 2][64], and stay in the second-level cache while all
// rows go by, six at a time: 24 sums in registers. What is added to the product is more of the same, so it is a further segment of the
// inner dimension, and so are several layers whose gradients meet in one input. Only for processors with AVX512-BF16 and without AMX,
// whose matrix library is far ahead.
#pragma once
#include "vec.h"

#if defined(VENEER_PAIRS) && !defined(__AMX_BF16__)
#define VENEER_PRODUCTS 1
#endif

namespace {

constexpr long PANEL = 64;      // columns of a panel
constexpr long WORDS = 160000;  // pairs of a panel's column times 64, at most: what the second-level cache holds beside the rest

#if defined(VENEER_PRODUCTS)

// A stretch of the inner dimension: rows x (pairs along it), and its panel, pairs [words][stride].
struct Segment {
    const bf16* x;
    long ldx;
    const uint32_t* panel;
    long stride;
    long words;
};

inline __m512i word_all(const bf16* p) {
    int v;
    std::memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}

// M rows of V * 16 columns, from row m on. gain: multiplies what the first segment gives; bias is added at the end.
template <int M, int V>
inline void tile(const Segment* segments, int count, long m, bf16* y, long ldy, const float* gain, const bf16* bias) {
    __m512 sum[M][V];
#pragma GCC unroll 6
    for (int i = 0; i < M; i++)  // an initialiser would be a call of memset
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[i][v] = _mm512_setzero_ps();
    for (int s = 0; s < count; s++) {
        const Segment& t = segments[s];
        const bf16* x = t.x + m * t.ldx;
        for (long k = 0; k < t.words; k++) {
            __m512bh column[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) column[v] = (__m512bh)_mm512_loadu_si512(t.panel + k * t.stride + 16 * v);
#pragma GCC unroll 6
            for (int i = 0; i < M; i++) {
                __m512bh row = (__m512bh)word_all(x + i * t.ldx + 2 * k);
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], row, column[v]);
            }
        }
        if (s == 0 && gain)
            for (int i = 0; i < M; i++)
                for (int v = 0; v < V; v++) sum[i][v] = (__m512)((vf)sum[i][v] * load(gain + 16 * v));
    }
    if (bias)
        for (int i = 0; i < M; i++)
            for (int v = 0; v < V; v++) sum[i][v] = (__m512)((vf)sum[i][v] + load(bias + 16 * v));
#pragma GCC unroll 6
    for (int i = 0; i < M; i++)
        for (int v = 0; v < V; v += 2)
            _mm512_storeu_si512(y + (m + i) * ldy + 16 * v, (__m512i)_mm512_cvtne2ps_pbh(sum[i][v + 1], sum[i][v]));
}

template <int V>
inline void panel_rows(const Segment* segments, int count, long rows, bf16* y, long ldy, const float* gain, const bf16* bias) {
    long m = 0;
    for (; m + 6 <= rows; m += 6) tile<6, V>(segments, count, m, y, ldy, gain, bias);
    if (m + 4 <= rows) {
        tile<4, V>(segments, count, m, y, ldy, gain, bias);
        m += 4;
    }
    for (; m < rows; m++) tile<1, V>(segments, count, m, y, ldy, gain, bias);
}

// width: 64 or 32 columns.
inline void panel_product(const Segment* segments, int count, long rows, bf16* y, long ldy, long width, const float* gain, const bf16* bias) {
    if (width == PANEL)
        panel_rows<4>(segments, count, rows, y, ldy, gain, bias);
    else
        panel_rows<2>(segments, count, rows, y, ldy, gain, bias);
}

// 16 x 16 words, turned.
inline void turn(__m512i* r) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

// Columns of W^T: rows o to o + width of W [O, K], for x W^T.
inline void pack_rows(const bf16* w, long K, long o, long width, uint32_t* panel) {
    for (long k = 0; k < K; k += 32)
        for (long c = 0; c < width; c += 16) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(w + (o + c + i) * K + k);
            turn(r);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(panel + (k / 2 + i) * PANEL + c, r[i]);
        }
}

inline __m512i scaled(__m512i row, float by) {
    vf lo = (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(row)), 16);
    vf hi = (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(row, 1)), 16);
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)(hi * by), (__m512)(lo * by));
}

// Columns k to k + width of W [O, K] as pairs of rows, for g W; gain: S [O] that multiplies W's rows, or null.
inline void pack_columns(const bf16* w, long O, long K, long k, long width, const float* gain, uint32_t* panel) {
    alignas(64) uint16_t even[32], odd[32];
    for (int i = 0; i < 32; i++) {
        even[i] = (uint16_t)(i / 2 + (i % 2) * 32);
        odd[i] = (uint16_t)(i / 2 + 16 + (i % 2) * 32);
    }
    __m512i first = _mm512_load_si512(even), second = _mm512_load_si512(odd);
    for (long o = 0; o < O; o += 2)
        for (long c = 0; c < width; c += 32) {
            __m512i a = _mm512_loadu_si512(w + o * K + k + c), b = _mm512_loadu_si512(w + (o + 1) * K + k + c);
            if (gain) {
                a = scaled(a, gain[o]);
                b = scaled(b, gain[o + 1]);
            }
            _mm512_storeu_si512(panel + o / 2 * PANEL + c, _mm512_permutex2var_epi16(a, first, b));
            _mm512_storeu_si512(panel + o / 2 * PANEL + c + 16, _mm512_permutex2var_epi16(a, second, b));
        }
}
#endif

}  // namespace
