// The 2-D down filter of filtered_lrelu on tensor cores: float16 images, down 2, compute capability 8.0 or higher.
//
// The grid is stored as float16. A warp computes pieces of 16 rows and 8 columns of outputs as sums of matrix products
// in float32, one for each row ky of taps:
//
//   piece[16 x 8] += A[16 x 32] * B[32 x 8]
//   A[m][k] = grid[2 * row(m) + ky][2 * column + k],  B[k][n] = taps[ky][k - 2 * n]
//
// B has zeros where there is no such tap. It is the same for all pieces, and a warp keeps it in registers. The product
// is taken in two halves of k; the second half of A is the first half for the next piece to the right. Rows m of A are
// first the even rows of the piece, then the odd ones. The odd ones are the even ones for ky + 2, which saves loads.
//
// The order of the sums depends on the column in a piece only, and tiles begin at multiples of 8 columns. Zeros of B do
// not hide NaN: all columns that a piece reads are elements of the grid, and NaN spreads by up to 12 outputs along x.
#include "matrices.cuh"

#define PIECE_H 16
#define PIECE_W 8
#define PITCH THREADS          // elements from a row of the grid to the next, in groups of four rows
#define GROUP (4 * PITCH + 8)  // from group to group, so that the same row of eight groups is in different banks
#define ROWS_READ UP_TO(4, SG_TAPS_DY + 2)

static_assert(SG_DOWN == 2 && SG_TAPS_DX <= 32 - 2 * (PIECE_W - 1), "columns of A");
static_assert(4 % SG_PERIOD == 0, "a block of rows is within a group");
static_assert(SG_TILE_W % PIECE_W == 0, "columns of outputs begin at the same place of a piece in all tiles");

// ---- Taps, as pairs of float16 with zeros around them: columns of B begin at different pairs

#define PAIRS 16                  // of a row, of which the last are zeros
#define ZERO_PAIRS (PIECE_W - 1)  // before the first row
#define TAPS_D (ZERO_PAIRS + SG_TAPS_DY * PAIRS)

__device__ __forceinline__ void read_down_taps(const acc* fd, bool as_given, acc* down) {
    for (int i = threadIdx.x; i < TAPS_D; i += THREADS) {
        const int kx = (i + PAIRS - ZERO_PAIRS) % PAIRS * 2, k = (i - ZERO_PAIRS) / PAIRS * SG_TAPS_DX + kx;
        acc pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e)
            pair[e] = kx + e < SG_TAPS_DX ? fd[as_given ? k + e : SG_TAPS_DY * SG_TAPS_DX - 1 - k - e] : acc(0);
        reinterpret_cast<unsigned*>(down)[i] = pack_pair(pair[0], pair[1]);
    }
}

// ---- The grid

#define GRID_ACCS(rows) (((rows) + 3) / 4 * GROUP / 2)

struct filtered_t {
    scalar* to;  // this column of the grid, from the next row on

    __device__ __forceinline__ filtered_t(const acc*, acc* area) : to(reinterpret_cast<scalar*>(area) + threadIdx.x) {}
    __device__ __forceinline__ void take(acc v, int s) { store_acc(to + s * PITCH, v); }
    __device__ __forceinline__ void next_block(int b, int) {
        to += (b + 1) * SG_PERIOD % 4 == 0 ? GROUP - (4 - SG_PERIOD) * PITCH : SG_PERIOD * PITCH;
    }
};

// ---- Outputs

// The sums of a lane in two rows and two columns of a piece. A product waits for the one before, so there are two
// parts: of ky with ky / 2 even, and of the others, for which the rows of outputs are exchanged.
struct sums_t {
    acc straight[4], exchanged[4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 4; ++i) straight[i] = exchanged[i] = acc(0);
    }
};

// Add what 16 columns of the grid contribute to the piece that begins there, and to the piece on the left of it.
template <bool BEGINS, bool ENDS>
__device__ __forceinline__ void filter(const scalar* from, const unsigned (*b)[4], sums_t& begun, sums_t& ended) {
    unsigned a[ROWS_READ / 2][4];  // of the grid: rows 0 and 2, 1 and 3, 4 and 6, 5 and 7, ...
#pragma unroll
    for (int i = 0; i < 2; ++i) load_matrices(from + i * PITCH, a[i]);
#pragma unroll
    for (int ky = 0; ky < SG_TAPS_DY; ky += ky % 4 == 1 ? 3 : 1) {
        const int i = ky / 2 + ky % 4;
        const unsigned* const now = a[i];
        if (ENDS) add_product(now[0], now[1], now[2], now[3], b[ky] + 2, ended.straight);
        if (BEGINS) add_product(now[0], now[1], now[2], now[3], b[ky], begun.straight);
        if (ky + 2 >= SG_TAPS_DY) continue;
        unsigned* const next = a[i + 2];
        load_matrices(from + (ky + 4) / 4 * GROUP + ky % 4 * PITCH, next);
        if (ENDS) add_product(next[0], now[1], next[2], now[3], b[ky + 2] + 2, ended.exchanged);
        if (BEGINS) add_product(next[0], now[1], next[2], now[3], b[ky + 2], begun.exchanged);
    }
}

// Filter the grid and write the outputs; a warp has neighboring pieces. Returns 0, because
// only SG_GATE needs their sum.
__device__ __forceinline__ acc write_outputs(
    const sg_filtered_lrelu_params& p, const tile_t& tile, const acc* taps, const acc* grid, scalar* y) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int g = lane / 4, t = lane % 4;
    const int across = (tile.columns + PIECE_W - 1) / PIECE_W, pieces = (tile.rows + PIECE_H - 1) / PIECE_H * across;
    const int end = pieces * (warp + 1) / (THREADS / 32);
    int piece = pieces * warp / (THREADS / 32);
    if (piece == end) return acc(0);
    const unsigned* const mine = reinterpret_cast<const unsigned*>(taps) + ZERO_PAIRS + t - g;
    unsigned b[SG_TAPS_DY][4];
#pragma unroll
    for (int ky = 0; ky < SG_TAPS_DY; ++ky)
#pragma unroll
        for (int i = 0; i < 4; ++i) b[ky][i] = mine[ky * PAIRS + 4 * i];
    const offset_t stride_y = static_cast<offset_t>(p.y_stride[2]);
    while (piece < end) {
        const int row = piece / across * PIECE_H, first = piece % across;
        const int count = across - first < end - piece ? across - first : end - piece;
        piece += count;
        // Rows of outputs that the tile does not have are computed from others of the grid, which may end here.
        const int pair = row + 2 * (lane % 8) < tile.rows ? lane % 8 : 0;
        const scalar* from = reinterpret_cast<const scalar*>(grid) + (row / 2 + pair) * GROUP +
                             lane / 8 % 2 * 2 * PITCH + lane / 16 * 8 + first * 2 * PIECE_W;
        int column = first * PIECE_W + 2 * t;
        scalar* to = y + (row + 2 * g) * stride_y + column;
        sums_t sums, next;
        sums.clear();
        filter<true, false>(from, b, sums, sums);
#pragma unroll 1
        for (int left = count; left > 0; --left) {
            from += 2 * PIECE_W;
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
            sums = next, column += PIECE_W, to += PIECE_W;
        }
    }
    return acc(0);
}
