// Arguments of filtered_lrelu; torch_utils/ops/native/params.py mirrors this struct field by field.
#ifndef SG_FILTERED_LRELU_H
#define SG_FILTERED_LRELU_H
#include "../common.h"

// Modes: what is done between the filters.
#define SG_ACTIVATE 0  // leaky ReLU and clamp, no mask
#define SG_RECORD 1    // the same, and the two bits of each element are written to mask
#define SG_GATE 2      // multiply by 1, slope or 0, by the bits of the mask; b and clamp are not used

// Along each axis, with taps in correlation order (flip_filter: as given; else reversed):
//   u[m] = up_gain * sum_i fu[i * up + pad0 - m] * (in[i] + b)         (padding is zero: the bias is not in it)
//   v[m] = activation or gate of u[m]
//   out[j] = sum_k fd[k] * v[j * down + k]
// up_gain includes up^2 and the gain of the op, which commutes with a leaky ReLU. The grid of u has the size that the
// outputs need: (out - 1) * down + taps_d. Element (h, w) of the grid has its bits at row
// h + mask_off_y, column w + mask_off_x of the mask; SG_GATE uses zero outside [mask_h, mask_w].
// So the backward pass is the same op: filters exchanged and flipped, up and down exchanged,
// pad0' = (taps_u - 1) + (taps_d - 1) - pad0, mask_off = pad0 - (taps_u - 1).
// Its own backward pass gates with offset 0.
//
// mask: [n, c, mask_h, mask_row_bytes] bytes, dense, two bits per element; the layout of a row depends on the
// implementation (it is read by the process that wrote it). Rows that no output needs may be uninitialized.
// Taps are float32, float64 for float64 images, dense; *_h = 0 means *_w taps along both axes (separable), and
// h = w = 1 the single tap of an identity.
typedef struct {
    const void* x;
    const void* fu;
    const void* fd;
    const void* b;          // [c] or null
    void* y;
    unsigned char* mask;    // null with SG_ACTIVATE
    void* sums;             // CUDA and SG_GATE only: null, or sums of outputs, acc [n, c, tiles_y, tiles_x]
    sg_int64 x_stride[4];   // elements: n, c, h, w
    sg_int64 y_stride[4];
    int n, c, in_h, in_w, out_h, out_w;
    int fu_h, fu_w, fd_h, fd_w;
    int up, down;
    int pad_x0, pad_y0;
    int mask_h, mask_w, mask_row_bytes;
    int mask_off_x, mask_off_y;
    int flip_filter;
    int mode;
    int dtype;
    double up_gain;
    double slope;
    double clamp;           // negative: none
    int num_threads;        // CPU only
    int tile_h;             // CUDA only: rows of outputs of a block
} sg_filtered_lrelu_params;

#ifndef __CUDACC__
#ifdef __cplusplus
extern "C"
#endif
int sg_filtered_lrelu(const sg_filtered_lrelu_params* params);
#endif

#endif
