#include "kernels/core/tensor.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace baleen {

int64_t NumElements(const Shape& shape) {
  int64_t count = 1;
  for (int64_t extent : shape) count *= extent;
  return count;
}

std::string ShapeString(const Shape& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

Tensor::Tensor(std::shared_ptr<Storage> storage, int64_t offset_bytes, DType dtype, Shape shape,
               Device device)
    : storage_(std::move(storage)),
      offset_bytes_(offset_bytes),
      num_elements_(NumElements(shape)),
      dtype_(dtype),
      shape_(std::move(shape)),
      device_(device) {
  CHECK(storage_ != nullptr);
  CHECK_LE(offset_bytes_ + bytes(), storage_->bytes()) << DebugString();
}

int64_t Tensor::dim(int index) const {
  const int resolved = index < 0 ? index + rank() : index;
  CHECK(resolved >= 0 && resolved < rank()) << "dim " << index << " of " << DebugString();
  return shape_[resolved];
}

void* Tensor::raw() const {
  if (storage_ == nullptr) return nullptr;
  return static_cast<char*>(storage_->data()) + offset_bytes_;
}

Tensor Tensor::Reshaped(Shape shape) const {
  CHECK_EQ(NumElements(shape), num_elements_) << DebugString() << " as " << ShapeString(shape);
  Tensor result = *this;
  result.shape_ = std::move(shape);
  return result;
}

Tensor Tensor::Rows(int64_t begin, int64_t end) const {
  CHECK(rank() >= 1 && begin >= 0 && begin <= end && end <= dim(0))
      << "rows " << begin << ".." << end << " of " << DebugString();
  const int64_t row_elements = dim(0) == 0 ? 0 : num_elements_ / dim(0);
  Tensor result = *this;
  result.shape_[0] = end - begin;
  result.num_elements_ = row_elements * (end - begin);
  result.offset_bytes_ += begin * row_elements * DTypeBytes(dtype_);
  return result;
}

Tensor Tensor::Flat(int64_t begin, int64_t count) const {
  return Reshaped({num_elements_}).Rows(begin, begin + count);
}

std::string Tensor::DebugString() const {
  return absl::StrCat(DTypeName(dtype_), ShapeString(shape_));
}

MatrixView MatrixView::Columns(int64_t begin, int64_t count) const {
  CHECK(begin >= 0 && count >= 0 && begin + count <= cols)
      << "columns " << begin << "+" << count << " of " << cols;
  MatrixView result = *this;
  result.offset += begin;
  result.cols = count;
  return result;
}

MatrixView MatrixView::RowRange(int64_t begin, int64_t end) const {
  CHECK(begin >= 0 && begin <= end && end <= rows) << begin << ".." << end << " of " << rows;
  MatrixView result = *this;
  result.offset += begin * row_stride;
  result.rows = end - begin;
  return result;
}

MatrixView AsMatrix(const Tensor& tensor) {
  CHECK_GE(tensor.rank(), 1) << tensor.DebugString();
  MatrixView view;
  view.tensor = tensor;
  view.cols = tensor.dim(-1);
  view.rows = view.cols == 0 ? 0 : tensor.num_elements() / view.cols;
  view.row_stride = view.cols;
  view.batch_stride = tensor.num_elements();
  return view;
}

MatrixView PerHead(const Tensor& tensor_THW) {
  CHECK_EQ(tensor_THW.rank(), 3) << tensor_THW.DebugString();
  MatrixView view;
  view.tensor = tensor_THW;
  view.batch = tensor_THW.dim(1);
  view.rows = tensor_THW.dim(0);
  view.cols = tensor_THW.dim(2);
  view.batch_stride = view.cols;
  view.row_stride = view.batch * view.cols;
  return view;
}

MatrixView AsBatch(const Tensor& tensor_BRC) {
  CHECK_EQ(tensor_BRC.rank(), 3) << tensor_BRC.DebugString();
  MatrixView view;
  view.tensor = tensor_BRC;
  view.batch = tensor_BRC.dim(0);
  view.rows = tensor_BRC.dim(1);
  view.cols = tensor_BRC.dim(2);
  view.batch_stride = view.rows * view.cols;
  view.row_stride = view.cols;
  return view;
}

}  // namespace baleen
