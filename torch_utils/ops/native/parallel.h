// Threads for the CPU kernels, and scratch memory that each of them keeps.
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

// Calls function(context, task) for every task below `tasks` on up to num_threads threads, and returns when all
// are done. Which thread takes which task is open: a result may not depend on it. Exceptions may not leave a task.
void run_tasks(int num_threads, sg_int64 tasks, task_function function, void* context);

template <class F>
void parallel_for(int num_threads, sg_int64 tasks, F&& body) {
    run_tasks(num_threads, tasks, [](void* context, sg_int64 task) { (*static_cast<F*>(context))(task); }, &body);
}

// At least `bytes` of memory on a 64-byte boundary, the calling thread's own until it asks again; null if there is none.
void* scratch(size_t bytes);

}  // namespace sg

// The address of GOMP_parallel in the OpenMP library that the process already has: its threads are used instead of
// ours. Null takes that back.
SG_EXPORT void sg_set_parallel_runner(void* gomp_parallel);

// Bytes of the struct that an op takes (0 bias_act, 1 upfirdn2d, 2 filtered_lrelu).
SG_EXPORT int sg_struct_bytes(int op);

// Compiler and instruction set, one line.
SG_EXPORT const char* sg_build_info(void);

#endif
