// Beliefs from scores that are there as float32: position by position, while its scores are in the cache.
#include <math.h>
#include <string.h>

#include <limits>

#include "team.h"
#include "wish.h"

namespace dgemma {

Stretch::Stretch(const DgemmaWish& wish, int64_t first, int64_t count) : wish_(wish), count_(count) {
    for (int64_t i = 0; i < wish.biases; i++) {
        const int64_t at = wish.words[i] - first;
        if (at >= 0 && at < count) biases_.push_back({at, wish.bias[i]});
    }
    for (int64_t i = 0; i < wish.ends; i++) {
        const int64_t at = wish.end[i] - first;
        if (at >= 0 && at < count) ends_.push_back(at);
    }
}

bool Stretch::apply(const Kernels& kernels, float* scores, bool barred) const {
    std::vector<float> biased;
    for (const Bias& bias : biases_) {
        float score = scores[bias.at];
        kernels.temper(&score, 1, wish_.cap, 1.0f);
        biased.push_back((score + bias.value) / wish_.heat);
    }
    const bool finite = kernels.temper(scores, count_, wish_.cap, wish_.heat);
    for (size_t i = 0; i < biased.size(); i++) scores[biases_[i].at] = biased[i];
    if (barred) {
        for (const int64_t at : ends_) scores[at] = -std::numeric_limits<float>::infinity();
    }
    return finite;
}

Largest largest(const Kernels& kernels, const float* scores, int64_t count, float* peaks) {
    kernels.peaks(scores, count, peaks);
    Largest out;
    int64_t block = -1;
    for (int64_t i = 0; i < (count + kBlock - 1) / kBlock; i++) {
        if (peaks[i] > out.score) {
            out.score = peaks[i];
            block = i;
        }
    }
    if (block < 0) return out;
    out.at = block * kBlock;
    while (scores[out.at] != out.score) out.at++;
    return out;
}

namespace {

void read(float* scores, int64_t rows, int64_t words, const DgemmaWish& wish, const float* uniform,
          const DgemmaBeliefs& out, int threads) {
    const Kernels& kernels = chosen();
    const Stretch all(wish, 0, words);
    const int64_t blocks = (words + kBlock - 1) / kBlock;
    share(rows, threads, [&](int64_t row) {
        float* own = scores + row * words;
        float* sums = scratch<float>(Use::kFloats, blocks);
        const bool finite = all.apply(kernels, own, row < wish.barred);
        const Largest most = finite ? largest(kernels, own, words, sums) : Largest();
        double total = 0, mean = 0;
        if (most.score > kLeast) {
            kernels.weigh(own, words, most.score, sums, &total, &mean);
        } else {
            memset(own, 0, static_cast<size_t>(words) * sizeof(float));
        }
        out.argmax[row] = out.sampled[row] = most.at;
        // Without a number among the scores: 0 / 0.
        out.entropies[row] = static_cast<float>(log(total) - mean / total);
        if (out.totals) out.totals[row] = static_cast<float>(total);
        if (!uniform || !(total > 0)) return;
        const double target = static_cast<double>(uniform[row]) * total;
        double before = 0;
        const int64_t block = first_above(blocks, target, before, [&](int64_t i) { return sums[i]; });
        const float* inside = own + block * kBlock;
        const int64_t count = words - block * kBlock < kBlock ? words - block * kBlock : kBlock;
        out.sampled[row] =
            block * kBlock + first_above(count, target, before, [&](int64_t i) { return inside[i]; });
    });
}

}  // namespace
}  // namespace dgemma

DGEMMA_API void dgemma_read(float* scores, int64_t rows, int64_t words, const DgemmaWish* wish, const float* uniform,
                            const DgemmaBeliefs* out, int32_t threads) {
    dgemma::read(scores, rows, words, *wish, uniform, *out, threads);
}
