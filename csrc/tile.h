// The integer products of one tile, for every instruction set: each isa_*.cpp defines `Isa` and then includes this.
// All is in unnamed namespaces and no standard template is used, so that the linker cannot hand code that was compiled
// for one instruction set to another.
#pragma once

#include "kernels.h"

namespace dgemma {
namespace {

// Sums of integers are exact; the float steps are one product and one sum a group, in the order of the groups, never
// fused: so every instruction set gives the same bits, and so does the reference.
template <Kind kKind, int Rows, bool ByRow>
void product_of(const uint8_t* weights, const void* scales, const float* factors, int64_t groups, int64_t chunks,
                const Panel& panel, float* out) {
    constexpr int kChunkBytes = kLanes * kChunk / (kKind == kInt8 ? 1 : 2);
    // Float sums live in memory: the registers are for the integers.
    DGEMMA_UNROLL
    for (int r = 0; r < Rows; r++) Isa::store(out + r * kLanes, Isa::all(0.0f));
    const int8_t* values = panel.data;
    const int32_t* starts = panel.starts;
    for (int64_t g = 0; g < groups; g++) {
        typename Isa::Ints ints[Rows];
        DGEMMA_UNROLL
        for (int r = 0; r < Rows; r++) ints[r] = Isa::all(starts[r]);
        typename Isa::Floats scale;
        if constexpr (kKind == kNvfp4) {
            if (g % 2 == 0) {
                Isa::template half<Rows, false>(ints, weights, values);
            } else {
                Isa::template half<Rows, true>(ints, weights, values);
                weights += kChunkBytes;
            }
            values += Rows * kNvfp4Group;
            scale = Isa::e4m3(static_cast<const uint8_t*>(scales) + g * kLanes);
        } else {
            int64_t left = chunks;  // at least one: a loop that may be empty costs registers
            do {
                if constexpr (kKind == kInt4) {
                    Isa::template chunk4<Rows>(ints, weights, values);
                } else {
                    Isa::template chunk8<Rows>(ints, weights, values);
                }
                weights += kChunkBytes;
                values += Rows * kChunk;
            } while (--left > 0);
            if constexpr (!ByRow) scale = Isa::load(static_cast<const float*>(scales) + g * kLanes);
        }
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
            typename Isa::Floats sum = Isa::load(out + r * kLanes);
            if constexpr (kKind == kNvfp4) sum = Isa::mul(sum, Isa::load(factors));
            Isa::store(out + r * kLanes, Isa::mul(sum, Isa::all(panel.scales[r])));
        }
    }
}

template <Kind kKind, bool ByRow, int Rows>
void dispatch(const uint8_t* weights, const void* scales, const float* factors, int64_t groups, int64_t chunks,
              const Panel& panel, float* out) {
    if constexpr (Rows > 0) {
        if (panel.rows == Rows) {
            product_of<kKind, Rows, ByRow>(weights, scales, factors, groups, chunks, panel, out);
        } else {
            dispatch<kKind, ByRow, Rows - 1>(weights, scales, factors, groups, chunks, panel, out);
        }
    }
}

template <Kind kKind, bool ByRow = false>
void product(const uint8_t* weights, const void* scales, const float* factors, int64_t groups, int64_t chunks,
             const Panel& panel, float* out) {
    dispatch<kKind, ByRow, Isa::kRows>(weights, scales, factors, groups, chunks, panel, out);
}

}  // namespace
}  // namespace dgemma
