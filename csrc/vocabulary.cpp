// The vocabulary step: scores against the table, beliefs, and the table's rows blended by their weights, tile by tile,
// so that the table is read once and scores never leave the cache.
//
// The vocabulary is cut into slices, whatever the number of threads; each slice has sums of its own, which are added
// up in order at the end. Within a slice weights are relative to `ref`, the largest score so far (or that of the
// hinted word, if larger); when it rises, what was summed is scaled down.
#include <math.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <limits>

#include "matrix.h"
#include "wish.h"

namespace dgemma {
namespace {

constexpr int64_t kTile = 512;  // words at a time
constexpr int64_t kTileBlocks = kTile / kBlock;
constexpr int64_t kWordTiles = kTile / kLanes;
constexpr int64_t kSlices = 16;
constexpr int64_t kMostAtOnce = 256;  // positions; more are done in turns

// What is known of one position in one slice.
struct State {
    float ref, best;
    int64_t argmax;
    double total, mean;  // of weights; of weights times their logarithms
    bool finite, blended;
};

struct Sizes {
    int64_t rows, words, hidden, tiles, slices, blocks;

    Sizes(int64_t rows, const Shape& table)
        : rows(rows),
          words(table.outputs),
          hidden((table.inputs + kLanes - 1) / kLanes * kLanes),
          tiles((table.outputs + kTile - 1) / kTile),
          slices(std::min(kSlices, tiles)),
          blocks(tiles * kTileBlocks) {}
    int64_t state_bytes() const { return round_up(slices * rows * static_cast<int64_t>(sizeof(State)), 64); }
    int64_t sum_bytes() const { return round_up(rows * (blocks + tiles) * 4, 64); }
    int64_t blend_bytes() const { return slices * rows * hidden * 4; }
};

struct Step {
    const Kernels& kernels;
    const Shape& shape;
    const DgemmaMatrix& table;
    const DgemmaWish& wish;
    const Panels& panels;
    Sizes sizes;
    int64_t offset;  // of the first of these positions among all
    float floor;     // a block of less than this share of the weights may be left out
    State* states;   // [slices, rows]
    float* sums;     // [rows, blocks], relative to
    float* refs;     // [rows, tiles]
    float* blends;   // [slices, rows, hidden], or null
    std::atomic<int64_t>* blended;

    bool barred(int64_t row) const { return offset + row < wish.barred; }
    int64_t first_tile(int64_t slice) const { return slice * sizes.tiles / sizes.slices; }
};

// Scores of some words at all positions: words first.. (whole tiles of 16) -> [rows][kTile].
void score(const Step& step, int64_t first, int64_t count, float* scores) {
    for (int64_t tile = 0; tile * kLanes < count; tile++) {
        for (int64_t p = 0; p < step.panels.split.count; p++) {
            alignas(64) float products[kMostRows * kLanes];
            const Panel panel = step.panels.at(p);
            multiply(step.kernels, step.shape, step.table, 0, first / kLanes + tile, panel, products);
            float* to = scores + step.panels.split.first(p) * kTile + tile * kLanes;
            for (int r = 0; r < panel.rows; r++) {
                memcpy(to + r * kTile, products + r * kLanes, kLanes * sizeof(float));
            }
        }
    }
}

// Processed scores of up to 64 words at one position; false if one is not finite.
bool score_one(const Step& step, int64_t row, int64_t first, int64_t count, float* scores) {
    int64_t p = 0;
    while (step.panels.split.first(p + 1) <= row) p++;
    const Panel from = step.panels.at(p);
    const int64_t own = row - step.panels.split.first(p);
    uint8_t* room = scratch<uint8_t>(Use::kUnit, panel_bytes(1, step.shape));
    for (int64_t quad = 0; quad < step.shape.padded / kQuad; quad++) {
        memcpy(room + quad * kQuad, from.data + (quad * from.rows + own) * kQuad, kQuad);
    }
    int32_t* starts = reinterpret_cast<int32_t*>(room + step.shape.padded);
    starts[0] = from.starts[own];  // one group: the table has one scale a row
    const Panel panel = {1, reinterpret_cast<int8_t*>(room), starts, from.scales + own};
    for (int64_t tile = first / kLanes; tile * kLanes < first + count; tile++) {
        alignas(64) float products[kLanes];
        multiply(step.kernels, step.shape, step.table, 0, tile, panel, products);
        for (int64_t i = 0; i < kLanes; i++) {
            const int64_t at = tile * kLanes + i - first;
            if (at >= 0 && at < count) scores[at] = products[i];
        }
    }
    return Stretch(step.wish, first, count).apply(step.kernels, scores, step.barred(row));
}

// Raises what the weights are relative to.
void raise(const Step& step, int64_t slice, int64_t row, State& state, float ref) {
    const double apart = static_cast<double>(state.ref) - static_cast<double>(ref), factor = exp(apart);
    state.mean = state.total > 0 ? (state.mean + apart * state.total) * factor : 0;
    state.total *= factor;
    state.ref = ref;
    if (!state.blended) return;
    float* blend = step.blends + (slice * step.sizes.rows + row) * step.sizes.hidden;
    for (int64_t i = 0; i < step.sizes.hidden; i++) blend[i] *= static_cast<float>(factor);
}

// Takes one position's scores of a tile in, and turns them into weights. Whether they count in its blend.
bool absorb(const Step& step, int64_t slice, int64_t tile, int64_t row, const Stretch& stretch, float* scores,
            int64_t count) {
    State& state = step.states[slice * step.sizes.rows + row];
    float* sums = step.sums + row * step.sizes.blocks + tile * kTileBlocks;
    state.finite = state.finite && stretch.apply(step.kernels, scores, step.barred(row));
    if (!state.finite) return false;
    const Largest most = largest(step.kernels, scores, count, sums);
    if (most.score > state.best) {
        state.best = most.score;
        state.argmax = tile * kTile + most.at;
    }
    if (most.score > state.ref) raise(step, slice, row, state, most.score);
    step.refs[row * step.sizes.tiles + tile] = state.ref;
    step.kernels.weigh(scores, count, state.ref, sums, &state.total, &state.mean);
    // All weights together are at least 1, that of the word that `ref` is the score of, and at least `total`.
    const float least = step.floor * static_cast<float>(std::max(1.0, state.total));
    bool counts = false;
    for (int64_t i = 0; i * kBlock < count; i++) counts = counts || sums[i] > least;
    return counts;
}

// Adds the table's rows of a tile, by weights [rows][kTile], to the blends of the positions in `taking`.
void blend(const Step& step, int64_t slice, int64_t first, int64_t count, const int64_t* taking, int64_t taken,
           float* weights) {
    const Kernels& kernels = step.kernels;
    const int offset = kernels.offset[kInt8];
    float factors[kTile] = {};  // the table's scales: one a word
    for (int64_t i = 0; i < count; i++) factors[i] = static_cast<const float*>(step.table.scales)[first + i];
    const Split split(taken, kernels.rows);
    const int64_t values_bytes = kernels.rows * kTile, stride = values_bytes + 8 * kernels.rows * kTileBlocks;
    uint8_t* room = scratch<uint8_t>(Use::kMore, split.count * stride);
    for (int64_t p = 0; p < split.count; p++) {
        int8_t* values = reinterpret_cast<int8_t*>(room + p * stride);
        int32_t* starts = reinterpret_cast<int32_t*>(room + p * stride + values_bytes);
        float* scales = reinterpret_cast<float*>(starts + kernels.rows * kTileBlocks);
        const int rows = split.size(p);
        for (int r = 0; r < rows; r++) {
            float* own = weights + taking[split.first(p) + r] * kTile;
            memset(own + count, 0, static_cast<size_t>(kTile - count) * sizeof(float));
            for (int64_t block = 0; block < kTileBlocks; block++) {
                int8_t rounded[kBlock];
                const int64_t at = block * rows + r;
                scales[at] = kernels.quantise_weights(own + block * kBlock, factors + block * kBlock, rounded);
                int32_t sum = 0;
                for (const int8_t value : rounded) sum += value;
                starts[at] = -offset * sum;
                for (int64_t quad = 0; quad < kBlock / kQuad; quad++) {
                    const int64_t to = ((block * (kBlock / kQuad) + quad) * rows + r) * kQuad;
                    memcpy(values + to, rounded + quad * kQuad, kQuad);
                }
            }
        }
    }
    alignas(64) uint8_t turned[kTile * kLanes];
    memset(turned, 0, sizeof(turned));  // words that a last tile lacks
    const uint8_t* table = step.table.data + first / kLanes * step.shape.tile_bytes;
    for (int64_t column = 0; column < step.sizes.hidden / kLanes; column++) {
        for (int64_t tile = 0; tile * kLanes < count; tile++) {
            const uint8_t* from = table + tile * step.shape.tile_bytes + column * kLanes * kLanes;
            kernels.turn(from, turned + tile * kLanes * kLanes, kLanes * kQuad);
        }
        for (int64_t p = 0; p < split.count; p++) {
            alignas(64) float products[kMostRows * kLanes];
            const int32_t* starts = reinterpret_cast<const int32_t*>(room + p * stride + values_bytes);
            const float* scales = reinterpret_cast<const float*>(starts + kernels.rows * kTileBlocks);
            const Panel panel = {split.size(p), reinterpret_cast<const int8_t*>(room + p * stride), starts, scales};
            kernels.blend(turned, nullptr, nullptr, kTileBlocks, kBlock / kChunk, panel, products);
            for (int r = 0; r < panel.rows; r++) {
                const int64_t row = taking[split.first(p) + r];
                float* to = step.blends + (slice * step.sizes.rows + row) * step.sizes.hidden + column * kLanes;
                for (int i = 0; i < kLanes; i++) to[i] += products[r * kLanes + i];
            }
        }
    }
}

void run_slice(const Step& step, int64_t slice) {
    const Sizes& sizes = step.sizes;
    float* scores = scratch<float>(Use::kFloats, sizes.rows * kTile);
    int64_t* taking = scratch<int64_t>(Use::kCodes, sizes.rows);
    if (step.blends) {
        memset(step.blends + slice * sizes.rows * sizes.hidden, 0,
               static_cast<size_t>(sizes.rows * sizes.hidden) * sizeof(float));
    }
    for (int64_t tile = step.first_tile(slice); tile < step.first_tile(slice + 1); tile++) {
        const int64_t first = tile * kTile, count = std::min(kTile, sizes.words - first);
        const Stretch stretch(step.wish, first, count);
        score(step, first, count, scores);
        int64_t taken = 0;
        for (int64_t row = 0; row < sizes.rows; row++) {
            const bool counts = absorb(step, slice, tile, row, stretch, scores + row * kTile, count);
            if (counts && step.blends) taking[taken++] = row;
        }
        for (int64_t i = 0; i < taken; i++) step.states[slice * sizes.rows + taking[i]].blended = true;
        if (taken) blend(step, slice, first, count, taking, taken, scores);
        *step.blended += taken * ((count + kBlock - 1) / kBlock);
    }
}

// The first word whose cumulative weight is above uniform times all of it: its block by the sums that are there, and
// in the block by scores that are computed once more.
int64_t sample(const Step& step, int64_t row, float ref, float uniform) {
    const Sizes& sizes = step.sizes;
    const float* sums = step.sums + row * sizes.blocks;
    const int64_t blocks = (sizes.words + kBlock - 1) / kBlock;
    auto weight = [&](int64_t block) {
        const float own = step.refs[row * sizes.tiles + block / kTileBlocks];
        return static_cast<double>(sums[block]) * exp(static_cast<double>(own) - static_cast<double>(ref));
    };
    double total = 0, before = 0;
    for (int64_t block = 0; block < blocks; block++) total += weight(block);
    const double target = static_cast<double>(uniform) * total;
    const int64_t block = first_above(blocks, target, before, weight);
    float inside[kBlock], sum;
    const int64_t first = block * kBlock, count = std::min<int64_t>(kBlock, sizes.words - first);
    score_one(step, row, first, count, inside);
    double ignored = 0, same = 0;
    step.kernels.weigh(inside, count, ref, &sum, &ignored, &same);
    return first + first_above(count, target, before, [&](int64_t i) { return inside[i]; });
}

void finish(const Step& step, int64_t row, const float* uniform, const DgemmaBeliefs& out, float* soft) {
    const Sizes& sizes = step.sizes;
    const int64_t at = step.offset + row;
    auto state = [&](int64_t slice) -> State& { return step.states[slice * sizes.rows + row]; };
    State sum = {kLeast, kLeast, 0, 0, 0, true, false};
    for (int64_t slice = 0; slice < sizes.slices; slice++) {
        const State& own = state(slice);
        sum.finite = sum.finite && own.finite;
        sum.ref = std::max(sum.ref, own.ref);
        if (own.best > sum.best) {
            sum.best = own.best;
            sum.argmax = own.argmax;
        }
    }
    for (int64_t slice = 0; slice < sizes.slices; slice++) {
        raise(step, slice, row, state(slice), sum.ref);
        sum.total += state(slice).total;
        sum.mean += state(slice).mean;
    }
    const bool sound = sum.finite && sum.total > 0;
    const float nothing = std::numeric_limits<float>::quiet_NaN();
    out.argmax[at] = out.sampled[at] = sum.argmax;
    out.entropies[at] = sound ? static_cast<float>(log(sum.total) - sum.mean / sum.total) : nothing;
    if (out.totals) out.totals[at] = sound ? static_cast<float>(sum.total) : nothing;
    if (sound && uniform) out.sampled[at] = sample(step, row, sum.ref, uniform[at]);
    if (!soft) return;
    float* to = soft + at * step.shape.inputs;
    for (int64_t i = 0; i < step.shape.inputs; i++) {
        float value = 0;
        for (int64_t slice = 0; slice < sizes.slices; slice++) {
            value += step.blends[(slice * sizes.rows + row) * sizes.hidden + i];
        }
        to[i] = sound ? value / static_cast<float>(sum.total) : nothing;
    }
}

}  // namespace
}  // namespace dgemma

DGEMMA_API int64_t dgemma_vocabulary_room(int64_t rows, const DgemmaMatrix* table, int32_t soft) {
    using namespace dgemma;
    const Sizes sizes(std::min(rows, kMostAtOnce), Shape(*table));
    return sizes.state_bytes() + sizes.sum_bytes() + (soft ? sizes.blend_bytes() : 0);
}

DGEMMA_API void dgemma_vocabulary(const void* hidden, int32_t half, int64_t rows, const DgemmaMatrix* table,
                                  const DgemmaWish* wish, const float* uniform, const int64_t* hint, float tolerance,
                                  const DgemmaBeliefs* out, float* soft, void* room, int64_t* blends,
                                  int32_t threads) {
    using namespace dgemma;
    const Shape shape(*table);
    std::atomic<int64_t> blended{0};
    for (int64_t offset = 0; offset < rows; offset += kMostAtOnce) {
        const int64_t count = std::min(kMostAtOnce, rows - offset);
        const Sizes sizes(count, shape);
        const int64_t bytes = half ? 2 : 4;
        const Rows own = {static_cast<const char*>(hidden) + offset * shape.inputs * bytes, half != 0, shape.inputs};
        const Panels panels(chosen(), own, count, shape, threads);
        char* at = static_cast<char*>(room);
        float* sums = reinterpret_cast<float*>(at + sizes.state_bytes());
        float* first_blend = soft ? reinterpret_cast<float*>(at + sizes.state_bytes() + sizes.sum_bytes()) : nullptr;
        const Step step = {chosen(), shape, *table, *wish, panels, sizes, offset,
                           tolerance / static_cast<float>((sizes.words + kBlock - 1) / kBlock),
                           reinterpret_cast<State*>(at), sums, sums + count * sizes.blocks, first_blend, &blended};
        share(count, threads, [&](int64_t row) {
            float ref = kLeast;
            const int64_t word = hint ? hint[offset + row] : -1;
            if (word >= 0 && score_one(step, row, word, 1, &ref)) {
                ref = std::max(ref, kLeast);  // refused: no bound
            } else {
                ref = kLeast;
            }
            for (int64_t slice = 0; slice < sizes.slices; slice++) {
                step.states[slice * count + row] = {ref, kLeast, 0, 0, 0, true, false};
            }
        });
        share(sizes.slices, threads, [&](int64_t slice) { run_slice(step, slice); });
        share(count, threads, [&](int64_t row) { finish(step, row, uniform, *out, soft); });
    }
    if (blends) *blends = blended;
}
