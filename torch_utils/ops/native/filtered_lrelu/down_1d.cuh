// The separable down filter of tensor_cores.cu.
#define FILTERED_P (UP_TO(16, SG_TILE_W) + 8)
#define STORED (GRID_H * FILTERED_P)  // elements in shared memory: rows of the upsampled image, columns of outputs
#define PARTS_X (((GROUP_W - 1) * SG_DOWN + SG_TAPS_DX + 15) / 16)  // products for a group of outputs
#define PARTS_Y ((15 * SG_DOWN + SG_TAPS_DY + 15) / 16)

static_assert(PARTS_X <= 2 * GROUP_PIECES, "a piece is part of two groups");

// Taps k and k + 1, for even k from -ZEROS_DOWN on.
#define ZEROS_DOWN (15 * SG_DOWN)
#define PAIRS_DOWN ((ZEROS_DOWN + 16 * PARTS_Y) / 2)

__device__ __forceinline__ void read_down_taps(const sg_filtered_lrelu_params& p, unsigned* down) {
    const acc* const fd = static_cast<const acc*>(p.fd);
    for (int i = threadIdx.x; i < PAIRS_DOWN; i += THREADS) {
        acc pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int k = 2 * i - ZEROS_DOWN + e;
            pair[e] = in_range(k, SG_TAPS_DX) ? fd[p.flip_filter ? k : SG_TAPS_DX - 1 - k] : acc(0);
        }
        down[i] = pack_pair(pair[0], pair[1]);
    }
}

// The down filter along x.
struct filtered_t {
    scalar* to;             // this lane's first element of the group of outputs that ends next
    unsigned down[2 * GROUP_PIECES][2];
    acc sums[2][2][4];      // [m], for the group that ends next and for the one after it

    __device__ __forceinline__ filtered_t(const unsigned* pairs, scalar* stored) {
        const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
        const int g = lane / 4, t = lane % 4;
        to = stored + (32 * warp + ROW_STEP * g) * FILTERED_P + 2 * t - GROUP_W;
#pragma unroll
        for (int i = 0; i < 4 * GROUP_PIECES; ++i)
            down[i / 2][i % 2] =
                i / 2 < PARTS_X ? pairs[(ZEROS_DOWN + 16 * (i / 2) + 2 * t + 8 * (i % 2) - SG_DOWN * g) / 2] : 0u;
#pragma unroll
        for (int i = 0; i < 16; ++i) sums[i / 8][i / 4 % 2][i % 4] = acc(0);
    }

    // Add what a piece contributes to two groups, of the second of which it is number `part`.
    __device__ __forceinline__ void take(int piece, int part, const unsigned (*v)[4]) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            add_product(v[m][0], v[m][1], v[m][2], v[m][3], down[part + GROUP_PIECES], sums[m][0]);
            add_product(v[m][0], v[m][1], v[m][2], v[m][3], down[part], sums[m][1]);
        }
        if (part + 1 < GROUP_PIECES) return;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
            for (int below = 0; below < 2; ++below)
                if (piece >= GROUP_PIECES) write<2>(to + row_of(m, below) * FILTERED_P, sums[m][0] + 2 * below);
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][0][i] = sums[m][1][i], sums[m][1][i] = acc(0);
        }
        to += GROUP_W;
    }
};

// Filter along y and write the outputs, of which the sum is returned; a warp has squares of 16 x 16 outputs.
__device__ __forceinline__ acc write_outputs(
    const sg_filtered_lrelu_params& p, const tile_t& tile, const scalar* stored, const unsigned* pairs) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int g = lane / 4, t = lane % 4;
    unsigned down[PARTS_Y][4];
#pragma unroll
    for (int part = 0; part < PARTS_Y; ++part)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            down[part][i] = pairs[(ZEROS_DOWN + 16 * part + 2 * t + 8 * (i / 2) - SG_DOWN * (g + 8 * (i % 2))) / 2];
    const acc gain = OUTPUT_GAIN;
    const offset_t stride_y = static_cast<offset_t>(p.y_stride[2]);
    acc total = acc(0);
    const int across = (tile.columns + 15) / 16, squares = (tile.rows + 15) / 16 * across;
    for (int square = warp; square < squares; square += SG_WARPS) {
        const int first_row = square / across * 16, first_column = square % across * 16;
        const scalar* const from =
            stored + (first_row * SG_DOWN + lane % 16) * FILTERED_P + first_column + lane / 16 * 8;
        acc sums[2][4] = {};
#pragma unroll
        for (int part = 0; part < PARTS_Y; ++part) {
            if (first_row * SG_DOWN + 16 * part >= GRID_H) break;  // rows that the tile does not need
            unsigned b[4];
            load_matrices<true>(from + 16 * part * FILTERED_P, b);
#pragma unroll
            for (int half = 0; half < 2; ++half)
                add_product(down[part][0], down[part][1], down[part][2], down[part][3], b + 2 * half, sums[half]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int half = i / 2, below = i % 2;
            const int row = first_row + g + 8 * below, column = first_column + 8 * half + 2 * t;
            if (row >= tile.rows) continue;
            const acc found[2] = {sums[half][2 * below] * gain, sums[half][2 * below + 1] * gain};
#pragma unroll
            for (int c = 0; c < 2; c += SG_STORE) {
                if (column + c >= tile.columns) continue;
                write<SG_STORE>(tile.y + row * stride_y + column + c, found + c);
                total += sum_of<SG_STORE>(found + c);
            }
        }
    }
    return total;
}
