#include "trainer/environment.h"

#include <link.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "checkpoints/hdf5_version.h"
#include "kernels/core/cuda_context.h"
#include "kernels/core/cuda_versions.h"
#include "nlohmann/json.hpp"
#include "parallel/agree.h"
#include "parallel/mpi_communicator.h"
#include "parallel/nccl_library.h"
#include "trainer/version.h"

namespace baleen {
namespace {

constexpr absl::string_view kGnuNote("GNU", sizeof("GNU"));  // its NUL is part of the name

// The whole of a file in /proc, whose size is not known before it is read; empty without it.
std::string ReadProc(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

// The build id among the notes in [note, end), in hexadecimal; empty where there is none.
std::string BuildIdAmong(const char* note, const char* end, size_t alignment) {
  const auto rounded = [&](size_t bytes) {
    return (bytes + alignment - 1) / alignment * alignment;
  };
  ElfW(Nhdr) header;
  while (note + sizeof(header) <= end) {
    std::memcpy(&header, note, sizeof(header));
    const char* const name = note + sizeof(header);
    const char* const value = note + rounded(sizeof(header) + header.n_namesz);
    if (header.n_type == NT_GNU_BUILD_ID && absl::string_view(name, header.n_namesz) == kGnuNote) {
      return absl::BytesToHexString(absl::string_view(value, header.n_descsz));
    }
    note = value + rounded(header.n_descsz);
  }
  return "";
}

// What the linker noted in this binary; a version number says less about a build.
std::string BuildId() {
  std::string id;
  const auto visit = [](dl_phdr_info* binary, size_t, void* found) {
    for (int i = 0; i < binary->dlpi_phnum; ++i) {
      const ElfW(Phdr)& segment = binary->dlpi_phdr[i];
      const char* const begin = reinterpret_cast<const char*>(binary->dlpi_addr + segment.p_vaddr);
      std::string& text = *static_cast<std::string*>(found);
      if (segment.p_type == PT_NOTE && text.empty()) {
        text = BuildIdAmong(begin, begin + segment.p_memsz, segment.p_align == 8 ? 8 : 4);
      }
    }
    return 1;  // the program comes first; its shared libraries, which would follow, have their own
  };
  dl_iterate_phdr(visit, &id);
  return id;
}

std::string HostName() {
  char host[256] = "";
  ::gethostname(host, sizeof(host) - 1);
  return host;
}

std::string GpuName(const Context& context) {
  if constexpr (kHaveCuda) {
    if (context.device().kind == DeviceKind::kCuda) return context.cuda().properties().name;
  }
  return "";
}

std::map<std::string, std::string> Libraries(const Context& context) {
  std::map<std::string, std::string> versions;
  if constexpr (kHaveCuda) {
    if (context.device().kind == DeviceKind::kCuda) {
      versions = CudaVersions();
      versions["nccl"] = NcclVersion();
    }
  }
  versions["mpi"] = MpiLibraryVersion();
  versions["hdf5"] = Hdf5Version();
  for (auto it = versions.begin(); it != versions.end();) {
    it = it->second.empty() ? versions.erase(it) : std::next(it);
  }
  return versions;
}

// Text of each rank -> the ranks that have it; a rank without one is left out.
std::map<std::string, std::string> RanksOf(const std::vector<std::string>& text_of_rank) {
  std::map<std::string, std::vector<int>> ranks;
  for (size_t r = 0; r < text_of_rank.size(); ++r) {
    if (!text_of_rank[r].empty()) ranks[text_of_rank[r]].push_back(static_cast<int>(r));
  }
  std::map<std::string, std::string> ranges;
  for (const auto& [text, list] : ranks) ranges[text] = RankRanges(list);
  return ranges;
}

}  // namespace

std::string RankRanges(const std::vector<int>& ranks) {
  std::string text;
  for (size_t i = 0; i < ranks.size();) {
    size_t end = i + 1;
    while (end < ranks.size() && ranks[end] == ranks[end - 1] + 1) ++end;
    absl::StrAppend(&text, text.empty() ? "" : ",", ranks[i]);
    if (end - i > 1) absl::StrAppend(&text, "-", ranks[end - 1]);
    i = end;
  }
  return text;
}

std::string GatherEnvironmentJson(const Context& context, Communicator& world) {
  const auto hosts = RanksOf(AllGatherStrings(world, "hosts", HostName()));
  const auto gpus = RanksOf(AllGatherStrings(world, "GPUs", GpuName(context)));
  nlohmann::ordered_json json;
  json["baleen"] = kVersion;
  if (const std::string id = BuildId(); !id.empty()) json["build_id"] = id;
  json["compiler"] = __VERSION__;
  const std::string command = ReadProc("/proc/self/cmdline");  // each word ends with a NUL
  std::vector<std::string> words = absl::StrSplit(command, '\0');
  words.pop_back();
  json["command"] = words;
  std::error_code error;
  json["directory"] = std::filesystem::current_path(error).string();
  json["host"] = HostName();
  json["pid"] = ::getpid();
  json["world_size"] = world.size();
  json["hosts"] = hosts;
  if (!gpus.empty()) json["gpus"] = gpus;
  json["libraries"] = Libraries(context);
  for (const char* name :
       {"SLURM_JOB_ID", "SLURM_NNODES", "SLURM_RESTART_COUNT", "OMPI_COMM_WORLD_SIZE",
        "CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_NVLS_ENABLE"}) {
    const char* value = std::getenv(name);
    if (value != nullptr) json["variables"][name] = value;
  }
  // A word that is no UTF-8 must not end the run.
  return json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

}  // namespace baleen
