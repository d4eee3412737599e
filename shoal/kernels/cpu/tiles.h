// Products through matrix tiles (AMX): 16 inputs times 16 outputs times 64 bytes of columns in one instruction.
//
// Bytes (int8 and int4 weights): blocks of 16 inputs only, what is left goes to the vector unit. Their sums are exact integers,
// so a row has the same bits here and in panel_products.h.
//
// bfloat16: all inputs, a single one too. The tile unit adds products in another order than the vector unit, and a row's bits
// must not depend on how many others come with it; a matrix whose width is no multiple of 32 stays with the vector unit whole.
//
// Compiled in where the processor has AMX (`-march=native` on one), and used if the system lets this process use tiles. No
// machine with AMX was at hand: the instructions have only ever run under tests/kernels/amx_emulator.cpp, which carries out
// each of them by the manual. That shows that the results are right, not how fast they come.

#pragma once

#include "packed.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define SHOAL_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace shoal {

constexpr int64_t TILE_INPUTS = 16, TILE_BYTES = 64, TILE_PAIRS = 32;  // rows of a tile; bytes, and bfloat16, of one of its rows

#if defined(SHOAL_TILES)

// Linux gives the tile registers to a process that asks (ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA).
inline bool tiles_allowed() {
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return allowed;
}

// Tiles 0 to 5, sums and inputs: `rows` rows, inputs `bytes` wide; tiles 6 and 7, weights: as many rows as that has words.
// Set before every use, because PyTorch sets it for its own products.
inline void configure_tiles(int64_t rows, int64_t bytes = TILE_BYTES) {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
        config.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : bytes / 4);
        config.bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? bytes : TILE_BYTES);
    }
    _tile_loadconfig(&config);
}

// Inputs as a tile wants them, one the same distance from the other: as they lie, or gathered.
template <typename T>
inline const T* evenly_spaced(const T* x, int64_t stride, int64_t cols, const int32_t* rows, int64_t num_rows) {
    bool apart = false;
    for (int64_t r = 1; r < num_rows; ++r) apart |= rows[r] != rows[0] + r;
    if (!apart) return x + rows[0] * stride;
    thread_local std::vector<T> gathered;
    grow(gathered, num_rows * stride);
    for (int64_t r = 0; r < num_rows; ++r) std::memcpy(gathered.data() + r * stride, x + rows[r] * stride, cols * sizeof(T));
    return gathered.data();
}

inline void clear_four() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Tiles 0 to 3 as [4][TILE_INPUTS][LANES] sums in floating point.
inline void store_four(float* to) {
    _tile_stored(0, to, TILE_BYTES);
    _tile_stored(1, to + TILE_INPUTS * LANES, TILE_BYTES);
    _tile_stored(2, to + 2 * TILE_INPUTS * LANES, TILE_BYTES);
    _tile_stored(3, to + 3 * TILE_INPUTS * LANES, TILE_BYTES);
}

// ---- bytes ----

using TileSums = int32_t[2][TILE_INPUTS][LANES];  // [panel][input][output]

// Signed inputs times unsigned weights over one group of columns, `step` at a time; lines of weights lie `line_step` bytes apart.
inline void tile_sums(const int8_t* x, int64_t stride, const uint8_t* first, const uint8_t* second, int64_t line_step, int64_t group, int64_t step,
                      TileSums& sums) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t k = 0; k < group; k += step) {
        _tile_loadd(4, x + k, stride);
        _tile_loadd(6, first + k / 4 * line_step, line_step);
        _tile_loadd(7, second + k / 4 * line_step, line_step);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
    }
    _tile_stored(0, sums[0], TILE_BYTES);
    _tile_stored(1, sums[1], TILE_BYTES);
}

// Nibbles of a panel as bytes [cols / 4][16][4].
inline void unpack_nibbles(const Panel& panel, int64_t cols, uint8_t* to) {
    for (int64_t k = 0; k < cols / 8; ++k) {
        const IntLanes both = int_lanes(panel.data + k * panel.step), low = both & 0x0F0F0F0F, high = (both >> 4) & 0x0F0F0F0F;
        std::memcpy(to + k * 128, &low, sizeof low);
        std::memcpy(to + k * 128 + 64, &high, sizeof high);
    }
}

// How many of so many inputs of bytes go through tiles.
inline int64_t inputs_by_tiles(const Matrix& w, int64_t num_rows) {
    const bool fits = (w.format == I8 || w.format == I4) && (w.group == 32 || w.group % TILE_BYTES == 0);
    return fits && num_rows >= TILE_INPUTS && tiles_allowed() ? num_rows / TILE_INPUTS * TILE_INPUTS : 0;
}

// `use(row number, panel, sixteen outputs)` for panels `first` and `first + 1` and the first `count` inputs, a multiple of 16.
template <typename Use>
inline void for_tiles(const Matrix& w, int64_t which, int64_t first, const Inputs& x, const int32_t* rows, int64_t count, Use&& use) {
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
    configure_tiles(TILE_INPUTS, step);
    for (int64_t block = 0; block < count; block += TILE_INPUTS) {
        const int32_t* row = rows + block;
        const int8_t* input = evenly_spaced(x.bytes, x.stride, x.cols, row, TILE_INPUTS);
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

// ---- bfloat16 ----

// Whether a matrix goes through tiles, with however many inputs.
inline bool pairs_by_tiles(const Matrix& w) { return w.format == BF16 && w.cols % TILE_PAIRS == 0 && tiles_allowed(); }

using PairSums = float[4][TILE_INPUTS][LANES];

// One block of inputs and up to four panels of a bundle, which stream once.
inline void pair_sums(const bf16* x, int64_t stride, const Panel& panel, int64_t panels, int64_t cols, PairSums& sums) {
    clear_four();
    const uint8_t* line = panel.data;
    for (int64_t k = 0; k < cols; k += TILE_PAIRS, line += TILE_PAIRS / 2 * panel.step) {
        _tile_loadd(4, x + k, stride * 2);
        _tile_loadd(6, line, panel.step);
        _tile_dpbf16ps(0, 4, 6);
        if (panels < 2) continue;
        _tile_loadd(7, line + LINE, panel.step);
        _tile_dpbf16ps(1, 4, 7);
        if (panels < 3) continue;
        _tile_loadd(6, line + 2 * LINE, panel.step);
        _tile_dpbf16ps(2, 4, 6);
        if (panels < 4) continue;
        _tile_loadd(7, line + 3 * LINE, panel.step);
        _tile_dpbf16ps(3, 4, 7);
    }
    store_four(sums[0][0]);
}

// Two whole blocks of inputs and two panels: half as many loads of weights, which come from the second-level cache. The same
// sums in the same order; [block * 2 + panel].
inline void pair_sums_of_two(const bf16* x, const bf16* y, int64_t stride, const Panel& panel, int64_t cols, PairSums& sums) {
    clear_four();
    const uint8_t* line = panel.data;
    for (int64_t k = 0; k < cols; k += TILE_PAIRS, line += TILE_PAIRS / 2 * panel.step) {
        _tile_loadd(4, x + k, stride * 2);
        _tile_loadd(5, y + k, stride * 2);
        _tile_loadd(6, line, panel.step);
        _tile_loadd(7, line + LINE, panel.step);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    store_four(sums[0][0]);
}

// `use(row number, panel, sixteen outputs)` for panels of [first, last) and all inputs; panels of one row ascend.
template <typename Use>
inline void for_pair_tiles(const Matrix& w, int64_t which, int64_t first, int64_t last, const Inputs& x, const int32_t* rows, int64_t num_rows,
                           Use&& use) {
    if (!num_rows) return;
    const bf16* input = evenly_spaced(x.pairs, x.stride, x.cols, rows, num_rows);
    alignas(64) PairSums sums;
    const int64_t twice = num_rows / (2 * TILE_INPUTS) * 2 * TILE_INPUTS;
    for (int64_t panel = first; panel < last;) {
        const int64_t count = std::min(BUNDLE - panel % BUNDLE, last - panel);
        if (twice) configure_tiles(TILE_INPUTS);
        for (int64_t pair = 0; twice && pair + 2 <= count; pair += 2)
            for (int64_t block = 0; block < twice; block += 2 * TILE_INPUTS) {
                const bf16* x_block = input + block * x.stride;
                pair_sums_of_two(x_block, x_block + TILE_INPUTS * x.stride, x.stride, w.panel(which, panel + pair), x.cols, sums);
                for (int64_t r = 0; r < 2 * TILE_INPUTS; ++r)
                    for (int64_t p = 0; p < 2; ++p) use(block + r, panel + pair + p, lanes(sums[r / TILE_INPUTS * 2 + p][r % TILE_INPUTS]));
            }
        // What is left: the last inputs for all panels, and an odd panel for all inputs.
        const int64_t odd = twice ? count / 2 * 2 : 0;
        for (int64_t block = odd == count ? twice : 0; block < num_rows; block += TILE_INPUTS) {
            const int64_t here = std::min(TILE_INPUTS, num_rows - block), from = block < twice ? odd : 0;
            configure_tiles(here);
            pair_sums(input + block * x.stride, x.stride, w.panel(which, panel + from), count - from, x.cols, sums);
            for (int64_t r = 0; r < here; ++r)
                for (int64_t p = from; p < count; ++p) use(block + r, panel + p, lanes(sums[p - from][r]));
        }
        panel += count;
    }
}

#else

inline bool tiles_allowed() { return false; }
inline int64_t inputs_by_tiles(const Matrix&, int64_t) { return 0; }
template <typename Use>
inline void for_tiles(const Matrix&, int64_t, int64_t, const Inputs&, const int32_t*, int64_t, Use&&) {}
inline bool pairs_by_tiles(const Matrix&) { return false; }
template <typename Use>
inline void for_pair_tiles(const Matrix&, int64_t, int64_t, int64_t, const Inputs&, const int32_t*, int64_t, Use&&) {}

#endif

}  // namespace shoal
