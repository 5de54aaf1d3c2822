// Row by row: norms and gates of floating-point networks.
#include "matrix.h"

namespace dgemma {
namespace {

constexpr int64_t kNumbersAUnit = 1 << 14;  // less is not worth another thread

// Calls work(row) for all rows, many of them a unit.
template <class Work>
void each_row(int64_t rows, int64_t width, int threads, Work&& work) {
    const int64_t some = kNumbersAUnit / width + 1;
    share((rows + some - 1) / some, threads, [&](int64_t unit) {
        for (int64_t row = unit * some; row < rows && row < (unit + 1) * some; row++) work(row);
    });
}

}  // namespace
}  // namespace dgemma

DGEMMA_API void dgemma_norm(const void* x, int32_t half, int64_t rows, int64_t width, const float* weight, float eps,
                            void* out, int32_t threads) {
    using namespace dgemma;
    const Kernels& kernels = chosen();
    const Rows from = {x, half != 0, width};
    each_row(rows, width, threads, [&](int64_t row) {
        float* room = half ? scratch<float>(Use::kFloats, width) : nullptr;
        float* to = half ? room : static_cast<float*>(out) + row * width;
        kernels.norm(from.read(row, room), weight, eps, width, to);
        if (half) write(out, true, row * width, to, width);
    });
}

DGEMMA_API void dgemma_gate(const float* gate, const float* up, int64_t pitch, int64_t rows, int64_t width, float* out,
                            int32_t threads) {
    using namespace dgemma;
    const Kernels& kernels = chosen();
    each_row(rows, width, threads,
             [&](int64_t row) { kernels.gate(gate + row * pitch, up + row * pitch, width, out + row * width); });
}
