// The unions of neighbouring queries' lists, entry by entry against std::map.
#include <algorithm>
#include <map>
#include <random>

#include "kernels/ops/attention/sparse_attention_packs_cuda.h"
#include "tests/cuda/ops_support.h"

namespace baleen {
namespace {

using testing::Gpu;
using testing::IntsOnBoth;
using testing::OnBoth;
using testing::OnHost;

struct Lists {
  int64_t T, S, K;
  int queries;  // of a pack
};

// Rows with all slots filled, one, none or some; -1 anywhere; keys of a row distinct, clustered so
// that neighbours share many.
std::vector<int32_t> RandomLists(const Lists& lists, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<int32_t> ids(lists.T * lists.K, -1);
  for (int64_t t = 0; t < lists.T; ++t) {
    const int64_t most = std::min(lists.S, lists.K);
    const int64_t count = t % 5 == 0 ? most : t % 5 == 1 ? 1 : t % 5 == 2 ? 0 : most / 2;
    const int64_t span = std::min(lists.S, 2 * lists.K), stride = lists.S / span;
    std::vector<int32_t> keys(span);
    for (int64_t i = 0; i < span; ++i) keys[i] = static_cast<int32_t>(i * stride);
    keys.back() = static_cast<int32_t>(lists.S - 1);
    std::shuffle(keys.begin(), keys.end(), random);
    std::copy_n(keys.begin(), count, ids.begin() + t * lists.K);
    std::shuffle(ids.begin() + t * lists.K, ids.begin() + (t + 1) * lists.K, random);
  }
  return ids;
}

// The union of one pack and, behind it, zeros up to the next 64.
std::vector<int32_t> ExpectedUnion(const Lists& lists, const std::vector<int32_t>& ids,
                                   int64_t pack, int32_t& count) {
  std::map<int32_t, uint32_t> bits;
  for (int64_t j = 0; j < lists.queries && pack * lists.queries + j < lists.T; ++j) {
    for (int64_t k = 0; k < lists.K; ++k) {
      const int32_t key = ids[(pack * lists.queries + j) * lists.K + k];
      if (key >= 0) bits[key] |= 1u << j;
    }
  }
  std::vector<int32_t> entries;
  for (const auto& [key, who] : bits) {
    entries.push_back(static_cast<int32_t>(static_cast<uint32_t>(key) | who << kPackedKeyBits));
  }
  count = static_cast<int32_t>(entries.size());
  entries.resize((entries.size() + 63) / 64 * 64);
  return entries;
}

TEST(CudaPackSelectedKeys, GivesTheUnionOfNeighboursAndWhoSelectedEachKey) {
  for (const Lists& lists :
       {Lists{23, 300, 128, 4}, Lists{18, 777, 192, 2}, Lists{13, 2300, 2048, 4},
        Lists{7, 3000, 2047, 2}, Lists{6, 5, 3, 4}, Lists{9, 1, 1, 4}, Lists{9, 131072, 2048, 4},
        Lists{10, 300001, 2048, 4}, Lists{5, 131073, 63, 2}}) {
    SCOPED_TRACE(::testing::Message() << "T " << lists.T << " S " << lists.S << " K " << lists.K
                                      << " queries a pack " << lists.queries);
    const std::vector<int32_t> ids = RandomLists(lists, 17 + lists.S);
    const OnBoth ids_TK = IntsOnBoth({lists.T, lists.K}, ids);
    SparseAttentionPacks packs;
    packs.num_tokens = static_cast<int>(lists.T);
    packs.num_keys = static_cast<int>(lists.S);
    packs.num_selected = static_cast<int>(lists.K);
    packs.queries = lists.queries;
    const std::vector<int32_t> poison(packs.NumPacks() * packs.Width(), -7);
    const Tensor entries = IntsOnBoth({packs.NumPacks(), packs.Width()}, poison).gpu;
    const Tensor counts = Gpu().Empty(DType::kI32, {packs.NumPacks()});
    packs.ids_TK = ids_TK.gpu.data<int32_t>();
    packs.entries_IU = reinterpret_cast<uint32_t*>(entries.data<int32_t>());
    packs.counts_I = counts.data<int32_t>();
    LaunchPackSelectedKeys(packs, Gpu().stream());
    const Tensor found = OnHost(entries), found_counts = OnHost(counts);
    for (int pack = 0; pack < packs.NumPacks(); ++pack) {
      int32_t count = 0;
      const std::vector<int32_t> expected = ExpectedUnion(lists, ids, pack, count);
      ASSERT_EQ(found_counts.data<int32_t>()[pack], count) << "pack " << pack;
      const int32_t* row = found.data<int32_t>() + int64_t{pack} * packs.Width();
      for (size_t i = 0; i < expected.size(); ++i) {
        ASSERT_EQ(row[i], expected[i]) << "pack " << pack << " entry " << i;
      }
    }
  }
}

}  // namespace
}  // namespace baleen
