// Arguments of fma; torch_utils/ops/native/params.py mirrors this struct field by field.
#ifndef SG_FMA_H
#define SG_FMA_H
#include "../common.h"

// out = in * b + c for dense in, out [n, channels, size] (planar) or [n, size, channels], b [n, channels], and
//   db: sums of in * other per image and channel, one per part (sums.cuh), in the type of computation
//   dc: [n, size], sums of in over channels; not for planar memory
// The gradient of y = a * b + c takes in = dy and other = a.
typedef struct {
    const void* in;
    const void* other; // null without db
    const void* b;
    const void* c;     // addend 0: null, 1: one number, 2: [size] at every c_step elements for each image
    void* out;
    void* db;          // null: not computed
    void* dc;          // null: not computed
    sg_int64 size;     // pixels of an image
    sg_int64 c_step;
    int n;
    int channels;
    int planar;
    int addend;
    int dtype;
    int reserved;
} sg_fma_params;

#endif
