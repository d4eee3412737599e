// The few vector operations that the kernels share: sixteen lanes, bfloat16, an exponential.
//
// `Lanes` is a GCC/Clang vector type, so the same source becomes AVX-512, AVX2 or plain SSE code; only where an instruction
// has no such spelling (dot products of bfloat16 pairs and of bytes) is there an #if, with a portable form beside it.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace shoal {

using bf16 = uint16_t;

inline float to_float(bf16 value) {
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

// Round to nearest even, as PyTorch does; NaN stays NaN.
inline bf16 to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<bf16>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

inline float load(const float* p, int64_t i) { return p[i]; }
inline float load(const bf16* p, int64_t i) { return to_float(p[i]); }
inline void store(float* p, int64_t i, float v) { p[i] = v; }
inline void store(bf16* p, int64_t i, float v) { p[i] = to_bf16(v); }

// exp to about 2 units in the last place, in a form compilers vectorise (std::exp is a call). Cody-Waite reduction to
// [-ln2/2, ln2/2], Taylor polynomial of degree 7, exponent put in by bits. Underflows to 0 below -87.
inline float fast_exp(float x) {
    const float clamped = std::min(std::max(x, -87.0f), 88.0f);
    const float n = std::nearbyint(clamped * 1.44269504088896341f);
    float r = clamped - n * 0.693359375f;
    r += n * 2.12194440e-4f;
    float poly = 1.0f / 5040;
    poly = poly * r + 1.0f / 720;
    poly = poly * r + 1.0f / 120;
    poly = poly * r + 1.0f / 24;
    poly = poly * r + 1.0f / 6;
    poly = poly * r + 0.5f;
    poly = poly * r + 1.0f;
    poly = poly * r + 1.0f;
    // NaN has no integer; the polynomial carries it to the result.
    const int32_t bits = (static_cast<int32_t>(n == n ? n : 0.0f) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : poly * power;
}

// Sixteen floats, or integers, at any address.
typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t IntLanes __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int64_t LANES = 16;

inline Lanes lanes(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
inline void put(float* p, Lanes v) { *reinterpret_cast<Lanes*>(p) = v; }
inline IntLanes int_lanes(const void* p) { return *reinterpret_cast<const IntLanes*>(p); }
inline Lanes to_lanes(IntLanes v) { return __builtin_convertvector(v, Lanes); }
template <typename V>
inline void grow(V& v, int64_t size) {
    if (static_cast<int64_t>(v.size()) < size) v.resize(size);
}
inline int64_t padded(int64_t count, int64_t grain = LANES) { return (count + grain - 1) / grain * grain; }

inline Lanes max_lanes(Lanes a, Lanes b) { return a > b ? a : b; }

inline float sum_of(Lanes v) {
    float total = 0.0f;
    for (int64_t i = 0; i < LANES; ++i) total += v[i];
    return total;
}

// fast_exp of each lane.
inline Lanes exp_lanes(Lanes x) {
    const Lanes low = Lanes{} - 87.0f, high = Lanes{} + 88.0f, half = Lanes{} + 0.5f;
    const Lanes clamped = x < low ? low : (x > high ? high : x);
    const Lanes scaled = clamped * 1.44269504088896341f;
    const IntLanes n = __builtin_convertvector(scaled + (scaled < 0.0f ? -half : half), IntLanes);
    const Lanes whole = to_lanes(n);
    const Lanes r = clamped - whole * 0.693359375f + whole * 2.12194440e-4f;
    Lanes poly = Lanes{} + 1.0f / 5040;
    poly = poly * r + 1.0f / 720;
    poly = poly * r + 1.0f / 120;
    poly = poly * r + 1.0f / 24;
    poly = poly * r + 1.0f / 6;
    poly = poly * r + 0.5f;
    poly = poly * r + 1.0f;
    poly = poly * r + 1.0f;
    const IntLanes bits = (n + 127) << 23;
    Lanes power;
    std::memcpy(&power, &bits, sizeof power);
    return x < low ? Lanes{} : poly * power;
}

// acc[i] += w[2i] * x[0] + w[2i + 1] * x[1], bfloat16 in, float32 sums. `x` is the pair as 32 bits.
inline Lanes dot_pairs(Lanes acc, IntLanes w, int32_t x) {
#if defined(__AVX512BF16__)
    return (Lanes)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512i)w, (__m512bh)_mm512_set1_epi32(x));
#else
    const IntLanes even_bits = w << 16, odd_bits = w & static_cast<int32_t>(0xFFFF0000u);
    Lanes even, odd;
    std::memcpy(&even, &even_bits, sizeof even);
    std::memcpy(&odd, &odd_bits, sizeof odd);
    const uint32_t bits = static_cast<uint32_t>(x);
    return acc + even * to_float(static_cast<bf16>(bits & 0xFFFFu)) + odd * to_float(static_cast<bf16>(bits >> 16));
#endif
}

// acc[i] += sum over j of w.u8[4i + j] * x.s8[j]. `x` is four signed bytes as 32 bits.
inline IntLanes dot_bytes(IntLanes acc, IntLanes w, int32_t x) {
#if defined(__AVX512VNNI__)
    return (IntLanes)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
    // Products of 16 bits, because those of bytes saturate: even bytes, then odd ones.
    const __m256i even = _mm256_set1_epi32((static_cast<int8_t>(x) & 0xFFFF) | static_cast<int32_t>(static_cast<uint32_t>(static_cast<int8_t>(x >> 16)) << 16));
    const __m256i odd = _mm256_set1_epi32((static_cast<int8_t>(x >> 8) & 0xFFFF) | static_cast<int32_t>(static_cast<uint32_t>(static_cast<int8_t>(x >> 24)) << 16));
    const __m256i mask = _mm256_set1_epi32(0x00FF00FF);
    __m256i part[2];
    std::memcpy(part, &w, sizeof part);
    for (__m256i& bytes : part)
        bytes = _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(bytes, mask), even), _mm256_madd_epi16(_mm256_and_si256(_mm256_srli_epi16(bytes, 8), mask), odd));
    IntLanes sum;
    std::memcpy(&sum, part, sizeof sum);
    return acc + sum;
#else
    for (int j = 0; j < 4; ++j) acc += ((w >> (8 * j)) & 255) * static_cast<int32_t>(static_cast<int8_t>(x >> (8 * j)));
    return acc;
#endif
}

// Round to the nearest integer, ties to even; NaN becomes anything.
inline IntLanes nearest(Lanes v) {
#if defined(__AVX512F__)
    return (IntLanes)_mm512_cvtps_epi32((__m512)v);
#else
    IntLanes out;
    for (int64_t i = 0; i < LANES; ++i) out[i] = std::isfinite(v[i]) ? static_cast<int32_t>(std::nearbyint(v[i])) : 0;
    return out;
#endif
}

// Sixteen integers to sixteen bytes.
inline void put_bytes(int8_t* p, IntLanes v) {
    typedef int8_t Bytes __attribute__((vector_size(16)));
    const Bytes low = __builtin_convertvector(v, Bytes);
    std::memcpy(p, &low, sizeof low);
}

// Rows become columns.
inline void transpose(IntLanes (&row)[LANES]) {
    const IntLanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int32_t step = 1; step < LANES; step *= 2) {
        const IntLanes odd = (lane & step) != 0;  // all bits set in lanes that come from the other row
        const IntLanes low = lane + (odd & (static_cast<int32_t>(LANES) - step)), high = lane + (odd & static_cast<int32_t>(LANES)) + (~odd & step);
        for (int64_t i = 0; i < LANES; ++i) {
            if (i & step) continue;
            const IntLanes a = row[i], b = row[i + step];
            row[i] = __builtin_shuffle(a, b, low);
            row[i + step] = __builtin_shuffle(a, b, high);
        }
    }
}

// Ask for a cache line that will be read soon, into the second level: the first is busy with what is being read now.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

inline int32_t pair_at(const void* p) {
    int32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return bits;
}

// Sixteen floats to sixteen bfloat16.
inline void put_bf16(bf16* p, Lanes v) {
#if defined(__AVX512BF16__)
    const __m256bh low = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &low, sizeof low);
#else
    for (int64_t i = 0; i < LANES; ++i) p[i] = to_bf16(v[i]);
#endif
}

inline void put(bf16* p, Lanes v) { put_bf16(p, v); }

// bfloat16 pairs of two vectors: low halves from `first`, high halves from `second`.
inline IntLanes paired(Lanes first, Lanes second) {
    uint16_t low[LANES], high[LANES];
    put_bf16(low, first), put_bf16(high, second);
    typedef uint16_t Half __attribute__((vector_size(32)));
    typedef uint32_t Wide __attribute__((vector_size(64)));
    Half a, b;
    std::memcpy(&a, low, sizeof a), std::memcpy(&b, high, sizeof b);
    const Wide joined = __builtin_convertvector(a, Wide) | (__builtin_convertvector(b, Wide) << 16);
    IntLanes out;
    std::memcpy(&out, &joined, sizeof out);
    return out;
}

inline Lanes lanes(const bf16* p) {
    uint16_t raw __attribute__((vector_size(32)));
    std::memcpy(&raw, p, sizeof raw);
    typedef uint32_t Wide __attribute__((vector_size(64)));
    const Wide bits = __builtin_convertvector(raw, Wide) << 16;
    Lanes out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

}  // namespace shoal
