// Channel sums within a pass over dense images; shared by fma, unit_distance and the gradient of bias_act.
//
// Macros: SG_VECTOR (elements per load), SG_PLANAR (1: memory is [groups, size], one channel per group;
// 0: memory is [groups, size, channels]), SG_CHUNKS (vectors of one pixel per thread; 1 if planar).
// A position is a vector of a plane, or a pixel. A block has 256 threads: blockDim.x of them, a power of two, are
// adjacent in memory (along a plane, or along the channels of a pixel, at most a warp), and blockDim.y planes or
// pixels are processed at once. The positions of a group are divided into parts, one per block.
#ifndef SG_SUMS_CUH
#define SG_SUMS_CUH
#include "cuda.cuh"

#define SG_UNROLL (SG_CHUNKS < 4 ? 4 / SG_CHUNKS : 1)

struct part_t {
    offset_t group, part, parts;
    offset_t begin, end, own, stride;  // positions: of the block, of the thread in the block, between its iterations
    offset_t base, every;              // element of position i: base + i * every
    int channels;
    bool inside;                       // false for threads beyond the last plane

    // First channel, within a pixel, of a chunk of this thread.
    __device__ __forceinline__ int channel(int chunk) const {
        return SG_PLANAR ? 0 : (static_cast<int>(threadIdx.x) + chunk * static_cast<int>(blockDim.x)) * SG_VECTOR;
    }
    __device__ __forceinline__ bool has(int chunk) const { return SG_PLANAR || channel(chunk) < channels; }
    // Clamp positions and channels beyond the end to readable ones, so that loads need no branch.
    __device__ __forceinline__ offset_t element(offset_t position, int chunk) const {
        const offset_t at = position < end ? position : end - 1;
        return base + at * every + (has(chunk) ? channel(chunk) : 0);
    }
};

__device__ __forceinline__ part_t part_of(offset_t groups, offset_t size, int channels) {
    const offset_t rows = static_cast<offset_t>(blockDim.y);
    const offset_t blocks = SG_PLANAR ? (groups + rows - 1) / rows : groups;
    const offset_t positions = SG_PLANAR ? size / SG_VECTOR : size;
    part_t w;
    w.parts = static_cast<offset_t>(gridDim.x) / blocks;
    w.part = static_cast<offset_t>(blockIdx.x) % w.parts;
    w.group = static_cast<offset_t>(blockIdx.x) / w.parts;
    w.channels = channels;
    if (SG_PLANAR) {
        w.group = w.group * rows + static_cast<offset_t>(threadIdx.y);
        w.own = static_cast<offset_t>(threadIdx.x), w.stride = static_cast<offset_t>(blockDim.x);
    } else {
        w.own = static_cast<offset_t>(threadIdx.y), w.stride = rows;
    }
    w.inside = w.group < groups;
    if (!w.inside) w.group = groups - 1;
    w.base = w.group * size * (SG_PLANAR ? 1 : channels);
    w.every = SG_PLANAR ? SG_VECTOR : channels;
    const offset_t share = (positions + w.parts - 1) / w.parts;
    w.begin = w.part * share;
    w.end = w.begin + share < positions ? w.begin + share : positions;
    return w;
}

// Call read(position, element) for all chunks of several positions, then use(position, holds, values of its chunks).
// All threads of a block make the same number of calls.
template <class Value, class Read, class Use>
__device__ __forceinline__ void for_each_position(const part_t& w, Read read, Use use) {
    for (offset_t i = w.begin; i < w.end; i += w.stride * SG_UNROLL) {
        Value values[SG_UNROLL][SG_CHUNKS];
#pragma unroll
        for (int u = 0; u < SG_UNROLL; ++u) {
            const offset_t position = i + w.own + u * w.stride;
#pragma unroll
            for (int k = 0; k < SG_CHUNKS; ++k)
                values[u][k] = read(position < w.end ? position : w.end - 1, w.element(position, k));
        }
#pragma unroll
        for (int u = 0; u < SG_UNROLL; ++u) {
            const offset_t position = i + w.own + u * w.stride;
            use(position, w.inside && position < w.end, values[u]);
        }
    }
}

// Write the sums of a block: planar to [groups, parts], else to [groups, parts, channels]. The order is fixed, so
// equal calls give equal bits. Needs 256 / 32 * blockDim.x * SG_VECTOR numbers of shared memory, planar 256 / 32.
__device__ __forceinline__ void write_sums(const part_t& w, const acc (*sums)[SG_VECTOR], acc* to) {
    SG_SHARED_MEMORY;
    acc* const shared = reinterpret_cast<acc*>(sg_shared_memory);
    const int width = static_cast<int>(blockDim.x);
    const int thread = static_cast<int>(threadIdx.y) * width + static_cast<int>(threadIdx.x);
    const int lane = thread % 32, warp = thread / 32;
#if SG_PLANAR
    acc total = acc(0);
#pragma unroll
    for (int e = 0; e < SG_VECTOR; ++e) total += sums[0][e];
    total = sum_of_lanes(total, width < 32 ? width : 32);
    if (width > 32) {
        if (lane == 0) shared[warp] = total;
        __syncthreads();
        if (threadIdx.x == 0)
            for (int other = 1; other < width / 32; ++other) total += shared[warp + other];
    }
    if (threadIdx.x == 0 && w.inside) to[w.group * w.parts + w.part] = total;
#else
    acc* const own = to + (w.group * w.parts + w.part) * w.channels;
    const int row = width * SG_VECTOR;
#pragma unroll
    for (int k = 0; k < SG_CHUNKS; ++k) {
        if (k) __syncthreads();  // the sums of the previous chunk have been read
#pragma unroll
        for (int e = 0; e < SG_VECTOR; ++e) {
            acc total = sums[k][e];
            for (int mask = width; mask < 32; mask *= 2) total += __shfl_xor_sync(0xffffffffu, total, mask);
            if (lane < width) shared[warp * row + lane * SG_VECTOR + e] = total;
        }
        __syncthreads();
        for (int i = thread; i < row; i += 256) {
            acc total = acc(0);
#pragma unroll
            for (int other = 0; other < 8; ++other) total += shared[other * row + i];
            if (k * row + i < w.channels) own[k * row + i] = total;
        }
    }
#endif
}

#endif
