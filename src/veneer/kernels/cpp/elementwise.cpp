// The elementwise chains of a transformer's block in one pass each; elementwise/functions.py has the formulas and the reference.
//
// Numbers are computed with in fp32 and rounded where the models round. Rows are independent of each other, and all sums lie inside rows.
#include "vec.h"

namespace {

constexpr float LOG2E = 1.4426950408889634f;

// 1 / rms of a row
template <class T> float scale_of(const T* x, long D, float eps) {
    vf one = zero(), two = zero();
    long d = 0;
    for (; d + 2 * LANES <= D; d += 2 * LANES) {
        vf a = load(x + d), b = load(x + d + LANES);
        one += a * a;
        two += b * b;
    }
    if (d < D) one += load(x + d) * load(x + d);
    return 1.0f / std::sqrt(total(one + two) / (float)D + eps);
}

template <class T, bool PLUS> void norm_forward(const T* x, const T* w, T* y, long D, float eps) {
    const float r = scale_of(x, D, eps);
    for (long d = 0; d < D; d += LANES) {
        vf n = load(x + d) * r, weight = load(w + d);
        store(y + d, PLUS ? n * (weight + 1.0f) : rounded<T>(n) * weight);
    }
}

// dx = (g w - n mean(g w n)) r,  n = x r
template <class T, bool PLUS> void norm_backward(const T* g, const T* x, const T* w, T* dx, long D, float eps) {
    const float r = scale_of(x, D, eps);
    vf along = zero();
    for (long d = 0; d < D; d += LANES) along += load(g + d) * (PLUS ? load(w + d) + 1.0f : load(w + d)) * load(x + d);
    const float less = total(along) * r * r / (float)D;
    for (long d = 0; d < D; d += LANES) {
        vf weight = PLUS ? load(w + d) + 1.0f : load(w + d);
        store(dx + d, (load(g + d) * weight - load(x + d) * less) * r);
    }
}

// Both activations are x s(z): s the logistic function, z = x for SiLU, and 2 sqrt(2 / pi) (x + 0.044715 x^3) for GELU's tanh form.
constexpr float GELU = 1.5957691216057308f, CUBE = 0.044715f;

template <bool TANH> vf logistic(vf x) {
    vf z = TANH ? x * (x * x * CUBE + 1.0f) * GELU : x;
    vf power, p = split_power(within(z * -LOG2E, -125.0f, 125.0f), power);
    return inverse(p * power + 1.0f);
}

template <class T, bool TANH> void gated_forward(const T* gate, const T* up, T* y) {
    vf x = load(gate);
    store(y, rounded<T>(x * logistic<TANH>(x)) * load(up));
}

template <class T, bool TANH> void gated_backward(const T* d, const T* gate, const T* up, T* d_gate, T* d_up) {
    vf x = load(gate), g = load(d), s = logistic<TANH>(x), act = x * s;
    vf slope = TANH ? (x * x * (3.0f * CUBE) + 1.0f) * GELU : all(1.0f);
    store(d_gate, g * load(up) * (s + act * (1.0f - s) * slope));
    store(d_up, g * act);
}

// One head of one token; sign -1: the transpose, for which the halves of sin change places too.
template <class T> void turn(const T* x, const T* cos, const T* sin, T* y, long D, float sign) {
    const long half = D / 2, first = sign > 0 ? 0 : half, second = half - first;
    long d = 0;
    for (; d + LANES <= half; d += LANES) {
        vf a = load(x + d), b = load(x + half + d);
        store(y + d, a * load(cos + d) - b * load(sin + first + d) * sign);
        store(y + half + d, b * load(cos + half + d) + a * load(sin + second + d) * sign);
    }
    for (; d < half; d++) {
        float a = to_float(x[d]), b = to_float(x[half + d]);
        set(y + d, a * to_float(cos[d]) - b * to_float(sin[first + d]) * sign);
        set(y + half + d, b * to_float(cos[half + d]) + a * to_float(sin[second + d]) * sign);
    }
}

template <class F> void over(long rows, int threads, F each) {
    if (threads < 2) {
        for (long i = 0; i < rows; i++) each(i);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < rows; i++) each(i);
}

template <class T, bool PLUS>
void norm(const T* g, const T* x, const T* w, T* y, long rows, long D, float eps, int threads) {
    if (g)
        over(rows, threads, [=](long i) { norm_backward<T, PLUS>(g + i * D, x + i * D, w, y + i * D, D, eps); });
    else
        over(rows, threads, [=](long i) { norm_forward<T, PLUS>(x + i * D, w, y + i * D, D, eps); });
}

constexpr long RUN = 4096;  // elements of a gate that a thread takes at once

template <class T, bool TANH> void gated(const T* d, const T* gate, const T* up, T* first, T* second, long size, int threads) {
    over((size + RUN - 1) / RUN, threads, [=](long i) {
        const long end = size < (i + 1) * RUN ? size : (i + 1) * RUN;
        if (d)
            for (long j = i * RUN; j < end; j += LANES) gated_backward<T, TANH>(d + j, gate + j, up + j, first + j, second + j);
        else
            for (long j = i * RUN; j < end; j += LANES) gated_forward<T, TANH>(gate + j, up + j, first + j);
    });
}

template <class T>
void rotate(const T* q, const T* k, const T* cos, const T* sin, T* to_q, T* to_k, long tokens, long H, long G, long D, float sign, int threads) {
    over(tokens, threads, [=](long t) {
        for (long h = 0; h < H; h++) turn(q + (t * H + h) * D, cos + t * D, sin + t * D, to_q + (t * H + h) * D, D, sign);
        for (long h = 0; h < G; h++) turn(k + (t * G + h) * D, cos + t * D, sin + t * D, to_k + (t * G + h) * D, D, sign);
    });
}

}  // namespace

// kind: 0 for fp32, 1 for bf16. Backward where there is a gradient g.
extern "C" void veneer_norm(int kind, int one_plus, const void* g, const void* x, const void* w, void* y, long rows, long D, float eps, int threads) {
    auto run = [=](auto type) {
        typedef decltype(type) T;
        auto form = one_plus ? norm<T, true> : norm<T, false>;
        form((const T*)g, (const T*)x, (const T*)w, (T*)y, rows, D, eps, threads);
    };
    kind ? run(bf16{}) : run(0.0f);
}

// first: y, or d_gate; second: null, or d_up. tanh: GELU's tanh form instead of SiLU.
extern "C" void veneer_gated(int kind, int tanh, const void* d, const void* gate, const void* up, void* first, void* second, long size, int threads) {
    auto run = [=](auto type) {
        typedef decltype(type) T;
        auto form = tanh ? gated<T, true> : gated<T, false>;
        form((const T*)d, (const T*)gate, (const T*)up, (T*)first, (T*)second, size, threads);
    };
    kind ? run(bf16{}) : run(0.0f);
}

extern "C" void veneer_rotate(int kind, const void* q, const void* k, const void* cos, const void* sin, void* to_q, void* to_k, long tokens, long H,
                              long G, long D, float sign, int threads) {
    auto run = [=](auto type) {
        typedef decltype(type) T;
        rotate((const T*)q, (const T*)k, (const T*)cos, (const T*)sin, (T*)to_q, (T*)to_k, tokens, H, G, D, sign, threads);
    };
    kind ? run(bf16{}) : run(0.0f);
}
