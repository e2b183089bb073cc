#include "trainer/svg_chart.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace baleen {
namespace {

constexpr double kWidth = 760, kHeight = 260, kLeft = 64, kRight = 16, kTop = 30, kBottom = 44;
constexpr const char* kColors[] = {"#1769aa", "#c2410c", "#15803d", "#7e22ce",
                                   "#b91c1c", "#0f766e", "#a16207", "#4b5563"};

struct Range {
  double low = INFINITY, high = -INFINITY;
  void Add(double value) {
    low = std::min(low, value);
    high = std::max(high, value);
  }
};

// Steps of 1, 2 or 5 times a power of ten, about `count` of them.
double TickStep(const Range& range, int count) {
  const double raw = (range.high - range.low) / count;
  const double power = std::pow(10, std::floor(std::log10(raw)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (raw <= factor * power) return factor * power;
  }
  return 10 * power;
}

struct Frame {
  Range x, y;
  double X(double value) const {
    return kLeft + (value - x.low) / (x.high - x.low) * (kWidth - kLeft - kRight);
  }
  double Y(double value) const {
    return kHeight - kBottom - (value - y.low) / (y.high - y.low) * (kHeight - kTop - kBottom);
  }
};

void AppendAxes(const Frame& frame, std::string& svg) {
  const double y_step = TickStep(frame.y, 5), x_step = TickStep(frame.x, 8);
  for (double v = std::ceil(frame.y.low / y_step) * y_step; v <= frame.y.high; v += y_step) {
    absl::StrAppendFormat(&svg, "<line x1='%g' x2='%g' y1='%.1f' y2='%.1f' stroke='#e5e7eb'/>",
                          kLeft, kWidth - kRight, frame.Y(v), frame.Y(v));
    absl::StrAppendFormat(&svg, "<text x='%g' y='%.1f' text-anchor='end'>%.4g</text>", kLeft - 6,
                          frame.Y(v) + 4, v);
  }
  for (double v = std::ceil(frame.x.low / x_step) * x_step; v <= frame.x.high; v += x_step) {
    absl::StrAppendFormat(&svg, "<text x='%.1f' y='%g' text-anchor='middle'>%.6g</text>",
                          frame.X(v), kHeight - kBottom + 16, v);
  }
}

}  // namespace

std::string HtmlEscape(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string SvgLineChart(const Chart& chart) {
  Frame frame;
  size_t longest = 0;
  for (const ChartSeries& series : chart.series) {
    size_t finite = 0;
    for (const auto& [x, y] : series.points) {
      if (!std::isfinite(y)) continue;
      frame.x.Add(x);
      frame.y.Add(y);
      ++finite;
    }
    longest = std::max(longest, finite);
  }
  if (longest < 2 || frame.x.low == frame.x.high) return "";
  const double margin = frame.y.high > frame.y.low ? 0.05 * (frame.y.high - frame.y.low)
                                                   : std::fabs(frame.y.low) * 0.05 + 1e-9;
  frame.y.low -= margin;
  frame.y.high += margin;

  std::string svg =
      absl::StrFormat("<svg viewBox='0 0 %g %g' role='img'><text x='%g' y='18' class='t'>%s</text>",
                      kWidth, kHeight, kLeft, HtmlEscape(chart.title));
  AppendAxes(frame, svg);
  for (const auto& [x, label] : chart.marks) {
    if (x < frame.x.low || x > frame.x.high) continue;
    absl::StrAppendFormat(
        &svg, "<line x1='%.1f' x2='%.1f' y1='%g' y2='%g' stroke='#9ca3af' stroke-dasharray='3 3'/>",
        frame.X(x), frame.X(x), kTop, kHeight - kBottom);
    absl::StrAppendFormat(&svg, "<text x='%.1f' y='%g'>%s</text>", frame.X(x) + 3, kTop + 10,
                          HtmlEscape(label));
  }
  double legend = kLeft;
  for (size_t i = 0; i < chart.series.size(); ++i) {
    const ChartSeries& series = chart.series[i];
    const char* color = kColors[i % std::size(kColors)];
    std::string points;
    for (const auto& [x, y] : series.points) {
      if (std::isfinite(y)) absl::StrAppendFormat(&points, "%.1f,%.1f ", frame.X(x), frame.Y(y));
    }
    absl::StrAppendFormat(&svg,
                          "<polyline fill='none' stroke='%s' stroke-width='1.6'%s points='%s'/>",
                          color, series.dashed ? " stroke-dasharray='6 4'" : "", points);
    absl::StrAppendFormat(&svg, "<text x='%.1f' y='%g' fill='%s'>%s</text>", legend, kHeight - 8,
                          color, HtmlEscape(series.name));
    legend += 14 + 7.0 * static_cast<double>(series.name.size());
  }
  absl::StrAppendFormat(&svg, "<text x='%g' y='%g' text-anchor='end'>%s</text></svg>",
                        kWidth - kRight, kHeight - 8, HtmlEscape(chart.x_label));
  return svg;
}

std::string SvgHeatMap(const HeatMap& map) {
  if (map.values.empty() || map.values[0].empty()) return "";
  const double cell =
      std::min(28.0, (kWidth - kLeft - kRight) / static_cast<double>(map.values[0].size()));
  const double height = kTop + cell * static_cast<double>(map.values.size()) + 8;
  std::string svg =
      absl::StrFormat("<svg viewBox='0 0 %g %g' role='img'><text x='%g' y='18' class='t'>%s</text>",
                      kWidth, height, kLeft, HtmlEscape(map.title));
  for (size_t r = 0; r < map.values.size(); ++r) {
    const double y = kTop + cell * static_cast<double>(r);
    absl::StrAppendFormat(&svg, "<text x='%g' y='%.1f' text-anchor='end'>%s</text>", kLeft - 6,
                          y + cell / 2 + 4, HtmlEscape(map.row_names[r]));
    for (size_t c = 0; c < map.values[r].size(); ++c) {
      const double value = map.values[r][c];
      // Blue below the middle, orange above; full colour at 0 and at twice the middle.
      const double t = std::clamp((value - map.middle) / map.middle, -1.0, 1.0);
      const int fade = static_cast<int>(std::lround(255 * (1 - std::fabs(t))));
      const std::string color = t < 0 ? absl::StrFormat("rgb(%d,%d,255)", fade, fade)
                                      : absl::StrFormat("rgb(255,%d,%d)", 128 + fade / 2, fade);
      absl::StrAppendFormat(
          &svg,
          "<rect x='%.1f' y='%.1f' width='%.1f' height='%.1f' fill='%s'><title>%.3f</title></rect>",
          kLeft + cell * static_cast<double>(c), y, cell - 1, cell - 1, color, value);
    }
  }
  return svg + "</svg>";
}

}  // namespace baleen
