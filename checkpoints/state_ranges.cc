#include "checkpoints/state_ranges.h"

#include <algorithm>

namespace baleen {
namespace {

// Elements of one index of dimension `dim` of the box: the product of the extents behind it.
int64_t Stride(const Shape& extent, size_t dim) {
  int64_t stride = 1;
  for (size_t d = dim + 1; d < extent.size(); ++d) stride *= extent[d];
  return stride;
}

// Appends [begin, end) of `box`, which counts from its dimension `dim` on: the ones before have
// extent 1.
void AppendRange(const Box& box, size_t dim, int64_t begin, int64_t end, std::vector<Box>& boxes) {
  if (begin >= end) return;
  if (dim == box.extent.size()) {
    boxes.push_back(box);
    return;
  }
  const int64_t stride = Stride(box.extent, dim);
  const auto rows = [&](int64_t first, int64_t count) {
    Box part = box;
    part.offset[dim] += first;
    part.extent[dim] = count;
    return part;
  };
  const int64_t first = begin / stride, last = end / stride;
  if (begin % stride == 0 && end % stride == 0) {
    boxes.push_back(rows(first, last - first));
  } else if (first == (end - 1) / stride) {
    AppendRange(rows(first, 1), dim + 1, begin - first * stride, end - first * stride, boxes);
  } else {
    const int64_t whole = (begin + stride - 1) / stride;
    AppendRange(rows(first, 1), dim + 1, begin % stride, begin % stride == 0 ? 0 : stride, boxes);
    if (whole < last) boxes.push_back(rows(whole, last - whole));
    AppendRange(rows(last, 1), dim + 1, 0, end % stride, boxes);
  }
}

struct Part {
  Box box;
  size_t piece;
};

int64_t FirstRow(const Part& part) { return part.box.offset.empty() ? 0 : part.box.offset[0]; }
int64_t RowsEnd(const Part& part) {
  return part.box.offset.empty() ? 1 : part.box.offset[0] + part.box.extent[0];
}

}  // namespace

std::vector<Box> RangeBoxes(const Box& box, int64_t flat_begin, int64_t flat_count) {
  std::vector<Box> boxes;
  AppendRange(box, 0, flat_begin, flat_begin + flat_count, boxes);
  return boxes;
}

int64_t FlatIndex(const Box& box, const Shape& index) {
  int64_t flat = 0;
  for (size_t d = 0; d < index.size(); ++d) {
    flat = flat * box.extent[d] + (index[d] - box.offset[d]);
  }
  return flat;
}

std::string PieceString(const Box& box, int64_t flat_begin, int64_t flat_count) {
  return absl::StrCat("box ", ShapeString(box.offset), " + ", ShapeString(box.extent),
                      ", elements ", flat_begin, " to ", flat_begin + flat_count, " of ",
                      NumElements(box.extent));
}

absl::Status CheckShape(absl::string_view what, const Shape& shape) {
  constexpr int64_t kMostElements = int64_t{1} << 62;
  if (shape.size() > 8) {
    return DataError(what, ": shape ", ShapeString(shape), " has more than 8 dimensions");
  }
  int64_t elements = 1;
  for (const int64_t extent : shape) {
    if (extent < 1 || extent > kMostElements / elements) {
      return DataError(what, ": shape ", ShapeString(shape),
                       ": extents must be at least 1 and their product at most 2^62");
    }
    elements *= extent;
  }
  return absl::OkStatus();
}

absl::Status CheckPiece(absl::string_view what, const Shape& shape, const Box& box,
                        int64_t flat_begin, int64_t flat_count) {
  bool inside = box.offset.size() == shape.size() && box.extent.size() == shape.size();
  for (size_t d = 0; inside && d < shape.size(); ++d) {
    inside = box.offset[d] >= 0 && box.extent[d] >= 1 && box.extent[d] <= shape[d] &&
             box.offset[d] <= shape[d] - box.extent[d];
  }
  if (!inside) {
    return DataError(what, ": box ", ShapeString(box.offset), " + ", ShapeString(box.extent),
                     " is not inside the shape ", ShapeString(shape));
  }
  const int64_t elements = NumElements(box.extent);
  if (flat_begin < 0 || flat_count < 1 || flat_begin > elements ||
      flat_count > elements - flat_begin) {
    return DataError(what, ": elements ", flat_begin, " + ", flat_count,
                     " are not inside a box of ", elements, " elements");
  }
  return absl::OkStatus();
}

absl::Status CheckCoverage(const TensorRecord& tensor, const std::vector<FileRecord>& files) {
  const auto describe = [&](size_t i) {
    const PieceRecord& piece = tensor.pieces[i];
    return absl::StrCat(PieceString(piece.box, piece.flat_begin, piece.flat_count), " (",
                        files[static_cast<size_t>(piece.file)].name, ")");
  };
  std::vector<Part> parts;
  int64_t covered = 0;
  for (size_t i = 0; i < tensor.pieces.size(); ++i) {
    const PieceRecord& piece = tensor.pieces[i];
    covered += piece.flat_count;
    for (Box& box : RangeBoxes(piece.box, piece.flat_begin, piece.flat_count)) {
      parts.push_back({std::move(box), i});
    }
  }
  // Sweep over the first dimension: only parts that share rows are compared.
  std::stable_sort(parts.begin(), parts.end(),
                   [](const Part& a, const Part& b) { return FirstRow(a) < FirstRow(b); });
  std::vector<const Part*> open;
  for (const Part& part : parts) {
    open.erase(std::remove_if(open.begin(), open.end(),
                              [&](const Part* other) { return RowsEnd(*other) <= FirstRow(part); }),
               open.end());
    for (const Part* other : open) {
      if (!Intersect(part.box, other->box)) continue;
      return DataError("tensor ", tensor.name, " ", ShapeString(tensor.shape),
                       ": elements are in two pieces: ", describe(other->piece), " and ",
                       describe(part.piece));
    }
    open.push_back(&part);
  }
  const int64_t missing = NumElements(tensor.shape) - covered;
  if (missing == 0) return absl::OkStatus();
  return DataError("tensor ", tensor.name, " ", ShapeString(tensor.shape), ": ", missing, " of ",
                   NumElements(tensor.shape), " elements are in no piece; there are ",
                   tensor.pieces.size(), " pieces, the first ", describe(0));
}

}  // namespace baleen
