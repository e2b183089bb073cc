// What the training-state tests share: layouts, and the values every element must have.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "checkpoints/state_manifest.h"
#include "checkpoints/state_piece.h"
#include "checkpoints/state_reader.h"
#include "kernels/core/context.h"
#include "tests/support/temporary_directory.h"

namespace baleen::testing {

struct TestTensor {
  std::string name;
  Shape shape;
  DType dtype;
};

// The value of a global element: a function of tensor, step and index, with all bits in use.
uint64_t ElementBits(const TestTensor& tensor, int64_t step, int64_t flat_index);

// A piece with its elements filled in by index arithmetic of its own (one element at a time).
StatePiece FilledPiece(const TestTensor& tensor, int64_t step, const Box& box, int64_t flat_begin,
                       int64_t flat_count);
// Allocated, zero.
StatePiece EmptyPiece(const TestTensor& tensor, const Box& box, int64_t flat_begin,
                      int64_t flat_count, DType dtype);

// For each rank its pieces, without data: every element exactly once.
struct PlacedPiece {
  size_t tensor;
  Box box;
  int64_t flat_begin;
  int64_t flat_count;
};
using Layout = std::vector<std::vector<PlacedPiece>>;
// Cuts every tensor into a random grid of boxes, each box into random flat ranges, and deals them
// to `ranks` ranks.
Layout RandomLayout(const std::vector<TestTensor>& tensors, int ranks, std::mt19937_64& random);
// Every tensor whole on rank 0.
Layout WholeLayout(const std::vector<TestTensor>& tensors);

StateMetadata TestMetadata(int64_t step);
// Begin, write every rank's file, publish.
absl::StatusOr<std::string> SaveState(const std::string& dir, int64_t step,
                                      const std::vector<TestTensor>& tensors, const Layout& layout);
// Reads every piece of the layout; an error tells which element differs.
absl::Status CheckState(StateReader& reader, int64_t step, const std::vector<TestTensor>& tensors,
                        const Layout& layout);

// A few tensors of all kinds and ranks, small.
std::vector<TestTensor> SmallTensors();

std::string ReadText(const std::string& path);
void WriteText(const std::string& path, const std::string& text);
// Manifest text with `from` replaced by `to` (which must occur) and the hash made right again.
void EditManifest(const std::string& step_dir, const std::string& from, const std::string& to);

}  // namespace baleen::testing
