// One decoding step of a whole decoder for a few rows, each the next token of its own sequence; decoding.py has the formulas and the structures.
//
// Reading the weights is what a step costs, so each is read once for all rows, in the order in which it is stored, and everything else
// happens on the way: an adapter's B and S when a block of 16 outputs is finished, activations and sums in place. Threads share the outputs
// of a product and meet at barriers between products. A row's numbers are computed in the same order however many rows there are, so its
// result does not depend on the others.
#include <algorithm>
#include <memory>

#include "quantized.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define VENEER_TILES 1
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

constexpr long ROWS = 16;  // rows of a block
constexpr float LOG2E = 1.4426950408889634f;
enum { Q, K, V, O, GATE, UP, DOWN, LINEARS };

// An adapter at one linear layer: A [rank, in], and for each 16 outputs S - 1 in fp32, if it is not 0, and (s S B)^T [rank, 16] behind it.
struct Factor {
    long rank;
    const void* a;
    const char* b;
    long stride;  // bytes of 16 outputs
    long gained;  // 1 with S - 1
};

struct Block {
    Weight weight[LINEARS];
    const void* bias[LINEARS];  // or null
    const void *norm, *norm_after;
    const void *q_norm, *k_norm;  // [head size] or null
    void *keys, *values;          // the cache: [slots, G, D]
    long before;                  // tokens back that a token attends to, or -1 for all
};

struct Decoder {
    long layers, width, heads, groups, size, inner, vocabulary;
    const void *embedding, *norm, *head;
    const Block* blocks;
    float eps, scale;
    long block;  // tokens of a cache block
};

struct Step {
    long rows;
    const long* ids;
    const long* lengths;  // tokens of each row's context, this one included
    const long* tables;   // [rows, stride]: the cache blocks of each row
    long stride;
    const float *cos, *sin;  // [rows, D]
    const long* first;       // [rows + 1]: each row's parts
    const Factor* const* factors;  // a part's adapter at layer l, linear i: factors[part][l * LINEARS + i]
    const float* weights;          // of the parts
    long most;                     // the largest rank
    float* logits;                 // [rows, V]
};

#if defined(VENEER_TILES)
bool tiles_allowed() {
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return allowed;
}
struct Tiles {  // 0 to 3: sums [16 outputs][16 rows]; 4: rows; 5 to 7: weights
    Tiles() {
        if (!tiles_allowed()) return;
        alignas(64) unsigned char config[64] = {1};
        for (int i = 0; i < 8; i++) {
            config[48 + i] = 16;
            config[16 + 2 * i] = 64;
        }
        _tile_loadconfig(config);
    }
    ~Tiles() {
        if (tiles_allowed()) _tile_release();
    }
};
#else
bool tiles_allowed() { return false; }
struct Tiles {};
#endif

template <class T> struct Product {
    // sums[o][n] of up to `count` blocks of 16 outputs from o on, for rows n to n + 16; x: [K] of each row.
    static void dots(const T* w, long k_all, const T* const* x, int rows, float* sums_on) {
        for (int o = 0; o < 16; o++) {
            vf acc[ROWS] = {};
            const T* row = w + o * k_all;
            for (long k = 0; k < k_all; k += LANES) {
                vf v = load(row + k);
                for (int n = 0; n < rows; n++) acc[n] += v * load(x[n] + k);
            }
            store(sums_on + o * ROWS, sums(acc));
        }
    }
};
#if defined(VENEER_PAIRS)
template <> struct Product<bf16> {
    static void dots(const bf16* w, long k_all, const bf16* const* x, int rows, float* sums_on) {
        for (int o = 0; o < 16; o++) {
            const bf16* row = w + o * k_all;
            vf acc[ROWS] = {};
            if (rows == 1)
                one(row, k_all, x[0], acc);
            else
                for (int n = 0; n < rows; n += 4) four(row, k_all, x + n, std::min(4, rows - n), acc + n);
            store(sums_on + o * ROWS, sums(acc));
        }
    }
    static __m512bh words(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static void one(const bf16* row, long k_all, const bf16* x, vf* acc) {
        __m512 a = _mm512_setzero_ps();
        for (long k = 0; k < k_all; k += 32) a = _mm512_dpbf16_ps(a, words(row + k), words(x + k));
        acc[0] = (vf)a;
    }
    static void four(const bf16* row, long k_all, const bf16* const* x, int rows, vf* acc) {
        const bf16 *p = x[0], *q = x[rows > 1], *r = x[rows > 2 ? 2 : 0], *s = x[rows > 3 ? 3 : 0];
        __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
        for (long k = 0; k < k_all; k += 32) {
            __m512bh v = words(row + k);
            a = _mm512_dpbf16_ps(a, v, words(p + k));
            b = _mm512_dpbf16_ps(b, v, words(q + k));
            c = _mm512_dpbf16_ps(c, v, words(r + k));
            d = _mm512_dpbf16_ps(d, v, words(s + k));
        }
        acc[0] = (vf)a, acc[1] = (vf)b, acc[2] = (vf)c, acc[3] = (vf)d;
    }
};
#endif

// The rows of a product's input, and for tiles the same as pairs along K: [block of rows][K / 2][16].
template <class T> struct Input {
    const T* x;
    long rows, columns;
    std::unique_ptr<uint32_t[]> packed;
    long capacity = 0;

    void set(const T* from, long n, long k) {
        x = from, rows = n, columns = k;
        if (sizeof(T) != 2 || !tiles_allowed() || k % 32) return;
        const long blocks = (n + ROWS - 1) / ROWS, needed = blocks * k / 2 * ROWS;
        if (needed > capacity) packed.reset(new uint32_t[capacity = needed]);
        for (long b = 0; b < blocks; b++)
            for (long w = 0; w < k / 2; w += LANES) {
                vf v[16];
                for (long i = 0; i < 16; i++) {
                    v[i] = zero();
                    if (b * ROWS + i < n) std::memcpy(&v[i], (const uint16_t*)x + (b * ROWS + i) * k + 2 * w, 64);
                }
                transpose(v);
                std::memcpy(packed.get() + (b * k / 2 + w) * ROWS, v, sizeof v);
            }
    }
    bool tiled() const { return sizeof(T) == 2 && tiles_allowed() && columns % 32 == 0; }
};

// sums [blocks][row block][16 outputs][16 rows] of `blocks` <= 4 blocks of outputs from w on.
template <class T> void product(const T* w, const Input<T>& in, long blocks, float* out) {
    const long k_all = in.columns, row_blocks = (in.rows + ROWS - 1) / ROWS;
#if defined(VENEER_TILES)
    if (in.tiled()) {
        for (long b = 0; b < row_blocks; b++) {
            const uint32_t* x = in.packed.get() + b * k_all / 2 * ROWS;
            const T* row = w;
            const long stride = k_all * 2;
            auto sum = [&](long i) { return out + (i * row_blocks + b) * ROWS * 16; };
            if (blocks == 4) {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                for (long k = 0; k < k_all; k += 32) {
                    _tile_loadd(4, x + k / 2 * ROWS, 64);
                    _tile_loadd(5, row + k, stride);
                    _tile_loadd(6, row + 16 * k_all + k, stride);
                    _tile_dpbf16ps(0, 5, 4);
                    _tile_dpbf16ps(1, 6, 4);
                    _tile_loadd(7, row + 32 * k_all + k, stride);
                    _tile_loadd(5, row + 48 * k_all + k, stride);
                    _tile_dpbf16ps(2, 7, 4);
                    _tile_dpbf16ps(3, 5, 4);
                }
                _tile_stored(0, sum(0), 64);
                _tile_stored(1, sum(1), 64);
                _tile_stored(2, sum(2), 64);
                _tile_stored(3, sum(3), 64);
            } else {
                for (long i = 0; i < blocks; i++) {
                    _tile_zero(0);
                    for (long k = 0; k < k_all; k += 32) {
                        _tile_loadd(4, x + k / 2 * ROWS, 64);
                        _tile_loadd(5, row + i * 16 * k_all + k, stride);
                        _tile_dpbf16ps(0, 5, 4);
                    }
                    _tile_stored(0, sum(i), 64);
                }
            }
        }
        return;
    }
#endif
    const T* x[ROWS];
    for (long b = 0; b < row_blocks; b++) {
        const int rows = (int)std::min(ROWS, in.rows - b * ROWS);
        for (int n = 0; n < rows; n++) x[n] = in.x + (b * ROWS + n) * k_all;
        for (long i = 0; i < blocks; i++) Product<T>::dots(w + i * 16 * k_all, k_all, x, rows, out + (i * row_blocks + b) * ROWS * 16);
    }
}

template <class T> float dot(const T* a, const T* x, long k_all) {
    vf one = zero(), two = zero();
    long k = 0;
    for (; k + 2 * LANES <= k_all; k += 2 * LANES) {
        one += load(a + k) * load(x + k);
        two += load(a + k + LANES) * load(x + k + LANES);
    }
    if (k < k_all) one += load(a + k) * load(x + k);
    return total(one + two);
}
#if defined(VENEER_PAIRS)
template <> float dot<bf16>(const bf16* a, const bf16* x, long k_all) {
    if (k_all % 32) {
        vf sum = zero();
        for (long k = 0; k < k_all; k += LANES) sum += load(a + k) * load(x + k);
        return total(sum);
    }
    __m512 one = _mm512_setzero_ps(), two = one;
    long k = 0;
    for (; k + 64 <= k_all; k += 64) {
        one = _mm512_dpbf16_ps(one, Product<bf16>::words(a + k), Product<bf16>::words(x + k));
        two = _mm512_dpbf16_ps(two, Product<bf16>::words(a + k + 32), Product<bf16>::words(x + k + 32));
    }
    if (k < k_all) one = _mm512_dpbf16_ps(one, Product<bf16>::words(a + k), Product<bf16>::words(x + k));
    return total((vf)one + (vf)two);
}
#endif

template <class T> void norm(const T* x, const T* w, T* y, long width, float eps) {
    vf sum = zero();
    for (long d = 0; d < width; d += LANES) sum += load(x + d) * load(x + d);
    const float r = 1.0f / std::sqrt(total(sum) / (float)width + eps);
    for (long d = 0; d < width; d += LANES) store(y + d, rounded<T>(load(x + d) * r) * load(w + d));
}

// What all threads share: activations, and u = x A^T of every part at up to three layers.
template <class T> struct Shared {
    std::unique_ptr<T[]> x, q, k, v, attended, h;
    std::unique_ptr<float[]> u;
    Shared(const Decoder& m, const Step& s, long parts)
        : x(new T[s.rows * m.width]), q(new T[s.rows * m.heads * m.size]), k(new T[s.rows * m.groups * m.size]),
          v(new T[s.rows * m.groups * m.size]), attended(new T[s.rows * m.heads * m.size]), h(new T[s.rows * m.inner]),
          u(new float[std::max(1L, parts * s.most * 3)]) {}
};

template <class T> struct Worker {
    const Decoder& m;
    const Step& s;
    Shared<T>& all;
    const long thread, threads, parts;
    Input<T> in;
    std::unique_ptr<T[]> normed, room;  // room: four blocks of outputs of a quantized weight
    std::unique_ptr<float[]> found, scores;
    Tiles tiles;

    Worker(const Decoder& m, const Step& s, Shared<T>& all, long thread, long threads)
        : m(m), s(s), all(all), thread(thread), threads(threads), parts(s.first[s.rows]), normed(new T[s.rows * m.width]) {
        const long row_blocks = (s.rows + ROWS - 1) / ROWS;
        found.reset(new float[2 * 4 * row_blocks * ROWS * 16]);
        room.reset(new T[4 * 16 * std::max({m.width, m.inner, m.heads * m.size})]);
        long longest = 0;
        for (long n = 0; n < s.rows; n++) longest = std::max(longest, s.lengths[n]);
        scores.reset(new float[m.heads / m.groups * ((longest + 15) / 16 * 16)]);
    }

    static void barrier() {
#if defined(_OPENMP)
#pragma omp barrier
#endif
    }

    const Factor& factor(long part, long layer, int linear) const { return s.factors[part][layer * LINEARS + linear]; }

    void norm_rows(const void* w) {
        for (long n = 0; n < s.rows; n++) norm(all.x.get() + n * m.width, (const T*)w, normed.get() + n * m.width, m.width, m.eps);
    }

    // u of all parts at the linears from `linear` on, of input x [rows, columns]; then a barrier.
    void low_rank(long layer, int linear, int count, const T* x, long columns) {
        if (!parts) return;
        long ranks = 0;
        for (long p = 0; p < parts; p++)
            for (int i = 0; i < count; i++) ranks += factor(p, layer, linear + i).rank;
        const long from = ranks * thread / threads, until = ranks * (thread + 1) / threads;  // a stretch, which is read as one
        long item = 0;
        for (long n = 0; n < s.rows; n++)
            for (long p = s.first[n]; p < s.first[n + 1]; p++)
                for (int i = 0; i < count; i++) {
                    const Factor& f = factor(p, layer, linear + i);
                    float* u = all.u.get() + (p * 3 + i) * s.most;
                    const long last = std::min(f.rank, until - item);
                    for (long r = std::max(0L, from - item); r < last; r++)
                        u[r] = dot((const T*)f.a + r * columns, x + n * columns, columns) * s.weights[p];
                    item += f.rank;
                }
        barrier();
    }

    // 16 outputs of a row: sums, S, bias and the low-rank parts.
    vf finish(vf y, long n, long layer, int linear, int slot, long o) const {
        vf gain = zero(), low = zero();
        bool gained = false;
        for (long p = s.first[n]; p < s.first[n + 1]; p++) {
            const Factor& f = factor(p, layer, linear);
            const float* u = all.u.get() + (p * 3 + slot) * s.most;
            const char* at = f.b + o / 16 * f.stride;
            const T* b = (const T*)(at + f.gained * sizeof(vf));
            vf sum[4] = {};  // one would wait for itself
            long r = 0;
            for (; r + 4 <= f.rank; r += 4)
                for (int i = 0; i < 4; i++) sum[i] += load(b + (r + i) * 16) * u[r + i];
            for (; r < f.rank; r++) sum[0] += load(b + r * 16) * u[r];
            low += (sum[0] + sum[1]) + (sum[2] + sum[3]);
            if (f.gained) {
                gain += load((const float*)at) * s.weights[p];
                gained = true;
            }
        }
        if (gained) y += gain * y;
        if (const void* bias = m.blocks[layer].bias[linear]) y += load((const T*)bias + o);
        return y + low;
    }

    // Sums of `count` <= 4 blocks of 16 outputs from block `at` on.
    void multiply(const Weight& w, long at, long count, float* sums_on) {
        product(dense_rows(w, at * 16, (at + count) * 16, room.get()), in, count, sums_on);
    }

    // The outputs of [first, last) blocks of 16 of a weight: take(row, output, sums of 16 outputs).
    template <class F> void outputs(const Weight& w, long first, long last, F take) {
        const long row_blocks = (s.rows + ROWS - 1) / ROWS;
        for (long at = first; at < last; at += 4) {
            const long count = std::min(4L, last - at);
            multiply(w, at, count, found.get());
            for (long b = 0; b < row_blocks; b++) {
                for (long i = 0; i < count; i++) turn(found.get() + (i * row_blocks + b) * ROWS * 16);
                // Row by row, so that each reads a stretch of its adapter's factors.
                for (long n = 0; n < std::min(ROWS, s.rows - b * ROWS); n++)
                    for (long i = 0; i < count; i++)
                        take(b * ROWS + n, (at + i) * 16, load(found.get() + (i * row_blocks + b) * ROWS * 16 + n * 16));
            }
        }
    }

    // Sums [16 outputs][16 rows] to [16 rows][16 outputs].
    static void turn(float* sums_on) {
        vf v[16];
        std::memcpy(v, sums_on, sizeof v);
        transpose(v);
        std::memcpy(sums_on, v, sizeof v);
    }

    // This thread's share of `blocks` blocks, in fours.
    void share(long blocks, long& first, long& last) const {
        const long fours = (blocks + 3) / 4;
        first = std::min(blocks, fours * thread / threads * 4);
        last = std::min(blocks, fours * (thread + 1) / threads * 4);
    }

    void project(long layer, int linear, int slot, T* to, long width, long first, long last) {
        outputs(m.blocks[layer].weight[linear], first, last,
                [&](long n, long o, vf y) { store(to + n * width + o, finish(y, n, layer, linear, slot, o)); });
    }

    // Adds a product to x, rounded as models do.
    void add(long layer, int linear) {
        long first, last;
        share(m.width / 16, first, last);
        outputs(m.blocks[layer].weight[linear], first, last, [&](long n, long o, vf y) {
            T* x = all.x.get() + n * m.width + o;
            store(x, load(x) + rounded<T>(finish(y, n, layer, linear, 0, o)));
        });
        barrier();
    }

    void attention_inputs(long layer) {
        const long width[3] = {m.heads * m.size, m.groups * m.size, m.groups * m.size};
        T* to[3] = {all.q.get(), all.k.get(), all.v.get()};
        low_rank(layer, Q, 3, normed.get(), m.width);
        long first, last, start = 0;
        share((width[0] + 2 * width[1]) / 16, first, last);
        for (int i = 0; i < 3; i++) {
            const long blocks = width[i] / 16;
            const long from = std::max(0L, first - start), until = std::min(blocks, last - start);
            if (from < until) project(layer, Q + i, i, to[i], width[i], from, until);
            start += blocks;
        }
        barrier();
    }

    // Norm, if the model has one, and rotation of one head.
    void rotate(T* x, const void* weight, long n) const {
        const long D = m.size, half = D / 2;
        if (weight) norm(x, (const T*)weight, x, D, m.eps);
        const float *cos = s.cos + n * D, *sin = s.sin + n * D;
        for (long d = 0; d < half; d++) {
            const float a = to_float(x[d]), b = to_float(x[half + d]);
            set(&x[d], a * cos[d] - b * sin[d]);
            set(&x[half + d], b * cos[half + d] + a * sin[half + d]);
        }
    }

    long slot(long n, long j) const { return s.tables[n * s.stride + j / m.block] * m.block + j % m.block; }

    void attend(long layer) {
        const Block& b = m.blocks[layer];
        const long D = m.size, G = m.groups, R = m.heads / G;
        for (long item = thread; item < s.rows * G; item += threads) {
            const long n = item / G, g = item % G, length = s.lengths[n];
            T* q = all.q.get() + (n * m.heads + g * R) * D;
            T* k = all.k.get() + (n * G + g) * D;
            for (long r = 0; r < R; r++) rotate(q + r * D, b.q_norm, n);
            rotate(k, b.k_norm, n);
            const long own = (slot(n, length - 1) * G + g) * D;
            std::memcpy((T*)b.keys + own, k, D * sizeof(T));
            std::memcpy((T*)b.values + own, all.v.get() + (n * G + g) * D, D * sizeof(T));
            one_head(b, n, g, q, all.attended.get() + (n * m.heads + g * R) * D);
        }
        barrier();
    }

    void one_head(const Block& b, long n, long g, const T* q, T* out) {
        const long D = m.size, G = m.groups, R = m.heads / G;
        const long from = b.before < 0 ? 0 : std::max(0L, s.lengths[n] - 1 - b.before);  // the first token that is seen
        const long length = s.lengths[n] - from, padded = (length + 15) / 16 * 16;
        float top[64];
        std::fill(top, top + R, -INFINITY);
        for (long j = 0; j < length; j += 16) {
            const T* key[16];
            for (long i = 0; i < 16; i++) key[i] = (const T*)b.keys + (slot(n, from + std::min(j + i, length - 1)) * G + g) * D;
            for (long r = 0; r < R; r++) {
                vf acc[16] = {};
                for (long d = 0; d < D; d += LANES) {
                    const vf x = load(q + r * D + d);
                    for (int i = 0; i < 16; i++) acc[i] += x * load(key[i] + d);
                }
                store(scores.get() + r * padded + j, sums(acc) * (m.scale * LOG2E));
            }
        }
        for (long r = 0; r < R; r++) {
            float* p = scores.get() + r * padded;
            for (long j = length; j < padded; j++) p[j] = -INFINITY;
            for (long j = 0; j < length; j++) top[r] = std::max(top[r], p[j]);
            vf sum = zero();
            for (long j = 0; j < padded; j += LANES) {
                const vf e = two_to(load(p + j) - top[r]);
                store(p + j, e);
                sum += e;
            }
            const float inverse_sum = 1.0f / total(sum);
            for (long d = 0; d < D; d += 4 * LANES) {
                const int parts_here = (int)std::min(4L, (D - d) / LANES);
                vf acc[4] = {};
                for (long j = 0; j < length; j++) {
                    const T* value = (const T*)b.values + (slot(n, from + j) * G + g) * D + d;
                    for (int i = 0; i < parts_here; i++) acc[i] += load(value + i * LANES) * p[j];
                }
                for (int i = 0; i < parts_here; i++) store(out + r * D + d + i * LANES, acc[i] * inverse_sum);
            }
        }
    }

    void gated(long layer) {
        const Block& b = m.blocks[layer];
        const long row_blocks = (s.rows + ROWS - 1) / ROWS, size = row_blocks * ROWS * 16;
        low_rank(layer, GATE, 2, normed.get(), m.width);
        long first, last;
        share(m.inner / 16, first, last);
        float *gates = found.get(), *ups = found.get() + 4 * size;
        for (long at = first; at < last; at += 4) {
            const long count = std::min(4L, last - at);
            multiply(b.weight[GATE], at, count, gates);
            multiply(b.weight[UP], at, count, ups);
            for (long rb = 0; rb < row_blocks; rb++) {
                for (long i = 0; i < count; i++) {
                    turn(gates + i * size + rb * ROWS * 16);
                    turn(ups + i * size + rb * ROWS * 16);
                }
                for (long n = 0; n < std::min(ROWS, s.rows - rb * ROWS); n++)
                    for (long i = 0; i < count; i++) {
                        const long sums_at = i * size + (rb * ROWS + n) * 16;
                        both(layer, load(gates + sums_at), load(ups + sums_at), rb * ROWS + n, (at + i) * 16);
                    }
            }
        }
        barrier();
    }

    void both(long layer, vf g, vf u, long n, long o) {
        const vf gate = rounded<T>(finish(g, n, layer, GATE, 0, o));
        const vf up = rounded<T>(finish(u, n, layer, UP, 1, o));
        const vf act = gate / (1.0f + two_to(within(gate * -LOG2E, -126.0f, 126.0f)));
        store(all.h.get() + n * m.inner + o, rounded<T>(act) * up);
    }

    void run() {
        for (long n = thread; n < s.rows; n += threads)
            std::memcpy(all.x.get() + n * m.width, (const T*)m.embedding + s.ids[n] * m.width, m.width * sizeof(T));
        barrier();
        for (long layer = 0; layer < m.layers; layer++) {
            norm_rows(m.blocks[layer].norm);
            in.set(normed.get(), s.rows, m.width);
            attention_inputs(layer);
            attend(layer);
            low_rank(layer, O, 1, all.attended.get(), m.heads * m.size);
            in.set(all.attended.get(), s.rows, m.heads * m.size);
            add(layer, O);
            norm_rows(m.blocks[layer].norm_after);
            in.set(normed.get(), s.rows, m.width);
            gated(layer);
            low_rank(layer, DOWN, 1, all.h.get(), m.inner);
            in.set(all.h.get(), s.rows, m.inner);
            add(layer, DOWN);
        }
        norm_rows(m.norm);
        in.set(normed.get(), s.rows, m.width);
        long first, last;
        share(m.vocabulary / 16, first, last);
        outputs(Weight{Weight::DENSE, m.width, 0, 0, m.head, nullptr, nullptr, nullptr, 0.0f, 0.0f, nullptr}, first, last, [&](long n, long o, vf y) { store(s.logits + n * m.vocabulary + o, y); });
    }
};

template <class T> void decode(const Decoder& m, const Step& s, int threads) {
    Shared<T> all(m, s, s.first[s.rows]);
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
    Worker<T>(m, s, all, omp_get_thread_num(), omp_get_num_threads()).run();
#else
    Worker<T>(m, s, all, 0, 1).run();
#endif
}

}  // namespace

// kind: 0 for fp32, 1 for bf16.
extern "C" void veneer_decode(int kind, const Decoder* m, const Step* s, int threads) {
    if (kind)
        decode<bf16>(*m, *s, threads);
    else
        decode<float>(*m, *s, threads);
}
