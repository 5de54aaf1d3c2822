// What a request wants of scores, applied to a stretch of words at one position.
#pragma once

#include <stdint.h>

#include <vector>

#include "dgemma_cpu.h"
#include "kernels.h"

namespace dgemma {

constexpr float kLeast = -1e30f;  // below every score, and still a number

// The part of a wish that falls on words [first, first + count).
class Stretch {
   public:
    Stretch(const DgemmaWish& wish, int64_t first, int64_t count);

    // Raw scores -> processed ones. False if a score is not finite.
    bool apply(const Kernels& kernels, float* scores, bool barred) const;

   private:
    struct Bias {
        int64_t at;
        float value;
    };
    const DgemmaWish& wish_;
    int64_t count_;
    std::vector<Bias> biases_;
    std::vector<int64_t> ends_;
};

// The largest of some processed scores and where it is; kLeast if all are -infinity. `peaks`: room for the blocks.
struct Largest {
    float score = kLeast;
    int64_t at = 0;
};
Largest largest(const Kernels& kernels, const float* scores, int64_t count, float* peaks);

// The first of `count` weights at which their sum, `before` included, is above `target`; the last that has a weight if
// rounding left the sum below.
template <class Weight>
int64_t first_above(int64_t count, double target, double& before, Weight&& weight) {
    int64_t last = 0;
    double at_last = before;
    for (int64_t i = 0; i < count; i++) {
        const double own = weight(i);
        if (own <= 0) continue;
        last = i;
        at_last = before;
        if (before + own > target) return i;
        before += own;
    }
    before = at_last;
    return last;
}

}  // namespace dgemma
