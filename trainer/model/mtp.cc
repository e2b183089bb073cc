#include "trainer/model/mtp.h"

#include "kernels/ops/elementwise.h"
#include "kernels/ops/linear/matmul.h"
#include "kernels/ops/rms_norm.h"
#include "trainer/model/linear.h"

namespace baleen {
namespace {

std::string Prefix(const ModelConfig& config) {
  return absl::StrCat("model.layers.", config.num_hidden_layers);
}

int DeclareMain(ParameterStore& store, const ModelConfig& config, const char* name, Shape shape) {
  return store.Declare(absl::StrCat(Prefix(config), ".", name, ".weight"), std::move(shape),
                       ParameterGroup::kMain);
}

}  // namespace

Mtp::Mtp(const ModelConfig& config, bool use_indexer, const Placement& placement,
         ParameterStore& store)
    : enorm_(DeclareMain(store, config, "enorm", {config.hidden_size})),
      hnorm_(DeclareMain(store, config, "hnorm", {config.hidden_size})),
      eh_proj_(DeclareMain(store, config, "eh_proj", {config.hidden_size, 2 * config.hidden_size})),
      shared_head_norm_(DeclareMain(store, config, "shared_head.norm", {config.hidden_size})),
      block_(config, Prefix(config), config.num_hidden_layers,
             config.IsMoeLayer(config.num_hidden_layers), use_indexer, placement, store) {}

Tensor Mtp::Join(const ModelContext& model, const Tensor& embedding, const Tensor& hidden,
                 Saved& saved) const {
  const Context& context = model.context;
  const double eps = model.config.rms_norm_eps;
  saved.embedding = embedding;
  saved.hidden = hidden;
  const RmsNormResult e = RmsNorm(context, embedding, model.parameters.value(enorm_), eps);
  const RmsNormResult h = RmsNorm(context, hidden, model.parameters.value(hnorm_), eps);
  saved.embedding_rstd = e.rstd;
  saved.hidden_rstd = h.rstd;
  saved.joined = ConcatColumns(context, e.y, h.y);
  return Linear(context, saved.joined, model.parameters.value(eh_proj_));
}

Tensor Mtp::Forward(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                    const Tensor& embedding, const Tensor& hidden, StepStats& stats,
                    Saved& saved) const {
  const Tensor x = Join(model, embedding, hidden, saved);
  saved.out = block_.Forward(model, batch, pass, x, stats, saved.block);
  const RmsNormResult norm =
      RmsNorm(model.context, saved.out, model.parameters.value(shared_head_norm_),
              model.config.rms_norm_eps);
  saved.out_rstd = norm.rstd;
  return norm.y;
}

Mtp::Gradients Mtp::BackwardInput(const ModelContext& model, const Batch& batch,
                                  const PassOptions& pass, const Tensor& dnorm_out,
                                  Saved& saved) const {
  const Context& context = model.context;
  const ParameterStore& weights = model.parameters;
  saved.dnorm_out = dnorm_out;
  const Tensor dout = RmsNormBackwardInput(context, dnorm_out, saved.out,
                                           weights.value(shared_head_norm_), saved.out_rstd);
  saved.dprojected = block_.BackwardInput(model, batch, pass, dout, saved.block);
  saved.djoined = LinearBackwardInput(context, saved.dprojected, weights.value(eh_proj_));
  const int64_t width = model.config.hidden_size;
  return {RmsNormBackwardInput(context, SliceColumns(context, saved.djoined, 0, width),
                               saved.embedding, weights.value(enorm_), saved.embedding_rstd),
          RmsNormBackwardInput(context, SliceColumns(context, saved.djoined, width, width),
                               saved.hidden, weights.value(hnorm_), saved.hidden_rstd)};
}

void Mtp::BackwardWeight(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                         StepStats& stats, Saved& saved) const {
  const Context& context = model.context;
  const ParameterStore& weights = model.parameters;
  const int64_t width = model.config.hidden_size;
  RmsNormBackwardWeight(context, saved.dnorm_out, saved.out, saved.out_rstd,
                        weights.grad(shared_head_norm_));
  block_.BackwardWeight(model, batch, pass, stats, saved.block);
  LinearBackwardWeight(model, saved.dprojected, saved.joined, eh_proj_);
  RmsNormBackwardWeight(context, SliceColumns(context, saved.djoined, 0, width), saved.embedding,
                        saved.embedding_rstd, weights.grad(enorm_));
  RmsNormBackwardWeight(context, SliceColumns(context, saved.djoined, width, width), saved.hidden,
                        saved.hidden_rstd, weights.grad(hnorm_));
}

}  // namespace baleen
