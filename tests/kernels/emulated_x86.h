// The instructions of AVX-512 VNNI and AVX-VNNI that the kernels use, in plain C++, so that their paths can be tested
// on processors that lack them: included before everything else.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace emulated {

struct Ints {
    int32_t lane[16];
};
struct Floats {
    float lane[16];
};

// 64 unsigned bytes times 64 signed ones, added in fours.
inline Ints dot(Ints sums, Ints a, Ints b, int lanes) {
    uint8_t left[64];
    int8_t right[64];
    memcpy(left, &a, 64);
    memcpy(right, &b, 64);
    for (int i = 0; i < 4 * lanes; i++) sums.lane[i / 4] += left[i] * right[i];
    return sums;
}
inline __m256i dot256(__m256i sums, __m256i a, __m256i b) {
    Ints all[3] = {};
    memcpy(&all[0], &sums, 32);
    memcpy(&all[1], &a, 32);
    memcpy(&all[2], &b, 32);
    all[0] = dot(all[0], all[1], all[2], 8);
    memcpy(&sums, &all[0], 32);
    return sums;
}
inline Ints dot512(Ints sums, Ints a, Ints b) { return dot(sums, a, b, 16); }
template <class Value, class Work>
Value each(Work&& work) {
    Value out;
    for (int i = 0; i < 16; i++) out.lane[i] = work(i);
    return out;
}
template <class Value>
Value load(const void* from) {
    Value out;
    memcpy(&out, from, 64);
    return out;
}
inline Ints fill(int32_t value) {
    return each<Ints>([&](int) { return value; });
}
inline Ints fill8(int value) { return fill(0x01010101 * value); }
inline Floats fill(float value) {
    return each<Floats>([&](int) { return value; });
}
inline void store(float* to, Floats value) { memcpy(to, &value, 64); }
inline Floats floats(Ints x) {
    return each<Floats>([&](int i) { return static_cast<float>(x.lane[i]); });
}
inline Floats add(Floats x, Floats y) {
    return each<Floats>([&](int i) { return x.lane[i] + y.lane[i]; });
}
inline Floats mul(Floats x, Floats y) {
    return each<Floats>([&](int i) { return x.lane[i] * y.lane[i]; });
}
inline Ints both(Ints x, Ints y) {
    return each<Ints>([&](int i) { return x.lane[i] & y.lane[i]; });
}
inline Ints widen8(__m128i x) {
    int8_t parts[16];
    memcpy(parts, &x, 16);
    return each<Ints>([&](int i) { return static_cast<int32_t>(parts[i]); });
}
inline Ints left32(Ints x, int by) {
    return each<Ints>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(x.lane[i]) << by); });
}
inline Floats as_floats(Ints x) { return load<Floats>(&x); }
inline Ints four_times(__m128i x) {
    Ints out;
    for (int i = 0; i < 4; i++) memcpy(out.lane + 4 * i, &x, 16);
    return out;
}
inline Ints shuffle(Ints table, Ints places) {
    uint8_t from[64], at[64], out[64];
    memcpy(from, &table, 64);
    memcpy(at, &places, 64);
    for (int i = 0; i < 64; i++) out[i] = at[i] & 0x80 ? 0 : from[i / 16 * 16 + (at[i] & 15)];
    return load<Ints>(out);
}
inline Ints shift16(Ints x, int by) {
    uint16_t parts[32];
    memcpy(parts, &x, 64);
    for (uint16_t& part : parts) part = static_cast<uint16_t>(part >> by);
    return load<Ints>(parts);
}

}  // namespace emulated

#define __m512i emulated::Ints
#define __m512 emulated::Floats
#define _mm512_set1_epi32 emulated::fill
#define _mm512_set1_epi8 emulated::fill8
#define _mm512_set1_ps emulated::fill
#define _mm512_loadu_ps emulated::load<emulated::Floats>
#define _mm512_loadu_si512 emulated::load<emulated::Ints>
#define _mm512_storeu_ps emulated::store
#define _mm512_cvtepi32_ps emulated::floats
#define _mm512_add_ps emulated::add
#define _mm512_mul_ps emulated::mul
#define _mm512_and_si512 emulated::both
#define _mm512_srli_epi16 emulated::shift16
#define _mm512_cvtepi8_epi32 emulated::widen8
#define _mm512_slli_epi32 emulated::left32
#define _mm512_castsi512_ps emulated::as_floats
#define _mm512_broadcast_i32x4 emulated::four_times
#define _mm512_shuffle_epi8 emulated::shuffle
#define _mm512_dpbusd_epi32 emulated::dot512
#define _mm256_dpbusd_avx_epi32 emulated::dot256
