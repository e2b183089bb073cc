// The rows of dkv between the products and their sum: short (one exponent for eight numbers) for up
// to 64 heads, bf16 for more. Each keeps its precision whatever its size is, and what is not finite
// reaches dkv.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/ops/attention/sparse_attention.h"
#include "tests/cuda/ops_support.h"

namespace baleen {
namespace {

using testing::Cpu;
using testing::Gpu;
using testing::IntsOnBoth;
using testing::OnBoth;
using testing::OnHost;
using testing::RandomOnBoth;
using testing::ToDoubles;

constexpr int64_t kQueries = 6, kKeysAQuery = 40, kKeys = kQueries * kKeysAQuery;
constexpr int64_t kC = 576, kV = 512, kSlots = 64;

// Queries that share no key, so that each row of dkv is one query's.
struct Apart {
  Apart(int64_t num_heads, const std::vector<double>& d_out)
      : q(RandomOnBoth(DType::kBF16, {kQueries, num_heads, kC}, 1)),
        kv(RandomOnBoth(DType::kBF16, {kKeys, kC}, 2)),
        d_o(testing::ValuesOnBoth(DType::kBF16, {kQueries, num_heads, kV}, d_out)),
        ids(IntsOnBoth({kQueries, kSlots}, Lists())) {}

  static std::vector<int32_t> Lists() {
    std::vector<int32_t> ids(kQueries * kSlots, -1);
    for (int64_t t = 0; t < kQueries; ++t) {
      for (int64_t k = 0; k < kKeysAQuery; ++k) {
        ids[t * kSlots + k] = static_cast<int32_t>(t * kKeysAQuery + k);
      }
    }
    return ids;
  }
  // Rows of dkv on the GPU, and the definition's from the GPU's o and lse.
  std::vector<double> OnGpu() const {
    const Tensor dkv = Gpu().Zeros(DType::kF32, {kKeys, kC});
    SparseAttentionBackward(Gpu(), d_o.gpu, q.gpu, kv.gpu, Forward(), ids.gpu, kScale, dkv,
                            Gpu().Empty(DType::kF32, {kQueries, kSlots}));
    return ToDoubles(OnHost(dkv));
  }
  std::vector<double> Defined() const {
    const SparseAttentionResult gpu = Forward();
    const Tensor dkv = Cpu().Zeros(DType::kF64, {kKeys, kC});
    SparseAttentionBackward(
        Cpu(), d_o.cpu, q.cpu, kv.cpu,
        {Cast(Cpu(), OnHost(gpu.o_THV), DType::kF64), Cast(Cpu(), OnHost(gpu.lse_TH), DType::kF64)},
        ids.cpu, kScale, dkv, Cpu().Empty(DType::kF64, {kQueries, kSlots}));
    return ToDoubles(dkv);
  }
  SparseAttentionResult Forward() const {
    return SparseAttention(Gpu(), q.gpu, kv.gpu, ids.gpu, kV, kScale);
  }

  static constexpr double kScale = 1.0 / 12;
  OnBoth q, kv, d_o, ids;
};

// Query t has numbers of 2^(20 (t - 3)).
std::vector<double> OutputGradients(int64_t num_heads) {
  const int64_t a_query = num_heads * kV;
  std::vector<double> values =
      ToDoubles(testing::RandomTensor(Cpu(), DType::kF64, {kQueries, num_heads, kV}, 3));
  for (int64_t i = 0; i < kQueries * a_query; ++i) {
    values[i] = std::ldexp(values[i], static_cast<int>(20 * (i / a_query - 3)));
  }
  return values;
}

TEST(CudaSparseBackwardRows, KeepTheirPrecisionWhateverTheirSize) {
  for (const int64_t heads : {5, 64, 128}) {
    const Apart x(heads, OutputGradients(heads));
    const std::vector<double> found = x.OnGpu(), defined = x.Defined();
    for (int64_t t = 0; t < kQueries; ++t) {
      const auto rows = [&](const std::vector<double>& all) {
        const auto begin = all.begin() + t * kKeysAQuery * kC;
        return std::vector<double>(begin, begin + kKeysAQuery * kC);
      };
      // Roundings of P, dS, the row, and of the exchange of two tiles.
      EXPECT_LE(testing::RelativeError(rows(found), rows(defined)), 4 * 0x1p-9)
          << heads << " heads, query " << t;
    }
  }
}

TEST(CudaSparseBackwardRows, BringWhatIsNotFiniteToItsKeysAlone) {
  const double infinity = std::numeric_limits<double>::infinity();
  for (const int64_t heads : {5, 64, 128}) {
    for (const double bad : {infinity, -infinity, std::nan("")}) {
      std::vector<double> d_out(kQueries * heads * kV, 0.25);
      const int64_t query = 2;
      d_out[query * heads * kV + kV + 7] = bad;  // head 1, column 7
      const std::vector<double> dkv = Apart(heads, d_out).OnGpu();
      for (int64_t i = 0; i < kKeys * kC; ++i) {
        ASSERT_EQ(std::isfinite(dkv[i]), i / kC / kKeysAQuery != query)
            << heads << " heads, " << bad << ", key " << i / kC << ", column " << i % kC;
      }
    }
  }
}

// dkv of queries of three heads, which share keys: list t has every third key from 7 t on, around.
void ExpectTheSum(int64_t num_queries, int64_t num_keys) {
  constexpr int64_t kHeads = 3;
  const int64_t listed = std::min(kSlots, num_keys / 3);
  std::vector<int32_t> lists(num_queries * kSlots, -1);
  for (int64_t t = 0; t < num_queries; ++t) {
    for (int64_t k = 0; k < listed; ++k) {
      lists[t * kSlots + k] = static_cast<int32_t>((7 * t + 3 * k) % num_keys);
    }
  }
  const OnBoth q = RandomOnBoth(DType::kBF16, {num_queries, kHeads, kC}, 4);
  const OnBoth kv = RandomOnBoth(DType::kBF16, {num_keys, kC}, 5);
  const OnBoth d_o = RandomOnBoth(DType::kBF16, {num_queries, kHeads, kV}, 6);
  const OnBoth ids = IntsOnBoth({num_queries, kSlots}, lists);
  const SparseAttentionResult forward =
      SparseAttention(Gpu(), q.gpu, kv.gpu, ids.gpu, kV, Apart::kScale);
  const Tensor found = Gpu().Zeros(DType::kF32, {num_keys, kC});
  const Tensor defined = Cpu().Zeros(DType::kF64, {num_keys, kC});
  SparseAttentionBackward(Gpu(), d_o.gpu, q.gpu, kv.gpu, forward, ids.gpu, Apart::kScale, found,
                          Gpu().Empty(DType::kF32, {num_queries, kSlots}));
  SparseAttentionBackward(Cpu(), d_o.cpu, q.cpu, kv.cpu,
                          {Cast(Cpu(), OnHost(forward.o_THV), DType::kF64),
                           Cast(Cpu(), OnHost(forward.lse_TH), DType::kF64)},
                          ids.cpu, Apart::kScale, defined,
                          Cpu().Empty(DType::kF64, {num_queries, kSlots}));
  EXPECT_LE(testing::RelativeError(ToDoubles(OnHost(found)), ToDoubles(defined)), 4 * 0x1p-9)
      << num_queries << " queries, " << num_keys << " keys";
}

// Chunks of 1024 queries for one tile of heads: the sums of the first run beside the second.
TEST(CudaSparseBackwardRows, OfOneTileAreAddedUpChunkAfterChunk) { ExpectTheSum(1100, 90); }

// A warp adds up the rows of 1, 2 or 4 neighbouring keys at a time, by how many keys there are: in
// a chunk of 32 queries up to 767, 1535, and more.
TEST(CudaSparseBackwardRows, AreAddedUpForAnyNumberOfKeys) {
  for (const int64_t keys : {3, 33, 383, 767, 768, 1151, 1152, 1300, 1535, 1536, 2111}) {
    ExpectTheSum(20, keys);
  }
}

}  // namespace
}  // namespace baleen
