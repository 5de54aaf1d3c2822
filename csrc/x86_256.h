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
    static __m256 e4m3_half(const uint8_t* from) {
        const __m256i own = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
        const __m256i mask = _mm256_set1_epi32(static_cast<int32_t>(kE4m3Bits));
        const __m256i bits = _mm256_and_si256(_mm256_slli_epi32(own, 20), mask);
        return _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(kE4m3Factor));
    }
    static Floats e4m3(const uint8_t* from) { return {e4m3_half(from), e4m3_half(from + 8)}; }
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
    // The low or the high ones of 32 pairs of E2M1 codes, as numbers with their offset.
    template <bool kHigh>
    static __m256i e2m1(const uint8_t* from) {
        const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kE2m1)));
        const __m256i pair = load_bytes(from), mask = _mm256_set1_epi8(15);
        return _mm256_shuffle_epi8(table, kHigh ? high(pair, mask) : low(pair, mask));
    }
    static __m256i low(__m256i pair, __m256i mask) { return _mm256_and_si256(pair, mask); }
    static __m256i high(__m256i pair, __m256i mask) { return _mm256_and_si256(_mm256_srli_epi16(pair, 4), mask); }
};

}  // namespace
}  // namespace dgemma
