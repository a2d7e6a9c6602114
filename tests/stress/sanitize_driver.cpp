// Calls the CPU library in many random forms, from several threads at once, under the sanitizers (test_sanitizers.py).
//
// Arrays are as long as a form says and no longer, and what lies between their rows must be left alone. Results are
// compared where that is cheap: one thread against several, a filter against its definition or its adjoint.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <numeric>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "bias_act/bias_act.h"
#include "filtered_lrelu/filtered_lrelu.h"
#include "parallel.h"
#include "upfirdn2d/upfirdn2d.h"

namespace {

void demand(bool truth, const char* what) {
    if (truth) return;
    std::fprintf(stderr, "%s\n", what);
    std::abort();
}

struct Random {
    std::mt19937 engine;
    explicit Random(unsigned seed) : engine(seed) {}
    int whole(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine); }
    int one_of(std::initializer_list<int> values) { return values.begin()[whole(0, static_cast<int>(values.size()) - 1)]; }
    bool maybe() { return whole(0, 1) == 1; }
    double real() { return std::normal_distribution<double>()(engine); }
    template <class T>
    std::vector<T> reals(size_t count) {
        std::vector<T> values(count);
        for (T& value : values) value = static_cast<T>(real());
        return values;
    }
};

template <class T>
constexpr int dtype = std::is_same<T, float>::value ? SG_F32 : SG_F64;

const double GAP = -77.0;  // stands where nothing may be written

// [n, c, h, w] with rows, planes and samples further apart than they need be, or not; or in channels-last order.
template <class T>
struct Images {
    int shape[4];
    sg_int64 stride[4];
    std::vector<T> values;

    Images(Random& random, int n, int c, int h, int w, bool channels_last = false) : shape{n, c, h, w} {
        stride[3] = channels_last ? c : 1;
        stride[2] = w * stride[3] + random.one_of({0, 0, 1, 7});
        stride[1] = channels_last ? 1 : h * stride[2] + random.one_of({0, 0, 3});
        stride[0] = (channels_last ? h * stride[2] : c * stride[1]) + random.one_of({0, 0, 5});
        sg_int64 last = 0;
        for (int axis = 0; axis < 4; ++axis) last += (shape[axis] - 1) * stride[axis];
        values.assign(static_cast<size_t>(last + 1), static_cast<T>(GAP));
    }
    T& at(int n, int c, int h, int w) {
        return values[static_cast<size_t>(n * stride[0] + c * stride[1] + h * stride[2] + w * stride[3])];
    }
    template <class F>
    void each(F&& visit) {
        for (int n = 0; n < shape[0]; ++n)
            for (int c = 0; c < shape[1]; ++c)
                for (int h = 0; h < shape[2]; ++h)
                    for (int w = 0; w < shape[3]; ++w) visit(at(n, c, h, w));
    }
    void fill(Random& random) {
        each([&](T& value) { value = static_cast<T>(random.real()); });
    }
    void demand_gaps() {
        Images copy = *this;
        copy.each([](T& value) { value = static_cast<T>(GAP); });
        for (T value : copy.values) demand(value == static_cast<T>(GAP), "something was written between the rows");
    }
    double dot(Images& other) {
        double sum = 0;
        for (int n = 0; n < shape[0]; ++n)
            for (int c = 0; c < shape[1]; ++c)
                for (int h = 0; h < shape[2]; ++h)
                    for (int w = 0; w < shape[3]; ++w)
                        sum += static_cast<double>(at(n, c, h, w)) * static_cast<double>(other.at(n, c, h, w));
        return sum;
    }
};

template <class T>
void describe(Images<T>& x, Images<T>& y, const void** x_values, void** y_values, sg_int64* x_stride, sg_int64* y_stride) {
    *x_values = x.values.data(), *y_values = y.values.data();
    std::memcpy(x_stride, x.stride, sizeof x.stride);
    std::memcpy(y_stride, y.stride, sizeof y.stride);
}

template <class T>
bool close(double a, double b, double scale) {
    return std::abs(a - b) <= (sizeof(T) == 4 ? 1e-4 : 1e-10) * (scale + 1);
}

// ---- upfirdn2d

template <class T>
double defined(const sg_upfirdn2d_params& p, Images<T>& x, const std::vector<T>& f, int n, int c, int my, int mx) {
    const int taps_h = p.f_h ? p.f_h : p.f_w;
    auto tap = [&](int ky, int kx) {
        const int y = p.flip_filter ? ky : taps_h - 1 - ky, z = p.flip_filter ? kx : p.f_w - 1 - kx;
        return p.f_h ? static_cast<double>(f[y * p.f_w + z]) : static_cast<double>(f[y]) * static_cast<double>(f[z]);
    };
    double sum = 0;
    for (int iy = 0; iy < p.in_h; ++iy)
        for (int ix = 0; ix < p.in_w; ++ix) {
            const int ky = iy * p.up_y + p.pad_y0 - my * p.down_y, kx = ix * p.up_x + p.pad_x0 - mx * p.down_x;
            if (ky >= 0 && ky < taps_h && kx >= 0 && kx < p.f_w) sum += tap(ky, kx) * x.at(n, c, iy, ix);
        }
    return sum * p.gain;
}

template <class T>
void try_upfirdn2d(Random& random) {
    sg_upfirdn2d_params p{};
    const bool channels_last = random.maybe();
    p.n = random.whole(1, 3), p.c = channels_last ? random.one_of({16, 24, 37}) : random.whole(1, 4);
    p.in_h = random.one_of({1, 2, 7, 19, 40}), p.in_w = random.one_of({1, 3, 16, 33, 70});
    p.out_h = random.one_of({1, 5, 18, 61}), p.out_w = random.one_of({1, 4, 31, 64, 97});
    p.up_x = random.one_of({1, 2, 2, 3, 4}), p.up_y = random.one_of({1, 2, 2, 3, 4});
    p.down_x = random.one_of({1, 2, 2, 3, 5}), p.down_y = random.one_of({1, 2, 2, 3, 5});
    p.f_w = random.one_of({1, 2, 4, 5, 12, 70}), p.f_h = random.maybe() ? 0 : random.one_of({1, 3, 4, 6});
    p.pad_x0 = random.whole(-6, 14), p.pad_y0 = random.whole(-6, 14);
    if (random.whole(0, 9) == 0) p.pad_x0 = random.one_of({-300, 300});
    p.flip_filter = random.maybe(), p.gain = random.real(), p.dtype = dtype<T>;
    std::vector<T> f = random.reals<T>(static_cast<size_t>(p.f_h ? p.f_h * p.f_w : p.f_w));
    if (p.f_h && random.maybe())  // a product of two filters
        for (int k = 0; k < p.f_h * p.f_w; ++k) f[k] = static_cast<T>((1 << k / p.f_w % 4) * (k % p.f_w + 1));
    Images<T> x(random, p.n, p.c, p.in_h, p.in_w, channels_last);
    Images<T> y(random, p.n, p.c, p.out_h, p.out_w, channels_last);
    x.fill(random);
    Images<T> again = y;
    p.f = f.data();
    describe(x, y, &p.x, &p.y, p.x_stride, p.y_stride);
    p.num_threads = random.whole(1, 4);
    demand(sg_upfirdn2d(&p) == SG_OK, "upfirdn2d refuses");
    p.y = again.values.data(), p.num_threads = 1;
    demand(sg_upfirdn2d(&p) == SG_OK && y.values == again.values, "upfirdn2d depends on the number of threads");
    y.demand_gaps();
    for (int k = 0; k < 20; ++k) {
        const int n = random.whole(0, p.n - 1), c = random.whole(0, p.c - 1);
        const int h = random.whole(0, p.out_h - 1), w = random.whole(0, p.out_w - 1);
        const double scale = 200 * std::abs(p.gain);
        demand(close<T>(y.at(n, c, h, w), defined(p, x, f, n, c, h, w), scale), "upfirdn2d is not its definition");
    }
}

// ---- filtered_lrelu

template <class T>
struct Filter {
    int h, w;
    std::vector<T> taps;
    Filter(Random& random, std::initializer_list<int> sizes) {
        w = random.one_of(sizes);
        h = w == 1 ? 1 : random.maybe() ? 0 : w;
        taps = random.reals<T>(static_cast<size_t>(h ? h * w : w));
    }
};

template <class T>
void run_filtered_lrelu(sg_filtered_lrelu_params p, Images<T>& x, Images<T>& y, Random& random) {
    describe(x, y, &p.x, &p.y, p.x_stride, p.y_stride);
    Images<T> again = y;
    p.num_threads = random.whole(1, 4);
    demand(sg_filtered_lrelu(&p) == SG_OK, "filtered_lrelu refuses");
    y.demand_gaps();
    std::vector<unsigned char> other_mask(p.mode == SG_RECORD ? static_cast<size_t>(p.n) * p.c * p.mask_h * p.mask_row_bytes : 0);
    if (p.mode == SG_RECORD) p.mask = other_mask.data();
    p.y = again.values.data(), p.num_threads = 1;
    demand(sg_filtered_lrelu(&p) == SG_OK && y.values == again.values, "filtered_lrelu depends on the number of threads");
}

template <class T>
void try_filtered_lrelu(Random& random) {
    sg_filtered_lrelu_params p{};
    p.n = random.whole(1, 2), p.c = random.whole(1, 3);
    p.up = random.one_of({1, 2, 2, 4}), p.down = random.one_of({1, 2, 2, 4});
    Filter<T> fu(random, {1, 6, 8, 12, 13}), fd(random, {1, 5, 8, 12, 24});
    p.fu_h = fu.h, p.fu_w = fu.w, p.fd_h = fd.h, p.fd_w = fd.w, p.fu = fu.taps.data(), p.fd = fd.taps.data();
    p.in_h = random.one_of({1, 5, 14, 36}), p.in_w = random.one_of({1, 7, 20, 52});
    p.out_h = random.one_of({1, 6, 17, 40}), p.out_w = random.one_of({1, 9, 32, 53});
    p.pad_x0 = random.whole(-3, 20), p.pad_y0 = random.whole(-3, 20);
    p.flip_filter = random.maybe(), p.up_gain = p.up * p.up, p.slope = 0.2, p.clamp = random.maybe() ? 1.5 : -1.0;
    p.dtype = dtype<T>;
    std::vector<T> b = random.reals<T>(static_cast<size_t>(p.c));
    p.b = random.maybe() ? b.data() : nullptr;
    Images<T> x(random, p.n, p.c, p.in_h, p.in_w), y(random, p.n, p.c, p.out_h, p.out_w), recorded = y, gated = y;
    x.fill(random);
    run_filtered_lrelu(p, x, y, random);

    // As torch_utils/ops/native/forms.py lays masks out.
    const int taps_d = fd.w, planes = p.up / std::gcd(p.up, p.down) * p.down;
    p.mask_h = (p.out_h - 1) * p.down + taps_d, p.mask_w = (p.out_w - 1) * p.down + taps_d;
    p.mask_row_bytes = (4 * planes * ((p.mask_w + 16 * planes - 1) / (16 * planes)) + 4 + 15) / 16 * 16;
    std::vector<unsigned char> mask(static_cast<size_t>(p.n) * p.c * p.mask_h * p.mask_row_bytes);
    p.mask = mask.data(), p.mode = SG_RECORD;
    run_filtered_lrelu(p, x, recorded, random);
    demand(recorded.values == y.values, "filtered_lrelu depends on whether it records");

    p.mode = SG_GATE;
    run_filtered_lrelu(p, x, gated, random);
    sg_filtered_lrelu_params q = p;
    std::swap(q.fu, q.fd), std::swap(q.fu_h, q.fd_h), std::swap(q.fu_w, q.fd_w), std::swap(q.up, q.down);
    q.in_h = p.out_h, q.in_w = p.out_w, q.out_h = p.in_h, q.out_w = p.in_w;
    q.pad_x0 = fu.w + fd.w - 2 - p.pad_x0, q.pad_y0 = fu.w + fd.w - 2 - p.pad_y0;
    q.mask_off_x = p.pad_x0 - (fu.w - 1), q.mask_off_y = p.pad_y0 - (fu.w - 1), q.flip_filter = !p.flip_filter;
    Images<T> dy(random, p.n, p.c, p.out_h, p.out_w), dx(random, p.n, p.c, p.in_h, p.in_w);
    dy.fill(random);
    run_filtered_lrelu(q, dy, dx, random);
    const double scale = std::sqrt(gated.dot(gated) * dy.dot(dy));
    demand(close<T>(gated.dot(dy), x.dot(dx), scale), "filtered_lrelu backward is not the adjoint of forward");
}

// ---- bias_act

template <class T>
void try_bias_act(Random& random) {
    sg_bias_act_params p{};
    p.bias_size = random.one_of({1, 3, 17, 64}), p.bias_step = random.one_of({1, 1, 5, 64, 1000});
    p.size = p.bias_size * p.bias_step * random.one_of({1, 2, 9});
    p.act = random.whole(SG_LINEAR, SG_SWISH), p.order = random.whole(0, 2), p.dtype = dtype<T>;
    p.alpha = 0.2, p.gain = random.one_of({1, 2, -1}), p.clamp = random.maybe() ? 0.9 : -1.0;
    const size_t size = static_cast<size_t>(p.size);
    std::vector<T> in = random.reals<T>(size), in2 = random.reals<T>(size), ref = random.reals<T>(size);
    std::vector<T> b = random.reals<T>(static_cast<size_t>(p.bias_size)), out(size), again(size);
    std::vector<T> db(b.size()), db_again(b.size());
    if (p.act != SG_SWISH && p.clamp >= 0)
        for (T& y : ref) y = y > T(0.9) ? T(0.9) : y < T(-0.9) ? T(-0.9) : y;
    p.in = in.data(), p.out = out.data(), p.b = random.maybe() ? b.data() : nullptr;
    if (p.order > 0 && (p.act != SG_LINEAR || p.clamp >= 0)) p.ref = ref.data();
    if (p.order == 2) p.in2 = in2.data();
    if (p.order == 1 && random.maybe()) p.db = db.data();
    p.num_threads = random.whole(1, 4);
    demand(sg_bias_act(&p) == SG_OK, "bias_act refuses");
    p.out = again.data(), p.num_threads = 1;
    if (p.db) p.db = db_again.data();
    demand(sg_bias_act(&p) == SG_OK, "bias_act refuses");
    demand(!std::memcmp(out.data(), again.data(), size * sizeof(T)), "bias_act depends on the number of threads");
    demand(!std::memcmp(db.data(), db_again.data(), db.size() * sizeof(T)), "the sum depends on the number of threads");
    for (sg_int64 k = 0; p.db && k < p.bias_size; ++k) {
        double sum = 0, scale = 0;
        for (sg_int64 i = 0; i < p.size; ++i)
            if (i / p.bias_step % p.bias_size == k) sum += out[i], scale += std::abs(out[i]);
        demand(std::abs(sum - db[k]) <= 1e-5 * (scale + 1), "bias_act sums what it does not write");
    }
}

// ---- parallel_for

void try_parallel_for(Random& random) {
    const int tasks = random.one_of({0, 1, 2, 1000});
    std::vector<std::atomic<int>> seen(static_cast<size_t>(tasks) * 3);
    sg::parallel_for(random.whole(0, 5), tasks, [&](sg_int64 task) {
        sg::parallel_for(2, 3, [&](sg_int64 inner) { ++seen[static_cast<size_t>(task * 3 + inner)]; });
    });
    for (auto& count : seen) demand(count == 1, "a task was left out or done twice");
}

void work(unsigned seed, int rounds) {
    Random random(seed);
    for (int round = 0; round < rounds; ++round) {
        try_parallel_for(random);
        try_upfirdn2d<float>(random);
        try_upfirdn2d<double>(random);
        try_bias_act<float>(random);
        try_bias_act<double>(random);
        try_filtered_lrelu<float>(random);
        try_filtered_lrelu<double>(random);
    }
}

}  // namespace

int main(int count, char** arguments) {
    const int rounds = count > 1 ? std::atoi(arguments[1]) : 100;
    work(0, rounds);
    std::vector<std::thread> callers;
    for (unsigned seed = 1; seed <= 3; ++seed) callers.emplace_back(work, seed, rounds);
    for (std::thread& caller : callers) caller.join();
    std::printf("%d forms of every op on one caller, then on three at once\n", rounds);
    return 0;
}
