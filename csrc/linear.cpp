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

template <class Word>
Word word_at(const uint8_t* from) {
    Word word;
    memcpy(&word, from, sizeof(word));
    return word;
}

// Four nibbles as four bytes.
uint32_t spread(uint32_t nibbles) {
    return (nibbles & 0xFu) | (nibbles & 0xF0u) << 4 | (nibbles & 0xF00u) << 8 | (nibbles & 0xF000u) << 12;
}

// A chunk of one row, 32 values of 8 bits or of 4, to its lane of a tile: a word for each quad.
void pack_chunk8(const uint8_t* from, uint8_t* out) {
    for (int quad = 0; quad < kChunk / kQuad; quad++) {
        const uint32_t word = word_at<uint32_t>(from + quad * kQuad) ^ 0x80808080u;
        memcpy(out + quad * kLanes * kQuad, &word, sizeof(word));
    }
}

void pack_chunk4(const uint8_t* from, uint8_t* out) {
    for (int quad = 0; quad < kChunk / kQuad / 2; quad++) {
        const uint32_t low = word_at<uint16_t>(from + quad * 2), high = word_at<uint16_t>(from + 8 + quad * 2);
        const uint32_t word = spread(low) | spread(high) << 4;
        memcpy(out + quad * kLanes * kQuad, &word, sizeof(word));
    }
}

// One tile's values, from rows of `bits` bits; what a last chunk or tile lacks is zero (in E2M1, minus zero).
void pack_tile(const Shape& shape, const uint8_t* values, int64_t tile, uint8_t* out) {
    const bool four = shape.bits == 4;
    const int64_t width = shape.inputs * shape.bits / 8, chunk = kChunk * shape.bits / 8;
    if (width % chunk || (tile + 1) * kLanes > shape.outputs) {
        memset(out, four ? 0x88 : 0x80, static_cast<size_t>(shape.tile_bytes));
    }
    for (int64_t at = 0; at < width; at += chunk) {
        for (int64_t lane = 0; lane < kLanes && tile * kLanes + lane < shape.outputs; lane++) {
            const uint8_t* from = values + (tile * kLanes + lane) * width + at;
            uint8_t filled[kChunk];
            if (width - at < chunk) {
                memset(filled, four ? 0x88 : 0, sizeof(filled));
                memcpy(filled, from, static_cast<size_t>(width - at));
                from = filled;
            }
            (four ? pack_chunk4 : pack_chunk8)(from, out + at * kLanes + lane * kQuad);
        }
    }
}

void pack(const DgemmaMatrix& matrix, const uint8_t* values, const uint8_t* scales, uint8_t* data, uint8_t* packed,
          int threads) {
    const Shape shape(matrix);
    const int64_t size = shape.scale_bytes;
    share(matrix.count * shape.tiles, threads, [&](int64_t unit) {
        const int64_t index = unit / shape.tiles, tile = unit % shape.tiles;
        const int64_t row_bytes = shape.inputs * shape.bits / 8;
        pack_tile(shape, values + index * shape.outputs * row_bytes, tile, data + unit * shape.tile_bytes);
        const uint8_t* from = scales + index * shape.outputs * shape.groups * size;
        uint8_t* to = packed + unit * shape.groups * kLanes * size;
        for (int64_t lane = 0; lane < kLanes; lane++) {
            const int64_t row = tile * kLanes + lane;
            for (int64_t group = 0; group < shape.groups; group++) {
                uint8_t* place = to + (group * kLanes + lane) * size;
                if (row < shape.outputs) {
                    memcpy(place, from + (row * shape.groups + group) * size, static_cast<size_t>(size));
                } else {
                    memset(place, 0, static_cast<size_t>(size));
                }
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

DGEMMA_API void dgemma_pack(const DgemmaMatrix* shape, const uint8_t* values, const void* scales, uint8_t* data,
                            void* packed_scales, int32_t threads) {
    dgemma::pack(*shape, values, static_cast<const uint8_t*>(scales), data, static_cast<uint8_t*>(packed_scales),
                 threads);
}
