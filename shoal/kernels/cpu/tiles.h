// Many rows of bytes through matrix tiles (AMX): 16 inputs times 16 outputs times 64 columns in one instruction.
//
// Only for int8 and int4 weights: their sums are exact integers, so a row has the same bits here and in panel_products.h. The
// tile unit adds bfloat16 products in another order than the vector unit; bfloat16 stays there, or a row's bits would depend
// on how many others came with it.
//
// Compiled in where the processor has AMX (`-march=native` on one), and used if the system lets this process use tiles. It
// has never run on such a processor: the machine it was written on has none. What is tested (level `tiles` in build.py) is
// everything around the instructions, with plain loops in their place.

#pragma once

#include "packed.h"

#if defined(__AMX_INT8__) || defined(SHOAL_EMULATED_TILES)
#define SHOAL_TILES
#if defined(__AMX_INT8__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace shoal {

constexpr int64_t TILE_INPUTS = 16, TILE_BYTES = 64;

#if defined(SHOAL_TILES)

using TileSums = int32_t[2][TILE_INPUTS][LANES];  // [panel][input][output]

#if defined(__AMX_INT8__)

// Linux gives the tile registers to a process that asks (ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA).
inline bool tiles_allowed() {
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return allowed;
}

// Tiles 0 and 1: sums; 2: inputs; 3 and 4: weights. Set before every use, because PyTorch sets it for its own products.
inline void configure_tiles(int64_t step) {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 2; ++tile) config.rows[tile] = TILE_INPUTS, config.bytes[tile] = TILE_BYTES;
    config.rows[2] = TILE_INPUTS, config.bytes[2] = static_cast<uint16_t>(step);
    for (int tile = 3; tile < 5; ++tile) config.rows[tile] = static_cast<uint8_t>(step / 4), config.bytes[tile] = TILE_BYTES;
    _tile_loadconfig(&config);
}

// Signed inputs times unsigned weights over one group of columns, `step` at a time; lines of weights lie `line_step` bytes apart.
inline void tile_sums(const int8_t* x, int64_t stride, const uint8_t* first, const uint8_t* second, int64_t line_step, int64_t group, int64_t step,
                      TileSums& sums) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t k = 0; k < group; k += step) {
        _tile_loadd(2, x + k, stride);
        _tile_loadd(3, first + k / 4 * line_step, line_step);
        _tile_loadd(4, second + k / 4 * line_step, line_step);
        _tile_dpbsud(0, 2, 3);
        _tile_dpbsud(1, 2, 4);
    }
    _tile_stored(0, sums[0], TILE_BYTES);
    _tile_stored(1, sums[1], TILE_BYTES);
}

#else

inline bool tiles_allowed() { return true; }
inline void configure_tiles(int64_t) {}
inline void tile_sums(const int8_t* x, int64_t stride, const uint8_t* first, const uint8_t* second, int64_t line_step, int64_t group, int64_t, TileSums& sums) {
    for (int64_t r = 0; r < TILE_INPUTS; ++r)
        for (int64_t i = 0; i < LANES; ++i) {
            sums[0][r][i] = sums[1][r][i] = 0;
            for (int64_t k = 0; k < group; ++k) {
                const int64_t at = k / 4 * line_step + i * 4 + k % 4;
                sums[0][r][i] += x[r * stride + k] * first[at];
                sums[1][r][i] += x[r * stride + k] * second[at];
            }
        }
}

#endif

// Nibbles of a panel as bytes [cols / 4][16][4].
inline void unpack_nibbles(const Panel& panel, int64_t cols, uint8_t* to) {
    for (int64_t k = 0; k < cols / 8; ++k) {
        const IntLanes both = int_lanes(panel.data + k * panel.step), low = both & 0x0F0F0F0F, high = (both >> 4) & 0x0F0F0F0F;
        std::memcpy(to + k * 128, &low, sizeof low);
        std::memcpy(to + k * 128 + 64, &high, sizeof high);
    }
}

// How many of so many inputs go through tiles.
inline int64_t inputs_by_tiles(const Matrix& w, int64_t num_rows) {
    const bool fits = (w.format == I8 || w.format == I4) && (w.group == 32 || w.group % TILE_BYTES == 0);
    return fits && num_rows >= TILE_INPUTS && tiles_allowed() ? num_rows / TILE_INPUTS * TILE_INPUTS : 0;
}

// `use(row number, panel, sixteen outputs)` for panels `first` and `first + 1` and the first `count` inputs, a multiple of 16.
template <typename Use>
inline void for_tiles(const Matrix& w, int64_t which, int64_t first, const Inputs& x, const int32_t* rows, int64_t count, Use&& use) {
    thread_local std::vector<int8_t> gathered;
    thread_local std::vector<uint8_t> unpacked;
    const Panel panel[2] = {w.panel(which, first), w.panel(which, first + 1)};
    const uint8_t* bytes[2] = {panel[0].data, panel[1].data};
    int64_t line_step = panel[0].step;
    if (w.format == I4) {
        grow(unpacked, 2 * x.cols * LANES);
        line_step = LINE;
        for (int p = 0; p < 2; ++p) {
            unpack_nibbles(panel[p], x.cols, unpacked.data() + p * x.cols * LANES);
            bytes[p] = unpacked.data() + p * x.cols * LANES;
        }
    }
    const int32_t offset = w.format == I4 ? 8 : 128;
    const int64_t step = std::min<int64_t>(TILE_BYTES, w.group);
    configure_tiles(step);
    for (int64_t block = 0; block < count; block += TILE_INPUTS) {
        const int32_t* row = rows + block;
        const int8_t* input = x.bytes + row[0] * x.stride;
        bool apart = false;
        for (int64_t r = 1; r < TILE_INPUTS; ++r) apart |= row[r] != row[0] + r;
        if (apart) {
            grow(gathered, TILE_INPUTS * x.stride);
            for (int64_t r = 0; r < TILE_INPUTS; ++r) std::memcpy(gathered.data() + r * x.stride, x.bytes + row[r] * x.stride, x.cols);
            input = gathered.data();
        }
        Lanes acc[TILE_INPUTS][2] = {};
        alignas(64) TileSums sums;
        for (int64_t g = 0; g < x.groups; ++g) {
            const int64_t skipped = g * w.group / 4 * line_step;
            tile_sums(input + g * w.group, x.stride, bytes[0] + skipped, bytes[1] + skipped, line_step, w.group, step, sums);
            for (int p = 0; p < 2; ++p) {
                const uint8_t* scale = panel[p].scale + g * panel[p].scale_step;
                const Lanes weight_scale = w.format == I4 ? lanes(reinterpret_cast<const bf16*>(scale)) : Lanes{};
                for (int64_t r = 0; r < TILE_INPUTS; ++r) {
                    const int64_t at = row[r] * x.groups + g;
                    const Lanes part = to_lanes(int_lanes(sums[p][r]) - offset * x.sums[at]);
                    if (w.format == I4) acc[r][p] += part * (weight_scale * x.scales[at]);
                    else acc[r][p] += part * x.scales[at];
                }
            }
        }
        for (int64_t r = 0; r < TILE_INPUTS; ++r)
            for (int p = 0; p < 2; ++p) {
                Lanes out = acc[r][p];
                if (w.format == I8) out = out * lanes(reinterpret_cast<const float*>(panel[p].scale));
                use(block + r, first + p, out);
            }
    }
}

#else

inline int64_t inputs_by_tiles(const Matrix&, int64_t) { return 0; }
template <typename Use>
inline void for_tiles(const Matrix&, int64_t, int64_t, const Inputs&, const int32_t*, int64_t, Use&&) {}

#endif

}  // namespace shoal
