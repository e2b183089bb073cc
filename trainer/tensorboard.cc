// TensorBoard event files without protobuf: the few fields of Event and Summary that scalars need,
// written by hand.
//
// Record = u64 length, u32 masked CRC-32C of those 8 bytes, data, u32 masked CRC-32C of data;
// mask(c) = rotr(c, 15) + 0xa282ead8. Event {1 wall_time: double, 2 step: int64, 3 file_version:
// string, 5 summary}; Summary {1 value}; Value {1 tag: string, 2 simple_value: float}. Readers
// check the CRC and drop everything after a bad one.
#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstring>

#include "kernels/core/file.h"
#include "trainer/crc32c.h"
#include "trainer/metrics.h"

namespace baleen {

uint32_t Crc32c(absl::string_view data) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> entries{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t crc = i;
      for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82f63b78u : 0);
      entries[i] = crc;
    }
    return entries;
  }();
  uint32_t crc = ~0u;
  for (const char c : data) crc = (crc >> 8) ^ table[(crc ^ static_cast<unsigned char>(c)) & 0xff];
  return ~crc;
}

namespace {

template <typename T>
void AppendRaw(std::string& out, T value) {
  char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  out.append(bytes, sizeof(T));
}

void AppendVarint(std::string& out, uint64_t value) {
  while (value >= 0x80) {
    out.push_back(static_cast<char>(value | 0x80));
    value >>= 7;
  }
  out.push_back(static_cast<char>(value));
}

// Protobuf key: field number and wire type (0 varint, 1 fixed64, 2 bytes, 5 fixed32).
void AppendKey(std::string& out, int field, int wire) {
  AppendVarint(out, static_cast<uint64_t>(field << 3 | wire));
}

void AppendBytes(std::string& out, int field, absl::string_view bytes) {
  AppendKey(out, field, 2);
  AppendVarint(out, bytes.size());
  out.append(bytes.data(), bytes.size());
}

std::string Record(const std::string& data) {
  const auto masked = [](absl::string_view bytes) {
    return std::rotr(Crc32c(bytes), 15) + 0xa282ead8u;
  };
  std::string length;
  AppendRaw(length, static_cast<uint64_t>(data.size()));
  std::string record = length;
  AppendRaw(record, masked(length));
  record += data;
  AppendRaw(record, masked(data));
  return record;
}

double WallTime() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

class TensorBoardSink : public MetricsSink {
 public:
  TensorBoardSink(FileDescriptor file, std::string path, const Log& log)
      : file_(std::move(file)), path_(std::move(path)), log_(log) {
    std::string event;
    AppendTime(event);
    AppendBytes(event, 3, "brain.Event:2");
    Write(Record(event));
  }

  void Step(const StepRecord& r) override {
    summary_.clear();
    Add("train/lm_loss", r.lm_loss);
    Add("train/mtp_loss", r.mtp_loss);
    Add("train/balance_loss", r.balance_loss);
    Add("train/grad_norm_main", r.grad_norm_main);
    Add("train/lr", r.lr);
    Add("train/skipped_steps", static_cast<double>(r.skipped_steps));
    Add("dsa/indexer_kl", r.indexer_kl);
    Add("dsa/grad_norm_indexer", r.grad_norm_indexer);
    Add("dsa/topk_mass", r.topk_mass);
    Add("dsa/topk_mass_of_best", r.topk_mass_of_best);
    Add("dsa/recall_at_k", r.recall_at_k);
    Add("dsa/topk_ties", r.topk_ties);
    Add("moe/expert_load_max_over_mean", r.expert_load_max_over_mean);
    Add("moe/expert_load_min", r.expert_load_min);
    Add("perf/step_seconds", r.step_seconds);
    Add("perf/tokens_per_second", r.tokens_per_second);
    Add("perf/mfu", r.mfu);
    Add("perf/memory_peak_bytes", static_cast<double>(r.memory_peak_bytes));
    WriteEvent(r.step);
  }
  void Validation(const ValidationRecord& r) override {
    summary_.clear();
    Add("validation/lm_loss", r.lm_loss);
    Add("validation/mtp_loss", r.mtp_loss);
    WriteEvent(r.step);
  }

 private:
  static void AppendTime(std::string& event) {
    AppendKey(event, 1, 1);
    AppendRaw(event, WallTime());
  }
  void Add(absl::string_view tag, std::optional<double> value) {
    if (!value) return;
    std::string one;
    AppendBytes(one, 1, tag);
    AppendKey(one, 2, 5);
    AppendRaw(one, static_cast<float>(*value));
    AppendBytes(summary_, 1, one);
  }
  void WriteEvent(int64_t step) {
    std::string event;
    AppendTime(event);
    AppendKey(event, 2, 0);
    AppendVarint(event, static_cast<uint64_t>(step));
    AppendBytes(event, 5, summary_);
    Write(Record(event));
  }
  void Write(const std::string& record) {
    const ssize_t n = ::write(file_.get(), record.data(), record.size());
    if (n == static_cast<ssize_t>(record.size()) || complained_) return;
    complained_ = true;
    log_.Error(path_, ": cannot write, training goes on: ", std::strerror(errno));
  }

  FileDescriptor file_;
  std::string path_;
  Log log_;
  std::string summary_;
  bool complained_ = false;
};

}  // namespace

absl::StatusOr<std::unique_ptr<MetricsSink>> OpenTensorBoardSink(const std::string& directory,
                                                                 const Log& log) {
  RETURN_IF_ERROR(MakeDirectories(directory));
  char host[128] = "host";
  ::gethostname(host, sizeof(host) - 1);
  const std::string path =
      JoinPath(directory, absl::StrCat("events.out.tfevents.", static_cast<int64_t>(WallTime()),
                                       ".", host, ".", ::getpid(), ".0"));
  FileDescriptor file(::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644));
  if (!file) return EnvironmentError(path, ": cannot create: ", std::strerror(errno));
  return std::make_unique<TensorBoardSink>(std::move(file), path, log);
}

}  // namespace baleen
