// Plain C++: what any processor runs, and the compiler vectorises as far as it may.
#include <string.h>

#include "kernels.h"

namespace dgemma {
namespace {

struct Isa {
    static constexpr const char* kName = "portable";
    static constexpr int kRows = 4;
    static constexpr int kOffset4 = 8, kOffset8 = 128;
    struct Ints {
        int32_t lane[kLanes];
    };
    struct Floats {
        float lane[kLanes];
    };

    static Ints all(int32_t value) {
        Ints out;
        for (int i = 0; i < kLanes; i++) out.lane[i] = value;
        return out;
    }
    static Floats all(float value) {
        Floats out;
        for (int i = 0; i < kLanes; i++) out.lane[i] = value;
        return out;
    }
    static Floats load(const float* from) {
        Floats out;
        memcpy(out.lane, from, sizeof(out.lane));
        return out;
    }
    static void store(float* to, const Floats& value) { memcpy(to, value.lane, sizeof(value.lane)); }
    static Floats e4m3(const uint8_t* from) {
        Floats out;
        for (int i = 0; i < kLanes; i++) {
            const uint32_t own = from[i], bits = (own << 24 & 0x80000000u) | (own << 20 & 0x07F00000u);
            memcpy(out.lane + i, &bits, 4);
            out.lane[i] *= kE4m3Factor;
        }
        return out;
    }
    static Floats floats(const Ints& value) {
        Floats out;
        for (int i = 0; i < kLanes; i++) out.lane[i] = static_cast<float>(value.lane[i]);
        return out;
    }
    static Floats add(const Floats& x, const Floats& y) {
        Floats out;
        for (int i = 0; i < kLanes; i++) out.lane[i] = x.lane[i] + y.lane[i];
        return out;
    }
    static Floats mul(const Floats& x, const Floats& y) {
        Floats out;
        for (int i = 0; i < kLanes; i++) out.lane[i] = x.lane[i] * y.lane[i];
        return out;
    }

    template <int Rows>
    static inline void quad(Ints (&sums)[Rows], const uint8_t* weights, const int8_t* values) {
        for (int r = 0; r < Rows; r++) {
            const int8_t* four = values + kQuad * r;
            for (int i = 0; i < kLanes; i++) {
                const uint8_t* own = weights + kQuad * i;
                sums[r].lane[i] += own[0] * four[0] + own[1] * four[1] + own[2] * four[2] + own[3] * four[3];
            }
        }
    }

    template <int Rows>
    static inline void chunk4(Ints (&sums)[Rows], const uint8_t* weights, const int8_t* values) {
        uint8_t low[64], high[64];
        for (int p = 0; p < 4; p++) {
            for (int i = 0; i < 64; i++) {
                low[i] = weights[64 * p + i] & 15;
                high[i] = weights[64 * p + i] >> 4;
            }
            quad<Rows>(sums, low, values + kQuad * Rows * p);
            quad<Rows>(sums, high, values + kQuad * Rows * (p + 4));
        }
    }

    template <int Rows, bool kHigh>
    static inline void half(Ints (&sums)[Rows], const uint8_t* weights, const int8_t* values) {
        uint8_t own[64];
        for (int p = 0; p < 4; p++) {
            // What `kE2m1` says, without a look-up, which few compilers vectorise.
            for (int i = 0; i < 64; i++) {
                const uint8_t code = kHigh ? weights[64 * p + i] >> 4 : weights[64 * p + i] & 15, size = code & 7;
                const uint8_t from4 = size > 4 ? size - 4 : 0, from6 = size > 6 ? 2 : 0;
                const uint8_t number = size + from4 + from6;
                own[i] = code > 7 ? kE2m1Offset - number : kE2m1Offset + number;
            }
            quad<Rows>(sums, own, values + kQuad * Rows * p);
        }
    }

    template <int Rows>
    static inline void chunk8(Ints (&sums)[Rows], const uint8_t* weights, const int8_t* values) {
        for (int p = 0; p < 8; p++) quad<Rows>(sums, weights + 64 * p, values + kQuad * Rows * p);
    }

    // 4 x 4 bytes, columns to rows.
    static void turn16(const uint8_t* from, uint8_t* to) {
        for (int i = 0; i < 16; i++) to[i] = from[i % 4 * 4 + i / 4];
    }
};

}  // namespace
}  // namespace dgemma

#define DGEMMA_KERNELS portable_kernels
#include "path.h"
