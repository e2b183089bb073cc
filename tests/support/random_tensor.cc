#include "tests/support/random_tensor.h"

#include <cmath>
#include <cstring>

#include "kernels/core/random.h"

namespace baleen::testing {
namespace {

void Set(const Tensor& tensor, int64_t i, double value) {
  if (tensor.dtype() == DType::kF64) {
    tensor.data<double>()[i] = value;
  } else {
    tensor.data<float>()[i] = static_cast<float>(value);
  }
}

}  // namespace

Tensor RandomTensor(const Context& context, DType dtype, Shape shape, uint64_t seed, double scale) {
  Tensor tensor = context.Empty(dtype, std::move(shape));
  const RandomStream random(seed, 0x7e57);
  for (int64_t i = 0; i < tensor.num_elements(); ++i) Set(tensor, i, scale * random.Normal(i));
  return tensor;
}

Tensor TensorOf(const Context& context, DType dtype, Shape shape,
                const std::vector<double>& values) {
  Tensor tensor = context.Empty(dtype, std::move(shape));
  CHECK_EQ(tensor.num_elements(), static_cast<int64_t>(values.size()));
  for (int64_t i = 0; i < tensor.num_elements(); ++i) Set(tensor, i, values[i]);
  return tensor;
}

Tensor IntTensorOf(const Context& context, Shape shape, const std::vector<int32_t>& values) {
  Tensor tensor = context.Empty(DType::kI32, std::move(shape));
  CHECK_EQ(tensor.num_elements(), static_cast<int64_t>(values.size()));
  for (int64_t i = 0; i < tensor.num_elements(); ++i) tensor.data<int32_t>()[i] = values[i];
  return tensor;
}

std::vector<double> ToDoubles(const Tensor& tensor) {
  std::vector<double> values(tensor.num_elements());
  for (int64_t i = 0; i < tensor.num_elements(); ++i) {
    switch (tensor.dtype()) {
      case DType::kF64:
        values[i] = tensor.data<double>()[i];
        break;
      case DType::kF32:
        values[i] = tensor.data<float>()[i];
        break;
      case DType::kBF16:
        values[i] = tensor.data<BFloat16>()[i].ToFloat();
        break;
      case DType::kI32:
        values[i] = tensor.data<int32_t>()[i];
        break;
      case DType::kI64:
        values[i] = static_cast<double>(tensor.data<int64_t>()[i]);
        break;
      default:
        CHECK(false) << tensor.DebugString();
    }
  }
  return values;
}

double RelativeError(const std::vector<double>& a, const std::vector<double>& b) {
  CHECK_EQ(a.size(), b.size());
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  // NaN anywhere makes the result NaN, which passes no upper bound.
  return std::sqrt(difference) / std::max(std::sqrt(norm), 1e-300);
}

double RelativeError(const Tensor& a, const Tensor& b) {
  return RelativeError(ToDoubles(a), ToDoubles(b));
}

double Cosine(const Tensor& a, const Tensor& b) {
  const std::vector<double> x = ToDoubles(a), y = ToDoubles(b);
  CHECK_EQ(x.size(), y.size());
  double xy = 0, xx = 0, yy = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    xy += x[i] * y[i];
    xx += x[i] * x[i];
    yy += y[i] * y[i];
  }
  if (xx == 0 && yy == 0) return 1;
  return xy / std::sqrt(xx * yy);
}

bool SameBits(const Tensor& a, const Tensor& b) {
  return a.dtype() == b.dtype() && a.shape() == b.shape() &&
         std::memcmp(a.raw(), b.raw(), static_cast<size_t>(a.bytes())) == 0;
}

}  // namespace baleen::testing
