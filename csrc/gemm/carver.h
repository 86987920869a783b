// Hands out the buffers of one part, each at a cache line of its own, from memory that the caller owns; or, from null,
// counts their bytes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "divide.h"

namespace torchq {

class Carver {
 public:
  explicit Carver(void* memory) : next_(round_up(reinterpret_cast<intptr_t>(memory), 64)) {}
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ = round_up(next_ + count * static_cast<int64_t>(sizeof(T)), 64);
    return taken;
  }
  // What was taken from null, with room to start at a cache line.
  size_t bytes() const { return next_ + 64; }

 private:
  intptr_t next_;
};

}  // namespace torchq
