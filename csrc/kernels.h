// What each instruction set implements, and the layout that all of them share.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Loops over rows whose sums live in registers must not stay loops.
#if defined(__GNUC__)
#define DGEMMA_UNROLL _Pragma("GCC unroll 16")
#else
#define DGEMMA_UNROLL
#endif

namespace dgemma {

constexpr int kLanes = 16;   // outputs of a tile
constexpr int kChunk = 32;   // inputs of a chunk: what 16-bit sums of 4-bit products can hold
constexpr int kQuad = 4;     // inputs whose products an integer dot product adds at once
constexpr int kBlock = 64;   // words whose weights are summed before the block that holds a sample is searched
constexpr int kMostRows = 16;

enum Kind { kInt4, kInt8, kNvfp4, kKinds };
constexpr int kNvfp4Group = 16;  // half a chunk: its quads in the low nibbles, or those in the high ones
constexpr int kE2m1Offset = 12;
// Of each E2M1 code: twice its number, and the offset.
alignas(16) constexpr uint8_t kE2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
// An E4M3 byte's sign at the top, the rest in the last bits of a float's exponent and the first of its mantissa: that is
// the scale times 2^-120.
constexpr uint32_t kE4m3Bits = 0x87F00000u;
constexpr float kE4m3Factor = 1329227995784915872903807060280344576.0f;  // 2^120

constexpr int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Up to 16 rows of int8 activations, quad by quad: data [inputs/4][rows][4]. A sum starts from `starts`
// [groups][rows], which makes up for weights being stored with an offset.
struct Panel {
    int rows;
    const int8_t* data;
    const int32_t* starts;
    const float* scales;   // [rows]; for `blend` [groups][rows]
};

// Products of one tile: groups of `chunks_a_group` chunks (NVFP4: of half a chunk) -> out [rows][16].
using Product = void (*)(const uint8_t* weights, const void* scales, const float* factors, int64_t groups,
                         int64_t chunks_a_group, const Panel& panel, float* out);

struct Kernels {
    const char* name;
    int rows;        // the most rows of a panel
    int offset[kKinds];  // what the path's products add to each weight
    Product product[kKinds];
    Product blend;   // 8 bits, a scale for each row and group in place of one for each output and group

    // A row of n numbers -> n_padded int8 values and their scale, which is NaN if a number is not finite.
    float (*quantise)(const float* x, int64_t n, int64_t padded, int8_t* values);
    // gelu(gate) * up, GELU in its tanh form.
    void (*gate)(const float* gate, const float* up, int64_t n, float* out);
    // x times (mean of squares + eps)^-0.5, times `weight` [n] unless it is null
    void (*norm)(const float* x, const float* weight, float eps, int64_t n, float* out);
    // out += weight * x
    void (*add_scaled)(const float* x, float weight, int64_t n, float* out);

    // Scores -> soft-capped (if cap > 0) and divided by heat; false if one is not finite.
    bool (*temper)(float* scores, int64_t n, float cap, float heat);
    // The largest of each 64; the last block may be short.
    void (*peaks)(const float* scores, int64_t n, float* out);
    // Scores -> weights exp(score - ref), with the sums of each 64; adds up weights, and weights times (score - ref).
    void (*weigh)(float* scores, int64_t n, float ref, float* sums, double* total, double* mean);
    // 64 weights -> int8 values 0..127 and their scale. `factors`: one for each, or null.
    float (*quantise_weights)(const float* weights, const float* factors, int8_t* values);
    // 16 words x 16 inputs of a table (4 quads of 64 bytes) -> 16 outputs x 16 words (4 quads, `stride` bytes apart).
    void (*turn)(const uint8_t* quads, uint8_t* out, int64_t stride);
};

// The paths that were compiled; each is null elsewhere.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avxvnni_kernels();
const Kernels* avx512vnni_kernels();
const Kernels* neon_kernels();

const Kernels& chosen();  // the path in use

}  // namespace dgemma
