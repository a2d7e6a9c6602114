// Arguments of upfirdn2d; torch_utils/ops/native/params.py mirrors this struct field by field.
#ifndef SG_UPFIRDN2D_H
#define SG_UPFIRDN2D_H
#include "../common.h"

// Along one axis, with taps g in correlation order (flip_filter: g = f; else g = f reversed):
//   out[m] = gain * sum_i g[i * up + pad0 - m * down] * in[i], over the i with 0 <= that index < taps, 0 <= i < in size
// out_h and out_w limit m; the caller computes them from the padding at the end, which is not needed here.
// pad0 may be negative. Taps are float32, float64 for float64 images, [f_h, f_w] dense; a separable filter
// has f_h = 0 and f_w taps, used along both axes (the gain is applied once).
typedef struct {
    const void* x;
    const void* f;
    void* y;
    sg_int64 x_stride[4];  // elements: n, c, h, w
    sg_int64 y_stride[4];
    int n, c, in_h, in_w, out_h, out_w;
    int f_h, f_w;
    int up_x, up_y, down_x, down_y;
    int pad_x0, pad_y0;
    int flip_filter;
    int dtype;
    double gain;
    int num_threads;       // CPU only
    int reserved;
} sg_upfirdn2d_params;

#ifndef __CUDACC__
#ifdef __cplusplus
extern "C"
#endif
int sg_upfirdn2d(const sg_upfirdn2d_params* params);
#endif

#endif
