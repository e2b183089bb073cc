// Line charts and heat maps as inline SVG: no script, no outside reference.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace baleen {

struct ChartSeries {
  std::string name;
  std::vector<std::pair<double, double>>
      points;  // x ascending; values that are not finite are left out
  bool dashed = false;
};

struct Chart {
  std::string title;
  std::string x_label;
  std::vector<ChartSeries> series;
  // Vertical marks: x and label (where a training stage begins).
  std::vector<std::pair<double, std::string>> marks;
};

// Empty when no series has two points.
std::string SvgLineChart(const Chart& chart);

// rows x cols values as coloured cells, white at `middle`.
struct HeatMap {
  std::string title;
  std::vector<std::string> row_names;
  std::vector<std::vector<double>> values;
  double middle = 1;
};
std::string SvgHeatMap(const HeatMap& map);

// & < > " escaped.
std::string HtmlEscape(const std::string& text);

}  // namespace baleen
