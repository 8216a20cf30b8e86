// Work that the threads of XLA's pool share.
#ifndef SPOTJAX_WORK_H_
#define SPOTJAX_WORK_H_

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace spotjax {

// Pieces that threads take one after another. The caller takes them, too, and waits for no thread that has not taken
// one: so it needs none, and never waits for one that waits for it.
class Work {
 public:
  explicit Work(int pieces) : pieces_(pieces) {}

  template <typename Compute>
  void take(const Compute& compute) {
    for (int piece; (piece = next_.fetch_add(1)) < pieces_;) {
      compute(piece);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  void wait() const {
    for (int spins = 0; done_.load(std::memory_order_acquire) < pieces_; ++spins) {
      if (spins > 2000) std::this_thread::yield();
    }
  }

 private:
  const int pieces_;
  std::atomic<int> next_{0}, done_{0};
};

inline int64_t threads_of(const xla::ffi::ThreadPool& pool) { return std::max<int64_t>(1, pool.num_threads()); }

// Has `compute(piece)` called for all pieces, and returns when all calls have. Threads that come too late keep a copy of
// `compute` for a while, but do not call it.
template <typename Compute>
void share(xla::ffi::ThreadPool& pool, int pieces, const Compute& compute) {
  const auto work = std::make_shared<Work>(pieces);
  auto help = [work, compute] { work->take(compute); };
  const int64_t helpers = std::min<int64_t>(threads_of(pool), pieces) - 1;
  for (int64_t helper = 0; helper < helpers; ++helper) pool.Schedule(decltype(help)(help));
  work->take(compute);
  work->wait();
}

}  // namespace spotjax

#endif  // SPOTJAX_WORK_H_
