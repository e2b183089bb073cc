#include "trainer/train_state.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "checkpoints/hf_config.h"
#include "parallel/agree.h"

namespace baleen {
namespace {

const char kFirstMoment[] = "adam_m/";
const char kSecondMoment[] = "adam_v/";

// Elements [begin, end) of the flat buffer of `parameter`'s group that this rank answers for, cut
// to the parameter.
std::optional<StatePiece> PieceOf(const Parameter& parameter, const std::string& prefix,
                                  const Tensor& flat, int64_t flat_origin, int64_t begin,
                                  int64_t end) {
  const int64_t first = std::max(parameter.begin, begin);
  const int64_t last = std::min(parameter.begin + parameter.value.num_elements(), end);
  if (first >= last) return std::nullopt;
  StatePiece piece;
  piece.name = prefix + parameter.name;
  piece.global_shape = parameter.global_shape;
  piece.box = parameter.box;
  piece.flat_begin = first - parameter.begin;
  piece.flat_count = last - first;
  piece.data = flat.Flat(first - flat_origin, last - first);
  return piece;
}

// The moments of this rank's share; the same pieces are what is saved and what is loaded.
std::vector<StatePiece> MomentPieces(TrainingStage& stage) {
  std::vector<StatePiece> pieces;
  const ParameterStore& parameters = stage.parameters();
  for (const OptimizerShard& shard : stage.optimizer().shards()) {
    const int64_t end = shard.begin + shard.count;
    for (const int id : parameters.buckets()[shard.bucket].parameters) {
      for (const auto& [prefix, moment] :
           {std::pair{kFirstMoment, &shard.m}, std::pair{kSecondMoment, &shard.v}}) {
        auto piece = PieceOf(parameters.at(id), prefix, *moment, shard.begin, shard.begin, end);
        if (piece) pieces.push_back(*std::move(piece));
      }
    }
  }
  return pieces;
}

// Values: an even cut of each bucket over the ranks that share it, as ZeRO-1 cuts it, whether the
// group trains or not.
std::vector<StatePiece> ValuePieces(TrainingStage& stage, const ChangedParameters& changed) {
  std::vector<StatePiece> pieces;
  const ParameterStore& parameters = stage.parameters();
  for (const Bucket& bucket : parameters.buckets()) {
    const Communicator& axis = AxisOf(bucket.group, stage.axes());
    const int64_t share = bucket.count / axis.size();
    const int64_t begin = bucket.begin + share * axis.rank();
    for (const int id : bucket.parameters) {
      const Parameter& parameter = parameters.at(id);
      if (changed.count(parameter.name) == 0) continue;
      auto piece =
          PieceOf(parameter, "", parameters.buffer(bucket.group).value, 0, begin, begin + share);
      if (piece) pieces.push_back(*std::move(piece));
    }
  }
  return pieces;
}

// What this stage changes: its trained groups, and the router bias where gradients reach the
// router.
void AddChanged(TrainingStage& stage, ChangedParameters& changed) {
  for (const Parameter& parameter : stage.parameters().parameters()) {
    const bool bias =
        parameter.group == ParameterGroup::kBuffer && stage.recipe().bias_update_speed != 0;
    if (!parameter.grad.empty() || bias) changed.insert(parameter.name);
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

std::string JobId() {
  const char* job = std::getenv("SLURM_JOB_ID");
  return absl::StrCat(job == nullptr ? "" : std::string(job) + "-", ::getpid());
}

}  // namespace

absl::Status LoadStage(TrainingStage& stage, const WeightSource& source, StateReader* state,
                       bool with_moments, ChangedParameters& changed) {
  for (const Parameter& parameter : stage.parameters().parameters()) {
    if (state != nullptr && state->manifest().Find(parameter.name) != nullptr) {
      RETURN_IF_ERROR(state->Read(parameter.name, parameter.box, 0, parameter.value.num_elements(),
                                  parameter.value.dtype(), parameter.value.raw()));
      changed.insert(parameter.name);
    } else {
      RETURN_IF_ERROR(source.Load(parameter.name, parameter.box, parameter.value.dtype(),
                                  parameter.value.raw()));
    }
  }
  AddChanged(stage, changed);
  if (!with_moments) return absl::OkStatus();
  for (const StatePiece& piece : MomentPieces(stage)) {
    RETURN_IF_ERROR(state->Read(piece.name, piece.box, piece.flat_begin, piece.flat_count,
                                piece.data.dtype(), piece.data.raw()));
  }
  return absl::OkStatus();
}

std::map<std::string, std::string> IdentityOf(const RunConfig& run, const WeightSource& source) {
  std::map<std::string, std::string> identity;
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
    identity[key + "precision.compute"] = std::string(Name(stage.precision.compute));
    identity[key + "data.train"] = absl::StrJoin(
        stage.data.train, " ",
        [](std::string* out, const DataSource& s) { absl::StrAppend(out, s.path, "*", s.weight); });
  }
  return identity;
}

absl::Status CheckIdentity(const StateMetadata& state,
                           const std::map<std::string, std::string>& identity,
                           const std::string& directory) {
  std::vector<std::string> differences;
  for (const auto& [key, value] : identity) {
    const auto saved = state.extra.find("identity." + key);
    const std::string before = saved == state.extra.end() ? "(absent)" : saved->second;
    if (before != value)
      differences.push_back(
          absl::StrCat("  ", key, ": the state has ", before, ", the run file ", value));
  }
  if (differences.empty()) return absl::OkStatus();
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
    ASSIGN_OR_RETURN(StateReader reader, OpenState(resume.path, world));
    return std::optional<StateReader>(std::move(reader));
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
