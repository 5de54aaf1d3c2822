// x86 with AVX-512 VNNI: one instruction multiplies and adds 64 pairs of bytes.
#include <immintrin.h>
#include <string.h>

#include "kernels.h"
#include "x86_turn.h"

namespace dgemma {
namespace {

struct Isa : Turn {
    static constexpr const char* kName = "avx512vnni";
    static constexpr int kRows = 16;  // 16 sums beside weights, mask and activations; more rows would rarely be full
    static constexpr int kOffset4 = 8, kOffset8 = 128;
    using Ints = __m512i;
    using Floats = __m512;

    static Ints all(int32_t value) { return _mm512_set1_epi32(value); }
    static Floats all(float value) { return _mm512_set1_ps(value); }
    static Floats load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, Floats value) { _mm512_storeu_ps(to, value); }
    static Floats e4m3(const uint8_t* from) {
        const __m512i own = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        const __m512i bits = _mm512_and_si512(_mm512_slli_epi32(own, 20), all(static_cast<int32_t>(kE4m3Bits)));
        return mul(_mm512_castsi512_ps(bits), all(kE4m3Factor));
    }
    static Floats floats(Ints value) { return _mm512_cvtepi32_ps(value); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }

    template <int Rows>
    static inline void quad(Ints (&sums)[Rows], __m512i weights, const int8_t* values) {
        DGEMMA_UNROLL
        for (int r = 0; r < Rows; r++) {
            int32_t four;
            memcpy(&four, values + kQuad * r, 4);
            sums[r] = _mm512_dpbusd_epi32(sums[r], weights, _mm512_set1_epi32(four));
        }
    }

    template <int Rows>
    static inline void chunk4(Ints (&sums)[Rows], const uint8_t* weights, const int8_t* values) {
        const __m512i mask = _mm512_set1_epi8(15);
        DGEMMA_UNROLL
        for (int p = 0; p < 4; p++) {
            const __m512i pair = _mm512_loadu_si512(weights + 64 * p);
            quad<Rows>(sums, _mm512_and_si512(pair, mask), values + kQuad * Rows * p);
            quad<Rows>(sums, _mm512_and_si512(_mm512_srli_epi16(pair, 4), mask), values + kQuad * Rows * (p + 4));
        }
    }

    template <int Rows, bool kHigh>
    static inline void half(Ints (&sums)[Rows], const uint8_t* weights, const int8_t* values) {
        const __m512i mask = _mm512_set1_epi8(15);
        const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kE2m1)));
        DGEMMA_UNROLL
        for (int p = 0; p < 4; p++) {
            const __m512i pair = _mm512_loadu_si512(weights + 64 * p);
            const __m512i codes = _mm512_and_si512(kHigh ? _mm512_srli_epi16(pair, 4) : pair, mask);
            quad<Rows>(sums, _mm512_shuffle_epi8(table, codes), values + kQuad * Rows * p);
        }
    }

    template <int Rows>
    static inline void chunk8(Ints (&sums)[Rows], const uint8_t* weights, const int8_t* values) {
        for (int p = 0; p < 8; p++) {
            quad<Rows>(sums, _mm512_loadu_si512(weights + 64 * p), values + kQuad * Rows * p);
        }
    }
};

}  // namespace
}  // namespace dgemma

#define DGEMMA_KERNELS avx512vnni_kernels
#include "path.h"
