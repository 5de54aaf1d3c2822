// The table of one instruction set's kernels: included last by each isa_*.cpp, which names it DGEMMA_KERNELS.
#pragma once

#include "lanes.h"
#include "tile.h"

namespace dgemma {
namespace {

constexpr Kernels kTable = {
    Isa::kName,
    Isa::kRows,
    {Isa::kOffset4, Isa::kOffset8, kE2m1Offset},
    {product<kInt4>, product<kInt8>, product<kNvfp4>},
    product<kInt8, true>,
    quantise,
    gate,
    norm,
    add_scaled,
    temper,
    peaks,
    weigh,
    quantise_weights,
    turn,
};

}  // namespace

const Kernels* DGEMMA_KERNELS() { return &kTable; }

}  // namespace dgemma
