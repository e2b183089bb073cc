// Tensor: dtype, shape, device and shared storage with an offset; contiguous, row-major, without
// operators. MatrixView: a strided (batch of) matrix over a tensor's storage, for GEMM and
// attention operands only.
//
// Copying a Tensor shares its storage. What computes on tensors are the ops in kernels/ops.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "kernels/core/check.h"
#include "kernels/core/dtype.h"

namespace baleen {

enum class DeviceKind : uint8_t { kCpu, kCuda };

struct Device {
  DeviceKind kind = DeviceKind::kCpu;
  int index = 0;  // CUDA device ordinal; 0 on the CPU
  bool operator==(const Device&) const = default;
};

// Extents, outermost first. A rank-0 shape is a scalar with one element.
using Shape = std::vector<int64_t>;

int64_t NumElements(const Shape& shape);
std::string ShapeString(const Shape& shape);  // "[4, 128]"

// A block of device memory; the pool that made it takes it back when the last Tensor is gone.
class Storage {
 public:
  virtual ~Storage() = default;
  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 protected:
  Storage(void* data, int64_t bytes) : data_(data), bytes_(bytes) {}

 private:
  void* data_;
  int64_t bytes_;
};

class Tensor {
 public:
  Tensor() = default;  // empty: no storage, zero elements
  Tensor(std::shared_ptr<Storage> storage, int64_t offset_bytes, DType dtype, Shape shape,
         Device device);

  bool empty() const { return storage_ == nullptr; }
  DType dtype() const { return dtype_; }
  Device device() const { return device_; }
  const Shape& shape() const { return shape_; }
  int rank() const { return static_cast<int>(shape_.size()); }
  // Extent of one dimension; a negative index counts from the end.
  int64_t dim(int index) const;
  int64_t num_elements() const { return num_elements_; }
  int64_t bytes() const { return num_elements_ * DTypeBytes(dtype_); }

  // Typed pointer; CHECKs that T is the tensor's dtype.
  template <typename T>
  T* data() const {
    CHECK_EQ(static_cast<int>(DTypeOf<T>::value), static_cast<int>(dtype_))
        << "asked for " << DTypeName(DTypeOf<T>::value) << " of " << DebugString();
    return static_cast<T*>(raw());
  }
  void* raw() const;

  // The same elements under another shape with the same number of elements.
  Tensor Reshaped(Shape shape) const;
  // Rows [begin, end) of the outermost dimension, sharing storage.
  Tensor Rows(int64_t begin, int64_t end) const;
  // `count` elements from flat element `begin`, as a vector, sharing storage.
  Tensor Flat(int64_t begin, int64_t count) const;

  std::string DebugString() const;  // "F32[4, 128]"

 private:
  std::shared_ptr<Storage> storage_;
  int64_t offset_bytes_ = 0;
  int64_t num_elements_ = 0;
  DType dtype_ = DType::kF32;
  Shape shape_;
  Device device_;
};

// `batch` matrices of rows x cols elements inside a tensor's storage; element (b, r, c) is at
// offset + b * batch_stride + r * row_stride + c (all in elements). The columns are contiguous.
struct MatrixView {
  Tensor tensor;
  int64_t offset = 0;
  int64_t batch = 1;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;

  DType dtype() const { return tensor.dtype(); }
  // `cols` columns from column `begin` of every row.
  MatrixView Columns(int64_t begin, int64_t count) const;
  MatrixView RowRange(int64_t begin, int64_t end) const;
};

// The whole tensor as one matrix: the last dimension is the columns, all others are rows.
MatrixView AsMatrix(const Tensor& tensor);
// A [rows, heads, width] tensor as `heads` matrices of [rows, width] (one per head, no copy).
MatrixView PerHead(const Tensor& tensor_THW);
// A [batch, rows, cols] tensor as `batch` matrices.
MatrixView AsBatch(const Tensor& tensor_BRC);

}  // namespace baleen
