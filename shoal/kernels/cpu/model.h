// What a pass is given: the model's packed weights, and a batch of tokens. Mirrors engine/packed_model.py.

#pragma once

#include "norms.h"
#include "packed.h"

namespace shoal {

// Pointers stay owned by Python.
struct Layer {
    const float* input_norm;
    const float* query_norm;   // of the query latent; null without query compression
    const float* latent_norm;
    const float* post_norm;
    const float* router_bias;  // null: choose by the scores alone
    Matrix down_projections;   // query (latent) rows, then key-value latent and rotary key
    Matrix query_up;           // ABSENT without query compression
    Matrix key_up;             // count = heads, [latent, plain]
    Matrix value_up;           // count = heads, [value, latent]
    Matrix output;
    Matrix router;             // ABSENT in a dense layer
    Matrix expert_gate_up;     // panels alternate: 16 rows of the gate, 16 of the up projection
    Matrix expert_down;
    Matrix shared_gate_up;     // the dense network in a dense layer; ABSENT without shared experts
    Matrix shared_down;
    Matrix key_expand;         // count = heads, [plain, latent]: what key_up is the transpose of; ABSENT: prompts are not read fast
};

struct Model {
    int64_t num_layers, hidden, heads, plain, rotary, value, latent, query_latent;
    int64_t experts_per_token, groups, top_groups;
    int32_t softmax_scores, group_by_best_two, renormalise;
    float routed_scale, norm_eps, latent_norm_eps, softmax_scale;
    const float* rotations;  // [positions][rotary / 2][cos, sin]
    const float* final_norm;
    const void* embedding;   // [vocabulary, hidden] in float or bfloat16; null: rows come ready in Batch::x
    int32_t embedding_is_bf16;
    Matrix head;
    const Layer* layers;

    int64_t query_width() const { return heads * (plain + rotary); }
    int64_t head_blocks() const { return padded(heads) / LANES; }
    int64_t entry_width() const { return latent + rotary; }
};

struct Batch {
    int64_t tokens;
    const int64_t* token;      // [tokens] into the vocabulary; null: `x` holds the embeddings
    float* x;                  // [tokens, hidden] final hidden states (before the last norm) out
    const int32_t* position;   // place in its sequence
    const int32_t* sequence;   // row of `table`
    const int32_t* table;      // pages of each sequence
    int64_t table_width;
    void* cache;               // [layers][pages][page_tokens][latent + rotary], or of entries in FP8 (fp8_entries.h)
    int32_t reads_bf16;        // attention reads entries as bfloat16, not float32; if they are not in FP8, they are that
    int32_t cache_is_fp8;
    int64_t page_tokens, layer_bytes;
    const int32_t* output_row; // tokens whose logits are wanted
    int64_t outputs;
    float* logits;             // [outputs, vocabulary], or null: draw instead
    int32_t* chosen;           // [layers, tokens, K] experts, or null
    const float* temperature;  // [outputs], above zero
    const double* uniform;     // [outputs] in [0, 1)
    int64_t* drawn;            // [outputs]
    float* drawn_logprob;      // [outputs]
};

inline void rotate(const float* x, const float* rotation, int64_t rotary, float scale, float* out) {
    for (int64_t i = 0; i < rotary; i += 2) {
        const float cos = rotation[i], sin = rotation[i + 1], a = x[i], b = x[i + 1];
        out[i] = (a * cos - b * sin) * scale;
        out[i + 1] = (a * sin + b * cos) * scale;
    }
}

// 16 outputs of one panel into a row of `rows` numbers, whose width need not be whole panels.
inline void put_panel(float* row, int64_t rows, int64_t panel, Lanes v) {
    const int64_t column = panel * LANES, valid = std::min(LANES, rows - column);
    if (valid == LANES)
        put(row + column, v);
    else
        for (int64_t i = 0; i < valid; ++i) row[column + i] = v[i];
}

inline void add_panel(float* row, int64_t rows, int64_t panel, Lanes v) {
    const int64_t column = panel * LANES, valid = std::min(LANES, rows - column);
    if (valid == LANES)
        put(row + column, lanes(row + column) + v);
    else
        for (int64_t i = 0; i < valid; ++i) row[column + i] += v[i];
}

}  // namespace shoal
