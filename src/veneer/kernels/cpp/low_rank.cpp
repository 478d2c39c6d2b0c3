// Low-rank branches of several adapters at the layers that read one input; kernels/lora/native.py has the formulas.
//
// A part is one adapter on a run of tokens. It takes layers h that read the same x [N, K]. Ranks are padded with zeros to multiples of 8
// and stand behind each other: R columns in all, of which layer h has those from at[h] on. In backward a part's tokens are cut into
// chunks, the same whatever the number of threads, and sums over tokens are taken chunk by chunk and then over chunks in their order: no
// result depends on the threads, or on the other parts.
#include <algorithm>
#include <memory>
#include <type_traits>

#include "products.h"
#include "vec.h"

namespace {

constexpr long UNIT = 8;     // ranks are padded to it
constexpr long ROWS = 64;    // tokens taken together: their inputs and gradients fit the second-level cache
constexpr long CHUNK = 256;  // tokens of a chunk in a long part
constexpr long CHUNKS = 32;  // chunks, at most

struct Layer {
    long width;         // O
    long rank;          // before padding
    long at;            // first of its columns
    const float* a;     // [rank, K]
    const float* b;     // [O, rank]
    const float* gain;  // S [O] or null
    const void* w;      // the layer's weight [O, K], where its product is taken here too, or null
    const void* bias;   // the layer's [O], where there is a gain or w, or null
    void* y;            // set by place(), as is out. Forward: the outputs [N, O]; backward: their gradients, or null
    const void* out;    // backward: the outputs, where S is trained, or null
    long host;          // which of the call's layers it is
    float* da;          // [rank, K] or null
    float* db;          // [O, rank] or null
    float* dots;        // [O]: sum_t g (out - bias), or null
    const int* gone;    // places n K + k of x, ascending, that dropout hides from the factors
    long lost;          // how many; -1 without dropout
    int turned;         // whether w is stored as [K, O]; then there is no gain
    float scale;
};

// An adapter in a call, wherever the call's tensors lie.
struct Run {
    long rows;             // N
    long first;            // its first token
    long columns;          // R
    long layers;           // how many
    long layer;            // the first of them
    long memory;           // where its packed factors begin: 2 R (K + O) numbers in all
    long u;                // where its [N, R] begins
    const float* weights;  // [N] or null
    float weight;
};

// The tensors of a call, of all its tokens: y and out by layer.
struct Call {
    const void* x;           // [N, K], or null where no factor is trained
    void* dx;                // [N, K] or null
    void* memory;
    void* u;
    void* const* y;          // [N, O], or null
    const void* const* out;  // [N, O], or null
    int packed;              // whether memory holds the packed factors already
    int joint;               // forward: the layers' products are taken of all tokens at once, whosever they are
};

// A run with its addresses.
struct Part {
    long rows;             // N
    long columns;          // R
    long layers;           // how many
    Layer* layer;
    const void* x;         // [N, K], or null where no factor is trained
    void* memory;          // the packed factors, 2 R (K + O) numbers in all
    void* u;               // [N, R]
    void* dx;              // [N, K] or null
    const float* weights;  // [N] or null
    float weight;
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
    // y[m] = y[m] + (S - 1) (y[m] - bias) + sum_r u[m][r] w[r], for up to four rows of y and R of the `whole` rows of w; S may be null
    static void add(T* y, long ldy, int rows, const T* u, long ldu, const T* w, long R, long, long X, const float* gain, const T* bias) {
        for (long k = 0; k < X; k += LANES) {
            vf acc[4];
            for (int m = 0; m < rows; m++) {
                acc[m] = load(y + m * ldy + k);
                if (gain) acc[m] = regained(acc[m], gain + k, bias ? bias + k : nullptr);
            }
            for (long r = 0; r < R; r++) {
                vf v = load(w + r * X + k);
                for (int m = 0; m < rows; m++) acc[m] += all(to_float(u[m * ldu + r])) * v;
            }
            for (int m = 0; m < rows; m++) store(y + m * ldy + k, acc[m]);
        }
    }
    static vf regained(vf y, const float* gain, const T* bias) { return y + (load(gain) - 1.0f) * (bias ? y - load(bias) : y); }
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
    template <int M>
    static void add_rows(bf16* y, long ldy, const bf16* u, long ldu, const bf16* w, long R, long whole, long X, const float* gain, const bf16* bias) {
        const bf16* by_two = w + whole * X;
        for (long k = 0; k < X; k += 2 * LANES) {
            __m512 lo[M], hi[M];
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                lo[m] = (__m512)load(y + m * ldy + k);
                hi[m] = (__m512)load(y + m * ldy + k + LANES);
                if (gain) {
                    lo[m] = (__m512)regained((vf)lo[m], gain + k, bias ? bias + k : nullptr);
                    hi[m] = (__m512)regained((vf)hi[m], gain + k + LANES, bias ? bias + k + LANES : nullptr);
                }
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
    static void add(bf16* y, long ldy, int rows, const bf16* u, long ldu, const bf16* w, long R, long whole, long X, const float* gain,
                    const bf16* bias) {
        if (rows == 4) return add_rows<4>(y, ldy, u, ldu, w, R, whole, X, gain, bias);
        for (int m = 0; m < rows; m++) add_rows<1>(y + m * ldy, ldy, u + m * ldu, ldu, w, R, whole, X, gain, bias);
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

bool drops(const Part& part) { return part.layer[0].lost >= 0; }  // all layers of a part, or none

long padded(long rank) { return (rank + UNIT - 1) / UNIT * UNIT; }

long chunks_of(long N) {
    if (N <= ROWS) return 1;
    long chunks = (N + CHUNK - 1) / CHUNK;
    return std::min(chunks + chunks % 2, CHUNKS);  // even, for two threads
}

// Where the packed factors of a part stand: A of all layers as one [R, K], then B of each.
template <class T> struct Bank {
    T* a;
    std::vector<T*> b;
    Bank(const Part& part, long K) : a((T*)part.memory) {
        T* p = a + 2 * part.columns * K;
        for (long h = 0; h < part.layers; h++) {
            b.push_back(p);
            p += 2 * padded(part.layer[h].rank) * part.layer[h].width;
        }
    }
};

template <class T> void fold(const Part& part, long K, long h, bool is_a) {
    Bank<T> bank(part, K);
    const Layer& l = part.layer[h];
    long P = padded(l.rank);
    if (!is_a) return Packed<T>::pack(bank.b[h], l.b, 1, l.rank, l.rank, P, l.width, l.gain, l.scale);
    std::vector<T> own(2 * P * K);  // pairs of rows never cross two layers
    Packed<T>::pack(own.data(), l.a, K, 1, l.rank, P, K, nullptr, 1.0f);
    std::memcpy(bank.a + l.at * K, own.data(), P * K * sizeof(T));
    std::memcpy(bank.a + (part.columns + l.at) * K, own.data() + P * K, P * K * sizeof(T));
}

template <class T> void round_rows(const float* from, T* to, long rows, long R, const float* weights, float weight) {
    for (long n = 0; n < rows; n++)
        for (long r = 0; r < R; r++) set(to + n * R + r, from[n * R + r] * (weights ? weights[n] : weight));
}

template <class T> void dots(const T* x, long X, long rows, const T* w, long R, float* out, long ldo) {
    for (long n = 0; n < rows; n += 2)
        for (long r = 0; r < R; r += UNIT) Packed<T>::dots(x + n * X, X, rows - n > 1 ? 2 : 1, w + r * X, X, out + n * ldo + r, ldo);
}
template <class T>
void add(T* y, long X, long rows, const T* u, long ldu, const T* w, long R, long whole, const float* gain = nullptr, const T* bias = nullptr) {
    for (long n = 0; n < rows; n += 4)
        Packed<T>::add(y + n * X, X, rows - n > 4 ? 4 : (int)(rows - n), u + n * ldu, ldu, w, R, whole, X, gain, bias);
}
// acc += sum_n a[n] (b[n] - bias)
template <class T> void column_dots(float* acc, const T* a, const T* b, const T* bias, long rows, long X) {
    for (long k = 0; k < X; k += LANES) {
        vf sum = load(acc + k), shift = bias ? load(bias + k) : zero();
        for (long n = 0; n < rows; n++) sum += load(a + n * X + k) * (load(b + n * X + k) - shift);
        store(acc + k, sum);
    }
}
template <class T> void outer(float* acc, const T* u, long ldu, long R, const T* x, long rows, long X) {
    for (long r = 0; r < R; r += UNIT) Packed<T>::outer(acc + r * X, u + r, ldu, x, X, rows, X);
}

// Zeros at what is hidden from a layer, in the rows of tokens n to n + rows.
template <class T> void hide(const Layer& l, long K, long n, long rows, T* t) {
    const int *p = std::lower_bound(l.gone, l.gone + l.lost, n * K), *end = std::lower_bound(p, l.gone + l.lost, (n + rows) * K);
    for (; p < end; p++) set(t + (*p - n * K), 0.0f);
}

// What a layer's factors see of these tokens.
template <class T> const T* seen(const Layer& l, long K, long n, long rows, const T* x, std::vector<T>& room) {
    if (l.lost < 0) return x + n * K;
    room.assign(x + n * K, x + (n + rows) * K);
    hide(l, K, n, rows, room.data());
    return room.data();
}

// u, and where the layers' products are there already, what the part adds to them.
template <class T> void forward_rows(const Part& part, long K, long n, long rows) {
    Bank<T> bank(part, K);
    long R = part.columns;
    T* u = (T*)part.u + n * R;
    std::vector<float> wide(rows * R);
    std::vector<T> room;
    if (!drops(part)) dots((const T*)part.x + n * K, K, rows, bank.a, R, wide.data(), R);
    for (long h = 0; drops(part) && h < part.layers; h++) {
        const Layer& l = part.layer[h];
        dots(seen(l, K, n, rows, (const T*)part.x, room), K, rows, bank.a + l.at * K, padded(l.rank), &wide[l.at], R);
    }
    round_rows(wide.data(), u, rows, R, part.weights ? part.weights + n : nullptr, part.weight);
    for (long h = 0; h < part.layers; h++) {
        const Layer& l = part.layer[h];
        long P = padded(l.rank);
        if (!l.w) add((T*)l.y + n * l.width, l.width, rows, u + l.at, R, bank.b[h], P, P, l.gain, (const T*)l.bias);
    }
}

// Numbers of a layer among a chunk's sums: dB [P, O], and the dots [O].
long sums_of(const Layer& l) { return (padded(l.rank) + (l.dots ? 1 : 0)) * l.width; }

// The chunk's part of dx, and its sums: dA [R, K], then those of each layer.
template <class T> void backward_rows(const Part& part, long K, long n, long end, float* sums, T* slopes) {
    Bank<T> bank(part, K);
    long R = part.columns;
    const T* x = (const T*)part.x;
    std::vector<float> wide(ROWS * R);
    std::vector<T> room;
    for (; n < end; n += ROWS) {
        long rows = std::min(ROWS, end - n);
        float* own = sums + R * K;
        for (long h = 0; h < part.layers; h++) {
            const Layer& l = part.layer[h];
            long P = padded(l.rank);
            if (l.y) {
                const T* g = (const T*)l.y + n * l.width;
                dots(g, l.width, rows, bank.b[h], P, &wide[l.at], R);
                if (x) outer(own, (const T*)part.u + n * R + l.at, R, P, g, rows, l.width);
                if (x && l.dots)
                    column_dots(own + P * l.width, g, (const T*)l.out + n * l.width, (const T*)l.bias, rows, l.width);
            } else {
                for (long m = 0; m < rows; m++) std::fill_n(&wide[m * R + l.at], P, 0.0f);
            }
            own += sums_of(l);
        }
        T* G = slopes + n * R;
        round_rows(wide.data(), G, rows, R, part.weights ? part.weights + n : nullptr, part.weight);
        if (part.dx && !part.layer[0].w && !drops(part)) add((T*)part.dx + n * K, K, rows, G, R, bank.a, R, R);
        if (x && !drops(part)) outer(sums, G, R, R, x + n * K, rows, K);
        for (long h = 0; x && drops(part) && h < part.layers; h++) {
            const Layer& l = part.layer[h];
            outer(sums + l.at * K, G + l.at, R, padded(l.rank), seen(l, K, n, rows, x, room), rows, K);
        }
    }
}

// dx += G A, but for what was hidden.
template <class T> void add_seen(const Part& part, long K, long n, long end, const T* slopes) {
    Bank<T> bank(part, K);
    long R = part.columns;
    std::vector<T> room;
    for (; n < end; n += ROWS)
        for (long h = 0; h < part.layers; h++) {
            const Layer& l = part.layer[h];
            long rows = std::min(ROWS, end - n), P = padded(l.rank);
            room.assign(rows * K, T{});
            add(room.data(), K, rows, slopes + n * R + l.at, R, bank.a + l.at * K, P, R);
            hide(l, K, n, rows, room.data());
            T* dx = (T*)part.dx + n * K;
            for (long k = 0; k < rows * K; k += LANES) store(dx + k, load(dx + k) + load(room.data() + k));
        }
}

// Sums over chunks, in the places and the size of the masters' gradients.
template <class T> void gather(const Part& part, long K, long h, bool is_a, const float* sums, long size, long chunks) {
    const Layer& l = part.layer[h];
    long X = is_a ? K : l.width, at = l.at * K;
    if (!is_a) {
        at = part.columns * K;
        for (long i = 0; i < h; i++) at += sums_of(part.layer[i]);
    }
    if (!is_a && l.dots)
        for (long k = 0; k < X; k++) {
            float sum = 0.0f;
            for (long c = 0; c < chunks; c++) sum += sums[c * size + at + padded(l.rank) * X + k];
            l.dots[k] = sum;
        }
    if (is_a ? !l.da : !l.db) return;
    std::vector<float> sum(X);
    for (long r = 0; r < l.rank; r++) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (long c = 0; c < chunks; c++)
            for (long k = 0; k < X; k++) sum[k] += sums[c * size + at + r * X + k];
        for (long k = 0; k < X; k++) {
            float found = sum[Packed<T>::place(k)];
            if (is_a)
                l.da[r * K + k] = found;
            else
                l.db[k * l.rank + r] = found * l.scale * (l.gain ? l.gain[k] : 1.0f);
        }
    }
}

struct Task {
    long part, first, end, room;
};

// size: bytes of a number. own: room for the layers.
std::vector<Part> placed(long size, long K, const Run* runs, long count, const Layer* layers, const Call& call, std::vector<Layer>& own) {
    auto at = [=](const void* p, long numbers) { return p ? (char*)p + numbers * size : nullptr; };
    std::vector<Part> parts;
    for (long i = 0; i < count; i++) own.insert(own.end(), layers + runs[i].layer, layers + runs[i].layer + runs[i].layers);
    Layer* layer = own.data();
    for (long i = 0; i < count; i++) {
        const Run& run = runs[i];
        for (long h = 0; h < run.layers; h++) {
            Layer& l = layer[h];
            l.y = at(call.y[l.host], run.first * l.width);
            l.out = l.dots ? at(call.out[l.host], run.first * l.width) : nullptr;
        }
        parts.push_back({run.rows, run.columns, run.layers, layer, at(call.x, run.first * K), at(call.memory, run.memory), at(call.u, run.u),
                         at(call.dx, run.first * K), run.weights, run.weight});
        layer += run.layers;
    }
    return parts;
}

#if defined(VENEER_PRODUCTS)
// Products of whole layers: for every panel of `columns` outputs, the rows of all parts, in pieces that go evenly into the threads.
struct Piece {
    long column, part, first, end;
};

std::vector<Piece> pieces_of(const Part* parts, long count, long columns, int threads) {
    std::vector<Piece> pieces;
    long panels = (columns + PANEL - 1) / PANEL, cuts = panels % threads ? threads : 1;
    for (long p = 0; p < panels; p++)
        for (long i = 0; i < count; i++) {
            long step = (parts[i].rows + cuts - 1) / cuts;
            step = std::max<long>(6, (step + 5) / 6 * 6);
            for (long n = 0; n < parts[i].rows; n += step) pieces.push_back({p * PANEL, i, n, std::min(n + step, parts[i].rows)});
        }
    return pieces;
}

struct Room {  // for one thread's panel
    std::unique_ptr<uint32_t[]> words;
    long column = -1, part = -1;
    uint32_t* of(long size) {
        if (!words) words.reset(new uint32_t[size]);
        return words.get();
    }
};

// joint: the product alone, with neither gain nor factors.
void layer_forward(long K, const Part* parts, long h, const Piece& t, Room& room, bool joint) {
    const Part& part = parts[t.part];
    const Layer& l = part.layer[h];
    Bank<bf16> bank(part, K);
    long P = padded(l.rank), width = std::min(PANEL, l.width - t.column);
    const float* gain = l.gain && !joint ? l.gain + t.column : nullptr;
    uint32_t* panel = room.of(K / 2 * PANEL);
    if (room.column != t.column) {
        if (l.turned)
            pack_columns((const bf16*)l.w, K, l.width, t.column, width, nullptr, panel);
        else
            pack_rows((const bf16*)l.w, K, t.column, width, panel);
    }
    room.column = t.column;
    const uint32_t* factor = (const uint32_t*)(bank.b[h] + P * l.width) + t.column;
    Segment segments[2] = {{(const bf16*)part.x + t.first * K, K, panel, PANEL, K / 2},
                           {(const bf16*)part.u + t.first * part.columns + l.at, part.columns, factor, l.width, P / 2}};
    const bf16* bias = (const bf16*)l.bias;
    panel_product(segments, joint ? 1 : 2, t.end - t.first, (bf16*)l.y + t.first * l.width + t.column, l.width, width, gain,
                  bias ? bias + t.column : nullptr);
}

// dx = sum_h (S g_h) W_h + G A.
void input_gradient(long K, const Part* parts, const Piece& t, const bf16* slopes, Room& room) {
    const Part& part = parts[t.part];
    Bank<bf16> bank(part, K);
    long R = part.columns, words = 0, width = std::min(PANEL, K - t.column);
    bool gained = false;
    for (long h = 0; h < part.layers; h++) {
        words += part.layer[h].width / 2;
        gained = gained || part.layer[h].gain;
    }
    uint32_t* panel = room.of(words * PANEL);
    bool packed = room.column == t.column && (room.part == t.part || !gained);
    std::vector<Segment> segments;
    for (long h = 0; h < part.layers; h++) {
        const Layer& l = part.layer[h];
        if (!l.y) continue;
        if (!packed && l.turned)
            pack_rows((const bf16*)l.w, l.width, t.column, width, panel);
        else if (!packed)
            pack_columns((const bf16*)l.w, l.width, K, t.column, width, l.gain, panel);
        segments.push_back({(const bf16*)l.y + t.first * l.width, l.width, panel, PANEL, l.width / 2});
        panel += l.width / 2 * PANEL;
    }
    room.column = t.column;
    room.part = t.part;
    const uint32_t* factor = (const uint32_t*)(bank.a + R * K) + t.column;
    if (!drops(part)) segments.push_back({slopes + t.first * R, R, factor, K, R / 2});
    panel_product(segments.data(), (int)segments.size(), t.end - t.first, (bf16*)part.dx + t.first * K + t.column, K, width, nullptr, nullptr);
}
#endif

// Parts of few tokens each: the layers' products of all tokens, which leaves the parts their own additions.
void products_of_all(long K, std::vector<Part>& parts, const Call& call, int threads) {
#if defined(VENEER_PRODUCTS)
    std::vector<Layer> layers(parts[0].layer, parts[0].layer + parts[0].layers);
    Part all = parts[0];
    all.rows = 0;
    all.x = call.x;
    all.layer = layers.data();
    for (const Part& part : parts) all.rows += part.rows;
    for (Layer& l : layers) l.y = call.y[l.host];
#pragma omp parallel num_threads(threads)
    for (long h = 0; h < all.layers; h++) {
        std::vector<Piece> pieces = pieces_of(&all, 1, layers[h].width, threads);
        Room room;
#pragma omp for schedule(static) nowait
        for (size_t i = 0; i < pieces.size(); i++) layer_forward(K, &all, h, pieces[i], room, true);
    }
    for (Part& part : parts)
        for (long h = 0; h < part.layers; h++) part.layer[h].w = nullptr;
#else
    (void)K, (void)parts, (void)call, (void)threads;
#endif
}

// Every token of a call belongs to a part, and all parts take all layers, where w is there.
template <class T> void forward(long K, const Part* parts, long count, bool packed, int threads) {
    std::vector<Task> folds, blocks;
    for (long i = 0; i < count; i++) {
        for (long h = 0; !packed && h < 2 * parts[i].layers; h++) folds.push_back({i, h, 0, 0});
        long step = parts[i].rows > 4 * ROWS ? ROWS : ROWS / 4;
        for (long n = 0; n < parts[i].rows; n += step) blocks.push_back({i, n, std::min(n + step, parts[i].rows), 0});
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static, 1)
        for (size_t i = 0; i < folds.size(); i++) fold<T>(parts[folds[i].part], K, folds[i].first / 2, folds[i].first % 2 == 0);
#pragma omp for schedule(static)
        for (size_t i = 0; i < blocks.size(); i++)
            forward_rows<T>(parts[blocks[i].part], K, blocks[i].first, blocks[i].end - blocks[i].first);
#if defined(VENEER_PRODUCTS)
        if (std::is_same<T, bf16>::value && parts[0].layer[0].w)
            for (long h = 0; h < parts[0].layers; h++) {
                std::vector<Piece> pieces = pieces_of(parts, count, parts[0].layer[h].width, threads);
                Room room;
#pragma omp for schedule(static) nowait
                for (size_t i = 0; i < pieces.size(); i++) layer_forward(K, parts, h, pieces[i], room, false);
            }
#endif
    }
}

template <class T> void backward(long K, const Part* parts, long count, int threads) {
    std::vector<Task> chunks, sums;
    std::vector<long> sizes, firsts;
    long room = 0, cells = 0;
    for (long i = 0; i < count; i++) {
        const Part& part = parts[i];
        long number = chunks_of(part.rows), size = 0;
        if (part.x) {
            size = part.columns * K;
            for (long h = 0; h < part.layers; h++) {
                size += sums_of(part.layer[h]);
                sums.push_back({i, 2 * h, number, room});
                sums.push_back({i, 2 * h + 1, number, room});
            }
        }
        sizes.push_back(size);
        firsts.push_back(cells);
        cells += part.rows * part.columns;
        for (long c = 0; c < number; c++, room += size) chunks.push_back({i, part.rows * c / number, part.rows * (c + 1) / number, room});
    }
    std::unique_ptr<float[]> memory(new float[room + 1]);
    std::unique_ptr<T[]> slopes(new T[cells + 1]);  // G of every part, [n, R]
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (size_t i = 0; i < chunks.size(); i++) {
            const Task& t = chunks[i];
            std::fill_n(memory.get() + t.room, sizes[t.part], 0.0f);
            backward_rows<T>(parts[t.part], K, t.first, t.end, memory.get() + t.room, slopes.get() + firsts[t.part]);
        }
#pragma omp for schedule(static, 1) nowait
        for (size_t i = 0; i < sums.size(); i++) {
            const Task& t = sums[i];
            gather<T>(parts[t.part], K, t.first / 2, t.first % 2 == 0, memory.get() + t.room, sizes[t.part], t.end);
        }
#if defined(VENEER_PRODUCTS)
        if (std::is_same<T, bf16>::value && parts[0].layer[0].w && parts[0].dx) {
            std::vector<Piece> pieces = pieces_of(parts, count, K, threads);
            Room own;
#pragma omp for schedule(static)
            for (size_t i = 0; i < pieces.size(); i++)
                input_gradient(K, parts, pieces[i], (const bf16*)slopes.get() + firsts[pieces[i].part], own);
        }
#endif
#pragma omp for schedule(static)
        for (size_t i = 0; i < chunks.size(); i++) {
            const Task& t = chunks[i];
            if (parts[t.part].dx && drops(parts[t.part])) add_seen(parts[t.part], K, t.first, t.end, slopes.get() + firsts[t.part]);
        }
    }
}

// ||W_o + s B_o A||^2 = ||W_o||^2 + 2 s <(W A^T)_o, B_o> + s^2 B_o (A A^T) B_o^T, for one row of W and one adapter, in fp32.
struct Norm {
    const float* a;  // [rank, K]
    const float* b;  // [O, rank]
    float* square;   // [O]
    long rank;
    float scale;
};

template <class T> void squared_norms(const T* w, long O, long K, const float* squared, const Norm* adapters, long count, int threads) {
    std::vector<std::vector<float>> rows(count), gram(count);  // A padded; A A^T
    for (long j = 0; j < count; j++) {
        const Norm& n = adapters[j];
        rows[j].assign(padded(n.rank) * K, 0.0f);
        std::memcpy(rows[j].data(), n.a, n.rank * K * sizeof(float));
        gram[j].resize(n.rank * n.rank);
        for (long r = 0; r < n.rank; r++)
            for (long q = 0; q <= r; q++) {
                vf sum = zero();
                for (long k = 0; k < K; k += LANES) sum += load(n.a + r * K + k) * load(n.a + q * K + k);
                float total = 0.0f;
                for (long i = 0; i < LANES; i++) total += sum[i];
                gram[j][r * n.rank + q] = gram[j][q * n.rank + r] = total;
            }
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long o = 0; o < O; o += 2) {
        int two = O - o > 1 ? 2 : 1;
        std::vector<float> wide(2 * K);  // two rows of W, read once for all adapters
        for (int i = 0; i < two; i++)
            for (long k = 0; k < K; k += LANES) store(&wide[i * K + k], load(w + (o + i) * K + k));
        for (long j = 0; j < count; j++) {
            const Norm& n = adapters[j];
            long P = padded(n.rank);
            std::vector<float> wa(2 * P);
            for (long r = 0; r < P; r += UNIT) Rows<float>::dots(wide.data(), K, two, rows[j].data() + r * K, K, &wa[r], P);
            for (int i = 0; i < two; i++) {
                const float* b = n.b + (o + i) * n.rank;
                float cross = 0.0f, own = 0.0f;
                for (long r = 0; r < n.rank; r++) {
                    float sum = 0.0f;
                    for (long q = 0; q < n.rank; q++) sum += gram[j][r * n.rank + q] * b[q];
                    cross += wa[i * P + r] * b[r];
                    own += sum * b[r];
                }
                float square = squared[o + i] + 2 * n.scale * cross + n.scale * n.scale * own;
                n.square[o + i] = square < 1.17549435e-38f ? 1.17549435e-38f : square;  // NaN goes through
            }
        }
    }
}

}  // namespace

// ||W_o + s (B A)_o||^2 of each adapter, into its `square` [O]. kind: 0 for fp32, 1 for bf16, of the weight [O, K]; squared: ||W_o||^2 [O].
extern "C" void veneer_dora_squared_norms(int kind, const void* w, long O, long K, const float* squared, const Norm* adapters, long count,
                                         int threads) {
    kind ? squared_norms((const bf16*)w, O, K, squared, adapters, count, threads) : squared_norms((const float*)w, O, K, squared, adapters, count, threads);
}

// Whether products of whole layers are taken here, up to so many numbers along the inner dimension; 0 if not at all.
extern "C" long veneer_products() {
#if defined(VENEER_PRODUCTS)
    return 2 * WORDS / PANEL;
#else
    return 0;
#endif
}

// y = x W^T + b in bf16, for x [N, K], W [O, K] and bias [O] or null; only where veneer_products() is at least K.
extern "C" void veneer_product(const void* x, long N, long K, const void* w, const void* bias, long O, void* y, int threads) {
#if defined(VENEER_PRODUCTS)
    Part part{};
    part.rows = N;
    std::vector<Piece> pieces = pieces_of(&part, 1, O, threads);
#pragma omp parallel num_threads(threads)
    {
        Room room;
#pragma omp for schedule(static)
        for (size_t i = 0; i < pieces.size(); i++) {
            const Piece& t = pieces[i];
            long width = std::min(PANEL, O - t.column);
            uint32_t* panel = room.of(K / 2 * PANEL);
            if (room.column != t.column) pack_rows((const bf16*)w, K, t.column, width, panel);
            room.column = t.column;
            Segment segment{(const bf16*)x + t.first * K, K, panel, PANEL, K / 2};
            const bf16* shift = bias ? (const bf16*)bias + t.column : nullptr;
            panel_product(&segment, 1, t.end - t.first, (bf16*)y + t.first * O + t.column, O, width, nullptr, shift);
        }
    }
#else
    (void)x, (void)N, (void)K, (void)w, (void)bias, (void)O, (void)y, (void)threads;
#endif
}

// kind: 0 for fp32, 1 for bf16. K: width of the input. Runs of one call share no token. layers: theirs, one run's behind the other's;
// what a call adds to them is written to a copy, so that threads may share them.
extern "C" void veneer_low_rank_forward(int kind, long K, const Run* runs, long count, const Layer* layers, const Call* call, int threads) {
    std::vector<Layer> own;
    std::vector<Part> parts = placed(kind ? 2 : 4, K, runs, count, layers, *call, own);
    if (call->joint) products_of_all(K, parts, *call, threads);
    kind ? forward<bf16>(K, parts.data(), count, call->packed, threads) : forward<float>(K, parts.data(), count, call->packed, threads);
}

extern "C" void veneer_low_rank_backward(int kind, long K, const Run* runs, long count, const Layer* layers, const Call* call, int threads) {
    std::vector<Layer> own;
    std::vector<Part> parts = placed(kind ? 2 : 4, K, runs, count, layers, *call, own);
    kind ? backward<bf16>(K, parts.data(), count, threads) : backward<float>(K, parts.data(), count, threads);
}
