// One packed product alone, and the rate at which this machine reads memory.

#include "model.h"
#include "panel_products.h"

extern "C" {

// y = x W^T for one packed matrix: the product alone, for tests, benchmarks and layers outside the fused pass.
void packed_linear(const shoal::Matrix* w, const float* x, int64_t rows, float* y) {
    shoal::InputBuffer buffer;
    buffer.reserve(rows, *w);
    const shoal::Inputs inputs = buffer.of(*w);
    std::vector<int32_t> row(rows);
    for (int64_t r = 0; r < rows; ++r) row[r] = static_cast<int32_t>(r);
    const int64_t panels = w->panels();
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) inputs.set(r, x + r * w->cols, w->cols);
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < panels; first += 4)
            shoal::for_panels(*w, 0, first, std::min(panels, first + 4), inputs, row.data(), rows, [&](int64_t r, int64_t p, shoal::Lanes v) {
                shoal::put_panel(y + r * w->rows, w->rows, p, v);
            });
    }
}

// Read an array of 32-bit words once with all threads; what it returns only keeps the compiler honest. The limit of bandwidth.
int32_t stream_words(const int32_t* words, int64_t count) {
    int32_t total = 0;
#pragma omp parallel reduction(^ : total)
    {
        shoal::IntLanes mixed[8] = {};
#pragma omp for schedule(static)
        for (int64_t block = 0; block < count / (8 * shoal::LANES); ++block)
            for (int64_t j = 0; j < 8; ++j) mixed[j] ^= shoal::int_lanes(words + (block * 8 + j) * shoal::LANES);
        for (int64_t j = 0; j < 8; ++j) total ^= mixed[j][0];
    }
    return total;
}

}  // extern "C"
