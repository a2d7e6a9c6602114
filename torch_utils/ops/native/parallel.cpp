// The thread pool of parallel_for: that of OpenMP if the process has one, else our own. Also, information on the
// library.
#include "parallel.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "bias_act/bias_act.h"
#include "filtered_lrelu/filtered_lrelu.h"
#include "upfirdn2d/upfirdn2d.h"

#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace sg {
namespace {

struct Work {
    task_function function;
    void* context;
    sg_int64 tasks;
    std::atomic<sg_int64> next;
};

void take_tasks(void* data) {
    Work& work = *static_cast<Work*>(data);
    for (;;) {
        sg_int64 task = work.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= work.tasks) return;
        work.function(work.context, task);
    }
}

typedef void (*gomp_parallel_function)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<gomp_parallel_function> gomp_parallel{nullptr};
std::atomic<long> gomp_owner{0};

long process() {
#if defined(_WIN32)
    return 0;
#else
    return static_cast<long>(getpid());
#endif
}

// Threads that sleep between calls. One call at a time uses them; a concurrent call, from another Python thread, runs
// single-threaded instead of waiting. The pool is never destroyed: at exit its threads are asleep and own nothing.
class Pool {
  public:
    const long owner = process();

    bool run(int helpers, Work& work) {
        std::unique_lock<std::mutex> use(in_use_, std::try_to_lock);
        if (!use.owns_lock()) return false;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            try {
                while (threads_ < helpers) {
                    std::thread(&Pool::live, this, threads_).detach();
                    ++threads_;
                }
            } catch (...) {  // thread limit reached: use those that exist
            }
            work_ = &work;
            wanted_ = helpers < threads_ ? helpers : threads_;
            running_ = wanted_;
            ++round_;
        }
        wake_.notify_all();
        take_tasks(&work);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
        work_ = nullptr;
        return true;
    }

  private:
    void live(int index) {
        uint64_t seen = 0;
        for (;;) {
            Work* work;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return round_ != seen; });
                seen = round_;
                if (index >= wanted_ || !work_) continue;
                work = work_;
            }
            take_tasks(work);
            std::lock_guard<std::mutex> lock(mutex_);
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex in_use_, mutex_;
    std::condition_variable wake_, done_;
    Work* work_ = nullptr;
    int threads_ = 0, wanted_ = 0, running_ = 0;
    uint64_t round_ = 0;
};

// A forked child has no threads of the pool, and its locks may be held: create a new pool.
Pool* pool() {
    static std::atomic<Pool*> current{nullptr};
    Pool* found = current.load();
    if (found && found->owner == process()) return found;
    Pool* fresh = new (std::nothrow) Pool;
    if (!fresh || current.compare_exchange_strong(found, fresh)) return fresh;
    delete fresh;  // another thread created one first; ours has no threads yet
    return found;
}

thread_local bool inside = false;  // nested kernel calls are single-threaded

struct Scratch {
    void* memory = nullptr;
    size_t bytes = 0;
    ~Scratch() { std::free(memory); }
};
thread_local Scratch own_scratch;

}  // namespace

void run_tasks(int num_threads, sg_int64 tasks, task_function function, void* context) {
    Work work{function, context, tasks, {0}};
    if (num_threads > tasks) num_threads = static_cast<int>(tasks);
    if (num_threads <= 1 || inside) {
        take_tasks(&work);
        return;
    }
    inside = true;
    gomp_parallel_function runner = gomp_parallel.load(std::memory_order_relaxed);
    if (runner && gomp_owner.load(std::memory_order_relaxed) == process()) {  // OpenMP's threads do not survive a fork
        runner(take_tasks, &work, static_cast<unsigned>(num_threads), 0);
    } else {
        Pool* threads = pool();
        if (!threads || !threads->run(num_threads - 1, work)) take_tasks(&work);
    }
    inside = false;
}

void* scratch(size_t bytes) {
    const size_t line = 64;
#if defined(__SANITIZE_ADDRESS__)
    const bool fits = own_scratch.bytes == bytes;  // exactly this size, so that sanitizers detect overruns
#else
    const bool fits = own_scratch.bytes >= bytes;
#endif
    if (!fits) {
        std::free(own_scratch.memory);
        own_scratch.memory = std::malloc(bytes + line);
        own_scratch.bytes = own_scratch.memory ? bytes : 0;
    }
    if (!own_scratch.memory) return nullptr;
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(own_scratch.memory) + line - 1) / line * line);
}

}  // namespace sg

void sg_set_parallel_runner(void* gomp_parallel) {
    sg::gomp_owner.store(sg::process());
    sg::gomp_parallel.store(reinterpret_cast<sg::gomp_parallel_function>(gomp_parallel));
}

int sg_struct_bytes(int op) {
    const int bytes[] = {sizeof(sg_bias_act_params), sizeof(sg_upfirdn2d_params), sizeof(sg_filtered_lrelu_params)};
    return op >= 0 && op < 3 ? bytes[op] : 0;
}

#define SG_TEXT(x) #x
#define SG_TEXT_OF(x) SG_TEXT(x)

const char* sg_build_info(void) {
    return
#if defined(__clang__)
        "clang " __clang_version__
#elif defined(__GNUC__)
        "gcc " __VERSION__
#elif defined(_MSC_VER)
        "msvc " SG_TEXT_OF(_MSC_VER)
#else
        "an unknown compiler"
#endif
#if defined(__AVX512F__)
        ", AVX-512";
#elif defined(__AVX2__)
        ", AVX2";
#elif defined(__ARM_NEON)
        ", NEON";
#else
        ", no wide vectors";
#endif
}
