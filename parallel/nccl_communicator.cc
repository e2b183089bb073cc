#include "parallel/nccl_communicator.h"

#include <nccl.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>
#include <future>
#include <thread>

#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/core/log.h"
#include "parallel/agree.h"
#include "parallel/mpi_communicator.h"
#include "parallel/nccl_library.h"

namespace baleen {
namespace {

constexpr int kExitEnvironment = 3;
constexpr int kExitHang = 76;
// What one communicator shows of its record when all of a process are printed.
constexpr uint64_t kShownCalls = 8;
constexpr auto kAbortTime = std::chrono::seconds(5);

ncclDataType_t NcclType(const Tensor& tensor) {
  switch (tensor.dtype()) {
    case DType::kF64:
      return ncclFloat64;
    case DType::kF32:
      return ncclFloat32;
    case DType::kBF16:
      return ncclBfloat16;
    case DType::kI64:
      return ncclInt64;
    case DType::kI32:
      return ncclInt32;
    default:
      CHECK(false) << "NCCL: cannot reduce " << tensor.DebugString();
      __builtin_unreachable();
  }
}

// Where two tensors of one call lie; on all ranks the same, so empty ones count too.
bool OnHost(const Tensor& a, const Tensor& b, const std::string& label) {
  CHECK(!a.empty() && !b.empty()) << label << ": a tensor without storage has no device";
  CHECK(a.device() == b.device()) << label << ": host and device tensors in one call";
  return a.device().kind == DeviceKind::kCpu;
}

class NcclCommunicator;

// The communicators that were split from one: an error in one ends them all.
struct Family {
  Context context;
  NcclOptions options;
  std::vector<NcclCommunicator*> members;
  int watcher = -1;

  Family(const Context& context, const NcclOptions& options);
  ~Family() { context.cuda().RemoveWatcher(watcher); }
  // Looks for asynchronous errors, and whether the wait is too long.
  void Watch(double seconds);
  [[noreturn]] void Fail(const std::string& message, int exit_code);
};

void DestroyComm(ncclComm_t comm) {
  if (const ncclResult_t result = ncclCommDestroy(comm); result != ncclSuccess) {
    WriteLog(Severity::kWarning, "", absl::StrCat("ncclCommDestroy: ", ncclGetErrorString(result)));
  }
}
using OwnedComm = Owned<ncclComm_t, &DestroyComm>;

class NcclCommunicator : public Communicator {
 public:
  NcclCommunicator(std::unique_ptr<Communicator> host, OwnedComm comm,
                   std::shared_ptr<Family> family)
      : Communicator(host->rank(), host->size(), host->name()),
        host_(std::move(host)),
        family_(std::move(family)),
        comm_(std::move(comm)),
        done_(kRing) {
    family_->members.push_back(this);
  }

  // NCCL ends a communicator when its work is done; a rank that is gone would let it wait for ever,
  // so the wait is one that notices.
  ~NcclCommunicator() override {
    if (comm_) {
      cuda().HostWait(cuda().Record(cuda().compute_stream()));
      cuda().HostWait(cuda().Record(cuda().communication_stream()));
      cuda().HostWait(cuda().Record(cuda().exchange_stream()));
    }
    comm_.Reset();
    std::erase(family_->members, this);
  }

  std::unique_ptr<Communicator> Split(int color, int key, std::string name) override;

  void Fork() override { forked_ = true; }
  void Join() override {
    forked_ = false;
    if (!beside_ && sent_.empty()) return;
    cuda().Order(cuda().compute_stream(), cuda().Record(cuda().communication_stream()));
    // Freed memory goes back in the order of the compute stream, which is behind them now.
    held_.clear();
    sent_.clear();
    beside_ = false;
  }

  ncclComm_t comm() const { return comm_.get(); }
  ncclComm_t ReleaseComm() { return comm_.Release(); }

 protected:
  void DoAllReduce(const Tensor& tensor, ReduceOp op) override {
    if (OnHost(tensor, tensor, current_label())) {
      return host_->AllReduce(current_label(), tensor, op);
    }
    const bool integers = tensor.dtype() == DType::kI32 || tensor.dtype() == DType::kI64;
    CHECK(op == ReduceOp::kSum || integers)
        << current_label() << ": NCCL's maximum of floats may lose a NaN";
    Collective({tensor}, [&](cudaStream_t stream) {
      return ncclAllReduce(tensor.raw(), tensor.raw(), tensor.num_elements(), NcclType(tensor),
                           op == ReduceOp::kSum ? ncclSum : ncclMax, comm(), stream);
    });
  }

  void DoAllGather(const Tensor& part, const Tensor& whole) override {
    if (OnHost(part, whole, current_label())) {
      return host_->AllGather(current_label(), part, whole);
    }
    Collective({part, whole}, [&](cudaStream_t stream) {
      if (size() == 1) return CopyBytes(whole.raw(), part.raw(), part.bytes(), stream);
      return ncclAllGather(part.raw(), whole.raw(), part.bytes(), ncclUint8, comm(), stream);
    });
  }

  void DoReduceScatter(const Tensor& whole, const Tensor& part) override {
    if (OnHost(part, whole, current_label())) {
      return host_->ReduceScatter(current_label(), whole, part);
    }
    Collective({whole, part}, [&](cudaStream_t stream) {
      if (size() == 1) return CopyBytes(part.raw(), whole.raw(), part.bytes(), stream);
      return ncclReduceScatter(whole.raw(), part.raw(), part.num_elements(), NcclType(part),
                               ncclSum, comm(), stream);
    });
  }

  void DoAllToAllV(const Tensor& send, const std::vector<int64_t>& send_counts, const Tensor& recv,
                   const std::vector<int64_t>& recv_counts) override {
    if (OnHost(send, recv, current_label())) {
      return host_->AllToAllV(current_label(), send, send_counts, recv, recv_counts);
    }
    Collective({send, recv}, [&](cudaStream_t stream) {
      return Exchange(send, send_counts, recv, recv_counts, stream);
    });
  }

  void DoBeginAllToAllV(const Tensor& send, const std::vector<int64_t>& send_counts,
                        const Tensor& recv, const std::vector<int64_t>& recv_counts) override {
    if (OnHost(send, recv, current_label())) {
      return host_->AllToAllV(current_label(), send, send_counts, recv, recv_counts);
    }
    if (beside_ || !sent_.empty()) {
      cuda().Order(cuda().exchange_stream(), cuda().Record(cuda().communication_stream()));
    }
    Begin({send, recv}, cuda().exchange_stream(), [&](cudaStream_t stream) {
      return Exchange(send, send_counts, recv, recv_counts, stream);
    });
  }

  void DoBeginAllGather(const Tensor& part, const Tensor& whole) override {
    if (OnHost(part, whole, current_label())) {
      return host_->AllGather(current_label(), part, whole);
    }
    Begin({part, whole}, cuda().communication_stream(), [&](cudaStream_t stream) {
      if (size() == 1) return CopyBytes(whole.raw(), part.raw(), part.bytes(), stream);
      return ncclAllGather(part.raw(), whole.raw(), part.bytes(), ncclUint8, comm(), stream);
    });
  }

  void DoBroadcast(const Tensor& tensor, int root) override {
    if (OnHost(tensor, tensor, current_label())) {
      return host_->Broadcast(current_label(), tensor, root);
    }
    Collective({tensor}, [&](cudaStream_t stream) {
      return ncclBroadcast(tensor.raw(), tensor.raw(), tensor.bytes(), ncclUint8, root, comm(),
                           stream);
    });
  }

  void DoSend(const Tensor& tensor, int to) override {
    if (OnHost(tensor, tensor, current_label())) return host_->Send(current_label(), tensor, to);
    ReleaseSent();
    OrderAfterCompute();
    Check(ncclSend(tensor.raw(), tensor.bytes(), ncclUint8, to, comm(), Beside()), "ncclSend");
    sent_.push_back({tensor, MarkDone(Beside())});
  }

  void DoRecv(const Tensor& tensor, int from) override {
    if (OnHost(tensor, tensor, current_label())) return host_->Recv(current_label(), tensor, from);
    // Not before the compute stream: that is where the tensor's memory had its last owner.
    OrderAfterCompute();
    Check(ncclRecv(tensor.raw(), tensor.bytes(), ncclUint8, from, comm(), Beside()), "ncclRecv");
    cuda().Order(cuda().compute_stream(), *MarkDone(Beside()));
  }

  void Wait(uint64_t call) override {
    const Begun* last = nullptr;
    for (const Begun& begun : begun_) {
      if (begun.call <= call) last = &begun;
    }
    if (last == nullptr) return;
    // The last of those waited for ends last: each began behind the one before it.
    cuda().Order(cuda().compute_stream(), *last->done);
    while (!begun_.empty() && begun_.front().call <= call) begun_.pop_front();
  }

  void DoBarrier() override { host_->Barrier(current_label()); }

  bool IsCallDone(uint64_t call) const override {
    const std::shared_ptr<CudaEvent>& event = done_[call % kRing];
    // Asked for when something failed: the state of the device is read, not judged.
    if (event == nullptr) return true;
    const bool done = cudaEventQuery(static_cast<cudaEvent_t>(event->get())) == cudaSuccess;
    cudaGetLastError();
    return done;
  }

 private:
  CudaDevice& cuda() const { return family_->context.cuda(); }
  cudaStream_t Beside() const { return static_cast<cudaStream_t>(cuda().communication_stream()); }

  void OrderAfterCompute() {
    cuda().Order(cuda().communication_stream(), cuda().Record(cuda().compute_stream()));
  }

  static ncclResult_t CopyBytes(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
    if (to == from || bytes == 0) return ncclSuccess;
    CUDA_CHECK(
        cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream));
    return ncclSuccess;
  }

  // Enqueues `call` on the compute stream, or forked on the communication stream.
  template <typename Call>
  void Collective(std::initializer_list<Tensor> tensors, Call call) {
    if (forked_) {
      OrderAfterCompute();
      beside_ = true;
      held_.insert(held_.end(), tensors.begin(), tensors.end());
    } else if (beside_ || !sent_.empty()) {
      // One communicator's calls run in their order, on whichever stream.
      cuda().Order(cuda().compute_stream(), cuda().Record(cuda().communication_stream()));
    }
    void* const stream = forked_ ? cuda().communication_stream() : cuda().compute_stream();
    if (!begun_.empty()) cuda().Order(stream, *begun_.back().done);
    Check(call(static_cast<cudaStream_t>(stream)), "call");
    MarkDone(stream);
  }

  // Enqueues `call` on `stream`, behind what was computed and begun before.
  template <typename Call>
  void Begin(std::vector<Tensor> tensors, void* stream, Call call) {
    cuda().Order(stream, cuda().Record(cuda().compute_stream()));
    if (!begun_.empty() && begun_.back().stream != stream) {
      cuda().Order(stream, *begun_.back().done);
    }
    Check(call(static_cast<cudaStream_t>(stream)), "call");
    begun_.push_back({current_call(), std::move(tensors), stream, MarkDone(stream)});
  }

  // Ranges to and from every rank at once; counts in elements, ranges in rank order.
  ncclResult_t Exchange(const Tensor& send, const std::vector<int64_t>& send_counts,
                        const Tensor& recv, const std::vector<int64_t>& recv_counts,
                        cudaStream_t stream) {
    const int64_t element = DTypeBytes(send.dtype());
    const char* from = static_cast<const char*>(send.raw());
    char* to = static_cast<char*>(recv.raw());
    if (size() > 1) Check(ncclGroupStart(), "ncclGroupStart");
    for (int r = 0; r < size(); ++r) {
      const int64_t sent = send_counts[r] * element, received = recv_counts[r] * element;
      if (r == rank()) {
        CHECK_EQ(sent, received) << current_label() << ": what a rank keeps";
        CopyBytes(to, from, sent, stream);
      } else {
        if (sent > 0) Check(ncclSend(from, sent, ncclUint8, r, comm(), stream), "ncclSend");
        if (received > 0) Check(ncclRecv(to, received, ncclUint8, r, comm(), stream), "ncclRecv");
      }
      from += sent;
      to += received;
    }
    return size() > 1 ? ncclGroupEnd() : ncclSuccess;
  }

  // The event behind the call under way, for the flight record and for who waits.
  std::shared_ptr<CudaEvent> MarkDone(void* stream) {
    std::shared_ptr<CudaEvent>& slot = done_[current_call() % kRing];
    slot = std::make_shared<CudaEvent>(cuda().Record(stream));
    return slot;
  }

  void ReleaseSent() {
    while (!sent_.empty() && cuda().IsDone(*sent_.front().done)) sent_.pop_front();
  }

  void Check(ncclResult_t result, const char* operation) {
    if (result == ncclSuccess) return;
    family_->Fail(absl::StrCat("NCCL ", operation, " failed on ", name(), " rank ", rank(), " (",
                               current_label(), "): ", ncclGetErrorString(result), ": ",
                               ncclGetLastError(comm())),
                  kExitEnvironment);
  }

  struct Sent {
    Tensor tensor;
    std::shared_ptr<CudaEvent> done;
  };

  struct Begun {
    uint64_t call;
    std::vector<Tensor> tensors;
    void* stream;
    std::shared_ptr<CudaEvent> done;
  };

  std::unique_ptr<Communicator> host_;
  std::shared_ptr<Family> family_;
  OwnedComm comm_;  // empty for one rank
  bool forked_ = false;
  bool beside_ = false;                           // something of Fork is not joined
  std::vector<Tensor> held_;                      // until Join
  std::deque<Sent> sent_;                         // until done
  std::deque<Begun> begun_;                       // until Wait, in the order of the calls
  std::vector<std::shared_ptr<CudaEvent>> done_;  // of the last calls, by number
};

Family::Family(const Context& context, const NcclOptions& options)
    : context(context), options(options) {
  watcher = context.cuda().AddWatcher([this](double seconds) { Watch(seconds); });
}

void Family::Watch(double seconds) {
  for (NcclCommunicator* member : members) {
    if (member->comm() == nullptr) continue;
    ncclResult_t error = ncclSuccess;
    const ncclResult_t asked = ncclCommGetAsyncError(member->comm(), &error);
    if (asked == ncclSuccess && (error == ncclSuccess || error == ncclInProgress)) continue;
    Fail(absl::StrCat("NCCL: asynchronous error on ", member->name(), " rank ", member->rank(),
                      ": ", ncclGetErrorString(asked == ncclSuccess ? error : asked), ": ",
                      ncclGetLastError(member->comm())),
         kExitEnvironment);
  }
  if (seconds > options.hang_seconds) {
    Fail(absl::StrCat("the GPU has not answered for ", static_cast<int64_t>(seconds),
                      " s: a rank stopped, or a collective waits for a call that never comes. A "
                      "rank whose record ends earlier than the others' is the one to look at"),
         kExitHang);
  }
}

void Family::Fail(const std::string& message, int exit_code) {
  std::string records;
  for (const NcclCommunicator* member : members) {
    absl::StrAppend(&records, member->FlightRecord(kShownCalls));
  }
  WriteLog(Severity::kError, "", absl::StrCat(message, "\n", records));
  // Ends NCCL's kernels on the device. It may itself wait for a peer, so not for long.
  std::vector<ncclComm_t> comms;
  for (NcclCommunicator* member : members) {
    if (ncclComm_t comm = member->ReleaseComm()) comms.push_back(comm);
  }
  auto aborted = std::make_shared<std::promise<void>>();
  std::future<void> all = aborted->get_future();
  std::thread([comms = std::move(comms), aborted] {
    for (ncclComm_t comm : comms) ncclCommAbort(comm);
    aborted->set_value();
  }).detach();
  all.wait_for(kAbortTime);
  AbortAllRanks("stopping all ranks (the reason is above)", exit_code);
}

// A unique id of rank 0, on all ranks.
ncclUniqueId ShareUniqueId(Communicator& host, ncclResult_t* result) {
  const Context cpu = Context::Cpu();
  const Tensor bytes = cpu.Zeros(DType::kU8, {static_cast<int64_t>(sizeof(ncclUniqueId)) + 1});
  ncclUniqueId id = {};
  *result = ncclSuccess;
  if (host.rank() == 0) {
    *result = ncclGetUniqueId(&id);
    std::memcpy(bytes.raw(), &id, sizeof(id));
    bytes.data<uint8_t>()[sizeof(id)] = static_cast<uint8_t>(*result);
  }
  host.Broadcast("nccl id", bytes, 0);
  std::memcpy(&id, bytes.raw(), sizeof(id));
  *result = static_cast<ncclResult_t>(bytes.data<uint8_t>()[sizeof(id)]);
  return id;
}

ncclConfig_t ConfigFor(const std::string& name) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.commName = name.c_str();
  // Communicators that share their buffers run one after the other: no overlap then.
  config.splitShare = 0;
  return config;
}

std::unique_ptr<Communicator> NcclCommunicator::Split(int color, int key, std::string name) {
  CHECK_GE(color, 0) << name;
  auto host = host_->Split(color, key, std::move(name));
  OwnedComm comm;
  if (size() > 1) {
    ncclConfig_t config = ConfigFor(host->name());
    ncclComm_t part = nullptr;
    // A rank alone needs no communicator of NCCL's, but takes part in the call.
    const int part_color = host->size() > 1 ? color : NCCL_SPLIT_NOCOLOR;
    // Keys order as for MPI, ties by rank.
    Check(ncclCommSplit(this->comm(), part_color, host->rank(), &part, &config), "ncclCommSplit");
    comm = OwnedComm(part);
  }
  return std::make_unique<NcclCommunicator>(std::move(host), std::move(comm), family_);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> MakeNcclCommunicator(
    const Context& context, std::unique_ptr<Communicator> host, const NcclOptions& options) {
  CHECK(context.device().kind == DeviceKind::kCuda);
  OwnedComm comm;
  if (host->size() > 1) {
    // All ranks learn whether all can load NCCL before any calls it.
    RETURN_IF_ERROR(Agree(*host, LoadNccl()));
    ncclResult_t result = ncclSuccess;
    const ncclUniqueId id = ShareUniqueId(*host, &result);
    ncclComm_t handle = nullptr;
    ncclConfig_t config = ConfigFor(host->name());
    if (result == ncclSuccess) {
      result = ncclCommInitRankConfig(&handle, host->size(), id, host->rank(), &config);
    }
    comm = OwnedComm(handle);
    if (result != ncclSuccess) {
      return EnvironmentError(
          "NCCL did not start on ", host->size(), " ranks: ", ncclGetErrorString(result), ": ",
          ncclGetLastError(nullptr),
          "; NCCL_DEBUG=WARN says more. It needs a GPU per rank and a network interface "
          "(NCCL_SOCKET_IFNAME); for several ranks on one GPU see launch/one_gpu_rank.sh");
    }
  }
  return std::make_unique<NcclCommunicator>(std::move(host), std::move(comm),
                                            std::make_shared<Family>(context, options));
}

}  // namespace baleen
