// Cached latents in FP8: E4M3 codes of the latent, a float32 scale for every 128 of them, the rotary key in bfloat16.
//
// Reference: quant/latent.py, whose bytes these are; compared in tests/engine/test_fp8_cache.py.

#pragma once

#include "panel_products.h"

namespace shoal {

constexpr float E4M3_TOP = 448.0f;

inline int64_t fp8_entry_bytes(int64_t latent, int64_t rotary) { return latent + padded(latent, FP8_BLOCK) / FP8_BLOCK * 4 + rotary * 2; }

// The nearest E4M3 codes, ties to even, of numbers within its range; NaN stays NaN.
inline IntLanes e4m3_codes(Lanes x) {
    const IntLanes bits = (IntLanes)x, size = bits & 0x7FFFFFFF, sign = (bits >> 24) & 0x80;
    const IntLanes normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3);
    const IntLanes subnormal = nearest((Lanes)size * 512.0f);
    const IntLanes code = size < 0x3C800000 ? subnormal : normal > 0x7E ? IntLanes{} + 0x7E : normal;
    return (size > 0x7F800000 ? IntLanes{} + 0x7F : code) | sign;
}

// `row` is [latent + rotary], latent in whole vectors.
inline void pack_entry(const float* row, int64_t latent, int64_t rotary, uint8_t* to) {
    uint8_t* scales = to + latent;
    for (int64_t first = 0; first < latent; first += FP8_BLOCK) {
        const int64_t last = std::min(latent, first + FP8_BLOCK);
        Lanes tops = {};
        for (int64_t c = first; c < last; c += LANES) {
            const Lanes v = lanes(row + c);
            tops = max_lanes(tops, v < 0.0f ? -v : v);
        }
        float top = 0.0f;
        for (int64_t i = 0; i < LANES; ++i) top = std::max(top, tops[i]);
        const float scale = top > 0.0f ? top / E4M3_TOP : 1.0f;
        for (int64_t c = first; c < last; c += LANES) put_bytes(reinterpret_cast<int8_t*>(to + c), e4m3_codes(lanes(row + c) / scale));
        std::memcpy(scales + first / FP8_BLOCK * 4, &scale, sizeof scale);
    }
    bf16* key = reinterpret_cast<bf16*>(scales + padded(latent, FP8_BLOCK) / FP8_BLOCK * 4);
    for (int64_t i = 0; i < rotary; ++i) {
        const bf16 value = to_bf16(row[latent + i]);
        std::memcpy(key + i, &value, sizeof value);
    }
}

// Sixteen codes times a scale. The bits of a code, moved into place, are a float32 2^120 too small.
inline Lanes e4m3_floats(const uint8_t* code, float scale) {
#if defined(__AVX512F__)
    __m128i bytes;
    std::memcpy(&bytes, code, sizeof bytes);
    const IntLanes wide = (IntLanes)_mm512_cvtepu8_epi32(bytes);
#else
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    Bytes bytes;
    std::memcpy(&bytes, code, sizeof bytes);
    const IntLanes wide = __builtin_convertvector(bytes, IntLanes);
#endif
    const IntLanes size = wide & 0x7F, bits = (size << 20) | ((wide ^ size) << 24);
    constexpr float HALFWAY = 1152921504606846976.0f;  // 2^60, since 2^120 times a large scale would be too much for one factor
    const Lanes value = (Lanes)bits * HALFWAY * (scale * HALFWAY);
    return size == 0x7F ? Lanes{} + NAN : value;
}

// What an entry stands for, as float32 or rounded to bfloat16.
template <typename T>
inline void unpack_entry(const uint8_t* from, int64_t latent, int64_t rotary, T* to) {
    const uint8_t* scales = from + latent;
    for (int64_t first = 0; first < latent; first += FP8_BLOCK) {
        float scale;
        std::memcpy(&scale, scales + first / FP8_BLOCK * 4, sizeof scale);
        for (int64_t c = first; c < std::min(latent, first + FP8_BLOCK); c += LANES) put(to + c, e4m3_floats(from + c, scale));
    }
    const uint8_t* key = scales + padded(latent, FP8_BLOCK) / FP8_BLOCK * 4;
    for (int64_t i = 0; i < rotary; ++i) {
        bf16 value;
        std::memcpy(&value, key + 2 * i, sizeof value);
        if constexpr (sizeof(T) == 2) to[latent + i] = value;
        else to[latent + i] = to_float(value);
    }
}

}  // namespace shoal
