// Owned<Handle, kDestroy>: the one owner of a C handle (stream, communicator, file, HDF5 id).
//
//   using OwnedFile = Owned<std::FILE*, [](std::FILE* f) { std::fclose(f); }>;
//
// Move-only; an empty one holds Handle{} and destroys nothing. Destroy functions log, they never
// throw.
#pragma once

#include <utility>

namespace baleen {

template <typename Handle, auto kDestroy, Handle kEmpty = Handle{}>
class Owned {
 public:
  Owned() = default;
  explicit Owned(Handle handle) : handle_(handle) {}
  Owned(Owned&& other) noexcept : handle_(std::exchange(other.handle_, kEmpty)) {}
  Owned& operator=(Owned&& other) noexcept {
    if (this != &other) {
      Reset();
      handle_ = std::exchange(other.handle_, kEmpty);
    }
    return *this;
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() { Reset(); }

  Handle get() const { return handle_; }
  explicit operator bool() const { return handle_ != kEmpty; }
  // Gives the handle up; the caller destroys it.
  Handle Release() { return std::exchange(handle_, kEmpty); }
  void Reset() {
    if (handle_ != kEmpty) kDestroy(std::exchange(handle_, kEmpty));
  }

 private:
  Handle handle_ = kEmpty;
};

}  // namespace baleen
