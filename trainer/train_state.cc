#include "trainer/train_state.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "checkpoints/hf_config.h"
#include "checkpoints/hf_export.h"
#include "data/token_source.h"
#include "kernels/core/transfer.h"
#include "parallel/agree.h"

namespace baleen {
namespace {

const char kFirstMoment[] = "adam_m/";
const char kSecondMoment[] = "adam_v/";
const char kContents[] = " (what the files hold)";  // end of a key of the identity
constexpr size_t kMostJobLetters = 64;

// What the rank's share holds of a parameter; `flat` is one of the share's tensors.
std::optional<StatePiece> PieceOf(const Parameter& parameter, const OptimizerShard& shard,
                                  const std::string& prefix, const Tensor& flat) {
  const int64_t first = std::max(parameter.begin, shard.begin);
  const int64_t last =
      std::min(parameter.begin + parameter.num_elements(), shard.begin + shard.count);
  if (first >= last) return std::nullopt;
  StatePiece piece;
  piece.name = prefix + parameter.name;
  piece.global_shape = parameter.global_shape;
  piece.box = parameter.box;
  piece.flat_begin = first - parameter.begin;
  piece.flat_count = last - first;
  piece.data = flat.Flat(first - shard.begin, last - first);
  return piece;
}

// The moments of this rank's share; the same pieces are what is saved and what is loaded.
std::vector<StatePiece> MomentPieces(TrainingStage& stage) {
  std::vector<StatePiece> pieces;
  const ParameterStore& parameters = stage.parameters();
  for (const OptimizerShard& shard : stage.optimizer().shards()) {
    if (!shard.trains()) continue;
    for (const int id : parameters.buckets()[shard.bucket].parameters) {
      for (const auto& [prefix, moment] :
           {std::pair{kFirstMoment, &shard.m}, std::pair{kSecondMoment, &shard.v}}) {
        auto piece = PieceOf(parameters.at(id), shard, prefix, *moment);
        if (piece) pieces.push_back(*std::move(piece));
      }
    }
  }
  return pieces;
}

// The masters of what changed, as ZeRO-1 cuts them, whether the group trains or not.
std::vector<StatePiece> ValuePieces(TrainingStage& stage, const ChangedParameters& changed) {
  std::vector<StatePiece> pieces;
  const ParameterStore& parameters = stage.parameters();
  for (const OptimizerShard& shard : stage.optimizer().shards()) {
    for (const int id : parameters.buckets()[shard.bucket].parameters) {
      const Parameter& parameter = parameters.at(id);
      if (changed.count(parameter.name) == 0) continue;
      CHECK(!shard.master.empty()) << parameter.name << " changed, and its masters were not kept";
      auto piece = PieceOf(parameter, shard, "", shard.master);
      if (piece) pieces.push_back(*std::move(piece));
    }
  }
  return pieces;
}

// The pieces in host memory, where the writer reads them.
void BringToHost(TrainingStage& stage, std::vector<StatePiece>& pieces) {
  const Context& context = stage.context();
  for (StatePiece& piece : pieces) {
    if (piece.data.device().kind == DeviceKind::kCpu) continue;
    const Tensor host = stage.host_context().Empty(piece.data.dtype(), piece.data.shape());
    Transfer(context, piece.data, host);
    piece.data = host;
  }
}

// Fills one parameter band by band, from the state where that has it.
absl::Status FillParameter(TrainingStage& stage, int id, const WeightSource& source,
                           StateReader* state, BandBuffer& buffer) {
  const Parameter& parameter = stage.parameters().at(id);
  const DType dtype = StatisticsOf(stage.dtype());
  int64_t first = 0;
  for (Box band : RowBands(parameter.box.extent)) {
    const Tensor values = buffer.Take(dtype, band.extent);
    for (size_t d = 0; d < band.offset.size(); ++d) band.offset[d] += parameter.box.offset[d];
    if (state != nullptr) {
      RETURN_IF_ERROR(state->Read(parameter.name, parameter.box, first, values.num_elements(),
                                  dtype, values.raw()));
    } else {
      RETURN_IF_ERROR(source.Load(parameter.name, band, dtype, values.raw()));
    }
    stage.optimizer().SetValues(
        id, first, values,
        state != nullptr ? Optimizer::Origin::kChanged : Optimizer::Origin::kSource);
    first += values.num_elements();
  }
  return absl::OkStatus();
}

// The moments of this rank's share.
absl::Status LoadMoments(TrainingStage& stage, StateReader& state) {
  for (const StatePiece& piece : MomentPieces(stage)) {
    const Tensor host = stage.host_context().Empty(piece.data.dtype(), piece.data.shape());
    RETURN_IF_ERROR(state.Read(piece.name, piece.box, piece.flat_begin, piece.flat_count,
                               host.dtype(), host.raw()));
    Transfer(stage.context(), host, piece.data);
  }
  return absl::OkStatus();
}

// What this stage changes: its trained groups, and the router bias where gradients reach the
// router.
void AddChanged(TrainingStage& stage, ChangedParameters& changed) {
  const ParameterStore& parameters = stage.parameters();
  for (const Parameter& parameter : parameters.parameters()) {
    const bool bias =
        parameter.group == ParameterGroup::kBuffer && stage.recipe().bias_update_speed != 0;
    if (parameters.trains(parameter.id) || bias) changed.insert(parameter.name);
  }
}

// What no rank saved is read from the source again: of the whole model, not of one rank's part.
void NameFrozen(const TrainingStage& stage, const WeightSource& source,
                const std::vector<RankFileRecord>& files, StateMetadata& metadata) {
  std::set<std::string> saved;
  for (const RankFileRecord& file : files) {
    for (const TensorRecord& tensor : file.tensors) saved.insert(tensor.name);
  }
  FrozenSource frozen = source.AsFrozenSource();
  for (const CatalogEntry& entry :
       TensorCatalog(stage.model_config(), {.with_indexer = stage.recipe().use_indexer})) {
    if (entry.duplicate_of.empty() && saved.count(entry.name) == 0)
      frozen.tensors.push_back(entry.name);
  }
  if (!frozen.tensors.empty()) metadata.sources.push_back(std::move(frozen));
}

// Part of a directory's name: of what the environment says only letters, digits, '_' and '-'.
std::string JobId() {
  const char* job = std::getenv("SLURM_JOB_ID");
  std::string id;
  for (const char c : absl::string_view(job == nullptr ? "" : job).substr(0, kMostJobLetters)) {
    if (absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '-') id += c;
  }
  return absl::StrCat(id, id.empty() ? "" : "-", ::getpid());
}

// What a key meant to versions that did not save it, so that their states stay good.
std::string InOlderStates(absl::string_view key, const std::string& value) {
  if (absl::EndsWith(key, ".data.first_sample")) return "0";
  for (const char* later : {kContents, ".precision.gemm", ".dsa.hadamard"}) {
    if (absl::EndsWith(key, later)) return value;  // nobody knows: taken for the same
  }
  return "(absent)";
}

}  // namespace

absl::Status LoadStage(TrainingStage& stage, const WeightSource& source, StateReader* state,
                       bool with_moments, ChangedParameters& changed) {
  BandBuffer buffer;
  for (int id = 0; id < stage.parameters().size(); ++id) {
    const std::string& name = stage.parameters().at(id).name;
    const bool saved = state != nullptr && state->manifest().Find(name) != nullptr;
    RETURN_IF_ERROR(FillParameter(stage, id, source, saved ? state : nullptr, buffer));
    if (saved) changed.insert(name);
  }
  AddChanged(stage, changed);
  return with_moments ? LoadMoments(stage, *state) : absl::OkStatus();
}

absl::Status CheckFrozenSources(const StateReader& state, const WeightSource& source,
                                Communicator& world) {
  const FrozenSource frozen = source.AsFrozenSource();
  RETURN_IF_ERROR(
      Agree(world, state.CheckSources([&](const std::string& path) -> absl::StatusOr<std::string> {
        if (path != frozen.path) {
          return DataError("not the run file's model, which is ", frozen.path,
                           ": set model.checkpoint to ", path, ", or start another run.dir");
        }
        return frozen.hash;
      })));
  for (const FrozenSource& saved : state.metadata().sources) {
    if (world.rank() == 0 && saved.hash != frozen.hash) {
      WriteLog(Severity::kWarning, "",
               absl::StrCat(state.directory(), ": saved by a version that knew ", saved.path,
                            " by config, index and headers alone: these are the same, that its ",
                            "weights are was not checked"));
    }
  }
  return absl::OkStatus();
}

Identity IdentityOf(const RunConfig& run, const WeightSource& source) {
  Identity identity;
  identity["run.seed"] = absl::StrCat(run.run.seed);
  identity["model"] = source.AsFrozenSource().path;
  const std::string sizes = HfConfigText({.model = source.config()});
  identity["model sizes"] =
      Hash128(absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(sizes.data()), sizes.size()));
  for (size_t i = 0; i < run.stages.size(); ++i) {
    const StageConfig& stage = run.stages[i];
    const std::string key = absl::StrCat("stages.", i, ".");
    identity[key + "name"] = stage.name;
    identity[key + "attention"] = std::string(Name(stage.attention));
    identity[key + "train"] = std::string(Name(stage.train));
    identity[key + "global_batch_size"] = absl::StrCat(stage.global_batch_size);
    identity[key + "data.seq_length"] = absl::StrCat(stage.data.seq_length);
    identity[key + "data.document_mask"] = stage.data.document_mask ? "true" : "false";
    identity[key + "data.first_sample"] = absl::StrCat(stage.data.first_sample);
    identity[key + "precision.compute"] = std::string(Name(stage.precision.compute));
    identity[key + "precision.gemm"] = std::string(Name(stage.precision.gemm));
    identity[key + "dsa.hadamard"] = stage.dsa.hadamard ? "true" : "false";
    identity[key + "data.train"] = absl::StrJoin(
        stage.data.train, " ",
        [](std::string* out, const DataSource& s) { absl::StrAppend(out, s.path, "*", s.weight); });
  }
  return identity;
}

absl::Status AddDataContents(const RunConfig& run, int64_t first_stage, Communicator& world,
                             Identity& identity) {
  for (size_t i = first_stage; i < run.stages.size(); ++i) {
    std::string contents;
    absl::Status status;
    for (const DataSource& source : run.stages[i].data.train) {
      if (world.rank() != 0 || !status.ok()) break;
      const absl::StatusOr<TokenSource> tokens = TokenSource::Open(source.path);
      const absl::StatusOr<std::string> found =
          tokens.ok() ? tokens->Contents() : absl::StatusOr<std::string>(tokens.status());
      status = found.status();
      if (found.ok()) absl::StrAppend(&contents, contents.empty() ? "" : "; ", *found);
    }
    RETURN_IF_ERROR(Agree(world, status));
    identity[absl::StrCat("stages.", i, ".data.train", kContents)] =
        BroadcastString(world, "data contents", contents, 0);
  }
  return absl::OkStatus();
}

absl::Status CheckIdentity(const StateMetadata& state, const std::string& directory,
                           Identity& identity) {
  std::vector<std::string> differences;
  for (const auto& [key, value] : identity) {
    const auto saved = state.extra.find("identity." + key);
    const std::string before =
        saved == state.extra.end() ? InOlderStates(key, value) : saved->second;
    if (before == value) continue;
    const char* of =
        key == "model sizes"
            ? " (hash of config.json's with dsa.index_topk, index_n_heads, index_head_dim)"
            : "";
    differences.push_back(
        absl::StrCat("  ", key, of, ": the state has ", before, ", the run file ", value));
  }
  if (differences.empty()) {
    for (const auto& [key, value] : state.extra) {
      absl::string_view name = key;
      if (absl::ConsumePrefix(&name, "identity.")) identity.emplace(name, value);
    }
    return absl::OkStatus();
  }
  return DataError(directory, ": this training state belongs to another run:\n",
                   absl::StrJoin(differences, "\n"),
                   "\nRestore these values, or start afresh with another run.dir.");
}

RunPosition PositionOf(const StateMetadata& metadata) {
  RunPosition position;
  position.step = metadata.step;
  position.stage_index = metadata.stage_index;
  position.stage_step = metadata.stage_step;
  position.consumed_samples = metadata.consumed_samples;
  position.consumed_tokens = metadata.consumed_tokens;
  const auto skipped = metadata.extra.find("skipped_steps");
  if (skipped != metadata.extra.end() &&
      !absl::SimpleAtoi(skipped->second, &position.skipped_steps)) {
    position.skipped_steps = 0;
  }
  return position;
}

absl::StatusOr<std::string> SaveTrainState(TrainingStage& stage, const WeightSource& source,
                                           const ChangedParameters& changed,
                                           const SaveRequest& request) {
  Communicator& world = stage.world();
  std::vector<StatePiece> pieces = ValuePieces(stage, changed);
  for (StatePiece& piece : MomentPieces(stage)) pieces.push_back(std::move(piece));
  BringToHost(stage, pieces);

  const Tensor bytes = stage.host_context().Zeros(DType::kI64, {1});
  bytes.data<int64_t>()[0] = StateBytes(pieces);
  world.AllReduce("state bytes", bytes);
  std::string temp_dir;
  absl::Status status;
  if (world.rank() == 0) {
    auto begun =
        BeginState(request.directory, request.position.step, JobId(), bytes.data<int64_t>()[0]);
    status = begun.status();
    if (begun.ok()) temp_dir = *begun;
  }
  RETURN_IF_ERROR(Agree(world, status));
  temp_dir = BroadcastString(world, "state directory", temp_dir, 0);

  auto record = WriteRankFile(temp_dir, world.rank(), pieces);
  status = Agree(world, record.status());
  if (!status.ok()) {
    if (world.rank() == 0) DiscardState(temp_dir);
    return status;
  }
  const std::vector<std::string> records =
      AllGatherStrings(world, "state records", record->ToJson());

  StateMetadata metadata;
  metadata.step = request.position.step;
  metadata.stage_name = request.stage_name;
  metadata.stage_index = request.position.stage_index;
  metadata.stage_step = request.position.stage_step;
  metadata.consumed_samples = request.position.consumed_samples;
  metadata.consumed_tokens = request.position.consumed_tokens;
  metadata.seed = request.seed;
  metadata.layout = absl::StrCat(stage.grid().DebugString(), ", ", world.size(), " ranks");
  metadata.extra["skipped_steps"] = absl::StrCat(request.position.skipped_steps);
  for (const auto& [key, value] : request.identity) metadata.extra["identity." + key] = value;

  std::string published;
  if (world.rank() == 0) {
    std::vector<RankFileRecord> files;
    for (const std::string& text : records) {
      auto file = RankFileRecord::FromJson(text);
      if (!file.ok()) status = file.status();
      if (file.ok()) files.push_back(*std::move(file));
    }
    NameFrozen(stage, source, files, metadata);
    if (status.ok()) {
      auto result = PublishState(request.directory, temp_dir, metadata, files);
      status = result.status();
      if (result.ok()) published = result->directory;
    } else {
      DiscardState(temp_dir);
    }
    if (status.ok() && request.keep > 0)
      status = PruneStates(request.directory, static_cast<int>(request.keep)).status();
  }
  RETURN_IF_ERROR(Agree(world, status));
  return BroadcastString(world, "published state", published, 0);
}

absl::StatusOr<StateReader> OpenState(const std::string& path, Communicator& world) {
  auto reader = StateReader::Open(path);
  RETURN_IF_ERROR(Agree(world, reader.status()));
  absl::Status status;
  for (int file = world.rank(); file < reader->num_files() && status.ok(); file += world.size()) {
    status = reader->VerifyFile(file);
  }
  RETURN_IF_ERROR(Agree(world, status));
  for (int file = 0; file < reader->num_files(); ++file) reader->MarkVerified(file);
  return reader;
}

absl::StatusOr<std::optional<StateReader>> FindState(const std::string& directory,
                                                     const ResumeConfig& resume,
                                                     Communicator& world, const Log& log) {
  if (resume.mode == ResumeMode::kPath) {
    absl::StatusOr<StateReader> reader = OpenState(resume.path, world);
    if (!reader.ok() && !FileExists(JoinPath(resume.path, kManifestName))) {
      return absl::Status(
          reader.status().code(),
          absl::StrCat(reader.status().message(), "; checkpoint.resume takes auto, never or the ",
                       "path of one state: RUN/checkpoints/step-XXXXXXXX"));
    }
    RETURN_IF_ERROR(reader.status());
    return std::optional<StateReader>(*std::move(reader));
  }
  // Rank 0's listing is everyone's: another rank could see a directory that is being renamed.
  std::string listing;
  absl::Status status;
  if (world.rank() == 0) {
    auto states = ListStates(directory);
    status = states.status();
    if (states.ok()) {
      for (const StateDirectory& state : *states)
        absl::StrAppend(&listing, state.step, " ", state.path, "\n");
    }
  }
  RETURN_IF_ERROR(Agree(world, status));
  listing = BroadcastString(world, "states", listing, 0);
  if (resume.mode == ResumeMode::kNever) {
    if (listing.empty()) return std::optional<StateReader>();
    const std::string newest = listing.substr(0, listing.find('\n'));
    return ConfigError(
        "checkpoint.resume = never, but the run has training states, which a run from the start "
        "would ",
        "replace (the newest: ", newest.substr(newest.find(' ') + 1),
        "). Give another run.dir, move them away, or set checkpoint.resume: auto");
  }
  std::vector<StateDirectory> candidates;
  for (absl::string_view line : absl::StrSplit(listing, '\n', absl::SkipEmpty())) {
    const std::pair<std::string, std::string> fields =
        absl::StrSplit(line, absl::MaxSplits(' ', 1));
    StateDirectory state;
    CHECK(absl::SimpleAtoi(fields.first, &state.step)) << std::string(line);
    state.path = fields.second;
    candidates.push_back(state);
  }
  const auto verifier = [&](const absl::Status& opened, StateReader* reader) {
    RETURN_IF_ERROR(Agree(world, opened));
    absl::Status verdict;
    for (int file = world.rank(); file < reader->num_files() && verdict.ok();
         file += world.size()) {
      verdict = reader->VerifyFile(file);
    }
    RETURN_IF_ERROR(Agree(world, verdict));
    for (int file = 0; file < reader->num_files(); ++file) reader->MarkVerified(file);
    return absl::OkStatus();
  };
  ASSIGN_OR_RETURN(UsableState usable, FindNewestUsable(candidates, verifier,
                                                        world.rank() == 0 ? DamagePolicy::kRename
                                                                          : DamagePolicy::kReport));
  if (world.rank() == 0) {
    for (const std::string& line : usable.set_aside)
      log.Warning("damaged checkpoint set aside: ", line);
  }
  return std::move(usable.reader);
}

}  // namespace baleen
