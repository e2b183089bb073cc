// Sparse attention in the absorbed form: by hand, against the plain loops, against differences, and
// equal to masked attention in the head form through explicit absorption.
#include "kernels/ops/attention/sparse_attention.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/ops/attention_oracle.h"
#include "tests/support/gradient_check.h"

namespace baleen {
namespace {

using namespace testing;  // NOLINT: the helpers of tests/support

struct Case {
  Case(DType dtype, int64_t T, int64_t S, int64_t H, int64_t C, int64_t V, Tensor ids_TK)
      : q(RandomTensor(context, dtype, {T, H, C}, 1)),
        kv(RandomTensor(context, dtype, {S, C}, 2)),
        d_out(RandomTensor(context, dtype, {T, H, V}, 3)),
        dkv(context.Zeros(dtype, {S, C})),
        ids(ids_TK),
        target(RandomTensor(context, dtype, ids_TK.shape(), 4)),  // to be overwritten
        scale(1 / std::sqrt(static_cast<double>(C))) {}
  SparseAttentionResult Forward() const {
    return SparseAttention(context, q, kv, ids, d_out.dim(2), scale);
  }
  Tensor Backward(const SparseAttentionResult& forward) const {
    return SparseAttentionBackward(context, d_out, q, kv, forward, ids, scale, dkv, target);
  }
  Context context = Context::Cpu();
  Tensor q, kv, d_out, dkv, ids, target;
  double scale;
};

// The absorbed form as an ordinary attention: every head has a copy of the latent rows.
struct SparseOracle {
  SparseOracle(const Case& c) {
    const int64_t S = c.kv.dim(0), H = c.q.dim(1), C = c.q.dim(2), V = c.d_out.dim(2);
    const std::vector<double> kv = ToDoubles(c.kv);
    std::vector<double> k, v;
    for (int64_t s = 0; s < S; ++s) {
      for (int64_t h = 0; h < H; ++h) {
        k.insert(k.end(), &kv[s * C], &kv[s * C] + C);
        v.insert(v.end(), &kv[s * C], &kv[s * C] + V);
      }
    }
    attention = PlainAttention(c.q, TensorOf(c.context, DType::kF64, {S, H, C}, k),
                               TensorOf(c.context, DType::kF64, {S, H, V}, v), c.d_out,
                               ListsOf(c.ids), c.scale);
    dkv.assign(S * C, 0);
    for (int64_t s = 0; s < S; ++s) {
      for (int64_t h = 0; h < H; ++h) {
        for (int64_t i = 0; i < C; ++i) dkv[s * C + i] += attention.dk_SHQ[(s * H + h) * C + i];
        for (int64_t i = 0; i < V; ++i) dkv[s * C + i] += attention.dv_SHV[(s * H + h) * V + i];
      }
    }
    target.assign(c.ids.num_elements(), 0);
    for (int64_t i = 0; i < c.ids.num_elements(); ++i) {
      const int64_t s = c.ids.data<int32_t>()[i], t = i / c.ids.dim(1);
      for (int64_t h = 0; s >= 0 && h < H; ++h) {
        target[i] += attention.probs_THS[(t * H + h) * S + s];
      }
    }
  }
  OracleAttention attention;
  std::vector<double> dkv, target;
};

TEST(SparseAttention, TwoOfThreeKeysByHand) {
  const Context context = Context::Cpu();
  Case c(DType::kF64, 1, 3, 1, 2, 1, IntTensorOf(context, {1, 3}, {-1, 2, 0}));
  c.q = TensorOf(context, DType::kF64, {1, 1, 2}, {0, 1});
  c.kv = TensorOf(context, DType::kF64, {3, 2}, {8, 0, 16, 7, 24, std::log(5)});
  c.d_out = TensorOf(context, DType::kF64, {1, 1, 1}, {1});
  c.scale = 1;
  const SparseAttentionResult result = c.Forward();  // P = 5/6 of key 2, 1/6 of key 0
  EXPECT_NEAR(ToDoubles(result.o_THV)[0], 128 / 6.0, 1e-13);
  EXPECT_NEAR(ToDoubles(result.lse_TH)[0], std::log(6), 1e-15);
  const Tensor dq = c.Backward(result);
  // dS of key 2 = 5/6 (24 - 128/6) = 20/9, of key 0 its negative.
  const double ds = 20 / 9.0;
  EXPECT_LT(RelativeError(ToDoubles(dq), {ds * 24 - ds * 8, ds * std::log(5)}), 1e-14);
  EXPECT_LT(RelativeError(ToDoubles(c.dkv), {1 / 6.0, -ds, 0, 0, 5 / 6.0, ds}), 1e-14);
  EXPECT_LT(RelativeError(ToDoubles(c.target), {0, 5 / 6.0, 1 / 6.0}), 1e-15);
}

TEST(SparseAttention, EqualsThePlainLoops) {
  const Context context = Context::Cpu();
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    for (const int64_t k : {1, 7, 90}) {  // 90: more slots than any row has keys
      SCOPED_TRACE(::testing::Message() << DTypeName(dtype).data() << " K " << k);
      const int64_t T = 40, S = 60, H = 5, C = 20;
      const Case c(dtype, T, S, H, C, 16, ScatteredIds(context, T, k, 20, /*empty_every=*/9));
      const SparseAttentionResult result = c.Forward();
      const Tensor dq = c.Backward(result);
      const SparseOracle oracle(c);
      const double tolerance = RoundingTolerance(dtype, C + S + T, 1.0);
      EXPECT_LT(ErrorOf(ToDoubles(result.o_THV), oracle.attention.o_THV), tolerance);
      EXPECT_LT(ErrorOf(ToDoubles(dq), oracle.attention.dq_THQ), tolerance);
      EXPECT_LT(ErrorOf(ToDoubles(c.dkv), oracle.dkv), tolerance);
      EXPECT_LT(ErrorOf(ToDoubles(c.target), oracle.target), tolerance);
      const std::vector<double> lse = ToDoubles(result.lse_TH), target = ToDoubles(c.target);
      for (int64_t t = 0; t < T; ++t) {
        const bool empty = t % 9 == 8;
        for (int64_t h = 0; h < H; ++h) {
          const double expected = oracle.attention.lse_TH[t * H + h];
          if (empty)
            EXPECT_EQ(lse[t * H + h], -INFINITY);
          else
            EXPECT_NEAR(lse[t * H + h], expected, 4 * tolerance);
        }
        double row_sum = 0;
        for (int64_t i = 0; i < k; ++i) row_sum += target[t * k + i];
        EXPECT_NEAR(row_sum, empty ? 0 : H, H * tolerance) << "row " << t;
      }
    }
  }
}

TEST(SparseAttention, GradientsAreTheCentralDifferences) {
  const Context context = Context::Cpu();
  const Case c(DType::kF64, 8, 10, 3, 5, 4, ScatteredIds(context, 8, 4, 2, /*empty_every=*/5));
  const Tensor dq = c.Backward(c.Forward());
  const auto loss = [&] { return DotOf(c.d_out, c.Forward().o_THV); };
  EXPECT_LT(GradientError(loss, c.q, dq), 1e-8);
  EXPECT_LT(GradientError(loss, c.kv, c.dkv), 1e-8);
}

TEST(SparseAttention, RowsWithoutKeysAreZeroAndChangeNothing) {
  const Context context = Context::Cpu();
  const Case c(DType::kF32, 2, 3, 2, 4, 3,
               IntTensorOf(context, {2, 2}, std::vector<int32_t>(4, -1)));
  const SparseAttentionResult result = c.Forward();
  const Tensor dq = c.Backward(result);
  for (const double lse : ToDoubles(result.lse_TH)) EXPECT_EQ(lse, -INFINITY);
  for (const Tensor& zero : {result.o_THV, dq, c.dkv, c.target}) {
    for (const double value : ToDoubles(zero)) EXPECT_EQ(value, 0);
  }
}

TEST(SparseAttention, WithAllKeysIsDenseAttention) {
  const Context context = Context::Cpu();
  const int64_t T = 24, C = 12, V = 8;
  std::vector<int32_t> ids(T * T, -1);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t s = 0; s <= t; ++s) ids[t * T + s] = static_cast<int32_t>(s);
  }
  // One head: the latent rows are the keys, their first columns the values.
  const Case c(DType::kF64, T, T, 1, C, V, IntTensorOf(context, {T, T}, ids));
  const SparseAttentionResult sparse = c.Forward();
  const Tensor sparse_dq = c.Backward(sparse);
  const Tensor k = c.kv.Reshaped({T, 1, C}), v = context.Empty(DType::kF64, {T, 1, V});
  for (int64_t s = 0; s < T; ++s) {
    for (int64_t i = 0; i < V; ++i) v.data<double>()[s * V + i] = c.kv.data<double>()[s * C + i];
  }
  const KeyWindows windows = CausalWindows(context, T);
  const AttentionResult dense = Attention(context, c.q, k, v, windows, c.scale);
  const Tensor dk = context.Zeros(DType::kF64, k.shape()),
               dv = context.Zeros(DType::kF64, v.shape());
  const Tensor dense_dq =
      AttentionBackward(context, c.d_out, c.q, k, v, dense, windows, c.scale, dk, dv);
  for (int64_t s = 0; s < T; ++s) {
    for (int64_t i = 0; i < V; ++i) dk.data<double>()[s * C + i] += dv.data<double>()[s * V + i];
  }
  EXPECT_LT(RelativeError(sparse.o_THV, dense.o_THV), 1e-14);
  EXPECT_LT(RelativeError(sparse.lse_TH, dense.lse_TH), 1e-14);
  EXPECT_LT(RelativeError(sparse_dq, dense_dq), 1e-13);
  EXPECT_LT(RelativeError(c.dkv, dk.Reshaped({T, C})), 1e-13);
}

TEST(SparseAttention, ARowHasTheSameBitsInEveryChunkOfRows) {
  const Context context = Context::Cpu();
  const int64_t T = 40, S = 400, K = 300;
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    const Case c(dtype, T, S, 3, 20, 16, ScatteredIds(context, T, K, 350, /*empty_every=*/7));
    const SparseAttentionResult whole = c.Forward();
    const Tensor whole_dq = c.Backward(whole);
    const Tensor dkv = context.Zeros(dtype, c.kv.shape());
    for (const auto& [first, last] : {std::pair<int64_t, int64_t>{0, 3}, {3, 30}, {30, 40}}) {
      Case part = c;
      part.q = c.q.Rows(first, last);
      part.d_out = c.d_out.Rows(first, last);
      part.ids = c.ids.Rows(first, last);
      part.target = context.Empty(dtype, part.ids.shape());
      part.dkv = dkv;
      const SparseAttentionResult rows = part.Forward();
      EXPECT_TRUE(SameBits(rows.o_THV, whole.o_THV.Rows(first, last)));
      EXPECT_TRUE(SameBits(rows.lse_TH, whole.lse_TH.Rows(first, last)));
      EXPECT_TRUE(SameBits(part.Backward(rows), whole_dq.Rows(first, last)));
      EXPECT_TRUE(SameBits(part.target, c.target.Rows(first, last)));
    }
    // Key gradients are added row by row, so that even they do not notice the chunks.
    EXPECT_TRUE(SameBits(dkv, c.dkv));
  }
}

// y[.., i] = sum_j w[i, j] x[.., j] for one head's w; the absorbed product.
void AddProduct(const double* w, int64_t rows, int64_t cols, const double* x, double* y) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) y[i] += w[i * cols + j] * x[j];
  }
}
void AddTransposedProduct(const double* w, int64_t rows, int64_t cols, const double* x, double* y) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) y[j] += w[i * cols + j] * x[i];
  }
}

// k_h = [W_UK,h c; k_rope], v_h = W_UV,h c against q~ = [W_UK,h^T q_nope; q_rope], o = W_UV,h o~:
// the same output, the same target and the same gradients of q_nope, q_rope, c and k_rope.
TEST(SparseAttention, AbsorbedEqualsMaskedAttentionPerHead) {
  const Context context = Context::Cpu();
  const int64_t T = 20, S = 30, H = 3, N = 6, R = 4, L = 10, V = 5, C = L + R, Q = N + R, K = 8;
  const Tensor ids = ScatteredIds(context, T, K, S - T, /*empty_every=*/6);
  const double scale = 1 / std::sqrt(static_cast<double>(Q));
  const auto random = [&](Shape shape, uint64_t seed) {
    return RandomTensor(context, DType::kF64, std::move(shape), seed, 0.5);
  };
  const Tensor q = random({T, H, Q}, 1), kv = random({S, C}, 2), d_out = random({T, H, V}, 5);
  const Tensor w_uk = random({H, N, L}, 3), w_uv = random({H, V, L}, 4);
  const auto at = [](const Tensor& x, int64_t row, int64_t h = 0) {
    return x.data<double>() + (x.rank() == 3 ? row * x.dim(1) + h : row) * x.dim(-1);
  };

  // The head form.
  const Tensor k = context.Zeros(DType::kF64, {S, H, Q}), v = context.Zeros(DType::kF64, {S, H, V});
  for (int64_t s = 0; s < S; ++s) {
    for (int64_t h = 0; h < H; ++h) {
      AddProduct(at(w_uk, h), N, L, at(kv, s), at(k, s, h));
      std::copy_n(at(kv, s) + L, R, at(k, s, h) + N);
      AddProduct(at(w_uv, h), V, L, at(kv, s), at(v, s, h));
    }
  }
  const AttentionResult heads = MaskedAttention(context, q, k, v, ids, scale);
  const Tensor dk = context.Zeros(DType::kF64, k.shape()),
               dv = context.Zeros(DType::kF64, v.shape());
  const Tensor target = context.Empty(DType::kF64, {T, K});
  const Tensor dq =
      MaskedAttentionBackward(context, d_out, q, k, v, heads, ids, scale, dk, dv, target);
  const Tensor dkv = context.Zeros(DType::kF64, kv.shape());
  for (int64_t s = 0; s < S; ++s) {
    for (int64_t h = 0; h < H; ++h) {
      AddTransposedProduct(at(w_uk, h), N, L, at(dk, s, h), at(dkv, s));
      AddTransposedProduct(at(w_uv, h), V, L, at(dv, s, h), at(dkv, s));
      for (int64_t i = 0; i < R; ++i) at(dkv, s)[L + i] += at(dk, s, h)[N + i];
    }
  }

  // The absorbed form.
  Case c(DType::kF64, T, S, H, C, L, ids);
  c.kv = kv;
  c.scale = scale;
  c.q = context.Zeros(DType::kF64, {T, H, C});
  c.d_out = context.Zeros(DType::kF64, {T, H, L});
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t h = 0; h < H; ++h) {
      AddTransposedProduct(at(w_uk, h), N, L, at(q, t, h), at(c.q, t, h));
      std::copy_n(at(q, t, h) + N, R, at(c.q, t, h) + L);
      AddTransposedProduct(at(w_uv, h), V, L, at(d_out, t, h), at(c.d_out, t, h));
    }
  }
  const SparseAttentionResult latent = c.Forward();
  const Tensor latent_dq = c.Backward(latent);
  const Tensor o = context.Zeros(DType::kF64, {T, H, V});
  const Tensor absorbed_dq = context.Zeros(DType::kF64, {T, H, Q});
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t h = 0; h < H; ++h) {
      AddProduct(at(w_uv, h), V, L, at(latent.o_THV, t, h), at(o, t, h));
      AddProduct(at(w_uk, h), N, L, at(latent_dq, t, h), at(absorbed_dq, t, h));
      std::copy_n(at(latent_dq, t, h) + L, R, at(absorbed_dq, t, h) + N);
    }
  }
  EXPECT_LT(RelativeError(o, heads.o_THV), 1e-14);
  EXPECT_LT(RelativeError(c.target, target), 1e-14);
  EXPECT_LT(RelativeError(absorbed_dq, dq), 1e-13);
  EXPECT_LT(RelativeError(c.dkv, dkv), 1e-13);
}

TEST(SparseAttentionDeathTest, NamesWhatDoesNotFit) {
  const Context context = Context::Cpu();
  Case c(DType::kF32, 2, 3, 2, 4, 3, IntTensorOf(context, {2, 1}, {0, 3}));
  EXPECT_DEATH(c.Forward(), "SparseAttention: row 1 names key 3 of 3 keys");
  c.ids = IntTensorOf(context, {1, 2}, {0, 1});
  EXPECT_DEATH(c.Forward(), "ids_TK is I32\\[1, 2\\], expected I32\\[2, 2\\]");
  c.ids = IntTensorOf(context, {2, 2}, {0, 1, 1, 1});
  EXPECT_DEATH(c.Forward(), "row 1 names key 1 twice");
  EXPECT_DEATH(SparseAttention(context, c.q, c.kv, c.ids, 5, 1.0),
               "value_dim 5 of key rows F32\\[3, 4\\]");
}

}  // namespace
}  // namespace baleen
