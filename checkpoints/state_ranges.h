// Flat ranges of boxes as boxes: the geometry under saving and loading on any layout.
//
// The elements [begin, end) of a row-major box are at most 2 * rank - 1 boxes: the rest of a row,
// whole rows, the start of a row, in each dimension. Two pieces then meet where two boxes meet.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "checkpoints/state_manifest.h"
#include "kernels/core/box.h"
#include "kernels/core/status.h"

namespace baleen {

// Boxes of the global tensor, in the row-major order of `box`.
std::vector<Box> RangeBoxes(const Box& box, int64_t flat_begin, int64_t flat_count);

// Row-major index inside `box` of the element with this global index.
int64_t FlatIndex(const Box& box, const Shape& index);

// "box [0, 4] + [8, 4], elements 0 to 16 of 32"
std::string PieceString(const Box& box, int64_t flat_begin, int64_t flat_count);

// Shapes have at most 8 dimensions, each extent at least 1, fewer than 2^62 elements; the piece
// lies inside.
absl::Status CheckShape(absl::string_view what, const Shape& shape);
absl::Status CheckPiece(absl::string_view what, const Shape& shape, const Box& box,
                        int64_t flat_begin, int64_t flat_count);

// Every element is in exactly one piece. DataError names the tensor and two pieces that overlap, or
// how many elements are missing. `files` are the names that PieceRecord::file counts.
absl::Status CheckCoverage(const TensorRecord& tensor, const std::vector<FileRecord>& files);

}  // namespace baleen
