// Number by number: rounding, GELU, soft-cap, exponentials. Plain loops that compilers vectorise for the instruction
// set of the isa_*.cpp that includes this; float sums go through 16 lanes that are folded in one order, so that the
// bits are the same everywhere.
#pragma once

#include <math.h>
#include <string.h>

#include "kernels.h"

namespace dgemma {
namespace {

inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, half to even, in the low bits
constexpr uint32_t kMagicBits = 0x4B400000u;
constexpr uint32_t kInfinity = 0x7F800000u;

// e^x to about 2 units in the last place: e^x = 2^n e^r with |r| <= ln(2) / 2, and the series of e^r up to r^7, whose
// remainder is below 6e-9. Zero below -87, where the result would leave the normal numbers; held at 88.
inline float exponential(float x) {
    const float held = x > 88.0f ? 88.0f : (x < -87.0f ? -87.0f : x);
    const float shifted = held * 1.44269504f + kMagic;
    const float n = shifted - kMagic;
    const float r = (held - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts; n times the first is exact
    float sum = 1.98412698e-4f;
    sum = sum * r + 1.38888889e-3f;
    sum = sum * r + 8.33333333e-3f;
    sum = sum * r + 4.16666667e-2f;
    sum = sum * r + 1.66666667e-1f;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    const float power = float_of((bits_of(shifted) - kMagicBits + 127u) << 23);
    return x < -87.0f ? 0.0f : sum * power;
}

// Rounded correctly, as every processor's own instruction is; not std::sqrt, which the linker might share.
inline float root(float x) {
#if defined(__GNUC__)
    return __builtin_sqrtf(x);
#else
    return sqrtf(x);
#endif
}

inline float fold(const float (&lane)[kLanes]) {
    float sums[8];
    for (int i = 0; i < 8; i++) sums[i] = lane[i] + lane[i + 8];
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

// The bits of the largest magnitude: they order as the magnitudes do, and those of NaN and infinity come last.
inline uint32_t largest_bits(const float* x, int64_t n) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t size = bits_of(x[i]) & 0x7FFFFFFFu;
        most = size > most ? size : most;
    }
    return most;
}

float quantise(const float* x, int64_t n, int64_t padded, int8_t* values) {
    const uint32_t most = largest_bits(x, n);
    const float largest = float_of(most);
    // What is not finite makes every product of its row NaN; a row too small to divide by is a row of zeros.
    if (most >= kInfinity || largest < 1e-30f) {
        memset(values, 0, static_cast<size_t>(padded));
        return most >= kInfinity ? float_of(0x7FC00000u) : 0.0f;
    }
    const float factor = 127.0f / largest;
    for (int64_t i = 0; i < n; i++) {
        values[i] = static_cast<int8_t>(static_cast<int32_t>(bits_of(x[i] * factor + kMagic) - kMagicBits));
    }
    memset(values + n, 0, static_cast<size_t>(padded - n));
    return largest / 127.0f;
}

// gelu(x) = x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3): its tanh form without the tanh.
void gate(const float* gates, const float* up, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i++) {
        const float x = gates[i];
        const float twice = x * (1.5957691216f + 0.0713548163f * (x * x));
        out[i] = x / (1.0f + exponential(-twice)) * up[i];
    }
}

void norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
    float lane[kLanes] = {};
    const int64_t whole = n / kLanes * kLanes;
    for (int64_t first = 0; first < whole; first += kLanes) {
        for (int i = 0; i < kLanes; i++) lane[i] = lane[i] + x[first + i] * x[first + i];
    }
    for (int64_t i = whole; i < n; i++) lane[i - whole] = lane[i - whole] + x[i] * x[i];
    const float factor = 1.0f / root(fold(lane) / static_cast<float>(n) + eps);
    if (weight) {
        for (int64_t i = 0; i < n; i++) out[i] = x[i] * factor * weight[i];
    } else {
        for (int64_t i = 0; i < n; i++) out[i] = x[i] * factor;
    }
}

void add_scaled(const float* x, float weight, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i++) out[i] = out[i] + x[i] * weight;
}

bool temper(float* scores, int64_t n, float cap, float heat) {
    const bool finite = largest_bits(scores, n) < kInfinity;
    if (cap > 0.0f) {
        for (int64_t i = 0; i < n; i++) {
            // tanh(y) = 1 - 2 / (e^2y + 1), on |y| so that the two signs are mirrored.
            const uint32_t sign = bits_of(scores[i]) & 0x80000000u;
            const float size = float_of(bits_of(scores[i]) & 0x7FFFFFFFu) / cap;
            const float curve = 1.0f - 2.0f / (exponential(size + size) + 1.0f);
            scores[i] = float_of(bits_of(curve) | sign) * cap;
        }
    }
    for (int64_t i = 0; i < n; i++) scores[i] = scores[i] / heat;
    return finite;
}

void peaks(const float* scores, int64_t n, float* out) {
    for (int64_t first = 0; first < n; first += kBlock) {
        const int64_t end = first + kBlock < n ? first + kBlock : n;
        float most = scores[first];
        if (end - first == kBlock) {
            float lane[kLanes];
            memcpy(lane, scores + first, sizeof(lane));
            for (int j = kLanes; j < kBlock; j += kLanes) {
                for (int i = 0; i < kLanes; i++) {
                    const float score = scores[first + j + i];
                    lane[i] = score > lane[i] ? score : lane[i];
                }
            }
            for (int i = 0; i < kLanes; i++) most = lane[i] > most ? lane[i] : most;
        } else {
            for (int64_t i = first; i < end; i++) most = scores[i] > most ? scores[i] : most;
        }
        out[first / kBlock] = most;
    }
}

// One block of 64.
inline void weigh_block(float* scores, float ref, float& sum, float& moment) {
    float sums[kLanes] = {}, moments[kLanes] = {};
    for (int j = 0; j < kBlock; j += kLanes) {
        for (int i = 0; i < kLanes; i++) {
            // Held well above -infinity: its weight is zero, and so must be weight times distance.
            const float distance = scores[j + i] - ref;
            const float held = distance < -1e4f ? -1e4f : distance;
            const float weight = exponential(held);
            scores[j + i] = weight;
            sums[i] = sums[i] + weight;
            moments[i] = moments[i] + weight * held;
        }
    }
    sum = fold(sums);
    moment = fold(moments);
}

void weigh(float* scores, int64_t n, float ref, float* sums, double* total, double* mean) {
    double all = 0, moments = 0;
    for (int64_t first = 0; first < n; first += kBlock) {
        float sum, moment;
        if (n - first >= kBlock) {
            weigh_block(scores + first, ref, sum, moment);
        } else {
            float rest[kBlock];
            const size_t bytes = static_cast<size_t>(n - first) * sizeof(float);
            for (int i = 0; i < kBlock; i++) rest[i] = float_of(0xFF800000u);  // -infinity: no weight
            memcpy(rest, scores + first, bytes);
            weigh_block(rest, ref, sum, moment);
            memcpy(scores + first, rest, bytes);
        }
        sums[first / kBlock] = sum;
        all += static_cast<double>(sum);
        moments += static_cast<double>(moment);
    }
    *total += all;
    *mean += moments;
}

float quantise_weights(const float* weights, const float* factors, int8_t* values) {
    float scaled[kBlock];
    for (int i = 0; i < kBlock; i++) scaled[i] = weights[i] * factors[i];
    const float largest = float_of(largest_bits(scaled, kBlock));
    if (largest < 1e-30f) {
        memset(values, 0, kBlock);
        return 0.0f;
    }
    const float factor = 127.0f / largest;
    for (int i = 0; i < kBlock; i++) {
        values[i] = static_cast<int8_t>(static_cast<int32_t>(bits_of(scaled[i] * factor + kMagic) - kMagicBits));
    }
    return largest / 127.0f;
}

// 4 words x 4 inputs at a time: quad q of the table (inputs 4q..) has words 4j.. at 16j, and quad j of the result
// (words 4j..) has outputs 4q.. at 16q.
void turn(const uint8_t* quads, uint8_t* out, int64_t stride) {
    for (int q = 0; q < 4; q++) {
        for (int j = 0; j < 4; j++) Isa::turn16(quads + 64 * q + 16 * j, out + stride * j + 16 * q);
    }
}

}  // namespace
}  // namespace dgemma
