// NCCL's functions by their own names, each forwarding to the library that LoadNccl opens: the
// binary links no NCCL. One more function of it is one more entry here.
#include "parallel/nccl_library.h"

#include <nccl.h>

#include <type_traits>

#include "kernels/core/shared_library.h"

namespace baleen {
namespace {

// The oldest one that the tests ran with.
constexpr int kFirstVersion = 22803;

absl::StatusOr<SharedLibrary> Open() {
  return SharedLibrary::Open({"libnccl.so.2"}, "NCCL (device communication)");
}

// Looks a function up once; the forwarding function names it.
template <auto kForwarder>
auto* Target(const char* name) {
  using Function = std::remove_pointer_t<decltype(kForwarder)>;
  static Function* const target = [&] {
    const absl::StatusOr<SharedLibrary> library = Open();
    CHECK_OK(library.status());
    return library->Find<Function>(name);
  }();
  return target;
}

}  // namespace

absl::Status LoadNccl() {
  RETURN_IF_ERROR(Open().status());
  int version = 0;
  if (ncclGetVersion(&version) != ncclSuccess || version < kFirstVersion) {
    return EnvironmentError("NCCL ", version, " is loaded, Baleen needs 2.28.3 (", kFirstVersion,
                            ") or newer: put it first in LD_LIBRARY_PATH");
  }
  return absl::OkStatus();
}

std::string NcclVersion() {
  int version = 0;
  if (!Open().ok() || ncclGetVersion(&version) != ncclSuccess) return "";
  return absl::StrCat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

}  // namespace baleen

using baleen::Target;

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
  return Target<&ncclGetVersion>("ncclGetVersion")(version);
}
const char* ncclGetErrorString(ncclResult_t result) {
  return Target<&ncclGetErrorString>("ncclGetErrorString")(result);
}
const char* ncclGetLastError(ncclComm_t comm) {
  return Target<&ncclGetLastError>("ncclGetLastError")(comm);
}
ncclResult_t ncclGetUniqueId(ncclUniqueId* uniqueId) {
  return Target<&ncclGetUniqueId>("ncclGetUniqueId")(uniqueId);
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int nranks, ncclUniqueId commId, int rank,
                                    ncclConfig_t* config) {
  return Target<&ncclCommInitRankConfig>("ncclCommInitRankConfig")(comm, nranks, commId, rank,
                                                                   config);
}
ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* newcomm,
                           ncclConfig_t* config) {
  return Target<&ncclCommSplit>("ncclCommSplit")(comm, color, key, newcomm, config);
}
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  return Target<&ncclCommDestroy>("ncclCommDestroy")(comm);
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  return Target<&ncclCommAbort>("ncclCommAbort")(comm);
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* asyncError) {
  return Target<&ncclCommGetAsyncError>("ncclCommGetAsyncError")(comm, asyncError);
}
ncclResult_t ncclAllReduce(const void* sendbuff, void* recvbuff, size_t count,
                           ncclDataType_t datatype, ncclRedOp_t op, ncclComm_t comm,
                           cudaStream_t stream) {
  return Target<&ncclAllReduce>("ncclAllReduce")(sendbuff, recvbuff, count, datatype, op, comm,
                                                 stream);
}
ncclResult_t ncclAllGather(const void* sendbuff, void* recvbuff, size_t sendcount,
                           ncclDataType_t datatype, ncclComm_t comm, cudaStream_t stream) {
  return Target<&ncclAllGather>("ncclAllGather")(sendbuff, recvbuff, sendcount, datatype, comm,
                                                 stream);
}
ncclResult_t ncclReduceScatter(const void* sendbuff, void* recvbuff, size_t recvcount,
                               ncclDataType_t datatype, ncclRedOp_t op, ncclComm_t comm,
                               cudaStream_t stream) {
  return Target<&ncclReduceScatter>("ncclReduceScatter")(sendbuff, recvbuff, recvcount, datatype,
                                                         op, comm, stream);
}
ncclResult_t ncclBroadcast(const void* sendbuff, void* recvbuff, size_t count,
                           ncclDataType_t datatype, int root, ncclComm_t comm,
                           cudaStream_t stream) {
  return Target<&ncclBroadcast>("ncclBroadcast")(sendbuff, recvbuff, count, datatype, root, comm,
                                                 stream);
}
ncclResult_t ncclSend(const void* sendbuff, size_t count, ncclDataType_t datatype, int peer,
                      ncclComm_t comm, cudaStream_t stream) {
  return Target<&ncclSend>("ncclSend")(sendbuff, count, datatype, peer, comm, stream);
}
ncclResult_t ncclRecv(void* recvbuff, size_t count, ncclDataType_t datatype, int peer,
                      ncclComm_t comm, cudaStream_t stream) {
  return Target<&ncclRecv>("ncclRecv")(recvbuff, count, datatype, peer, comm, stream);
}
ncclResult_t ncclGroupStart() { return Target<&ncclGroupStart>("ncclGroupStart")(); }
ncclResult_t ncclGroupEnd() { return Target<&ncclGroupEnd>("ncclGroupEnd")(); }

}  // extern "C"
