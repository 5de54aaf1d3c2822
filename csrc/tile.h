// The integer products of one tile, for every instruction set: each isa_*.cpp defines `Isa` and then includes this.
// All is in unnamed namespaces and no standard template is used, so that the linker cannot hand code that was compiled
// for one instruction set to another.
#pragma once

#include "kernels.h"

namespace dgemma {
namespace {

// Sums of integers are exact; the float steps are one product and one sum a group, in the order of the groups, never
// fused: so every instruction set gives the same bits, and so does the reference.
template <int Bits, int Rows, bool ByRow>
void product_of(const uint8_t* weights, const float* scales, int64_t groups, int64_t chunks, const Panel& panel,
                float* out) {
    // Float sums live in memory: the registers are for the integers.
    DGEMMA_UNROLL
    for (int r = 0; r < Rows; r++) Isa::store(out + r * kLanes, Isa::all(0.0f));
    const int8_t* values = panel.data;
    const int32_t* starts = panel.starts;
    for (int64_t g = 0; g < groups; g++) {
        typename Isa::Ints ints[Rows];
        DGEMMA_UNROLL
        for (int r = 0; r < Rows; r++) ints[r] = Isa::all(starts[r]);
        int64_t left = chunks;  // at least one: a loop that may be empty costs registers
        do {
            if constexpr (Bits == 4) {
                Isa::template chunk4<Rows>(ints, weights, values);
            } else {
                Isa::template chunk8<Rows>(ints, weights, values);
            }
            weights += Bits * kLanes * kChunk / 8;
            values += Rows * kChunk;
        } while (--left > 0);
        typename Isa::Floats scale;
        if constexpr (!ByRow) scale = Isa::load(scales + g * kLanes);
        DGEMMA_UNROLL
        for (int r = 0; r < Rows; r++) {
            if constexpr (ByRow) scale = Isa::all(panel.scales[g * Rows + r]);
            const auto part = Isa::mul(Isa::floats(ints[r]), scale);
            Isa::store(out + r * kLanes, Isa::add(Isa::load(out + r * kLanes), part));
        }
        starts += Rows;
    }
    if constexpr (!ByRow) {
        DGEMMA_UNROLL
        for (int r = 0; r < Rows; r++) {
            Isa::store(out + r * kLanes, Isa::mul(Isa::load(out + r * kLanes), Isa::all(panel.scales[r])));
        }
    }
}

template <int Bits, bool ByRow, int Rows>
void dispatch(const uint8_t* weights, const float* scales, int64_t groups, int64_t chunks, const Panel& panel,
              float* out) {
    if constexpr (Rows > 0) {
        if (panel.rows == Rows) {
            product_of<Bits, Rows, ByRow>(weights, scales, groups, chunks, panel, out);
        } else {
            dispatch<Bits, ByRow, Rows - 1>(weights, scales, groups, chunks, panel, out);
        }
    }
}

template <int Bits, bool ByRow = false>
void product(const uint8_t* weights, const float* scales, int64_t groups, int64_t chunks, const Panel& panel,
             float* out) {
    dispatch<Bits, ByRow, Isa::kRows>(weights, scales, groups, chunks, panel, out);
}

}  // namespace
}  // namespace dgemma
