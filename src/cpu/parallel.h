// Rows in parallel on XLA's own thread pool.

#ifndef JAX_ROUTER_CPU_PARALLEL_H_
#define JAX_ROUTER_CPU_PARALLEL_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

#include "ffi.h"

namespace jax_router {

inline ffi::Future finished(ffi::Error error) {
  ffi::Promise promise;
  if (error.failure()) {
    promise.SetError(std::move(error));
  } else {
    promise.SetAvailable();
  }
  return ffi::Future(promise);
}

// Memory for one thread, aligned to a cache line.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : data_(::operator new(bytes + 1, kAlignment)) {}
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void* data_;
};

// Calls body(begin, end) over [0, rows) in chunks of about `chunk_cost` units of work, on the
// caller's thread and the pool's. Chunks are fixed by the sizes alone; which thread takes which
// does not matter to the result. The future completes with the last chunk, so no thread ever
// blocks: a task that comes late finds no chunk left and touches nothing. `finish` runs when all
// chunks are done, before the future completes.
template <typename Body, typename Finish>
ffi::Future parallel_rows(ffi::ThreadPool& pool, int64_t rows, int64_t cost_per_row, Body body,
                          Finish finish) {
  constexpr int64_t kChunkCost = 1 << 15;
  const int64_t chunk = cost_per_row < kChunkCost ? kChunkCost / cost_per_row : 1;
  const int64_t chunks = (rows + chunk - 1) / chunk;
  if (chunks <= 1) {
    if (rows > 0) body(0, rows);
    finish();
    return finished(ffi::Error::Success());
  }
  struct Work {
    Work(Body rows_body, Finish rows_finish, int64_t chunks)
        : body(std::move(rows_body)), finish(std::move(rows_finish)), left(chunks), done(chunks) {}
    Body body;
    Finish finish;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> left;
    ffi::CountDownPromise done;
  };
  auto work = std::make_shared<Work>(std::move(body), std::move(finish), chunks);
  ffi::Future future(work->done);
  auto run = [work, rows, chunk, chunks] {
    for (int64_t i = work->next++; i < chunks; i = work->next++) {
      const int64_t begin = i * chunk;
      work->body(begin, begin + chunk < rows ? begin + chunk : rows);
      if (--work->left == 0) work->finish();
      work->done.CountDown();
    }
  };
  const int64_t threads = pool.num_threads() < chunks ? pool.num_threads() : chunks;
  for (int64_t i = 1; i < threads; ++i) pool.Schedule(decltype(run)(run));
  run();
  return future;
}

template <typename Body>
ffi::Future parallel_rows(ffi::ThreadPool& pool, int64_t rows, int64_t cost_per_row, Body body) {
  return parallel_rows(pool, rows, cost_per_row, std::move(body), [] {});
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CPU_PARALLEL_H_
