// Words of 32 bits, which hold one float, two bfloat16, four bytes or eight int4 codes of a row, into panels (packed.h), in one pass:
// read along rows, turned sixteen by sixteen in registers, written line by line to where they stay.
//
// Reference: kernels/packed.py, which does it in PyTorch; compared in tests/kernels/test_packed.py.

#include "packed.h"

namespace {

using namespace shoal;

// Words of eight codes side by side as words whose bytes hold codes four columns apart: a perfect shuffle of the nibbles, in two
// exchanges, of the middle bytes and then of the middle nibbles of both halves.
IntLanes apart(IntLanes words) {
    auto exchange = [&](int32_t shift, int32_t moved) {
        const IntLanes both = (words ^ (words >> shift)) & moved;
        words ^= both ^ (both << shift);
    };
    exchange(8, 0x0000FF00);
    exchange(4, 0x00F000F0);
    return words;
}

}  // namespace

extern "C" {

// `words` [count][rows][width]; `lines` words of a panel's row, those beyond `width` being `filler` like the rows that fill the
// last panel; `out` [count][panels * lines][16] in bundles. `flip` is added to every word bit by bit, `nibbles` moves int4 codes
// to where they are unpacked.
void lay_out_words(const int32_t* words, int64_t count, int64_t rows, int64_t width, int64_t lines, int32_t filler, int32_t flip, int32_t nibbles,
                   int32_t* out) {
    const int64_t panels = padded(rows) / LANES, bundles = (panels + BUNDLE - 1) / BUNDLE;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t which = 0; which < count; ++which)
        for (int64_t bundle = 0; bundle < bundles; ++bundle) {
            const int64_t first = bundle * BUNDLE, side = std::min(BUNDLE, panels - first);
            const int32_t* from = words + which * rows * width;
            int32_t* to = out + (which * panels + first) * lines * LANES;
            for (int64_t line = 0; line < lines; line += LANES)
                for (int64_t p = 0; p < side; ++p) {
                    IntLanes square[LANES];
                    for (int64_t r = 0; r < LANES; ++r) {
                        const int64_t row = (first + p) * LANES + r, there = row < rows ? std::clamp<int64_t>(width - line, 0, LANES) : 0;
                        square[r] = IntLanes{} + filler;
                        if (there == LANES) square[r] = int_lanes(from + row * width + line);
                        else if (there) std::memcpy(&square[r], from + row * width + line, there * sizeof(int32_t));
                    }
                    transpose(square);
                    for (int64_t k = 0; k < std::min(LANES, lines - line); ++k) {
                        const IntLanes done = (nibbles ? apart(square[k]) : square[k]) ^ flip;
                        std::memcpy(to + ((line + k) * side + p) * LANES, &done, sizeof done);
                    }
                }
        }
}

}  // extern "C"
