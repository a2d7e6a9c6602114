// bias_act on the CPU: one pass over the memory, in rows that share a bias or have one element per bias.
#include "bias_act.h"

#include <algorithm>
#include <new>
#include <vector>

#include "../parallel.h"
#include "math.h"

namespace sg {
namespace {

const sg_int64 TASK = 32768;  // elements, about
const sg_int64 ROW = 256;     // elements, at least

template <class T>
struct Call {
    T gain, alpha, clamp;
    bool clamps;
    // If the gain is 0, the derivatives are 0 at every point.
    double inverse_gain() const { return gain == 0 ? 1.0 : 1.0 / gain; }
};

// act(u) * gain, clamped, or its derivatives times the incoming gradient. `at` is y, for swish u.
template <class T, int ACT, int ORDER, class V>
SG_INLINE V piecewise(const Call<T>& call, V in, V at) {
    const V zero{};
    if constexpr (ORDER == 0) {
        V v = in;
        if constexpr (ACT == SG_RELU) v = in < zero ? zero : in;  // a NaN stays one
        if constexpr (ACT == SG_LRELU) v = in > zero ? in : in * call.alpha;
        v = v * call.gain;
        if (call.clamps) {
            v = v > call.clamp ? zero + call.clamp : v;
            v = v < -call.clamp ? zero - call.clamp : v;
        }
        return v;
    } else {
        V v = in * call.gain;
        if constexpr (ACT == SG_RELU) v = at * call.gain > zero ? v : zero;
        if constexpr (ACT == SG_LRELU) v = at * call.gain > zero ? v : v * call.alpha;
        if (call.clamps) v = (at >= call.clamp) | (at <= -call.clamp) ? zero : v;
        return v;
    }
}

template <int ACT, int ORDER, class T, class R>
SG_INLINE R smooth(const Call<T>& call, R in, R in2, R at) {
    if constexpr (ORDER == 0) {
        R v = activated<ACT>(in) * call.gain;
        if (call.clamps) {
            v = v > call.clamp ? R{} + call.clamp : v;
            v = v < -call.clamp ? R{} - call.clamp : v;
        }
        return v;
    } else {
        R y = at, a = at;
        if constexpr (ACT == SG_SWISH) {
            if (call.clamps) y = activated<ACT>(at) * call.gain;
        } else {
            a = at * static_cast<T>(call.inverse_gain());
        }
        R v;
        if constexpr (ORDER == 1) v = in * (slope<ACT>(a) * call.gain);
        else v = in * in2 * (curvature<ACT>(a) * call.gain);
        if (call.clamps) v = y >= call.clamp ? R{} : y <= -call.clamp ? R{} : v;
        return v;
    }
}

// Like run_row, for activations with an exponential. One copy for both steps, since it is slow to compile.
template <int ACT, int ORDER>
void run_smooth(const Call<double>& call, const double* in, const double* in2, const double* ref, const double* b,
                int step, double* out, sg_int64 count) {
    for (sg_int64 i = 0; i < count; ++i) {
        const double bias = b ? b[step ? i : 0] : 0.0;
        const double at = ref ? ref[i] + (ACT == SG_SWISH ? bias : 0.0) : 0.0;
        out[i] = smooth<ACT, ORDER>(call, in[i] + (ORDER == 0 ? bias : 0.0), in2 ? in2[i] : 0.0, at);
    }
}

template <int ACT, int ORDER>
void run_smooth(const Call<float>& call, const float* in, const float* in2, const float* ref, const float* b, int step,
                float* out, sg_int64 count) {
    constexpr bool is_single = ORDER < 2 && (ACT == SG_SIGMOID || ACT == SG_SWISH);
    typedef typename working<is_single>::number number;
    typedef typename working<is_single>::vector vector;
    typedef typename working<is_single>::memory memory;
    constexpr int lanes = sizeof(vector) / sizeof(number);
    const Call<number> own_call{call.gain, call.alpha, call.clamp, call.clamps};
    auto widen = [](const float* from) {
        memory v;
        std::memcpy(&v, from, sizeof v);
        return __builtin_convertvector(v, vector);
    };
    const vector same = vector{} + static_cast<number>(b && !step ? *b : 0.0f);
    auto run_vector = [&](const float* in, const float* in2, const float* ref, const float* b, float* out) {
        const vector bias = step && b ? widen(b) : same;
        vector v = widen(in), second{}, at{};
        if constexpr (ORDER == 0) v += bias;
        else at = ACT == SG_SWISH ? widen(ref) + bias : widen(ref);
        if constexpr (ORDER == 2) second = widen(in2);
        const memory result = __builtin_convertvector(smooth<ACT, ORDER>(own_call, v, second, at), memory);
        std::memcpy(out, &result, sizeof result);
    };
    sg_int64 i = 0;
    for (; i + lanes <= count; i += lanes)
        run_vector(in + i, in2 + (in2 ? i : 0), ref + (ref ? i : 0), b + (b && step ? i : 0), out + i);
    if (i == count) return;
    float parts[5][lanes] = {};
    const size_t bytes = static_cast<size_t>(count - i) * sizeof(float);
    std::memcpy(parts[0], in + i, bytes);
    if (in2) std::memcpy(parts[1], in2 + i, bytes);
    if (ref) std::memcpy(parts[2], ref + i, bytes);
    if (b && step) std::memcpy(parts[3], b + i, bytes);
    run_vector(parts[0], parts[1], parts[2], step && b ? parts[3] : b, parts[4]);
    std::memcpy(out + i, parts[4], bytes);
}

// `count` elements whose bias is *b (step 0) or b[0], b[1], … (step 1).
template <class T, int ACT, int ORDER, int STEP>
void run_row(const Call<T>& call, const T* in, const T* in2, const T* ref, const T* b, T* out, sg_int64 count) {
    constexpr bool simple = ACT == SG_LINEAR || ACT == SG_RELU || ACT == SG_LRELU;
    constexpr int lanes = simd<T>::lanes;
    if constexpr (simple && ORDER == 2) {
        std::fill_n(out, count, T(0));
        return;
    } else if constexpr (simple) {
        sg_int64 i = 0;
        const vector_of<T> same = all(b ? *b : T(0));
        auto step = [&](const T* from, const T* at, const T* bias, T* to) {
            vector_of<T> v = load(from), y{};
            if (ORDER == 0 && b) v += STEP ? load(bias) : same;
            if (ORDER == 1 && ref) y = load(at);
            store(to, piecewise<T, ACT, ORDER>(call, v, y));
        };
        for (; i + lanes <= count; i += lanes) step(in + i, ref + (ref ? i : 0), b + (b && STEP ? i : 0), out + i);
        if (i < count) {
            T parts[4][lanes] = {};
            const size_t bytes = static_cast<size_t>(count - i) * sizeof(T);
            std::memcpy(parts[0], in + i, bytes);
            if (ref) std::memcpy(parts[1], ref + i, bytes);
            if (b && STEP) std::memcpy(parts[2], b + i, bytes);
            step(parts[0], parts[1], parts[2], parts[3]);
            std::memcpy(out + i, parts[3], bytes);
        }
    } else {
        run_smooth<ACT, ORDER>(call, in, in2, ref, b, STEP, out, count);
    }
}

template <class T>
double sum_of(const T* values, sg_int64 count) {
    typedef T part __attribute__((vector_size(WIDE * sizeof(T))));
    wide sums[4] = {};
    double total = 0;
    sg_int64 i = 0;
    for (; i + 4 * WIDE <= count; i += 4 * WIDE) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            part v;
            std::memcpy(&v, values + i + k * WIDE, sizeof v);
            sums[k] += __builtin_convertvector(v, wide);
        }
    }
    for (; i < count; ++i) total += static_cast<double>(values[i]);
    const wide all_sums = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int k = 0; k < WIDE; ++k) total += all_sums[k];
    return total;
}

// Rows of bias_step elements share a bias. The order of sums does not depend on the number of threads.
template <class T, int ACT, int ORDER>
void run_shared(const sg_bias_act_params& p, const Call<T>& call) {
    const sg_int64 step = p.bias_size == 1 && !p.db ? p.size : p.bias_step;
    const sg_int64 rows = (p.size + step - 1) / step;
    const sg_int64 parts = p.db ? 1 : (step + TASK - 1) / TASK, part = (step + parts - 1) / parts;
    const sg_int64 together = std::max<sg_int64>(1, TASK / step);  // short rows are grouped
    std::vector<double> sums(p.db ? static_cast<size_t>(rows) : 0);
    parallel_for(p.num_threads, (rows + together - 1) / together * parts, [&](sg_int64 task) {
        const sg_int64 first = task / parts * together, last = std::min(first + together, rows);
        for (sg_int64 row = first; row < last; ++row) {
            const sg_int64 begin = row * step + task % parts * part;
            const sg_int64 end = std::min({begin + part, (row + 1) * step, p.size});
            if (begin >= end) continue;
            auto at = [begin](const void* data) { return data ? static_cast<const T*>(data) + begin : nullptr; };
            T* out = static_cast<T*>(p.out) + begin;
            const T* b = p.b ? static_cast<const T*>(p.b) + row % p.bias_size : nullptr;
            run_row<T, ACT, ORDER, 0>(call, at(p.in), at(p.in2), at(p.ref), b, out, end - begin);
            if (p.db) sums[static_cast<size_t>(row)] = sum_of(out, end - begin);
        }
    });
    if (!p.db) return;
    for (sg_int64 k = 0; k < p.bias_size; ++k) {
        double total = 0;
        for (sg_int64 row = k; row < rows; row += p.bias_size) total += sums[static_cast<size_t>(row)];
        static_cast<T*>(p.db)[k] = static_cast<T>(total);
    }
}

// Adjacent elements have adjacent biases: channels-last images, and matrices. Few biases are repeated to fill a row
// long enough for a loop.
template <class T, int ACT, int ORDER>
void run_side_by_side(const sg_bias_act_params& p, const Call<T>& call) {
    const sg_int64 repeats = (ROW + p.bias_size - 1) / p.bias_size, width = p.bias_size * repeats;
    const sg_int64 rows = (p.size + width - 1) / width;
    std::vector<T> b;
    for (sg_int64 k = 0; p.b && k < width; ++k) b.push_back(static_cast<const T*>(p.b)[k % p.bias_size]);
    // A small number of parts, independent of the number of threads.
    const sg_int64 together = std::max<sg_int64>({1, TASK / width, (rows + 255) / 256});
    const sg_int64 tasks = (rows + together - 1) / together;
    std::vector<double> sums(p.db ? static_cast<size_t>(tasks * width) : 0);
    parallel_for(p.num_threads, tasks, [&](sg_int64 task) {
        const sg_int64 last = std::min((task + 1) * together, rows);
        for (sg_int64 row = task * together; row < last; ++row) {
            const sg_int64 begin = row * width, count = std::min(width, p.size - begin);
            auto at = [begin](const void* data) { return data ? static_cast<const T*>(data) + begin : nullptr; };
            T* out = static_cast<T*>(p.out) + begin;
            run_row<T, ACT, ORDER, 1>(call, at(p.in), at(p.in2), at(p.ref), p.b ? b.data() : nullptr, out, count);
            if (!p.db) continue;
            double* sum = sums.data() + task * width;
            for (sg_int64 i = 0; i < count; ++i) sum[i] += static_cast<double>(out[i]);
        }
    });
    if (!p.db) return;
    for (sg_int64 k = 0; k < p.bias_size; ++k) {
        double total = 0;
        for (sg_int64 part = k; part < tasks * width; part += p.bias_size) total += sums[static_cast<size_t>(part)];
        static_cast<T*>(p.db)[k] = static_cast<T>(total);
    }
}

template <class T, int ACT, int ORDER>
int run(const sg_bias_act_params& p) {
    const Call<T> call{static_cast<T>(p.gain), static_cast<T>(p.alpha), static_cast<T>(p.clamp), p.clamp >= 0};
    if (p.bias_step == 1 && p.bias_size > 1) run_side_by_side<T, ACT, ORDER>(p, call);
    else run_shared<T, ACT, ORDER>(p, call);
    return SG_OK;
}

template <class T, int ACT>
int run(const sg_bias_act_params& p) {
    switch (p.order) {
        case 0: return run<T, ACT, 0>(p);
        case 1: return run<T, ACT, 1>(p);
        case 2: return run<T, ACT, 2>(p);
        default: return SG_UNSUPPORTED;
    }
}

template <class T>
int run(const sg_bias_act_params& p) {
    switch (p.act) {
        case SG_LINEAR: return run<T, SG_LINEAR>(p);
        case SG_RELU: return run<T, SG_RELU>(p);
        case SG_LRELU: return run<T, SG_LRELU>(p);
        case SG_TANH: return run<T, SG_TANH>(p);
        case SG_SIGMOID: return run<T, SG_SIGMOID>(p);
        case SG_ELU: return run<T, SG_ELU>(p);
        case SG_SELU: return run<T, SG_SELU>(p);
        case SG_SOFTPLUS: return run<T, SG_SOFTPLUS>(p);
        case SG_SWISH: return run<T, SG_SWISH>(p);
        default: return SG_UNSUPPORTED;
    }
}

}  // namespace
}  // namespace sg

SG_EXPORT int sg_bias_act(const sg_bias_act_params* p) {
    if (p->size == 0) return SG_OK;
    try {
        if (p->dtype == SG_F32) return sg::run<float>(*p);
        if (p->dtype == SG_F64) return sg::run<double>(*p);
    } catch (const std::bad_alloc&) {
        return SG_NO_MEMORY;
    }
    return SG_UNSUPPORTED;
}
