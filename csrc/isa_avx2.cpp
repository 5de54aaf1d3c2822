// x86 with AVX2 only. Its byte products are added in pairs into 16 bits, with saturation, so what is added must fit.
#include <immintrin.h>

#include "kernels.h"
#include "x86_256.h"

namespace dgemma {
namespace {

struct Isa : Wide256 {
    static constexpr const char* kName = "avx2";
    static constexpr int kRows = 6;  // 12 sums, two weights, four activations and a mask
    static constexpr int kOffset4 = 8, kOffset8 = 0;

    // Nibbles 0..15 times activations -127..127: a pair is at most 3,810, and the 8 pairs of a chunk 30,480 < 32,768,
    // so sums of 16 bits hold a chunk exactly.
    template <int Rows>
    static inline void quad(__m256i (&a)[Rows], __m256i (&b)[Rows], __m256i wa, __m256i wb, const int8_t* values) {
        DGEMMA_UNROLL
        for (int r = 0; r < Rows; r++) {
            const __m256i four = four_of(values + kQuad * r);
            a[r] = _mm256_add_epi16(a[r], _mm256_maddubs_epi16(wa, four));
            b[r] = _mm256_add_epi16(b[r], _mm256_maddubs_epi16(wb, four));
        }
    }

    template <int Rows>
    static inline void widen(Ints (&sums)[Rows], const __m256i (&a)[Rows], const __m256i (&b)[Rows]) {
        const __m256i ones = _mm256_set1_epi16(1);
        DGEMMA_UNROLL
        for (int r = 0; r < Rows; r++) {
            sums[r].a = _mm256_add_epi32(sums[r].a, _mm256_madd_epi16(a[r], ones));
            sums[r].b = _mm256_add_epi32(sums[r].b, _mm256_madd_epi16(b[r], ones));
        }
    }

    template <int Rows>
    static inline void chunk4(Ints (&sums)[Rows], const uint8_t* weights, const int8_t* values) {
        const __m256i mask = _mm256_set1_epi8(15);
        __m256i a[Rows], b[Rows];
        DGEMMA_UNROLL
        for (int r = 0; r < Rows; r++) a[r] = b[r] = _mm256_setzero_si256();
        for (int p = 0; p < 4; p++) {  // unrolled, too many sums would be held at once
            const __m256i wa = load_bytes(weights + 64 * p), wb = load_bytes(weights + 64 * p + 32);
            quad<Rows>(a, b, low(wa, mask), low(wb, mask), values + kQuad * Rows * p);
            quad<Rows>(a, b, high(wa, mask), high(wb, mask), values + kQuad * Rows * (p + 4));
        }
        widen<Rows>(sums, a, b);
    }

    // Numbers 0..24: a pair is at most 6,096, and the 4 pairs of half a chunk 24,384.
    template <int Rows, bool kHigh>
    static inline void half(Ints (&sums)[Rows], const uint8_t* weights, const int8_t* values) {
        __m256i a[Rows], b[Rows];
        DGEMMA_UNROLL
        for (int r = 0; r < Rows; r++) a[r] = b[r] = _mm256_setzero_si256();
        for (int p = 0; p < 4; p++) {
            const uint8_t* own = weights + 64 * p;
            quad<Rows>(a, b, e2m1<kHigh>(own), e2m1<kHigh>(own + 32), values + kQuad * Rows * p);
        }
        widen<Rows>(sums, a, b);
    }

    // Signs go from the weights (-128..127) to the activations (-127..127, so that turning them cannot overflow):
    // a pair is then at most 2 * 128 * 127 = 32,512 < 32,768 and never saturates.
    template <int Rows>
    static inline void chunk8(Ints (&sums)[Rows], const uint8_t* weights, const int8_t* values) {
        const __m256i flip = _mm256_set1_epi8(-128), ones = _mm256_set1_epi16(1);
        for (int p = 0; p < 8; p++) {
            const __m256i wa = _mm256_xor_si256(load_bytes(weights + 64 * p), flip);
            const __m256i wb = _mm256_xor_si256(load_bytes(weights + 64 * p + 32), flip);
            const __m256i size_a = _mm256_abs_epi8(wa), size_b = _mm256_abs_epi8(wb);
            DGEMMA_UNROLL
            for (int r = 0; r < Rows; r++) {
                const __m256i four = four_of(values + kQuad * (Rows * p + r));
                const __m256i a = _mm256_maddubs_epi16(size_a, _mm256_sign_epi8(four, wa));
                const __m256i b = _mm256_maddubs_epi16(size_b, _mm256_sign_epi8(four, wb));
                sums[r].a = _mm256_add_epi32(sums[r].a, _mm256_madd_epi16(a, ones));
                sums[r].b = _mm256_add_epi32(sums[r].b, _mm256_madd_epi16(b, ones));
            }
        }
    }
};

}  // namespace
}  // namespace dgemma

#define DGEMMA_KERNELS avx2_kernels
#include "path.h"
