// The cross-entropy of rows of logits, and its gradient in their place; cross_entropy.py has the formulas.
//
// A row is read from memory once: it fits the second-level cache, where it is gone through for its highest number, for the sum, and for
// the gradient. Rows are independent of each other.
#include "vec.h"

namespace {

constexpr float LOG2E = 1.4426950408889634f;

// The last numbers of a row, -inf behind them.
template <class T> vf rest(const T* x, long count) {
    float own[LANES];
    for (long i = 0; i < LANES; i++) own[i] = i < count ? to_float(x[i]) : -INFINITY;
    return load(own);
}

template <class T> void row(T* x, long V, long target, float weight, float* loss, bool gradient) {
    const long whole = V / LANES * LANES;
    const vf last = rest(x + whole, V - whole);
    vf top[4] = {last, last, last, last}, sum[4] = {};
    long v = 0;
    for (; v + 4 * LANES <= whole; v += 4 * LANES)
        for (int i = 0; i < 4; i++) {
            vf own = load(x + v + i * LANES);
            top[i] = own > top[i] ? own : top[i];
        }
    for (; v < whole; v += LANES) {
        vf own = load(x + v);
        top[0] = own > top[0] ? own : top[0];
    }
    float lanes[LANES], highest = -INFINITY;
    for (int i = 0; i < 4; i++) {
        store(lanes, top[i]);
        for (float one : lanes) highest = one > highest ? one : highest;
    }
    for (v = 0; v + 4 * LANES <= whole; v += 4 * LANES)
        for (int i = 0; i < 4; i++) sum[i] += two_to((load(x + v + i * LANES) - highest) * LOG2E);
    for (; v < whole; v += LANES) sum[0] += two_to((load(x + v) - highest) * LOG2E);
    sum[1] += two_to((last - highest) * LOG2E);
    const float all_of_them = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
    const float hit = to_float(x[target]) - highest;
    *loss = std::log(all_of_them) - hit;
    if (!gradient) return;
    const float factor = weight / all_of_them;
    const float own = factor * std::exp(hit) - weight;
    for (v = 0; v < whole; v += LANES) store(x + v, two_to((load(x + v) - highest) * LOG2E) * factor);
    if (whole < V) {
        store(lanes, two_to((last - highest) * LOG2E) * factor);
        for (v = whole; v < V; v++) set(x + v, lanes[v - whole]);
    }
    set(x + target, own);
}

template <class T>
void rows(T* logits, long k, long V, const int64_t* targets, const float* weights, float* losses, int gradient, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < k; i++) row(logits + i * V, V, (long)targets[i], weights[i], losses + i, gradient);
}

}  // namespace

// kind: 0 for fp32, 1 for bf16. Returns how many targets are no numbers of the vocabulary; nothing is done then.
extern "C" long veneer_cross_entropy(int kind, void* logits, long k, long V, const int64_t* targets, const float* weights, float* losses,
                                     int gradient, int threads) {
    long wrong = 0;
    for (long i = 0; i < k; i++) wrong += targets[i] < 0 || targets[i] >= V;
    if (wrong) return wrong;
    if (kind)
        rows((bf16*)logits, k, V, targets, weights, losses, gradient, threads);
    else
        rows((float*)logits, k, V, targets, weights, losses, gradient, threads);
    return 0;
}
