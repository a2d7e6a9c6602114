// Threads for the CPU kernels, and scratch memory per thread.
#ifndef SG_PARALLEL_H
#define SG_PARALLEL_H
#include <cstddef>

#include "common.h"

#if defined(_WIN32)
#define SG_EXPORT extern "C" __declspec(dllexport)
#else
#define SG_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace sg {

typedef void (*task_function)(void* context, sg_int64 task);

// Call function(context, task) for every task below `tasks` on up to num_threads threads, and return when all are
// done. The assignment of tasks to threads is unspecified; results must not depend on it. Tasks must not throw.
void run_tasks(int num_threads, sg_int64 tasks, task_function function, void* context);

template <class F>
void parallel_for(int num_threads, sg_int64 tasks, F&& body) {
    run_tasks(num_threads, tasks, [](void* context, sg_int64 task) { (*static_cast<F*>(context))(task); }, &body);
}

// Return at least `bytes` of 64-byte aligned memory, owned by the calling thread until its next call; null on failure.
void* scratch(size_t bytes);

}  // namespace sg

// Set the address of GOMP_parallel in the OpenMP library of the process, whose threads are then used instead of ours.
// Null resets it.
SG_EXPORT void sg_set_parallel_runner(void* gomp_parallel);

// Return the size in bytes of the struct of an op (0 bias_act, 1 upfirdn2d, 2 filtered_lrelu).
SG_EXPORT int sg_struct_bytes(int op);

// Return compiler and instruction set, one line.
SG_EXPORT const char* sg_build_info(void);

#endif
