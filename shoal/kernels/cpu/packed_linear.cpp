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
            shoal::for_panels(*w, 0, first, std::min(panels, first + 4), inputs, row.data(), rows, nullptr, [&](int64_t r, int64_t p, shoal::Lanes v) {
                shoal::put_panel(y + r * w->rows, w->rows, p, v);
            });
    }
}

// Read an array once with all threads; what it returns only keeps the compiler honest. The measured limit of bandwidth.
float stream_sum(const float* x, int64_t count) {
    float total = 0.0f;
#pragma omp parallel reduction(+ : total)
    {
        shoal::Lanes sums[8] = {};
#pragma omp for schedule(static)
        for (int64_t block = 0; block < count / (8 * shoal::LANES); ++block)
            for (int64_t j = 0; j < 8; ++j) sums[j] += shoal::lanes(x + (block * 8 + j) * shoal::LANES);
        for (int64_t j = 0; j < 8; ++j) total += sums[j][0];
    }
    return total;
}

}  // extern "C"
