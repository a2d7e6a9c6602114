// The sum of what a block writes, for blocks of any shape. (../sums.cuh has sums of dense images by channel.)
#ifndef SG_BLOCK_SUM_CUH
#define SG_BLOCK_SUM_CUH
#include "../cuda.cuh"

template <int N>
__device__ __forceinline__ acc sum_of(const acc* values) {
    acc total = values[0];
#pragma unroll
    for (int i = 1; i < N; ++i) total += values[i];
    return total;
}

// Write the sum over a block. `shared` has room for a number of each warp, and the block no longer needs it.
template <int THREADS_OF_BLOCK>
__device__ __forceinline__ void write_sum(acc mine, acc* shared, acc* to) {
    mine = sum_of_lanes(mine, 32);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < THREADS_OF_BLOCK / 32; ++warp) mine += shared[warp];
    *to = mine;
}
#endif
