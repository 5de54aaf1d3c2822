// Runs every kernel on random shapes with every instruction set that runs here, against plain formulas in double
// precision, and compares the instruction sets bit for bit. For sanitizers and for processors without torch.
// Buffers have exactly the sizes that the kernels are promised.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <string>
#include <vector>

#include "../../csrc/dgemma_cpu.h"

namespace {

uint64_t state = 1;

uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
}

int64_t below(int64_t n) { return bits() % n; }
float real() { return static_cast<float>(bits()) / 2147483648.0f * 2 - 1; }
float unit() { return static_cast<float>(bits() >> 8) / 8388608.0f; }

int cases = 0;

void check(bool good, const char* what) {
    cases++;
    if (good) return;
    printf("wrong: %s\n", what);
    exit(1);
}

// A number near another: absolute and relative.
bool near(double a, double b, double bound) { return fabs(a - b) <= bound * std::max(1.0, fabs(b)); }

struct Weight {
    DgemmaMatrix matrix;
    std::vector<uint8_t> values, data, small, packed_small;
    std::vector<float> scales, packed, factors;
    std::vector<int> numbers;  // [E, O, I]

    Weight(int bit, int64_t count, int64_t outputs, int64_t inputs, int64_t group, float scale)
        : matrix{bit, static_cast<int32_t>(count), outputs, inputs, group, nullptr, nullptr, nullptr} {
        const int64_t groups = group ? inputs / group : 1, tiles = (outputs + 15) / 16;
        values.resize(count * outputs * inputs * bit / 8);
        for (uint8_t& value : values) value = static_cast<uint8_t>(bits());
        if (below(4) == 0) std::fill(values.begin(), values.end(), bit == 8 ? 0x80 : 0x00);  // -128, -8: the extremes
        const bool nvfp4 = group == 16;
        const int twice[] = {0, 1, 2, 3, 4, 6, 8, 12};
        for (int64_t i = 0; i < count * outputs * inputs; i++) {
            const int code = values[bit == 8 ? i : i / 2] >> (bit == 8 ? 0 : i % 2 * 4) & 15;
            const int size = code & 8 ? -twice[code & 7] : twice[code & 7];
            numbers.push_back(bit == 8 ? static_cast<int8_t>(values[i]) : nvfp4 ? size : code - 8);
        }
        scales.resize(count * outputs * groups);
        for (float& value : scales) value = scale * unit();
        data.resize(count * tiles * ((inputs + 31) / 32 * 32) * 16 * bit / 8);
        packed.resize(count * tiles * groups * 16);
        if (nvfp4) {
            // Scales of 2^-9 to 15 / 8, times a factor.
            factors.assign(count * tiles * 16, 0.0f);
            for (float& value : scales) {
                small.push_back(static_cast<uint8_t>(1 + below(63)));
                const int exponent = small.back() >> 3, part = small.back() & 7;
                value = (exponent ? ldexpf(1 + part / 8.0f, exponent - 7) : ldexpf(part / 8.0f, -6)) * scale / 2;
            }
            for (int64_t row = 0; row < count * outputs; row++) {
                factors[row / outputs * tiles * 16 + row % outputs] = scale / 2;
            }
            packed_small.resize(packed.size());
            matrix.factors = factors.data();
        }
        dgemma_pack(&matrix, values.data(), nvfp4 ? static_cast<void*>(small.data()) : scales.data(), data.data(),
                    nvfp4 ? static_cast<void*>(packed_small.data()) : packed.data(), 3);
        matrix.data = data.data();
        matrix.scales = nvfp4 ? static_cast<void*>(packed_small.data()) : packed.data();
    }

    double at(int64_t row, int64_t i) const {
        const int64_t group = matrix.group ? matrix.group : matrix.inputs, groups = matrix.inputs / group;
        return static_cast<double>(numbers[row * matrix.inputs + i]) * scales[row * groups + i / group];
    }
};

// Rounded to 8 bits and back.
std::vector<double> rounded(const std::vector<double>& x) {
    double most = 0;
    for (const double value : x) most = std::max(most, fabs(value));
    std::vector<double> out;
    for (const double value : x) out.push_back(most ? nearbyint(value * 127 / most) * most / 127 : 0);
    return out;
}

std::vector<double> multiply(const Weight& weight, int64_t index, const std::vector<double>& x) {
    std::vector<double> out;
    for (int64_t o = 0; o < weight.matrix.outputs; o++) {
        double sum = 0;
        for (int64_t i = 0; i < weight.matrix.inputs; i++) sum += x[i] * weight.at(index * weight.matrix.outputs + o, i);
        out.push_back(sum);
    }
    return out;
}

std::vector<double> row_of(const std::vector<float>& x, int64_t row, int64_t width) {
    return {x.begin() + row * width, x.begin() + (row + 1) * width};
}

// The results of one instruction set, to be equal to those of the others.
struct Results {
    std::vector<float> numbers;
    std::vector<int64_t> words;
};

Weight any_weight(int64_t count, int64_t outputs, int64_t inputs) {
    const int bit = inputs % 2 == 0 && below(2) ? 4 : 8;
    const int64_t group = bit == 4 && inputs % 16 == 0 && below(3) == 0 ? 16
                          : inputs % 64 == 0 && below(2)                ? 64
                          : inputs % 32 == 0 && below(2)                ? 32
                                                                        : 0;
    return Weight(bit, count, outputs, inputs, group, 0.02f);
}

int64_t any_width() {
    const int64_t widths[] = {1, 2, 7, 32, 46, 48, 64, 65, 96, 128, 192, 320, 704};
    return widths[below(13)];
}

void linear(Results& results, int threads) {
    const int64_t rows = 1 + below(40), inputs = any_width(), outputs = 1 + below(70);
    const Weight weight = any_weight(1, outputs, inputs);
    std::vector<float> x(rows * inputs), out(rows * outputs);
    const float size = below(4) ? 1.0f : powf(10.0f, 30 * real());
    for (float& value : x) value = real() * size;
    if (below(3) == 0) std::fill_n(x.begin(), inputs, 0.0f);
    dgemma_linear(x.data(), 0, rows, &weight.matrix, out.data(), threads);
    for (int64_t row = 0; row < rows; row++) {
        const std::vector<double> expected = multiply(weight, 0, rounded(row_of(x, row, inputs)));
        double most = 0;
        for (const double value : expected) most = std::max(most, fabs(value));
        // A value at half way may be rounded the other way in double: one step of one activation.
        for (int64_t o = 0; o < outputs; o++) {
            check(fabs(out[row * outputs + o] - expected[o]) <= 1e-5 * most + 0.03 * size, "linear");
        }
    }
    results.numbers.insert(results.numbers.end(), out.begin(), out.end());
}

void experts(Results& results, int threads) {
    const int64_t rows = 1 + below(30), hidden = any_width(), width = 2 * any_width(), count = 1 + below(9);
    const int64_t k = 1 + below(std::min<int64_t>(count, 4));
    const Weight gate_up = any_weight(count, 2 * width, hidden), down = any_weight(count, hidden, width);
    std::vector<float> x(rows * hidden), weights(rows * k), room(rows * k * hidden), out(rows * hidden);
    std::vector<int64_t> chosen(rows * k);
    for (float& value : x) value = real();
    for (float& value : weights) value = unit();
    for (int64_t& expert : chosen) expert = below(2) ? 0 : below(count);  // some experts have no rows
    dgemma_experts(x.data(), 0, rows, k, weights.data(), chosen.data(), &gate_up.matrix, &down.matrix, room.data(),
                   out.data(), threads);
    for (int64_t row = 0; row < rows; row++) {
        std::vector<double> sum(hidden), sizes(hidden);
        const std::vector<double> own = rounded(row_of(x, row, hidden));
        for (int64_t j = 0; j < k; j++) {
            const int64_t expert = chosen[row * k + j];
            const std::vector<double> both = multiply(gate_up, expert, own);
            std::vector<double> inner;
            for (int64_t i = 0; i < width; i++) {
                const double g = both[i], u = sqrt(2 / acos(-1.0)) * (g + 0.044715 * g * g * g);
                inner.push_back(0.5 * g * (1 + tanh(u)) * both[width + i]);
            }
            double most = 0;
            for (const double value : inner) most = std::max(most, fabs(value));
            const std::vector<double> part = multiply(down, expert, rounded(inner));
            for (int64_t i = 0; i < hidden; i++) {
                sum[i] += part[i] * weights[row * k + j];
                // Two activations that round the other way, as far as the products can carry them.
                sizes[i] += 2 * most / 127 * 128 * 0.02 + 1e-5 * fabs(part[i]);
            }
        }
        for (int64_t i = 0; i < hidden; i++) {
            check(fabs(out[row * hidden + i] - sum[i]) <= sizes[i] + 1e-3, "experts");
        }
    }
    results.numbers.insert(results.numbers.end(), out.begin(), out.end());
}

// Checks beliefs against processed scores.
void check_beliefs(const std::vector<double>& scores, int64_t argmax, int64_t sampled, float entropy, const float* u,
                   double bound) {
    const double most = *std::max_element(scores.begin(), scores.end());
    double total = 0, mean = 0;
    for (const double score : scores) {
        const double weight = exp(score - most);
        total += weight;
        if (weight > 0) mean += weight * (score - most);
    }
    check(scores[argmax] >= most - bound, "argmax");
    check(near(entropy, log(total) - mean / total, 20 * bound), "entropy");
    if (!u) return check(sampled == argmax, "likeliest");
    double before = 0;
    for (int64_t i = 0; i < sampled; i++) before += exp(scores[i] - most) / total;
    const double after = before + exp(scores[sampled] - most) / total;
    check(before - 20 * bound <= *u && *u <= after + 20 * bound, "sample");
}

struct Wanted {
    std::vector<int64_t> words, ends;
    std::vector<float> bias;
    DgemmaWish wish;

    explicit Wanted(int64_t vocabulary) : wish{} {
        wish.cap = below(2) ? 30.0f : 0.0f;
        wish.heat = 0.3f + unit();
        if (below(2)) words = {below(vocabulary)}, bias = {5 * real()};
        if (vocabulary > 2 && below(2)) ends = {below(vocabulary)}, wish.barred = 2;
        wish.biases = static_cast<int64_t>(words.size());
        wish.words = words.data();
        wish.bias = bias.data();
        wish.ends = static_cast<int64_t>(ends.size());
        wish.end = ends.data();
    }

    std::vector<double> process(std::vector<double> scores, int64_t row) const {
        for (double& score : scores) score = wish.cap ? wish.cap * tanh(score / wish.cap) : score;
        for (size_t i = 0; i < words.size(); i++) scores[words[i]] += bias[i];
        for (double& score : scores) score /= wish.heat;
        for (const int64_t end : ends) scores[end] = row < wish.barred ? -INFINITY : scores[end];
        return scores;
    }
};

void read(Results& results, int threads) {
    const int64_t rows = 1 + below(20), words = 1 + below(below(3) ? 300 : 3000);
    const Wanted wanted(words);
    std::vector<float> scores(rows * words), uniform(rows), entropies(rows), totals(rows);
    std::vector<int64_t> argmax(rows), sampled(rows);
    const float size = below(3) ? 10.0f : 1000.0f;
    for (float& score : scores) score = size * real();
    for (float& value : uniform) value = unit();
    const std::vector<float> before = scores;
    const bool greedy = below(3) == 0;
    const DgemmaBeliefs out = {argmax.data(), sampled.data(), entropies.data(), totals.data()};
    dgemma_read(scores.data(), rows, words, &wanted.wish, greedy ? nullptr : uniform.data(), &out, threads);
    for (int64_t row = 0; row < rows; row++) {
        const std::vector<double> own = wanted.process(row_of(before, row, words), row);
        const double bound = 2e-6 * std::max(30.0, static_cast<double>(size)) / wanted.wish.heat;
        check_beliefs(own, argmax[row], sampled[row], entropies[row], greedy ? nullptr : &uniform[row], bound);
    }
    results.numbers.insert(results.numbers.end(), scores.begin(), scores.end());
    results.words.insert(results.words.end(), sampled.begin(), sampled.end());
}

void vocabulary(Results& results, int threads) {
    const int64_t rows = below(6) ? 1 + below(20) : 258, hidden = any_width(), words = 1 + below(below(3) ? 700 : 3000);
    const Weight table(8, 1, words, hidden, 0, 0.01f);
    const Wanted wanted(words);
    const float size = powf(10.0f, 1.5f * real());
    std::vector<float> x(rows * hidden), uniform(rows), entropies(rows), soft(rows * hidden);
    std::vector<int64_t> argmax(rows), sampled(rows), hint(rows);
    for (float& value : x) value = size * real();
    for (float& value : uniform) value = unit();
    for (int64_t& word : hint) word = below(words + 1) - 1;
    std::vector<char> room(dgemma_vocabulary_room(rows, &table.matrix, 1));
    const DgemmaBeliefs out = {argmax.data(), sampled.data(), entropies.data(), nullptr};
    int64_t blends = 0;
    dgemma_vocabulary(x.data(), 0, rows, &table.matrix, &wanted.wish, uniform.data(), hint.data(), 1e-7f, &out,
                      soft.data(), room.data(), &blends, threads);
    for (int64_t row = 0; row < rows; row += 1 + rows / 20) {
        const std::vector<double> raw = multiply(table, 0, rounded(row_of(x, row, hidden)));
        const std::vector<double> own = wanted.process(raw, row);
        const double most = *std::max_element(own.begin(), own.end());
        // One activation that rounds the other way.
        const double bound = (2e-4 + 1.28 * size / 127) / wanted.wish.heat;
        check_beliefs(own, argmax[row], sampled[row], entropies[row], &uniform[row], bound);
        double total = 0;
        std::vector<double> blend(hidden);
        for (int64_t word = 0; word < words; word++) {
            total += exp(own[word] - most);
            for (int64_t i = 0; i < hidden; i++) blend[i] += exp(own[word] - most) * table.at(word, i);
        }
        // Weights in 7 bits: half a step of the largest of 64, for each of them, times at most 128 * 0.01.
        for (int64_t i = 0; i < hidden; i++) {
            check(fabs(soft[row * hidden + i] - blend[i] / total) <= 1.28 * (0.26 + 2 * bound), "blend");
        }
    }
    results.numbers.insert(results.numbers.end(), soft.begin(), soft.end());
    results.numbers.insert(results.numbers.end(), entropies.begin(), entropies.end());
    results.words.insert(results.words.end(), sampled.begin(), sampled.end());
    results.words.insert(results.words.end(), argmax.begin(), argmax.end());
}

}  // namespace

int main(int count, char** arguments) {
    const int rounds = count > 1 ? atoi(arguments[1]) : 20;
    std::string names = dgemma_compiled(), ran;
    Results first;
    for (size_t at = 0; at < names.size();) {
        const size_t end = std::min(names.find(' ', at), names.size());
        const std::string isa = names.substr(at, end - at);
        at = end + 1;
        if (!dgemma_use(isa.c_str())) continue;
        Results results;
        state = 1;
        for (int round = 0; round < rounds; round++) {
            linear(results, 1 + round % 3);
            experts(results, 1 + round % 3);
            read(results, 1 + round % 3);
            vocabulary(results, 1 + round % 3);
        }
        if (ran.empty()) first = results;
        check(results.words == first.words, "the same words from every instruction set");
        check(results.numbers.size() == first.numbers.size() &&
                  !memcmp(results.numbers.data(), first.numbers.data(), 4 * first.numbers.size()),
              "the same bits from every instruction set");
        ran += " " + isa;
    }
    printf("%d checks:%s\n", cases, ran.c_str());
    return 0;
}
