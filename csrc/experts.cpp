// Mixture of experts: each expert's rows go through its two products at once, while they are in the cache.
#include <string.h>

#include <algorithm>
#include <vector>

#include "matrix.h"

namespace dgemma {
namespace {

constexpr int kRowsAUnit = 64;  // rows of one expert that are done together: its weights are read once for them

struct Unit {
    int64_t expert, first;
    int rows;
};

struct Call {
    Rows x;
    int64_t rows, k;
    const float* weights;
    const int64_t* experts;
    const DgemmaMatrix &gate_up, &down;
    float* room;
};

// The T * k places [token, choice] in order of their experts, and the units that they are done in, large ones first.
std::vector<Unit> plan(const Call& call, std::vector<int64_t>& places) {
    const int64_t count = call.rows * call.k, experts = call.gate_up.count;
    std::vector<int64_t> ends(static_cast<size_t>(experts) + 1);
    for (int64_t i = 0; i < count; i++) ends[static_cast<size_t>(call.experts[i]) + 1]++;
    for (int64_t e = 0; e < experts; e++) ends[static_cast<size_t>(e) + 1] += ends[static_cast<size_t>(e)];
    std::vector<Unit> units;
    for (int64_t e = 0; e < experts; e++) {
        const int64_t begin = ends[static_cast<size_t>(e)], end = ends[static_cast<size_t>(e) + 1];
        for (int64_t first = begin; first < end; first += kRowsAUnit) {
            units.push_back({e, first, static_cast<int>(std::min<int64_t>(kRowsAUnit, end - first))});
        }
    }
    places.resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; i++) places[static_cast<size_t>(ends[static_cast<size_t>(call.experts[i])]++)] = i;
    std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.rows > b.rows; });
    return units;
}

// Products of `rows` int8 rows, chosen by `row`, with one matrix; `take` gets each tile of each panel.
template <class Row, class Take>
void multiply_rows(const Kernels& kernels, const Shape& shape, const DgemmaMatrix& matrix, int64_t index, int rows,
                   const int8_t* values, const float* scales, Row&& row, Take&& take) {
    const Split split(rows, kernels.rows);
    const int64_t stride = panel_bytes(kernels.rows, shape);
    uint8_t* data = scratch<uint8_t>(Use::kUnit, split.count * stride);
    for (int64_t p = 0; p < split.count; p++) {
        const int64_t first = split.first(p);
        fill_panel(data + p * stride, split.size(p), shape, kernels.offset[shape.kind], values, scales,
                   [&](int r) { return row(first + r); });
    }
    for (int64_t tile = 0; tile < shape.tiles; tile++) {
        for (int64_t p = 0; p < split.count; p++) {
            alignas(64) float products[kMostRows * kLanes];
            const Panel panel = panel_at(data + p * stride, split.size(p), shape);
            multiply(kernels, shape, matrix, index, tile, panel, products);
            for (int r = 0; r < panel.rows; r++) take(split.first(p) + r, tile, products + r * kLanes);
        }
    }
}

void run(const Call& call, void* out, int threads) {
    const Kernels& kernels = chosen();
    const Shape in(call.gate_up), back(call.down);
    const int64_t width = back.inputs, hidden = in.inputs;

    int8_t* values = scratch<int8_t>(Use::kPanels, call.rows * (in.padded + 4));
    float* scales = reinterpret_cast<float*>(values + call.rows * in.padded);
    share(call.rows, threads, [&](int64_t row) {
        float* numbers = scratch<float>(Use::kFloats, hidden);
        scales[row] = kernels.quantise(call.x.read(row, numbers), hidden, in.padded, values + row * in.padded);
    });

    std::vector<int64_t> places;
    const std::vector<Unit> units = plan(call, places);
    share(static_cast<int64_t>(units.size()), threads, [&](int64_t number) {
        const Unit& unit = units[static_cast<size_t>(number)];
        const int64_t* own = places.data() + unit.first;
        const int64_t pitch = in.tiles * kLanes;
        float* both = scratch<float>(Use::kFloats, unit.rows * pitch);
        multiply_rows(
            kernels, in, call.gate_up, unit.expert, unit.rows, values, scales,
            [&](int64_t row) { return own[row] / call.k; },
            [&](int64_t row, int64_t tile, const float* products) {
                memcpy(both + row * pitch + tile * kLanes, products, kLanes * sizeof(float));
            });
        int8_t* inner = scratch<int8_t>(Use::kCodes, unit.rows * back.padded);
        float inner_scales[kRowsAUnit];
        for (int r = 0; r < unit.rows; r++) {
            float* gates = both + r * pitch;
            kernels.gate(gates, gates + width, width, gates);
            inner_scales[r] = kernels.quantise(gates, width, back.padded, inner + r * back.padded);
        }
        multiply_rows(
            kernels, back, call.down, unit.expert, unit.rows, inner, inner_scales, [](int64_t row) { return row; },
            [&](int64_t row, int64_t tile, const float* products) {
                const int64_t left = std::min<int64_t>(kLanes, hidden - tile * kLanes);
                memcpy(call.room + own[row] * hidden + tile * kLanes, products,
                       static_cast<size_t>(left) * sizeof(float));
            });
    });

    // In the router's order, so that a token's sum does not depend on what else there is.
    share(call.rows, threads, [&](int64_t row) {
        float* sum = scratch<float>(Use::kFloats, hidden);
        memset(sum, 0, static_cast<size_t>(hidden) * sizeof(float));
        for (int64_t i = row * call.k; i < (row + 1) * call.k; i++) {
            kernels.add_scaled(call.room + i * hidden, call.weights[i], hidden, sum);
        }
        write(out, call.x.half, row * hidden, sum, hidden);
    });
}

}  // namespace
}  // namespace dgemma

DGEMMA_API void dgemma_experts(const void* x, int32_t half, int64_t rows, int64_t k, const float* weights,
                               const int64_t* experts, const DgemmaMatrix* gate_up, const DgemmaMatrix* down,
                               float* room, void* out, int32_t threads) {
    if (!rows) return;
    dgemma::run({{x, half != 0, gate_up->inputs}, rows, k, weights, experts, *gate_up, *down, room}, out, threads);
}
