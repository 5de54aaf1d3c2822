// What every path of x86 shares.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace dgemma {
namespace {

struct Turn {
    // 4 x 4 bytes, columns to rows.
    static void turn16(const uint8_t* from, uint8_t* to) {
        const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(value, order));
    }
};

}  // namespace
}  // namespace dgemma
