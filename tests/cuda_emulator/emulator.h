// Runs a CUDA kernel on one CPU thread: the threads of a block are coroutines that take turns at barriers.
//
// Blocks run one after the other. A thread runs until it reaches a barrier or a vote of its warp, and the next one goes
// on, in odd blocks the one before: what threads read without a barrier in between is wrong in one order or the other.
// A barrier that some threads of a block never reach is an error here, as it is on a GPU.
#ifndef SG_EMULATOR_H
#define SG_EMULATOR_H
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))

namespace sg_emulator {

struct dim3 {
    unsigned x, y, z;
};

const unsigned MARGIN = 4096;  // bytes behind the shared memory of a block

enum state { READY, AT_BARRIER, AT_VOTE, DONE };

struct words {
    unsigned w[6];
};

struct fiber {
    ucontext_t context;
    char* stack;
    dim3 thread;
    unsigned lane, warp;
    state now;
    bool ballot;
    words given;  // to the other lanes
};

struct machine {
    dim3 grid, block, index;
    std::vector<fiber> fibers;
    std::vector<unsigned> votes;  // of each warp, when all its lanes have voted
    std::vector<words> given;     // by each thread, likewise
    fiber* current = nullptr;
    ucontext_t scheduler;
    std::vector<unsigned char> shared;
    void (*kernel)(const void*);
    const void* params;
    const char* error = nullptr;
};

inline machine& the() {
    static machine one;
    return one;
}

inline void pause(state s) {
    machine& m = the();
    m.current->now = s;
    swapcontext(&m.current->context, &m.scheduler);
}

inline void enter() {
    the().kernel(the().params);
    pause(DONE);
}

inline bool all_of_warp_vote(machine& m, unsigned warp) {
    unsigned bits = 0;
    for (fiber& f : m.fibers) {
        if (f.warp != warp) continue;
        if (f.now != AT_VOTE) return false;
        bits |= static_cast<unsigned>(f.ballot) << f.lane;
        m.given[warp * 32 + f.lane] = f.given;
    }
    m.votes[warp] = bits;
    for (fiber& f : m.fibers)
        if (f.warp == warp) f.now = READY;
    return true;
}

inline void run_block(machine& m) {
    const unsigned count = m.block.x * m.block.y * m.block.z;
    m.fibers.resize(count, fiber());
    m.votes.assign(count / 32 + 1, 0);
    m.given.assign((count / 32 + 1) * 32, words());
    for (unsigned i = 0; i < count; ++i) {
        fiber& f = m.fibers[i];
        const size_t size = 64 * 1024;
        if (!f.stack) f.stack = new char[size];  // kept for the next block
        f.thread = {i % m.block.x, i / m.block.x % m.block.y, i / m.block.x / m.block.y};
        f.lane = i % 32, f.warp = i / 32, f.now = READY;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack;
        f.context.uc_stack.ss_size = size;
        f.context.uc_link = &m.scheduler;
        makecontext(&f.context, enter, 0);
    }
    for (;;) {
        unsigned done = 0, waiting = 0;
        bool moved = false;
        for (unsigned i = 0; i < count; ++i) {
            fiber& f = m.fibers[m.index.x % 2 ? count - 1 - i : i];
            if (f.now == READY) {
                m.current = &f;
                swapcontext(&m.scheduler, &f.context);
                moved = true;
            }
            done += f.now == DONE;
            waiting += f.now == AT_BARRIER;
        }
        if (done == count) return;
        if (waiting == count) {
            for (fiber& f : m.fibers) f.now = READY;
            continue;
        }
        for (unsigned warp = 0; warp <= count / 32; ++warp)
            if (warp * 32 < count) moved |= all_of_warp_vote(m, warp);
        if (!moved) {
            m.error = "some threads wait at a barrier that others never reach";
            return;
        }
    }
}

inline unsigned ballot(bool value) {
    the().current->ballot = value;
    const unsigned warp = the().current->warp;
    pause(AT_VOTE);
    return the().votes[warp];
}

// Give words to the lanes of the warp, and return theirs, valid until the next exchange.
inline const words* exchange(const words& mine) {
    the().current->given = mine;
    const unsigned warp = the().current->warp;
    pause(AT_VOTE);
    return &the().given[warp * 32];
}

inline double from_lane(double value, unsigned mask) {
    words mine = {};
    std::memcpy(&mine, &value, sizeof value);
    const unsigned lane = the().current->lane ^ mask;
    std::memcpy(&value, exchange(mine) + lane, sizeof value);
    return value;
}

inline unsigned bits_of(float f) {
    unsigned u;
    std::memcpy(&u, &f, 4);
    return u;
}

inline float float_of(unsigned u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

inline float half_to_float(unsigned short h) {
    _Float16 f;
    std::memcpy(&f, &h, 2);
    return static_cast<float>(f);
}

inline unsigned short float_to_half(float v) {
    const _Float16 f = static_cast<_Float16>(v);
    unsigned short h;
    std::memcpy(&h, &f, 2);
    return h;
}

// ldmatrix.sync.aligned.m8n8.x4(.trans).shared.b16: lane 8 * i + j has the address of row j of matrix i.
inline const words* exchange_rows(const void* row) {
    const machine& m = the();
    const size_t offset = static_cast<const unsigned char*>(row) - m.shared.data();
    if (offset % 16 || offset + 16 > m.shared.size() - MARGIN) the().error = "ldmatrix reads elsewhere, or not aligned";
    const words* const given = exchange({{static_cast<unsigned>(offset)}});
    return m.error ? nullptr : given;
}

template <bool TRANSPOSED>
inline void ldmatrix_x4(const void* row, unsigned* found) {
    const unsigned lane = the().current->lane;
    const words* const given = exchange_rows(row);
    for (unsigned i = 0; given && i < 8; ++i) {
        unsigned at = lane / 4, column = lane % 4 * 2 + i % 2;
        if (TRANSPOSED) std::swap(at, column);
        const void* const from = &the().shared[given[8 * (i / 2) + at].w[0] + column * 2];
        std::memcpy(reinterpret_cast<unsigned short*>(found) + i, from, 2);
    }
}

// mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32. The PTX manual has the place of each element.
inline void mma_m16n8k16(unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1, float* sums) {
    const unsigned lane = the().current->lane;
    const words* const given = exchange({{a0, a1, a2, a3, b0, b1}});
    const auto element = [&](unsigned row, unsigned k, unsigned first) {  // first: the register of element (0, 0)
        const unsigned pair = given[row % 8 * 4 + k % 8 / 2].w[first];
        return half_to_float(static_cast<unsigned short>(k % 2 ? pair >> 16 : pair));
    };
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
        double sum = sums[i];
        for (unsigned k = 0; k < 16; ++k)
            sum += static_cast<double>(element(m, k, m / 8 + k / 8 * 2)) * element(n, k, 4 + k / 8);
        sums[i] = static_cast<float>(sum);
    }
}

}  // namespace sg_emulator

#define threadIdx (sg_emulator::the().current->thread)
#define blockIdx (sg_emulator::the().index)
#define blockDim (sg_emulator::the().block)
#define gridDim (sg_emulator::the().grid)
#define SG_SHARED_MEMORY unsigned char* const sg_shared_memory = sg_emulator::the().shared.data()

inline void __syncthreads() { sg_emulator::pause(sg_emulator::AT_BARRIER); }
inline void __syncwarp() { sg_emulator::ballot(false); }
inline unsigned __ballot_sync(unsigned, bool value) { return sg_emulator::ballot(value); }
using std::exp, std::expm1, std::fabs, std::log1p, std::tanh;  // overloaded for float and double, as in CUDA
inline float __shfl_xor_sync(unsigned, float v, int mask) { return static_cast<float>(sg_emulator::from_lane(v, mask)); }
inline unsigned __shfl_xor_sync(unsigned, unsigned v, int mask) {
    return static_cast<unsigned>(sg_emulator::from_lane(v, mask));
}
inline double __shfl_xor_sync(unsigned, double v, int mask) { return sg_emulator::from_lane(v, mask); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

#define SG_EMULATE(ENTRY, PARAMS)                                                                                        \
    extern "C" const char* sg_emulate(const PARAMS* p, const unsigned* grid, const unsigned* block, unsigned shared) {   \
        sg_emulator::machine& m = sg_emulator::the();                                                                    \
        m.grid = {grid[0], grid[1], grid[2]}, m.block = {block[0], block[1], block[2]};                                  \
        m.error = nullptr;                                                                                               \
        m.params = p;                                                                                                    \
        m.kernel = [](const void* data) { ENTRY(*static_cast<const PARAMS*>(data)); };                                   \
        for (unsigned z = 0; z < grid[2]; ++z)                                                                           \
            for (unsigned y = 0; y < grid[1]; ++y)                                                                       \
                for (unsigned x = 0; x < grid[0]; ++x) {                                                                 \
                    m.index = {x, y, z};                                                                                 \
                    m.shared.assign(shared + sg_emulator::MARGIN, 0xff); /* NaNs: what nobody wrote shows */           \
                    sg_emulator::run_block(m);                                                                           \
                    for (unsigned i = shared; i < shared + sg_emulator::MARGIN; ++i)                                     \
                        if (m.shared[i] != 0xff) m.error = "a block writes behind its shared memory";                    \
                    if (m.error) return m.error;                                                                         \
                }                                                                                                        \
        return nullptr;                                                                                                  \
    }
#endif
