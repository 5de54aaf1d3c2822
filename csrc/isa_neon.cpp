// ARM with NEON's dot product: 16 lanes in four registers.
#include <arm_neon.h>
#include <string.h>

#include "kernels.h"

namespace dgemma {
namespace {

struct Isa {
    static constexpr const char* kName = "neon";
    static constexpr int kRows = 4;  // 16 sums, four activations, and the weights as they come
    static constexpr int kOffset4 = 8, kOffset8 = 0;
    struct Ints {
        int32x4_t part[4];
    };
    struct Floats {
        float32x4_t part[4];
    };

    static Ints all(int32_t value) {
        const int32x4_t one = vdupq_n_s32(value);
        return {{one, one, one, one}};
    }
    static Floats all(float value) {
        const float32x4_t one = vdupq_n_f32(value);
        return {{one, one, one, one}};
    }
    static Floats load(const float* from) {
        return {{vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)}};
    }
    static void store(float* to, Floats value) {
        for (int i = 0; i < 4; i++) vst1q_f32(to + 4 * i, value.part[i]);
    }
    static Floats e4m3(const uint8_t* from) {
        Floats out;
        for (int i = 0; i < 4; i++) {
            int32_t own[4];
            for (int k = 0; k < 4; k++) own[k] = static_cast<int8_t>(from[4 * i + k]);
            const uint32x4_t bits = vreinterpretq_u32_s32(vshlq_n_s32(vld1q_s32(own), 20));
            out.part[i] = vmulq_n_f32(vreinterpretq_f32_u32(vandq_u32(bits, vdupq_n_u32(kE4m3Bits))), kE4m3Factor);
        }
        return out;
    }
    static Floats floats(Ints value) {
        Floats out;
        for (int i = 0; i < 4; i++) out.part[i] = vcvtq_f32_s32(value.part[i]);
        return out;
    }
    static Floats add(Floats x, Floats y) {
        for (int i = 0; i < 4; i++) x.part[i] = vaddq_f32(x.part[i], y.part[i]);
        return x;
    }
    static Floats mul(Floats x, Floats y) {
        for (int i = 0; i < 4; i++) x.part[i] = vmulq_f32(x.part[i], y.part[i]);
        return x;
    }

    template <int Rows>
    static inline void quad(Ints (&sums)[Rows], const int8x16_t (&weights)[4], const int8_t* values) {
        DGEMMA_UNROLL
        for (int r = 0; r < Rows; r++) {
            int32_t bits;
            memcpy(&bits, values + kQuad * r, 4);
            const int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(bits));
            DGEMMA_UNROLL
            for (int i = 0; i < 4; i++) sums[r].part[i] = vdotq_s32(sums[r].part[i], weights[i], four);
        }
    }

    template <int Rows>
    static inline void chunk4(Ints (&sums)[Rows], const uint8_t* weights, const int8_t* values) {
        const uint8x16_t mask = vdupq_n_u8(15);
        for (int p = 0; p < 4; p++) {
            int8x16_t low[4], high[4];
            DGEMMA_UNROLL
            for (int i = 0; i < 4; i++) {
                const uint8x16_t pair = vld1q_u8(weights + 64 * p + 16 * i);
                low[i] = vreinterpretq_s8_u8(vandq_u8(pair, mask));
                high[i] = vreinterpretq_s8_u8(vshrq_n_u8(pair, 4));
            }
            quad<Rows>(sums, low, values + kQuad * Rows * p);
            quad<Rows>(sums, high, values + kQuad * Rows * (p + 4));
        }
    }

    template <int Rows, bool kHigh>
    static inline void half(Ints (&sums)[Rows], const uint8_t* weights, const int8_t* values) {
        const uint8x16_t mask = vdupq_n_u8(15), table = vld1q_u8(kE2m1);
        for (int p = 0; p < 4; p++) {
            int8x16_t own[4];
            DGEMMA_UNROLL
            for (int i = 0; i < 4; i++) {
                const uint8x16_t pair = vld1q_u8(weights + 64 * p + 16 * i);
                own[i] = vreinterpretq_s8_u8(vqtbl1q_u8(table, kHigh ? vshrq_n_u8(pair, 4) : vandq_u8(pair, mask)));
            }
            quad<Rows>(sums, own, values + kQuad * Rows * p);
        }
    }

    template <int Rows>
    static inline void chunk8(Ints (&sums)[Rows], const uint8_t* weights, const int8_t* values) {
        const uint8x16_t flip = vdupq_n_u8(128);
        for (int p = 0; p < 8; p++) {
            int8x16_t four[4];
            DGEMMA_UNROLL
            for (int i = 0; i < 4; i++) {
                four[i] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(weights + 64 * p + 16 * i), flip));
            }
            quad<Rows>(sums, four, values + kQuad * Rows * p);
        }
    }

    // 4 x 4 bytes, columns to rows.
    static void turn16(const uint8_t* from, uint8_t* to) {
        const uint8_t order[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
        vst1q_u8(to, vqtbl1q_u8(vld1q_u8(from), vld1q_u8(order)));
    }
};

}  // namespace
}  // namespace dgemma

#define DGEMMA_KERNELS neon_kernels
#include "path.h"
