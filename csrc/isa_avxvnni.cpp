// x86 with AVX-VNNI: the dot products of AVX-512 in half the width.
#include <immintrin.h>

#include "kernels.h"
#include "x86_256.h"

namespace dgemma {
namespace {

struct Isa : Wide256 {
    static constexpr const char* kName = "avxvnni";
    static constexpr int kRows = 6;  // 12 sums, two weights and four activations: 15 of 16 registers
    static constexpr int kOffset4 = 8, kOffset8 = 128;

    template <int Rows>
    static inline void quad(Ints (&sums)[Rows], __m256i a, __m256i b, const int8_t* values) {
        DGEMMA_UNROLL
        for (int r = 0; r < Rows; r++) {
            const __m256i four = four_of(values + kQuad * r);
            sums[r].a = _mm256_dpbusd_avx_epi32(sums[r].a, a, four);
            sums[r].b = _mm256_dpbusd_avx_epi32(sums[r].b, b, four);
        }
    }

    template <int Rows>
    static inline void chunk4(Ints (&sums)[Rows], const uint8_t* weights, const int8_t* values) {
        const __m256i mask = _mm256_set1_epi8(15);
        for (int p = 0; p < 4; p++) {
            const __m256i a = load_bytes(weights + 64 * p), b = load_bytes(weights + 64 * p + 32);
            quad<Rows>(sums, low(a, mask), low(b, mask), values + kQuad * Rows * p);
            quad<Rows>(sums, high(a, mask), high(b, mask), values + kQuad * Rows * (p + 4));
        }
    }

    template <int Rows, bool kHigh>
    static inline void half(Ints (&sums)[Rows], const uint8_t* weights, const int8_t* values) {
        for (int p = 0; p < 4; p++) {
            const uint8_t* own = weights + 64 * p;
            quad<Rows>(sums, e2m1<kHigh>(own), e2m1<kHigh>(own + 32), values + kQuad * Rows * p);
        }
    }

    template <int Rows>
    static inline void chunk8(Ints (&sums)[Rows], const uint8_t* weights, const int8_t* values) {
        for (int p = 0; p < 8; p++) {
            const __m256i a = load_bytes(weights + 64 * p), b = load_bytes(weights + 64 * p + 32);
            quad<Rows>(sums, a, b, values + kQuad * Rows * p);
        }
    }
};

}  // namespace
}  // namespace dgemma

#define DGEMMA_KERNELS avxvnni_kernels
#include "path.h"
