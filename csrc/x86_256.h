// What the two 256-bit paths of x86 share: 16 lanes in two registers.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "kernels.h"
#include "x86_turn.h"

namespace dgemma {
namespace {

struct Wide256 : Turn {
    struct Ints {
        __m256i a, b;
    };
    struct Floats {
        __m256 a, b;
    };

    static Ints all(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
    static Floats all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
    static Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
    static void store(float* to, Floats value) {
        _mm256_storeu_ps(to, value.a);
        _mm256_storeu_ps(to + 8, value.b);
    }
    static Floats floats(Ints value) { return {_mm256_cvtepi32_ps(value.a), _mm256_cvtepi32_ps(value.b)}; }
    static Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
    static Floats mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }

    static __m256i load_bytes(const uint8_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    // Four bytes in every lane.
    static __m256i four_of(const int8_t* values) {
        int32_t four;
        memcpy(&four, values, 4);
        return _mm256_set1_epi32(four);
    }
    static __m256i low(__m256i pair, __m256i mask) { return _mm256_and_si256(pair, mask); }
    static __m256i high(__m256i pair, __m256i mask) { return _mm256_and_si256(_mm256_srli_epi16(pair, 4), mask); }
};

}  // namespace
}  // namespace dgemma
