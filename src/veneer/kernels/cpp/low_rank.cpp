// Products with the few rows of adapters' factors; low_rank.py has the formulas.
//
// A call takes layers h that read the same x [N, K]. Ranks are padded with zeros to multiples of 8 and stand behind each other: R columns in
// all, of which layer h has those from at[h] on. Tokens are cut into chunks, the same whatever the number of threads, and
// sums over tokens are taken chunk by chunk and then over chunks in their order: results do not depend on the threads.
#include <algorithm>
#include <memory>

#include "vec.h"

namespace {

constexpr long UNIT = 8;    // ranks are padded to it
constexpr long ROWS = 64;   // tokens taken together: their inputs and gradients fit the second-level cache
constexpr long CHUNK = 256; // tokens of a chunk
constexpr long CHUNKS = 32; // chunks, at most

struct Layer {
    long width;         // O
    long rank;          // before padding
    long at;            // first of its columns
    const float* a;     // [rank, K]
    const float* b;     // [O, rank]
    const float* gain;  // [O] or null
    float scale;
};

// ---- fp32, and bf16 on processors that do not multiply it: rows [R, X], computed with in fp32 ----------------------------------

template <class T> struct Rows {
    // out[m][r] = sum_k x[m][k] w[r][k], for two rows of x and eight of w
    static void dots(const T* x, long ldx, int rows, const T* w, long X, float* out, long ldo) {
        vf acc[16] = {};
        const T* y = rows > 1 ? x + ldx : x;
        for (long k = 0; k < X; k += LANES) {
            vf p = load(x + k), q = load(y + k);
            for (int r = 0; r < UNIT; r++) {
                vf v = load(w + r * X + k);
                acc[r] += p * v;
                acc[8 + r] += q * v;
            }
        }
        write(acc, rows, out, ldo);
    }
    static void write(const vf* acc, int rows, float* out, long ldo) {
        float s[16];
        store(s, sums(acc));
        std::memcpy(out, s, 8 * sizeof(float));
        if (rows > 1) std::memcpy(out + ldo, s + 8, 8 * sizeof(float));
    }
    // y[m] += sum_r u[m][r] w[r], for up to four rows of y and R rows of w
    static void add(T* y, long ldy, int rows, const T* u, long ldu, const T* w, long R, long X) {
        for (long k = 0; k < X; k += LANES) {
            vf acc[4];
            for (int m = 0; m < rows; m++) acc[m] = load(y + m * ldy + k);
            for (long r = 0; r < R; r++) {
                vf v = load(w + r * X + k);
                for (int m = 0; m < rows; m++) acc[m] += all(to_float(u[m * ldu + r])) * v;
            }
            for (int m = 0; m < rows; m++) store(y + m * ldy + k, acc[m]);
        }
    }
    // acc[r] += sum_n u[n][r] x[n], for eight columns of u
    static void outer(float* acc, const T* u, long ldu, const T* x, long ldx, long rows, long X) {
        for (long k = 0; k < X; k += LANES) {
            vf s[UNIT];
            for (int r = 0; r < UNIT; r++) s[r] = load(acc + r * X + k);
            for (long n = 0; n < rows; n++) {
                vf v = load(x + n * ldx + k);
                for (int r = 0; r < UNIT; r++) s[r] += all(to_float(u[n * ldu + r])) * v;
            }
            for (int r = 0; r < UNIT; r++) store(acc + r * X + k, s[r]);
        }
    }
    static long place(long k) { return k; }
    static void pack(T* wide, const float* w, long ldr, long ldk, long rank, long padded, long X, const float* factor, float scale) {
        for (long r = 0; r < padded; r++)
            for (long k = 0; k < X; k++)
                set(wide + r * X + k, r < rank ? w[r * ldr + k * ldk] * scale * (factor ? factor[k] : 1.0f) : 0.0f);
    }
};
template <class T> struct Packed : Rows<T> {};

#if defined(VENEER_PAIRS)

// ---- bf16 in pairs: rows [R, X], and behind them the same as [R / 2, X] pairs of neighbouring rows -----------------------------

template <> struct Packed<bf16> : Rows<bf16> {
    static __m512bh pairs(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static __m512bh both(const bf16* p) {
        int u;
        std::memcpy(&u, p, 4);
        return (__m512bh)_mm512_set1_epi32(u);
    }
    static void dots(const bf16* x, long ldx, int rows, const bf16* w, long X, float* out, long ldo) {
        __m512 acc[16] = {};
        const bf16* y = rows > 1 ? x + ldx : x;
        for (long k = 0; k < X; k += 2 * LANES) {
            __m512bh p = pairs(x + k), q = pairs(y + k);
#pragma GCC unroll 8
            for (int r = 0; r < UNIT; r++) {
                __m512bh v = pairs(w + r * X + k);
                acc[r] = _mm512_dpbf16_ps(acc[r], p, v);
                acc[8 + r] = _mm512_dpbf16_ps(acc[8 + r], q, v);
            }
        }
        write((const vf*)acc, rows, out, ldo);
    }
    template <int M> static void add_rows(bf16* y, long ldy, const bf16* u, long ldu, const bf16* w, long R, long X) {
        const bf16* by_two = w + R * X;
        for (long k = 0; k < X; k += 2 * LANES) {
            __m512 lo[M], hi[M];
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                lo[m] = (__m512)load(y + m * ldy + k);
                hi[m] = (__m512)load(y + m * ldy + k + LANES);
            }
            for (long r = 0; r < R; r += 2) {
                __m512bh v = pairs(by_two + r * X + 2 * k), w2 = pairs(by_two + r * X + 2 * k + 2 * LANES);
#pragma GCC unroll 4
                for (int m = 0; m < M; m++) {
                    __m512bh s = both(u + m * ldu + r);
                    lo[m] = _mm512_dpbf16_ps(lo[m], s, v);
                    hi[m] = _mm512_dpbf16_ps(hi[m], s, w2);
                }
            }
#pragma GCC unroll 4
            for (int m = 0; m < M; m++)
                _mm512_storeu_si512(y + m * ldy + k, (__m512i)_mm512_cvtne2ps_pbh(hi[m], lo[m]));
        }
    }
    static void add(bf16* y, long ldy, int rows, const bf16* u, long ldu, const bf16* w, long R, long X) {
        if (rows == 4) return add_rows<4>(y, ldy, u, ldu, w, R, X);
        for (int m = 0; m < rows; m++) add_rows<1>(y + m * ldy, ldy, u + m * ldu, ldu, w, R, X);
    }
    // Neighbouring tokens are taken in pairs, as unpacking lays them: see place().
    static void outer(float* acc, const bf16* u, long ldu, const bf16* x, long ldx, long rows, long X) {
        alignas(64) uint32_t two[ROWS / 2][UNIT];
        long even = rows / 2;
        for (long n = 0; n < even; n++)
            for (int r = 0; r < UNIT; r++) two[n][r] = u[2 * n * ldu + r].bits | (uint32_t)u[(2 * n + 1) * ldu + r].bits << 16;
        for (long k = 0; k < X; k += 2 * LANES) {
            __m512 lo[UNIT], hi[UNIT];
#pragma GCC unroll 8
            for (int r = 0; r < UNIT; r++) {
                lo[r] = (__m512)load(acc + r * X + k);
                hi[r] = (__m512)load(acc + r * X + k + LANES);
            }
            for (long n = 0; n < even; n++) {
                __m512i p = _mm512_loadu_si512(x + 2 * n * ldx + k), q = _mm512_loadu_si512(x + (2 * n + 1) * ldx + k);
                __m512bh v = (__m512bh)_mm512_unpacklo_epi16(p, q), w = (__m512bh)_mm512_unpackhi_epi16(p, q);
#pragma GCC unroll 8
                for (int r = 0; r < UNIT; r++) {
                    __m512bh s = (__m512bh)_mm512_set1_epi32((int)two[n][r]);
                    lo[r] = _mm512_dpbf16_ps(lo[r], s, v);
                    hi[r] = _mm512_dpbf16_ps(hi[r], s, w);
                }
            }
            if (rows % 2) {
                __m512i p = _mm512_loadu_si512(x + (rows - 1) * ldx + k), none = _mm512_setzero_si512();
                __m512bh v = (__m512bh)_mm512_unpacklo_epi16(p, none), w = (__m512bh)_mm512_unpackhi_epi16(p, none);
                for (int r = 0; r < UNIT; r++) {
                    __m512bh s = (__m512bh)_mm512_set1_epi32((int)u[(rows - 1) * ldu + r].bits);
                    lo[r] = _mm512_dpbf16_ps(lo[r], s, v);
                    hi[r] = _mm512_dpbf16_ps(hi[r], s, w);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < UNIT; r++) {
                store(acc + r * X + k, (vf)lo[r]);
                store(acc + r * X + k + LANES, (vf)hi[r]);
            }
        }
    }
    // Where the sum of column k stands: in each 32, the first half of every eight comes first.
    static long place(long k) { return k / 32 * 32 + k % 8 / 4 * 16 + k % 32 / 8 * 4 + k % 4; }
    static void pack(bf16* wide, const float* w, long ldr, long ldk, long rank, long padded, long X, const float* factor, float scale) {
        Rows<bf16>::pack(wide, w, ldr, ldk, rank, padded, X, factor, scale);
        bf16* by_two = wide + padded * X;
        for (long r = 0; r < padded; r += 2)
            for (long k = 0; k < X; k++) {
                by_two[r * X + 2 * k] = wide[r * X + k];
                by_two[r * X + 2 * k + 1] = wide[(r + 1) * X + k];
            }
    }
};
#endif

long padded(long rank) { return (rank + UNIT - 1) / UNIT * UNIT; }
long chunks_of(long N) {
    long chunks = (N + CHUNK - 1) / CHUNK;
    return chunks < 1 ? 1 : chunks > CHUNKS ? CHUNKS : chunks;
}

// Where the packed factors of a call stand: A of all layers, then B of each.
template <class T> struct Bank {
    T* a;
    std::vector<T*> b;
    long R = 0;
    Bank(T* memory, const Layer* layers, int H, long K) : a(memory) {
        for (int h = 0; h < H; h++) R += padded(layers[h].rank);
        T* p = memory + 2 * R * K;
        for (int h = 0; h < H; h++) {
            b.push_back(p);
            p += 2 * padded(layers[h].rank) * layers[h].width;
        }
    }
};

template <class T> void fold(T* memory, const Layer* layers, int H, long K, int threads) {
    Bank<T> bank(memory, layers, H, K);
    // A stands as one [R, K]; pairs of rows never cross two layers.
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < 2 * H; i++) {
        const Layer& l = layers[i / 2];
        long P = padded(l.rank);
        if (i % 2) {
            Packed<T>::pack(bank.b[i / 2], l.b, 1, l.rank, l.rank, P, l.width, l.gain, l.scale);
        } else {
            std::vector<T> own(2 * P * K);
            Packed<T>::pack(own.data(), l.a, K, 1, l.rank, P, K, nullptr, 1.0f);
            std::memcpy(bank.a + l.at * K, own.data(), P * K * sizeof(T));
            std::memcpy(bank.a + (bank.R + l.at) * K, own.data() + P * K, P * K * sizeof(T));
        }
    }
}

template <class T> void round_rows(const float* from, T* to, long rows, long R, const float* weights, float weight) {
    for (long n = 0; n < rows; n++)
        for (long r = 0; r < R; r++) set(to + n * R + r, from[n * R + r] * (weights ? weights[n] : weight));
}

template <class T> void dots(const T* x, long X, long rows, const T* w, long R, float* out, long ldo) {
    for (long n = 0; n < rows; n += 2)
        for (long r = 0; r < R; r += UNIT) Packed<T>::dots(x + n * X, X, rows - n > 1 ? 2 : 1, w + r * X, X, out + n * ldo + r, ldo);
}
template <class T> void add(T* y, long X, long rows, const T* u, long ldu, const T* w, long R) {
    for (long n = 0; n < rows; n += 4) Packed<T>::add(y + n * X, X, rows - n > 4 ? 4 : (int)(rows - n), u + n * ldu, ldu, w, R, X);
}
template <class T> void outer(float* acc, const T* u, long ldu, long R, const T* x, long rows, long X) {
    for (long r = 0; r < R; r += UNIT) Packed<T>::outer(acc + r * X, u + r, ldu, x, X, rows, X);
}

template <class T>
void forward(const T* x, long N, long K, const Layer* layers, int H, T* memory, const float* weights, float weight, T* const* y, T* xa, int threads) {
    fold(memory, layers, H, K, threads);
    Bank<T> bank(memory, layers, H, K);
    long R = bank.R, blocks = (N + ROWS - 1) / ROWS;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < blocks; i++) {
        long n = i * ROWS, rows = N - n < ROWS ? N - n : ROWS;
        std::vector<float> wide(rows * R);
        dots(x + n * K, K, rows, bank.a, R, wide.data(), R);
        round_rows(wide.data(), xa + n * R, rows, R, weights ? weights + n : nullptr, weight);
        for (int h = 0; h < H; h++)
            add(y[h] + n * layers[h].width, layers[h].width, rows, xa + n * R + layers[h].at, R, bank.b[h], padded(layers[h].rank));
    }
}

// g[h], da[h], db[h] are null where there is none; dx may be null, and x where no factor is trained.
template <class T>
void backward(const T* x, long N, long K, const Layer* layers, int H, T* memory, const float* weights, float weight, const T* const* g, const T* xa, T* dx,
              float* const* da, float* const* db, int threads) {
    Bank<T> bank(memory, layers, H, K);
    long R = bank.R, chunks = chunks_of(N), O = 0;
    std::vector<long> from;
    for (int h = 0; h < H; h++) {
        from.push_back(O);
        O += padded(layers[h].rank) * layers[h].width;
    }
    long size = x ? R * K + O : 0;
    std::unique_ptr<float[]> room(new float[chunks * size + 1]);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long c = 0; c < chunks; c++) {
        float* own = room.get() + c * size;
        std::fill(own, own + size, 0.0f);
        std::vector<float> wide(ROWS * R);
        std::vector<T> gb(ROWS * R);
        long end = N * (c + 1) / chunks;
        for (long n = N * c / chunks; n < end; n += ROWS) {
            long rows = end - n < ROWS ? end - n : ROWS;
            for (int h = 0; h < H; h++) {
                const Layer& l = layers[h];
                long P = padded(l.rank);
                if (!g[h]) {
                    for (long m = 0; m < rows; m++) std::memset(&wide[m * R + l.at], 0, P * sizeof(float));
                    continue;
                }
                const T* gh = g[h] + n * l.width;
                dots(gh, l.width, rows, bank.b[h], P, &wide[l.at], R);
                if (x) outer(own + R * K + from[h], xa + n * R + l.at, R, P, gh, rows, l.width);
            }
            round_rows(wide.data(), gb.data(), rows, R, weights ? weights + n : nullptr, weight);
            if (dx) add(dx + n * K, K, rows, gb.data(), R, bank.a, R);
            if (x) outer(own, gb.data(), R, R, x + n * K, rows, K);
        }
    }
    if (!x) return;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < 2 * H; i++) {
        int h = i / 2;
        const Layer& l = layers[h];
        bool is_a = i % 2 == 0;
        long X = is_a ? K : l.width;
        const float* first = room.get() + (is_a ? l.at * K : R * K + from[h]);
        if (is_a ? !da[h] : !db[h]) continue;
        std::vector<float> sum(X);
        for (long r = 0; r < l.rank; r++) {
            std::fill(sum.begin(), sum.end(), 0.0f);
            for (long c = 0; c < chunks; c++)
                for (long k = 0; k < X; k++) sum[k] += first[c * size + r * X + k];
            for (long k = 0; k < X; k++) {
                float found = sum[Packed<T>::place(k)];
                if (is_a)
                    da[h][r * K + k] = found;
                else
                    db[h][k * l.rank + r] = found * l.scale * (l.gain ? l.gain[k] : 1.0f);
            }
        }
    }
}

}  // namespace

// kind: 0 for fp32, 1 for bf16.
extern "C" void veneer_low_rank_forward(int kind, const void* x, long N, long K, const Layer* layers, int H, void* memory, const float* weights,
                                        float weight, void* const* y, void* xa, int threads) {
    if (kind)
        forward((const bf16*)x, N, K, layers, H, (bf16*)memory, weights, weight, (bf16* const*)y, (bf16*)xa, threads);
    else
        forward((const float*)x, N, K, layers, H, (float*)memory, weights, weight, (float* const*)y, (float*)xa, threads);
}

extern "C" void veneer_low_rank_backward(int kind, const void* x, long N, long K, const Layer* layers, int H, void* memory, const float* weights,
                                         float weight, const void* const* g, const void* xa, void* dx, float* const* da, float* const* db,
                                         int threads) {
    if (kind)
        backward((const bf16*)x, N, K, layers, H, (bf16*)memory, weights, weight, (const bf16* const*)g, (const bf16*)xa, (bf16*)dx, da, db, threads);
    else
        backward((const float*)x, N, K, layers, H, (float*)memory, weights, weight, (const float* const*)g, (const float*)xa, (float*)dx, da, db, threads);
}
