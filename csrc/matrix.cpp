#include "matrix.h"

#include <string.h>

namespace dgemma {

const float* Rows::read(int64_t index, float* room) const {
    if (!half) return static_cast<const float*>(data) + index * width;
    const uint16_t* from = static_cast<const uint16_t*>(data) + index * width;
    for (int64_t i = 0; i < width; i++) {
        const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
        memcpy(room + i, &bits, 4);
    }
    return room;
}

void write(void* out, bool half, int64_t at, const float* values, int64_t n) {
    if (!half) {
        memcpy(static_cast<float*>(out) + at, values, static_cast<size_t>(n) * sizeof(float));
        return;
    }
    uint16_t* to = static_cast<uint16_t*>(out) + at;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, 4);
        // Half to even: what is added to the cut-off half carries when it should. Not to NaN, which would become 0.
        const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
        to[i] = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
    }
}

Panels::Panels(const Kernels& kernels, const Rows& x, int64_t rows, const Shape& shape, int threads)
    : split(rows, kernels.rows), stride(panel_bytes(kernels.rows, shape)), shape(shape) {
    data = scratch<uint8_t>(Use::kPanels, split.count * stride);
    share(split.count, threads, [&](int64_t panel) {
        const int size = split.size(panel);
        float* numbers = scratch<float>(Use::kFloats, shape.inputs);
        int8_t* values = scratch<int8_t>(Use::kCodes, size * shape.padded);
        float scales[kMostRows];
        for (int r = 0; r < size; r++) {
            const float* row = x.read(split.first(panel) + r, numbers);
            scales[r] = kernels.quantise(row, shape.inputs, shape.padded, values + r * shape.padded);
        }
        fill_panel(data + panel * stride, size, shape, kernels.offset[shape.kind], values, scales,
                   [](int r) { return static_cast<int64_t>(r); });
    });
}

}  // namespace dgemma
