// Arguments of unit_distance; torch_utils/ops/native/params.py mirrors this struct field by field.
#ifndef SG_UNIT_DISTANCE_H
#define SG_UNIT_DISTANCE_H
#include "../common.h"

// For x, y [positions, channels], with u = x / sqrt(sum of x^2 + 1e-10) at each position, and v likewise of y:
//   without s: out [positions] = sum over channels of w * (u - v)^2
//   with s:    out [positions, channels] = s times the gradient of that to x
typedef struct {
    const void* x;
    const void* y;
    const void* w;  // [channels] in the type of computation; null: ones
    const void* s;  // [positions]
    void* out;
    sg_int64 positions;
    int channels;
    int dtype;
} sg_unit_distance_params;

#endif
