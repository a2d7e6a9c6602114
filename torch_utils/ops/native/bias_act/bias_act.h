// Arguments of bias_act; torch_utils/ops/native/params.py mirrors this struct field by field.
#ifndef SG_BIAS_ACT_H
#define SG_BIAS_ACT_H
#include "../common.h"

#define SG_LINEAR 1
#define SG_RELU 2
#define SG_LRELU 3
#define SG_TANH 4
#define SG_SIGMOID 5
#define SG_ELU 6
#define SG_SELU 7
#define SG_SOFTPLUS 8
#define SG_SWISH 9

// With c(u) = clamp(act(u) * gain) and u = x + b:
//   order 0: out = c(u)               in = x
//   order 1: out = in * c'(u)         in = dy
//   order 2: out = in * in2 * c''(u)  in = dy, in2 = ddx (the gradient that arrives at dx)
// Where values are clamped (|act(u) * gain| >= clamp), both derivatives are zero.
// ref is the point of orders 1 and 2: y = c(u) for every activation but swish, x (b is added here) for swish.
// All tensors are dense and share one order of memory, in which element i has the bias (i / bias_step) % bias_size.
typedef struct {
    const void* in;
    const void* in2;     // order 2 only
    const void* ref;     // orders 1 and 2; null for linear without clamp
    const void* b;       // null: no bias
    void* out;
    void* db;            // order 1: the sums of out per bias, null: not computed. On the CPU [bias_size], on CUDA those
                         // of the groups and parts of sums.cuh, to be added up
    sg_int64 size;       // elements
    sg_int64 bias_size;  // at least 1
    sg_int64 bias_step;  // at least 1
    double alpha;
    double gain;
    double clamp;        // negative: none
    int dtype;
    int act;
    int order;
    int num_threads;     // CPU only
} sg_bias_act_params;

#ifndef __CUDACC__
#ifdef __cplusplus
extern "C"
#endif
int sg_bias_act(const sg_bias_act_params* params);
#endif

#endif
