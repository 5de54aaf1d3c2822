// Plain products, and the packing of their weights.
#include <string.h>

#include "matrix.h"

namespace dgemma {
namespace {

constexpr int64_t kTilesAUnit = 4;   // their weights stay in a core's second cache while all rows pass
constexpr int64_t kPanelsAUnit = 16;  // so many panels, so that long prompts divide among many threads

void linear(const Rows& x, int64_t rows, const DgemmaMatrix& weight, void* out, int threads) {
    const Kernels& kernels = chosen();
    const Shape shape(weight);
    const Panels panels(kernels, x, rows, shape, threads);
    const int64_t blocks = (panels.split.count + kPanelsAUnit - 1) / kPanelsAUnit;
    const int64_t columns = (shape.tiles + kTilesAUnit - 1) / kTilesAUnit;
    share(columns * blocks, threads, [&](int64_t unit) {
        const int64_t first = unit % columns * kTilesAUnit, block = unit / columns * kPanelsAUnit;
        for (int64_t tile = first; tile < first + kTilesAUnit && tile < shape.tiles; tile++) {
            const int64_t left = shape.outputs - tile * kLanes;
            for (int64_t p = block; p < block + kPanelsAUnit && p < panels.split.count; p++) {
                alignas(64) float products[kMostRows * kLanes];
                const Panel panel = panels.at(p);
                multiply(kernels, shape, weight, 0, tile, panel, products);
                for (int r = 0; r < panel.rows; r++) {
                    const int64_t at = (panels.split.first(p) + r) * shape.outputs + tile * kLanes;
                    write(out, x.half, at, products + r * kLanes, left < kLanes ? left : kLanes);
                }
            }
        }
    });
}

// One tile's values, from rows of `bits` bits.
void pack_tile(const Shape& shape, const uint8_t* values, int64_t tile, uint8_t* out) {
    memset(out, shape.bits == 4 ? 0x88 : 0x80, static_cast<size_t>(shape.tile_bytes));
    const int64_t width = shape.inputs * shape.bits / 8;
    for (int64_t lane = 0; lane < kLanes && tile * kLanes + lane < shape.outputs; lane++) {
        const uint8_t* row = values + (tile * kLanes + lane) * width;
        if (shape.bits == 8) {
            for (int64_t i = 0; i < shape.inputs; i++) {
                out[(i / kQuad * kLanes + lane) * kQuad + i % kQuad] = static_cast<uint8_t>(row[i] ^ 0x80);
            }
            continue;
        }
        for (int64_t i = 0; i < shape.inputs; i++) {
            const int64_t chunk = i / kChunk, quad = i % kChunk / kQuad;
            const int nibble = row[i / 2] >> (i % 2 * 4) & 15, shift = quad < 4 ? 0 : 4;
            uint8_t& to = out[((chunk * 4 + quad % 4) * kLanes + lane) * kQuad + i % kQuad];
            to = static_cast<uint8_t>((to & ~(15 << shift)) | nibble << shift);
        }
    }
}

void pack(const DgemmaMatrix& matrix, const uint8_t* values, const float* scales, uint8_t* data, float* packed,
          int threads) {
    const Shape shape(matrix);
    share(matrix.count * shape.tiles, threads, [&](int64_t unit) {
        const int64_t index = unit / shape.tiles, tile = unit % shape.tiles;
        const int64_t row_bytes = shape.inputs * shape.bits / 8;
        pack_tile(shape, values + index * shape.outputs * row_bytes, tile, data + unit * shape.tile_bytes);
        const float* from = scales + index * shape.outputs * shape.groups;
        float* to = packed + unit * shape.tile_scales;
        for (int64_t lane = 0; lane < kLanes; lane++) {
            const int64_t row = tile * kLanes + lane;
            for (int64_t group = 0; group < shape.groups; group++) {
                to[group * kLanes + lane] = row < shape.outputs ? from[row * shape.groups + group] : 0.0f;
            }
        }
    });
}

}  // namespace
}  // namespace dgemma

DGEMMA_API void dgemma_linear(const void* x, int32_t half, int64_t rows, const DgemmaMatrix* weight, void* out,
                              int32_t threads) {
    if (rows) dgemma::linear({x, half != 0, weight->inputs}, rows, *weight, out, threads);
}

DGEMMA_API void dgemma_pack(const DgemmaMatrix* shape, const uint8_t* values, const float* scales, uint8_t* data,
                            float* packed_scales, int32_t threads) {
    dgemma::pack(*shape, values, scales, data, packed_scales, threads);
}
