// HDF5 files of our own: what is written, and what is refused when read.
#include <gtest/gtest.h>
#include <hdf5.h>

#include <functional>

#include "checkpoints/hdf5_file.h"
#include "kernels/core/file.h"
#include "tests/checkpoints/state_support.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::HasStatus;
using testing::IsOk;
using testing::TemporaryDirectory;

constexpr auto kDataLoss = absl::StatusCode::kDataLoss;
constexpr auto kEnvironment = absl::StatusCode::kFailedPrecondition;

TEST(Hdf5File, HoldsWhatWasWrittenAndTheHashOfTheFile) {
  const TemporaryDirectory dir;
  const std::string path = dir.path() + "/a.h5";
  std::vector<double> values(3'000'000);
  for (size_t i = 0; i < values.size(); ++i) values[i] = 1.0 / static_cast<double>(i + 1);
  const int64_t one = -5;
  ASSERT_OK_AND_ASSIGN(Hdf5Writer writer, Hdf5Writer::Create(path));
  ASSERT_THAT(writer.WriteDataset("m/x", DType::kF64, values.data(), 3'000'000,
                                  {{"box", {1, 2}}, {"none", {}}}),
              IsOk());
  ASSERT_THAT(writer.WriteDataset("m/n/y", DType::kI64, &one, 1, {}), IsOk());
  ASSERT_OK_AND_ASSIGN(const Hdf5Writer::Finished finished, writer.Finish());
  EXPECT_EQ(HashFile(path).value(), finished.hash);
  EXPECT_EQ(static_cast<int64_t>(testing::ReadText(path).size()), finished.bytes);
  EXPECT_LT(finished.bytes, 24'000'000 + 10'000) << "chunks of equal size waste nothing";

  ASSERT_OK_AND_ASSIGN(const Hdf5Reader reader, Hdf5Reader::Open(path));
  ASSERT_OK_AND_ASSIGN(const Hdf5Dataset x, reader.OpenDataset("m/x", DType::kF64));
  ASSERT_OK_AND_ASSIGN(const Hdf5Dataset y, reader.OpenDataset("m/n/y", DType::kI64));
  EXPECT_EQ(x.count(), 3'000'000);
  std::vector<double> found(2'000'001);
  ASSERT_THAT(x.Read(700'000, 2'000'001, found.data()), IsOk());
  EXPECT_TRUE(std::equal(found.begin(), found.end(), values.begin() + 700'000));
  int64_t other = 0;
  ASSERT_THAT(y.Read(0, 1, &other), IsOk());
  EXPECT_EQ(other, -5);
  EXPECT_THAT(y.Read(1, 1, &other), HasStatus(kDataLoss, "has 1 elements, asked for 1 + 1"));
  EXPECT_THAT(reader.OpenDataset("m/z", DType::kF64), HasStatus(kDataLoss, "m/z"));
  EXPECT_THAT(reader.OpenDataset("m/x", DType::kF32), HasStatus(kDataLoss, "are not F32"));
  EXPECT_THAT(Hdf5Writer::Create(path), HasStatus(kEnvironment, "cannot create: File exists"));
}

TEST(Hdf5File, RefusesStateThatChangedWhileItWasSaved) {
  const TemporaryDirectory dir;
  std::vector<float> values(5'000, 1.0f);
  ASSERT_OK_AND_ASSIGN(Hdf5Writer writer, Hdf5Writer::Create(dir.path() + "/a.h5"));
  ASSERT_THAT(writer.WriteDataset("x", DType::kF32, values.data(), 5'000, {}), IsOk());
  values[4'321] = 2.0f;
  EXPECT_THAT(writer.Finish(), HasStatus(kEnvironment, "read back differ from memory"));
}

TEST(Hdf5File, ANameThatIsAlsoAGroupIsAnError) {
  const TemporaryDirectory dir;
  const float value = 1;
  ASSERT_OK_AND_ASSIGN(Hdf5Writer writer, Hdf5Writer::Create(dir.path() + "/a.h5"));
  ASSERT_THAT(writer.WriteDataset("x", DType::kF32, &value, 1, {}), IsOk());
  EXPECT_THAT(writer.WriteDataset("x/y", DType::kF32, &value, 1, {}),
              HasStatus(kEnvironment, "group x"));
}

// Files made with the bare library, as we never write them.
void MakeForeign(const std::string& path, const std::function<void(hid_t file)>& fill) {
  const hid_t file = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  ASSERT_GE(file, 0);
  fill(file);
  ASSERT_GE(H5Fclose(file), 0);
}

void MakeDataset(hid_t file, const char* name, const std::function<void(hid_t creation)>& configure,
                 std::vector<hsize_t> extents) {
  const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
  configure(creation);
  const hid_t space = H5Screate_simple(static_cast<int>(extents.size()), extents.data(), nullptr);
  const hid_t id =
      H5Dcreate2(file, name, H5T_IEEE_F32LE, space, H5P_DEFAULT, creation, H5P_DEFAULT);
  ASSERT_GE(id, 0);
  H5Dclose(id);
  H5Sclose(space);
  H5Pclose(creation);
}

TEST(Hdf5File, RefusesWhatItNeverWrites) {
  const TemporaryDirectory dir;
  const std::string path = dir.path() + "/foreign.h5";
  const hsize_t chunk = 8, chunk_2d[2] = {4, 2};
  MakeForeign(path, [&](hid_t file) {
    MakeDataset(file, "contiguous", [](hid_t) {}, {8});
    MakeDataset(file, "external", [](hid_t c) { H5Pset_external(c, "/etc/hostname", 0, 32); }, {8});
    MakeDataset(file, "unchecked", [&](hid_t c) { H5Pset_chunk(c, 1, &chunk); }, {8});
    MakeDataset(
        file, "two_filters",
        [&](hid_t c) { H5Pset_chunk(c, 1, &chunk), H5Pset_shuffle(c), H5Pset_fletcher32(c); }, {8});
    MakeDataset(file, "shuffled", [&](hid_t c) { H5Pset_chunk(c, 1, &chunk), H5Pset_shuffle(c); },
                {8});
    MakeDataset(file, "matrix",
                [&](hid_t c) { H5Pset_chunk(c, 2, chunk_2d), H5Pset_fletcher32(c); }, {4, 2});
    MakeDataset(file, "good", [&](hid_t c) { H5Pset_chunk(c, 1, &chunk), H5Pset_fletcher32(c); },
                {8});
    H5Lcreate_soft("/good", file, "soft", H5P_DEFAULT, H5P_DEFAULT);
    H5Lcreate_external("/dev/null", "/x", file, "elsewhere", H5P_DEFAULT, H5P_DEFAULT);
  });
  ASSERT_OK_AND_ASSIGN(const Hdf5Reader reader, Hdf5Reader::Open(path));
  EXPECT_THAT(reader.OpenDataset("good", DType::kF32), IsOk());
  for (const char* name : {"contiguous", "external", "matrix"}) {
    EXPECT_THAT(reader.OpenDataset(name, DType::kF32),
                HasStatus(kDataLoss, "expected one-dimensional chunks"))
        << name;
  }
  for (const char* name : {"unchecked", "two_filters", "shuffled"}) {
    EXPECT_THAT(reader.OpenDataset(name, DType::kF32), HasStatus(kDataLoss, "Fletcher32")) << name;
  }
  for (const char* name : {"soft", "elsewhere", "elsewhere/y"}) {
    EXPECT_THAT(reader.OpenDataset(name, DType::kF32), HasStatus(kDataLoss, "is a link")) << name;
  }
  testing::WriteText(path, "not HDF5 at all");
  EXPECT_THAT(Hdf5Reader::Open(path), HasStatus(kDataLoss, "HDF5 cannot open the file"));
}

}  // namespace
}  // namespace baleen
