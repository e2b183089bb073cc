#include "checkpoints/state_writer.h"

#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "checkpoints/hdf5_file.h"
#include "checkpoints/state_directory.h"
#include "checkpoints/state_io.h"
#include "checkpoints/state_ranges.h"
#include "checkpoints/state_reader.h"
#include "kernels/core/file.h"

namespace baleen {
namespace {

constexpr char kLatestName[] = "latest";

bool Exists(const std::string& path) {
  struct stat info;
  return ::lstat(path.c_str(), &info) == 0;
}

absl::Status CheckFreeSpace(const std::string& dir, int64_t bytes_needed) {
  if (bytes_needed == 0) return absl::OkStatus();
  struct statvfs info;
  if (::statvfs(dir.c_str(), &info) != 0) {
    return EnvironmentError(dir, ": cannot ask for free space: ", std::strerror(errno));
  }
  const double free_bytes = static_cast<double>(info.f_bavail) * static_cast<double>(info.f_frsize);
  if (free_bytes >= static_cast<double>(bytes_needed)) return absl::OkStatus();
  return EnvironmentError(
      dir, ": a state needs ", bytes_needed, " bytes (",
      absl::StrFormat("%.1f", static_cast<double>(bytes_needed) / 1e9), " GB), free are ",
      static_cast<int64_t>(free_bytes),
      "; make room, or keep fewer states (checkpoint.keep; 0 keeps all of them)");
}

std::string HashOf(const Tensor& data) {
  return Hash128(absl::MakeConstSpan(static_cast<const uint8_t*>(data.raw()),
                                     static_cast<size_t>(data.bytes())));
}

void CheckWritable(const StatePiece& piece) {
  CHECK(!piece.name.empty());
  CHECK(piece.data.device().kind == DeviceKind::kCpu)
      << piece.name << ": copy it to the host first";
  CHECK_OK(CheckShape(piece.name, piece.global_shape));
  CHECK_OK(
      CheckPiece(piece.name, piece.global_shape, piece.box, piece.flat_begin, piece.flat_count));
  CHECK_EQ(piece.data.num_elements(), piece.flat_count) << piece.name;
}

absl::StatusOr<RankFileRecord> WritePieces(const std::string& path,
                                           const std::vector<StatePiece>& pieces) {
  ASSIGN_OR_RETURN(Hdf5Writer file, Hdf5Writer::Create(path));
  std::map<std::string, TensorRecord> tensors;
  std::set<std::string> datasets;
  for (const StatePiece& piece : pieces) {
    if (piece.flat_count == 0) continue;
    CheckWritable(piece);
    // A rank may hold several pieces of a tensor; only the first can have its very name.
    std::string dataset = piece.name;
    for (int n = 1; !datasets.insert(dataset).second; ++n)
      dataset = absl::StrCat(piece.name, ".piece", n);
    TensorRecord& tensor =
        tensors
            .try_emplace(piece.name,
                         TensorRecord{piece.name, piece.data.dtype(), piece.global_shape, {}})
            .first->second;
    CHECK(tensor.dtype == piece.data.dtype() && tensor.shape == piece.global_shape) << piece.name;
    tensor.pieces.push_back(
        {0, dataset, piece.box, piece.flat_begin, piece.flat_count, HashOf(piece.data)});
    RETURN_IF_ERROR(file.WriteDataset(dataset, piece.data.dtype(), piece.data.raw(),
                                      piece.flat_count,
                                      {{"global_shape", piece.global_shape},
                                       {"box_offset", piece.box.offset},
                                       {"box_extent", piece.box.extent},
                                       {"flat_range", {piece.flat_begin, piece.flat_count}}}));
  }
  ASSIGN_OR_RETURN(const Hdf5Writer::Finished finished, file.Finish());
  RankFileRecord record;
  record.file = {Basename(path), finished.bytes, finished.hash};
  for (auto& [name, tensor] : tensors) record.tensors.push_back(std::move(tensor));
  return record;
}

// The temporary directory holds the files of the manifest, each with its size, and nothing else.
absl::Status CheckFiles(const std::string& temp_dir, const StateManifest& manifest) {
  ASSIGN_OR_RETURN(const std::vector<std::string> names, ListNames(temp_dir));
  std::set<std::string> unexpected(names.begin(), names.end());
  for (const FileRecord& file : manifest.files) {
    unexpected.erase(file.name);
    ASSIGN_OR_RETURN(const OpenedFile opened, OpenStateFile(JoinPath(temp_dir, file.name)));
    if (opened.bytes != file.bytes) {
      return DataError(JoinPath(temp_dir, file.name), ": found ", opened.bytes,
                       " bytes, the rank wrote ", file.bytes);
    }
  }
  if (unexpected.empty()) return absl::OkStatus();
  return DataError(temp_dir, ": holds ", *unexpected.begin(), ", which no rank wrote");
}

// Everything up to the rename; nothing of it is visible to a reader.
absl::Status Prepare(const std::string& temp_dir, const std::string& final_dir,
                     const StateMetadata& metadata, const std::vector<RankFileRecord>& records) {
  ASSIGN_OR_RETURN(const StateManifest manifest, JoinRankFiles(metadata, records));
  RETURN_IF_ERROR(CheckFiles(temp_dir, manifest));
  const std::string text = manifest.ToJson();
  const std::string path = JoinPath(temp_dir, kManifestName);
  RETURN_IF_ERROR(
      WriteFileDurably(path, text));  // syncs the directory, and so the rank files' names
  ASSIGN_OR_RETURN(const std::string read_back,
                   ReadStateText(path, static_cast<int64_t>(text.size())));
  if (read_back != text) return EnvironmentError(path, ": reads back other than it was written");
  // rename(2) would replace an empty directory.
  if (Exists(final_dir))
    return EnvironmentError(final_dir, ": exists already; a state is never overwritten");
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::string> BeginState(const std::string& dir, int64_t step, const std::string& id,
                                       int64_t bytes_needed) {
  CHECK_GE(step, 0);
  CHECK(!id.empty() && id.find('/') == std::string::npos) << id;
  RETURN_IF_ERROR(MakeDirectories(dir));
  const std::string final_dir = JoinPath(dir, StateDirectoryName(step));
  if (Exists(final_dir)) {
    return EnvironmentError(final_dir, ": exists already; a state is never overwritten");
  }
  RETURN_IF_ERROR(CheckFreeSpace(dir, bytes_needed));
  const std::string temp_dir = absl::StrCat(final_dir, ".tmp.", id);
  if (::mkdir(temp_dir.c_str(), 0750) != 0) {
    return EnvironmentError(temp_dir, ": cannot create: ", std::strerror(errno));
  }
  return temp_dir;
}

int64_t StateBytes(const std::vector<StatePiece>& pieces) {
  // Per dataset: header, attributes, chunk index; per chunk: its checksum and address.
  constexpr int64_t kFileBytes = 64 << 10, kDatasetBytes = 2 << 10, kPerChunkBytes = 32;
  int64_t bytes = kFileBytes;
  for (const StatePiece& piece : pieces) {
    bytes += kDatasetBytes + piece.data.bytes() +
             kPerChunkBytes * (piece.data.bytes() / kHdf5ChunkBytes + 1);
  }
  return bytes;
}

absl::StatusOr<RankFileRecord> WriteRankFile(const std::string& temp_dir, int rank,
                                             const std::vector<StatePiece>& pieces) {
  const std::string path = JoinPath(temp_dir, absl::StrFormat("rank-%05d.h5", rank));
  absl::StatusOr<RankFileRecord> record = WritePieces(path, pieces);
  if (record.ok()) {
    if (absl::Status synced = SyncDirectory(temp_dir); !synced.ok()) record = synced;
  }
  if (!record.ok()) ::unlink(path.c_str());
  return record;
}

absl::StatusOr<PublishedState> PublishState(const std::string& dir, const std::string& temp_dir,
                                            const StateMetadata& metadata,
                                            const std::vector<RankFileRecord>& records) {
  PublishedState published;
  published.directory = JoinPath(dir, StateDirectoryName(metadata.step));
  absl::Status status = Prepare(temp_dir, published.directory, metadata, records);
  if (status.ok() && ::rename(temp_dir.c_str(), published.directory.c_str()) != 0) {
    status = EnvironmentError(temp_dir, ": cannot rename to ", published.directory, ": ",
                              std::strerror(errno));
  }
  if (!status.ok()) {
    DiscardState(temp_dir);
    return Annotate(status, absl::StrCat("saving step ", metadata.step));
  }
  // From here on the state is complete and visible; only a power loss could still take its name
  // away.
  RETURN_IF_ERROR(
      Annotate(SyncDirectory(dir),
               absl::StrCat(published.directory, " is written, but may not survive a power loss")));
  const absl::Status hint = WriteFileDurably(JoinPath(dir, kLatestName),
                                             absl::StrCat(StateDirectoryName(metadata.step), "\n"));
  if (!hint.ok()) published.warning = std::string(hint.message());
  return published;
}

void DiscardState(const std::string& temp_dir) {
  CHECK(ParseStateName(Basename(temp_dir)).entry == StateEntry::kTemporary) << temp_dir;
  RemoveDirectory(temp_dir).IgnoreError();
}

absl::StatusOr<std::vector<std::string>> SweepTemporary(const std::string& dir) {
  ASSIGN_OR_RETURN(const std::vector<std::string> names, ListNames(dir));
  std::vector<std::string> removed;
  for (const std::string& name : names) {
    const std::string path = JoinPath(dir, name);
    if (ParseStateName(name).entry == StateEntry::kTemporary) {
      RETURN_IF_ERROR(RemoveDirectory(path));
      removed.push_back(path);
    } else if (absl::StartsWith(name, absl::StrCat(kLatestName, ".tmp."))) {
      ::unlink(path.c_str());
      removed.push_back(path);
    }
  }
  return removed;
}

absl::StatusOr<PruneResult> PruneStates(const std::string& dir, int keep) {
  PruneResult result;
  ASSIGN_OR_RETURN(result.removed, SweepTemporary(dir));
  ASSIGN_OR_RETURN(std::vector<std::string> states, ListNames(dir));
  std::erase_if(states, [](const std::string& name) {
    return ParseStateName(name).entry != StateEntry::kState;
  });
  std::sort(states.begin(), states.end(), [](const std::string& a, const std::string& b) {
    return ParseStateName(a).step > ParseStateName(b).step;
  });
  int verified = 0;
  for (const std::string& name : states) {
    const std::string path = JoinPath(dir, name);
    if (verified < std::max(keep, 2)) {
      const bool whole = StateReader::Open(path).ok();
      if (!whole) result.damaged.push_back(path);
      verified += whole;
      continue;
    }
    const std::string going = absl::StrCat(path, ".tmp.prune");
    if (::rename(path.c_str(), going.c_str()) != 0) {
      return EnvironmentError(path, ": cannot rename to ", going, ": ", std::strerror(errno));
    }
    RETURN_IF_ERROR(RemoveDirectory(going));
    result.removed.push_back(path);
  }
  return result;
}

}  // namespace baleen
