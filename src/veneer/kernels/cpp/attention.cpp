// Attention inside segments, forward and backward; attention/native.py has the formulas.
//
// One item of work is the queries of one run of positions in one segment and all query heads of one key head, R rows a position, over the
// keys that they see. Runs are cut by length alone, and sums over them are taken in their order: results do not depend on the number of
// threads. Every matrix stands in words of 32 bits: one float, or two neighbouring bf16 along the dimension that is summed over. So all
// products are one function, rows of broadcast words times two vectors of words.
//
// What is rounded to the tensors' dtype, as matrix products would need it: P and dS. Row statistics are in powers of two.
#include <algorithm>
#include <memory>

#include "vec.h"

namespace {

#if defined(__AVX512F__)
constexpr int TILE = 12;  // rows of a product: with two vectors each they fill the registers
constexpr int KEYS = 8;   // and where the rows are keys
#else
constexpr int TILE = 2;
constexpr int KEYS = 2;
#endif
constexpr long PANEL = 32;                   // columns of a product
constexpr long FORWARD = 24, BACKWARD = 96;  // rows taken together; multiples of TILE
constexpr long RUN = 256, RUNS = 8;         // positions of an item, and items of a segment's key head: at most, the latter first
constexpr float LOG2E = 1.4426950408889634f;

template <class T> struct Words {
    typedef float word;
    static constexpr long PER = 1;  // numbers in a word
    typedef register_f part;
    static part both(word w) { return w - part{}; }
    static part madd(part acc, part a, part b) { return acc + a * b; }
    static vf rounded(vf x) { return ::rounded<T>(x); }
    static void put(word* to, vf x, vf y) {
        store(to, x);
        store(to + LANES, y);
    }
    // rows that are neighbours along the dimension that is summed over, 16 numbers of each
    static void put_rows(word* to, const vf* x) { store(to, x[0]); }
    static void copy(word* to, const T* x) { store(to, load(x)); }
    static void interleave(word* to, const T* const* x) { store(to, load(x[0])); }
};

#if defined(VENEER_PAIRS)
template <> struct Words<bf16> {
    typedef uint32_t word;
    static constexpr long PER = 2;
    typedef vf part;
    static vf both(word w) { return (vf)_mm512_set1_epi32((int)w); }
    static vf madd(vf acc, vf a, vf b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
    static vf rounded(vf x) { return x; }  // put() rounds
    static void put(word* to, vf x, vf y) { _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x)); }
    static __m512i zip() {
        const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_or_si512(i, _mm512_slli_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(16)), 16));
    }
    static void put_rows(word* to, const vf* x) {
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(zip(), both));
    }
    static void copy(word* to, const bf16* x) { std::memcpy(to, x, LANES * sizeof(bf16)); }
    static void interleave(word* to, const bf16* const* x) {
        __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)x[0])),
                                          _mm256_loadu_si256((const __m256i*)x[1]), 1);
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(zip(), both));
    }
};
#endif

// c[m][0..32] (+)= sum over k of K words a * b[k][0..32]. COLUMNS: a's rows stand behind each other, word (m, k) at k lda + m.
template <class W, int M, bool COLUMNS = false>
inline void product(const typename W::word* a, long lda, const typename W::word* b, long ldb, long K, float* c, long ldc, bool add = false) {
    typedef typename W::part part;
    constexpr int PARTS = PANEL * sizeof(float) / sizeof(part), SIZE = PANEL / PARTS;
    auto read = [](const void* p) {
        part v;
        std::memcpy(&v, p, sizeof v);
        return v;
    };
    part x[M][PARTS];
#pragma GCC unroll 12
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int i = 0; i < PARTS; i++) x[m][i] = add ? read(c + m * ldc + i * SIZE) : part{};
    for (long k = 0; k < K; k++) {
        part y[PARTS];
#pragma GCC unroll 8
        for (int i = 0; i < PARTS; i++) y[i] = read(b + k * ldb + i * SIZE);
#pragma GCC unroll 12
        for (int m = 0; m < M; m++) {
            part s = W::both(COLUMNS ? a[k * lda + m] : a[m * lda + k]);
#pragma GCC unroll 8
            for (int i = 0; i < PARTS; i++) x[m][i] = W::madd(x[m][i], s, y[i]);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int i = 0; i < PARTS; i++) std::memcpy(c + m * ldc + i * SIZE, &x[m][i], sizeof(part));
}

long up(long n, long unit) { return (n + unit - 1) / unit * unit; }

template <class T> struct View {  // [T, heads, size] in any order of the first two
    T* at;
    long token, head;
    T* row(long t, long h) const { return at + t * token + h * head; }
};

// Rows of D numbers, each in Dp / PER words, zeros behind.
template <class T> void put_row(typename Words<T>::word* to, const T* x, long D, long Dp) {
    for (long d = 0; d < D; d += LANES) Words<T>::copy(to + d / Words<T>::PER, x + d);
    if (D < Dp) std::memset(to + D / Words<T>::PER, 0, (Dp - D) / Words<T>::PER * sizeof(*to));
}

// [n / PER, Dp]: PER neighbouring rows in a word. row(i): null behind the last.
template <class T, class F> void put_columns(typename Words<T>::word* to, long n, long D, long Dp, F row) {
    typedef Words<T> W;
    static const T none[256] = {};
    for (long i = 0; i < n; i += W::PER) {
        const T* x[2] = {row(i), W::PER > 1 ? row(i + 1) : nullptr};
        for (long d = 0; d < Dp; d += LANES) {
            const T* own[2] = {x[0] && d < D ? x[0] + d : none, x[1] && d < D ? x[1] + d : none};
            W::interleave(to + i / W::PER * Dp + d, own);
        }
    }
}

// [n / 32, Dp / PER, 32]: panels of 32 rows, transposed.
template <class T, class F> void put_panels(typename Words<T>::word* to, long n, long D, long Dp, F row) {
    typedef Words<T> W;
    alignas(64) float own[LANES][256];
    const long words = Dp / W::PER;
    for (long i = 0; i < n; i += LANES) {
        for (long m = 0; m < LANES; m++)
            if (const T* x = row(i + m))
                put_row<T>((typename W::word*)own[m], x, D, Dp);
            else
                std::memset(own[m], 0, words * sizeof(float));
        for (long w = 0; w < words; w += LANES) {
            vf v[LANES];
            for (int m = 0; m < LANES; m++) v[m] = load(own[m] + w);
            transpose(v);
            float* first = (float*)to + (i / PANEL * words + w) * PANEL + i % PANEL;
            for (int m = 0; m < LANES; m++) store(first + m * PANEL, v[m]);
        }
    }
}

struct Item {
    long start, length, head, from, to;  // the segment, the key head, and the run of positions in the segment
    long first, last;                    // keys that it sees
    long room;                           // where its part of dK and dV stands, -1: nobody else has one
};

struct Shape {
    long segments, heads, groups, D, E, before, after;  // the last two negative: all
    const long* bounds;
    long R() const { return heads / groups; }
    long low(long t) const { return before < 0 || t < before ? 0 : t - before; }
    long high(long t, long length) const { return after < 0 || t + after >= length ? length - 1 : t + after; }
    std::vector<Item> items() const {
        std::vector<Item> found;
        for (long s = 0; s < segments; s++) {
            long start = bounds[s], length = bounds[s + 1] - start, runs = std::min(RUNS, (length + RUN - 1) / RUN);
            for (long g = 0; g < groups; g++)
                for (long i = 0; i < runs; i++) {
                    long from = length * i / runs, to = length * (i + 1) / runs;
                    found.push_back({start, length, g, from, to, low(from), high(to - 1, length) + 1, runs > 1 ? 0 : -1});
                }
        }
        return found;
    }
};

// The longest first, so that threads end together.
std::vector<long> order_of(const std::vector<Item>& items) {
    std::vector<long> order(items.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = (long)i;
    auto cost = [&](long i) { return (items[i].to - items[i].from) * (items[i].last - items[i].first); };
    std::stable_sort(order.begin(), order.end(), [&](long a, long b) { return cost(a) > cost(b); });
    return order;
}

// Memory of a thread, kept from call to call.
class Room {
    std::unique_ptr<float[]> memory;
    long size = 0, used = 0;

  public:
    void begin(long floats) {
        if (floats + 16 * 32 > size) {
            size = floats + 16 * 32;
            memory.reset(new float[size]);
        }
        used = (64 - (uintptr_t)memory.get() % 64) % 64 / sizeof(float);
    }
    template <class X = float> X* take(long words) {
        X* p = (X*)(memory.get() + used);
        used += up(words, LANES);
        return p;
    }
};
thread_local Room room;

// What of a tile's row the columns [0, n) hold: from, to - 1 are the visible ones.
struct Seen {
    long from, to;
    bool all(long j) const { return from <= j && j + PANEL <= to; }
};
const vu LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
inline vf hide(vf x, long j, const Seen& seen, float instead) {
    vu at = LANE + (uint32_t)(j - seen.from);  // wraps round below from
    return at < (uint32_t)(seen.to - seen.from) ? x : all(instead);
}

template <class T> struct Attention {
    typedef Words<T> W;
    typedef typename W::word word;
    static constexpr long PER = W::PER;
    const Shape& s;
    View<const T> q, k, v;
    float scale;
    View<T> out;
    float* tops;  // [H, T], log2 of the rows' sums of 2^(scale' q.k)
    long tokens;
    const long R, D, E, Dp, Ep;

    Attention(const Shape& s, View<const T> q, View<const T> k, View<const T> v, float scale, View<T> out, float* tops)
        : s(s), q(q), k(k), v(v), scale(scale), out(out), tops(tops), tokens(s.bounds[s.segments]), R(s.R()), D(s.D), E(s.E), Dp(up(s.D, PANEL)),
          Ep(up(s.E, PANEL)) {}

    long position(const Item& it, long row) const { return it.from + row / R; }
    long head(const Item& it, long row) const { return it.head * R + row % R; }
    float& top(const Item& it, long row) const { return tops[head(it, row) * tokens + it.start + position(it, row)]; }
    template <class X> X* row_of(const View<X>& x, const Item& it, long row) const {
        return x.row(it.start + position(it, row), head(it, row));
    }
    Seen seen(const Item& it, long row, long base) const {
        long t = position(it, row);
        return {s.low(t) - base, s.high(t, it.length) + 1 - base};
    }
    auto key_rows(const View<const T>& x, const Item& it) const {
        return [&x, &it](long j) { return it.first + j < it.last ? x.row(it.start + it.first + j, it.head) : nullptr; };
    }
    // [rows, size / PER], zeros behind the item's rows
    void put_block(word* to, const View<const T>& x, const Item& it, long i, long count, long rows, long size, long padded) const {
        for (long m = 0; m < rows; m++)
            if (m < count)
                put_row<T>(to + m * padded / PER, row_of(x, it, i + m), size, padded);
            else
                std::memset(to + m * padded / PER, 0, padded / PER * sizeof(word));
    }

    void forward(const Item& it) const {
        const long n = up(it.last - it.first, PANEL), rows = (it.to - it.from) * R;
        room.begin(n * (Dp + Ep) / PER + FORWARD * (n + n / PER + Dp / PER) + TILE * PANEL + 8 * LANES);
        word *kt = room.take<word>(n * Dp / PER), *vc = room.take<word>(n * Ep / PER), *qb = room.take<word>(FORWARD * Dp / PER);
        word* p = room.take<word>(FORWARD * n / PER);
        float *scores = room.take(FORWARD * n), *tile = room.take(TILE * PANEL);
        put_panels<T>(kt, n, D, Dp, key_rows(k, it));
        put_columns<T>(vc, n, E, Ep, key_rows(v, it));
        for (long i = 0; i < rows; i += FORWARD) {
            const long count = std::min(FORWARD, rows - i), used = up(count, TILE);
            const long begin = (s.low(position(it, i)) - it.first) / PANEL * PANEL;
            const long m = up(s.high(position(it, i + count - 1), it.length) + 1 - it.first, PANEL) - begin;
            put_block(qb, q, it, i, count, used, D, Dp);
            for (long j = 0; j < m; j += PANEL)
                for (long a = 0; a < used; a += TILE)
                    product<W, TILE>(qb + a * Dp / PER, Dp / PER, kt + (begin + j) * Dp / PER, PANEL, Dp / PER, scores + a * m + j, m);
            for (long a = 0; a < count; a += TILE) {
                const long some = std::min<long>(TILE, count - a);
                float total[LANES];
                softmax(it, i + a, some, it.first + begin, scores + a * m, p + a * m / PER, m, total);
                for (long e = 0; e < E; e += PANEL) {
                    product<W, TILE>(p + a * m / PER, m / PER, vc + begin / PER * Ep + e, Ep, m / PER, tile, PANEL);
                    for (long r = 0; r < some; r++) {
                        T* to = row_of(out, it, i + a + r) + e;
                        store(to, load(tile + r * PANEL) * all(1.0f / total[r]));
                        if (e + LANES < E) store(to + LANES, load(tile + r * PANEL + LANES) * all(1.0f / total[r]));
                    }
                }
            }
        }
    }

    // p = 2^(scale' (scores - the row's highest)), and the rows' sums
    void softmax(const Item& it, long i, long count, long base, float* scores, word* p, long m, float* total) const {
        const float c = scale * LOG2E;
        vf top_of[LANES] = {}, sum[LANES] = {};
        float tops_of[LANES];
        for (long r = 0; r < count; r++) {
            const Seen own = seen(it, i + r, base);
            float* x = scores + r * m;
            vf top = all(-INFINITY);
            for (long j = own.from / PANEL * PANEL; j < own.to; j += PANEL) {
                vf a = load(x + j), b = load(x + j + LANES);
                if (!own.all(j)) {
                    store(x + j, a = hide(a, j, own, -INFINITY));
                    store(x + j + LANES, b = hide(b, j + LANES, own, -INFINITY));
                }
                vf higher = a > b ? a : b;
                top = higher > top ? higher : top;
            }
            top_of[r] = top;
        }
        store(tops_of, highest(top_of));
        for (long r = 0; r < count; r++) {
            const Seen own = seen(it, i + r, base);
            const float* x = scores + r * m;
            word* to = p + r * m / PER;
            const long begin = own.from / PANEL * PANEL, end = up(own.to, PANEL);
            std::memset(to, 0, begin / PER * sizeof(word));
            std::memset(to + end / PER, 0, (m - end) / PER * sizeof(word));
            const float less = c * tops_of[r];
            vf one = zero(), two = zero();
            for (long j = begin; j < end; j += PANEL) {
                vf a = two_to(load(x + j) * c - less), b = two_to(load(x + j + LANES) * c - less);
                one += a;
                two += b;
                W::put(to + j / PER, W::rounded(a), W::rounded(b));
            }
            sum[r] = one + two;
        }
        store(total, sums(sum));
        if (tops)
            for (long r = 0; r < count; r++) top(it, i + r) = c * tops_of[r] + std::log2(total[r]);
    }

    // dQ of the item's rows, and its part of dK [n, Dp] and dV [n, Ep], the scale left out
    void backward(const Item& it, const View<const T>& g, const View<T>& dq, float* dk, float* dv) const {
        const long n = up(it.last - it.first, PANEL), rows = (it.to - it.from) * R;
        const long used = up(std::min(rows, BACKWARD), TILE);
        room.begin(n * (2 * Dp + Ep) / PER + used * 2 * (Dp + Ep) / PER + used * (n + 2 * PANEL) / PER + (used + TILE) * 2 * PANEL + 16 * LANES + 2 * BACKWARD);
        word *kt = room.take<word>(n * Dp / PER), *kc = room.take<word>(n * Dp / PER), *vt = room.take<word>(n * Ep / PER);
        Block b;
        b.q = room.take<word>(used * Dp / PER), b.qc = room.take<word>(used * Dp / PER);
        b.g = room.take<word>(used * Ep / PER), b.gc = room.take<word>(used * Ep / PER);
        b.p = room.take<word>(used * PANEL / PER), b.ds = room.take<word>(used * PANEL / PER), b.slopes = room.take<word>(used * n / PER);
        b.x = room.take(TILE * PANEL), b.y = room.take(TILE * PANEL);
        b.top = room.take(BACKWARD), b.mean = room.take(BACKWARD);
        put_panels<T>(kt, n, D, Dp, key_rows(k, it));
        put_columns<T>(kc, n, D, Dp, key_rows(k, it));
        put_panels<T>(vt, n, E, Ep, key_rows(v, it));
        for (long i = 0; i < rows; i += BACKWARD) {
            b.i = i, b.count = std::min(BACKWARD, rows - i);
            b.begin = (s.low(position(it, i)) - it.first) / PANEL * PANEL;
            b.width = up(s.high(position(it, i + b.count - 1), it.length) + 1 - it.first, PANEL) - b.begin;
            load_block(it, g, b);
            for (long j = 0; j < b.width; j += PANEL) {
                const long at = b.begin + j;
                const long end = slopes(it, b, j, kt + at * Dp / PER, vt + at * Ep / PER);
                const long low = b.low, K = (end - low) / PER;
                for (long m = 0; m < PANEL; m += KEYS) {
                    for (long e = 0; e < Ep; e += PANEL)
                        product<W, KEYS, true>(b.p + low / PER * PANEL + m, PANEL, b.gc + low / PER * Ep + e, Ep, K, dv + (at + m) * Ep + e, Ep, true);
                    for (long d = 0; d < Dp; d += PANEL)
                        product<W, KEYS, true>(b.ds + low / PER * PANEL + m, PANEL, b.qc + low / PER * Dp + d, Dp, K, dk + (at + m) * Dp + d, Dp, true);
                }
            }
            for (long a = 0; a < b.count; a += TILE) {
                const Seen own = tile_sees(it, b, a);
                for (long d = 0; d < D; d += PANEL) {
                    product<W, TILE>(b.slopes + (a * b.width + own.from) / PER, b.width / PER, kc + (b.begin + own.from) / PER * Dp + d, Dp,
                                     (own.to - own.from) / PER, b.x, PANEL);
                    for (long r = 0; r < TILE && a + r < b.count; r++) {
                        T* to = row_of(dq, it, i + a + r) + d;
                        store(to, load(b.x + r * PANEL) * scale);
                        if (d + LANES < D) store(to + LANES, load(b.x + r * PANEL + LANES) * scale);
                    }
                }
            }
        }
    }

    struct Block {
        long i, count, begin, width;  // rows [i, i + count) and keys [begin, begin + width) of the item
        long low;                     // first row that sees the panel at hand
        word *q, *qc, *g, *gc;        // queries and gradients, in rows and in columns
        word *p, *ds, *slopes;        // P and dS of a panel in columns, dS of the block in rows
        float *x, *y, *top, *mean;    // two tiles, log2 of the rows' sums, and sum(dO * O)
    };

    void load_block(const Item& it, const View<const T>& g, Block& b) const {
        const long used = up(b.count, TILE);
        put_block(b.q, q, it, b.i, b.count, used, D, Dp);
        put_block(b.g, g, it, b.i, b.count, used, E, Ep);
        put_columns<T>(b.qc, used, D, Dp, [&](long m) { return m < b.count ? row_of(q, it, b.i + m) : nullptr; });
        put_columns<T>(b.gc, used, E, Ep, [&](long m) { return m < b.count ? row_of(g, it, b.i + m) : nullptr; });
        for (long m = 0; m < used; m += LANES) {
            vf own[LANES] = {};
            for (long r = 0; r < LANES && m + r < b.count; r++) {
                const T *x = row_of(g, it, b.i + m + r), *y = row_of(out, it, b.i + m + r);
                for (long e = 0; e < E; e += LANES) own[r] += load(x + e) * load(y + e);
            }
            store(b.mean + m, sums(own));
        }
        for (long m = 0; m < used; m++) b.top[m] = m < b.count ? top(it, b.i + m) : INFINITY;  // rows that are none weigh nothing
    }

    // The panels [from, to) of the block that any row of a tile sees, in columns.
    Seen tile_sees(const Item& it, const Block& b, long a) const {
        const long base = it.first + b.begin, end = std::min<long>(a + TILE, b.count) - 1;
        return {seen(it, b.i + a, base).from / PANEL * PANEL, up(seen(it, b.i + end, base).to, PANEL)};
    }

    // P and dS of one panel of keys, for the rows [b.low, end) that see it. Returns end.
    long slopes(const Item& it, Block& b, long j, const word* kt, const word* vt) const {
        long end = b.low = 0;
        bool any = false;
        for (long a = 0; a < b.count; a += TILE) {
            const Seen own = tile_sees(it, b, a);
            if (j < own.from || j >= own.to) continue;
            if (!any) b.low = a;
            any = true;
            end = a + TILE;
            product<W, TILE>(b.q + a * Dp / PER, Dp / PER, kt, PANEL, Dp / PER, b.x, PANEL);
            product<W, TILE>(b.g + a * Ep / PER, Ep / PER, vt, PANEL, Ep / PER, b.y, PANEL);
            const long base = it.first + b.begin;
            const bool whole = seen(it, b.i + std::min<long>(a + TILE, b.count) - 1, base).from <= j && seen(it, b.i + a, base).to >= j + PANEL;
            for (long r = 0; r < TILE; r += PER) {
                vf p[2][2], ds[2][2];
                for (long z = 0; z < PER; z++) {
                    const long m = a + r + z;
                    vf first = load(b.x + (r + z) * PANEL), second = load(b.x + (r + z) * PANEL + LANES);
                    p[0][z] = two_to(first * (scale * LOG2E) - b.top[m]);
                    p[1][z] = two_to(second * (scale * LOG2E) - b.top[m]);
                    if (!whole) {
                        const Seen row = seen(it, b.i + std::min(m, b.count - 1), base);
                        p[0][z] = hide(p[0][z], j, row, 0.0f);
                        p[1][z] = hide(p[1][z], j + LANES, row, 0.0f);
                    }
                    ds[0][z] = p[0][z] * (load(b.y + (r + z) * PANEL) - b.mean[m]);
                    ds[1][z] = p[1][z] * (load(b.y + (r + z) * PANEL + LANES) - b.mean[m]);
                    for (int h = 0; h < 2; h++) p[h][z] = W::rounded(p[h][z]), ds[h][z] = W::rounded(ds[h][z]);
                    W::put(b.slopes + (m * b.width + j) / PER, ds[0][z], ds[1][z]);
                }
                for (int h = 0; h < 2; h++) {
                    W::put_rows(b.p + (a + r) / PER * PANEL + h * LANES, p[h]);
                    W::put_rows(b.ds + (a + r) / PER * PANEL + h * LANES, ds[h]);
                }
            }
        }
        return end;
    }
};

template <class T> void write_rows(const View<T>& to, long t, long head, const float* from, long size, float factor) {
    T* x = to.row(t, head);
    for (long d = 0; d < size; d += LANES) store(x + d, load(from + d) * factor);
}

template <class T> void forward(const Attention<T>& a, int threads) {
    const std::vector<Item> items = a.s.items();
    const std::vector<long> order = order_of(items);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (size_t i = 0; i < order.size(); i++) a.forward(items[order[i]]);
}

template <class T>
void backward(const Attention<T>& a, const View<const T>& g, const View<T>& dq, const View<T>& dk, const View<T>& dv, int threads) {
    std::vector<Item> items = a.s.items();
    const std::vector<long> order = order_of(items);
    const long size = a.Dp + a.Ep;
    long shared = 0;
    for (Item& it : items)
        if (it.room >= 0) {
            it.room = shared;
            shared += up(it.last - it.first, PANEL) * size;
        }
    std::unique_ptr<float[]> parts(new float[shared + 1]);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> own;
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < order.size(); i++) {
            const Item& it = items[order[i]];
            const long n = up(it.last - it.first, PANEL);
            if (it.room < 0 && (long)own.size() < n * size) own.resize(n * size);
            float* sum = it.room < 0 ? own.data() : parts.get() + it.room;
            std::fill(sum, sum + n * size, 0.0f);
            a.backward(it, g, dq, sum, sum + n * a.Dp);
            for (long j = 0; it.room < 0 && j < it.length; j++) {
                write_rows(dk, it.start + j, it.head, sum + j * a.Dp, a.D, a.scale);
                write_rows(dv, it.start + j, it.head, sum + n * a.Dp + j * a.Ep, a.E, 1.0f);
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < items.size(); i++) {
            if (items[i].room < 0 || items[i].from) continue;
            std::vector<float> sum(size);
            for (long j = 0; j < items[i].length; j++) {
                std::fill(sum.begin(), sum.end(), 0.0f);
                for (size_t o = i; o < items.size() && (o == i || items[o].from); o++) {
                    const Item& it = items[o];
                    if (j < it.first || j >= it.last) continue;
                    const long n = up(it.last - it.first, PANEL), row = j - it.first;
                    const float *k = parts.get() + it.room + row * a.Dp, *v = parts.get() + it.room + n * a.Dp + row * a.Ep;
                    for (long d = 0; d < a.Dp; d++) sum[d] += k[d];
                    for (long e = 0; e < a.Ep; e++) sum[a.Dp + e] += v[e];
                }
                write_rows(dk, items[i].start + j, items[i].head, sum.data(), a.D, a.scale);
                write_rows(dv, items[i].start + j, items[i].head, sum.data() + a.Dp, a.E, 1.0f);
            }
        }
    }
}

template <class T>
void run(const long* sizes, const long* bounds, void* const* at, float scale, float* tops, int threads) {
    const Shape s = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], bounds};
    const long* own = sizes + 7;  // (token, head) of each tensor
    auto view = [&](int i) { return View<T>{(T*)at[i], own[2 * i], own[2 * i + 1]}; };
    auto fixed = [&](int i) { return View<const T>{(const T*)at[i], own[2 * i], own[2 * i + 1]}; };
    const Attention<T> a(s, fixed(0), fixed(1), fixed(2), scale, view(3), tops);
    if (at[4])
        backward(a, fixed(4), view(5), view(6), view(7), threads);
    else
        forward(a, threads);
}

}  // namespace

// Whether this is faster here than matrix products of a library: with registers of 16 floats.
extern "C" int veneer_pays() { return sizeof(register_f) == sizeof(vf); }

// kind: 0 for fp32, 1 for bf16. sizes: segments, H, G, D, E, before, after, then the strides of q, k, v, out, d_out, dq, dk, dv along tokens
// and heads; at: where these lie. Forward where there is no d_out.
extern "C" void veneer_attention(int kind, const long* sizes, const long* bounds, void* const* at, float scale, float* tops, int threads) {
    if (kind)
        run<bf16>(sizes, bounds, at, scale, tops, threads);
    else
        run<float>(sizes, bounds, at, scale, tops, threads);
}
