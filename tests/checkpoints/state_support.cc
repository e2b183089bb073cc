#include "tests/checkpoints/state_support.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <sstream>

#include "checkpoints/state_writer.h"
#include "kernels/core/file.h"
#include "kernels/core/random.h"

namespace baleen::testing {
namespace {

// Global row-major index of element `flat` of a box.
int64_t GlobalIndex(const Shape& shape, const Box& box, int64_t flat) {
  int64_t global = 0, stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    global += (box.offset[d] + flat % box.extent[d]) * stride;
    flat /= box.extent[d];
    stride *= shape[d];
  }
  return global;
}

// `parts` ascending cuts of [0, length), the first 0.
std::vector<int64_t> RandomCuts(int64_t length, int64_t parts, std::mt19937_64& random) {
  std::vector<int64_t> cuts = {0};
  while (static_cast<int64_t>(cuts.size()) < std::min(parts, length)) {
    const int64_t cut = static_cast<int64_t>(random() % static_cast<uint64_t>(length));
    if (std::find(cuts.begin(), cuts.end(), cut) == cuts.end()) cuts.push_back(cut);
  }
  std::sort(cuts.begin(), cuts.end());
  return cuts;
}

std::vector<Box> RandomGrid(const Shape& shape, std::mt19937_64& random) {
  std::vector<Box> boxes = {WholeBox(shape)};
  for (size_t d = 0; d < shape.size(); ++d) {
    std::vector<int64_t> cuts =
        RandomCuts(shape[d], 1 + static_cast<int64_t>(random() % 3), random);
    std::vector<Box> finer;
    for (const Box& box : boxes) {
      for (size_t i = 0; i < cuts.size(); ++i) {
        Box part = box;
        part.offset[d] = cuts[i];
        part.extent[d] = (i + 1 < cuts.size() ? cuts[i + 1] : shape[d]) - cuts[i];
        finer.push_back(part);
      }
    }
    boxes = finer;
  }
  return boxes;
}

}  // namespace

uint64_t ElementBits(const TestTensor& tensor, int64_t step, int64_t flat_index) {
  return RandomStream(static_cast<uint64_t>(step), NameStream(tensor.name))
      .Integer(static_cast<uint64_t>(flat_index));
}

StatePiece EmptyPiece(const TestTensor& tensor, const Box& box, int64_t flat_begin,
                      int64_t flat_count, DType dtype) {
  return {tensor.name, tensor.shape, box,
          flat_begin,  flat_count,   Context::Cpu().Zeros(dtype, {flat_count})};
}

StatePiece FilledPiece(const TestTensor& tensor, int64_t step, const Box& box, int64_t flat_begin,
                       int64_t flat_count) {
  StatePiece piece = EmptyPiece(tensor, box, flat_begin, flat_count, tensor.dtype);
  const size_t bytes = static_cast<size_t>(DTypeBytes(tensor.dtype));
  for (int64_t i = 0; i < flat_count; ++i) {
    const uint64_t bits = ElementBits(tensor, step, GlobalIndex(tensor.shape, box, flat_begin + i));
    std::memcpy(static_cast<char*>(piece.data.raw()) + static_cast<size_t>(i) * bytes, &bits,
                bytes);
  }
  return piece;
}

Layout RandomLayout(const std::vector<TestTensor>& tensors, int ranks, std::mt19937_64& random) {
  Layout layout(static_cast<size_t>(ranks));
  for (size_t t = 0; t < tensors.size(); ++t) {
    for (const Box& box : RandomGrid(tensors[t].shape, random)) {
      const int64_t count = NumElements(box.extent);
      const std::vector<int64_t> cuts =
          RandomCuts(count, 1 + static_cast<int64_t>(random() % 4), random);
      for (size_t i = 0; i < cuts.size(); ++i) {
        const int64_t end = i + 1 < cuts.size() ? cuts[i + 1] : count;
        layout[random() % layout.size()].push_back({t, box, cuts[i], end - cuts[i]});
      }
    }
  }
  return layout;
}

Layout WholeLayout(const std::vector<TestTensor>& tensors) {
  Layout layout(1);
  for (size_t t = 0; t < tensors.size(); ++t) {
    layout[0].push_back({t, WholeBox(tensors[t].shape), 0, NumElements(tensors[t].shape)});
  }
  return layout;
}

StateMetadata TestMetadata(int64_t step) {
  StateMetadata metadata;
  metadata.step = step;
  metadata.stage_name = "indexer-warmup";
  metadata.stage_index = 1;
  metadata.stage_step = step / 2;
  metadata.consumed_samples = 16 * step;
  metadata.consumed_tokens = 8192 * step;
  metadata.seed = 1234;
  metadata.layout = "tp2 dp2";
  metadata.config_hash = "c0ffee";
  metadata.extra = {{"hdf5", "1.10"}, {"data", "{\"position\": 7}"}};
  return metadata;
}

absl::StatusOr<std::string> SaveState(const std::string& dir, int64_t step,
                                      const std::vector<TestTensor>& tensors,
                                      const Layout& layout) {
  ASSIGN_OR_RETURN(const std::string temp_dir, BeginState(dir, step, "job.1", 0));
  std::vector<RankFileRecord> records;
  for (size_t rank = 0; rank < layout.size(); ++rank) {
    std::vector<StatePiece> pieces;
    for (const PlacedPiece& placed : layout[rank]) {
      pieces.push_back(FilledPiece(tensors[placed.tensor], step, placed.box, placed.flat_begin,
                                   placed.flat_count));
    }
    absl::StatusOr<RankFileRecord> record = WriteRankFile(temp_dir, static_cast<int>(rank), pieces);
    // As the trainer does: the record travels as text.
    if (record.ok()) record = RankFileRecord::FromJson(record->ToJson());
    if (!record.ok()) {
      DiscardState(temp_dir);
      return record.status();
    }
    records.push_back(*std::move(record));
  }
  ASSIGN_OR_RETURN(const PublishedState published,
                   PublishState(dir, temp_dir, TestMetadata(step), records));
  return published.directory;
}

absl::Status CheckState(StateReader& reader, int64_t step, const std::vector<TestTensor>& tensors,
                        const Layout& layout) {
  for (const std::vector<PlacedPiece>& pieces : layout) {
    for (const PlacedPiece& placed : pieces) {
      const TestTensor& tensor = tensors[placed.tensor];
      StatePiece found =
          EmptyPiece(tensor, placed.box, placed.flat_begin, placed.flat_count, tensor.dtype);
      RETURN_IF_ERROR(reader.Read(found));
      const StatePiece expected =
          FilledPiece(tensor, step, placed.box, placed.flat_begin, placed.flat_count);
      if (std::memcmp(found.data.raw(), expected.data.raw(),
                      static_cast<size_t>(found.data.bytes())) != 0) {
        return absl::InternalError(
            absl::StrCat(tensor.name, ": wrong values in box ", ShapeString(placed.box.offset),
                         " + ", ShapeString(placed.box.extent), " from ", placed.flat_begin));
      }
    }
  }
  return absl::OkStatus();
}

std::vector<TestTensor> SmallTensors() {
  return {{"adam_m/model.layers.0.mlp.experts.gate_proj.weight", {4, 6, 10}, DType::kF32},
          {"adam_v/model.norm.weight", {33}, DType::kF32},
          {"model.embed_tokens.weight", {19, 8}, DType::kF64},
          {"model.layers.0.mlp.gate.e_score_correction_bias", {16}, DType::kF32},
          {"model.layers.0.self_attn.q_a_proj.weight", {12, 7}, DType::kBF16},
          {"data/position", {}, DType::kI64},
          {"data/counts", {5, 3}, DType::kI32},
          {"rng", {64}, DType::kU8}};
}

std::string ReadText(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  CHECK(in.good()) << path;
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

void WriteText(const std::string& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out << text;
  out.close();
  CHECK(out.good()) << path;
}

void EditManifest(const std::string& step_dir, const std::string& from, const std::string& to) {
  const std::string path = JoinPath(step_dir, kManifestName);
  std::string text = ReadText(path);
  const size_t at = text.find(from);
  CHECK(at != std::string::npos) << from << " in " << text;
  text.replace(at, from.size(), to);
  const size_t digits = text.find("\"hash\": \"") + 9;
  text.replace(digits, 32, std::string(32, '0'));
  text.replace(
      digits, 32,
      Hash128(absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(text.data()), text.size())));
  WriteText(path, text);
}

}  // namespace baleen::testing
