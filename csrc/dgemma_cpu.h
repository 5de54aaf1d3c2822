// The plain C face of the CPU kernels: what `dgemma.kernels.native` calls. Buffers are contiguous and the caller's.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define DGEMMA_API extern "C" __declspec(dllexport)
#else
#define DGEMMA_API extern "C" __attribute__((visibility("default")))
#endif

// One packed matrix, or E of them one after another. Packed: tiles of 16 outputs; in a tile, chunks of 32 inputs; in a
// chunk, quads of 4 inputs; in a quad, 16 outputs x 4 neighbouring inputs, a byte each as value + 128 (8 bits), or as
// value + 8 in a nibble (4 bits): quad p in the low nibbles and quad p + 4 in the high ones of 64 bytes, p = 0..3.
// Scales: [tiles, groups, 16]. Outputs are filled up to 16 and inputs to 32 with zeros.
// NVFP4: 4 bits that are E2M1 codes of half the value, E4M3 scales for groups of 16, and factors [tiles, 16].
struct DgemmaMatrix {
    int32_t bits;      // 4 or 8
    int32_t count;     // E; 1 for one matrix
    int64_t outputs;   // O
    int64_t inputs;    // I
    int64_t group;     // inputs that share a scale, a multiple of 32 (NVFP4: 16); 0: all of a row
    const uint8_t* data;
    const void* scales;    // float32; NVFP4: a byte each
    const float* factors;  // NVFP4: by which a row's scales are multiplied; null: whole numbers
};

// What a request wants of its scores, in the order in which it is applied.
struct DgemmaWish {
    float cap;               // soft-cap: cap * tanh(score / cap); 0: none
    float heat;              // scores are divided by it
    int64_t biases;          // words that get a bias, before the division
    const int64_t* words;    // [biases]
    const float* bias;       // [biases]
    int64_t ends;            // words that are refused at the first `barred` positions
    const int64_t* end;      // [ends]
    int64_t barred;
};

// What is found of n positions; a position whose scores are not finite gets a NaN entropy.
struct DgemmaBeliefs {
    int64_t* argmax;      // [n]
    int64_t* sampled;     // [n]
    float* entropies;     // [n] nats
    float* totals;        // [n]: sum of weights exp(score - largest); or null
};

DGEMMA_API int32_t dgemma_abi(void);  // changes with this file

// Instruction sets. Names in order of preference, separated by spaces; of those, what this machine can run.
DGEMMA_API const char* dgemma_compiled(void);
DGEMMA_API int32_t dgemma_runs(const char* isa);
DGEMMA_API int32_t dgemma_use(const char* isa);  // 1: chosen; 0: cannot run here

// Gives the OpenMP runtime's `GOMP_parallel`, so that work runs on the threads that torch keeps warm; null: own threads.
DGEMMA_API void dgemma_team(void* gomp_parallel);

// values: bits 4: uint8 [E, O, I/2]; bits 8: int8 [E, O, I]; scales [E, O, groups] -> the layout above. Factors are laid
// out by the caller; here they only say that it is NVFP4.
DGEMMA_API void dgemma_pack(const DgemmaMatrix* shape, const uint8_t* values, const void* scales, uint8_t* data,
                            void* packed_scales, int32_t threads);

// x [T, I] float32, or bfloat16 if `half` -> out [T, O] in the same dtype.
DGEMMA_API void dgemma_linear(const void* x, int32_t half, int64_t rows, const DgemmaMatrix* weight, void* out,
                              int32_t threads);

// Gated feed-forwards. x [T, H]; weights [T, k] float32; experts [T, k], each below E; gate_up [E, 2I, H];
// down [E, H, I]; room: float32 [T * k, H] that the call may use -> out [T, H] in x's dtype.
DGEMMA_API void dgemma_experts(const void* x, int32_t half, int64_t rows, int64_t k, const float* weights,
                               const int64_t* experts, const DgemmaMatrix* gate_up, const DgemmaMatrix* down,
                               float* room, void* out, int32_t threads);

// x [T, I] -> x * (mean of squares + eps)^-0.5 * weight, [T, I] in the same dtype; weight [I] float32, or null for none.
DGEMMA_API void dgemma_norm(const void* x, int32_t half, int64_t rows, int64_t width, const float* weight, float eps,
                            void* out, int32_t threads);

// gelu(gate) * up, GELU in its tanh form: rows of `width` numbers, `pitch` apart -> out [T, I] without gaps.
DGEMMA_API void dgemma_gate(const float* gate, const float* up, int64_t pitch, int64_t rows, int64_t width, float* out,
                            int32_t threads);

// Scores [n, V] float32 -> beliefs; overwritten by the weights exp(score - largest). `uniform` [n] or null: likeliest.
DGEMMA_API void dgemma_read(float* scores, int64_t rows, int64_t words, const DgemmaWish* wish, const float* uniform,
                            const DgemmaBeliefs* out, int32_t threads);

// The vocabulary step on a table of 8 bits with one scale a row. hidden [n, H]; hint [n] or null: words that are
// likely the largest; soft: float32 [n, H] or null; room: `dgemma_vocabulary_room` bytes; blends [1] or null: blocks
// of scores (of one position and 64 words) that took part in `soft`.
DGEMMA_API int64_t dgemma_vocabulary_room(int64_t rows, const DgemmaMatrix* table, int32_t soft);
DGEMMA_API void dgemma_vocabulary(const void* hidden, int32_t half, int64_t rows, const DgemmaMatrix* table,
                                  const DgemmaWish* wish, const float* uniform, const int64_t* hint, float tolerance,
                                  const DgemmaBeliefs* out, float* soft, void* room, int64_t* blends, int32_t threads);
