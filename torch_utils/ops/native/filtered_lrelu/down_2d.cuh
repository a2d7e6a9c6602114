// The 2-D down filter of tensor_cores.cu: down 2, up to 18 columns of taps.
//
// A warp computes blocks of 16 rows and 8 columns of outputs as sums of matrix products, one for each row ky of taps:
//
//   y[16 x 8] += A[16 x 32] * B[32 x 8]
//   A[m][k] = v[2 * row(m) + ky][2 * column + k],  B[k][n] = taps[ky][k - 2 * n]
//
// B is the same for all blocks. The product is taken in two halves of k; the second half of A is the first half for the
// next block to the right. Rows m of A are first the even rows of the block, then the odd ones. The odd ones are the
// even ones for ky + 2, which saves loads.
//
// Zeros of B do not hide NaN, which spreads by up to 12 outputs along x. All columns that a block reads are elements of
// v, and of the rows, all that are multiplied.
#define BLOCK_H 16
// Elements from a row to the next, in groups of four rows. Eight rows, and the same row of eight groups, are in
// different banks.
#define PITCH (UP_TO(64, GRID_W - 16) + 16)
#define FOUR_ROWS (4 * PITCH + 8)
#define STORED (GRID_H / 4 * FOUR_ROWS)  // elements in shared memory
#define ROWS_LOADED UP_TO(4, SG_TAPS_DY + 2)

static_assert(SG_TAPS_DX <= 32 - 2 * (GROUP_W - 1), "columns of A");

// ---- Taps, as pairs of float16 with zeros around them: columns of B begin at different pairs

#define ROW_PAIRS_DOWN 16         // of which the last are zeros
#define ZERO_PAIRS (GROUP_W - 1)  // before the first row
#define PAIRS_DOWN (ZERO_PAIRS + SG_TAPS_DY * ROW_PAIRS_DOWN)

__device__ __forceinline__ void read_down_taps(const sg_filtered_lrelu_params& p, unsigned* down) {
    const acc* const fd = static_cast<const acc*>(p.fd);
    for (int i = threadIdx.x; i < PAIRS_DOWN; i += THREADS) {
        const int kx = (i + ROW_PAIRS_DOWN - ZERO_PAIRS) % ROW_PAIRS_DOWN * 2;
        const int k = (i - ZERO_PAIRS) / ROW_PAIRS_DOWN * SG_TAPS_DX + kx;
        acc pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e)
            pair[e] = kx + e < SG_TAPS_DX ? fd[p.flip_filter ? k + e : SG_TAPS_DY * SG_TAPS_DX - 1 - k - e] : acc(0);
        down[i] = pack_pair(pair[0], pair[1]);
    }
}

// Stores v.
struct filtered_t {
    scalar* to;  // this lane's first element

    __device__ __forceinline__ filtered_t(const unsigned*, scalar* stored) {
        const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
        to = stored + place(32 * warp + lane / 4) + 2 * (lane % 4);
    }

    __device__ __forceinline__ static int place(int row) { return row / 4 * FOUR_ROWS + row % 4 * PITCH; }

    __device__ __forceinline__ void take(int piece, int, const unsigned (*v)[4]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int m = i / 4, half = i / 2 % 2, below = i % 2;
            scalar* const at = to + place(row_of(m, below)) + PIECE_W * piece + 8 * half;
            *reinterpret_cast<unsigned*>(at) = v[m][2 * half + below];
        }
    }
};

// ---- Outputs

// The sums of a lane in two rows and two columns of a block. A product waits for the one before, so there are two
// parts: of ky with ky / 2 even, and of the others, for which the rows of outputs are exchanged.
struct sums_t {
    acc straight[4], exchanged[4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 4; ++i) straight[i] = exchanged[i] = acc(0);
    }
};

// Add what 16 columns of v contribute to the block that begins there, and to the block on the left of it.
template <bool BEGINS, bool ENDS>
__device__ __forceinline__ void filter(const scalar* from, const unsigned (*b)[4], sums_t& begun, sums_t& ended) {
    unsigned a[ROWS_LOADED / 2][4];  // rows 0 and 2, 1 and 3, 4 and 6, 5 and 7, ...
#pragma unroll
    for (int i = 0; i < 2; ++i) load_matrices<false>(from + i * PITCH, a[i]);
#pragma unroll
    for (int ky = 0; ky < SG_TAPS_DY; ky += ky % 4 == 1 ? 3 : 1) {
        const int i = ky / 2 + ky % 4;
        const unsigned* const now = a[i];
        if (ENDS) add_product(now[0], now[1], now[2], now[3], b[ky] + 2, ended.straight);
        if (BEGINS) add_product(now[0], now[1], now[2], now[3], b[ky], begun.straight);
        if (ky + 2 >= SG_TAPS_DY) continue;
        unsigned* const next = a[i + 2];
        load_matrices<false>(from + (ky + 4) / 4 * FOUR_ROWS + ky % 4 * PITCH, next);
        if (ENDS) add_product(next[0], now[1], next[2], now[3], b[ky + 2] + 2, ended.exchanged);
        if (BEGINS) add_product(next[0], now[1], next[2], now[3], b[ky + 2], begun.exchanged);
    }
}

// Filter v and write the outputs; a warp has neighboring blocks. Returns 0, because only SG_GATE needs their sum.
__device__ __forceinline__ acc write_outputs(
    const sg_filtered_lrelu_params& p, const tile_t& tile, const scalar* stored, const unsigned* pairs) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int g = lane / 4, t = lane % 4;
    const int across = (tile.columns + GROUP_W - 1) / GROUP_W;
    const int blocks = (tile.rows + BLOCK_H - 1) / BLOCK_H * across, end = blocks * (warp + 1) / SG_WARPS;
    int block = blocks * warp / SG_WARPS;
    if (block == end) return acc(0);
    unsigned b[SG_TAPS_DY][4];
#pragma unroll
    for (int ky = 0; ky < SG_TAPS_DY; ++ky)
#pragma unroll
        for (int i = 0; i < 4; ++i) b[ky][i] = pairs[ZERO_PAIRS + t - g + ky * ROW_PAIRS_DOWN + 4 * i];
    const offset_t stride_y = static_cast<offset_t>(p.y_stride[2]);
    while (block < end) {
        const int row = block / across * BLOCK_H, first = block % across;
        const int count = across - first < end - block ? across - first : end - block;
        block += count;
        // Rows of outputs that the tile does not have are computed from others of v, which may end here.
        const int pair = row + 2 * (lane % 8) < tile.rows ? lane % 8 : 0;
        const scalar* from =
            stored + (row / 2 + pair) * FOUR_ROWS + lane / 8 % 2 * 2 * PITCH + lane / 16 * 8 + first * PIECE_W;
        int column = first * GROUP_W + 2 * t;
        scalar* to = tile.y + (row + 2 * g) * stride_y + column;
        sums_t sums, next;
        sums.clear();
        filter<true, false>(from, b, sums, sums);
#pragma unroll 1
        for (int left = count; left > 0; --left) {
            from += PIECE_W;
            next.clear();
            if (left > 1) filter<true, true>(from, b, next, sums);
            else filter<false, true>(from, b, next, sums);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                if (row + 2 * g + j >= tile.rows) continue;
                const acc found[2] = {sums.straight[2 * j] + sums.exchanged[2 - 2 * j],
                                      sums.straight[2 * j + 1] + sums.exchanged[3 - 2 * j]};
#pragma unroll
                for (int c = 0; c < 2; c += SG_STORE)
                    if (column + c < tile.columns) write<SG_STORE>(to + j * stride_y + c, found + c);
            }
            __syncwarp();
            sums = next, column += GROUP_W, to += GROUP_W;
        }
    }
    return acc(0);
}
