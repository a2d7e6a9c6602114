// Matrices of float16 that the lanes of a warp hold together, and their products on tensor cores (compute capability
// 8.0 or higher). Of a matrix [8 x 8], lane 4 * g + t has elements 2t and 2t + 1 of row g, the first in the low bits.
#ifndef SG_MATRICES_CUH
#define SG_MATRICES_CUH
#include "../cuda.cuh"

// Load four matrices [8 x 8] from shared memory; lane 8 * i + j has the address of row j of matrix i. Of TRANSPOSED
// matrices, a lane has elements 2t and 2t + 1 of column g.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(const scalar* row, unsigned* found) {
#ifdef SG_EMULATED
    sg_emulator::ldmatrix_x4<TRANSPOSED>(row, found);
#else
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(found[0]), "=r"(found[1]), "=r"(found[2]), "=r"(found[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(found[0]), "=r"(found[1]), "=r"(found[2]), "=r"(found[3])
                     : "r"(address)
                     : "memory");
#endif
}

// Limit the magnitudes of two float16; NaN stays NaN.
__device__ __forceinline__ unsigned clamp_pair(unsigned pair, unsigned limits) {
#ifdef SG_EMULATED
    acc values[2], limit[2];
    unpack_pair(pair, values), unpack_pair(limits, limit);
    return pack_pair(clamp_to(values[0], limit[0]), clamp_to(values[1], limit[1]));
#else
    asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(limits));
    asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(limits ^ 0x80008000u));
    return pair;
#endif
}

// Add A * B to sums [16 x 8], rows 0 to 7 and 8 to 15. A [16 x 16] is given as its quarters: top left, bottom left, top
// right, bottom right; B [16 x 8] transposed, left and right.
__device__ __forceinline__ void add_product(
    unsigned a0, unsigned a1, unsigned a2, unsigned a3, const unsigned* b, acc* sums) {
#ifdef SG_EMULATED
    sg_emulator::mma_m16n8k16(a0, a1, a2, a3, b[0], b[1], sums);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b[0]), "r"(b[1]));
#endif
}

// Set sums to A * B.
__device__ __forceinline__ void set_product(
    unsigned a0, unsigned a1, unsigned a2, unsigned a3, const unsigned* b, acc* sums) {
#ifdef SG_EMULATED
    for (int i = 0; i < 4; ++i) sums[i] = 0;
    sg_emulator::mma_m16n8k16(a0, a1, a2, a3, b[0], b[1], sums);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
                 : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b[0]), "r"(b[1]), "f"(0.0f));
#endif
}
#endif
