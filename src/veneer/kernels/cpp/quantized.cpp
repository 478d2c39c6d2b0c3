// Dequantizing whole weights; quantized.h has the formats.
#include "quantized.h"

namespace {

template <class T> void dequantize(const Weight& w, long first, long last, T* out, int threads) {
    if (w.format == Weight::EIGHT_BITS) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (long row = first; row < last; row++) eight_bits(w, row, out + (row - first) * w.columns);
        return;
    }
    first *= w.columns, last *= w.columns;
    const long begin = first / w.block, end = (last + w.block - 1) / w.block;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long b = begin; b < end; b++) four_bits(w, b, first, last, out);
}

}  // namespace

// Rows first .. last of a quantized weight. kind: of out, 0 for fp32, 1 for bf16. Returns 0 where this build cannot round to the weight's type.
extern "C" int veneer_dequantize(int kind, const Weight* w, long first, long last, void* out, int threads) {
#if !(defined(__F16C__) && defined(__AVX512F__))
    if (w->rounding == 2) return 0;
#endif
    kind ? dequantize(*w, first, last, (bf16*)out, threads) : dequantize(*w, first, last, (float*)out, threads);
    return 1;
}
