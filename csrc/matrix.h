// Packed matrices, rows of activations, and panels made of them.
#pragma once

#include <string.h>

#include "dgemma_cpu.h"
#include "kernels.h"
#include "team.h"

namespace dgemma {

// Sizes of a packed matrix.
struct Shape {
    Kind kind;
    int bits;
    int64_t outputs, inputs, tiles, padded, span, groups;  // span: inputs of a group
    int64_t tile_bytes, scale_bytes;                       // scale_bytes: of one

    explicit Shape(const DgemmaMatrix& matrix)
        : kind(matrix.factors ? kNvfp4 : matrix.bits == 4 ? kInt4 : kInt8),
          bits(matrix.bits),
          outputs(matrix.outputs),
          inputs(matrix.inputs),
          tiles((matrix.outputs + kLanes - 1) / kLanes),
          padded(round_up(matrix.inputs, kChunk)),
          span(matrix.group ? matrix.group : padded),
          groups((matrix.inputs + span - 1) / span),
          tile_bytes(padded * kLanes * matrix.bits / 8),
          scale_bytes(matrix.factors ? 1 : sizeof(float)) {}
};

// One tile's products with a panel -> out [rows][16].
inline void multiply(const Kernels& kernels, const Shape& shape, const DgemmaMatrix& matrix, int64_t index,
                     int64_t tile, const Panel& panel, float* out) {
    const int64_t at = index * shape.tiles + tile;
    const auto* scales = static_cast<const uint8_t*>(matrix.scales) + at * shape.groups * kLanes * shape.scale_bytes;
    const float* factors = matrix.factors ? matrix.factors + at * kLanes : nullptr;
    kernels.product[shape.kind](matrix.data + at * shape.tile_bytes, scales, factors, shape.groups, shape.span / kChunk,
                                panel, out);
}

// Rows of numbers, float32 or bfloat16, as they come from and go to torch.
struct Rows {
    const void* data;
    bool half;
    int64_t width;

    // Row `index` as floats: in place, or in `room` [width].
    const float* read(int64_t index, float* room) const;
};

// Writes n floats to place `at` of an output in float32 or bfloat16 (rounded to nearest, half to even).
void write(void* out, bool half, int64_t at, const float* values, int64_t n);

// How n rows are divided into panels: as few as possible, of nearly the same size.
struct Split {
    int64_t rows, count;

    Split(int64_t rows, int most) : rows(rows), count((rows + most - 1) / most) {}
    int64_t first(int64_t panel) const { return panel * (rows / count) + min(panel, rows % count); }
    int size(int64_t panel) const { return static_cast<int>(first(panel + 1) - first(panel)); }

   private:
    static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
};

// Bytes of a panel's values, starts and scales, in one piece of memory.
inline int64_t panel_bytes(int rows, const Shape& shape) {
    return round_up(rows * (shape.padded + 4 * shape.groups + 4), 64);
}

// Builds a panel at `room` from rows of int8 values [padded] and their scales. `row` gives the place of each row.
template <class Row>
Panel fill_panel(uint8_t* room, int rows, const Shape& shape, int offset, const int8_t* values, const float* scales,
                 Row&& row) {
    auto* data = reinterpret_cast<int8_t*>(room);
    auto* starts = reinterpret_cast<int32_t*>(room + rows * shape.padded);
    auto* own = reinterpret_cast<float*>(starts + rows * shape.groups);
    for (int r = 0; r < rows; r++) {
        const int64_t index = row(r);
        const int8_t* from = values + index * shape.padded;
        for (int64_t quad = 0; quad < shape.padded / kQuad; quad++) {
            memcpy(data + (quad * rows + r) * kQuad, from + quad * kQuad, kQuad);
        }
        for (int64_t group = 0; group < shape.groups; group++) {
            int32_t sum = 0;
            for (int64_t i = 0; i < shape.span; i++) sum += from[group * shape.span + i];
            starts[group * rows + r] = -offset * sum;
        }
        own[r] = scales[index];
    }
    return {rows, data, starts, own};
}

inline Panel panel_at(const uint8_t* room, int rows, const Shape& shape) {
    const auto* starts = reinterpret_cast<const int32_t*>(room + rows * shape.padded);
    return {rows, reinterpret_cast<const int8_t*>(room), starts,
            reinterpret_cast<const float*>(starts + rows * shape.groups)};
}

// All rows of a product as panels, one after another at equal distances in this thread's memory.
struct Panels {
    Split split;
    int64_t stride;
    uint8_t* data;
    const Shape& shape;

    // Rounds all rows to int8 and lays them out.
    Panels(const Kernels& kernels, const Rows& x, int64_t rows, const Shape& shape, int threads);
    Panel at(int64_t panel) const { return panel_at(data + panel * stride, split.size(panel), shape); }
};

}  // namespace dgemma
