#include "parallel/mpi_communicator.h"

#include <mpi.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "kernels/core/check.h"
#include "kernels/core/owned.h"

namespace baleen {
namespace {

// MPI counts are int: longer messages go in pieces of at most this many bytes.
constexpr int64_t kPieceBytes = int64_t{1} << 30;
constexpr int kTag = 1;

void FreeCommunicator(MPI_Comm communicator) {
  int finalized = 0;
  MPI_Finalized(&finalized);
  if (!finalized) MPI_Comm_free(&communicator);
}

// a[i] = op(a[i], b[i]).
template <typename T>
void Reduce(T* a, const T* b, int64_t count, ReduceOp op) {
  if (op == ReduceOp::kSum) {
    for (int64_t i = 0; i < count; ++i) a[i] += b[i];
  } else {
    // A NaN must survive a maximum: it is a sign that something is wrong.
    for (int64_t i = 0; i < count; ++i) a[i] = (b[i] > a[i] || b[i] != b[i]) ? b[i] : a[i];
  }
}

void ReduceBytes(DType dtype, void* a, const void* b, int64_t count, ReduceOp op) {
  switch (dtype) {
    case DType::kF32:
      return Reduce(static_cast<float*>(a), static_cast<const float*>(b), count, op);
    case DType::kF64:
      return Reduce(static_cast<double*>(a), static_cast<const double*>(b), count, op);
    case DType::kI32:
      return Reduce(static_cast<int32_t*>(a), static_cast<const int32_t*>(b), count, op);
    case DType::kI64:
      return Reduce(static_cast<int64_t*>(a), static_cast<const int64_t*>(b), count, op);
    default:
      CHECK(false) << "cannot reduce " << DTypeName(dtype);
  }
}

class MpiCommunicator : public Communicator {
 public:
  MpiCommunicator(MPI_Comm communicator, int rank, int size, std::string name)
      : Communicator(rank, size, std::move(name)), communicator_(communicator) {
    MPI_Comm_set_errhandler(communicator, MPI_ERRORS_RETURN);
  }
  ~MpiCommunicator() override {
    if (communicator_ != MPI_COMM_WORLD) FreeCommunicator(communicator_);
  }

  std::unique_ptr<Communicator> Split(int color, int key, std::string name) override {
    MPI_Comm part = MPI_COMM_NULL;
    Check(MPI_Comm_split(communicator_, color, key, &part), "Split");
    int part_rank = 0, part_size = 0;
    MPI_Comm_rank(part, &part_rank);
    MPI_Comm_size(part, &part_size);
    return std::make_unique<MpiCommunicator>(part, part_rank, part_size, std::move(name));
  }

 protected:
  // Every rank gets the others' range of it and adds in the order of ranks, then all ranges are
  // gathered: the sum does not depend on MPI's algorithm. Ranges differ by at most one element.
  void DoAllReduce(const Tensor& tensor, ReduceOp op) override {
    const int64_t count = tensor.num_elements();
    std::vector<int64_t> counts(size()), begins(size());
    for (int r = 0; r < size(); ++r) {
      begins[r] = count * r / size();
      counts[r] = count * (r + 1) / size() - begins[r];
    }
    const int element = DTypeBytes(tensor.dtype());
    const int64_t mine = counts[rank()];
    std::vector<char> received(std::max<int64_t>(1, mine * size() * element));
    Exchange(static_cast<const char*>(tensor.raw()), counts, begins, received.data(),
             std::vector<int64_t>(size(), mine), element);
    SumInRankOrder(tensor.dtype(), received.data(), mine, op);
    std::vector<char> result(received.begin(), received.begin() + mine * element);
    // Everyone sends its finished range to everyone.
    Exchange(result.data(), std::vector<int64_t>(size(), mine), std::vector<int64_t>(size(), 0),
             static_cast<char*>(tensor.raw()), counts, element);
  }

  void DoAllGather(const Tensor& part, const Tensor& whole) override {
    const int64_t count = part.num_elements();
    const int element = DTypeBytes(part.dtype());
    // The rank's own range may be the source: copy it aside, since MPI forbids overlap.
    std::vector<char> own(static_cast<const char*>(part.raw()),
                          static_cast<const char*>(part.raw()) + part.bytes());
    Exchange(own.data(), std::vector<int64_t>(size(), count), std::vector<int64_t>(size(), 0),
             static_cast<char*>(whole.raw()), std::vector<int64_t>(size(), count), element);
  }

  void DoReduceScatter(const Tensor& whole, const Tensor& part) override {
    const int64_t count = part.num_elements();
    const int element = DTypeBytes(part.dtype());
    std::vector<int64_t> counts(size(), count), begins(size());
    for (int r = 0; r < size(); ++r) begins[r] = r * count;
    std::vector<char> received(count * size() * element);
    Exchange(static_cast<const char*>(whole.raw()), counts, begins, received.data(), counts,
             element);
    SumInRankOrder(part.dtype(), received.data(), count, ReduceOp::kSum);
    std::memcpy(part.raw(), received.data(), part.bytes());
  }

  void DoAllToAllV(const Tensor& send, const std::vector<int64_t>& send_counts, const Tensor& recv,
                   const std::vector<int64_t>& recv_counts) override {
    std::vector<int64_t> begins(size(), 0);
    for (int r = 1; r < size(); ++r) begins[r] = begins[r - 1] + send_counts[r - 1];
    Exchange(static_cast<const char*>(send.raw()), send_counts, begins,
             static_cast<char*>(recv.raw()), recv_counts, DTypeBytes(send.dtype()));
  }

  void DoBroadcast(const Tensor& tensor, int root) override {
    ForPieces(tensor, [&](char* data, int bytes) {
      Check(MPI_Bcast(data, bytes, MPI_BYTE, root, communicator_), "Broadcast");
    });
  }
  void DoSend(const Tensor& tensor, int to) override {
    ForPieces(tensor, [&](char* data, int bytes) {
      Check(MPI_Send(data, bytes, MPI_BYTE, to, kTag, communicator_), "Send");
    });
  }
  void DoRecv(const Tensor& tensor, int from) override {
    ForPieces(tensor, [&](char* data, int bytes) {
      Check(MPI_Recv(data, bytes, MPI_BYTE, from, kTag, communicator_, MPI_STATUS_IGNORE), "Recv");
    });
  }
  void DoBarrier() override { Check(MPI_Barrier(communicator_), "Barrier"); }

 private:
  template <typename Function>
  static void ForPieces(const Tensor& tensor, Function function) {
    char* data = static_cast<char*>(tensor.raw());
    for (int64_t done = 0; done < tensor.bytes(); done += kPieceBytes) {
      function(data + done, static_cast<int>(std::min(kPieceBytes, tensor.bytes() - done)));
    }
  }

  // All-to-all of ranges: counts and begins in elements of `element` bytes; received ranges stand
  // in rank order.
  void Exchange(const char* send, const std::vector<int64_t>& send_counts,
                const std::vector<int64_t>& send_begins, char* recv,
                const std::vector<int64_t>& recv_counts, int element) {
    std::vector<MPI_Request> requests;
    int64_t recv_begin = 0;
    for (int r = 0; r < size(); ++r) {
      char* target = recv + recv_begin * element;
      const int64_t bytes = recv_counts[r] * element;
      recv_begin += recv_counts[r];
      if (r == rank()) {
        if (bytes > 0) std::memcpy(target, send + send_begins[r] * element, bytes);
        continue;
      }
      for (int64_t done = 0; done < bytes; done += kPieceBytes) {
        Check(MPI_Irecv(target + done, static_cast<int>(std::min(kPieceBytes, bytes - done)),
                        MPI_BYTE, r, kTag, communicator_, &requests.emplace_back()),
              "receive");
      }
    }
    for (int step = 1; step < size();
         ++step) {  // start with the next rank: no rank is everyone's first target
      const int r = (rank() + step) % size();
      const int64_t bytes = send_counts[r] * element;
      for (int64_t done = 0; done < bytes; done += kPieceBytes) {
        Check(MPI_Isend(send + send_begins[r] * element + done,
                        static_cast<int>(std::min(kPieceBytes, bytes - done)), MPI_BYTE, r, kTag,
                        communicator_, &requests.emplace_back()),
              "send");
      }
    }
    Check(MPI_Waitall(static_cast<int>(requests.size()), requests.data(), MPI_STATUSES_IGNORE),
          "wait");
  }

  void SumInRankOrder(DType dtype, char* parts, int64_t count, ReduceOp op) {
    const int64_t bytes = count * DTypeBytes(dtype);
    for (int r = 1; r < size(); ++r) ReduceBytes(dtype, parts, parts + r * bytes, count, op);
  }

  void Check(int code, const char* operation) {
    if (code == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING];
    int length = 0;
    MPI_Error_string(code, text, &length);
    AbortAllRanks(absl::StrCat("MPI ", operation, " failed on ", name(), " rank ", rank(), ": ",
                               std::string(text, length), "\n", FlightRecord()),
                  3);
  }

  MPI_Comm communicator_;
};

}  // namespace

std::string MpiLibraryVersion() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = "";
  int length = 0;
  if (MPI_Get_library_version(text, &length) != MPI_SUCCESS) return "";
  return std::string(absl::StripAsciiWhitespace(text));  // to its NUL, which some count in length
}

std::unique_ptr<Communicator> WrapMpiWorld() {
  int rank = 0, size = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return std::make_unique<MpiCommunicator>(MPI_COMM_WORLD, rank, size, "world");
}

// A launcher that this MPI does not know (another MPI's mpirun, srun without --mpi=pmix) starts
// processes that each see a world of one and would each train alone.
absl::Status CheckLauncher(int world_size) {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"}) {
    const char* text = std::getenv(name);
    int started = 0;
    if (world_size == 1 && text != nullptr && absl::SimpleAtoi(text, &started) && started > 1) {
      return EnvironmentError("the launcher started ", started, " processes (", name,
                              "), but MPI sees one: start with Open MPI's mpirun ",
                              "(launch/mpirun.sh) or srun --mpi=pmix");
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<MpiRuntime>> MpiRuntime::Start(int* argc, char*** argv) {
  int provided = 0;
  if (MPI_Init_thread(argc, argv, MPI_THREAD_SERIALIZED, &provided) != MPI_SUCCESS ||
      provided < MPI_THREAD_SERIALIZED) {
    return EnvironmentError("MPI did not start with serialized threads (level ", provided,
                            "): use Open MPI 4.1 or newer, or start with launch/mpirun.sh");
  }
  std::unique_ptr<MpiRuntime> runtime(new MpiRuntime());
  runtime->world_ = WrapMpiWorld();
  RETURN_IF_ERROR(CheckLauncher(runtime->world_->size()));
  MPI_Comm host = MPI_COMM_NULL;
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, runtime->world_->rank(), MPI_INFO_NULL,
                      &host);
  MPI_Comm_rank(host, &runtime->local_rank_);
  MPI_Comm_size(host, &runtime->local_size_);
  MPI_Comm_free(&host);
  return runtime;
}

MpiRuntime::~MpiRuntime() {
  world_.reset();
  MPI_Finalize();
}

void AbortAllRanks(const std::string& message, int exit_code) {
  std::fprintf(stderr, "%s\n", message.c_str());
  std::fflush(stderr);
  int initialized = 0;
  MPI_Initialized(&initialized);
  if (initialized) MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::_Exit(exit_code);
}

}  // namespace baleen
