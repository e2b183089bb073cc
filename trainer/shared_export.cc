#include "trainer/shared_export.h"

#include <optional>

#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "parallel/agree.h"

namespace baleen {
namespace {

std::string HashOf(const std::string& text) {
  return Hash128({reinterpret_cast<const uint8_t*>(text.data()), text.size()});
}

// Everything that decides what a rank writes, and where.
std::string Identity(const ExportRequest& request, const ExportPlan& plan) {
  std::string text = HashOf(plan.config_json);
  for (const ShardPlan::Shard& shard : plan.shards.shards) {
    absl::StrAppend(&text, shard.file, HashOf(shard.header));
  }
  for (const ExportTensor& tensor : plan.tensors) {
    absl::StrAppend(&text, static_cast<int>(tensor.from), tensor.origin);
  }
  if (request.source != nullptr) absl::StrAppend(&text, request.source->SourceHash());
  return HashOf(text);
}

absl::Status ComparePlans(const std::string& mine, Communicator& world) {
  const std::string first = BroadcastString(world, "export plan", mine, 0);
  return Agree(world, mine == first
                          ? absl::OkStatus()
                          : DataError("checkpoint export: this rank plans another checkpoint than "
                                      "rank 0; every rank must see the same files"));
}

absl::Status WriteShare(const ExportRequest& request, const ExportPlan& plan,
                        const TensorValues& values, const Communicator& world, HfWriter& writer) {
  BandBuffer buffer;
  for (const size_t index : ShareOf(plan, world.rank(), world.size())) {
    RETURN_IF_ERROR(ExportOne(plan.tensors[index], request.source, values, buffer, writer));
  }
  return writer.Sync();
}

// The names this rank has written. Its files are closed on return: rank 0 may then remove the
// directory on any file system (NFS keeps an entry for a file that somebody has open).
absl::StatusOr<std::string> WriteAttachedShare(const ExportRequest& request, const ExportPlan& plan,
                                               const TensorValues& values,
                                               const Communicator& world,
                                               const std::string& staging) {
  absl::StatusOr<HfWriter> writer = HfWriter::Attach(staging, plan.shards);
  if (!writer.ok()) {
    return Annotate(writer.status(),
                    "checkpoint export: a rank cannot open what rank 0 created; every rank must "
                    "see the same directory");
  }
  RETURN_IF_ERROR(WriteShare(request, plan, values, world, *writer));
  return absl::StrJoin(writer->written(), "\n");
}

}  // namespace

absl::Status ExportShared(const ExportRequest& request, const TensorValues& values,
                          const std::string& directory, Communicator& world) {
  const absl::StatusOr<ExportPlan> plan = PlanExport(request);
  RETURN_IF_ERROR(Agree(world, plan.status()));
  RETURN_IF_ERROR(ComparePlans(Identity(request, *plan), world));

  std::optional<HfWriter> writer;  // rank 0's; going out of scope unfinished, it removes everything
  absl::Status status;
  if (world.rank() == 0) {
    HfWriterFiles files{.config_json = plan->config_json};
    if (request.source != nullptr) files.copy_from = request.source->directory();
    absl::StatusOr<HfWriter> created = HfWriter::Create(directory, plan->shards, std::move(files));
    status = created.status();
    if (created.ok()) writer.emplace(*std::move(created));
  }
  RETURN_IF_ERROR(Agree(world, status));
  const std::string staging = BroadcastString(
      world, "export directory", writer ? writer->staging_directory() : std::string(), 0);

  std::string written;
  if (writer) {
    status = WriteShare(request, *plan, values, world, *writer);
  } else {
    absl::StatusOr<std::string> names = WriteAttachedShare(request, *plan, values, world, staging);
    status = names.status();
    if (names.ok()) written = *std::move(names);
  }
  RETURN_IF_ERROR(Agree(world, status));
  const std::vector<std::string> all_written = AllGatherStrings(world, "export names", written);
  if (writer) {
    for (const std::string& names : all_written) {
      writer->AddWritten(absl::StrSplit(names, '\n', absl::SkipEmpty()));
    }
    status = writer->Finish();
  }
  return Agree(world, status);
}

}  // namespace baleen
